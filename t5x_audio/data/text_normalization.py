"""Text as it is said: what is compared with a transcript, and what the corpora hold.

`normalize` gives lower-case words without digits or punctuation. `sounds_like` goes one step
further and gives words that sound the same one spelling, because no recogniser can hear whether
"two" or "to" was meant; a comparison by sound is right for checking recordings, and too lenient
only for telling such words apart. Both are idempotent. English only.
"""

import re

# fmt: off
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
_ORDINALS = {
    **dict(one="first", two="second", three="third", five="fifth", eight="eighth", nine="ninth"),
    "twelve": "twelfth",
}
MAX_NUMBER = 9999

# Signs that a recogniser writes for words.
_SIGNS = {
    "+": " plus ",
    "=": " equals ",
    "×": " times ",
    "÷": " divided by ",
    "&": " and ",
    "%": " percent ",
}
_CONTRACTIONS = {
    "what's": "what is",
    "that's": "that is",
    "it's": "it is",
    "let's": "let us",
    "i'm": "i am",
    "you're": "you are",
    "we're": "we are",
    "o'clock": "oclock",
}

# One spelling for words of one sound. Letters first: their names are all a recogniser can write.
_LETTER_NAMES = {
    "a": "ay eh",
    "b": "be bee",
    "c": "see sea",
    "d": "dee",
    "e": "ee",
    "f": "ef eff",
    "g": "gee",
    "h": "aitch age",
    "i": "eye aye",
    "j": "jay",
    "k": "kay",
    "l": "el ell",
    "m": "em",
    "n": "en",
    "o": "oh owe",
    "p": "pea pee",
    "q": "queue cue",
    "r": "are",
    "s": "ess",
    "t": "tea tee",
    "u": "you ewe",
    "v": "vee",
    "x": "ex",
    "y": "why",
    "z": "zee zed",
}
_SAME_SOUND = (
    "two to too,four for fore,one won,eight ate,six sicks,bye by buy,son sun,write right,"
    "know no,their there,read red,here hear,weak week,meat meet,high hi,night knight,"
    "new knew,blew blue,week weak,hole whole,plane plain,our hour,wait weight,ring wring,"
    "tale tail,male mail,sale sail,pear pair,bear bare,flower flour,minus minas"
)
_CANONICAL = {
    other: letter for letter, names in _LETTER_NAMES.items() for other in names.split()
} | {other: group.split()[0] for group in _SAME_SOUND.split(",") for other in group.split()[1:]}


def number_words(number: int) -> str:
    """0..9999 in words without "and" or hyphens: 342 -> "three hundred forty two"."""
    if not 0 <= number <= MAX_NUMBER:
        raise ValueError(f"{number} is outside 0..{MAX_NUMBER}")
    if number < 20:
        return _UNITS[number]
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            head = f"{number_words(number // size)} {name}"
            return head + (f" {number_words(number % size)}" if number % size else "")
    return _TENS[number // 10] + (f" {_UNITS[number % 10]}" if number % 10 else "")


def ordinal_words(number: int) -> str:
    """1..9999 as an ordinal: 21 -> "twenty first"."""
    *head, last = number_words(number).split()
    if last in _ORDINALS:
        last = _ORDINALS[last]
    else:
        last = (last[:-1] + "ie" if last.endswith("y") else last) + "th"
    return " ".join([*head, last])


def _spell(match: re.Match, one_by_one: bool) -> str:
    digits, suffix = match[1].replace(",", ""), match[2]
    if one_by_one or len(digits) > len(str(MAX_NUMBER)) or (len(digits) > 1 and digits[0] == "0"):
        return " " + " ".join(_UNITS[int(digit)] for digit in digits) + " "
    number = int(digits)
    return f" {ordinal_words(number) if suffix and number else number_words(number)} "


def normalize(text: str, digits_one_by_one: bool = False) -> str:
    """Lower-case words separated by single spaces: a-z and inner apostrophes only.

    Args:
      text: any English text.
      digits_one_by_one: read 123 as "one two three", as a counted list is often written down;
        without it numbers up to 9999 are read as numbers, longer ones digit by digit.
    """
    text = text.lower().replace("’", "'").replace("‘", "'")
    for contraction, words in _CONTRACTIONS.items():
        text = re.sub(rf"\b{contraction}\b", words, text)
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1 m", text)
    text = re.sub(r"(?<=\d)\s*[x*]\s*(?=\d)", " times ", text)
    # "9-4" is a subtraction, "1-2-3" a list: a hyphen counts as a word when numbers are read whole.
    text = text if digits_one_by_one else re.sub(r"(?<=\d)\s*[-−–]\s*(?=\d)", " minus ", text)
    text = text.replace("−", " minus ")
    for sign, words in _SIGNS.items():
        text = text.replace(sign, words)
    text = re.sub(
        r"(\d+(?:,\d{3})*)(?:(st|nd|rd|th)\b)?", lambda m: _spell(m, digits_one_by_one), text
    )
    text = re.sub(r"[^a-z']+", " ", text)
    return " ".join(word for word in (word.strip("'") for word in text.split()) if word)


def sounds_like(text: str, digits_one_by_one: bool = False) -> str:
    """`normalize`, then one spelling for letter names and words that sound the same."""
    words = normalize(text, digits_one_by_one).split()
    # "w" is three words to the ear; "a" may be the article or the letter.
    joined = " ".join(_CANONICAL.get(word, word) for word in words)
    return re.sub(r"\bdouble u\b", "w", joined)


def same_sound(expected: str, heard: str) -> bool:
    """Whether a transcript says the expected words, by sound; digit strings are read both ways."""
    target = sounds_like(expected)
    return target in (sounds_like(heard), sounds_like(heard, digits_one_by_one=True))
