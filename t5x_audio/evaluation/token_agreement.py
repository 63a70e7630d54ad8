"""How many tokens stay when a tokenizer's encoder is quantised.

A served tokenizer must give the codes that the language model was trained on, so what counts of a
quantised encoder is not how near its features are but which codes come out: their share that is the
same, and how much of the codebook is still in use.
"""

from collections.abc import Iterable, Sequence

import jax
import numpy as np
from flax import nnx

from t5x_audio.quantization.rules import Rules
from t5x_audio.quantization.simulate import calibrate, quantized

Batch = tuple[np.ndarray, np.ndarray]
"""Audio float32 [B, T] at 16 kHz and lengths int32 [B]."""


def token_agreement(
    tokenizer: nnx.Module,
    rules: Rules,
    calibration: Iterable[Batch],
    batches: Iterable[Batch],
    bits: Sequence[tuple[int, int]],
) -> list[dict[str, float]]:
    """The tokenizer quantised to each of several widths beside itself.

    Args:
      tokenizer: a LinguisticTokenizer or SemanticTokenizer.
      rules: what is quantised.
      calibration: recordings that the ranges of the activations are taken from.
      batches: recordings to encode, of one shape or few.
      bits: (of weights, of activations).

    Returns:
      For each of `bits`: agreement, the share of codes that are the same; usage, the share of the
      codebook that occurs; plain_usage, the same without quantisation.

    Raises:
      UserError: as of `calibrate`.
    """
    graphdef, state = nnx.split(tokenizer)
    ranges = calibrate(tokenizer, rules, calibration, lambda model, batch: model.encode(*batch))

    @jax.jit
    def plain(state, audio, lengths):
        return nnx.merge(graphdef, state).encode(audio, lengths)

    @jax.jit
    def low(state, ranges, audio, lengths, bits):
        live = nnx.merge(graphdef, state)
        with quantized(live, rules, ranges, bits):
            return live.encode(audio, lengths)

    size = tokenizer.config.codebook_size
    same, used = np.zeros(len(bits)), np.zeros((len(bits) + 1, size), bool)
    total = 0
    for audio, lengths in batches:
        codes, counts = map(np.asarray, plain(state, audio, lengths))
        valid = np.arange(codes.shape[1]) < counts[:, None]
        total += valid.sum()
        used[-1, codes[valid]] = True
        for i, pair in enumerate(bits):
            widths = tuple(np.float32(width) for width in pair)
            found = np.asarray(low(state, ranges, audio, lengths, widths)[0])
            same[i] += (found == codes)[valid].sum()
            used[i, found[valid]] = True
    usage = used.mean(1)
    return [
        {"agreement": float(kept / max(total, 1)), "usage": float(u), "plain_usage": usage[-1]}
        for kept, u in zip(same, usage, strict=False)
    ]
