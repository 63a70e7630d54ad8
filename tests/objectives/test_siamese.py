"""SimSiam, BYOL, MoCo and SSQL over each: what a step computes, updates and leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.images.resnet import ResnetConfig
from t5x_audio.images.siamese import Ema, SiameseConfig
from t5x_audio.objectives import siamese, ssql
from t5x_audio.objectives.siamese import Siamese
from t5x_audio.objectives.ssql import Ssql
from t5x_audio.training.checkpoints import named_arrays
from t5x_audio.training.learner import GradientLearner
from t5x_audio.training.optimizers import Sgd

SIMSIAM = SiameseConfig(ResnetConfig((1,), (4,)), (8, 8), predictor=4)
CONFIGS = {
    "simsiam": SIMSIAM,
    "byol": dataclasses.replace(SIMSIAM, momentum=0.75),
    "moco": dataclasses.replace(
        SIMSIAM, predictor=0, projector_norms=False, momentum=0.75, queue=12
    ),
}


def learner_of(method, quantised=True, **options):
    objective = Siamese(method=method)
    if quantised:
        objective = Ssql(objective, **options)
    return GradientLearner(CONFIGS[method], objective, Sgd(peak_lr=0.1, schedule="constant"))


def batch(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 8, 3))
    return {"images": pixels.astype(np.uint8)}


def values(metrics):
    return {name: float(total) / float(weight) for name, (total, weight) in metrics.items()}


@pytest.mark.parametrize("method", siamese.METHODS)
def test_one_compiled_step_learns_at_all_bits(method):
    learner = learner_of(method)
    start = state = jax.jit(learner.init)(jax.random.key(0))
    step = jax.jit(learner.step)
    drawn = set()
    for index in range(8):
        state, metrics = step(state, batch(index), jax.random.key(index))
        got = values(metrics)
        assert all(np.isfinite(value) for value in got.values()), (index, got)
        drawn.add((got["weight_bits"], got["activation_bits"]))
        assert got["loss"] == pytest.approx(0.5 * (got["ssl_loss"] + got["quantized_loss"]), 1e-4)
    assert step._cache_size() == 1 and len(drawn) > 3
    assert all(2 <= w <= 8 and 4 <= a <= 8 for w, a in drawn)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), start.params, state.params)
    changes = named_arrays(moved["model"])
    assert all(change > 0 for name, change in changes.items() if name.endswith("kernel"))
    # The state is the plain model's: nothing of the quantisation stays in it.
    assert jax.tree.structure(start) == jax.tree.structure(state)
    stats = named_arrays(state.variables["model"])
    assert not any("quantizer" in name for name in stats)


def test_the_copy_follows_and_the_queue_turns():
    learner = learner_of("moco")
    state = jax.jit(learner.init)(jax.random.key(0))
    step = jax.jit(learner.step)
    first, _ = step(state, batch(), jax.random.key(0))
    second, _ = step(first, batch(1), jax.random.key(1))

    def copy_of(state):
        return named_arrays(state.variables["model"])["target_encoder/stem/conv/kernel"]

    def online(state):
        return named_arrays(state.params["model"])["encoder/stem/conv/kernel"]

    np.testing.assert_array_equal(copy_of(first), online(state))
    want = 0.75 * copy_of(first) + 0.25 * online(first)
    np.testing.assert_allclose(copy_of(second), want, rtol=1e-5)
    before, middle, after = (
        named_arrays(s.variables["model"])["queue"] for s in (state, first, second)
    )
    assert (before[:6] != middle[:6]).any() and (before[6:] == middle[6:]).all()
    assert (middle[6:] != after[6:]).any() and (middle[:6] == after[:6]).all()
    np.testing.assert_allclose(np.linalg.norm(after, axis=-1), 1.0, rtol=1e-5)


def test_without_quantised_layers_it_is_the_plain_objective():
    plain, low = learner_of("simsiam", False), learner_of("simsiam")
    rules = ssql.Rules(weights=((".*kernel", 0),))
    low = dataclasses.replace(low, objective=dataclasses.replace(low.objective, rules=rules))
    state = jax.jit(plain.init)(jax.random.key(0))
    rng = jax.random.key(3)
    got = values(jax.jit(low.evaluate)(state, batch(), rng))
    view_rng, _ = jax.random.split(rng)
    want = values(jax.jit(plain.evaluate)(state, batch(), view_rng))
    assert got["quantized_loss"] == pytest.approx(got["ssl_loss"], abs=1e-6)
    assert got["loss"] == pytest.approx(want["loss"], abs=1e-6)
    assert got["quantization_error"] == pytest.approx(0.0, abs=1e-6)


def test_the_error_splits_into_its_terms():
    rng = np.random.default_rng(0)
    z, low, target = rng.normal(size=(3, 5, 7)).astype(np.float32)
    terms = ssql.decomposition((z,), (low,), (target,))
    norm = [a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (z, low, target)]
    want = np.mean(np.sum((norm[1] - norm[2]) ** 2, -1))
    product = np.sqrt(terms["ssl_error"] * terms["quantization_error"])
    got = terms["ssl_error"] + terms["quantization_error"] + 2 * terms["error_cosine"] * product
    assert got == pytest.approx(want, rel=1e-5)


def test_losses_by_hand():
    p, target = jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.array([[5.0, 0.0], [0.0, 2.0]])
    assert siamese.negative_cosine(p, target) == pytest.approx(-0.3)
    queue = jnp.array([[0.0, 1.0]])
    logits = np.array([[0.6, 0.8], [0.0, 0.0]]) / 0.5
    want = np.mean(np.log(np.exp(logits).sum(-1)) - logits[:, 0])
    assert siamese.contrast(p, target, queue, 0.5) == pytest.approx(want, rel=1e-5)
    gradient = jax.grad(siamese.negative_cosine)(jnp.zeros((2, 3)), jnp.ones((2, 3)))
    assert np.isfinite(gradient).all()  # a collapsed row does no harm
    assert siamese.spread(jnp.ones((4, 9)))[0] == pytest.approx(0.0, abs=1e-5)


def test_reverse_teaches_the_plain_branch_quantised_targets():
    learner = learner_of(
        "simsiam", reverse=True, same_bits=True, weight_bits=(4, 16), activation_bits=(4, 16)
    )
    state = jax.jit(learner.init)(jax.random.key(0))
    _, metrics = jax.jit(learner.step)(state, batch(), jax.random.key(0))
    got = values(metrics)
    assert got["weight_bits"] == got["activation_bits"]
    assert got["loss"] != pytest.approx(got["ssl_loss"], abs=1e-9)
    with pytest.raises(UserError, match="Ssql.reverse"):
        Ssql(Siamese("byol"), reverse=True)


def test_bad_settings_are_named():
    for bits in ((1, 8), (2, 9)):
        with pytest.raises(UserError, match=r"Ssql.weight_bits"):
            Ssql(weight_bits=bits)
    with pytest.raises(UserError, match="fewest first"):
        Ssql(activation_bits=(8, 4))
    with pytest.raises(UserError, match="Siamese.method"):
        Siamese("simclr")
    with pytest.raises(UserError, match="needs a queue"):
        Siamese("moco")(SIMSIAM.make(nnx.Rngs(0)), batch(), jax.random.key(0), True)
    model = dataclasses.replace(CONFIGS["moco"], queue=10).make(nnx.Rngs(0))
    with pytest.raises(UserError, match="queue=10 is no multiple of the batch of 6"):
        model.enqueue(jnp.ones((6, 8)))
    with pytest.raises(UserError, match="give a momentum"):
        SiameseConfig(queue=4)


def test_the_copy_has_no_parameters():
    model = CONFIGS["byol"].make(nnx.Rngs(0))
    names = named_arrays(nnx.state(model, nnx.Param))
    assert not any(name.startswith("target") for name in names)
    assert len(jax.tree.leaves(nnx.state(model, Ema))) == len(
        jax.tree.leaves(nnx.state((model.encoder, model.projector), nnx.Param))
    )
