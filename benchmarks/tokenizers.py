# ruff: noqa: E402
"""Codes per second of both tokenizers at the published size, ours beside the reference's.

The linguistic encoder (SAN-M, 50 layers) beside FunASR's in PyTorch: a padded batch with full
context, and one recording chunk by chunk with caches. The semantic tokenizer beside onnxruntime on
the graph that S3Tokenizer exports, a padded batch and one recording. Weights are random and the
same on both sides, features too; outputs must agree, else nothing is reported. All run in this one
process, a call of one after a call of the other, so that whatever else the machine does meets both;
freed memory is kept, as in every job.

    .venv-parity/bin/python benchmarks/tokenizers.py

A ratio is that of CPU seconds, those of all threads, which say more than the clock on a busy
machine; the real-time factor is by the clock. The page goes to docs/results/.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The project is run from its tree; the references are built as the parity tests build them.
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import test_linguistic
import test_semantic
import torch
from flax import nnx

from t5x_audio import cpu_weights
from t5x_audio.evaluation import summary
from t5x_audio.interop import paraformer, speech_tokenizer
from t5x_audio.tokenizers import batching
from t5x_audio.training.host_memory import keep_freed_memory

RATE = 16000
CHUNK_SECONDS = 0.24


@dataclasses.dataclass
class Race:
    """Two ways to the same result. `seconds`: of speech in a call; `flops`: of ours."""

    name: str
    peer: str
    seconds: float
    ours: Callable[[], np.ndarray]
    theirs: Callable[[], np.ndarray]
    flops: float
    tolerance: float

    def check(self) -> None:
        mine, other = self.ours(), self.theirs()
        difference = np.abs(mine - other).max() / max(np.abs(other).max(), 1)
        wrong = np.mean(mine != other) if self.tolerance == 0 else difference > self.tolerance
        if wrong > 0.005:
            sys.exit(f"{self.name}: the two do not agree ({difference:.1e}); nothing is reported")

    def run(self, repeats: int) -> dict[str, list[tuple[float, float]]]:
        """(wall, CPU) seconds of each call."""
        found = {"ours": [], "theirs": []}
        for _ in range(repeats):
            for name, call in (("ours", self.ours), ("theirs", self.theirs)):
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        return found


def flops_of(module, rows: int) -> float:
    """Of the products with weights, for so many frames; convolutions count as if at their end."""
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    return 2.0 * rows * sum(leaf.size for leaf in leaves if leaf.ndim > 1)


def speech(count: int) -> list[np.ndarray]:
    """Recordings of like length: parts of the two that the parity tests have."""
    whole = conftest.recordings()
    return [np.roll(whole[i % 2], 5000 * i)[: 4 * RATE - 3000 * (i % 3)] for i in range(count)]


def linguistic(folder: pathlib.Path, rows: int) -> list[Race]:
    model = test_linguistic.reference()
    recordings = speech(rows)
    test_linguistic.write_folder(folder, model, recordings)
    plain = test_linguistic.front_end(test_linguistic.WavFrontend, folder)
    centres = np.random.default_rng(0).normal(size=(1024, 512)).astype(np.float32)
    np.save(folder / "linguistic_tokenizer.npy", centres)
    ours, _ = paraformer.load(folder, folder / "linguistic_tokenizer.npy")
    frames = [plain(torch.tensor(x)[None], [len(x)])[0][0] for x in recordings]
    return [_full_context(ours, model, frames, recordings), _chunks(ours, model, frames[0])]


def _full_context(ours, model, frames, recordings) -> Race:
    lengths = torch.tensor([len(x) for x in frames])
    padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
    encoder = test_linguistic.offline(model)
    module = test_linguistic.with_context(ours, "full")
    module = cpu_weights.arranged(module, batching.MAX_LAYERS_APART)
    run, state = _compiled(module, lambda m, x, n: m.encoder(x, n))
    arguments = state, jnp.asarray(padded.numpy()), jnp.asarray(lengths.numpy())
    run = run.lower(*arguments).compile()
    valid = np.arange(padded.shape[1]) < lengths.numpy()[:, None]

    @torch.no_grad()
    def theirs():
        return encoder(padded, lengths)[0].numpy()[valid]

    seconds = sum(len(x) for x in recordings) / RATE
    name = f"linguistic, full context, a batch of {len(frames)}"
    return Race(
        name,
        "FunASR",
        seconds,
        lambda: np.asarray(run(*arguments))[valid],
        theirs,
        flops_of(ours.encoder, valid.size),
        1e-4,
    )


def _chunks(ours, model, frames) -> Race:
    size = test_linguistic.CHUNK[1]
    count = len(frames) // size
    chunks = frames[: count * size].reshape(count, 1, size, -1)
    module = cpu_weights.arranged(ours)
    run, state = _compiled(module, lambda m, *arguments: m.encoder.step(*arguments))
    first = ours.encoder.initial_state(1)
    pieces, full = [jnp.asarray(x.numpy()) for x in chunks], jnp.asarray([size])
    run = run.lower(state, pieces[0], full, first).compile()

    def mine():
        caches, outputs = first, []
        for piece in pieces:
            out, caches = run(state, piece, full, caches)
            outputs.append(np.asarray(out[0]))  # each is wanted before the next one
        return np.concatenate(outputs)

    @torch.no_grad()
    def theirs():
        cache, outputs = {}, []
        model.init_cache(
            cache,
            chunk_size=test_linguistic.CHUNK,
            encoder_chunk_look_back=test_linguistic.LOOK_BACK,
            encoder_conf=test_linguistic.encoder_values(),
            frontend_conf=test_linguistic.FRONT_END,
        )
        for piece in chunks:
            out, _ = model.encode_chunk(piece, torch.tensor([size]), cache=cache)
            outputs.append(out[0, -size:].numpy())
        return np.concatenate(outputs)

    name = "linguistic, chunk by chunk of 0.24 s"
    flops = flops_of(module.encoder, count * (size + module.encoder.config.overlap_frames))
    return Race(name, "FunASR", count * CHUNK_SECONDS, mine, theirs, flops, 1e-4)


def semantic(folder: pathlib.Path, rows: int) -> list[Race]:
    recordings = speech(rows)
    model = test_semantic.reference(recordings[:2])
    folder.mkdir()
    path = folder / "speech_tokenizer_v1.onnx"
    test_semantic.export(model, path)
    del model
    session, (ours, _) = test_semantic.run_file(path), speech_tokenizer.load(path)
    module = cpu_weights.arranged(ours, batching.MAX_LAYERS_APART)
    run, state = _compiled(module, lambda m, x, n: m.quantizer.encode(m.hidden(x, n)[0]))
    races = []
    for count in (rows, 1):
        mels, lengths = test_semantic.s3tokenizer.padding(
            [test_semantic.features(x) for x in recordings[:count]]
        )
        inputs = {"feats": mels.numpy(), "feats_length": lengths.numpy().astype(np.int32)}
        arguments = state, jnp.asarray(mels.numpy().swapaxes(1, 2)), jnp.asarray(lengths.numpy())
        compiled = run.lower(*arguments).compile()
        codes = (lengths.numpy() + 3) // 4
        valid = np.arange(codes.max()) < codes[:, None]
        name = "one recording" if count == 1 else f"a batch of {count}"
        races.append(
            Race(
                f"semantic, {name}",
                "onnxruntime",
                sum(len(x) for x in recordings[:count]) / RATE,
                lambda c=compiled, a=arguments, v=valid: np.asarray(c(*a))[v],
                lambda i=inputs, v=valid: session.run(None, i)[0].reshape(v.shape)[v],
                flops_of(ours, valid.size),
                0,
            )
        )
    return races


def _compiled(module, call):
    graph, state = nnx.split(module)
    return jax.jit(lambda state, *arguments: call(nnx.merge(graph, state), *arguments)), state


def peak() -> float:
    """FLOP/s of the faster library's product of two 2,048 x 2,048 float32 matrices."""
    a = np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32)
    product, x, t = jax.jit(lambda x: x @ x), jnp.asarray(a), torch.tensor(a)
    best = 0.0
    for call in (lambda: product(x).block_until_ready(), lambda: t @ t):
        call()
        for _ in range(5):
            start = time.perf_counter()
            call()
            best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def row(race: Race, repeats: int) -> tuple[str, ...]:
    race.check()
    times = race.run(repeats)
    clock = {k: statistics.median(wall for wall, _ in v) for k, v in times.items()}
    ratios = sorted(b[1] / a[1] for a, b in zip(times["ours"], times["theirs"], strict=True))
    by_clock = statistics.median(
        b[0] / a[0] for a, b in zip(times["ours"], times["theirs"], strict=True)
    )
    return (
        race.name,
        race.peer,
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{by_clock:.2f}",
        f"{clock['ours'] / race.seconds:.3f}",
        f"{clock['theirs'] / race.seconds:.3f}",
        f"{race.flops / clock['ours'] / 1e9:.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--rows",
        type=int,
        default=16,
        help="recordings of about 4 s; 16 are a batch of a corpus job",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    flags = parser.parse_args()
    keep_freed_memory()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for make in (linguistic, semantic):
            for race in make(pathlib.Path(folder) / make.__name__, flags.rows):
                rows.append(row(race, flags.repeats))
                print(*rows[-1], sep=" | ", flush=True)
    columns = ("what", "beside", "times as fast", "by the clock")
    columns += ("real-time factor", "of the other", "our GFLOP/s")
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "torch", "funasr", "onnxruntime")
    )
    text = "\n\n".join(
        (
            "# Speed of the tokenizers at the published size",
            f"Made by `python benchmarks/tokenizers.py {' '.join(sys.argv[1:])}`".rstrip(" `")
            + f"` (seed 0; {os.cpu_count()} cores, {platform.machine()}, {datetime.date.today()}; "
            f"{versions}; float32; large matrices are multiplied at {peak() / 1e9:.0f} GFLOP/s).",
            "From features to outputs (linguistic) or codes (semantic) on two Mandarin sentences. "
            f"Medians of {flags.repeats} calls in turn: times as fast by CPU seconds (range of the "
            "pairs) and by the clock; real-time factors by the clock.",
            summary.table_markdown(summary.Table("", columns, tuple(rows))),
        )
    )
    (flags.output / "tokenizer_speed.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
