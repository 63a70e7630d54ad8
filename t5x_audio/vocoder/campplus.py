"""CAM++ speaker encoder: a waveform becomes a vector that points the same way for the same speaker.

Wang et al. 2023 (arXiv 2303.00332), as published by 3D-Speaker and FunASR and used by CosyVoice and
Step-Audio-TTS-3B: a small 2-D residual network halves the mel axis three times, a densely connected
TDNN follows in three blocks, every layer of which is weighted by a mask made of the means over the
utterance and over its own second (context-aware masking), and mean and standard deviation over time
are projected to 192 numbers.

Choices: an utterance gives in any padded batch what it gives alone: convolutions see zeros beyond
its end, and means, deviations and the statistics of batch norm are over its own frames. The mask is
computed once a segment, not once a frame. Features are Kaldi's log-mels with its own window on
samples in [-1, 1], less their mean over time. Hosts' waveforms are padded to a few lengths and
counts, because every new shape compiles the whole network.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.audio import features as audio_features
from t5x_audio.errors import UserError
from t5x_audio.vocoder.convolution import Convolution, length_mask
from t5x_audio.vocoder.initialisers import fan_in
from t5x_audio.vocoder.layers import linear

_MOMENTUM = 0.9  # of the running statistics, as published
_BATCH_SECONDS = 64  # of audio at once, padding included: bounds the memory of `embed_batch`
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class CamPlusConfig:
    """Sizes; the defaults are the published model's.

    Attributes:
      num_mels: of the features; a multiple of 8.
      embedding: width of what comes out.
      front_channels, front_blocks: of the 2-D network, residual blocks in each of its two stages.
      channels: of the TDNN that the blocks start from.
      growth: channels that every layer of a block adds.
      bottleneck: channels inside a layer.
      block_layers, block_kernels, block_dilations: of each densely connected block.
      segment: frames (of 20 ms) that share a mask.
      num_speakers: classes of a training; 0 without: the encoder alone.
    """

    num_mels: int = 80
    embedding: int = 192
    front_channels: int = 32
    front_blocks: int = 2
    channels: int = 128
    growth: int = 32
    bottleneck: int = 128
    block_layers: tuple[int, ...] = (12, 24, 16)
    block_kernels: tuple[int, ...] = (3, 3, 3)
    block_dilations: tuple[int, ...] = (1, 2, 2)
    segment: int = 100
    num_speakers: int = 0

    def make(self, rngs: nnx.Rngs) -> "CamPlus":
        """Builds the module with random weights."""
        return CamPlus(self, rngs)

    @property
    def fbank(self) -> audio_features.KaldiFbankConfig:
        """The features."""
        return audio_features.KaldiFbankConfig(
            num_mels=self.num_mels, scale=1.0, window_shape="povey"
        )

    @property
    def fewest_samples(self) -> int:
        """The shortest waveform: two frames behind the stride, or there is no deviation."""
        return self.fbank.window + 2 * self.fbank.hop

    def padded_samples(self, samples: int) -> int:
        """Length to pad so many samples to: whole segments, so many that lengths are few."""
        length = 2 * self.segment * self.fbank.hop
        count = -(-samples // length)
        count = count if count <= 4 else -(-count // 4) * 4
        return count * length


class CamPlus(nnx.Module):
    """Waveforms -> unit vectors of width `config.embedding`."""

    def __init__(self, config: CamPlusConfig, rngs: nnx.Rngs):
        if config.num_mels % 8:
            raise ValueError(f"num_mels {config.num_mels} is no multiple of 8")
        self.config = config
        rngs = _Keys(rngs.params())
        self.front = Front(config, rngs)
        width = config.front_channels * config.num_mels // 8
        self.tdnn = NormedConvolution(width, config.channels, 5, 2, rngs=rngs)
        width, blocks = config.channels, []
        sizes = (config.block_layers, config.block_kernels, config.block_dilations)
        for count, kernel, dilation in zip(*sizes, strict=True):
            blocks.append(DenseBlock(config, width, count, kernel, dilation, rngs))
            width = blocks[-1].width
        self.blocks = nnx.List(blocks)
        self.norm = batch_norm(width, rngs)
        axes = (None, None)
        self.dense = linear(
            2 * width, config.embedding, axes, dtype="float32", use_bias=False, rngs=rngs
        )
        self.dense_norm = batch_norm(config.embedding, rngs, affine=False)
        head = (config.embedding, config.num_speakers)
        self.speakers = nnx.Param(fan_in()(rngs.params(), head)) if config.num_speakers else None

    def __call__(self, samples, lengths=None):
        """Embeds a batch; pure and jittable.

        Args:
          samples: float [B, T] in [-1, 1] at 16 kHz.
          lengths: int [B] true samples; None = all T. What lies beyond has no influence.

        Returns:
          float32 [B, embedding], each of unit length.
        """
        vectors = self.embed_features(*self.features(samples, lengths))
        length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors / jnp.maximum(length, _TINY)

    def features(self, samples, lengths=None):
        """What the network reads.

        Args:
          samples, lengths: see `__call__`.

        Returns:
          (float32 [B, F, num_mels], each mel with mean 0 over an utterance and 0 beyond its end;
          int32 [B] frames).
        """
        fbank = self.config.fbank
        lengths = jnp.full(len(samples), samples.shape[-1]) if lengths is None else lengths
        frames = fbank.num_frames(jnp.asarray(lengths))
        mels = audio_features.kaldi_fbank(samples, lengths, fbank)
        mask = length_mask(frames, mels.shape[1])
        mean = mels.sum(1, keepdims=True) / jnp.maximum(mask.sum(1, keepdims=True), 1.0)
        return (mels - mean) * mask, frames

    def embed_features(self, features, frames):
        """The network as it is published: any norm.

        Args:
          features: float [B, F, num_mels], see `features`.
          frames: int [B]; fewer than 3 have no deviation, which is then 0.

        Returns:
          float32 [B, embedding].
        """
        hidden = self.front(features, length_mask(frames, features.shape[1]))
        hidden = self.tdnn(hidden, length_mask(frames, features.shape[1]))
        frames = (frames + 1) // 2
        mask = length_mask(frames, hidden.shape[1])
        for block in self.blocks:
            hidden = block(hidden, mask)
        hidden = jax.nn.relu(self.norm(hidden, mask=mask > 0))
        return self.dense_norm(self.dense(statistics(hidden, mask)))

    def embed(self, waveform) -> np.ndarray:
        """Embeds one float [T] waveform at 16 kHz; float32 [embedding]. See `embed_batch`."""
        return self.embed_batch([waveform])[0]

    def embed_batch(self, waveforms) -> np.ndarray:
        """Embeds float [T_i] waveforms of any lengths; float32 [len(waveforms), embedding].

        Raises:
          UserError: one is too short or silent.
        """
        for number, waveform in enumerate(waveforms, 1):
            self._require_speech(np.asarray(waveform), f"waveform {number} of {len(waveforms)}")
        longest = max(len(waveform) for waveform in waveforms)
        samples = self.config.padded_samples(longest)
        most = max(1, _BATCH_SECONDS * self.config.fbank.sample_rate // samples)
        rows = min(1 << (len(waveforms) - 1).bit_length(), most)
        vectors = []
        for start in range(0, len(waveforms), rows):
            some = waveforms[start : start + rows]
            padded = np.zeros((rows, samples), np.float32)
            lengths = np.full(rows, self.config.fewest_samples, np.int32)
            for i, waveform in enumerate(some):
                padded[i, : len(waveform)], lengths[i] = waveform, len(waveform)
            vectors.append(np.asarray(_evaluate(*nnx.split(self), padded, lengths))[: len(some)])
        return np.concatenate(vectors)

    def _require_speech(self, waveform: np.ndarray, name: str) -> None:
        fewest = self.config.fewest_samples
        if len(waveform) < fewest:
            raise UserError(
                f"speaker encoder: {name} has {len(waveform)} samples; at least {fewest} at 16 kHz "
                "are needed"
            )
        if not np.isfinite(waveform).all() or np.ptp(waveform) == 0.0:
            raise UserError(
                f"speaker encoder: {name} is silent or not finite; leave it out of the recordings"
            )


@jax.jit
def _evaluate(graphdef, state, samples, lengths):
    model = nnx.merge(graphdef, state)
    model.eval()
    return model(samples, lengths)


class _Keys:
    """In place of `nnx.Rngs`, whose every key costs time for all operations traced before.

    With hundreds of layers that is minutes.
    """

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    def params(self) -> jax.Array:
        """Another key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


