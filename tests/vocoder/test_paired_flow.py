"""The flow of paired codes: its rows, and batches that change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.dit import DitConfig
from t5x_audio.vocoder.flow_stream import CacheStream
from t5x_audio.vocoder.paired_flow import PairedFlowConfig, pairs
from t5x_audio.vocoder.ring import Chunks
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


def test_another_frame_rate_is_refused():
    with pytest.raises(UserError, match="50 frames a second at 22050 Hz need a hop of 441 samples"):
        dataclasses.replace(CONFIG, sample_rate=22050).make(nnx.Rngs(0))


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
    numbers = jnp.repeat(jnp.arange(len(sizes)), np.array(sizes))
    chunks = Chunks(jnp.stack([numbers] * 2), jnp.array([prompt] * 2))
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


@pytest.mark.parametrize("prompt", [0, 10])
def test_a_stream_samples_what_the_whole_samples(model, prompt):
    """The whole under what a stream sees, from the same noise."""
    codes = np.random.default_rng(4).integers(0, 20, (1, prompt + 40)).astype(np.int32)
    speaker = jnp.ones((1, 4))
    frames, prompt_frames = CONFIG.mel_lengths(codes.shape[1]), CONFIG.mel_lengths(prompt)
    rng = np.random.default_rng(5)
    mel, noise = (jnp.asarray(rng.normal(size=(1, frames, 6)), jnp.float32) for _ in range(2))
    sizes = ([prompt] if prompt else []) + [15, 15, 10]
    numbers = jnp.repeat(jnp.arange(len(sizes)), jnp.array(sizes) * 3 // 5)
    chunks = Chunks(numbers[None], jnp.array([prompt * 3 // 5]))

    @jax.jit
    def whole(codes, mel, noise):
        lengths = jnp.array([codes.shape[1]])
        prompts = jnp.array([prompt])
        conditions = model.conditions(codes, lengths, speaker, mel, prompts, chunks=chunks)
        return model.sample(conditions, noise)

    @jax.jit
    def step(numbers, codes, state, mel, valid):
        return model.step(codes, speaker, noise[:, numbers], state, mel, valid)

    def call(codes, numbers, state, mel, valid):
        mel = None if mel is None else mel[None]
        made, state = step(numbers, codes[None], state, mel, valid)
        return made[0], state

    stream = CacheStream(
        CONFIG, call, model.initial_state(1, prompt), codes[0, :prompt], mel[0, :prompt_frames], 15
    )
    made = [stream.push(codes[0, prompt : prompt + 21]), stream.push(codes[0, prompt + 21 :])]
    made.append(stream.finish())
    assert [len(one) for one in made] == [18, 18, 12]
    want = whole(codes, mel, noise)[0, prompt_frames:]
    np.testing.assert_allclose(np.concatenate(made), want, atol=1e-3 * np.abs(want).max())
