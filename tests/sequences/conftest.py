import pytest

from t5x_audio.sequences.vocabulary import Vocabulary, train_sentencepiece

TEXTS = [
    "what is three plus four?",
    "three plus four is seven.",
    "the opposite of hot is cold.",
    "answer in speech transcribe the text",
]


@pytest.fixture(scope="session")
def small_vocabulary(tmp_path_factory):
    """160 text rows (some unused), 16 linguistic, 32 semantic."""
    path = train_sentencepiece(TEXTS * 3, str(tmp_path_factory.mktemp("v") / "text"), 140)
    return Vocabulary(160, 16, 32, 8, 64, sentencepiece=path)
