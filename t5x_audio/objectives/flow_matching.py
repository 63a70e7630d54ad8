"""What the flow minimises: the masked error of the velocity on the optimal-transport path.

CosyVoice-1's recipe: x_t = (1 - (1 - sigma) t) z + t x_1 with target x_1 - (1 - sigma) z, times
1 - cos(pi u / 2), all conditions dropped together in a fifth of the rows (for classifier-free
guidance), and in half of the rows a random prefix of up to 30 % of the mel given as the prompt.

Choices: the mel is computed here from the batch's waveform, so nothing but audio and codes is
stored; frames count as far as both the codes and the audio reach; times are stratified over a
batch, which lowers the variance of the gradient and of the logged loss. Rows that train as a stream
draw their own chunks; CosyVoice-2 draws once for a batch and has one length of chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_audio.audio.features import MelConfig, mel_spectrogram
from t5x_audio.errors import UserError
from t5x_audio.vocoder.convolution import length_mask
from t5x_audio.vocoder.ring import equal_chunks


@dataclasses.dataclass(frozen=True)
class FlowMatchingObjective:
    """(model, batch, rng, train) -> (loss, Metrics).

    Batch: audio float32 [B, T] and audio_lengths int32 [B] in samples; codes int32 [B, N] flat
    local codes and code_lengths int32 [B]; speaker_embedding float32 [B, speaker_dim].

    Attributes:
      mel: features the flow learns; same rate and hop as the model's configuration.
      condition_dropout: share of rows without any condition, in training.
      prompt_probability: share of rows with a mel prefix, in training.
      prior_weight: of the squared error of mu itself, the prior loss of Grad-TTS and Matcha-TTS
        (arXiv 2309.03199); for `FlowConfig.residual_std`. mu then learns from this error alone: the
        velocity's gradient carries the noise of times and draws. Published here: 0.
      velocity_share: share of a batch's rows, at least one, that train the velocity too; the
        others train mu only, which is much cheaper than the U-Net. Below 1 only with
        `prior_weight`. Published: 1.
      prompt_fraction: longest prefix, as a share of the utterance.
      stream_probability: share of rows, in training, whose encoder and velocity see as little as a
        stream would: their chunk, what is shortly before it, and the prompt. 0 = all rows are
        whole; only the paired flow can stream. CosyVoice-2: 0.5.
      stream_chunk_positions: shortest and longest chunk of such rows, in pairs of codes, 25 a
        second. CosyVoice-2: 25 and 25.
    """

    mel: MelConfig = MelConfig()
    condition_dropout: float = 0.2
    prompt_probability: float = 0.5
    prompt_fraction: float = 0.3
    prior_weight: float = 0.0
    velocity_share: float = 1.0
    stream_probability: float = 0.0
    stream_chunk_positions: tuple[int, int] = (25, 25)

    def __post_init__(self):
        shortest, longest = self.stream_chunk_positions
        if not 1 <= shortest <= longest:
            raise UserError(
                f"FlowMatchingObjective.stream_chunk_positions={self.stream_chunk_positions}: give "
                "the shortest and the longest chunk, 1 at least"
            )
        lowest = 0.0 if self.prior_weight else 1.0
        if not lowest <= self.velocity_share <= 1.0:
            raise UserError(
                f"FlowMatchingObjective.velocity_share={self.velocity_share}: give 0 to 1, "
                "below 1 only together with prior_weight"
            )

    def __call__(self, model, batch, rng: jax.Array, train: bool):
        """See the class; `rng` draws times, noise, prefixes, dropped conditions, chunks, dropout.

        Raises:
          UserError: rows are to train as a stream and the model cannot stream, or embeddings of
            another width than the model's.
        """
        width = batch["speaker_embedding"].shape[-1]
        if width != model.config.speaker_dim:
            raise UserError(
                f"the speaker embeddings have {width} numbers, {type(model.config).__name__}."
                f"speaker_dim is {model.config.speaker_dim}; bind {width} or another encoder"
            )
        rngs = jax.random.split(rng, 5)
        audio_lengths = batch["audio_lengths"]
        log_mel = mel_spectrogram(batch["audio"], self.mel, audio_lengths)
        frames = jnp.minimum(
            model.config.mel_lengths(batch["code_lengths"]), self.mel.num_frames(audio_lengths)
        )
        prefix, streaming = self._prefix(frames, rngs[1]), {}
        if train and self.stream_probability:
            prefix, streaming["chunks"] = self._chunks(model, prefix, batch["codes"], rngs[1])
        conditions = model.conditions(
            batch["codes"],
            batch["code_lengths"],
            batch["speaker_embedding"],
            rng=rngs[0] if train else None,
            **streaming,
        )
        size = conditions.mu.shape[1]
        mask = length_mask(frames, size)
        target = model.normalise(_fit(log_mel, size)) * mask
        conditions = conditions.replace(mask=mask)
        weight = jnp.maximum(mask.sum() * target.shape[-1], 1.0)
        prior = (jnp.square(conditions.mu - target) * mask).sum()
        if self.prior_weight:
            rows = max(1, round(self.velocity_share * target.shape[0])) if train else None
            stopped = conditions.replace(mu=jax.lax.stop_gradient(conditions.mu))
            conditions, target, prefix = jax.tree.map(lambda x: x[:rows], (stopped, target, prefix))
        error, count = self._velocity_error(model, conditions, target, prefix, rngs[2:], train)
        metrics = {"velocity_mse": (error, count)}
        loss = error / jnp.maximum(count, 1.0)
        if self.prior_weight:
            metrics["mu_mse"] = (prior, weight)
            loss = loss + self.prior_weight * prior / weight
        return loss, metrics

    def _velocity_error(self, model, conditions, target, prefix, rngs, train: bool):
        """(summed squared error of the velocity, number of its entries) at random times."""
        rows, size, mels = target.shape
        if train:
            conditions = conditions.replace(prompt=target * length_mask(prefix, size))
            kept = jax.random.uniform(rngs[0], (rows,)) >= self.condition_dropout
            conditions = conditions.keep(kept.astype(jnp.float32))
        # Stratified over the batch: every row's time is uniform, the batch covers the whole path.
        uniform = (jnp.arange(rows) + jax.random.uniform(rngs[1])) / rows
        time = 1.0 - jnp.cos(0.5 * jnp.pi * uniform)
        noise = jax.random.normal(rngs[2], target.shape)
        shrink = 1.0 - model.config.sigma_min
        t = time[:, None, None]
        x = (1.0 - shrink * t) * noise + t * target
        velocity = model.velocity(x, time, conditions)
        squared = jnp.square(velocity - (target - shrink * noise)) * conditions.mask
        return squared.sum(), conditions.mask.sum() * mels

    def _prefix(self, frames, rng):
        """Int32 [B]: frames of a random prefix in some rows, 0 in the others."""
        pick_rng, length_rng = jax.random.split(rng)
        picked = jax.random.uniform(pick_rng, frames.shape) < self.prompt_probability
        longest = self.prompt_fraction * frames.astype(jnp.float32)
        length = jnp.floor(jax.random.uniform(length_rng, frames.shape) * (longest + 1.0))
        return jnp.where(picked, length, 0.0).astype(jnp.int32)

    def _chunks(self, model, prefix, codes, rng):
        """(frames of the prefixes, now of whole positions; `Chunks`, one only in whole rows)."""
        if not hasattr(model.config, "positions"):
            raise UserError(
                f"FlowMatchingObjective.stream_probability={self.stream_probability}: a "
                f"{type(model).__name__} cannot stream; give 0"
            )
        pick_rng, chunk_rng = jax.random.split(jax.random.fold_in(rng, 1))
        factor = model.config.encoder.up_factor
        shortest, longest = self.stream_chunk_positions
        lengths = jax.random.randint(chunk_rng, prefix.shape, shortest, longest + 1)
        chunks = equal_chunks(model.config.positions(codes.shape[1]), prefix // factor, lengths)
        picked = jax.random.uniform(pick_rng, prefix.shape) < self.stream_probability
        chunks = jax.tree.map(lambda x: jnp.where(_rows(picked, x), x, 0), chunks)
        return prefix // factor * factor, chunks


def _rows(values, like):
    """[B] with as many axes as `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _fit(mel, size: int):
    """Cuts or zero-pads [B, F, M] to F = size."""
    mel = mel[:, :size]
    return jnp.pad(mel, ((0, 0), (0, size - mel.shape[1]), (0, 0)))
