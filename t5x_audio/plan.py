r"""Plans a training run on a TPU pod without a pod: memory, time and cost of its compiled step.

    python -m t5x_audio.plan --topology=v5p:8x8x16 --gin_file=gin/models/step1_130b.gin \
        --gin_file=gin/runs/pretrain_stage1.gin --gin_file=gin/hardware/v5p.gin

Takes the gin files of `train` and compiles the very step that it runs, with XLA's TPU compiler
(`make pods`) and no device. Memory and operations are the compiler's; times are modelled
(see t5x_audio/planning/step_time.py) and never measured. MFU counts 6 operations for each token and
parameter but the input embedding's, and none for attention.
"""

import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5x_audio import launch
from t5x_audio.errors import UserError

if TYPE_CHECKING:
    from t5x_audio.training.learner import Learner
    from t5x_audio.training.partitioning import MeshShape, ShardingRules


def run(
    *,
    topology: str,
    learner: "Learner",
    batch_shapes: Callable[[], dict],
    steps: int | None = None,
    mesh: "MeshShape | None" = None,
    rules: "ShardingRules | None" = None,
    xla_flags: Sequence[str] = (),
    seed: int = 0,
    slices: int = 1,
    dump_hlo: str | None = None,
) -> dict[str, Any]:
    """Compiles a training step for a topology and prints what it needs.

    Args:
      topology: of one slice, as CHIP:AxBxC, e.g. 'v5p:8x8x16'.
      learner, mesh, rules, xla_flags, seed, steps: of `train.run`.
      batch_shapes: () -> {field: (shape, type)} of a global batch.
      slices: slices joined by the network of the data centre; the mesh's `replica` axis.
      dump_hlo: file for the optimised HLO.

    Returns:
      What the table says, in bytes, seconds and plain numbers.

    Raises:
      UserError: no such topology, sizes that do not divide, a step that does not fit.
    """
    from t5x_audio.planning import chips
    from t5x_audio.planning import topology as topologies
    from t5x_audio.training import xla_flags as flag_sets

    flag_sets.apply(xla_flags, topology.partition(":")[0])
    devices = topologies.devices(topology, slices)
    chip = chips.chip(topology.partition(":")[0])

    import jax

    from t5x_audio.planning import collectives, memory, step_time
    from t5x_audio.planning.hlo import Module
    from t5x_audio.training import partitioning, program

    made = (mesh or partitioning.MeshShape()).make(devices)
    planned = program.TrainProgram(learner, made, rules or partitioning.ShardingRules(), seed)
    batch = {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=partitioning.batch_sharding(made, name, shape)
        )
        for name, (shape, dtype) in batch_shapes().items()
    }
    print(f"compiling for {topology}: minutes for a deep model", file=sys.stderr, flush=True)
    started = time.monotonic()
    with jax.set_mesh(made):
        compiled = _compile(planned.step.lower(planned.template, batch), topology)
    text = compiled.as_text()
    if dump_hlo is not None:
        Path(dump_hlo).write_text(text)
    module, torus = Module(text), collectives.Torus.of(list(made.devices.flat))
    needs = memory.split(compiled, module, planned.template, batch)
    times = {
        model: step_time.StepTime(module, chip, torus, model).step() for model in step_time.MODELS
    }
    num_chips = len(devices) // chip.devices
    report = {
        "topology": topology,
        "chips": num_chips,
        "mesh": " x ".join(f"{axis}={n}" for axis, n in made.shape.items() if n > 1),
        "compile_seconds": round(time.monotonic() - started, 1),
        "fits": needs.total <= chip.hbm_bytes / chip.devices,
        "hbm_bytes": int(chip.hbm_bytes / chip.devices),
        "memory": dataclasses.asdict(needs),
    }
    report |= _speed(times, planned.template, batch, chip, num_chips, steps)
    print("\n".join(_table(report, times)), flush=True)
    sizes = {f"{name}_bytes": size for name, size in report.pop("memory").items()}
    return report | sizes


def _compile(lowered, topology: str):
    try:
        return lowered.compile()
    except Exception as error:  # of the C API: no class of its own
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        raise UserError(
            f"--topology={topology}: the step does not fit ({_shortage(text)}); keep fewer "
            "activations (BACKBONE_REMAT), take fewer sequences a chip, or shard over more chips"
        ) from error


def _shortage(text: str) -> str:
    """What the compiler says of the memory it lacks; it has two ways to put it."""
    found = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+|total memory required.*?exceeds.*?\)", text)
    return found[0] if found else text.split("RESOURCE_EXHAUSTED:")[-1].strip().split("\n")[0][:120]


def _speed(times, template, batch, chip, num_chips: int, steps: int | None) -> dict[str, Any]:
    """Modelled rates of the step and the run."""
    import jax

    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template.params))
    table = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(template.params)
        if "embedding" in jax.tree_util.keystr(path)
    )
    tokens = max(math.prod(leaf.shape) for leaf in batch.values())
    speed: dict[str, Any] = {"parameters": parameters, "tokens_per_step": tokens}
    for model, step in times.items():
        flops = 6 * (parameters - table) * tokens
        speed[f"step_seconds_{model}"] = step.seconds
        speed[f"mfu_{model}"] = flops / (step.seconds * num_chips * chip.flops)
    seconds = times["hybrid"].seconds
    speed["tokens_per_second"] = tokens / seconds
    if steps is not None:
        speed["days"] = steps * seconds / 86400
        speed["chip_hours"] = steps * seconds / 3600 * num_chips
    return speed


def _table(report: dict[str, Any], times) -> list[str]:
    """The report for people."""
    gib, hybrid = 2.0**30, times["hybrid"]
    lines = [
        f"{report['topology']}, {report['chips']} chips, {report['mesh'] or 'one device'}; "
        f"compiled in {report['compile_seconds']} s",
        "",
        "| memory of a device | GiB |",
        "|---|---|",
    ]
    lines += [f"| {name} | {size / gib:.2f} |" for name, size in report["memory"].items()]
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    lines += [f"| HBM: {verdict} | {report['hbm_bytes'] / gib:.2f} |", ""]
    lines += [
        "| collective | | count | GiB | s on the links | s exposed |",
        "|---|---|---|---|---|---|",
    ]
    for (kind, manner), use in sorted(hybrid.uses.items()):
        lines.append(
            f"| {kind} | {manner} | {use.count} | {use.bytes / gib:.2f} | {use.seconds:.3f} | "
            f"{use.exposed:.3f} |"
        )
    lines += ["", "| modelled | " + " | ".join(times) + " |", "|---|" + "---|" * len(times)]
    rows = {
        "matrix products, s": "products",
        "Pallas kernels, s": "kernels",
        "all else, s": "rest",
        "exposed communication, s": "exposed",
        "step, s": "seconds",
    }
    for title, name in rows.items():
        cells = " | ".join(f"{getattr(step, name):.3f}" for step in times.values())
        lines.append(f"| {title} | {cells} |")
    lines.append("| MFU | " + " | ".join(f"{report[f'mfu_{m}']:.3f}" for m in times) + " |")
    return lines


def _add_flags(parser) -> None:
    parser.add_argument(
        "--topology", help="CHIP:AxBxC of one slice, e.g. v5p:8x8x16", required=True
    )
    parser.add_argument("--slices", type=int, help="slices joined by DCN; default 1")
    parser.add_argument("--dump_hlo", help="file for the optimised HLO")


if __name__ == "__main__":
    launch.main(
        "t5x_audio.plan", description=__doc__, add_flags=_add_flags, settings_of="t5x_audio.train"
    )
