"""Embeddings of a frozen encoder in place of tokens, and nothing where there are none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.objectives.language_modeling import LanguageModeling
from t5x_audio.training import checkpoints

PLAIN = TransformerConfig(
    num_layers=2, embed=12, mlp=20, num_heads=6, num_kv_heads=2, head_dim=4, vocab_size=29,
    init_std=0.4, dtype="float32", remat="none", attention_block=8,
)  # fmt: skip
CONFIG = dataclasses.replace(PLAIN, soft_width=5)


def make(config=CONFIG):
    return jax.jit(lambda: config.make(nnx.Rngs(0)))()


def batch(width=5):
    random = np.random.default_rng(0)
    tokens = random.integers(0, 29, (2, 10)).astype(np.int32)
    index = np.full((2, 10), -1, np.int32)
    index[0, 2:5], index[1, [1, 8]] = [0, 1, 2], [1, 0]
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "weights": np.ones((2, 10), np.float32),
        "segment_ids": np.ones((2, 10), np.int32),
        "positions": np.tile(np.arange(10, dtype=np.int32), (2, 1)),
        "soft_embeddings": random.standard_normal((2, 4, width)).astype(np.float16),
        "soft_index": index,
    }


def test_they_stand_where_the_index_says():
    """A model that has the projected embeddings as rows of its table computes the same."""
    model, given = make(), batch()
    soft = (given["soft_embeddings"], given["soft_index"])
    hidden, _ = model.hidden(given["tokens"], soft=soft)
    projected = given["soft_embeddings"].astype(np.float32) @ np.asarray(model.soft_projector[...])
    tokens = given["tokens"].copy()
    rows = [np.asarray(model.embedding[...])]
    for row, at in np.argwhere(given["soft_index"] >= 0):
        tokens[row, at] = sum(map(len, rows))
        rows.append(projected[row, given["soft_index"][row, at]][None])
    model.embedding = nnx.Param(jnp.concatenate(rows))
    np.testing.assert_allclose(hidden, model.hidden(tokens)[0], rtol=1e-5, atol=1e-5)


def test_a_prompt_with_an_image_fills_the_cache():
    model, given = make(), batch()
    embeddings, index = given["soft_embeddings"], given["soft_index"]
    whole, _ = model.hidden(given["tokens"], soft=(embeddings, index))
    prompt, cache = model.hidden(
        given["tokens"][:, :9], cache=model.init_cache(2, 16), soft=(embeddings, index[:, :9])
    )
    last, _ = model.hidden(given["tokens"][:, 9:], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([prompt, last], 1), whole, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_projector_and_no_row_that_was_replaced():
    graphdef, params = nnx.split(make())
    given = batch()
    given["tokens"][given["soft_index"] >= 0] = 28
    given["tokens"][given["soft_index"] < 0] %= 28

    def loss(params, given):
        return LanguageModeling()(nnx.merge(graphdef, params), given, None, train=True)[0]

    gradients = jax.grad(loss)(params, given)
    assert np.abs(gradients["soft_projector"][...]).max() > 1e-3
    rows = np.abs(gradients["embedding"][...]).max(1)
    assert rows[28] == 0 and rows[given["tokens"][0, 0]] > 0
    del given["soft_embeddings"], given["soft_index"]
    gradients = jax.grad(loss)(params, given)
    assert not np.asarray(gradients["soft_projector"][...]).any()


def test_without_them_nothing_is_other():
    plain, soft = (nnx.state(make(config)) for config in (PLAIN, CONFIG))
    assert set(plain) == {"embedding", "layers", "final_norm", "head"}
    assert set(soft) - set(plain) == {"soft_projector"}
    assert soft["soft_projector"].get_metadata()["logical_axes"] == (None, "embed")
    # A configuration that was written before there was the field.
    written = checkpoints.encode_config(PLAIN)
    del written["fields"]["soft_width"]
    assert checkpoints.decode_config(written) == PLAIN


@pytest.mark.parametrize("config", [PLAIN, CONFIG])
def test_another_width_is_told_before_anything_is_compiled(config):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))

    def loss(params, given):
        return LanguageModeling()(nnx.merge(graphdef, params), given, None, train=True)

    message = f"soft tokens of width 7 and the model soft_width={config.soft_width}"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(loss, params, batch(width=7))
