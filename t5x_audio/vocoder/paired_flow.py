"""Conditional flow matching from paired audio codes to mel: the form of Step-Audio's successors.

A group of five codes (two linguistic, three semantic: 0.12 s) becomes three positions at 25 Hz,
each a pair of a linguistic code or padding and a semantic code; both go through one table and stand
side by side. An up-sampling conformer that sees three positions ahead gives mu at 50 Hz, a
diffusion transformer the velocity. Sampling is `flow.solve`. Source: Step-Audio-EditX's
stepvocoder/cosyvoice2 (embedding/dual_codebook.py, flow/flow.py, cli/cosyvoice.py).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.vocoder.convolution import length_mask
from t5x_audio.vocoder.dit import Dit, DitConfig
from t5x_audio.vocoder.flow import CODES_PER_GROUP, Conditions, normalised, solve
from t5x_audio.vocoder.initialisers import spread
from t5x_audio.vocoder.layers import linear
from t5x_audio.vocoder.upsampling_conformer import UpsamplingConformerConfig

LINGUISTIC_PER_GROUP, POSITIONS_PER_GROUP = 2, 3


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

    def positions(self, code_lengths):
        """Pairs of so many codes (int or integer array), of whole groups."""
        return code_lengths // CODES_PER_GROUP * POSITIONS_PER_GROUP

    def mel_lengths(self, code_lengths):
        """Mel frames of so many codes (int or integer array), of whole groups."""
        return self.positions(code_lengths) * self.encoder.up_factor

    def make(self, rngs: nnx.Rngs) -> "PairedFlow":
        """The model with fresh weights."""
        return PairedFlow(self, rngs)


def pairs(codes: jax.Array, linguistic_size: int) -> jax.Array:
    """Flat local codes int32 [B, N] -> rows of the table int32 [B, 3 * (N // 5), 2]."""
    batch, count = codes.shape[0], codes.shape[1] // CODES_PER_GROUP
    groups = codes[:, : count * CODES_PER_GROUP].reshape(batch, count, CODES_PER_GROUP)
    padding = jnp.full((batch, count, 1), linguistic_size, codes.dtype)
    linguistic = jnp.concatenate([groups[..., :LINGUISTIC_PER_GROUP], padding], axis=-1)
    semantic = groups[..., LINGUISTIC_PER_GROUP:] + 1
    return jnp.stack([linguistic, semantic], axis=-1).reshape(batch, -1, 2)


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
    ) -> Conditions:
        """Encodes codes and speaker; arguments as of `FlowMatching.conditions`."""
        config = self.config
        rows = pairs(jnp.clip(codes, 0, config.codebook - 1), config.linguistic_size)
        size = config.mel_lengths(codes.shape[1])
        prompt = jnp.zeros((codes.shape[0], size, config.num_mels))
        if prompt_code_lengths is not None:
            frames = config.mel_lengths(prompt_code_lengths)
            prompt = self.normalise(prompt_mel[:, :size]) * length_mask(frames, size)
        position_mask = length_mask(config.positions(code_lengths), rows.shape[1])
        x = self.embedding(rows).reshape(*rows.shape[:2], -1) * position_mask
        mask = length_mask(config.mel_lengths(code_lengths), size)
        mu = self.project(self.encoder(x, position_mask, rng)) * mask
        speaker = self.speaker(normalised(speaker_embedding))
        return Conditions(mu, speaker, prompt, mask, jnp.ones(codes.shape[0]))

    def velocity(
        self, x: jax.Array, time: jax.Array, conditions: Conditions, bias=None
    ) -> jax.Array:
        """d x / d t of the flow: x float32 [B, F, M], time float32 [B] -> float32 [B, F, M].

        `bias`: of the estimator.
        """
        joined = conditions.beside(x).astype(self.config.estimator.dtype)
        return self.estimator(joined, conditions.mask, time, bias)

    def sample(self, conditions: Conditions, noise: jax.Array) -> jax.Array:
        """Solves the flow from noise; see `FlowMatching.sample`."""
        return solve(self, conditions, noise)
