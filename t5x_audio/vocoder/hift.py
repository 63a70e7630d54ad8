"""HiFT: mel to waveform with a harmonic-plus-noise source and an inverse STFT at the end.

Architecture as in CosyVoice-1's public implementation (HiFTNet, Li et al. 2023, arXiv 2309.09493):
an F0 predictor drives a sine source with harmonics; a stack of transposed convolutions with Snake
residual blocks raises the mel towards the sample rate, meeting the source's STFT at every stage;
the last stage gives magnitude and phase of a small iSTFT.

Choices:
- Every size is a field; the mel's hop must equal prod(upsample_rates) * istft_hop.
- With `filters_source` the last stage is a time-varying filter of the source, for small generators
  and short trainings: as published (False), these make hiss from tones at their frame rates. With
  `filters_noise` a second filter shapes white noise, which is added, so that what is voiced has
  breath in it (harmonics plus noise, Serra and Smith 1990; DDSP, arXiv 2001.04643).
- The source starts as a pulse train (all harmonics at weight 1), up-sampling as interpolation.
- With `lengths` all convolutions see zeros beyond an utterance's end and the mirrored edges sit at
  its own end: the result does not depend on padding.
- The source's phase is accumulated frame by frame modulo one cycle, so an hour of speech stays as
  exact as a second (a plain float32 cumulative sum loses a degree after a minute).
- The 24 kHz form of CosyVoice-2 and Step-Audio's successors, `HIFT_24K`, is the same generator with
  other rates; only its phase runs otherwise (`HiftConfig.source_phase`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.vocoder.convolution import Convolution, TransposedConvolution, length_mask
from t5x_audio.vocoder.envelope import NOISE_LEVEL, SOURCE_LEVEL, Envelope, minimum_phase
from t5x_audio.vocoder.initialisers import fan_in, interpolating, spread
from t5x_audio.vocoder.istft import istft, stft
from t5x_audio.vocoder.noise import frame_noise

_MAX_MAGNITUDE = 1e2


@dataclasses.dataclass(frozen=True)
class HiftConfig:
    """Sizes of the generator; defaults are CosyVoice-1's at 22.05 kHz.

    Attributes:
      num_mels: mel channels in.
      sample_rate: Hz.
      base_channels: width before the first up-sampling; halves at every stage.
      num_harmonics: overtones above the fundamental in the source.
      sine_amplitude: level of each source sine.
      noise_std: noise added to voiced source samples.
      voiced_threshold: F0 in Hz above which a frame is voiced.
      upsample_rates: factor of each stage.
      upsample_kernels: kernel of each stage's transposed convolution.
      istft_n_fft: points of the final iSTFT.
      istft_hop: its hop in samples.
      resblock_kernels: kernel of each parallel residual block of a stage.
      resblock_dilations: dilations inside every residual block.
      source_kernels: kernel of each stage's source residual block.
      f0_channels: width of the F0 predictor.
      f0_layers: its convolutions.
      negative_slope: of the leaky ReLU before each up-sampling.
      audio_limit: samples are clipped to +- this.
      phase_range: the phase is phase_range * sin(.); published 1 radian. A longer iSTFT needs pi.
      filters_source: magnitude and phase multiply the source's spectrum instead of being the
        output's (published): pitch and hiss come with the source, the network learns an envelope.
      filters_noise: a filter of white noise beside that of the source; needs `filters_source`.
      envelope_fmax: Hz of the mel's top channel, from which the filters then start (`envelope.py`)
        with minimum phases; 0 = they start from 1.
      random_phase: overtones of the source start at random phases (published at 22.05 kHz);
        otherwise at 0 (the published 24 kHz form draws phases too, but they reach no sample).
      source_phase: 'samples': each sample advances it by its frame's F0 (published at 22.05 kHz);
        'frames': it is known at the frames' centres and linear in between, so that it stands still
        before the first and after the last (published at 24 kHz).
      dtype: compute dtype of the convolutions.
    """

    num_mels: int = 80
    sample_rate: int = 22050
    base_channels: int = 512
    num_harmonics: int = 8
    sine_amplitude: float = 0.1
    noise_std: float = 0.003
    voiced_threshold: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 8)
    upsample_kernels: tuple[int, ...] = (16, 16)
    istft_n_fft: int = 16
    istft_hop: int = 4
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[int, ...] = (1, 3, 5)
    source_kernels: tuple[int, ...] = (7, 11)
    f0_channels: int = 512
    f0_layers: int = 5
    negative_slope: float = 0.1
    audio_limit: float = 0.99
    phase_range: float = 1.0
    filters_source: bool = False
    filters_noise: bool = False
    envelope_fmax: float = 0.0
    random_phase: bool = True
    source_phase: str = "samples"
    dtype: str = "float32"

    @property
    def hop(self) -> int:
        """Samples of one mel frame."""
        return math.prod(self.upsample_rates) * self.istft_hop

    def make(self, rngs: nnx.Rngs) -> "HiftGenerator":
        """The generator with fresh weights."""
        stages = len(self.upsample_rates)
        if not stages == len(self.upsample_kernels) == len(self.source_kernels):
            raise UserError(
                "HiftConfig: upsample_rates, upsample_kernels and source_kernels must have the "
                "same length"
            )
        if self.istft_n_fft % self.istft_hop:
            raise UserError("HiftConfig.istft_hop must divide istft_n_fft")
        for name in ("filters_noise", "envelope_fmax"):
            if getattr(self, name) and not self.filters_source:
                raise UserError(f"HiftConfig.{name} needs filters_source")
        if self.source_phase not in ("samples", "frames"):
            raise UserError("HiftConfig.source_phase must be 'samples' or 'frames'")
        return HiftGenerator(self, rngs)


HIFT_24K = HiftConfig(
    sample_rate=24000,
    upsample_rates=(8, 5, 3),
    upsample_kernels=(16, 11, 7),
    source_kernels=(7, 7, 11),
    random_phase=False,
    source_phase="frames",
)
"""Sizes of CosyVoice-2, Step-Audio 2 and Step-Audio-EditX: a frame of 480 samples."""


class Snake(nnx.Module):
    """x + sin^2(a x) / a with a learned a for each channel (Ziyin et al. 2020)."""

    def __init__(self, channels: int):
        self.alpha = nnx.Param(jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., channels] -> the same."""
        alpha = self.alpha[...].astype(x.dtype)
        return x + jnp.square(jnp.sin(alpha * x)) / (alpha + 1e-9)


