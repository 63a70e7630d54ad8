r"""Makes the speech corpora of a run: human recordings and a spoken question-and-answer world.

`<run_dir>/corpus/asterisk` holds telephone prompts by a human speaker, fetched with apt; where that
cannot be had, a notice says why and the run goes on without. `<run_dir>/corpus/spoken_qa` is made
by the data engine: questions spoken by a natural voice and its variants, each clip checked by a
speech recogniser. An interrupted job continues; a finished corpus is left as it is.

    python -m t5x_audio.prepare_data --gin_file=gin/models/demo.gin \
        --gin_file=gin/runs/prepare_data.gin --gin.RUN_DIR=runs/demo
"""

import errno
import os
import shutil
import sys

from t5x_audio import launch
from t5x_audio.errors import UserError


def run(
    *,
    engine,
    run_dir: str | None = None,
    model_dir: str | None = None,
    asterisk: bool = True,
    asterisk_clips: int | None = None,
    max_seconds: float = 15.0,
    piper: str | None = None,
    recognizer: str | None = None,
) -> dict:
    """Makes both corpora.

    Args:
      engine: `data.engine.build.SpokenQuestions`, the dials of the question-and-answer corpus; None
        makes none of it, the human recordings only.
      run_dir: the corpora go to its corpus/.
      model_dir: takes the place of `run_dir`/corpus.
      asterisk: whether to fetch the human recordings.
      asterisk_clips: at most so many of them; None = all.
      max_seconds: longer recordings are left out.
      piper: Python of the voice's environment; None = $T5X_AUDIO_PIPER or .venv-voice beside ours.
      recognizer: folder of a CTranslate2 Whisper model; None = the pinned tiny.en.

    Returns:
      Figures for the closing line.

    Raises:
      UserError: the voice or the recogniser is missing, or the disk is full; nothing is lost.
    """
    if not (model_dir or run_dir):
        raise UserError("prepare_data: say where the corpora go, with --model_dir or RUN_DIR")
    if engine is None and not asterisk:
        raise UserError("prepare_data: neither an engine nor recordings: nothing to make")
    root = model_dir or os.path.join(run_dir, "corpus")
    work = os.path.join(root, ".work")
    try:
        os.makedirs(root, exist_ok=True)
        recorded = _asterisk(root, work, asterisk_clips, max_seconds) if asterisk else None
        spoken = _spoken_questions(root, work, engine, piper, recognizer) if engine else {}
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            place = error.filename or root
            raise UserError(f"{place}: cannot be written ({error.strerror})") from error
        raise
    return {
        "corpus": root,
        "clips": spoken.get("clips", 0) + (recorded or {}).get("clips", 0),
        "hours": round(spoken.get("hours", 0.0) + (recorded or {}).get("hours", 0.0), 3),
        "recorded_clips": (recorded or {}).get("clips", 0),
        "questions": spoken.get("questions", 0),
        "test_questions": spoken.get("test_questions", 0),
        "dropped_clips": sum(c["dropped"] for c in spoken.get("checked", {}).values()),
    }


def _asterisk(root: str, work: str, limit: int | None, max_seconds: float) -> dict | None:
    """The human recordings' summary, or None, with a notice, where they cannot be had."""
    from t5x_audio.data import corpus

    directory = os.path.join(root, "asterisk")
    summary = corpus.read_summary(directory)
    if summary is None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from t5x_audio.data import asterisk

        try:
            summary = asterisk.build(
                directory, os.path.join(work, "asterisk"), limit=limit, max_seconds=max_seconds
            )
        except asterisk.Unavailable as error:
            _say(f"NOTICE: no human recordings: {error}; going on with the data engine alone")
            return None
    dropped = ", ".join(f"{n} {reason}" for reason, n in summary["dropped"].items()) or "none"
    _say(f"{directory}: {_size(summary)}; left out: {dropped}; licence {summary['licence']}")
    return summary


def _spoken_questions(root: str, work: str, engine, piper, recognizer) -> dict:
    """The spoken questions' summary; the voice and the recogniser are loaded only when needed."""
    from t5x_audio.data import corpus

    directory = os.path.join(root, "spoken_qa")
    summary = corpus.read_summary(directory)
    if summary is None:
        from t5x_audio.data.engine.recognizer import Recognizer
        from t5x_audio.data.engine.speak import Piper

        voice = Piper(piper)
        listener = Recognizer(recognizer)
        summary = engine.build(directory, os.path.join(work, "spoken_qa"), voice, listener)
    _say(
        f"{directory}: {summary['questions']} questions ({summary['test_questions']} held out), "
        f"{_size(summary)}; kept of the clips made:"
    )
    for category, counts in summary["checked"].items():
        _say(f"  {category:12} {counts['kept']:6} of {counts['made']:6}")
    return summary


def _size(summary: dict) -> str:
    return f"{summary['clips']} clips, {summary['hours']:.2f} h"


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    launch.main("t5x_audio.prepare_data", description=__doc__)
