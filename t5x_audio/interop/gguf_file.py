"""Checkpoints in GGUF files, the format of llama.cpp: Llama, Qwen2 and Qwen3, quantised or not.

The gguf library of the same project reads the file through the memory map and takes its blocks
apart; tensors get the names and the order of rows that they have in a Hugging Face checkpoint.
Quantised weights become float32, which holds scale * code + offset of every block exactly; float16
and bfloat16 stay. Sources: convert_hf_to_gguf.py of llama.cpp (rows of query and key of a Llama are
interleaved there, see `LlamaModel.permute`; Llama 3.1's stretched frequencies are a tensor).
"""

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.interop import hugging_face

FAMILIES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"
_FLOATS = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class GgufFile:
    """The tensors of a GGUF file under their Hugging Face names.

    Attributes:
      config: of the model.
      shapes, dtypes: by tensor, as `read` returns them.
    """

    def __init__(self, path: Path):
        """Reads the header. UserError: no or another file, damaged, or a model that we have not."""
        import gguf

        self._path = path
        try:
            reader = gguf.GGUFReader(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: no GGUF file, or cut short ({str(error)[:80]}); fetch it again"
            ) from error
        fields = {name: field.contents for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        frequencies = stored.pop(_FREQUENCIES, None)
        self._tensors = {_hugging_face_name(name): tensor for name, tensor in stored.items()}
        self.shapes = {n: tuple(int(d) for d in t.shape[::-1]) for n, t in self._tensors.items()}
        self.dtypes = {
            n: _FLOATS.get(t.tensor_type.name, np.dtype(np.float32))
            for n, t in self._tensors.items()
        }
        values = self._values(fields, None if frequencies is None else frequencies.data)
        self.config: TransformerConfig = hugging_face.config_of(values, path)
        self._heads = {}  # of interleaved rows
        if values["model_type"] == "llama":
            self._heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}

    def read(self, name: str) -> np.ndarray:
        """One tensor, [out, in] for a linear layer."""
        import gguf

        tensor = self._tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        if heads := self._heads.get(name.split(".")[-2]):
            halves = values.reshape(heads, -1, 2, values.shape[-1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        return values.astype(self.dtypes[name], copy=False)

    def _values(self, fields: dict[str, Any], frequencies) -> dict[str, Any]:
        """What config.json would say."""
        family = self._field(fields, "general.architecture")
        if family not in FAMILIES:
            raise UserError(f"{self._path}: holds a {family}, none of {', '.join(FAMILIES)}")

        def get(name, *default):
            return self._field(fields, f"{family}.{name}", *default)

        stretched = get("rope.scaling.type", "none")
        if stretched != "none":
            raise UserError(f"{self._path}: rope.scaling.type {stretched!r} is not supported")
        if get("expert_count", 0):
            raise UserError(f"{self._path}: a mixture of experts is not supported")
        embedding = self.shapes.get("model.embed_tokens.weight")
        if embedding is None:
            raise UserError(f"{self._path}: lacks token_embd.weight")
        values = {
            "model_type": family,
            "architectures": [hugging_face.ARCHITECTURES[family]],
            "num_hidden_layers": get("block_count"),
            "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_attention_heads": get("attention.head_count"),
            "num_key_value_heads": get("attention.head_count_kv", None),
            "head_dim": get("attention.key_length", None),
            "vocab_size": embedding[0],
            # float32 in the file: 1e-5 comes back as 9.99999975e-06.
            "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(get("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "hidden_act": "silu",
        }
        values = {name: value for name, value in values.items() if value is not None}
        if frequencies is not None:
            values["rope_scaling"] = self._scaling(values, np.asarray(frequencies, np.float32))
        return values

    def _scaling(self, values: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
        """Llama 3.1's stretching, of which the file holds only the factor of each frequency."""
        from t5x_audio.backbone import rope

        head_dim = 2 * len(factors)
        scaling = rope.Llama3Scaling(factor=float(factors.max()))
        plain = rope.frequencies(head_dim, values["rope_theta"])
        if not np.allclose(
            plain / factors, rope.frequencies(head_dim, values["rope_theta"], scaling), rtol=1e-4
        ):
            raise UserError(f"{self._path}: {_FREQUENCIES} is not the stretching of Llama 3.1")
        return hugging_face.scaling_values(scaling)

    def _field(self, fields: dict[str, Any], name: str, *default):
        if name in fields:
            return fields[name]()
        if not default:
            raise UserError(f"{self._path}: lacks the field {name}")
        return default[0]


def _hugging_face_name(name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'; unknown ones stay."""
    stem, _, kind = name.rpartition(".")
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        inner = _LAYER_NAMES.get(layer[2])
        return f"model.layers.{layer[1]}.{inner}.{kind}" if inner else name
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name
