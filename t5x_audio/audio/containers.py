"""Whether a sound file is whole: what its container promises, beside what is there.

libsndfile reads a cut-off WAV, AIFF or Ogg file as far as it goes and says nothing; here its length
is compared with the sizes in the header and, for Ogg, with the mark of the last page. FLAC says how
many samples it holds, which whoever decodes it compares. Sources: the RIFF, RF64 (EBU 3306) and
AIFF chunk layouts; RFC 3533 for Ogg.
"""

import os
import struct
from typing import BinaryIO

_UNKNOWN = (0, 0xFFFFFFFF)  # sizes that a writer leaves that cannot go back to its header
_MAX_CHUNKS = 1000
_LAST_PAGE = 65536 + 282  # bytes: the longest Ogg page
_END_OF_STREAM = 0x04


def what_is_missing(file: BinaryIO) -> str | None:
    """Why an open file must have been cut off; None where it is whole or the format cannot tell.

    The position in the file is kept.
    """
    place = file.tell()
    try:
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        head = file.read(12)
        if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:] == b"WAVE":
            return _chunks(file, size, b"data", ">" if head[:4] == b"RIFX" else "<")
        if head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
            return _chunks(file, size, b"SSND", ">")
        if head[:4] == b"OggS":
            return _ogg(file, size)
        return None
    finally:
        file.seek(place)


def _chunks(file: BinaryIO, size: int, samples: bytes, order: str) -> str | None:
    """Follows the chunks up to the one of the samples, which has to end within the file."""
    place, large = 12, None
    for _ in range(_MAX_CHUNKS):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return None  # no samples at all: the decoder says so
        name, length = struct.unpack(f"{order}4sI", head)
        if name == b"ds64":  # the 64-bit sizes of RF64
            fields = file.read(16)
            large = struct.unpack("<Q", fields[8:])[0] if len(fields) == 16 else None
        if name == samples:
            length = large if length == 0xFFFFFFFF and large else length
            missing = 0 if length in _UNKNOWN else place + 8 + length - size
            return f"{missing} of {length} bytes of samples are missing" if missing > 0 else None
        place += 8 + length + length % 2
    return None


def _ogg(file: BinaryIO, size: int) -> str | None:
    file.seek(max(0, size - _LAST_PAGE))
    end = file.read()
    page = end.rfind(b"OggS")
    if page < 0 or len(end) < page + 27:
        return "its last page is missing"
    if not end[page + 5] & _END_OF_STREAM:
        return "its last page is missing"
    segments = end[page + 27 : page + 27 + end[page + 26]]
    whole = len(segments) == end[page + 26] and len(end) >= page + 27 + len(segments) + sum(
        segments
    )
    return None if whole else "its last page is not whole"
