"""Which recordings a job is to read, from its flags: the one place where sources are chosen."""

from __future__ import annotations

import typing

from t5x_audio.errors import UserError

if typing.TYPE_CHECKING:
    from t5x_audio.data.recordings import Source


def choose(
    *,
    manifest: str | None = None,
    folder: str | None = None,
    tfds: str | None = None,
    data_dir: str | None = None,
    seqio_task: str | None = None,
    seqio_module: str | None = None,
    rate: int = 16000,
    validation: float = 0.02,
    test: float = 0.02,
) -> Source | None:
    """The source that is named, None when none is. UserError for two, or for shares above 1."""
    names = {"manifest": manifest, "folder": folder, "tfds": tfds, "seqio_task": seqio_task}
    given = [f"--{name}={value}" for name, value in names.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]}: give one of them")
    if not 0 <= validation + test < 1 or min(validation, test) < 0:
        raise UserError(f"validation={validation}, test={test}: shares that leave something over")
    # Here, since a job's --help needs none of it.
    from t5x_audio.data import manifests, recordings, tf_recordings

    if manifest is not None:
        return manifests.Manifest(manifest, validation, test)
    if folder is not None:
        return recordings.Folder(folder, validation, test)
    if tfds is not None:
        return tf_recordings.Tfds(tfds, data_dir)
    return None if seqio_task is None else tf_recordings.SeqioTask(seqio_task, seqio_module, rate)


def add_flags(parser) -> None:
    """The flags of `choose`, and the limits of `recordings`, for a job's parser."""
    parser.add_argument("--manifest", help="JSONL file of recordings")
    parser.add_argument("--folder", help="folder of sound files, with texts beside them if any")
    parser.add_argument("--tfds", help="name of a TFDS builder, e.g. librispeech")
    parser.add_argument("--data_dir", help="of TFDS; default ~/tensorflow_datasets")
    parser.add_argument("--seqio_task", help="a SeqIO task of your own that gives recordings")
    parser.add_argument("--seqio_module", help="Python module that registers it")
    parser.add_argument("--rate", type=int, help="of the SeqIO task's audio; default 16000 Hz")
    parser.add_argument("--validation", type=float, help="share of a split; default 0.02")
    parser.add_argument("--test", type=float, help="share of a split; default 0.02")
    parser.add_argument("--max_seconds", type=float, help="longest recording that is taken")
    parser.add_argument("--min_rate", type=int, help="lowest sampling rate; default 16000 Hz")
    parser.add_argument(
        "--normalization", choices=("english", "none"),
        help="of texts: english (default) spells them as they are said; none keeps them",
    )  # fmt: skip
    parser.add_argument("--num_shards", type=int, help="files a split; default 1")
