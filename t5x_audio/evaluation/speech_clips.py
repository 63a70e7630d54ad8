"""Clips of speech with their codes, drawn from a run's corpora or from recordings of any source.

A draw is random but always the same, and a smaller one is the beginning of a larger one: the order
is that of a hash of the ids. Only what is drawn is decoded.
"""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Collection, Sequence

import numpy as np

from t5x_audio.data import corpus, records
from t5x_audio.data.recordings import Limits, Source
from t5x_audio.errors import UserError
from t5x_audio.tokenizers import dual_codebook

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SpeechClip:
    """A recording, what is said in it, and its codes.

    Attributes:
      id: unique in a draw: the corpus or split, and the clip's own.
      text: normalised; '' where unknown.
      samples: float32 [T] at 16 kHz.
      codes: int32 [5 g], flat local codes.
    """

    id: str
    text: str
    samples: np.ndarray
    codes: np.ndarray


def of_run(
    places: Sequence[tuple[os.PathLike, os.PathLike]],
    split: str,
    linguistic_size: int,
    *,
    roles: Collection[str] | None = None,
    limit: int | None = None,
    max_seconds: float = 30.0,
) -> list[SpeechClip]:
    """Clips of a run, with the codes that the run keeps of them.

    Args:
      places: (corpus, its token corpus), directories.
      split: 'train', 'validation' or 'test'.
      linguistic_size: rows of the linguistic codebook.
      roles: of the clips; None = all.
      limit: at most so many; None = all.
      max_seconds: longer clips are left out.

    Raises:
      UserError: a corpus is damaged, or no clip is left.
    """
    found = {}
    for place, tokens in places:
        if not (records.has_split(place, split) and records.has_split(tokens, split)):
            continue
        for record in records.open_records(tokens, split):
            codes = dual_codebook.merge(record["linguistic"], record["semantic"], linguistic_size)
            right = roles is None or record["role"] in roles
            if right and len(codes) and record["duration"] <= max_seconds:
                found[str(place), record["id"]] = codes
    order = sorted(found, key=lambda key: _place(key[1]))[:limit]
    if not order:
        where = ", ".join(str(tokens) for _, tokens in places)
        what = f"split '{split}'" + (f" with role {' or '.join(roles)}" if roles else "")
        raise UserError(f"{where}: no tokens of {what}; run tokenize_corpus first")
    wanted, clips = set(order), {}
    for place in {place for place, _ in order}:
        for clip in corpus.iterate_clips(place, split):
            if (place, clip.id) in wanted:
                clips[place, clip.id] = clip
    for place, name in order:
        if (place, name) not in clips:
            raise UserError(f"{place}: lacks the clip {name} of its tokens; tokenise it again")
    return [_clip(os.path.basename(key[0]), clips[key], found[key]) for key in order]


def of_source(
    source: Source,
    tokenizer,
    *,
    limits: Limits,
    limit: int | None = None,
    normalization: str = "english",
) -> list[SpeechClip]:
    """Clips of all splits of a source, tokenised here; a recording that is no good is left out.

    Args:
      source: of the recordings.
      tokenizer: `DualCodebookTokenizer`.
      limits, normalization: see `recordings`.
      limit: at most so many; None = all.

    Raises:
      UserError: the source cannot be read, or no recording is good.
    """
    everything = [(split, one) for split in source.sizes() for one in source.shard(split, 0, 1)]
    clips, reason = [], "it holds no recording"
    for split, one in sorted(everything, key=lambda pair: _place(pair[1].id)):
        if len(clips) == limit:
            break
        try:
            clips.append((split, one.clip(limits, normalization)))
        except UserError as error:
            reason = str(error)
            _log.warning("left out: %s", reason)
    if not clips:
        raise UserError(f"no recording can be used: {reason}")
    streams = tokenizer.encode_batch([clip.samples for _, clip in clips])
    made = [
        _clip(split, clip, tokenizer.merge(*pair))
        for (split, clip), pair in zip(clips, streams, strict=True)
    ]
    return [one for one in made if len(one.codes)]


def _clip(place: str, clip: corpus.Clip, codes: np.ndarray) -> SpeechClip:
    return SpeechClip(f"{place}/{clip.id}", clip.text, clip.samples, codes)


def _place(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
