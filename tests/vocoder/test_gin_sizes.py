"""The vocoder's gin files parse, and build the published configurations without allocating."""

import math

import jax
import numpy as np
import pytest

import gin
from t5x_audio.audio.features import MelConfig
from t5x_audio.vocoder.discriminators import DiscriminatorConfig
from t5x_audio.vocoder.flow import FlowConfig
from t5x_audio.vocoder.hift import HIFT_24K, HiftConfig
from t5x_audio.vocoder.paired_flow import PairedFlowConfig

MELS = {
    "vocoder_22k": MelConfig(),
    "vocoder_24k": MelConfig(24000, n_fft=1920, hop=480, win=1920),
}


def parse(size: str, run: str) -> None:
    gin.clear_config()
    gin.parse_config("RUN_DIR = 'runs/x'")
    gin.parse_config_file(f"gin/models/{size}.gin")
    gin.parse_config_file(f"gin/runs/{run}.gin")
    gin.finalize()


@pytest.fixture
def parsed():
    yield parse
    gin.clear_config()


def parameters(learner) -> dict[str, int]:
    """{model: number of parameters} of the learner's first state."""
    state = jax.eval_shape(learner.init, jax.random.key(0))
    return {
        name: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
        for name, params in state.params.items()
    }


@pytest.mark.parametrize(
    ("size", "run", "model", "millions"),
    [
        ("vocoder_22k", "train_flow", FlowConfig(speaker_dim=192), 105.4),
        ("vocoder_24k", "train_paired_flow", PairedFlowConfig(), None),
    ],
)
def test_flows_of_published_size(parsed, size, run, model, millions):
    parsed(size, run)
    learner = gin.get_configurable("learner.GradientLearner")()
    assert learner.model == model
    assert learner.objective.mel == MELS[size]
    assert learner.objective.stream_probability == (0.5 if size == "vocoder_24k" else 0.0)
    assert (learner.objective.condition_dropout, learner.objective.prior_weight) == (0.2, 0.0)
    assert (learner.optimizer.clip_norm, learner.optimizer.weight_decay) == (5.0, 0.0)
    assert learner.optimizer.schedule == "inverse_sqrt"
    assert float(learner.optimizer.learning_rate(9999)) == pytest.approx(5e-4)
    count = parameters(learner)["model"]
    assert millions is None or round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("size", "model", "samples"),
    [("vocoder_22k", HiftConfig(), 24576), ("vocoder_24k", HIFT_24K, 24480)],
)
def test_hift_of_published_size(parsed, size, model, samples):
    parsed(size, "train_hift")
    learner = gin.get_configurable("gan.GanLearner")()
    assert learner.generator == model
    assert learner.discriminator == DiscriminatorConfig()
    assert learner.objective.mel == MELS[size]
    rate = model.sample_rate
    assert learner.objective.loss_mels == (MelConfig(rate, fmax=None),)
    assert (learner.objective.f0.sample_rate, learner.objective.f0.hop) == (rate, model.hop)
    weights = [getattr(learner.objective, f"{name}_weight") for name in ("mel", "feature")]
    assert weights == [45.0, 4.0] and learner.objective.relativistic_weight == 1.0
    for optimizer in (learner.optimizer, learner.discriminator_optimizer):
        assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.999, 0.0)
        assert float(optimizer.learning_rate(1000)) == pytest.approx(2e-4)
    seconds = gin.query_parameter("HIFT_SEGMENT_SECONDS/gin.macro.value")
    assert round(seconds * rate) == samples and samples % model.hop == 0
    assert parameters(learner).keys() == {"generator", "discriminator"}


@pytest.mark.parametrize("run", ["train_flow", "train_hift"])
@pytest.mark.parametrize("size", ["toy", "demo", "tiny"])
def test_small_sizes_fit_together(parsed, size, run):
    """All macros are there; rate and hop are the same for the model and what it is trained on."""
    parsed(size, run)
    name = "learner.GradientLearner" if run == "train_flow" else "gan.GanLearner"
    learner = gin.get_configurable(name)()
    model = learner.model if run == "train_flow" else learner.generator
    mel = learner.objective.mel
    assert (model.sample_rate, model.hop) == (mel.sample_rate, mel.hop) == (16000, 240)
    if run == "train_hift":
        assert (model.phase_range, model.random_phase) == (pytest.approx(math.pi), False)
        assert [m.hop for m in learner.objective.loss_mels] == [240, 256, 80, 60]
