"""The world that the data engine speaks of: facts, the ways to ask for them, and what is held out.

Seven categories: arithmetic, counting, opposites, calendar (days and months), letters, comparisons
and repeat-after-me. A *fact* has one spoken answer and several phrasings that ask for it. Texts are
lower-case words without digits over a small closed vocabulary. A letter is said with a word
("b like black"): bare letter names sound too much alike for a small model and for a recogniser.

A held-out question has `novelty` 'phrasing' when its fact is asked in training in other words, and
'fact' when no training question asks for it. The latter are drawn only where an unseen fact can be
answered at all by something learnt from others (sums, comparisons, counting, repeating); the
opposite of a word never told cannot be known. Facts are ordered: "three plus four" may be unseen
while "four plus three" is seen. Everything follows from the seed.

Own design; the idea of a synthetic spoken question-and-answer set follows Step-Audio-AQAA
(arXiv 2506.08967), whose data engine speaks text answers with a natural voice.
"""

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Iterable

from t5x_audio.data.text_normalization import normalize, number_words
from t5x_audio.errors import UserError

# Share of the questions, and whether an unseen fact of it can be answered.
CATEGORIES = {
    "arithmetic": (0.34, True),
    "counting": (0.13, True),
    "opposites": (0.13, False),
    "calendar": (0.11, False),
    "letters": (0.11, False),
    "comparisons": (0.10, True),
    "repeat": (0.08, True),
}

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = ("january", "february", "march", "april", "may", "june", "july")
MONTHS += ("august", "september", "october", "november", "december")
OPPOSITES = (
    "hot cold,big small,up down,day night,black white,open closed,fast slow,young old,happy sad,"
    "rich poor,hard soft,wet dry,full empty,light dark,high low,left right,loud quiet,early late,"
    "first last,near far,above below,strong weak,long short,clean dirty,true false,inside outside,"
    "push pull,win lose,love hate,begin end"
)
# One for each letter, from the words of the other categories where they serve.
LETTER_WORDS = (
    "april black cat dog empty friday green happy inside july king left monday night october pig "
    "queen red seven tuesday uncle voice water box yellow zero"
)
REPEATED_WORDS = (
    "apple water yellow orange monday july happy seven green black king queen table garden window "
    "river summer winter music teacher paper silver dinner twelve"
)


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing that can be asked for.

    Attributes:
      category: one of CATEGORIES.
      phrasings: questions as they are spoken, with the punctuation that gives the tune.
      answer: the spoken answer, with punctuation.
      short_answer: the words in which a right answer ends.
    """

    category: str
    phrasings: tuple[str, ...]
    answer: str
    short_answer: str


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of the corpus.

    Attributes:
      id: from category and text, the same in any selection.
      split: 'train' or 'test'.
      category: one of CATEGORIES.
      question, answer, short_answer: lower-case words.
      spoken_question, spoken_answer: the same with punctuation, for the voice.
      novelty: of a test question, 'phrasing' or 'fact'; '' in training.
    """

    id: str
    split: str
    category: str
    question: str
    answer: str
    short_answer: str
    spoken_question: str
    spoken_answer: str
    novelty: str = ""

    def to_row(self) -> dict[str, str]:
        """The row of questions.jsonl."""
        names = ("id", "split", "category", "question", "answer", "short_answer", "novelty")
        return {name: getattr(self, name) for name in names}


def _fact(category: str, asked: Iterable[str], answer: str, short_answer: str) -> Fact:
    return Fact(category, tuple(asked), answer, normalize(short_answer))


def _arithmetic() -> Iterable[Fact]:
    numbers = range(1, 11)
    sums = [("plus", a, b, a + b) for a in numbers for b in numbers]
    # Differences that repeat the number taken away would be right by echo.
    pairs = [(a, b) for a in range(2, 13) for b in range(1, a) if a != 2 * b and b <= 10]
    sums += [("minus", a, b, a - b) for a, b in pairs]
    factors = [(a, b) for a in range(2, 6) for b in range(2, 6) if a * b <= 20]
    sums += [("times", a, b, a * b) for a, b in factors]
    for sign, a, b, value in sums:
        first, second, result = map(number_words, (a, b, value))
        asked = [
            f"what is {first} {sign} {second}?",
            f"how much is {first} {sign} {second}?",
            f"tell me {first} {sign} {second}.",
            f"do you know {first} {sign} {second}?",
        ]
        yield _fact("arithmetic", asked, f"{first} {sign} {second} is {result}.", result)


