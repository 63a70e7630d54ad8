"""fit_codebook and tokenize_corpus, from a small corpus on disk to its codes."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx

from t5x_audio import fit_codebook, tokenize_corpus
from t5x_audio.audio import io, quality
from t5x_audio.data import corpus, records, tokenizing
from t5x_audio.errors import UserError
from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig
from t5x_audio.training import checkpoints

LENGTHS = {"train": (9000, 15999, 12345, 14000, 1000, 16000), "test": (12000, 0)}


def clips(split):
    generator = np.random.default_rng(len(split))
    for i, length in enumerate(LENGTHS[split]):
        # A length of 0 stands for a silent second.
        audio = (generator.normal(size=length or 16000) * (3000 if length else 0)).astype(np.int16)
        yield corpus.Clip(f"{split}{i}", audio, f"words {i}", "joe", category="test")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("run"))
    corpus.write_corpus(f"{path}/corpus/speech", {split: clips(split) for split in LENGTHS})
    linguistic = LinguisticTokenizerConfig(
        SanmConfig(num_layers=1, width=8, num_heads=2, mlp_dim=8), codebook_size=6, text_size=0
    )
    semantic = SemanticTokenizerConfig(
        8, 2, 8, 1, codebook_size=7, num_supervision_layers=0, text_size=0
    )
    for name, config in {"linguistic": linguistic, "semantic": semantic}.items():
        model = config.make(nnx.Rngs(0))
        checkpoints.save_model(f"{path}/{name}", {"model": config}, {"model": model})
    return path


@pytest.fixture(scope="module")
def codebook(run_dir):
    settings = {"run_dir": run_dir, "model_dir": f"{run_dir}/linguistic_tokenizer"}
    return fit_codebook.run(**settings, batch_frames=30, num_epochs=3), settings


def test_the_codebook_is_fitted_and_saved(codebook, run_dir):
    figures, settings = codebook
    assert figures["codes"] == 6 and figures["usage"] == 1.0
    assert 0.1 < figures["variance_explained"] < 1.0
    saved = checkpoints.load_model(settings["model_dir"])
    assert len(np.unique(saved.codebook[...], axis=0)) == 6
    again = fit_codebook.run(**settings, batch_frames=30, num_epochs=3)
    assert again["already_there"] and again["usage"] == 1.0


def tokenize(run_dir, target, **settings):
    return tokenize_corpus.run(model_dir=f"{run_dir}/{target}", run_dir=run_dir, **settings)


@pytest.fixture(scope="module")
def tokens(codebook, run_dir):
    return tokenize(run_dir, "tokens", num_shards=2)


def test_records_have_the_codes_and_the_fields_of_the_clips(tokens, run_dir):
    assert tokens["clips"] == 6 and tokens["quarantined"] == 2
    made = {r["id"]: r for r in records.open_records(f"{run_dir}/tokens/speech", "train")}
    assert set(made) == {"train0", "train1", "train2", "train3", "train5"}
    tokenizer = tokenize_corpus.load_tokenizer(run_dir)
    for clip in clips("train"):
        if clip.id not in made:
            continue
        record = made[clip.id]
        linguistic, semantic = tokenizer.encode_batch([clip.samples])[0]
        np.testing.assert_array_equal(record.pop("linguistic"), linguistic)
        np.testing.assert_array_equal(record.pop("semantic"), semantic)
        fields = clip.to_record() | quality.measure(clip.samples, corpus.RATE)
        del fields["audio"]
        assert record == fields


def test_rejected_clips_are_listed_with_the_reason(tokens, run_dir):
    with open(f"{run_dir}/tokens/speech/quarantine.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert [(row["split"], row["id"]) for row in rows] == [("train", "train4"), ("test", "test1")]
    assert "too short" in rows[0]["reason"] and "silent" in rows[1]["reason"]
    assert all(row["reason"].startswith(f"{run_dir}/corpus/speech") for row in rows)


def contents(directory):
    names = sorted(os.listdir(directory))
    names = [name for name in names if name.endswith((".array_record", ".jsonl"))]
    return {name: open(os.path.join(directory, name), "rb").read() for name in names}


def test_what_is_finished_is_not_done_again(tokens, run_dir, monkeypatch):
    original, calls = tokenizing._tokenized, []

    def counted(tokenizer, chunk):
        calls.append([recording.id for recording, _ in chunk])
        if len(calls) == 2:
            raise UserError("stopped")
        return original(tokenizer, chunk)

    monkeypatch.setattr(tokenizing, "_tokenized", counted)
    with pytest.raises(UserError, match="stopped"):
        tokenize(run_dir, "resumed", num_shards=2)
    assert not contents(f"{run_dir}/resumed/speech")
    first = calls[0]
    again = tokenize(run_dir, "resumed", num_shards=2)
    assert calls.count(first) == 1 and len(calls) == 5
    assert {k: again[k] for k in ("clips", "hours")} == {k: tokens[k] for k in ("clips", "hours")}
    assert contents(f"{run_dir}/resumed/speech") == contents(f"{run_dir}/tokens/speech")
    assert sorted(os.listdir(f"{run_dir}/resumed/speech")) == sorted(
        os.listdir(f"{run_dir}/tokens/speech")
    )
    tokenize(run_dir, "resumed", num_shards=2)
    assert len(calls) == 5  # Finished: nothing was done again.


def started(run_dir, target, workers):
    """A job in a session of its own, in the midst of a shard."""
    command = [sys.executable, "-m", "t5x_audio.tokenize_corpus", f"--run_dir={run_dir}"]
    command += [f"--model_dir={run_dir}/{target}", "--num_shards=5", f"--workers={workers}"]
    job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    unfinished = pathlib.Path(run_dir, target, "speech/.unfinished")
    while not list(unfinished.glob("attempt-*")):
        assert job.poll() is None
        time.sleep(0.01)
    return job


def wait_for_workers(job):
    """Until no process of the job's session is left."""
    for _ in range(300):
        try:
            os.killpg(job.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive their starter")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interruption_ends_all_at_once(codebook, run_dir, workers):
    job = started(run_dir, f"interrupted{workers}", workers)
    job.terminate()
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130 and "interrupted; start again to continue" in errors
    assert "Traceback" not in errors
    wait_for_workers(job)


def test_workers_end_with_a_starter_that_is_killed(codebook, run_dir):
    job = started(run_dir, "orphaned", 2)
    job.kill()
    job.wait()
    wait_for_workers(job)


def test_two_jobs_do_not_write_one_corpus(codebook, run_dir):
    os.makedirs(f"{run_dir}/twice/speech")
    other = tokenizing.running(f"{run_dir}/twice/speech/.running.lock")
    with other, pytest.raises(UserError, match="another tokenize_corpus is writing it"):
        tokenize(run_dir, "twice")
    tokenize(run_dir, "twice")


def test_a_killed_job_of_two_workers_goes_on_and_its_bytes_are_those_of_one(codebook, run_dir):
    tokenize(run_dir, "alone", num_shards=5)
    job = started(run_dir, "killed", 2)
    unfinished = pathlib.Path(run_dir, "killed/speech/.unfinished")
    while not (kept := list(unfinished.glob("t*-*/summary.json"))):
        assert job.poll() is None
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not contents(f"{run_dir}/killed/speech")
    before = {path: path.stat().st_mtime_ns for path in kept}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_corpus._CorpusJob, "_publish", lambda *_: {"hours": 0.0})
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        tokenize(run_dir, "killed", num_shards=5, workers=2)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    os.remove(f"{run_dir}/killed/speech/tokens.json")
    tokenize(run_dir, "killed", num_shards=5)
    assert contents(f"{run_dir}/killed/speech") == contents(f"{run_dir}/alone/speech")


