"""Human recordings with transcripts: the core sounds of Asterisk in English, as a TFDS builder.

Prompts of a telephone exchange read by Allison Smith, 16 kHz (G.722), some 25 minutes, from
Debian's packages asterisk-core-sounds-en-g722 and asterisk-core-sounds-en (the texts); licence
CC-BY-SA-3.0, copyright 2003-2010 Allison Smith. Nothing of it is shipped with this project:
`fetch` has apt download the packages (no root needed) and unpacks them into a cache folder.

A prompt is left out when its text does not say what is heard: notes in brackets, keys such as * or
#, web addresses and decimals, numbers of three or more digits and capital abbreviations (read
sometimes as words, sometimes letter by letter). `SELECTION` reasons are counted in the summary.

This module imports TensorFlow Datasets: import it only where data is made.
"""

import collections
import contextlib
import gzip
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from t5x_audio.audio import io
from t5x_audio.data import corpus, records
from t5x_audio.data.text_normalization import normalize
from t5x_audio.errors import UserError

PACKAGES = ("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en")
LICENCE = "CC-BY-SA-3.0, Allison Smith; from Debian's asterisk-core-sounds-en"
SPEAKER = "allison"
_SOUNDS = "usr/share/asterisk/sounds"
_TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"

# Why a prompt is left out -> what its text looks like.
SELECTION = {
    "note in brackets": re.compile(r"[\[\]<>()]"),
    "keys or addresses": re.compile(r"[*#@/]|www|\d\.\d"),
    "long number": re.compile(r"\d{3}"),
    "abbreviation": re.compile(r"\b[A-Z]{2,}\d*\b|\b[A-Z]\.\S"),
}


class Unavailable(UserError):
    """The packages cannot be had here: no apt, no network, no such package."""


def fetch(cache_dir: str) -> str:
    """Downloads and unpacks the packages once; returns the folder of their files.

    Raises:
      Unavailable: with one line saying what is missing.
    """
    cache_dir = os.path.abspath(cache_dir)  # the programs below run inside it
    unpacked = pathlib.Path(cache_dir) / "unpacked"
    if unpacked.is_dir():
        return str(unpacked)
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise Unavailable(f"{program} is not on this machine (not a Debian or Ubuntu?)")
    os.makedirs(cache_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        failure = _download(folder)
        if failure and os.geteuid() == 0:  # a fresh machine has no package lists yet
            _run(["apt-get", "update"], folder)
            failure = _download(folder)
        if failure:
            raise Unavailable(f"apt-get download {' '.join(PACKAGES)} failed: {failure}")
        for deb in sorted(pathlib.Path(folder).glob("*.deb")):
            if failure := _run(["dpkg-deb", "-x", str(deb), f"{folder}/files"], folder):
                raise Unavailable(f"dpkg-deb -x {deb.name} failed: {failure}")
        os.replace(f"{folder}/files", unpacked)
    return str(unpacked)


def _download(folder: str) -> str:
    return _run(["apt-get", "download", *PACKAGES], folder)


def _run(command: list[str], folder: str) -> str:
    """Runs a program; returns '' or, on failure, the line that tells most."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=600, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if not done.returncode:
        return ""
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return next((line for line in lines if line.startswith("E:")), lines[-1])[:160]


def read_transcripts(path: str) -> dict[str, str]:
    """`name: text` lines of the packaged list -> {name: text as written}."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete the cache and retry") from error
    pairs = (line.split(":", 1) for line in lines if ":" in line and not line.startswith(";"))
    return {name.strip(): text.strip() for name, text in pairs}


def reason_to_drop(text: str | None) -> str | None:
    """Why a prompt with this text is left out, or None when it is kept."""
    if text is None:
        return "no transcript"
    for reason, pattern in SELECTION.items():
        if pattern.search(text):
            return reason
    return None if normalize(text) else "no words"


