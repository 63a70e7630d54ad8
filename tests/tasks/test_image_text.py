"""The image task from files to training: what an image shows is learnt, and only through it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from t5x_audio import cache_tasks, encode_images, launch
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.data import lm_reader, records
from t5x_audio.errors import UserError
from t5x_audio.objectives.language_modeling import LanguageModeling
from t5x_audio.sequences.layouts import Layouts
from t5x_audio.sequences.vocabulary import Vocabulary
from t5x_audio.tokenizers.image_encoder import ImageEncoderConfig, random_image_encoder
from t5x_audio.training import checkpoints, optimizers
from t5x_audio.training.learner import GradientLearner

ENCODER = ImageEncoderConfig(
    image_size=8, patch_size=4, width=8, num_layers=1, num_heads=2, mlp_dim=16
)
CAPTIONS = ("one", "two", "three", "four")
MIXTURES = {"one": {"text": 1, "image_text": 1}}
READ = {"sequence_length": 64, "batch_size": 8, "soft_tokens": 24, "soft_width": 8}


@pytest.fixture(scope="module")
def image_run(run_dir, tmp_path_factory):
    """A run with random images, of which one corner tells the caption."""
    root = tmp_path_factory.mktemp("images")
    for part in ("vocabulary", "tokens", "corpus"):
        shutil.copytree(f"{run_dir}/{part}", root / part)
    random, rows = np.random.default_rng(0), []
    for i in range(96):
        kind = i % len(CAPTIONS)
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        pixels[:4, :4] = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]])[kind]
        Image.fromarray(pixels).save(root / f"{i}.png")
        split = "train" if i < 80 else "validation"
        image = {"image": f"{i}.png"}
        if i % 8 == 1:  # interleaved: two images and a text before them
            spans = ["what is", image, CAPTIONS[kind], image, CAPTIONS[kind]]
            rows.append({"spans": spans, "split": split})
        else:
            rows.append(image | {"text": CAPTIONS[kind], "split": split})
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoder = random_image_encoder(ENCODER)
    done = encode_images.run(
        run_dir=str(root), name="pairs", manifest=str(root / "pairs.jsonl"), encoder=encoder
    )
    assert (done["documents"], done["images"]) == (96, 108)
    made = cache_tasks.run(model_dir=f"{root}/tasks", run_dir=str(root), mixtures=MIXTURES)
    assert made["made"] == 2
    return str(root)


def test_the_cache_holds_tokens_and_their_embeddings(image_run):
    vocabulary = Vocabulary.load(f"{image_run}/vocabulary")
    stored = records.open_records(f"{image_run}/tasks/image_text", "train")
    source = records.open_records(f"{image_run}/images/pairs", "train")
    assert len(stored) == len(source) == 80
    for record, document in zip(stored, source, strict=True):
        assert set(record) == {"tokens", "weights", "soft_embeddings"}
        spans = [4 if span is None else span for span in json.loads(document["spans"])]
        expected = Layouts(vocabulary).image_text(spans)
        np.testing.assert_array_equal(record["tokens"], expected.tokens)
        np.testing.assert_array_equal(record["weights"], expected.weights)
        np.testing.assert_array_equal(record["soft_embeddings"], document["soft_embeddings"])
        held = record["tokens"] == vocabulary.image
        assert held.sum() == len(record["soft_embeddings"]) and not record["weights"][held].any()
    stats = lm_reader.read_stats(f"{image_run}/tasks/image_text")
    assert stats["soft_embeddings"] == {"most": 8, "width": 8, "placeholder": vocabulary.image}
    assert "soft_embeddings" not in lm_reader.read_stats(f"{image_run}/tasks/text")
    validation = records.open_records(f"{image_run}/tasks/image_text", "validation")[0]
    assert validation["id"] == "80" and json.loads(validation["spans"])[-1] == CAPTIONS[0]


def test_new_images_are_noticed(image_run, tmp_path):
    given = {"run_dir": image_run, "model_dir": f"{image_run}/tasks", "mixtures": MIXTURES}
    assert cache_tasks.run(**given)["made"] == 0
    (tmp_path / "one.jsonl").write_text(json.dumps({"image": f"{image_run}/0.png"}))
    more = {"name": "more", "manifest": str(tmp_path / "one.jsonl"), "validation": 0, "test": 0}
    encode_images.run(run_dir=image_run, encoder=random_image_encoder(ENCODER), **more)
    moved = given | {"model_dir": str(tmp_path / "tasks")}
    try:
        assert cache_tasks.run(**moved)["made"] == 2
        stats = lm_reader.read_stats(str(tmp_path / "tasks" / "image_text"))
        assert stats["train"]["examples"] == 81
    finally:
        shutil.rmtree(f"{image_run}/images/more")


def test_what_an_image_shows_is_learnt(image_run):
    import jax

    dataset = lm_reader.PackedLmDataset(image_run, {"image_text": 1}, open_rows=8, **READ)
    config = TransformerConfig(
        num_layers=1, embed=32, mlp=64, num_heads=2, num_kv_heads=2, head_dim=16,
        vocab_size=dataset.vocabulary_sizes["size"], dtype="float32", remat="none",
        soft_width=ENCODER.width,
    )  # fmt: skip
    optimizer = optimizers.AdamW(peak_lr=1e-2, schedule="constant", weight_decay=0.0)
    learner = GradientLearner(config, LanguageModeling(), optimizer)
    state, step = jax.jit(learner.init)(jax.random.key(0)), jax.jit(learner.step)
    projector = np.asarray(state.params["model"]["soft_projector"][...])
    for _, batch in zip(range(120), dataset, strict=False):
        state, _ = step(state, batch, jax.random.key(1))
    evaluate = jax.jit(learner.evaluate)

    def loss(change=lambda embeddings: embeddings):
        total = weight = 0.0
        for batch in dataset.eval_sets()["image_text"]:
            batch = batch | {"soft_embeddings": change(batch["soft_embeddings"])}
            value, count = evaluate(state, batch, jax.random.key(0))["loss"]
            total, weight = total + float(value), weight + float(count)
        return total / weight

    # Captions are one of four: without the image, log 4 nats on their first piece.
    seen, blind = loss(), loss(np.zeros_like)
    shuffled = loss(lambda embeddings: np.roll(embeddings, 4, axis=1))
    assert seen < 0.15 < 0.4 < min(blind, shuffled)
    assert np.abs(np.asarray(state.params["model"]["soft_projector"][...]) - projector).max() > 0.01
    # The encoder is no part of what is trained.
    assert set(state.params["model"]) == {
        *("embedding", "layers", "final_norm", "head", "soft_projector")
    }


def test_what_is_missing_is_named(run_dir, image_run, tmp_path):
    given = {"model_dir": str(tmp_path), "mixtures": MIXTURES}
    with pytest.raises(UserError, match="no images under .*run t5x_audio.encode_images"):
        cache_tasks.run(run_dir=run_dir, **given)
    narrow = tmp_path / "narrow"
    shutil.copytree(image_run, narrow)
    path = narrow / "vocabulary" / "vocabulary.json"
    path.write_text(path.read_text().replace('"num_specials": 8', '"num_specials": 4'))
    with pytest.raises(UserError, match="num_specials=4, and images need 7"):
        cache_tasks.run(run_dir=str(narrow), **given)


RUN = ["--gin_file=gin/models/toy.gin", "--gin_file=gin/runs/pretrain_stage1.gin"]
SMALL = [
    "--gin.STAGE1_MIXTURE={'image_text': 1}",
    "--gin.STAGE1_STEPS=2",
    "--gin.BACKBONE_VOCAB=256",
    "--gin.SEQUENCES_TEXT_SIZE=160",
    "--gin.TOKENIZERS_SEMANTIC_SIZE=32",
]


def test_training_by_its_gin_files(image_run, capsys):
    flags = [*RUN, "--gin_file=gin/tasks/images.gin", f"--gin.RUN_DIR={image_run}", *SMALL]
    width = "--gin.IMAGES_SOFT_WIDTH=8"
    assert launch.launch("t5x_audio.train", "", [*flags, width, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 2
    assert checkpoints.load_config(f"{image_run}/pretrain1").soft_width == 8
    # A run that has no room for images, or for others, says so at once.
    for files, room in ((RUN, "0 of width 0"), ([*RUN, flags[2]], "64 of width 64")):
        again = [*files, f"--gin.RUN_DIR={image_run}", *SMALL, f"--model_dir={image_run}/other"]
        assert launch.launch("t5x_audio.train", "", again) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: task 'image_text' has up to 8 soft tokens of width 8")
        assert room in error and "IMAGES_SOFT_WIDTH=8" in error


def test_encoding_by_its_gin_file(image_run, tmp_path, capsys):
    flags = ["--gin_file=gin/runs/encode_images.gin", f"--run_dir={tmp_path}", "--name=a"]
    flags += [f"--manifest={image_run}/pairs.jsonl", "--json"]
    assert launch.launch("t5x_audio.encode_images", "", flags, encode_images._add_flags) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["images"], figures["soft_tokens_per_image"]) == (108, 16)
    assert figures["soft_width"] == 64 and figures["encoder"].startswith("vit-")
