"""Text for pretraining: documents on disk, and where they come from.

`<run_dir>/texts/<name>/<split>-*.array_record` holds one document a record, id and text;
`texts.json`, written last, says that the collection is whole. Sources are JSONL files with a row
{"text": ..., "id": ..., "split": ...} a document (only `text` must be there), plain text files, of
which each is a document, and TFDS builders with a field `text` such as c4 and wikipedia.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from t5x_audio.data import corpus, records
from t5x_audio.errors import UserError

SUMMARY_FILE = "texts.json"
_TFDS_SPLITS = {"train": "train", "valid": "validation", "dev": "validation", "test": "test"}


class Document(NamedTuple):
    """A text, its id and its split ('' follows from the id)."""

    id: str
    text: str
    split: str


def read_files(paths: Iterable[str]) -> Iterator[Document]:
    """The documents of files and folders: .jsonl by rows, all others whole.

    UserError, naming file and line, for what cannot be read or has no text.
    """
    for path in map(pathlib.Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            try:
                if file.suffix == ".jsonl":
                    with open(file, encoding="utf-8") as lines:
                        yield from _rows(file, lines)
                else:
                    yield Document(str(file.with_suffix("")), file.read_text("utf-8"), "")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file}: cannot be read as text ({error})") from error


def _rows(file: pathlib.Path, lines: Iterable[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: is no JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f"{where}: has no field 'text' with a text")
        split = row.get("split", "")
        if split not in ("", *records.SPLITS):
            raise UserError(f"{where}: split {split!r} is none of {', '.join(records.SPLITS)}")
        yield Document(str(row.get("id", f"{file.stem}-{number}")), row["text"], split)


def read_tfds(name: str, data_dir: str | None) -> Iterator[Document]:
    """The documents of a TFDS builder, downloaded and prepared if they are not there.

    UserError for no such builder, no field `text`, or a split of no known kind.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise UserError(f"--tfds={name}: {str(error).splitlines()[0]}") from error
    if "text" not in builder.info.features:
        known = ", ".join(sorted(builder.info.features))
        raise UserError(f"--tfds={name}: has no field 'text', only {known}")
    builder.download_and_prepare()
    for split in builder.info.splits:
        begins = [ours for theirs, ours in _TFDS_SPLITS.items() if split.startswith(theirs)]
        if not begins:
            raise UserError(f"--tfds={name}: split {split!r} is neither train, validation nor test")
        dataset = builder.as_dataset(split=split, shuffle_files=False)
        for number, example in enumerate(tfds.as_numpy(dataset)):
            yield Document(f"{split}-{number}", example["text"].decode("utf-8"), begins[0])


def write(
    directory: str, found: Iterable[Document], validation: float, test: float, num_shards: int
) -> dict:
    """Writes a whole collection; returns its summary: documents and characters, in all and a split.

    Empty documents are left out. UserError when nothing is left to train on.
    """
    counts = {split: [0, 0] for split in records.SPLITS}
    writers = {split: records.RecordWriter(directory, split, num_shards) for split in counts}
    try:
        for document in found:
            if not document.text.strip():
                continue
            split = document.split or corpus.split_of(document.id, validation, test)
            writers[split].write({"id": document.id, "text": document.text})
            counts[split][0] += 1
            counts[split][1] += len(document.text)
        if not counts["train"][0]:
            raise UserError(f"{directory}: the source has no text for the training split")
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    for split, writer in writers.items():
        writer.close() if counts[split][0] else writer.discard()
    splits = {s: {"documents": n, "characters": c} for s, (n, c) in counts.items() if n}
    summary = {
        key: sum(split[key] for split in splits.values()) for key in ("documents", "characters")
    }
    summary |= {"splits": splits}
    corpus.write_text(os.path.join(directory, SUMMARY_FILE), json.dumps(summary, indent=1) + "\n")
    return summary


def read_summary(directory: str) -> dict | None:
    """The figures of a whole collection, or None when it is absent or unfinished."""
    try:
        return json.loads(pathlib.Path(directory, SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def finished(run_dir: str) -> list[str]:
    """The directories of a run's whole collections, sorted."""
    root = os.path.join(run_dir, "texts")
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    directories = [os.path.join(root, name) for name in names]
    return [directory for directory in directories if read_summary(directory) is not None]
