"""The programs of a decoder on a pod: prompts through the model, and a block of new tokens.

They are those of backbone/decoding.py, with the sampling released with Step-Audio, the weights as
decoding_weights.py prepares them and the layout of a training run's rules: a weight stays where it
is stored and the few tokens of a step travel.
"""

import dataclasses

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_audio.backbone import decoding, decoding_weights
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.errors import UserError
from t5x_audio.sequences.layouts import Layouts
from t5x_audio.tokenizers.dual_codebook import GROUP_SECONDS, GROUP_SIZE
from t5x_audio.training import partitioning
from t5x_audio.training.partitioning import ShardingRules

BLOCK = 16
"""Tokens of a run of `decode`."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What a decoder has to carry.

    Attributes:
      context: slots of the cache, the prompt among them.
      prompt: tokens of each prompt.
      batch: streams at once.
      weights: see decoding_weights.KINDS.
    """

    context: int
    prompt: int
    batch: int = 1
    weights: str = "bfloat16"

    def __post_init__(self):
        if self.batch < 1 or not 0 < self.prompt < self.context:
            raise UserError(
                f"cannot serve {self.batch} streams with prompts of {self.prompt} tokens in a "
                f"context of {self.context}: the context must be longer than the prompt"
            )


def tokens_for_real_time() -> float:
    """Tokens a second of one stream that speaks as fast as it is heard, text blocks included."""
    audio_share = Layouts.audio_block / (Layouts.audio_block + Layouts.text_block)
    return GROUP_SIZE / GROUP_SECONDS / audio_share


class ServingProgram:
    """`prefill` and `decode` of a model on a mesh, lowered but not compiled.

    Attributes:
      weights: ShapeDtypeStructs with shardings.
    """

    def __init__(self, config: TransformerConfig, mesh: Mesh, rules: ShardingRules, load: Load):
        """UserError where sizes do not divide over the mesh. Use under `jax.set_mesh(mesh)`."""
        model = nnx.eval_shape(
            lambda: decoding_weights.prepare(config.make(nnx.Rngs(0)), load.weights, unstack=False)
        )
        self._graphdef, state = nnx.split(model)
        self._whole, self._load = NamedSharding(mesh, P()), load
        self.weights = partitioning.with_shardings(state, rules.shardings(state, mesh))

    def prefill(self):
        """Lowered: prompts in; cache, logits and positions out."""
        return decoding.prefill.lower(self._graphdef, self.weights, *self._prompts(), self._room)

    def decode(self, shardings):
        """Lowered: BLOCK tokens for every stream, from the state that `prefill` leaves.

        Args:
          shardings: of what the compiled `prefill` returns.
        """
        run = lambda w, *prompts: decoding.prefill(self._graphdef, w, *prompts, self._room)  # noqa: E731
        made = partitioning.with_shardings(
            jax.eval_shape(run, self.weights, *self._prompts()), shardings
        )
        sampling = decoding.Sampling()
        state = jax.eval_shape(lambda *made: decoding.begin(*made, sampling), *made)
        rest = jax.tree.map(lambda leaf: self._whole, state)
        rest = rest.replace(**dict(zip(("cache", "logits", "position"), shardings, strict=True)))
        state = partitioning.with_shardings(state, rest)
        return decoding.decode_block.lower(
            self._graphdef, self.weights, state, None, sampling, (), BLOCK
        )

    @property
    def _room(self) -> int:
        return self._load.context - self._load.prompt

    def _prompts(self):
        shapes = ((self._load.batch, self._load.prompt), (self._load.batch,))
        return [jax.ShapeDtypeStruct(s, "int32", sharding=self._whole) for s in shapes]
