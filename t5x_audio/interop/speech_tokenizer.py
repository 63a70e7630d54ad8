"""The published semantic tokenizer from and to its file: `speech_tokenizer_v1.onnx` of CosyVoice.

The graph takes `feats` float32 [B, 128, T] and `feats_length` int32 [B] and gives `indices`. Its
exporter left most matrices without a name (`onnx::MatMul_1672`), so weights are told by what the
graph does with them (`onnx_graph`), never by name. What the published file looks like is known
from its readers, S3Tokenizer's `onnx2torch` and mlx-speech's `vq06`: layer norms in single steps,
biases apart from the products, one product per projection. A graph that is fused or quantised is
refused. What is written has the node names that these readers ask for.
"""

import pathlib
from typing import Any

import numpy as np

from t5x_audio.errors import UserError
from t5x_audio.interop import assembly, onnx_graph, speech_tokenizer_graph
from t5x_audio.interop.assembly import Tensor
from t5x_audio.tokenizers import semantic, whisper
from t5x_audio.tokenizers.semantic import SemanticTokenizer, SemanticTokenizerConfig

_PROJECTIONS = ("query", "key", "value", "out")


def load(path: pathlib.Path) -> tuple[SemanticTokenizer, dict[str, Any]]:
    """Reads a tokenizer.

    Returns:
      (the tokenizer, {'tensors', 'parameters', 'not_used'}: how many were read, and how many
      constants of the graph are no weights).

    Raises:
      UserError: missing, damaged, or another graph: what is missing, unknown or of another shape
        is named.
    """
    graph = onnx_graph.Graph(path)
    weights, heads = _weights(graph)
    config = _config(path, weights, heads)
    wanted = tensors(config)
    assembly.require_tensors(path, wanted, {n: a.shape for n, a in weights.items()})
    others = _others(graph, weights)
    arrays = assembly.to_ours(wanted, weights)
    codes = arrays["quantizer/codes"]
    # Even wins: a training that goes on keeps every code where it is.
    arrays |= {"quantizer/counts": np.ones(len(codes), np.float32), "quantizer/sums": codes}
    arrays["quantizer/steps"] = np.float32(0)
    return assembly.build(config, arrays), assembly.report(wanted) | {"not_used": others}


def save(model: SemanticTokenizer, path: pathlib.Path) -> dict[str, Any]:
    """Writes the graph of a tokenizer; layers of supervision and the CTC head are no part of it.

    Returns:
      {'tensors', 'parameters'} written. UserError if the file is there already.
    """
    if path.exists():
        raise UserError(f"{path}: is there already; give another file")
    wanted = tensors(model.config)
    arrays = assembly.from_ours(wanted, assembly.arrays_of(model))
    path.parent.mkdir(parents=True, exist_ok=True)
    speech_tokenizer_graph.write(path, arrays, model.config)
    return assembly.report(wanted)


def tensors(config: SemanticTokenizerConfig) -> list[Tensor]:
    """Every weight of a graph of this configuration, by our name for it there."""
    width, mlp, mels = config.width, config.mlp_dim, semantic.LOG_MEL.num_mels
    plain = (0, 1)  # a matrix that is the same way round on both sides
    found = [
        Tensor("positions", (semantic.MAX_FRAMES, width), "positions",
               (semantic.MAX_FRAMES, width), None, plain),
        Tensor("codebook", (width, config.codebook_size), "quantizer/codes",
               (config.codebook_size, width), None),
    ]  # fmt: skip
    for name, n_in in (("conv1", mels), ("conv2", width)):
        kernel = (whisper.KERNEL, n_in, width)
        found.append(Tensor(f"{name}.weight", kernel[::-1], f"{name}/kernel", kernel, None))
        found.append(Tensor(f"{name}.bias", (width,), f"{name}/bias", (width,), None))
    shapes = dict.fromkeys(_PROJECTIONS, (width, width)) | {
        "up": (width, mlp),
        "down": (mlp, width),
    }
    for layer in range(config.num_layers):
        for name, shape in shapes.items():
            there, here = f"blocks.{layer}.{name}", f"blocks/stack/{name}"
            found.append(Tensor(f"{there}.weight", shape, f"{here}/kernel", shape, layer, plain))
            if name != "key":
                bias = shape[1:]
                found.append(Tensor(f"{there}.bias", bias, f"{here}/bias", bias, layer))
        for name in ("attention_norm", "mlp_norm"):
            there, here = f"blocks.{layer}.{name}", f"blocks/stack/{name}"
            found.append(Tensor(f"{there}.weight", (width,), f"{here}/scale", (width,), layer))
            found.append(Tensor(f"{there}.bias", (width,), f"{here}/bias", (width,), layer))
    return found


