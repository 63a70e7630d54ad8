"""Batches of audio: shapes, what is in them, and exact continuation."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.data import audio_reader, buckets, corpus, records, speaker_embeddings
from t5x_audio.data.speaker_embeddings import ClipEmbedder
from t5x_audio.errors import UserError
from t5x_audio.sequences import vocabulary
from t5x_audio.tokenizers import dual_codebook

_WORDS = ["one", "two", "three", "four", "five", "six", "seven", "cat", "dog", "monday"]


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=60),
    st.integers(100, 400),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_an_epoch_holds_every_clip(lengths, samples, multiple, epoch):
    made = buckets.make_buckets(lengths, [30, 60, 120], samples, multiple)
    plan = buckets.BatchPlan(made, seed=5)
    seen = []
    for place in range(epoch * plan.batches_per_epoch, (epoch + 1) * plan.batches_per_epoch):
        bucket, chosen = plan[place]
        assert len(chosen) == bucket.rows and bucket.rows % multiple == 0
        assert all(lengths[i] <= bucket.samples for i in chosen)
        seen += chosen.tolist()
    assert set(seen) == set(range(len(lengths)))
    ordered = [i for p in range(plan.batches_per_epoch) for i in plan.ordered(p)[1].tolist()]
    assert set(ordered) == set(range(len(lengths)))


def test_bad_buckets_are_named():
    with pytest.raises(UserError, match="rise"):
        buckets.make_buckets([1], [5, 5], 10)
    with pytest.raises(UserError, match="no clip fits"):
        buckets.make_buckets([99], [5], 10)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Two corpora with tokens; the value of a clip's samples and codes tells which clip it is."""
    root = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for name, count in (("a", 14), ("b", 6)):
        splits = {}
        for split, number in (("train", count), ("validation", 3)):
            splits[split] = []
            for i in range(number):
                samples = int(rng.integers(4000, 40000))
                splits[split].append(
                    corpus.Clip(
                        id=f"{name}{i}",
                        audio=np.full(samples, 100 * (i + 1), np.int16),
                        text=" ".join(rng.choice(_WORDS, 1 + i % 5)),
                        speaker=f"speaker {i % 2}",
                        role="question" if i % 2 else "utterance",
                    )
                )
        corpus.write_corpus(root / "corpus" / name, splits)
        for split, clips in splits.items():
            with records.RecordWriter(root / "tokens" / name, split) as writer:
                for i, clip in enumerate(clips[:-1]):  # the last has no tokens
                    groups = len(clip.audio) // audio_reader.SAMPLES_PER_GROUP
                    record = {k: v for k, v in clip.to_record().items() if k != "audio"}
                    record["linguistic"] = np.full(2 * groups, i, np.int32)
                    record["semantic"] = np.full(3 * groups, i, np.int32)
                    writer.write(record)
    model = vocabulary.train_sentencepiece(_WORDS * 3, str(root / "sp"), 90)
    sizes = dict(text_size=90, linguistic_size=32, semantic_size=32, num_specials=8, multiple_of=8)
    vocabulary.Vocabulary(**sizes, sentencepiece=model).save(str(root / "vocabulary"))
    return str(root)


def _mean(waveforms):
    return np.stack([np.full(8, w.mean(), np.float32) for w in waveforms])


_embed = ClipEmbedder(lambda: "mean", _mean)


_BUCKETS = dict(bucket_seconds=(1.2, 2.4), batch_seconds=9.6)


def _datasets(run_dir):
    yield audio_reader.AudioBatches(run_dir, **_BUCKETS, speeds=(0.9, 1.0, 1.1))
    yield audio_reader.FlowBatches(run_dir, _embed, **_BUCKETS)
    yield audio_reader.SegmentBatches(run_dir, segment_seconds=0.6, batch_size=4)


def _equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_restored_iterator_goes_on_exactly(run_dir, which):
    dataset = next(itertools.islice(_datasets(run_dir), which, None))
    iterator = iter(dataset)
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(12)]  # more than an epoch
    for fresh in (iter(dataset), iter(next(itertools.islice(_datasets(run_dir), which, None)))):
        fresh.set_state(state)
        for batch in expected:
            _equal(next(fresh), batch)
    assert any(not np.array_equal(expected[0]["audio"], b["audio"]) for b in expected[1:])


