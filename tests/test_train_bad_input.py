"""What a pretraining run cannot use: one line that names it, exit code 2, before any compilation.

Damage that shows only when it is read stops the run with everything saved, or sends it back to the
checkpoint before; mended, it goes on bit for bit.
"""

import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from t5x_audio import launch
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.data import lm_reader, records
from t5x_audio.errors import UserError
from t5x_audio.training import checkpoints, program
from tests.pod import jobs

ONE_DEVICE = ["--gin.DEVICES=0"]
ONE_DEVICE += [f"--gin.partitioning.MeshShape.{axis}=1" for axis in ("data", "fsdp", "tensor")]
STEPS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's caches, in two shards a task."""
    folder = tmp_path_factory.mktemp("made")
    jobs.write_caches(folder, num_shards=2)
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch, capsys):
    """Flags -> (exit code, lines of stderr but the progress bar's), on caches of its own."""
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    shutil.copytree(made / "tasks", tmp_path / "tasks")

    def call(*flags, name="model"):
        arguments = [f"--gin_file={jobs.GIN}", *ONE_DEVICE, f"--gin.STEPS={STEPS}"]
        arguments += [f"--gin.RUN_DIR={tmp_path}", f"--model_dir={tmp_path / name}", *flags]
        code = launch.launch("t5x_audio.train", "Trains.", arguments)
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return code, [line for line in lines if line.startswith(("error", "interrupted"))]

    call.folder = tmp_path
    return call


@pytest.fixture
def refused(run, monkeypatch):
    """Flags -> the line with which the run ends before anything is compiled."""

    def compiles(self):
        raise AssertionError("something is compiled")

    monkeypatch.setattr(program.TrainProgram, "init", property(compiles))

    def call(*flags):
        code, lines = run(*flags)
        assert code == 2 and len(lines) == 1
        assert not (run.folder / "model" / "model.json").exists()
        return lines[0]

    return call


def shard(folder, task="counting", number=1) -> pathlib.Path:
    return pathlib.Path(records.shard_path(folder / "tasks" / task, "train", number, 2))


def test_a_shard_that_is_missing(run, refused):
    shard(run.folder).unlink()
    assert "counting/train-00001-of-00002.array_record: missing; the shards" in refused()


def test_a_shard_that_is_cut_off(run, refused):
    path = shard(run.folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "counting/train-00001-of-00002.array_record: is damaged or no record file" in refused()


@pytest.mark.parametrize(
    ("mixture", "line"),
    [
        ("{'counting': 1, 'asr': 1}", "no cache of task 'asr' in .*, which has counting, stepping"),
        ("{'counting': 0, 'stepping': 0}", "the shares sum to zero"),
        ("{}", "the shares sum to zero"),
        ("{'counting': -0.5}", "the share of 'counting' is -0.5, not a number >= 0"),
        ("{'counting': 1e999}", "the share of 'counting' is inf, not a number >= 0"),
        ("{'counting': 'one'}", "the share of 'counting' is one, not a number >= 0"),
        ("counting", "mixture 'counting': give {task: share}"),
    ],
)
def test_mixtures_that_cannot_be(refused, mixture, line):
    flag = f"--gin.lm_reader.PackedLmDataset.mixture={mixture}"
    assert re.search(line, refused(flag))


def test_sequences_that_are_all_too_long(refused):
    line = refused("--gin.lm_reader.PackedLmDataset.sequence_length=3")
    assert "counting/train: no example fits sequence_length=3" in line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--gin.transformer.TransformerConfig.vocab_size=96"],
            "TransformerConfig.vocab_size=96, but the data were cached with a vocabulary of 64",
        ),
        (
            ["--gin.language_modeling.LanguageModeling.text_size=48"],
            "LanguageModeling.text_size=48, but the vocabulary of the data has 40",
        ),
    ],
)
def test_a_vocabulary_that_is_not_the_model_s(run, refused, flags, line):
    for path in run.folder.glob("tasks/*/stats.json"):
        sizes = {"size": 64, "text_size": 40, "linguistic_size": 8, "semantic_size": 8}
        path.write_text(json.dumps({"vocabulary": sizes, "pad": 0}))
    assert line in refused(*flags)


def small_model(vocab_size) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2, embed=32, mlp=64, num_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=vocab_size, dtype="float32",
    )  # fmt: skip


def test_a_start_with_another_vocabulary(run, refused):
    import jax
    from flax import nnx

    config = small_model(96)
    checkpoints.save_model(
        run.folder / "start", {"model": config}, {"model": config.make(nnx.Rngs(jax.random.key(0)))}
    )
    line = refused(f"--gin.learner.GradientLearner.init_from={run.folder / 'start'}")
    assert "(96, 32) there but (64, 32) in the configuration" in line
    line = refused(f"--gin.learner.GradientLearner.init_from={run.folder / 'absent'}")
    assert "absent: not a model directory" in line


