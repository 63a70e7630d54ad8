# ruff: noqa: E402
"""Training tokens per second of the backbone, ours beside the same model in PyTorch eager.

Both start from the same weights and train on the same packed batch in this one process, a step of
one after a step of the other, so that whatever else the machine does meets both. Losses of the
first steps must agree, else nothing is reported.

    .venv-parity/bin/python benchmarks/lm_step.py --size=tiny

FLOPs are the model's: 6 per weight and token of the matrix products, and 12 per layer, head
dimension and visible key of the attention, with full-length rows and the causal half counted once;
recomputation is not counted. The peak is the faster library's product of two 2,048 x 2,048 float32
matrices. CPU seconds are those of all threads: on a busy machine they say more than the clock.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.sizes import backbone, macros
from t5x_audio.objectives.language_modeling import LanguageModeling
from t5x_audio.training.host_memory import keep_freed_memory
from t5x_audio.training.learner import GradientLearner
from t5x_audio.training.optimizers import AdamW

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01


def packed_batch(vocab: int, rows: int, length: int, segments: int = 4) -> dict[str, np.ndarray]:
    """Random tokens in rows of `segments` examples of unlike lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, length), segments - 1, replace=False))
        for number, span in enumerate(np.split(np.arange(length), cuts), 1):
            segment_ids[row, span] = number
            positions[row, span] = np.arange(len(span))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((rows, length), np.float32),
        "segment_ids": segment_ids,
        "positions": positions,
    }


class Ours:
    """The learner's own step, compiled as the loop compiles it."""

    def __init__(self, config, batch):
        optimizer = AdamW(
            peak_lr=LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY, clip_norm=1.0
        )
        learner = GradientLearner(config, LanguageModeling(), optimizer)
        self.state = jax.jit(learner.init)(jax.random.key(0))
        self.batch = {name: jnp.asarray(array) for name, array in batch.items()}
        self.run = jax.jit(learner.step, donate_argnums=0)

    def weights(self):
        state = nnx.to_pure_dict(self.state.params["model"])
        return jax.tree.map(lambda a: np.array(a), state)

    def step(self) -> float:
        self.state, metrics = self.run(self.state, self.batch, jax.random.key(1))
        total, weight = metrics["loss"]
        return float(total) / float(weight)


def model_flops(config, rows: int, length: int) -> float:
    """Of one training step; see the module docstring."""
    attention = config.embed * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    per_layer = attention + 3 * config.embed * config.mlp
    weights = config.num_layers * per_layer + config.embed * config.vocab_size
    width = config.num_layers * config.num_heads * config.head_dim
    return rows * length * (6 * weights + 12 * width * length / 2)


def matmul_peak(threads: int) -> float:
    """FLOP/s of the faster of both libraries."""
    import torch

    torch.set_num_threads(threads)
    a = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    on_torch, on_jax = torch.from_numpy(a), jnp.asarray(a)
    product = jax.jit(jnp.matmul)
    best = min(
        _seconds(call)
        for call in (
            lambda: on_torch @ on_torch,
            lambda: product(on_jax, on_jax).block_until_ready(),
        )
        for _ in range(6)
    )
    return 2 * 2048**3 / best


def _seconds(call) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(trainers: dict, steps: int) -> dict[str, dict[str, float]]:
    """Medians of wall-clock and CPU seconds a step, the trainers taking turns."""
    wall, cpu = ({name: [] for name in trainers} for _ in range(2))
    for _ in range(steps):
        for name, trainer in trainers.items():
            begun, busy = time.perf_counter(), time.process_time()
            trainer.step()
            wall[name].append(time.perf_counter() - begun)
            cpu[name].append(time.process_time() - busy)
    return {
        name: {"seconds": statistics.median(wall[name]), "cpu": statistics.median(cpu[name])}
        for name in trainers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="tiny", help="a file of gin/models")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; XLA takes all cores")
    parser.add_argument("--plain-malloc", action="store_true", help="leave the allocator alone")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    if not flags.plain_malloc:
        keep_freed_memory()
    from benchmarks import torch_step1

    values = macros(flags.size)
    config = backbone(values)
    rows, length = values["SEQUENCES_BATCH"], values["SEQUENCES_LENGTH"]
    batch = packed_batch(config.vocab_size, rows, length)
    ours = Ours(config, batch)
    peer = torch_step1.Trainer(
        config, ours.weights(), batch, LEARNING_RATE, WEIGHT_DECAY, flags.threads
    )
    losses = [(ours.step(), peer.step()) for _ in range(3)]
    if not np.allclose(*zip(*losses, strict=True), rtol=2e-3):
        sys.exit(f"error: the two models differ, losses {losses}: there is nothing to compare")
    times = measure({"jax": ours, "torch": peer}, flags.steps)
    flops, peak = model_flops(config, rows, length), matmul_peak(flags.threads)
    report = {"size": flags.size, "rows": rows, "length": length, "losses": losses}
    for name, time_of in times.items():
        report[name] = time_of | {
            "tokens_per_second": rows * length / time_of["seconds"],
            "gflops": flops / time_of["seconds"] / 1e9,
            "of_peak": flops / time_of["seconds"] / peak,
        }
    report["peak_gflops"] = peak / 1e9
    report["ratio"] = times["torch"]["seconds"] / times["jax"]["seconds"]
    report["cpu_ratio"] = times["torch"]["cpu"] / times["jax"]["cpu"]
    print(json.dumps(report) if flags.json else _table(report))


def _table(report) -> str:
    lines = [
        f"{report['size']}: {report['rows']} x {report['length']} tokens a step, "
        f"matmul peak {report['peak_gflops']:.0f} GFLOP/s",
        f"{'':6} {'tokens/s':>9} {'s/step':>7} {'CPU s':>6} {'GFLOP/s':>8} {'of peak':>8}",
    ]
    for name in ("jax", "torch"):
        row = report[name]
        lines.append(
            f"{name:6} {row['tokens_per_second']:9.0f} {row['seconds']:7.3f} {row['cpu']:6.2f} "
            f"{row['gflops']:8.1f} {row['of_peak']:8.1%}"
        )
    lines.append(f"jax / torch: {report['ratio']:.2f} (by CPU seconds {report['cpu_ratio']:.2f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
