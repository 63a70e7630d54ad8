"""Speaker similarity: the cosine between the speaker embeddings of two recordings."""

import numpy as np


def speaker_similarity(encoder, a: np.ndarray, b: np.ndarray) -> float:
    """How alike the voices of two recordings are.

    Args:
      encoder: has `embed(waveform) -> [D]`, e.g. `interop.ge2e.load_speaker_encoder()`.
      a: float [T] at the encoder's rate.
      b: float [U] at the encoder's rate.

    Returns:
      The cosine in [-1, 1]; with the published GE2E weights about 0.87 for the same speaker and
      0.52 for two speakers.
    """
    return cosine(encoder.embed(a), encoder.embed(b))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors [D]; 0 when either is zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.clip(a @ b / norms, -1.0, 1.0)) if norms > 0 else 0.0
