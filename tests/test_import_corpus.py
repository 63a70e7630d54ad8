"""Recordings of one's own become a corpus, or one line says why not."""

import json

import numpy as np
import pytest

from t5x_audio import import_corpus, launch
from t5x_audio.audio import io
from t5x_audio.data import corpus, records, tf_recordings
from t5x_audio.data.recordings import Limits
from t5x_audio.errors import UserError


def tone(seconds, rate=16000, hertz=220.0):
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


@pytest.fixture
def folder(tmp_path):
    io.save(tmp_path / "speech/a.flac", tone(1.0))
    io.save(tmp_path / "speech/b.wav", tone(2.0, rate=8000), 8000)
    io.save(tmp_path / "speech/long.wav", tone(9.0))
    io.save(tmp_path / "speech/silent.wav", np.zeros(16000))
    return tmp_path


def write(folder, *rows):
    path = folder / "speech.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def run(folder, **settings):
    return import_corpus.run(
        run_dir=str(folder / "run"), name="mine", max_seconds=8.0, min_rate=8000, **settings
    )


def clips(folder, split):
    return {clip.id: clip for clip in corpus.iterate_clips(folder / "run/corpus/mine", split)}


def test_a_manifest_becomes_a_corpus(folder, capsys):
    manifest = write(
        folder,
        {"audio": "speech/a.flac", "text": "Hello, World!", "speaker": "anna", "split": "train"},
        "",
        {"audio_filepath": "speech/b.wav", "id": "half", "offset": 0.5, "duration": 1.0,
         "split": "test"},
        {"audio": "speech/long.wav", "split": "train"},
        {"audio": "speech/silent.wav", "split": "train"},
        {"audio": "speech/none.wav", "split": "train"},
    )  # fmt: skip
    result = run(folder, manifest=manifest)
    assert (result["clips"], result["left_out"]) == (2, 3)
    clip = clips(folder, "train")["speech-a"]
    assert (clip.text, clip.speaker, clip.role, clip.duration) == (
        "hello world", "anna", "utterance", 1.0,
    )  # fmt: skip
    np.testing.assert_allclose(clip.samples, tone(1.0), atol=1e-4)
    part = clips(folder, "test")["half"]
    assert part.duration == pytest.approx(1.0) and part.text == ""
    np.testing.assert_allclose(part.samples[800:-800], tone(1.5)[8000:][800:-800], atol=2e-2)
    assert not records.has_split(folder / "run/corpus/mine", "validation")
    lines = (folder / "run/corpus/mine/quarantine.jsonl").read_text().splitlines()
    reasons = {row["id"]: row["reason"] for row in map(json.loads, lines)}
    assert "lasts 9.0 s" in reasons["speech-long"] and "silent" in reasons["speech-silent"]
    assert "no such file" in reasons["speech-none"]
    assert corpus.finished_corpora(str(folder / "run/corpus"))
    assert (
        run(folder, manifest=manifest) == result and "finished already" in capsys.readouterr().err
    )


def test_splits_follow_from_the_ids(folder):
    rows = [{"audio": "speech/a.flac", "id": f"clip {n}"} for n in range(60)]
    run(folder, manifest=write(folder, *rows), validation=0.2, test=0.2)
    found = {split: set(clips(folder, split)) for split in records.SPLITS}
    assert sum(map(len, found.values())) == 60 and all(found.values())
    for split, ids in found.items():
        assert all(corpus.split_of(i, 0.2, 0.2) == split for i in ids)


GOOD = {"audio": "speech/a.flac", "split": "train"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "{"], "line 2: is not JSON"),
        (["[1]"], "line 1: is not an object"),
        ([{"text": "x"}], "line 1: lacks the field 'audio'"),
        ([GOOD | {"txt": "x"}], "line 1: unknown field 'txt'; there are audio, "),
        ([GOOD | {"offset": -1}], "line 1: offset=-1 is not a number from 0 on"),
        ([GOOD | {"text": 3}], "line 1: text=3 is not a text"),
        ([GOOD | {"split": "dev"}], "line 1: split 'dev' is none of train"),
        ([GOOD, GOOD], "line 2: a second clip with id 'speech-a'"),
        ([], "holds no recording"),
        ([{"audio": "speech/silent.wav"}], "no recording can be used .*silent"),
    ],
)
def test_bad_manifests_are_one_line_and_leave_nothing(folder, rows, message):
    with pytest.raises(UserError, match=message):
        run(folder, manifest=write(folder, *rows))
    assert not (folder / "run/corpus/mine").exists()


def test_other_mistakes_are_one_line(folder):
    with pytest.raises(UserError, match="name a source, e.g. --manifest=FILE"):
        run(folder)
    with pytest.raises(UserError, match="missing.jsonl: cannot be read"):
        run(folder, manifest=str(folder / "missing.jsonl"))
    with pytest.raises(UserError, match="shares that leave something over"):
        run(folder, manifest=write(folder, GOOD), validation=0.5, test=0.5)
    with pytest.raises(UserError, match="--tfds=no_such_speech: "):
        run(folder, tfds="no_such_speech")


