"""Conditional flow matching from audio codes to mel: the CosyVoice-1 form.

Flat interleaved codes (0 .. codebook - 1) go through one table, a conformer, a projection to mel
width and the length regulator, giving mu; a U-Net estimates the velocity of the optimal-transport
path from noise to the mel given mu, a speaker vector and a mel prompt. Sampling: Euler on cosine
times with classifier-free guidance. Source: CosyVoice (arXiv 2407.05407 section 2.3) and its public
implementation; Lipman et al. 2023 (arXiv 2210.02747).

Choices:
- Five codes are 0.12 s, so n codes are floor(n * 3 * sample_rate / (125 * hop)) mel frames: an
  integer rule with no drift. Shapes are static; lengths are arrays.
- `mel_mean` and `mel_std` standardise the mel inside the model (published: 0 and 1). Small models
  train much faster on data of unit scale.
- `residual_std`: if the mel were Gaussian with mean mu and this deviation s, the velocity could be
  written down: mu + k(t) (x_t - t mu) with k = (t s^2 - (1 - t)) / (t^2 s^2 + (1 - t)^2). That part
  is added outside, so mu becomes the expected mel, learnt straight from the codes, and the U-Net
  has what is left to learn; where the conditions are dropped, mu is 0 and s is 1, the deviation of
  all standardised mels. Alone the U-Net must pass the noise and mu through all its norms, for
  which a short training is too short. It is the idea of EDM's skip connection (Karras et al.,
  arXiv 2206.00364, section 5) on the straight path. Published: none.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.convolution import length_mask
from t5x_audio.vocoder.initialisers import spread
from t5x_audio.vocoder.layers import linear
from t5x_audio.vocoder.length_regulator import LengthRegulator
from t5x_audio.vocoder.ring import Chunks
from t5x_audio.vocoder.unet import Unet, UnetConfig

CODES_PER_GROUP = 5


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Sizes; defaults are Step-Audio-TTS-3B's, with a 256-wide speaker vector.

    Attributes:
      codebook: flat local codes, linguistic then semantic.
      num_mels: mel channels.
      speaker_dim: width of the speaker embedding.
      sample_rate: Hz of the waveform behind the mel.
      hop: samples of a mel frame.
      encoder: the code encoder.
      regulator_layers: convolutions of the length regulator.
      regulator_residual: whether each is added to its input (published: not).
      edge_codes: at both ends of what is sampled, which are interpolated apart, see
        `length_regulator`; 0 = none.
      estimator: the U-Net.
      sigma_min: width of the path's end.
      guidance: classifier-free guidance rate of sampling.
      temperature: standard deviation of the noise that sampling starts from.
      num_steps: Euler steps of sampling.
      mel_mean: subtracted from the log-mel inside the model.
      mel_std: divides it.
      residual_std: of the standardised mel around what the conditions say; None = the published
        form, in which the U-Net alone gives the velocity.
      dtype: compute dtype of the regulator; encoder and estimator have their own.
    """

    codebook: int = 5120
    num_mels: int = 80
    speaker_dim: int = 256
    sample_rate: int = 22050
    hop: int = 256
    encoder: ConformerConfig = ConformerConfig()
    regulator_layers: int = 4
    regulator_residual: bool = False
    edge_codes: int = 20
    estimator: UnetConfig = UnetConfig()
    sigma_min: float = 1e-6
    guidance: float = 0.7
    temperature: float = 1.0
    num_steps: int = 10
    mel_mean: float = 0.0
    mel_std: float = 1.0
    residual_std: float | None = None
    dtype: str = "float32"

    def mel_lengths(self, code_lengths):
        """Mel frames of so many codes (int or integer array)."""
        return code_lengths * (3 * self.sample_rate) // (125 * self.hop)

    def completed(self, codes: np.ndarray) -> np.ndarray:
        """Flat codes [N] as they are: the frames of an odd tail are its share of a group's."""
        return codes

    def make(self, rngs: nnx.Rngs) -> "FlowMatching":
        """The model with fresh weights."""
        return FlowMatching(self, rngs)


