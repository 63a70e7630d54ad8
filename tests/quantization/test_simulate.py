"""Ranges, quantised forwards and what is left behind, on the layers this project has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.quantization import fake_quant, simulate
from t5x_audio.quantization.rules import Rules, find
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.whisper import BlockConfig, Blocks
from t5x_audio.training.checkpoints import named_arrays
from t5x_audio.vocoder import layers as vocoder_layers
from t5x_audio.vocoder.convolution import Convolution


class Net(nnx.Module):
    """A convolution and a dense layer, each with what follows it."""

    def __init__(self, rngs):
        self.first = Convolution(3, 4, 3, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.first(x)))


class Stack(nnx.Module):
    """Layers of the vocoder, run by its scan."""

    def __init__(self, rngs):
        def make(rngs):
            return vocoder_layers.linear(4, 4, ("embed", "mlp"), dtype="float32", rngs=rngs,
                                         stacked=1)  # fmt: skip

        self.layers = vocoder_layers.stack(make, 3, rngs)

    def __call__(self, x):
        return vocoder_layers.run_stack(self.layers, lambda layer, x, _: jnp.tanh(layer(x)), x)


ALL = Rules(weights=((".*kernel", None),), activations=(("first", 8), ("last", None)))


def net():
    return Net(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 5, 3))


def test_the_quantised_forward_is_what_one_would_write():
    model, x = net()
    with simulate.observing(model, ALL) as ranges:
        plain = model(x)
    np.testing.assert_allclose(ranges["last"], [plain.min(), plain.max()], rtol=1e-6)
    with simulate.quantized(model, ALL, ranges, (3, 4)):
        got = model(x)
    weights = {n: fake_quant.quantize_weight(getattr(model, n).kernel[...], 3)
               for n in ("first", "last")}  # fmt: skip
    pad = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    hidden = sum(pad[:, k : k + 5] @ weights["first"][k] for k in range(3))
    hidden = fake_quant.quantize_activation(hidden, ranges["first"], 8)
    want = jax.nn.relu(hidden) @ weights["last"]
    want = fake_quant.quantize_activation(want, ranges["last"], 4)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got - plain).max() > 1e-3


def test_nothing_is_left_behind_even_after_an_error():
    model, x = net()
    before = nnx.split(model)
    with simulate.observing(model, ALL) as ranges:
        model(x)
    with pytest.raises(ZeroDivisionError), simulate.quantized(model, ALL, ranges, (2, 4)):
        raise ZeroDivisionError
    after = nnx.split(model)
    assert before[0] == after[0] and type(model.first) is Convolution
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


def test_gradients_reach_the_weights_through_the_quantised_forward():
    model, x = net()
    graphdef, params = nnx.split(model)

    def loss(params):
        live = nnx.merge(graphdef, params)
        with simulate.observing(live, ALL) as ranges:
            live(x)
        with simulate.quantized(live, ALL, ranges, (4, 4)):
            return jnp.sum(live(x) ** 2)

    grads = named_arrays(jax.jit(jax.grad(loss))(params))
    assert all(np.abs(grads[f"{n}/kernel"]).max() > 0 for n in ("first", "last"))


MODELS = {
    "sanm": (
        lambda: SanmConfig(6, num_layers=3, width=8, num_heads=2, mlp_dim=8).make(nnx.Rngs(0)),
        lambda m, x: m(x, jnp.array([4, 4])),
        "(first|rest)/(attention_norm|mlp_norm|up|qkv)",
        "(first|rest)/(qkv|out|up|down)/kernel",
        ("rest/up", "rest/mlp_norm"),
        2,
    ),
    "whisper": (
        lambda: Blocks(3, BlockConfig(6, 2, 8, "float32"), nnx.Rngs(0)),
        lambda m, x: m(x, jnp.ones((2, 4), bool)),
        "stack/(attention_norm|mlp_norm|up)",
        "stack/.*/kernel",
        ("stack/up", "stack/mlp_norm"),
        3,
    ),
    "transformer": (
        lambda: TransformerConfig(
            num_layers=3, embed=8, mlp=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=6,
            dtype="float32",
        ).make(nnx.Rngs(0)),
        lambda m, x: m((jnp.abs(x[..., 0]) * 3).astype(jnp.int32)),
        "layers/(attention_norm|mlp_norm)",
        "layers/(query|key|value|out|gate|up|down)|head",
        ("layers/mlp_norm",),
        3,
    ),
    "vocoder": (lambda: Stack(nnx.Rngs(0)), lambda m, x: m(x[..., :4]), "layers",
                "layers/kernel", ("layers",), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_stacked_layers_have_ranges_and_scales_of_their_own(name):
    make, forward, outputs, weights, stacked, count = MODELS[name]
    model, x = make(), jax.random.normal(jax.random.key(2), (2, 4, 6))
    rules = Rules(weights=((weights, None),), activations=((outputs, None),))
    ranges = simulate.calibrate(model, rules, [x], forward)
    for path in stacked:
        assert ranges[path].shape == (count, 2)
        assert len(np.unique(ranges[path][:, 1])) == count
    for path, weight in find(model, rules)[0].items():
        if any(path.startswith(s.split("/")[0]) for s in stacked):
            assert weight.channel_axes[0] == 0, path
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, ranges, bits):
        live = nnx.merge(graphdef, state)
        plain = forward(live, x)
        with simulate.quantized(live, rules, ranges, (bits, bits)):
            return plain, forward(live, x)

    errors = []
    for bits in (3, 8, 12):
        plain, low = run(state, ranges, float(bits))
        errors.append(float(jnp.abs(plain - low).mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0
    assert run._cache_size() == 1


def test_calibration_joins_batches_and_refuses_bad_ones():
    model, x = net()
    joint = simulate.calibrate(model, ALL, [x, 3 * x])
    with simulate.observing(model, ALL) as ranges:
        model(x)
        model(3 * x)
    np.testing.assert_allclose(joint["last"], ranges["last"], rtol=1e-6)
    with pytest.raises(UserError, match="no data"):
        simulate.calibrate(model, ALL, [])
    with pytest.raises(UserError, match="first: .* constant"):
        simulate.calibrate(model, ALL, [0 * x])
    with pytest.raises(UserError, match="first: .* not finite"):
        simulate.calibrate(model, ALL, [jnp.nan * x])
    rules = Rules(activations=(("first", None), ("last", None)))
    with pytest.raises(UserError, match="last: nothing was observed"):
        simulate.calibrate(model, rules, [x], lambda m, x: m.first(x))


def test_bits_and_ranges_are_checked():
    model, x = net()
    ranges = simulate.calibrate(model, ALL, [x])
    for bits, name in (((1, 8), "bits of weights"), ((8, 9), "bits of activations")):
        with pytest.raises(UserError, match=name), simulate.quantized(model, ALL, ranges, bits):
            pass
    bad = ranges | {"first": jnp.array([jnp.nan, 1.0])}
    with pytest.raises(UserError, match="first: .* not finite"):  # noqa: SIM117
        with simulate.quantized(model, ALL, bad, (8, 8)):
            pass
    del ranges["last"]
    with pytest.raises(UserError, match="last: has no range"):  # noqa: SIM117
        with simulate.quantized(model, ALL, ranges, (8, 8)):
            pass


def test_the_first_rule_that_fits_decides_and_idle_rules_are_refused():
    model, _ = net()
    rules = Rules(weights=(("first/kernel", 8), ("last/kernel", 0)))
    weights, outputs = find(model, rules)
    assert {n: w.bits for n, w in weights.items()} == {"first/kernel": 8} and not outputs
    with pytest.raises(UserError, match="'stem/.*' matches no layer: it fits none"):
        find(model, Rules(weights=(("stem/.*", 8),)))
    with pytest.raises(UserError, match="'first' matches no layer: an earlier rule"):
        find(model, Rules(activations=((".*st", 8), ("first", 4))))
    with pytest.raises(UserError, match="first/bias .* is no kernel"):
        find(model, Rules(weights=((".*bias", None),)))
    with pytest.raises(UserError, match="'first': 9 bits"):
        Rules(activations=(("first", 9),))
    with pytest.raises(UserError, match="is no pattern"):
        Rules(activations=(("(", 8),))
