"""Makes speech of codes, and of a mel, and measures what is lost on the way.

Every clip is heard as it is, as its own mel through HiFT, from the codes of both codebooks, at once
and as a stream, and from those of one; see `evaluation/resynthesis.py`. Clips are a run's held-out
ones, or those of a JSONL manifest or a folder, which are tokenised here.

What is written, in `<run_dir>/resynthesis/`: `results.json` (all figures and every clip),
`results.md` (the table), `speech/<version>/<clip>.flac`, and spectrograms of a few. Every clip is
kept as it comes, so an interrupted job goes on where it stopped and a finished one is not repeated.

    python -m t5x_audio.evaluate_resynthesis --gin_file=gin/models/demo.gin \
        --gin_file=gin/runs/evaluate_resynthesis.gin --gin.RUN_DIR=runs/demo
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CLIPS, SPEECH = "clips.jsonl", "speech"
SINGLE_FLOWS = {name: f"flow_{name}" for name in ("semantic", "linguistic")}
"""Where a flow that was trained with one codebook alone is, if there is one."""

_ALONE = "a flow trained with the {name} codes alone ({folder}/)"
_MASKED = (
    "the flow that was trained with both, unable to tell {other} codes apart (their vectors are "
    "replaced by the mean): how far the {name} codes carry it, not what a vocoder that was trained "
    "with them alone would make"
)


def run(
    *,
    run_dir: str,
    mel,
    embed: Callable[[Sequence[Any]], Any],
    model_dir: str | None = None,
    corpora: Sequence[str] | None = None,
    split: str = "test",
    roles: Sequence[str] | None = None,
    manifest: str | None = None,
    folder: str | None = None,
    normalization: str = "english",
    max_seconds: float = 30.0,
    voice: str = "clip",
    num_clips: int | None = 24,
    num_rated: int | None = None,
    num_examples: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    make_judges: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Evaluates the tokenizers and the vocoder of a run.

    Args:
      run_dir: the run, e.g. runs/demo; of it the tokenizers, flow/ and hift/ are needed.
      mel: `features.MelConfig` that HiFT was trained on.
      embed: waveforms float32 [T_i] at 16 kHz -> speaker vectors [N, D] as the flow was trained.
      model_dir: where the results go; None = `<run_dir>/resynthesis`.
      corpora: names of the run's corpora; None = all.
      split, roles: whose clips of the run; roles None = all.
      manifest, folder: recordings of a source instead, see `data.sources`.
      normalization: of a source's texts: 'english' or 'none'.
      max_seconds: longer clips are left out.
      voice: 'clip', each clip's own speaker vector, or 'answer', that of the run's answers.
      num_clips: how many, always the same ones; None = all.
      num_rated: how many get a DNSMOS, 3 s of a core for each of the 6 versions; None = all.
      num_examples: how many get spectrograms.
      batch_size: clips worked on, and kept, at a time.
      seed: of the vocoder's noise.
      make_judges: -> `judges.Judges`; None = the project's.

    Returns:
      The figures, flat.

    Raises:
      UserError: a part of the run or a recording is missing, or of another size.
    """
    from t5x_audio import evaluate, launch
    from t5x_audio.data import sources
    from t5x_audio.errors import UserError
    from t5x_audio.evaluation import results_folder, resynthesis
    from t5x_audio.serving.model_dir import SOUND_PARTS, RunDirectory

    root = RunDirectory(run_dir)
    sizes = root.check_sound()
    target = pathlib.Path(model_dir or root.resynthesis)
    if voice not in ("clip", "answer"):
        raise UserError(f"evaluate_resynthesis.run.voice={voice!r}: there are 'clip' and 'answer'")
    source = sources.choose(manifest=manifest, folder=folder)
    alone = [name for name in SINGLE_FLOWS.values() if root.stage(name).is_dir()]
    settings = {
        "weights": root.fingerprint((*SOUND_PARTS, *alone)),
        "mel": dataclasses.asdict(mel),
        "clips": source.facts() if source else [corpora and list(corpora), split],
        "roles": roles and list(roles),
        "normalization": normalization,
        "max_seconds": max_seconds,
        "voice": voice,
        "num_clips": num_clips,
        "num_rated": num_rated,
        "num_examples": num_examples,
        "seed": seed,
    }
    if results := results_folder.finished(target, settings):
        print(f"already evaluated: {target}", file=sys.stderr)
        return results["figures"]
    if source:
        clips = _clips_of_source(source, run_dir, num_clips, max_seconds, normalization)
    else:
        clips = _clips_of_run(root, sizes[0], corpora, split, roles, num_clips, max_seconds)
    results_folder.begin(target, settings, (CLIPS, SPEECH))
    versions, notes = load_versions(root, sizes, clips, mel, seed)
    voices = _voices(root, voice, embed)
    judges = (make_judges or evaluate.default_judges)()
    rows = evaluate_all(clips, versions, voices, judges, mel, target, batch_size, num_rated)
    figures = resynthesis.summarise(rows)
    distance = figures["stream_mel_distance_from_whole"]
    notes["stream"] += f"; its mel is {distance:.2f} dB from theirs"
    results = {
        "figures": figures,
        "notes": notes,
        "seed": seed,
        "settings": settings,
        "clips": rows,
    }
    results["examples"] = _draw_examples(rows[:num_examples], target)
    launch.save_operative_config(target)
    results_folder.write(target / results_folder.TABLES, tables(results))
    results_folder.write(target / results_folder.RESULTS, json.dumps(results, indent=1) + "\n")
    return figures