def _counting() -> Iterable[Fact]:
    for number, (word, step) in itertools.product(range(1, 20), (("after", 1), ("before", -1))):
        n, result = number_words(number), number_words(number + step)
        asked = [
            f"what number comes {word} {n}?",
            f"which number is right {word} {n}?",
            f"tell me the number {word} {n}.",
            f"what do you count {word} {n}?",
        ]
        yield _fact("counting", asked, f"the number {word} {n} is {result}.", result)
    for start, length in itertools.product(range(1, 9), (3, 4, 5)):
        words = [number_words(n) for n in range(start, start + length)]
        asked = [
            f"count from {words[0]} to {words[-1]}.",
            f"can you count from {words[0]} to {words[-1]}?",
            f"please count up from {words[0]} to {words[-1]}.",
        ]
        yield _fact("counting", asked, f"{', '.join(words)}.", " ".join(words))


def _opposites() -> Iterable[Fact]:
    for pair in OPPOSITES.split(","):
        for word, other in (pair.split(), pair.split()[::-1]):
            asked = [
                f"what is the opposite of {word}?",
                f"tell me the opposite of {word}.",
                f"which word is the opposite of {word}?",
                f"do you know the opposite of {word}?",
            ]
            yield _fact("opposites", asked, f"the opposite of {word} is {other}.", other)


def _calendar() -> Iterable[Fact]:
    for unit, names in (("day", DAYS), ("month", MONTHS)):
        for i, (word, step) in itertools.product(range(len(names)), (("after", 1), ("before", -1))):
            name, result = names[i], names[(i + step) % len(names)]
            asked = [
                f"what {unit} comes {word} {name}?",
                f"which {unit} is right {word} {name}?",
                f"tell me the {unit} {word} {name}.",
                f"do you know the {unit} {word} {name}?",
            ]
            answer = f"the {unit} {word} {name} is {result}."
            yield _fact("calendar", asked, answer, result)
    ends = [("first month", "year", "january"), ("last month", "year", "december")]
    for what, whole, result in [*ends, ("first day", "work week", "monday")]:
        asked = [
            f"what is the {what} of the {whole}?",
            f"tell me the {what} of the {whole}.",
            f"do you know the {what} of the {whole}?",
        ]
        answer = f"the {what} of the {whole} is {result}."
        yield _fact("calendar", asked, answer, result)


def named_letters() -> list[str]:
    """The names of the letters as they are spoken: from "A, like april" to "Z, like zero"."""
    # Upper case and the comma make the voice say the name of the letter, not the article.
    return [f"{chr(ord('A') + i)}, like {word}" for i, word in enumerate(LETTER_WORDS.split())]


def _letters() -> Iterable[Fact]:
    named, words = named_letters(), LETTER_WORDS.split()
    for i, (word, step) in itertools.product(range(26), (("after", 1), ("before", -1))):
        if not 0 <= i + step < 26:
            continue
        name, result = named[i], named[i + step]
        asked = [
            f"what letter comes {word} {name}?",
            f"which letter is right {word} {name}?",
            f"tell me the letter {word} {name}.",
            f"do you know the letter {word} {name}?",
        ]
        answer = f"the letter {word} {name}, is {result}."
        # The word tells the letter, as in any spelling alphabet.
        yield _fact("letters", asked, answer, words[i + step])


def _comparisons() -> Iterable[Fact]:
    for a, b in itertools.permutations(range(1, 13), 2):
        first, second = number_words(a), number_words(b)
        for word, best in (("bigger", max(a, b)), ("smaller", min(a, b))):
            result = number_words(best)
            asked = [
                f"which is {word}, {first}, or {second}?",
                f"which number is {word}, {first}, or {second}?",
                f"tell me which is {word}, {first}, or {second}.",
            ]
            yield _fact("comparisons", asked, f"the {word} number is {result}.", result)


def _repeat() -> Iterable[Fact]:
    words = REPEATED_WORDS.split()
    lists = [*itertools.permutations(words, 2), *itertools.permutations(words, 3)]
    # A fixed thousand of the lists keeps the pool small; the seed chooses among them.
    for chosen in random.Random(0).sample(lists, 1000):
        said = ", ".join(chosen)
        asked = [f"repeat after me, {said}.", f"please say, {said}.", f"say after me, {said}."]
        yield _fact("repeat", asked, f"{said}.", " ".join(chosen))


