# ruff: noqa: E402
"""Speed and memory of the vocoder at the published sizes, ours beside the reference in PyTorch.

    .venv-parity/bin/python benchmarks/vocoder.py

Codes to mel (10 Euler steps with guidance) and mel to samples, without prompt, weights random and
the same on both sides, read from the same files; mels and waveforms must agree, else nothing is
reported. Each side is a process of its own on the same cores, and they take turns, call by call;
both are started several times, since two starts of the same program can differ by a quarter.
Our programs are compiled for the length beforehand. The published code takes one utterance at a
time, so a batch is several calls of it. Memory is the highest resident set of a process during the
timed calls, weights and libraries included.

A ratio is that of the medians by the clock, its range that of the pairs; CPU seconds are those of
all threads. The page goes to docs/results/.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

# The project is run from its tree, in place of this folder, whose tokenizers.py hides a package.
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np

from t5x_audio.evaluation import summary

SIDES = ("ours", "theirs")
STAGES = ("flow", "hift")
CASES = ("5.04x1", "10.08x1", "5.04x4")  # seconds x utterances
SPEAKER_DIM, NUM_MELS, LINGUISTIC_SIZE, CODES = 192, 80, 1024, 5120
STREAM_COLUMNS = ("form", "speech waited for, s", "to the first samples, s", "chunk, s of speech")
STREAM_COLUMNS += ("a chunk, s", "real-time factor")
TOLERANCES = {"flow": 1e-3, "hift": 1e-2}  # relative to the largest value, float32 on both sides


@dataclasses.dataclass(frozen=True)
class Variant:
    """A form of the vocoder: what it is called, the mel's rate and hop, and who makes its parts.

    Attributes:
      flow, hift: names of functions of tests/parity/cosyvoice_reference.py.
      interop: modules of t5x_audio.interop that read the files of both.
      sizes: name of the keyword arguments of `hift` in cosyvoice_reference; None = none.
    """

    name: str
    rate: int
    hop: int
    flow: str
    hift: str = "hift"
    interop: tuple[str, str] = ("cosyvoice_flow", "cosyvoice_hift")
    sizes: str | None = None

    def frames(self, groups: int) -> int:
        return groups * 5 * 3 * self.rate // (125 * self.hop)


VARIANTS = {
    "cosyvoice1": Variant("CosyVoice-1 form, 22.05 kHz", 22050, 256, "flow"),
    "successor": Variant(
        "successors' form, 24 kHz", 24000, 480, "paired_flow",
        interop=("stepaudio2_flow", "cosyvoice_hift"), sizes="HIFT_24K",
    ),
}  # fmt: skip


def inputs(variant: Variant, seconds: float, rows: int) -> dict[str, np.ndarray]:
    """Codes, speaker vectors, noise, mels and sources of a case, the same on both sides."""
    rng = np.random.default_rng(0)
    groups = round(seconds / 0.12)
    frames = variant.frames(groups)
    linguistic = rng.integers(0, LINGUISTIC_SIZE, (rows, groups, 2))
    semantic = rng.integers(LINGUISTIC_SIZE, CODES, (rows, groups, 3))
    return {
        "codes": np.concatenate([linguistic, semantic], axis=2).reshape(rows, -1),
        "speaker": rng.normal(size=(rows, SPEAKER_DIM)).astype(np.float32),
        "noise": rng.normal(size=(rows, frames, NUM_MELS)).astype(np.float32),
        "mel": (rng.normal(size=(rows, frames, NUM_MELS)) - 3.0).astype(np.float32),
        "source": (0.1 * rng.normal(size=(rows, frames * variant.hop))).astype(np.float32),
    }


# ---- one side, in a process of its own ---------------------------------------------------------


class Theirs:
    """CosyVoice's modules; writes the files that ours are read from."""

    def __init__(self, variant: Variant, stages, folder: pathlib.Path, threads: int):
        import torch

        from tests.parity import cosyvoice_reference as reference

        torch.set_num_threads(threads)
        self.torch, self.variant = torch, variant
        for stage in stages:
            sizes = getattr(reference, variant.sizes) if stage == "hift" and variant.sizes else {}
            model = getattr(reference, getattr(variant, stage))(**sizes)
            torch.save(model.state_dict(), folder / f"{stage}.pt")
            setattr(self, stage, model)

    def calls(self, arrays) -> dict[str, Callable[[], np.ndarray]]:
        """stage -> what is timed, 'check hift' -> waveforms of given sources."""
        torch = self.torch
        made = {name: torch.tensor(array) for name, array in arrays.items()}
        mels = made["mel"].transpose(1, 2)
        rows = range(len(mels))

        @torch.inference_mode()
        def flow():
            return np.stack([self._mel(made, row).numpy()[0].T for row in rows])

        @torch.inference_mode()
        def hift():
            found = [self.hift.inference(mels[row : row + 1]) for row in rows]
            found = [one[0] if isinstance(one, tuple) else one for one in found]
            return np.concatenate([one.numpy() for one in found])

        @torch.inference_mode()
        def filtered():
            sources = made["source"][:, None]
            return np.concatenate(
                [self.hift.decode(x=mels[i : i + 1], s=sources[i : i + 1]).numpy() for i in rows]
            )

        return {"flow": flow, "hift": hift, "check hift": filtered}

    def _mel(self, made, row: int):
        torch, one = self.torch, slice(row, row + 1)
        codes, none = made["codes"][one], torch.zeros(1, 0, dtype=torch.long)
        noise, empty = made["noise"][one].transpose(1, 2).contiguous(), torch.zeros(1, 0, NUM_MELS)
        length, zero, speaker = torch.tensor([codes.shape[1]]), torch.tensor([0]), made["speaker"]
        if self.variant.flow == "flow":
            drawn, torch.randn_like = torch.randn_like, lambda _: noise.clone()
            try:
                return self.flow.inference(
                    codes, length, none, zero, empty, zero, speaker[one], torch.zeros(1, 80, 0, 2)
                )[0]
            finally:
                torch.randn_like = drawn
        self.flow.decoder.rand_noise = noise
        pairs = _pairs(codes[0])
        return self.flow.inference(
            pairs, torch.tensor([pairs.shape[1]]), none[..., None].expand(1, 0, 2), zero, empty,
            zero, speaker[one],
        )  # fmt: skip


