import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.sanm import SanmConfig

CONFIG = LinguisticTokenizerConfig(
    SanmConfig(num_layers=2, width=16, num_heads=2, mlp_dim=16),
    codebook_size=8,
    text_size=11,
    num_supervision_layers=1,
)


@pytest.fixture(scope="module")
def model():
    model = CONFIG.make(nnx.Rngs(0))
    model.codebook[...] = jax.random.normal(jax.random.key(1), model.codebook.shape)
    return model


def audio(length, batch=1):
    return np.random.default_rng(0).normal(size=(batch, length)).astype(np.float32) * 0.1


def test_codes_come_every_60_ms_and_ignore_padding(model):
    encode = jax.jit(lambda x, n: model.encode(x, n))
    x = audio(16000)
    codes, counts = encode(x, jnp.array([16000]))
    assert codes.shape == (1, 17) and int(counts[0]) == 17
    padded = np.concatenate([x, audio(8000)], axis=1)
    longer, counts = encode(padded, jnp.array([16000]))
    assert int(counts[0]) == 17
    np.testing.assert_array_equal(longer[:, :17], codes)
    assert len(np.unique(codes)) > 1


def test_codes_are_the_nearest_centres(model):
    x, n = audio(8000), jnp.array([8000])
    hidden, counts = jax.jit(lambda x, n: model.encode_frames(x, n))(x, n)
    codes, _ = jax.jit(lambda x, n: model.encode(x, n))(x, n)
    distance = np.linalg.norm(np.asarray(hidden)[:, :, None] - model.codebook[...], axis=-1)
    np.testing.assert_array_equal(codes[0, : counts[0]], distance.argmin(-1)[0, : counts[0]])


def test_statistics_are_those_of_all_valid_frames():
    model = CONFIG.make(nnx.Rngs(0))
    generator = np.random.default_rng(0)
    seen = []
    for length in (5, 9, 7):
        batch = generator.normal(3.0, 2.0, size=(2, 12, 560)).astype(np.float32)
        lengths = np.array([length, length + 2])
        normalized = model.normalize(jnp.asarray(batch), lengths, train=True)
        seen += [row[:count] for row, count in zip(batch, lengths, strict=True)]
    seen = np.concatenate(seen)
    np.testing.assert_allclose(model.mean[...], seen.mean(0), atol=1e-4)
    np.testing.assert_allclose(model.variance[...], seen.var(0), rtol=1e-3, atol=1e-4)
    assert float(model.count[...]) == len(seen)
    want = (batch - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-5)
    np.testing.assert_allclose(normalized, want, atol=1e-3)
    mean = np.asarray(model.mean[...])
    model.normalize(jnp.asarray(batch), lengths)
    np.testing.assert_array_equal(model.mean[...], mean)


def test_logits_pass_through_the_supervision_layers(model):
    hidden = jax.random.normal(jax.random.key(0), (1, 6, 16))
    logits = model.logits(hidden, jnp.array([6]))
    assert logits.shape == (1, 6, 11) and logits.dtype == jnp.float32
    assert np.abs(np.asarray(model.head(hidden) - logits)).max() > 1e-3


def test_the_published_layout_has_no_training_parts():
    config = LinguisticTokenizerConfig(text_size=0)
    state = nnx.state(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))), nnx.Param)
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    first = 560 * 1536 + 1536 + 2 * 560
    shared = 512 * 512 + 512 + 11 * 512 + 2 * 512 + 2 * 512 * 2048 + 2048 + 512
    rest = 512 * 1536 + 1536 + 2 * 512
    assert sum(sizes) == first + 49 * rest + 50 * shared + 2 * 512
