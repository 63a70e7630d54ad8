"""Answers one spoken or typed question: a recording in, a recording out.

The question may be wav, flac, ogg or mp3, of any rate and number of channels. The answer is written
as speech (wav or flac) and printed as text, with the time each part took. The models are compiled
for the question's length before the clock starts; `load` tells how long that and loading took.

    python -m t5x_audio.infer --model_dir=runs/demo --input=question.wav --output=answer.wav
    python -m t5x_audio.infer --model_dir=runs/demo --text="what is two plus three?" --json
"""

import argparse
import pathlib
import sys
import time

MAX_SECONDS = 30.0


def run(
    *,
    model_dir: str | None = None,
    input: str | None = None,
    text: str | None = None,
    output: str = "answer.wav",
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_new_tokens: int = 400,
    max_seconds: float = MAX_SECONDS,
    seed: int = 0,
    weights: str | None = None,
    cache: str | None = None,
) -> dict[str, object]:
    """Answers a question; exactly one of `input` and `text` asks it.

    Args:
      model_dir: a run directory, e.g. runs/demo.
      input: recording of the question.
      text: the question, typed.
      output: recording of the answer, .wav or .flac.
      temperature, top_p, max_new_tokens: of sampling; temperature 0 takes the likeliest token.
      max_seconds: longest question.
      seed: of sampling and of the vocoder's noise: the same question gives the same answer.
      weights: how the backbone keeps them: 'float32', 'bfloat16', 'int8', 'w8a8' (with products of
        integers), or None = as they are.
      cache: how it keeps keys and values: 'int8', or None = as it computes.

    Returns:
      The text, the file, its seconds, the timings in seconds and tokens per second.

    Raises:
      UserError: the question, the output's name or the run directory is at fault.
    """
    from t5x_audio.errors import UserError

    if model_dir is None:
        raise UserError("give the run to ask, for example --model_dir=runs/demo")
    if (input is None) == (text is None):
        raise UserError("give either --input=recording or --text='a question'")
    if text is not None and not text.strip():
        raise UserError("--text: the question is empty; type one")
    _check_output(output)
    waveform = None
    if input is not None:
        from t5x_audio.audio import io

        waveform = io.load(input, max_seconds=max_seconds)
    options = {"max_new_tokens": max_new_tokens, "seed": seed}
    options |= {"weights": weights, "cache": cache}
    answer, loading = _answer(model_dir, waveform, text, temperature, top_p, options)
    return _hand_over(answer, output, loading)


def _check_output(output: str) -> None:
    """Refuses an unusable name before minutes go into an answer."""
    from t5x_audio.errors import UserError

    path = pathlib.Path(output)
    if path.suffix.lower() not in (".wav", ".flac"):
        raise UserError(f"--output={output}: can only write .wav and .flac; change the ending")
    if path.is_dir():
        raise UserError(f"--output={output}: is a folder; give a file")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--output={output}: {parent} is not a folder; give another path")


def _answer(model_dir: str, waveform, text: str | None, temperature, top_p, options):
    """-> (Answer, seconds that loading and compiling took)."""
    from t5x_audio.backbone.decoding import Sampling
    from t5x_audio.serving.assistant import SpokenAssistant

    begun = time.perf_counter()
    sampling = Sampling(temperature=temperature, top_p=top_p)
    assistant = SpokenAssistant.load(model_dir, sampling=sampling, **options)

    def ask():
        return assistant.answer(waveform) if text is None else assistant.answer_text(text)

    ask()  # Compiles; the same seed gives the same answer again.
    loading = time.perf_counter() - begun
    return ask(), loading


def _hand_over(answer, output: str, loading: float) -> dict[str, object]:
    """Writes the recording, tells people on stderr, returns the closing line's values."""
    from t5x_audio.audio import io
    from t5x_audio.errors import UserError

    print(f"written: {answer.text or '(nothing)'}", file=sys.stderr)
    if not len(answer.audio):
        raise UserError("the model answered without speech; train it longer or ask again")
    io.save(output, answer.audio, answer.rate)
    seconds = len(answer.audio) / answer.rate
    times = ", ".join(f"{name} {value:.3f} s" for name, value in answer.timings.items())
    print(f"spoken:  {output}, {seconds:.2f} s", file=sys.stderr)
    print(f"timings: {times}; {answer.tokens_per_second:.0f} tokens/s", file=sys.stderr)
    timings = {f"{name}_seconds": round(value, 4) for name, value in answer.timings.items()}
    return {
        "text": answer.text,
        "output": output,
        "audio_seconds": round(seconds, 3),
        **timings,
        "load_seconds": round(loading, 2),
        "tokens": len(answer.tokens),
        "tokens_per_second": round(answer.tokens_per_second, 1),
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `run`, see its docstring; gin/runs/infer.gin is read before other gin files."""
    parser.set_defaults(gin_file=["gin/runs/infer.gin"])
    parser.add_argument("--input", help="recording of the question: wav, flac, ogg or mp3")
    parser.add_argument("--text", help="the question, typed")
    parser.add_argument("--output", help="recording of the answer (default: answer.wav)")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answer")


if __name__ == "__main__":
    from t5x_audio import launch

    launch.main("t5x_audio.infer", description=__doc__, add_flags=add_flags)
