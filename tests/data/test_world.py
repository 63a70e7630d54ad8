"""The question world: what is promised about its questions and what is held out."""

import collections

import pytest

from t5x_audio.data.engine import world
from t5x_audio.data.text_normalization import normalize
from t5x_audio.errors import UserError
from t5x_audio.evaluation.answers import ends_in_short_answer


@pytest.fixture(scope="module", params=[(24, 7), (1000, 120), (1620, 120)])
def questions(request):
    return world.make_questions(*request.param)


def test_counts_and_distinct_texts(questions):
    assert len({q.question for q in questions}) == len(questions) in (24, 1000, 1620)
    assert len({q.id for q in questions}) == len(questions)
    held_out = [q for q in questions if q.split == "test"]
    assert len(held_out) == (7 if len(questions) == 24 else 120)
    assert {q.category for q in held_out} == set(world.CATEGORIES)


def test_novelty_is_what_it_says(questions):
    trained = collections.defaultdict(set)
    for q in questions:
        if q.split == "train":
            trained[q.answer].add(q.question)
    held_out = [q for q in questions if q.split == "test"]
    # The answer names the fact in all categories but comparisons, where order differs.
    for q in held_out:
        assert q.question not in trained[q.answer]
        if q.novelty == "phrasing":
            assert trained[q.answer], q.question
        elif q.category != "comparisons":
            assert not trained[q.answer], q.question
    facts = sum(q.novelty == "fact" for q in held_out)
    assert 0.1 < facts / len(held_out) < 0.21
    assert all(q.novelty == "" for q in questions if q.split == "train")


def test_texts_are_clean_and_answers_right(questions):
    for q in questions:
        for text in (q.question, q.answer, q.short_answer):
            assert text == normalize(text) and text
        assert normalize(q.spoken_question) == q.question
        assert normalize(q.spoken_answer) == q.answer
        assert ends_in_short_answer(q.answer, q.short_answer)
        assert not any(ch.isdigit() for ch in q.spoken_question + q.spoken_answer)
    vocabulary = {word for q in questions for word in f"{q.question} {q.answer}".split()}
    assert len(vocabulary) < 250


def test_no_question_asks_for_two_facts():
    by_question = {}
    for fact in (fact for category in world.CATEGORIES for fact in world.all_facts(category)):
        for text in fact.phrasings:
            assert by_question.setdefault(normalize(text), fact) is fact


def test_arithmetic_is_true():
    numbers = {normalize(str(n)): n for n in range(101)}
    operations = {
        "plus": lambda a, b: a + b,
        "minus": lambda a, b: a - b,
        "times": lambda a, b: a * b,
    }
    for fact in world.all_facts("arithmetic"):
        left, result = normalize(fact.answer).split(" is ")
        a, sign, b = left.split(" ")
        assert operations[sign](numbers[a], numbers[b]) == numbers[result]
        assert all(f"{a} {sign} {b}" in normalize(text) for text in fact.phrasings)


def test_seed_decides_everything():
    assert world.make_questions(100, 20, seed=1) == world.make_questions(100, 20, seed=1)
    assert world.make_questions(100, 20, seed=1) != world.make_questions(100, 20, seed=2)


@pytest.mark.parametrize("sizes", [(10, 7), (99999, 100), (24, 20)])
def test_impossible_sizes_are_named(sizes):
    with pytest.raises(UserError, match="num_questions or num_test_questions"):
        world.make_questions(*sizes)
