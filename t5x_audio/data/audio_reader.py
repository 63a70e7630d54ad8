"""Batches of audio from clip corpora: for the tokenizers, flow matching and the vocoder.

Choices:
- Grain over a source whose item i *is* batch i of an endless plan (`buckets.BatchPlan`): the state
  of an iterator is one integer and a restored one gives the same batches.
- Whatever is random in a batch is drawn from (seed, place), never from a running generator.
- Lengths and texts of all clips are read once when the dataset is opened, the audio only when it
  is needed.
- Evaluation takes whole batches in a fixed order; the last one of a length is filled up by
  repeating clips, so that no shape occurs but those of training.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from t5x_audio.audio import io, transforms
from t5x_audio.data import buckets, corpus, records, speaker_embeddings
from t5x_audio.data.speaker_embeddings import ClipEmbedder
from t5x_audio.errors import UserError
from t5x_audio.sequences.vocabulary import Vocabulary
from t5x_audio.tokenizers import dual_codebook

RATE = corpus.RATE
SAMPLES_PER_GROUP = 1920  # 0.12 s: two linguistic and three semantic codes
_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # the loop prefetches
_log = logging.getLogger(__name__)


class ClipIndex:
    """The clips of one split of several corpora, by one index.

    Attributes:
      ids, texts, speakers, lengths: of each clip; lengths in samples.
    """

    def __init__(self, directories: Sequence[str], split: str, roles: Sequence[str] | None = None):
        """Reads all records once; corpora without the split are passed over.

        Raises:
          UserError: no corpus has a clip of this split and these roles, or a file is damaged.
        """
        self._places, self.ids, self.texts, self.speakers, lengths = [], [], [], [], []
        for directory in directories:
            if not os.path.isdir(directory):
                raise UserError(f"{directory}: no such corpus; run prepare_data first")
            if not records.has_split(directory, split):
                continue
            source = records.open_records(directory, split)
            for i, record in enumerate(source):
                if roles and record["role"] not in roles:
                    continue
                self._places.append((source, i))
                self.ids.append(record["id"])
                self.texts.append(record["text"])
                self.speakers.append(record["speaker"])
                lengths.append(record["audio"].size)
        self.lengths = np.asarray(lengths, np.int64)
        if not len(self.lengths):
            places = ", ".join(map(str, directories))
            raise UserError(f"{places}: hold no clips for split '{split}'")

    def __len__(self) -> int:
        return len(self._places)

    def samples(self, index: int) -> np.ndarray:
        """float32 [T] in [-1, 1)."""
        source, place = self._places[index]
        return corpus.Clip.from_record(source[place]).samples


class _Batches:
    """Endless batches of a plan through Grain, and the finite ones for evaluation.

    A subclass has `self._train = (plan, index)` and `_evaluation()` -> the same of the validation
    split, or None, and makes a batch from a bucket and clip indices.
    """

    _train: tuple[buckets.BatchPlan, ClipIndex]
    max_eval_batches: int | None

    def __iter__(self) -> grain.DatasetIterator:
        source = _Places(self)
        return iter(grain.MapDataset.source(source).to_iter_dataset(_READ))

    def batch(self, place: int) -> dict[str, np.ndarray]:
        """Training batch `place`: the same whenever it is asked for."""
        plan, index = self._train
        bucket, chosen = plan[place]
        return self._make(index, bucket, chosen, np.random.default_rng([plan.seed, 1, place]))

    def eval_sets(self) -> dict[str, Iterator[dict[str, np.ndarray]]]:
        """'clips' -> batches of the validation split in a fixed order; {} without such a split."""
        found = self._evaluation()
        return {} if found is None else {"clips": self._in_order(*found)}

    def _in_order(self, plan, index) -> Iterator[dict[str, np.ndarray]]:
        count = plan.batches_per_epoch
        if self.max_eval_batches is not None:
            # Spread over the lengths, not the shortest only.
            count = min(count, self.max_eval_batches)
        for place in np.linspace(0, plan.batches_per_epoch - 1, count).round().astype(int):
            bucket, chosen = plan.ordered(int(place))
            yield self._make(index, bucket, chosen, None)

    def _make(self, index, bucket, chosen, rng) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def _evaluation(self):
        raise NotImplementedError


class _Places:
    """A source for Grain: item i is batch i."""

    def __init__(self, dataset: _Batches):
        self._dataset = dataset

    def __len__(self) -> int:
        return min(sys.maxsize, 2**40)

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        return self._dataset.batch(int(place))


def corpora_of(run_dir: str, names: Sequence[str] | None = None) -> list[str]:
    """Directories of the named corpora of a run; None = every finished one."""
    root = os.path.join(run_dir, "corpus")
    return [os.path.join(root, name) for name in names] if names else corpus.finished_corpora(root)


def pad_audio(waveforms: Sequence[np.ndarray], samples: int) -> dict[str, np.ndarray]:
    """Stacks [T] waveforms: audio float32 [B, samples] and audio_lengths int32 [B]."""
    audio = np.zeros((len(waveforms), samples), np.float32)
    for row, waveform in zip(audio, waveforms, strict=True):
        row[: len(waveform)] = waveform[:samples]
    lengths = np.array([min(len(waveform), samples) for waveform in waveforms], np.int32)
    return {"audio": audio, "audio_lengths": lengths}


def _pad_ids(rows: Sequence[np.ndarray], width: int, name: str) -> dict[str, np.ndarray]:
    ids = np.zeros((len(rows), width), np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    lengths = np.array([len(values) for values in rows], np.int32)
    return {f"{name}s" if name == "code" else f"{name}_ids": ids, f"{name}_lengths": lengths}


class AudioBatches(_Batches):
    """Speech, with its text if that is wanted, for training a tokenizer.

    A batch: audio float32 [B, T], audio_lengths int32 [B] (samples), and with units text_ids int32
    [B, U] (ids of the text's units, 0 behind the end), text_lengths int32 [B].
    """

    def __init__(
        self,
        run_dir: str,
        corpora: Sequence[str] | None = None,
        roles: Sequence[str] | None = None,
        bucket_seconds: Sequence[float] = (2.4, 4.8, 9.6, 15.0),
        batch_seconds: float = 120.0,
        rows_multiple_of: int = 1,
        speeds: Sequence[float] = (1.0,),
        units: str | None = "pieces",
        seed: int = 0,
        max_eval_batches: int | None = None,
    ):
        """Opens the corpora and the vocabulary of a run.

        Args:
          run_dir: holds corpus/, and vocabulary/ for pieces.
          corpora: names under corpus/; None = all.
          roles: of the clips; None = all.
          bucket_seconds: padded lengths; longer clips are left out, counted and announced.
          batch_seconds: about how much audio a batch has, padding included.
          rows_multiple_of: B is a multiple of it.
          speeds: each clip is played at one of these, drawn anew every epoch; 1 = as it is.
          units: of the text: 'pieces' (SentencePiece ids) or 'bytes' (of UTF-8, plus 1: 1 to
            256). Bytes are sounds rather than words, and need frames enough: some 15 a second.
            None = no text: the recordings need none.
          seed: of the order and the speeds.
          max_eval_batches: at most so many; None = all.

        Raises:
          UserError: no clips, or no such units.
        """
        self.max_eval_batches = max_eval_batches
        self._encode_text = text_encoder(units, run_dir)
        self._directories, self._roles = corpora_of(run_dir, corpora), roles
        self._speeds = np.asarray(speeds, np.float64)
        self._shape = (bucket_seconds, batch_seconds, rows_multiple_of, seed)
        self._text_ids: dict[str, np.ndarray] = {}
        self._train = self._open("train", float(self._speeds.min()))
        self._widths = self._text_widths()

    def _open(self, split: str, slowest: float):
        index = ClipIndex(self._directories, split, self._roles)
        if self._encode_text is not None:
            for text in set(index.texts) - self._text_ids.keys():
                self._text_ids[text] = self._encode_text(text)
        return _plan(np.ceil(index.lengths / slowest), *self._shape, split), index

    def _evaluation(self):
        if not any(records.has_split(place, "validation") for place in self._directories):
            return None
        plan, index = self._open("validation", 1.0)
        return plan, index

    def _text_widths(self) -> dict[int, int]:
        """Bucket length -> U: the longest text of training in it, with a quarter to spare."""
        if self._encode_text is None:
            return {}
        plan, index = self._train
        widths = {}
        for bucket in plan.buckets:
            longest = max(len(self._text_ids[index.texts[i]]) for i in bucket.members)
            widths[bucket.samples] = -(-(longest * 5 // 4 + 1) // 8) * 8
        return widths

    def _make(self, index, bucket, chosen, rng):
        waveforms = [index.samples(i) for i in chosen]
        if rng is not None and len(self._speeds) > 1:
            speeds = rng.choice(self._speeds, len(waveforms))
            pairs = zip(waveforms, speeds, strict=True)
            waveforms = [transforms.change_speed(waveform, s) for waveform, s in pairs]
        audio = pad_audio(waveforms, bucket.samples)
        if self._encode_text is None:
            return audio
        texts = [self._text_ids[index.texts[i]] for i in chosen]
        widest = max(len(ids) for ids in texts)
        width = max(self._widths.get(bucket.samples, 0), -(-widest // 8) * 8)
        return audio | _pad_ids(texts, width, "text")


def text_encoder(units: str | None, run_dir: str) -> Callable[[str], np.ndarray] | None:
    """Text -> ids int32 [U]; 0, the blank of CTC, is none of them. None without units."""
    if units is None:
        return None
    if units == "pieces":
        return Vocabulary.load(os.path.join(run_dir, "vocabulary")).encode_text
    if units == "bytes":
        return lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1
    raise UserError(f"AudioBatches.units={units!r}: there are 'pieces', 'bytes' and None")


class FlowBatches(_Batches):
    """Speech with its codes and its speaker, for training flow matching.

    A batch: audio float32 [B, T], audio_lengths int32 [B], codes int32 [B, N] (flat local codes, 0
    behind the end; five to 0.12 s), code_lengths int32 [B], speaker_embedding float32 [B, D].
    """

    def __init__(
        self,
        run_dir: str,
        embed: ClipEmbedder | None = None,
        corpora: Sequence[str] | None = None,
        roles: Sequence[str] | None = None,
        bucket_seconds: Sequence[float] = (2.4, 4.8, 9.6, 15.0),
        batch_seconds: float = 120.0,
        rows_multiple_of: int = 1,
        seed: int = 0,
        max_eval_batches: int | None = None,
        embeddings_file: str = "speaker_embeddings.npz",
        sample_rate: int = RATE,
        codebook: str | None = None,
    ):
        """Opens the corpora and their tokens; speaker embeddings that lack are made with batches.

        Args:
          run_dir: holds corpus/, tokens/ and vocabulary/; clips without tokens are left out.
          embed: the speaker encoder; None = the file must be complete.
          embeddings_file: under tokens/, one embedding a clip; of this encoder.
          sample_rate: of `audio`, Hz. Corpora have 16 kHz: a higher rate has nothing above 8 kHz.
          codebook: 'linguistic' or 'semantic', see `dual_codebook.only`; None = both.

        The other arguments are those of `AudioBatches`.
        """
        self.max_eval_batches = max_eval_batches
        vocabulary = Vocabulary.load(os.path.join(run_dir, "vocabulary"))
        self._linguistic_size = vocabulary.linguistic_size
        self._directories, self._roles = corpora_of(run_dir, corpora), roles
        self._tokens = [
            os.path.join(run_dir, "tokens", os.path.basename(d)) for d in self._directories
        ]
        self._shape = (bucket_seconds, batch_seconds, rows_multiple_of, seed)
        self._embeddings_path = os.path.join(run_dir, "tokens", embeddings_file)
        self._embed, self._codebook, self._sample_rate = embed, codebook, sample_rate
        self._codes: dict[str, np.ndarray] = {}
        self._speakers: dict[str, np.ndarray] = {}
        self._train = self._open("train")

    def _open(self, split: str):
        index = ClipIndex(self._directories, split, self._roles)
        for directory in self._tokens:
            if not records.has_split(directory, split):
                continue
            for record in records.open_records(directory, split):
                size = self._linguistic_size
                codes = dual_codebook.merge(record["linguistic"], record["semantic"], size)
                if self._codebook is not None:
                    codes = dual_codebook.only(codes, size, self._codebook)
                self._codes[f"{split} {record['id']}"] = codes
        keys = [f"{split} {clip_id}" for clip_id in index.ids]
        known = np.array([len(self._codes.get(key, ())) > 0 for key in keys])
        if not known.any():
            places = ", ".join(self._tokens)
            raise UserError(f"{places}: hold no tokens of these clips; run tokenize_corpus first")
        # Beyond any bucket: left out like a clip that is too long.
        lengths = np.where(known, index.lengths, np.iinfo(np.int64).max)
        index.keys = keys
        return _plan(lengths, *self._shape, split), index

    def __iter__(self) -> grain.DatasetIterator:
        # Before the reading threads start, and not on opening: the encoder needs the devices.
        self._know_speakers("train", self._train[1])
        return super().__iter__()

    def _know_speakers(self, split: str, index: ClipIndex) -> None:
        if not self._speakers.keys() >= set(index.keys):
            self._speakers |= speaker_embeddings.of_clips(
                self._embeddings_path, split, index, self._embed
            )

    def batch(self, place: int) -> dict[str, np.ndarray]:
        """Training batch `place`: the same whenever it is asked for."""
        self._know_speakers("train", self._train[1])
        return super().batch(place)

    def _evaluation(self):
        if not any(records.has_split(place, "validation") for place in self._directories):
            return None
        plan, index = self._open("validation")
        self._know_speakers("validation", index)
        return plan, index

    def _make(self, index, bucket, chosen, rng):
        keys = [index.keys[i] for i in chosen]
        width = -(-bucket.samples // SAMPLES_PER_GROUP) * dual_codebook.GROUP_SIZE
        codes = [self._codes[key][:width] for key in keys]
        speakers = np.stack([self._speakers[key] for key in keys]).astype(np.float32)
        waveforms = [io.resample(index.samples(i), RATE, self._sample_rate) for i in chosen]
        audio = pad_audio(waveforms, round(bucket.samples * self._sample_rate / RATE))
        return audio | _pad_ids(codes, width, "code") | {"speaker_embedding": speakers}


class SegmentBatches(_Batches):
    """Random pieces of speech of one length, for training a vocoder on waveforms.

    A batch: audio float32 [B, T], audio_lengths int32 [B]; a clip shorter than T is followed by
    zeros. Evaluation takes each clip's middle.
    """

    def __init__(
        self,
        run_dir: str,
        corpora: Sequence[str] | None = None,
        roles: Sequence[str] | None = None,
        segment_seconds: float = 0.96,
        batch_size: int = 16,
        seed: int = 0,
        max_eval_batches: int | None = None,
        sample_rate: int = RATE,
    ):
        """Opens the corpora of a run; `segment_seconds` T and `batch_size` B are of the batches.

        `sample_rate` is that of `FlowBatches`, the other arguments are those of `AudioBatches`.
        """
        self.max_eval_batches = max_eval_batches
        self._sample_rate = sample_rate
        self._samples = round(segment_seconds * sample_rate)
        self._segment = -(-self._samples * RATE // sample_rate)  # of the corpus
        self._batch_size, self._seed = batch_size, seed
        self._directories, self._roles = corpora_of(run_dir, corpora), roles
        self._train = self._open("train")

    def _open(self, split: str):
        index = ClipIndex(self._directories, split, self._roles)
        bucket = buckets.Bucket(self._segment, self._batch_size, np.arange(len(index)))
        return buckets.BatchPlan([bucket], self._seed), index

    def _evaluation(self):
        if not any(records.has_split(place, "validation") for place in self._directories):
            return None
        return self._open("validation")

    def _make(self, index, bucket, chosen, rng):
        pieces = []
        for i in chosen:
            samples = index.samples(i)
            spare = max(0, len(samples) - self._segment)
            start = spare // 2 if rng is None else int(rng.integers(spare + 1))
            piece = samples[start : start + self._segment]
            pieces.append(io.resample(piece, RATE, self._sample_rate))
        return pad_audio(pieces, self._samples)


class SpeakerBatches(SegmentBatches):
    """The same with who speaks, for training a speaker encoder.

    A batch: also speaker int32 [B], its place in `speakers`; -1 for a voice of evaluation that
    training has not.

    Attributes:
      speakers: names of the voices of training, sorted.
    """

    def __init__(self, run_dir: str, **options):
        """As `SegmentBatches`. UserError where training has fewer than two voices."""
        super().__init__(run_dir, **options)
        self.speakers = sorted(set(self._train[1].speakers) - {""})
        if len(self.speakers) < 2:
            places = ", ".join(self._directories)
            raise UserError(
                f"{places}: a speaker encoder needs clips of two named speakers or more"
            )
        self._numbers = {name: i for i, name in enumerate(self.speakers)}

    def _make(self, index, bucket, chosen, rng):
        numbers = [self._numbers.get(index.speakers[i], -1) for i in chosen]
        batch = super()._make(index, bucket, chosen, rng)
        return batch | {"speaker": np.array(numbers, np.int32)}


def _plan(lengths, bucket_seconds, batch_seconds, rows_multiple_of, seed, split):
    edges = [round(seconds * RATE) for seconds in bucket_seconds]
    dropped = int(np.count_nonzero(np.asarray(lengths) > edges[-1]))
    if dropped:
        _log.warning(
            "%s: left out %d of %d clips, longer than %.1f s or without tokens",
            *(split, dropped, len(lengths), edges[-1] / RATE),
        )
    made = buckets.make_buckets(lengths, edges, round(batch_seconds * RATE), rows_multiple_of)
    return buckets.BatchPlan(made, seed)
