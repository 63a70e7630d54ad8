import flax.nnx as nnx
import numpy as np
import pytest

from t5x_audio.audio.features import MelConfig
from t5x_audio.evaluation import resynthesis
from t5x_audio.vocoder.flow import FlowMatching
from t5x_audio.vocoder.paired_flow import PairedFlowConfig
from tests.toy_vocoder import FLOW

MEL = MelConfig(sample_rate=16000, hop=240)
SEMITONE = 2 ** (1 / 12)


def _sung(pitches, level=0.3, seconds=1.2):
    """A voice of harmonics whose F0 goes through `pitches` (Hz); 0 = silence in between."""
    per_note = int(seconds * 16000) // len(pitches)
    f0 = np.repeat(np.asarray(pitches, float), per_note)
    phase = 2 * np.pi * np.cumsum(f0) / 16000
    voice = sum(np.sin(k * phase) / k for k in range(1, 6))
    return (level * voice * (f0 > 0)).astype(np.float32)


TUNE = (150.0, 170.0, 0.0, 200.0, 180.0)


def test_the_same_sound_is_at_no_distance():
    found = resynthesis.compare(_sung(TUNE), {"same": _sung(TUNE)}, MEL)["same"]
    assert found["mel_distance"] == 0.0 and found["voicing_agreement"] == 1.0
    assert found["f0_correlation"] == pytest.approx(1.0) and found["f0_semitones"] == 0.0


def test_a_semitone_higher_is_a_semitone_away():
    higher = _sung([SEMITONE * pitch for pitch in TUNE])
    found = resynthesis.compare(_sung(TUNE), {"higher": higher}, MEL)["higher"]
    assert found["f0_semitones"] == pytest.approx(1.0, abs=0.02)
    assert found["f0_correlation"] > 0.99  # a transposed tune is still the tune
    assert found["voicing_agreement"] > 0.97


def test_a_mirrored_tune_moves_against_the_recording():
    pitches = (150.0, 160.0, 170.0, 180.0)
    found = resynthesis.compare(_sung(pitches), {"down": _sung(pitches[::-1])}, MEL)["down"]
    assert found["f0_correlation"] < -0.9
    monotone = resynthesis.compare(_sung(pitches), {"flat": _sung([160.0] * 4)}, MEL)["flat"]
    assert monotone["f0_semitones"] == pytest.approx(1.1, abs=0.3)


def test_level_is_a_distance_in_decibels():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 16000).astype(np.float32)
    louder = noise * 10 ** (6 / 20)
    found = resynthesis.compare(noise, {"louder": louder}, MEL)["louder"]
    assert found["mel_distance"] == pytest.approx(6.0, abs=1e-3)
    assert found["f0_correlation"] is None and found["f0_semitones"] is None


def test_frames_count_as_far_as_both_reach():
    whole = _sung(TUNE)
    cut = whole[: 240 * 60]
    found = resynthesis.compare(whole, {"cut": cut}, MEL)["cut"]
    # Only the frames at the cut see something else than the recording.
    assert found["mel_distance"] < 1.0 and found["f0_correlation"] > 0.99


def test_pitch_of_hand_made_courses():
    a = np.array([0.0] * 5 + [100.0, 120.0] * 10)
    b = np.array([0.0] * 4 + [200.0] + [100.0, 120.0] * 8 + [0.0] * 4)
    found = resynthesis.pitch_agreement(a, b)
    assert found["voicing_agreement"] == pytest.approx(20 / 25)
    assert found["f0_correlation"] == pytest.approx(1.0) and found["f0_semitones"] == 0.0
    assert resynthesis.pitch_agreement(a[:14], b[:14])["f0_correlation"] is None  # too few
    octave = resynthesis.pitch_agreement(a, 2 * a)
    assert octave["f0_semitones"] == pytest.approx(12.0)
    steady = resynthesis.pitch_agreement(np.full(20, 100.0), np.linspace(90, 110, 20))
    assert steady["f0_correlation"] is None and steady["f0_semitones"] is not None
    assert resynthesis.pitch_agreement(a[:0], b)["voicing_agreement"] is None


def test_log_mel_does_not_see_its_padding():
    from t5x_audio.audio.features import mel_spectrogram

    samples = _sung(TUNE)[:10000]
    np.testing.assert_allclose(
        resynthesis.log_mel(samples, MEL), mel_spectrogram(samples, MEL), atol=1e-4
    )


def test_without_a_codebook_its_codes_sound_alike():
    flow = FlowMatching(FLOW, nnx.Rngs(0))
    before = np.asarray(flow.embedding.embedding[...])
    counts = np.array([3, 1] + [0] * 8)  # 10 linguistic codes, 20 semantic ones
    masked = resynthesis.without_codebook(flow, 0, counts)
    table = np.asarray(masked.embedding.embedding[...])
    mean = 0.75 * before[0] + 0.25 * before[1]
    np.testing.assert_allclose(table[:10], np.tile(mean, (10, 1)), atol=1e-6)
    np.testing.assert_array_equal(table[10:], before[10:])
    np.testing.assert_array_equal(flow.embedding.embedding[...], before)  # a copy


def test_the_table_of_pairs_ends_in_the_semantic_rows():
    """`load_versions` counts on it for either kind of flow."""
    config = PairedFlowConfig()
    rows = nnx.eval_shape(lambda: config.make(nnx.Rngs(0))).embedding.num_embeddings
    assert rows == config.codebook + 1


def _row(errors, similarity, correlation):
    version = {
        "word_errors": errors, "words": 4, "character_errors": 2 * errors, "characters": 20,
        "mos": 3.0, "similarity": similarity, "mel_distance": 5.0, "f0_correlation": correlation,
        "f0_semitones": 0.5, "voicing_agreement": 0.9,
    }  # fmt: skip
    versions = {name: dict(version) for name in resynthesis.VERSIONS}
    versions["stream"]["mel_distance_from_whole"] = errors / 10
    return versions


def test_figures_of_all_clips():
    figures = resynthesis.summarise([_row(1, 0.8, 0.5), _row(3, 0.6, None)])
    assert figures["clips"] == 2 and figures["both_wer"] == 0.5 and figures["both_cer"] == 0.2
    assert figures["both_speaker_similarity"] == pytest.approx(0.7)
    assert figures["both_f0_correlation"] == 0.5  # of the one that has it
    assert "recording_mel_distance" not in figures
    assert figures["stream_mel_distance_from_whole"] == pytest.approx(0.2)


def test_clips_without_text_have_no_error_rate():
    row = _row(1, 0.8, 0.5)
    for version in row.values():
        for name in ("word_errors", "words", "character_errors", "characters"):
            del version[name]
    figures = resynthesis.summarise([row])
    assert figures["both_wer"] is None and figures["both_mel_distance"] == 5.0
    assert resynthesis.summarise([row, _row(1, 0.8, 0.5)])["both_wer"] == 0.25
