"""Our transformer against PyTorch: Step-1 written from its equations, and transformers' own Llama,
Qwen2 and Qwen3; checkpoints pass through `convert` in both directions.

Random weights of full spread, so that every tensor matters. Logits in float32 agree within 1e-4 of
their largest; bfloat16 loses at most 1.5 times what it loses in PyTorch; 200 greedy tokens are the
same.
"""

import copy
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from flax import nnx

from benchmarks import torch_step1
from t5x_audio import convert
from t5x_audio.backbone.decoding import Decoder, Sampling
from t5x_audio.training import checkpoints

SIZES = dict(
    hidden_size=96, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, vocab_size=211, max_position_embeddings=1024, initializer_range=0.15,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
PEERS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, head_dim=16, rope_parameters=LLAMA3)
    ),
    "llama_tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, head_dim=8, tie_word_embeddings=True)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)
    ),
}
FAMILIES = ["step1", *PEERS]


@functools.cache
def sentences():
    rng = np.random.default_rng(1)
    return [rng.integers(0, SIZES["vocab_size"], n) for n in (70, 41)]


def randomise(state):
    """Norms away from 1 and biases from 0."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if name.endswith("bias") or "norm" in name:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(the peer as tokens [S] -> logits [S, V] and its module, folder, our model directory)."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "step1":
        peer = step1(folder / "hf")
    else:
        peer = PEERS[request.param]().eval()
        with torch.no_grad():
            randomise(peer.state_dict())
        peer.save_pretrained(folder / "hf")
    convert.run(from_hf=str(folder / "hf"), model_dir=str(folder / "ours"))
    return peer, folder


def step1(folder):
    """A Step-1 of the benchmark's PyTorch, and its checkpoint under the published names."""
    values = {"model_type": "step1", "num_attention_groups": 2, "rms_norm_eps": 1e-5} | SIZES
    values["head_dim"] = 16
    config = convert_config(folder, values)
    peer = torch_step1.Step1(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.15)
        for norm in [
            peer.final_norm,
            *(n for x in peer.layers for n in (x.attention_norm, x.mlp_norm)),
        ]:
            norm += 1.0
    state = {
        "model.embed_tokens.weight": peer.embedding.weight,
        "model.norm.weight": peer.final_norm,
        "lm_head.weight": peer.head.weight,
    }
    names = {
        "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }  # fmt: skip
    for i, layer in enumerate(peer.layers):
        for ours, theirs in names.items():
            state[f"model.layers.{i}.{theirs}.weight"] = getattr(layer, ours).weight
        state[f"model.layers.{i}.input_layernorm.weight"] = layer.attention_norm
        state[f"model.layers.{i}.post_attention_layernorm.weight"] = layer.mlp_norm
    state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return peer


def convert_config(folder, values):
    from t5x_audio.interop import hugging_face

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    return hugging_face.read_config(folder / "config.json")


@torch.no_grad()
def theirs(peer, tokens):
    """Logits [S, V] of one sequence."""
    tokens = torch.tensor(np.asarray(tokens))[None]
    if isinstance(peer, torch_step1.Step1):
        positions = torch.arange(tokens.shape[1])[None]
        return peer(tokens, positions, torch.ones_like(tokens))[0].float().numpy()
    return peer(tokens).logits[0].float().numpy()


def load(folder, dtype="float32"):
    config = dataclasses.replace(checkpoints.load_config(folder), dtype=dtype, remat="none")
    abstract = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(abstract, nnx.Param, ...)
    return nnx.merge(graphdef, *checkpoints.restore_states(folder, "model", params, rest))


def ours(model, tokens, **places):
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda s, tokens, places: nnx.merge(graphdef, s)(tokens, **places))
    return np.asarray(run(state, np.asarray(tokens, np.int32), places))


def close(got, want, within=1e-4):
    assert np.abs(got - want).max() < within * np.abs(want).max()


def test_padded_and_packed_logits(pair):
    peer, folder = pair
    model, rows = load(folder / "ours"), sentences()
    length = len(rows[0])
    padded = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
    segments = np.stack([np.arange(length) < len(row) for row in rows]).astype(np.int32)
    for row, got in zip(rows, ours(model, padded, segment_ids=segments), strict=True):
        close(got[: len(row)], theirs(peer, row))
    packed = np.concatenate(rows)[None]
    segments = np.repeat([1, 2], [len(row) for row in rows])[None].astype(np.int32)
    positions = np.concatenate([np.arange(len(row)) for row in rows])[None].astype(np.int32)
    (got,) = ours(model, packed, segment_ids=segments, positions=positions)
    close(got[:length], theirs(peer, rows[0]))
    close(got[length:], theirs(peer, rows[1]))


def test_bfloat16_loses_no_more_than_torch_does(pair):
    peer, folder = pair
    (row, _) = sentences()
    exact = theirs(peer, row)

    def lost(logits):
        return np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2))

    half = theirs(copy.deepcopy(peer).bfloat16(), row)
    mine = ours(load(folder / "ours", "bfloat16"), row[None])[0]
    assert lost(mine) < 1.5 * lost(half) < 0.1


def test_two_hundred_greedy_tokens(pair):
    peer, folder = pair
    decoder = Decoder(load(folder / "ours"), stop_ids=())
    prompts = [row[:20] for row in sentences()]
    got = decoder.generate(prompts, sampling=Sampling(temperature=0.0), max_new_tokens=200)
    for prompt, row in zip(prompts, got, strict=True):
        tokens = list(prompt)
        for _ in range(200):
            tokens.append(int(theirs(peer, tokens)[-1].argmax()))
        assert row.tolist() == tokens[20:]


def test_exported_weights_are_theirs(pair, tmp_path):
    peer, folder = pair
    convert.run(model_dir=str(folder / "ours"), to_hf=str(tmp_path / "hf"))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / "hf" / name).read_bytes()
    if not isinstance(peer, torch_step1.Step1):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        np.testing.assert_array_equal(theirs(again, sentences()[0]), theirs(peer, sentences()[0]))
