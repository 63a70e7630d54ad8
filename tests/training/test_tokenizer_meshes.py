"""A training step of the tokenizers is the same on a mesh: gradients, codebooks, statistics."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from t5x_audio.objectives.augmentation import Noise, SpecAugment
from t5x_audio.objectives.best_rq import BestRq
from t5x_audio.objectives.ctc import SemanticCtc
from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.masked_prediction import MaskedPredictionConfig
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig
from t5x_audio.training import learner, partitioning, program
from t5x_audio.training.optimizers import AdamW
from t5x_audio.training.partitioning import MeshShape, ShardingRules

LINGUISTIC = LinguisticTokenizerConfig(
    SanmConfig(num_layers=2, width=16, num_heads=2, mlp_dim=32), 8, 16, num_supervision_layers=1
)
SEMANTIC = SemanticTokenizerConfig(16, 2, 32, 2, 16, 1, text_size=16)
BARE = {"text_size": 0, "num_supervision_layers": 0}
AUGMENTATION = {"spec_augment": SpecAugment(), "noise": Noise(0.7)}
# Between them: both encoders, both objectives, moving statistics and codebooks.
CASES = {
    "semantic_ctc": (SEMANTIC, SemanticCtc(**AUGMENTATION)),
    "linguistic_best_rq": (
        MaskedPredictionConfig(dataclasses.replace(LINGUISTIC, **BARE), 32, 8),
        BestRq(0.02, **AUGMENTATION),
    ),
}
ONE = MeshShape(data=1)
ALL_AXES = MeshShape(data=2, fsdp=2, tensor=2)
ADAM = AdamW(peak_lr=1e-3, end_lr=1e-4, warmup_steps=1, total_steps=10)


@dataclasses.dataclass(frozen=True)
class Descent:
    """Steps along the gradient. Adam would blow up the rounding of gradients that are 0, such as
    those of a bias of keys, to whole steps.
    """

    def make(self, params):
        return optax.sgd(0.1)

    def learning_rate(self, step):
        return 0.1


def batch():
    rng = np.random.default_rng(0)
    lengths = rng.integers(6000, 12000, 8).astype(np.int32)
    audio = 0.1 * rng.normal(size=(8, 12000)).astype(np.float32)
    audio *= np.arange(12000) < lengths[:, None]
    return {
        "audio": audio,
        "audio_lengths": lengths,
        "text_ids": rng.integers(1, 16, (8, 4)).astype(np.int32),
        "text_lengths": rng.integers(1, 4, 8).astype(np.int32),
    }


def two_steps(name, shape, devices=None):
    """-> (TrainState, metrics) after two steps: the second one has statistics to move."""
    config, objective = CASES[name]
    mesh = shape.make(devices)
    made = learner.GradientLearner(config, objective, Descent())
    compiled = program.TrainProgram(made, mesh, ShardingRules(), seed=0)
    with jax.set_mesh(mesh):
        state, placed = compiled.init(), partitioning.place_batch(batch(), mesh)
        for _ in range(2):
            state, metrics = compiled.step(state, placed)
    return jax.device_get((state, metrics))


def check(name):
    want, want_metrics = two_steps(name, ONE, jax.devices()[:1])
    assert np.isfinite(want_metrics["loss"][0]) and want_metrics["grad_norm"][0] > 1e-3
    got, metrics = two_steps(name, ALL_AXES)
    for metric, pair in want_metrics.items():
        np.testing.assert_allclose(metrics[metric], pair, rtol=1e-3, atol=1e-5, err_msg=metric)
    for kind in ("params", "variables"):
        a, b = (jax.tree.leaves_with_path(getattr(x, kind)) for x in (want, got))
        for (path, one), (_, other) in zip(a, b, strict=True):
            np.testing.assert_allclose(
                other, one, rtol=1e-3, atol=1e-5, err_msg=jax.tree_util.keystr(path)
            )


def semantic_ctc_on_8_devices():
    check("semantic_ctc")


def linguistic_best_rq_on_8_devices():
    check("linguistic_best_rq")


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_agrees_with_one_device(on_devices, name):
    on_devices(8, f"{name}_on_8_devices")


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_near_float32(name):
    config, objective = CASES[name]

    def loss(dtype):
        inner = getattr(config, "tokenizer", config)
        if isinstance(inner, LinguisticTokenizerConfig):
            encoder = dataclasses.replace(inner.encoder, dtype=dtype)
            inner = dataclasses.replace(inner, encoder=encoder)
        else:
            inner = dataclasses.replace(inner, dtype=dtype)
        wrapped = isinstance(config, MaskedPredictionConfig)
        outer = dataclasses.replace(config, tokenizer=inner) if wrapped else inner
        made = learner.GradientLearner(outer, objective, ADAM)
        state, metrics = jax.jit(made.step)(
            jax.jit(made.init)(jax.random.key(0)), batch(), jax.random.key(1)
        )
        types = {x.dtype for x in jax.tree.leaves((state.params, state.variables))}
        return float(metrics["loss"][0]), float(metrics["grad_norm"][0]), types

    exact, half = loss("float32"), loss("bfloat16")
    assert exact[2] == half[2] == {np.dtype("float32")}  # weights and codebooks stay exact
    assert half[0] != exact[0]
    assert half[0] == pytest.approx(exact[0], rel=0.03)
    assert half[1] == pytest.approx(exact[1], rel=0.2)
