"""Brings recordings of your own into a run, from a JSONL manifest or a TFDS builder.

    python -m t5x_audio.import_corpus --manifest=speech.jsonl --name=mine --run_dir=runs/demo
    python -m t5x_audio.import_corpus --tfds=librispeech --name=librispeech --run_dir=runs/step1

The corpus is `<run_dir>/corpus/<name>`; `t5x_audio.tokenize_corpus` takes it from there. What a
manifest's line looks like: t5x_audio/data/manifests.py. Recordings that cannot be used are left out
and listed, with the reason, in the corpus's quarantine.jsonl.
"""

import json
import os
import shutil
import sys

from t5x_audio import launch
from t5x_audio.errors import UserError

QUARANTINE_FILE = "quarantine.jsonl"


def run(
    *,
    run_dir: str,
    name: str,
    manifest: str | None = None,
    tfds: str | None = None,
    data_dir: str | None = None,
    validation: float = 0.02,
    test: float = 0.02,
    max_seconds: float = 30.0,
    num_shards: int = 1,
) -> dict:
    """Writes the corpus `name` of a run; a finished one is left as it is.

    Args:
      run_dir: the run.
      name: of the corpus.
      manifest: JSONL file of recordings.
      tfds: name of a TFDS builder, in place of a manifest.
      data_dir: of TFDS.
      validation, test: shares of the splits where the source names none.
      max_seconds: longer recordings are left out.
      num_shards: files a split.

    Returns:
      Figures for the closing line.

    Raises:
      UserError: both or none of manifest and tfds, a bad line, or nothing that can be used.
    """
    from tqdm import tqdm

    from t5x_audio.data import corpus, manifests, records

    if (manifest is None) == (tfds is None):
        raise UserError("import_corpus: give one of --manifest=FILE and --tfds=NAME")
    if not 0 <= validation + test < 1 or min(validation, test) < 0:
        raise UserError(f"validation={validation}, test={test}: shares that leave something over")
    directory = os.path.join(run_dir, "corpus", name)
    summary = corpus.read_summary(directory)
    if summary is not None:
        print(f"{directory}: finished already", file=sys.stderr)
        return _figures(directory, summary)
    if manifest is not None:
        source = manifests.read_manifest(manifest, validation, test)
    else:
        source = manifests.read_tfds(tfds, data_dir)
    shutil.rmtree(directory, ignore_errors=True)
    refused, counts = [], {split: [0, 0.0] for split in records.SPLITS}
    writers = {split: records.RecordWriter(directory, split, num_shards) for split in counts}
    try:
        for split, clip in manifests.clips(tqdm(source, unit="clip"), max_seconds, refused):
            writers[split].write(clip.to_record())
            counts[split][0] += 1
            counts[split][1] += clip.duration
        if not any(number for number, _ in counts.values()):
            why = refused[0]["reason"] if refused else "there is none"
            raise UserError(f"{manifest or tfds}: no recording can be used ({why})")
    except BaseException:
        for writer in writers.values():
            writer.discard()
        shutil.rmtree(directory, ignore_errors=True)
        raise
    for split, writer in writers.items():
        if counts[split][0]:
            writer.close()
        else:
            writer.discard()
    lines = "".join(json.dumps(row) + "\n" for row in refused)
    corpus.write_text(os.path.join(directory, QUARANTINE_FILE), lines)
    info = {"source": manifest or tfds, "left_out": len(refused)}
    return _figures(directory, corpus.write_summary(directory, counts, info))


def _figures(directory: str, summary: dict) -> dict:
    figures = {name: summary[name] for name in ("clips", "hours", "left_out") if name in summary}
    return {"corpus": directory} | figures


def _add_flags(parser) -> None:
    parser.add_argument("--run_dir", help="the run that the corpus is for", required=True)
    parser.add_argument("--name", help="of the corpus", required=True)
    parser.add_argument("--manifest", help="JSONL file of recordings")
    parser.add_argument("--tfds", help="name of a TFDS builder, e.g. librispeech")
    parser.add_argument("--data_dir", help="of TFDS; default ~/tensorflow_datasets")
    parser.add_argument("--validation", type=float, help="share of a split; default 0.02")
    parser.add_argument("--test", type=float, help="share of a split; default 0.02")
    parser.add_argument("--max_seconds", type=float, help="of a recording; default 30")
    parser.add_argument("--num_shards", type=int, help="files a split; default 1")


if __name__ == "__main__":
    launch.main("t5x_audio.import_corpus", description=__doc__, add_flags=_add_flags)
