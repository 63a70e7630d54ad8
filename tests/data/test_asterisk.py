"""The human recordings: choosing prompts, the builder, and what happens without apt."""

import gzip
import os
import pathlib
import stat

import numpy as np
import pytest

from t5x_audio.data import asterisk, corpus
from t5x_audio.errors import UserError


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Please enter your password followed by the pound key.", None),
        ("press 1 to accept, or 2 to reject it", None),
        ("I'm sorry.", None),
        ("[ascending tones]", "note in brackets"),
        ('IAX (note: does not say "2")', "note in brackets"),
        ("press * to toggle pause", "keys or addresses"),
        ("visit www.asterisk.org.", "keys or addresses"),
        ("To execute an echo test dial 600.", "long number"),
        ("the open source PBX", "abbreviation"),
        ("A.M.", "abbreviation"),
        ("...", "no words"),
        (None, "no transcript"),
    ],
)
def test_reason_to_drop(text, reason):
    assert asterisk.reason_to_drop(text) == reason


def _unpacked(folder: pathlib.Path, transcripts: dict[str, str], silent=()) -> str:
    """A folder as the packages make it, with a tone for each prompt."""
    import G722

    texts = folder / asterisk._TEXTS
    texts.parent.mkdir(parents=True)
    with gzip.open(texts, "wt") as file:
        file.write("; a comment: indeed\n\n")
        file.writelines(f"{name}: {text}\n" for name, text in transcripts.items())
    tone = (3000 * np.sin(np.arange(8000) / 9)).astype(np.int16)
    for name in [*transcripts, *silent]:
        path = folder / asterisk._SOUNDS / "en_US_f_Allison" / f"{name}.g722"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(G722.G722(16000, 64000).encode(tone)))
    return str(folder)


def test_select_counts_what_it_leaves_out(tmp_path):
    transcripts = {"digits/1": "one", "beep": "[beep]", "agent-pass": "Enter 2 digits: now."}
    unpacked = _unpacked(tmp_path, transcripts, silent=["nowhere"])
    chosen, dropped = asterisk.select(unpacked)
    assert [(name, text) for name, _, text in chosen] == [
        ("agent-pass", "enter two digits now"),
        ("digits-1", "one"),
    ]
    assert dropped == {"note in brackets": 1, "no transcript": 1}
    assert len(asterisk.select(unpacked, limit=1)[0]) == 1


def test_build_makes_a_corpus(tmp_path):
    transcripts = {f"prompt-{i}": f"This is prompt {i}." for i in range(40)}
    _unpacked(tmp_path / "work" / "unpacked", transcripts)
    summary = asterisk.build(str(tmp_path / "asterisk"), str(tmp_path / "work"))
    assert summary["clips"] == 40 and "CC-BY-SA" in summary["licence"]
    clips = [c for s in summary["splits"] for c in corpus.iterate_clips(tmp_path / "asterisk", s)]
    assert {c.speaker for c in clips} == {"allison"} and {c.role for c in clips} == {"utterance"}
    assert sorted(c.id for c in clips) == sorted(transcripts)
    clip = next(c for c in clips if c.id == "prompt-7")
    assert clip.text == "this is prompt seven" and clip.duration == pytest.approx(0.5, abs=0.01)
    assert 0.05 < np.abs(clip.samples).max() < 0.15
    assert not (tmp_path / "work").exists()
    assert asterisk.build(str(tmp_path / "asterisk"), str(tmp_path / "gone")) == summary


def _program(folder: pathlib.Path, name: str, script: str):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_without_apt_a_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(asterisk.Unavailable, match="apt-get is not on this machine"):
        asterisk.fetch(str(tmp_path / "cache"))


def test_without_network_aptness_own_words(tmp_path, monkeypatch):
    _program(tmp_path, "apt-get", 'echo "W: hm" >&2; echo "E: Unable to fetch" >&2; exit 100')
    _program(tmp_path, "dpkg-deb", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(asterisk.Unavailable, match="failed: E: Unable to fetch"):
        asterisk.fetch(str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_list_is_named(tmp_path):
    path = tmp_path / "list.txt.gz"
    path.write_bytes(b"not gzip")
    with pytest.raises(UserError, match="list.txt.gz"):
        asterisk.read_transcripts(str(path))
