"""The flow of Step-Audio's successors at Step-Audio 2 mini's size against its own modules.

The table of paired codes is EditX's, written from its few lines; encoder, transformer and sampling
are the reference's. Its state dict with random weights is saved by PyTorch, read by
`interop.stepaudio2_flow`, and compared in float64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t5x_audio.interop import stepaudio2_flow
from t5x_audio.vocoder.paired_flow import PairedFlow, PairedFlowConfig
from tests.parity import cosyvoice_reference


@dataclasses.dataclass
class Pair:
    """`state`: the reference's state dict, float32; `theirs`: it in float64."""

    state: dict
    theirs: torch.nn.Module
    ours: PairedFlow


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    path = tmp_path_factory.mktemp("flow") / "flow.pt"
    model = cosyvoice_reference.paired_flow()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, path)
    ours, report = stepaudio2_flow.load(path)
    assert ours.config == PairedFlowConfig()
    assert report["parameters"] == sum(tensor.numel() for tensor in state.values())
    return Pair(state, model.double(), ours)


def error(got, want) -> float:
    """Largest difference over the largest value."""
    want = want.numpy()
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def reference_pairs(codes) -> torch.Tensor:
    """[02, 02, 06, 06, 06] -> [[02, 06], [02, 06], [padding, 06]], group by group."""
    rows = []
    for a, b, x, y, z in codes.reshape(-1, 5):
        rows += [(a, x + 1), (b, y + 1), (1024, z + 1)]
    return torch.tensor(np.array(rows))[None]


def groups(rng, count) -> np.ndarray:
    """`count` groups of flat codes."""
    linguistic, semantic = rng.integers(0, 1024, (count, 2)), rng.integers(1024, 5120, (count, 3))
    return np.concatenate([linguistic, semantic], axis=1).reshape(-1)


@torch.no_grad()
def test_sampled_mel(pair):
    """10 Euler steps with guidance after a prompt, padding behind the codes."""
    rng = np.random.default_rng(0)
    prompt_codes, codes = groups(rng, 3), groups(rng, 8)
    config = pair.ours.config
    prompt_frames, frames = config.mel_lengths(15), config.mel_lengths(55)
    prompt_mel, speaker = rng.normal(size=(prompt_frames, 80)), rng.normal(size=192)
    lengths = [torch.tensor([n]) for n in (24, 9, prompt_frames)]
    want = pair.theirs.inference(
        reference_pairs(codes), lengths[0], reference_pairs(prompt_codes), lengths[1],
        torch.tensor(prompt_mel[None]), lengths[2], torch.tensor(speaker[None]),
    ).transpose(1, 2)  # fmt: skip
    noise = pair.theirs.decoder.rand_noise[0, :, :frames].T.numpy()
    padded = np.concatenate([prompt_codes, codes, groups(rng, 4)]).astype(np.int32)
    size = config.mel_lengths(len(padded))
    ours_noise = rng.normal(size=(1, size, 80)).astype(np.float32)
    ours_noise[0, :frames] = noise
    ours_prompt = np.zeros((1, size, 80), np.float32)
    ours_prompt[0, :prompt_frames] = prompt_mel

    @jax.jit
    def sample(noise, *inputs):
        return pair.ours.sample(pair.ours.conditions(*inputs), noise)

    got = sample(
        ours_noise, padded[None], jnp.array([55]), jnp.asarray(speaker[None], jnp.float32),
        ours_prompt, jnp.array([15]),
    )  # fmt: skip
    assert want.shape[1] == frames - prompt_frames
    assert error(got[:, prompt_frames:frames], want) < 1e-4


@torch.no_grad()
def test_chunks_of_the_transformer(pair):
    """Three chunks with the reference's own caches, all of whose frames stay visible here."""
    theirs, ours = pair.theirs.decoder.estimator, pair.ours.estimator
    rng = np.random.default_rng(1)
    time, state = np.array([0.4]), ours.initial_state(1, 30)
    step = jax.jit(ours.step, static_argnames="prompt")
    cnn_cache = att_cache = None
    # The reference's buffers are for two rows.
    theirs.cnn_cache_buffer = torch.zeros(16, 1, 1024, 2).double()
    theirs.att_cache_buffer = torch.zeros(16, 1, 8, 200, 128).double()
    for number, length in enumerate((30, 24, 17)):
        x = rng.normal(size=(1, length, 320))
        parts = torch.tensor(x).transpose(1, 2).split(80, dim=1)
        want, cnn_cache, att_cache = theirs.forward_chunk(
            parts[0], parts[1], torch.tensor(time), torch.tensor(x[:, 0, 160:240]), parts[3],
            cnn_cache, att_cache,
        )  # fmt: skip
        cnn_cache, att_cache = cnn_cache.clone(), att_cache.clone()
        x[:, :, 160:240] = x[:, :1, 160:240]  # one speaker for all frames
        got, state = step(
            jnp.asarray(x, jnp.float32), jnp.asarray(time, jnp.float32), state, prompt=number == 0
        )
        assert error(got, want.transpose(1, 2)) < 1e-5, number


@torch.no_grad()
def test_stream(pair):
    """The prompt and three chunks with the reference's caches, nothing behind the last."""
    rng, config = np.random.default_rng(2), pair.ours.config
    codes, speaker = groups(rng, 12), rng.normal(size=192)
    sizes = (15, 15, 15, 15)
    frames = config.mel_lengths(len(codes))
    prompt_mel = rng.normal(size=(config.mel_lengths(sizes[0]), 80))
    decoder = pair.theirs.decoder
    for owner, times in ((decoder, (10,)), (decoder.estimator, ())):
        owner.cnn_cache_buffer = torch.zeros(*times, 16, 2, 1024, 2).double()
        owner.att_cache_buffer = torch.zeros(*times, 16, 2, 8, frames, 128).double()
    noise = decoder.rand_noise[0, :, :frames].T.numpy().astype(np.float32)

    @functools.partial(jax.jit, static_argnames="start")
    def step(codes, state, mel, valid, start, embedding):
        length = config.mel_lengths(codes.shape[1] - config.look_ahead_codes)
        now = jax.lax.dynamic_slice_in_dim(noise, start, length)[None]
        return pair.ours.step(codes, embedding, now, state, mel, valid)

    state, cache, done = pair.ours.initial_state(1, sizes[0]), None, 0
    embedding = torch.tensor(speaker[None])
    for number, size in enumerate(sizes):
        ahead = codes[done : done + size + 5]
        last, mel = number == len(sizes) - 1, None
        if number == 0:
            mel = jnp.asarray(prompt_mel[None], jnp.float32)
            cache = pair.theirs.setup_cache(
                reference_pairs(ahead), torch.tensor(prompt_mel[None]), embedding
            )
        else:
            want, cache = pair.theirs.inference_chunk(
                reference_pairs(ahead), embedding, cache, last_chunk=last
            )
        cache = {name: value.clone() for name, value in cache.items()}
        padded = np.pad(ahead, (0, size + 5 - len(ahead))).astype(np.int32)[None]
        start = config.mel_lengths(done)
        got, state = step(
            padded, state, mel, len(ahead), start, jnp.asarray(speaker[None], jnp.float32)
        )
        if number:
            assert error(got, want.transpose(1, 2)) < 1e-4, number
        done += size


def test_export_is_the_same_file(pair, tmp_path):
    stepaudio2_flow.save(pair.ours, tmp_path / "flow.pt")
    read = torch.load(tmp_path / "flow.pt", weights_only=True)
    assert read.keys() == pair.state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in pair.state.items())
