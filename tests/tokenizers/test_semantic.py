import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.tokenizers import vector_quantizer, whisper
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig

CONFIG = SemanticTokenizerConfig(
    16, 2, 24, 2, codebook_size=16, num_supervision_layers=1, text_size=11
)


@pytest.fixture(scope="module")
def model():
    model = CONFIG.make(nnx.Rngs(0))
    # An untrained encoder says much the same everywhere: codes drawn from it tell frames apart.
    hidden, _ = jax.jit(lambda x, n: model.hidden(*model.features(x, n)))(
        audio(16000), jnp.array([16000])
    )
    model.quantizer.codes[...] = vector_quantizer.normalize(hidden[0, :16])
    return model


def audio(length):
    return np.random.default_rng(0).normal(size=(1, length)).astype(np.float32) * 0.1


@pytest.mark.parametrize("length", [16159, 15900])
def test_codes_come_every_40_ms_and_ignore_padding(model, length):
    encode = jax.jit(lambda x, n: model.encode(x, n))
    x = audio(length)
    codes, counts = encode(x, jnp.array([length]))
    count = int(counts[0])
    assert abs(count - 25 * length / 16000) <= 1 and codes.shape == (1, count)
    padded = np.concatenate([x, 3 * audio(7777)], axis=1)
    longer, counts = encode(padded, jnp.array([length]))
    assert int(counts[0]) == count
    np.testing.assert_array_equal(longer[:, :count], codes)
    assert len(np.unique(codes)) > 1


@pytest.mark.parametrize("length", [8, 9])
def test_strided_convolution_is_the_convolution(length):
    layer = whisper.StridedConvolution(5, 7, "float32", nnx.Rngs(0))
    layer.bias[...] = jnp.arange(7.0)
    x = jax.random.normal(jax.random.key(0), (2, length, 5))
    got, lengths = layer(x, jnp.array([length, 4]))
    want = jax.lax.conv_general_dilated(
        x, layer.kernel[...], (2,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    want = jax.nn.gelu(want + layer.bias[...], approximate=False)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_array_equal(lengths, [want.shape[1], 2])
    masked = layer(x.at[1, 4:].set(0), jnp.array([length, length]))[0]
    np.testing.assert_allclose(got[1], masked[1], atol=1e-6)


def test_block_agrees_with_plain_numpy():
    config = whisper.BlockConfig(16, 2, 24)
    block = whisper.Block(config, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def linear(x, module):
        bias = 0.0 if module.bias is None else np.asarray(module.bias[...])
        return x @ np.asarray(module.kernel[...]) + bias

    assert block.key.bias is None
    h = norm(x)
    query, key, value = (linear(h, m) for m in (block.query, block.key, block.value))
    mixed = np.zeros_like(value)
    for part in (slice(0, 8), slice(8, 16)):
        weights = np.exp(query[:, part] @ key[:, part].T / np.sqrt(8))
        mixed[:, part] = weights / weights.sum(-1, keepdims=True) @ value[:, part]
    want = x + linear(mixed, block.out)
    hidden = np.asarray(jax.nn.gelu(linear(norm(want), block.up), approximate=False))
    want = want + linear(hidden, block.down)
    got = block(jnp.asarray(x)[None], jnp.ones((1, 7), bool))
    np.testing.assert_allclose(got[0], want, atol=2e-5)


def test_the_published_graph_has_its_parameter_count():
    config = SemanticTokenizerConfig(num_supervision_layers=0, text_size=0)
    abstract = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    assert abstract.quantizer.codes.shape == (4096, 1280)
    params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param)))
    # The published file has about 130.6 million with its codebook.
    assert params + 4096 * 1280 == pytest.approx(130.6e6, rel=0.01)
