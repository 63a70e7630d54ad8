"""Optimisers as plain values: what gin binds, what a learner turns into optax on its parameters.

`make(params)` sees the `nnx.State`, so that groups follow from the parameters' own logical axes:
embedding and LM head (any parameter with a 'vocab' axis) may learn at a multiple of the backbone's
rate, as in Step-Audio's first two pretraining stages (5x), and gains and biases don't decay.
`learning_rate(step)` is the schedule itself, for the logs. No optimiser holds state of its own.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from t5x_audio.errors import UserError

_SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scheduled(abc.ABC):
    """Warm-up, then decay; clipping, decay and learning rate groups around an update rule.

    Attributes:
      peak_lr: learning rate after the warm-up.
      total_steps: step at which `end_lr` is reached; only 'cosine' and 'linear' need it.
      warmup_steps: steps of linear growth from 0.
      end_lr: final learning rate of 'cosine' and 'linear'.
      schedule: after the warm-up 'cosine', 'linear', 'constant' or 'inverse_sqrt': as the root of
        warmup_steps / steps (Vaswani et al. 2017; CosyVoice's WarmupLR).
      weight_decay: decoupled decay per unit of learning rate; matrices only.
      clip_norm: bound of the gradient's global norm; None doesn't clip.
      embedding_lr_multiplier: rate of parameters with a 'vocab' axis relative to the others.
    """

    peak_lr: float
    total_steps: int | None = None
    warmup_steps: int = 0
    end_lr: float = 0.0
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    embedding_lr_multiplier: float = 1.0

    def __post_init__(self):
        if self.schedule not in _SCHEDULES:
            raise UserError(f"schedule={self.schedule!r}: use one of {', '.join(_SCHEDULES)}")
        if self.schedule in ("cosine", "linear") and self.total_steps is None:
            raise UserError(f"schedule={self.schedule!r} needs total_steps")
        if self.schedule == "inverse_sqrt" and self.warmup_steps < 1:
            raise UserError("schedule='inverse_sqrt' needs warmup_steps")

    def learning_rate(self, step) -> jax.Array:
        """The backbone's rate at the update with index `step` (0 is the first): float32 scalar."""
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return jnp.asarray(self.peak_lr * warm, jnp.float32)
        if self.schedule == "inverse_sqrt":
            fall = jnp.sqrt(self.warmup_steps / jnp.maximum(step + 1, self.warmup_steps))
            return self.peak_lr * warm * fall
        span = max(self.total_steps - self.warmup_steps, 1)
        done = jnp.clip((step - self.warmup_steps) / span, 0.0, 1.0)
        left = 1 - done if self.schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(
            step < self.warmup_steps,
            self.peak_lr * warm,
            self.end_lr + (self.peak_lr - self.end_lr) * left,
        )

    @abc.abstractmethod
    def _rule(self) -> optax.GradientTransformation:
        """Gradients -> directions, before decay and learning rate."""

    def make(self, params) -> optax.GradientTransformation:
        """The transformation for an nnx.State of parameters with `logical_axes` metadata."""
        clip = optax.identity()
        if self.clip_norm is not None:
            clip = optax.clip_by_global_norm(self.clip_norm)
        decay = optax.identity()
        if self.weight_decay:
            decay = optax.add_decayed_weights(
                self.weight_decay, mask=_per_parameter(_decays, params)
            )
        return optax.chain(
            clip,
            self._rule(),
            decay,
            self._embedding_group(params),
            optax.scale_by_learning_rate(self.learning_rate),
        )

    def _embedding_group(self, params) -> optax.GradientTransformation:
        if self.embedding_lr_multiplier == 1.0:
            return optax.identity()
        multiplier = self.embedding_lr_multiplier
        factors = _per_parameter(lambda axes, _: multiplier if "vocab" in axes else 1.0, params)
        return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(_Scheduled):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    Attributes:
      b1, b2, eps: of Adam.
      moments_dtype: 'float32', or 'bfloat16' to keep both moments in half of the memory; they are
        computed in float32. A second moment changes by 1 - b2 of itself at most when the gradients
        shrink, which bfloat16 (8 bits) resolves down to 0.004: a larger b2 is refused.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    moments_dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        if self.moments_dtype not in ("float32", "bfloat16"):
            raise UserError(f"AdamW.moments_dtype={self.moments_dtype!r}: float32 or bfloat16")
        if self.moments_dtype == "bfloat16" and max(self.b1, self.b2) > 0.99:
            raise UserError(
                f"AdamW.moments_dtype='bfloat16' cannot hold moments with b1={self.b1}, "
                f"b2={self.b2}: they would stand still; keep both at 0.99 or below, or use float32"
            )

    def _rule(self):
        rule = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return rule if self.moments_dtype == "float32" else _kept_in(rule, self.moments_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(_Scheduled):
    """Stochastic gradient descent with momentum, as PyTorch's: l2 before the momentum.

    Attributes:
      momentum: of the gradients.
      l2: times every parameter, gains and biases too, added to its gradient; what PyTorch and the
        published recipes of SimSiam and SSQL call weight decay.
    """

    momentum: float = 0.9
    l2: float = 0.0
    clip_norm: float | None = None

    def _rule(self):
        return optax.chain(optax.add_decayed_weights(self.l2), optax.trace(self.momentum))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(_Scheduled):
    """Factored second moments and clipped updates, no momentum (Shazeer and Stern, 2018)."""

    decay_rate: float = 0.8
    min_factored_size: int = 128
    clip_update_rms: float = 1.0

    def _rule(self):
        return optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_factored_size
            ),
            optax.clip_by_block_rms(self.clip_update_rms),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(_Scheduled):
    """Orthogonalised momentum for matrices, Adam for the rest (Jordan, 2024; optax.contrib.muon).

    The rest are embedding and head (any parameter with a 'vocab' axis), gains and biases. Heads of
    an attention are the columns of one matrix; stacked layers are orthogonalised one by one.
    Updates of matrices have the size of Adam's (arXiv 2502.16982, section 2.2), so that the rates
    and the decay of AdamW serve.

    Attributes:
      momentum: of the matrices' gradients, Nesterov's.
      b1, b2, eps: of Adam.
      newton_schulz_steps: iterations of the orthogonalisation.
      update_rms: root mean square of a matrix's update at a learning rate of 1.
    """

    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    newton_schulz_steps: int = 5
    update_rms: float = 0.2

    def _rule(self):
        return optax.contrib.muon(
            learning_rate=-1.0,  # the direction; rate and sign come behind it
            ns_steps=self.newton_schulz_steps,
            beta=self.momentum,
            eps=self.eps,
            adam_b1=self.b1,
            adam_b2=self.b2,
            consistent_rms=self.update_rms,
            muon_weight_dimension_numbers=lambda params: _per_parameter(_as_matrix, params),
        )


def _as_matrix(axes, ndim) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are inputs and which outputs of a matrix; None if it is none."""
    inner = [axis for axis in range(ndim) if not (axes and axes[axis] == "layers")]
    outputs = 2 if axes and axes[-1] == "head_dim" else 1
    if "vocab" in axes or len(inner) <= outputs:
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(inner[:-outputs]), tuple(inner[-outputs:]))


def _kept_in(rule: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`rule` with the floating-point arrays of its state in another type between two updates."""

    def cast(state, to):
        def one(leaf):
            return leaf.astype(to) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(one, state)

    def update(updates, state, params=None):
        updates, state = rule.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(rule.init(params), dtype), update)


def _per_parameter(function, params):
    """`params` with every array replaced by function(logical axes, number of dimensions)."""

    def of(node):
        axes = getattr(node, "logical_axes", None) or ()
        return jax.tree.map(lambda leaf: function(axes, leaf.ndim), node)

    return jax.tree.map(of, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _decays(axes, ndim) -> bool:
    """Whether a parameter is a matrix; the stacking axis of scanned layers doesn't count."""
    return ndim - axes.count("layers") > 1
