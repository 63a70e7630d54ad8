"""Conditional flow matching from paired audio codes to mel: the form of Step-Audio's successors.

A group of five codes (two linguistic, three semantic: 0.12 s) becomes three positions at 25 Hz,
each a pair of a linguistic code or padding and a semantic code; both go through one table and stand
side by side. An up-sampling conformer that sees three positions ahead gives mu at 50 Hz, a
diffusion transformer the velocity. Sampling is `flow.solve`. Source: Step-Audio-EditX's
stepvocoder/cosyvoice2 (embedding/dual_codebook.py, flow/flow.py, cli/cosyvoice.py).
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.vocoder.convolution import length_mask
from t5x_audio.vocoder.dit import Dit, DitConfig, DitState
from t5x_audio.vocoder.flow import (
    CODES_PER_GROUP,
    Conditions,
    normalised,
    solve,
    solve_with_state,
)
from t5x_audio.vocoder.initialisers import spread
from t5x_audio.vocoder.layers import linear
from t5x_audio.vocoder.ring import Chunks
from t5x_audio.vocoder.upsampling_conformer import UpsamplingConformerConfig, UpsamplingState

LINGUISTIC_PER_GROUP, POSITIONS_PER_GROUP = 2, 3
POSITIONS_A_SECOND = 25


@dataclasses.dataclass(frozen=True)
class PairedFlowConfig:
    """Sizes; defaults are EditX's table with the networks of Step-Audio 2 mini.

    Attributes:
      codebook: flat local codes, linguistic then semantic.
      linguistic_size: of them, the linguistic ones; padding is the row after them.
      num_mels, speaker_dim, sample_rate, hop: as of `FlowConfig`; 50 frames a second.
      encoder, estimator: the networks.
      sigma_min, guidance, temperature, num_steps, mel_mean, mel_std: as of `FlowConfig`.
    """

    codebook: int = 5120
    linguistic_size: int = 1024
    num_mels: int = 80
    speaker_dim: int = 192
    sample_rate: int = 24000
    hop: int = 480
    encoder: UpsamplingConformerConfig = UpsamplingConformerConfig()
    estimator: DitConfig = DitConfig()
    sigma_min: float = 1e-6
    guidance: float = 0.7
    temperature: float = 1.0
    num_steps: int = 10
    mel_mean: float = 0.0
    mel_std: float = 1.0

    @property
    def look_ahead_codes(self) -> int:
        """Codes behind a chunk that a stream waits for: whole groups."""
        return -(-self.encoder.look_ahead // POSITIONS_PER_GROUP) * CODES_PER_GROUP

    def positions(self, code_lengths):
        """Pairs of so many codes (int or integer array), of whole groups."""
        return code_lengths // CODES_PER_GROUP * POSITIONS_PER_GROUP

    def mel_lengths(self, code_lengths):
        """Mel frames of so many codes (int or integer array), of whole groups."""
        return self.positions(code_lengths) * self.encoder.up_factor

    def completed(self, codes: np.ndarray) -> np.ndarray:
        """Flat codes [N] as whole groups: to an odd tail the first code of each kind is added.

        EditX takes them from the end of [0, 0, 0, 1024, 1024, 1024].
        """
        missing = -len(codes) % CODES_PER_GROUP
        first = [0] * LINGUISTIC_PER_GROUP + [self.linguistic_size] * POSITIONS_PER_GROUP
        return np.append(codes, first[len(first) - missing :]).astype(codes.dtype)

    def make(self, rngs: nnx.Rngs) -> "PairedFlow":
        """The model with fresh weights."""
        frame_rate = POSITIONS_A_SECOND * self.encoder.up_factor
        if self.sample_rate != self.hop * frame_rate:
            raise UserError(
                f"PairedFlowConfig: {frame_rate} frames a second at {self.sample_rate} Hz need a "
                f"hop of {self.sample_rate / frame_rate:g} samples, not {self.hop}"
            )
        return PairedFlow(self, rngs)


def pairs(codes: jax.Array, linguistic_size: int) -> jax.Array:
    """Flat local codes int32 [B, N] -> rows of the table int32 [B, 3 * (N // 5), 2]."""
    batch, count = codes.shape[0], codes.shape[1] // CODES_PER_GROUP
    groups = codes[:, : count * CODES_PER_GROUP].reshape(batch, count, CODES_PER_GROUP)
    padding = jnp.full((batch, count, 1), linguistic_size, codes.dtype)
    linguistic = jnp.concatenate([groups[..., :LINGUISTIC_PER_GROUP], padding], axis=-1)
    semantic = groups[..., LINGUISTIC_PER_GROUP:] + 1
    return jnp.stack([linguistic, semantic], axis=-1).reshape(batch, -1, 2)


@flax.struct.dataclass
class PairedFlowState:
    """Of a stream: the encoder's state, and the estimator's at each of the num_steps times."""

    encoder: UpsamplingState
    estimator: DitState


class PairedFlow(nnx.Module):
    """Codes and speaker to mel; `conditions`, `velocity` and `sample` as of `FlowMatching`."""

    def __init__(self, config: PairedFlowConfig, rngs: nnx.Rngs):
        self.config = config
        width, mels = config.encoder.width, config.num_mels
        self.embedding = nnx.Embed(
            config.codebook + 1,
            width // 2,
            embedding_init=nnx.with_metadata(spread(1.0), logical_axes=("vocab", "embed")),
            rngs=rngs,
        )
        self.encoder = config.encoder.make(rngs)
        self.project = linear(width, mels, ("embed", None), dtype="float32", rngs=rngs)
        self.speaker = linear(config.speaker_dim, mels, (None, None), dtype="float32", rngs=rngs)
        self.estimator = Dit(4 * mels, mels, config.estimator, rngs)

    def normalise(self, mel: jax.Array) -> jax.Array:
        """Log-mel -> the model's scale."""
        return (mel - self.config.mel_mean) / self.config.mel_std

    def conditions(
        self,
        codes: jax.Array,
        code_lengths: jax.Array,
        speaker_embedding: jax.Array,
        prompt_mel: jax.Array | None = None,
        prompt_code_lengths: jax.Array | None = None,
        rng: jax.Array | None = None,
        chunks: Chunks | None = None,
    ) -> Conditions:
        """Encodes codes and speaker; arguments as of `FlowMatching.conditions`, and one more.

        Args:
          chunks: of pairs; encoder and estimator see what a stream of such chunks sees. None = all.
        """
        config = self.config
        rows = self._rows(codes)
        size = config.mel_lengths(codes.shape[1])
        prompt = jnp.zeros((codes.shape[0], size, config.num_mels))
        if prompt_code_lengths is not None:
            frames = config.mel_lengths(prompt_code_lengths)
            prompt = self.normalise(prompt_mel[:, :size]) * length_mask(frames, size)
        position_mask = length_mask(config.positions(code_lengths), rows.shape[1])
        x = self._embed(rows) * position_mask
        mask = length_mask(config.mel_lengths(code_lengths), size)
        mu = self.project(self.encoder(x, position_mask, rng, chunks)) * mask
        speaker = self.speaker(normalised(speaker_embedding))
        return Conditions(mu, speaker, prompt, mask, jnp.ones(codes.shape[0]), chunks)

    def velocity(self, x: jax.Array, time: jax.Array, conditions: Conditions) -> jax.Array:
        """d x / d t of the flow: x float32 [B, F, M], time float32 [B] -> float32 [B, F, M]."""
        config, bias = self.config, None
        joined = conditions.beside(x).astype(config.estimator.dtype)
        if conditions.chunks is not None:
            chunks = conditions.chunks.repeated(config.encoder.up_factor)
            bias = chunks.bias(config.estimator.look_back_frames)
        return self.estimator(joined, conditions.mask, time, bias)

    def sample(self, conditions: Conditions, noise: jax.Array) -> jax.Array:
        """Solves the flow from noise; see `FlowMatching.sample`."""
        return solve(self, conditions, noise)

    def initial_state(self, batch_size: int, prompt_codes: int) -> PairedFlowState:
        """The state of a stream before its first code; a prompt has at most `prompt_codes`."""
        config = self.config
        estimator = self.estimator.initial_state(2 * batch_size, config.mel_lengths(prompt_codes))
        return PairedFlowState(
            encoder=self.encoder.initial_state(batch_size, config.positions(prompt_codes)),
            estimator=jax.tree.map(lambda a: jnp.stack([a] * config.num_steps), estimator),
        )

    def step(
        self,
        codes: jax.Array,
        speaker_embedding: jax.Array,
        noise: jax.Array,
        state: PairedFlowState,
        prompt_mel: jax.Array | None = None,
        valid_codes: jax.Array | None = None,
    ):
        """The mel of the next chunk of a stream; chunk by chunk, as the reference's caches give it.

        Args:
          codes: int32 [B, N + look_ahead_codes] of whole groups, the chunk's and those after it.
          speaker_embedding: float [B, speaker_dim].
          noise: float32 [B, F, num_mels] with F = mel_lengths(N).
          state: after the chunks before it.
          prompt_mel: float [B, F, num_mels] log-mel, if the chunk is the prompt; it must be first.
          valid_codes: int32 [], as `valid` of the encoder, in codes; None = all.

        Returns:
          (log-mel float32 [B, F, num_mels], the next state)
        """
        config = self.config
        is_prompt = prompt_mel is not None
        length = noise.shape[1] // config.encoder.up_factor
        rows = self._rows(codes)[:, : length + config.encoder.look_ahead]
        valid = frames = None
        if valid_codes is not None:
            valid = config.positions(valid_codes)
            frames = jnp.minimum(valid, length) * config.encoder.up_factor
        mu, encoder = self.encoder.step(self._embed(rows), state.encoder, is_prompt, valid)
        conditions = Conditions(
            mu=self.project(mu),
            speaker=self.speaker(normalised(speaker_embedding)),
            prompt=self.normalise(prompt_mel) if is_prompt else jnp.zeros_like(noise),
            mask=jnp.ones((*noise.shape[:2], 1)),
            kept=jnp.ones(len(codes)),
        )

        def velocity(x, time, both, state):
            joined = both.beside(x).astype(config.estimator.dtype)
            return self.estimator.step(joined, time, state, is_prompt, frames)

        mel, estimator = solve_with_state(config, velocity, conditions, noise, state.estimator)
        return mel, PairedFlowState(encoder, estimator)

    def _rows(self, codes):
        return pairs(jnp.clip(codes, 0, self.config.codebook - 1), self.config.linguistic_size)

    def _embed(self, rows):
        return self.embedding(rows).reshape(*rows.shape[:2], -1)
