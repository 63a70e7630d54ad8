"""Brings recordings of your own into a run: a manifest, a folder, a TFDS builder, a SeqIO task.

    python -m t5x_audio.import_corpus --manifest=speech.jsonl --name=mine --run_dir=runs/demo
    python -m t5x_audio.import_corpus --tfds=librispeech --name=librispeech --run_dir=runs/step1

The corpus is `<run_dir>/corpus/<name>`, where the trainings of tokenizers and vocoder and
`t5x_audio.tokenize_corpus` find it. What a manifest's line looks like: t5x_audio/data/manifests.py.
Recordings that cannot be used are left out and listed, with the reason, in the corpus's
quarantine.jsonl.
"""

import os
import shutil
import sys

from t5x_audio import launch
from t5x_audio.data import sources
from t5x_audio.errors import UserError


def run(
    *,
    run_dir: str,
    name: str,
    max_seconds: float = 30.0,
    min_rate: int = 16000,
    max_clipped: float = 0.01,
    normalization: str = "english",
    num_shards: int = 1,
    **source,
) -> dict:
    """Writes the corpus `name` of a run; a finished one is left as it is.

    Args:
      run_dir: the run.
      name: of the corpus.
      max_seconds, min_rate, max_clipped: see `data.recordings.Limits`.
      normalization: of texts: 'english' or 'none'.
      num_shards: files a split.
      source: what `data.sources.choose` takes: manifest, folder, tfds, seqio_task, ...

    Returns:
      Figures for the closing line.

    Raises:
      UserError: no source or two, a bad line, or nothing that can be used.
    """
    from t5x_audio.data import corpus
    from t5x_audio.data.recordings import Limits, require_normalization

    require_normalization(normalization)
    recordings = sources.choose(**source)
    if recordings is None:
        raise UserError("import_corpus: name a source, e.g. --manifest=FILE or --tfds=NAME")
    directory = os.path.join(run_dir, "corpus", name)
    summary = corpus.read_summary(directory)
    if summary is not None:
        print(f"{directory}: finished already", file=sys.stderr)
        return _figures(directory, summary)
    limits = Limits(max_seconds, min_rate, max_clipped)
    shutil.rmtree(directory, ignore_errors=True)
    try:
        summary = _write(directory, recordings, limits, normalization, num_shards)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return _figures(directory, summary)


def _write(directory: str, source, limits, normalization: str, num_shards: int) -> dict:
    from tqdm import tqdm

    from t5x_audio.data import corpus, records

    refused, counts = [], {}
    sizes = source.sizes()
    with tqdm(total=sum(sizes.values()), unit="clip") as progress:
        for split in sizes:
            writer, seconds = records.RecordWriter(directory, split, num_shards), 0.0
            with writer:
                for recording in source.shard(split, 0, 1):
                    progress.update()
                    try:
                        clip = recording.clip(limits, normalization)
                    except UserError as error:
                        refused.append({"split": split, "id": recording.id, "reason": str(error)})
                        continue
                    writer.write(clip.to_record())
                    seconds += clip.duration
            if not writer.num_records:
                records.remove_split(directory, split)
            counts[split] = (writer.num_records, seconds)
    if not any(count for count, _ in counts.values()):
        why = refused[0]["reason"] if refused else "there is none"
        raise UserError(f"{source}: no recording can be used ({why})")
    corpus.write_quarantine(directory, refused)
    return corpus.write_summary(
        directory, counts, {"source": str(source), "left_out": len(refused)}
    )


def _figures(directory: str, summary: dict) -> dict:
    figures = {name: summary[name] for name in ("clips", "hours", "left_out") if name in summary}
    return {"corpus": directory} | figures


def _add_flags(parser) -> None:
    parser.add_argument("--run_dir", help="the run that the corpus is for", required=True)
    parser.add_argument("--name", help="of the corpus", required=True)
    sources.add_flags(parser)


if __name__ == "__main__":
    launch.main("t5x_audio.import_corpus", description=__doc__, add_flags=_add_flags)
