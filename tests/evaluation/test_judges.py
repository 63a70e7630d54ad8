import numpy as np

from t5x_audio.evaluation import judges

TONE = np.full(4000, 0.5, np.float32)


def _judges(heard, **settings):
    embed = lambda sound: np.tile([0.6, 0.8], (len(sound), 1))  # noqa: E731
    return judges.Judges(
        lambda sound: heard[: len(sound)], lambda samples: 3.0, embed, np.array([1.0, 0.0]),
        **settings,
    )  # fmt: skip


def test_only_the_first_are_rated():
    rows = _judges(["cold"] * 3, num_rated=2).listen([TONE] * 3)
    assert [row["mos"] for row in rows] == [3.0, 3.0, None]
    assert all(row["similarity"] is not None and row["audible"] for row in rows)


def test_each_recording_may_have_a_voice_of_its_own():
    voices = [np.array([0.6, 0.8]), np.array([1.0, 0.0]), np.array([-0.8, 0.6])]
    rows = _judges(["a", "b"]).listen([TONE, np.zeros(9, np.float32), TONE], voices)
    assert [row["heard"] for row in rows] == ["a", "", "b"]
    np.testing.assert_allclose([rows[0]["similarity"], rows[2]["similarity"]], [1, 0], atol=1e-7)
    assert rows[1]["similarity"] is None


def test_errors_in_words_and_characters():
    assert judges.word_errors("It is sevn.", "it is seven") == {"word_errors": 1, "words": 3}
    found = judges.character_errors("it is sevn", "it is seven")
    assert found == {"character_errors": 1, "characters": 11}


def test_batches_keep_the_order():
    sizes = []

    def embed(sound):
        sizes.append(len(sound))
        return np.array([[len(samples)] for samples in sound])

    recordings = [np.zeros(n) for n in (5, 1, 9, 3, 7)]
    found = judges.in_batches(embed, recordings, 2)
    assert found[:, 0].tolist() == [5, 1, 9, 3, 7] and sizes == [2, 2, 2]


def test_reference_voice_is_of_unit_length():
    embed = lambda sound: np.array([[samples.mean(), 1.0] for samples in sound])  # noqa: E731
    voice = judges.reference_voice(embed, [TONE, -TONE, np.zeros(0, np.float32)])
    np.testing.assert_allclose(voice, [0.0, 1.0], atol=1e-7)
