"""Audio codes to a waveform: flow matching and HiFT behind one call.

Choices:
- Lengths are padded to a few buckets, so that a process compiles each stage a few times only; the
  models mask the padding, so a bucket doesn't change what is heard.
- Codes come in groups of five (two linguistic, three semantic: 0.12 s). What becomes of an odd tail
  is the flow's (`completed` of its configuration) and as published: the interleaved form speaks it,
  as many frames as the codes stand for; the paired form fills the group up with the first code of
  each kind. A prompt's odd tail is left out, so that speech goes on after a whole group.
- Same codes, speaker, prompt and seed: same samples.
- A stream (`TokenVocoder.stream`) draws the same noise for the same frames as `synthesize`.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio import cpu_weights
from t5x_audio.errors import UserError
from t5x_audio.vocoder.convolution import length_mask
from t5x_audio.vocoder.flow import CODES_PER_GROUP, FlowMatching
from t5x_audio.vocoder.flow_stream import CacheStream, StreamConfig, Window, WindowStream
from t5x_audio.vocoder.hift import HiftGenerator
from t5x_audio.vocoder.hift_stream import HiftStream
from t5x_audio.vocoder.noise import frame_noise
from t5x_audio.vocoder.paired_flow import PairedFlow

_BUCKET_GROUPS = (16, 32, 64, 128, 256)


class TokenVocoder:
    """Synthesis from flat local codes (0 .. codebook - 1) with a flow and a HiFT generator.

    Attributes:
      sample_rate: of the samples, Hz.
      hop: samples of a mel frame.
    """

    def __init__(
        self,
        flow: FlowMatching | PairedFlow,
        hift: HiftGenerator,
        bucket_groups: tuple[int, ...] = _BUCKET_GROUPS,
    ):
        """Joins two trained models.

        Args:
          flow: codes to mel, of either form.
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
        self._buckets, self._caches = bucket_groups, isinstance(flow, PairedFlow)
        self._flow_graph, self._flow_state = nnx.split(cpu_weights.arranged(flow))
        self._hift_graph, self._hift_state = nnx.split(hift)
        self._to_mel = jax.jit(self._flow_step)
        self._to_samples = jax.jit(self._hift_step)
        self._to_next_mel = jax.jit(self._flow_chunk)
        self._to_next_samples = jax.jit(self._hift_window)

    def with_flow(self, flow: FlowMatching) -> "TokenVocoder":
        """The same vocoder with other weights of its flow; nothing compiles anew.

        Raises:
          UserError: the flow is of other sizes.
        """
        if flow.config != self.flow_config:
            raise UserError("the other flow has other settings; train both with the same gin files")
        other = copy.copy(self)
        other._flow_state = nnx.state(cpu_weights.arranged(flow))
        return other

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
          codes: ints [N] in 0 .. codebook - 1, five at least.
          speaker_embedding: float [speaker_dim].
          seed: of the flow's noise and the source's noise.
          prompt_codes: ints of a recording whose voice and manner are continued; None = none.
          prompt_mel: float [frames, num_mels], log-mel of the same recording, at least as long as
            its codes.

        Returns:
          float32 [mel_lengths(N) * hop] in [-1, 1], N completed, the prompt not included.

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
        codes = config.completed(_checked_codes(codes, config.codebook, "codes"))
        speaker = self._checked_speaker(speaker_embedding)
        prompt, prompt_mel = self._checked_prompt(prompt_codes, prompt_mel)
        joined = np.concatenate([prompt, codes])
        padded = self._bucket(-(-len(joined) // CODES_PER_GROUP)) * CODES_PER_GROUP
        size = config.mel_lengths(padded)
        frames = config.mel_lengths(len(codes))
        mel = self._to_mel(
            self._flow_state,
            np.pad(joined, (0, padded - len(joined)))[None],
            np.array([len(joined)], np.int32),
            speaker[None],
            np.pad(prompt_mel, ((0, size - len(prompt_mel)), (0, 0)))[None],
            np.array([len(prompt)], np.int32),
            None,
            np.arange(size, dtype=np.int32),
            _flow_key(seed),
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
            _hift_key(seed),
        )
        return _finite(np.asarray(samples[0, : frames * self.hop]), "hift")

    def stream(
        self,
        speaker_embedding,
        *,
        seed: int = 0,
        prompt_codes=None,
        prompt_mel=None,
        sizes: StreamConfig | None = None,
    ) -> "VocoderStream":
        """Begins an utterance whose codes are still to come.

        Args:
          speaker_embedding, seed, prompt_codes, prompt_mel: as of `synthesize`.
          sizes: of its chunks; None = the defaults.

        Raises:
          UserError: as of `synthesize`.
        """
        speaker = self._checked_speaker(speaker_embedding)[None]
        prompt, prompt_mel = self._checked_prompt(prompt_codes, prompt_mel)
        sizes = sizes or StreamConfig()
        if self._caches:
            flow = self._cache_stream(speaker, seed, prompt, prompt_mel, sizes)
        else:
            flow = self._window_stream(speaker, seed, prompt, prompt_mel, sizes)

        def vocode(mel, frames, f0, known, phase, first):
            inputs = (mel[None], np.int32(frames), f0[None], np.int32(known), np.float32(phase))
            made = self._to_next_samples(
                self._hift_state, *inputs, np.int32(first), _hift_key(seed)
            )
            return tuple(np.asarray(one[0]) for one in made)

        piece = self.flow_config.mel_lengths(sizes.chunk_codes) + 1
        return VocoderStream(self, flow, HiftStream(self.hift_config, vocode, piece))

    def _window_stream(self, speaker, seed, prompt, prompt_mel, sizes) -> WindowStream:
        def sample(window: Window):
            mel = self._to_mel(
                self._flow_state,
                window.codes[None],
                np.array([window.num_codes], np.int32),
                speaker,
                window.mel[None],
                np.array([window.prompt_codes], np.int32),
                tuple(np.array([n], np.int32) for n in (window.prompt_frames, window.num_frames)),
                window.noise_frames,
                _flow_key(seed),
            )
            return np.asarray(mel[0])

        return WindowStream(self.flow_config, sample, prompt, prompt_mel, sizes)

    def _cache_stream(self, speaker, seed, prompt, prompt_mel, sizes) -> CacheStream:
        flow = nnx.merge(self._flow_graph, self._flow_state)
        state = flow.initial_state(1, len(prompt))

        def step(codes, numbers, state, prompt_mel, valid):
            prompt_mel = None if prompt_mel is None else prompt_mel[None]
            mel, state = self._to_next_mel(
                self._flow_state, codes[None], speaker, numbers, state, prompt_mel,
                np.int32(valid), _flow_key(seed),
            )  # fmt: skip
            return mel[0], state

        return CacheStream(self.flow_config, step, state, prompt, prompt_mel, sizes.chunk_codes)

    def _bucket(self, groups: int) -> int:
        for bucket in self._buckets:
            if groups <= bucket:
                return bucket
        return -(-groups // self._buckets[-1]) * self._buckets[-1]

    def _checked_speaker(self, embedding) -> np.ndarray:
        speaker, wide = np.asarray(embedding, np.float32), self.flow_config.speaker_dim
        if speaker.shape != (wide,) or not np.isfinite(speaker).all():
            raise UserError(f"speaker embedding: shape {speaker.shape}; give {wide} finite values")
        return speaker

    def _checked_prompt(self, prompt_codes, prompt_mel):
        """(codes int32 [N], mel float32 [mel_lengths(N), num_mels])."""
        config = self.flow_config
        if prompt_codes is None and prompt_mel is None:
            return np.zeros(0, np.int32), np.zeros((0, config.num_mels), np.float32)
        if prompt_codes is None or prompt_mel is None:
            raise UserError("prompt: give both prompt_codes and prompt_mel of the same recording")
        codes = _checked_codes(prompt_codes, config.codebook, "prompt_codes")
        codes = codes[: len(codes) - len(codes) % CODES_PER_GROUP]
        frames = config.mel_lengths(len(codes))
        mel = np.asarray(prompt_mel, np.float32)
        if mel.ndim != 2 or mel.shape[1] != config.num_mels or len(mel) < frames:
            raise UserError(
                f"prompt_mel: shape {mel.shape}; {len(codes)} prompt codes need [{frames} or more, "
                f"{config.num_mels}]"
            )
        return codes, _finite(mel[:frames], "prompt_mel")

    def _flow_step(
        self, state, codes, lengths, speaker, prompt_mel, prompt_lengths, frames, numbers, rng
    ):
        flow = nnx.merge(self._flow_graph, state)
        more = {} if frames is None else {"frames": frames}
        conditions = flow.conditions(codes, lengths, speaker, prompt_mel, prompt_lengths, **more)
        return flow.sample(conditions, frame_noise(rng, numbers, conditions.mu.shape[-1])[None])

    def _flow_chunk(self, state, codes, speaker, numbers, stream, prompt_mel, valid, rng):
        noise = frame_noise(rng, numbers, self.flow_config.num_mels)[None]
        flow = nnx.merge(self._flow_graph, state)
        return flow.step(codes, speaker, noise, stream, prompt_mel, valid)

    def _hift_step(self, state, mel, lengths, rng):
        return nnx.merge(self._hift_graph, state)(mel, rng, lengths=lengths)

    def _hift_window(self, state, mel, frames, f0, known, phase, first, rng):
        hift, size = nnx.merge(self._hift_graph, state), mel.shape[1]
        predicted = hift.f0_predictor(mel, length_mask(frames[None], size))
        f0 = jnp.where(jnp.arange(size) < known, f0, predicted)
        return hift(mel, rng, f0=f0, lengths=frames[None], start=(first, phase)), f0


class VocoderStream:
    """Speech of codes as they come: `push` codes, get samples; `finish` gives the last.

    Attributes:
      delay_seconds: what a code waits for beyond the chunk that it completes, at the most.
    """

    def __init__(self, vocoder: TokenVocoder, flow, hift: HiftStream):
        """Joins the streams of both models; see `TokenVocoder.stream`."""
        self._codebook = vocoder.flow_config.codebook
        self._flow, self._hift, self._finished = flow, hift, False
        mel_seconds = hift.delay_frames * vocoder.hop / vocoder.sample_rate
        self.delay_seconds = flow.delay_codes * 3 / 125 + mel_seconds

    def push(self, codes) -> np.ndarray:
        """Samples float32 [T] that are ready after flat local codes [N]; T may be 0.

        Raises:
          UserError: an id out of range, weights that give what is not finite, or a stream that is
            finished.
        """
        if self._finished:
            raise UserError("the stream is finished; begin another with TokenVocoder.stream")
        mel = self._flow.push(_in_range(codes, self._codebook, "codes"))
        return _finite(self._hift.push(_finite(mel, "flow")), "hift")

    def finish(self) -> np.ndarray:
        """The samples float32 [T] of what waits; an odd tail becomes what it does in the whole."""
        self._finished = True
        made = self._hift.push(_finite(self._flow.finish(), "flow"))
        return _finite(np.concatenate([made, self._hift.finish()]), "hift")


def _flow_key(seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), 0)


def _hift_key(seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), 1)


def _in_range(codes, codebook: int, what: str) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 1 or (codes.size and not np.issubdtype(codes.dtype, np.integer)):
        raise UserError(f"{what}: give a flat list of whole numbers, not shape {codes.shape}")
    if codes.size and (codes.min() < 0 or codes.max() >= codebook):
        worst = codes.min() if codes.min() < 0 else codes.max()
        raise UserError(f"{what}: {worst} is outside of the codebook's range 0..{codebook - 1}")
    return codes.astype(np.int32)


def _checked_codes(codes, codebook: int, what: str) -> np.ndarray:
    codes = _in_range(codes, codebook, what)
    if len(codes) < CODES_PER_GROUP:
        raise UserError(
            f"{what}: {len(codes)} codes; a sound needs at least {CODES_PER_GROUP} (0.12 s)"
        )
    return codes


def _finite(values: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UserError(f"{what}: holds values that are not finite; check its weights or source")
    return values
