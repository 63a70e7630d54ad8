"""Every script prints its command when run dry, and refuses a missing flag in one line."""

import pathlib
import shlex
import subprocess

import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "tpu_scripts"
COMMON = ["--name", "pod", "--zone", "us-east5-a"]
JOB = ["--", "t5x_audio.train", "--gin.RUN_DIR=gs://a b/run"]


def run(script, *flags):
    return subprocess.run(
        [SCRIPTS / script, *flags], capture_output=True, text=True, check=False, timeout=30
    )


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        ("create.sh", ["--type", "v5p-256", "--spot"], ["create", "v5p-256", "--spot"]),
        ("launch.sh", ["--repo", "u", "--commit", "c", *JOB], ["tpu-vm", "--worker", "all"]),
        ("delete.sh", [], ["delete", "--force"]),
    ],
)
def test_dry_run_prints_the_command(script, flags, expected):
    result = run(script, *COMMON, "--dry-run", *flags)
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    assert words[:3] == ["gcloud", "compute", "tpus"]
    assert words[words.index("--zone") + 1] == "us-east5-a"
    assert all(word in words for word in expected)


def test_the_job_keeps_its_quotes():
    result = run("launch.sh", *COMMON, "--dry-run", "--repo", "u", "--commit", "c", *JOB)
    start = shlex.split(result.stdout.splitlines()[1])[
        shlex.split(result.stdout.splitlines()[1]).index("--command") + 1
    ]
    assert "--gin.RUN_DIR=gs://a b/run" in shlex.split(start)


@pytest.mark.parametrize("script", ["create.sh", "launch.sh", "delete.sh"])
def test_a_missing_flag_is_one_line(script):
    result = run(script, "--zone", "us-east5-a", "--dry-run")
    assert result.returncode == 2
    assert result.stderr == f"error: --name is required: see {SCRIPTS / script} --help\n"
