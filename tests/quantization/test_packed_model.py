"""Models with packed weights: the same classes, the numbers of fake quantisation, fewer bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.backbone import decoding, decoding_weights
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.quantization.fake_quant import quantize_weight
from t5x_audio.quantization.packed_model import (
    LANGUAGE_MODEL,
    PackedConfig,
    PackedParam,
    packed_model,
)
from t5x_audio.quantization.rules import Rules
from t5x_audio.quantization.simulate import quantized
from t5x_audio.training import checkpoints
from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.convolution import length_mask

CONFORMER = ConformerConfig(width=16, num_layers=2, num_heads=2, mlp_dim=24, dropout=0.0)


def encode(model) -> np.ndarray:
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    graph, state = nnx.split(model)
    call = jax.jit(lambda s, x: nnx.merge(graph, s)(x, length_mask(jnp.array([5, 9]), 9)))
    return np.asarray(call(state, x))


@pytest.mark.parametrize("bits", [8, 3])
def test_stacked_layers_serve_packed_what_fake_quantisation_gives(bits):
    config = PackedConfig(CONFORMER, bits)
    model = CONFORMER.make(nnx.Rngs(0))
    with quantized(model, config.rules, {}, (bits, 8)):
        want = encode(model)
    packed = packed_model(model, config)
    assert isinstance(packed.layers.up.kernel, PackedParam)
    np.testing.assert_allclose(encode(packed), want, atol=2e-5)


def test_a_checkpoint_of_packed_weights(tmp_path):
    """It is loaded as it was saved, in about as many bytes as the integers take."""
    config = PackedConfig(CONFORMER, 4, group=8)
    model = packed_model(CONFORMER.make(nnx.Rngs(0)), config)
    want = encode(model)
    checkpoints.save_model(tmp_path, {"model": config}, {"model": model})
    loaded = checkpoints.load_model(tmp_path)
    assert checkpoints.load_config(tmp_path) == config and config.width == 16
    np.testing.assert_array_equal(encode(loaded), want)
    types = checkpoints.array_types(tmp_path)
    assert types["params/layers/up/kernel/0"] == np.uint8


def test_bits_of_rules_come_first():
    rules = Rules(weights=(("layers/down/kernel", 8), ("layers/(up|query)/kernel", None)))
    with pytest.raises(UserError, match="layers/.up.query./kernel|matches no layer|is no"):
        PackedConfig(CONFORMER, 2, rules=Rules(weights=(("nothing", None),))).make(nnx.Rngs(0))
    model = PackedConfig(CONFORMER, 2, rules=rules).make(nnx.Rngs(0))
    assert model.layers.down.kernel.get_raw_value().bits == 8
    assert model.layers.up.kernel.get_raw_value().bits == 2
    assert not isinstance(model.embed.kernel, PackedParam)


BACKBONE = TransformerConfig(
    num_layers=2, embed=16, mlp=24, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=32,
    dtype="float32", init_std=0.3,
)  # fmt: skip


def test_a_decoder_says_what_the_rounded_weights_say():
    """Layer by layer, as a CPU decodes."""
    config = PackedConfig(BACKBONE, 4)
    rounded, packed = (BACKBONE.make(nnx.Rngs(0)) for _ in range(2))
    for weight, bits, _ in config.weights(rounded).values():
        variable = weight.variable
        variable[...] = quantize_weight(variable[...], bits, weight.channel_axes)
    options = {"max_new_tokens": 8, "sampling": decoding.Sampling(temperature=0.0)}
    said = [
        decoding.Decoder(model, [31]).generate([[1, 2, 3], [4, 5]], **options)
        for model in (rounded, packed_model(packed, config))
    ]
    for one, other in zip(*said, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("unstack", [True, False])
def test_a_decoder_keeps_packed_weights_packed(unstack):
    """Unless another kind is asked for, which unpacks them, an embedding too."""
    config = PackedConfig(BACKBONE, 4, rules=LANGUAGE_MODEL)
    model = packed_model(BACKBONE.make(nnx.Rngs(0)), config)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 5))
    want = np.asarray(nnx.jit(lambda m: m(tokens))(model))
    for kind, within in ((None, 1e-5), ("float32", 1e-5), ("bfloat16", 3e-2), ("w8a8", 5e-2)):
        prepared = decoding_weights.prepare(model, kind, unstack)
        got = np.asarray(nnx.jit(lambda m: m(tokens))(prepared))
        assert np.abs(got - want).max() <= within * np.abs(want).max()
        layer = prepared.layers[0] if unstack else prepared.layers
        assert isinstance(layer.query, PackedParam) == (kind is None)
        assert isinstance(prepared.embedding, PackedParam) == (kind is None)


def test_attention_of_the_backbone_keeps_its_heads():
    config = BACKBONE
    model = config.make(nnx.Rngs(0))
    shapes = {name: getattr(model.layers, name)[...].shape for name in ("query", "out", "up")}
    packed = packed_model(model, PackedConfig(config, 4))
    for name, shape in shapes.items():
        parameter = getattr(packed.layers, name)
        assert isinstance(parameter, PackedParam) and parameter[...].shape == shape
