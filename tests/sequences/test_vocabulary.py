import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.sequences import vocabulary as V

TEXTS = [
    "what is three plus four?",
    "three plus four is seven.",
    "the opposite of hot is cold.",
    "repeat after me: the sky is blue.",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vocabulary")
    path = V.train_sentencepiece(TEXTS * 5, str(directory / "text"), 160)
    return V.Vocabulary(160, 16, 32, 8, 64, sentencepiece=path)


def test_published_sizes():
    published = V.Vocabulary()
    assert published.size == 74752
    assert published.audio_offset == 65536
    assert published.from_local(5119) == 70655
    assert published.audio_start == 70656


def test_order_of_ids(vocabulary):
    v = vocabulary
    table = v.modality_table
    assert len(table) == v.size == 256
    assert table[[v.unk, v.bos, v.eos, v.eot, v.bot]].tolist() == [0, 3, 3, 3, 3]
    assert (table[5:160] == V.TEXT).all()
    assert (table[160:176] == V.LINGUISTIC).all()
    assert (table[176:208] == V.SEMANTIC).all()
    assert (table[208:] == V.SPECIAL).all()
    assert len({v.audio_start, v.audio_end, v.text_end, v.pad}) == 4


def test_fixed_pieces(vocabulary):
    pieces = [vocabulary._processor.IdToPiece(i) for i in range(5)]
    assert pieces == ["<unk>", "<s>", "</s>", "<|EOT|>", "<|BOT|>"]
    for role in V.ROLES:
        assert len(vocabulary.encode_header(role)) == 1
    for text in V.INSTRUCTIONS:
        assert len(vocabulary.encode_text(text)) == 1
        assert vocabulary.decode_text(vocabulary.encode_text(text)) == text
    mixed = "please answer in text: transcribe the speech"
    assert vocabulary.decode_text(vocabulary.encode_text(mixed)) == mixed


ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)


@settings(deadline=None)
@given(ascii_text)
def test_any_english_text_encodes_and_returns(vocabulary, text):
    ids = vocabulary.encode_text(text)
    assert (vocabulary.modality(ids) == V.TEXT).all()
    assert (ids != vocabulary.unk).all()
    assert vocabulary.decode_text(ids) == text.lower()


@settings(deadline=None)
@given(st.text(max_size=20))
def test_byte_fallback_encodes_any_script(tmp_path_factory, text):
    directory = tmp_path_factory.getbasetemp() / "bytes"
    if not (directory / "text.model").exists():
        V.train_sentencepiece(TEXTS, str(directory / "text"), 2048)
    v = V.Vocabulary(2048, sentencepiece=str(directory / "text.model"), lowercase=False)
    # U+2581 is SentencePiece's own mark for a space; lone surrogates are no text.
    text = text.replace("\u2581", "").replace("\x00", "")
    assert v.decode_text(v.encode_text(text)) == text


def test_control_symbols_cannot_be_typed(vocabulary):
    ids = vocabulary.encode_text("<|eot|> <|EOT|> <s>")
    assert not set(ids.tolist()) & {vocabulary.eot, vocabulary.bot, vocabulary.bos}


def test_decode_ignores_what_is_not_text(vocabulary):
    v = vocabulary
    ids = v.encode_text("hot").tolist()
    assert v.decode_text([v.bot, *ids, v.eot, v.from_local(3), v.size - 1]) == "hot"


@given(st.lists(st.integers(0, 47)))
def test_local_codes_return(codes):
    v = V.Vocabulary(100, 16, 32, 8, 64)
    ids = v.from_local(codes)
    assert v.to_local(ids).tolist() == codes
    assert v.is_audio(ids).all()
    assert v.parse_audio(v.surface(ids)).tolist() == ids.tolist()


@pytest.mark.parametrize("code", [-1, 48])
def test_codes_outside_the_codebooks(code):
    v = V.Vocabulary(100, 16, 32, 8, 64)
    with pytest.raises(UserError, match=str(code)):
        v.from_local([0, code])
    with pytest.raises(UserError):
        v.to_local([code + v.audio_offset])


def test_surface(vocabulary):
    v = vocabulary
    ids = [v.bot, *v.encode_text("hot"), v.audio_start, v.from_local(17), v.audio_end, v.eot]
    assert v.surface(ids) == "<|BOT|>hot<audio_start><audio_17><audio_end><|EOT|>"
    with pytest.raises(UserError, match="audio_x"):
        v.parse_audio("<audio_1><audio_x>")


def test_save_and_load(vocabulary, tmp_path):
    vocabulary.save(str(tmp_path / "v"))
    loaded = V.Vocabulary.load(str(tmp_path / "v"))
    assert loaded.sizes() == vocabulary.sizes()
    text = "the sky is seven."
    np.testing.assert_array_equal(loaded.encode_text(text), vocabulary.encode_text(text))


def test_training_is_deterministic(tmp_path):
    for name in "ab":
        V.train_sentencepiece(TEXTS, str(tmp_path / name), 120)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="train_vocabulary"):
        V.Vocabulary.load(str(tmp_path))
    (tmp_path / "vocabulary.json").write_text('{"no_such_field": 1}')
    with pytest.raises(UserError, match="vocabulary.json"):
        V.Vocabulary.load(str(tmp_path))
    with pytest.raises(UserError, match="no text"):
        V.train_sentencepiece([], str(tmp_path / "x"), 100)
    with pytest.raises(UserError, match="20 pieces"):
        V.train_sentencepiece(TEXTS, str(tmp_path / "x"), 20)
    with pytest.raises(UserError, match="num_specials"):
        V.Vocabulary(num_specials=2)


def test_ids_of_images_move_no_others(vocabulary):
    v, published = vocabulary, V.Vocabulary()
    before = [v.audio_start, v.audio_end, v.text_end, v.pad]
    assert before == [208, 209, 210, 211] and published.pad == 70659
    assert [v.image_start, v.image_end, v.image] == [212, 213, 214]
    ids = [v.image_start, v.image, v.image, v.image_end]
    assert v.surface(ids) == "<image_start><image><image><image_end>"
    assert v.parse_audio(v.surface(ids)).tolist() == ids
    without = V.Vocabulary(160, 16, 32, 4, 64)
    assert (without.pad, without.size) == (211, 256)
    with pytest.raises(UserError, match="num_specials=4, and images need 7"):
        _ = without.image
    with pytest.raises(UserError, match="not an audio token: '<image>'"):
        without.parse_audio("<audio_1><image>")
