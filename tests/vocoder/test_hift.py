import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.audio.features import MelConfig, mel_spectrogram
from t5x_audio.errors import UserError
from t5x_audio.vocoder.hift import (
    HIFT_24K,
    HarmonicSource,
    HiftConfig,
    interpolated_source_phase,
    source_phase,
)

SMALL = HiftConfig(
    num_mels=12,
    sample_rate=16000,
    base_channels=16,
    num_harmonics=3,
    upsample_rates=(5, 3),
    upsample_kernels=(11, 7),
    istft_n_fft=32,
    istft_hop=16,
    resblock_kernels=(3, 5),
    resblock_dilations=(2,),
    source_kernels=(3, 3),
    f0_channels=16,
    f0_layers=2,
)


@pytest.fixture(scope="module")
def generator(build):
    return build(SMALL)


@pytest.mark.parametrize(
    ("config", "hop", "millions"), [(HiftConfig(), 256, 20.5), (HIFT_24K, 480, 20.8)]
)
def test_published_size(config, hop, millions):
    module = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    assert config.hop == hop
    assert round(sum(x.size for x in jax.tree.leaves(module)) / 1e6, 1) == millions


def test_shape_range_and_determinism(generator):
    mel = jax.random.normal(jax.random.key(0), (2, 6, 12)) * 4.0
    run = nnx.jit(lambda g, m, k: g(m, k))
    samples = run(generator, mel, jax.random.key(1))
    assert samples.shape == (2, 6 * SMALL.hop)
    assert jnp.isfinite(samples).all()
    assert jnp.abs(samples).max() <= SMALL.audio_limit
    np.testing.assert_array_equal(samples, run(generator, mel, jax.random.key(1)))
    assert jnp.abs(samples - run(generator, mel, jax.random.key(2))).max() > 0


FILTER = dataclasses.replace(
    SMALL,
    upsample_rates=(4,),
    upsample_kernels=(8,),
    source_kernels=(3,),
    istft_n_fft=240,
    istft_hop=60,
    phase_range=math.pi,
    filters_source=True,
)
FILTERS = dataclasses.replace(FILTER, filters_noise=True)
ENVELOPES = dataclasses.replace(FILTERS, envelope_fmax=8000.0)


@pytest.mark.parametrize("config", [SMALL, FILTER, FILTERS, ENVELOPES])
def test_padding_does_not_change_a_row(build, config):
    generator = build(config)
    mel = jax.random.normal(jax.random.key(0), (2, 9, 12))
    source = jax.random.normal(jax.random.key(1), (2, 9 * SMALL.hop)) * 0.1
    lengths = jnp.array([5, 9])
    inside = jnp.arange(9 * SMALL.hop) < lengths[:, None] * SMALL.hop
    decode = nnx.jit(lambda g, m, s, n: g.decode(m, s, n, noise=0.5 * s))
    both = decode(generator, mel, source * inside, lengths)
    alone = decode(generator, mel[:1, :5], source[:1, : 5 * SMALL.hop], None)
    np.testing.assert_allclose(both[:1, : 5 * SMALL.hop], alone, atol=2e-6)
    assert not both[0, 5 * SMALL.hop :].any()


def test_f0_predictor_masks_padding(generator):
    mel = jax.random.normal(jax.random.key(0), (1, 9, 12))
    mask = (jnp.arange(9) < 5).astype(jnp.float32)[None, :, None]
    predict = nnx.jit(lambda g, m, mask: g.f0_predictor(m, mask))
    f0 = predict(generator, mel, mask)
    np.testing.assert_allclose(f0[:, :5], predict(generator, mel[:, :5], None), rtol=1e-5)
    assert not f0[:, 5:].any()
    assert (f0 >= 0).all()


def test_phase_advances_by_f0_and_never_drifts():
    hop, rate = 4, 1000
    f0 = jnp.full((1, 2**17), 123.0)
    phase = np.asarray(jax.jit(source_phase, static_argnums=(1, 2))(f0, hop, rate))[0]
    n = np.arange(1, 2**17 * hop + 1, dtype=np.float64)
    drift = np.abs((phase - n * 0.123 + 0.5) % 1.0 - 0.5)
    assert drift.max() < 0.02  # cycles, after 524 seconds


def test_phase_between_frames_is_interpolated_and_never_drifts():
    """As the text of SineGen2 has it: sums at the frames' centres, straight lines between them."""
    hop, rate = 4, 1000
    f0 = np.random.default_rng(0).uniform(50.0, 200.0, 2**17).astype(np.float32)
    run = jax.jit(interpolated_source_phase, static_argnums=(1, 2))
    phase = np.asarray(run(f0[None], hop, rate))[0]
    sums = np.cumsum(f0.astype(np.float64) / rate * hop)
    centres = np.arange(len(f0)) * hop + (hop - 1) / 2
    want = np.interp(np.arange(len(f0) * hop), centres, sums)  # flat beyond the ends
    drift = np.abs((phase - want + 0.5) % 1.0 - 0.5)
    assert drift.max() < 0.02  # cycles, after 524 seconds


def test_padding_does_not_change_the_source_between_frames(build):
    """The last frame's second half must not hear of an F0 behind it."""
    config = dataclasses.replace(SMALL, random_phase=False, noise_std=0.0, source_phase="frames")
    generator = build(config)
    mel = jax.random.normal(jax.random.key(0), (1, 9, 12))
    f0 = jnp.full((1, 9), 200.0)
    run = nnx.jit(lambda g, mel, f0, lengths: g(mel, jax.random.key(1), f0=f0, lengths=lengths))
    padded = run(generator, mel, f0, jnp.array([5]))
    alone = run(generator, mel[:, :5], f0[:, :5], jnp.array([5]))
    np.testing.assert_allclose(padded[:, : 5 * config.hop], alone, atol=2e-5)