def _config(path, weights: dict[str, np.ndarray], heads: int) -> SemanticTokenizerConfig:
    width = weights["codebook"].shape[0]
    if width % heads:
        raise UserError(f"{path}: {heads} heads do not divide a width of {width}")
    return SemanticTokenizerConfig(
        width=width,
        num_heads=heads,
        mlp_dim=weights["blocks.0.up.weight"].shape[-1],
        num_layers=sum(name.endswith("query.weight") for name in weights),
        codebook_size=weights["codebook"].shape[1],
        num_supervision_layers=0,
        text_size=0,
    )


def _weights(graph: onnx_graph.Graph) -> tuple[dict[str, np.ndarray], int]:
    """({our name for it there: weight}, number of heads), by the structure of the graph.

    A graph is in topological order, so that of the six products with a constant in a layer the
    last three are output, up and down; queries and keys are the two that reach the scores.
    """
    found: dict[str, np.ndarray] = {}

    def add(name: str, value: np.ndarray | None):
        if value is not None:
            found[name] = value

    convolutions = graph.of_type("Conv")
    softmaxes = graph.of_type("Softmax")
    products = [
        node for node in graph.of_type("MatMul") if graph.constant_operand(node) is not None
    ]
    if len(convolutions) != 2 or not softmaxes or len(products) != 6 * len(softmaxes) + 1:
        raise UserError(
            f"{graph.path}: has {len(convolutions)} convolutions, {len(softmaxes)} attentions and "
            f"{len(products)} products with weights, where 2, N and 6 N + 1 make a speech "
            "tokenizer; give the file as it was published"
        )
    for i, node in enumerate(convolutions, 1):
        add(f"conv{i}.weight", graph.input_constant(node, 1))
        add(f"conv{i}.bias", graph.input_constant(node, 2))
    heads = set()
    for layer, softmax in enumerate(softmaxes):
        *three, out, up, down = products[6 * layer : 6 * layer + 6]
        scores = graph.producer(softmax.input[0], "MatMul", but_not=three)
        query, key = (graph.producer(name, "MatMul", among=three) for name in scores.input)
        (value,) = [node for node in three if node not in (query, key)] or [None]
        if value is None or query is key:
            raise UserError(f"{graph.path}: attention {layer} is not made of three projections")
        heads.add(graph.heads_between(query, scores))
        named = dict(zip(_PROJECTIONS, (query, key, value, out), strict=True))
        for name, node in (named | {"up": up, "down": down}).items():
            add(f"blocks.{layer}.{name}.weight", graph.constant_operand(node))
            add(f"blocks.{layer}.{name}.bias", graph.added_constant(node))
        for name, node in (("attention_norm", query), ("mlp_norm", up)):
            scale, bias = graph.norm_before(node)
            add(f"blocks.{layer}.{name}.weight", scale)
            add(f"blocks.{layer}.{name}.bias", bias)
    found["codebook"] = graph.constant_operand(products[-1])
    if len(heads) != 1 or None in heads:
        raise UserError(f"{graph.path}: the number of attention heads cannot be told")
    add("positions", _positions(graph, found))
    return found, heads.pop()


def _positions(graph: onnx_graph.Graph, found: dict[str, np.ndarray]) -> np.ndarray | None:
    """The table [frames, width] that is left when all products have their weights."""
    width = found["codebook"].shape[0]
    tables = [
        array
        for array in graph.unused_weights()
        if array.ndim == 2 and array.shape[1] == width and not _same(array, found["codebook"])
    ]
    return tables[0] if len(tables) == 1 else None


def _others(graph: onnx_graph.Graph, found: dict[str, np.ndarray]) -> int:
    """How many constants of the graph are no weights. UserError where one looks like a weight."""
    graph.mark_used(found["positions"])
    codes = found["codebook"]
    norms = np.square(codes).sum(0)
    for name, array in graph.named_unused().items():
        # The distance needs the codes' norms, perhaps of a copy, perhaps computed beforehand.
        known = _same(array, codes) or (
            array.size == norms.size and np.allclose(array.reshape(-1), norms, rtol=1e-4)
        )
        if array.size > 1 and array.dtype.kind == "f" and not known:
            raise UserError(
                f"{graph.path}: has {name} {array.shape}, which no speech tokenizer needs; give "
                "the file as it was published"
            )
    return len(graph.named_unused())


def _same(array: np.ndarray, other: np.ndarray) -> bool:
    return any(np.array_equal(array, way) for way in (other, other.T))
