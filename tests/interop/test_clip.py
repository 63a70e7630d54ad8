"""A CLIP checkpoint gives the patches that transformers does (tests/parity/make_clip_golden.py)."""

import pathlib

import numpy as np
import pytest
import safetensors.numpy

from t5x_audio.errors import UserError
from t5x_audio.interop import clip

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "clip.npz")


def write(folder, prefix="", drop=(), more=None):
    (folder / "config.json").write_text(str(GOLDEN["config"]))
    names = [name.removeprefix("weights.") for name in GOLDEN.files if "weights." in name]
    tensors = {prefix + name: GOLDEN[f"weights.{name}"] for name in names if name not in drop}
    safetensors.numpy.save_file(tensors | (more or {}), folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_patches_equal_those_of_transformers(tmp_path, prefix, skip):
    # Older checkpoints hold integers as well, and the text's tower.
    more = {"vision_model.embeddings.position_ids": np.arange(10)} if prefix else None
    encoder = clip.load_clip(write(tmp_path, prefix, more=more), skip_layers=skip)
    assert encoder.image_size == 12
    expected = GOLDEN[f"layer_{3 - skip}"]
    np.testing.assert_allclose(encoder(GOLDEN["images"]), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - GOLDEN[f"layer_{2 - skip}"]).max() > 0.1


def test_the_name_tells_weights_apart(tmp_path):
    folder = write(tmp_path)
    names = [clip.load_clip(folder, skip_layers=skip).name for skip in (0, 1, 1)]
    assert names[0] != names[1] == names[2]


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match="config.json: no such file"):
        clip.load_clip(str(tmp_path))
    folder = write(tmp_path, drop=["pre_layrnorm.weight"])
    with pytest.raises(UserError, match=r"model\.safetensors: holds no such .*pre_layrnorm"):
        clip.load_clip(folder)
    text = str(GOLDEN["config"])
    (tmp_path / "config.json").write_text(text.replace('"patch_size": 4', '"patch_size": 6'))
    with pytest.raises(UserError, match=r"model\.safetensors: holds no such vision tower"):
        clip.load_clip(folder)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        clip.load_clip(folder)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model\.safetensors: holds no such"):
        clip.load_clip(folder)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: unreadable"):
        clip.load_clip(folder)
