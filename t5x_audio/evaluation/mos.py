"""DNSMOS: speech quality from 1 to 5 as predicted by two small networks (ONNX, on the CPU).

P.835 gives signal, background and overall quality (Reddy et al., arXiv 2110.01763); P.808 gives
one overall score (arXiv 2010.15258). Both networks come with the speechmos wheel (0.0.1.1, MIT);
its Python needs librosa and pandas, so the published procedure is followed here instead: windows
of 9.01 s every second, shorter clips doubled until they fill one, means over the windows.
"""

import functools

import numpy as np

from t5x_audio.audio import features, io, mel_filters, model_files
from t5x_audio.errors import UserError

RATE = 16000
REQUIREMENT = "--no-deps speechmos==0.0.1.1"
_WINDOW = int(9.01 * RATE)
_MODELS = {
    "sig_bak_ovr": "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd",
    "model_v8": "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91",
}
# From the networks' raw outputs to the scale of human ratings.
_CALIBRATION = {
    "sig": np.poly1d([-0.08397278, 1.22083953, 0.0052439]),
    "bak": np.poly1d([-0.13166888, 1.60915514, -0.39604546]),
    "ovrl": np.poly1d([-0.06766283, 1.11546468, 0.04602535]),
}


def dnsmos(samples: np.ndarray, rate: int = RATE) -> dict[str, float]:
    """Scores one recording.

    Args:
      samples: float [T] in [-1, 1] (clipped).
      rate: its sampling rate in Hz; resampled to 16 kHz when it differs.

    Returns:
      {'ovrl', 'sig', 'bak', 'p808'}, each about 1 (bad) to 5 (excellent).

    Raises:
      UserError: the recording is empty or not finite, or the networks are not installed.
    """
    samples = io.resample(samples, rate, RATE)
    if samples.size == 0 or not np.isfinite(samples).all():
        raise UserError("DNSMOS: the recording holds no samples or NaN; give audible audio")
    scores = [_score(window) for window in _windows(np.clip(samples, -1.0, 1.0))]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def overall(samples: np.ndarray, rate: int = RATE) -> float:
    """The P.835 overall score of `dnsmos`."""
    return dnsmos(samples, rate)["ovrl"]


def _windows(samples: np.ndarray) -> list[np.ndarray]:
    while len(samples) < _WINDOW:
        samples = np.concatenate([samples, samples])
    # Truncation towards zero, as published: the whole seconds count, not the samples.
    count = int(len(samples) // RATE - 9.01) + 1
    starts = [i * RATE for i in range(count) if i * RATE + _WINDOW <= len(samples)]
    return [samples[start : start + _WINDOW] for start in starts]


def _score(window: np.ndarray) -> dict[str, float]:
    raw = _session("sig_bak_ovr").run(None, {"input_1": window[None]})[0][0]
    p808 = _session("model_v8").run(None, {"input_1": _p808_features(window[:-160])[None]})[0]
    scores = {
        name: float(_CALIBRATION[name](x))
        for name, x in zip(("sig", "bak", "ovrl"), raw, strict=True)
    }
    return {**scores, "p808": float(p808[0][0])}


def _p808_features(samples: np.ndarray) -> np.ndarray:
    """Scaled decibels [900, 120] of a Slaney mel spectrum, n_fft 321, hop 160, loudest = 1."""
    n_fft = 321
    padded = np.pad(samples.astype(np.float32), n_fft // 2)
    power = np.asarray(features.power_spectrogram(padded, n_fft, 160))
    mel = power @ mel_filters.mel_filters(RATE, n_fft, 120)
    decibels = 10.0 * np.log10(np.maximum(mel, 1e-10))
    decibels = np.maximum(decibels - decibels.max(), -80.0)
    return ((decibels + 40.0) / 40.0).astype(np.float32)


@functools.cache
def _session(name: str):
    import onnxruntime

    path = model_files.find_model_file(
        "speechmos", f"dnsmos_models/{name}.onnx", _MODELS[name], REQUIREMENT
    )
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
