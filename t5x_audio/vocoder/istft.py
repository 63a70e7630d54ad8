"""Short-time Fourier transform and its exact inverse, for HiFT's source and output.

Semantics are `torch.stft/istft(center=True)` with a periodic Hann window: the signal is mirrored by
n_fft / 2 at both of its ends, there are length / hop + 1 frames, and the inverse divides by the
summed squared window. With `lengths` every row is mirrored at its own end and frames beyond it are
0, so a row's result does not depend on the padding.

Choices: both directions are one matrix product with a windowed real DFT basis plus reshapes (hop
divides n_fft). HiFT's transform is tiny (16 points), where products beat an FFT on every device,
and no gather or scatter appears in the gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from t5x_audio.vocoder.convolution import overlap_add

_PRECISION = jax.lax.Precision.HIGHEST


def stft(samples: jax.Array, n_fft: int, hop: int, lengths: jax.Array | None = None) -> jax.Array:
    """Real and imaginary parts side by side: [B, T] -> float32 [B, T // hop + 1, n_fft + 2].

    T and `lengths` (int32 [B], samples) must be multiples of hop. Column k is the real part of
    bin k, column n_fft // 2 + 1 + k its imaginary part.
    """
    padded = _mirror(samples.astype(jnp.float32), n_fft // 2, lengths)
    blocks = padded.reshape(padded.shape[0], -1, hop)
    count = samples.shape[1] // hop + 1
    frames = jnp.concatenate([blocks[:, p : p + count] for p in range(n_fft // hop)], axis=-1)
    spectrum = jnp.matmul(frames, _analysis(n_fft), precision=_PRECISION)
    if lengths is None:
        return spectrum
    valid = jnp.arange(count) <= (lengths // hop)[:, None]
    return jnp.where(valid[..., None], spectrum, 0.0)


def istft(
    real: jax.Array, imag: jax.Array, n_fft: int, hop: int, frames: jax.Array | None = None
) -> jax.Array:
    """Inverse of `stft`: real, imag [B, F, n_fft // 2 + 1] -> float32 [B, (F - 1) * hop].

    `frames` int32 [B] = valid frames of each row; samples after (frames - 1) * hop are 0.
    """
    batch, count, _ = real.shape
    spectrum = jnp.concatenate([real, imag], axis=-1).astype(jnp.float32)
    valid = jnp.ones((batch, count, 1)) if frames is None else _valid(frames, count)
    pieces = jnp.matmul(spectrum * valid, _synthesis(n_fft), precision=_PRECISION)
    envelope = valid * jnp.asarray(np.square(hann(n_fft)))
    shape = (batch, count, n_fft // hop, hop)
    signal, envelope = (
        overlap_add(x.reshape(shape)).reshape(batch, -1) for x in (pieces, envelope)
    )
    samples = (count - 1) * hop
    half = n_fft // 2
    signal, envelope = (x[:, half : half + samples] for x in (signal, envelope))
    inside = (
        jnp.ones((batch, samples), bool)
        if frames is None
        else jnp.arange(samples) < ((frames - 1) * hop)[:, None]
    )
    return jnp.where(inside, signal / jnp.where(inside, envelope, 1.0), 0.0)


@functools.cache
def hann(size: int) -> np.ndarray:
    """Periodic Hann window, float64 [size]."""
    return 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(size) / size)


def _valid(frames, count):
    return (jnp.arange(count) < frames[:, None]).astype(jnp.float32)[..., None]


def _mirror(samples, amount: int, lengths):
    """Reflects each row at its own end by gathering; what lies beyond is 0."""
    total = samples.shape[1]
    if lengths is None:
        return jnp.pad(samples, ((0, 0), (amount, amount)), mode="reflect")
    padded = jnp.pad(samples, ((0, 0), (amount, amount)), mode="reflect")
    position = jnp.arange(-amount, total + amount)
    end = lengths[:, None]
    reflected = jnp.clip(2 * end - 2 - position, -amount, total + amount - 1) + amount
    mirrored = jnp.take_along_axis(padded, reflected, axis=1)
    tail = jnp.where(position < end + amount, mirrored, 0.0)
    return jnp.where(position < end, padded, tail)


@functools.cache
def _analysis(n_fft: int) -> np.ndarray:
    """[n_fft, n_fft + 2]: windowed cosines, then minus sines."""
    angle = 2.0 * np.pi * np.outer(np.arange(n_fft), np.arange(n_fft // 2 + 1)) / n_fft
    basis = np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)
    return (basis * hann(n_fft)[:, None]).astype(np.float32)


@functools.cache
def _synthesis(n_fft: int) -> np.ndarray:
    """[n_fft + 2, n_fft]: the inverse real DFT, windowed."""
    bins = np.arange(n_fft // 2 + 1)
    angle = 2.0 * np.pi * np.outer(bins, np.arange(n_fft)) / n_fft
    weight = np.where((bins == 0) | (bins == n_fft // 2), 1.0, 2.0)[:, None] / n_fft
    basis = np.concatenate([weight * np.cos(angle), -weight * np.sin(angle)], axis=0)
    return (basis * hann(n_fft)[None]).astype(np.float32)
