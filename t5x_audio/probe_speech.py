r"""Judges a trained encoder of speech by probes of its features, quantised to several widths.

    python -m t5x_audio.probe_speech --gin_file=gin/runs/probe_speech.gin \
      --model_dir=runs/speech/linguistic_ssql --manifest=digits.jsonl

Writes <model_dir>/<name>.json: for each probe its figure at each pair of bits. The model is a
tokenizer, or what pretrains its encoder; quantisation is simulated. Recordings of the splits
'validation' and 'test' are told by what is learnt from those of 'train'. Probes, of which those
are taken that are asked for (`probe_speech.run.probes`):

- text, speaker: accuracy of a linear classifier of a recording's mean feature;
- unit: accuracy of a linear classifier of single features, phone-like units (`speech_probe.py`);
- code: share of the tokenizer's codes that stay as they are without quantisation;
- usage: share of the codebook that occurs;
- recognition: error rate of the tokenizer's own CTC head, of the units that it was trained on.
"""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from t5x_audio.errors import UserError

if TYPE_CHECKING:
    from t5x_audio.evaluation.linear_probe import LinearProbe

PROBES = ("text", "speaker", "unit", "code", "usage", "recognition")


def run(
    *,
    model_dir: str,
    manifest: str | None = None,
    folder: str | None = None,
    validation: float = 0.1,
    test: float = 0.0,
    run_dir: str | None = None,
    name: str = "probe",
    probes: Sequence[str] = ("text", "speaker"),
    bits: Sequence[tuple[int, int]] = (),
    calibration_recordings: int = 32,
    num_units: int = 50,
    min_rate: int = 8000,
    seed: int = 0,
    probe: "LinearProbe | None" = None,
) -> dict[str, Any]:
    """Probes and writes the figures.

    Args:
      model_dir: a tokenizer or a `MaskedPrediction`.
      manifest, folder: the recordings, see `data.sources`.
      validation, test: shares of the splits where the source names none.
      run_dir: whose vocabulary a linguistic tokenizer was trained on; for 'recognition'.
      name: of the file that is written.
      probes: of PROBES.
      bits: (of weights, of activations); (0, 0) is unquantised; () all that SSQL is judged at.
      calibration_recordings: training recordings, the first ones, for the ranges.
      num_units: clusters of 'unit'.
      min_rate: lowest sampling rate in Hz of the recordings.
      seed: of the clusters.
      probe: how classifiers learn; None = `speech_probe.PROBE`.

    Returns:
      step, recordings (held out), and {probe: {'FP': figure, 'W4A4': ...}}.

    Raises:
      UserError: no such model, recordings, probe or bits, or a range that cannot be taken.
    """
    from tqdm import tqdm

    from t5x_audio import launch
    from t5x_audio.data import sources
    from t5x_audio.evaluation import linear_probe, speech_probe
    from t5x_audio.evaluation.quantized_speech import QuantizedSpeech
    from t5x_audio.training import checkpoints

    pairs = [tuple(pair) for pair in bits] or list(linear_probe.BIT_PAIRS)
    for pair in pairs:
        linear_probe.require_pair(pair)
    if strange := set(probes) - set(PROBES):
        raise UserError(f"probe_speech.run.probes: {min(strange)!r} is none of {', '.join(PROBES)}")
    source = sources.choose(manifest=manifest, folder=folder, validation=validation, test=test)
    if source is None:
        raise UserError("no recordings: name them with --manifest or --folder")
    train, held_out = _clips(source, min_rate)
    model = checkpoints.load_model(model_dir)
    speech = QuantizedSpeech(model, [clip.samples for clip in train[:calibration_recordings]])
    judge = _Judge(speech, train, held_out, probe or speech_probe.PROBE)
    _require(judge.tokenizer, model, probes)
    if "unit" in probes:
        judge.cluster(num_units, seed)
    if "recognition" in probes:
        judge.spell(run_dir)
    figures: dict[str, dict[str, float]] = {one: {} for one in probes}
    for pair in tqdm(pairs, desc=name, unit="pair"):
        for one, figure in judge(pair, probes).items():
            figures[one][linear_probe.bit_name(pair)] = figure
    step = checkpoints.checkpoint_steps(model_dir)[-1]
    result = {"step": step, "recordings": len(held_out)} | figures
    path = os.path.join(model_dir, f"{name}.json")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=2)
    os.replace(f"{path}.tmp", path)
    launch.save_operative_config(model_dir)
    return result


