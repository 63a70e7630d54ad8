"""Images with text as documents: manifests, pixels, and corpora of their embeddings.

A manifest has one document a line, an image with its text or any row of texts and images:

    {"image": "a/b.jpg", "text": "what is seen", "id": "b", "split": "train"}
    {"spans": ["before", {"image": "a.png"}, "between", {"image": "b.png"}]}

Images are files, relative to the manifest, of any kind that Pillow reads. `id` is by default the
first image's path without its ending; a `split` follows from the id, so that all texts of an image
are in one.

A corpus, `<run_dir>/images/<name>`, holds what a frozen encoder makes of them, so that it runs once
and never beside the language model: a record has id, spans (JSON, null for an image),
soft_embeddings float16[n k, width] of its n images and per_image = k. images.json, written last,
has the figures and the encoder's name.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from t5x_audio.data import corpus, manifests, records
from t5x_audio.errors import UserError

SUMMARY_FILE = "images.json"
_FIELDS = ("image", "text", "spans", "id", "split")


@dataclasses.dataclass(frozen=True)
class Document:
    """Texts (str) and images (paths) in their order, before any image is read."""

    id: str
    split: str
    spans: tuple[str | pathlib.Path, ...]

    @property
    def images(self) -> list[pathlib.Path]:
        """The paths."""
        return [span for span in self.spans if not isinstance(span, str)]


def read_manifest(path: str, validation: float, test: float) -> list[Document]:
    """The documents of a JSONL file; `validation` and `test` are shares of splits not named.

    UserError, naming the line, for what is no document with an image.
    """
    folder = pathlib.Path(path).parent
    found = []
    for where, row in manifests.read_rows(path, _FIELDS):
        spans = _spans(where, row)
        if not any(isinstance(span, dict) for span in spans):
            raise UserError(f"{where}: has no image")
        first = next(span["image"] for span in spans if isinstance(span, dict))
        default = str(pathlib.PurePath(first).with_suffix("")).replace("/", "-").strip("-.")
        name = str(row.get("id") or default)
        split = row.get("split") or corpus.split_of(name, validation, test)
        parts = (s.strip() if isinstance(s, str) else folder / s["image"] for s in spans)
        found.append(Document(name, split, tuple(part for part in parts if part != "")))
    if not found:
        raise UserError(f"{path}: holds no document")
    return found


def _spans(where: str, row: dict) -> list:
    spans = row.get("spans")
    if ("image" in row) == (spans is not None):
        raise UserError(f"{where}: give one of the fields 'image' and 'spans'")
    if spans is None:
        spans = [{"image": row["image"]}, row.get("text", "")]
    if not isinstance(spans, list):
        raise UserError(f"{where}: spans={spans!r} is no list")
    for span in spans:
        image = span.get("image") if isinstance(span, dict) and len(span) == 1 else None
        if not isinstance(span, str) and not (isinstance(image, str) and image):
            raise UserError(f'{where}: {span!r} is neither a text nor {{"image": "a file"}}')
    return spans


def load_image(path: str | os.PathLike, size: int) -> np.ndarray:
    """An image file as uint8 [size, size, 3]: its middle square, scaled bicubically.

    UserError, naming the file, when it is missing or no whole image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: is no whole image ({str(error).splitlines()[0]})") from error


def encode(
    documents: Iterable[Document],
    encoder: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    max_images: int,
    refused: list[dict],
) -> Iterator[tuple[str, dict]]:
    """Yields (split, record); what cannot be used is added to `refused` with the reason.

    Args:
      documents: in any order, which is kept.
      encoder: uint8 [batch_size, image_size, image_size, 3] -> float [batch_size, k, width].
      batch_size: images that go through it together.
      max_images: of a document; more are refused.
      refused: {id, reason} of documents.
    """
    waiting, pixels = [], []
    for document in documents:
        try:
            if len(document.images) > max_images:
                raise UserError(f"has {len(document.images)} images, max_images={max_images}")
            loaded = [load_image(path, encoder.image_size) for path in document.images]
        except UserError as error:
            refused.append({"id": document.id, "reason": str(error)})
            continue
        waiting.append(document)
        pixels += loaded
        if len(pixels) >= batch_size:
            yield from _records(waiting, _embeddings(encoder, pixels, batch_size))
            waiting, pixels = [], []
    if waiting:
        yield from _records(waiting, _embeddings(encoder, pixels, batch_size))


def _embeddings(encoder, pixels: list[np.ndarray], batch_size: int) -> np.ndarray:
    """float16 [N, k, width]; the last batch is filled up."""
    parts = []
    for start in range(0, len(pixels), batch_size):
        batch = np.stack(pixels[start : start + batch_size])
        padding = [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)]
        with np.errstate(over="ignore"):
            made = np.asarray(encoder(np.pad(batch, padding)))[: len(batch)].astype(np.float16)
        if not np.isfinite(made).all():
            raise UserError("the image encoder gives numbers that float16 does not hold")
        parts.append(made)
    return np.concatenate(parts)


def _records(documents: list[Document], embeddings: np.ndarray) -> Iterator[tuple[str, dict]]:
    first, (per_image, width) = 0, embeddings.shape[1:]
    for document in documents:
        last = first + len(document.images)
        spans = [span if isinstance(span, str) else None for span in document.spans]
        yield (
            document.split,
            {
                "id": document.id,
                "spans": json.dumps(spans),
                "soft_embeddings": embeddings[first:last].reshape(-1, width),
                "per_image": per_image,
            },
        )
        first = last


# ---- corpora of a run -------------------------------------------------------------------------


def read_summary(directory: str) -> dict | None:
    """images.json of a whole corpus, or None."""
    try:
        with open(os.path.join(directory, SUMMARY_FILE), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def finished_corpora(run_dir: str) -> list[str]:
    """Directories of the whole corpora of a run, sorted; [] when it has none.

    UserError when two of them are of different encoders.
    """
    root = os.path.join(run_dir, "images")
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    summaries = {os.path.join(root, name): read_summary(os.path.join(root, name)) for name in names}
    found = {path: summary for path, summary in summaries.items() if summary is not None}
    encoders = {summary["encoder"]: path for path, summary in found.items()}
    if len(encoders) > 1:
        raise UserError(
            f"{' and '.join(sorted(encoders.values()))} are of different image encoders: delete "
            "one of them and run t5x_audio.encode_images again"
        )
    return list(found)


def source_files(run_dir: str) -> list[str]:
    """Every file that the documents of a run are read from."""
    corpora = finished_corpora(run_dir)
    return [path for d in corpora for split in records.SPLITS for path in _shards(d, split)]


def _shards(directory: str, split: str) -> list[str]:
    return records.shard_paths(directory, split)


def documents(run_dir: str, split: str) -> Iterator[dict]:
    """The records of a split, corpus by corpus."""
    for directory in finished_corpora(run_dir):
        if records.has_split(directory, split):
            yield from records.open_records(directory, split)
