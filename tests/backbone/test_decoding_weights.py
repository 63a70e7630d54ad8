"""What a decoder reads instead of the model's own weights, and what that costs in exactness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.backbone import decoding_weights
from t5x_audio.backbone.decoding import Decoder, Sampling
from t5x_audio.backbone.integer_product import integer_product
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.cpu_weights import ByOutput
from t5x_audio.errors import UserError

CONFIG = TransformerConfig(
    num_layers=2, embed=32, mlp=64, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=40,
    dtype="float32", remat="none", init_std=0.3, qkv_bias=True, qk_norm=True,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12))


@pytest.fixture(scope="module")
def model():
    return CONFIG.make(nnx.Rngs(0))


def bytes_of(model):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(("kind", "share", "within"), [
    (None, 1.0, 1e-6), ("float32", 1.0, 1e-6), ("bfloat16", 0.5, 2e-2), ("int8", 0.35, 6e-2),
    ("w8a8", 0.35, 8e-2),
])  # fmt: skip
def test_logits_and_size(model, kind, share, within):
    prepared = decoding_weights.prepare(model, kind)
    want, got = (np.asarray(nnx.jit(lambda m: m(TOKENS))(m)) for m in (model, prepared))
    assert np.abs(got - want).max() < within * np.abs(want).max()
    assert bytes_of(prepared) <= share * bytes_of(model)
    assert prepared.config is model.config and not isinstance(prepared.layers, type(model.layers))


def test_integers_are_the_nearest(model):
    prepared = decoding_weights.prepare(model, "int8")
    for index, layer in enumerate(prepared.layers):
        whole = np.asarray(model.layers.out[...])[index].reshape(-1, CONFIG.embed)
        integers, scale = np.asarray(layer.out[...]).T, np.asarray(layer.out_scale[...])
        assert integers.dtype == np.int8 and scale.shape == (CONFIG.embed,)
        assert np.abs(integers * scale - whole).max() <= scale.max() / 2 * 1.001
        assert np.abs(integers).max(0).tolist() == [127] * CONFIG.embed  # all bits are used


def test_integers_compute_what_their_scaled_values_would(model):
    prepared = decoding_weights.prepare(model, "int8")
    widened = nnx.merge(*nnx.split(prepared))
    for module in (widened, *widened.layers):
        for name in [name for name in vars(module) if name.endswith("_scale")]:
            matrix = name.removesuffix("_scale")
            integers, scale = getattr(module, matrix)[...], getattr(module, name)[...]
            setattr(module, matrix, ByOutput(integers.astype(jnp.float32) * scale[:, None]))
            delattr(module, name)
    want, got = (np.asarray(nnx.jit(lambda m: m(TOKENS))(m)) for m in (widened, prepared))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("rows", [1, 5])
def test_products_of_integers_are_exact(rows):
    """What is rounded are the activations alone, each row by its own largest value."""
    rng = np.random.default_rng(rows)
    kernel, scale = rng.integers(-127, 128, (6, 24)), rng.uniform(0.01, 0.1, 6)
    x = rng.normal(size=(rows, 24)) * 10.0 ** rng.integers(-3, 3, (rows, 1))
    step = np.abs(x).max(1, keepdims=True) / 127.0
    product = jax.jit(integer_product)
    got = np.asarray(product(jnp.asarray(x, jnp.float32), jnp.int8(kernel), jnp.float32(scale)))
    exact = x @ (kernel * scale[:, None]).T
    bound = 0.51 * step * np.abs(kernel * scale[:, None]).sum(1)
    assert (np.abs(got - exact) <= bound).all() and got.shape == exact.shape
    assert product(jnp.zeros((2, 3, 24)), jnp.int8(kernel), jnp.float32(scale)).shape == (2, 3, 6)


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_a_column_of_zeros_stays_zero(model, kind):
    model = nnx.merge(*nnx.split(model))
    model.head[...] = model.head[...].at[:, 3].set(0.0)
    logits = decoding_weights.prepare(model, kind)(TOKENS)
    assert np.isfinite(logits).all() and not np.asarray(logits[..., 3]).any()


@pytest.mark.parametrize("unstack", [True, False])
@pytest.mark.parametrize("kind", [None, "int8", "w8a8"])
def test_every_weight_names_its_axes(model, kind, unstack):
    prepared = decoding_weights.prepare(model, kind, unstack)
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    for variable in jax.tree.leaves(nnx.state(prepared, nnx.Param), is_leaf=is_variable):
        assert len(variable.get_metadata()["logical_axes"]) == variable[...].ndim


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_stacked_layers_are_the_same(model, kind):
    apart, stacked = (decoding_weights.prepare(model, kind, unstack) for unstack in (True, False))
    want, got = (np.asarray(nnx.jit(lambda m: m(TOKENS))(m)) for m in (apart, stacked))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_decoders(model):
    options = dict(sampling=Sampling(temperature=0), max_new_tokens=8)
    want = Decoder(model, []).generate([[1, 2, 3]], **options)[0]
    assert Decoder(model, [], weights="float32").generate([[1, 2, 3]], **options)[0].tolist() == (
        want.tolist()
    )
    for kind in ("int8", "w8a8"):
        got = Decoder(model, [], weights=kind).generate([[1, 2, 3]], **options)[0]
        assert got.shape == want.shape and got[0] == want[0]


def test_other_kinds_are_refused(model):
    with pytest.raises(UserError, match="weights='int4': use one of float32, bfloat16, int8, w8a8"):
        decoding_weights.prepare(model, "int4")


def test_abstract_models_can_be_prepared():
    made = nnx.eval_shape(lambda: decoding_weights.prepare(CONFIG.make(nnx.Rngs(0)), "int8"))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(made, nnx.Param))}
    assert dtypes == {jnp.dtype("int8"), jnp.dtype("float32")}
