"""Tokens of a quantised tokenizer beside those of the plain one."""

import numpy as np
import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.evaluation import quantized_speech
from t5x_audio.evaluation.quantized_speech import QuantizedSpeech
from t5x_audio.evaluation.token_agreement import token_agreement
from t5x_audio.tokenizers.masked_prediction import MaskedPredictionConfig
from tests.objectives.test_best_rq import LINGUISTIC, SEMANTIC, batch

BITS = [(8, 8), (4, 4), (2, 4)]
CONFIGS = {"linguistic": LINGUISTIC, "semantic": SEMANTIC}


def recordings(seed):
    made = batch(3, seed=seed)
    return [x[:n] for x, n in zip(made["audio"], made["audio_lengths"], strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_more_bits_keep_more_tokens(name):
    tokenizer = CONFIGS[name].make(nnx.Rngs(0))
    calibration, held_out = recordings(0), sum(map(recordings, range(1, 4)), [])
    if name == "linguistic":  # its codes are fitted to features
        made = QuantizedSpeech(tokenizer, calibration)(
            quantized_speech.features, calibration, (0, 0)
        )
        tokenizer.codebook[...] = np.concatenate(made)[:44:11]
    found = token_agreement(QuantizedSpeech(tokenizer, calibration), held_out, BITS)
    shares = [one["agreement"] for one in found]
    assert shares[0] > 0.9 and shares[0] >= shares[1] >= shares[2]
    assert shares[2] < shares[0]
    for one in found:
        assert 0.0 < one["usage"] <= 1.0 and one["plain_usage"] == found[0]["plain_usage"]


def test_batches_change_nothing():
    """Neither the padding nor the neighbours; and pretraining has the encoder of its tokenizer."""
    pretraining = MaskedPredictionConfig(SEMANTIC, num_labels=8).make(nnx.Rngs(0))
    tokenizer, calibration = pretraining.tokenizer, recordings(0)
    some = [*recordings(1), np.tile(recordings(2)[0], 3), np.zeros(0, np.float32)]
    speech = QuantizedSpeech(pretraining, calibration)
    features = speech(quantized_speech.features, some, (4, 4))
    alone = QuantizedSpeech(tokenizer, calibration, batch_seconds=1.0)
    for number, samples in enumerate(some):
        (one,) = alone(quantized_speech.features, [samples], (4, 4))
        np.testing.assert_allclose(features[number], one, atol=2e-5)


def test_without_recordings_to_calibrate_on():
    tokenizer = SEMANTIC.make(nnx.Rngs(0))
    with pytest.raises(UserError, match="no data to take ranges from"):
        QuantizedSpeech(tokenizer, [])
    speech = QuantizedSpeech(tokenizer, recordings(0))
    with pytest.raises(UserError, match="9 bits"):
        token_agreement(speech, recordings(1), [(9, 4)])
