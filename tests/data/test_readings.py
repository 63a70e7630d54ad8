"""Sentences to read aloud: how many, of what, and that nothing held out is among them."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.data.engine import readings, world
from t5x_audio.data.text_normalization import normalize
from t5x_audio.errors import UserError

QUESTIONS = world.make_questions(400, 60)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 900), st.integers(0, 3))
def test_as_many_as_wanted_and_none_is_an_answer(count, seed):
    made = readings.make_readings(QUESTIONS, count, seed)
    assert made == readings.make_readings(QUESTIONS, count, seed)
    assert len({reading.id for reading in made}) == len({r.text for r in made}) == count
    assert not {reading.text for reading in made} & {question.answer for question in QUESTIONS}
    for reading in made:
        assert reading.text == normalize(reading.spoken)
        assert re.fullmatch(r"[a-z ]+", reading.text)


def test_some_are_true_answers_and_the_others_state_nothing_false():
    made = readings.make_readings(QUESTIONS, 300)
    facts = {normalize(f.answer) for name in world.CATEGORIES for f in world.all_facts(name)}
    true = [reading for reading in made if reading.text in facts]
    assert 80 <= len(true) <= 101
    others = [reading.text for reading in made if reading.text not in facts]
    assert not any(re.search("number|opposite|after|before|the", text) for text in others)
    assert not any(re.search("(plus|minus|times) .* is", text) for text in others)
    # Every kind of word occurs, and the small word that links them.
    everything = " | ".join(others)
    kinds = (" is ", " plus ", " minus ", " times ", "seven", "monday", "cold", "b like", "teacher")
    assert all(word in everything for word in kinds)


@pytest.mark.parametrize("count", [-1, readings.MAX_READINGS + 1])
def test_a_wrong_count_is_named(count):
    with pytest.raises(UserError, match="num_readings"):
        readings.make_readings(QUESTIONS, count)


def test_the_largest_count_is_possible():
    assert len(readings.make_readings(QUESTIONS, readings.MAX_READINGS)) == readings.MAX_READINGS
