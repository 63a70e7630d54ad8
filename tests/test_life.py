"""The list of jobs: commands as printed, skipping, failing, and one whole life at toy size."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from t5x_audio import life

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_dry_run_names_every_job_in_order(in_root, capsys, tmp_path):
    assert life.main(["--size=toy", f"--run_dir={tmp_path}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    commands = [line for line in printed.splitlines() if line.startswith("  python")]
    assert [c.split("gin/runs/")[1].split(".gin")[0] for c in commands] == [
        stage.name for stage in life.STAGES
    ]
    assert not list(tmp_path.iterdir())


def test_every_stage_has_its_gin_file_and_entry_point():
    for stage in life.STAGES:
        assert (ROOT / f"gin/runs/{stage.name}.gin").is_file()
        assert (ROOT / f"t5x_audio/{stage.job}.py").is_file()


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--size=giant"], "gin/models/giant.gin"),
        (["--size=toy", "--only=sft9"], "'sft9'"),
        (["--size=toy", "--model_dri=x"], "--model_dri"),
    ],
)
def test_bad_flags_are_one_line(in_root, capsys, flags, culprit):
    assert life.main(flags) == 2
    error = capsys.readouterr().err
    assert culprit in error
    assert error.count("\n") == 1


def test_finished_stages_are_skipped_and_a_failure_stops(in_root, monkeypatch, tmp_path):
    started = []

    def fake_run(argv):
        name = argv[4].split("gin/runs/")[1].removesuffix(".gin")
        started.append(name)
        stage = next(stage for stage in life.STAGES if stage.name == name)
        (tmp_path / stage.output).mkdir(exist_ok=True)
        return 2 if started.count(name) > 1 else 0

    monkeypatch.setattr(life, "run_job", fake_run)
    flags = ["--size=toy", f"--run_dir={tmp_path}"]
    assert life.main(flags) == 0
    assert started == [stage.name for stage in life.STAGES]
    assert life.main(flags) == 0
    assert len(started) == len(life.STAGES)

    (tmp_path / "sft1").rmdir()  # an output that is gone is made again
    assert life.main(flags) == 2
    assert started[-1] == "sft1"


def test_time_before_an_interruption_counts(in_root, monkeypatch, tmp_path):
    (tmp_path / "corpus").mkdir()
    codes, clock = iter([130, 0, 0, 0]), iter(range(0, 1000, 10))
    writes = iter([True, True, False, True])

    def job(argv):
        if next(writes):
            (tmp_path / "corpus" / f"{time.time_ns()}").touch()
        return next(codes)

    monkeypatch.setattr(life, "run_job", job)
    monkeypatch.setattr(life.time, "monotonic", lambda: next(clock))
    stage, ledger = life.STAGES[0], life.Ledger(tmp_path)
    argv = life.command(stage, "toy", str(tmp_path), [])
    assert life.run_stage(stage, argv, ledger) == 130
    assert not life.Ledger(tmp_path).finished(stage, argv)
    assert life.run_stage(stage, argv, ledger) == 0
    again = life.Ledger(tmp_path)
    assert again.finished(stage, argv) and again.rows[stage.name]["seconds"] == 20
    # Other settings are another run; its time is the old one when it found nothing to do.
    for other, seconds in (("other", 20), ("a third", 10)):
        monkeypatch.setattr(life, "settings", lambda argv, other=other: other)
        assert not again.finished(stage, argv)
        assert life.run_stage(stage, argv, again) == 0 and again.finished(stage, argv)
        assert again.rows[stage.name]["seconds"] == seconds


def test_two_lives_of_one_run_are_refused(in_root, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(life, "run_job", lambda argv: 0)
    with life.only_here(str(tmp_path)) as alone:
        assert alone
        assert life.main(["--size=toy", f"--run_dir={tmp_path}"]) == 2
        assert "another process" in capsys.readouterr().err
    assert life.main(["--size=toy", f"--run_dir={tmp_path}"]) == 0


def test_a_run_directory_that_cannot_be_is_one_line(in_root, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert life.main(["--size=toy", f"--run_dir={tmp_path}/file/run"]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and error.count("\n") == 1


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_job_may_save_its_work(tmp_path, sent, code):
    """The signal goes to the whole group, as from a terminal; the job takes a second to stop."""
    job = (
        "import pathlib, signal, sys, time\n"
        "def stop(number, frame):\n"
        "    time.sleep(1); pathlib.Path('saved').touch(); sys.exit(128 + number)\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, stop)\n"
        "pathlib.Path('ready').touch(); time.sleep(60)\n"
    )
    parent = "import sys; from t5x_audio import life; sys.exit(life.run_job(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", parent, sys.executable, "-c", job],
        cwd=tmp_path, env=environment, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    target = process.pid if sent == signal.SIGTERM else -process.pid
    os.kill(target, sent)
    assert process.wait(timeout=30) == code and (tmp_path / "saved").exists()


def test_settings_follow_included_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.gin").write_text("include 'sizes.gin'\n")
    (tmp_path / "sizes.gin").write_text("WIDTH = 1\n")
    before = life.settings(["python", "--gin_file=run.gin"])
    assert before == life.settings(["python", "--gin_file=run.gin"])
    (tmp_path / "sizes.gin").write_text("WIDTH = 2\n")
    assert before != life.settings(["python", "--gin_file=run.gin"])


def test_the_whole_life_at_toy_size_on_a_mesh(tmp_path):
    """Every job in turn, 2 x 2 simulated devices (data x tensor), on speech made for the test."""
    run_dir = tmp_path / "toy"
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "t5x_audio.life",
            "--size=toy",
            f"--run_dir={run_dir}",
            "--gin_file=gin/hardware/cpu_4_devices.gin",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]

    results = json.loads((run_dir / "evaluation" / "results.json").read_text())
    assert results["questions"]
    assert (run_dir / "report.html").stat().st_size > 100_000
    for stage in ("linguistic", "semantic", "pretrain1", "sft1", "flow", "hift"):
        rows = (run_dir / stage / "metrics.jsonl").read_text().splitlines()
        # HiFT's loss has the discriminators' terms in it from the tenth step on.
        name = "mel_l1" if stage == "hift" else "loss"
        losses = [row[name] for row in map(json.loads, rows) if row["split"] == "train"]
        assert losses[-1] < losses[0], stage