def test_source_is_periodic_where_voiced():
    config = dataclasses.replace(SMALL, random_phase=False, noise_std=0.0)
    source = HarmonicSource(config, nnx.Rngs(0))
    f0 = jnp.concatenate([jnp.full((1, 6), 200.0), jnp.zeros((1, 6))], axis=1)
    samples = np.asarray(nnx.jit(lambda s, *a: s(*a))(source, f0, jax.random.key(0)))[0]
    voiced, period = samples[: 6 * config.hop], 16000 // 200
    np.testing.assert_allclose(voiced[period:], voiced[:-period], atol=1e-4)
    assert samples[6 * config.hop :].std() > 1e-3


def test_harmonics_above_half_the_rate_are_silent():
    config = dataclasses.replace(SMALL, num_harmonics=9, random_phase=False, noise_std=0.0)
    source = HarmonicSource(config, nnx.Rngs(0))
    source.merge.kernel[...] = source.merge.kernel[...] * 1e-3  # tanh makes overtones of its own
    samples = nnx.jit(lambda s, *a: s(*a))(source, jnp.full((1, 20), 1500.0), jax.random.key(0))
    power = np.abs(np.fft.rfft(np.asarray(samples)[0, : 16 * 240] * np.hanning(16 * 240)))
    peaks = np.flatnonzero(power > 1e-3 * power.max())
    frequencies = sorted({round(float(k) * 16000 / (16 * 240), -2) for k in peaks})
    assert frequencies == [1500.0 * k for k in range(1, 6)]  # the sixth would fold to 7000 Hz


def test_a_neutral_filter_returns_its_source(build):
    generator = build(FILTER)
    generator.conv_post.scale[...] = generator.conv_post.scale[...] * 0.0
    mel = jax.random.normal(jax.random.key(0), (1, 8, 12))
    source = jax.random.normal(jax.random.key(1), (1, 8 * FILTER.hop)) * 0.1
    np.testing.assert_allclose(generator.decode(mel, source), source, atol=1e-5)


def test_neutral_filters_return_source_and_noise(build):
    generator = build(FILTERS)
    generator.conv_post.scale[...] = generator.conv_post.scale[...] * 0.0
    mel = jax.random.normal(jax.random.key(0), (1, 8, 12))
    source, noise = 0.1 * jax.random.normal(jax.random.key(1), (2, 1, 8 * FILTERS.hop))
    made = generator.decode(mel, source, noise=noise)
    np.testing.assert_allclose(made, source + noise, atol=1e-5)
    # What is unvoiced has noise twice, that of the source and its own.
    rng, f0 = jax.random.key(0), jnp.zeros((1, 8))
    source = generator.source(f0, rng)
    breath = generator(mel, rng, f0=f0) - source
    assert jnp.std(breath) == pytest.approx(FILTERS.sine_amplitude / 3, rel=0.1)
    assert abs(np.corrcoef(breath[0], source[0])[0, 1]) < 0.1


def test_filters_that_start_from_the_mel_give_its_envelope():
    """A buzz through two formants: its mel before anything is learnt, and without the envelope."""
    mel = MelConfig(sample_rate=16000, hop=240)
    f0, seconds = 120.0, 0.9
    hz = f0 * np.arange(1, 60)
    levels = sum(np.exp(-(((hz - centre) / 200.0) ** 2)) for centre in (600.0, 1800.0)) + 0.01
    time = np.arange(int(16000 * seconds)) / 16000
    speech = 0.1 * (levels @ np.sin(2 * np.pi * hz[:, None] * time))
    wanted = mel_spectrogram(jnp.asarray(speech)[None], mel)

    def distance(fmax):
        config = dataclasses.replace(
            ENVELOPES, num_mels=80, num_harmonics=60, envelope_fmax=fmax, noise_std=0.0
        )
        generator = config.make(nnx.Rngs(0))
        course = jnp.full((1, wanted.shape[1]), f0)
        made = nnx.jit(lambda g: g(wanted, jax.random.key(0), f0=course))(generator)
        return jnp.mean(jnp.abs(mel_spectrogram(made, mel) - wanted)[:, 4:-4])

    assert distance(8000.0) < 0.6 < 1.5 < distance(0.0)


@pytest.mark.parametrize("setting", [{"filters_noise": True}, {"envelope_fmax": 8000.0}])
def test_what_only_filters_have(setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} needs filters_source"):
        dataclasses.replace(SMALL, **setting).make(nnx.Rngs(0))


def test_every_parameter_learns(generator):
    mel = jax.random.normal(jax.random.key(0), (1, 6, 12))
    graph, params = nnx.split(generator)

    def loss(params):
        model = nnx.merge(graph, params)
        wave = model(mel, jax.random.key(1), f0=jnp.full((1, 6), 150.0))
        return jnp.square(wave).sum() + model.f0_predictor(mel).sum()

    grads = [np.abs(g).max() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params))]
    assert all(math.isfinite(g) and g > 0 for g in grads)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="same length"):
        dataclasses.replace(SMALL, upsample_kernels=(11,)).make(nnx.Rngs(0))
    with pytest.raises(UserError, match="divide"):
        dataclasses.replace(SMALL, istft_hop=5).make(nnx.Rngs(0))
    with pytest.raises(UserError, match="source_phase"):
        dataclasses.replace(SMALL, source_phase="hours").make(nnx.Rngs(0))