def _clips_of_run(root, linguistic_size, corpora, split, roles, limit, max_seconds):
    from t5x_audio.data import audio_reader, records
    from t5x_audio.errors import UserError
    from t5x_audio.evaluation import speech_clips

    if split not in records.SPLITS:
        known = ", ".join(records.SPLITS)
        raise UserError(f"evaluate_resynthesis.run.split={split!r}: there are {known}")
    names = [pathlib.Path(place).name for place in audio_reader.corpora_of(root.root, corpora)]
    places = [(root.corpus(name), root.tokens(name)) for name in names]
    options = {"roles": roles, "limit": limit, "max_seconds": max_seconds}
    return speech_clips.of_run(places, split, linguistic_size, **options)


def _clips_of_source(source, run_dir, limit, max_seconds, normalization):
    from t5x_audio import tokenize_corpus
    from t5x_audio.data import recordings
    from t5x_audio.evaluation import speech_clips

    recordings.require_normalization(normalization)
    return speech_clips.of_source(
        source,
        tokenize_corpus.load_tokenizer(run_dir),
        limits=recordings.Limits(max_seconds),
        limit=limit,
        normalization=normalization,
    )


def load_versions(root, sizes: tuple[int, int], clips: Sequence, mel, seed: int):
    """Everything that makes a version of a clip.

    Args:
      root: the `RunDirectory`.
      sizes: of the linguistic and the semantic codebook.
      clips: all `SpeechClip`s, in which codes are counted.
      mel: see `run`.
      seed: of the noise.

    Returns:
      ({version: (clip, speaker vector) -> float32 [T] at the vocoder's rate},
      {version: note for people}).

    Raises:
      UserError: `mel` is not that of the vocoder, or a flow of one codebook is of other sizes.
    """
    import numpy as np

    from t5x_audio.audio import io
    from t5x_audio.errors import UserError
    from t5x_audio.evaluation import resynthesis
    from t5x_audio.tokenizers import dual_codebook
    from t5x_audio.training import checkpoints
    from t5x_audio.vocoder.token_vocoder import TokenVocoder

    flow = checkpoints.load_model(root.flow)
    vocoder = TokenVocoder(flow, checkpoints.load_model(root.hift, "generator"))
    for name in ("sample_rate", "hop", "num_mels"):
        ours, theirs = getattr(mel, name), getattr(vocoder.hift_config, name)
        if ours != theirs:
            raise UserError(
                f"features.MelConfig.{name}={ours} but the vocoder of {root.root} has {theirs}; "
                f"give the mel it was trained on, --gin.features.MelConfig.{name}={theirs}"
            )

    def recorded(clip, _):
        return io.resample(clip.samples, 16000, mel.sample_rate)

    def copied(clip, _):
        return vocoder.vocode(resynthesis.log_mel(recorded(clip, _), mel), seed=seed)

    def spoken(which, codebook=None):
        def speak(clip, vector):
            codes = clip.codes
            if codebook is not None:
                codes = dual_codebook.only(codes, sizes[0], codebook)
            return which.synthesize(codes, vector, seed=seed)

        return speak

    def streamed(clip, vector):
        stream = vocoder.stream(vector, seed=seed)  # all at once gives what blocks give
        return np.concatenate([stream.push(clip.codes), stream.finish()])

    versions = {"recording": recorded, "copy": copied, "both": spoken(vocoder), "stream": streamed}
    notes = {
        "recording": "what the judges make of the recordings themselves",
        "copy": "each recording's own mel through HiFT: what HiFT alone loses",
        "both": "codes of both codebooks through flow matching and HiFT",
        "stream": "the same codes as they would come, block after block of an answer",
    }
    counts = np.bincount(np.concatenate([clip.codes for clip in clips]), minlength=sum(sizes))
    # Where each codebook's rows are: the semantic ones end the table of every kind of flow.
    places = {"linguistic": 0, "semantic": flow.embedding.num_embeddings - sizes[1]}
    counts = {"linguistic": counts[: sizes[0]], "semantic": counts[sizes[0] :]}
    for name, other in (("semantic", "linguistic"), ("linguistic", "semantic")):
        folder = root.stage(SINGLE_FLOWS[name])
        if folder.is_dir():
            versions[name] = spoken(vocoder.with_flow(checkpoints.load_model(folder)), name)
            notes[name] = _ALONE.format(name=name, folder=folder.name)
        else:
            masked = resynthesis.without_codebook(flow, places[other], counts[other])
            versions[name] = spoken(vocoder.with_flow(masked))
            notes[name] = _MASKED.format(name=name, other=other)
    return versions, notes


