"""Text of one's own becomes the task `text`, or one line says why not."""

import json
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from t5x_audio import cache_tasks, import_text
from t5x_audio.data import documents, lm_reader, records
from t5x_audio.errors import UserError
from t5x_audio.sequences.layouts import Layouts
from t5x_audio.sequences.vocabulary import Vocabulary
from tasks import text


def write(folder, *rows):
    path = folder / "books.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def run(folder, *files, **settings):
    return import_text.run(run_dir=str(folder / "run"), name="books", files=list(files), **settings)


def found(folder, split):
    return {r["id"]: r["text"] for r in records.open_records(folder / "run/texts/books", split)}


def test_rows_and_files_become_documents(tmp_path, capsys):
    rows = write(
        tmp_path,
        {"text": "One.", "id": "a", "split": "train"},
        "",
        {"text": "Two, too!", "split": "test"},
        {"text": "  ", "split": "train"},
    )
    (tmp_path / "more/deep").mkdir(parents=True)
    (tmp_path / "more/deep/c.txt").write_text("Three.")
    result = run(tmp_path, rows, str(tmp_path / "more"), validation=0.0, test=0.0)
    assert (result["documents"], result["characters"]) == (3, 4 + 9 + 6)
    assert found(tmp_path, "train") == {"a": "One.", f"{tmp_path}/more/deep/c": "Three."}
    assert found(tmp_path, "test") == {"books-3": "Two, too!"}
    assert run(tmp_path, rows) == result and "finished already" in capsys.readouterr().err


def test_normalised_text_is_words(tmp_path):
    run(tmp_path, write(tmp_path, {"text": "Call me Ishmael: 2 times!", "split": "train"}),
        normalize=True)  # fmt: skip
    assert list(found(tmp_path, "train").values()) == ["call me ishmael two times"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", r"books.jsonl: line 2: is no JSON"),
        ({"words": "x"}, "line 2: has no field 'text'"),
        ({"text": "x", "split": "dev"}, "line 2: split 'dev' is none of train, validation, test"),
    ],
)
def test_a_bad_row_is_one_line_and_leaves_nothing(tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        run(tmp_path, write(tmp_path, {"text": "x", "split": "train"}, row))
    assert not (tmp_path / "run/texts/books").exists()


def test_other_bad_input_is_one_line(tmp_path):
    with pytest.raises(UserError, match="none.txt: cannot be read as text"):
        run(tmp_path, str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="give one of --files=FILE and --tfds=NAME"):
        run(tmp_path)
    with pytest.raises(UserError, match="no text for the training split"):
        run(tmp_path, write(tmp_path, {"text": "x", "split": "test"}))
    with pytest.raises(UserError, match="shares that leave something over"):
        run(tmp_path, "x", validation=0.6, test=0.6)
    with pytest.raises(UserError, match="--tfds=no_such_builder: "):
        import_text.run(run_dir=str(tmp_path), name="x", tfds="no_such_builder")


@hypothesis.given(st.lists(st.integers(0, 40), max_size=5), st.integers(2, 12))
@hypothesis.settings(max_examples=30)
def test_pieces_are_the_whole_text_and_fit(vocabulary, lengths, sequence_length):
    layouts = Layouts(vocabulary)
    given = [{"id": str(i), "text": "ab " * n} for i, n in enumerate(lengths)]
    made = list(text.pieces(iter(given), layouts, sequence_length))
    for document in given:
        parts = [p["ids"] for p in made if p["id"].rsplit("-", 1)[0] == document["id"]]
        assert all(2 < len(part) <= sequence_length + 1 for part in parts)
        whole = np.concatenate([part[1:-1] for part in parts]) if parts else []
        np.testing.assert_array_equal(whole, vocabulary.encode_text(document["text"]))


def test_the_text_task_reads_documents_beside_questions(run_dir, tmp_path):
    for name in ("tokens", "corpus", "vocabulary"):
        shutil.copytree(f"{run_dir}/{name}", tmp_path / "run" / name)
    root = str(tmp_path / "run")
    arguments = {"model_dir": f"{root}/tasks", "run_dir": root, "mixtures": {"m": {"text": 1}}}
    arguments["sequence_length"] = 40
    assert cache_tasks.run(**arguments)["made"] == 1
    before = lm_reader.read_stats(f"{root}/tasks/text")["train"]["examples"]
    said = "one plus two is three " * 30
    run(tmp_path, write(tmp_path, {"text": said, "id": "long", "split": "train"}))
    assert cache_tasks.run(**arguments)["made"] == 1  # the new text is seen
    pieces = list(records.open_records(f"{root}/tasks/text", "train"))[before:]
    tokens = np.concatenate([piece["tokens"][1:-1] for piece in pieces])
    vocabulary = Vocabulary.load(f"{root}/vocabulary")
    assert vocabulary.decode_text(tokens).strip() == said.strip()
    assert all(piece["weights"].sum() == len(piece["tokens"]) - 1 for piece in pieces)
    assert not lm_reader.CachedTask(f"{root}/tasks/text", "train", 40).dropped
    assert documents.finished(root) == [f"{root}/texts/books"]