class NormedConvolution(nnx.Module):
    """Convolution without bias, batch norm: [B, T, *rest, in] -> [B, T', *rest', out]."""

    def __init__(self, n_in: int, n_out: int, kernel_size, strides=1, *, rngs: nnx.Rngs):
        """`kernel_size` and `strides` are those of `Convolution`."""
        self.convolution = Convolution(
            n_in,
            n_out,
            kernel_size,
            strides=strides,
            use_bias=False,
            kernel_init=fan_in(2.0),
            rngs=rngs,
        )
        self.norm = batch_norm(n_out, rngs)

    def __call__(self, x, mask, rectified: bool = True):
        """`mask` float32 [B, T, 1] of the frames of x; ReLU at the end where `rectified`."""
        rest = x.ndim - mask.ndim
        y = self.convolution(x * _widened(mask, rest))
        stride = self.convolution.strides[0]
        y = self.norm(y, mask=_widened(mask[:, ::stride], rest) > 0)
        return jax.nn.relu(y) if rectified else y


class Front(nnx.Module):
    """2-D residual network: [B, T, mels] -> [B, T, channels * mels / 8], channels outside."""

    def __init__(self, config: CamPlusConfig, rngs: nnx.Rngs):
        width = config.front_channels
        self.first = NormedConvolution(1, width, (3, 3), (1, 1), rngs=rngs)
        strides = ([2] + [1] * (config.front_blocks - 1)) * 2
        self.blocks = nnx.List([ResidualBlock(width, stride, rngs) for stride in strides])
        self.last = NormedConvolution(width, width, (3, 3), (1, 2), rngs=rngs)

    def __call__(self, features, mask):
        """`mask` float32 [B, T, 1]."""
        x = self.first(features[..., None], mask)
        for block in self.blocks:
            x = block(x, mask)
        x = self.last(x, mask)
        return jnp.swapaxes(x, 2, 3).reshape(*x.shape[:2], -1)


