import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.audio.features import MelConfig, mel_spectrogram
from t5x_audio.objectives.flow_matching import FlowMatchingObjective
from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.flow import FlowConfig
from t5x_audio.vocoder.unet import UnetConfig

MEL = MelConfig(sample_rate=16000, n_fft=256, hop=240, win=256, num_mels=6)
CONFIG = FlowConfig(
    codebook=30,
    num_mels=6,
    speaker_dim=4,
    sample_rate=16000,
    hop=240,
    encoder=ConformerConfig(width=8, num_layers=1, num_heads=2, mlp_dim=16, dropout=0.1),
    regulator_layers=1,
    estimator=UnetConfig(
        channels=(8,), num_mid_stages=1, num_blocks=1, num_heads=2, head_dim=4, norm_groups=4
    ),
    mel_mean=-5.0,
    mel_std=2.0,
)
OBJECTIVE = FlowMatchingObjective(mel=MEL)
_make = nnx.jit(lambda: CONFIG.make(nnx.Rngs(0)))
_evaluate = nnx.jit(lambda m, b: OBJECTIVE(m, b, jax.random.key(0), False))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "audio": jnp.asarray(rng.standard_normal((4, 4000)) * 0.1, jnp.float32),
        "audio_lengths": jnp.array([4000, 3000, 4000, 2000]),
        "codes": jnp.asarray(rng.integers(0, 30, (4, 10))),
        "code_lengths": jnp.array([10, 5, 10, 10]),
        "speaker_embedding": jnp.asarray(rng.standard_normal((4, 4)), jnp.float32),
    }


def test_a_zero_velocity_costs_the_energy_of_the_target(batch):
    loss, metrics = _evaluate(_make(), batch)  # a new model's last projection is zero
    mel = (mel_spectrogram(batch["audio"], MEL, batch["audio_lengths"]) + 5.0) / 2.0
    frames = np.array([16, 8, 16, 8])
    power = np.mean(np.concatenate([np.square(mel[i, :n]).ravel() for i, n in enumerate(frames)]))
    assert float(metrics["velocity_mse"][1]) == frames.sum() * 6
    np.testing.assert_allclose(loss, power + 1.0, rtol=0.15)


def test_padding_does_not_change_the_loss_much(batch):
    model = _make()
    padded = dict(batch)
    padded["audio"] = jnp.pad(batch["audio"], ((0, 0), (0, 4000)), constant_values=0.7)
    padded["codes"] = jnp.pad(batch["codes"], ((0, 0), (0, 10)), constant_values=3)
    one, _ = _evaluate(model, batch)
    two, metrics = _evaluate(model, padded)
    assert float(metrics["velocity_mse"][1]) == 48 * 6
    np.testing.assert_allclose(one, two, rtol=0.15)  # other noise is drawn for other shapes


def test_training_lowers_the_loss(batch):
    graph, params = nnx.split(_make())

    @jax.jit
    def step(params, rng):
        def loss(params):
            return OBJECTIVE(nnx.merge(graph, params), batch, rng, True)[0]

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, grads), value

    losses = []
    for i in range(40):
        params, value = step(params, jax.random.key(i))
        losses.append(float(value))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_prefix_is_short_and_in_about_half_of_the_rows():
    frames = jnp.full(400, 50)
    prefix = np.asarray(OBJECTIVE._prefix(frames, 50, jax.random.key(0)))[..., 0]
    lengths = prefix.sum(1)
    assert lengths.max() <= 15
    assert 0.4 < (lengths > 0).mean() < 0.6
    np.testing.assert_array_equal(prefix, np.arange(50) < lengths[:, None])
