"""The gin files of the tasks parse, and name tasks that exist."""

import glob
import json
import os
import types

import pytest

import tasks
from t5x_audio import launch
from t5x_audio.errors import UserError

SIZES = [f"gin/models/{size}.gin" for size in ("toy", "demo", "tiny")]


@pytest.fixture
def parsed(monkeypatch):
    import gin

    def parse(*paths):
        gin.clear_config()
        gin.parse_config("RUN_DIR = 'runs/x'")
        for path in paths:
            gin.parse_config_file(path)
        return gin

    yield parse
    gin.clear_config()


def test_mixtures_name_tasks(parsed):
    gin = parsed("gin/tasks/mixtures.gin")
    for stage in ("STAGE1", "STAGE2", "STAGE3", "SFT1", "SFT2"):
        mixture = gin.query_parameter(f"{stage}_MIXTURE/gin.macro.value")
        assert mixture.keys() <= set(tasks.TASKS) and min(mixture.values()) > 0


@pytest.mark.parametrize("path", sorted(set(glob.glob("gin/tasks/*.gin"))))
def test_every_macro_is_set_by_every_size(parsed, path):
    for model in SIZES:
        parsed(model, path).finalize()


@pytest.mark.parametrize("kind", ["AdamW", "Adafactor", "Muon"])
@pytest.mark.parametrize("run", ["pretrain_stage1", "pretrain_stage3", "sft1", "dpo"])
def test_every_stage_takes_any_optimiser(parsed, run, kind):
    gin = parsed("gin/models/tiny.gin", f"gin/runs/{run}.gin")
    gin.parse_config(f"OPTIMIZER = @optimizers.{kind}()")
    learner = "PreferenceLearner" if run == "dpo" else "GradientLearner"
    made = gin.get_configurable(f"learner.{learner}")().optimizer
    stage = {"pretrain_stage1": "STAGE1", "pretrain_stage3": "STAGE3"}.get(run, run.upper())
    assert type(made).__name__ == kind
    assert made.peak_lr == gin.query_parameter(f"{stage}_PEAK_LR/gin.macro.value")
    assert made.embedding_lr_multiplier == (5.0 if stage == "STAGE1" else 1.0)
    assert made.schedule == ("constant" if stage == "STAGE1" else "cosine")


def test_either_speaker_encoder_can_be_bound(parsed):
    gin = parsed("gin/models/demo.gin", "gin/runs/train_flow.gin")
    gin.parse_config("FLOW_EMBED = @campplus.clip_embedder()")
    gin.finalize()
    embed = gin.query_parameter("FLOW_EMBED/gin.macro.value").scoped_configurable_fn()
    with pytest.raises(UserError, match="runs/x/speaker_encoder: not a model directory"):
        embed.describe()


def test_the_job_by_its_gin_file(run_dir, capsys):
    arguments = ["--gin_file=gin/models/toy.gin", "--gin_file=gin/runs/cache_tasks.gin", "--json"]
    arguments += [f"--gin.RUN_DIR={run_dir}", f"--model_dir={run_dir}/all_tasks"]
    assert launch.launch("t5x_audio.cache_tasks", "", arguments) == 0
    closing = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert closing["tasks"] == closing["made"] == 10
    assert sorted(os.listdir(f"{run_dir}/all_tasks")) == sorted(
        set(tasks.TASKS) - {"taqta", "image_text", "linguistic_alone", "semantic_alone"}
    )


def test_the_training_of_a_speaker_encoder_by_its_gin_file(parsed):
    gin = parsed("gin/runs/train_speaker_encoder.gin")
    gin.parse_config("SPEAKERS = 7")
    made = gin.get_configurable("learner.GradientLearner")()
    assert made.model.num_speakers == 7 and made.model.embedding == 192
    made.check_data(types.SimpleNamespace(speakers=list("abcdefg")))
