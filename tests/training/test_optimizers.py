import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_run
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.training import optimizers


@functools.cache
def make_params():
    return nnx.split(toy_run.MlpConfig().make(nnx.Rngs(0)), nnx.Param, ...)[1]


def update(optimizer, params, grads, steps=1):
    return run(optimizer.make(params), params, grads, steps)


def run(tx, params, grads, steps):
    @jax.jit
    def all_steps(params, grads):
        state = tx.init(params)
        for _ in range(steps):
            updates, state = tx.update(grads, state, params)
        return updates

    return all_steps(params, grads)


def test_schedule_warms_up_decays_and_stays():
    cosine = optimizers.AdamW(peak_lr=2e-5, end_lr=5e-6, warmup_steps=10, total_steps=110)
    rates = [float(cosine.learning_rate(step)) for step in (0, 9, 10, 60, 110, 500)]
    np.testing.assert_allclose(rates, [2e-6, 2e-5, 2e-5, 1.25e-5, 5e-6, 5e-6], rtol=1e-5)
    linear = optimizers.AdamW(peak_lr=1.0, total_steps=10, schedule="linear")
    np.testing.assert_allclose(linear.learning_rate(5), 0.5)
    constant = optimizers.AdamW(peak_lr=1.0, warmup_steps=2, schedule="constant")
    np.testing.assert_allclose([constant.learning_rate(s) for s in (0, 1, 99)], [0.5, 1, 1])
    root = optimizers.AdamW(peak_lr=1.0, warmup_steps=4, schedule="inverse_sqrt")
    np.testing.assert_allclose(
        [root.learning_rate(s) for s in (0, 3, 15, 63)], [0.25, 1, 0.5, 0.25]
    )


def test_adamw_agrees_with_optax():
    params = make_params()
    grads = jax.tree.map(lambda x: jnp.sin(x + 1), params)
    ours = optimizers.AdamW(peak_lr=1e-3, schedule="constant", weight_decay=0.1, clip_norm=None)
    matrices = jax.tree.map(lambda x: x.ndim > 1, params)
    theirs = optax.adamw(1e-3, b2=0.95, weight_decay=0.1, mask=matrices)
    expected = run(theirs, params, grads, steps=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        update(ours, params, grads, steps=3),
        expected,
    )


def test_moments_in_bfloat16():
    params = make_params()
    grads = jax.tree.map(lambda x: jnp.sin(x + 1), params)
    settings = dict(peak_lr=1e-3, schedule="constant", b2=0.95, clip_norm=None)
    ours = optimizers.AdamW(moments_dtype="bfloat16", **settings)
    state = ours.make(params).init(params)
    kept = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert kept and all(leaf.dtype == jnp.bfloat16 for leaf in kept)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(state) if not leaf.ndim)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-6),
        update(ours, params, grads, steps=20),
        update(optimizers.AdamW(**settings), params, grads, steps=20),
    )
    # Small gradients after large ones: the second moment comes down as fast as in float32.
    shrunk = []
    for optimizer in (ours, optimizers.AdamW(**settings)):
        tx = optimizer.make(params)
        state = tx.init(params)
        for scale in [1.0] * 3 + [1e-3] * 100:
            updates, state = tx.update(jax.tree.map(lambda g, s=scale: s * g, grads), state, params)
        shrunk.append(updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=1e-5), *shrunk)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(moments_dtype="float16"), "float32 or bfloat16"),
        (dict(moments_dtype="bfloat16", b2=0.999), "stand still"),
    ],
)
def test_types_that_cannot_hold_moments(settings, message):
    with pytest.raises(UserError, match=message):
        optimizers.AdamW(peak_lr=1.0, schedule="constant", **settings)


def test_embedding_and_head_learn_at_their_own_rate():
    params = make_params()
    grads = jax.tree.map(jnp.ones_like, params)
    plain = optimizers.AdamW(peak_lr=1e-3, schedule="constant")
    fast = optimizers.AdamW(peak_lr=1e-3, schedule="constant", embedding_lr_multiplier=5.0)
    ratio = jax.tree.map(jnp.divide, update(fast, params, grads), update(plain, params, grads))
    np.testing.assert_allclose(ratio["table"][...], 5.0, rtol=1e-6)
    np.testing.assert_allclose(ratio["head"]["kernel"][...], 5.0, rtol=1e-6)
    np.testing.assert_allclose(ratio["up"]["kernel"][...], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio["head"]["bias"][...], 1.0, rtol=1e-6)


