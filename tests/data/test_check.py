"""Checking clips by joined hearing: what is confirmed is right, at few calls."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from t5x_audio.data.engine import check

_WORDS = st.sampled_from(["one", "two", "three", "cat", "dog", "monday", "after", "before"])
_TEXTS = st.lists(st.lists(_WORDS, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6)


@given(_TEXTS)
def test_all_heard_is_all_right(texts):
    assert check.agreement(texts, ". ".join(texts)) == [True] * len(texts)


@given(_TEXTS, st.data())
def test_a_wrong_word_is_always_noticed(texts, data):
    place = data.draw(st.integers(0, len(texts) - 1))
    words = texts[place].split()
    words[data.draw(st.integers(0, len(words) - 1))] = "wrong"
    heard = [*texts[:place], " ".join(words), *texts[place + 1 :]]
    right = check.agreement(texts, " ".join(heard))
    # Of equal neighbours another may be blamed; then the blame must be on an equal text.
    assert not all(right)
    if texts.count(texts[place]) == 1 and len(set(" ".join(texts).split())) == len(
        " ".join(texts).split()
    ):
        assert right == [i != place for i in range(len(texts))]


def test_added_and_missing_words():
    texts = ["one two", "three four", "five six"]
    assert check.agreement(texts, "1 2 3 4 5 6") == [True] * 3
    assert check.agreement(texts, "one two four five six") == [True, False, True]
    assert check.agreement(texts, "one two three um four five six") == [True, False, True]
    # A word too many between two clips casts doubt on both.
    assert check.agreement(texts, "one two um three four five six") == [False, False, True]
    assert check.agreement(texts, "") == [False] * 3


@given(st.lists(st.floats(0.1, 40), max_size=30))
def test_pack_keeps_order_and_bound(durations):
    pieces = check.pack(durations)
    assert [i for piece in pieces for i in piece] == list(range(len(durations)))
    for piece in pieces:
        total = sum(durations[i] + check.PAUSE_SECONDS for i in piece)
        assert len(piece) == 1 or total <= check.MAX_PIECE_SECONDS + 1e-6


class _Ear:
    """Hears the values of samples as words; deaf to the word 'deaf' when clips are joined."""

    words = ["zero", "cat", "dog", "fish", "deaf"]

    def __init__(self):
        self.calls = []

    def transcribe(self, waveforms):
        self.calls.append(len(waveforms))
        heard = [[self.words[int(v)] for v in w[:: check.RATE] if v] for w in waveforms]
        return [
            " ".join(x for x in words if x != "deaf" or len(words) == 1) if words else ""
            for words in heard
        ]


def test_doubtful_clips_are_heard_again_alone():
    say = {word: np.full(check.RATE, i, np.float32) for i, word in enumerate(_Ear.words)}
    clips = [say[word] for word in ("cat", "deaf", "dog", "fish")]
    ear = _Ear()
    ear_pause, check.PAUSE_SECONDS = check.PAUSE_SECONDS, 1.0
    try:
        right = check.confirm(clips, ["cat", "deaf", "cat", "fish"], ear)
    finally:
        check.PAUSE_SECONDS = ear_pause
    assert right == [True, True, False, True]
    assert ear.calls[0] == 1 and ear.calls[1] <= 3
