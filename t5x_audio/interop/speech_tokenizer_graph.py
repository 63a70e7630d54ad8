"""Writes the graph of a speech tokenizer in the form of CosyVoice's `speech_tokenizer_v1.onnx`.

Nodes and named weights are called as in the published file, as far as its readers tell (S3Tokenizer
and mlx-speech find weights by them); constants that are no weights are nodes, as there. The graph
takes batches and masks what lies beyond a row's length. Operators of opset 14, float32.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from t5x_audio.interop.onnx_writer import Builder
from t5x_audio.tokenizers import semantic
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig

_OPSET = 14
_MASKED = -1e10  # added to the scores of frames beyond the end
_NORM_EPSILON, _UNIT_EPSILON = 1e-5, 1e-12
_CODEBOOK = "/quantizer/rq/model/layers.0/_codebook"
_PLACES = {  # our name -> scope of its nodes under a block, name of its weights
    "query": "attn/query", "key": "attn/key", "value": "attn/value", "out": "attn/out",
    "up": "mlp/mlp.0", "down": "mlp/mlp.2",
}  # fmt: skip


def write(
    path: pathlib.Path, weights: Mapping[str, np.ndarray], config: SemanticTokenizerConfig
) -> None:
    """Writes a file; it appears under its name only when complete.

    Args:
      path: of the new file.
      weights: of `speech_tokenizer.tensors`, by their names.
      config: sizes.
    """
    from onnx import TensorProto

    builder = _Builder(weights)
    indices = _tokenizer(builder, config)
    builder.add("Identity", indices, output="indices")
    mels = semantic.LOG_MEL.num_mels
    builder.write(
        path,
        "speech_tokenizer",
        {
            "feats": (TensorProto.FLOAT, ["batch", mels, "frames"]),
            "feats_length": (TensorProto.INT32, ["batch"]),
        },
        {"indices": (TensorProto.INT64, ["batch", "codes"])},
        _OPSET,
    )


class _Builder(Builder):
    """With the layers of this network."""

    def linear(self, x: str, ours: str, scope: str, name: str, bias: bool = True) -> str:
        """X times a matrix, plus a bias."""
        x = self.add("MatMul", x, self.weight(f"{ours}.weight", f"{name}.weight"), scope=scope)
        if bias:
            x = self.add("Add", self.weight(f"{ours}.bias", f"{name}.bias"), x, scope=scope)
        return x

    def layer_norm(self, x: str, ours: str, scope: str, name: str) -> str:
        """Over the last axis, spelled out: opset 14 has it in no other way."""
        centred = self.add("Sub", x, self.add("ReduceMean", x, scope=scope, axes=[-1]), scope=scope)
        square = self.add("Pow", centred, self.constant(2.0, scope=scope), scope=scope)
        variance = self.add("ReduceMean", square, scope=scope, axes=[-1])
        floored = self.add("Add", variance, self.constant(_NORM_EPSILON, scope=scope), scope=scope)
        normal = self.add("Div", centred, self.add("Sqrt", floored, scope=scope), scope=scope)
        scaled = self.add(
            "Mul", normal, self.weight(f"{ours}.weight", f"{name}.weight"), scope=scope
        )
        return self.add("Add", scaled, self.weight(f"{ours}.bias", f"{name}.bias"), scope=scope)

    def gelu(self, x: str, scope: str) -> str:
        """The exact one, by erf."""
        erf = self.add(
            "Erf",
            self.add("Div", x, self.constant(np.sqrt(2.0), scope=scope), scope=scope),
            scope=scope,
        )
        one_more = self.add("Add", erf, self.constant(1.0, scope=scope), scope=scope)
        product = self.add("Mul", x, one_more, scope=scope)
        return self.add("Mul", product, self.constant(0.5, scope=scope), scope=scope)

    def size(self, x: str, axis: int) -> str:
        """The size of an axis, int64 []."""
        return self.add("Gather", self.add("Shape", x), self.constant(axis, np.int64))

    def valid(self, lengths: str, size: str) -> str:
        """Float [B, 1, size]: 1 within lengths int64 [B], 0 beyond."""
        start, step = self.constant(0, np.int64), self.constant(1, np.int64)
        frames = self.add("Range", start, size, step)
        ends = self.add("Unsqueeze", lengths, self.constant([1, 2], np.int64))
        return self.add("Cast", self.add("Less", frames, ends), to=1)


def _tokenizer(b: _Builder, config: SemanticTokenizerConfig) -> str:
    """The whole network; the name of the codes."""
    x, valid = _convolutions(b)
    x = b.add("Transpose", x, perm=[0, 2, 1])
    table = b.add(
        "Slice",
        b.weight("positions", "encoders.positional_embedding"),
        b.constant([0], np.int64),
        b.add("Unsqueeze", b.size(x, 1), b.constant([0], np.int64)),
        b.constant([0], np.int64),
    )
    x = b.add("Add", x, table)
    beyond = b.add("Sub", b.constant(1.0), valid)
    bias = b.add("Unsqueeze", b.add("Mul", beyond, b.constant(_MASKED)), b.constant([1], np.int64))
    for layer in range(config.num_layers):
        x = _block(b, x, bias, layer, config)
    return _nearest(b, x)


def _convolutions(b: _Builder) -> tuple[str, str]:
    """([B, width, frames], their validity [B, 1, frames])."""
    x, lengths = "feats", b.add("Cast", "feats_length", to=7)
    for name in ("conv1", "conv2"):
        masked = b.add("Mul", x, b.valid(lengths, b.size(x, 2)))
        kernel = b.weight(f"{name}.weight", f"encoders.{name}.weight")
        bias = b.weight(f"{name}.bias", f"encoders.{name}.bias")
        geometry = {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}
        x = b.gelu(b.add("Conv", masked, kernel, bias, scope=f"/{name}", **geometry), "")
        one, two = b.constant(1, np.int64), b.constant(2, np.int64)
        lengths = b.add("Div", b.add("Add", lengths, one), two)
    return x, b.valid(lengths, b.size(x, 2))


def _block(b: _Builder, x: str, bias: str, layer: int, config: SemanticTokenizerConfig) -> str:
    """One pre-norm block."""
    ours, scope, name = f"blocks.{layer}", f"/blocks.{layer}", f"encoders.blocks.{layer}"

    def linear(value: str, which: str) -> str:
        place = _PLACES[which]
        names = f"{name}.{place.replace('/mlp.', '.').replace('/', '.')}"
        return b.linear(value, f"{ours}.{which}", f"{scope}/{place}", names, which != "key")

    def norm(value: str, which: str, place: str) -> str:
        return b.layer_norm(value, f"{ours}.{which}", f"{scope}/{place}", f"{name}.{place}")

    inside = f"{scope}/attn"
    normal = norm(x, "attention_norm", "attn_ln")
    query, key, value = (linear(normal, which) for which in ("query", "key", "value"))
    shape = [0, 0, config.num_heads, config.width // config.num_heads]
    split = b.constant(shape, np.int64, inside)
    # The second constant here is the number of heads in the published graph: a reader takes it.
    heads = b.constant(config.num_heads, np.int64, inside)
    size = b.add("Div", b.size(normal, 2), heads, scope=inside)
    power = b.constant(-0.25, np.float32, inside)
    scale = b.add("Pow", b.add("Cast", size, scope=inside, to=1), power, scope=inside)
    parts = {}
    for which, part, order in (
        ("query", query, [0, 2, 1, 3]),
        ("key", key, [0, 2, 3, 1]),
        ("value", value, [0, 2, 1, 3]),
    ):
        part = b.add("Reshape", part, split, scope=inside)
        part = b.add("Transpose", part, scope=inside, perm=order)
        parts[which] = part if which == "value" else b.add("Mul", part, scale, scope=inside)
    scores = b.add("MatMul", parts["query"], parts["key"], scope=inside)
    seen = b.add("Softmax", b.add("Add", scores, bias, scope=inside), scope=inside, axis=-1)
    mixed = b.add("MatMul", seen, parts["value"], scope=inside)
    mixed = b.add("Transpose", mixed, scope=inside, perm=[0, 2, 1, 3])
    joined = b.constant([0, 0, config.width], np.int64, inside)
    mixed = b.add("Reshape", mixed, joined, scope=inside)
    x = b.add("Add", x, linear(mixed, "out"), scope=scope)
    hidden = b.gelu(linear(norm(x, "mlp_norm", "mlp_ln"), "up"), f"{scope}/mlp/mlp.1")
    return b.add("Add", x, linear(hidden, "down"), scope=scope)


def _nearest(b: _Builder, x: str) -> str:
    """Index of the code nearest to the features at unit length."""
    length = b.add("ReduceL2", x, axes=[-1])
    x = b.add("Div", x, b.add("Max", length, b.constant(_UNIT_EPSILON)))
    codes = b.weight("codebook", "quantizer.codebook")
    two, axis = b.constant(2.0, scope=_CODEBOOK), b.constant([-1], np.int64, _CODEBOOK)
    own = b.add("ReduceSum", b.add("Pow", x, two, scope=_CODEBOOK), axis, scope=_CODEBOOK)
    cross = b.add("MatMul", x, codes, scope=_CODEBOOK)
    first = b.constant([0], np.int64, _CODEBOOK)
    squares = b.add("ReduceSum", b.add("Pow", codes, two, scope=_CODEBOOK), first, scope=_CODEBOOK)
    distance = b.add("Sub", own, b.add("Mul", cross, two, scope=_CODEBOOK), scope=_CODEBOOK)
    distance = b.add("Add", distance, squares, scope=_CODEBOOK)
    return b.add("ArgMin", distance, scope=_CODEBOOK, axis=-1, keepdims=0)
