"""CAM++; its numbers against the reference are in tests/interop and tests/parity."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.vocoder import campplus
from t5x_audio.vocoder.campplus import CamPlusConfig

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "campplus.npz")
SMALL = CamPlusConfig(
    num_mels=16, embedding=6, front_channels=4, front_blocks=1, channels=8, growth=4, bottleneck=8,
    block_layers=(1, 2), block_kernels=(3, 3), block_dilations=(1, 2), segment=10,
)  # fmt: skip
FRAMES = 90  # of the features that the tests compile for


def shake(model):
    """Statistics that differ from channel to channel."""
    rng = np.random.default_rng(1)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.mean[...] = rng.normal(size=module.mean.shape)
            module.var[...] = rng.uniform(0.5, 2.0, module.var.shape)


@pytest.fixture(scope="module")
def small(build):
    """In evaluation mode."""
    model = build(SMALL, shake)
    model.eval()
    return model


@pytest.fixture(scope="module")
def published():
    """Shapes only."""
    return nnx.eval_shape(lambda: CamPlusConfig().make(nnx.Rngs(0)))


@pytest.fixture(scope="module")
def embed_features(small):
    graphdef, state = nnx.split(small)
    return jax.jit(lambda *args: nnx.merge(graphdef, state).embed_features(*args))


def noise(length, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)


def features(frames, seed=0):
    return np.random.default_rng(seed).normal(size=(frames, 16)).astype(np.float32)


def test_the_published_size(published):
    parameters = nnx.state(published, nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == 6_848_544


@settings(deadline=None, max_examples=25)
@given(st.integers(3, FRAMES), st.integers(0, 5))
def test_padding_and_neighbours_have_no_influence(embed_features, frames, seed):
    """What lies beyond the end is not even zero here."""
    one, other = features(frames, seed), features(FRAMES, seed + 1)
    batch = np.stack([other, other])
    batch[1, :frames] = one
    clean = np.zeros_like(batch)
    clean[0, :frames] = one
    got = embed_features(batch, np.array([FRAMES, frames]))
    alone = embed_features(clean, np.array([frames, 3]))
    np.testing.assert_allclose(got[1], alone[0], atol=1e-5)


def test_an_utterance_alone_is_padded_by_nothing(embed_features):
    """An array of just its length, which ends within a segment."""
    batch = np.zeros((2, FRAMES, 16), np.float32)
    batch[0, :41] = features(41)
    got = embed_features(batch, np.array([41, 3]))
    want = embed_features(batch[:1, :41], np.array([41]))
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)


def test_segments_and_deviation_by_their_definition():
    x = np.random.default_rng(0).normal(size=(1, 25, 3)).astype(np.float32)
    mask = np.ones((1, 25, 1), np.float32)
    got = campplus.segment_context(jnp.asarray(x), jnp.asarray(mask), 10)
    want = [x[0].mean(0) + part.mean(0) for part in (x[0, :10], x[0, 10:20], x[0, 20:])]
    np.testing.assert_allclose(got[0], want, atol=1e-6)
    got = campplus.statistics(jnp.asarray(x), jnp.asarray(mask))
    want = np.concatenate([x[0].mean(0), x[0].std(0, ddof=1)])
    np.testing.assert_allclose(got[0], want, atol=1e-6)


def test_features_are_the_references(published):
    samples, want = GOLDEN["samples"], GOLDEN["fbank"]
    junk = np.concatenate([samples, noise(2000)])
    got, frames = jax.jit(published.features)(junk[None], np.array([len(samples)]))
    assert int(frames[0]) == len(want) == 36
    assert not np.asarray(got[0, 36:]).any()
    np.testing.assert_allclose(got[0, :36], want, atol=2e-3)
    assert np.abs(got[0, :36] - want).mean() < 2e-5


def test_waveforms_of_any_length(small):
    """Alone and in a batch, the same every time, of unit length."""
    waveforms = [noise(9000), noise(720, 1), noise(5000, 2)]
    batch = small.embed_batch(waveforms)
    assert batch.shape == (3, 6) and batch.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(batch, axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(batch, small.embed_batch(waveforms))
    np.testing.assert_allclose(small.embed(waveforms[0]), batch[0], atol=1e-5)


def test_embedding_is_evaluation_and_leaves_the_mode_alone(build, small):
    model = build(SMALL, shake)
    before = np.asarray(model.norm.mean[...])
    embedding = model.embed(noise(9000))
    assert not model.norm.use_running_average
    np.testing.assert_array_equal(model.norm.mean[...], before)
    np.testing.assert_allclose(small.embed(noise(9000)), embedding, atol=1e-6)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (noise(719), "waveform 2 of 2 has 719 samples; at least 720"),
        (np.zeros(9000, np.float32), "waveform 2 of 2 is silent"),
        (np.full(9000, np.nan, np.float32), "not finite"),
    ],
)
def test_what_cannot_be_embedded_is_named(small, waveform, message):
    with pytest.raises(UserError, match=message):
        small.embed_batch([noise(9000), waveform])


def test_few_shapes_are_compiled():
    lengths = {CamPlusConfig().padded_samples(n) for n in range(1000, 16000 * 20, 100)}
    assert sorted(lengths) == [16000 * seconds for seconds in (2, 4, 6, 8, 16, 24)]


def test_batch_statistics_are_those_of_valid_frames(build):
    """In training, junk beyond the end changes neither what comes out nor what is gathered."""
    graphdef, state = nnx.split(build(SMALL, shake))

    @jax.jit
    def forward(state, x, frames):
        model = nnx.merge(graphdef, state)
        model.train()
        return model.embed_features(x, frames), nnx.state(model, nnx.BatchStat)

    frames = np.array([40, FRAMES, 25, 60])
    batch = np.stack([features(FRAMES, seed) for seed in range(4)])
    other = np.where((np.arange(FRAMES) < frames[:, None])[..., None], batch, 3.0)
    (got, gathered), (want, wanted) = (forward(state, x, frames) for x in (batch, other))
    np.testing.assert_allclose(got, want, atol=1e-4)
    for one, two in zip(jax.tree.leaves(gathered), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    # Over the batch, each number of the embedding is normalised.
    np.testing.assert_allclose(np.mean(got, 0), 0.0, atol=1e-4)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gathered)) > 0.01


def test_gradients_are_finite_and_reach_every_weight(build):
    graphdef, params, others = nnx.split(build(SMALL, shake), nnx.Param, ...)
    x, frames = np.stack([features(FRAMES, s) for s in range(3)]), np.array([FRAMES, 33, 61])

    @jax.jit
    def gradients(params):
        def loss(params):
            here = jax.tree.map(lambda leaf: leaf, others)  # training gathers statistics in it
            out = nnx.merge(graphdef, params, here).embed_features(x, frames)
            return (out * jnp.arange(18.0).reshape(3, 6)).sum()

        return jax.grad(loss)(params)

    norms = [float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients(params))]
    assert np.isfinite(norms).all() and min(norms) > 0
