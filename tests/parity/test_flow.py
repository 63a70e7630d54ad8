"""The flow of Step-Audio-TTS-3B at its published size against CosyVoice's own modules.

Its state dict with random weights is saved by PyTorch, read by `interop.cosyvoice_flow`, and every
part is compared in float64; what we export PyTorch reads, bit for bit.
"""

import dataclasses
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t5x_audio.errors import UserError
from t5x_audio.interop import cosyvoice_flow
from t5x_audio.vocoder.convolution import length_mask
from t5x_audio.vocoder.flow import Conditions, FlowMatching
from tests.parity import cosyvoice_reference


@dataclasses.dataclass
class Pair:
    """`state`: the reference's state dict, float32; `theirs`: it in float64."""

    path: pathlib.Path
    state: dict
    theirs: torch.nn.Module
    ours: FlowMatching


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    path = tmp_path_factory.mktemp("flow") / "flow.pt"
    model = cosyvoice_reference.flow()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, path)
    ours, report = cosyvoice_flow.load(path)
    assert report == {"tensors": len(state), "parameters": 105399040}
    return Pair(path, state, model.double(), ours)


def error(got, want) -> float:
    """Largest difference over the largest value."""
    want = want.numpy()
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


@torch.no_grad()
def test_velocity(pair):
    rng, frames = np.random.default_rng(0), 123  # odd: the U-Net halves and doubles it
    x, mu, prompt = (rng.normal(size=(2, frames, 80)) for _ in range(3))
    speaker, time = rng.normal(size=(2, 80)), np.array([0.3, 0.8])
    channels_first = [torch.tensor(a).transpose(1, 2) for a in (x, mu, prompt)]
    want = pair.theirs.decoder.estimator(
        channels_first[0], torch.ones(2, 1, frames).double(), channels_first[1],
        torch.tensor(time), torch.tensor(speaker), channels_first[2],
    )  # fmt: skip
    ours = [jnp.asarray(a, jnp.float32) for a in (x, time, mu, speaker, prompt)]
    mask = length_mask(jnp.array([frames] * 2), frames)
    conditions = Conditions(ours[2], ours[3], ours[4], mask, jnp.ones(2))
    got = jax.jit(pair.ours.velocity)(ours[0], ours[1], conditions)
    assert error(got, want.transpose(1, 2)) < 1e-5


@torch.no_grad()
def sampled(pair, codes, prompt_codes, prompt_mel, speaker, seed):
    """(mel of the reference float64 [1, F, 80], the noise it started from [1, F, 80])."""
    frames = len(prompt_mel) + int(len(codes) / cosyvoice_reference.FRAME_RATE * 22050 / 256)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 80, frames, generator=generator, dtype=torch.float64)
    with mock.patch.object(torch, "randn_like", lambda _: noise.clone()):
        mel, _ = pair.theirs.inference(
            torch.tensor(codes[None]), torch.tensor([len(codes)]),
            torch.tensor(prompt_codes[None]), torch.tensor([len(prompt_codes)]),
            torch.tensor(prompt_mel[None]), torch.tensor([len(prompt_mel)]),
            torch.tensor(speaker[None]), torch.zeros(1, 80, 0, 2).double(),
        )  # fmt: skip
    return mel.double().transpose(1, 2), noise.transpose(1, 2)


@pytest.mark.parametrize(("count", "prompt_count"), [(30, 0), (75, 25)])
def test_sampled_mel(pair, count, prompt_count):
    """10 Euler steps with guidance: short, and after a prompt with the ends apart."""
    rng = np.random.default_rng(count)
    codes, prompt_codes = (rng.integers(0, 5120, n) for n in (count, prompt_count))
    config = pair.ours.config
    prompt_frames = config.mel_lengths(prompt_count)
    prompt_mel, speaker = rng.normal(size=(prompt_frames, 80)), rng.normal(size=192)
    want, noise = sampled(pair, codes, prompt_codes, prompt_mel, speaker, seed=count)
    # Padding behind the codes must not be seen.
    padded = np.concatenate([prompt_codes, codes, rng.integers(0, 5120, 20)])
    size = config.mel_lengths(len(padded))
    ours_prompt = np.zeros((1, size, 80), np.float32)
    ours_prompt[0, :prompt_frames] = prompt_mel
    ours_noise = rng.normal(size=(1, size, 80)).astype(np.float32)
    ours_noise[:, : noise.shape[1]] = noise

    @jax.jit
    def sample(noise, *inputs):
        return pair.ours.sample(pair.ours.conditions(*inputs), noise)

    got = sample(
        ours_noise, padded[None].astype(np.int32), jnp.array([count + prompt_count]),
        jnp.asarray(speaker[None], jnp.float32), ours_prompt, jnp.array([prompt_count]),
    )  # fmt: skip
    assert noise.shape[1] == prompt_frames + config.mel_lengths(count)
    assert error(got[:, prompt_frames : noise.shape[1]], want) < 1e-4


def test_export_is_the_same_file(pair, tmp_path):
    cosyvoice_flow.save(pair.ours, tmp_path / "flow.pt")
    read = torch.load(tmp_path / "flow.pt", weights_only=True)
    assert read.keys() == pair.state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in pair.state.items())


def test_another_model_is_named(pair, tmp_path):
    for name, change, message in (
        ("encoder.after_norm.bias", None, "lacks encoder.after_norm.bias"),
        ("encoder.after_norm.bias", torch.zeros(7), "encoder.after_norm.bias has shape"),
        ("llm.weight", torch.zeros(7), "has llm.weight"),
        ("input_embedding.weight", None, "no flow of CosyVoice-1"),
    ):
        state = dict(pair.state)
        state.pop(name, None)
        if change is not None:
            state[name] = change
        torch.save(state, tmp_path / "wrong.pt")
        with pytest.raises(UserError, match=message):
            cosyvoice_flow.load(tmp_path / "wrong.pt")
