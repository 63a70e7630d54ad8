"""AQTA and TAQTA: a spoken question (TAQTA: typed too) in, a written answer out."""

from t5x_audio.sequences.layouts import Layouts
from tasks.aqaa import METADATA, answer_postprocess, flat, text_accuracy
from tasks.corpus import TokenCorpus


def register(corpus: TokenCorpus, layouts: Layouts) -> list[str]:
    """Registers `aqta` and `taqta`: each (question, speaker) once."""
    from tasks.registration import CODES, TEXT, add_task

    def aqta(example):
        return layouts.aqta(example["question_codes"], example["answer"])

    def taqta(example):
        return layouts.taqta(example["question"], example["question_codes"], example["answer"])

    for name, layout in (("aqta", aqta), ("taqta", taqta)):
        add_task(
            name,
            vocabulary=layouts.vocabulary,
            source=lambda split: map(flat, corpus.spoken_questions(split)),
            spec=dict.fromkeys(METADATA, TEXT) | {"question_codes": CODES},
            layout=layout,
            postprocess=answer_postprocess(layouts),
            metrics=[text_accuracy],
        )
    return ["aqta", "taqta"]
