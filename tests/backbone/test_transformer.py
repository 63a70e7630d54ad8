"""Step-1 against an independent float64 numpy forward written from the published equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.backbone.transformer import TransformerConfig, unstack_layers
from t5x_audio.errors import UserError

VOCAB = 29
CONFIG = TransformerConfig(
    num_layers=2, embed=12, mlp=20, num_heads=6, num_kv_heads=2, head_dim=4, vocab_size=VOCAB,
    init_std=0.4, dtype="float32", remat="none", attention_block=8,
)  # fmt: skip
LENGTHS = (10, 7)


@functools.cache
def make():
    weights = jax.jit(lambda: nnx.state(CONFIG.make(nnx.Rngs(0))))()
    model = nnx.merge(other(), weights)
    # Scales away from 1, so that a forgotten norm weight shows.
    for i, norm in enumerate(
        (model.final_norm, model.layers.attention_norm, model.layers.mlp_norm)
    ):
        shape = norm.scale[...].shape
        norm.scale[...] = 1 + 0.3 * jax.random.normal(jax.random.key(i), shape)
    return model


@functools.cache
def forward(**changes):
    """tokens, positions= and segment_ids= -> logits, of CONFIG with `changes`."""
    graphdef, state = other(**changes), nnx.state(make())
    run = jax.jit(lambda state, tokens, places: nnx.merge(graphdef, state)(tokens, **places))
    return lambda tokens, **places: run(state, tokens, places)


def other(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return nnx.graphdef(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))


def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


def reference(tokens):
    """Logits [S, V] of one sequence, in float64: one loop over heads, no blocks, no packing."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(make())))
    heads, groups = CONFIG.num_heads, CONFIG.num_kv_heads
    # 6 heads: n = 4 main slopes 2^(-8i/4), then 2^(-4k/4) for k = 1, 3.
    slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    h = w["embedding"][tokens]
    index = np.arange(len(tokens))
    behind = index[:, None] - index[None, :]
    for i in range(CONFIG.num_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], w["layers"])
        x = rms(h, layer["attention_norm"]["scale"])
        attended = 0
        for head in range(heads):
            group = head // (heads // groups)
            q = x @ layer["query"][:, head]
            k, v = x @ layer["key"][:, group], x @ layer["value"][:, group]
            score = q @ k.T / np.sqrt(CONFIG.head_dim) - slopes[head] * np.sqrt(np.abs(behind))
            weight = np.where(behind >= 0, np.exp(score), 0)
            attended += weight / weight.sum(-1, keepdims=True) @ v @ layer["out"][head]
        h = h + attended
        x = rms(h, layer["mlp_norm"]["scale"])
        gate, up = x @ layer["gate"], x @ layer["up"]
        h = h + (gate / (1 + np.exp(-gate)) * up) @ layer["down"]
    return rms(h, w["final_norm"]["scale"]) @ w["head"]


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_padded_batch():
    rows = sequences()
    tokens = np.stack([np.pad(r, (0, 10 - len(r)), constant_values=5) for r in rows])
    segments = np.stack([(np.arange(10) < len(r)).astype(np.int32) for r in rows])
    logits = forward()(tokens, segment_ids=segments)
    for row, got in zip(rows, logits, strict=True):
        close(got[: len(row)], reference(row))


def test_packed_batch():
    first, second = sequences()
    tokens = np.concatenate([first, second, [0, 0, 0]])[None]
    segments = np.array([[1] * 10 + [2] * 7 + [0] * 3], np.int32)
    positions = np.array([[*range(10), *range(7), 0, 0, 0]], np.int32)
    logits = forward()(tokens, positions=positions, segment_ids=segments)[0]
    close(logits[:10], reference(first))
    close(logits[10:17], reference(second))


@pytest.mark.parametrize("stacked", [True, False])
def test_prefill_and_steps(stacked):
    model = make() if stacked else unstack_layers(make())
    graphdef, state = nnx.split(model)
    step = jax.jit(lambda s, tokens, cache: nnx.merge(graphdef, s)(tokens, cache=cache))
    tokens = sequences()[0]
    logits, cache = step(state, tokens[None, :6], model.init_cache(1, 16))
    pieces = [logits[0]]
    for i in range(6, 10):
        logits, cache = step(state, tokens[None, i : i + 1], cache)
        pieces.append(logits[0])
    assert int(cache.length) == 10
    close(np.concatenate(pieces), reference(tokens))


def test_remat_and_unrolling_change_nothing():
    tokens, weights = sequences()[0][None, :8], nnx.state(make())

    def gradients(**changes):
        graphdef = other(**changes)

        def loss(state):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(tokens)))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(weights))

    plain = gradients()
    for changes in ({"remat": "full", "scan_unroll": 2}, {"remat": "dots"}):
        for a, b in zip(plain, gradients(**changes), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close():
    tokens = sequences()[0]
    logits = forward(dtype="bfloat16")(tokens[None])[0]
    assert logits.dtype == jnp.float32
    want = reference(tokens)
    assert np.abs(logits - want).max() < 0.05 * np.abs(want).max()


def test_explicit_slopes_are_used():
    tokens = sequences()[0]
    steep = forward(alibi_slopes=(9.0,) * 6)(tokens[None])[0]
    assert np.abs(steep - reference(tokens)).max() > 0.1


def test_every_parameter_names_its_axes():
    for path, param in nnx.to_flat_state(nnx.state(make(), nnx.Param)):
        assert len(param.logical_axes) == param[...].ndim, path
        assert (param.logical_axes[0] == "layers") == (path[0] == "layers"), path


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({}, 131_946_590_208),
        (
            {"num_layers": 32, "embed": 3072, "mlp": 8192, "num_heads": 48, "num_kv_heads": 4}
            | {"head_dim": 64},
            3_529_706_496,
        ),
    ],
)
def test_published_sizes(sizes, count):
    model = nnx.eval_shape(lambda: TransformerConfig(**sizes).make(nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == count


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"num_kv_heads": 4}, "num_kv_heads=4"),
        ({"remat": "most"}, "remat='most'"),
        ({"alibi_slopes": (1.0,)}, "1 alibi_slopes"),
    ],
)
def test_bad_configurations(change, culprit):
    with pytest.raises(UserError, match=culprit):
        dataclasses.replace(CONFIG, **change)
