"""HiFT of Step-Audio-TTS-3B and of its successors at published size against CosyVoice's generator.

Compared in float64, the source without noise and, at 22.05 kHz, without random phases; the filter
with any source. The source of Step-Audio 2's own copy is compared too.
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
from t5x_audio.vocoder.hift import HIFT_24K, HarmonicSource, HiftConfig, HiftGenerator
from tests.parity import cosyvoice_reference


@dataclasses.dataclass
class Pair:
    """`state`: the reference's state dict, float32; `theirs`: it in float64."""

    state: dict
    theirs: torch.nn.Module
    ours: HiftGenerator


@pytest.fixture(scope="module", params=[{}, cosyvoice_reference.HIFT_24K], ids=["22k", "24k"])
def pair(request, tmp_path_factory) -> Pair:
    path = tmp_path_factory.mktemp("hift") / "hift.pt"
    model = cosyvoice_reference.hift(**request.param)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, path)
    ours, report = cosyvoice_hift.load(path)
    assert ours.config == (HIFT_24K if request.param else HiftConfig())
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


def reference_source(module, f0, hop) -> np.ndarray:
    """Of F0 [frames] in float64, without noise and the random phases of 22.05 kHz."""
    zeros = mock.Mock(return_value=mock.Mock(sample=lambda sample_shape: torch.zeros(sample_shape)))
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(cosyvoice_reference.generator, "Uniform", zeros),
            mock.patch.object(torch, "randn_like", torch.zeros_like),
        ):
            frames = torch.tensor(f0, dtype=torch.float64)
            return module(frames.repeat_interleave(hop)[None, :, None])[0][0, :, 0].numpy()
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_source(pair):
    """10 s of a rising voice; the phases must not drift.

    At 24 kHz the reference's random phases are on: they reach no sample.
    """
    config = dataclasses.replace(pair.ours.config, random_phase=False)
    f0 = voice(10 * config.sample_rate // config.hop)
    want = reference_source(pair.theirs.m_source, f0, config.hop)
    if pair.ours.config == HIFT_24K:
        successor = cosyvoice_reference.successor_source().double()
        successor.load_state_dict(pair.theirs.m_source.state_dict())
        np.testing.assert_allclose(reference_source(successor, f0, config.hop), want, atol=1e-9)
    source = HarmonicSource(config, nnx.Rngs(0))
    source.merge = pair.ours.source.merge
    with mock.patch.object(jax.random, "normal", lambda _, shape: jnp.zeros(shape)):
        got = source(jnp.asarray(f0)[None], jax.random.key(0))
    assert want.std() > 1e-2
    assert np.abs(np.asarray(got)[0] - want).max() < 1e-3


@torch.no_grad()
def test_waveform(pair):
    """Two utterances in a padded batch, each as the reference gives it alone."""
    rng, hop = np.random.default_rng(0), pair.ours.config.hop
    mel = rng.normal(size=(2, 60, 80)) - 3.0
    source = 0.1 * rng.normal(size=(2, 60 * hop))
    lengths = (60, 41)
    decode = jax.jit(pair.ours.decode)
    got = np.asarray(decode(mel.astype("f"), source.astype("f"), jnp.array(lengths)))
    for row, frames in enumerate(lengths):
        want = pair.theirs.decode(
            torch.tensor(mel[row : row + 1, :frames]).transpose(1, 2),
            torch.tensor(source[row : row + 1, None, : frames * hop]),
        ).numpy()[0]
        assert want.std() > 1e-3
        assert np.abs(got[row, : frames * hop] - want).max() < 1e-3 * max(1.0, np.abs(want).max())
        assert not got[row, frames * hop :].any()


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
    # Step-Audio 2's names, which its training made.
    torch.save({f"generator.{name}": a for name, a in older.items()}, tmp_path / "hift.pt")
    model, _ = cosyvoice_hift.load(tmp_path / "hift.pt")
    np.testing.assert_array_equal(model.conv_pre.scale[...], pair.ours.conv_pre.scale[...])


def test_another_model_is_named(pair, tmp_path):
    torch.save(pair.state, tmp_path / "hift.pt")
    with pytest.raises(UserError, match="has shape"):
        cosyvoice_hift.load(tmp_path / "hift.pt", HiftConfig(base_channels=256))
    with pytest.raises(UserError, match="lacks"):
        torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
        cosyvoice_hift.load(tmp_path / "other.pt")
