"""Turns speech into corpora of codes: the linguistic and the semantic stream of recordings.

    python -m t5x_audio.tokenize_corpus --run_dir=runs/step --manifest=speech.jsonl --name=mine \
        --num_shards=64 --workers=8

reads a JSONL manifest, a folder, a TFDS builder or a SeqIO task, or, where none is named, the
corpora of the run (`<run_dir>/corpus/<name>`), and writes `<run_dir>/tokens/<name>`: a record for
every recording with id, text, speaker, duration, the quality fields of `audio.quality`, and
`linguistic` and `semantic` int32 [N] local codes.

Apache Beam spreads the shards over workers: processes of this machine, or with --beam_options those
of Dataflow, Flink or Spark, given that they all see the same files. The output is the same bytes
for any number of workers. Shards are kept as they are finished, so an interrupted job goes on with
the others; a split appears under its final names when all of its shards are there. What cannot be
used is listed with the reason in quarantine.jsonl, never tokenised wrongly in silence.
"""

import dataclasses
import functools
import importlib.util
import os
import shlex
import shutil
import time
from collections.abc import Sequence

from t5x_audio import launch
from t5x_audio.data import sources
from t5x_audio.errors import UserError

SUMMARY_FILE = "tokens.json"


def run(
    *,
    run_dir: str,
    model_dir: str | None = None,
    corpora: Sequence[str] | None = None,
    name: str | None = None,
    num_shards: int = 1,
    max_seconds: float = 3600.0,
    min_rate: int = 16000,
    max_clipped: float = 0.01,
    normalization: str = "english",
    workers: int = 1,
    beam_options: str = "",
    **source,
) -> dict:
    """Tokenises corpora; what is finished is not done again.

    Args:
      run_dir: its linguistic_tokenizer/, semantic/ and corpus/<name>/ are read.
      model_dir: where the token corpora go, one directory a corpus; None = `<run_dir>/tokens`.
      corpora: names of the run's corpora; None = all. Not together with a source.
      name: of the token corpus of a source.
      num_shards: files a split, and the pieces of work that there are for the workers.
      max_seconds, min_rate, max_clipped: see `data.recordings.Limits`; others are in quarantine.
      normalization: of a source's texts: 'english' or 'none'.
      workers: processes on this machine.
      beam_options: for another runner, e.g. '--runner=DataflowRunner --project=... --region=...'.
      source: what `data.sources.choose` takes: manifest, folder, tfds, seqio_task, ...

    Returns:
      Figures for the closing line. UserError when a tokenizer or a source is missing.
    """
    from t5x_audio.data.recordings import Limits, require_normalization

    if importlib.util.find_spec("apache_beam") is None:
        raise UserError(
            "tokenize_corpus needs Apache Beam: make env, or "
            "pip install --no-deps -r requirements/beam.txt"
        )
    if workers < 1 or num_shards < 1:
        raise UserError(f"workers={workers}, num_shards={num_shards}: give 1 or more of each")
    require_normalization(normalization)
    found = _sources(run_dir, sources.choose(**source), name, corpora)
    model_dir = model_dir or os.path.join(run_dir, "tokens")
    limits = Limits(max_seconds, min_rate, max_clipped)
    load = functools.partial(load_tokenizer, run_dir)
    tokenizer = load()
    options = _beam_options(workers, beam_options)
    local = "--runner" not in beam_options
    began = time.monotonic()
    totals = {"clips": 0, "hours": 0.0, "quarantined": 0, "new_hours": 0.0}
    for corpus_name, recordings in found.items():
        target = os.path.join(model_dir, corpus_name)
        job = _CorpusJob(recordings, target, num_shards, limits, normalization, load, local)
        for key, value in job.run(tokenizer, options).items():
            totals[key] += value
    launch.save_operative_config(model_dir)
    new_hours, elapsed = totals.pop("new_hours"), (time.monotonic() - began) / 3600
    totals["hours_per_hour"] = new_hours / elapsed
    return {"model_dir": model_dir, **totals}


def load_tokenizer(run_dir: str):
    """The `DualCodebookTokenizer` of a run."""
    from t5x_audio.tokenizers import dual_codebook
    from t5x_audio.training import checkpoints

    parts = ("linguistic_tokenizer", "semantic")
    linguistic, semantic = (checkpoints.load_model(os.path.join(run_dir, p)) for p in parts)
    return dual_codebook.DualCodebookTokenizer(linguistic, semantic)


def _sources(run_dir: str, source, name: str | None, corpora: Sequence[str] | None) -> dict:
    """Name -> source of everything that is to be tokenised."""
    from t5x_audio.data import audio_reader, recordings

    if source is None:
        directories = audio_reader.corpora_of(run_dir, corpora)
        return {os.path.basename(path): recordings.Corpus(path) for path in directories}
    if corpora:
        raise UserError("corpora names what the run has; leave it away, or the source")
    if not name:
        raise UserError("tokenize_corpus: say what the token corpus is called, with --name=...")
    return {name: source}


