"""What becomes of a step that went wrong: a number that is not finite, or a loss that jumps.

Choices:
- Whether a step is bad is decided inside the compiled step, so that leaving its update out needs no
  word from the host and every host decides alike.
- 'skip' leaves the update out; the step counts and the data move on.
- 'roll_back' takes the last checkpoint again and goes on with the data behind the bad batches:
  spikes come of a state and a batch together and rarely come again (PaLM, arXiv 2204.02311,
  section 5.1).
- A loss jumps when it is `spike` standard deviations above the mean of the steps before. Both are
  part of the train state, hence of checkpoints: a run that is started again decides the same.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError
from t5x_audio.training.learner import Metrics, TrainState
from t5x_audio.training.metrics import first_bad

_POLICIES = ("stop", "skip", "roll_back")
_NAME = "guard"  # of what is remembered, among the variables of a state


@dataclasses.dataclass(frozen=True)
class StepGuard:
    """The policy of a run.

    Attributes:
      policy: 'stop', 'skip' or 'roll_back'.
      spike: how many standard deviations a loss may be above the mean; None looks only for numbers
        that are not finite.
      memory: steps over which mean and deviation are taken; before as many no loss is called a
        jump.
      patience: updates left out in a row, or roll-backs to one checkpoint, before the run stops.
    """

    policy: str = "stop"
    spike: float | None = None
    memory: int = 100
    patience: int = 5

    def __post_init__(self):
        if self.policy not in _POLICIES:
            raise UserError(f"StepGuard.policy={self.policy!r}: use one of {', '.join(_POLICIES)}")
        if self.spike is not None and self.spike <= 0:
            raise UserError(f"StepGuard.spike={self.spike}: give standard deviations above 0")
        if self.memory < 2 or self.patience < 1:
            raise UserError(
                f"StepGuard: memory={self.memory} is below 2 or patience={self.patience} below 1"
            )

    @property
    def _remembers(self) -> bool:
        return self.policy == "skip" or self.spike is not None

    def init(self, state: TrainState) -> TrainState:
        """`state` with what the guard remembers, if it has to."""
        if not self._remembers:
            return state
        kept = {
            "mean": jnp.zeros((), jnp.float32),
            "variance": jnp.zeros((), jnp.float32),
            "steps": jnp.zeros((), jnp.int32),
            "left_out": jnp.zeros((), jnp.int32),
        }
        return state.replace(variables=state.variables | {_NAME: kept})

    def judge(
        self, before: TrainState, after: TrainState, metrics: Metrics
    ) -> tuple[TrainState, Metrics]:
        """The state to go on with and the metrics of a step; jittable.

        Adds the metrics bad_steps, of which the mean is the share of bad steps, and, where updates
        are left out, left_out, how many in a row. The other metrics of such a step do not count.
        """
        if not self._remembers:
            return after, metrics
        kept = before.variables[_NAME]
        bad = ~jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(metrics)]).all()
        if self.spike is not None:
            loss = metrics["loss"][0] / metrics["loss"][1]
            limit = kept["mean"] + self.spike * jnp.sqrt(kept["variance"])
            bad |= (kept["steps"] >= self.memory) & (loss > limit)
            kept = _where(bad, kept, self._with_loss(kept, loss))
        if self.policy == "skip":
            after = _where(bad, before, after).replace(step=after.step)
            metrics = _where(bad, jax.tree.map(jnp.zeros_like, metrics), metrics)
            kept = kept | {"left_out": jnp.where(bad, kept["left_out"] + 1, 0)}
            metrics["left_out"] = (kept["left_out"].astype(jnp.float32), jnp.float32(1))
        metrics["bad_steps"] = (bad.astype(jnp.float32), jnp.float32(1))
        return after.replace(variables=after.variables | {_NAME: kept}), metrics

    def _with_loss(self, kept, loss):
        """Exponentially weighted mean and variance, of all steps as long as they are few."""
        share = 1.0 / jnp.minimum(kept["steps"] + 1, self.memory).astype(jnp.float32)
        change = loss - kept["mean"]
        return kept | {
            "mean": kept["mean"] + share * change,
            "variance": (1 - share) * (kept["variance"] + share * change**2),
            "steps": kept["steps"] + 1,
        }

    def first_bad(self, metrics: list[Metrics]) -> tuple[int, str] | None:
        """(index, what is wrong) of the first of these steps that must not be gone on from."""
        if self.policy == "skip":
            for index, one in enumerate(metrics):
                if one["left_out"][0] >= self.patience:
                    return index, f"the update was left out {self.patience} times in a row"
            return None
        if (found := first_bad(metrics)) is not None:
            return found[0], f"{found[1]} is not finite"
        for index, one in enumerate(metrics):
            if self.spike is not None and one["bad_steps"][0]:
                return index, f"the loss jumped by more than {self.spike} standard deviations"
        return None


def _where(condition, one, other):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)