class ResidualBlock(nnx.Module):
    """Pairs of dilated and plain convolutions, each after a Snake, around a residual path."""

    def __init__(self, channels: int, kernel: int, config: HiftConfig, rngs: nnx.Rngs):
        def conv(dilation):
            return Convolution(
                channels,
                channels,
                kernel,
                dilation=dilation,
                weight_norm=True,
                kernel_init=spread(0.01),
                dtype=config.dtype,
                rngs=rngs,
            )

        dilations = config.resblock_dilations
        self.dilated = nnx.List([conv(d) for d in dilations])
        self.plain = nnx.List([conv(1) for _ in dilations])
        self.snakes_in = nnx.List([Snake(channels) for _ in dilations])
        self.snakes_out = nnx.List([Snake(channels) for _ in dilations])

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """[B, T, channels] -> the same; mask float [B, T, 1] or None."""
        for i in range(len(self.dilated)):
            y = self.dilated[i](_masked(self.snakes_in[i](x), mask))
            y = self.plain[i](_masked(self.snakes_out[i](y), mask))
            x = x + y
        return x


class F0Predictor(nnx.Module):
    """Convolutions of kernel 3 with ELU, then |linear|: mel [B, F, M] -> F0 in Hz [B, F]."""

    def __init__(self, config: HiftConfig, rngs: nnx.Rngs):
        widths = [config.num_mels] + [config.f0_channels] * config.f0_layers
        self.convolutions = nnx.List(
            [
                Convolution(n_in, n_out, 3, weight_norm=True, dtype=config.dtype, rngs=rngs)
                for n_in, n_out in zip(widths[:-1], widths[1:], strict=True)
            ]
        )
        self.classifier = nnx.Linear(config.f0_channels, 1, kernel_init=fan_in(), rngs=rngs)

    def __call__(self, mel: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """See the class; frames outside the mask are 0."""
        x = _masked(mel, mask)
        for convolution in self.convolutions:
            x = _masked(jax.nn.elu(convolution(x)), mask)
        f0 = jnp.abs(self.classifier(x.astype(jnp.float32)))
        return _masked(f0, mask)[..., 0]


class HarmonicSource(nnx.Module):
    """F0 to the excitation: sines at F0 and its overtones, noise where unvoiced, merged to one."""

    def __init__(self, config: HiftConfig, rngs: nnx.Rngs):
        self.config = config
        self.merge = nnx.Linear(
            config.num_harmonics + 1, 1, kernel_init=nnx.initializers.ones_init(), rngs=rngs
        )

    def __call__(self, f0: jax.Array, rng: jax.Array, start=(0, 0.0)) -> jax.Array:
        """F0 [B, F] in Hz -> samples [B, F * hop] in (-1, 1); `rng` draws phases and noise.

        `start`: number of the first frame, and the fundamental's phase there in cycles.
        """
        config = self.config
        first, phase = start
        phase_rng, noise_rng = jax.random.split(rng)
        waves = config.num_harmonics + 1
        offset = jnp.zeros((f0.shape[0], 1, waves))
        if config.random_phase:
            drawn = jax.random.uniform(phase_rng, offset.shape, minval=-0.5, maxval=0.5)
            offset = drawn.at[..., 0].set(0.0)
        running = source_phase if config.source_phase == "samples" else interpolated_source_phase
        cycles = running(f0, config.hop, config.sample_rate)[..., None] + phase
        cycles = cycles * jnp.arange(1, waves + 1) + offset
        sines = config.sine_amplitude * jnp.sin(2.0 * jnp.pi * jnp.mod(cycles, 1.0))
        voiced = jnp.repeat(f0 > config.voiced_threshold, config.hop, axis=1)[..., None]
        noise_level = jnp.where(voiced, config.noise_std, config.sine_amplitude / 3.0)
        # One draw for the sum of independent equal noises through the merge: nine times cheaper.
        noise = noise_level[..., 0] * white_noise(noise_rng, f0.shape, first, config.hop)
        noise = noise * jnp.linalg.norm(self.merge.kernel[...])
        audible = jnp.arange(1, waves + 1) * f0[..., None] < config.sample_rate / 2.0
        audible = jnp.repeat(audible, config.hop, axis=1)
        return jnp.tanh(self.merge(jnp.where(voiced & audible, sines, 0.0))[..., 0] + noise)


def white_noise(rng: jax.Array, shape: tuple[int, int], first, hop: int) -> jax.Array:
    """Standard normal samples [B, F * hop] of `shape` [B, F] frames, from the number `first` on."""
    rows = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(shape[0]))
    noise = jax.vmap(frame_noise, (0, None, None))(rows, first + jnp.arange(shape[1]), hop)
    return noise.reshape(shape[0], -1)