def _pairs(codes):
    """[02, 02, 06, 06, 06] -> [[02, 06], [02, 06], [padding, 06]], group by group: [1, T, 2]."""
    import torch

    groups = codes.reshape(-1, 5)
    padding = torch.full((len(groups), 1), LINGUISTIC_SIZE)
    linguistic = torch.cat([groups[:, :2], padding], dim=1)
    return torch.stack([linguistic, groups[:, 2:] + 1], dim=-1).reshape(1, -1, 2)


class Ours:
    """The same weights, read from their files."""

    def __init__(self, variant: Variant, stages, folder: pathlib.Path, threads: int):
        import jax

        from t5x_audio import cpu_weights
        from t5x_audio.training.host_memory import keep_freed_memory

        keep_freed_memory()
        self.jax = jax
        for stage, module in zip(STAGES, variant.interop, strict=True):
            if stage in stages:
                reader = importlib.import_module(f"t5x_audio.interop.{module}")
                setattr(self, stage, cpu_weights.arranged(reader.load(folder / f"{stage}.pt")[0]))

    def calls(self, arrays) -> dict[str, Callable[[], np.ndarray]]:
        """As of `Theirs`, compiled."""
        jnp, key = self.jax.numpy, self.jax.random.key(0)
        x = {name: jnp.asarray(array) for name, array in arrays.items()}
        codes = x["codes"].astype(jnp.int32)
        lengths = jnp.full(len(codes), codes.shape[1])
        nothing = jnp.zeros(len(codes), jnp.int32)

        def flow(model, codes, lengths, speaker, noise, prompt_lengths):
            prompt = jnp.zeros(noise.shape)
            return model.sample(
                model.conditions(codes, lengths, speaker, prompt, prompt_lengths), noise
            )

        self.flops, made = {}, {}
        if hasattr(self, "flow"):
            given = codes, lengths, x["speaker"], x["noise"], nothing
            made["flow"] = self._compiled("flow", self.flow, flow, *given)
        if hasattr(self, "hift"):
            made["hift"] = self._compiled("hift", self.hift, lambda m, *a: m(*a), x["mel"], key)
            given = x["mel"], x["source"]
            made["check hift"] = self._compiled(
                "check hift", self.hift, lambda m, *a: m.decode(*a), *given
            )
        return made

    def stream(self, arrays) -> dict[str, float]:
        """Codes pushed group by group: how many, and the seconds, to the first samples; afterwards
        the median seconds for a chunk.
        """
        from t5x_audio.vocoder.flow_stream import StreamConfig
        from t5x_audio.vocoder.token_vocoder import TokenVocoder

        vocoder, codes = TokenVocoder(self.flow, self.hift), arrays["codes"][0]
        for _ in range(2):  # the first time compiles
            stream, seconds, pushed = vocoder.stream(arrays["speaker"][0]), [], []
            for start in range(0, len(codes), 5):
                before = time.perf_counter()
                if len(stream.push(codes[start : start + 5])):
                    seconds.append(time.perf_counter() - before)
                    pushed.append(start + 5)
        return {
            "codes": pushed[0],
            "first": seconds[0],
            "chunk": statistics.median(seconds[1:]),
            "chunk_codes": StreamConfig().chunk_codes,
        }

    def _compiled(self, name: str, module, call, *arguments):
        from flax import nnx

        from t5x_audio.training.flops import count_flops

        graph, state = nnx.split(module)

        def function(state, *arguments):
            return call(nnx.merge(graph, state), *arguments)

        self.flops[name] = count_flops(function, state, *arguments)
        run = self.jax.jit(function).lower(state, *arguments).compile()
        return lambda: np.asarray(run(state, *arguments))