def test_what_is_missing_is_named(run_dir, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        tokenize(run_dir, "none", corpora=["nowhere"])
    with pytest.raises(UserError, match=str(tmp_path)):
        fit_codebook.run(model_dir=f"{tmp_path}/out", run_dir=str(tmp_path))


def test_a_folder_goes_straight_to_codes_and_what_is_bad_to_quarantine(codebook, run_dir):
    folder = pathlib.Path(run_dir, "recordings")
    sound = next(clips("train")).samples
    io.save(folder / "anna/good.wav", sound)
    io.save(folder / "anna/named.flac", sound)
    (folder / "anna/named.flac").rename(folder / "anna/wrongly.ogg")
    (folder / "anna/good.txt").write_text("Zwei Wörter")
    io.save(folder / "phone.wav", sound, 8000)
    io.save(folder / "silent.wav", 0 * sound)
    io.save(folder / "clipped.wav", np.clip(20 * sound, -1, 1))
    io.save(folder / "long.wav", np.tile(sound, 40))
    io.save(folder / "short.wav", sound[:1000])
    whole = (folder / "anna/good.wav").read_bytes()
    for name, data in {"empty": b"", "cut": whole[:9000], "text": b"no sound at all"}.items():
        (folder / f"{name}.wav").write_bytes(data)
    result = tokenize(
        run_dir, "direct", folder=str(folder), name="own", normalization="none", max_seconds=20.0,
        validation=0.0, test=0.0, num_shards=3,
    )  # fmt: skip
    assert (result["clips"], result["quarantined"]) == (2, 8)
    made = {r["id"]: r for r in records.open_records(f"{run_dir}/direct/own", "train")}
    assert set(made) == {"anna-good", "anna-wrongly"}
    assert (made["anna-good"]["text"], made["anna-good"]["speaker"]) == ("Zwei Wörter", "anna")
    for stream in ("linguistic", "semantic"):
        np.testing.assert_array_equal(made["anna-good"][stream], made["anna-wrongly"][stream])
    lines = pathlib.Path(run_dir, "direct/own/quarantine.jsonl").read_text().splitlines()
    reasons = {row["id"]: row["reason"] for row in map(json.loads, lines)}
    for name, reason in {
        "phone": "sampled at 8000 Hz", "silent": "is silent", "clipped": "is clipped",
        "long": "more than the 20 s", "short": "too short", "empty": "is empty",
        "cut": "is cut off", "text": "cannot be read as audio",
    }.items():  # fmt: skip
        assert reason in reasons[name] and f"{name}.wav" in reasons[name]


def test_what_does_not_go_together_is_told(codebook, run_dir):
    for message, settings in {
        "with --name": {"folder": run_dir},
        "leave it away": {"folder": run_dir, "corpora": ["speech"]},
        "give 1 or more": {"workers": 0},
        "there are english, none": {"normalization": "french"},
    }.items():
        with pytest.raises(UserError, match=message):
            tokenize(run_dir, "none", **settings)
