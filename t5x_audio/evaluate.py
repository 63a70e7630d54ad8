"""Asks a run's assistant the held-out spoken questions and measures its answers.

What is written, in `<run_dir>/evaluation/`: `results.json` (all figures and every question),
`results.md` (the tables), `speech/<kind>/<question>.flac` (what was said). Every answer is kept as
it comes, so an interrupted evaluation goes on where it stopped and a finished one is not repeated;
it starts anew when the weights or the settings are others.

    python -m t5x_audio.evaluate --gin_file=gin/models/demo.gin --gin_file=gin/runs/evaluate.gin
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ANSWERS, SPEECH = "answers.jsonl", "speech"


def run(
    *,
    model_dir: str,
    run_dir: str,
    split: str = "test",
    num_questions: int | None = 100,
    batch_size: int = 16,
    num_examples: int = 8,
    num_timed: int = 5,
    num_rated: int | None = None,
    max_new_tokens: int = 400,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    make_judges: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Evaluates a run.

    Args:
      model_dir: where the results go, e.g. runs/demo/evaluation.
      run_dir: the run, e.g. runs/demo.
      split: whose questions: 'test', in the voice that nothing was trained on, or 'validation', the
        same in training voices, for choosing between settings.
      num_questions: how many of the held-out questions, always the same ones; None = all.
      batch_size: questions answered at once.
      num_examples: how many the report lets one listen to.
      num_timed: questions asked one at a time for the time to first audio.
      num_rated: how many recordings of each kind get a DNSMOS, which costs 3 s of a core for
        each; None = all.
      max_new_tokens, temperature, top_p: of the answers; temperature 0 takes the likeliest token.
      seed: of sampling and of the vocoder's noise.
      make_judges: (recordings of the reference voice) -> `judges.Judges`; None = the project's.

    Returns:
      The figures, flat.

    Raises:
      UserError: a part of the run is missing or of another size.
    """
    from t5x_audio import launch
    from t5x_audio.backbone.decoding import Sampling
    from t5x_audio.evaluation import results_folder
    from t5x_audio.serving.assistant import SpokenAssistant
    from t5x_audio.serving.model_dir import RunDirectory

    folder, root = pathlib.Path(model_dir), RunDirectory(run_dir)
    vocabulary = root.check()
    options = {"seed": seed, "max_new_tokens": max_new_tokens}
    settings = options | {
        "weights": root.fingerprint(),
        "split": split,
        "num_questions": num_questions,
        "temperature": temperature,
        "top_p": top_p,
        "num_examples": num_examples,
        "num_timed": num_timed,
        "num_rated": num_rated,
    }
    if results := results_folder.finished(folder, settings):
        print(f"already evaluated: {folder}", file=sys.stderr)
        return results["figures"]
    questions = _load_questions(root, vocabulary, split, num_questions)
    results_folder.begin(folder, settings, (ANSWERS, SPEECH))
    sampling = Sampling(temperature=temperature, top_p=top_p)
    assistant = SpokenAssistant.load(run_dir, sampling=sampling, **options)
    written, codes = answer_all(assistant, questions, folder / ANSWERS, batch_size)
    speech = speak_all(assistant, questions, codes, folder / SPEECH)
    speed = time_answers(assistant, questions[:num_timed])
    judges = (make_judges or default_judges)(speech["recordings"])
    judges = dataclasses.replace(judges, num_rated=num_rated)
    results = _judge(questions, written, speech, judges)
    results["figures"] |= speed
    results["seed"], results["settings"] = seed, settings
    results["examples"] = _examples(results["questions"], num_examples, questions, folder)
    launch.save_operative_config(folder)
    results_folder.write(folder / results_folder.TABLES, tables(results))
    results_folder.write(folder / results_folder.RESULTS, json.dumps(results, indent=1) + "\n")
    return results["figures"]


def _load_questions(root, vocabulary, split: str, limit: int | None):
    from t5x_audio.errors import UserError
    from t5x_audio.evaluation import spoken_qa

    if split not in ("test", "validation"):
        raise UserError(f"evaluate.run.split={split!r}: there are 'test' and 'validation'")
    return spoken_qa.load_questions(
        root.corpus("spoken_qa"),
        root.tokens("spoken_qa"),
        vocabulary.linguistic_size,
        split=split,
        limit=limit,
    )