@flax.struct.dataclass
class Conditions:
    """What the velocity depends on, at mel rate: mu, prompt [B, F, M], speaker [B, M], mask.

    `kept` float [B] is 0 in the rows whose conditions were dropped. With `chunks`, at the rate of
    what was encoded, a flow that can stream sees only what its stream sees.
    """

    mu: jax.Array
    speaker: jax.Array
    prompt: jax.Array
    mask: jax.Array
    kept: jax.Array
    chunks: Chunks | None = None

    def keep(self, kept: jax.Array) -> "Conditions":
        """mu, speaker and prompt zeroed together in the rows where `kept` float [B] is 0."""
        return self.replace(
            mu=self.mu * kept[:, None, None],
            speaker=self.speaker * kept[:, None],
            prompt=self.prompt * kept[:, None, None],
            kept=self.kept * kept,
        )

    def beside(self, x: jax.Array) -> jax.Array:
        """The estimator's input: x [B, F, M], mu, speaker and prompt, [B, F, 4 M]."""
        speaker = jnp.broadcast_to(self.speaker[:, None], x.shape) * self.mask
        return jnp.concatenate([x * self.mask, self.mu, speaker, self.prompt], axis=-1)


class FlowMatching(nnx.Module):
    """Codes and speaker to mel, by an ordinary differential equation."""

    def __init__(self, config: FlowConfig, rngs: nnx.Rngs):
        self.config = config
        width, mels = config.encoder.width, config.num_mels
        self.embedding = nnx.Embed(
            config.codebook,
            width,
            embedding_init=nnx.with_metadata(spread(1.0), logical_axes=("vocab", "embed")),
            rngs=rngs,
        )
        self.encoder = config.encoder.make(rngs)
        self.project = linear(width, mels, ("embed", None), dtype="float32", rngs=rngs)
        self.speaker = linear(config.speaker_dim, mels, (None, None), dtype="float32", rngs=rngs)
        self.regulator = LengthRegulator(
            mels, config.regulator_layers, config.regulator_residual, config.dtype, rngs
        )
        self.estimator = Unet(4 * mels, mels, config.estimator, rngs)

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
        frames: tuple[jax.Array, jax.Array] | None = None,
    ) -> Conditions:
        """Encodes codes and speaker.

        Args:
          codes: int32 [B, N] flat local codes, prompt first.
          code_lengths: int32 [B], prompt included.
          speaker_embedding: float [B, speaker_dim], any norm.
          prompt_mel: float [B, F, num_mels] log-mel, of which the prompt's frames count.
          prompt_code_lengths: int32 [B], multiples of 5, 0 without one; None in training, where
            the whole is interpolated alike.
          rng: key of the encoder's dropout; None = none.
          frames: of the prompt and of all, int32 [B] each, where they are not `mel_lengths` of the
            codes: a window of a stream begins between two frames; only with a prompt_mel.

        Returns:
          Conditions on F frames: mel_lengths(N), or as many as `prompt_mel` has with `frames`.
        """
        config = self.config
        size = config.mel_lengths(codes.shape[1]) if frames is None else prompt_mel.shape[1]
        prompts, edges = None, (0, 0)
        prompt = jnp.zeros((codes.shape[0], size, config.num_mels))
        lengths = config.mel_lengths(code_lengths)
        if prompt_code_lengths is not None:
            if frames is None:
                prompt_frames = config.mel_lengths(prompt_code_lengths)
                rest = config.mel_lengths(code_lengths - prompt_code_lengths)
                frames = (prompt_frames, prompt_frames + rest)
            prompt_frames, lengths = frames
            prompts = (prompt_code_lengths, prompt_frames)
            edges = (config.edge_codes, config.mel_lengths(config.edge_codes))
            prompt = self.normalise(prompt_mel[:, :size]) * length_mask(prompt_frames, size)
        code_mask = length_mask(code_lengths, codes.shape[1])
        mask = length_mask(lengths, size)
        x = self.embedding(jnp.clip(codes, 0, config.codebook - 1)) * code_mask
        x = self.project(self.encoder(x, code_mask, rng))
        mu = self.regulator(x, code_lengths, lengths, size, mask, prompts, edges)
        speaker = self.speaker(normalised(speaker_embedding))
        return Conditions(mu, speaker, prompt, mask, jnp.ones(codes.shape[0]))

    def velocity(self, x: jax.Array, time: jax.Array, conditions: Conditions) -> jax.Array:
        """d x / d t of the flow: x float32 [B, F, M], time float32 [B] -> float32 [B, F, M]."""
        c = conditions
        joined = c.beside(x).astype(self.config.estimator.dtype)
        velocity = self.estimator(joined, c.mask, time)
        if self.config.residual_std is None:
            return velocity
        deviation = jnp.where(c.kept > 0, self.config.residual_std, 1.0)
        share = noise_share(time, deviation)[:, None, None]
        return velocity + (c.mu + share * (x - time[:, None, None] * c.mu)) * c.mask

    def sample(self, conditions: Conditions, noise: jax.Array) -> jax.Array:
        """Solves the flow from noise.

        Args:
          conditions: of `conditions`.
          noise: float32 [B, F, num_mels], standard normal.

        Returns:
          float32 [B, F, num_mels] log-mel, prompt frames included; padded frames are 0.
        """
        return solve(self, conditions, noise)


