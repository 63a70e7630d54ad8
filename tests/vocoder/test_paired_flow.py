"""The flow of paired codes: its rows, and batches that change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.dit import DitConfig
from t5x_audio.vocoder.paired_flow import PairedFlowConfig, pairs
from t5x_audio.vocoder.upsampling_conformer import UpsamplingConformerConfig

CONFIG = PairedFlowConfig(
    codebook=20, linguistic_size=8, num_mels=6, speaker_dim=4, num_steps=3,
    encoder=UpsamplingConformerConfig(ConformerConfig(16, 2, 2, 24), 1, 2, 2),
    estimator=DitConfig(16, 2, 2, 8, 24),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """A model whose zeros (modulations, last projection) are not zeros."""
    model = CONFIG.make(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        noise = rng.normal(size=variable.shape).astype(np.float32)
        variable[...] = variable[...] + 0.2 * noise
    return model


def test_rows_of_the_table():
    codes = jnp.array([[3, 7, 8, 12, 19, 0, 1, 9, 9, 10, 5, 5]])  # an odd tail is no group
    want = [(3, 9), (7, 13), (8, 20), (0, 10), (1, 10), (8, 11)]
    assert pairs(codes, 8)[0].tolist() == [list(row) for row in want]
    assert CONFIG.mel_lengths(12) == 12 and CONFIG.mel_lengths(15) == 18


def test_a_batch_gives_what_each_gives_alone(model):
    rng = np.random.default_rng(1)
    codes = jnp.asarray(rng.integers(0, 20, (2, 20)), jnp.int32)
    lengths, prompts = jnp.array([10, 20]), jnp.array([5, 0])
    speaker = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    mel, noise = (jnp.asarray(rng.normal(size=(2, 24, 6)), jnp.float32) for _ in range(2))

    @jax.jit
    def sample(codes, lengths, speaker, mel, prompts, noise):
        return model.sample(model.conditions(codes, lengths, speaker, mel, prompts), noise)

    both = sample(codes, lengths, speaker, mel, prompts, noise)
    assert both.shape == (2, 24, 6) and not both[0, 12:].any()
    alone = sample(
        codes[:1, :10], lengths[:1], speaker[:1], mel[:1, :12], prompts[:1], noise[:1, :12]
    )
    np.testing.assert_allclose(both[:1, :12], alone, atol=1e-3)
    np.testing.assert_allclose(
        both[1:], sample(codes[1:], lengths[1:], speaker[1:], mel[1:], prompts[1:], noise[1:]),
        atol=1e-3,
    )  # fmt: skip


def test_the_encoder_does_not_see_padding(model):
    encoder = model.encoder
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 12, 16)), jnp.float32)
    padded = jnp.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=9.0)
    mask = (jnp.arange(16) < 12).astype(jnp.float32)[None, :, None]
    np.testing.assert_allclose(encoder(padded, mask)[:, :24], encoder(x, mask[:, :12]), atol=1e-4)
    assert not encoder(padded, mask)[:, 24:].any()


@pytest.mark.parametrize("prompt", [0, 3])
def test_a_stream_of_the_encoder_gives_what_the_whole_gives(model, prompt):
    encoder, ahead = model.encoder, CONFIG.encoder.look_ahead
    sizes = ([prompt] if prompt else []) + [2, 5, 3, 3]
    total = sum(sizes)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, total, 16)), jnp.float32)
    chunks = (jnp.repeat(jnp.arange(len(sizes)), np.array(sizes)), jnp.int32(prompt))
    want = nnx.jit(lambda e, x: e(x, jnp.ones((2, total, 1)), None, chunks))(encoder, x)
    step = nnx.jit(
        lambda e, x, state, prompt, valid: e.step(x, state, prompt, valid),
        static_argnames="prompt",
    )
    state, made, start = encoder.initial_state(2, prompt + 1), [], 0
    padded = jnp.pad(x, ((0, 0), (0, 9), (0, 0)), constant_values=5.0)
    for number, size in enumerate(sizes):
        first, last = prompt > 0 and number == 0, number == len(sizes) - 1
        length = size + 2 * last  # the last chunk with others behind it
        part = padded[:, start : start + length + ahead]
        y, state = step(encoder, part, state, first, jnp.int32(size) if last else None)
        made.append(y[:, : 2 * size])
        start += size
    np.testing.assert_allclose(np.concatenate(made, axis=1), want, atol=2e-4)
