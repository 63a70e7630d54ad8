"""A profile of a few training steps, in the form that XProf and TensorBoard read.

Every host writes its own trace to `<model_dir>/profile`; `benchmarks/stage_profiles.py` reads them
without either. Python frames are left out: they fill the trace and belong to the host alone.
"""

import os

import jax


class ProfileWindow:
    """Traces the steps first, ..., first + count - 1 of a run; `first` None traces nothing."""

    def __init__(self, directory: str | os.PathLike, first: int | None, count: int):
        """`directory` is the run's; a run that starts behind `first` traces nothing."""
        self._directory = os.path.join(directory, "profile")
        self._first, self._last = first, (first or 0) + count - 1
        self._active = False

    def before(self, step: int, state) -> None:
        """Starts the trace when its first step is next and `state`, which it reads, is there."""
        if step == self._first:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._active = True

    def after(self, step: int, results) -> None:
        """Waits for the last step's `results` and writes the trace."""
        if self._active and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced, if the run ends within the window."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