def _beam_options(workers: int, others: str) -> list[str]:
    if "--runner" in others:
        return shlex.split(others)
    mode = "multi_processing" if workers > 1 else "in_memory"
    quiet = "--default_sdk_harness_log_level=ERROR"
    local = [quiet, f"--direct_running_mode={mode}", f"--direct_num_workers={workers}"]
    return ["--runner=DirectRunner", *local, *shlex.split(others)]


@dataclasses.dataclass(frozen=True)
class _CorpusJob:
    """One source and the directory that its codes go to."""

    source: object
    target: str
    num_shards: int
    limits: object
    normalization: str
    load: functools.partial
    local: bool

    def run(self, tokenizer, options: list[str]) -> dict:
        """Does what is not done yet; returns the figures of the whole corpus."""
        from t5x_audio.data import tokenizing

        os.makedirs(self.target, exist_ok=True)
        lock = os.path.join(self.target, ".running.lock")
        with tokenizing.running(lock):
            return self._run(tokenizer, options, lock)

    def _run(self, tokenizer, options: list[str], lock: str) -> dict:
        from t5x_audio.data import tokenizing

        sizes = self.source.sizes()
        made_from = self._made_from(tokenizer)
        summary = tokenizing.read_json(os.path.join(self.target, SUMMARY_FILE))
        if summary and summary["made_from"] == made_from:
            return {**summary["totals"], "new_hours": 0.0}
        self._start(made_from)
        job = tokenizing.Tokenizing(
            self.source, self._unfinished(), self.num_shards, self.limits, self.normalization,
            self.load, lock if self.local else None, os.getpid(),
        )  # fmt: skip
        shards = [(split, shard) for split in sizes for shard in range(self.num_shards)]
        before = sum((job.finished(*shard) or {"seconds": 0.0})["seconds"] for shard in shards)
        name = os.path.basename(self.target)
        with tokenizing.Progress(job, name, sum(sizes.values())):
            job.run(sizes, options)
        totals = self._publish(job, list(sizes))
        tokenizing.write_json(
            os.path.join(self.target, SUMMARY_FILE),
            {
                "made_from": made_from,
                "totals": totals,
                "linguistic_size": tokenizer.linguistic_size,
                "semantic_size": tokenizer.semantic_size,
            },
        )
        shutil.rmtree(self._unfinished())
        return {**totals, "new_hours": totals["hours"] - before / 3600}

    def _made_from(self, tokenizer) -> dict:
        """What the tokens depend on, so that a change of it is seen."""
        from t5x_audio import fit_codebook

        return {
            "tokenizers": fit_codebook.fingerprint(tokenizer.linguistic, tokenizer.semantic),
            "shards": self.num_shards,
            "limits": dataclasses.asdict(self.limits),
            "normalization": self.normalization,
            "source": self.source.facts(),
        }

    def _unfinished(self, *names: str) -> str:
        return os.path.join(self.target, ".unfinished", *names)

    def _start(self, made_from: dict) -> None:
        """Keeps the finished shards of an interrupted run of the same job, and no others."""
        from t5x_audio.data import tokenizing

        mark = self._unfinished("made_from.json")
        if tokenizing.read_json(mark) != made_from:
            shutil.rmtree(self._unfinished(), ignore_errors=True)
            os.makedirs(self._unfinished())
            tokenizing.write_json(mark, made_from)

    def _publish(self, job, splits: Sequence[str]) -> dict:
        """Gives all shards their final names; returns the totals."""
        from t5x_audio.data import corpus, records

        shards = [(split, shard) for split in splits for shard in range(self.num_shards)]
        results = [job.finished(*shard) for shard in shards]
        rejected = [row for result in results for row in result["quarantine"]]
        for name in os.listdir(self.target):
            if name == SUMMARY_FILE or ".array_record" in name:
                os.remove(os.path.join(self.target, name))
        for split, shard in shards:
            # Copied, not moved: were the job stopped here, the finished shards would remain.
            final = records.shard_path(self.target, split, shard, self.num_shards)
            made = records.shard_path(job.shard_directory(split, shard), split, 0, 1)
            shutil.copyfile(made, f"{final}.writing")
            os.replace(f"{final}.writing", final)
        corpus.write_quarantine(self.target, rejected)
        return {
            "clips": sum(result["clips"] for result in results),
            "hours": sum(result["seconds"] for result in results) / 3600,
            "quarantined": len(rejected),
        }


def _add_flags(parser) -> None:
    parser.add_argument("--run_dir", help="the run that the codes are for")
    parser.add_argument("--name", help="of the token corpus of a source")
    sources.add_flags(parser)
    parser.add_argument("--workers", type=int, help="processes on this machine; default 1")
    parser.add_argument("--beam_options", help="of another Beam runner, in quotes")


if __name__ == "__main__":
    launch.main("t5x_audio.tokenize_corpus", description=__doc__, add_flags=_add_flags)
