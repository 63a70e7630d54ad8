"""Golden vectors of the GE2E speaker encoder, from PyTorch's LSTM and float64 numpy.

Run in the environment that has PyTorch, with the wheel's weight file as its argument:
  python tests/parity/make_ge2e_golden.py <site-packages>/resemblyzer/pretrained.pt
Writes tests/golden/ge2e.npz: a small random encoder with its weights, and utterances with their
embeddings by the published weights.
"""

import pathlib
import sys

import numpy as np
import torch

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "ge2e.npz"


class Encoder(torch.nn.Module):
    """The published network."""

    def __init__(self, width, hidden, layers, embedding):
        super().__init__()
        self.lstm = torch.nn.LSTM(width, hidden, layers, batch_first=True)
        self.linear = torch.nn.Linear(hidden, embedding)

    @torch.no_grad()
    def forward(self, mels):
        """float64 [B, T, width] -> unit vectors [B, embedding]."""
        _, (hidden, _) = self.lstm(torch.as_tensor(mels))
        raw = torch.relu(self.linear(hidden[-1]))
        return (raw / raw.norm(dim=1, keepdim=True)).numpy()


def mel_power(x):
    """librosa's melspectrogram by its definition: centred, zero-padded, Slaney scale and norm."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    padded = np.pad(x, 200)
    frames = np.stack([padded[i : i + 400] * window for i in range(0, len(padded) - 399, 160)])
    power = np.abs(np.fft.rfft(frames)) ** 2

    def to_hz(mel):
        return 200 / 3 * mel if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * np.log(8000 / 1000) / np.log(6.4)
    edges = [to_hz(top * i / 41) for i in range(42)]
    hz = np.arange(201) * 40.0
    filters = np.zeros((201, 40))
    for m in range(40):
        left, centre, right = edges[m : m + 3]
        triangle = np.minimum((hz - left) / (centre - left), (right - hz) / (right - centre))
        filters[:, m] = np.maximum(0, triangle) * 2 / (right - left)
    return power @ filters


def embed(encoder, x, rate=1.3, min_coverage=0.75):
    """The published procedure after its VAD: raise to -30 dBFS, overlapping windows, mean."""
    level = 20 * np.log10(np.sqrt(np.mean(x**2)))
    if level < -30:
        x = x * 10 ** ((-30 - level) / 20)
    step = round(16000 / rate / 160)
    num_frames = int(np.ceil((len(x) + 1) / 160))
    starts = list(range(0, max(1, num_frames - 160 + step + 1), step))
    if len(starts) > 1 and (len(x) - starts[-1] * 160) / 25600 < min_coverage:
        starts.pop()
    x = np.pad(x, (0, max(0, (starts[-1] + 160) * 160 - len(x))))
    mel = mel_power(x)
    mean = encoder(np.stack([mel[s : s + 160] for s in starts])).mean(0)
    return mean / np.linalg.norm(mean)


def utterance(seed, seconds, level):
    """A gliding harmonic tone in noise, int16."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16000)) / 16000
    phase = 2 * np.pi * np.cumsum(110 + 15 * seed + 30 * np.sin(5 * time)) / 16000
    x = sum(np.sin(k * phase) / k ** (0.6 + 0.2 * seed) for k in range(1, 25))
    x = level * (x * (1.2 + np.sin(9 * time)) / 6 + 0.02 * rng.standard_normal(len(time)))
    return np.clip(np.round(x * 32768), -32768, 32767).astype(np.int16)


def main(weights):
    """Writes the golden file."""
    torch.manual_seed(0)
    small = Encoder(5, 8, 2, 6).double()
    mels = np.random.default_rng(0).uniform(0, 2, (3, 11, 5))
    content = {f"small.{k}": v.numpy() for k, v in small.state_dict().items()}
    content["small_mels"], content["small_embeddings"] = mels, small(mels)

    encoder = Encoder(40, 256, 3, 256)
    state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
    state = {k: v for k, v in state.items() if not k.startswith("similarity")}
    encoder.load_state_dict(state)
    encoder.double()
    for i, (seconds, level) in enumerate([(0.7, 0.3), (1.62, 0.02), (2.33, 0.2), (2.5, 0.005)]):
        samples = utterance(i, seconds, level)
        content[f"samples_{i}"] = samples
        content[f"embedding_{i}"] = embed(encoder, samples / 32768.0)
    np.savez_compressed(
        GOLDEN,
        **{k: v if v.dtype == np.int16 else v.astype(np.float32) for k, v in content.items()},
    )


if __name__ == "__main__":
    main(sys.argv[1])