def answer_all(assistant, questions: Sequence, path: pathlib.Path, batch_size: int):
    """Answers what `path` (JSON lines of id, text, codes) does not answer yet, batch by batch.

    Returns:
      (texts, flat local codes int32 [5 g_i]) in the order of the questions.
    """
    import numpy as np
    import tqdm

    from t5x_audio.evaluation import results_folder

    known = results_folder.read_rows(path)
    missing = [one for one in questions if one.id not in known]
    progress = tqdm.tqdm(total=len(questions), initial=len(known), desc="answers", unit="q")
    with progress, path.open("a") as file:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            replies = assistant.answer_batch([one.audio for one in batch], batch_size)
            for one, reply in zip(batch, replies, strict=True):
                row = {"id": one.id, "text": reply.text, "codes": reply.codes.tolist()}
                known[one.id] = row
                file.write(json.dumps(row) + "\n")
            file.flush()
            progress.update(len(batch))
    rows = [known[one.id] for one in questions]
    return [row["text"] for row in rows], [np.asarray(row["codes"], np.int32) for row in rows]


def speak_all(assistant, questions: Sequence, codes: Sequence, folder: pathlib.Path):
    """Vocodes the answers and, from their codes, the true answers; keeps each as a file.

    Returns:
      {kind: float32 [T_i] at 16 kHz of each question} for the kinds of `spoken_qa`; an answer
      without audio has no samples and no file.
    """
    import tqdm

    from t5x_audio.audio import io

    jobs = [("answers", one.id, code) for one, code in zip(questions, codes, strict=True)]
    jobs += [("resynthesis", one.id, one.codes) for one in questions]
    speech: dict[str, list] = {"answers": [], "resynthesis": []}
    for kind, name, code in tqdm.tqdm(jobs, desc="speech", unit="clip"):
        samples, rate = _spoken(assistant, code, folder / kind / f"{name}.flac")
        speech[kind].append(io.resample(samples, rate, 16000))
    return speech | {"recordings": [one.recording for one in questions]}


def _spoken(assistant, code, path: pathlib.Path):
    """(float32 [T], rate in Hz) of `code`: from the file, which is made when it is missing."""
    import soundfile

    from t5x_audio.audio import io

    if not path.exists():
        samples = assistant.speak(code)
        if not samples.size:
            return samples, assistant.rate
        io.save(path, samples, assistant.rate)
    return soundfile.read(path, dtype="float32")


def time_answers(assistant, questions: Sequence) -> dict[str, float]:
    """Medians over `questions`, each asked alone."""
    answers = []
    for one in questions:
        assistant.answer(one.audio)  # Compiles for this length; not counted.
        answers.append(assistant.answer(one.audio))
    if not answers:
        return {}
    spoken = [one for one in answers if len(one.audio)]
    figures = {
        "time_to_first_audio": statistics.median(one.timings["first_audio"] for one in answers),
        "tokens_per_second": statistics.median(one.tokens_per_second for one in answers),
    }
    if spoken:
        seconds = sum(len(one.audio) / one.rate for one in spoken)
        figures["real_time_factor"] = sum(one.timings["total"] for one in spoken) / seconds
    return figures


def default_judges(recordings: Sequence = ()):
    """faster-whisper, DNSMOS and GE2E, beside the voice of `recordings` (float32 [T_i], 16 kHz)."""
    from t5x_audio.data.engine.recognizer import Recognizer
    from t5x_audio.evaluation import judges, mos
    from t5x_audio.interop import ge2e

    encoder = ge2e.load_speaker_encoder()

    def embed(sound):
        return judges.in_batches(encoder.embed_batch, sound, 16)

    voice = judges.reference_voice(embed, recordings) if recordings else None
    return judges.Judges(Recognizer().transcribe, mos.overall, embed, voice)


def _judge(questions, written, speech, judges) -> dict[str, Any]:
    from t5x_audio.evaluation import spoken_qa

    rows = spoken_qa.assess(questions, written, speech, judges)
    return {
        "figures": spoken_qa.summarise(rows),
        "by_category": spoken_qa.by_group(rows, "category"),
        "by_novelty": spoken_qa.by_group(rows, "novelty"),
        "questions": rows,
    }


def _examples(rows, count: int, questions: Sequence, folder: pathlib.Path) -> list[dict]:
    """The rows of the examples, each with the names of its recordings."""
    from t5x_audio.audio import io
    from t5x_audio.evaluation import spoken_qa

    asked, by_id = {one.id: one for one in questions}, {row["id"]: row for row in rows}
    examples = []
    for name in spoken_qa.choose_examples(rows, count):
        question = pathlib.Path(SPEECH) / "questions" / f"{name}.flac"
        io.save(folder / question, asked[name].audio, 16000)
        clips = {
            "question": str(question),
            "true answer, resynthesised": f"{SPEECH}/resynthesis/{name}.flac",
            "answer": f"{SPEECH}/answers/{name}.flac",
        }
        examples.append(by_id[name] | {"clips": clips})
    return examples


def tables(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    from t5x_audio.evaluation.summary import table_markdown
    from t5x_audio.make_report import measured_tables

    parts = (f"## {table.title}\n\n{table_markdown(table)}" for table in measured_tables(results))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    from t5x_audio import launch

    launch.main("t5x_audio.evaluate", description=__doc__)
