"""Text as it is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_audio.data import text_normalization as tn


@pytest.mark.parametrize(
    "text, words",
    [
        ("Three + 4 = 7.", "three plus four equals seven"),
        ("Please press 1, now!", "please press one now"),
        ("The 21st of July", "the twenty first of july"),
        ("On the 12th and the 20th", "on the twelfth and the twentieth"),
        ("It is 1,342 o'clock", "it is one thousand three hundred forty two oclock"),
        ("What's 9-4?", "what is nine minus four"),
        ("3 x 5", "three times five"),
        ("Un-muted “Quote” caller’s", "un muted quote caller's"),
        ("3D", "three d"),
        ("call 5551234", "call five five five one two three four"),
        ("", ""),
    ],
)
def test_normalize(text, words):
    assert tn.normalize(text) == words


def test_every_number_is_words_and_distinct():
    seen = {tn.number_words(n) for n in range(tn.MAX_NUMBER + 1)}
    assert len(seen) == tn.MAX_NUMBER + 1
    assert all(tn.normalize(words) == words for words in seen)
    assert len({tn.ordinal_words(n) for n in range(1, 1000)}) == 999
    assert [tn.ordinal_words(n) for n in (1, 2, 3, 8, 30, 100)] == (
        ["first", "second", "third", "eighth", "thirtieth", "one hundredth"]
    )


@given(st.text(max_size=60))
def test_both_forms_are_stable_and_clean(text):
    for form in (tn.normalize, tn.sounds_like):
        once = form(text)
        assert form(once) == once
        assert set(once) <= set("abcdefghijklmnopqrstuvwxyz' ")


@pytest.mark.parametrize(
    "expected, heard, same",
    [
        ("four plus two is six", "for plus 2 is 6.", True),
        ("one two three four", "1234", True),
        ("one two three", "1-2-3", True),
        ("twelve", "12.", True),
        ("the letter after b is c like cat", "The letter after B is see, like cat.", True),
        ("w like water", "Double U like water", True),
        ("three plus four", "three plus five", False),
        ("one two three", "one two", False),
        ("thirteen", "thirty", False),
    ],
)
def test_same_sound(expected, heard, same):
    assert tn.same_sound(expected, heard) is same
