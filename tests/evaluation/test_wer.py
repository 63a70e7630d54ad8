import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.evaluation import wer

words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=6).map(" ".join)


def edit_distance(a, b):
    """Levenshtein distance between two sequences, by its recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_rates_are_pooled_edit_distances(pairs):
    references, hypotheses = zip(*pairs, strict=True)
    for measure, split in ((wer.word_error_rate, str.split), (wer.character_error_rate, list)):
        total = sum(len(split(reference)) for reference in references)
        if total == 0:
            with pytest.raises(UserError, match="no reference"):
                measure(references, hypotheses)
        else:
            edits = sum(edit_distance(split(a), split(b)) for a, b in pairs)
            assert measure(references, hypotheses) == pytest.approx(edits / total)


def test_known_rates():
    assert wer.word_error_rate(["two plus two is four"], ["two plus to is"]) == pytest.approx(0.4)
    assert wer.character_error_rate(["four"], ["for"]) == pytest.approx(0.25)
    counts = wer.count_errors("one two three", "one three four")
    assert (counts.errors, counts.words) == (2, 3)
    assert wer.count_errors("", "well").insertions == 1
    assert wer.count_errors("", "").errors == 0


def test_unequal_lists_are_refused():
    with pytest.raises(UserError, match="2 references but 1"):
        wer.word_error_rate(["a", "b"], ["a"])
    with pytest.raises(UserError, match="no reference"):
        wer.word_error_rate([], [])
