"""The scripts for GKE: their commands, the JobSet they render, and that JAX joins its hosts."""

import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys

import pytest
import yaml

SCRIPTS = pathlib.Path(__file__).parents[1] / "tpu_scripts" / "gke"
CLUSTER = ["--project", "mine", "--cluster", "tpus", "--zone", "us-east5-a"]
IMAGE = ["--image", "registry/it's:c0ffee"]
WORDS = ["t5x_audio.train", "--gin.RUN_DIR=/mnt/run/a b", "--gin.NOTE=it's $(HOME) at $5: {x}"]
# script -> the flags it needs besides CLUSTER and --name
NEEDED = {
    "cluster.sh": ["--bucket", "bucket"],
    "create.sh": ["--type", "v5p-256"],
    "build.sh": [*IMAGE, "--repo", "https://host/re po", "--commit", "c0ffee"],
    "launch.sh": ["--type", "v5p-256", *IMAGE, "--bucket", "bucket", "--", *WORDS],
    "watch.sh": ["--every", "0"],
    "logs.sh": ["--type", "v5p-16", "--output", "logs"],
    "delete.sh": [],
}
UNNAMED = ("build.sh", "cluster.sh")

# Notes its arguments and what it reads; `get` and `describe` answer from lists of the environment.
FAKE = """#!/bin/bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >> "$CALLS"
case "$*" in
  *"apply -f -"*) cat > "$CALLS.manifest" ;;
  *" get "*)
    asked=$(grep -c " get " "$CALLS")
    answer=$(sed -n "${asked}p" <<<"$STATES")
    [ "$answer" != down ] || exit 1
    echo "$answer" ;;
  *" logs "*) echo "a line" ;;
  *"node-pools describe"*) [ "$4" = pod-0 ] ;;
  *"clusters describe"*) false ;;
  *"projects describe"*) echo 42 ;;
esac
"""


def run(script, *flags, **environment):
    flags = list(flags)
    before, job = flags, []
    if "--" in flags:
        before, job = flags[: flags.index("--")], flags[flags.index("--") :]
    name = [] if script in UNNAMED else ["--name", "pod"]
    cluster = [] if script == "build.sh" else CLUSTER
    return subprocess.run(
        [SCRIPTS / script, *name, *cluster, *before, *job], capture_output=True, text=True,
        check=False, timeout=30, env=os.environ | environment,
    )  # fmt: skip


def dry(script, *flags):
    result = run(script, "--dry-run", *flags, *NEEDED[script])
    assert result.returncode == 0, result.stderr
    return result.stdout


def commands(text):
    return [
        shlex.split(line) for line in re.sub(r"<<'MANIFEST'.*", "", text, flags=re.S).splitlines()
    ]


def manifest(*flags):
    text = dry("launch.sh", *flags)
    return yaml.safe_load(re.search(r"<<'MANIFEST'\n(.*)^MANIFEST$", text, re.S | re.M)[1])


def pods(jobset):
    (slices,) = jobset["spec"]["replicatedJobs"]
    return slices["replicas"], slices["template"]["spec"]


def container(jobset):
    (job,) = pods(jobset)[1]["template"]["spec"]["containers"]
    return job


@pytest.fixture
def cloud(tmp_path):
    """The environment of a cloud that is not there, and a function for the calls it got."""
    for name in ("kubectl", "gcloud", "docker"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)}
    return environment, lambda: [shlex.split(line) for line in calls.read_text().splitlines()]


def test_all_scripts_are_here():
    assert {path.name for path in SCRIPTS.glob("*.sh")} == {*NEEDED, "common.sh"}


@pytest.mark.parametrize("script", NEEDED)
def test_every_command_names_its_cluster(script):
    printed = commands(dry(script))
    assert printed
    for command in printed:
        if command[0] == "kubectl":
            assert command[1:3] == ["--context", "gke_mine_us-east5_tpus"]
        elif command[:2] == ["gcloud", "container"]:
            assert command[command.index("--project") + 1] == "mine"
            assert command[command.index("--location") + 1] == "us-east5"


