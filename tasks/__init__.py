"""SeqIO tasks and mixtures, one file a family.

    tasks.register_all("runs/demo", Vocabulary.load("runs/demo/vocabulary"))
    seqio.get_mixture_or_task("aqaa").get_dataset(None, split="train", shuffle=False)

Here the layouts of `t5x_audio.sequences` are applied to tokenised corpora. TensorFlow is loaded by
`register_all` and not before; the metric functions need none.
"""

from collections.abc import Mapping

TASKS = (
    *("continuation", "linguistic_alone", "semantic_alone"),
    *("interleaved", "asr", "tts", "text", "tqta"),
    *("aqta", "taqta", "aqaa", "tqaa", "aqaa_preference", "image_text"),
)


def register_all(
    run_dir: str,
    vocabulary,
    mixtures: Mapping[str, Mapping[str, float]] | None = None,
    text_block: int = 10,
    audio_block: int = 15,
    sequence_length: int = 512,
) -> list[str]:
    """Registers every task over the tokens under `run_dir`, and the given mixtures.

    Args:
      run_dir: the run; tokens/, corpus/ and images/ under it are read.
      vocabulary: a `Vocabulary` with its SentencePiece model.
      mixtures: name -> {task: share of the tokens}; see `tasks.mixtures`.
      text_block, audio_block: ratio of a spoken answer.
      sequence_length: of the rows that long texts are cut for.

    Returns:
      The names of the tasks.
    """
    import tensorflow as tf

    from t5x_audio.sequences.layouts import Layouts
    from tasks import aqaa, aqta, asr, continuation, dpo, image_text, interleaved, text, tts
    from tasks import mixtures as mixing
    from tasks.corpus import TokenCorpus

    for kind in ("GPU", "TPU"):  # TensorFlow prepares data here and must take no accelerator.
        tf.config.set_visible_devices([], kind)
    corpus, layouts = TokenCorpus(run_dir, vocabulary), Layouts(vocabulary, text_block, audio_block)
    families = (continuation, interleaved, asr, tts, aqta, aqaa, dpo, image_text)
    names = [name for family in families for name in family.register(corpus, layouts)]
    names += text.register(corpus, layouts, sequence_length)
    for name, shares in (mixtures or {}).items():
        mixing.register(name, shares, run_dir)
    return names
