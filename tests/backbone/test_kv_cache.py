"""The cache in 8 bits: what is read is nearly what was written, and a decoder hardly notices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.backbone import decoding, decoding_weights, kv_cache
from t5x_audio.backbone.decoding import Decoder, Sampling
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError

CONFIG = TransformerConfig(
    num_layers=2, embed=32, mlp=64, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=40,
    dtype="float32", remat="none", init_std=0.2,
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(
    size=st.floats(1e-6, 1e6),
    slot=st.integers(0, 5),
    index=st.sampled_from([None, 0, 2]),
    batch=st.integers(1, 2),
)
def test_what_is_written_is_read(size, slot, index, batch):
    new = size * np.random.default_rng(slot).normal(size=(batch, 2, 3, 4)).astype(np.float32)
    new[0, 0, 1] = 0.0
    shape = (batch, 2, 9, 4) if index is None else (3, batch, 2, 9, 4)
    slots = kv_cache.written(kv_cache.empty(shape, "float32", "int8"), new, index, slot)
    got = kv_cache.read(slots, batch, index, "float32")
    error = np.abs(got[:, :, slot : slot + 3] - new)
    assert (error <= np.abs(new).max(-1, keepdims=True) * (0.5001 / 127)).all()
    assert not np.asarray(got[0, 0, slot + 1]).any()
    rest = np.delete(np.asarray(got), np.s_[slot : slot + 3], axis=2)
    assert not rest.any()


@pytest.mark.parametrize("unstack", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_hardly_change(unstack, batch):
    model = decoding_weights.prepare(CONFIG.make(nnx.Rngs(0)), None, unstack)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (batch, 12)))
    found = []
    for kind in (None, "int8"):
        cache = model.init_cache(batch, 16, kind)
        step = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache))
        first, cache = step(model, tokens[:, :7], cache)
        rest = []
        for place in range(7, 12):
            logits, cache = step(model, tokens[:, place : place + 1], cache)
            rest.append(logits)
        found.append(jnp.concatenate([first, *rest], axis=1))
    exact, near = found
    assert 0 < jnp.square(near - exact).mean() < 0.01**2 * jnp.square(exact).mean()


def test_a_decoder_takes_a_quarter_of_the_bytes():
    model = CONFIG.make(nnx.Rngs(0))
    sizes = {}
    for kind in (None, "int8"):
        decoder = Decoder(model, [3], cache=kind)
        rows = decoder.generate([[5, 9, 11], [7]], sampling=Sampling(temperature=0))
        assert all(len(row) for row in rows)
        arguments = decoder._graphdef, decoder._weights, *decoder._pad([[5, 9, 11]]), 8, kind
        cache, *_ = jax.eval_shape(
            lambda w, t, n, a=arguments: decoding.prefill(a[0], w, t, n, *a[4:]), *arguments[1:4]
        )
        leaves = jax.tree.leaves((cache.keys, cache.values))
        sizes[kind] = sum(x.size * x.dtype.itemsize for x in leaves)
    head_dim = CONFIG.head_dim
    assert sizes["int8"] / sizes[None] == (head_dim + 4) / (4 * head_dim)


def test_no_such_kind():
    with pytest.raises(UserError, match="cache='int3': use None or int8"):
        Decoder(CONFIG.make(nnx.Rngs(0)), [3], cache="int3")
