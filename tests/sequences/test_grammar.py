import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.sequences import grammar
from t5x_audio.sequences.layouts import Layouts

fast = settings(deadline=None, max_examples=60)
text_ids = st.lists(st.sampled_from([0, *range(5, 160)]), max_size=45)
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
lows, highs = st.integers(0, 15), st.integers(16, 47)
groups = st.lists(st.tuples(lows, lows, highs, highs, highs), max_size=12)
codes = groups.map(lambda g: np.asarray(g, np.int32).reshape(-1))
RATIOS = [(10, 15), (3, 5), (6, 50)]


@fast
@given(text_ids, codes, st.sampled_from(RATIOS))
def test_every_encoded_answer_is_accepted(small_vocabulary, text, audio, ratio):
    layouts = Layouts(small_vocabulary, *ratio)
    pieces = small_vocabulary.num_pieces
    tokens = layouts.encode_aqaa_answer([t for t in text if t < pieces], audio)
    automaton = grammar.spoken_answer(layouts)
    assert automaton.accepts(tokens)
    assert not automaton.accepts(tokens[:-1])
    assert not automaton.accepts([*tokens, tokens[-1]])


def sample(automaton, seed, length, text_end):
    """Random allowed tokens; the channels' ends are rare at first, then forced."""
    random, state, tokens = np.random.default_rng(seed), automaton.start_state, []
    ends = [grammar.TEXT_END, grammar.AUDIO_END, grammar.EOT]
    while state != automaton.done:
        allowed = np.flatnonzero(automaton.mask(state))
        ending = allowed[np.isin(automaton.token_class[allowed], ends)]
        want_end = len(tokens) > length or random.random() < text_end
        token = random.choice(ending if len(ending) and want_end else allowed)
        tokens.append(int(token))
        state = automaton.next_state[state, automaton.token_class[token]]
        assert len(tokens) < length + 200
    return tokens


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 120), st.floats(0, 0.3), st.sampled_from(RATIOS))
def test_samples_decode_to_whole_groups(small_vocabulary, seed, length, end_rate, ratio):
    layouts = Layouts(small_vocabulary, *ratio)
    tokens = sample(grammar.spoken_answer(layouts), seed, length, end_rate)
    text, audio = layouts.decode_aqaa_answer(tokens)
    assert len(audio) % 5 == 0
    rows = audio.reshape(-1, 5)
    assert (rows[:, :2] < 16).all() and (rows[:, 2:] >= 16).all()
    # The sample is nothing but the encoding of what it decodes to.
    assert layouts.encode_aqaa_answer(text, audio).tolist() == tokens


@fast
@given(texts, codes)
def test_written_and_audio_answers(small_vocabulary, text, audio):
    layouts = Layouts(small_vocabulary)
    tokens, weights = layouts.asr(audio, text)
    written = grammar.written_answer(small_vocabulary)
    assert written.accepts(tokens[weights > 0])
    tokens, weights = layouts.tts(text, audio)
    spoken = grammar.audio_answer(small_vocabulary)
    assert spoken.accepts(tokens[weights > 0])
    assert not written.accepts(tokens[weights > 0])


def test_a_wrong_group_is_refused(small_vocabulary):
    layouts = Layouts(small_vocabulary)
    automaton = grammar.spoken_answer(layouts)
    assert automaton.accepts(layouts.encode_aqaa_answer([9], [1, 2, 20, 21, 22]))
    assert not automaton.accepts(layouts.encode_aqaa_answer([9], [1, 20, 2, 21, 22]))
    assert not automaton.accepts(layouts.encode_aqaa_answer([9], [1, 2, 20, 21]))


def test_tables(small_vocabulary):
    v = small_vocabulary
    for automaton in (
        grammar.spoken_answer(Layouts(v)),
        grammar.written_answer(v),
        grammar.audio_answer(v),
    ):
        n_states = len(automaton.allowed)
        assert automaton.allowed.shape == automaton.next_state.shape
        assert automaton.allowed.any(axis=1).all(), "a state without a way on"
        assert not automaton.allowed[:, grammar.FORBIDDEN].any()
        assert ((automaton.next_state >= 0) & (automaton.next_state < n_states)).all()
        assert np.flatnonzero(automaton.mask(automaton.done)).tolist() == [v.eot]
        assert automaton.mask(np.array([0, 1])).shape == (2, v.size)
    classes = grammar.token_classes(v)
    unused = [v.bos, v.eos, v.bot, v.pad, v.size - 1, *range(v.num_pieces, v.text_size)]
    assert (classes[unused] == grammar.FORBIDDEN).all()


def test_blocks_without_whole_groups(small_vocabulary):
    with pytest.raises(UserError, match="multiple of 5"):
        grammar.spoken_answer(Layouts(small_vocabulary, 10, 14))
