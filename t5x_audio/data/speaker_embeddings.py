"""One speaker embedding a clip, computed once and kept in a file with the name of its encoder.

Embeddings of two encoders have nothing to do with each other, so a file that another encoder has
made (another kind, or the same with other weights) is refused, never filled up or read as its own.
"""

import dataclasses
import os
import zipfile
from collections.abc import Callable, Mapping

import numpy as np

from t5x_audio.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClipEmbedder:
    """A speaker encoder as a function of clips, which may load its weights when first asked.

    Attributes:
      describe: () -> kind of encoder and fingerprint of its weights.
      embed: waveforms float32 [T] at 16 kHz each -> embeddings float32 [N, D].
    """

    describe: Callable[[], str]
    embed: Callable[[list[np.ndarray]], np.ndarray]

    def __call__(self, waveforms: list[np.ndarray]) -> np.ndarray:
        """See `embed`."""
        return self.embed(waveforms)


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """What a file holds.

    Attributes:
      vectors: "<split> <clip id>" -> float32 [D].
      encoder: what made them; '' in a file that does not say.
    """

    vectors: Mapping[str, np.ndarray]
    encoder: str


def read(path: str | os.PathLike) -> Embeddings | None:
    """The embeddings of a file; None without one. UserError when it is damaged."""
    try:
        with np.load(path) as archive:
            vectors = dict(zip(archive["keys"].tolist(), archive["embeddings"], strict=True))
            return Embeddings(vectors, str(archive["encoder"]) if "encoder" in archive else "")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is damaged; delete it to have it made again") from error


def write(path: str | os.PathLike, embeddings: Embeddings) -> None:
    """Writes a file whole or not at all."""
    path, vectors = str(path), embeddings.vectors
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.writing", "wb") as file:
        np.savez(
            file,
            keys=np.array(list(vectors)),
            embeddings=np.stack(list(vectors.values())),
            encoder=np.array(embeddings.encoder),
        )
    os.replace(f"{path}.writing", path)


def of_clips(
    path: str, split: str, index, embed: ClipEmbedder | None, batch_size: int = 32
) -> Mapping[str, np.ndarray]:
    """The embeddings of a file after those that it lacks have been computed.

    Args:
      path: of the file; it is written anew when something was missing.
      split, index: the clips, an `audio_reader.ClipIndex`; their keys are "<split> <id>".
      embed: the encoder; None = the file must be complete.
      batch_size: clips at once.

    Returns:
      Key -> float32 [D].

    Raises:
      UserError: an embedding is missing and there is no encoder, the encoder refuses a clip, or
        the file is damaged or of another encoder.
    """
    found = read(path)
    known = dict(found.vectors) if found else {}
    missing = [i for i in range(len(index)) if f"{split} {index.ids[i]}" not in known]
    if embed is None:
        if missing:
            raise UserError(
                f"{path}: lacks {len(missing)} speaker embeddings; give a speaker encoder"
            )
        return known
    encoder = embed.describe()
    if found and found.encoder != encoder:
        maker = f"'{found.encoder}'" if found.encoder else "an encoder that it does not name"
        raise UserError(
            f"{path}: was made by {maker}, not by '{encoder}'; bind that encoder, or delete the "
            "file to have it made again"
        )
    # Similar lengths together, so that an encoder pads little and compiles few shapes.
    missing.sort(key=lambda i: int(index.lengths[i]))
    for start in range(0, len(missing), batch_size):
        some = missing[start : start + batch_size]
        try:
            vectors = np.asarray(embed([index.samples(i) for i in some]), np.float32)
        except UserError as error:
            ids = ", ".join(index.ids[i] for i in some)
            raise UserError(f"{split} clips {ids}: {error}") from error
        known |= {f"{split} {index.ids[i]}": v for i, v in zip(some, vectors, strict=True)}
    if missing:
        write(path, Embeddings(known, encoder))
    return known
