import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.audio.features import MelConfig
from t5x_audio.objectives.gan import GanObjective
from t5x_audio.training.gan import GanLearner
from t5x_audio.training.optimizers import AdamW
from t5x_audio.vocoder.discriminators import DiscriminatorConfig
from t5x_audio.vocoder.f0 import F0Config
from tests.toy_vocoder import HIFT

MEL = MelConfig(sample_rate=16000, n_fft=256, hop=240, win=256, num_mels=HIFT.num_mels)
START = 3


@pytest.fixture(scope="module")
def learner():
    return GanLearner(
        generator=HIFT,
        discriminator=DiscriminatorConfig((2,), (4, 4), ((64, 16, 64),), 4),
        objective=GanObjective(
            mel=MEL, loss_mels=(MEL,), f0=F0Config(sample_rate=16000, hop=240), f0_scale=20.0
        ),
        optimizer=AdamW(peak_lr=5e-3, schedule="constant"),
        discriminator_optimizer=AdamW(peak_lr=1e-3, schedule="constant"),
        disc_start_step=START,
    )


@pytest.fixture(scope="module")
def batch():
    time = jnp.arange(2400) / 16000
    return {"audio": jnp.stack([0.2 * jnp.sin(2 * jnp.pi * f * time) for f in (120.0, 190.0)])}


@pytest.fixture(scope="module")
def step(learner):
    return jax.jit(learner.step)


@pytest.fixture(scope="module")
def history(learner, batch, step):
    state = jax.jit(learner.init)(jax.random.key(0))
    states, metrics = [state], []
    for i in range(8):
        state, values = step(state, batch, jax.random.key(i))
        states.append(state)
        metrics.append(values)
    return states, metrics


def _moved(a, b, name):
    pairs = zip(jax.tree.leaves(a.params[name]), jax.tree.leaves(b.params[name]), strict=True)
    return any((x != y).any() for x, y in pairs)


def test_discriminator_rests_until_its_first_step(history):
    states, metrics = history
    for i in range(8):
        assert _moved(states[i], states[i + 1], "generator")
        assert _moved(states[i], states[i + 1], "discriminator") == (i >= START)
        assert float(metrics[i]["discriminator_loss"][1]) == float(i >= START)
    assert int(states[-1].step) == 8


def test_metrics_are_finite_and_the_mel_improves(history):
    _, metrics = history
    for values in metrics:
        assert all(np.isfinite(v).all() for pair in values.values() for v in pair)
    assert metrics[START]["feature_matching"][0] > 0
    assert metrics[-1]["mel_l1"][0] < metrics[0]["mel_l1"][0]


def test_generator_hears_the_discriminator(step, batch, history):
    """The same step with and without the adversarial terms gives other parameters."""
    state = history[0][START]
    with_them, _ = step(state, batch, jax.random.key(0))
    early = state.replace(step=jnp.zeros((), jnp.int32))
    without, _ = step(early, batch, jax.random.key(0))
    assert _moved(with_them, without, "generator")


def test_same_seed_same_training(learner, step, batch, history):
    state = jax.jit(learner.init)(jax.random.key(0))
    for i in range(2):
        state, _ = step(state, batch, jax.random.key(i))
    assert not _moved(state, history[0][2], "generator")


def test_evaluation_reports_the_signal_terms(learner, batch, history):
    metrics = jax.jit(learner.evaluate)(history[0][-1], batch, jax.random.key(0))
    assert {"loss", "mel_l1", "f0_l1_hz"} <= set(metrics)
    assert all(np.isfinite(v).all() for pair in metrics.values() for v in pair)