def normalised(embedding: jax.Array) -> jax.Array:
    """[..., D] at length 1."""
    return embedding / jnp.maximum(jnp.linalg.norm(embedding, axis=-1, keepdims=True), 1e-12)


def solve(model, conditions: Conditions, noise: jax.Array) -> jax.Array:
    """Euler steps on cosine times with guidance; see `FlowMatching.sample`.

    `model` has `velocity` and, in its config, guidance, temperature, num_steps and the mel's scale.
    """

    def velocity(x, time, both, state):
        return model.velocity(x, time, both), state

    return solve_with_state(model.config, velocity, conditions, noise, None)[0]


def solve_with_state(config, velocity, conditions: Conditions, noise: jax.Array, states):
    """As `solve`, with a state of the velocity at each time.

    Args:
      config: guidance, temperature, num_steps and the mel's scale.
      velocity: (x, time, conditions, state), of rows with conditions and then rows without ->
        (velocity, next state).
      conditions: of the rows.
      noise: float32 [B, F, num_mels], standard normal.
      states: a pytree with a leading axis of num_steps, or None.

    Returns:
      (log-mel float32 [B, F, num_mels], next states)
    """
    batch = noise.shape[0]
    none = conditions.keep(jnp.zeros(batch))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), conditions, none)
    times = 1.0 - np.cos(np.linspace(0.0, 1.0, config.num_steps + 1) * 0.5 * np.pi)

    def euler(x, step):
        (start, end), state = step
        time = jnp.full((2 * batch,), start)
        found, state = velocity(jnp.concatenate([x, x]), time, both, state)
        guided = (1.0 + config.guidance) * found[:batch] - config.guidance * found[batch:]
        return x + (end - start) * guided, state

    intervals = jnp.asarray(np.stack([times[:-1], times[1:]], axis=1), jnp.float32)
    start = config.temperature * noise.astype(jnp.float32)
    x, states = jax.lax.scan(euler, start, (intervals, states))
    return (x * config.mel_std + config.mel_mean) * conditions.mask, states


def noise_share(time: jax.Array, residual_std: jax.Array) -> jax.Array:
    """k of the module docstring: d E[velocity | x_t] / d x_t for Gaussian mels; shape of `time`."""
    variance, rest = jnp.square(residual_std), 1.0 - time
    return (time * variance - rest) / (jnp.square(time) * variance + jnp.square(rest))
