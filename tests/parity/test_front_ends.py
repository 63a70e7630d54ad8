"""What tokenizers and vocoder hear, against FunASR, Kaldi, transformers, librosa, CosyVoice and a
long sinc filter.

Speech: the recordings of conftest.py; made louder, quieter, longer and of other rates as needed.
"""

import contextlib
import io
import math

import jax.numpy as jnp
import kaldi_native_fbank
import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
import transformers

with contextlib.redirect_stdout(io.StringIO()):  # it asks for packages that are not needed
    from funasr.frontends.wav_frontend import WavFrontend

from t5x_audio.audio import features, transforms
from t5x_audio.audio import io as audio_io
from t5x_audio.interop import paraformer
from tests.parity import cosyvoice_reference

FRONT_END = {
    "fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10,
    "lfr_m": 7, "lfr_n": 6,
}  # fmt: skip
LENGTHS = (400, 1200, 16000, 16159, 60001)


def variants(speech) -> list[np.ndarray]:
    """Recordings of several lengths and levels, one with an offset, one of two voices."""
    cut = [speech[i % 2][3000:][:length] for i, length in enumerate(LENGTHS)]
    count = min(map(len, speech))
    return [*cut, 0.01 * speech[0], speech[1] + 0.05, speech[0][:count] + speech[1][:count]]


def test_kaldi_fbank(speech):
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hamming"
    options.mel_opts.num_bins = 80
    options.energy_floor = 0.0
    for samples in variants(speech):
        reference = kaldi_native_fbank.OnlineFbank(options)
        reference.accept_waveform(16000, (samples * 32768).tolist())
        reference.input_finished()
        want = np.stack([reference.get_frame(i) for i in range(reference.num_frames_ready)])
        got = np.asarray(features.kaldi_fbank(jnp.asarray(samples)))
        assert got.shape == want.shape
        difference = np.abs(got - want)
        print(
            f"{len(samples)} samples: largest {difference.max():.1e}, mean {difference.mean():.1e}"
        )
        # Both spectra are float32: bins far below the loudest of a frame carry rounding.
        assert difference.mean() < 2e-5 and difference.max() < 2e-3


def test_stacked_and_normalised_as_funasr_does(speech, tmp_path):
    """Filter banks, stacks of 7 at every 6th, mean and scale out of an am.mvn."""
    plain = WavFrontend(cmvn_file=None, dither=0.0, **FRONT_END)
    frames = np.concatenate([plain(torch.tensor(x)[None], [len(x)])[0][0] for x in speech])
    path = tmp_path / "am.mvn"
    paraformer.write_cmvn(path, -frames.mean(0), 1 / frames.std(0))
    reference = WavFrontend(cmvn_file=str(path), dither=0.0, **FRONT_END)
    shift, scale = paraformer.read_cmvn(path, 560)
    for samples in variants(speech):
        want = reference(torch.tensor(samples)[None], [len(samples)])[0][0].numpy()
        got = (features.low_frame_rate(features.kaldi_fbank(jnp.asarray(samples))) + shift) * scale
        assert got.shape == want.shape
        difference = np.abs(np.asarray(got) - want)
        assert difference.mean() < 2e-5 and difference.max() < 2e-3


def test_whisper_log_mel(speech):
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    for samples in variants(speech):
        if len(samples) < 1200:
            continue  # the extractor mirrors at both ends, which takes more than 200 samples
        whole = samples[: len(samples) // 160 * 160]
        want = (
            extractor(whole, sampling_rate=16000, padding=False, return_tensors="np")
            .input_features[0]
            .T
        )
        got = np.asarray(features.whisper_log_mel(jnp.asarray(whole)))
        assert got.shape == want.shape
        difference = np.abs(got - want)
        print(f"{len(whole)} samples: largest {difference.max():.1e}")
        assert difference.mean() < 1e-5 and difference.max() < 5e-4


@pytest.mark.parametrize(
    "config",
    [
        features.MelConfig(),  # CosyVoice-1
        features.MelConfig(24000, n_fft=1920, hop=480, win=1920),  # its successors
        features.MelConfig(24000, fmax=None),  # what their HiFT is trained to match
    ],
    ids=["22k", "24k", "24k loss"],
)
def test_vocoder_log_mel(speech, config):
    """The recordings count as ones of the vocoder's rate."""
    for samples in variants(speech):
        if len(samples) < config.n_fft:
            continue
        want = cosyvoice_reference.log_mel(
            torch.tensor(samples)[None], config.n_fft, config.num_mels, config.sample_rate,
            config.hop, config.win, config.fmin, config.fmax,
        )[0].T.numpy()  # fmt: skip
        got = np.asarray(features.mel_spectrogram(jnp.asarray(samples), config))
        assert got.shape == want.shape
        difference = np.abs(got - want)
        print(f"{len(samples)} samples: largest {difference.max():.1e}")
        # Ours is float32: quiet bands of a recording with an offset carry its rounding.
        assert difference.max() < (1e-3 if abs(samples.mean()) > 0.04 else 1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 96000])
