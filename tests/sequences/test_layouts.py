import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.sequences.layouts import Layouts, SpokenText

lows, highs = st.integers(0, 15), st.integers(16, 47)
groups = st.lists(st.tuples(lows, lows, highs, highs, highs), max_size=12)
codes = groups.map(lambda g: np.asarray(g, np.int32).reshape(-1))
any_codes = st.lists(st.integers(0, 47), max_size=70)
text_ids = st.lists(st.sampled_from([0, *range(5, 160)]), max_size=45)
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
ratios = st.sampled_from([(10, 15), (3, 5), (6, 50), (1, 1), (7, 4)])
fast = settings(deadline=None, max_examples=60)


@fast
@given(text_ids, any_codes, ratios)
def test_answer_returns(small_vocabulary, text, audio, ratio):
    layouts = Layouts(small_vocabulary, *ratio)
    tokens = layouts.encode_aqaa_answer(text, audio)
    assert len(tokens) == len(text) + len(audio) + 3
    text_back, audio_back = layouts.decode_aqaa_answer(tokens)
    assert text_back.tolist() == text
    assert audio_back.tolist() == audio
    # What follows <|EOT|> is not part of the answer.
    again = layouts.decode_aqaa_answer([*tokens, 7, small_vocabulary.from_local(3)])
    assert again[0].tolist() == text and again[1].tolist() == audio


@fast
@given(text_ids, any_codes, ratios)
def test_answer_blocks(small_vocabulary, text, audio, ratio):
    """An independent reading of the layout: walk the tokens and count."""
    v, (text_block, audio_block) = small_vocabulary, ratio
    tokens = Layouts(v, *ratio).encode_aqaa_answer(text, audio).tolist()
    assert tokens[-1] == v.eot
    kinds = "".join("a" if v.is_audio(t) or t == v.audio_end else "t" for t in tokens[:-1])
    expected, t_left, a_left = "", len(text) + 1, len(audio) + 1
    while t_left or a_left:
        t, a = min(t_left, text_block), min(a_left, audio_block)
        expected += "t" * t + "a" * a
        t_left, a_left = t_left - t, a_left - a
    assert kinds == expected
    assert tokens.count(v.text_end) == tokens.count(v.audio_end) == 1


def test_default_answer_is_10_to_15(small_vocabulary):
    v = small_vocabulary
    tokens = Layouts(v).encode_aqaa_answer(range(5, 17), np.arange(40) % 16)
    is_audio = v.is_audio(tokens)
    assert not is_audio[:10].any() and is_audio[10:25].all()
    assert tokens[25:28].tolist() == [15, 16, v.text_end]
    assert is_audio[28:53].all() and tokens[53:].tolist() == [v.audio_end, v.eot]


def test_audio_ends_first(small_vocabulary):
    v = small_vocabulary
    tokens = Layouts(v).encode_aqaa_answer(range(5, 35), [])
    assert tokens[10] == v.audio_end
    assert tokens[11:].tolist() == [*range(15, 35), v.text_end, v.eot]


def test_cut_short_answer_decodes(small_vocabulary):
    layouts = Layouts(small_vocabulary)
    tokens = layouts.encode_aqaa_answer(range(5, 30), np.arange(30) % 16)
    text, audio = layouts.decode_aqaa_answer(tokens[:27])
    assert text.tolist() == [*range(5, 17)] and audio.tolist() == list(range(15))
    empty = layouts.decode_aqaa_answer([])
    assert len(empty[0]) == len(empty[1]) == 0


@fast
@given(texts, texts, codes, codes)
def test_chat_masks_cover_exactly_the_answer(small_vocabulary, question, answer, q, a):
    v, layouts = small_vocabulary, Layouts(small_vocabulary)
    voice = SpokenText(question, q)
    audio = [v.audio_start, *v.from_local(a), v.audio_end, v.eot]
    text = [*v.encode_text(answer), v.eot]
    spoken = layouts.encode_aqaa_answer(v.encode_text(answer), a)
    repeated = [*v.encode_text(f"{question}\n{answer}"), v.eot]
    cases = [
        (layouts.asr(q, answer), layouts.asr_prompt(q), text),
        (layouts.tts(question, a), layouts.tts_prompt(question), audio),
        (layouts.tts(question, a, voice), layouts.tts_prompt(question, voice), audio),
        (layouts.tqta(question, answer), layouts.tqta_prompt(question), text),
        (layouts.aqta(q, answer), layouts.aqta_prompt(q), text),
        (layouts.taqta(question, q, answer), layouts.taqta_prompt(question, q), repeated),
        (layouts.aqaa(q, answer, a), layouts.aqaa_prompt(q), spoken),
        (layouts.tqaa(question, answer, a), layouts.tqaa_prompt(question), spoken),
    ]
    for (tokens, weights), prompt, target in cases:
        assert tokens.dtype == np.int32 and weights.dtype == np.float32
        assert tokens.tolist() == [*prompt.tolist(), *(int(t) for t in target)]
        assert weights.tolist() == [0.0] * len(prompt) + [1.0] * len(target)
        assert tokens[0] == v.bos and (tokens == v.bot).sum() == (tokens == v.eot).sum()


