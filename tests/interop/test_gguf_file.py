"""GGUF files written by the gguf library: every tensor in its place, every fault named."""

import json

import gguf
import numpy as np
import pytest

from t5x_audio import convert
from t5x_audio.backbone import rope
from t5x_audio.errors import UserError
from t5x_audio.interop import hugging_face
from t5x_audio.interop.gguf_file import GgufFile
from t5x_audio.training import checkpoints

# Rows of 32 and more: the quantised types store blocks of 32.
FIELDS = {
    "block_count": 2, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "context_length": 512,
}  # fmt: skip
QUANTISED = {
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_1": gguf.GGMLQuantizationType.Q4_1,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}
LLAMA_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def their_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, *rest = stem.split(".")
        return f"blk.{layer}.{LLAMA_NAMES[rest[-1]]}.{kind}"
    known = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    return f"{known[stem]}.{kind}"


def interleaved(array, heads):
    """Rows of query or key as llama.cpp orders them: half a head beside the other half."""
    first, second = np.split(array.reshape(heads, -1, array.shape[-1]), 2, 1)
    return np.stack([first, second], 2).reshape(array.shape)


def write(path, family="llama", kind="Q8_0", tied=False, drop=None, fields=None, factors=None):
    """A file of random weights; returns what they are after quantisation, under our names."""
    config = hugging_face.config_of(
        {
            "model_type": family, "num_hidden_layers": 2, "hidden_size": 64,
            "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 77, "tie_word_embeddings": tied,
        },
        path,
    )  # fmt: skip
    writer = gguf.GGUFWriter(path, family)
    for name, value in (FIELDS | (fields or {})).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{family}.{name}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{family}.rope.freq_base", 5e5)
    rng, read = np.random.default_rng(0), {}
    for tensor in hugging_face.tensors(config):
        values = rng.normal(size=tensor.shape).astype(np.float32)
        stored = values
        if family == "llama" and (".q_proj." in tensor.name or ".k_proj." in tensor.name):
            stored = interleaved(values, 4 if ".q_proj." in tensor.name else 2)
        if tensor.name == drop:
            continue
        if values.ndim == 2:
            # Blocks lie along the rows, so the order of rows does not matter to them.
            blocks = gguf.quantize(stored, QUANTISED[kind])
            values = gguf.dequantize(gguf.quantize(values, QUANTISED[kind]), QUANTISED[kind])
            writer.add_tensor(their_name(tensor.name), blocks, raw_dtype=QUANTISED[kind])
        else:
            writer.add_tensor(their_name(tensor.name), stored)
        read[tensor.name] = values
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_tensor_is_read(tmp_path, family, kind):
    wanted = write(tmp_path / "m.gguf", family, kind, tied=family == "qwen2")
    file = GgufFile(tmp_path / "m.gguf")
    assert file.shapes == {name: array.shape for name, array in wanted.items()}
    for name, array in wanted.items():
        read = file.read(name)
        assert read.dtype == file.dtypes[name]
        np.testing.assert_array_equal(read.astype(np.float32), array, err_msg=name)
    config = file.config
    assert (config.num_layers, config.vocab_size, config.head_dim) == (2, 77, 16)
    assert (config.rope_theta, config.rms_eps) == (5e5, 1e-5)
    assert hugging_face.family_of(config) == family and config.tied_head == (family == "qwen2")


def test_an_import_can_be_exported_to_hugging_face(tmp_path):
    wanted = write(tmp_path / "m.gguf", kind="Q4_1")
    convert.run(from_gguf=str(tmp_path / "m.gguf"), model_dir=str(tmp_path / "model"))
    convert.run(model_dir=str(tmp_path / "model"), to_hf=str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "llama"
    convert.run(from_hf=str(tmp_path / "hf"), model_dir=str(tmp_path / "again"))
    model = checkpoints.load_model(tmp_path / "again")
    query = wanted["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(model.layers.query[...][1].reshape(64, 64), query.T)


def test_stretched_frequencies(tmp_path):
    scaling = rope.Llama3Scaling(factor=32.0)
    factors = rope.frequencies(16, 5e5) / rope.frequencies(16, 5e5, scaling)
    write(tmp_path / "m.gguf", factors=factors.astype(np.float32))
    assert GgufFile(tmp_path / "m.gguf").config.rope_scaling == scaling
    factors[0] = 3.0
    write(tmp_path / "other.gguf", factors=factors.astype(np.float32))
    with pytest.raises(UserError, match=r"rope_freqs.weight is not the stretching of Llama 3\.1"):
        GgufFile(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"family": "gemma"}, None),
        ({"drop": "model.layers.1.mlp.up_proj.weight"}, "lacks model.layers.1.mlp.up_proj.weight"),
        ({"drop": "model.embed_tokens.weight"}, "lacks token_embd.weight"),
        ({"fields": {"rope.scaling.type": "yarn"}}, "rope.scaling.type 'yarn' is not supported"),
        ({"fields": {"expert_count": 8}}, "mixture of experts"),
        ({"fields": {"embedding_length": 128}}, "asks for"),
    ],
)
def test_faults_are_named_and_leave_nothing(tmp_path, options, line):
    if line is None:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        line = "holds a gemma, none of llama, qwen2, qwen3"
    else:
        write(tmp_path / "m.gguf", **options)
    with pytest.raises(UserError, match=line):
        convert.run(from_gguf=str(tmp_path / "m.gguf"), model_dir=str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("size", [0, 10, 3000, 70_000])
def test_a_cut_file_is_named(tmp_path, size):
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    assert len(whole) > 70_000
    (tmp_path / "m.gguf").write_bytes(whole[:size])
    with pytest.raises(UserError, match="m.gguf: no GGUF file, or cut short"):
        GgufFile(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="nowhere.gguf: no such file"):
        GgufFile(tmp_path / "nowhere.gguf")
