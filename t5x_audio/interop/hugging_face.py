"""Backbones from and to Hugging Face checkpoints: Step-1, Llama, Qwen2 and Qwen3.

What is the same and what is not: a linear layer is [out, in] there and [in, out] here, with its
heads as axes of their own; layers are stacked here. Every tensor's name and shape is compared with
the configuration before any is read. Tensors pass one at a time.

An imported model keeps config.json, the tokenizer's files and the layout of the safetensors files
under `<model_dir>/hugging_face/`: exported again, the weights are the same bytes in the same files.
Sources: configuration_*.py and modeling_*.py of transformers; modeling_step1.py of
stepfun-ai/Step-Audio-Chat.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from t5x_audio.backbone.rope import Llama3Scaling
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError

ARCHITECTURES = {
    "step1": "Step1ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FAMILIES = tuple(ARCHITECTURES)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor there and its place here.

    Attributes:
      name, shape: in the safetensors file.
      parameter, layer: here; layer None where there is no stack.
      inner: shape here, without the stack's axis.
      linear: transposed here.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    layer: int | None
    inner: tuple[int, ...]
    linear: bool

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """[out, in] -> [in, out with heads]; anything else as it is."""
        return (array.T if self.linear else array).reshape(self.inner)

    def from_ours(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.linear:
            return array.reshape(self.shape[::-1]).T
        return array.reshape(self.shape)


def tensors(config: TransformerConfig) -> list[Tensor]:
    """Every tensor of a checkpoint of this configuration."""
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    heads, groups = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
    found = [
        Tensor("model.embed_tokens.weight", *_flat("embedding", c.vocab_size, c.embed)),
        Tensor("model.norm.weight", *_flat("final_norm/scale", c.embed)),
    ]
    if not c.tied_head:
        shapes = (c.vocab_size, c.embed), (c.embed, c.vocab_size)
        found.append(Tensor("lm_head.weight", shapes[0], "head", None, shapes[1], True))
    # name there, parameter here, [out, in] there, shape here
    linear = [
        ("self_attn.q_proj", "query", (queries, c.embed), (c.embed, *heads)),
        ("self_attn.k_proj", "key", (keys, c.embed), (c.embed, *groups)),
        ("self_attn.v_proj", "value", (keys, c.embed), (c.embed, *groups)),
        ("self_attn.o_proj", "out", (c.embed, queries), (*heads, c.embed)),
        ("mlp.gate_proj", "gate", (c.mlp, c.embed), (c.embed, c.mlp)),
        ("mlp.up_proj", "up", (c.mlp, c.embed), (c.embed, c.mlp)),
        ("mlp.down_proj", "down", (c.embed, c.mlp), (c.mlp, c.embed)),
    ]
    plain = [
        ("input_layernorm.weight", "attention_norm/scale", (c.embed,), (c.embed,)),
        ("post_attention_layernorm.weight", "mlp_norm/scale", (c.embed,), (c.embed,)),
    ]
    if c.qkv_bias:
        plain += [
            ("self_attn.q_proj.bias", "query_bias", (queries,), heads),
            ("self_attn.k_proj.bias", "key_bias", (keys,), groups),
            ("self_attn.v_proj.bias", "value_bias", (keys,), groups),
        ]
    if c.qk_norm:
        plain += [
            ("self_attn.q_norm.weight", "query_norm/scale", (c.head_dim,), (c.head_dim,)),
            ("self_attn.k_norm.weight", "key_norm/scale", (c.head_dim,), (c.head_dim,)),
        ]
    rows = [(f"{n}.weight", *rest, True) for n, *rest in linear] + [(*r, False) for r in plain]
    for layer in range(c.num_layers):
        for name, parameter, shape, inner, transposed in rows:
            there, here = f"model.layers.{layer}.{name}", f"layers/{parameter}"
            found.append(Tensor(there, shape, here, layer, inner, transposed))
    return found


def _flat(parameter: str, *shape: int):
    return shape, parameter, None, shape, False


# ---- config.json -----------------------------------------------------------------------------


def read_config(path: Path) -> TransformerConfig:
    """The configuration that a config.json describes.

    Raises:
      UserError: no such file, another family, or something in it that our transformer has not.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder with a checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error})") from error
    return config_of(values, path)


