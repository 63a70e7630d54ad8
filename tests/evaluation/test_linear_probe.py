"""Linear probes: they learn what is linear, and see what bits take away."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.evaluation import linear_probe
from t5x_audio.evaluation.linear_probe import LinearProbe, QuantizedFeatures
from t5x_audio.images import resnet
from t5x_audio.quantization.rules import Rules

RULES = Rules(resnet.WEIGHTS, resnet.ACTIVATIONS)


def normalize(images):
    return images.astype(jnp.float32) / 255.0


def encoder():
    model = resnet.ResnetConfig((1,), (4,)).make(nnx.Rngs(0))
    # Fresh blocks are the identity, and the stem has 8 bits whatever is asked for.
    model.stages[0][0].outer.norm.scale[...] = jnp.ones(4)
    model.eval()
    return model


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def test_a_probe_learns_what_is_linear_and_nothing_else():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 5)).astype(np.float32)
    labels = np.argmax(features @ rng.normal(size=(5, 3)), axis=-1)
    probe = LinearProbe(epochs=20, batch_size=64)
    train, test = (features[:200], labels[:200]), (features[200:], labels[200:])
    assert probe.accuracy(train, test, 3) > 0.9
    shuffled = rng.permutation(labels[200:])
    assert probe.accuracy(train, (features[200:], shuffled), 3) < 0.6
    again = dataclasses.replace(probe)
    assert again.accuracy(train, test, 3) == probe.accuracy(train, test, 3)


def test_features_move_further_with_fewer_bits():
    made = QuantizedFeatures(encoder(), RULES, normalize, images(8), batch_size=4)
    whole = made(images(6), (0, 0))
    with jax.default_matmul_precision("highest"):
        want = encoder()(normalize(jnp.asarray(images(6))))
    np.testing.assert_allclose(whole, want, atol=1e-5)
    errors = [np.abs(made(images(6), pair) - whole).mean() for pair in ((2, 4), (4, 4), (8, 8))]
    assert errors[0] > errors[1] > errors[2] > 0
    assert made._run._cache_size() == 2  # one unquantised, one for all bits


def test_bad_input_is_named():
    with pytest.raises(UserError, match="no data"):
        QuantizedFeatures(encoder(), RULES, normalize, images(0), 4)
    with pytest.raises(UserError, match=r"bits \(9, 4\), weights: 9 bits"):
        linear_probe.require_pair((9, 4))
    with pytest.raises(UserError, match="give pairs"):
        linear_probe.require_pair((4,))
    assert [linear_probe.bit_name(pair) for pair in ((0, 0), (2, 4))] == ["FP", "W2A4"]
