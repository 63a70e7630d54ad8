"""Turns corpora of speech into corpora of codes: the linguistic and the semantic stream of clips.

Every clip of `<run_dir>/corpus/<name>` becomes a record of `<model_dir>/<name>` with the same
fields but for the audio, and with `linguistic` and `semantic` int32 [N] local codes. Clips of
like length go through the compiled encoders together.

Shards are finished one at a time and kept, so an interrupted job goes on with the next one; a split
appears under its final names when all its shards are there. Clips that cannot be used are listed
with the reason in `<model_dir>/<name>/quarantine.jsonl`, never tokenised wrongly in silence.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence

from t5x_audio import fit_codebook
from t5x_audio.errors import UserError

CHUNK_CLIPS = 512  # read and encoded at a time
SUMMARY_FILE = "tokens.json"
QUARANTINE_FILE = "quarantine.jsonl"


def run(
    *,
    model_dir: str,
    run_dir: str,
    corpora: Sequence[str] | None = None,
    num_shards: int = 1,
    max_seconds: float = 3600.0,
) -> dict:
    """Tokenises corpora; what is finished is not done again.

    Args:
      model_dir: where the token corpora go, one directory a corpus.
      run_dir: its linguistic_tokenizer/, semantic/ and corpus/<name>/ are read.
      corpora: names of corpora; None = all.
      num_shards: files a split.
      max_seconds: longer clips are put in quarantine.

    Returns:
      Figures for the closing line. UserError when a tokenizer or a corpus is missing.
    """
    from t5x_audio import launch
    from t5x_audio.data import audio_reader
    from t5x_audio.tokenizers import dual_codebook
    from t5x_audio.training import checkpoints

    sources = audio_reader.corpora_of(run_dir, corpora)
    linguistic = checkpoints.load_model(os.path.join(run_dir, "linguistic_tokenizer"))
    semantic = checkpoints.load_model(os.path.join(run_dir, "semantic"))
    tokenizer = dual_codebook.DualCodebookTokenizer(linguistic, semantic)
    fingerprint = fit_codebook.fingerprint(linguistic, semantic)
    began = time.monotonic()
    totals = {"clips": 0, "hours": 0.0, "quarantined": 0, "new_hours": 0.0}
    for source in sources:
        target = os.path.join(model_dir, os.path.basename(source))
        job = _CorpusJob(tokenizer, source, target, num_shards, max_seconds, fingerprint)
        for key, value in job.run().items():
            totals[key] += value
    launch.save_operative_config(model_dir)
    new_hours, elapsed = totals.pop("new_hours"), (time.monotonic() - began) / 3600
    totals["hours_per_hour"] = new_hours / elapsed
    return {"model_dir": model_dir, **totals}


@dataclasses.dataclass(frozen=True)
class _CorpusJob:
    """One corpus; `source` and `target` are directories."""

    tokenizer: object
    source: str
    target: str
    num_shards: int
    max_seconds: float
    fingerprint: str

    def run(self) -> dict:
        """Does what is not done yet; returns the figures of the whole corpus."""
        from t5x_audio.data import records

        made_from = self._made_from()
        summary = _read_json(os.path.join(self.target, SUMMARY_FILE))
        if summary and summary["made_from"] == made_from:
            return {**summary["totals"], "new_hours": 0.0}
        self._start(made_from)
        splits = [split for split in records.SPLITS if records.has_split(self.source, split)]
        new_seconds = sum(self._tokenize_split(split) for split in splits)
        totals = self._publish(splits)
        _write_json(
            os.path.join(self.target, SUMMARY_FILE),
            {
                "made_from": made_from,
                "totals": totals,
                "linguistic_size": self.tokenizer.linguistic_size,
                "semantic_size": self.tokenizer.semantic_size,
            },
        )
        shutil.rmtree(self._unfinished())
        return {**totals, "new_hours": new_seconds / 3600}

    def _made_from(self) -> dict:
        """What the tokens depend on, so that a change of it is seen."""
        if not os.path.isdir(self.source):
            raise UserError(f"{self.source}: no such corpus; run prepare_data first")
        files = [os.path.join(self.source, name) for name in sorted(os.listdir(self.source))]
        sizes = {os.path.basename(f): os.path.getsize(f) for f in files if ".array_record" in f}
        return {"tokenizers": self.fingerprint, "shards": self.num_shards, "corpus": sizes}

    def _unfinished(self, *names: str) -> str:
        return os.path.join(self.target, ".unfinished", *names)

    def _start(self, made_from: dict) -> None:
        """Keeps the finished shards of an interrupted run of the same job, and no others."""
        mark = self._unfinished("made_from.json")
        if _read_json(mark) != made_from:
            shutil.rmtree(self._unfinished(), ignore_errors=True)
            os.makedirs(self._unfinished())
            _write_json(mark, made_from)

    def _tokenize_split(self, split: str) -> float:
        """Makes the missing shards of a split; returns the seconds of audio done now."""
        from tqdm import tqdm

        from t5x_audio.data import records

        reader = records.open_records(self.source, split)
        seconds = 0.0
        name = f"{os.path.basename(self.target)} {split}"
        with tqdm(total=len(reader), desc=name, unit=" clips") as progress:
            for shard in range(self.num_shards):
                indices = range(shard, len(reader), self.num_shards)
                if os.path.exists(self._unfinished(f"{split}-{shard}", SUMMARY_FILE)):
                    progress.update(len(indices))
                else:
                    seconds += self._tokenize_shard(reader, split, shard, indices, progress)
                    progress.set_postfix_str(f"{seconds:.0f} s of audio")
        return seconds

    def _tokenize_shard(self, reader, split: str, shard: int, indices, progress) -> float:
        from t5x_audio.data import records

        directory = self._unfinished(f"{split}-{shard}")
        shutil.rmtree(directory, ignore_errors=True)
        rejected, seconds, count = [], 0.0, 0
        with records.RecordWriter(directory, split) as writer:
            for chunk in _chunks(indices, CHUNK_CLIPS):
                for record, reason in self._tokenize(reader, chunk):
                    if reason is None:
                        writer.write(record)
                        seconds += record["duration"]
                        count += 1
                    else:
                        rejected.append({"split": split, **record, "reason": reason})
                progress.update(len(chunk))
        # Last of all: the mark of a finished shard.
        result = {"clips": count, "seconds": seconds, "quarantine": rejected}
        _write_json(os.path.join(directory, SUMMARY_FILE), result)
        return seconds

    def _tokenize(self, reader, indices: Sequence[int]) -> Iterator[tuple[dict, str | None]]:
        """(token record, None) or ({id or index}, reason of rejection) for every index in order."""
        clips, reasons = {}, {}
        for index in indices:
            try:
                clips[index] = self._read(reader, index)
            except UserError as error:
                reasons[index] = str(error)
        waveforms = [clip.samples for clip in clips.values()]
        streams = dict(zip(clips, self.tokenizer.encode_batch(waveforms), strict=True))
        for index in indices:
            if index in reasons:
                yield {"record": index}, reasons[index]
                continue
            record = clips[index].to_record()
            linguistic, semantic = streams[index]
            if not len(self.tokenizer.merge(linguistic, semantic)):
                yield {"record": index, "id": record["id"]}, "too short for one group of codes"
                continue
            del record["audio"]
            yield record | {"linguistic": linguistic, "semantic": semantic}, None

    def _read(self, reader, index: int):
        """The clip, or UserError when it cannot be used."""
        from t5x_audio.audio import io
        from t5x_audio.data import corpus

        clip = corpus.Clip.from_record(reader[index])
        io.check_samples(
            clip.samples, corpus.RATE, name=clip.id, min_seconds=0.0, max_seconds=self.max_seconds
        )
        return clip

    def _publish(self, splits: Sequence[str]) -> dict:
        """Moves all shards to their final names; returns the totals."""
        from t5x_audio.data import records

        shards = [(split, shard) for split in splits for shard in range(self.num_shards)]
        results = []
        for split, shard in shards:
            directory = self._unfinished(f"{split}-{shard}")
            results.append(_read_json(os.path.join(directory, SUMMARY_FILE)))
        rejected = [row for result in results for row in result["quarantine"]]
        with open(self._unfinished(QUARANTINE_FILE), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rejected)
        for name in os.listdir(self.target):
            if name == SUMMARY_FILE or ".array_record" in name:
                os.remove(os.path.join(self.target, name))
        for split, shard in shards:
            # Copied, not moved: were the job stopped here, the finished shards would remain.
            final = records.shard_path(self.target, split, shard, self.num_shards)
            made = records.shard_path(self._unfinished(f"{split}-{shard}"), split, 0, 1)
            shutil.copyfile(made, f"{final}.writing")
            os.replace(f"{final}.writing", final)
        os.replace(self._unfinished(QUARANTINE_FILE), os.path.join(self.target, QUARANTINE_FILE))
        return {
            "clips": sum(result["clips"] for result in results),
            "hours": sum(result["seconds"] for result in results) / 3600,
            "quarantined": len(rejected),
        }


def _chunks(indices: range, size: int) -> Iterator[range]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _read_json(path: str):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _write_json(path: str, value) -> None:
    with open(f"{path}.writing", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(f"{path}.writing", path)


if __name__ == "__main__":
    from t5x_audio import launch

    launch.main("t5x_audio.tokenize_corpus", description=__doc__)
