"""A stream of HiFT gives the samples of the whole; its reach is what `context` says."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.vocoder.hift import HiftConfig
from t5x_audio.vocoder.hift_stream import HiftStream, context
from tests.toy_vocoder import HIFT
from tests.vocoder.spectral_flux import clicks

LONG_REACH = dataclasses.replace(
    HIFT,
    upsample_rates=(5, 3),
    upsample_kernels=(11, 7),
    istft_n_fft=16,
    istft_hop=4,
    resblock_kernels=(3, 7),
    resblock_dilations=(1, 3),
    source_kernels=(3, 7),
    f0_layers=2,
    source_phase="frames",
    random_phase=False,
)
FILTERS = dataclasses.replace(HIFT, filters_source=True, filters_noise=True, envelope_fmax=8000.0)


@dataclasses.dataclass
class Case:
    """A generator, compiled once for windows and for the whole."""

    config: HiftConfig
    window: Callable
    whole: Callable

    def stream(self) -> HiftStream:
        def vocode(mel, frames, f0, known, phase, first):
            made = self.window(mel[None], jnp.int32(frames), f0[None], known, phase, first)
            return tuple(np.asarray(one[0]) for one in made)

        return HiftStream(self.config, vocode, 7)


@pytest.fixture(
    scope="module", params=[HIFT, LONG_REACH, FILTERS], ids=["samples", "frames", "filters"]
)
def case(build, request):
    def voice(hift):
        """F0 between 50 and 150 Hz; 100 Hz where the mel is steady."""
        predictor = hift.f0_predictor
        predictor.classifier.bias[...] += 200.0  # positive: its magnitude is what is given
        predictor.classifier.bias[...] += 100.0 - predictor(jnp.full((1, 9, 6), -2.0))[0, 4]

    generator = build(dataclasses.replace(request.param, noise_std=0.0), edit=voice)

    @jax.jit
    def window(mel, frames, f0, known, phase, first):
        predicted = generator.f0_predictor(mel, (jnp.arange(mel.shape[1]) < frames)[None, :, None])
        f0 = jnp.where(jnp.arange(mel.shape[1]) < known, f0, predicted)
        rng, lengths = jax.random.key(3), frames[None]
        return generator(mel, rng, f0=f0, lengths=lengths, start=(first, phase)), f0

    whole = jax.jit(lambda mel: generator(mel, jax.random.key(3)))
    return Case(request.param, window, whole)


def mel_of(frames: int) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(frames, 6)) - 2.0).astype(np.float32)


@pytest.mark.parametrize("pieces", [(1, 3, 60, 2, 9), (75,), (10,) * 7 + (5,)])
def test_any_pushing_gives_the_whole(case, pieces):
    mel = mel_of(75)
    whole = case.whole(mel[None])[0]
    session, made, start = case.stream(), [], 0
    for size in pieces:
        made.append(session.push(mel[start : start + size]))
        start += size
        heard = sum(map(len, made)) // case.config.hop
        assert heard == max(0, start - session.delay_frames)
    made.append(session.finish())
    assert np.std(whole) > 1e-3
    np.testing.assert_allclose(np.concatenate(made), whole, atol=1e-3 * np.abs(whole).max())


@pytest.mark.parametrize("case", [HIFT, LONG_REACH], ids=["samples", "frames"], indirect=True)
def test_a_tone_has_no_click_at_the_seams(case):
    """100 Hz, steady over 480 samples. A jump of a hundredth of its level would be found."""
    stream, frames = case.stream(), 48000 // case.config.hop
    mel, pieces = np.full((frames, 6), -2.0, np.float32), []
    for part in np.split(mel, np.arange(frames // 8, frames, frames // 8)):
        pieces.append(stream.push(part))
    tone = np.concatenate([*pieces, stream.finish()])
    seams = np.cumsum([len(one) for one in pieces])[1:-2]
    assert tone.std() > 1e-3 and not clicks(tone, seams, hop=480)
    for seam in seams:
        tone[seam:] += 0.01 * np.abs(tone).max()
    assert clicks(tone, seams, hop=480)


def test_less_than_the_delay_comes_at_the_end(case):
    session = case.stream()
    assert not len(session.push(mel_of(2))) and len(session.finish()) == 2 * case.config.hop
    assert not len(case.stream().finish())


@pytest.mark.parametrize("config", [HIFT, LONG_REACH, HiftConfig(base_channels=16, f0_channels=8)])
def test_the_reach_is_what_context_says(build, config):
    """A frame changes F0 and samples so far and no farther; and nearly so far."""
    generator = build(config)
    f0_reach, reach = context(config)
    at, size = reach + 5, 2 * reach + 11
    mel = np.random.default_rng(0).normal(size=(1, size, config.num_mels)).astype(np.float32)
    f0 = np.full((1, size), 120.0, np.float32)
    call = nnx.jit(lambda g, m, f: (g(m, jax.random.key(0), f0=f), g.f0_predictor(m)))
    base, base_f0 = call(generator, mel, f0)
    changed_mel, changed_f0 = mel.copy(), f0.copy()
    changed_mel[:, at] += 1.0
    changed_f0[:, at:] = 0.0  # from here on all phases differ
    other, other_f0 = call(generator, changed_mel, f0)
    changed = np.flatnonzero(np.asarray(other != base)[0]) / config.hop - at
    assert -reach <= changed.min() and changed.max() < reach + 1
    assert changed.min() < 3 - reach  # else the stream waits for nothing
    moved = np.flatnonzero(np.asarray(other_f0 != base_f0)[0]) - at
    assert moved.min() == -f0_reach and moved.max() == f0_reach
    other, _ = call(generator, mel, changed_f0)
    assert np.flatnonzero(np.asarray(other != base)[0])[0] / config.hop - at >= -reach


def test_memory_does_not_grow():
    """A minute, then five more."""
    samples = np.zeros(1000 * HIFT.hop, np.float32)
    stream = HiftStream(HIFT, lambda mel, frames, f0, *_: (samples, f0), 30)

    def held() -> int:
        return sum(a.nbytes for a in vars(stream).values() if isinstance(a, np.ndarray))

    sizes = []
    for minutes in (1, 5):
        for _ in range(minutes * 60):
            assert stream.push(np.zeros((67, 6), np.float32)).size
        sizes.append(held())
    assert sizes[0] == sizes[1]
