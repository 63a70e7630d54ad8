"""Learners: what is trained, on what, and how, as pure functions the loop can compile.

A learner pairs model configurations, an objective and optimisers into three pure, jittable
functions: `init(rng)`, `step(state, batch, rng)` and `evaluate(state, batch, rng)`. The loop in
`t5x_audio.train` knows nothing else, so language modelling, DPO, the adversarial vocoder and
quantisation aware training share one loop and one checkpoint format.

Choices: the train state is plain pytrees (`nnx.State`), the live module exists only inside a
step; everything that isn't an `nnx.Param` (EMA codebooks, statistics) travels in `variables` and
is updated by the training forward in place. `init` never touches the disk: weights to start from
come through `warm_start`, which the loop calls once, outside of any compiled function.
"""

import abc
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.training import checkpoints

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum, weight), float32 scalars. Both are added over steps and hosts, then divided."""


def mean_metric(value, weight=1.0) -> tuple[jax.Array, jax.Array]:
    """A metric whose mean over steps weighs `value` (a mean itself) by `weight`."""
    weight = jnp.asarray(weight, jnp.float32)
    return jnp.asarray(value, jnp.float32) * weight, weight


def sum_metrics(*metrics: Metrics) -> Metrics:
    """Adds sums and weights name by name; a name may be absent from some."""
    total: Metrics = {}
    for one in metrics:
        for name, (value, weight) in one.items():
            old_value, old_weight = total.get(name, (0.0, 0.0))
            total[name] = (old_value + value, old_weight + weight)
    return total


@flax.struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: model name -> nnx.State of nnx.Param.
      variables: model name -> nnx.State of everything else; and what a learner carries besides.
      opt_state: model name -> optax state.
    """

    step: jax.Array
    params: dict[str, Any]
    variables: dict[str, Any]
    opt_state: dict[str, Any]


class Learner(abc.ABC):
    """What the loop trains. `model_configs` maps each model's name to its configuration."""

    model_configs: dict[str, Any]

    @abc.abstractmethod
    def init(self, rng: jax.Array) -> TrainState:
        """The state before the first step, from a PRNG key alone."""

    @abc.abstractmethod
    def step(self, state: TrainState, batch, rng: jax.Array) -> tuple[TrainState, Metrics]:
        """One update on one batch. `rng` differs at every step."""

    @abc.abstractmethod
    def evaluate(self, state: TrainState, batch, rng: jax.Array) -> Metrics:
        """The metrics of one batch without learning from it."""

    def check_data(self, dataset) -> None:
        """UserError if the models cannot learn from this dataset; asked before all compilation."""
        del dataset

    def check_start(self, template: TrainState) -> None:
        """UserError if `warm_start` cannot fill a state of these shapes; reads no weights."""
        del template

    def warm_start(self, state: TrainState) -> TrainState:
        """`state` with the weights that training starts from. Reads the disk; not jittable."""
        return state

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """More to write of the means of one or several steps, such as perplexities of losses."""
        del values
        return {}

    def branch(self, step: int) -> int | None:
        """Which branch of its `lax.cond` (0 is false) the step after `step` takes; None: no cond.

        Only the count of floating-point operations asks.
        """
        del step
        return None


