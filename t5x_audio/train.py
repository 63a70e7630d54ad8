"""Trains any learner: the one loop, for every model, from a laptop to a pod.

    python -m t5x_audio.train --gin_file=gin/models/demo.gin --gin_file=gin/runs/<run>.gin

The loop knows a learner (`init`, `step`, `evaluate`) and a dataset of numpy batches whose
iterator has a state. It is deterministic from the seed: the randomness of a step is a function of
the seed and the step's index, so a run that is stopped in any way and started again computes, bit
for bit, what an uninterrupted one does. Checkpoints hold state and iterator and are written in
the background; SIGINT and SIGTERM write one first. Metrics stay on the device until logged. What
happens after a step that went wrong is a policy (training/step_guard.py).
"""

import contextlib
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from t5x_audio import launch
from t5x_audio.errors import UserError

if TYPE_CHECKING:
    from t5x_audio.training.learner import Learner
    from t5x_audio.training.partitioning import MeshShape, ShardingRules
    from t5x_audio.training.step_guard import StepGuard
    from tasks.evaluation import TaskEvaluation


def run(
    *,
    learner: "Learner",
    dataset: Any,
    steps: int,
    model_dir: str | None = None,
    run_dir: str | None = None,
    name: str | None = None,
    seed: int = 0,
    log_every: int = 10,
    eval_every: int = 0,
    save_every: int = 500,
    keep: int = 2,
    keep_every: int | None = None,
    throughput_key: str | None = None,
    throughput_unit: str = "examples",
    profile_at: int | None = None,
    profile_steps: int = 5,
    mesh: "MeshShape | None" = None,
    rules: "ShardingRules | None" = None,
    xla_flags: Sequence[str] = (),
    executable: str | None = None,
    guard: "StepGuard | None" = None,
    answers: "TaskEvaluation | None" = None,
) -> dict[str, Any]:
    """Trains until `steps`, continuing from the latest checkpoint in the directory.

    Args:
      learner: what is trained.
      dataset: `iter(dataset)` yields global batches (dicts of numpy arrays) without end and has
        get_state and set_state; `dataset.iterator(rows)`, if it exists, reads but the rows that a
        host needs (data/readers.py); `dataset.eval_sets()`, if it exists, gives {name: a finite
        number of global batches}, whose metrics are written together and one by one.
      steps: updates in total, over all restarts.
      model_dir: where the run lives; default `run_dir`/`name`.
      run_dir, name: see `model_dir`.
      seed: of the initial weights and of every step's randomness.
      log_every, eval_every, save_every: in steps; 0 for eval_every evaluates at the end only.
      keep: checkpoints to keep; multiples of `keep_every` stay besides.
      throughput_key: batch field that is counted for the rate: the sum of a vector (lengths), the
        nonzero elements of anything larger (segment ids). None counts examples.
      throughput_unit: what that is.
      profile_at, profile_steps: first step and number of steps to trace into <model_dir>/profile.
      mesh: devices along each mesh axis; default all of them on `data`.
      rules: logical axes to mesh axes.
      xla_flags: names of sets in training/xla_flags.py, for XLA's TPU compiler.
      executable: the compiled step, a file of `plan --save_executable`, for a dataset whose batches
        have one shape; None compiles it here.
      guard: what becomes of a step that went wrong; by default the run stops.
      answers: SeqIO tasks whose examples the model answers every so often, judged by their metrics.

    Returns:
      model_dir, step, the last train and validation metrics.

    Raises:
      UserError: bad sizes, mesh, data or executable, a step that went wrong, or a record that
        cannot be read (on one host with everything saved, on several from the last checkpoint on).
      KeyboardInterrupt: after a signal, with everything saved.
    """
    # Heavy, and of no use to --help.
    import jax

    from t5x_audio.training import (
        checkpoints,
        executables,
        flops,
        partitioning,
        prefetch,
        profiling,
        program,
        progress,
        provenance,
        step_guard,
    )
    from t5x_audio.training import xla_flags as flag_sets
    from t5x_audio.training.metrics import MetricWriter, summarize

    flag_sets.apply(xla_flags)
    mesh = (mesh or partitioning.MeshShape()).make()
    rules = rules or partitioning.ShardingRules()
    guard = guard or step_guard.StepGuard()
    directory = progress.run_directory(model_dir, run_dir, name)
    saving = checkpoints.RunCheckpoints(directory, learner.model_configs, keep, keep_every)
    with contextlib.closing(saving) as saved, jax.set_mesh(mesh), progress.StopSignals() as signals:
        if (saved.latest_step() or 0) >= steps:
            checkpoints.require_same_configs(directory, learner.model_configs)
            print(f"{directory}: finished already, at step {saved.latest_step()}", file=sys.stderr)
            return progress.results(directory, saved.latest_step())

        compiled = program.TrainProgram(learner, mesh, rules, seed, guard)
        learner.check_data(dataset)
        if hasattr(dataset, "batch_size"):
            own_rows = partitioning.rows_of_process(mesh, dataset.batch_size)
        if jax.process_count() > 1 and hasattr(dataset, "iterator"):
            iterator = dataset.iterator(own_rows)
        else:
            iterator = iter(dataset)
        rows = getattr(iterator, "rows", None)
        batch_size = getattr(iterator, "batch_size", None)

        def last_good():
            """-> (state, iterator state or None) of the last checkpoint, or of the beginning."""
            if (found := saved.restore(compiled.template)) is not None:
                return found
            learner.check_start(compiled.template)
            return learner.warm_start(compiled.init()), None

        state, iterator_state = last_good()
        if iterator_state is not None:
            iterator.set_state(iterator_state)
        step = start = int(state.step)
        if jax.process_index() == 0:
            checkpoints.write_configs(directory, learner.model_configs)
            provenance.write(directory, state)
            launch.save_operative_config(directory)

        take_step, count_flops = compiled.step, flops.StepFlops(compiled.step)

        place = functools.partial(partitioning.place_batch, mesh=mesh)

        writer = MetricWriter(directory, from_step=start)
        console = progress.Console(
            directory, start, steps, throughput_key, throughput_unit,
            _mfu_per_token(state, mesh) if throughput_unit == "tokens" else None,
        )  # fmt: skip
        goodput = progress.Goodput(directory, start)
        profile = profiling.ProfileWindow(directory, profile_at, profile_steps)
        batches = prefetch.Prefetch(
            iterator, functools.partial(place, rows=rows, batch_size=batch_size)
        )
        unlogged, rolled_back = [], 0

        def log(step, metrics):
            values, rates = summarize(metrics), console.rates()
            values |= learner.derived(values) | rates | goodput.add(rates)
            writer.write(step, "train", values)
            console.show(values)

        try:
            while step < steps:
                step += 1
                try:
                    batch, host_batch, iterator_state = next(batches)
                except StopIteration:
                    raise progress.data_ended(directory, step - 1, steps) from None
                except UserError as error:  # of a damaged shard
                    unlogged, alone = jax.device_get(unlogged), jax.process_count() == 1
                    if alone and step > start + 1 and guard.first_bad(unlogged) is None:
                        if unlogged:
                            log(step - 1, unlogged)
                        saved.save(state, iterator_state)
                        saved.wait()
                    raise progress.data_failed(error, saved) from error
                step_flops = count_flops(state, batch, learner.branch(step - 1))
                if executable is not None and step == start + 1:
                    take_step = executables.load(
                        executable, compiled.step.lower(state, batch), mesh
                    )
                profile.before(step, state)
                state, metrics = take_step(state, batch)
                profile.after(step, metrics)
                unlogged.append(metrics)
                console.advance(
                    host_batch, step_flops, 1 if rows is None else batch_size / len(rows)
                )
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    console.restart_clock()  # Compilation isn't part of the rate.

                stop = signals.requested()  # Once: a signal may come at any point below.
                save = stop or step == steps or step % save_every == 0
                if save or step % log_every == 0:
                    unlogged = jax.device_get(unlogged)
                    if (bad := guard.first_bad(unlogged)) is not None:
                        bad_step, what = step - len(unlogged) + bad[0] + 1, bad[1]
                        if guard.policy != "roll_back" or rolled_back == guard.patience:
                            raise progress.went_wrong(directory, bad_step, what, saved)
                        # The data stay where they are: behind the batches that went wrong.
                        saved.wait()
                        state, _ = last_good()
                        step, unlogged, rolled_back = int(state.step), [], rolled_back + 1
                        console.say(f"{what} at step {bad_step}: back to step {step}")
                        console.go_back(step)
                        goodput.go_back(step)
                        writer.close()
                        writer = MetricWriter(directory, from_step=step)
                        continue
                    log(step, unlogged)
                    unlogged = []
                due = step == steps or (eval_every and step % eval_every == 0)
                if due and hasattr(dataset, "eval_sets"):
                    with console.paused():
                        for split, values in _validate(compiled, state, dataset, place).items():
                            writer.write(step, split, values | learner.derived(values))
                if answers is not None and (step == steps or step % answers.every == 0):
                    with console.paused():
                        for task, values in answers(learner.live(state)).items():
                            writer.write(step, f"validation/{task}", values)
                if save:
                    rolled_back = 0
                    with console.paused():
                        saved.save(state, iterator_state)
                if stop and step < steps:
                    raise KeyboardInterrupt(f"{directory} saved at step {step} of {steps}")
        finally:
            batches.close()
            profile.close()
            console.close()
            writer.close()
    if jax.process_index() == 0:
        launch.save_operative_config(directory)  # Now with what evaluation used.
    return progress.results(directory, steps)


def _validate(compiled, state, dataset, place) -> dict[str, dict[str, float]]:
    """{'validation': means over all sets, 'validation/<set>': of each, where there are several}."""
    from t5x_audio.training.metrics import summarize

    results = {
        name: [compiled.evaluate(state, place(batch), index) for index, batch in enumerate(batches)]
        for name, batches in dataset.eval_sets().items()
    }
    together = {"validation": summarize([one for some in results.values() for one in some])}
    if len(results) < 2:
        return together
    return together | {f"validation/{name}": summarize(some) for name, some in results.items()}


def _mfu_per_token(state, mesh) -> float | None:
    """Model FLOPs of a token over the peak of the mesh; None where the peak is not known."""
    from t5x_audio.planning import chips
    from t5x_audio.training import flops

    chip = chips.of_device(mesh.devices.flat[0].device_kind)
    if chip is None:
        return None
    return flops.model_flops_per_token(state.params) * chip.devices / (mesh.size * chip.flops)


if __name__ == "__main__":
    launch.main("t5x_audio.train", description=__doc__)