def select(unpacked: str, limit: int | None = None) -> tuple[list[tuple[str, str, str]], dict]:
    """The prompts to use.

    Args:
      unpacked: what `fetch` returned.
      limit: at most so many, those that come first by name.

    Returns:
      [(id, path, normalised text)] sorted by id, and {reason: prompts left out}.
    """
    transcripts = read_transcripts(os.path.join(unpacked, _TEXTS))
    root = next(iter(sorted(pathlib.Path(unpacked, _SOUNDS).glob("*"))), None)
    if root is None:
        raise UserError(f"{unpacked}: holds no sounds; delete it and retry")
    chosen, dropped = [], collections.Counter()
    for path in sorted(root.rglob("*.g722")):
        name = str(path.relative_to(root).with_suffix(""))
        if reason := reason_to_drop(transcripts.get(name)):
            dropped[reason] += 1
        else:
            chosen.append((name.replace("/", "-"), str(path), normalize(transcripts[name])))
    return chosen[:limit], dict(dropped)


class AsteriskCoreSounds(tfds.core.GeneratorBasedBuilder):
    """English telephone prompts by one speaker, 16 kHz, with normalised texts.

    Args:
      unpacked: the folder `fetch` returned; None = fetch into `data_dir`/asterisk_packages.
      limit: at most so many prompts.
      validation, test: shares of the splits, by a hash of the prompt's name.
      **kwargs: as for any builder.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def __init__(
        self,
        *,
        unpacked: str | None = None,
        limit: int | None = None,
        validation: float = 0.05,
        test: float = 0.05,
        **kwargs,
    ):
        self._unpacked, self._limit = unpacked, limit
        self._shares = {"validation": validation, "test": test}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="English prompts of the Asterisk telephone exchange, one speaker.",
            homepage="https://www.asterisk.org",
            license=LICENCE,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "text": tfds.features.Text(),
                    "speaker": tfds.features.Text(),
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # apt downloads and verifies
        unpacked = self._unpacked or fetch(os.path.join(self._data_dir_root, "asterisk_packages"))
        prompts, _ = select(unpacked, self._limit)
        groups = {split: [] for split in records.SPLITS}
        for prompt in prompts:
            groups[corpus.split_of(prompt[0], **self._shares)].append(prompt)
        return {split: self._generate_examples(group) for split, group in groups.items() if group}

    def _generate_examples(self, prompts):
        for name, path, text in tqdm(prompts, unit="clip", desc="decode recordings"):
            samples, rate = io.decode_g722(pathlib.Path(path).read_bytes())
            audio = io.to_int16(io.resample(samples, rate, corpus.RATE))
            yield name, {"id": name, "text": text, "speaker": SPEAKER, "audio": audio}


def build(directory: str, work_dir: str, *, limit: int | None = None, max_seconds: float = 15.0):
    """Makes the corpus in the project's format, or returns the summary of a finished one.

    Args:
      directory: of the corpus; prompts become clips of role 'utterance'.
      work_dir: for packages and the TFDS cache; removed at the end.
      limit: at most so many prompts; None = all.
      max_seconds: longer prompts are left out.

    Raises:
      Unavailable: the packages cannot be had.
      UserError: the disk is full or a file is damaged.
    """
    if finished := corpus.read_summary(directory):
        return finished
    unpacked = fetch(work_dir)
    _, dropped = select(unpacked, limit)
    builder = AsteriskCoreSounds(
        unpacked=unpacked,
        limit=limit,
        data_dir=os.path.join(work_dir, "tfds"),
        file_format="array_record",
    )
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(None):
        builder.download_and_prepare()
    dropped = collections.Counter(dropped)

    def clips(split: str) -> Iterator[corpus.Clip]:
        for example in builder.as_data_source(split) if split in builder.info.splits else ():
            audio = np.asarray(example["audio"], np.int16)
            if audio.size > max_seconds * corpus.RATE:
                dropped["too long"] += 1
                continue
            name, text, speaker = (example[k].decode() for k in ("id", "text", "speaker"))
            yield corpus.Clip(id=name, audio=audio, text=text, speaker=speaker)

    streams = {split: list(clips(split)) for split in records.SPLITS}
    info = {"licence": LICENCE, "dropped": dict(sorted(dropped.items()))}
    summary = corpus.write_corpus(directory, streams, info=info)
    shutil.rmtree(work_dir)
    return summary