@pytest.mark.parametrize(
    ("kind", "accelerator", "topology", "hosts"),
    [
        (["v5p-2048"], "tpu-v5p-slice", "8x8x16", 256),
        (["v5p-8"], "tpu-v5p-slice", "2x2x1", 1),
        (["v5p-1536", "--topology", "8x8x12"], "tpu-v5p-slice", "8x8x12", 192),
        (["v4-64"], "tpu-v4-podslice", "2x4x4", 8),
        (["v5litepod-256"], "tpu-v5-lite-podslice", "16x16", 64),
        (["v6e-16"], "tpu-v6e-slice", "4x4", 4),
    ],
)
def test_a_slice_is_one_job_of_all_its_hosts(kind, accelerator, topology, hosts):
    flags = ["--type", *kind, *IMAGE, "--bucket", "b", "--dry-run", "--", "x"]
    text = run("launch.sh", *flags).stdout
    replicas, job = pods(yaml.safe_load(text[text.index("apiVersion") : text.rindex("MANIFEST")]))
    assert (replicas, job["parallelism"], job["completions"]) == (1, hosts, hosts)
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    (pool,) = commands(run("create.sh", "--dry-run", "--type", *kind).stdout)
    assert pool[pool.index("--num-nodes") + 1] == str(hosts)
    given = pool[pool.index("--tpu-topology") + 1] if "--tpu-topology" in pool else None
    assert given == (topology if hosts > 1 else None)


def test_the_manifest_has_what_a_run_needs():
    jobset = manifest("--slices", "2")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"] == {
        "name": "pod",
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }
    replicas, job = pods(jobset)
    pod = job["template"]["spec"]
    assert replicas == 2
    assert container(jobset)["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container(jobset)["image"] == "registry/it's:c0ffee"
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert pod["terminationGracePeriodSeconds"] >= 300
    # The bucket, mounted as tpu_scripts/setup.sh mounts it.
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    (mount,), (volume,) = container(jobset)["volumeMounts"], pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/mnt/run"}
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    attributes = volume["csi"]["volumeAttributes"]
    assert attributes["bucketName"] == "bucket" and attributes["hostNetworkPodKSA"] == "true"
    setup = (SCRIPTS.parent / "setup.sh").read_text()
    limit = re.search(r"--rename-dir-limit (\d+)", setup)[1]
    assert attributes["mountOptions"] == f"implicit-dirs,rename-dir-limit={limit}"


def test_interruptions_restart_for_ever_crashes_do_not_and_bad_input_ends():
    """The first rule that matches decides: of the job for a pod, then of the JobSet for a job."""
    jobset = manifest("--max-restarts", "7")
    _, job = pods(jobset)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"

    def action(code=None, disrupted=False):
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
            assert rule["action"] == "FailJob"
            codes = rule.get("onExitCodes", {"values": []})
            if code in codes["values"]:
                assert codes["containerName"] == container(jobset)["name"]
                found = (
                    f"Container job for pod default/pod-slice-0-0-x failed with exit code {code}"
                )
            elif disrupted and rule.get("onPodConditions", [{}])[0].get("status") == "True":
                found = "Pod default/pod-slice-0-0-x has condition DisruptionTarget"
            else:
                continue
            reason, message = "PodFailurePolicy", f"{found} matching FailJob rule at index {index}"
            break
        for rule in policy["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [".*"])
            matches = any(re.search(pattern, message) for pattern in patterns)
            if matches and reason in rule["onJobFailureReasons"]:
                return rule["action"]
        return "RestartJobSet"

    assert action(2) == "FailJobSet"
    assert action(130) == action(disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(1) == action(134) == action(132) == "RestartJobSet"


def test_the_job_keeps_its_words():
    command = container(manifest())["command"]
    # As Kubernetes reads a command: $$ is one $, and $(NAME) would be filled in.
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", word) for word in command)
    read = [word.replace("$$", "$") for word in command]
    assert read == ["python", "-m", *WORDS, "--distributed"]


def test_a_dry_run_prints_what_a_run_does(cloud):
    environment, calls = cloud
    assert run("launch.sh", *NEEDED["launch.sh"], **environment).returncode == 0
    done, applied = calls(), pathlib.Path(f"{environment['CALLS']}.manifest").read_text()
    assert [call[3] for call in done] == ["delete", "apply"] and "--cascade=foreground" in done[0]
    pathlib.Path(environment["CALLS"]).unlink()
    subprocess.run(["bash", "-c", dry("launch.sh")], check=True, env=os.environ | environment)
    assert calls() == done
    assert pathlib.Path(f"{environment['CALLS']}.manifest").read_text() == applied


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["state= restarts=0", "down", "state= restarts=1", "state=Completed restarts=1"], 0),
        (["state= restarts=0", "state=Failed restarts=20"], 1),
        ([], 3),
    ],
)
def test_a_job_is_watched_through_restarts_to_its_end(cloud, states, code):
    environment, calls = cloud
    result = run("watch.sh", "--every", "0", STATES="\n".join(states), **environment)
    assert result.returncode == code, result.stderr
    told = [line for line in result.stdout.splitlines() if line.startswith(("state=", "UNKNOWN"))]
    assert told == ["UNKNOWN" if state == "down" else state for state in states]
    assert sum("get" in call for call in calls()) == max(len(states), 1)


