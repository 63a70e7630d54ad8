import errno
import json
import os
import subprocess
import sys

import pytest

from t5x_audio import launch

JOB = """
import dataclasses, errno
from t5x_audio.errors import UserError

@dataclasses.dataclass(frozen=True)
class Thing:
    size: int
    name: str = "thing"

class Data:
    def __init__(self, directory, width):
        raise OSError("opened")

    @staticmethod
    def batch_shapes(width=1):
        return {"x": [width]}

class Shapeless:
    pass

def run(*, thing, steps=1, model_dir=None, run_dir=None, word=None, fail="", dataset=None):
    if fail == "user":
        raise UserError("clip.wav: silent; record it again")
    if fail == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "/some/file")
    if fail == "stop":
        raise KeyboardInterrupt("saved at step 7")
    if fail == "bug":
        raise TypeError("inner() missing 1 required positional argument: 'x'")
    return {"size": thing.size, "steps": steps, "dir": model_dir, "run_dir": run_dir, "word": word}
"""
BORROWER = """
def run(*, thing, batch_shapes, steps=0, word="own"):
    return {"size": thing.size, "steps": steps, "word": word, "shapes": batch_shapes()}
"""
MODEL = """
from __gin__ import dynamic_registration
import toyjob
# Commonly overridden: NICKNAME
SIZE = 3
RUN_DIR = 'runs/toy'
toyjob.Thing.size = %SIZE
"""
TASK = """
from __gin__ import dynamic_registration
import toyjob
STEPS = %gin.REQUIRED
toyjob.run.thing = @toyjob.Thing()
toyjob.run.steps = %STEPS
toyjob.run.run_dir = %RUN_DIR
"""


