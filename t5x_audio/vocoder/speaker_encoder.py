"""GE2E speaker encoder: a waveform becomes a unit vector that is close for the same speaker.

Wan et al. 2018 (generalized end-to-end loss) with the settings of the public implementation
whose weights `interop.ge2e` loads (resemblyzer 0.1.4): 40 linear-power Slaney mels of 25/10 ms,
three LSTM layers, a ReLU projection, L2 norm; an utterance is the normalised mean over windows of
160 frames. That implementation also cuts long pauses with a VAD beforehand; here the caller
trims.

Choices: LSTM input projections are one matrix product for all frames, so that the scan holds only
the recurrent product; windows of all utterances run as one batch; hosts' waveforms are padded to
whole windows, so that few shapes are compiled.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.audio import features, mel_filters


@dataclasses.dataclass(frozen=True)
class SpeakerEncoderConfig:
    """Sizes and front end; the defaults are the published model's."""

    sample_rate: int = 16000
    num_mels: int = 40
    n_fft: int = 400
    hop: int = 160
    hidden: int = 256
    num_layers: int = 3
    embedding: int = 256
    window_frames: int = 160
    windows_per_second: float = 1.3
    min_coverage: float = 0.75  # a last window with less of it inside the utterance is dropped
    target_dbfs: float = -30.0  # quieter utterances are raised to this RMS level

    def make(self, rngs: nnx.Rngs) -> "SpeakerEncoder":
        """Builds the module with random weights."""
        return SpeakerEncoder(self, rngs)

    @property
    def step_frames(self) -> int:
        """Frames between the starts of neighbouring windows."""
        return round(self.sample_rate / self.windows_per_second / self.hop)

    def num_windows(self, samples):
        """Windows that cover so many samples: at least one; int -> int, array -> array."""
        xp = np if isinstance(samples, int) else jnp
        frames = -(-(samples + 1) // self.hop)
        starts = xp.maximum(1, frames - self.window_frames + self.step_frames + 1)
        count = -(-starts // self.step_frames)
        last_start = (count - 1) * self.step_frames * self.hop
        covered = (samples - last_start) / (self.window_frames * self.hop)
        count = xp.where((covered < self.min_coverage) & (count > 1), count - 1, count)
        return int(count) if isinstance(samples, int) else count

    def padded_samples(self, samples: int) -> int:
        """Length to pad so many samples to: whole windows, rounded up so that lengths are few."""
        step, window = self.step_frames * self.hop, self.window_frames * self.hop
        windows = 1 + max(0, -(-(samples - window) // step))
        windows = windows if windows <= 4 else -(-windows // 4) * 4
        return window + (windows - 1) * step


class SpeakerEncoder(nnx.Module):
    """Waveforms -> unit vectors of width `config.embedding` with no negative component."""

    def __init__(self, config: SpeakerEncoderConfig, rngs: nnx.Rngs):
        self.config = config
        widths = [config.num_mels] + [config.hidden] * (config.num_layers - 1)
        self.layers = nnx.List([Lstm(width, config.hidden, rngs) for width in widths])
        self.projection = nnx.Linear(config.hidden, config.embedding, rngs=rngs)

    def __call__(self, samples, lengths=None):
        """Embeds a batch; pure and jittable.

        Args:
          samples: float [B, T] in [-1, 1] at config.sample_rate.
          lengths: int [B] true samples; None = all T. What lies beyond has no influence.

        Returns:
          float32 [B, embedding], each of unit length.
        """
        config = self.config
        batch, total = samples.shape
        lengths = jnp.full(batch, total) if lengths is None else jnp.asarray(lengths)
        counts = config.num_windows(lengths)
        num_windows = config.num_windows(total)
        starts = np.arange(num_windows) * config.step_frames
        mel = self._mel(samples, lengths, int(starts[-1]) + config.window_frames)
        windows = mel[:, starts[:, None] + np.arange(config.window_frames)]
        vectors = self.embed_mels(windows.reshape(-1, *windows.shape[2:]))
        vectors = vectors.reshape(batch, num_windows, -1)
        used = np.arange(num_windows) < counts[:, None]
        return _unit(jnp.sum(vectors, axis=1, where=used[..., None]))

    def embed_mels(self, mels):
        """One window each: float32 [B, frames, num_mels] of mel power -> float32 [B, embedding]."""
        hidden = mels
        for layer in self.layers:
            hidden = layer(hidden)
        return _unit(jax.nn.relu(self.projection(hidden[:, -1])))

    def embed(self, waveform) -> np.ndarray:
        """Embeds one float [T] waveform at config.sample_rate; float32 [embedding]."""
        return self.embed_batch([waveform])[0]

    def embed_batch(self, waveforms) -> np.ndarray:
        """Embeds float [T_i] waveforms of any lengths; float32 [len(waveforms), embedding]."""
        lengths = np.array([len(waveform) for waveform in waveforms], np.int32)
        padded = np.zeros(
            (len(lengths), self.config.padded_samples(int(lengths.max()))), np.float32
        )
        for row, waveform in zip(padded, waveforms, strict=True):
            row[: len(waveform)] = waveform
        return np.asarray(_jitted_call(self, padded, lengths))

    def _mel(self, samples, lengths, num_frames: int):
        """Mel power [B, num_frames, num_mels] of the level-adjusted, zero-extended waveform."""
        config = self.config
        total = samples.shape[-1]
        inside = np.arange(total) < lengths[:, None]
        samples = jnp.where(inside, samples.astype(jnp.float32), 0.0)
        power = jnp.sum(jnp.square(samples), -1) / jnp.maximum(lengths, 1)
        level = jnp.sqrt(jnp.maximum(power, 1e-12))
        gain = jnp.maximum(1.0, 10.0 ** (config.target_dbfs / 20.0) / level)
        wanted = (num_frames - 1) * config.hop + config.n_fft
        left = config.n_fft // 2
        samples = jnp.pad(samples * gain[:, None], [(0, 0), (left, max(0, wanted - left - total))])
        spectrum = features.power_spectrogram(samples[:, :wanted], config.n_fft, config.hop)
        filters = mel_filters.mel_filters(config.sample_rate, config.n_fft, config.num_mels)
        return jnp.matmul(spectrum, filters, precision=jax.lax.Precision.HIGHEST)


class Lstm(nnx.Module):
    """One LSTM layer over whole sequences; gates in the order input, forget, cell, output."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.input = nnx.Linear(width, 4 * hidden, rngs=rngs)
        initial = nnx.initializers.lecun_normal()(rngs.params(), (hidden, 4 * hidden))
        self.recurrent = nnx.Param(initial)

    def __call__(self, inputs):
        """float [B, T, width] -> float [B, T, hidden], from a zero state."""
        projected = jnp.swapaxes(self.input(inputs), 0, 1)
        kernel = self.recurrent[...]
        zeros = jnp.zeros((inputs.shape[0], kernel.shape[0]), projected.dtype)

        def step(carry, frame):
            hidden, cell = carry
            gates = frame + jnp.matmul(hidden, kernel)
            into, forget, new, out = jnp.split(gates, 4, axis=-1)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(into) * jnp.tanh(new)
            hidden = jax.nn.sigmoid(out) * jnp.tanh(cell)
            return (hidden, cell), hidden

        return jnp.swapaxes(jax.lax.scan(step, (zeros, zeros), projected)[1], 0, 1)


@nnx.jit
def _jitted_call(encoder, samples, lengths):
    return encoder(samples, lengths)


def _unit(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-16))
