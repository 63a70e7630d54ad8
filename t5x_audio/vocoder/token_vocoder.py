"""Audio codes to a waveform: flow matching and HiFT behind one call.

Choices:
- Lengths are padded to a few buckets, so that a process compiles each stage a few times only; the
  models mask the padding, so a bucket doesn't change what is heard.
- Codes come in groups of five (two linguistic, three semantic: 0.12 s). An odd tail of fewer than
  five is dropped: it stands for less than a tokenizer frame of either stream.
- Same codes, speaker, prompt and seed: same samples.
"""

import jax
import numpy as np
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.vocoder.flow import CODES_PER_GROUP, FlowMatching
from t5x_audio.vocoder.hift import HiftGenerator

_BUCKET_GROUPS = (16, 32, 64, 128, 256)


class TokenVocoder:
    """Synthesis from flat local codes (0 .. codebook - 1) with a flow and a HiFT generator.

    Attributes:
      sample_rate: of the samples, Hz.
      hop: samples of a mel frame.
    """

    def __init__(
        self,
        flow: FlowMatching,
        hift: HiftGenerator,
        bucket_groups: tuple[int, ...] = _BUCKET_GROUPS,
    ):
        """Joins two trained models.

        Args:
          flow: codes to mel.
          hift: mel to samples.
          bucket_groups: padded lengths in groups of five codes, rising; longer inputs are padded to
            a multiple of the last.

        Raises:
          UserError: the two were not trained on the same mel.
        """
        for name in ("num_mels", "sample_rate", "hop"):
            ours, theirs = getattr(flow.config, name), getattr(hift.config, name)
            if ours != theirs:
                raise UserError(
                    f"flow and hift disagree on {name} ({ours} and {theirs}); train both with the "
                    "same gin model file"
                )
        self.flow_config, self.hift_config = flow.config, hift.config
        self.sample_rate, self.hop = hift.config.sample_rate, hift.config.hop
        self._buckets = bucket_groups
        self._flow_graph, self._flow_state = nnx.split(flow)
        self._hift_graph, self._hift_state = nnx.split(hift)
        self._to_mel = jax.jit(self._flow_step)
        self._to_samples = jax.jit(self._hift_step)

    def synthesize(
        self,
        codes,
        speaker_embedding,
        *,
        seed: int = 0,
        prompt_codes=None,
        prompt_mel=None,
    ) -> np.ndarray:
        """Speech of codes.

        Args:
          codes: ints [N] in 0 .. codebook - 1; the tail beyond a multiple of five is dropped.
          speaker_embedding: float [speaker_dim].
          seed: of the flow's noise and the source's noise.
          prompt_codes: ints of a recording whose voice and manner are continued; None = none.
          prompt_mel: float [frames, num_mels], log-mel of the same recording, at least as long as
            its codes.

        Returns:
          float32 [mel_lengths(N) * hop] in [-1, 1], the prompt not included.

        Raises:
          UserError: fewer than five codes, an id out of range, an embedding or prompt of the wrong
            shape or not finite, or weights that give samples which are not finite.
        """
        mel = self.mel(codes, speaker_embedding, seed, prompt_codes, prompt_mel)
        return self.vocode(mel, seed=seed)

    def mel(
        self, codes, speaker_embedding, seed: int = 0, prompt_codes=None, prompt_mel=None
    ) -> np.ndarray:
        """The log-mel float32 [frames, num_mels] of codes; arguments as in `synthesize`."""
        config = self.flow_config
        codes = _checked_codes(codes, config.codebook, "codes")
        speaker = np.asarray(speaker_embedding, np.float32)
        if speaker.shape != (config.speaker_dim,) or not np.isfinite(speaker).all():
            raise UserError(
                f"speaker embedding: shape {speaker.shape}; give {config.speaker_dim} finite values"
            )
        prompt, prompt_mel = self._checked_prompt(prompt_codes, prompt_mel)
        joined = np.concatenate([prompt, codes])
        padded = self._bucket(len(joined) // CODES_PER_GROUP) * CODES_PER_GROUP
        size = config.mel_lengths(padded)
        frames = config.mel_lengths(len(codes))
        mel = self._to_mel(
            self._flow_state,
            np.pad(joined, (0, padded - len(joined)))[None],
            np.array([len(joined)], np.int32),
            speaker[None],
            np.pad(prompt_mel, ((0, size - len(prompt_mel)), (0, 0)))[None],
            np.array([len(prompt)], np.int32),
            jax.random.fold_in(jax.random.key(seed), 0),
        )
        return _finite(np.asarray(mel[0, len(prompt_mel) : len(prompt_mel) + frames]), "flow")

    def vocode(self, mel, *, seed: int = 0) -> np.ndarray:
        """Samples float32 [frames * hop] of a log-mel float [frames, num_mels]."""
        mel = np.asarray(mel, np.float32)
        if mel.ndim != 2 or mel.shape[1] != self.hift_config.num_mels or not len(mel):
            raise UserError(
                f"mel: shape {mel.shape}; give [frames, {self.hift_config.num_mels}] with a frame "
                "at least"
            )
        frames = len(_finite(mel, "mel"))
        per_group = self.flow_config.mel_lengths(CODES_PER_GROUP)
        groups = self._bucket(-(-frames // max(per_group, 1)))
        size = max(self.flow_config.mel_lengths(groups * CODES_PER_GROUP), frames)
        samples = self._to_samples(
            self._hift_state,
            np.pad(mel, ((0, size - frames), (0, 0)))[None],
            np.array([frames], np.int32),
            jax.random.fold_in(jax.random.key(seed), 1),
        )
        return _finite(np.asarray(samples[0, : frames * self.hop]), "hift")

    def _bucket(self, groups: int) -> int:
        for bucket in self._buckets:
            if groups <= bucket:
                return bucket
        return -(-groups // self._buckets[-1]) * self._buckets[-1]

    def _checked_prompt(self, prompt_codes, prompt_mel):
        """(codes int32 [N], mel float32 [mel_lengths(N), num_mels])."""
        config = self.flow_config
        if prompt_codes is None and prompt_mel is None:
            return np.zeros(0, np.int32), np.zeros((0, config.num_mels), np.float32)
        if prompt_codes is None or prompt_mel is None:
            raise UserError("prompt: give both prompt_codes and prompt_mel of the same recording")
        codes = _checked_codes(prompt_codes, config.codebook, "prompt_codes")
        frames = config.mel_lengths(len(codes))
        mel = np.asarray(prompt_mel, np.float32)
        if mel.ndim != 2 or mel.shape[1] != config.num_mels or len(mel) < frames:
            raise UserError(
                f"prompt_mel: shape {mel.shape}; {len(codes)} prompt codes need [{frames} or more, "
                f"{config.num_mels}]"
            )
        return codes, _finite(mel[:frames], "prompt_mel")

    def _flow_step(self, state, codes, lengths, speaker, prompt_mel, prompt_lengths, rng):
        flow = nnx.merge(self._flow_graph, state)
        conditions = flow.conditions(codes, lengths, speaker, prompt_mel, prompt_lengths)
        return flow.sample(conditions, jax.random.normal(rng, conditions.mu.shape))

    def _hift_step(self, state, mel, lengths, rng):
        return nnx.merge(self._hift_graph, state)(mel, rng, lengths=lengths)


def _checked_codes(codes, codebook: int, what: str) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 1 or (codes.size and not np.issubdtype(codes.dtype, np.integer)):
        raise UserError(f"{what}: give a flat list of whole numbers, not shape {codes.shape}")
    if codes.size and (codes.min() < 0 or codes.max() >= codebook):
        worst = codes.min() if codes.min() < 0 else codes.max()
        raise UserError(f"{what}: {worst} is outside of the codebook's range 0..{codebook - 1}")
    whole = len(codes) - len(codes) % CODES_PER_GROUP
    if not whole:
        raise UserError(
            f"{what}: {len(codes)} codes; a sound needs at least {CODES_PER_GROUP} (0.12 s)"
        )
    return codes[:whole].astype(np.int32)


def _finite(values: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UserError(f"{what}: holds values that are not finite; check its weights or source")
    return values
