"""Thousands of damaged sound files: one line that names the file, or sound, and never more."""

import io as bytes_io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.audio import io
from t5x_audio.errors import UserError

RATE = 16000
KINDS = {
    "pcm.wav": {"format": "WAV", "subtype": "PCM_16"},
    "float.wav": {"format": "WAV", "subtype": "FLOAT"},
    "long.wav": {"format": "RF64", "subtype": "PCM_24"},
    "mac.aiff": {"format": "AIFF", "subtype": "PCM_16"},
    "free.flac": {"format": "FLAC", "subtype": "PCM_16"},
    "vorbis.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus.ogg": {"format": "OGG", "subtype": "OPUS"},
}
HEADER = {"FLAC": 8300, "OGG": 4200}  # flac ends its header with padding, vorbis with its codebook
MUTANTS_OF_EACH = 600


def sound(seconds=0.4):
    noise = np.random.default_rng(0).normal(size=int(seconds * RATE))
    return (0.1 * noise).astype(np.float32)


def encoded(**kind):
    buffer = bytes_io.BytesIO()
    soundfile.write(buffer, sound(), RATE, **kind)
    return buffer.getvalue()


WHOLE = {name: encoded(**kind) for name, kind in KINDS.items()}


def attempt(path, data):
    """Samples, or the one line that says why there are none."""
    path.write_bytes(data)
    try:
        samples = io.load(path, RATE, max_seconds=3600.0)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error), error
        return str(error)
    assert samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all()
    assert samples.size <= 3600 * RATE
    return samples


@pytest.mark.parametrize("name", KINDS)
def test_whole_files_are_read(tmp_path, name):
    samples = attempt(tmp_path / name, WHOLE[name])
    assert len(samples) == len(sound())
    # Codecs that lose something keep the level.
    assert np.std(samples) == pytest.approx(np.std(sound()), rel=0.3)


@pytest.mark.parametrize("name", KINDS)
def test_mutated_headers(tmp_path, name):
    generator = np.random.default_rng(list(name.encode()))
    whole = np.frombuffer(WHOLE[name], np.uint8)
    # Half of the damage goes to the first bytes, where formats, sizes and rates are.
    header = min(HEADER.get(KINDS[name]["format"], 64), len(whole))
    refused = 0
    for number in range(MUTANTS_OF_EACH):
        data, count = whole.copy(), generator.integers(1, 6)
        places = generator.integers(0, header if number % 2 else 64, count)
        data[places] = generator.choice(
            [0, 1, 0x7F, 0x80, 0xFF, *generator.integers(0, 256, 5)], count
        )
        refused += isinstance(attempt(tmp_path / name, data.tobytes()), str)
    assert refused > MUTANTS_OF_EACH / 10


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60)
@given(st.data())
def test_a_file_that_is_cut_off_is_refused(tmp_path_factory, name, data):
    whole = WHOLE[name]
    tail = 2 if name.endswith((".wav", ".aiff")) else 1  # a pad byte is no loss
    cut = data.draw(st.integers(1, len(whole) - tail))
    if KINDS[name]["format"] in ("RF64", "WAV", "AIFF"):
        cut -= cut % 2
    path = tmp_path_factory.getbasetemp() / name
    if cut:
        assert isinstance(attempt(path, whole[:cut]), str)


def test_a_streamed_wav_does_not_know_its_size(tmp_path):
    data = bytearray(WHOLE["pcm.wav"])
    place = data.index(b"data") + 4
    data[4:8] = data[place : place + 4] = struct.pack("<I", 0xFFFFFFFF)
    assert len(attempt(tmp_path / "streamed.wav", bytes(data))) == len(sound())


@pytest.mark.parametrize(
    ("rate", "message"), [(100, "sampled at 100 Hz"), (2_000_000_000, "no rate of speech")]
)
def test_rates_that_are_none(tmp_path, rate, message):
    data = bytearray(WHOLE["pcm.wav"])
    data[24:28] = struct.pack("<I", rate)
    assert message in attempt(tmp_path / "rate.wav", bytes(data))


def test_a_wrong_name_is_no_harm(tmp_path):
    for name, data in WHOLE.items():
        assert len(attempt(tmp_path / f"{name}.mp3", data)) == len(sound())


def test_parts_are_read_without_the_rest(tmp_path):
    samples = sound(3.0)
    io.save(tmp_path / "a.flac", samples, RATE)
    part = io.load(tmp_path / "a.flac", RATE, start=1.0, seconds=0.5, max_seconds=1.0)
    np.testing.assert_allclose(part, samples[RATE : RATE * 3 // 2], atol=1e-4)
    rest = io.load(tmp_path / "a.flac", RATE, start=2.5)
    np.testing.assert_allclose(rest, samples[RATE * 5 // 2 :], atol=1e-4)
    with pytest.raises(UserError, match="ends at 3.00 s, before 4 s"):
        io.load(tmp_path / "a.flac", RATE, start=4.0)
    with pytest.raises(UserError, match="lasts 3.0 s, more than the 1 s"):
        io.load(tmp_path / "a.flac", RATE, max_seconds=1.0)
    with pytest.raises(UserError, match="sampled at 16000 Hz, below the 24000"):
        io.load(tmp_path / "a.flac", RATE, min_rate=24000)
