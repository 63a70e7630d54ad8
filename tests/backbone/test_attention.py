"""Blockwise attention and its gradients against the plain formula differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.backbone.alibi import alibi_slopes
from t5x_audio.backbone.attention import attention

BATCH, GROUPS, HEADS, DIM = 2, 2, 3, 4
SLOPES = alibi_slopes(GROUPS * HEADS)


def places(length):
    """Row 0: two segments and padding; row 1: one segment."""
    first = length // 3
    rest = length - first - 2
    positions = np.array([[*range(first), *range(rest), 0, 0], [*range(length)]], np.int32)
    segments = np.array([[1] * first + [2] * rest + [0, 0], [1] * length], np.int32)
    return jnp.asarray(positions), jnp.asarray(segments)


def plain(query, key, value, place):
    positions, segments = place
    distance = positions[:, :, None] - positions[:, None, :]
    seen = (segments[:, :, None] == segments[:, None, :]) & (distance >= 0)
    slopes = jnp.asarray(SLOPES).reshape(1, GROUPS, HEADS, 1, 1)
    root = jnp.sqrt(jnp.abs(distance).astype(jnp.float32))[:, None, None]
    scores = jnp.einsum("bkgqd,bktd->bkgqt", query, key) * DIM**-0.5 - slopes * root
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), -1)
    return jnp.einsum("bkgqt,bktd->bkgqd", weights, value)


def gradient(function):
    return jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))


def inputs(length, scale=1.0):
    keys = jax.random.split(jax.random.key(length), 4)
    query = scale * jax.random.normal(keys[0], (BATCH, GROUPS, HEADS, length, DIM))
    key, value = (jax.random.normal(k, (BATCH, GROUPS, length, DIM)) for k in keys[1:3])
    return query, key, value, jax.random.normal(keys[3], query.shape)


@pytest.mark.parametrize(("length", "block"), [(7, 4), (8, 8)])
def test_output_and_gradients(length, block):
    query, key, value, probe = inputs(length)
    place = places(length)
    real = (place[1] > 0)[:, None, None, :, None]  # what padding sees is nobody's business

    def ours(query, key, value):
        out = attention(query, key, value, place, place, SLOPES, block, same_tokens=True)
        return jnp.where(real, out * probe, 0).sum(), out

    def theirs(query, key, value):
        out = plain(query, key, value, place)
        return jnp.where(real, out * probe, 0).sum(), out

    (_, out), grads = gradient(ours)(query, key, value)
    (_, expected), expected_grads = gradient(theirs)(query, key, value)
    np.testing.assert_allclose(jnp.where(real, out, 0), jnp.where(real, expected, 0), atol=2e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_leaving_keys_out_changes_nothing():
    query, key, value, _ = inputs(8)
    place = places(8)
    run = jax.jit(attention, static_argnums=(5, 6, 7))
    all_keys = run(query, key, value, place, place, SLOPES, 4, False)
    fewer = run(query, key, value, place, place, SLOPES, 4, True)
    real = np.asarray(place[1] > 0)[:, None, None, :, None]
    np.testing.assert_allclose(np.where(real, all_keys, 0), np.where(real, fewer, 0), atol=2e-6)


def test_large_scores_stay_finite():
    query, key, value, _ = inputs(8, scale=1e4)
    place = (jnp.arange(8)[None].repeat(BATCH, 0), jnp.ones((BATCH, 8), jnp.int32))

    def total(query, key, value):
        out = attention(query, key, value, place, place, SLOPES, 4, same_tokens=True)
        return out.sum(), out

    (_, out), grads = gradient(total)(query, key, value)
    assert np.isfinite(out).all()
    assert all(np.isfinite(g).all() for g in grads)
