import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.vocoder.istft import hann, istft, stft


def _split(spectrum, n_fft):
    bins = n_fft // 2 + 1
    return spectrum[..., :bins], spectrum[..., bins:]


@pytest.mark.parametrize(("n_fft", "hop", "hops"), [(16, 4, 5), (64, 16, 31), (8, 4, 2)])
def test_inverse_returns_the_samples(n_fft, hop, hops):
    samples = np.random.default_rng(0).standard_normal((2, hops * hop)).astype(np.float32)

    @jax.jit
    def there_and_back(x):
        return istft(*_split(stft(x, n_fft, hop), n_fft), n_fft, hop)

    np.testing.assert_allclose(there_and_back(samples), samples, atol=5e-6)


def test_spectrum_is_the_windowed_dft_of_the_mirrored_signal():
    samples = np.random.default_rng(0).standard_normal((1, 40)).astype(np.float32)
    padded = np.pad(samples[0], 8, mode="reflect")
    wanted = np.stack([np.fft.rfft(padded[t * 4 : t * 4 + 16] * hann(16)) for t in range(11)])
    real, imag = _split(stft(jnp.asarray(samples), 16, 4), 16)
    np.testing.assert_allclose(real[0] + 1j * imag[0], wanted, atol=1e-5)


def test_padding_does_not_reach_the_row():
    samples = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    lengths = np.array([16, 40, 96])
    masked = np.asarray(jax.jit(lambda x, n: stft(x, 16, 4, n))(samples, lengths))
    inverse = jax.jit(lambda s, f: istft(*_split(s, 16), 16, 4, f))
    noisy = masked + (np.arange(25) >= (lengths // 4 + 1)[:, None])[..., None] * 5.0
    back = np.asarray(inverse(noisy, lengths // 4 + 1))
    for row, length in enumerate(lengths):
        frames = length // 4 + 1
        padded = np.pad(samples[row, :length], 8, mode="reflect")
        wanted = np.stack(
            [np.fft.rfft(padded[t * 4 : t * 4 + 16] * hann(16)) for t in range(frames)]
        )
        real, imag = _split(masked[row, :frames], 16)
        np.testing.assert_allclose(real + 1j * imag, wanted, atol=1e-5)
        assert not masked[row, frames:].any()
        np.testing.assert_allclose(back[row, :length], samples[row, :length], atol=2e-6)
        assert not back[row, length:].any()