@pytest.mark.parametrize("units", ["pieces", "bytes"])
def test_audio_batches(run_dir, units):
    dataset = audio_reader.AudioBatches(run_dir, units=units, **_BUCKETS)
    pieces = vocabulary.Vocabulary.load(f"{run_dir}/vocabulary").encode_text
    encode = {"pieces": pieces, "bytes": lambda text: [byte + 1 for byte in text.encode()]}[units]
    words = {text: np.asarray(encode(text)) for text in dataset._train[1].texts}
    shapes = set()
    for batch in itertools.islice(dataset, 12):
        shapes.add(batch["audio"].shape + batch["text_ids"].shape)
        assert batch["audio"].dtype == np.float32 and batch["text_ids"].dtype == np.int32
        for row in range(len(batch["audio"])):
            length = batch["audio_lengths"][row]
            assert np.all(batch["audio"][row, :length] > 0)
            assert np.all(batch["audio"][row, length:] == 0)
            said = batch["text_ids"][row, : batch["text_lengths"][row]]
            assert any(np.array_equal(said, ids) for ids in words.values())
    assert len(shapes) == 2
    assert {s[:2] for s in shapes} == {(8, 19200), (4, 38400)}


def test_evaluation_is_fixed_and_of_known_shapes(run_dir):
    dataset = audio_reader.AudioBatches(run_dir, **_BUCKETS)
    known = {b["audio"].shape + b["text_ids"].shape for b in itertools.islice(dataset, 12)}
    first, again = list(dataset.eval_sets()["clips"]), list(dataset.eval_sets()["clips"])
    assert first
    for one, other in zip(first, again, strict=True):
        _equal(one, other)
        assert one["audio"].shape + one["text_ids"].shape in known


def test_flow_batches_join_audio_with_its_codes(run_dir):
    calls = []

    def embed(waveforms):
        calls.append(len(waveforms))
        return _mean(waveforms)

    file = {"embeddings_file": "counted.npz"}
    counted = ClipEmbedder(lambda: "counted", embed)
    dataset = audio_reader.FlowBatches(run_dir, counted, **_BUCKETS, **file)
    again = audio_reader.FlowBatches(run_dir, None, **_BUCKETS, **file)
    assert not calls  # opening needs no devices
    iter(dataset)
    assert sum(calls) == 20
    for batch, other in zip(itertools.islice(dataset, 8), again, strict=False):
        _equal(batch, other)
        assert batch["codes"].shape[1] * 1920 == batch["audio"].shape[1] * 5
        for row in range(len(batch["audio"])):
            clip = round(batch["audio"][row, 0] * 32768 / 100) - 1
            codes = batch["codes"][row, : batch["code_lengths"][row]]
            linguistic, semantic = dual_codebook.split(codes, 32)
            assert set(linguistic) == set(semantic) == {clip}
            assert len(codes) == batch["audio_lengths"][row] // 1920 * 5
            assert batch["speaker_embedding"][row] == pytest.approx(batch["audio"][row, 0])
    assert list(dataset.eval_sets()["clips"])
    with pytest.raises(UserError, match="speaker embeddings"):
        iter(audio_reader.FlowBatches(run_dir, None, **_BUCKETS, embeddings_file="none.npz"))


def test_flow_batches_of_one_codebook(run_dir):
    dataset = audio_reader.FlowBatches(run_dir, _embed, **_BUCKETS, codebook="semantic")
    both = audio_reader.FlowBatches(run_dir, _embed, **_BUCKETS)
    one, other = (
        dual_codebook.split(batch["codes"][0, : batch["code_lengths"][0]], 32)
        for batch in (dataset.batch(3), both.batch(3))
    )
    assert not one[0].any() and other[0].any()
    np.testing.assert_array_equal(one[1], other[1])


def test_embeddings_of_another_encoder_are_refused(run_dir):
    """Another kind, the same with other weights, and a file that does not say."""

    def batches(embed):
        file = "of_one.npz"
        return iter(audio_reader.FlowBatches(run_dir, embed, **_BUCKETS, embeddings_file=file))

    first = next(batches(ClipEmbedder(lambda: "campplus 1", _mean)))
    assert first["speaker_embedding"].shape[1] == 8
    path = f"{run_dir}/tokens/of_one.npz"
    made = speaker_embeddings.read(path)
    assert made.encoder == "campplus 1" and len(made.vectors) == 20

    def other(waveforms):
        raise AssertionError("must not be asked")

    for name in ("ge2e 1", "campplus 2"):
        with pytest.raises(UserError, match=f"made by 'campplus 1', not by '{name}'"):
            batches(ClipEmbedder(lambda name=name: name, other))
    _equal(next(batches(ClipEmbedder(lambda: "campplus 1", other))), first)
    np.savez(path, keys=list(made.vectors), embeddings=list(made.vectors.values()))
    with pytest.raises(UserError, match="an encoder that it does not name"):
        batches(ClipEmbedder(lambda: "campplus 1", other))


