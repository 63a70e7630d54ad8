"""The job that probes a trained encoder of speech: from a checkpoint to its file of figures."""

import json

import numpy as np
import pytest
import soundfile
from flax import nnx

from t5x_audio import probe_speech
from t5x_audio.errors import UserError
from t5x_audio.evaluation.linear_probe import LinearProbe
from t5x_audio.tokenizers.masked_prediction import MaskedPredictionConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig
from t5x_audio.training import checkpoints
from tests.objectives.test_best_rq import SEMANTIC

BITS = ((0, 0), (8, 8), (2, 4))
READING = SemanticTokenizerConfig(
    16, 2, 32, 1, codebook_size=32, num_supervision_layers=1, text_size=264
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Low and high tones by a loud and a quiet speaker, told by any encoder."""
    folder, rows = tmp_path_factory.mktemp("tones"), []
    rng = np.random.default_rng(0)
    for number in range(36):
        text, speaker = ("low", "high")[number % 2], ("ann", "bob")[number // 2 % 2]
        tone = np.sin(np.arange(8000 + 100 * number) * (0.1 if text == "low" else 0.9))
        noise = 0.02 if speaker == "ann" else 0.2
        path = folder / f"{number}.wav"
        soundfile.write(path, 0.5 * tone + noise * rng.normal(size=tone.shape), 16000)
        split = "test" if number < 8 else "train"
        rows.append({"audio": path.name, "text": text, "speaker": speaker, "split": split})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "manifest.jsonl")


def model_dir(tmp_path, config):
    checkpoints.save_model(tmp_path, {"model": config}, {"model": config.make(nnx.Rngs(0))})
    return str(tmp_path)


def test_an_encoder_by_its_features(tmp_path, manifest):
    place = model_dir(tmp_path, MaskedPredictionConfig(SEMANTIC, num_labels=8))
    given = {
        "model_dir": place, "manifest": manifest, "bits": BITS, "num_units": 4,
        "probes": ("text", "speaker", "unit"), "probe": LinearProbe(20, 16, 0.3),
    }  # fmt: skip
    result = probe_speech.run(**given, name="tones")
    assert result["recordings"] == 8 and set(result["text"]) == {"FP", "W8A8", "W2A4"}
    assert result["text"]["FP"] == 1.0 and result["unit"]["FP"] > 0.5
    assert result["speaker"]["FP"] > 0.7
    assert json.loads((tmp_path / "tones.json").read_text()) == result
    with pytest.raises(UserError, match="'code' is of a tokenizer"):
        probe_speech.run(**given | {"probes": ("code",)})


def test_a_tokenizer_by_its_codes_and_its_reading(tmp_path, manifest):
    place = model_dir(tmp_path, READING)
    probes = ("code", "usage", "recognition")
    result = probe_speech.run(model_dir=place, manifest=manifest, bits=BITS, probes=probes)
    assert result["code"]["FP"] == 1.0 >= result["code"]["W8A8"] > result["code"]["W2A4"]
    assert 0 < result["usage"]["FP"] <= 1.0 and result["recognition"]["FP"] > 0.5


def test_what_cannot_be_probed(tmp_path, manifest):
    place = model_dir(tmp_path, SEMANTIC)
    for given, words in (
        ({}, "no recordings"),
        ({"manifest": manifest, "probes": ("texts",)}, "'texts' is none of"),
        ({"manifest": manifest, "bits": ((1, 4),)}, "bits"),
        ({"manifest": manifest, "probes": ("recognition",)}, "CTC head"),
        ({"manifest": str(tmp_path / "none.jsonl")}, "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            probe_speech.run(model_dir=place, **given)
