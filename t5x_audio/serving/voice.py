"""The voice that answers: one speaker embedding, the mean over the training answers' recordings.

The vocoder was trained with an embedding for each recording (`tokens/speaker_embeddings.npz`).
Their mean over the answers, all spoken by one voice, is kept beside the vocoder when it is first
asked for, so that a run without its corpora can still answer.
"""

import os
import zipfile

import numpy as np

from t5x_audio.data import records, speaker_embeddings
from t5x_audio.errors import UserError
from t5x_audio.serving.model_dir import RunDirectory


def answer_voice(root: RunDirectory) -> np.ndarray:
    """Speaker embedding float32 [D] of the answers' voice, of unit length.

    Raises:
      UserError: neither it nor what it is made of is there, or a file is damaged.
    """
    if not root.speaker_embedding.exists():
        voice = _mean_of_answers(root)
        _keep(root, voice)
        return voice
    try:
        with np.load(root.speaker_embedding) as archive:
            return archive["embedding"].astype(np.float32)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{root.speaker_embedding}: is damaged ({error}); delete it to have it made again"
        ) from error


def _mean_of_answers(root: RunDirectory) -> np.ndarray:
    path = root.speaker_embeddings
    embeddings = speaker_embeddings.read(path)
    if embeddings is None:
        raise UserError(f"{path}: missing; run the stage train_flow first")
    known = embeddings.vectors
    clips = records.open_records(root.tokens("spoken_qa"), "train")
    keys = [f"train {clip['id']}" for clip in clips if clip["role"] == "answer"]
    found = [known[key] for key in keys if key in known]
    if not found:
        raise UserError(f"{path}: holds no answer of {root.tokens('spoken_qa')}; run train_flow")
    mean = np.mean(found, axis=0, dtype=np.float64)
    return (mean / np.linalg.norm(mean)).astype(np.float32)


def _keep(root: RunDirectory, voice: np.ndarray) -> None:
    """Writes the embedding where it will be found, if the folder can be written."""
    temporary = root.speaker_embedding.with_suffix(".writing")
    try:
        with temporary.open("wb") as file:
            np.savez(file, embedding=voice)
        os.replace(temporary, root.speaker_embedding)
    except OSError:
        temporary.unlink(missing_ok=True)
