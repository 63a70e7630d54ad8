"""Writes the SeqIO tasks of a run as caches that training reads without TensorFlow.

For every task, each split that has examples becomes `<model_dir>/<task>/<split>-*.array_record`
(tokens int32[L] and weights float32[L], and for validation and test the texts beside them),
`<split>-lengths.npy`, and stats.json with examples, tokens by modality and lengths. A task is
built under a temporary name and renamed when it is whole. One that is up to date with the tokens,
the vocabulary and the answer's ratio is passed over.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_audio import launch
from t5x_audio.data import lm_reader, records
from t5x_audio.errors import UserError
from t5x_audio.sequences.vocabulary import MODALITIES, Vocabulary


def run(
    *,
    model_dir: str,
    run_dir: str,
    mixtures: Mapping[str, Mapping[str, float]],
    extra_tasks: Sequence[str] = (),
    num_shards: int = 1,
    text_block: int = 10,
    audio_block: int = 15,
) -> dict:
    """Caches every task that a mixture or `extra_tasks` names.

    Args:
      model_dir: where the caches go, one directory a task; training reads `<run_dir>/tasks`.
      run_dir: the run; its vocabulary/, tokens/ and corpus/ are read.
      mixtures: name -> {task: share of the tokens}.
      extra_tasks: tasks in no mixture, such as preference pairs.
      num_shards: files a split.
      text_block, audio_block: ratio of a spoken answer.

    Returns:
      Figures for the closing line. UserError for an unknown task or missing tokens.
    """
    import tasks
    from tasks.corpus import TokenCorpus

    names = list(dict.fromkeys([*(t for m in mixtures.values() for t in m), *extra_tasks]))
    unknown = [name for name in names if name not in tasks.TASKS]
    if unknown:
        raise UserError(f"no task is called {unknown[0]!r}: choose from {', '.join(tasks.TASKS)}")
    vocabulary = Vocabulary.load(os.path.join(run_dir, "vocabulary"))
    corpus = TokenCorpus(run_dir, vocabulary)
    fingerprint = _fingerprint(corpus, vocabulary, (text_block, audio_block, num_shards))
    directories = {name: os.path.join(model_dir, name) for name in names}
    missing = [name for name, path in directories.items() if not _is_current(path, fingerprint)]
    if missing:
        tasks.register_all(run_dir, vocabulary, mixtures, text_block, audio_block)
        for name in _progress(missing):
            _cache(name, directories[name], vocabulary, num_shards, fingerprint)
    stats = [lm_reader.read_stats(path) for path in directories.values()]
    splits = [s[split] for s in stats for split in records.SPLITS if split in s]
    return {
        "tasks": len(names),
        "made": len(missing),
        "already_there": len(names) - len(missing),
        "examples": sum(split["examples"] for split in splits),
        "tokens": sum(split["tokens"] for split in splits),
    }


def _fingerprint(corpus, vocabulary: Vocabulary, settings: tuple) -> str:
    """Changes when anything that the caches are made of does."""
    files = corpus.source_files() + [vocabulary.sentencepiece]
    facts = [(os.path.relpath(f, corpus.run_dir), *_size_and_time(f)) for f in files if f]
    text = json.dumps([sorted(facts), vocabulary.sizes(), settings])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _is_current(directory: str, fingerprint: str) -> bool:
    if not os.path.exists(os.path.join(directory, lm_reader.STATS_FILE)):
        return False
    return lm_reader.read_stats(directory).get("made_from") == fingerprint


def _progress(names: list[str]):
    import tqdm

    bar = tqdm.tqdm(names, unit="task")
    for name in bar:
        bar.set_description(name)
        yield name


def _cache(name: str, directory: str, vocabulary: Vocabulary, num_shards: int, made_from: str):
    """Builds the cache of one task beside its final place, then puts it there."""
    building = os.path.join(os.path.dirname(directory), f".{name}.writing")
    shutil.rmtree(building, ignore_errors=True)
    stats = {
        "task": name,
        "made_from": made_from,
        "vocabulary": vocabulary.sizes(),
        "pad": vocabulary.pad,
    }
    for split in records.SPLITS:
        figures = _cache_split(name, building, split, vocabulary, num_shards)
        if figures:
            stats[split] = figures
    if "train" not in stats:
        shutil.rmtree(building, ignore_errors=True)
        raise UserError(f"task {name}: the tokens hold no training example for it")
    with open(os.path.join(building, lm_reader.STATS_FILE), "w", encoding="utf-8") as f:
        json.dump(stats, f, indent=1)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(building, directory)


def _cache_split(name, directory, split, vocabulary, num_shards) -> dict | None:
    """Writes the shards and lengths of one split; its figures, None when it has no example."""
    lengths, targets = [], 0
    by_modality = np.zeros(len(MODALITIES), np.int64)
    with records.RecordWriter(directory, split, num_shards) as writer:
        for example in _examples(name, split):
            writer.write(_record(example, keep_texts=split != "train"))
            tokens = [value for key, value in example.items() if key.endswith("tokens")]
            lengths.append(max(map(len, tokens)))
            for ids in tokens:
                by_modality += np.bincount(vocabulary.modality(ids), minlength=len(MODALITIES))
            weights = (value for key, value in example.items() if key.endswith("weights"))
            targets += sum(int(np.count_nonzero(w)) for w in weights)
    if not lengths:
        for path in records.shard_paths(directory, split):
            os.remove(path)
        return None
    # Records go round the shards; readers see one shard after the other.
    order = np.concatenate([np.arange(s, len(lengths), num_shards) for s in range(num_shards)])
    np.save(lm_reader.lengths_path(directory, split), np.asarray(lengths, np.int32)[order])
    return {
        "examples": len(lengths),
        "tokens": int(by_modality.sum()),
        "targets": targets,
        "tokens_by_modality": dict(zip(MODALITIES, by_modality.tolist(), strict=True)),
        "lengths": {
            "min": min(lengths),
            "mean": round(float(np.mean(lengths)), 2),
            "p95": int(np.percentile(lengths, 95)),
            "max": max(lengths),
        },
    }


def _examples(name: str, split: str):
    import seqio

    task = seqio.get_mixture_or_task(name)
    return task.get_dataset(None, split=split, shuffle=False).as_numpy_iterator()


def _record(example: dict, keep_texts: bool) -> dict:
    record = {}
    for key, value in example.items():
        if key.endswith(("tokens", "weights")):
            record[key] = value
        elif keep_texts:
            record[key] = value.decode()
    return record


if __name__ == "__main__":
    launch.main("t5x_audio.cache_tasks", description=__doc__)
