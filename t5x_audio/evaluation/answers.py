"""Is an answer right? Judged on words, the same for what was written and for what was heard.

A question of the spoken question world has one `short_answer`: the words that make an answer right
("seven", "three four five"). An answer is right when it ends in them: what it names before may be
an echo of the question ("the opposite of hot is cold"). A spoken number is one thing: "twenty five"
does not end in "five", nor "one hundred and twenty" in "twenty".

Plain Python: SeqIO tasks use it as their metric and the evaluation as its judge. Step-Audio has a
large language model judge free answers (paper section 6.1); a closed question needs none.
"""

from collections.abc import Sequence

from t5x_audio.data.text_normalization import normalize, sounds_like

_UNITS = {"one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
_TEENS = {"ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"}
_TEENS |= {"eighteen", "nineteen"}
_TENS = {"twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"}
_SCALES = {"hundred", "thousand"}
_SMALL = _UNITS | _TEENS | _TENS


def ends_in_short_answer(text: str, short_answer: str, by_sound: bool = False) -> bool:
    """Whether `text` ends in the words of `short_answer`.

    Args:
      text: an answer, written or heard, in any spelling.
      short_answer: the words that make it right.
      by_sound: take words that sound the same for one word, and a row of digits for a number or,
        where several words are wanted, for single digits, as is fair to a transcript: nobody hears
        whether "two" or "to" was meant.

    Raises:
      ValueError: `short_answer` has no words.
    """
    if not normalize(short_answer):
        raise ValueError(f"the short answer {short_answer!r} has no words")
    if not by_sound:
        return _ends_in(normalize(text).split(), normalize(short_answer).split())
    wanted = sounds_like(short_answer).split()
    # Read digit by digit, "14" would end in "four".
    readings = (False, True) if len(wanted) > 1 else (False,)
    return any(_ends_in(sounds_like(text, one_by_one).split(), wanted) for one_by_one in readings)


def _ends_in(words: list[str], wanted: list[str]) -> bool:
    before, end = words[: -len(wanted)], words[-len(wanted) :]
    return end == wanted and not _one_number(before, wanted)


def _one_number(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether the last words of `left` and the first of `right` belong to one spoken number."""
    if not left or not right:
        return False
    last, first = left[-1], right[0]
    if last == "and":  # "one hundred and twenty", but not "five and six"
        return len(left) > 1 and left[-2] in _SCALES and first in _SMALL
    if last in _SCALES and first == "and":
        return len(right) > 1 and right[1] in _SMALL
    if first in _SCALES:
        return last in _SMALL or last in _SCALES
    return (last in _TENS and first in _UNITS) or (last in _SCALES and first in _SMALL)
