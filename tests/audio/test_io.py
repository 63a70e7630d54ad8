import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.audio import io
from t5x_audio.errors import UserError


def tone(rate, seconds=0.5, frequency=440.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("suffix", "rate", "channels", "tolerance"),
    [
        (".wav", 16000, 1, 1e-4),
        (".flac", 44100, 2, 2e-3),
        (".ogg", 48000, 1, 3e-2),
        (".mp3", 22050, 2, 3e-2),
        (".wav", 8000, 3, 2e-3),
    ],
)
def test_load_any_format_rate_and_channels(tmp_path, suffix, rate, channels, tolerance):
    path = tmp_path / f"tone{suffix}"
    soundfile.write(path, np.tile(tone(rate)[:, None], (1, channels)), rate)
    samples = io.load(path)
    assert samples.dtype == np.float32 and samples.ndim == 1
    expected = tone(16000)
    # Lossy coders may pad; the middle holds the same tone. mp3 keeps its encoder delay out.
    assert abs(len(samples) - len(expected)) <= 2000
    middle = samples[2000:6000]
    score = np.abs(np.fft.rfft(middle * np.hanning(4000)))
    assert np.argmax(score) == 110  # 440 Hz at 4 Hz a bin
    assert abs(np.abs(middle).max() - 0.5) < 0.02
    if suffix != ".mp3":
        np.testing.assert_allclose(middle, expected[2000:6000], atol=tolerance)


def test_channels_are_averaged(tmp_path):
    left, right = tone(16000), tone(16000, frequency=1000.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(io.load(tmp_path / "a.wav"), (left + right) / 2, atol=1e-6)


def test_content_decides_the_format_not_the_name(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    for name in ("a.raw", "a.mp3", "a"):
        (tmp_path / name).write_bytes((tmp_path / "a.wav").read_bytes())
        assert len(io.load(tmp_path / name)) == 8000


def write(path, samples, subtype="FLOAT"):
    soundfile.write(path, np.asarray(samples, np.float32), 16000, subtype=subtype)


BAD_FILES = {
    "missing.wav": (None, "no such file"),
    "empty.wav": (lambda p: p.write_bytes(b""), "empty"),
    "text.wav": (lambda p: p.write_text("What is two plus two?\n" * 50), "cannot be read as audio"),
    "folder.wav": (lambda p: p.mkdir(), "not a file"),
    "none.wav": (lambda p: write(p, np.zeros(0)), "no samples"),
    "one.wav": (lambda p: write(p, [0.5]), "1 sample"),
    "nan.wav": (lambda p: write(p, np.full(8000, np.nan)), "NaN"),
    "inf.wav": (lambda p: write(p, np.r_[tone(16000), np.inf]), "NaN or infinite"),
    "silent.wav": (lambda p: write(p, np.zeros(8000)), "silent"),
    "hour.wav": (lambda p: write(p, np.zeros(16000 * 61), "PCM_16"), "61.0 s"),
    "cut.flac": (None, "cannot be read as audio"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_input_is_one_line_that_names_the_file(tmp_path, name):
    path = tmp_path / name
    make, culprit = BAD_FILES[name]
    if make is not None:
        make(path)
    if name == "cut.flac":
        soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 32000), 16000)
        path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(UserError) as error:
        io.load(path, max_seconds=60.0)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and culprit in message


def test_silence_may_be_allowed(tmp_path):
    write(tmp_path / "silent.wav", np.zeros(8000))
    assert len(io.load(tmp_path / "silent.wav", check_silence=False)) == 8000


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_saved_16_bit_audio_comes_back_exactly(tmp_path, suffix):
    path = tmp_path / "new" / f"a{suffix}"
    samples = np.random.default_rng(0).integers(-32768, 32768, 4000).astype(np.int16)
    io.save(path, samples)
    np.testing.assert_array_equal(io.to_int16(io.load(path)), samples)
    io.save(path, np.array([2.0, -2.0] * 500, np.float32))
    assert io.load(path).max() == np.float32(32767 / 32768)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_save_refuses_other_endings_and_unwritable_places(tmp_path):
    with pytest.raises(UserError, match=r"\.flac"):
        io.save(tmp_path / "a.mp3", tone(16000))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        io.save(tmp_path / "file" / "a.wav", tone(16000))
    with pytest.raises(ValueError, match="finite"):
        io.save(tmp_path / "a.wav", np.array([np.nan]))


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(1, 5000),
    source=st.sampled_from([8000, 16000, 22050, 44100, 48000]),
    target=st.sampled_from([8000, 16000, 22050, 24000]),
)
def test_resample_length(length, source, target):
    resampled = io.resample(np.ones(length, np.float32), source, target)
    assert resampled.dtype == np.float32
    assert abs(len(resampled) - length * target / source) <= 1


def test_resample_keeps_the_tone():
    np.testing.assert_allclose(
        io.resample(tone(44100), 44100, 16000)[500:-500], tone(16000)[500:-500], atol=2e-3
    )


def test_g722_round_trip():
    import G722

    data = G722.G722(16000, 64000).encode(io.to_int16(tone(16000)))
    samples, rate = io.decode_g722(bytes(data))
    assert rate == 16000 and samples.dtype == np.float32 and len(samples) == 8000
    delay = 22  # of the two quadrature mirror filters
    np.testing.assert_allclose(samples[1000:], tone(16000)[1000 - delay : -delay], atol=0.03)
    with pytest.raises(UserError, match="empty"):
        io.decode_g722(b"")