def test_meshes_and_readers_that_do_not_fit(refused):
    line = refused("--gin.partitioning.MeshShape.data=3")
    assert "mesh data=3 needs 3 devices but there are 1" in line
    assert "readers=3 does not divide batch_size=8" in refused(
        "--gin.lm_reader.PackedLmDataset.readers=3"
    )


def test_a_batch_that_does_not_divide_over_the_data_axis(made, tmp_path):
    command = [sys.executable, "-m", "t5x_audio.train", f"--gin_file={jobs.GIN}"]
    command += [f"--gin.RUN_DIR={made}", f"--model_dir={tmp_path}", "--gin.DEVICES=8"]
    command += [f"--gin.lm_reader.PackedLmDataset.{n}" for n in ("batch_size=6", "readers=1")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=jobs.ROOT)
    assert done.returncode == 2
    assert done.stderr == (
        "error: batch field rows: 6 examples do not divide over the 4 devices of data "
        "parallelism; change the batch size or the mesh\n"
    )


# ---- damage that shows when it is read -------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    arguments = [f"--gin_file={jobs.GIN}", *ONE_DEVICE, f"--gin.STEPS={STEPS}"]
    arguments += [f"--gin.RUN_DIR={made}", f"--model_dir={folder}"]
    assert launch.launch("t5x_audio.train", "Trains.", arguments) == 0
    return jobs.losses(folder)


def flip(path: pathlib.Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 64
    path.write_bytes(bytes(data))


def damage_a_record(folder: pathlib.Path, batches: range) -> str:
    """Flips a byte of the shard so that one of these batches cannot be read; the error's line."""
    path = shard(folder)
    for at in range(500, 20000, 100):
        good = path.read_bytes()
        flip(path, at)
        try:
            data = lm_reader.PackedLmDataset(
                str(folder), {"counting": 2, "stepping": 1}, sequence_length=64, batch_size=8,
                readers=4, open_rows=8,
            )  # fmt: skip
            read = 0
            for _ in itertools.islice(data, max(batches) + 1):
                read += 1
        except UserError as error:
            if read in batches:
                return str(error)
        path.write_bytes(good)
    raise AssertionError("no such record")


def test_a_record_damaged_in_the_middle_stops_the_run_with_everything_saved(run, uninterrupted):
    path = shard(run.folder)
    good = path.read_bytes()
    expected = damage_a_record(run.folder, range(4, 9))
    assert "train-00001-of-00002.array_record: record" in expected
    once = ("--gin.train.run.save_every=100", "--gin.train.run.log_every=4")
    code, (line,) = run(*once)
    step = checkpoints.checkpoint_steps(run.folder / "model")[-1]
    assert code == 2 and 1 < step < STEPS
    assert line == f"error: {expected}; saved at step {step}, start again then"
    logged = jobs.losses(run.folder / "model")
    assert max(logged) == step
    assert run(*once)[0] == 2  # nothing changes before it is mended
    path.write_bytes(good)
    assert run() == (0, [])
    done = jobs.losses(run.folder / "model")
    assert {n: done[n] for n in range(step + 1, STEPS + 1)} == {
        n: uninterrupted[n] for n in range(step + 1, STEPS + 1)
    }


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["no commit", "cut off", "flipped weight", "flipped iterator"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    run, uninterrupted, damage, caplog
):
    assert run("--gin.train.run.steps=11")[0] == 0
    saved = run.folder / "model" / "checkpoints"
    assert checkpoints.checkpoint_steps(run.folder / "model") == [10, 11]
    if damage == "no commit":
        os.rename(saved / "11", saved / "11.orbax-checkpoint-tmp")
    elif damage == "cut off":
        path = largest_file(saved / "11" / "model")
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "flipped weight":
        path = largest_file(saved / "11" / "model")
        flip(path, path.stat().st_size // 2)
    else:
        path = saved / "11" / "iterator" / "metadata"
        path.write_text(path.read_text().replace("11", "12", 1))
    assert run() == (0, [])
    found = [line for line in caplog.messages if "going back to the checkpoint before" in line]
    if damage == "no commit":
        assert not found  # it was never there
    else:
        assert len(found) == 1 and "\n" not in found[0] and "checkpoints/11/" in found[0]
        assert (run.folder / "model" / "11.damaged").is_dir()
    assert jobs.losses(run.folder / "model") == uninterrupted


def test_without_a_good_checkpoint_the_run_does_not_begin_anew_by_itself(run):
    assert run("--gin.train.run.steps=2")[0] == 0
    path = largest_file(run.folder / "model" / "checkpoints" / "2" / "model")
    os.truncate(path, 10)
    for _ in range(2):
        code, (line,) = run()
        assert code == 2 and "2.damaged: damaged, and no checkpoint is left" in line
    shutil.rmtree(run.folder / "model" / "2.damaged")
    assert run()[0] == 0