def test_a_tfds_builder_becomes_a_corpus(folder):
    import tensorflow_datasets as tfds

    class FakeLibrispeech(tfds.core.GeneratorBasedBuilder):
        """With the fields of librispeech."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(
                    {
                        "speech": tfds.features.Audio(sample_rate=8000),
                        "text": tfds.features.Text(),
                        "speaker_id": np.int64,
                        "id": tfds.features.Text(),
                    }
                )
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(name) for name in ("train_clean100", "dev_clean")}

        def _generate_examples(self, name):
            samples = (tone(1.0, rate=8000) * 32767).astype(np.int64)
            for number in range(3):
                key = f"{name}-{number}"
                yield (
                    key,
                    {"speech": samples, "text": "HELLO", "speaker_id": number, "id": key},
                )

    result = run(folder, tfds="fake_librispeech", data_dir=str(folder / "tfds"))
    assert result["clips"] == 6
    found = clips(folder, "validation")
    assert sorted(found) == [f"dev_clean-{n}" for n in range(3)]
    clip = found["dev_clean-1"]
    assert (clip.text, clip.speaker, clip.duration) == ("hello", "1", 1.0)
    np.testing.assert_allclose(clip.samples[800:-800], tone(1.0)[800:-800], atol=2e-2)


def test_a_folder_becomes_a_corpus(folder):
    (folder / "speech/a.txt").write_text("Bonjour,  le monde!\n")
    result = import_corpus.run(
        run_dir=str(folder / "run"), name="mine", folder=str(folder), normalization="none",
        validation=0.0, test=0.0, max_seconds=8.0, min_rate=8000,
    )  # fmt: skip
    assert (result["clips"], result["left_out"]) == (2, 2)
    found = clips(folder, "train")
    assert (found["speech-a"].text, found["speech-a"].speaker) == ("Bonjour, le monde!", "speech")
    assert found["speech-b"].text == ""
    with pytest.raises(UserError, match="no such folder"):
        import_corpus.run(run_dir=str(folder), name="x", folder=str(folder / "nowhere"))
    with pytest.raises(UserError, match="give one of them"):
        import_corpus.run(run_dir=str(folder), name="x", folder=str(folder), tfds="librispeech")


def test_what_the_tokenizers_would_misread_is_left_out(folder):
    io.save(folder / "speech/clipped.wav", np.clip(5 * tone(1.0), -1, 1))
    rows = [{"audio": f"speech/{name}.wav", "split": "train"} for name in ("b", "clipped")]
    manifest = write(folder, GOOD, *rows)
    import_corpus.run(run_dir=str(folder / "run"), name="mine", manifest=manifest)
    lines = (folder / "run/corpus/mine/quarantine.jsonl").read_text().splitlines()
    reasons = [row["reason"] for row in map(json.loads, lines)]
    assert "b.wav" in reasons[0] and "is sampled at 8000 Hz, below the 16000 Hz" in reasons[0]
    assert "clipped.wav" in reasons[1] and "is clipped" in reasons[1]


def test_a_seqio_task_gives_recordings(tmp_path):
    import seqio
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        audio = tf.constant(np.stack([tone(1.0, hertz=100.0 + n) for n in range(5)]), tf.float32)
        texts = tf.constant([f"Number {n}" for n in range(5)])
        return tf.data.Dataset.from_tensor_slices({"audio": audio, "text": texts})

    seqio.TaskRegistry.add(
        "recordings_for_test",
        source=seqio.FunctionDataSource(dataset, splits=["train"]),
        output_features={"audio": seqio.ContinuousFeature(dtype=tf.float32, rank=1)},
    )
    source = tf_recordings.SeqioTask("recordings_for_test")
    assert source.sizes() == {"train": 5}
    parts = [list(source.shard("train", n, 2)) for n in range(2)]
    assert [len(part) for part in parts] == [3, 2]
    found = [recording.clip(Limits()) for part in parts for recording in part]
    assert sorted(clip.text for clip in found) == [
        "number four", "number one", "number three", "number two", "number zero",
    ]  # fmt: skip
    assert len({clip.id for clip in found}) == 5 and {clip.duration for clip in found} == {1.0}
    with pytest.raises(UserError, match="name the module"):
        tf_recordings.SeqioTask("no_such_task").sizes()
    with pytest.raises(UserError, match="--seqio_module=no_such_module"):
        tf_recordings.SeqioTask("recordings_for_test", "no_such_module").sizes()


def test_flags_are_checked(folder, capsys):
    words = [f"--run_dir={folder}/run", "--name=mine", f"--folder={folder}"]

    def launched(*more):
        job = "t5x_audio.import_corpus"
        return launch.launch(job, "", [*words, *more], import_corpus._add_flags)

    assert launched("--model_dir=elsewhere") == 2
    assert "--model_dir: t5x_audio.import_corpus has no such setting" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        launched("--normalization=french")
    assert "--normalization" in capsys.readouterr().err
    assert launched("--max_seconds=8", "--min_rate=8000") == 0
    assert "clips=2" in capsys.readouterr().out
