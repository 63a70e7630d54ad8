"""HiFT of Step-Audio-TTS-3B at its published size against CosyVoice's own generator.

Compared in float64, the source without its noise and random phases; the filter with any source.
"""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.interop import cosyvoice_hift
from t5x_audio.vocoder.hift import HarmonicSource, HiftConfig, HiftGenerator
from tests.parity import cosyvoice_reference


@dataclasses.dataclass
class Pair:
    """`state`: the reference's state dict, float32; `theirs`: it in float64."""

    state: dict
    theirs: torch.nn.Module
    ours: HiftGenerator


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    path = tmp_path_factory.mktemp("hift") / "hift.pt"
    model = cosyvoice_reference.hift()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, path)
    ours, report = cosyvoice_hift.load(path)
    assert report["tensors"] == len(state)
    assert report["parameters"] == sum(tensor.numel() for tensor in state.values())
    double = model.double()
    double.stft_window = double.stft_window.double()
    return Pair(state, double, ours)


def voice(frames: int) -> np.ndarray:
    """F0 in Hz float32 [frames]: rising, and unvoiced in between."""
    f0 = np.linspace(80.0, 400.0, frames)
    f0[frames // 3 : frames // 2] = 0.0
    return f0.astype(np.float32)


@torch.no_grad()
def test_f0(pair):
    mel = np.random.default_rng(0).normal(size=(2, 50, 80))
    want = pair.theirs.f0_predictor(torch.tensor(mel).transpose(1, 2)).numpy()
    got = jax.jit(pair.ours.f0_predictor)(jnp.asarray(mel, jnp.float32))
    assert np.abs(got - want).max() < 1e-5 * want.max()


@torch.no_grad()
def test_source(pair):
    """10 s of a rising voice; the phases must not drift."""
    frames = 860
    f0 = voice(frames)
    module = pair.theirs.m_source
    zeros = mock.Mock(return_value=mock.Mock(sample=lambda sample_shape: torch.zeros(sample_shape)))
    generator = cosyvoice_reference.generator
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(generator, "Uniform", zeros),
            mock.patch.object(torch, "randn_like", torch.zeros_like),
        ):
            want = module(
                torch.tensor(f0, dtype=torch.float64).repeat_interleave(256)[None, :, None]
            )
    finally:
        torch.set_default_dtype(torch.float32)
    source = HarmonicSource(HiftConfig(random_phase=False), nnx.Rngs(0))
    source.merge = pair.ours.source.merge
    with mock.patch.object(jax.random, "normal", lambda _, shape: jnp.zeros(shape)):
        got = source(jnp.asarray(f0)[None], jax.random.key(0))
    assert np.abs(np.asarray(got) - want[0][..., 0].numpy()).max() < 1e-3


@torch.no_grad()
def test_waveform(pair):
    """Two utterances in a padded batch, each as the reference gives it alone."""
    rng = np.random.default_rng(0)
    mel = rng.normal(size=(2, 60, 80)) - 3.0
    source = 0.1 * rng.normal(size=(2, 60 * 256))
    lengths = (60, 41)
    decode = jax.jit(pair.ours.decode)
    got = np.asarray(decode(mel.astype("f"), source.astype("f"), jnp.array(lengths)))
    for row, frames in enumerate(lengths):
        want = pair.theirs.decode(
            torch.tensor(mel[row : row + 1, :frames]).transpose(1, 2),
            torch.tensor(source[row : row + 1, None, : frames * 256]),
        ).numpy()[0]
        assert want.std() > 1e-3
        assert np.abs(got[row, : frames * 256] - want).max() < 1e-3 * max(1.0, np.abs(want).max())
        assert not got[row, frames * 256 :].any()


def test_export_is_the_same_file(pair, tmp_path):
    cosyvoice_hift.save(pair.ours, tmp_path / "hift.pt")
    read = torch.load(tmp_path / "hift.pt", weights_only=True)
    assert read.keys() == pair.state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in pair.state.items())


def test_older_names_of_weight_norm_are_read(pair, tmp_path):
    older = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in pair.state.items()
    }
    assert "conv_pre.weight_g" in older
    torch.save(older, tmp_path / "hift.pt")
    model, _ = cosyvoice_hift.load(tmp_path / "hift.pt")
    np.testing.assert_array_equal(model.conv_pre.scale[...], pair.ours.conv_pre.scale[...])


def test_another_model_is_named(pair, tmp_path):
    torch.save(pair.state, tmp_path / "hift.pt")
    with pytest.raises(UserError, match="has shape"):
        cosyvoice_hift.load(tmp_path / "hift.pt", HiftConfig(base_channels=256))
    with pytest.raises(UserError, match="lacks"):
        torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
        cosyvoice_hift.load(tmp_path / "other.pt")
