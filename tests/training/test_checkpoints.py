import dataclasses
import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.training import checkpoints, learner


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    sizes: tuple[int, ...] = (3, 5)
    name: str = "inner"


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 4
    inner: InnerConfig = InnerConfig()
    dropout: float = 0.5

    def make(self, rngs):
        return Toy(self, rngs)


class Toy(nnx.Module):
    def __init__(self, config, rngs):
        self.first = nnx.Linear(config.width, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.dropout(self.norm(self.first(x)))
        for layer in self.layers:
            x = layer(x)
        return x


def square_loss(model, batch, rng, train):
    loss = jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
    return loss, {"error": learner.mean_metric(loss, batch["x"].shape[0])}


@dataclasses.dataclass(frozen=True)
class Sgd:
    def make(self, params):
        return optax.adam(1e-2)

    def learning_rate(self, step):
        return 1e-2


BATCH = {"x": np.ones((6, 4), np.float32), "y": np.zeros((6, 8), np.float32)}


def test_model_round_trip_restores_weights_and_statistics(tmp_path):
    config = ToyConfig(inner=InnerConfig(sizes=(1, 2, 3)))
    model = config.make(nnx.Rngs(1))
    model.norm.mean[...] = jnp.arange(8.0)
    checkpoints.save_model(tmp_path / "m", {"toy": config}, {"toy": model})
    loaded = checkpoints.load_model(tmp_path / "m", "toy")
    assert checkpoints.load_config(tmp_path / "m", "toy") == config
    model.eval()
    np.testing.assert_array_equal(loaded(BATCH["x"]), model(BATCH["x"]))
    np.testing.assert_array_equal(loaded.norm.mean[...], np.arange(8.0))


def test_saving_again_replaces(tmp_path):
    for seed in (1, 2):
        model = ToyConfig().make(nnx.Rngs(seed))
        checkpoints.save_model(tmp_path, {"model": ToyConfig()}, {"model": model})
    assert len(checkpoints.checkpoint_steps(tmp_path)) == 1
    loaded = checkpoints.load_model(tmp_path)
    np.testing.assert_array_equal(loaded.first.kernel[...], model.first.kernel[...])


def test_other_size_names_both_shapes(tmp_path):
    checkpoints.save_model(
        tmp_path, {"model": ToyConfig()}, {"model": ToyConfig().make(nnx.Rngs(0))}
    )
    checkpoints.write_configs(tmp_path, {"model": ToyConfig(width=7)})
    with pytest.raises(UserError, match=r"first/kernel is \(4, 8\) there but \(7, 8\)"):
        checkpoints.load_model(tmp_path)


@pytest.mark.parametrize("damage", ["no directory", "no json", "bad json", "no weights", "cut"])
def test_damage_is_one_line(tmp_path, damage):
    model_dir = tmp_path / "m"
    checkpoints.save_model(
        model_dir, {"model": ToyConfig()}, {"model": ToyConfig().make(nnx.Rngs(0))}
    )
    if damage == "no directory":
        model_dir = tmp_path / "absent"
    elif damage == "no json":
        os.remove(model_dir / "model.json")
    elif damage == "bad json":
        (model_dir / "model.json").write_text('{"model": {"class": "no.such:Thing", "fields": {}}}')
    elif damage == "no weights":
        os.rename(model_dir / "checkpoints", tmp_path / "elsewhere")
    else:
        for path in (model_dir / "checkpoints" / "0" / "model").rglob("*"):
            if path.is_file() and path.parent.name == "d":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError) as caught:
        checkpoints.load_model(model_dir)
    assert str(model_dir) in str(caught.value) and "\n" not in str(caught.value)


@functools.cache
def compiled():
    toy = learner.GradientLearner(model=ToyConfig(), objective=square_loss, optimizer=Sgd())
    return toy, jax.jit(toy.init), jax.jit(toy.step), jax.jit(toy.step, donate_argnums=0)


def make_state(seed=0):
    """After one step: moments and statistics aren't zero."""
    toy, init, step, _ = compiled()
    state, _ = step(init(jax.random.key(seed)), BATCH, jax.random.key(1))
    return toy, state