def test_resampling(rate):
    """Any rate to 16 kHz: tones stay, what 16 kHz cannot hold goes."""
    time = np.arange(2 * rate) / rate
    below = 0.8 * min(rate, 16000) / 2
    tones = sum(np.sin(2 * np.pi * hz * time + hz) for hz in (100.0, 997.0, below)) / 4
    got = audio_io.resample(tones.astype(np.float32), rate, 16000)
    assert len(got) == 32000
    at = np.arange(32000) / 16000
    want = sum(np.sin(2 * np.pi * hz * at + hz) for hz in (100.0, 997.0, below)) / 4
    inside = slice(1600, -1600)
    assert np.abs(got - want)[inside].max() < 1e-4
    if rate > 16000:
        above = np.sin(2 * np.pi * min(10000.0, 0.49 * rate) * time).astype(np.float32)
        assert np.abs(audio_io.resample(above, rate, 16000))[inside].max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_resampled_speech(speech, rate):
    """Within -60 dB of a polyphase filter of scipy that is far longer than soxr's."""
    common = math.gcd(rate, 16000)
    source = scipy.signal.resample_poly(
        speech[0].astype(np.float64), rate // common, 16000 // common, window=("kaiser", 12.0)
    ).astype(np.float32)
    up, down = 16000 // common, rate // common
    slower = max(up, down)
    taps = scipy.signal.firwin(2 * 128 * slower + 1, 0.96 / slower, window=("kaiser", 12.0))
    want = scipy.signal.resample_poly(source.astype(np.float64), up, down, window=taps)
    got = audio_io.resample(source, rate, 16000)
    count = min(len(got), len(want))
    # The two let go of the last hundreds of hertz differently; compare below them.
    low = scipy.signal.firwin(513, 0.8 * min(rate, 16000) / 16000, window=("kaiser", 8.0))
    error = np.convolve(got[:count] - want[:count], low, "valid")
    level = 10 * np.log10(np.mean(error**2) / np.mean(want**2))
    print(f"from {rate} Hz: {level:.0f} dB")
    assert level < -60


def test_channels_are_averaged(speech, tmp_path):
    count = min(map(len, speech))
    stereo = np.stack([speech[0][:count], speech[1][:count]], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 16000, subtype="FLOAT")
    want = torch.tensor(stereo.T).mean(dim=0).numpy()  # Step-Audio's load_audio
    np.testing.assert_allclose(audio_io.load(tmp_path / "stereo.wav"), want, atol=1e-7)


def test_level(speech):
    """Step-Audio's energy_norm_fn."""
    for samples in (speech[0], 1e-3 * speech[0], 3.0 * speech[1], np.zeros(100, np.float32)):
        want = samples / max(np.max(np.abs(samples)), 0.01) * 0.999
        np.testing.assert_allclose(transforms.normalize_energy(samples), want, rtol=1e-6)


def step_audio_trim(samples: np.ndarray) -> np.ndarray:
    """Step-Audio's trim_silence around librosa's, in its own order of steps."""
    _, (start, stop) = librosa.effects.trim(samples, top_db=20, frame_length=512, hop_length=128)
    length = int(math.ceil((stop - start) / 240) * 240 + (0.05 + 0.22) * 16000)
    begin = start - int(0.05 * 16000)
    moved = samples[begin:] if begin > 0 else np.pad(samples, (abs(begin), 0))
    return moved[:length] if length < len(moved) else np.pad(moved, (0, length - len(moved)))


def test_trimming(speech):
    rng = np.random.default_rng(0)
    cases = [*speech, speech[0][9000:], speech[1][:40000], np.zeros(3000, np.float32)]
    cases += [np.pad(speech[0], (left, 5000)) for left in (1, 700, 800, 801, 20000)]
    cases += [x + 1e-3 * rng.standard_normal(len(x)).astype(np.float32) for x in speech]
    cases += [np.roll(np.pad(speech[1], 4000), shift) for shift in rng.integers(0, 60000, 10)]
    for samples in cases:
        np.testing.assert_array_equal(transforms.trim_silence(samples), step_audio_trim(samples))