@pytest.fixture(scope="module")
def toyjob(tmp_path_factory):
    """One module for all tests: gin's registry outlives a test."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "toyjob.py").write_text(JOB)
    (folder / "toyborrower.py").write_text(BORROWER)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def job(tmp_path, monkeypatch, toyjob):
    (tmp_path / "model.gin").write_text(MODEL)
    (tmp_path / "task.gin").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)

    def call(*arguments, files=("model.gin", "task.gin"), add_flags=None):
        arguments = [f"--gin_file={name}" for name in files] + list(arguments)
        return launch.launch("toyjob", "A toy.", arguments, add_flags)

    return call


def done(capsys):
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("files", [("model.gin", "task.gin"), ("task.gin", "model.gin")])
def test_files_macros_and_unquoted_paths(job, capsys, files):
    code = job("--gin.STEPS=5", "--gin.RUN_DIR=runs/demo-1", "--json", "--model_dir=m", files=files)
    assert code == 0
    expected = {"size": 3, "steps": 5, "dir": "m", "run_dir": "runs/demo-1", "word": None}
    assert done(capsys) == expected


def test_parameters_by_module_name_even_if_no_file_binds_them(job, capsys):
    flags = ("--gin.STEPS=5", "--gin.toyjob.Thing.name=x", "--gin.toyjob.run.word=two words")
    assert job(*flags) == 0
    assert capsys.readouterr().out == (
        "done: size=3 steps=5 dir=None run_dir=runs/toy word='two words'\n"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("true", True),
        ("None", None),
        ("'3'", "3"),
        ("(1, 2)", [1, 2]),
        ("a%b", "a%b"),
    ],
)
def test_literals(job, capsys, text, value):
    assert job("--gin.STEPS=1", f"--gin.toyjob.run.word={text}", "--json") == 0
    assert done(capsys)["word"] == value


def borrow(job, *lines):
    with open("task.gin", "a") as file:
        file.write("\n".join(lines) + "\n")
    files = ["--gin_file=model.gin", "--gin_file=task.gin"]
    arguments = [*files, "--gin.STEPS=5", "--json"]
    return launch.launch("toyborrower", "Borrows.", arguments, settings_of="toyjob")


def test_a_job_may_have_the_settings_of_another_without_opening_its_data(job, capsys):
    lines = ("toyjob.run.dataset = @toyjob.Data()", "toyjob.Data.width = 7", "WIDE = 2",
             "toyjob.Data.directory = %RUN_DIR")  # fmt: skip
    assert borrow(job, *lines) == 0
    assert done(capsys) == {"size": 3, "steps": 5, "word": "own", "shapes": {"x": [7]}}


def test_a_dataset_that_cannot_tell_its_shapes_is_named(job, capsys):
    assert borrow(job, "toyjob.run.dataset = @toyjob.Shapeless()") == 2
    assert "shapes of Shapeless are not known without its data" in capsys.readouterr().err


def test_settings_that_no_file_has_are_asked_for(job, capsys):
    arguments = ["--gin_file=model.gin"]
    assert launch.launch("toyborrower", "Borrows.", arguments, settings_of="toyjob") == 2
    expected = "error: no gin file given here configures toyjob; add --gin_file=...\n"
    assert capsys.readouterr().err == expected


def test_own_flags_reach_run(job, capsys):
    add = lambda parser: parser.add_argument("--word")  # noqa: E731
    assert job("--gin.STEPS=1", "--word", "hello", "--json", add_flags=add) == 0
    assert done(capsys)["word"] == "hello"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "STEPS is required; add --gin.STEPS=..."),
        (
            ["--gin.STEPZ=1"],
            "--gin.STEPZ: no gin file given here mentions STEPZ; did you mean STEPS?",
        ),
        (
            ["--gin.STEPS=1", "--gin.toyjob.run.stepz=1"],
            "--gin.toyjob.run.stepz=1: Configurable 'toyjob.run' doesn't have a parameter named "
            "'stepz'; did you mean steps?",
        ),
        (
            ["--gin.STEPS=1", "--gin.toyjob.Thong.size=1"],
            "--gin.toyjob.Thong.size=1: Couldn't resolve selector toyjob.Thong; "
            "did you mean Thing?",
        ),
        (["--gin.STEPS=[1,"], "--gin.STEPS=[1,: not gin syntax"),
        (["--gin.STEPS"], "--gin.STEPS: write --gin.NAME=value (see --help)"),
        (["--steps=1"], "unrecognized arguments: --steps=1 (see --help)"),
        (["--gin.STEPS=1", "--gin_file=absent.gin"], "--gin_file=absent.gin: no such file"),
        (["--gin.STEPS=1", "--gin.toyjob.run.fail=user"], "clip.wav: silent; record it again"),
        (
            ["--gin.STEPS=1", "--gin.toyjob.run.fail=disk"],
            "no space left on the disk of /some/file; free some and start again",
        ),
    ],
)
def test_bad_input_is_one_line(job, capsys, arguments, line):
    try:
        code = job(*arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_bad_files_are_named(job, capsys, tmp_path):
    (tmp_path / "bad.gin").write_text(
        "from __gin__ import dynamic_registration\nimport toyjob\n\ntoyjob.run.wrd = 1\n"
    )
    assert job(files=("bad.gin",)) == 2
    assert "bad.gin line 4: Configurable 'toyjob.run' doesn't have" in capsys.readouterr().err
    (tmp_path / "syntax.gin").write_text("STEPS = = 1\n")
    assert job(files=("syntax.gin",)) == 2
    assert capsys.readouterr().err.startswith("error: syntax.gin")
    (tmp_path / "outer.gin").write_text("include 'gone.gin'\n")
    assert job(files=("outer.gin",)) == 2
    assert "outer.gin: includes gone.gin, which does not exist" in capsys.readouterr().err


def test_unset_macro_and_unbound_parameter(job, capsys):
    assert job("--gin.STEPS=1", files=("task.gin",)) == 2
    assert capsys.readouterr().err == "error: RUN_DIR has no value; add --gin.RUN_DIR=...\n"
    assert job(files=()) == 2
    assert capsys.readouterr().err.startswith("error: run needs 'thing'; bind it with --gin_file=")


def test_a_flag_the_job_has_no_use_for(job, capsys):
    add = lambda parser: parser.add_argument("--colour")  # noqa: E731
    assert job("--gin.STEPS=1", "--colour=red", add_flags=add) == 2
    assert capsys.readouterr().err == "error: --colour: toyjob has no such setting\n"


def test_interruption_and_defects(job, capsys):
    assert job("--gin.STEPS=1", "--gin.toyjob.run.fail=stop") == 130
    expected = "interrupted: saved at step 7; start again to continue\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(TypeError):
        job("--gin.STEPS=1", "--gin.toyjob.run.fail=bug")


def test_a_disk_that_is_full_is_seen_through_other_exceptions():
    error = ValueError("write failed")
    error.__cause__ = OSError(errno.ENOSPC, "x")
    assert launch._full_disk(error, "runs/x") == "runs/x"
    store = 'writing "params/w": Failed writing: "/run/d/9f": No space left on device [os=\'28\']'
    assert launch._full_disk(ValueError(store), "x") == "/run/d/9f"
    assert launch._full_disk(ValueError("other"), "x") is None


def test_operative_config_holds_what_was_used(job, tmp_path):
    assert job("--gin.STEPS=5") == 0
    launch.save_operative_config(tmp_path)
    text = (tmp_path / "config.gin").read_text()
    assert "STEPS = 5" in text and "toyjob.Thing.size = %SIZE" in text


@pytest.mark.parametrize("module", ["train", "merge", "infer"])
def test_help_is_quick_and_loads_nothing_heavy(module):
    code = (
        "import sys, runpy\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('t5x_audio.{module}', run_name='__main__')\n"
        "finally: assert not {'jax', 'gin', 'tensorflow', 'numpy'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert run.returncode == 0 and "--gin_file" in run.stdout, run.stderr


def test_a_job_without_any_gin_file_names_what_it_needs():
    result = subprocess.run(
        [sys.executable, "-m", "t5x_audio.merge"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: run needs 'models' and 'weights'")
    assert result.stderr.count("\n") == 1
