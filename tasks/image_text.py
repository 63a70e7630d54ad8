"""Images with text, paired or interleaved: the text is learnt, given the image.

An image is its soft tokens, the embeddings of a frozen encoder, which `t5x_audio.encode_images` has
computed; they travel beside the tokens into the cache. Step-Omni's own documents are not published
(Step-Audio, arXiv 2502.11946, section 4).
"""

import json

from t5x_audio.data import images
from t5x_audio.errors import UserError
from t5x_audio.sequences.layouts import Layouts
from tasks.corpus import TokenCorpus

NAME = "image_text"


def register(corpus: TokenCorpus, layouts: Layouts) -> list[str]:
    """Registers `image_text`: every document of every corpus of images."""
    from tasks.registration import EMBEDDINGS, NUMBER, TEXT, add_task

    add_task(
        NAME,
        vocabulary=layouts.vocabulary,
        source=lambda split: images.documents(corpus.run_dir, split),
        spec={"id": TEXT, "spans": TEXT, "soft_embeddings": EMBEDDINGS, "per_image": NUMBER},
        layout=lambda example: layouts.image_text(spans(example)),
    )
    return [NAME]


def spans(document: dict) -> list[str | int]:
    """The spans of a document, in order: a text, or the number of an image's soft tokens."""
    per_image = int(document["per_image"])
    return [per_image if span is None else span for span in json.loads(document["spans"])]


def require(corpus: TokenCorpus) -> None:
    """UserError when the run has no images, or its vocabulary no ids for them."""
    if not images.finished_corpora(corpus.run_dir):
        raise UserError(
            f"task {NAME}: no images under {corpus.run_dir}/images: run t5x_audio.encode_images"
        )
    _ = corpus.vocabulary.image
