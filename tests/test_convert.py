"""Checkpoints of Hugging Face in and out: the same bytes back, and every fault named."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from t5x_audio import convert
from t5x_audio.backbone.rope import Llama3Scaling
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.interop import hugging_face
from t5x_audio.training import checkpoints

SIZES = {
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6,
    "vocab_size": 29, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
STRETCHED = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "step1": {"num_attention_groups": 2, "max_pos_interp_ratio": 2.0},
    "llama": {"num_key_value_heads": 2, "rope_theta": 5e5, "rope_scaling": STRETCHED},
    "qwen2": {"num_key_value_heads": 3, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 4, "rope_parameters": {"rope_theta": 1e6}},
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def values_of(family):
    return {"model_type": family} | SIZES | FAMILIES[family]


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write_checkpoint(folder, family, dtype=BFLOAT16, files=2):
    """A checkpoint of random tensors as the safetensors library writes it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values_of(family)))
    (folder / "tokenizer.json").write_text("{}")
    rng = np.random.default_rng(0)
    config = hugging_face.read_config(folder / "config.json")
    arrays = {
        tensor.name: rng.normal(size=tensor.shape).astype(dtype)
        for tensor in hugging_face.tensors(config)
    }
    if files == 1:
        path = folder / "model.safetensors"
        safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
        return arrays
    names = sorted(arrays)
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {n: arrays[n] for n in names[i::files]}
        safetensors.numpy.save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return arrays


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@every_family
@pytest.mark.parametrize("files", [1, 2])
def test_there_and_back_is_the_same_bytes(tmp_path, family, files):
    write_checkpoint(tmp_path / "hf", family, files=files)
    result = convert.run(from_hf=str(tmp_path / "hf"), model_dir=str(tmp_path / "model"))
    assert result["family"] == family
    assert convert.run(from_hf=str(tmp_path / "hf"), model_dir=str(tmp_path / "model")) == result
    left = {path.name for path in (tmp_path / "model").iterdir()}
    assert left == {"checkpoints", "hugging_face", "model.json"}
    convert.run(model_dir=str(tmp_path / "model"), to_hf=str(tmp_path / "back"))
    there, back = files_of(tmp_path / "hf"), files_of(tmp_path / "back")
    index = "model.safetensors.index.json"
    if files > 1:  # written anew: what it says of the files must be the same
        maps = [json.loads(files.pop(index))["weight_map"] for files in (there, back)]
        assert maps[0] == maps[1]
    assert there == back


@every_family
def test_weights_are_where_the_model_wants_them(tmp_path, family):
    arrays = write_checkpoint(tmp_path / "hf", family, np.dtype(np.float32), files=1)
    convert.run(from_hf=str(tmp_path / "hf"), model_dir=str(tmp_path / "model"))
    model = checkpoints.load_model(tmp_path / "model")
    layer, head_dim = 1, model.config.head_dim
    query = arrays[f"model.layers.{layer}.self_attn.q_proj.weight"]  # [heads * head_dim, embed]
    out = arrays[f"model.layers.{layer}.self_attn.o_proj.weight"]  # [embed, heads * head_dim]
    for head in range(6):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        np.testing.assert_array_equal(model.layers.query[...][layer, :, head], query[rows].T)
        np.testing.assert_array_equal(model.layers.out[...][layer, head], out[:, rows].T)
    down = arrays[f"model.layers.{layer}.mlp.down_proj.weight"]
    np.testing.assert_array_equal(model.layers.down[...][layer], down.T)
    np.testing.assert_array_equal(model.embedding[...], arrays["model.embed_tokens.weight"])
    tied = family == "qwen2"
    head = arrays["model.embed_tokens.weight" if tied else "lm_head.weight"]
    np.testing.assert_array_equal(model.head_kernel, head.T)


