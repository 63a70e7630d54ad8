"""The backbone's sizes and batch as gin/models/<size>.gin states them, so benchmarks hold none."""

import ast
import pathlib
import re

from t5x_audio.backbone.transformer import TransformerConfig

_MODELS = pathlib.Path(__file__).resolve().parent.parent / "gin" / "models"


def macros(size: str) -> dict[str, object]:
    """{name: value} of the plain macros of a size file."""
    text = (_MODELS / f"{size}.gin").read_text()
    found = re.findall(r"^([A-Z0-9_]+) = (.+)$", text, re.MULTILINE)
    return {name: ast.literal_eval(value) for name, value in found}


def backbone(values: dict[str, object]) -> TransformerConfig:
    """The configuration that gin/models/backbone.gin makes of these macros."""
    return TransformerConfig(
        num_layers=values["BACKBONE_LAYERS"],
        embed=values["BACKBONE_EMBED"],
        mlp=values["BACKBONE_MLP"],
        num_heads=values["BACKBONE_HEADS"],
        num_kv_heads=values["BACKBONE_KV_HEADS"],
        head_dim=values["BACKBONE_HEAD_DIM"],
        vocab_size=values["BACKBONE_VOCAB"],
        dtype=values["BACKBONE_DTYPE"],
        remat=values["BACKBONE_REMAT"],
        scan_unroll=values["BACKBONE_SCAN_UNROLL"],
    )
