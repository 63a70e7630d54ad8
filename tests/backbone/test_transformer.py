"""Step-1, and the options that make it Llama, Qwen2 or Qwen3, against an independent float64 numpy
forward written from the published equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.backbone import decoding_weights, remat
from t5x_audio.backbone.rope import Llama3Scaling
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.training.flops import count_flops

VOCAB = 29
CONFIG = TransformerConfig(
    num_layers=2, embed=12, mlp=20, num_heads=6, num_kv_heads=2, head_dim=4, vocab_size=VOCAB,
    init_std=0.4, dtype="float32", remat="none", attention_block=8,
)  # fmt: skip
LENGTHS = (10, 7)
# Everything that Step-1 is not: Qwen2's biases, Qwen3's norms, Llama 3.1's stretched turns.
LONG = Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=16)
VARIANTS = {
    "step1": {},
    "llama": {"positions": "rope", "rope_theta": 20.0, "rope_scaling": LONG},
    "qwen2": {"positions": "rope", "qkv_bias": True, "tied_head": True},
    "qwen3": {"positions": "rope", "rope_theta": 1e6, "qk_norm": True},
    "longer": {"max_pos_interp_ratio": 4.0},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@functools.cache
def make(variant="step1"):
    weights = jax.jit(
        lambda: nnx.state(dataclasses.replace(CONFIG, **VARIANTS[variant]).make(nnx.Rngs(0)))
    )()
    # Scales away from 1 and biases from 0, so that a forgotten one shows.
    for i, (path, param) in enumerate(nnx.to_flat_state(weights)):
        if path[-1] == "scale" or path[-1].endswith("bias"):
            noise = jax.random.normal(jax.random.key(i), param[...].shape)
            param[...] = param[...] + 0.3 * noise
    return nnx.merge(other(variant), weights)


@functools.cache
def forward(variant="step1", **changes):
    """tokens, positions= and segment_ids= -> logits, of a variant with `changes`."""
    graphdef, state = other(variant, **changes), nnx.state(make(variant))
    run = jax.jit(lambda state, tokens, places: nnx.merge(graphdef, state)(tokens, **places))
    return lambda tokens, **places: run(state, tokens, places)


def other(variant="step1", **changes):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant] | changes)
    return nnx.graphdef(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))


def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def slopes_of(config):
    # 6 heads: n = 4 main slopes 2^(-8i/4), then 2^(-4k/4) for k = 1, 3.
    slopes = np.array([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    from_steepest = (-1 - np.log2(slopes)) / 7
    return slopes / config.max_pos_interp_ratio ** (from_steepest / 2)


def turn(x, config):
    """Rotates [S, D] as complex numbers, position after position."""
    half = config.head_dim // 2
    turns = config.rope_theta ** (-np.arange(half) / half)
    if config.rope_scaling:
        wavelength = 2 * np.pi / turns
        slow, fast = LONG.original_length / LONG.low_freq_factor, LONG.original_length / 4.0
        blend = (LONG.original_length / wavelength - 1.0) / (4.0 - 1.0)
        between = (1 - blend) * turns / LONG.factor + blend * turns
        turns = np.where(wavelength > slow, turns / LONG.factor, turns)
        turns = np.where((wavelength <= slow) & (wavelength >= fast), between, turns)
    angles = np.arange(len(x))[:, None] * turns
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def reference(tokens, variant="step1"):
    """Logits [S, V] of one sequence, in float64: one loop over heads, no blocks, no packing."""
    model = make(variant)
    config = model.config
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(model)))
    h = w["embedding"][tokens]
    index = np.arange(len(tokens))
    behind = index[:, None] - index[None, :]
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], w["layers"])
        x = rms(h, layer["attention_norm"]["scale"])
        attended = 0
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.num_kv_heads)
            q, k, v = (
                x @ layer[name][:, one] + (layer[f"{name}_bias"][one] if config.qkv_bias else 0)
                for name, one in (("query", head), ("key", group), ("value", group))
            )
            if config.qk_norm:
                q, k = rms(q, layer["query_norm"]["scale"]), rms(k, layer["key_norm"]["scale"])
            if config.positions == "rope":
                q, k = turn(q, config), turn(k, config)
            score = q @ k.T / np.sqrt(config.head_dim)
            if config.positions == "alibi":
                score -= slopes_of(config)[head] * np.sqrt(np.abs(behind))
            weight = np.where(behind >= 0, np.exp(score), 0)
            attended += weight / weight.sum(-1, keepdims=True) @ v @ layer["out"][head]
        h = h + attended
        x = rms(h, layer["mlp_norm"]["scale"])
        gate, up = x @ layer["gate"], x @ layer["up"]
        h = h + (gate / (1 + np.exp(-gate)) * up) @ layer["down"]
    head = w["embedding"].T if config.tied_head else w["head"]
    return rms(h, w["final_norm"]["scale"]) @ head


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@every_variant
def test_padded_batch(variant):
    rows = sequences()
    tokens = np.stack([np.pad(r, (0, 10 - len(r)), constant_values=5) for r in rows])
    segments = np.stack([(np.arange(10) < len(r)).astype(np.int32) for r in rows])
    logits = forward(variant)(tokens, segment_ids=segments)
    for row, got in zip(rows, logits, strict=True):
        close(got[: len(row)], reference(row, variant))


@every_variant
def test_packed_batch(variant):
    first, second = sequences()
    tokens = np.concatenate([first, second, [0, 0, 0]])[None]
    segments = np.array([[1] * 10 + [2] * 7 + [0] * 3], np.int32)
    positions = np.array([[*range(10), *range(7), 0, 0, 0]], np.int32)
    logits = forward(variant)(tokens, positions=positions, segment_ids=segments)[0]
    close(logits[:10], reference(first, variant))
    close(logits[10:17], reference(second, variant))


@pytest.mark.parametrize(
    ("variant", "stacked"),
    [("step1", True), ("step1", False), ("llama", False), ("qwen2", True), ("qwen3", False)],
)
def test_prefill_and_steps(variant, stacked):
    model = make(variant) if stacked else decoding_weights.prepare(make(variant))
    graphdef, state = nnx.split(model)
    step = jax.jit(lambda s, tokens, cache: nnx.merge(graphdef, s)(tokens, cache=cache))
    tokens = sequences()[0]
    logits, cache = step(state, tokens[None, :6], model.init_cache(1, 16))
    pieces = [logits[0]]
    for i in range(6, 10):
        logits, cache = step(state, tokens[None, i : i + 1], cache)
        pieces.append(logits[0])
    assert int(cache.length) == 10
    close(np.concatenate(pieces), reference(tokens, variant))


@pytest.mark.parametrize("policy", [policy for policy in remat.POLICIES if policy != "none"])
def test_remat_and_unrolling_change_nothing(policy):
    tokens, weights = sequences()[0][None, :8], nnx.state(make())

    def gradients(**changes):
        graphdef = other(**changes)

        def loss(state):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(tokens)))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(weights))

    plain = gradients()
    unroll = 2 if policy == "full" else 1
    for a, b in zip(plain, gradients(remat=policy, scan_unroll=unroll), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_more_is_kept_the_less_is_computed_again():
    tokens, weights = sequences()[0][None, :8], nnx.state(make())

    def flops(policy):
        graphdef = other(remat=policy)

        def loss(state):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(tokens)))

        return count_flops(jax.grad(loss), weights)

    order = ["full", "attention", "projections", "residual", "products", "all_products"]
    counts = [flops(policy) for policy in order]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == len(counts)
    assert counts[-1] == flops("offload") == flops("none")


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


@every_variant
def test_every_parameter_names_its_axes(variant):
    for path, param in nnx.to_flat_state(nnx.state(make(variant), nnx.Param)):
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
        ({"alibi_slopes": (1.0,) * 5 + (0.0,)}, "alibi_slopes must be above 0"),
        ({"positions": "learned"}, "positions='learned'"),
        ({"max_pos_interp_ratio": 0.5}, "max_pos_interp_ratio=0.5"),
    ],
)
def test_bad_configurations(change, culprit):
    with pytest.raises(UserError, match=culprit):
        dataclasses.replace(CONFIG, **change)
