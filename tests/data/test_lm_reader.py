import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.data import lm_reader
from t5x_audio.data.records import RecordWriter
from t5x_audio.errors import UserError

PAD = 999
SIZES = {"text_size": 500, "size": 1024}


def write_cache(root, task, split, lengths, first_token=0, sizes=SIZES):
    """Example i of `task` is the run of tokens that starts at 100 i + first_token."""
    directory = root / "tasks" / task
    with RecordWriter(directory, split) as writer:
        for i, length in enumerate(lengths):
            tokens = np.arange(length, dtype=np.int32) + 100 * i + first_token
            weights = (np.arange(length) >= 2).astype(np.float32)
            record = {"tokens": tokens, "weights": weights}
            if task == "aqaa_preference":
                record = {p + k: v for p in ("chosen_", "rejected_") for k, v in record.items()}
                record["rejected_tokens"] = record["rejected_tokens"][: length - 1]
                record["rejected_weights"] = record["rejected_weights"][: length - 1]
            writer.write(record)
    np.save(lm_reader.lengths_path(str(directory), split), np.asarray(lengths, np.int32))
    (directory / "stats.json").write_text(json.dumps({"vocabulary": sizes, "pad": PAD}))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    write_cache(root, "long", "train", random.integers(20, 40, 60))
    write_cache(root, "short", "train", random.integers(3, 9, 50), first_token=50)
    write_cache(root, "long", "validation", random.integers(20, 40, 9))
    write_cache(root, "short", "validation", random.integers(3, 9, 11), first_token=50)
    write_cache(root, "aqaa_preference", "train", random.integers(5, 30, 7))
    write_cache(root, "aqaa_preference", "validation", random.integers(5, 30, 7))
    return str(root)


