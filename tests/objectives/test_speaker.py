import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.objectives.speaker import SpeakerClassification, with_margin
from t5x_audio.training.learner import GradientLearner
from t5x_audio.training.optimizers import AdamW
from t5x_audio.vocoder.campplus import CamPlusConfig

MODEL = CamPlusConfig(
    num_mels=8, embedding=6, front_channels=2, front_blocks=1, channels=4, growth=2, bottleneck=4,
    block_layers=(1,), block_kernels=(3,), block_dilations=(1,), segment=10, num_speakers=3,
)  # fmt: skip


class Given:
    """A model whose embeddings are the batch's."""

    def __init__(self, classes):
        self.speakers = nnx.Param(jnp.asarray(classes, jnp.float32))

    def __call__(self, audio, lengths):
        return audio / jnp.linalg.norm(audio, axis=-1, keepdims=True)


def test_margin_of_the_angle():
    angles = np.linspace(0.01, np.pi - 0.01, 200)
    got = with_margin(jnp.cos(jnp.asarray(angles, jnp.float32)), 0.3)
    inside = angles < np.pi - 0.3
    np.testing.assert_allclose(got[inside], np.cos(angles + 0.3)[inside], atol=1e-4)
    assert (np.diff(got) < 0).all()  # falls with the angle, also beyond half a turn
    np.testing.assert_allclose(with_margin(jnp.cos(angles), 0.0), np.cos(angles), atol=1e-6)


def test_loss_by_its_definition():
    rng = np.random.default_rng(0)
    classes, vectors = rng.normal(size=(4, 3)), rng.normal(size=(5, 4))
    speaker = np.array([0, 2, 1, -1, 2])
    batch = {"audio": vectors, "audio_lengths": np.full(5, 4), "speaker": speaker}
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    angles = np.arccos(units @ (classes / np.linalg.norm(classes, axis=0)))
    for train, margin in ((True, 0.2), (False, 0.0)):
        loss, metrics = SpeakerClassification(0.2, 8.0)(
            Given(classes), jax.tree.map(jnp.asarray, batch), None, train
        )
        want = []
        for row, own in enumerate(speaker):
            if own >= 0:
                turned = angles[row] + margin * (np.arange(3) == own)
                logits = 8.0 * np.cos(turned)
                want.append(np.log(np.exp(logits).sum()) - logits[own])
        np.testing.assert_allclose(loss, np.mean(want), rtol=1e-4)
        hits = (angles.argmin(1) == speaker).sum()
        assert tuple(map(float, metrics["accuracy"])) == (hits, 4.0)


def voices(rows, seed):
    """Three voices, told by their pitch and their first formant: audio [B, T] and speaker [B].

    They come and go, because what stays the same for all the time is no feature.
    """
    rng = np.random.default_rng(seed)
    time, speaker = np.arange(4000) / 16000, rng.integers(0, 3, rows)
    pitch = np.array([110.0, 170.0, 260.0])[speaker] * rng.uniform(0.95, 1.05, rows)
    formant = np.array([400.0, 700.0, 1500.0])[speaker]
    audio = np.zeros((rows, 4000))
    for k in range(1, 25):
        height = np.exp(-np.square((k * pitch - formant) / 300.0))
        audio += height[:, None] * np.sin(2 * np.pi * k * pitch[:, None] * time)
    audio *= np.sin(2 * np.pi * (10 * time + rng.uniform(size=(rows, 1)))) > 0
    audio += 0.01 * rng.normal(size=audio.shape)
    audio = 0.1 * audio.astype(np.float32)
    return {
        "audio": jnp.asarray(audio),
        "audio_lengths": jnp.asarray(rng.integers(2000, 4000, rows), jnp.int32),
        "speaker": jnp.asarray(speaker, jnp.int32),
    }


def test_a_learner_tells_voices_that_it_has_not_heard():
    learner = GradientLearner(
        MODEL, SpeakerClassification(), AdamW(peak_lr=1e-2, warmup_steps=5, total_steps=60)
    )
    state = jax.jit(learner.init)(jax.random.key(0))
    step, evaluate = jax.jit(learner.step), jax.jit(learner.evaluate)
    held_out = voices(48, 999)
    for i in range(60):
        state, metrics = step(state, voices(48, i), jax.random.key(i))
    metrics = evaluate(state, held_out, jax.random.key(0))
    accuracy = float(metrics["accuracy"][0] / metrics["accuracy"][1])
    assert accuracy > 0.65  # of three voices
    assert optax.global_norm(state.variables["model"]["norm"]["mean"][...]) > 0


def test_classes_are_held_against_the_speakers():
    learner = GradientLearner(MODEL, SpeakerClassification(), AdamW(peak_lr=1.0, total_steps=1))
    learner.check_data(types.SimpleNamespace(speakers=["a", "b", "c"]))
    with pytest.raises(UserError, match="num_speakers=3, but the clips of training have 2"):
        learner.check_data(types.SimpleNamespace(speakers=["a", "b"]))
    with pytest.raises(UserError, match="margin=2.0"):
        SpeakerClassification(margin=2.0)