def source_phase(f0: jax.Array, hop: int, sample_rate: int) -> jax.Array:
    """Running phase in cycles, modulo 1 at frame starts: F0 [B, F] in Hz -> [B, F * hop].

    F0 counts up to half the sample rate.
    """
    per_sample, ends = _frame_phases(f0, hop, sample_rate)
    starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    within = per_sample[..., None] * jnp.arange(1, hop + 1)
    return (starts[..., None] + within).reshape(f0.shape[0], -1)


def interpolated_source_phase(f0: jax.Array, hop: int, sample_rate: int) -> jax.Array:
    """The same with the sum over frames standing at their centres and linear in between.

    Source: SineGen2 of CosyVoice's hifigan/generator.py.
    """
    per_sample, centres = _frame_phases(f0, hop, sample_rate)
    from_centre = jnp.arange(hop) - (hop - 1) / 2.0
    # Up to its centre a frame's own F0 counts, then the next one's; nothing moves at the ends.
    before = per_sample.at[:, 0].set(0.0)
    after = jnp.pad(per_sample[:, 1:], ((0, 0), (0, 1)))
    slope = jnp.where(from_centre < 0.0, before[..., None], after[..., None])
    return (centres[..., None] + slope * from_centre).reshape(f0.shape[0], -1)


def _frame_phases(f0: jax.Array, hop: int, sample_rate: int) -> tuple[jax.Array, jax.Array]:
    """(cycles a sample of each frame, their sum up to its end modulo 1), each [B, F]."""
    per_sample = jnp.minimum(f0.astype(jnp.float32) / sample_rate, 0.5)
    ends = jax.lax.associative_scan(lambda a, b: jnp.mod(a + b, 1.0), per_sample * hop, axis=1)
    return per_sample, ends


