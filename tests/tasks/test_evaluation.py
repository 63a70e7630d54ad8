"""Answers to the examples of tasks, judged while a model trains and with a model that is there."""

import json
import subprocess
import sys

import numpy as np
import pytest

from t5x_audio import cache_tasks, evaluate_tasks, train
from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.data import lm_reader
from t5x_audio.errors import UserError
from t5x_audio.objectives.language_modeling import LanguageModeling
from t5x_audio.training.learner import GradientLearner
from t5x_audio.training.metrics import read_metrics
from t5x_audio.training.optimizers import AdamW
from tasks.evaluation import TaskEvaluation


@pytest.fixture(scope="module", autouse=True)
def caches(run_dir):
    mixtures = {"all": {"asr": 1, "aqaa": 1, "text": 1}}
    cache_tasks.run(model_dir=f"{run_dir}/tasks", run_dir=run_dir, mixtures=mixtures)


class Oracle:
    """In place of a Decoder: knows what follows each prompt, and keeps what it was asked."""

    def __init__(self, run_dir, tasks, split="validation"):
        self.known, self.asked = {}, []
        for task in tasks:
            for record in lm_reader.records.open_records(f"{run_dir}/tasks/{task}", split):
                start = np.flatnonzero(record["weights"])[0]
                self.known[tuple(record["tokens"][:start])] = record["tokens"][start:]

    def generate(self, prompts, *, sampling, max_new_tokens, width):
        assert sampling.temperature == 0 and width >= max(map(len, prompts))
        self.asked.append(len(prompts))
        return [self.known[tuple(prompt)] for prompt in prompts]


def test_right_answers_are_right(run_dir):
    tasks = ("asr", "aqaa")
    evaluation = TaskEvaluation(run_dir, tasks, batch_size=4)
    oracle = Oracle(run_dir, tasks)
    results = evaluation.score(oracle)
    assert results["asr"] == {"examples": 6, "wer": 0}
    assert results["aqaa"] == {"examples": 4, "text_accuracy": 100}
    assert oracle.asked == [4, 4, 4]  # batches of one shape: 6 and 4 examples
    example, target, prediction = evaluation.answered["aqaa"][0]
    assert target == example["short_answer"] and prediction == example["answer"]


def test_wrong_answers_are_wrong(run_dir):
    evaluation = TaskEvaluation(run_dir, ("asr",), num_examples=3)
    oracle = Oracle(run_dir, ("asr",))
    eot = next(iter(oracle.known.values()))[-1]
    oracle.known = dict.fromkeys(oracle.known, np.array([eot]))
    assert evaluation.score(oracle)["asr"] == {"examples": 3, "wer": 100}


def small(vocabulary):
    return TransformerConfig(
        num_layers=1, embed=16, mlp=32, num_heads=2, num_kv_heads=1, head_dim=8,
        vocab_size=vocabulary.size, dtype="float32", remat="none",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(run_dir, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    learner = GradientLearner(
        small(vocabulary), LanguageModeling(), AdamW(peak_lr=1e-2, total_steps=4, warmup_steps=1)
    )
    dataset = lm_reader.PackedLmDataset(
        run_dir, {"asr": 1, "text": 1}, sequence_length=128, batch_size=2, open_rows=4
    )
    answers = TaskEvaluation(run_dir, ("asr",), every=2, num_examples=2, max_new_tokens=8)
    settings = {"steps": 4, "eval_every": 2, "log_every": 2, "model_dir": str(folder)}
    return folder, train.run(learner=learner, dataset=dataset, answers=answers, **settings)


def test_a_run_logs_losses_and_metrics_of_every_task(trained):
    folder, result = trained
    lines = read_metrics(folder)
    losses = {(m["step"], m["split"]): m["loss"] for m in lines if "loss" in m}
    for step in (2, 4):
        both = losses[step, "validation/asr"], losses[step, "validation/text"]
        assert min(both) < losses[step, "validation"] < max(both)
    errors = {m["step"]: m["wer"] for m in lines if "wer" in m}
    assert sorted(errors) == [2, 4] and all(value > 0 for value in errors.values())
    assert result["validation/asr_wer"] == errors[4]
    assert result["validation/asr_loss"] == losses[4, "validation/asr"]


def test_a_trained_model_is_judged(trained, run_dir):
    folder, _ = trained
    figures = evaluate_tasks.run(model_dir=str(folder), run_dir=run_dir, task=["asr"])
    assert figures["asr_examples"] == 4 and figures["asr_wer"] > 0
    rows = (folder / "answers" / "asr-test.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rows]
    assert len(rows) == 4 and all(row["target"] == row["text"] for row in rows)
    assert all(isinstance(row["prediction"], str) for row in rows)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": ("asrr",)}, "no task is called 'asrr': choose from .*asr"),
        ({"tasks": ("continuation",)}, "'continuation' has no metrics"),
        ({"tasks": ("aqta",)}, "no cache of task 'aqta'.*run t5x_audio.cache_tasks"),
        ({"tasks": ("asr",), "split": "train"}, "there are 'validation' and 'test'"),
        ({"tasks": ("asr",), "every": 0}, "every=0: give 1 or more"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(run_dir, settings, said):
    with pytest.raises(UserError, match=said):
        TaskEvaluation(run_dir, **settings)


def test_the_entry_point_names_what_is_missing(run_dir, tmp_path):
    command = [sys.executable, "-m", "t5x_audio.evaluate_tasks", f"--model_dir={tmp_path}"]
    done = subprocess.run(
        [*command, f"--run_dir={run_dir}", "--task=asr"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("not a model directory (it has no model.json)")