def config_of(values: dict[str, Any], path: Path) -> TransformerConfig:
    """`read_config` of the values of a config.json; `path` is named in errors."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type {family!r} is none of {', '.join(FAMILIES)}")
    _refuse(path, values, family)
    try:
        heads, embed = values["num_attention_heads"], values["hidden_size"]
        groups = values.get("num_attention_groups" if family == "step1" else "num_key_value_heads")
        return TransformerConfig(
            num_layers=values["num_hidden_layers"],
            embed=embed,
            mlp=values["intermediate_size"],
            num_heads=heads,
            num_kv_heads=groups or heads,
            head_dim=values.get("head_dim") or embed // heads,
            vocab_size=values["vocab_size"],
            rms_eps=values.get("rms_norm_eps", 1e-6),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied_head=bool(values.get("tie_word_embeddings")) and family != "step1",
            init_std=values.get("initializer_range", 0.02),
            **(_alibi(values) if family == "step1" else _rope(path, values)),
        )
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}") from error


def _refuse(path: Path, values: dict, family: str) -> None:
    """UserError for settings that change the computation in a way we do not have."""
    wanted = {"hidden_act": ("silu",), "use_sliding_window": (False,), "mlp_bias": (False,)}
    if family != "qwen2":
        wanted["attention_bias"] = (False,)
    for name, allowed in wanted.items():
        if values.get(name, allowed[0]) not in allowed:
            raise UserError(f"{path}: {name}={values[name]!r} is not supported for {family}")


def _alibi(values: dict) -> dict[str, Any]:
    slopes = values.get("alibi_slopes")
    return {
        "positions": "alibi",
        "alibi_slopes": tuple(slopes) if slopes else None,
        "max_pos_interp_ratio": float(values.get("max_pos_interp_ratio") or 1.0),
    }


def _rope(path: Path, values: dict) -> dict[str, Any]:
    # transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
    stretched = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = stretched.get("rope_type") or stretched.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: rope_type {kind!r} is neither default nor llama3")
    scaling = None
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=stretched["factor"],
            low_freq_factor=stretched["low_freq_factor"],
            high_freq_factor=stretched["high_freq_factor"],
            original_length=stretched["original_max_position_embeddings"],
        )
    theta = stretched.get("rope_theta") or values.get("rope_theta") or 10000.0
    return {"positions": "rope", "rope_theta": float(theta), "rope_scaling": scaling}


def family_of(config: TransformerConfig) -> str:
    """The family whose checkpoints hold this configuration. UserError if there is none."""
    if config.positions == "alibi":
        if not (config.qkv_bias or config.qk_norm or config.tied_head):
            return "step1"
    elif config.qkv_bias != config.qk_norm:
        return "qwen2" if config.qkv_bias else "qwen3"
    elif not config.qkv_bias:
        return "llama"
    raise UserError(
        "no family of Hugging Face has this transformer: step1 has ALiBi and nothing else, llama, "
        "qwen2 (qkv_bias) and qwen3 (qk_norm) have RoPE"
    )


def config_values(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model that was not imported. `dtype` as torch names it."""
    family = family_of(config)
    values = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_attention_groups" if family == "step1" else "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }
    if family == "step1":
        if config.alibi_slopes:
            values["alibi_slopes"] = list(config.alibi_slopes)
        if config.max_pos_interp_ratio != 1.0:
            values["max_pos_interp_ratio"] = config.max_pos_interp_ratio
        return values
    values["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        values["rope_scaling"] = scaling_values(config.rope_scaling)
    return values


def scaling_values(scaling: Llama3Scaling) -> dict[str, Any]:
    """`rope_scaling` of a config.json."""
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }


def require_tensors(place: Path, config: TransformerConfig, shapes: dict[str, tuple]) -> None:
    """UserError naming what a checkpoint lacks, has too much or has in another shape."""
    wanted = {tensor.name: tensor.shape for tensor in tensors(config)}
    if config.tied_head:  # Some files hold the tied head as well: the same numbers.
        shapes = {name: s for name, s in shapes.items() if name != "lm_head.weight"}
    missing, extra = wanted.keys() - shapes.keys(), shapes.keys() - wanted.keys()
    extra -= {name for name in extra if name.endswith("rotary_emb.inv_freq")}
    for names, what in ((missing, "lacks"), (extra, "holds unknown")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{place}: {what} {', '.join(sorted(names)[:3])}{more}")
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise UserError(
                f"{place}: {name} is {tuple(shapes[name])}, but its config.json asks for {shape}"
            )


def stack_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Parameter here -> its shape, stacks with their first axis."""
    shapes = {}
    for tensor in tensors(config):
        stack = () if tensor.layer is None else (config.num_layers,)
        shapes[tensor.parameter] = (*stack, *tensor.inner)
    if config.soft_width:  # no tensor there
        shapes["soft_projector"] = (config.soft_width, config.embed)
    return shapes


def count(config: TransformerConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(shape) for shape in stack_shapes(config).values())
