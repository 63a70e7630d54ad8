"""The metrics of next-token cross-entropy by hand, and word dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.objectives.language_modeling import LanguageModeling

BATCH, LENGTH, EMBED, VOCAB = 2, 12, 8, 20


@functools.cache
def model():
    config = TransformerConfig(
        num_layers=1, embed=8, mlp=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=VOCAB,
        init_std=0.5, dtype="float32", remat="none",
    )  # fmt: skip
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(config.make(nnx.Rngs(0))))())


def evaluate(objective, data):
    """(loss, metrics) in one compiled program per objective."""
    graphdef, state = nnx.split(model())
    return _evaluate(graphdef, objective)(state, data)


@functools.cache
def _evaluate(graphdef, objective):
    return jax.jit(lambda state, data: objective(nnx.merge(graphdef, state), data, None, False))


def batch():
    rng = np.random.default_rng(1)
    weights = np.ones((BATCH, LENGTH), np.float32)
    weights[0, :5] = 0
    return {
        "tokens": rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32),
        "targets": rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32),
        "weights": weights,
        "segment_ids": np.ones((BATCH, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
    }


def test_metrics():
    data = batch()
    objective = LanguageModeling(text_size=8, linguistic_size=4, semantic_size=6)
    loss, metrics = evaluate(objective, data)
    graphdef, state = nnx.split(model())
    logits = np.asarray(jax.jit(lambda s: nnx.merge(graphdef, s)(data["tokens"]))(state))
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    losses = -np.take_along_axis(log_probs, data["targets"][..., None], -1)[..., 0]
    weights = data["weights"]
    np.testing.assert_allclose(loss, (losses * weights).sum() / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-5)
    right = (logits.argmax(-1) == data["targets"]) * weights
    np.testing.assert_allclose(metrics["accuracy"], (right.sum(), weights.sum()))
    np.testing.assert_allclose(metrics["tokens"][0], weights.sum())
    for stream, (start, stop) in {
        "text": (0, 8), "linguistic": (8, 12), "semantic": (12, 18),
    }.items():  # fmt: skip
        counted = weights * ((data["targets"] >= start) & (data["targets"] < stop))
        expected = ((losses * counted).sum(), counted.sum())
        np.testing.assert_allclose(metrics[f"loss_{stream}"], expected, rtol=1e-5)


def test_perplexities_are_those_of_the_losses_that_are_there():
    derived = LanguageModeling().derived({"loss": 2.0, "loss_semantic": 1e4, "accuracy": 0.5})
    assert derived == {
        "perplexity": pytest.approx(np.e**2), "perplexity_semantic": pytest.approx(np.e**100)
    }  # fmt: skip


def test_targets_without_weight_do_not_count():
    data = batch()
    changed = data | {"targets": np.where(data["weights"] > 0, data["targets"], 0)}
    objective = LanguageModeling()
    np.testing.assert_allclose(evaluate(objective, data)[0], evaluate(objective, changed)[0])


def test_a_batch_of_padding_is_no_nan():
    data = batch()
    data["weights"] = np.zeros_like(data["weights"])
    loss, metrics = evaluate(LanguageModeling(), data)
    assert float(loss) == 0
    assert float(metrics["loss"][1]) == 0


class _Recorder:
    """Stands for a model: keeps the tokens that it is given."""

    def __init__(self):
        self.head_kernel = jnp.zeros((EMBED, VOCAB))

    def hidden(self, tokens, positions, segment_ids):
        self.tokens = np.asarray(tokens)
        return jnp.zeros((*tokens.shape, EMBED)), None


def test_word_dropout_replaces_audio_tokens_of_the_input_in_training():
    data = batch()
    tokens = np.random.default_rng(2).integers(0, VOCAB, (64, LENGTH)).astype(np.int32)
    data = {key: np.resize(value, tokens.shape) for key, value in data.items()} | {"tokens": tokens}
    sizes = dict(text_size=8, linguistic_size=4, semantic_size=6)
    stream = np.searchsorted([8, 12, 18], np.arange(VOCAB), side="right")

    def seen(train, seed=0, share=0.5):
        model, objective = _Recorder(), LanguageModeling(word_dropout=share, **sizes)
        objective(model, data, jax.random.key(seed), train)
        return model.tokens

    np.testing.assert_array_equal(seen(train=False), tokens)
    given = seen(train=True)
    np.testing.assert_array_equal(stream[given], stream[tokens])
    audio = (stream[tokens] == 1) | (stream[tokens] == 2)
    np.testing.assert_array_equal(given[~audio], tokens[~audio])
    # Half are dropped, and some of those draw themselves: 1 in 4 or 6.
    assert 0.3 < np.mean(given[audio] != tokens[audio]) < 0.5
    assert np.unique(given[stream[given] == 2]).tolist() == list(range(12, 18))
    np.testing.assert_array_equal(seen(train=True), given)
    assert (seen(train=True, seed=1) != given).any()


@pytest.mark.parametrize("settings", [{"word_dropout": 1.0}, {"word_dropout": 0.1}])
def test_word_dropout_needs_a_share_and_the_streams(settings):
    with pytest.raises(UserError, match="word_dropout"):
        LanguageModeling(**settings)