def make(run_dir, mixture=None, **kwargs):
    given = {"sequence_length": 64, "batch_size": 4, "seed": 3, "open_rows": 8} | kwargs
    return lm_reader.PackedLmDataset(run_dir, mixture or {"long": 1, "short": 1}, **given)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def examples_of(batch):
    """The examples of a batch, unpacked by segment id: (tokens, targets, weights, positions)."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
            at = batch["segment_ids"][row] == segment
            keys = ("tokens", "targets", "weights", "positions")
            yield tuple(batch[key][row][at] for key in keys)


def assert_whole(batch, length):
    """Every packing invariant of a batch."""
    ids = batch["segment_ids"]
    for key in ("tokens", "targets", "segment_ids", "positions"):
        assert batch[key].dtype == np.int32 and batch[key].shape == ids.shape
    assert batch["weights"].dtype == np.float32 and ids.shape[1] == length
    padding = ids == 0
    assert (batch["tokens"][padding] == PAD).all() and (batch["targets"][padding] == PAD).all()
    assert not batch["weights"][padding].any() and not batch["positions"][padding].any()
    # Segments are in one piece, numbered in order, padding last.
    assert (np.diff(np.where(padding, 10**6, ids), axis=1) >= 0).all()
    for tokens, targets, weights, positions in examples_of(batch):
        assert positions.tolist() == list(range(len(tokens)))
        np.testing.assert_array_equal(tokens, tokens[0] + positions)
        np.testing.assert_array_equal(targets, tokens + 1)
        np.testing.assert_array_equal(weights, positions >= 1)


def test_batches_are_packed_examples(run_dir):
    dataset = make(run_dir)
    batches = take(iter(dataset), 20)
    for batch in batches:
        assert_whole(batch, 64)
    assert dataset.packing_efficiency > 0.85
    assert dataset.vocabulary_sizes == SIZES
    assert dataset.dropped == {"long": 0, "short": 0}


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=30),
    room=st.integers(1, 40),
    batch_size=st.integers(1, 5),
)
def test_evaluation_reads_every_example_once(tmp_path_factory, lengths, room, batch_size):
    root = tmp_path_factory.mktemp("any")
    write_cache(root, "task", "train", lengths)
    fitting = [i for i, length in enumerate(lengths) if length - 1 <= room]
    kwargs = {"sequence_length": room, "batch_size": batch_size, "eval_split": "train"}
    if not fitting:
        with pytest.raises(UserError, match=f"sequence_length={room}"):
            make(str(root), {"task": 1}, **kwargs)
        return
    dataset = make(str(root), {"task": 1}, **kwargs)
    assert dataset.dropped == {"task": len(lengths) - len(fitting)}
    batches = list(dataset.eval_sets()["task"])
    for batch in batches:
        assert batch["tokens"].shape == (batch_size, room)
        assert_whole(batch, room)
    found = [(tokens[0], len(tokens)) for batch in batches for tokens, *_ in examples_of(batch)]
    assert sorted(found) == [(100 * i, lengths[i] - 1) for i in fitting]


def test_evaluation_is_finite_the_same_and_task_by_task(run_dir):
    dataset = make(run_dir)
    first, second = (
        {name: list(batches) for name, batches in dataset.eval_sets().items()} for _ in range(2)
    )
    for name, count in (("long", 9), ("short", 11)):
        for a, b in zip(first[name], second[name], strict=True):
            np.testing.assert_array_equal(a["tokens"], b["tokens"])
        assert sum(len(list(examples_of(batch))) for batch in first[name]) == count
    few = {n: len(list(b)) for n, b in make(run_dir, max_eval_batches=1).eval_sets().items()}
    assert few == {"long": 1, "short": 1}
    assert make(run_dir, eval_split="test").eval_sets() == {}


def test_mixed_by_tokens_not_by_examples(run_dir):
    dataset = make(run_dir, {"long": 3, "short": 1, "absent": 0})
    tokens = {"long": 0, "short": 0}
    for batch in take(iter(dataset), 40):
        for example, *_ in examples_of(batch):
            tokens["short" if example[0] % 100 == 50 else "long"] += len(example)
    assert tokens["long"] / tokens["short"] == pytest.approx(3, rel=0.1)


def test_epochs_are_shuffled_and_whole(run_dir):
    starts = [
        int(example[0])
        for batch in take(iter(make(run_dir, {"long": 1})), 40)
        for example, *_ in examples_of(batch)
    ]
    # Packing reorders, but only among the rows that are open together.
    assert len(starts) >= 180
    counts = np.bincount(np.array(starts) // 100, minlength=60)
    assert counts.min() >= 1 and counts.max() - counts.min() <= 3
    assert starts[:60] != sorted(starts[:60])


def test_order_depends_on_the_seed_only(run_dir):
    def tokens(seed):
        return np.stack([b["tokens"] for b in take(iter(make(run_dir, seed=seed)), 5)])

    np.testing.assert_array_equal(tokens(1), tokens(1))
    assert (tokens(1) != tokens(2)).any()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_order_is_the_same_on_any_number_of_hosts(run_dir, hosts):
    dataset = make(run_dir, batch_size=8, readers=4, changes={3: {"short": 1}})
    whole = take(iter(dataset), 6)
    share = 8 // hosts
    parts = [dataset.iterator(range(h * share, (h + 1) * share)) for h in range(hosts)]
    for expected in whole[:4]:
        rows = [next(part)["tokens"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(rows), expected["tokens"])
    # The states of the hosts together go on on any other number of them.
    state = {k: v for part in parts for k, v in json.loads(json.dumps(part.get_state())).items()}
    for rows in (range(8), range(2, 4), range(3, 6)):
        resumed = dataset.iterator(rows)
        resumed.set_state(state)
        held = slice(resumed.rows[0], resumed.rows[-1] + 1)
        assert set(rows) <= set(resumed.rows.tolist())
        for expected in whole[4:]:
            batch = next(resumed)
            for key, values in expected.items():
                np.testing.assert_array_equal(batch[key], values[held])


def test_readers_share_the_examples(run_dir):
    found = [
        int(example[0])
        for batch in take(iter(make(run_dir, {"long": 1}, batch_size=4, readers=4)), 8)
        for example, *_ in examples_of(batch)
    ]
    counts = np.bincount(np.array(found) // 100, minlength=60)
    assert counts.max() <= 2 < 4 and len(found) > 45


def test_a_mixture_changes_at_its_batch_and_goes_on_where_it_was(run_dir):
    changes = {4: {"short": 1}, 8: {"long": 1}}
    dataset = make(run_dir, {"long": 1}, changes=changes, batch_size=2, open_rows=2)
    kinds, longs = [], []
    iterator = iter(dataset)
    for _ in range(12):
        state = json.loads(json.dumps(iterator.get_state()))
        batch = next(iterator)
        starts = [int(example[0]) for example, *_ in examples_of(batch)]
        kinds.append({"short" if start % 100 == 50 else "long" for start in starts})
        longs.append([start // 100 for start in starts if start % 100 == 0])
        again = iter(dataset)
        again.set_state(state)
        np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])
    assert kinds == [{"long"}] * 4 + [{"short"}] * 4 + [{"long"}] * 4
    before, after = (sum(longs[part], []) for part in (slice(0, 4), slice(8, 12)))
    assert len(before) >= 12 and len(set(before) & set(after)) <= 3  # of one epoch of 60
    assert dataset.mixture == {"long": 1.0} and list(dataset.eval_sets()) == ["long", "short"]


@pytest.mark.parametrize("kind", ["packed", "preference"])
def test_resuming_is_exact(run_dir, kind):
    def fresh():
        if kind == "packed":
            return iter(make(run_dir))
        return iter(lm_reader.PreferenceDataset(run_dir, sequence_length=64, batch_size=2))

    reference = take(fresh(), 30)
    for stop in (0, 1, 17):
        iterator = fresh()
        take(iterator, stop)
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = fresh()
        resumed.set_state(state)
        for expected in reference[stop : stop + 12]:
            batch = next(resumed)
            assert batch.keys() == expected.keys()
            for key, values in expected.items():
                np.testing.assert_array_equal(batch[key], values)


def test_preference_batches(run_dir):
    dataset = lm_reader.PreferenceDataset(run_dir, sequence_length=32, batch_size=2)
    for batch in [*take(iter(dataset), 5), *dataset.eval_sets()["aqaa_preference"]]:
        for prefix in ("chosen_", "rejected_"):
            part = {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
            assert_whole(part, 32)
            assert part["segment_ids"].max() == 1
        used = {p: (batch[p + "segment_ids"] > 0).sum(1) for p in ("chosen_", "rejected_")}
        np.testing.assert_array_equal(used["chosen_"], used["rejected_"] + 1)
    assert len(list(dataset.eval_sets()["aqaa_preference"])) == 3


@pytest.mark.parametrize(
    ("kind", "settings_"),
    [
        (make, {"sequence_length": 64, "batch_size": 4}),
        (lm_reader.PreferenceDataset, {"sequence_length": 32, "batch_size": 2}),
    ],
)
def test_shapes_are_known_without_data(run_dir, kind, settings_):
    dataset = kind(run_dir, **settings_)
    (batch,) = take(iter(dataset), 1)
    found = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert type(dataset).batch_shapes(**settings_) == found


def test_too_long_examples_are_announced(run_dir, caplog):
    dataset = make(run_dir, {"long": 1}, sequence_length=30)
    assert 0 < dataset.dropped["long"] < 60
    assert f"left out {dataset.dropped['long']} of 60 examples" in caplog.text
    for batch in take(iter(dataset), 10):
        assert_whole(batch, 30)


def test_bad_input(run_dir, tmp_path):
    with pytest.raises(UserError, match="'asr' .*has aqaa_preference, long, short: .*cache_tasks"):
        make(run_dir, {"asr": 1})
    with pytest.raises(UserError, match="sum to zero"):
        make(run_dir, {"long": 0})
    with pytest.raises(UserError, match="'long' is -1"):
        make(run_dir, {"long": -1})
    for share in (float("nan"), float("inf"), "one"):
        with pytest.raises(UserError, match=f"'long' is {share}, not a number"):
            make(run_dir, {"long": share})
    with pytest.raises(UserError, match=r"mixture 'long': give \{task: share\}"):
        make(run_dir, "long")
    with pytest.raises(UserError, match="readers=1: a host wants 2 rows of batch_size=4.*as many"):
        make(run_dir).iterator([0, 1])
    with pytest.raises(UserError, match="readers=3 does not divide batch_size=4"):
        make(run_dir, readers=3)
    with pytest.raises(UserError, match="changes: 0 is no batch"):
        make(run_dir, changes={0: {"long": 1}})
    with pytest.raises(UserError, match="sum to zero"):
        make(run_dir, changes={5: {"long": 0}})
    with pytest.raises(UserError, match="none of reader 1: go on with as many readers"):
        iter(make(run_dir, readers=2)).set_state(iter(make(run_dir)).get_state())
    with pytest.raises(UserError, match="long/train.*sequence_length=10"):
        make(run_dir, {"long": 1}, sequence_length=10)
    write_cache(tmp_path, "a", "train", [5, 6])
    write_cache(tmp_path, "b", "train", [5, 6], sizes={"size": 7})
    with pytest.raises(UserError, match="different vocabularies"):
        make(str(tmp_path), {"a": 1, "b": 1})
    np.save(lm_reader.lengths_path(str(tmp_path / "tasks" / "a"), "train"), np.ones(3, np.int32))
    with pytest.raises(UserError, match="a/train-lengths.npy"):
        make(str(tmp_path), {"a": 1})


def test_no_tensorflow(run_dir):
    program = (
        "import sys; from t5x_audio.data import lm_reader;"
        f"d = lm_reader.PackedLmDataset({run_dir!r}, {{'long': 1}}, sequence_length=64);"
        "next(iter(d)); sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_state_is_small(run_dir):
    iterator = iter(make(run_dir))
    list(itertools.islice(iterator, 50))
    assert len(json.dumps(iterator.get_state())) < 2000
