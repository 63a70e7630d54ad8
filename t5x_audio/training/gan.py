"""GanLearner: generator and discriminators trained against each other in one compiled step.

Each step updates the discriminators on the generator's present output, then the generator through
the updated discriminators. Before `disc_start_step` only the generator's signal terms (mel, F0) are
trained; `lax.cond` keeps that phase from paying for the discriminators. The generator runs forward
once a step: its samples serve both players, and its gradient is pulled back from the sum of terms.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from t5x_audio.training import learner
from t5x_audio.training.learner import Metrics, TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class GanLearner(learner.Learner):
    """Models 'generator' and 'discriminator', each with an optimiser of its own.

    Attributes:
      generator: configuration with `.make(rngs)`, a `HiftConfig`.
      discriminator: configuration with `.make(rngs)`, a `DiscriminatorConfig`.
      objective: a `GanObjective`.
      optimizer: factory of the generator's optimiser.
      discriminator_optimizer: factory of the discriminators' optimiser.
      disc_start_step: first step that trains the discriminators and listens to them.
    """

    generator: Any
    discriminator: Any
    objective: Any
    optimizer: Any
    discriminator_optimizer: Any
    disc_start_step: int = 0

    @property
    def model_configs(self) -> dict[str, Any]:
        """The two configurations by model name."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    @functools.cached_property
    def graphdefs(self):
        """The modules' structure by model name."""
        return {
            name: nnx.split(nnx.eval_shape(lambda c=c: c.make(nnx.Rngs(0))), nnx.Param, ...)[0]
            for name, c in self.model_configs.items()
        }

    def _optimizers(self):
        return {"generator": self.optimizer, "discriminator": self.discriminator_optimizer}

    def init(self, rng: jax.Array) -> TrainState:
        """Both models and both optimisers before the first step."""
        keys = dict(zip(self.model_configs, jax.random.split(rng), strict=True))
        params, variables, opt_state = {}, {}, {}
        for name, config in self.model_configs.items():
            module = config.make(nnx.Rngs(keys[name]))
            _, params[name], variables[name] = nnx.split(module, nnx.Param, ...)
            tx = self._optimizers()[name].make(params[name])
            opt_state[name] = tx.init(params[name])
        step = jnp.zeros((), jnp.int32)
        return TrainState(step=step, params=params, variables=variables, opt_state=opt_state)

    def _merge(self, name, state, params, train):
        return learner.merge_model(self.graphdefs[name], params, state.variables[name], train)

    def _update(self, name, state: TrainState, grads) -> TrainState:
        params = state.params[name]
        tx = self._optimizers()[name].make(params)
        updates, opt_state = tx.update(grads, state.opt_state[name], params)
        return state.replace(
            params=state.params | {name: optax.apply_updates(params, updates)},
            opt_state=state.opt_state | {name: opt_state},
        )

    def step(self, state: TrainState, batch, rng: jax.Array) -> tuple[TrainState, Metrics]:
        """One update of each player; see the module's text."""
        real, mel, f0 = jax.lax.stop_gradient(self.objective.inputs(batch))

        def generate(params):
            model = self._merge("generator", state, params, True)
            return self.objective.generate(model, mel, f0, rng)

        (fake, predicted), pull_back = jax.vjp(generate, state.params["generator"])

        def signal(fake, predicted):
            return self.objective.signal_loss(fake, real, predicted, f0)

        (loss, values), cotangents = jax.value_and_grad(signal, (0, 1), has_aux=True)(
            fake, predicted
        )
        active = state.step >= self.disc_start_step
        state, extra_loss, extra_cotangent, extra = jax.lax.cond(
            active,
            lambda s: self._play(s, fake, real),
            lambda s: self._idle(s, fake),
            state,
        )
        (grads,) = pull_back((cotangents[0] + extra_cotangent, cotangents[1]))
        metrics = {name: learner.mean_metric(value) for name, value in values.items()}
        weight = active.astype(jnp.float32)
        metrics |= {name: learner.mean_metric(value, weight) for name, value in extra.items()}
        metrics["loss"] = learner.mean_metric(loss + extra_loss)
        metrics["grad_norm"] = learner.mean_metric(optax.global_norm(grads))
        metrics["learning_rate"] = learner.mean_metric(self.optimizer.learning_rate(state.step))
        state = self._update("generator", state, grads)
        return state.replace(step=state.step + 1), metrics

    def branch(self, step: int) -> int:
        """1 once the discriminators play."""
        return int(step >= self.disc_start_step)

    def _play(self, state: TrainState, fake, real):
        """Updates the discriminators; -> (state, loss, d loss / d fake, values)."""

        def judge(params):
            model = self._merge("discriminator", state, params, True)
            return self.objective.discriminator_loss(model, fake, real)

        disc_loss, grads = jax.value_and_grad(judge)(state.params["discriminator"])
        state = self._update("discriminator", state, grads)
        model = self._merge("discriminator", state, state.params["discriminator"], True)
        (loss, values), cotangent = jax.value_and_grad(
            lambda x: self.objective.adversarial_loss(model, x, real), has_aux=True
        )(fake)
        return state, loss, cotangent, values | {"discriminator_loss": disc_loss}

    def _idle(self, state: TrainState, fake):
        names = ("generator_adversarial", "feature_matching", "discriminator_loss")
        zero = jnp.zeros((), jnp.float32)
        return state, zero, jnp.zeros_like(fake), dict.fromkeys(names, zero)

    def evaluate(self, state: TrainState, batch, rng: jax.Array) -> Metrics:
        """Signal terms with the F0 that synthesis would use: the predicted one."""
        real, mel, f0 = self.objective.inputs(batch)
        model = self._merge("generator", state, state.params["generator"], False)
        predicted = model.f0_predictor(mel)
        fake = model(mel, rng, f0=predicted)
        loss, values = self.objective.signal_loss(fake, real, predicted, f0)
        return {name: learner.mean_metric(v) for name, v in ({"loss": loss} | values).items()}