@fast
@given(st.lists(st.one_of(texts, codes), max_size=5))
def test_documents(small_vocabulary, spans):
    v, layouts = small_vocabulary, Layouts(small_vocabulary)
    tokens, weights = layouts.interleaved(spans)
    expected = [v.bos]
    for span in spans:
        if isinstance(span, str):
            expected += v.encode_text(span).tolist()
        else:
            expected += [v.audio_start, *v.from_local(span).tolist(), v.audio_end]
    assert tokens.tolist() == [*expected, v.eos]
    assert weights.tolist() == [0.0] + [1.0] * len(expected)


def test_continuation_and_text(small_vocabulary):
    v, layouts = small_vocabulary, Layouts(small_vocabulary)
    tokens, weights = layouts.continuation([1, 2, 20, 21, 22])
    assert v.surface(tokens) == (
        "<s><audio_start><audio_1><audio_2><audio_20><audio_21><audio_22><audio_end></s>"
    )
    assert weights.tolist() == [0.0] + [1.0] * 8
    tokens, weights = layouts.text("hot", "cold")
    np.testing.assert_array_equal(tokens, layouts.tqta("hot", "cold").tokens)
    assert weights.sum() == len(tokens) - 1


def test_chat_form(small_vocabulary):
    v = small_vocabulary
    prompt = Layouts(v).tts_prompt("hot", SpokenText("cold", [1, 2, 20, 21, 22]))
    assert v.surface(prompt).replace("\n", "|") == (
        "<s><|BOT|>system|speak the text<|EOT|><|BOT|>human|cold<|EOT|>"
        "<|BOT|>assistant|<audio_start><audio_1><audio_2><audio_20><audio_21><audio_22><audio_end>"
        "<|EOT|><|BOT|>human|hot<|EOT|><|BOT|>assistant|"
    ).replace("|speak", "| speak").replace("|cold", "| cold").replace("|hot", "| hot")


@fast
@given(texts, texts, codes, codes, codes)
def test_preference_pairs_mask_the_audio(small_vocabulary, good, bad, q, a, b):
    v, layouts = small_vocabulary, Layouts(small_vocabulary)
    pair = layouts.aqaa_preference(q, SpokenText(good, a), SpokenText(bad, b))
    for (tokens, weights), text, audio in zip(pair, (good, bad), (a, b), strict=True):
        whole = layouts.aqaa(q, text, audio)
        np.testing.assert_array_equal(tokens, whole.tokens)
        targets = tokens[weights > 0].tolist()
        assert targets == [*v.encode_text(text), v.text_end, v.eot]
        assert set(np.unique(weights)) <= {0.0, 1.0}


def test_bad_input(small_vocabulary):
    layouts = Layouts(small_vocabulary)
    with pytest.raises(UserError, match="99"):
        layouts.continuation([99])
    with pytest.raises(UserError, match="not text"):
        layouts.encode_aqaa_answer([small_vocabulary.eot], [])


@fast
@given(st.lists(st.one_of(texts, st.integers(1, 6)), max_size=6))
def test_documents_with_images(small_vocabulary, spans):
    v = small_vocabulary
    tokens, weights = Layouts(v).image_text(spans)
    expected, learned = [v.bos], [0]
    for span in spans:
        if isinstance(span, str):
            ids = v.encode_text(span).tolist()
            expected, learned = expected + ids, learned + [1] * len(ids)
        else:
            expected += [v.image_start, *[v.image] * span, v.image_end]
            learned += [0] * (span + 2)
    assert tokens.tolist() == [*expected, v.eos]
    assert weights.tolist() == [*learned, 1] and weights.dtype == np.float32
    ids = {v.image_start, v.image, v.image_end}
    assert len(ids) == 3 and max(ids) < v.size
