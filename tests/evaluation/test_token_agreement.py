"""Tokens of a quantised tokenizer beside those of the plain one."""

import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.evaluation.token_agreement import token_agreement
from t5x_audio.objectives.masked_ssql import linguistic_rules, semantic_rules
from tests.objectives.test_best_rq import LINGUISTIC, SEMANTIC, batch

BITS = [(8, 8), (4, 4), (2, 4)]
CASES = {"linguistic": (LINGUISTIC, linguistic_rules), "semantic": (SEMANTIC, semantic_rules)}


def recordings(seed):
    made = batch(3, seed=seed)
    return made["audio"], made["audio_lengths"]


@pytest.mark.parametrize("name", CASES)
def test_more_bits_keep_more_tokens(name):
    config, rules = CASES[name]
    tokenizer = config.make(nnx.Rngs(0))
    batches = [recordings(seed) for seed in range(4)]
    if name == "linguistic":  # its codes are fitted to features
        features = tokenizer.encode_frames(*batches[0])[0]
        tokenizer.codebook[...] = features.reshape(-1, features.shape[-1])[:44:11]
    found = token_agreement(tokenizer, rules(""), batches[:1], batches[1:], BITS)
    shares = [one["agreement"] for one in found]
    assert shares[0] > 0.9 and shares[0] >= shares[1] >= shares[2]
    assert shares[2] < shares[0]
    for one in found:
        assert 0.0 < one["usage"] <= 1.0 and one["plain_usage"] == found[0]["plain_usage"]


def test_without_recordings_to_calibrate_on():
    tokenizer = SEMANTIC.make(nnx.Rngs(0))
    with pytest.raises(UserError, match="no data to take ranges from"):
        token_agreement(tokenizer, semantic_rules(""), [], [recordings(0)], BITS)