def test_stacked_gains_do_not_decay():
    gain = nnx.Param(jnp.ones((3, 4)), logical_axes=("layers", "embed"))
    kernel = nnx.Param(jnp.ones((3, 4, 4)), logical_axes=("layers", "embed", "mlp"))
    params = nnx.State({"gain": gain, "kernel": kernel})
    optimizer = optimizers.AdamW(peak_lr=1.0, schedule="constant", weight_decay=0.5)
    updates = update(optimizer, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(updates["gain"][...], 0.0)
    np.testing.assert_allclose(updates["kernel"][...], -0.5)


def backbone_params():
    axes = {
        "embedding": ("vocab", "embed"), "query": ("layers", "embed", "heads", "head_dim"),
        "out": ("layers", "heads", "head_dim", "embed"), "up": ("layers", "embed", "mlp"),
        "query_bias": ("layers", "heads", "head_dim"), "gain": ("layers", "embed"),
    }  # fmt: skip
    sizes = {"vocab": 20, "embed": 12, "heads": 4, "head_dim": 6, "mlp": 32, "layers": 3}
    rng = np.random.default_rng(0)
    return nnx.State(
        {
            name: nnx.Param(
                jnp.asarray(rng.normal(size=[sizes[a] for a in of]), jnp.float32), logical_axes=of
            )
            for name, of in axes.items()
        }
    )


MUON = dict(peak_lr=1.0, schedule="constant", weight_decay=0.0, clip_norm=None)


def test_muon_turns_matrices_into_rotations_of_one_size():
    params = backbone_params()
    updates = update(optimizers.Muon(newton_schulz_steps=10, **MUON), params, params, steps=2)
    for name, shape in (("query", (12, 24)), ("out", (24, 12)), ("up", (12, 32))):
        for layer in np.asarray(updates[name][...]):
            matrix = layer.reshape(shape)
            singular = np.linalg.svd(matrix, compute_uv=False)
            size = 0.2 * max(shape) ** 0.5
            # The quintic iteration ends between 0.7 and 1.2 on purpose (Jordan, 2024).
            assert (0.6 * size < singular).all() and (singular < 1.3 * size).all()


def test_muon_is_that_of_optax_on_matrices_and_adam_elsewhere():
    params = backbone_params()
    got = update(optimizers.Muon(**MUON), params, params, steps=3)
    plain = {
        f"{name}/{layer}": params[name][...][layer].reshape(shape)
        for name, shape in (("query", (12, 24)), ("out", (24, 12)), ("up", (12, 32)))
        for layer in range(3)
    }
    theirs = optax.contrib.muon(1.0, consistent_rms=0.2)
    expected = run(theirs, plain, plain, steps=3)
    for name, value in expected.items():
        name, layer = name.split("/")
        ours = got[name][...][int(layer)].reshape(value.shape)
        np.testing.assert_allclose(ours, value, atol=1e-5)
    rest = {n: params[n][...] for n in ("embedding", "query_bias", "gain")}
    adam = run(optax.nadam(1.0, b2=0.95), rest, rest, steps=3)
    for name, value in adam.items():
        np.testing.assert_allclose(got[name][...], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [optimizers.AdamW, optimizers.Adafactor, optimizers.Muon])
def test_all_minimise_and_clip(kind):
    optimizer = kind(peak_lr=0.05, schedule="constant", weight_decay=0.0)
    params = make_params()
    tx = optimizer.make(params)

    def loss(params):
        return sum(jnp.sum((x - 0.5) ** 2) for x in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, before = jax.jit(tx.init)(params), loss(params)
    for _ in range(60):
        params, state = step(params, state)
    assert loss(params) < 0.1 * before


def test_bad_settings_are_one_line():
    with pytest.raises(UserError, match="schedule='cosin': use one of cosine"):
        optimizers.AdamW(peak_lr=1.0, schedule="cosin")
    with pytest.raises(UserError, match="needs total_steps"):
        optimizers.AdamW(peak_lr=1.0)


def test_sgd_is_pytorchs_by_hand():
    sgd = optimizers.Sgd(peak_lr=0.1, schedule="constant", momentum=0.9, l2=0.5)
    params = {"gain": jnp.array([2.0])}
    tx = sgd.make(params)
    state = tx.init(params)
    velocity, value = 0.0, 2.0
    for gradient in (1.0, -3.0, 0.5):
        updates, state = tx.update({"gain": jnp.array([gradient])}, state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity + gradient + 0.5 * value
        value -= 0.1 * velocity
        np.testing.assert_allclose(params["gain"], value, rtol=1e-6)