class Objective(Protocol):
    """What is minimised. `model` is a live module; its non-param Variables may be updated."""

    def __call__(
        self, model: nnx.Module, batch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, Metrics]:
        """(model, batch, rng, train) -> (loss, a scalar; metrics)."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class GradientLearner(Learner):
    """One model named 'model', one objective, one optimiser.

    Attributes:
      model: configuration with `.make(rngs)`.
      objective: (model, batch, rng, train) -> (loss, Metrics).
      optimizer: factory of `t5x_audio.training.optimizers`.
      init_from: model directory whose weights start the model; None starts from the seed.
      run_dir: what a relative `init_from` is relative to; None is the working directory.
      init_part: the submodule of the model there that is this model ('tokenizer'); '' is all of it.
      init_fresh: submodules of this model that start from the seed all the same ('head').
    """

    model: Any
    objective: Objective
    optimizer: Any
    init_from: str | None = None
    run_dir: str | None = None
    init_part: str = ""
    init_fresh: Sequence[str] = ()

    @property
    def model_configs(self) -> dict[str, Any]:
        """{'model': its configuration}."""
        return {"model": self.model}

    @functools.cached_property
    def graphdef(self):
        """The static part of the model."""
        return nnx.graphdef(nnx.eval_shape(lambda: self.model.make(nnx.Rngs(0))))

    def init(self, rng: jax.Array) -> TrainState:
        """Fresh weights and optimiser state."""
        _, params, variables = nnx.split(self.model.make(nnx.Rngs(rng)), nnx.Param, ...)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params={"model": params},
            variables={"model": variables},
            opt_state={"model": self.optimizer.make(params).init(params)},
        )

    def check_data(self, dataset) -> None:
        """Holds the dataset against the model and the objective: its vocabulary, its speakers."""
        if hasattr(self.objective, "check_dataset"):
            self.objective.check_dataset(self.model, dataset)
        sizes = getattr(dataset, "vocabulary_sizes", None)
        if sizes is None:
            return
        rows = getattr(self.model, "vocab_size", sizes["size"])
        if rows != sizes["size"]:
            raise UserError(
                f"{type(self.model).__name__}.vocab_size={rows}, but the data were cached with a "
                f"vocabulary of {sizes['size']}: give that size or run t5x_audio.cache_tasks with "
                "the model's vocabulary"
            )
        if hasattr(self.objective, "check_vocabulary"):
            self.objective.check_vocabulary(sizes)

    def check_start(self, template: TrainState) -> None:
        """UserError if `init_from` is absent or of another size."""
        if self.init_from is not None:
            checkpoints.require_same_sizes(
                self._start, "model", *_model_of(template), self.init_part, self.init_fresh
            )

    def warm_start(self, state: TrainState) -> TrainState:
        """`state` with the weights of `init_from`. UserError if absent or of another size."""
        if self.init_from is None:
            return state
        params, variables = checkpoints.restore_states(
            self._start, "model", *_model_of(state), self.init_part, self.init_fresh
        )
        return state.replace(
            params=state.params | {"model": params},
            variables=state.variables | {"model": variables},
        )

    def live(self, state: TrainState) -> nnx.Module:
        """The model of a state, for use between two steps: the next one takes its arrays."""
        params, variables = state.params["model"], state.variables["model"]
        return merge_model(self.graphdef, params, variables, train=False)

    @property
    def _start(self) -> str:
        return os.path.join(self.run_dir or "", self.init_from)

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """What the objective derives, if it does."""
        derive = getattr(self.objective, "derived", None)
        return derive(values) if derive else {}

    def _loss(self, params, variables, state, batch, rng, train):
        """-> (loss, (metrics, the model's variables after the forward))."""
        model = merge_model(self.graphdef, params, variables, train)
        loss, metrics = self._objective(model, state, batch, rng, train)
        return loss.astype(jnp.float32), (metrics, updated_variables(model))

    def _objective(self, model, state, batch, rng, train):
        return self.objective(model, batch, rng, train)

    def step(self, state: TrainState, batch, rng: jax.Array) -> tuple[TrainState, Metrics]:
        """One update; adds learning_rate and norms of gradient and update to the metrics."""
        params = state.params["model"]
        (loss, (metrics, variables)), grads = jax.value_and_grad(self._loss, has_aux=True)(
            params, state.variables["model"], state, batch, rng, True
        )
        tx = self.optimizer.make(params)
        updates, opt_state = tx.update(grads, state.opt_state["model"], params)
        metrics = {"loss": mean_metric(loss)} | metrics
        metrics["grad_norm"] = mean_metric(optax.global_norm(grads))
        metrics["update_norm"] = mean_metric(optax.global_norm(updates))
        metrics["learning_rate"] = mean_metric(self.optimizer.learning_rate(state.step))
        new_state = state.replace(
            step=state.step + 1,
            params=state.params | {"model": optax.apply_updates(params, updates)},
            variables=state.variables | {"model": variables},
            opt_state=state.opt_state | {"model": opt_state},
        )
        return new_state, metrics

    def evaluate(self, state: TrainState, batch, rng: jax.Array) -> Metrics:
        """The objective's metrics with train=False."""
        loss, (metrics, _) = self._loss(
            state.params["model"], state.variables["model"], state, batch, rng, False
        )
        return {"loss": mean_metric(loss)} | metrics


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceLearner(GradientLearner):
    """A GradientLearner whose objective also sees the model as it was before the first step.

    The objective is (model, reference, batch, rng, train) -> (loss, Metrics). The reference's
    state is in `variables['reference']`: saved with the run, never changed, never differentiated.
    """

    def init(self, rng: jax.Array) -> TrainState:
        """Fresh weights, and the reference equal to them."""
        return self._with_reference(super().init(rng))

    def warm_start(self, state: TrainState) -> TrainState:
        """The weights of `init_from`, and the reference equal to them."""
        return self._with_reference(super().warm_start(state))

    def _with_reference(self, state: TrainState) -> TrainState:
        reference = {"params": state.params["model"], "variables": state.variables["model"]}
        # A copy of its own: the loop donates the model's buffers to each step.
        reference = jax.tree.map(jnp.copy, reference)
        return state.replace(variables=state.variables | {"reference": reference})

    def _objective(self, model, state, batch, rng, train):
        frozen = jax.lax.stop_gradient(state.variables["reference"])
        reference = merge_model(self.graphdef, frozen["params"], frozen["variables"], train=False)
        return self.objective(model, reference, batch, rng, train)


def _model_of(state: TrainState) -> tuple[Any, Any]:
    return state.params["model"], state.variables["model"]


def merge_model(graphdef, params, variables, train: bool) -> nnx.Module:
    """The live module of a state, with its dropout and normalisation layers set for `train`."""
    # The identity map makes Variables of its own: the forward may change them in place.
    model = nnx.merge(graphdef, *jax.tree.map(lambda x: x, (params, variables)))
    if train:
        model.train()
    else:
        model.eval()
    return model


def updated_variables(model: nnx.Module):
    """The nnx.State of everything but the parameters, to be carried to the next step."""
    nnx.pop(model, nnx.Intermediate)  # What a forward sows isn't state.
    return jax.lax.stop_gradient(nnx.split(model, nnx.Param, ...)[2])
