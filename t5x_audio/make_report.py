r"""Makes the report of a run: `<run_dir>/report.html`, one page that needs nothing but itself.

Where the page's name ends in .md, it is the Markdown edition instead, with tables and losses but
without sound: what a repository keeps of a run.

It gathers what the stages left behind: results and recordings of the evaluations, every stage's
`metrics.jsonl` and operative configuration, and the times in `stages.json`. What is not there yet
is left out, so that a half-finished run can be looked at too.

    python -m t5x_audio.make_report --gin_file=gin/runs/make_report.gin --gin.RUN_DIR=runs/demo
    python -m t5x_audio.make_report --gin_file=gin/runs/make_report.gin --gin.RUN_DIR=runs/demo \
        --model_dir=docs/results/demo.md
"""

import json
import os
import pathlib
import platform
import re
from collections.abc import Mapping
from typing import Any

MEASURES = (
    # name in results.json, what it is called, how it is written, note
    ("text_accuracy", "right in the text channel", "percent",
     "what was written ends in the words that make it right"),
    ("heard_accuracy", "right as heard", "percent",
     "what an independent recogniser hears ends in those words"),
    ("wer", "word error rate of what is heard", "percent",
     "answers: against what the model wrote; the others: against what is said"),
    ("audible", "with sound", "percent", "recordings that are not silent"),
    ("dnsmos", "DNSMOS overall", "score", "P.835 quality from 1 to 5, by an automatic judge"),
    ("speaker_similarity", "speaker similarity", "score",
     "cosine of GE2E embeddings to the reference voice"),
)  # fmt: skip
SPEEDS = (
    ("time_to_first_audio", "time to first audio", "seconds",
     "median, from the question in memory to the first samples of its answer"),
    ("tokens_per_second", "tokens per second", "number", "one answer at a time, text and audio"),
    ("real_time_factor", "real-time factor", "score", "time taken per second of speech answered"),
)  # fmt: skip
VERSIONS = (
    ("recording", "recordings"),
    ("copy", "own mel through HiFT"),
    ("both", "both codebooks"),
    ("stream", "both, as a stream"),
    ("semantic", "semantic codes only"),
    ("linguistic", "linguistic codes only"),
)
LOSSES = (
    # name in results.json after the version, what it is called, how it is written
    ("wer", "word errors", "percent"),
    ("cer", "character errors", "percent"),
    ("dnsmos", "DNSMOS overall", "score"),
    ("speaker_similarity", "GE2E cosine to the recording", "score"),
    ("mel_distance", "mel distance, dB", "score"),
    ("f0_correlation", "F0 correlation", "score"),
    ("f0_semitones", "F0 distance, semitones", "score"),
    ("voicing_agreement", "same voicing", "percent"),
)
PACKAGES = ("t5x_audio", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "seqio")


def run(*, model_dir: str, run_dir: str, title: str = "A spoken question in, a spoken answer out"):
    """Writes the report.

    Args:
      model_dir: the page to write, e.g. runs/demo/report.html; beside docs/results/demo.md,
        demo.svg has the losses.
      run_dir: the run it tells of, e.g. runs/demo.
      title: heading of the page.

    Returns:
      {"report": path, "megabytes": size, "examples": how many can be listened to}.

    Raises:
      UserError: the run directory is missing, or the page cannot be written.
    """
    from t5x_audio.errors import UserError

    root, path = pathlib.Path(run_dir), pathlib.Path(model_dir)
    if not root.is_dir():
        raise UserError(f"{root}: no such run directory; run `make demo` to make one")
    page = gather(root, title)
    for file, text in _editions(page, root, path):
        temporary = file.with_name(file.name + ".tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(file)
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror})") from error
    megabytes = round(path.stat().st_size / 1e6, 2)
    return {"report": str(path), "megabytes": megabytes, "examples": len(page.examples)}