def test_a_clip_that_cannot_be_embedded_is_named(run_dir):
    def refuse(waveforms):
        raise UserError("waveform 1 of 20 is silent")

    dataset = audio_reader.FlowBatches(
        run_dir, ClipEmbedder(lambda: "strict", refuse), embeddings_file="strict.npz", **_BUCKETS
    )
    with pytest.raises(UserError, match="train clips .*a3.*waveform 1 of 20 is silent"):
        iter(dataset)


def test_segments(run_dir):
    dataset = audio_reader.SegmentBatches(run_dir, segment_seconds=0.6, batch_size=4)
    for batch in itertools.islice(dataset, 10):
        assert batch["audio"].shape == (4, 9600)
        for row, length in zip(batch["audio"], batch["audio_lengths"], strict=True):
            assert np.all(row[:length] > 0) and np.all(row[length:] == 0)
    assert len(list(dataset.eval_sets()["clips"])) == 2


def test_audio_at_another_rate(run_dir):
    """Codes and lengths in seconds stay; whole segments of the vocoder's frames come out."""
    flow = {"embeddings_file": "rates.npz"}
    at_16k = audio_reader.FlowBatches(run_dir, _embed, **_BUCKETS, **flow)
    at_24k = audio_reader.FlowBatches(run_dir, _embed, **_BUCKETS, **flow, sample_rate=24000)
    for batch, higher in zip(itertools.islice(at_16k, 4), at_24k, strict=False):
        np.testing.assert_array_equal(batch["codes"], higher["codes"])
        np.testing.assert_array_equal(batch["speaker_embedding"], higher["speaker_embedding"])
        assert higher["audio"].shape[1] * 2 == batch["audio"].shape[1] * 3
        longer = higher["audio_lengths"] - 1.5 * batch["audio_lengths"]
        assert np.abs(longer).max() <= 0.5
        np.testing.assert_allclose(higher["audio"][:, 300], batch["audio"][:, 200], rtol=0.02)
    segments = {"segment_seconds": 24576 / 22050, "batch_size": 4, "sample_rate": 22050}
    lengths = []
    for batch in itertools.islice(audio_reader.SegmentBatches(run_dir, **segments), 6):
        assert batch["audio"].shape == (4, 24576)
        lengths += batch["audio_lengths"].tolist()
    assert max(lengths) == 24576 > min(lengths)


def test_speakers(run_dir):
    """The value of a sample tells the clip, the clip its speaker."""
    options = {"segment_seconds": 0.6, "batch_size": 4}
    dataset = audio_reader.SpeakerBatches(run_dir, **options)
    assert dataset.speakers == ["speaker 0", "speaker 1"]
    batches = [*itertools.islice(dataset, 10), *dataset.eval_sets()["clips"]]
    for batch in batches:
        clip = np.round(batch["audio"][:, 0] * 32768 / 100).astype(int) - 1
        np.testing.assert_array_equal(batch["speaker"], clip % 2)
    with pytest.raises(UserError, match="two named speakers or more"):
        audio_reader.SpeakerBatches(run_dir, roles=("question",), **options)


def test_roles_and_missing_things(run_dir, tmp_path):
    only = audio_reader.SegmentBatches(run_dir, roles=("question",))
    assert len(only._train[1]) == 10
    with pytest.raises(UserError, match="prepare_data"):
        audio_reader.SegmentBatches(str(tmp_path))
    with pytest.raises(UserError, match="no such corpus"):
        audio_reader.SegmentBatches(run_dir, corpora=("c",))
    with pytest.raises(UserError, match="units='letters'"):
        audio_reader.AudioBatches(run_dir, units="letters")
    with pytest.raises(UserError, match="no clips"):
        audio_reader.SegmentBatches(run_dir, roles=("answer",))