def _clips(source, min_rate: int):
    """(training, held-out) clips."""
    from t5x_audio.data.recordings import Limits

    limits = Limits(max_seconds=60.0, min_rate=min_rate)
    found: tuple[list, list] = ([], [])
    for split in source.sizes():
        for one in source.shard(split, 0, 1):
            found[split != "train"].append(one.clip(limits))
    for clips, what in zip(found, ("training", "held-out"), strict=True):
        if not clips:
            raise UserError(f"there are no {what} recordings; give other shares, --validation=0.1")
    return found


def _require(tokenizer, model, probes: Sequence[str]) -> None:
    """UserError for a probe of what the model lacks."""
    if tokenizer is not model and (wrong := {"code", "usage", "recognition"} & set(probes)):
        raise UserError(
            f"probe_speech.run.probes: {min(wrong)!r} is of a tokenizer, and this model only "
            "pretrains the encoder of one; leave it away"
        )
    if "recognition" in probes and not tokenizer.config.text_size:
        raise UserError("probe_speech.run.probes: 'recognition' needs a CTC head; leave it away")


class _Judge:
    """Every probe at some bits."""

    def __init__(self, speech, train, held_out, probe):
        self.tokenizer, self._speech, self._probe = speech.tokenizer, speech, probe
        self._clips = train, held_out
        self._audio = tuple([clip.samples for clip in clips] for clips in self._clips)
        self._units = self._count = self._texts = None

    def cluster(self, count: int, seed: int) -> None:
        """Makes the units."""
        from t5x_audio.evaluation import speech_probe

        frames = round(100 / self.tokenizer.frame_rate)
        self._units, self._count = speech_probe.units(*self._audio, frames, count, seed), count

    def spell(self, run_dir: str | None) -> None:
        """Takes the held-out texts in the units of the tokenizer's head."""
        from t5x_audio.data.audio_reader import text_encoder
        from t5x_audio.tokenizers.semantic import SemanticTokenizer

        kind = "bytes" if isinstance(self.tokenizer, SemanticTokenizer) else "pieces"
        if kind == "pieces" and run_dir is None:
            raise UserError("'recognition' needs the vocabulary of a run: give --run_dir")
        encode = text_encoder(kind, run_dir or "")
        self._texts = [_words(encode(clip.text)) for clip in self._clips[1]]

    def __call__(self, pair, probes: Sequence[str]) -> dict[str, float]:
        from t5x_audio.evaluation import quantized_speech, speech_probe, token_agreement, wer

        found, sides = {}, None
        if {"text", "speaker", "unit"} & set(probes):
            sides = [self._speech(quantized_speech.features, x, pair) for x in self._audio]
        for one in ("text", "speaker"):
            if one in probes:
                labels = [[getattr(clip, one) for clip in clips] for clips in self._clips]
                arguments = (sides[0], labels[0], sides[1], labels[1])
                found[one] = speech_probe.of_recordings(*arguments, self._probe)
        if "unit" in probes:
            arguments = (sides[0], self._units[0], sides[1], self._units[1])
            found["unit"] = speech_probe.of_frames(*arguments, self._count, self._probe)
        if {"code", "usage"} & set(probes):
            (same,) = token_agreement.token_agreement(self._speech, self._audio[1], [pair])
            both = {"code": same["agreement"], "usage": same["usage"]}
            found |= {one: both[one] for one in both if one in probes}
        if "recognition" in probes:
            heard = self._speech(quantized_speech.recognised, self._audio[1], pair)
            found["recognition"] = wer.word_error_rate(self._texts, [_words(x) for x in heard])
        return {one: found[one] for one in probes}


def _words(ids) -> str:
    return " ".join(map(str, ids))


def _add_flags(parser) -> None:
    parser.add_argument("--manifest", help="JSONL file of recordings")
    parser.add_argument("--folder", help="folder of sound files, with texts beside them")
    parser.add_argument("--validation", type=float, help="share that is held out; default 0.1")
    parser.add_argument("--test", type=float, help="share that is held out too; default 0")
    parser.add_argument("--run_dir", help="whose vocabulary the tokenizer was trained on")
    parser.add_argument("--name", help="of the file that is written; default probe")


if __name__ == "__main__":
    from t5x_audio import launch

    launch.main("t5x_audio.probe_speech", description=__doc__, add_flags=_add_flags)