def serve(flags) -> None:
    """Answers the parent's requests, a line of JSON each, until there is none."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    variant, folder = VARIANTS[flags.variant], pathlib.Path(flags.folder)
    kind = Ours if flags.serve == "ours" else Theirs
    side = kind(variant, flags.stages.split(","), folder, flags.threads)
    _answer({"ready": True})
    calls: dict = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "prepare":
            calls = side.calls(inputs(variant, *asked["case"]))
            for stage in flags.stages.split(","):
                name = "check hift" if stage == "hift" else stage
                np.save(folder / f"{flags.serve}-{stage}.npy", calls[name]())
                calls[stage]()  # warm
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            _answer({"flops": getattr(side, "flops", {})})
        elif asked["do"] == "stream":
            _answer(side.stream(inputs(variant, *asked["case"])))
        else:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[asked["stage"]]()
            _answer({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
                    | {"peak": _peak_bytes()})  # fmt: skip


def _answer(value) -> None:
    print(json.dumps(value), flush=True)


def _peak_bytes() -> int:
    """Highest resident set since it was last cleared."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# ---- the race ----------------------------------------------------------------------------------


class Side:
    """A process that serves one side of a variant."""

    def __init__(self, name: str, flags, variant: str, stages, folder: str):
        command = [sys.executable, __file__, f"--serve={name}", f"--variant={variant}"]
        command += [f"--folder={folder}", f"--threads={flags.threads}"]
        command += [f"--stages={','.join(stages)}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(flags.threads)}
        self.name = name
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._read()

    def ask(self, **what) -> dict:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"{self.name}: the process ended; nothing is reported")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def race(flags, name: str) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Rows of both tables for one variant."""
    variant = VARIANTS[name]
    stages = [stage for stage in available(variant) if stage in flags.stages.split(",")]
    cases = list(map(_seconds_and_rows, flags.cases))
    found = {case: {side: {stage: [] for stage in stages} for side in SIDES} for case in cases}
    flops, streams = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(flags.starts):  # where a process lies in memory is luck
            sides = {side: Side(side, flags, name, stages, folder) for side in SIDES[::-1]}
            for case in cases:
                print(f"{variant.name}: {case[1]} x {case[0]:g} s", file=sys.stderr, flush=True)
                made = {side: one.ask(do="prepare", case=case) for side, one in sides.items()}
                flops[case] = made["ours"]["flops"]
                _require_agreement(pathlib.Path(folder), stages, variant)
                take_turns(sides, found[case], flags.repeats)
            if len(stages) == len(STAGES) and not streams:
                made = sides["ours"].ask(do="stream", case=cases[0])
                streams.append(stream_row(variant, made))
            for side in sides.values():
                side.close()
    rows = [row for case in cases for row in table_rows(variant, case, found[case], flops[case])]
    for row in rows:
        print(*row, sep=" | ", flush=True)
    return rows, streams


def take_turns(sides: dict[str, Side], found, repeats: int) -> None:
    """Adds `repeats` calls of each stage of each side to {side: {stage: [calls]}}."""
    for number in range(repeats):
        for side in SIDES if number % 2 else SIDES[::-1]:
            for stage, calls in found[side].items():
                calls.append(sides[side].ask(do="run", stage=stage))


def stream_row(variant: Variant, made: dict[str, float]) -> tuple[str, ...]:
    """A row of the second table, of what `Ours.stream` found."""
    waits, speech = (made[name] * 3 / 125 for name in ("codes", "chunk_codes"))
    return (
        variant.name, f"{waits:.2f}", f"{made['first']:.2f}", f"{speech:.2f}",
        f"{made['chunk']:.2f}", f"{made['chunk'] / speech:.2f}",
    )  # fmt: skip


def _seconds_and_rows(case: str) -> tuple[float, int]:
    seconds, rows = case.split("x")
    return float(seconds), int(rows)


def available(variant: Variant) -> tuple[str, ...]:
    """The stages whose reference and reader are there."""
    from tests.parity import cosyvoice_reference as reference

    return ("flow",) if variant.sizes and not hasattr(reference, variant.sizes) else STAGES


def _require_agreement(folder: pathlib.Path, stages, variant: Variant) -> None:
    for stage in stages:
        mine, other = (np.load(folder / f"{side}-{stage}.npy") for side in SIDES)
        difference = np.abs(mine - other).max() / max(np.abs(other).max(), 1.0)
        if mine.shape != other.shape or not difference < TOLERANCES[stage]:
            sys.exit(
                f"{variant.name}, {stage}: the two do not agree ({difference:.1e}); nothing is "
                "reported"
            )


def table_rows(variant: Variant, case, found, flops) -> list[tuple[str, ...]]:
    seconds, utterances = case
    speech = seconds * utterances
    stages = list(found["ours"])
    if len(stages) > 1:  # the whole: call by call
        for side in found.values():
            side["whole"] = [
                {key: sum(part[key] for part in parts) for key in ("wall", "cpu")}
                | {"peak": max(part["peak"] for part in parts)}
                for parts in zip(*(side[stage] for stage in stages), strict=True)
            ]
        flops = flops | {"whole": sum(flops[stage] for stage in stages)}
    rows = []
    for stage in found["ours"]:
        mine, other = found["ours"][stage], found["theirs"][stage]
        clock = {
            side: statistics.median(call["wall"] for call in found[side][stage]) for side in SIDES
        }
        pairs = sorted(b["wall"] / a["wall"] for a, b in zip(mine, other, strict=True))
        by_cpu = statistics.median(b["cpu"] for b in other) / statistics.median(
            a["cpu"] for a in mine
        )
        peaks = [max(call["peak"] for call in calls) / 2**20 for calls in (mine, other)]
        what = f"{seconds:g} s" if utterances == 1 else f"{utterances} x {seconds:g} s"
        rows.append(
            (
                variant.name,
                what,
                stage,
                f"{clock['theirs'] / clock['ours']:.2f} ({pairs[0]:.2f} to {pairs[-1]:.2f})",
                f"{by_cpu:.2f}",
                f"{clock['ours'] / speech:.3f}",
                f"{clock['theirs'] / speech:.3f}",
                f"{flops[stage] / speech / 1e9:.0f}",
                f"{flops[stage] / clock['ours'] / 1e9:.0f}",
                f"{peaks[0]:.0f}",
                f"{peaks[1]:.0f}",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which, with commas")
    parser.add_argument("--cases", nargs="+", default=CASES, help="seconds x utterances, each")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, with commas")
    parser.add_argument("--starts", type=int, default=3, help="processes of each side in turn")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls in each of them")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "results")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        serve(flags)
        return
    load = os.getloadavg()[0]
    found = [race(flags, name) for name in flags.variants.split(",")]
    rows, streams = ([row for part in parts for row in part] for parts in zip(*found, strict=True))
    columns = ("form", "speech", "stage", "times as fast", "by CPU seconds", "real-time factor")
    columns += ("of PyTorch", "GFLOP a second of speech", "our GFLOP/s")
    columns += ("our peak, MiB", "PyTorch's, MiB")
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "torch")
    )
    text = "\n\n".join(
        (
            "# Speed of the vocoder at the published sizes",
            f"Made by `{' '.join(['python benchmarks/vocoder.py', *sys.argv[1:]])}`"
            f" (seed 0; {flags.threads} of {os.cpu_count()} cores, {platform.machine()}, "
            f"{datetime.date.today()}; load average before the start {load:.1f}; {versions}; "
            "float32).",
            "Beside CosyVoice's own modules (Step-Audio 2's in the successors' form), each side a "
            f"process of its own, started {flags.starts} times; medians of {flags.repeats} calls "
            "of each start in turn, by the clock, with the range of the pairs. 10 Euler steps with "
            "guidance; a batch is one call of ours and "
            "several of theirs, which take one utterance at a time.",
            summary.table_markdown(summary.Table("", columns, tuple(rows))),
            "Ours as a stream, codes pushed as a language model makes them: how many seconds of "
            "speech have to be there, and how long the computation then takes, until the first "
            "samples come; later the computation for a chunk.",
            summary.table_markdown(summary.Table("", STREAM_COLUMNS, tuple(streams))),
        )
    )
    (flags.output / "vocoder_speed.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
