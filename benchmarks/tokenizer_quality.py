# ruff: noqa: E402
"""The tokenizers of a run on recordings: use of the codebooks, codes under noise, in segments and
by quantised encoders.

    python benchmarks/tokenizer_quality.py --run_dir=runs/speech --manifest=speech.jsonl

Usage is the share of a codebook that occurs, perplexity 2 to the entropy of its codes; both also
for the held-out recordings alone. Token error is the share of codes that change: when noise or
another talker is added at a ratio of powers, when encoders that see their whole input get it in
segments, as a stream does, instead of 30 s at a time, and when they are quantised. The page goes to
docs/results/.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import sys

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from t5x_audio import tokenize_corpus
from t5x_audio.audio import augment
from t5x_audio.data import manifests
from t5x_audio.data.recordings import Limits
from t5x_audio.evaluation import summary
from t5x_audio.evaluation.quantized_speech import QuantizedSpeech
from t5x_audio.evaluation.token_agreement import token_agreement
from t5x_audio.tokenizers import dual_codebook

STREAMS = ("linguistic", "semantic")
RATIOS = (30, 20, 10, 5, 0)  # dB
SEGMENTS = (0.48, 0.96, 1.92, 3.84)  # seconds
BITS = ((8, 8), (6, 6), (5, 5), (4, 4), (3, 3), (2, 4))  # of weights, of activations
CALIBRATION = 16  # recordings that are not held out
KINDS = {"white noise": (0.0, 0.0), "pink noise": (0.0, 1.0), "another talker": (1.0, 0.0)}


def recordings(manifest: str, validation: float) -> tuple[list[np.ndarray], list[bool]]:
    """Float [T] of all, and which were held out."""
    source, found, held_out = manifests.Manifest(manifest, validation, 0.02), [], []
    for split in source.sizes():
        for one in source.shard(split, 0, 1):
            found.append(one.clip(Limits(max_seconds=40.0)).samples)
            held_out.append(split != "train")
    return found, held_out


def codebook_use(codes: list[np.ndarray], size: int) -> tuple[float, float]:
    """(usage, perplexity) of a codebook."""
    counts = np.bincount(np.concatenate(codes), minlength=size)
    shares = counts[counts > 0] / counts.sum()
    return float(np.mean(counts > 0)), float(np.exp(-(shares * np.log(shares)).sum()))


def token_error(codes: list[np.ndarray], clean: list[np.ndarray]) -> float:
    """Share of codes that differ, over all recordings."""
    pairs = [(a[: len(b)], b[: len(a)]) for a, b in zip(codes, clean, strict=True)]
    return float(np.mean(np.concatenate([a != b for a, b in pairs])))


def noisy(waveforms: list[np.ndarray], kind: str, ratio: float) -> list[np.ndarray]:
    """Each waveform with noise, or with the one before it, at a ratio in dB."""
    talker, exponent = KINDS[kind]
    found = []
    for number, samples in enumerate(waveforms):
        other = np.resize(waveforms[number - 1], len(samples))
        # The row before is the other talker; padded, so that few lengths are compiled.
        size = -(-len(samples) // 32000) * 32000
        rows = np.zeros((2, size), np.float32)
        rows[0, : len(samples)], rows[1, : len(samples)] = other, samples
        key = jax.random.fold_in(jax.random.key(0), number)
        lengths = np.array([len(samples)] * 2)
        if talker:
            made = _mix(key, rows, lengths, 1.0, 0.0, ratio)
        else:
            made = _mix(key, rows, lengths, 0.0, exponent, ratio)
        found.append(np.asarray(made[1, : len(samples)]))
    return found


@jax.jit
def _mix(key, audio, lengths, talker, exponent, ratio):
    return augment.add_noise(
        key, audio, lengths, probability=1.0, speech_share=talker, min_snr_db=ratio,
        max_snr_db=ratio, max_exponent=exponent,
    )  # fmt: skip


def streams(tokenizer, waveforms) -> dict[str, list[np.ndarray]]:
    pairs = tokenizer.encode_batch(waveforms)
    return {name: [pair[i] for pair in pairs] for i, name in enumerate(STREAMS)}


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def use_table(codes, held_out, sizes) -> summary.Table:
    rows = []
    for name in STREAMS:
        usage, perplexity = codebook_use(codes[name], sizes[name])
        kept = [one for one, out in zip(codes[name], held_out, strict=True) if out]
        held_usage, held_perplexity = codebook_use(kept, sizes[name])
        rows.append(
            (name, str(sizes[name]), str(sum(map(len, codes[name]))), percent(usage))
            + (f"{perplexity:.0f}", percent(held_usage), f"{held_perplexity:.0f}")
        )
    columns = ("codebook", "codes", "tokens", "usage", "perplexity", "usage, held out")
    return summary.Table("Use of the codebooks", (*columns, "perplexity, held out"), tuple(rows))


def noise_table(tokenizer, waveforms, clean) -> summary.Table:
    rows = []
    for kind in KINDS:
        for name in STREAMS:
            errors = []
            for ratio in RATIOS:
                codes = streams(tokenizer, noisy(waveforms, kind, float(ratio)))
                errors.append(percent(token_error(codes[name], clean[name])))
            rows.append((kind, name, *errors))
    columns = ("added", "codes", *(f"{ratio} dB" for ratio in RATIOS))
    return summary.Table("Token error of held-out recordings under noise", columns, tuple(rows))


def segment_table(tokenizer, waveforms, clean) -> summary.Table:
    rows = {name: [] for name in STREAMS}
    for seconds in SEGMENTS:
        cut = dual_codebook.DualCodebookTokenizer(tokenizer.linguistic, tokenizer.semantic, seconds)
        codes = streams(cut, waveforms)
        for name in STREAMS:
            rows[name].append(percent(token_error(codes[name], clean[name])))
    columns = ("codes", *(f"{seconds:g} s" for seconds in SEGMENTS))
    cells = tuple((name, *row) for name, row in rows.items())
    return summary.Table("Token error in segments, beside pieces of 30 s", columns, cells)


def quantised_table(tokenizer, waveforms, calibration) -> summary.Table:
    rows = []
    for name in STREAMS:
        speech = QuantizedSpeech(getattr(tokenizer, name), calibration)
        found = token_agreement(speech, waveforms, BITS)
        errors = [percent(1.0 - one["agreement"]) for one in found]
        rows.append((name, "token error", *errors))
        usage = [percent(one["usage"] / one["plain_usage"]) for one in found]
        rows.append((name, "usage, of the plain encoder's", *usage))
    columns = ("codes", "", *(f"W{weights}A{activations}" for weights, activations in BITS))
    return summary.Table("Quantised encoders, held-out recordings", columns, tuple(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run_dir", required=True)
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--validation", type=float, default=0.1, help="share that was held out")
    parser.add_argument("--remark", default="", help="a sentence for the page: what data this was")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    flags = parser.parse_args()
    tokenizer = tokenize_corpus.load_tokenizer(flags.run_dir)
    sizes = {"linguistic": tokenizer.linguistic_size, "semantic": tokenizer.semantic_size}
    waveforms, held_out = recordings(flags.manifest, flags.validation)
    codes = streams(tokenizer, waveforms)
    kept = [x for x, out in zip(waveforms, held_out, strict=True) if out]
    learnt = [x for x, out in zip(waveforms, held_out, strict=True) if not out]
    clean = {n: [x for x, o in zip(codes[n], held_out, strict=True) if o] for n in STREAMS}
    tables = [
        use_table(codes, held_out, sizes),
        noise_table(tokenizer, kept, clean),
        segment_table(tokenizer, kept, clean),
        quantised_table(tokenizer, kept, learnt[:CALIBRATION]),
    ]
    words = [word for word in sys.argv[1:] if not word.startswith("--remark")]
    parts = [
        "# The tokenizers on recorded speech",
        f"Made by `python benchmarks/tokenizer_quality.py {' '.join(words)}` (seed 0; "
        f"{os.cpu_count()} cores, {platform.machine()}, {datetime.date.today()}; "
        f"jax {importlib.metadata.version('jax')}).",
        f"{len(waveforms)} recordings, {sum(held_out)} of them held out. {flags.remark}".strip(),
    ]
    for table in tables:
        parts += [f"## {table.title}", summary.table_markdown(table)]
    text = "\n\n".join(parts)
    (flags.output / "tokenizers.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
