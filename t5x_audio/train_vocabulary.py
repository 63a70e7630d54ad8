r"""Trains the SentencePiece model of a run and writes its vocabulary.

The text is what is said in the training split of every corpus under `<run_dir>/corpus`. The
vocabulary (text ids, then linguistic and semantic codes, then specials) goes to
`<run_dir>/vocabulary` as sentencepiece.model and vocabulary.json.

    python -m t5x_audio.train_vocabulary --gin_file=gin/models/demo.gin \
        --gin_file=gin/runs/train_vocabulary.gin --gin.RUN_DIR=runs/demo
"""

import os
import sys
from collections.abc import Sequence

from t5x_audio import launch
from t5x_audio.errors import UserError


def run(
    *,
    run_dir: str | None = None,
    model_dir: str | None = None,
    corpora: Sequence[str] | None = None,
    text_size: int,
    linguistic_size: int,
    semantic_size: int,
    num_specials: int,
    multiple_of: int,
) -> dict:
    """Trains and writes the vocabulary.

    Args:
      run_dir: holds corpus/; the vocabulary goes to its vocabulary/.
      model_dir: takes the place of `run_dir`/vocabulary.
      corpora: directories of clips; None = every finished corpus under `run_dir`/corpus.
      text_size, linguistic_size, semantic_size, num_specials, multiple_of: see
        `sequences.vocabulary.Vocabulary`; the SentencePiece model gets at most `text_size` pieces.

    Returns:
      Figures for the closing line.

    Raises:
      UserError: there is no corpus, or `text_size` is too small for its characters.
    """
    from t5x_audio.data import corpus
    from t5x_audio.sequences import vocabulary

    if run_dir is None and (corpora is None or model_dir is None):
        raise UserError("train_vocabulary: say where things are, with RUN_DIR")
    directory = model_dir or os.path.join(run_dir, "vocabulary")
    sizes = {
        "text_size": text_size,
        "linguistic_size": linguistic_size,
        "semantic_size": semantic_size,
        "num_specials": num_specials,
        "multiple_of": multiple_of,
    }
    if os.path.exists(os.path.join(directory, vocabulary.VOCABULARY_FILE)):
        result = vocabulary.Vocabulary.load(directory)
        if result.sizes() != sizes | {"size": result.size}:
            raise UserError(
                f"{directory}: has other sizes than asked for; delete it or choose another"
            )
        print(f"{directory}: finished already", file=sys.stderr)
    else:
        found = corpora or corpus.finished_corpora(os.path.join(run_dir, "corpus"))
        texts = [clip.text for place in found for clip in corpus.iterate_clips(place, "train")]
        # Each text once, sorted, so that neither order nor repetition of clips matters.
        texts = sorted(set(texts))
        os.makedirs(directory, exist_ok=True)
        prefix = os.path.join(directory, "sentencepiece")
        model = vocabulary.train_sentencepiece(texts, prefix, text_size)
        result = vocabulary.Vocabulary(**sizes, sentencepiece=model)
        result.save(directory)
    return {
        "vocabulary": directory,
        "text_pieces": result.num_pieces,
        "text_size": text_size,
        "size": result.size,
    }


if __name__ == "__main__":
    launch.main("t5x_audio.train_vocabulary", description=__doc__)