def test_a_cluster_and_its_pools_are_made_once_and_deleted(cloud):
    environment, calls = cloud
    for script in ("cluster.sh", "create.sh", "delete.sh"):
        result = run(script, "--slices", "2", *NEEDED[script], **environment)
        assert result.returncode == 0, result.stderr
    made = [call[2:5] for call in calls() if call[0] == "gcloud" and "describe" not in call]
    assert ["clusters", "create", "tpus"] in made
    assert ["node-pools", "create", "pod-0"] not in made  # it is there
    assert ["node-pools", "create", "pod-1"] in made
    assert made[-2:] == [["node-pools", "delete", "pod-0"], ["node-pools", "delete", "pod-1"]]
    (binding,) = [call for call in calls() if "add-iam-policy-binding" in call]
    assert binding[-1].startswith("principal://iam.googleapis.com/projects/42/")


def test_the_log_of_every_host_is_a_file(cloud, tmp_path):
    environment, calls = cloud
    flags = ["--slices", "2", "--type", "v6e-8", "--output", str(tmp_path / "logs")]
    assert run("logs.sh", *flags, **environment).returncode == 0
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    assert names == {f"pod-{index}-{host}.log" for index in (0, 1) for host in (0, 1)}
    assert (tmp_path / "logs/pod-1-1.log").read_text() == "a line\n"
    assert len({tuple(call) for call in calls()}) == 4


def test_mistakes_are_one_line():
    for script, flags, said in (
        ("create.sh", [], "--type is required"),
        ("create.sh", ["--type"], "--type wants a value"),
        ("create.sh", ["--type", "v9-8"], "--type v9-8: give v4-N or v5p-N"),
        ("create.sh", ["--type", "v5p-9"], "--type v5p-9: no usual shape"),
        ("create.sh", ["--type", "v6e-1"], "--type v6e-1: no usual shape"),
        ("create.sh", ["--type", "v6e-8", "--topology", "8"], "--topology 8: write AxB"),
        ("create.sh", ["--type", "v6e-8", "--topology", "4x4"], "--topology 4x4: not as many"),
        ("create.sh", ["--type", "v6e-2", "--topology", "1x2"], "--topology 1x2: not as many"),
        ("create.sh", ["--type", "v5p-8", "--slices", "2"], "--slices 2: GKE joins no slices"),
        ("launch.sh", NEEDED["launch.sh"][:-4], "no job: name it after --"),
        ("launch.sh", [*NEEDED["launch.sh"], "a\nb"], "the job has a line break"),
        ("launch.sh", ["--max-restarts", "x", *NEEDED["launch.sh"]], "--max-restarts x: give"),
        ("watch.sh", ["--name", "Pod_1"], "--name Pod_1: up to 36 small letters"),
        ("watch.sh", ["--typ", "x"], "unknown flag --typ"),
        ("cluster.sh", [], "--bucket is required"),
    ):
        result = run(script, "--dry-run", *flags)
        assert result.returncode == 2 and result.stderr.startswith(f"error: {said}"), result.stderr
        assert result.stderr.count("\n") == 1


def test_the_image_has_what_setup_installs():
    recipe = (SCRIPTS / "Dockerfile").read_text()
    python = re.search(r"^FROM python:(\d+)\.(\d+)-", recipe, re.M)
    constraints = f"constraints/py{python[1]}{python[2]}.txt"
    assert f"-c {constraints} -r requirements.txt 'jax[tpu]'" in recipe
    assert (SCRIPTS.parents[1] / constraints).exists()
    assert "-r requirements.txt \\\n'jax[tpu]'" in (SCRIPTS.parent / "setup.sh").read_text()
    build, push = commands(dry("build.sh"))
    assert "REPO=https://host/re po" in build and "COMMIT=c0ffee" in build
    assert set(re.findall(r"^ARG (\w+)", recipe, re.M)) == {"REPO", "COMMIT"}
    assert build[build.index("--tag") + 1] == push[-1] == "registry/it's:c0ffee"


def test_jax_joins_the_hosts_of_two_slices_by_what_gke_tells_them():
    """Plain --distributed, which the manifest has: 2 slices of 2 hosts, on CPUs of this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    code = (
        "from t5x_audio import launch; launch._join_hosts(''); import jax; "
        "print(jax.process_index(), jax.process_count(), jax.device_count())"
    )
    told = {
        # As on a TPU: JAX asks for GKE only there.
        "JAX_FORCE_TPU_INIT": "1", "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(port),
        "JAX_NUM_CPU_DEVICES": "1", "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "2",
    }  # fmt: skip
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
            env=os.environ | told | {"MEGASCALE_SLICE_ID": index, "TPU_WORKER_ID": worker},
        )
        for index in "01" for worker in "01"
    ]  # fmt: skip
    said = [host.communicate(timeout=120)[0].strip() for host in hosts]
    assert said == [f"{index} 4 4" for index in range(4)]