def _voices(root, voice: str, embed):
    """Recordings -> speaker vectors [N, D]."""
    import numpy as np

    from t5x_audio.serving.voice import answer_voice

    if voice == "clip":
        return lambda recordings: np.asarray(embed(recordings), np.float32)
    vector = answer_voice(root)
    return lambda recordings: np.tile(vector, (len(recordings), 1))


def evaluate_all(
    clips, versions, voices, judges, mel, target: pathlib.Path, batch_size: int, num_rated
) -> list[dict[str, Any]]:
    """Speaks, judges and compares what `clips.jsonl` does not have yet; one row a clip.

    Args:
      clips: `SpeechClip`s.
      versions: of `load_versions`.
      voices: recordings -> speaker vectors.
      judges: who listens.
      mel, batch_size, num_rated: see `run`.
      target: the folder of the results.
    """
    import tqdm

    from t5x_audio.evaluation import results_folder

    path = target / CLIPS
    known = results_folder.read_rows(path)
    progress = tqdm.tqdm(total=len(clips), initial=len(known), desc="clips", unit="clip")
    with progress, path.open("a") as file:
        while len(known) < len(clips):
            start = len(known)
            batch = clips[start : start + batch_size]
            names = [_file_name(start + i, clip.id) for i, clip in enumerate(batch)]
            sounds = _speak(batch, names, versions, voices, mel.sample_rate, target / SPEECH)
            rated = None if num_rated is None else max(0, num_rated - start)
            for row in _judge(batch, names, sounds, judges, mel, rated):
                known[row["id"]] = row
                file.write(json.dumps(row) + "\n")
            file.flush()
            progress.update(len(batch))
    return [known[clip.id] for clip in clips]


def _file_name(number: int, name: str) -> str:
    return f"{number:04d}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)[-80:]}"


def _speak(batch, names, versions, voices, rate: int, folder: pathlib.Path):
    """One {version: float32 [T] at `rate`} a clip; each is kept as a file, and read where it is."""
    import soundfile

    from t5x_audio.audio import io

    vectors = voices([clip.samples for clip in batch])
    sounds = []
    for clip, name, vector in zip(batch, names, vectors, strict=True):
        made = {}
        for version, make in versions.items():
            path = folder / version / f"{name}.flac"
            if not path.exists():
                io.save(path, make(clip, vector), rate)
            made[version] = soundfile.read(path, dtype="float32")[0]
        sounds.append(made)
    return sounds


def _judge(batch, names, sounds, judges, mel, rated: int | None) -> list[dict[str, Any]]:
    import numpy as np

    from t5x_audio.audio import io
    from t5x_audio.evaluation import resynthesis
    from t5x_audio.evaluation.judges import JUDGE_RATE, character_errors, word_errors

    versions = resynthesis.VERSIONS
    heard = [
        io.resample(made[version], mel.sample_rate, JUDGE_RATE)
        for made in sounds
        for version in versions
    ]
    own = np.repeat(judges.embed([clip.samples for clip in batch]), len(versions), axis=0)
    shown = dataclasses.replace(judges, num_rated=rated and rated * len(versions))
    judged = iter(shown.listen(heard, own))
    rows = []
    for clip, name, made in zip(batch, names, sounds, strict=True):
        row = {"id": clip.id, "file": name, "text": clip.text}
        row["seconds"] = len(clip.samples) / JUDGE_RATE
        compared = resynthesis.compare(made["recording"], made, mel)
        for version in versions:
            row[version] = next(judged) | compared[version]
            if clip.text:
                said = row[version]["heard"], clip.text
                row[version] |= word_errors(*said) | character_errors(*said)
        rows.append(row)
    return rows


def _draw_examples(rows: Sequence[Mapping[str, Any]], target: pathlib.Path) -> list[str]:
    """Draws the spectrogram of each version beside its sound; returns the names of the clips."""
    import soundfile

    from t5x_audio.evaluation import report, spectrogram

    for row in rows:
        for path in target.glob(f"{SPEECH}/*/{row['file']}.flac"):
            picture = spectrogram.spectrogram_png(*soundfile.read(path), report.SPECTROGRAM_COLOUR)
            path.with_suffix(".png").write_bytes(picture)
    return [row["file"] for row in rows]


def tables(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    from t5x_audio.evaluation.summary import table_section
    from t5x_audio.make_report import resynthesis_tables

    return "\n\n".join(map(table_section, resynthesis_tables(results))) + "\n"


def _add_flags(parser) -> None:
    parser.add_argument("--manifest", help="JSONL file of recordings, instead of the run's own")
    parser.add_argument("--folder", help="folder of sound files, with texts beside them if any")


if __name__ == "__main__":
    from t5x_audio import launch

    launch.main("t5x_audio.evaluate_resynthesis", description=__doc__, add_flags=_add_flags)
