"""From a Python stream of examples and a layout to a SeqIO task.

A task is a source (split -> dicts), the TensorFlow form of those dicts, and a layout that turns
one of them into `Sequence`s. SeqIO gives it a name, splits, features, metrics and a place in
mixtures. Texts of the example travel on beside the features, as the metadata of an evaluation, and
so do embeddings of images, which are no tokens.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf

from t5x_audio.data.records import SPLITS
from t5x_audio.sequences.vocabulary import Vocabulary

# What an example may hold.
TEXT = tf.TensorSpec((), tf.string)
CODES = tf.TensorSpec((None,), tf.int32)
TEXTS = tf.TensorSpec((None,), tf.string)
NUMBER = tf.TensorSpec((), tf.int32)
EMBEDDINGS = tf.TensorSpec((None, None), tf.float16)


def add_task(
    name: str,
    *,
    vocabulary: Vocabulary,
    source: Callable[[str], Iterable[dict]],
    spec: dict[str, tf.TensorSpec],
    layout: Callable[[dict], object],
    prefixes: Sequence[str] = ("",),
    postprocess: Callable | None = None,
    metrics: Sequence[Callable] = (),
    splits: Sequence[str] = SPLITS,
) -> seqio.Task:
    """Registers (or registers anew) a SeqIO task.

    Args:
      name: of the task.
      vocabulary: of the tokens.
      source: split -> examples, the same in every pass.
      spec: form of an example's values, of the kinds above.
      layout: example (texts as str) -> one `Sequence`, or a tuple of them, one a prefix.
      prefixes: of the features: `<prefix>tokens` int32[L] and `<prefix>weights` float32[L].
      postprocess: SeqIO postprocess_fn for evaluation.
      metrics: SeqIO metric functions of (targets, predictions).
      splits: the splits of the task.
    """
    seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(_dataset_fn(source, spec), splits=list(splits)),
        preprocessors=[_lay_out(layout, spec, prefixes)],
        output_features=output_features(vocabulary, prefixes),
        postprocess_fn=postprocess,
        metric_fns=list(metrics),
    )


def output_features(vocabulary: Vocabulary, prefixes: Sequence[str] = ("",)) -> dict:
    """SeqIO features of a task: token ids and the weight of each as a target."""
    ids = seqio.PassThroughVocabulary(vocabulary.size, eos_id=vocabulary.eos)
    features = {}
    for prefix in prefixes:
        features[prefix + "tokens"] = seqio.Feature(ids, add_eos=False, dtype=tf.int32)
        features[prefix + "weights"] = seqio.Feature(ids, add_eos=False, dtype=tf.float32)
    return features


def _dataset_fn(source, spec):
    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None):
        del shuffle_files, seed  # Caches are written in order; the reader shuffles.

        def examples():
            return ({key: example[key] for key in spec} for example in source(split))

        return tf.data.Dataset.from_generator(examples, output_signature=spec)

    return dataset


def _lay_out(layout, spec, prefixes):
    """Preprocessor: applies `layout`; keeps scalar texts and embeddings, drops the rest."""
    keys = list(spec)
    metadata = [key for key in keys if spec[key] in (TEXT, EMBEDDINGS)]
    names = [prefix + part for prefix in prefixes for part in ("tokens", "weights")]
    dtypes = [tf.int32, tf.float32] * len(prefixes)

    def lay_out_numpy(*values):
        example = dict(zip(keys, map(_plain, values), strict=True))
        sequences = layout(example)
        sequences = (sequences,) if len(prefixes) == 1 else sequences
        return [np.asarray(part) for sequence in sequences for part in sequence]

    def lay_out(example):
        outputs = tf.numpy_function(lay_out_numpy, [example[key] for key in keys], dtypes)
        for output in outputs:
            output.set_shape([None])
        return dict(zip(names, outputs, strict=True)) | {key: example[key] for key in metadata}

    def preprocess(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(lay_out, num_parallel_calls=2, deterministic=True)

    return preprocess


def _plain(value):
    """Bytes of TensorFlow as str."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        return [text.decode() for text in value]
    return value