def test_configurations(tmp_path):
    def read(family):
        (tmp_path / "config.json").write_text(json.dumps(values_of(family)))
        return hugging_face.read_config(tmp_path / "config.json")

    step1, llama, qwen2, qwen3 = map(read, FAMILIES)
    assert (step1.num_kv_heads, step1.positions, step1.max_pos_interp_ratio) == (2, "alibi", 2.0)
    assert (llama.rope_theta, llama.rope_scaling) == (5e5, Llama3Scaling(4.0, 1.0, 4.0, 64))
    assert (qwen2.qkv_bias, qwen2.tied_head, qwen2.head_dim, qwen2.rope_theta) == (
        True,
        True,
        2,
        1e4,
    )
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.rope_theta) == (True, 4, 1e6)
    for config in (step1, llama, qwen2, qwen3):
        values = hugging_face.config_values(config, "bfloat16")
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert hugging_face.read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_of_our_own(tmp_path, dtype):
    config = TransformerConfig(
        num_layers=2, embed=8, mlp=12, num_heads=4, num_kv_heads=2, head_dim=2, vocab_size=11
    )
    model = config.make(nnx.Rngs(0))
    checkpoints.save_model(tmp_path / "model", {"model": config}, {"model": model})
    convert.run(model_dir=str(tmp_path / "model"), to_hf=str(tmp_path / "hf"), dtype=dtype)
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "step1"
    convert.run(from_hf=str(tmp_path / "hf"), model_dir=str(tmp_path / "again"))
    again = checkpoints.load_model(tmp_path / "again")
    assert again.config == config
    for one, other in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True
    ):
        if dtype:
            one = one.astype(dtype).astype(other.dtype)
        np.testing.assert_array_equal(one, other)
    stored = checkpoints.array_types(tmp_path / "again")["params/layers/query"]
    assert stored == np.dtype(dtype or "float32")


def drop(name):
    def change(folder):
        path = folder / "model.safetensors"
        arrays = safetensors.numpy.load_file(path)
        arrays.pop(name)
        safetensors.numpy.save_file(arrays, path)

    return change


def put(name, shape):
    def change(folder):
        path = folder / "model.safetensors"
        arrays = safetensors.numpy.load_file(path) | {name: np.zeros(shape, np.float32)}
        safetensors.numpy.save_file(arrays, path)

    return change


def configure(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def cut(folder):
    os.truncate(folder / "model.safetensors", 2000)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (put("model.layers.9.mlp.up_proj.weight", (2,)), "holds unknown model.layers.9.mlp.up"),
        (put("model.norm.weight", (13,)), r"model.norm.weight is \(13,\), but .* asks for \(12,\)"),
        (cut, "model.safetensors: damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: unreadable"),
        (configure(model_type="gpt2"), "model_type 'gpt2' is none of step1, llama, qwen2, qwen3"),
        (configure(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (configure(rope_scaling={"rope_type": "yarn"}), "rope_type 'yarn' is neither"),
        (configure(num_attention_heads=5), "num_heads=5 is no multiple"),
    ],
)
def test_faults_are_named_and_leave_nothing(tmp_path, change, line):
    write_checkpoint(tmp_path / "hf", "llama", np.dtype(np.float32), files=1)
    change(tmp_path / "hf")
    with pytest.raises(UserError, match=line):
        convert.run(from_hf=str(tmp_path / "hf"), model_dir=str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_missing_file_of_several_is_named(tmp_path):
    write_checkpoint(tmp_path / "hf", "qwen3")
    (tmp_path / "hf/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: missing, though"):
        convert.run(from_hf=str(tmp_path / "hf"), model_dir=str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({}, "give --from_hf=FOLDER, --from_gguf"),
        ({"from_hf": "a", "to_hf": "b"}, "give --from_hf=FOLDER, --from_gguf"),
        ({"from_hf": "a", "dtype": "bfloat16"}, "--dtype=bfloat16: for --to_hf only"),
        ({"to_hf": "b", "dtype": "int8"}, "--dtype=int8: for --to_hf only, one of bfloat16"),
    ],
)
def test_flags_that_do_not_go_together(flags, line):
    with pytest.raises(UserError, match=line):
        convert.run(model_dir="m", **flags)


def test_an_export_overwrites_no_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "hf", "llama", files=1)
    convert.run(from_hf=str(tmp_path / "hf"), model_dir=str(tmp_path / "model"))
    before = files_of(tmp_path / "hf")
    with pytest.raises(UserError, match="holds model.safetensors already"):
        convert.run(model_dir=str(tmp_path / "model"), to_hf=str(tmp_path / "hf"))
    assert files_of(tmp_path / "hf") == before


def test_a_transformer_of_no_family_is_refused(tmp_path):
    config = TransformerConfig(
        num_layers=1, embed=8, mlp=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=5,
        qk_norm=True,
    )  # fmt: skip
    checkpoints.save_model(tmp_path / "m", {"model": config}, {"model": config.make(nnx.Rngs(0))})
    with pytest.raises(UserError, match="no family of Hugging Face"):
        convert.run(model_dir=str(tmp_path / "m"), to_hf=str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()
