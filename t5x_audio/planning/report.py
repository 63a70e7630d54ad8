"""What a plan says: numbers for scripts, tables for people."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from t5x_audio.planning import collectives, serving, step_time
from t5x_audio.planning.chips import Chip
from t5x_audio.planning.hlo import Module
from t5x_audio.planning.memory import DecoderMemory
from t5x_audio.planning.step_time import Step
from t5x_audio.training.flops import model_flops_per_token

_GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Pod:
    """Where a program would run: `topology` of `chip`s, laid out as `mesh`."""

    topology: str
    chip: Chip
    mesh: Mesh

    @property
    def chips(self) -> int:
        """How many there are."""
        return self.mesh.size // self.chip.devices

    def modelled(self, compiled, dump_hlo: str | None = None) -> tuple[Module, dict[str, Step]]:
        """A compiled program's HLO, also written to a file, and its step by every model."""
        text = compiled.as_text()
        if dump_hlo is not None:
            Path(dump_hlo).write_text(text)
        module = Module(text)
        torus = collectives.Torus.of(list(self.mesh.devices.flat))
        return module, {
            model: step_time.StepTime(module, self.chip, torus, model).step()
            for model in step_time.MODELS
        }

    def described(self, compile_seconds: float, total_bytes: int) -> dict[str, Any]:
        """The first entries of every report."""
        hbm = self.chip.hbm_bytes / self.chip.devices
        return {
            "topology": self.topology,
            "chips": self.chips,
            "mesh": " x ".join(f"{axis}={n}" for axis, n in self.mesh.shape.items() if n > 1),
            "compile_seconds": compile_seconds,
            "fits": total_bytes <= hbm,
            "hbm_bytes": int(hbm),
        }


def flat(report: dict[str, Any]) -> dict[str, Any]:
    """The report with its memory as `<name>_bytes`."""
    sizes = {f"{name}_bytes": size for name, size in report["memory"].items()}
    return {name: value for name, value in report.items() if name != "memory"} | sizes


def training_speed(times, template, batch, pod: Pod, steps: int | None) -> dict[str, Any]:
    """Modelled rates of a training step and of a run of `steps`."""
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template.params))
    tokens = max(math.prod(leaf.shape) for leaf in batch.values())
    speed: dict[str, Any] = {"parameters": parameters, "tokens_per_step": tokens}
    for model, step in times.items():
        flops = model_flops_per_token(template.params) * tokens
        speed[f"step_seconds_{model}"] = step.seconds
        speed[f"mfu_{model}"] = flops / (step.seconds * pod.chips * pod.chip.flops)
    seconds = times["hybrid"].seconds
    speed["tokens_per_second"] = tokens / seconds
    if steps is not None:
        speed["days"] = steps * seconds / 86400
        speed["chip_hours"] = steps * seconds / 3600 * pod.chips
    return speed


def decoding_speed(
    prompt_times, block_times, needs: DecoderMemory, pod: Pod, load: serving.Load
) -> dict[str, Any]:
    """Modelled rates of a decoder; beside them what reading weights and cache alone would take.

    Rates are those of the roofline: a token is bound by bytes, which the compiler's cycles for thin
    matrix products overrate by half.
    """
    speed: dict[str, Any] = {}
    for model in block_times:
        speed[f"prompt_seconds_{model}"] = prompt_times[model].seconds
        speed[f"token_seconds_{model}"] = block_times[model].seconds / serving.BLOCK
    bandwidth = pod.chip.hbm_bandwidth / pod.chip.devices
    speed["token_seconds_bytes"] = (needs.weights + needs.cache) / bandwidth
    per_stream = 1 / speed["token_seconds_roofline"]
    needed = serving.tokens_for_real_time()
    return speed | {
        "tokens_per_second_per_stream": per_stream,
        "tokens_per_second": load.batch * per_stream,
        "tokens_per_second_of_speech": needed,
        "real_time": per_stream >= needed,
    }


# ---- for people --------------------------------------------------------------------------------


def training_table(report: dict[str, Any], times) -> list[str]:
    """Memory, collectives, times."""
    mfu = "| MFU | " + " | ".join(f"{report[f'mfu_{model}']:.3f}" for model in times) + " |"
    return [
        *_heading(report),
        *_memory_table(report),
        *_collectives_table(times["hybrid"]),
        *_times_table("modelled", times),
        mfu,
    ]


def decoding_table(report: dict[str, Any], prompt_times, block_times) -> list[str]:
    """Memory; collectives and times of a block of tokens; times of the prompts; rates."""
    verdict = "real time" if report["real_time"] else "NOT real time"
    return [
        *_heading(report),
        f"{report['batch']} streams, prompts of {report['prompt']} tokens, a context of "
        f"{report['context']}, weights in {report['weights']}",
        "",
        *_memory_table(report),
        *_collectives_table(block_times["hybrid"]),
        *_times_table(f"{serving.BLOCK} tokens, modelled", block_times),
        "",
        *_times_table("the prompts, modelled", prompt_times),
        "",
        f"{report['tokens_per_second_per_stream']:.1f} tokens a second and stream (roofline), "
        f"{report['tokens_per_second_of_speech']:.1f} for speech: {verdict}. To read weights and "
        f"cache once, and nothing else, takes {1e3 * report['token_seconds_bytes']:.2f} ms.",
    ]


def _heading(report) -> list[str]:
    return [
        f"{report['topology']}, {report['chips']} chips, {report['mesh'] or 'one device'}; "
        f"compiled in {report['compile_seconds']} s",
        "",
    ]


def _memory_table(report) -> list[str]:
    lines = ["| memory of a device | GiB |", "|---|---|"]
    lines += [f"| {name} | {size / _GIB:.2f} |" for name, size in report["memory"].items()]
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    return [*lines, f"| HBM: {verdict} | {report['hbm_bytes'] / _GIB:.2f} |", ""]


def _collectives_table(step: Step) -> list[str]:
    lines = [
        "| collective | | count | GiB | s on the links | s exposed |",
        "|---|---|---|---|---|---|",
    ]
    for (kind, manner), use in sorted(step.uses.items()):
        lines.append(
            f"| {kind} | {manner} | {use.count} | {use.bytes / _GIB:.2f} | {use.seconds:.3f} | "
            f"{use.exposed:.3f} |"
        )
    return [*lines, ""]


def _times_table(title: str, times: dict[str, Step]) -> list[str]:
    """In seconds, or in milliseconds where they are short."""
    scale, unit = (1.0, "s") if times["hybrid"].seconds > 1 else (1e3, "ms")
    lines = [f"| {title} | " + " | ".join(times) + " |", "|---|" + "---|" * len(times)]
    rows = {
        "matrix products": "products",
        "Pallas kernels": "kernels",
        "all else": "rest",
        "exposed communication": "exposed",
        "together": "seconds",
    }
    for name, field in rows.items():
        cells = " | ".join(f"{scale * getattr(step, field):.3f}" for step in times.values())
        lines.append(f"| {name}, {unit} | {cells} |")
    return lines
