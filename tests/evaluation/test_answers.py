import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_audio.evaluation.answers import contains_short_answer


@pytest.mark.parametrize(
    "text, short, right",
    [
        ("Three plus four is seven.", "seven", True),
        ("3 plus 4 is 7", "seven", True),
        ("Three plus four is eight.", "seven", False),
        ("The answer is twenty five.", "five", False),
        ("The answer is twenty five.", "twenty", False),
        ("The answer is 25.", "twenty five", True),
        ("It is one hundred and twenty.", "twenty", False),
        ("It is one hundred twenty.", "one hundred", False),
        ("It is two hundred.", "two", False),
        ("Five and six.", "five", True),
        ("Three, four, five, six.", "three four five six", True),
        ("Three, five, four, six.", "three four five six", False),
        ("After Monday comes Tuesday.", "tuesday", True),
        ("", "seven", False),
    ],
)
def test_known_answers(text, short, right):
    assert contains_short_answer(text, short) is right


def test_by_sound():
    assert contains_short_answer("after one comes to", "two", by_sound=True)
    assert not contains_short_answer("after one comes to", "two")
    assert contains_short_answer("After B comes see.", "c", by_sound=True)
    assert contains_short_answer("345", "three four five", by_sound=True)
    assert not contains_short_answer("after one comes three", "two", by_sound=True)


def test_short_answer_without_words_is_refused():
    with pytest.raises(ValueError, match="no words"):
        contains_short_answer("anything", "?!")


WORDS = st.lists(
    st.sampled_from(["cold", "tuesday", "red", "seven", "big"]), min_size=1, max_size=4
)


@given(WORDS, WORDS, WORDS, st.booleans())
def test_found_wherever_it_stands(before, short, after, by_sound):
    text = " ".join([*before, "so", *short, "then", *after])
    assert contains_short_answer(text, " ".join(short), by_sound)


@given(WORDS, st.booleans())
def test_not_found_when_a_word_is_missing(words, by_sound):
    assert not contains_short_answer(" ".join(words), " ".join([*words, "never"]), by_sound)
