# ruff: noqa: E402
r"""SSQL for encoders of speech and for whole tokenizers, at every pair of bits.

    python benchmarks/ssql_speech.py --run_dir=runs/ssql_speech --speech_run=runs/speech \
        --digits=recordings/ --manifest=speech.jsonl

Encoders: per seed three trainings without text (masked prediction with SSQL; as many steps of it
alone; twice as many, which is about what SSQL costs), each followed by probes of digits and
speakers, of recordings called <digit>_<speaker>_<number>.wav, and of phone-like units, of the
recordings of the manifest. Tokenizers: those of the run go on with SSQL, or without it for twice as
many steps; how many codes stay when they are quantised, how much of the codebook is used, and the
error of their recognisers. What has finished is not done again. The page goes to docs/results/.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import bit_chart
from t5x_audio.evaluation import summary
from t5x_audio.evaluation.linear_probe import BIT_PAIRS, bit_name
from t5x_audio.evaluation.report import Table

METHODS = {
    "ssql": ("with SSQL", 1),
    "plain": ("without, same steps", 1),
    "plain_2x": ("without, same compute", 2),
}
KINDS = ("linguistic", "semantic")
BITS = tuple(bit_name(pair) for pair in BIT_PAIRS)
HELD_OUT = 5  # recordings of a digit and speaker below this number
ENCODER_PROBES = {"digits": ("text", "speaker"), "recordings": ("unit",)}
CODE_PROBES = ("code", "usage", "recognition")
WORDS = {
    "text": "digits told, %",
    "speaker": "speakers told, %",
    "unit": "phone-like units told, %",
    "code": "codes that stay, %",
    "usage": "codebook in use, %",
    "recognition": "units misread by the CTC head, %",
}


def run(job: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"t5x_audio.{job}", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train(flags, name: str, model_dir: pathlib.Path, steps: int, seed: int, *bindings) -> None:
    run(
        "train",
        f"--gin_file=gin/models/{flags.size}.gin",
        f"--gin_file=gin/runs/{name}.gin",
        f"--gin.RUN_DIR={flags.speech_run}",
        f"--gin.TRAINING_STEPS={steps}",
        f"--gin.TOKENIZERS_SAVE_EVERY={max(steps // 4, 1)}",
        f"--gin.train.run.seed={seed}",
        f"--gin.audio_reader.AudioBatches.seed={seed}",
        *bindings,
        f"--model_dir={model_dir}",
    )


def probe(flags, model_dir: pathlib.Path, name: str, manifest, probes, **options) -> dict:
    path = model_dir / f"{name}.json"
    if not path.is_file():
        run(
            "probe_speech",
            "--gin_file=gin/runs/probe_speech.gin",
            f"--gin.probe_speech.run.probes={tuple(probes)}",
            f"--manifest={manifest}",
            f"--validation={flags.validation}",
            f"--run_dir={flags.speech_run}",
            f"--model_dir={model_dir}",
            f"--name={name}",
        )
    return json.loads(path.read_text())


def digits_manifest(flags) -> pathlib.Path:
    """Of the recordings of digits, with their splits."""
    path, rows = flags.run_dir / "digits.jsonl", []
    for file in sorted(flags.digits.glob("*.wav")):
        digit, speaker, number = file.stem.split("_")
        split = "test" if int(number) < HELD_OUT else "train"
        row = {"audio": str(file.resolve()), "text": digit, "speaker": speaker}
        rows.append(json.dumps(row | {"id": file.stem, "split": split}))
    if not rows:
        sys.exit(f"error: {flags.digits} holds no <digit>_<speaker>_<number>.wav")
    path.write_text("\n".join(rows) + "\n")
    return path


def encoders(flags) -> dict:
    """{(kind, probe): {method: [figures of a seed]}}."""
    found: dict = {}
    manifests = {"digits": digits_manifest(flags), "recordings": flags.manifest}
    for seed in flags.seeds:  # Seed by seed: an interrupted experiment has whole comparisons.
        for kind in flags.kinds:
            for method, (_, times) in METHODS.items():
                place = flags.run_dir / f"{kind}_{method}_{seed}"
                name = f"pretrain_{kind}" + ("_ssql" if method == "ssql" else "")
                train(flags, name, place, flags.steps * times, seed)
                for source, probes in ENCODER_PROBES.items():
                    made = probe(flags, place, f"probe_{source}", manifests[source], probes)
                    for one in probes:
                        rows = found.setdefault((kind, one), {})
                        rows.setdefault(method, []).append(made[one])
    return found


def tokenizers(flags) -> dict:
    """{(kind, probe): {'as trained', or a method: [its figures]}}."""
    found: dict = {}
    for kind in flags.kinds:
        models = {"as trained": flags.speech_run / kind}
        for method in ("ssql", "plain_2x"):
            times = METHODS[method][1]
            models[method] = flags.run_dir / f"tokenizer_{method}" / kind
            name = f"train_{kind}" + ("_ssql" if method == "ssql" else "")
            train(
                flags, name, models[method], flags.tokenizer_steps * times, 0,
                f"--gin.{kind.upper()}_INIT_FROM={models['as trained'].resolve()}",
                "--gin.learner.GradientLearner.init_part=''",
                "--gin.learner.GradientLearner.init_fresh=()",
                f"--gin.TRAINING_PEAK_LR={flags.tokenizer_rate}",
            )  # fmt: skip
        for method, place in models.items():
            # Read by its head where that was trained, told by codes where those are fitted.
            made = dict(probe(flags, place, "probe_reading", flags.manifest, ("recognition",)))
            made |= probe(flags, fitted(flags, kind, place), "probe_codes", flags.manifest,
                          ("code", "usage"))  # fmt: skip
            for one in CODE_PROBES:
                found.setdefault((kind, one), {})[method] = [made[one]]
    return found


def fitted(flags, kind: str, place: pathlib.Path) -> pathlib.Path:
    """The tokenizer with its codebook: of the linguistic one that is fitted behind the training."""
    if kind == "semantic":
        return place
    codebook = place.parent / "linguistic_tokenizer"
    if not codebook.is_dir():
        corpus = place.parent / "corpus"
        if not corpus.exists():
            corpus.symlink_to((flags.speech_run / "corpus").resolve())
        run(
            "fit_codebook",
            f"--gin_file=gin/models/{flags.size}.gin",
            "--gin_file=gin/runs/fit_codebook.gin",
            f"--gin.RUN_DIR={place.parent}",
            f"--model_dir={codebook}",
        )
    return codebook


def tables(found: dict, titles: dict) -> list[Table]:
    made = []
    for (kind, one), rows in found.items():
        cells = []
        for method, figures in rows.items():
            spreads = [bit_chart.spread([x[bits] for x in figures]) for bits in BITS]
            few = len(figures) < 2
            texts = (f"{mean:.1f}" if few else f"{mean:.1f} ± {dev:.1f}" for mean, dev in spreads)
            cells.append((titles.get(method, method), *texts))
        made.append(Table(f"{kind}: {WORDS[one]}", ("training", *BITS), tuple(cells)))
    return made


def chart(found: dict, key: tuple[str, str], titles: dict) -> str:
    lines = {
        titles.get(method, method): {
            bits: bit_chart.spread([x[bits] for x in figures]) for bits in BITS
        }
        for method, figures in found[key].items()
    }
    return bit_chart.draw(lines, f"{key[0]}: {WORDS[key[1]]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run_dir", type=pathlib.Path, required=True)
    parser.add_argument("--speech_run", type=pathlib.Path, required=True, help="with tokenizers")
    parser.add_argument("--digits", type=pathlib.Path, required=True, help="folder of recordings")
    parser.add_argument("--manifest", type=pathlib.Path, required=True, help="of recordings")
    parser.add_argument("--validation", type=float, default=0.1, help="share of them held out")
    parser.add_argument("--size", default="tiny", help="a file of gin/models")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=400, help="of masked prediction")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokenizer_steps", type=int, default=400, help="of SSQL on tokenizers")
    parser.add_argument("--tokenizer_rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--remark", default="", help="a sentence for the page: what data this was")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    flags = parser.parse_args()
    flags.run_dir.mkdir(parents=True, exist_ok=True)
    words = [word for word in sys.argv[1:] if not word.startswith("--remark")]
    parts = [
        "# SSQL for speech",
        f"Made by `python benchmarks/ssql_speech.py {' '.join(words)}` ({os.cpu_count()} cores, "
        f"{platform.machine()}, {datetime.date.today()}; "
        f"jax {importlib.metadata.version('jax')}). {flags.remark}".rstrip(),
        "WxAy: weights of x bits, activations of y, simulated; the first product has weights of 8. "
        "All figures are of held-out recordings.",
    ]
    titles = {method: title for method, (title, _) in METHODS.items()}
    for part in flags.parts:
        found = PARTS[part][0](flags)
        parts += [f"## {PARTS[part][1]}", PARTS[part][2].format(flags=flags)]
        for kind in flags.kinds:
            name = f"ssql_{part}_{kind}.svg"
            shown = chart(found, (kind, PARTS[part][3]), titles)
            (flags.output / name).write_text(shown)
            parts.append(f"![{kind}: {WORDS[PARTS[part][3]]}]({name})")
        for table in tables(found, titles):
            parts += [f"### {table.title}", summary.table_markdown(table)]
    text = "\n\n".join(parts)
    (flags.output / "ssql_speech.md").write_text(text + "\n")
    print(text)


PARTS = {
    "encoders": (
        encoders,
        "Encoders trained without text",
        "{flags.steps} steps of masked prediction, seeds {flags.seeds}: mean and standard "
        "deviation. Linear probes of frozen features.",
        "text",
    ),
    "tokenizers": (
        tokenizers,
        "Tokenizers",
        "Those of the run, and after {flags.tokenizer_steps} more steps with SSQL, or twice as "
        "many without; seed 0.",
        "code",
    ),
}
"""{name: (its experiment, title, what it is, the probe that is drawn)}."""


if __name__ == "__main__":
    main()
