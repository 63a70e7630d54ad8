"""The compiled functions of a training run on its mesh: what `train` runs and `plan` costs.

One description for both, so that what is planned without a device is the very step that is run.
"""

import functools

import jax
from jax.sharding import Mesh

from t5x_audio.training import partitioning
from t5x_audio.training.learner import Learner, TrainState
from t5x_audio.training.partitioning import ShardingRules
from t5x_audio.training.step_guard import StepGuard


class TrainProgram:
    """`init`, `step` and `evaluate` of a learner, jitted and sharded; nothing is compiled yet.

    Attributes:
      mesh: where it runs; `jax.set_mesh(program.mesh)` around every use.
      shardings: a tree like the TrainState.
      template: the TrainState as ShapeDtypeStructs with their shardings.
      init: () -> a fresh TrainState.
      step: (state, batch) -> (state, metrics); the state is donated.
      evaluate: (state, batch, index) -> metrics.
    """

    def __init__(
        self,
        learner: Learner,
        mesh: Mesh,
        rules: ShardingRules,
        seed: int,
        guard: StepGuard | None = None,
    ):
        """`seed` decides the initial weights and the randomness of every step.

        UserError where sizes do not divide over the mesh.
        """
        # Before the mesh is set: a mesh of a topology without devices cannot compute even this.
        self._root = jax.random.key(seed)
        self._learner, self._guard, self.mesh = learner, guard or StepGuard(), mesh
        abstract = jax.eval_shape(self._init, self._root)
        self.shardings = rules.shardings(abstract, mesh)
        self.template = partitioning.with_shardings(abstract, self.shardings)
        # A dataset of several static shapes compiles these once for each.
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, None))
        self.evaluate = jax.jit(self._evaluate)

    @functools.cached_property
    def init(self):
        """See the class."""
        compiled = jax.jit(self._init, out_shardings=self.shardings)
        return functools.partial(compiled, self._root)

    def _init(self, root):
        return self._guard.init(self._learner.init(root))

    def _step(self, state: TrainState, batch):
        rng = jax.random.fold_in(self._root, state.step)
        return self._guard.judge(state, *self._learner.step(state, batch, rng))

    def _evaluate(self, state: TrainState, batch, index):
        return self._learner.evaluate(state, batch, jax.random.fold_in(self._root, index))
