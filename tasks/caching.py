"""A SeqIO task as a cache on disk: shards, lengths and figures, in one directory.

`<split>-*.array_record` holds tokens int32[L] and weights float32[L] of each example (preference
pairs: both of each), with images soft_embeddings float16[k, width], and in validation and test the
texts beside them; `<split>-lengths.npy` the
number of tokens, so that a reader can plan without reading; stats.json, written last, the figures
and what the cache was made from.
"""

import hashlib
import json
import os
import shutil

import numpy as np

from t5x_audio.data import lm_reader, records
from t5x_audio.errors import UserError
from t5x_audio.sequences.vocabulary import MODALITIES, Vocabulary
from tasks.corpus import TokenCorpus

_SOFT = "soft_embeddings"


def fingerprint(corpus: TokenCorpus, vocabulary: Vocabulary, settings: tuple) -> str:
    """Changes when anything that the caches are made of does."""
    files = corpus.source_files() + [vocabulary.sentencepiece]
    facts = [(os.path.relpath(f, corpus.run_dir), *_size_and_time(f)) for f in files if f]
    text = json.dumps([sorted(facts), vocabulary.sizes(), settings])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def is_current(directory: str, made_from: str) -> bool:
    """Whether `directory` holds a whole cache with this fingerprint."""
    if not os.path.exists(os.path.join(directory, lm_reader.STATS_FILE)):
        return False
    return lm_reader.read_stats(directory).get("made_from") == made_from


def cache(
    name: str, directory: str, vocabulary: Vocabulary, num_shards: int, made_from: str
) -> None:
    """Builds the cache of a registered task beside its final place, then puts it there.

    UserError when the task has no training example.
    """
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
    soft = [stats[split][_SOFT] for split in records.SPLITS if _SOFT in stats.get(split, ())]
    if soft:
        most = max(found["most"] for found in soft)
        stats[_SOFT] = soft[0] | {"most": most, "placeholder": vocabulary.image}
    if "train" not in stats:
        shutil.rmtree(building, ignore_errors=True)
        raise UserError(f"task {name}: the tokens hold no training example for it")
    with open(os.path.join(building, lm_reader.STATS_FILE), "w", encoding="utf-8") as f:
        json.dump(stats, f, indent=1)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(building, directory)


def _cache_split(name, directory, split, vocabulary, num_shards) -> dict | None:
    """Writes the shards and lengths of one split; its figures, None when it has no example."""
    lengths, targets, soft = [], 0, {}
    by_modality = np.zeros(len(MODALITIES), np.int64)
    with records.RecordWriter(directory, split, num_shards) as writer:
        for example in _examples(name, split):
            writer.write(_record(example, keep_texts=split != "train"))
            if _SOFT in example:
                count, width = example[_SOFT].shape
                soft = {"most": max(count, soft.get("most", 0)), "width": width}
            tokens = [value for key, value in example.items() if key.endswith("tokens")]
            lengths.append(max(map(len, tokens)))
            for ids in tokens:
                by_modality += np.bincount(vocabulary.modality(ids), minlength=len(MODALITIES))
            weights = (value for key, value in example.items() if key.endswith("weights"))
            targets += sum(int(np.count_nonzero(w)) for w in weights)
    if not lengths:
        records.remove_split(directory, split)
        return None
    # Records go round the shards; readers see one shard after the other.
    order = np.concatenate([np.arange(s, len(lengths), num_shards) for s in range(num_shards)])
    np.save(lm_reader.lengths_path(directory, split), np.asarray(lengths, np.int32)[order])
    return ({_SOFT: soft} if soft else {}) | {
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
        if key.endswith(("tokens", "weights")) or key == _SOFT:
            record[key] = value
        elif keep_texts:
            record[key] = value.decode()
    return record