class ResidualBlock(nnx.Module):
    """Two convolutions and a shortcut; `stride` is of the mel axis."""

    def __init__(self, width: int, stride: int, rngs: nnx.Rngs):
        self.first = NormedConvolution(width, width, (3, 3), (1, stride), rngs=rngs)
        self.second = NormedConvolution(width, width, (3, 3), (1, 1), rngs=rngs)
        self.shortcut = (
            NormedConvolution(width, width, (1, 1), (1, stride), rngs=rngs) if stride > 1 else None
        )

    def __call__(self, x, mask):
        """[B, T, mels, width] -> [B, T, mels / stride, width]."""
        y = self.second(self.first(x, mask), mask, rectified=False)
        shortcut = x if self.shortcut is None else self.shortcut(x, mask, rectified=False)
        return jax.nn.relu(y + shortcut)


class DenseBlock(nnx.Module):
    """Layers that each see all before them; half of all channels go on: `width`."""

    def __init__(self, config: CamPlusConfig, n_in: int, count, kernel, dilation, rngs: nnx.Rngs):
        widths = [n_in + i * config.growth for i in range(count + 1)]
        self.layers = nnx.List(
            [DenseLayer(config, width, kernel, dilation, rngs) for width in widths[:-1]]
        )
        self.width = widths[-1] // 2
        self.norm = batch_norm(widths[-1], rngs)
        self.transit = _pointwise(widths[-1], self.width, rngs)

    def __call__(self, x, mask):
        """[B, T, n_in] -> [B, T, width]; mask float32 [B, T, 1]."""
        for layer in self.layers:
            x = jnp.concatenate([x, layer(x, mask)], axis=-1)
        return self.transit(jax.nn.relu(self.norm(x, mask=mask > 0)))