def same(a, b):
    a, b = checkpoints.named_arrays(a), checkpoints.named_arrays(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_run_checkpoint_restores_everything_and_loads_as_a_model(tmp_path):
    toy, state = make_state()
    checkpoints.write_configs(tmp_path, toy.model_configs)
    run = checkpoints.RunCheckpoints(tmp_path, toy.model_configs)
    run.save(state, {"position": np.int64(7), "rest": {3: b"\x00\xff"}})
    run.wait()
    _, other = make_state(seed=5)
    restored, iterator = run.restore(other)
    same(restored, state)
    assert iterator == {"position": 7, "rest": {3: b"\x00\xff"}}
    loaded = checkpoints.load_model(tmp_path)
    np.testing.assert_array_equal(
        loaded.first.kernel[...], state.params["model"]["first"]["kernel"][...]
    )
    run.close()


def test_a_donated_state_does_not_change_the_checkpoint(tmp_path):
    toy, state = make_state()
    step = compiled()[3]
    run = checkpoints.RunCheckpoints(tmp_path, toy.model_configs)
    expected = jax.tree.map(jnp.copy, state)
    run.save(state)
    for i in range(20):
        state, _ = step(state, BATCH, jax.random.key(i))
    run.wait()
    same(run.restore(state)[0], expected)
    run.close()


def test_half_written_is_ignored_and_damaged_falls_back(tmp_path):
    toy, state = make_state()
    run = checkpoints.RunCheckpoints(tmp_path, toy.model_configs)
    run.save(state)
    later, _ = compiled()[2](state, BATCH, jax.random.key(2))
    run.save(later)
    run.wait()
    run.close()
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp-1").mkdir()
    for path in (tmp_path / "checkpoints" / "2" / "training").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    run = checkpoints.RunCheckpoints(tmp_path, toy.model_configs)
    assert run.latest_step() == 2
    restored, _ = run.restore(later)
    same(restored, state)
    run.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's
def test_a_flipped_bit_is_found_wherever_it_matters(tmp_path):
    weights = {
        "a": jax.random.normal(jax.random.key(0), (32, 64)),
        "b": jnp.ones(700, jnp.bfloat16),
    }
    weights |= {"c": jnp.arange(900), "d": jnp.arange(600) % 2 == 0, "e": jnp.ones(500, jnp.int8)}
    checkpoints.save_states(tmp_path, {"model": ToyConfig()}, {"model": (weights, {})})
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    random, found = np.random.default_rng(0), []
    for path in files:
        data = path.read_bytes()
        for at in random.integers(0, len(data), 8):
            changed = bytearray(data)
            changed[at] ^= 1 << random.integers(8)
            path.write_bytes(changed)
            try:
                same(checkpoints.restore_states(tmp_path, "model", weights, {})[0], weights)
            except UserError as error:
                found.append(str(error))
        path.write_bytes(data)
    assert any("is not what was saved" in line for line in found)
    assert all("\n" not in line and str(tmp_path) in line for line in found)
    same(checkpoints.restore_states(tmp_path, "model", weights, {})[0], weights)


def test_a_checkpoint_without_checksums_is_read(tmp_path):
    toy, state = make_state()
    run = checkpoints.RunCheckpoints(tmp_path, toy.model_configs)
    run.save(state)
    run.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "checksums")
    same(run.restore(state)[0], state)
    run.close()


def test_preference_reference_stays_and_survives(tmp_path):
    def objective(model, reference, batch, rng, train):
        x = batch["x"]
        return jnp.mean((model(x) - reference(x) - 1.0) ** 2), {}

    toy = learner.PreferenceLearner(model=ToyConfig(), objective=objective, optimizer=Sgd())
    state = jax.jit(toy.init)(jax.random.key(0))
    before = jax.tree.map(jnp.copy, state.variables["reference"])
    step = jax.jit(toy.step, donate_argnums=0)
    losses = []
    for i in range(10):
        state, metrics = step(state, BATCH, jax.random.key(i))
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < losses[0]
    same(state.variables["reference"], before)
    run = checkpoints.RunCheckpoints(tmp_path, toy.model_configs)
    run.save(state)
    run.wait()
    same(run.restore(state)[0], state)
    run.close()


def test_init_from_starts_with_those_weights_and_rejects_other_sizes(tmp_path):
    model = ToyConfig().make(nnx.Rngs(9))
    checkpoints.save_model(tmp_path, {"model": ToyConfig()}, {"model": model})
    toy = learner.PreferenceLearner(ToyConfig(), square_loss, Sgd(), init_from=str(tmp_path))
    state = toy.warm_start(jax.jit(toy.init)(jax.random.key(0)))
    for params in (state.params["model"], state.variables["reference"]["params"]):
        np.testing.assert_array_equal(params["first"]["kernel"][...], model.first.kernel[...])
    toy = learner.GradientLearner(ToyConfig(width=6), square_loss, Sgd(), init_from=str(tmp_path))
    with pytest.raises(UserError, match=r"\(4, 8\).*\(6, 8\)"):
        toy.warm_start(toy.init(jax.random.key(0)))


def test_training_updates_statistics_evaluation_does_not_need_them():
    toy, state = make_state()
    assert float(jnp.abs(state.variables["model"]["norm"]["mean"][...]).sum()) > 0
    first, second = (toy.evaluate(state, BATCH, jax.random.key(i))["error"][0] for i in (0, 1))
    assert float(first) == float(second)  # No dropout, no statistics of the batch.


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=4).map(tuple), st.text(max_size=4), plain)
def test_config_round_trip(sizes, name, value):
    config = ToyConfig(width=value, inner=InnerConfig(sizes=sizes, name=name))
    text = json.dumps(checkpoints.encode_config(config))
    assert checkpoints.decode_config(json.loads(text)) == config
