r"""Plans a training run or a decoder on a TPU pod without a pod: memory, time and cost.

    python -m t5x_audio.plan --topology=v5p:8x8x16 --gin_file=gin/models/step1_130b.gin \
        --gin_file=gin/runs/pretrain_stage1.gin --gin_file=gin/hardware/v5p.gin

Takes the gin files of `train` and compiles the very step that it runs, with XLA's TPU compiler
(`make pods`) and no device. With --context it compiles what a decoder of that model runs instead:
prompts and a block of new tokens. Memory and operations are the compiler's; times are modelled (see
t5x_audio/planning/step_time.py) and never measured. MFU counts 6 operations for each token and
parameter but the input embedding's, and none for attention.

    ... --search BACKBONE_REMAT=full,products DATA=1,8     # the best of all combinations
    ... --context=4096 --batch=8 --prompt=1024 --weights=int8
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5x_audio import launch
from t5x_audio.errors import UserError

LESS = "keep fewer activations (BACKBONE_REMAT), take fewer sequences a chip"
FEWER = "serve fewer streams (--batch), a shorter --context, --weights=int8"

if TYPE_CHECKING:
    from t5x_audio.training.learner import Learner
    from t5x_audio.training.partitioning import MeshShape, ShardingRules
    from t5x_audio.training.step_guard import StepGuard


def run(
    *,
    topology: str,
    learner: "Learner",
    batch_shapes: Callable[[], dict],
    steps: int | None = None,
    mesh: "MeshShape | None" = None,
    rules: "ShardingRules | None" = None,
    xla_flags: Sequence[str] = (),
    guard: "StepGuard | None" = None,
    seed: int = 0,
    slices: int = 1,
    context: int | None = None,
    batch: int | None = None,
    prompt: int | None = None,
    weights: str | None = None,
    search: Sequence[str] | None = None,
    dump_hlo: str | None = None,
    save_executable: str | None = None,
) -> dict[str, Any]:
    """Compiles for a topology and prints what the programs need.

    Args:
      topology: of one slice, as CHIP:AxBxC, e.g. 'v5p:8x8x16'.
      learner, mesh, rules, xla_flags, guard, seed, steps: of `train.run`.
      batch_shapes: () -> {field: (shape, type)} of a global batch.
      slices: slices joined by the network of the data centre; the mesh's `replica` axis.
      context: slots of a decoder's cache; None plans training.
      batch, prompt, weights: of a decoder: streams (default 1), tokens of each prompt (default a
        quarter of the context), 'float32', 'bfloat16' (the default) or 'int8'.
      search: NAME=VALUE,VALUE of gin macros; every combination is planned and ranked.
      dump_hlo: file for the optimised HLO, of a decoder that of a block of tokens.
      save_executable: file for the compiled training step, for `train.run.executable`.

    Returns:
      What the table says, in bytes, seconds and plain numbers.

    Raises:
      UserError: no such topology, sizes that do not divide, a program that does not fit.
    """
    decoder = {"batch": batch, "prompt": prompt, "weights": weights}
    decoder = {name: value for name, value in decoder.items() if value is not None}
    files = {"dump_hlo": dump_hlo, "save_executable": save_executable}
    _refuse_unused(context, decoder, files, search is not None)
    if search is not None:
        from t5x_audio.planning import search as searching

        return searching.run("t5x_audio.plan", sys.argv[1:], search)
    from t5x_audio.planning import chips
    from t5x_audio.planning import topology as topologies
    from t5x_audio.training import xla_flags as flag_sets

    flag_sets.apply(xla_flags, topology.partition(":")[0])
    devices = topologies.devices(topology, slices)
    chip = chips.chip(topology.partition(":")[0])

    from t5x_audio.planning import report
    from t5x_audio.training import partitioning, program

    made = (mesh or partitioning.MeshShape()).make(devices)
    rules = rules or partitioning.ShardingRules()
    pod = report.Pod(topology, chip, made)
    if context is not None:
        from t5x_audio.planning.serving import Load

        load = Load(**{"prompt": context // 4} | decoder, context=context)
        return _plan_decoder(pod, learner.model, rules, load, dump_hlo)
    shapes = batch_shapes()
    planned = program.TrainProgram(learner, made, rules, seed, guard)
    return _plan_step(pod, planned, shapes, steps, dump_hlo, save_executable)


def _refuse_unused(context: int | None, decoder, files, searching: bool) -> None:
    """UserError for flags that would do nothing, and for files that could not be written."""
    if context is None and decoder:
        raise UserError(f"--{next(iter(decoder))} is of a decoder: give its --context too")
    if context is not None and files["save_executable"] is not None:
        raise UserError("--save_executable keeps a training step: leave it or --context out")
    for name, path in files.items():
        if path is None:
            continue
        if searching:
            raise UserError(f"--{name}: one file for all plans of --search; leave one of them out")
        if not Path(path).parent.is_dir():
            raise UserError(f"--{name}={path}: {Path(path).parent} is no folder; make it first")


def _compiling(topology: str) -> None:
    print(f"compiling for {topology}: minutes for a deep model", file=sys.stderr, flush=True)


def _plan_step(pod, planned, shapes, steps, dump_hlo, save_executable):
    import jax

    from t5x_audio.planning import compilation, memory, report
    from t5x_audio.training import executables, partitioning

    batch = {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=partitioning.batch_sharding(pod.mesh, name, shape)
        )
        for name, (shape, dtype) in shapes.items()
    }
    _compiling(pod.topology)
    started = time.monotonic()
    with jax.set_mesh(pod.mesh):
        lowered = planned.step.lower(planned.template, batch)
        compiled = compilation.compile_for(pod.topology, lowered, "the step", LESS)
    if save_executable is not None:
        executables.save(save_executable, compiled, lowered, pod.mesh)
    module, times = pod.modelled(compiled, dump_hlo)
    needs = memory.split(compiled, module, planned.template, batch)
    said = pod.described(round(time.monotonic() - started, 1), needs.total)
    said |= {"memory": dataclasses.asdict(needs)}
    said |= report.training_speed(times, planned.template, batch, pod, steps)
    print("\n".join(report.training_table(said, times)), flush=True)
    return report.flat(said)


def _plan_decoder(pod, config, rules, load, dump_hlo):
    import jax

    from t5x_audio.planning import compilation, memory, report, serving

    program = serving.ServingProgram(config, pod.mesh, rules, load)
    _compiling(pod.topology)
    started = time.monotonic()
    with jax.set_mesh(pod.mesh):
        prefill = compilation.compile_for(pod.topology, program.prefill(), "a prompt", FEWER)
        block = program.decode(prefill.output_shardings)
        decode = compilation.compile_for(pod.topology, block, "a token", FEWER)
    prompt_times = pod.modelled(prefill)[1]
    block_times = pod.modelled(decode, dump_hlo)[1]
    needs = memory.of_decoder(program.weights, prefill, decode)
    said = pod.described(round(time.monotonic() - started, 1), needs.total)
    said |= {"memory": dataclasses.asdict(needs)} | dataclasses.asdict(load)
    said |= report.decoding_speed(prompt_times, block_times, needs, pod, load)
    print("\n".join(report.decoding_table(said, prompt_times, block_times)), flush=True)
    return report.flat(said)


def _add_flags(parser) -> None:
    parser.add_argument(
        "--topology", help="CHIP:AxBxC of one slice, e.g. v5p:8x8x16", required=True
    )
    parser.add_argument("--slices", type=int, help="slices joined by DCN; default 1")
    parser.add_argument("--context", type=int, help="plan a decoder with a cache of that length")
    parser.add_argument("--batch", type=int, help="its streams; default 1")
    parser.add_argument("--prompt", type=int, help="tokens of its prompts; default context / 4")
    parser.add_argument("--weights", help="its weights: float32, bfloat16 (default) or int8")
    parser.add_argument(
        "--search", nargs="+", metavar="NAME=VALUE,...", help="rank all combinations of gin macros"
    )
    parser.add_argument("--dump_hlo", help="file for the optimised HLO")
    parser.add_argument("--save_executable", help="file for the compiled training step")


if __name__ == "__main__":
    launch.main(
        "t5x_audio.plan", description=__doc__, add_flags=_add_flags, settings_of="t5x_audio.train"
    )
