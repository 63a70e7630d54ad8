"""Chunked cross-entropy against the whole one differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.objectives import cross_entropy

ROWS, LENGTH, EMBED, VOCAB = 2, 12, 8, 20
CHUNKS = pytest.mark.parametrize("chunk", [4, 64])


def made():
    keys = jax.random.split(jax.random.key(0), 4)
    targets = jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCAB)
    return (
        jax.random.normal(keys[0], (ROWS, LENGTH, EMBED)),
        jax.random.normal(keys[1], (EMBED, VOCAB)),
        targets,
        jax.random.uniform(keys[3], (ROWS, LENGTH)) * (targets > 3),
    )


def log_probs(hidden, kernel, targets):
    whole = jax.nn.log_softmax(hidden @ kernel)
    return whole[jnp.arange(ROWS)[:, None], jnp.arange(LENGTH), targets]


def gradient(function):
    return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@CHUNKS
@pytest.mark.parametrize("z_loss", [0.1, 0.0])
def test_weighted_sum(monkeypatch, chunk, z_loss):
    monkeypatch.setattr(cross_entropy, "_CHUNK", chunk)
    hidden, kernel, targets, weights = made()

    def ours(hidden, kernel):
        total, (losses, _) = cross_entropy.cross_entropy(hidden, kernel, targets, weights, z_loss)
        return 3 * total, losses

    def theirs(hidden, kernel):
        losses = -log_probs(hidden, kernel, targets)
        normaliser = jax.nn.logsumexp(hidden @ kernel, -1)
        return 3 * jnp.sum(weights * (losses + z_loss * normaliser**2)), losses

    want = gradient(theirs)(hidden, kernel)
    assert_close(gradient(ours)(hidden, kernel), want)
    np.testing.assert_allclose(jax.jit(ours)(hidden, kernel)[0], want[0][0], rtol=1e-5)


@CHUNKS
def test_sums_of_rows(monkeypatch, chunk):
    monkeypatch.setattr(cross_entropy, "_CHUNK", chunk)
    hidden, kernel, targets, weights = made()

    def ours(hidden, kernel):
        rows = cross_entropy.row_log_probs(hidden, kernel, targets, weights)
        return jnp.sum(jnp.sin(rows)), rows  # every row's gradient is scaled by its own cosine

    def theirs(hidden, kernel):
        rows = jnp.sum(weights * log_probs(hidden, kernel, targets), -1)
        return jnp.sum(jnp.sin(rows)), rows

    assert_close(gradient(ours)(hidden, kernel), gradient(theirs)(hidden, kernel))
