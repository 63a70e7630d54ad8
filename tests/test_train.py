import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "training"))
import toy_run

from t5x_audio import train
from t5x_audio.errors import UserError
from t5x_audio.planning import chips
from t5x_audio.training import checkpoints, learner
from t5x_audio.training.metrics import read_metrics

HERE = Path(__file__).parent


ONE_SHAPE = {"lengths": (4, 4)}


def small_learner(vocab=12, **objective):
    return learner.GradientLearner(
        toy_run.BigramConfig(vocab), toy_run.NextToken(**objective), toy_run.Descent()
    )


def start(folder, cache, *flags):
    """The toy run in a process of its own."""
    command = [sys.executable, "-m", "t5x_audio.train", f"--gin_file={HERE}/training/toy.gin"]
    command += [f"--model_dir={folder}", *flags]
    env = os.environ | {"PYTHONPATH": f"{HERE}/training{os.pathsep}{HERE.parent}"}
    env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder / "run", folder / "cache", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder / "run", json.loads(out)


PLANNED = """
import sys
import jax
import toy_run
from t5x_audio.training import executables, learner, optimizers, partitioning, program
jax.config.update("jax_enable_compilation_cache", False)
mesh = partitioning.MeshShape().make()
optimizer = optimizers.AdamW(peak_lr=1e-2, total_steps=60, warmup_steps=5)
toy = learner.GradientLearner(toy_run.MlpConfig(), toy_run.NextToken(), optimizer)
with jax.set_mesh(mesh):
    planned = program.TrainProgram(toy, mesh, partitioning.ShardingRules(), seed=0)
    batch = partitioning.place_batch(next(iter(toy_run.Data(lengths=(4, 4)))), mesh)
    lowered = planned.step.lower(planned.template, batch)
    executables.save(sys.argv[1], lowered.compile(), lowered, mesh)
"""


def test_a_run_starts_from_a_compiled_step(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    env = os.environ | {"PYTHONPATH": f"{HERE}/training{os.pathsep}{HERE.parent}"}
    command = [sys.executable, "-c", PLANNED, str(tmp_path / "step")]
    subprocess.run(command, env=env, check=True)
    flag = f"--gin.train.run.executable={tmp_path / 'step'}"
    process = start(tmp_path / "run", tmp_path / "cache", flag)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert lines(tmp_path / "run") == lines(folder)
    # Another model's step is refused before anything is learnt.
    process = start(tmp_path / "other", tmp_path / "cache", flag, "--gin.STEPS=61")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "compiled for another model" in err
    assert not list((tmp_path / "other" / "checkpoints").glob("[0-9]*"))


def lines(folder, split="train"):
    return {m["step"]: m["loss"] for m in read_metrics(folder) if m["split"] == split}


def final_weights(folder):
    params = checkpoints.load_model(folder)
    return jax.tree.map(np.asarray, checkpoints.named_arrays(learner.nnx.state(params)))


def test_a_run_learns_and_leaves_what_it_promises(uninterrupted):
    folder, result = uninterrupted
    losses = lines(folder)
    assert sorted(losses) == list(range(1, 61)) and losses[60] < 0.6 * losses[1]
    assert sorted(lines(folder, "validation")) == [30, 60]
    assert result["step"] == 60 and result["validation_loss"] == lines(folder, "validation")[60]
    assert result["examples_per_second"] > result["steps_per_second"]
    assert "total: 460 parameters" in (folder / "model-info.txt").read_text()
    assert "jax" in (folder / "versions.json").read_text()
    assert checkpoints.checkpoint_steps(folder) == [56, 60]


def test_a_finished_run_says_so(uninterrupted, capsys):
    folder, result = uninterrupted
    before = (folder / "metrics.jsonl").read_bytes()

    def run(config):
        same = learner.GradientLearner(config, toy_run.NextToken(), toy_run.Descent())
        return train.run(learner=same, dataset=toy_run.Data(), steps=60, model_dir=str(folder))

    again = run(toy_run.MlpConfig())
    assert again == result and "finished already, at step 60" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="holds a model with model.mlp=16, not 32; give"):
        run(toy_run.MlpConfig(mlp=32))


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 120
    while max(lines(folder), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)


