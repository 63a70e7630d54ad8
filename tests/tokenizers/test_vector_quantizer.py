import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.tokenizers import vector_quantizer


def quantizer(num_codes=8, **settings):
    return vector_quantizer.VectorQuantizer(num_codes, 6, nnx.Rngs(0), **settings)


def features(batch=2, length=30, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, length, 6)), jnp.float32)


ALL = jnp.ones((2, 30), bool)


def test_codes_are_the_most_similar_by_cosine():
    model, x = quantizer(), features()
    codes = model.codes[...] / jnp.linalg.norm(model.codes[...], axis=-1, keepdims=True)
    want = jnp.argmax(jnp.einsum("btd,kd->btk", x, codes), axis=-1)
    np.testing.assert_array_equal(model.encode(x * 7.0), want)


def test_evaluation_changes_no_state():
    model = quantizer()
    before = jax.tree.map(np.asarray, nnx.state(model))
    _, codes, _ = model(features(), ALL)
    np.testing.assert_array_equal(codes, model.encode(features()))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_gradient_passes_straight_through():
    model, x = quantizer(), features()
    target = features(seed=1)

    def through(x):
        return jnp.sum(model(x, ALL)[0] * target)

    def around(x):
        return jnp.sum(vector_quantizer.normalize(x) * target)

    np.testing.assert_allclose(jax.grad(through)(x), jax.grad(around)(x), atol=1e-6)
    np.testing.assert_allclose(
        model(x, ALL)[0], jnp.take(model.codes[...], model.encode(x), axis=0), atol=1e-6
    )


def test_training_uses_every_code_and_lowers_the_commitment():
    model, x = quantizer(), features()
    first = float(model(x, ALL)[2])
    for step in range(60):
        _, codes, commitment = model(x, ALL, jax.random.key(step), train=True)
    assert float(commitment) < 0.8 * first
    assert len(np.unique(codes)) == 8
    np.testing.assert_allclose(jnp.linalg.norm(model.codes[...], axis=-1), 1.0, atol=1e-5)


def test_a_code_settles_on_the_mean_direction_of_what_it_wins():
    model = quantizer(num_codes=1, decay=0.5)
    x = features() + jnp.array([3.0, 0, 0, 0, 0, 0])
    for step in range(30):
        model(x, ALL, jax.random.key(step), train=True)
    mean = vector_quantizer.normalize(vector_quantizer.normalize(x).mean((0, 1)))
    np.testing.assert_allclose(model.codes[...][0], mean, atol=1e-4)


def test_a_code_that_never_wins_is_revived():
    model, x = quantizer(), features()
    for step in range(5):
        model(x, ALL, jax.random.key(step), train=True)
    away = vector_quantizer.normalize(-x.mean((0, 1)) + 100.0)
    model.codes[...] = model.codes[...].at[3].set(away)
    model.counts[...] = model.counts[...].at[3].set(0.0)
    _, codes, _ = model(x, ALL, jax.random.key(9), train=True)
    assert 3 in np.asarray(codes)


def test_padding_teaches_nothing():
    x = features()
    valid = jnp.broadcast_to(jnp.arange(30) < 12, (2, 30))
    one, two = quantizer(), quantizer()
    for step in range(4):
        _, _, loss_one = one(x, valid, jax.random.key(step), train=True)
        noisy = jnp.where(valid[..., None], x, 9.0)
        _, _, loss_two = two(noisy, valid, jax.random.key(step), train=True)
    np.testing.assert_allclose(loss_one, loss_two, rtol=1e-6)
    np.testing.assert_allclose(one.codes[...], two.codes[...], atol=1e-6)
    assert float(one.counts[...].sum()) <= 24


def test_quantisation_sets_in_over_the_warm_up():
    model = quantizer(warmup_steps=4)
    x, valid = features(batch=40, length=3), jnp.ones((40, 3), bool)
    shares = []
    for step in range(6):
        out, codes, _ = model(x, valid, jax.random.key(step), train=True)
        passed = np.isclose(out, vector_quantizer.normalize(x), atol=1e-6).all(axis=(1, 2))
        shares.append(1 - passed.mean())
    assert shares[0] == 0.0 and shares[4] == shares[5] == 1.0
    assert 0.2 < shares[2] < 0.8
    out, codes, _ = model(x, valid)
    np.testing.assert_allclose(out, jnp.take(model.codes[...], codes, axis=0), atol=1e-6)


def test_standardised_codes_have_zero_mean_and_unit_variance():
    model, x = quantizer(decay=0.0), features() + jnp.array([5.0, 0, 0, 0, 0, 0])
    for step in range(3):
        out, _, _ = model(x, ALL, jax.random.key(step), train=True)
    # The counts are those of the last batch, whose codes moved a little after it was quantised.
    standard = model.standardize(jnp.take(model.codes[...], model.encode(x), axis=0))
    assert np.abs(np.asarray(standard.mean((0, 1)))).max() < 0.2
    np.testing.assert_allclose(jnp.mean(jnp.square(standard)), 1.0, atol=0.2)
