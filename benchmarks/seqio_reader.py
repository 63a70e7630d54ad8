# ruff: noqa: E402
"""The peer of input_pipeline.py: SeqIO's reader and packer, as T5X uses them, on the same examples.

The examples become a cached SeqIO task (TFRecord, as many shards), read through SeqIO: shuffled
files and a shuffled buffer, packed by `trim_and_pack_dataset`, batched. tf.data resumes by skipping
batches, each of which is made. Two forms:
- "plain": `seqio.get_dataset` with the `DecoderFeatureConverter`, whose loss weights are those of
  the padding. The examples have no weights.
- "weighted": a weight of its own for each target, as our batches have. The packer takes zeros for
  padding and packs integers only, so the weights 0 and 1 are stored as 1 and 2.

A process of its own: TensorFlow starts its threads where it is imported.
"""

import json
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import seqio
import tensorflow as tf

from t5x_audio.data import records

SPLIT = "train"
FEATURES = {"plain": ("targets",), "weighted": ("targets", "weights")}


def write_cache(source: pathlib.Path, folder: pathlib.Path, features: tuple[str, ...]) -> None:
    """The first shard of our cache as TFRecord, standing in SeqIO's cache as often as in ours."""
    shards = records.shard_paths(str(source), SPLIT)
    examples = records.Records(shards[:1])
    folder.mkdir(parents=True)
    first = folder / f"{SPLIT}.tfrecord-00000-of-{len(shards):05d}"
    with tf.io.TFRecordWriter(str(first)) as writer:
        for example in examples:
            values = {"targets": example["tokens"], "weights": example["weights"].astype(int) + 1}
            lists = {name: tf.train.Int64List(value=values[name]) for name in features}
            stored = {name: tf.train.Feature(int64_list=ids) for name, ids in lists.items()}
            example = tf.train.Example(features=tf.train.Features(feature=stored))
            writer.write(example.SerializeToString())
    for shard in range(1, len(shards)):
        os.link(first, folder / f"{SPLIT}.tfrecord-{shard:05d}-of-{len(shards):05d}")
    info = {
        "seqio_version": seqio.__version__,
        "num_shards": len(shards),
        "features": {name: {"shape": [None], "dtype": "int32"} for name in features},
    }
    (folder / f"info.{SPLIT}.json").write_text(json.dumps(info))
    stats = {"examples": len(examples) * len(shards)}
    (folder / f"stats.{SPLIT}.json").write_text(json.dumps(stats))
    (folder / "COMPLETED").write_text("")


def add_task(name: str, folder: pathlib.Path, source: pathlib.Path, vocabulary: int) -> None:
    """Registers the task, with its cache, which is made if it is not there."""
    if not (folder / name).exists():
        write_cache(source, folder / name, FEATURES[name])
    seqio.add_global_cache_dirs([str(folder)])
    ids = seqio.PassThroughVocabulary(vocabulary)
    feature = seqio.Feature(ids, add_eos=False, dtype=tf.int32)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(_no_source, splits=[SPLIT]),
        preprocessors=[seqio.CacheDatasetPlaceholder()],
        output_features=dict.fromkeys(FEATURES[name], feature),
    )


def _no_source(split, shuffle_files, seed=None):
    raise AssertionError("the cache is read")


def batches(settings: dict) -> tf.data.Dataset:
    """Endless packed batches, as T5X asks for them."""
    name, reading = settings["form"], {"use_cached": True, "shuffle": True, "num_epochs": None}
    lengths = dict.fromkeys(FEATURES[name], settings["length"])
    reading |= {"seed": settings["seed"]}
    if name == "plain":
        converter = seqio.DecoderFeatureConverter(pack=True)
        packed = seqio.get_dataset(name, lengths, converter, SPLIT, **reading)
    else:
        examples = seqio.get_mixture_or_task(name).get_dataset(lengths, SPLIT, **reading)
        packed = seqio.trim_and_pack_dataset(examples, lengths).map(_named)
    return packed.batch(settings["rows"], drop_remainder=True)


def _named(row):
    targets, segments = row["targets"], row["targets_segment_ids"]
    first = row["targets_positions"] == 0
    return {
        "decoder_target_tokens": targets,
        "decoder_input_tokens": tf.where(first, 0, tf.roll(targets, 1, axis=0)),
        "decoder_loss_weights": tf.cast(tf.maximum(row["weights"] - 1, 0), tf.float32),
        "decoder_segment_ids": segments,
        "decoder_positions": row["targets_positions"],
    }


def measure(settings: dict) -> dict:
    """Tokens for a second of the core, positions filled, seconds to the first batch and to skip
    1,000 of them.
    """
    iterator = batches(settings).as_numpy_iterator()
    for _ in range(64):  # what was read ahead meanwhile is not counted
        next(iterator)
    begun, cpu = time.perf_counter(), time.process_time()
    filled = [
        np.mean(next(iterator)["decoder_segment_ids"] > 0) for _ in range(settings["batches"])
    ]
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    del iterator
    tokens = float(np.mean(filled)) * settings["batches"] * settings["rows"] * settings["length"]
    skipped = _seconds_to_first(settings, settings["skip"])
    first = _seconds_to_first(settings, 0)
    return {
        "tokens_per_core_second": tokens / cpu,
        "core_share": cpu / seconds,
        "packing_efficiency": float(np.mean(filled)),
        "open_seconds": first,
        "skip_seconds": (skipped - first) * 1000 / settings["skip"],
    }


def _seconds_to_first(settings, skipped: int) -> float:
    """Of the core, to the first batch after so many."""
    begun = time.process_time()
    next(batches(settings).skip(skipped).as_numpy_iterator())
    return time.process_time() - begun


def main() -> None:
    """Settings as JSON in, a line of JSON out; see `input_pipeline.py`."""
    settings = json.loads(sys.argv[1])
    folder = pathlib.Path(settings["folder"])
    os.sched_setaffinity(0, {settings["core"]})
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    add_task(
        settings["form"], folder / "seqio", folder / "tasks" / "speech", settings["vocabulary"]
    )
    print(json.dumps(measure(settings)))


if __name__ == "__main__":
    main()
