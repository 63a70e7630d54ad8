# ruff: noqa: E402
"""Decoding with weights of each width: bytes, tokens a second, and how far the logits move.

    python benchmarks/decoding_widths.py

The backbone of 100 million parameters of benchmarks/backbone.py with random weights: as it is, in
the kinds that a decoder prepares, and packed, which it unpacks for every token. All decode greedily
in this one process and take turns. The page goes to docs/results/.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import sys
import time

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from flax import nnx

from benchmarks.backbone import CONFIG
from t5x_audio.backbone import decoding_weights
from t5x_audio.backbone.decoding import Decoder, Sampling
from t5x_audio.evaluation import summary
from t5x_audio.quantization.packed_model import LANGUAGE_MODEL, PackedConfig, packed_model
from t5x_audio.training.host_memory import keep_freed_memory


def models(group: int) -> dict[str, tuple[nnx.Module, str | None]]:
    """{name: (model, kind that the decoder is to prepare)}."""
    whole = CONFIG.make(nnx.Rngs(0))
    found = {kind: (whole, kind) for kind in decoding_weights.KINDS}
    for bits in (8, 4, 3, 2):
        config = PackedConfig(CONFIG, bits, group, LANGUAGE_MODEL)
        packed = packed_model(nnx.merge(*nnx.split(whole)), config)
        found[f"packed, {bits} bits"] = (packed, None)
    return found


def figures(model, kind: str | None, tokens) -> tuple[float, np.ndarray]:
    """(MB of weights, logits)."""
    prepared = decoding_weights.prepare(model, kind)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(prepared)))
    return size / 1e6, np.asarray(nnx.jit(lambda m: m(tokens))(prepared))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--group", type=int, default=128, help="inputs that share a packed scale")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows decoded")
    parser.add_argument("--repeats", type=int, default=5, help="timed answers of each")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    flags = parser.parse_args()
    keep_freed_memory()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (2, flags.prompt))
    found = models(flags.group)
    sizes = {name: figures(*one, tokens) for name, one in found.items()}
    decoders = {name: Decoder(model, (), weights=kind) for name, (model, kind) in found.items()}
    options = dict(sampling=Sampling(temperature=0.0), max_new_tokens=flags.tokens)
    seconds: dict[tuple[str, int], list[float]] = {}
    for batch in flags.batches:
        prompts = rng.integers(0, CONFIG.vocab_size, (batch, flags.prompt)).tolist()
        for turn in range(flags.repeats + 1):  # the first compiles
            for name, decoder in decoders.items():
                begun = time.perf_counter()
                decoder.generate(prompts, **options)
                if turn:
                    taken = seconds.setdefault((name, batch), [])
                    taken.append(time.perf_counter() - begun)
    exact, rows = sizes["float32"][1], []
    for name, (size, logits) in sizes.items():
        error = np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2))
        speeds = (b * flags.tokens / statistics.median(seconds[name, b]) for b in flags.batches)
        rows.append((name, f"{size:.0f}", f"{100 * error:.2f} %", *(f"{x:.0f}" for x in speeds)))
    columns = ("weights", "MB", "error of the logits")
    columns += tuple(f"tokens/s, {batch} at once" for batch in flags.batches)
    text = "\n\n".join(
        (
            "# Decoding with weights of each width",
            f"Made by `{' '.join(['python benchmarks/decoding_widths.py', *sys.argv[1:]])}` (seed "
            f"0; {os.cpu_count()} cores, {platform.machine()}, {datetime.date.today()}; "
            f"jax {importlib.metadata.version('jax')}, qwix {importlib.metadata.version('qwix')}).",
            "The backbone of 100 million parameters of [backbone.md](backbone.md), random weights. "
            "int8 multiplies in float32, w8a8 integers with integers; packed weights, of which "
            f"{flags.group} inputs share a scale, are unpacked for every token. The error is the "
            "root mean square of the difference, in parts of that of the logits.",
            summary.table_markdown(summary.Table("", columns, tuple(rows))),
        )
    )
    (flags.output / "decoding_widths.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
