import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.audio.features import MelConfig
from t5x_audio.errors import UserError
from t5x_audio.objectives.gan import GanObjective, feature_matching
from t5x_audio.vocoder.f0 import F0Config

MEL = MelConfig(sample_rate=16000, n_fft=256, hop=240, win=256, num_mels=10)
OBJECTIVE = GanObjective(
    mel=MEL, loss_mels=(MEL,), f0=F0Config(sample_rate=16000, hop=240), f0_scale=10.0
)


def _judge(scale):
    """Discriminator whose score and hidden layer are the scaled samples."""
    return lambda x: [(scale * x, [x, scale * x])]


def test_inputs_have_one_f0_for_each_mel_frame():
    tone = jnp.sin(2 * jnp.pi * 200.0 * jnp.arange(4800) / 16000)[None] * 0.3
    audio, mel, f0 = OBJECTIVE.inputs({"audio": tone})
    assert audio.shape == (1, 4800) and mel.shape == (1, 20, 10) and f0.shape == (1, 20)
    np.testing.assert_allclose(f0[0, 4:-6], 200.0, rtol=0.01)


def test_least_squares_terms():
    real, fake = jnp.ones((1, 4)), jnp.full((1, 4), 0.5)
    assert float(OBJECTIVE.discriminator_loss(_judge(1.0), fake, real)) == 0.25
    loss, values = OBJECTIVE.adversarial_loss(_judge(1.0), fake, real)
    assert float(values["generator_adversarial"]) == 0.25
    assert float(values["feature_matching"]) == 1.0  # half on each of two layers
    assert float(loss) == 0.25 + 2.0 * 1.0


def test_feature_matching_is_zero_on_itself():
    judged = _judge(2.0)(jnp.arange(4.0)[None])
    assert float(feature_matching(judged, judged)) == 0.0


def test_reconstruction_and_f0_terms():
    rng = jax.random.key(0)
    real = jax.random.normal(rng, (1, 2400)) * 0.1
    f0 = jnp.full((1, 10), 100.0)
    loss, values = OBJECTIVE.signal_loss(real, real, f0, f0)
    assert float(loss) == 0.0
    loss, values = OBJECTIVE.signal_loss(real * np.e, real, f0 + 20.0, f0)
    np.testing.assert_allclose(values["mel_l1"], 1.0, rtol=1e-3)  # a factor e is 1 in log
    np.testing.assert_allclose(values["f0_l1_hz"], 20.0, rtol=1e-5)
    np.testing.assert_allclose(loss, 45.0 + 2.0, rtol=1e-3)


def test_source_follows_the_setting():
    class Generator:
        def f0_predictor(self, mel):
            return jnp.full(mel.shape[:2], 50.0)

        def __call__(self, mel, rng, f0):
            return f0

    mel, f0 = jnp.zeros((1, 3, 10)), jnp.full((1, 3), 90.0)
    driven, predicted = OBJECTIVE.generate(Generator(), mel, f0, None)
    assert (float(driven[0, 0]), float(predicted[0, 0])) == (90.0, 50.0)
    published = GanObjective(source_f0="predicted")
    assert float(published.generate(Generator(), mel, f0, None)[0][0, 0]) == 50.0


def test_settings_that_contradict_are_refused():
    with pytest.raises(UserError, match="same hop"):
        GanObjective(mel=MEL)
    with pytest.raises(UserError, match="source_f0"):
        GanObjective(source_f0="guessed")
