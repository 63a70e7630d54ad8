"""Resynthesis with a whole, untrained run, with judges that cost nothing."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from t5x_audio import evaluate_resynthesis, launch, tokenize_corpus
from t5x_audio.audio import io
from t5x_audio.audio.features import MelConfig
from t5x_audio.data import records
from t5x_audio.errors import UserError
from t5x_audio.evaluation.judges import Judges
from t5x_audio.evaluation.resynthesis import VERSIONS
from t5x_audio.serving.model_dir import RunDirectory
from t5x_audio.training import checkpoints
from t5x_audio.vocoder import token_vocoder
from t5x_audio.vocoder.token_vocoder import TokenVocoder

MEL = MelConfig(sample_rate=16000, hop=256, num_mels=8)


def _judges():
    def embed(sound):
        levels = np.array([np.abs(samples).mean() for samples in sound])
        return np.stack([np.ones(len(sound)), levels], axis=1)

    return Judges(lambda sound: ["the opposite of hot is cold"] * len(sound), lambda _: 2.0, embed)


def _embed(sound):
    return np.random.default_rng(len(sound)).random((len(sound), 256), np.float32)


def _evaluate(root, **settings):
    settings = {"num_clips": 3, "num_rated": 2, "num_examples": 1, "batch_size": 2} | settings
    settings = {"mel": MEL, "embed": _embed, "roles": ("answer",)} | settings
    return evaluate_resynthesis.run(run_dir=str(root), make_judges=_judges, **settings)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """Every vocoder is the first one with another flow."""
    made = []

    def make(flow, hift):
        made.append(TokenVocoder(flow, hift, (16,)) if not made else made[0].with_flow(flow))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_vocoder, "TokenVocoder", make)
        yield


@pytest.fixture(scope="module")
def evaluated(run_dir, tmp_path_factory):
    """A run and its figures; evaluated once."""
    root = shutil.copytree(run_dir, tmp_path_factory.mktemp("resynthesis") / "run")
    hift = checkpoints.load_model(root / "hift", "generator")
    hift.conv_post.scale[...] *= 0.02  # else all is clipped
    checkpoints.save_model(root / "hift", {"generator": hift.config}, {"generator": hift})
    _vary_codes(root / "tokens" / "spoken_qa")
    return root, _evaluate(root)


def _vary_codes(tokens):
    """Codes that no untrained tokenizer would give: that one says the same all the time."""
    rng, found = np.random.default_rng(0), list(records.open_records(tokens, "test"))
    with records.RecordWriter(tokens, "test") as writer:
        for record in found:
            streams = {"linguistic": 16, "semantic": 24}
            writer.write(
                record
                | {name: rng.integers(0, n, len(record[name])) for name, n in streams.items()}
            )


def test_results(evaluated):
    root, figures = evaluated
    folder = root / "resynthesis"
    results = json.loads((folder / "results.json").read_text())
    assert results["figures"] == figures and figures["clips"] == len(results["clips"]) == 3
    assert all(figures[f"{version}_dnsmos"] == 2.0 for version in VERSIONS)
    assert [row["both"]["mos"] for row in results["clips"]] == [2.0, 2.0, None]
    # All judges hear one sentence, which is one answer, if that was drawn.
    texts = [row["text"] for row in results["clips"]]
    assert figures["recording_wer"] == figures["both_wer"]
    assert (figures["both_wer"] == 0) == (set(texts) == {"the opposite of hot is cold"})
    assert figures["copy_mel_distance"] > 0 and figures["both_mel_distance"] > 0
    # Without the codes of either codebook other sound is made.
    distances = [figures[f"{name}_mel_distance"] for name in ("both", "semantic", "linguistic")]
    assert len(set(distances)) == 3
    table = (folder / "results.md").read_text()
    assert "| semantic codes only |" in table and "unable to tell linguistic codes apart" in table
    assert f"{figures['stream_mel_distance_from_whole']:.2f} dB from theirs" in table
    for row in results["clips"]:
        lengths = [
            len(io.load(folder / "speech" / version / f"{row['file']}.flac", check_silence=False))
            for version in VERSIONS
        ]
        assert max(lengths) - min(lengths) < 0.12 * 16000  # less than a group of codes
    pictures = {path.parent.name for path in folder.glob("speech/*/*.png")}
    assert pictures == set(VERSIONS)


def test_finished_is_not_repeated_and_other_settings_are(evaluated, capsys):
    root, figures = evaluated
    assert _evaluate(root) == figures
    assert "already evaluated" in capsys.readouterr().err
    with pytest.raises(UserError, match="no tokens of split 'validation'"):
        _evaluate(root, split="validation")
    assert (root / "resynthesis" / "results.json").is_file()


def test_interrupted_goes_on(evaluated, tmp_path):
    root = shutil.copytree(evaluated[0], tmp_path / "run")
    folder = root / "resynthesis"
    (folder / "results.json").unlink()
    lines = (folder / "clips.jsonl").read_text().splitlines(keepends=True)
    (folder / "clips.jsonl").write_text("".join(lines[:2]) + lines[2][:20])  # cut off
    kept = next((folder / "speech" / "both").glob("0000-*.flac"))
    lost = next((folder / "speech" / "both").glob("0002-*.flac"))
    lost.unlink()
    before = kept.stat().st_mtime_ns
    assert _evaluate(root) == evaluated[1]
    assert (folder / "clips.jsonl").read_text() == "".join(lines)
    assert kept.stat().st_mtime_ns == before and lost.is_file()


def test_a_flow_of_one_codebook_is_used_where_there_is_one(evaluated, tmp_path):
    root = shutil.copytree(evaluated[0], tmp_path / "run")
    shutil.copytree(root / "flow", root / "flow_semantic")
    figures = _evaluate(root, num_clips=1)
    results = json.loads((root / "resynthesis" / "results.json").read_text())
    assert "trained with the semantic codes alone (flow_semantic/)" in results["notes"]["semantic"]
    assert "unable to tell semantic codes apart" in results["notes"]["linguistic"]
    assert figures["semantic_mel_distance"] > 0


def test_recordings_of_a_manifest(evaluated, parts, tmp_path, caplog, monkeypatch):
    root, _ = evaluated
    monkeypatch.setattr(tokenize_corpus, "load_tokenizer", lambda _: parts["tokenizer"])
    for name, pitch in (("a", 110), ("b", 150)):
        tone = 0.3 * np.sin(2 * np.pi * pitch * np.arange(30000) / 24000)
        io.save(tmp_path / f"{name}.wav", tone.astype(np.float32), 24000)
    (tmp_path / "c.wav").write_bytes(b"no sound")
    rows = [{"audio": "a.wav", "text": "The opposite of hot is cold."}, {"audio": "b.wav"}]
    lines = "\n".join(map(json.dumps, [*rows, {"audio": "c.wav"}]))
    (tmp_path / "m.jsonl").write_text(lines)
    settings = {"manifest": str(tmp_path / "m.jsonl"), "model_dir": str(tmp_path / "out")}
    figures = _evaluate(root, voice="answer", **settings)
    assert figures["clips"] == 2 and figures["both_cer"] == 0.0
    assert "c.wav" in caplog.text


def test_wrong_settings_are_named(evaluated, tmp_path):
    root, _ = evaluated
    with pytest.raises(UserError, match="voice='mine'"):
        _evaluate(root, voice="mine")
    with pytest.raises(UserError, match="split='dev'"):
        _evaluate(root, split="dev")
    with pytest.raises(UserError, match="MelConfig.hop=240 but the vocoder of .* has 256"):
        _evaluate(root, mel=dataclasses.replace(MEL, hop=240), model_dir=str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no sound"):
        _evaluate(root, folder=str(tmp_path / "empty"))


def test_missing_and_foreign_parts_are_named(run_dir, tmp_path):
    root = shutil.copytree(run_dir, tmp_path / "run")
    config = dataclasses.replace(checkpoints.load_config(root / "flow"), codebook=41)
    checkpoints.write_configs(root / "flow", {"model": config})
    with pytest.raises(UserError, match="codebook is 41 but the tokenizers have 16 \\+ 24 codes"):
        _evaluate(root)
    shutil.rmtree(root / "merged")  # is not needed
    shutil.rmtree(root / "hift")
    with pytest.raises(UserError, match="has no hift/; run its stage train_hift first"):
        RunDirectory(root).check_sound()


def test_bad_input_is_one_line_and_code_2(tmp_path, capsys):
    arguments = ["--gin_file=gin/models/toy.gin", "--gin_file=gin/runs/evaluate_resynthesis.gin"]
    arguments.append(f"--gin.RUN_DIR={tmp_path / 'none'}")
    assert launch.launch("t5x_audio.evaluate_resynthesis", "", arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no such run directory" in error
