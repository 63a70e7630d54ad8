"""The job that probes a trained image encoder: from a checkpoint to its file of accuracies."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio import probe_images
from t5x_audio.errors import UserError
from t5x_audio.evaluation.linear_probe import LinearProbe
from t5x_audio.images.resnet import ResnetConfig
from t5x_audio.images.siamese import SiameseConfig
from t5x_audio.training import checkpoints

CONFIG = SiameseConfig(ResnetConfig((1,), (4,)), projector=(8, 8, 8), predictor=4)


@pytest.fixture
def model_dir(tmp_path):
    model = CONFIG.make(nnx.Rngs(0))
    # A fresh block is the identity: nothing in it would be quantised.
    model.encoder.stages[0][0].outer.norm.scale[...] = jnp.ones(4)
    checkpoints.save_model(tmp_path / "model", {"model": CONFIG}, {"model": model})
    return tmp_path / "model"


@pytest.fixture
def source(tmp_path):
    """Bright and dark images: any encoder tells them apart."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("test", 30)):
        labels = rng.integers(0, 2, count)
        level = 40 + 150 * labels[:, None, None, None]
        arrays[f"{split}_images"] = (level + rng.integers(0, 40, (count, 8, 8, 3))).astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    np.savez(tmp_path / "images.npz", **arrays)
    return str(tmp_path / "images.npz")


def test_accuracies_by_bits(model_dir, source):
    given = {
        "model_dir": str(model_dir), "source": source, "bits": ((0, 0), (8, 8), (2, 4)),
        "batch_size": 16, "probe": LinearProbe(epochs=10, batch_size=20),
    }  # fmt: skip
    result = probe_images.run(**given)
    assert list(result) == ["step", "images", "FP", "W8A8", "W2A4"] and result["images"] == 30
    assert result["FP"] > 0.9 and result["W8A8"] > 0.9
    assert json.loads((model_dir / "probe.json").read_text()) == result
    assert probe_images.run(**given) == result


def test_what_is_no_model_and_no_bits(tmp_path, model_dir, source):
    with pytest.raises(UserError, match=r"not a model directory"):
        probe_images.run(model_dir=str(tmp_path / "none"), source=source)
    with pytest.raises(UserError, match=r"bits"):
        probe_images.run(model_dir=str(model_dir), source=source, bits=((1, 4),))
