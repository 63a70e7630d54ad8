"""ASR: speech in, transcript out; judged by word error rate."""

from t5x_audio.data.text_normalization import normalize
from t5x_audio.sequences.layouts import Layouts
from tasks.corpus import TokenCorpus


def register(corpus: TokenCorpus, layouts: Layouts) -> list[str]:
    """Registers `asr`: every clip with a transcript once."""
    from tasks.registration import CODES, TEXT, add_task

    def postprocess(output, example=None, is_target=False):
        return example["text"].decode() if is_target else as_text(output, layouts)

    add_task(
        "asr",
        vocabulary=layouts.vocabulary,
        source=lambda split: (clip._asdict() for clip in corpus.clips(split) if clip.text),
        spec={"id": TEXT, "text": TEXT, "codes": CODES},
        layout=lambda example: layouts.asr(example["codes"], example["text"]),
        postprocess=postprocess,
        metrics=[word_error_rate],
    )
    return ["asr"]


def as_text(output, layouts: Layouts) -> str:
    """A prediction, text or answer tokens, as text: what stands before the first <|EOT|>."""
    if isinstance(output, str):
        return output
    text_ids, _ = layouts.decode_aqaa_answer(output)
    return layouts.vocabulary.decode_text(text_ids)


def word_error_rate(targets: list[str], predictions: list[str]) -> dict[str, float]:
    """WER in percent over all words, on normalised text. Targets without words are left out."""
    import jiwer

    pairs = [(normalize(t), normalize(p)) for t, p in zip(targets, predictions, strict=True)]
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        return {"wer": 0.0}
    references, hypotheses = zip(*pairs, strict=True)
    return {"wer": 100 * jiwer.wer(list(references), list(hypotheses))}
