"""`plan` compiles the step of `train` for a pod that is not there, and says what it needs."""

import json
import subprocess
import sys

import pytest

from t5x_audio.planning.compilation import shortage

MODEL = ["--gin_file=gin/models/toy.gin", "--gin_file=gin/runs/pretrain_stage1.gin"]
BACKBONE = ["--gin.BACKBONE_HEAD_DIM=128", "--gin.BACKBONE_DTYPE=bfloat16"]


def plan(*flags):
    command = [sys.executable, "-m", "t5x_audio.plan", *MODEL, "--gin.RUN_DIR=nowhere", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_small_pod(tmp_path):
    dump = tmp_path / "step.hlo"
    mesh = ["--gin_file=gin/hardware/v5p.gin", "--gin.DATA=2", "--gin.SEQUENCES_BATCH=8"]
    mesh += ["--gin.partitioning.ShardingRules.kv_heads=('data', 'tensor')"]
    keep = [f"--dump_hlo={dump}", f"--save_executable={tmp_path / 'step'}"]
    done = plan("--topology=v5p:2x2x2", *mesh, *BACKBONE, *keep, "--json")
    assert done.returncode == 0, done.stderr
    *table, closing = done.stdout.splitlines()
    report = json.loads(closing)
    assert report["chips"] == 8 and report["mesh"] == "data=2 x fsdp=4" and report["fits"]
    assert 0 < report["mfu_hybrid"] < 1 and 0 < report["mfu_roofline"] < 1
    # What XLA holds is what the shardings say, and something beside.
    state = report["parameters_bytes"] + report["optimizer_bytes"]
    assert state == pytest.approx(12 * report["parameters"] / 8, rel=0.3)  # small ones are whole
    assert report["total_bytes"] > state
    assert report["days"] * 86400 == pytest.approx(report["chip_hours"] / 8 * 3600, rel=1e-6)
    assert (tmp_path / "step").stat().st_size > 100_000
    text = dump.read_text()
    assert "ENTRY" in text
    assert "tpu_custom_call" in text  # attention is the Pallas kernel, not the path of a CPU
    assert any("all-gather" in line for line in table)


def test_a_decoder_on_a_small_pod():
    # 8 is no product of whole sides of 4x4: a side is split.
    heads = ["--gin.BACKBONE_HEADS=8", "--gin.BACKBONE_KV_HEADS=8", "--gin.TENSOR_PARALLELISM=8"]
    load = ["--context=256", "--batch=4", "--prompt=64", "--weights=int8"]
    mesh = ["--topology=v6e:4x4", "--gin_file=gin/hardware/v6e.gin"]
    done = plan(*mesh, *heads, *BACKBONE, *load, "--json")
    assert done.returncode == 0, done.stderr
    *table, closing = done.stdout.splitlines()
    report = json.loads(closing)
    assert report["mesh"] == "fsdp=2 x tensor=8" and report["fits"]
    # Matrices in int8, scales and embedding beside them; groups of heads over `tensor`.
    assert report["cache_bytes"] >= 2 * 4 * 256 * 128 * 2  # a layer's keys and values of one group
    assert report["token_seconds_roofline"] >= report["token_seconds_bytes"] > 0
    rate = report["tokens_per_second_per_stream"]
    assert rate == pytest.approx(1 / report["token_seconds_roofline"])
    assert report["tokens_per_second"] == pytest.approx(4 * rate)
    assert report["real_time"] == (rate >= report["tokens_per_second_of_speech"])
    assert report["tokens_per_second_of_speech"] == pytest.approx(5 / 0.12 * 25 / 15)
    assert any("16 tokens, modelled" in line for line in table)


def test_search():
    flags = ["--topology=v5p:2x2x1", "--gin_file=gin/hardware/v5p.gin", "--gin.SEQUENCES_BATCH=4"]
    done = plan(*flags, *BACKBONE, "--search", "DATA=3,2", "--json")
    assert done.returncode == 0, done.stderr
    *table, closing = done.stdout.splitlines()
    assert json.loads(closing)["DATA"] == "2"
    assert table[2].startswith("| 2 |") and "| yes |" in table[2]
    assert table[3].startswith("| 3 | mesh data=3") and "does not divide 4 devices" in table[3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (202.81G) exceeds available HBM (95.74G).",
            "total memory required for HLO temporaries (202.81G) exceeds available HBM (95.74G)",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 98.31G of 95.74G hbm. Exceeded hbm capacity by 2.57G.\n\nTotal",
            "Used 98.31G of 95.74G hbm",
        ),
        ("RESOURCE_EXHAUSTED: no room\nat all", "no room"),
    ],
)
def test_what_does_not_fit_is_told(text, said):
    assert shortage(text) == said


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--topology=v5p:3x9x100"], "--topology=v5p:3x9x100: no such shape"),
        (
            ["--topology=v5e:2x2", "--gin_file=gin/hardware/v5p.gin"],
            "sparse_core_collectives is for v5p, v6e, tpu7x, not v5e",
        ),
        (
            ["--topology=v5p:2x2x1", "--gin_file=gin/hardware/v5p.gin", "--gin.DATA=3"],
            "does not divide 4 devices",
        ),
        (
            ["--topology=v5p:2x2x1", "--context=64", "--prompt=64"],
            "the context must be longer than the prompt",
        ),
        (["--topology=v5p:2x2x1", "--batch=2"], "--batch is of a decoder: give its --context too"),
        (
            ["--topology=v5p:2x2x1", "--context=64", "--save_executable=step"],
            "--save_executable keeps a training step",
        ),
        (
            ["--topology=v5p:2x2x1", "--save_executable=no/such/step"],
            "--save_executable=no/such/step: no/such is no folder",
        ),
        (
            ["--topology=v5p:2x2x1", "--dump_hlo=one", "--search", "DATA=1,2"],
            "--dump_hlo: one file for all plans of --search",
        ),
        (
            ["--topology=v5p:2x2x1", "--context=64", "--weights=int4"],
            "weights='int4': use one of float32, bfloat16, int8",
        ),
    ],
)
def test_faults_are_one_line(flags, line):
    done = plan(*flags)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and line in done.stderr
