"""Keys and values that a stream attends to: all of its prompt, then the last frames, in a ring.

Memory is the same after an hour. Which frame stands in which place follows from how many were seen;
the places have no order, so whoever cares for distances takes them from `Ring.distances`, in which
the frames that are kept stand side by side, as in Step-Audio 2's cache.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

_UNSEEN = -1e9


@dataclasses.dataclass(frozen=True)
class RingSize:
    """Places of a cache: `prompt` for the prompt at the most, then `look_back` for frames."""

    prompt: int
    look_back: int

    @property
    def places(self) -> int:
        """All of them."""
        return self.prompt + self.look_back


@flax.struct.dataclass
class Ring:
    """A cache of P places and T new frames behind it.

    Attributes:
      mask: float32 [P + T], 1 where there is a valid frame.
      distances: int32 [T, P + T], frames from each place to each new frame; any where mask is 0.
      targets: int32 [T], where to keep the new frames; P or more = nowhere.
    """

    mask: jax.Array
    distances: jax.Array
    targets: jax.Array

    def keep(self, cache: jax.Array, new: jax.Array) -> jax.Array:
        """The cache [B, P, ...] with the new frames [B, T, ...]."""
        return cache.at[:, self.targets].set(new.astype(cache.dtype), mode="drop")


def ring(size: RingSize, seen, prompt_frames, length: int, valid, prompt: bool) -> Ring:
    """The ring of the next chunk.

    Args:
      size: of the cache.
      seen: int32 [], frames before this chunk, the prompt's too.
      prompt_frames: int32 [], of them the prompt's.
      length: frames of the chunk, T.
      valid: int32 [], of them those that count; the others come after them and are not kept.
      prompt: whether the chunk is the prompt.
    """
    look_back = size.look_back
    if prompt:
        prompt_frames = valid
    place = jnp.arange(size.places)
    # The last frame that was put into each place of the ring.
    turn = (seen - prompt_frames - 1 - (place - size.prompt)) // look_back
    recent = prompt_frames + place - size.prompt + turn * look_back
    index = jnp.where(place < size.prompt, place, recent)
    filled = jnp.where(
        place < size.prompt, place < jnp.minimum(seen, prompt_frames), recent >= prompt_frames
    )
    new = jnp.arange(length)
    # Side by side: the prompt, then the frames from the oldest that is kept.
    gone = jnp.maximum(seen - look_back - prompt_frames, 0)
    stands = jnp.where(place < size.prompt, place, index - gone)
    stands = jnp.concatenate([stands, seen - gone + new])
    number = seen + new
    target = jnp.where(
        number < prompt_frames, number, size.prompt + (number - prompt_frames) % look_back
    )
    # Of more new frames than the ring has places, the last ones stay.
    fading = (number >= prompt_frames) & (number < seen + valid - look_back)
    target = jnp.where(fading | (new >= valid), size.places, target)
    return Ring(
        mask=jnp.concatenate([filled, new < valid]).astype(jnp.float32),
        distances=(seen - gone + new)[:, None] - stands[None],
        targets=target,
    )


@flax.struct.dataclass
class Chunks:
    """In which chunk of a stream each frame comes, where a whole sees only what a stream sees.

    Attributes:
      numbers: int32 [B, T], rising; a prompt is a chunk of its own, the first.
      prompts: int32 [B], frames of the prompt; 0 = none.
    """

    numbers: jax.Array
    prompts: jax.Array

    def repeated(self, factor: int) -> "Chunks":
        """The same for `factor` frames in the place of each."""
        return Chunks(jnp.repeat(self.numbers, factor, axis=1), self.prompts * factor)

    def bias(self, look_back: int) -> jax.Array:
        """Scores to add [B, 1, T, T]: of its own chunk a frame sees all, before it `look_back`
        frames and the prompt.
        """
        index, numbers = jnp.arange(self.numbers.shape[1]), self.numbers
        start = jax.vmap(jnp.searchsorted)(numbers, numbers)  # of a frame's own chunk
        recent = index >= start[:, :, None] - look_back
        prompt = index < self.prompts[:, None, None]
        visible = (numbers[:, None] <= numbers[:, :, None]) & (recent | prompt)
        return jnp.where(visible, 0.0, _UNSEEN)[:, None]


def equal_chunks(size: int, prompts: jax.Array, lengths: jax.Array) -> Chunks:
    """Chunks of `lengths` int32 [B] frames behind prompts of `prompts` int32 [B] frames."""
    beyond = jnp.arange(size) - prompts[:, None]
    return Chunks(jnp.where(beyond < 0, 0, 1 + beyond // lengths[:, None]), prompts)
