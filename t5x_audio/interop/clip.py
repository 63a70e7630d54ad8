"""CLIP's vision tower, from a Hugging Face checkpoint, as the frozen encoder of images.

A checkpoint of CLIPModel or CLIPVisionModel: config.json and model.safetensors, of which only the
tensors of the tower are read. LLaVA (arXiv 2304.08485) takes the patches behind the last layer but
one, so that layer is left out. Source: modeling_clip.py of transformers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.interop.safetensors_files import SINGLE_FILE
from t5x_audio.tokenizers.image_encoder import (
    FrozenImageEncoder,
    ImageEncoder,
    ImageEncoderConfig,
)

_PREFIX = "vision_model."
# Linear layers of a block: name there, name here.
_LINEAR = {
    "self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "value",
    "self_attn.out_proj": "out", "mlp.fc1": "up", "mlp.fc2": "down",
}  # fmt: skip
_NORMS = {"layer_norm1": "attention_norm", "layer_norm2": "mlp_norm"}


def load_clip(folder: str, skip_layers: int = 1, dtype: str = "float32") -> FrozenImageEncoder:
    """The encoder of a checkpoint.

    Args:
      folder: with config.json and model.safetensors.
      skip_layers: layers at the end that are not run.
      dtype: of the computation.

    Raises:
      UserError: naming the file, when one is missing or holds no such tower.
    """
    import safetensors

    config = _config(Path(folder) / "config.json", skip_layers, dtype)
    path = Path(folder) / SINGLE_FILE
    try:
        with safetensors.safe_open(path, framework="np") as file:
            # transformers 5 saves a CLIPVisionModel without the prefix.
            prefixed = any(name.startswith(_PREFIX) for name in file.keys())  # noqa: SIM118
            prefix = _PREFIX if prefixed else ""
            read = lambda name: file.get_tensor(prefix + name)  # noqa: E731
            return FrozenImageEncoder(_filled(config, read))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder with a CLIP checkpoint") from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: holds no such vision tower ({error})") from error


def _config(path: Path, skip_layers: int, dtype: str) -> ImageEncoderConfig:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        # The towers' defaults are left out of config.json; those of ViT-B/32.
        values = values.get("vision_config", values)
        return ImageEncoderConfig(
            image_size=values.get("image_size", 224),
            patch_size=values.get("patch_size", 32),
            width=values.get("hidden_size", 768),
            num_layers=values.get("num_hidden_layers", 12) - skip_layers,
            num_heads=values.get("num_attention_heads", 12),
            mlp_dim=values.get("intermediate_size", 3072),
            activation=values.get("hidden_act", "quick_gelu"),
            dtype=dtype,
        )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder with a CLIP checkpoint") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: unreadable ({error})") from error


def _filled(config: ImageEncoderConfig, read: Callable[[str], np.ndarray]) -> ImageEncoder:
    """The encoder with the tensors that `read` gives by name."""
    encoder = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))

    def put(variable, array):
        if variable.shape != array.shape:
            raise ValueError(f"{array.shape} in place of {variable.shape}")
        variable.set_value(np.asarray(array, np.float32))

    def take(name):
        return np.asarray(read(name), np.float32)

    kernel = take("embeddings.patch_embedding.weight")  # [width, 3, patch, patch]
    put(encoder.patches, kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel)))
    put(encoder.class_token, take("embeddings.class_embedding"))
    put(encoder.positions, take("embeddings.position_embedding.weight"))
    put(encoder.norm.scale, take("pre_layrnorm.weight"))
    put(encoder.norm.bias, take("pre_layrnorm.bias"))

    def stack(name):
        return np.stack([take(f"encoder.layers.{i}.{name}") for i in range(config.num_layers)])

    blocks = encoder.blocks.stack
    for there, here in _LINEAR.items():
        layer = getattr(blocks, here)
        put(layer.kernel, stack(f"{there}.weight").swapaxes(1, 2))
        if layer.bias is not None:
            put(layer.bias, stack(f"{there}.bias"))
    for there, here in _NORMS.items():
        put(getattr(blocks, here).scale, stack(f"{there}.weight"))
        put(getattr(blocks, here).bias, stack(f"{there}.bias"))
    return encoder
