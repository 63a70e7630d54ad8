"""Sentences to read aloud: what the voice says besides answers, so that its words meet freely.

The answers of a small world are few sentences, each heard in many questions: a model learns them by
rote, and what it says falls apart where it should put known words together anew. Readings are never
asked for. Some are true answers that no question has, the others sums without a result, lists of
words, and unpredictable sentences like those by which synthesis is tested (Benoit et al., "The SUS
test", Speech Communication 18, 1996).

Nothing that is held out is read aloud: the answers of all questions, held out or not, are left out.
"""

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Sequence

from t5x_audio.data.engine import world
from t5x_audio.data.text_normalization import normalize, number_words
from t5x_audio.errors import UserError

CATEGORY = "reading"
FACT_SHARE = 1 / 3
MAX_READINGS = 10_000  # well below the number of different sentences
_SUM = "{} {} {}."
_FRAMES = (_SUM, "{} is {}.", "{}, {}, {}.", "{} is {}.", "{}, {}, {}, {}.")


@dataclasses.dataclass(frozen=True)
class Reading:
    """One sentence: `text` in lower-case words, `spoken` with the punctuation for the voice."""

    text: str
    spoken: str

    @property
    def id(self) -> str:
        """From the text, the same in any selection."""
        return f"{CATEGORY}-{hashlib.sha256(self.text.encode()).hexdigest()[:10]}"


def make_readings(questions: Sequence[world.Question], count: int, seed: int = 0) -> list[Reading]:
    """`count` different sentences, none the answer of a question; shuffled, reproducible.

    Args:
      questions: of the corpus, train and test.
      count: how many; up to a third are answers that nobody asks for.
      seed: of the choice.

    Raises:
      UserError: a negative count, or more than MAX_READINGS.
    """
    if not 0 <= count <= MAX_READINGS:
        raise UserError(f"num_readings={count}: give 0 to {MAX_READINGS}")
    rng = random.Random(f"{seed} {CATEGORY}")
    asked = {question.answer for question in questions}
    # Lists of words come from the frames, over more words than there are to repeat.
    names = [name for name in world.CATEGORIES if name != "repeat"]
    answers = {fact.answer for name in names for fact in world.all_facts(name)}
    unasked = sorted(answer for answer in answers if normalize(answer) not in asked)
    chosen = rng.sample(unasked, min(round(count * FACT_SHARE), len(unasked)))
    readings = {normalize(spoken): spoken for spoken in chosen}
    for frame in itertools.cycle(_FRAMES):
        if len(readings) >= count:
            break
        spoken = _fill(frame, rng)
        if normalize(spoken) not in asked:
            readings.setdefault(normalize(spoken), spoken)
    made = [Reading(text, spoken[0].upper() + spoken[1:]) for text, spoken in readings.items()]
    rng.shuffle(made)
    return made


def _fill(frame: str, rng: random.Random) -> str:
    """The frame with words of as many kinds, since two numbers could state what is false."""
    if frame == _SUM:
        first, second = (number_words(rng.randint(1, 20)) for _ in range(2))
        return frame.format(first, rng.choice(("plus", "minus", "times")), second)
    kinds = rng.sample(_kinds(), frame.count("{}"))
    words = [rng.choice(kind) for kind in kinds]
    # A letter is said with a pause behind it, as in answers: "B, like black, is ...".
    words = [f"{word}," if "," in word else word for word in words]
    return frame.format(*words).replace(",,", ",").replace(",.", ".")


def _kinds() -> list[list[str]]:
    """The words that answers name, kind by kind; no word in two of them."""
    numbers = [number_words(number) for number in range(21)]
    dates = [*world.DAYS, *world.MONTHS]
    opposites = world.OPPOSITES.replace(",", " ").split()
    known = {*numbers, *dates, *opposites}
    others = [word for word in world.REPEATED_WORDS.split() if word not in known]
    return [numbers, dates, opposites, world.named_letters(), others]
