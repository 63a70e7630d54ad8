"""A learner and a dataset small enough to train, kill and resume within a test."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from t5x_audio.training import learner


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    embed: int = 8
    mlp: int = 16
    vocab: int = 12
    dropout: float = 0.1

    def make(self, rngs):
        return Mlp(self, rngs)


def linear(inputs, outputs, axes, rngs, use_bias=True):
    init = nnx.with_metadata(nnx.initializers.lecun_normal(), logical_axes=axes)
    return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs, use_bias=use_bias)


class Mlp(nnx.Module):
    """Embedding, dropout, one hidden layer with running statistics, logits."""

    def __init__(self, c, rngs):
        table = nnx.initializers.normal(1.0)(rngs.params(), (c.vocab, c.embed))
        self.table = nnx.Param(table, logical_axes=("vocab", "embed"))
        self.up = linear(c.embed, c.mlp, ("embed", "mlp"), rngs, use_bias=False)
        self.norm = nnx.BatchNorm(c.mlp, rngs=rngs)
        self.head = linear(c.mlp, c.vocab, (None, "vocab"), rngs)
        self.dropout = nnx.Dropout(c.dropout, rngs=rngs)

    def __call__(self, tokens, rng):
        x = self.dropout(self.table[...][tokens], rngs=nnx.Rngs(rng))
        return self.head(jax.nn.relu(self.norm(self.up(x))))


@dataclasses.dataclass(frozen=True)
class BigramConfig:
    """The smallest model: a table of logits. Quick to compile."""

    vocab: int = 12

    def make(self, rngs):
        return Bigram(self)


class Bigram(nnx.Module):
    def __init__(self, c):
        self.table = nnx.Param(jnp.zeros((c.vocab, c.vocab)), logical_axes=("vocab", None))

    def __call__(self, tokens, rng):
        return self.table[...][tokens]


@dataclasses.dataclass(frozen=True)
class Descent:
    def make(self, params):
        return optax.sgd(0.1)

    def learning_rate(self, step):
        return 0.1


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy; `poison_at` is a token that makes the loss NaN."""

    poison_at: int = -1

    def __call__(self, model, batch, rng, train):
        logits = model(batch["tokens"], rng).astype(jnp.float32)
        losses = -jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1
        )
        poison = jnp.where((batch["tokens"] == self.poison_at).any(), jnp.nan, 0.0)
        loss = losses.mean() + poison
        return loss, {"loss": learner.mean_metric(loss, losses.size)}


class Counting:
    """Iterator whose batch n is a function of n; alternates between two static shapes."""

    def __init__(self, data):
        self.data, self.position = data, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.data.length is not None and self.position >= self.data.length:
            raise StopIteration
        rng = np.random.default_rng(self.position)
        tokens = rng.integers(0, 10, (8, self.data.lengths[self.position % 2])).astype(np.int32)
        self.position += 1
        if self.position == self.data.poison_at:
            tokens[0, 0] = 11
        time.sleep(self.data.delay)
        return {"tokens": tokens, "targets": (tokens * 3 + 1) % 10}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


@dataclasses.dataclass(frozen=True)
class Data:
    length: int | None = None
    delay: float = 0.0
    poison_at: int = -1
    lengths: tuple[int, int] = (4, 6)

    def __iter__(self):
        return Counting(self)

    def eval_sets(self):
        iterator = Counting(Data())
        return {"counting": [next(iterator) for _ in range(3)]}
