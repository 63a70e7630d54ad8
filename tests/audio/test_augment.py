import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.audio import augment

augmented = jax.jit(
    functools.partial(
        augment.spec_augment,
        num_time_masks=2,
        max_time_frames=10,
        num_frequency_masks=1,
        max_frequency_bins=5,
    )
)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), lengths=st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_blanks_whole_spans_and_bands_within_bounds(seed, lengths):
    ones = np.ones((2, 60, 16), np.float32)
    result = np.asarray(augmented(jax.random.key(seed), ones, np.array(lengths)))
    assert set(np.unique(result)) <= {0.0, 1.0}
    for row, length in zip(result, lengths, strict=True):
        bins = ~row.any(axis=0)
        kept = row[:, ~bins]
        frames = ~kept.any(axis=1)
        np.testing.assert_array_equal(kept[~frames], 1.0)  # nothing but spans and bands
        assert not frames[length:].any()
        assert frames.sum() <= 2 * min(10, int(0.2 * length))
        assert bins.sum() <= 5
        assert len(np.flatnonzero(np.diff(bins.astype(int)) == 1)) <= 1


def test_follows_the_key_and_differs_between_utterances():
    x = jnp.ones((4, 60, 16))
    lengths = jnp.full(4, 60)
    first = augmented(jax.random.key(0), x, lengths)
    np.testing.assert_array_equal(first, augmented(jax.random.key(0), x, lengths))
    assert len({np.asarray(row).tobytes() for row in first}) > 1
    assert not np.array_equal(first, augmented(jax.random.key(1), x, lengths))


def test_mask_widths_reach_their_bound():
    x = jnp.ones((256, 60, 16))
    result = np.asarray(augmented(jax.random.key(0), x, jnp.full(256, 60)))
    bands = (~result.any(axis=1)).sum(-1)
    assert set(bands) == set(range(6))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), speech=st.sampled_from([0.0, 1.0]), snr=st.floats(-5, 30))
def test_noise_has_the_power_that_was_asked_for(seed, speech, snr):
    lengths = np.array([2000, 1200, 37])
    audio = np.random.default_rng(seed).normal(size=(3, 2000)).astype(np.float32)
    noisy = np.asarray(
        augment.add_noise(
            jax.random.key(seed),
            audio,
            lengths,
            probability=1.0,
            speech_share=speech,
            min_snr_db=snr,
            max_snr_db=snr,
        )  # fmt: skip
    )
    for row, clean, length in zip(noisy, audio, lengths, strict=True):
        assert not row[length:].any()
        noise = row[:length] - clean[:length]
        got = 10 * np.log10(np.square(clean[:length]).sum() / np.square(noise).sum())
        np.testing.assert_allclose(got, snr, atol=0.05)


def test_the_other_talker_is_the_row_before():
    audio = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    lengths = np.array([400, 250, 400])
    noisy = augment.add_noise(
        jax.random.key(0), audio, lengths, probability=1.0, speech_share=1.0, min_snr_db=0.0,
        max_snr_db=0.0,
    )  # fmt: skip
    added = np.asarray(noisy) - np.where(np.arange(400) < lengths[:, None], audio, 0)
    assert not added[2, 250:].any()  # where the other one has ended
    for row, other in ((0, 2), (1, 0), (2, 1)):
        both = min(lengths[row], lengths[other])
        assert np.corrcoef(added[row, :both], audio[other, :both])[0, 1] > 0.9999


def test_a_share_of_the_utterances_stays_clean_and_silence_stays_finite():
    audio = np.random.default_rng(0).normal(size=(600, 50)).astype(np.float32)
    audio[7:9] = 0.0
    noisy = augment.add_noise(jax.random.key(0), audio, np.full(600, 50), probability=0.3)
    assert np.isfinite(noisy).all() and not noisy[7:9].any()
    changed = (np.asarray(noisy) != audio).any(axis=1).mean()
    assert 0.24 < changed < 0.36


def test_the_colour_of_noise_is_the_slope_of_its_spectrum():
    exponents = jnp.array([[0.0], [1.0], [2.0]])
    noise = augment.coloured_noise(jax.random.key(0), (3, 2**16), exponents)
    power = np.square(np.abs(np.fft.rfft(np.asarray(noise, np.float64))))[:, 1:]
    frequency = np.log(np.arange(1, power.shape[1] + 1))
    for row, exponent in zip(power, exponents[:, 0], strict=True):
        slope = np.polyfit(frequency, np.log(row), 1)[0]
        np.testing.assert_allclose(slope, -exponent, atol=0.05)
    assert np.abs(noise.mean(axis=1)).max() < 1e-4
