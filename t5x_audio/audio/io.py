"""Waveforms in and out: files of any common format become float32 [T] mono in [-1, 1].

libsndfile (through soundfile) decodes wav, flac, ogg and mp3 and tells the format from the
content, never from the name; soxr resamples. Everything that can be wrong with a recording is
reported here as one `UserError` line, so that no later stage has to ask again.
"""

import os
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from t5x_audio.audio import containers
from t5x_audio.errors import UserError

DEFAULT_RATE = 16000
G722_RATE = 16000
SILENCE_PEAK = 1e-4  # -80 dBFS: below the last bit or two of 16-bit audio
LOUDEST_PEAK = 16.0  # 24 dB above full scale: no float recording goes there
MIN_RATE, MAX_RATE = 4000, 768000  # Hz: what speech may be sampled at
_BLOCK_SECONDS = 60  # decoded at a time, so that a header alone cannot ask for all memory
_UNKNOWN_FRAMES = 2**62  # libsndfile's length of a stream that does not tell its own


def load(
    path,
    rate: int = DEFAULT_RATE,
    *,
    min_seconds: float = 0.05,
    max_seconds: float | None = None,
    min_rate: int = MIN_RATE,
    start: float = 0.0,
    seconds: float | None = None,
    check_silence: bool = True,
) -> np.ndarray:
    """Reads a recording, or a part of one, of any format, rate and channel count.

    Args:
      path: a wav, flac, ogg or mp3 file.
      rate: sampling rate of the result in Hz; channels are averaged, then resampled.
      min_seconds: shorter recordings are refused.
      max_seconds: longer ones are refused before they are decoded; None = any length.
      min_rate: recordings of a lower rate in Hz are refused.
      start, seconds: the part to read; None = to the end.
      check_silence: refuse a recording that never exceeds -80 dBFS.

    Returns:
      float32 [T] mono.

    Raises:
      UserError: the file is missing, empty, cut off, not audio, too short, too long, of too low a
        rate, silent or not finite, or ends before the part.
    """
    part = _Part(start, seconds, max_seconds)
    samples, source_rate = _decode(pathlib.Path(path), part, min_rate)
    check_samples(
        samples, source_rate, name=str(path), min_seconds=min_seconds, check_silence=check_silence
    )
    return resample(samples, source_rate, rate)


def check_samples(
    samples: np.ndarray,
    rate: int,
    *,
    name: str,
    min_seconds: float = 0.05,
    max_seconds: float | None = None,
    check_silence: bool = True,
) -> None:
    """Raises UserError, naming `name`, unless [T] samples are speech-like enough to work on."""
    if samples.size == 0:
        raise UserError(f"{name}: holds no samples; record it again")
    seconds = samples.size / rate
    if seconds < min_seconds:
        raise UserError(
            f"{name}: only {samples.size} sample(s), {seconds:.3f} s, where at least "
            f"{min_seconds:g} s is needed; give a longer recording"
        )
    if max_seconds is not None and seconds > max_seconds:
        _refuse_long(name, seconds, max_seconds)
    peak = float(np.abs(samples).max())
    if not np.isfinite(peak):
        raise UserError(f"{name}: holds NaN or infinite samples; export it again as 16-bit audio")
    if peak > LOUDEST_PEAK:
        raise UserError(
            f"{name}: holds samples up to {peak:.3g}, where full scale is 1; its header tells the "
            "wrong sample format, or it needs another export"
        )
    if check_silence and peak < SILENCE_PEAK:
        raise UserError(f"{name}: is silent (peak below -80 dBFS); check the microphone or level")


def check_rate(name: str, rate: float, min_rate: int = MIN_RATE) -> None:
    """Raises UserError, naming `name`, for a sampling rate in Hz that is none of speech."""
    if rate < min_rate:
        raise UserError(
            f"{name}: is sampled at {rate} Hz, below the {min_rate} Hz that are needed; "
            "take the original recording"
        )
    if rate > MAX_RATE:
        raise UserError(f"{name}: {rate} Hz is no rate of speech; its header is damaged")


def save(path, samples: np.ndarray, rate: int = DEFAULT_RATE) -> None:
    """Writes float [T] samples in [-1, 1] (clipped) or int16 [T] as 16-bit wav or flac.

    The file appears under its name only when complete; missing parent folders are made.

    Raises:
      UserError: the name ends in neither .wav nor .flac, or the file cannot be written.
      ValueError: samples are not a finite [T].
    """
    path = pathlib.Path(path)
    file_format = {".wav": "WAV", ".flac": "FLAC"}.get(path.suffix.lower())
    if file_format is None:
        raise UserError(f"{path}: can only write .wav and .flac; change the ending")
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(f"expected finite samples of shape [T], got shape {samples.shape}")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        soundfile.write(temporary, to_int16(samples), rate, subtype="PCM_16", format=file_format)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except (OSError, soundfile.SoundFileError) as error:
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)
        reason = _one_line(error)
        raise UserError(
            f"{path}: cannot be written ({reason}); check the folder and disk"
        ) from None


