"""What a tokenizer makes of recordings when its encoder is quantised: features, codes, text.

The encoder is calibrated once; one compiled function of each kind and length of audio serves all
numbers of bits. Recordings are padded to a few lengths, which changes no result, and cut to 30 s,
the longest piece that a tokenizer takes.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.evaluation.linear_probe import FULL, require_pair
from t5x_audio.objectives import ctc, encoder_ssql
from t5x_audio.objectives.augmentation import energy_normalize
from t5x_audio.quantization.simulate import calibrate, quantized
from t5x_audio.tokenizers.batching import PIECE_SECONDS, SAMPLE_RATE, bucket_samples
from t5x_audio.tokenizers.masked_prediction import MaskedPrediction
from t5x_audio.tokenizers.semantic import SemanticTokenizer, valid_frames

Function = Callable[[nnx.Module, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(tokenizer, audio [B, T], lengths [B]) -> (arrays [B, N, ...], counts [B])."""


def features(tokenizer, audio, lengths):
    """What codes are made of: [B, N, D] and counts."""
    return tokenizer.encode_frames(energy_normalize(audio), lengths)


def codes(tokenizer, audio, lengths):
    """Codes int32 [B, N] and counts."""
    return tokenizer.encode(energy_normalize(audio), lengths)


def recognised(tokenizer, audio, lengths):
    """Ids int32 [B, N] of what the tokenizer's own CTC head reads, and counts."""
    hidden, lengths = tokenizer.encode_frames(energy_normalize(audio), lengths)
    if isinstance(tokenizer, SemanticTokenizer):
        hidden = tokenizer.quantizer(hidden, valid_frames(lengths, hidden.shape[1]))[0]
    return ctc.greedy(tokenizer.logits(hidden, lengths), lengths)


class QuantizedSpeech:
    """See the module docstring.

    Args:
      model: a LinguisticTokenizer or SemanticTokenizer, or the MaskedPrediction of one.
      calibration: float [T_i] at 16 kHz, recordings that the ranges of activations are taken from.
      batch_seconds: of padded audio that is encoded at a time.
    """

    def __init__(
        self,
        model: nnx.Module,
        calibration: Sequence[np.ndarray],
        batch_seconds: float = 64.0,
    ):
        """Calibrates. UserError where that cannot be, see `simulate.calibrate`."""
        self.tokenizer = model.tokenizer if isinstance(model, MaskedPrediction) else model
        semantic = isinstance(self.tokenizer, SemanticTokenizer)
        kind = encoder_ssql.semantic_rules if semantic else encoder_ssql.linguistic_rules
        self._rules, self._batch_seconds = kind(""), batch_seconds
        batches = [batch for _, batch in self._batches(calibration)]
        self._ranges = calibrate(
            self.tokenizer, self._rules, batches, lambda live, batch: features(live, *batch)
        )
        self._graph, self._state = nnx.split(self.tokenizer)

    def __call__(
        self, function: Function, recordings: Sequence[np.ndarray], pair: tuple[int, int]
    ) -> list[np.ndarray]:
        """What `function` makes of each recording at bits of (weights, activations): [N_i, ...].

        (0, 0) is unquantised. UserError for other bits than 2 to 8.
        """
        require_pair(pair)
        bits = tuple(jnp.float32(b) for b in pair)
        whole, found = tuple(pair) == FULL, {}
        for numbers, (audio, lengths) in self._batches(recordings):
            made = self._run(function, whole, self._state, self._ranges, bits, audio, lengths)
            arrays, counts = map(np.asarray, made)
            for row, number in enumerate(numbers):
                found[number] = arrays[row, : counts[row]]
        return [found[number] for number in range(len(recordings))]

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def _run(self, function, whole, state, ranges, bits, audio, lengths):
        live = nnx.merge(self._graph, state)
        if whole:
            return function(live, audio, lengths)
        with quantized(live, self._rules, ranges, bits):
            return function(live, audio, lengths)

    def _batches(self, recordings):
        """(places in `recordings`, (audio [B, T], lengths [B])), of few shapes."""
        pieces = [np.asarray(x, np.float32)[: PIECE_SECONDS * SAMPLE_RATE] for x in recordings]
        buckets: dict[int, list[int]] = {}
        for number, samples in enumerate(pieces):
            buckets.setdefault(bucket_samples(len(samples)), []).append(number)
        for size, members in sorted(buckets.items()):
            rows = max(1, int(self._batch_seconds * SAMPLE_RATE) // size)
            rows = min(rows, len(members))
            for start in range(0, len(members), rows):
                some = members[start : start + rows]
                audio, lengths = np.zeros((rows, size), np.float32), np.zeros(rows, np.int32)
                for row, number in enumerate(some):
                    audio[row, : len(pieces[number])] = pieces[number]
                    lengths[row] = len(pieces[number])
                yield some, (audio, lengths)