_MAKERS: dict[str, Callable[[], Iterable[Fact]]] = {
    "arithmetic": _arithmetic,
    "counting": _counting,
    "opposites": _opposites,
    "calendar": _calendar,
    "letters": _letters,
    "comparisons": _comparisons,
    "repeat": _repeat,
}


def all_facts(category: str) -> list[Fact]:
    """Every fact of a category, in a fixed order."""
    return list(_MAKERS[category]())


def make_questions(
    num_questions: int, num_test: int, fact_share: float = 0.17, seed: int = 0
) -> list[Question]:
    """Chooses the questions of a corpus and holds some out.

    Args:
      num_questions: distinct question texts in all; at least 3 a category.
      num_test: how many of them are held out; every category gets one or more.
      fact_share: share of the held-out questions whose fact no training question asks for.
      seed: of every choice.

    Returns:
      Questions in a shuffled, reproducible order, train and test mixed.

    Raises:
      UserError: more questions are wanted than the world has, or fewer than the categories need.
    """
    pools = {name: all_facts(name) for name in CATEGORIES}
    capacity = {name: sum(len(f.phrasings) for f in facts) for name, facts in pools.items()}
    wanted = _shares(num_questions, capacity, minimum=3)
    # A test fact costs its other phrasings, so leave room for them.
    held_out = _shares(num_test, {name: wanted[name] // 3 for name in CATEGORIES})
    answerable = {name: held_out[name] * open_ for name, (_, open_) in CATEGORIES.items()}
    num_unseen = min(round(num_test * fact_share), sum(answerable.values()))
    unseen = _shares(num_unseen, answerable, minimum=0)
    questions = []
    for name, facts in pools.items():
        rng = random.Random(f"{seed} {name}")
        rng.shuffle(facts)
        questions += _choose(facts, wanted[name], held_out[name], unseen[name], rng)
    random.Random(seed).shuffle(questions)
    return questions


def _shares(total: int, capacity: dict[str, int], minimum: int = 1) -> dict[str, int]:
    """Divides a total by the categories' weights, within capacities; exact, deterministic."""
    low = {name: min(minimum, room) for name, room in capacity.items()}
    if not sum(low.values()) <= total <= sum(capacity.values()):
        raise UserError(
            f"the question world cannot give {total} questions: between {sum(low.values())} and "
            f"{sum(capacity.values())} are possible; change num_questions or num_test_questions"
        )
    given = dict(low)
    while sum(given.values()) < total:
        open_ = [name for name in capacity if given[name] < capacity[name]]
        # The category furthest below its share comes next.
        name = min(open_, key=lambda n: (given[n] + 1) / CATEGORIES[n][0])
        given[name] += 1
    return given


def _choose(
    facts: list[Fact], wanted: int, held_out: int, unseen: int, rng: random.Random
) -> list[Question]:
    """`wanted` questions of shuffled facts, `held_out` of them for testing."""
    chosen = []
    for fact in facts[:unseen]:
        chosen.append(_question(fact, rng.choice(fact.phrasings), "test", "fact"))
    rest = wanted - unseen
    by_phrasing = held_out - unseen
    for fact in facts[unseen:]:
        take = min(rest, len(fact.phrasings))
        asked = rng.sample(fact.phrasings, take)
        rest -= take
        if by_phrasing and take >= 2:
            chosen.append(_question(fact, asked.pop(), "test", "phrasing"))
            by_phrasing -= 1
        chosen += [_question(fact, text, "train", "") for text in asked]
        if not rest:
            break
    if rest or by_phrasing:
        raise UserError(
            f"category {facts[0].category}: {wanted} questions with {held_out} held out cannot be "
            "had; lower num_test_questions"
        )
    return chosen


def _question(fact: Fact, spoken: str, split: str, novelty: str) -> Question:
    text = normalize(spoken)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Question(
        id=f"{fact.category}-{digest}",
        split=split,
        category=fact.category,
        question=text,
        answer=normalize(fact.answer),
        short_answer=fact.short_answer,
        spoken_question=spoken[0].upper() + spoken[1:],
        spoken_answer=fact.answer[0].upper() + fact.answer[1:],
        novelty=novelty,
    )