def resample(x: np.ndarray, source_rate: float, target_rate: float) -> np.ndarray:
    """Changes the rate of float [T] samples; float32 [round(T * target_rate / source_rate)]."""
    x = np.asarray(x, np.float32)
    if source_rate == target_rate or x.size == 0:
        return x
    return soxr.resample(x, source_rate, target_rate, quality="HQ")


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Float samples in [-1, 1] (clipped) -> int16 of the same shape; int16 passes through."""
    if samples.dtype == np.int16:
        return samples
    scaled = np.round(np.asarray(samples, np.float64) * 32768.0)
    return np.clip(scaled, -32768, 32767).astype(np.int16)


def to_float32(samples: np.ndarray) -> np.ndarray:
    """int16 samples -> float32 in [-1, 1) of the same shape; inverse of `to_int16`."""
    return samples.astype(np.float32) / np.float32(32768.0)


def decode_g722(data: bytes) -> tuple[np.ndarray, int]:
    """Decodes ITU-T G.722 at 64 kbit/s, as in Asterisk's prompts.

    Returns:
      (float32 [T] mono in [-1, 1), 16000): every byte holds two samples.

    Raises:
      UserError: `data` is empty.
    """
    import G722

    if not data:
        raise UserError("empty G.722 data: the file holds no audio; fetch it again")
    decoded = G722.G722(G722_RATE, 64000).decode(data)
    return to_float32(np.asarray(decoded, dtype=np.int16)), G722_RATE


class _Part(NamedTuple):
    """The seconds of a file that are wanted, and how many there may be."""

    start: float
    seconds: float | None
    max_seconds: float | None


def _decode(path: pathlib.Path, part: _Part, min_rate: int) -> tuple[np.ndarray, int]:
    """Returns (float32 [T] mono, its rate), or raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise UserError(f"{path}: is not a file; give a wav, flac, ogg or mp3 file")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty (0 bytes); record or copy it again")
        # By descriptor, so that the content alone decides the format (a name ending in .raw
        # would make soundfile ask for the layout); unbuffered, as libsndfile goes on where it is.
        with path.open("rb", buffering=0) as file:
            missing = containers.what_is_missing(file)
            if missing:
                raise UserError(f"{path}: is cut off: {missing}; copy it again")
            with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
                check_rate(str(path), sound.samplerate, min_rate)
                return _read(str(path), sound, part), sound.samplerate
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:
        reason = _one_line(error)
        raise UserError(
            f"{path}: cannot be read as audio ({reason}); give a wav, flac, ogg or mp3 file"
        ) from None


def _read(name: str, sound: soundfile.SoundFile, part: _Part) -> np.ndarray:
    """float32 [T]: the mean of the channels of the part, decoded by the minute."""
    rate, known = sound.samplerate, sound.frames < _UNKNOWN_FRAMES
    start = round(part.start * rate)
    wanted = None if part.seconds is None else round(part.seconds * rate)
    if known:
        if part.start and start >= sound.frames:
            raise UserError(f"{name}: ends at {sound.frames / rate:.2f} s, before {part.start:g} s")
        wanted = min(sound.frames - start, sound.frames if wanted is None else wanted)
    limit = None if part.max_seconds is None else int(part.max_seconds * rate)
    if limit is not None and wanted is not None and wanted > limit:
        _refuse_long(name, wanted / rate, part.max_seconds)
    if start:
        sound.seek(start)
    blocks, count = [], 0
    while wanted is None or count < wanted:
        size = _BLOCK_SECONDS * rate
        block = sound.read(size if wanted is None else min(size, wanted - count), always_2d=True,
                           dtype="float32")  # fmt: skip
        if not len(block):
            break
        blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1))
        count += len(block)
        if limit is not None and count > limit:
            _refuse_long(name, count / rate, part.max_seconds)
    # The length of an MP3 is an estimate.
    if known and count < wanted and sound.format not in ("MP3", "MPEG"):
        raise UserError(
            f"{name}: is cut off: {wanted - count} of {wanted} samples are missing; copy it again"
        )
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _refuse_long(name: str, seconds: float, max_seconds: float):
    raise UserError(
        f"{name}: lasts {seconds:.1f} s, more than the {max_seconds:g} s allowed; "
        "cut it into shorter pieces"
    )


def _one_line(error: Exception) -> str:
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__
