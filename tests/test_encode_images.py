"""Images and texts become a corpus of soft tokens, or one line says why not."""

import json

import numpy as np
import pytest
from PIL import Image

from t5x_audio import encode_images
from t5x_audio.data import images, records
from t5x_audio.errors import UserError


class MeanColour:
    """Embeddings that can be checked by hand: two per image, its mean colour and its half."""

    image_size, name = 8, "mean"

    def __init__(self, scale=1.0):
        self.scale, self.batches = scale, []

    def __call__(self, pixels):
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (8, 8, 3)
        self.batches.append(len(pixels))
        mean = self.scale * pixels.mean((1, 2))
        return np.stack([mean, mean / 2], axis=1).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for name in ("one.png", "two.png", "three.png"):
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a" / name)
    Image.fromarray(random.integers(0, 256, (30, 50), np.uint8)).save(tmp_path / "grey.jpg")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a" / "one.png").read_bytes()[:90])
    (tmp_path / "text.png").write_text("no image at all")
    return tmp_path


def write(folder, *rows):
    path = folder / "pairs.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def run(folder, manifest, encoder=None, **settings):
    given = {"run_dir": str(folder / "run"), "name": "pairs", "manifest": manifest}
    return encode_images.run(**given | {"encoder": encoder or MeanColour()} | settings)


def colour(path):
    return np.asarray(Image.open(path)).reshape(-1, 3).mean(0)


ROWS = (
    {"image": "a/one.png", "text": " A caption. ", "split": "train"},
    {"image": "missing.png", "text": "gone", "id": "gone", "split": "train"},
    {"image": "cut.png", "text": "cut", "split": "train"},
    {"image": "text.png", "text": "text", "split": "train"},
    "",
    {"spans": ["before", {"image": "a/two.png"}, {"image": "a/three.png"}, "behind"],
     "id": "both", "split": "train"},
    {"spans": [{"image": "a/one.png"}] * 9, "id": "many", "split": "train"},
    {"image": "grey.jpg", "split": "test"},
)  # fmt: skip


def test_a_manifest_becomes_a_corpus(folder, capsys):
    encoder = MeanColour()
    result = run(folder, write(folder, *ROWS), encoder, batch_size=2)
    assert set(encoder.batches) == {2}  # one shape, so one compilation
    assert (result["documents"], result["images"], result["left_out"]) == (3, 4, 4)
    assert (result["soft_tokens_per_image"], result["soft_width"]) == (2, 3)
    one, both = images.documents(str(folder / "run"), "train")
    assert (one["id"], json.loads(one["spans"])) == ("a-one", [None, "A caption."])
    assert (both["id"], json.loads(both["spans"])) == ("both", ["before", None, None, "behind"])
    assert both["per_image"] == 2 and both["soft_embeddings"].dtype == np.float16
    two, three = colour(folder / "a" / "two.png"), colour(folder / "a" / "three.png")
    expected = [two, two / 2, three, three / 2]
    np.testing.assert_allclose(both["soft_embeddings"], expected, rtol=1e-3)
    (grey,) = images.documents(str(folder / "run"), "test")
    assert json.loads(grey["spans"]) == [None]
    quarantine = (folder / "run/images/pairs/quarantine.jsonl").read_text().splitlines()
    reasons = {row["id"]: row["reason"] for row in map(json.loads, quarantine)}
    assert reasons.keys() == {"gone", "cut", "text", "many"}
    assert reasons["gone"].endswith("missing.png: no such file")
    assert "cut.png: is no whole image" in reasons["cut"]
    assert "has 9 images, max_images=8" in reasons["many"]
    # A finished one is left alone, unless it is of another encoder.
    capsys.readouterr()
    assert run(folder, "none.jsonl") == result
    assert "finished already" in capsys.readouterr().err
    encoder.name = "other"
    with pytest.raises(UserError, match="made with encoder mean, not other"):
        run(folder, "none.jsonl", encoder)
    run(folder, write(folder, ROWS[0]), encoder, name="more")
    with pytest.raises(UserError, match="more and .*pairs are of different image encoders"):
        images.finished_corpora(str(folder / "run"))


def test_texts_of_an_image_share_a_split(folder):
    rows = [{"image": f"a/{n}.png", "text": t} for n in ("one", "two", "three") for t in "abcd"]
    documents = images.read_manifest(write(folder, *rows), 0.3, 0.3)
    assert len({(d.id, d.split) for d in documents}) == len({d.id for d in documents}) == 3
    assert run(folder, write(folder, *rows), validation=0.3, test=0.3)["documents"] == 12


def test_pictures_of_any_shape_and_kind(folder):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200  # the middle square
    Image.fromarray(wide).save(folder / "wide.png")
    assert images.load_image(folder / "wide.png", 4).min() > 180  # the filter looks beyond
    Image.fromarray(wide[..., 0]).convert("P").save(folder / "palette.gif")
    assert images.load_image(folder / "palette.gif", 6).shape == (6, 6, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1: is not JSON"),
        ({"text": "only"}, "line 1: give one of the fields 'image' and 'spans'"),
        ({"image": "a.png", "spans": []}, "line 1: give one of the fields"),
        ({"image": 3}, "line 1: {'image': 3} is neither a text nor"),
        ({"image": "a.png", "text": 3}, "line 1: 3 is neither a text nor"),
        ({"spans": ["only text"]}, "line 1: has no image"),
        ({"spans": "text"}, "line 1: spans='text' is no list"),
        ({"spans": [{"image": "a.png", "size": 1}]}, "line 1: .*neither a text nor"),
        ({"image": "a.png", "caption": "c"}, "line 1: unknown field 'caption'"),
        ({"image": "a.png", "split": "dev"}, "line 1: split 'dev'"),
        ({"image": "missing.png"}, r"no document can be used \(.*missing.png: no such file\)"),
        ("", "holds no document"),
    ],
)
def test_bad_manifests(folder, row, message):
    with pytest.raises(UserError, match=message):
        run(folder, write(folder, row))
    assert not (folder / "run").exists()


def test_embeddings_beyond_float16_are_refused(folder):
    with pytest.raises(UserError, match="float16 does not hold"):
        run(folder, write(folder, ROWS[0], *ROWS[5:6]), MeanColour(1e4))
    assert images.finished_corpora(str(folder / "run")) == []


def test_a_stopped_job_leaves_nothing_and_begins_anew(folder):
    class Stops(MeanColour):
        def __call__(self, pixels):
            if self.batches:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    manifest = write(folder, *ROWS)
    with pytest.raises(KeyboardInterrupt):
        run(folder, manifest, Stops(), batch_size=1)
    assert not records.shard_paths(str(folder / "run/images/pairs"), "train")
    assert run(folder, manifest)["documents"] == 3
