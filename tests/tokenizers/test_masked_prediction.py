"""Labels of the random-projection quantiser, against numpy and under padding."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.tokenizers import masked_prediction
from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.masked_prediction import MaskedPredictionConfig
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig


def labels_in_float64(features, lengths, projection, codes, stack):
    """-> (labels of every utterance, how far the best code is nearer than the second best)."""
    rows, margins = [], []
    for row, length in zip(np.asarray(features, np.float64), lengths, strict=True):
        row = row[:length]
        row = (row - row.mean(0)) / np.sqrt(row.var(0) + 1e-5)
        row = np.concatenate([row, np.zeros((-length % stack, row.shape[1]))])
        projected = row.reshape(-1, stack * row.shape[1]) @ np.asarray(projection, np.float64)
        projected /= np.linalg.norm(projected, axis=1, keepdims=True)
        distance = np.linalg.norm(projected[:, None] - np.asarray(codes, np.float64), axis=-1)
        rows.append(distance.argmin(1))
        margins.append(np.diff(np.sort(distance, axis=1)[:, :2], axis=1)[:, 0])
    return rows, margins


@pytest.mark.parametrize("stack", [1, 4])
def test_labels_agree_with_float64(stack):
    rng = np.random.default_rng(0)
    # Offsets and scales such as filter banks have.
    features = rng.normal(size=(3, 41, 20)) * rng.uniform(0.5, 4, 20) + rng.uniform(-9, 9, 20)
    lengths = np.array([41, 23, 4])
    projection, codes = rng.normal(size=(stack * 20, 6)), rng.normal(size=(32, 6))
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    arrays = [jnp.asarray(x, jnp.float32) for x in (features, projection, codes)]
    got, counts = masked_prediction.random_projection_labels(
        arrays[0], jnp.asarray(lengths), *arrays[1:], stack
    )
    want, margins = labels_in_float64(features, lengths, projection, codes, stack)
    assert got.shape == (3, -(-41 // stack)) and len(set(np.concatenate(want))) > 10
    for row, count, truth, margin in zip(got, counts, want, margins, strict=True):
        clear = margin > 1e-4
        assert count == len(truth) and clear.mean() > 0.9
        np.testing.assert_array_equal(np.asarray(row)[:count][clear], truth[clear])


def test_labels_ignore_padding_level_and_neighbours():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(2, 30, 8)), jnp.float32)
    projection = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
    codes = masked_prediction.normalize(jnp.asarray(rng.normal(size=(16, 4))))
    lengths = jnp.array([30, 18])
    both, counts = masked_prediction.random_projection_labels(
        features, lengths, projection, codes, 4
    )
    alone = jnp.pad(features[1:, :18], ((0, 0), (0, 15), (0, 0)), constant_values=7.0)
    alone, count = masked_prediction.random_projection_labels(
        3.0 * alone + 5.0, lengths[1:], projection, codes, 4
    )
    assert int(counts[1]) == int(count[0]) == 5
    np.testing.assert_array_equal(both[1, :5], alone[0, :5])


CONFIGS = {
    "linguistic": MaskedPredictionConfig(
        LinguisticTokenizerConfig(
            SanmConfig(num_layers=1, width=8, num_heads=2, mlp_dim=8), 4, text_size=0
        ),
        num_labels=16,
        label_dim=4,
    ),
    "semantic": MaskedPredictionConfig(
        SemanticTokenizerConfig(8, 2, 8, 1, 4, 0, text_size=0), num_labels=16, label_dim=4
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("samples", [16000, 15900, 16159, 9999])
def test_there_is_a_label_for_every_code(name, samples):
    model = CONFIGS[name].make(nnx.Rngs(0))
    audio = np.random.default_rng(0).normal(size=(1, samples)).astype(np.float32)
    features, lengths = model.tokenizer.features(audio, jnp.array([samples]))
    labels, counts = model.labels(features, lengths)
    hidden = model.hidden(features, lengths)
    _, codes = model.tokenizer.encode(audio, jnp.array([samples]))
    assert labels.shape == hidden.shape[:2] and int(counts[0]) == int(codes[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_quantiser_follows_the_seed_and_is_no_parameter(name):
    one, same, other = (CONFIGS[name].make(nnx.Rngs(seed)) for seed in (0, 0, 1))
    for field in ("projection", "codes"):
        array = getattr(one, field)[...]
        np.testing.assert_array_equal(array, getattr(same, field)[...])
        assert np.abs(array - getattr(other, field)[...]).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(one.codes[...], axis=1), 1.0, rtol=1e-5)
    params = nnx.to_flat_state(nnx.state(one, nnx.Param))
    assert not {path[0] for path, _ in params} & {"projection", "codes"}


def test_parts_that_nothing_would_train_are_refused():
    with pytest.raises(UserError, match="set its text_size and num_supervision_layers to 0"):
        MaskedPredictionConfig(SemanticTokenizerConfig())
