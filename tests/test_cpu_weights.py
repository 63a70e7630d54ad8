"""Weights arranged for a CPU give what the modules themselves give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio import cpu_weights
from t5x_audio.cpu_weights import dense_by_output
from t5x_audio.tokenizers import sanm, whisper


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 3), (5, 9)])
@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_dense_by_output(shape, dtype, within):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(*shape, 24)), rng.normal(size=(24, 16))
    product = jax.jit(lambda x, kernel: dense_by_output(x, kernel, jnp.float32))
    got = product(jnp.asarray(x, dtype), jnp.asarray(kernel.T, jnp.float32))
    assert got.dtype == jnp.float32 and got.shape == (*shape, 16)
    np.testing.assert_allclose(got, x @ kernel, atol=within * np.abs(x @ kernel).max())
    assert dense_by_output(jnp.asarray(x, dtype), jnp.asarray(kernel.T)).dtype == dtype


def leaves(module):
    return [x.shape for x in jax.tree.leaves(nnx.state(module))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_layers", [None, 2])
def test_encoders_stay_what_they_are(dtype, max_layers):
    rngs, within = nnx.Rngs(0), {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    generator = np.random.default_rng(0)
    config = sanm.SanmConfig(12, 4, 16, 2, 24, context="chunk", dtype=dtype)
    encoder = config.make(rngs)
    x = jnp.asarray(generator.normal(size=(2, 11, 12)), jnp.float32)
    lengths = jnp.array([11, 6])
    before = leaves(encoder)
    made = cpu_weights.arranged(encoder, max_layers)
    assert isinstance(made.rest, nnx.List) == (max_layers is None)
    run = nnx.jit(lambda module, *inputs: module(*inputs))
    np.testing.assert_allclose(
        run(made, x, lengths)[0], run(encoder, x, lengths)[0], atol=10 * within
    )
    assert leaves(encoder) == before  # the module itself is left alone

    blocks = whisper.Blocks(2, whisper.BlockConfig(16, 2, 24, dtype), rngs)
    x = jnp.asarray(generator.normal(size=(2, 30, 16)), jnp.float32)
    valid = jnp.arange(30) < jnp.array([30, 7])[:, None]
    made = cpu_weights.arranged(blocks, max_layers)
    assert isinstance(made.stack, nnx.List) and isinstance(
        made.stack[0].up, cpu_weights.LinearByOutput
    )
    np.testing.assert_allclose(run(made, x, valid), run(blocks, x, valid), atol=10 * within)
