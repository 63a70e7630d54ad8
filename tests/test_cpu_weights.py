"""Weights arranged for a CPU give what the modules themselves give."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio import cpu_weights
from t5x_audio.cpu_weights import dense_by_output
from t5x_audio.quantization.packed_model import PackedConfig, PackedParam, packed_model
from t5x_audio.tokenizers import sanm, whisper
from t5x_audio.vocoder import flow, paired_flow
from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.dit import DitConfig
from t5x_audio.vocoder.unet import UnetConfig
from t5x_audio.vocoder.upsampling_conformer import UpsamplingConformerConfig


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


CODEBOOK, SPEAKER_DIM, NUM_MELS = 20, 4, 6
UNET = flow.FlowConfig(
    codebook=CODEBOOK, num_mels=NUM_MELS, speaker_dim=SPEAKER_DIM, num_steps=2,
    encoder=ConformerConfig(16, 2, 2, 24),
    estimator=UnetConfig((16, 16), 2, 2, 2, 8, 4),
)  # fmt: skip
DIT = paired_flow.PairedFlowConfig(
    codebook=CODEBOOK, linguistic_size=8, num_mels=NUM_MELS, speaker_dim=SPEAKER_DIM, num_steps=2,
    encoder=UpsamplingConformerConfig(ConformerConfig(16, 2, 2, 24), 1, 2, 2),
    estimator=DitConfig(16, 2, 2, 8, 24),
)  # fmt: skip


def not_zero(model):
    """Last projections start at zero and would hide what is before them."""
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        noise = rng.normal(size=variable.shape).astype(np.float32)
        variable[...] = variable[...] + 0.2 * noise
    return model


def inputs(model, groups=4):
    rng = np.random.default_rng(1)
    codes = np.stack([rng.integers(0, 8, 5 * groups)] * 2)
    codes.reshape(2, groups, 5)[..., 2:] += 8
    speaker = rng.normal(size=(2, SPEAKER_DIM)).astype(np.float32)
    noise = rng.normal(size=(2, model.config.mel_lengths(5 * groups), NUM_MELS))
    return jnp.asarray(codes), jnp.asarray(speaker), jnp.asarray(noise, jnp.float32)


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
def test_flows_stay_what_they_are(config):
    model = not_zero(config.make(nnx.Rngs(0)))
    codes, speaker, noise = inputs(model)

    @nnx.jit
    def mel(model):
        return model.sample(model.conditions(codes, jnp.array([20, 15]), speaker), noise)

    before = leaves(model)
    made = cpu_weights.arranged(model)
    stack = made.estimator.mid[1].blocks if config is UNET else made.estimator.blocks
    assert isinstance(stack[1].up, cpu_weights.LinearByOutput)
    assert leaves(cpu_weights.arranged(made)) == leaves(made)
    np.testing.assert_allclose(mel(made), mel(model), atol=1e-3)
    assert leaves(model) == before


def test_a_stream_of_an_arranged_flow_stays_what_it_is():
    model = not_zero(DIT.make(nnx.Rngs(0)))
    codes, speaker, noise = inputs(model)
    state = model.initial_state(2, 0)

    @nnx.jit
    def chunk(model):
        first, after = model.step(
            codes[:, : 10 + DIT.look_ahead_codes], speaker, noise[:, :12], state
        )
        return first, after

    (one, state_one), (other, state_other) = chunk(cpu_weights.arranged(model)), chunk(model)
    np.testing.assert_allclose(one, other, atol=1e-3)
    chex.assert_trees_all_close(state_one, state_other, atol=1e-3)


def test_packed_weights_stay_packed():
    model = packed_model(not_zero(UNET.make(nnx.Rngs(0))), PackedConfig(UNET, bits=8))
    codes, speaker, noise = inputs(model)

    @nnx.jit
    def mel(model):
        return model.sample(model.conditions(codes, jnp.array([20, 15]), speaker), noise)

    made = cpu_weights.arranged(model)
    assert isinstance(made.estimator.mid[1].blocks[1].up.kernel, PackedParam)
    np.testing.assert_allclose(mel(made), mel(model), atol=1e-3)