def _editions(page, root: pathlib.Path, path: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """(file, its text) of the page, and of what stands beside it."""
    from t5x_audio.evaluation import report, summary

    if path.suffix != ".md":
        return [(path, report.render(page))]
    picture = path.with_suffix(".svg")
    losses = summary.draw_losses(page.stages)
    text = summary.render(page, _command(root), picture.name if losses else None)
    return [(path, text), *([(picture, losses)] if losses else [])]


def _command(root: pathlib.Path) -> str | None:
    """What makes the run again, going by its ledger; None if that tells no size, or several."""
    commands = [row["command"] for row in _read_json(root / "stages.json").values()]
    sizes = set(re.findall(r"gin/models/(\w+)\.gin", " ".join(commands)))
    if len(sizes) != 1:
        return None
    return f"python -m t5x_audio.life --size={sizes.pop()} --run_dir=runs/{root.name}"


def gather(root: pathlib.Path, title: str):
    """The `Report` of a run directory, from what is there."""
    from t5x_audio.evaluation import report

    results = _read_json(root / "evaluation" / "results.json")
    resynthesis = _read_json(root / "resynthesis" / "results.json")
    ledger = _read_json(root / "stages.json")
    figures = results.get("figures", {})
    return report.Report(
        title=title,
        lead=_lead(root, results),
        figures=_headline(figures),
        examples=tuple(_example(root / "evaluation", row) for row in results.get("examples", ())),
        tables=(*measured_tables(results), *resynthesis_tables(resynthesis)),
        stages=_stages(root, ledger),
        facts=_facts(root, results, ledger),
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    from t5x_audio.errors import UserError

    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); run its stage again") from error


def _lead(root: pathlib.Path, results: Mapping[str, Any]) -> str:
    """The sentence under the title."""
    count = results.get("figures", {}).get("questions")
    if not count:
        return f"The run {root.name}, as far as it has come; it has not been evaluated yet."
    return (
        f"The run {root.name}: tokenizers, language model and vocoder were trained from scratch, "
        f"then asked {count} spoken questions that they had never seen, in a voice that they had "
        "never heard."
    )


def write_number(value: float | None, form: str) -> str:
    """A measured value for people: form is percent, score, seconds or number; None is a dash."""
    if value is None:
        return "–"
    if form == "percent":
        return f"{100 * value:.1f} %"
    if form == "seconds":
        return f"{value:.2f} s"
    return f"{value:.2f}" if form == "score" else f"{value:,.0f}"


def _headline(figures: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    chosen = (
        ("text_accuracy", "percent", "of the answers are right in the text channel"),
        ("heard_accuracy", "percent", "are right as heard by a recogniser"),
        ("wer", "percent", "word errors between what was written and what is heard"),
        ("dnsmos", "score", "overall quality of the speech (DNSMOS, 1 to 5)"),
        ("time_to_first_audio", "seconds", "from the question to the first sound"),
    )
    return tuple(
        (write_number(figures[name], form), what)
        for name, form, what in chosen
        if figures.get(name) is not None
    )


def _example(folder: pathlib.Path, row: Mapping[str, Any]):
    """One question to listen to; recordings that are missing are left out."""
    import soundfile

    from t5x_audio.evaluation import report

    clips = []
    for label, name in row["clips"].items():
        if (folder / name).is_file():
            samples, rate = soundfile.read(folder / name, dtype="float32")
            clips.append(report.Clip(label, samples, rate))
    new = {"phrasing": "asked in new words", "fact": "a fact never asked"}.get(row["novelty"], "")
    lines = (
        report.Line("true answer", row["answer"]),
        report.Line("written", row["written"], row["written_right"]),
        report.Line("heard", row["answers"]["heard"], row["answers"]["heard_right"]),
    )
    meta = " · ".join(part for part in (row["category"], new) if part)
    return report.Example(_sentence(row["question"]), meta, lines, tuple(clips))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def measured_tables(results: Mapping[str, Any]):
    """Quality beside its anchors, speed, and accuracy by category and novelty."""
    from t5x_audio.evaluation import report

    figures = results.get("figures", {})
    if not figures:
        return ()
    kinds = ("", "resynthesis_", "recordings_")
    quality = tuple(
        (what, *(_anchor(figures, kind + name, form) for kind in kinds))
        for name, what, form, _ in MEASURES
    )
    notes = {what: note for _, what, _, note in (*MEASURES, *SPEEDS) if note}
    columns = ("", "answers", "true answers, resynthesised", "recordings")
    speed = tuple(
        (what, write_number(figures[name], form))
        for name, what, form, _ in SPEEDS
        if name in figures
    )
    tables = [report.Table("The answers, beside what their parts allow", columns, quality, notes)]
    tables += [report.Table("Speed", ("", "answers"), speed, notes)] if speed else []
    for title, key in (("By category", "by_category"), ("By novelty", "by_novelty")):
        rows = tuple(
            (
                name,
                str(group["questions"]),
                write_number(group["text_accuracy"], "percent"),
                write_number(group["heard_accuracy"], "percent"),
            )
            for name, group in results.get(key, {}).items()
        )
        head = ("", "questions", "right in the text channel", "right as heard")
        tables += [report.Table(title, head, rows)] if len(rows) > 1 else []
    return tuple(tables)


def resynthesis_tables(results: Mapping[str, Any]):
    """What codes, flow matching and HiFT leave of held-out speech."""
    from t5x_audio.evaluation import report

    figures = results.get("figures", {})
    if not figures:
        return ()
    rows = tuple(
        (what, *(_anchor(figures, f"{version}_{name}", form) for name, _, form in LOSSES))
        for version, what in VERSIONS
    )
    notes = {what: results["notes"][version] for version, what in VERSIONS}
    columns = ("", *(what for _, what, _ in LOSSES))
    return (report.Table(f"Resynthesis of {figures['clips']} clips", columns, rows, notes),)


def _anchor(figures: Mapping[str, Any], name: str, form: str) -> str:
    return write_number(figures[name], form) if name in figures else ""


def _stages(root: pathlib.Path, ledger: Mapping[str, Any]):
    """Every stage of the life with what it left behind."""
    from t5x_audio import life
    from t5x_audio.evaluation import curves, report

    stages = []
    for stage in life.STAGES:
        folder = root / stage.output
        config = folder / "config.gin"
        seconds = ledger.get(stage.name, {}).get("seconds")
        stages.append(
            report.Stage(
                name=stage.name,
                says=stage.says,
                seconds=seconds,
                metrics=curves.read_curves(folder),
                config=config.read_text() if config.is_file() else None,
            )
        )
    return tuple(stages)


def _facts(root: pathlib.Path, results: Mapping[str, Any], ledger: Mapping[str, Any]):
    """(name, value) of seeds, machine and versions."""
    import importlib.metadata

    configs = [path.read_text() for path in root.glob("*/config.gin")]
    seeds = sorted(set(re.findall(r"^\w+\.run\.seed = (\d+)", "\n".join(configs), re.MULTILINE)))
    facts = [("seed of every stage", ", ".join(seeds))] if seeds else []
    facts += [("seed of the evaluation", str(results["seed"]))] if "seed" in results else []
    if machines := {row["machine"] for row in ledger.values() if "machine" in row}:
        facts.append(("machine", "; ".join(sorted(machines))))
    else:
        facts.append(("machine", f"{os.cpu_count()} cores, {platform.machine()}"))
    facts.append(("Python", platform.python_version()))
    for package in PACKAGES:
        try:
            facts.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    if finished := [row["finished"] for row in ledger.values() if "finished" in row]:
        facts.append(("finished", max(finished)))
    return tuple(facts)


if __name__ == "__main__":
    from t5x_audio import launch

    launch.main("t5x_audio.make_report", description=__doc__)