def test_killed_and_terminated_runs_continue_bit_for_bit(uninterrupted, tmp_path):
    folder, cache = tmp_path / "run", uninterrupted[0].parent / "cache"
    # Slow data and many saves: a kill falls anywhere, often within a save.
    flags = ["--gin.toy_run.Data.delay=0.02", "--gin.train.run.save_every=3"]
    rng = np.random.default_rng()
    first, second = int(rng.integers(4, 20)), int(rng.integers(24, 50))
    process = start(folder, cache, *flags)
    wait_for_step(folder, first, process)
    process.kill()
    process.communicate()
    process = start(folder, cache, *flags)
    wait_for_step(folder, second, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "start again to continue" in err.splitlines()[-1]
    assert checkpoints.checkpoint_steps(folder)[-1] == max(lines(folder)) >= second
    process = start(folder, cache, *flags)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert lines(folder) == lines(uninterrupted[0]), f"killed at {first}, terminated at {second}"
    whole, pieces = final_weights(uninterrupted[0]), final_weights(folder)
    for name in whole:
        np.testing.assert_array_equal(whole[name], pieces[name], err_msg=name)
    assert "train.run.save_every = 3" in (folder / "config.gin").read_text()


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match="loss is not finite at step 9; the last good .* step 8"):
        train.run(
            learner=small_learner(poison_at=11),
            dataset=toy_run.Data(poison_at=9, **ONE_SHAPE),
            steps=20,
            model_dir=str(tmp_path),
            log_every=5,
            save_every=4,
        )
    assert checkpoints.checkpoint_steps(tmp_path)[-1] == 8


def test_batches_of_several_static_shapes(tmp_path):
    result = train.run(
        learner=small_learner(),
        dataset=toy_run.Data(lengths=(4, 6)),
        steps=6,
        model_dir=str(tmp_path),
        throughput_key="targets",
        throughput_unit="tokens",
    )
    assert result["loss"] < np.log(12)
    assert 8 * 4 < result["tokens_per_second"] / result["steps_per_second"] < 8 * 6


def test_mfu_is_six_operations_a_weight_and_token_over_the_peak(tmp_path, monkeypatch):
    chip = dataclasses.replace(chips.chip("v5e"), flops=1e9, kind=jax.devices()[0].device_kind)
    monkeypatch.setitem(chips.CHIPS, "v5e", chip)
    result = train.run(
        learner=small_learner(),
        dataset=toy_run.Data(),
        steps=4,
        model_dir=str(tmp_path),
        throughput_key="targets",
        throughput_unit="tokens",
    )
    assert result["mfu"] == pytest.approx(6 * 12 * 12 * result["tokens_per_second"] / 1e9)
    assert 0 < result["goodput"] < 1 and result["update_norm"] > 0


def test_bad_runs_are_one_line(uninterrupted, tmp_path):
    def run(**settings):
        data = toy_run.Data(length=3, **ONE_SHAPE)
        return train.run(**({"learner": small_learner(), "dataset": data, "steps": 9} | settings))

    with pytest.raises(UserError, match="data ended after step 3 of 9"):
        run(model_dir=str(tmp_path / "a"))
    with pytest.raises(UserError, match="throughput_key='x': the batch has only targets, tokens"):
        run(model_dir=str(tmp_path / "b"), throughput_key="x")
    with pytest.raises(UserError, match="add --model_dir"):
        run(run_dir="x")
    whole = {"dataset": toy_run.Data(**ONE_SHAPE), "model_dir": str(tmp_path / "c")}
    assert run(**whole, steps=1)["step"] == 1
    with pytest.raises(UserError, match=r"\(12, 12\) there but \(14, 14\) in the configuration"):
        run(**whole, learner=small_learner(vocab=14))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made a directory"):
        run(model_dir=str(tmp_path / "file"))


def test_no_tensorflow():
    code = (
        "import sys, runpy, t5x_audio.train, t5x_audio.merge\n"
        "from t5x_audio.training import checkpoints, learner, metrics, optimizers, partitioning\n"
        "import tempfile; writer = metrics.MetricWriter(tempfile.mkdtemp())\n"
        "writer.write(1, 'x', {'a': 1.0})\n"
        "assert not {'tensorflow', 'seqio', 'gin'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
