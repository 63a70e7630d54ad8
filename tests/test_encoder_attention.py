"""Attention of encoders: the CPU's form, the compiler's and float64 agree, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio import encoder_attention
from t5x_audio.encoder_attention import attend


def arrays(batch, length, keys, heads=2, dim=8, bias_heads=None):
    rng = np.random.default_rng(length + keys)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    valid = jnp.asarray(np.arange(keys) < rng.integers(1, keys + 1, (batch, 1)))
    bias = None if bias_heads is None else normal(batch, bias_heads, length, keys)
    query = normal(batch, length, heads, dim)
    return query, normal(batch, keys, heads, dim), normal(batch, keys, heads, dim), valid, bias


def reference(query, key, value, valid, bias):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
    scores = scores if bias is None else scores + np.asarray(bias, np.float64)
    scores = np.where(np.asarray(valid)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights, value)


@pytest.mark.parametrize("at_once", [1 << 20, 100, 30], ids=["together", "some heads", "blocks"])
@pytest.mark.parametrize("bias_heads", [None, 1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 7, 7), (2, 13, 6), (3, 6, 13)])
def test_every_form_agrees_with_float64(monkeypatch, at_once, bias_heads, shape):
    monkeypatch.setattr(encoder_attention, "_AT_ONCE", at_once)
    given = arrays(*shape, heads=3, bias_heads=bias_heads)
    expected = reference(*given)
    np.testing.assert_allclose(jax.jit(attend)(*given), expected, atol=1e-5)
    bias = jnp.zeros((1, 1, 1, 1)) if given[4] is None else given[4]
    masked = jnp.where(given[3], 0.0, -jnp.inf)[:, None, None]
    scaled = given[0] * given[0].shape[-1] ** -0.5
    plain = encoder_attention._at_once(scaled, *given[1:3], bias + masked)
    np.testing.assert_allclose(plain, expected, atol=1e-5)


def test_gradients_of_the_forms_agree(monkeypatch):
    given = arrays(2, 9, 9, heads=4, bias_heads=4)

    def gradients():
        @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
        def of(query, key, value, bias):
            return jnp.sum(jnp.sin(attend(query, key, value, given[3], bias)))

        return of(*given[:3], given[4])

    together = gradients()
    monkeypatch.setattr(encoder_attention, "_AT_ONCE", 50)
    for one, other in zip(gradients(), together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_query_that_sees_nothing_gets_a_finite_answer():
    query, key, value, valid, _ = arrays(2, 4, 4)
    mixed = attend(query, key, value, jnp.zeros_like(valid))
    np.testing.assert_allclose(mixed, jnp.broadcast_to(value.mean(1, keepdims=True), mixed.shape),
                               atol=1e-5)  # fmt: skip


def test_results_have_the_type_of_the_values():
    given = (x.astype(jnp.bfloat16) for x in arrays(2, 6, 6)[:3])
    query, key, value = given
    mixed = attend(query, key, value, jnp.ones((2, 6), bool))
    assert mixed.dtype == jnp.bfloat16
    expected = reference(query, key, value, np.ones((2, 6), bool), None)
    np.testing.assert_allclose(mixed.astype(np.float32), expected, atol=0.03)
