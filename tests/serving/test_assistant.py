import itertools

import numpy as np
import pytest

from t5x_audio.backbone.decoding import Sampling
from t5x_audio.errors import UserError
from t5x_audio.sequences import grammar
from t5x_audio.serving.assistant import TIMINGS, SpokenAssistant

SPEECH = (0.3 * np.sin(np.arange(12000) / 11)).astype(np.float32)


@pytest.fixture(scope="module")
def assistant(parts):
    return SpokenAssistant(**parts, max_new_tokens=120, seed=3)


@pytest.fixture(scope="module")
def answer(assistant):
    return assistant.answer(SPEECH)


def test_answer_follows_the_layout(assistant, answer):
    automaton = grammar.spoken_answer(assistant.layouts)
    state = automaton.start_state
    for token in answer.tokens:
        assert automaton.mask(state)[token]
        state = automaton.next_state[state, automaton.token_class[token]]
    text, codes = assistant.layouts.decode_aqaa_answer(answer.tokens)
    assert answer.text.split() == assistant.vocabulary.decode_text(text).split()
    assert "\n" not in answer.text
    np.testing.assert_array_equal(answer.codes, codes[: len(codes) // 5 * 5])


def test_answer_is_as_long_as_its_codes(assistant, answer):
    assert len(answer.codes) >= 15
    config = assistant.vocoder.flow_config
    assert len(answer.audio) == config.mel_lengths(len(answer.codes)) * config.hop
    assert answer.rate == 16000 and np.isfinite(answer.audio).all()
    assert 0 < np.abs(answer.audio).max() <= 1


def test_timings_are_in_order(answer):
    assert tuple(answer.timings) == TIMINGS
    times = answer.timings
    assert 0 < times["tokenise"] < times["first_audio"] <= times["total"]
    assert times["tokenise"] + times["first_block"] <= times["first_audio"]
    assert answer.tokens_per_second == len(answer.tokens) / answer.decoding_seconds


def test_same_question_same_answer(assistant, answer):
    again = assistant.answer(SPEECH)
    np.testing.assert_array_equal(again.tokens, answer.tokens)
    np.testing.assert_array_equal(again.audio, answer.audio)
    assert again.timings["total"] < answer.timings["total"]  # nothing is compiled twice


def test_typed_question(assistant):
    answer = assistant.answer_text("what is the opposite of hot?")
    assert answer.timings["tokenise"] == 0.0 and len(answer.tokens) <= 120
    assert len(answer.codes) % 5 == 0


def test_batch_answers_like_one_by_one(parts):
    greedy = SpokenAssistant(**parts, sampling=Sampling(temperature=0), max_new_tokens=50)
    questions = [SPEECH, SPEECH[:9000]]
    batch = greedy.answer_batch(questions, batch_size=3)
    assert len(batch) == 2
    for question, one in zip(questions, batch, strict=True):
        np.testing.assert_array_equal(one.tokens, greedy.answer(question).tokens)


def test_the_answer_grows(assistant, answer):
    pieces = list(assistant.stream(SPEECH))
    assert len(pieces) > 2 and not len(pieces[0].audio)
    for before, after in itertools.pairwise(pieces):
        for name in ("tokens", "codes", "audio"):
            old, new = getattr(before, name), getattr(after, name)
            np.testing.assert_array_equal(new[: len(old)], old)
        assert before.timings["total"] <= after.timings["total"]
    np.testing.assert_array_equal(pieces[-1].audio, answer.audio)
    # Speech is there before the answer is.
    first = next(one for one in pieces if len(one.audio))
    assert len(first.tokens) < len(answer.tokens)
    assert first.timings["first_audio"] < pieces[-1].timings["total"]


def test_less_than_a_group_is_silent(assistant):
    assert assistant.speak(np.arange(4)).shape == (0,)


def test_too_short_a_question(assistant):
    with pytest.raises(UserError, match="too short"):
        assistant.answer(SPEECH[:800])