class HiftGenerator(nnx.Module):
    """The vocoder: mel [B, F, M] (and its F0) to samples [B, F * hop]."""

    def __init__(self, config: HiftConfig, rngs: nnx.Rngs):
        self.config = config
        base, dtype = config.base_channels, config.dtype
        stages = range(len(config.upsample_rates))
        widths = [base // 2**i for i in range(len(stages) + 1)]
        bins = config.istft_n_fft + 2
        small = spread(0.01)
        self.f0_predictor = F0Predictor(config, rngs)
        self.source = HarmonicSource(config, rngs)
        self.conv_pre = Convolution(
            config.num_mels, base, 7, weight_norm=True, dtype=dtype, rngs=rngs
        )
        self.upsamples = nnx.List(
            [
                TransposedConvolution(
                    widths[i],
                    widths[i + 1],
                    config.upsample_kernels[i],
                    config.upsample_rates[i],
                    weight_norm=True,
                    kernel_init=interpolating(config.upsample_rates[i], 0.01),
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in stages
            ]
        )
        self.source_downs = nnx.List(
            [
                self._source_down(
                    bins, widths[i + 1], math.prod(config.upsample_rates[i + 1 :]), rngs
                )
                for i in stages
            ]
        )
        self.source_blocks = nnx.List(
            [ResidualBlock(widths[i + 1], config.source_kernels[i], config, rngs) for i in stages]
        )
        self.blocks = nnx.List(
            [
                nnx.List(
                    [ResidualBlock(widths[i + 1], k, config, rngs) for k in config.resblock_kernels]
                )
                for i in stages
            ]
        )
        outputs = bins + config.filters_noise * bins // 2
        if config.envelope_fmax:
            levels = (SOURCE_LEVEL, NOISE_LEVEL)[: 1 + config.filters_noise]
            sizes = (config.num_mels, bins // 2, config.sample_rate, config.envelope_fmax)
            self.envelope = Envelope(*sizes, levels)
        self.conv_post = Convolution(
            widths[-1], outputs, 7, weight_norm=True, kernel_init=small, dtype=dtype, rngs=rngs
        )

    def _source_down(self, n_in, n_out, factor, rngs):
        kernel, padding = (1, 0) if factor == 1 else (2 * factor, factor // 2)
        return Convolution(
            n_in,
            n_out,
            kernel,
            strides=factor,
            padding=padding,
            dtype=self.config.dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        mel: jax.Array,
        rng: jax.Array,
        *,
        f0: jax.Array | None = None,
        lengths: jax.Array | None = None,
        start=(0, 0.0),
    ) -> jax.Array:
        """Samples of a mel.

        Args:
          mel: float [B, F, num_mels], natural-log magnitudes.
          rng: key of the source's phases and noise.
          f0: Hz [B, F] that drives the source; None = predicted from the mel.
          lengths: int32 [B] mel frames; None = all F.
          start: of a window in the midst of an utterance, as of `HarmonicSource`.

        Returns:
          float32 [B, F * hop] within +- audio_limit, 0 beyond the lengths.
        """
        mask = None if lengths is None else length_mask(lengths, mel.shape[1])
        f0 = self.f0_predictor(mel, mask) if f0 is None else f0
        source, noise = self.source(f0 if mask is None else f0 * mask[..., 0], rng, start), None
        if self.config.filters_noise:
            rng = jax.random.fold_in(rng, 2)  # two keys of it are the source's
            noise = white_noise(rng, f0.shape, start[0], self.config.hop)
            noise = noise * self.config.sine_amplitude / 3.0
        if lengths is not None:
            inside = length_mask(lengths * self.config.hop, source.shape[1])[..., 0]
            source, noise = source * inside, None if noise is None else noise * inside
        return self.decode(mel, source, lengths, noise)

    def decode(
        self,
        mel: jax.Array,
        source: jax.Array,
        lengths: jax.Array | None = None,
        noise: jax.Array | None = None,
    ) -> jax.Array:
        """The filter: mel [B, F, M] and source [B, F * hop] -> samples [B, F * hop].

        `noise`, as the source, is needed by `filters_noise`.
        """
        config = self.config
        sample_lengths = None if lengths is None else lengths * config.hop
        spectrum = stft(source, config.istft_n_fft, config.istft_hop, sample_lengths)
        mask = None if lengths is None else length_mask(lengths, mel.shape[1])
        x = self.conv_pre(_masked(mel, mask))
        last = len(self.upsamples) - 1
        factor = 1
        for i, upsample in enumerate(self.upsamples):
            x = upsample(_masked(jax.nn.leaky_relu(x, config.negative_slope), mask))
            factor *= config.upsample_rates[i]
            if i == last:  # the iSTFT wants one frame more than length / hop
                x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)), mode="reflect")
            if lengths is not None:
                mask = length_mask(lengths * factor + (i == last), x.shape[1])
            injected = self.source_downs[i](spectrum)[:, : x.shape[1]]
            x = x + self.source_blocks[i](_masked(injected, mask), mask)
            x = sum(block(x, mask) for block in self.blocks[i]) / len(self.blocks[i])
        x = self.conv_post(_masked(jax.nn.leaky_relu(x), mask)).astype(jnp.float32)
        bins = config.istft_n_fft // 2 + 1
        if config.envelope_fmax:
            gains = self.envelope(mel, factor, lengths)
            x = x.at[..., :bins].add(gains[..., :bins])
            x = x.at[..., 2 * bins :].add(gains[..., bins:])
            natural = minimum_phase(x[..., :bins])
        magnitude = jnp.exp(jnp.minimum(x[..., :bins], math.log(_MAX_MAGNITUDE)))
        phase = config.phase_range * jnp.sin(x[..., bins : 2 * bins])
        phase = phase + natural if config.envelope_fmax else phase
        frames = None if lengths is None else lengths * factor + 1
        real, imag = magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)
        if config.filters_source:
            a, b = spectrum[..., :bins], spectrum[..., bins:]
            real, imag = real * a - imag * b, real * b + imag * a
        if config.filters_noise:
            level = jnp.exp(jnp.minimum(x[..., 2 * bins :], math.log(_MAX_MAGNITUDE)))
            breath = stft(noise, config.istft_n_fft, config.istft_hop, sample_lengths)
            real, imag = real + level * breath[..., :bins], imag + level * breath[..., bins:]
        samples = istft(
            real,
            imag,
            config.istft_n_fft,
            config.istft_hop,
            frames,
        )
        return jnp.clip(samples, -config.audio_limit, config.audio_limit)


def _masked(x, mask):
    return x if mask is None else x * mask.astype(x.dtype)