class DenseLayer(nnx.Module):
    """[B, T, n_in] -> [B, T, growth]: bottleneck, convolution, context-aware mask."""

    def __init__(self, config: CamPlusConfig, n_in: int, kernel, dilation, rngs: nnx.Rngs):
        self.segment = config.segment
        width, growth = config.bottleneck, config.growth
        self.norm_in = batch_norm(n_in, rngs)
        self.bottleneck = _pointwise(n_in, width, rngs)
        self.norm = batch_norm(width, rngs)
        self.local = Convolution(
            width,
            growth,
            kernel,
            dilation=dilation,
            use_bias=False,
            kernel_init=fan_in(2.0),
            rngs=rngs,
        )
        self.context_in = _pointwise(width, width // 2, rngs, use_bias=True)
        self.context_out = _pointwise(width // 2, growth, rngs, use_bias=True)

    def __call__(self, x, mask):
        """`mask` float32 [B, T, 1]."""
        hidden = self.bottleneck(jax.nn.relu(self.norm_in(x, mask=mask > 0)))
        hidden = jax.nn.relu(self.norm(hidden, mask=mask > 0)) * mask
        context = self.context_in(segment_context(hidden, mask, self.segment))
        weight = jax.nn.sigmoid(self.context_out(jax.nn.relu(context)))
        weight = jnp.repeat(weight, self.segment, axis=1)[:, : x.shape[1]]
        return self.local(hidden) * weight


def segment_context(x, mask, segment: int):
    """Mean over the utterance plus mean over each segment.

    Args:
      x: float [B, T, C], 0 beyond the end.
      mask: float32 [B, T, 1].
      segment: frames; the last segment of an utterance is what is left.

    Returns:
      float [B, ceil(T / segment), C].
    """
    count = jnp.maximum(mask.sum(1, keepdims=True), 1.0)
    padding = ((0, 0), (0, -x.shape[1] % segment), (0, 0))
    parts = jnp.pad(x, padding).reshape(len(x), -1, segment, x.shape[-1]).sum(2)
    counts = jnp.pad(mask, padding).reshape(len(x), -1, segment, 1).sum(2)
    return x.sum(1, keepdims=True) / count + parts / jnp.maximum(counts, 1.0)


def statistics(x, mask):
    """Mean and unbiased standard deviation over time: [B, T, C], mask [B, T, 1] -> [B, 2 C]."""
    count = mask.sum(1)
    mean = (x * mask).sum(1) / jnp.maximum(count, 1.0)
    squares = (jnp.square(x - mean[:, None]) * mask).sum(1)
    variance = squares / jnp.maximum(count - 1.0, 1.0)
    # The root has no gradient at 0, where a channel that is never active lies.
    deviation = jnp.where(variance > _TINY, jnp.sqrt(jnp.maximum(variance, _TINY)), 0.0)
    return jnp.concatenate([mean, deviation], axis=-1)


def batch_norm(width: int, rngs: nnx.Rngs, affine: bool = True) -> nnx.BatchNorm:
    """Batch norm over valid frames, in float32."""
    return nnx.BatchNorm(
        width,
        momentum=_MOMENTUM,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,
        rngs=rngs,
    )


def _pointwise(n_in: int, n_out: int, rngs: nnx.Rngs, use_bias: bool = False) -> nnx.Linear:
    return linear(
        n_in,
        n_out,
        (None, None),
        dtype="float32",
        use_bias=use_bias,
        init=fan_in(2.0),
        rngs=rngs,
    )


def _widened(mask, rest: int):
    return mask.reshape(*mask.shape[:2], *(1,) * rest, 1)
