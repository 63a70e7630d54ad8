"""How many tokens stay when a tokenizer's encoder is quantised.

A served tokenizer must give the codes that the language model was trained on, so what counts of a
quantised encoder is not how near its features are but which codes come out: their share that is the
same, and how much of the codebook is still in use.
"""

from collections.abc import Sequence

import numpy as np

from t5x_audio.evaluation.linear_probe import FULL
from t5x_audio.evaluation.quantized_speech import QuantizedSpeech, codes


def token_agreement(
    speech: QuantizedSpeech,
    recordings: Sequence[np.ndarray],
    bits: Sequence[tuple[int, int]],
) -> list[dict[str, float]]:
    """The tokenizer quantised to each of several widths beside itself.

    Args:
      speech: the tokenizer, calibrated.
      recordings: float [T_i] at 16 kHz.
      bits: (of weights, of activations).

    Returns:
      For each of `bits`: agreement, the share of codes that are the same; usage, the share of the
      codebook that occurs; plain_usage, the same without quantisation.

    Raises:
      UserError: bits that there are not.
    """
    plain = np.concatenate(speech(codes, recordings, FULL))
    size = speech.tokenizer.config.codebook_size
    found = []
    for pair in bits:
        low = np.concatenate(speech(codes, recordings, pair))
        found.append(
            {
                "agreement": float(np.mean(low == plain)) if len(plain) else 0.0,
                "usage": len(np.unique(low)) / size,
                "plain_usage": len(np.unique(plain)) / size,
            }
        )
    return found
