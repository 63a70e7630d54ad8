import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_audio.evaluation.answers import ends_in_short_answer


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
        ("It is two hundred.", "hundred", False),
        ("Five and six.", "six", True),
        ("Five and six.", "five", False),
        ("Three, four, five, six.", "three four five six", True),
        ("Three, five, four, six.", "three four five six", False),
        ("After Monday comes Tuesday.", "tuesday", True),
        ("The opposite of hot is cold.", "hot", False),
        ("seven", "three four five six seven", False),
        ("", "seven", False),
    ],
)
def test_known_answers(text, short, right):
    assert ends_in_short_answer(text, short) is right


def test_by_sound():
    assert ends_in_short_answer("7 plus 7 is 14.", "fourteen", by_sound=True)
    assert not ends_in_short_answer("7 plus 7 is 14.", "four", by_sound=True)
    assert not ends_in_short_answer("It is 25.", "five", by_sound=True)
    assert ends_in_short_answer("after one comes to", "two", by_sound=True)
    assert not ends_in_short_answer("after one comes to", "two")
    assert ends_in_short_answer("After B comes see.", "c", by_sound=True)
    assert ends_in_short_answer("345", "three four five", by_sound=True)
    assert not ends_in_short_answer("after one comes three", "two", by_sound=True)


def test_short_answer_without_words_is_refused():
    with pytest.raises(ValueError, match="no words"):
        ends_in_short_answer("anything", "?!")


WORDS = st.lists(
    st.sampled_from(["cold", "tuesday", "red", "seven", "big"]), min_size=1, max_size=4
)


@given(WORDS, WORDS, st.booleans())
def test_found_at_the_end_and_nowhere_else(before, short, by_sound):
    text = " ".join([*before, "so", *short])
    assert ends_in_short_answer(text, " ".join(short), by_sound)
    assert not ends_in_short_answer(f"{text} then", " ".join(short), by_sound)


@given(WORDS, st.booleans())
def test_not_found_when_a_word_is_missing(words, by_sound):
    assert not ends_in_short_answer(" ".join(words), " ".join([*words, "never"]), by_sound)
