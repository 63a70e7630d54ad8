import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from t5x_audio.audio.features import MelConfig, mel_spectrogram
from t5x_audio.errors import UserError
from t5x_audio.objectives.flow_matching import FlowMatchingObjective
from tests.toy_vocoder import FLOW, PAIRED_FLOW

MEL = MelConfig(sample_rate=16000, n_fft=256, hop=240, win=256, num_mels=6)
OBJECTIVE = FlowMatchingObjective(mel=MEL)
_make = nnx.jit(lambda: FLOW.make(nnx.Rngs(0)))
_make_paired = nnx.jit(lambda: PAIRED_FLOW.make(nnx.Rngs(0)))
PAIRED_MEL = MelConfig(sample_rate=16000, n_fft=640, hop=320, win=640, num_mels=6)
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


def test_what_lies_in_the_padding_does_not_matter(batch):
    model = _make()
    model.estimator.project.kernel[...] += 0.3
    dirty = dict(batch)
    beyond = np.arange(4000) >= np.asarray(batch["audio_lengths"])[:, None]
    dirty["audio"] = jnp.where(beyond, 0.7, batch["audio"])
    beyond = np.arange(10) >= np.asarray(batch["code_lengths"])[:, None]
    dirty["codes"] = jnp.where(beyond, 29, batch["codes"])
    np.testing.assert_allclose(_evaluate(model, batch)[0], _evaluate(model, dirty)[0], rtol=1e-5)


@pytest.mark.parametrize("form", ["interleaved", "paired"])
def test_training_lowers_the_loss(batch, form):
    """Of the paired flow half of the rows train as streams."""
    make, objective = _make, OBJECTIVE
    if form == "paired":
        make = _make_paired
        objective = FlowMatchingObjective(
            mel=PAIRED_MEL, stream_probability=0.5, stream_chunk_positions=(1, 3)
        )
    graph, params = nnx.split(make())
    adam = optax.adam(1e-2)

    @jax.jit
    def step(params, moments, rng):
        def loss(params):
            return objective(nnx.merge(graph, params), batch, rng, True)[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = adam.update(grads, moments)
        return optax.apply_updates(params, updates), moments, value

    moments, losses = adam.init(params), []
    for _ in range(60):
        params, moments, value = step(params, moments, jax.random.key(1))
        losses.append(float(value))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]


def test_rows_as_streams_see_what_a_stream_sees():
    """Of 400 rows about half; prefix, own chunk and what is shortly before it."""
    objective = FlowMatchingObjective(
        mel=PAIRED_MEL, stream_probability=0.5, stream_chunk_positions=(3, 6)
    )
    model = nnx.eval_shape(lambda: PAIRED_FLOW.make(nnx.Rngs(0)))
    drawn = jnp.asarray(np.arange(400) % 9, jnp.int32)
    prefix, chunks = objective._chunks(model, drawn, np.zeros((400, 20)), jax.random.key(0))
    np.testing.assert_array_equal(prefix, drawn // 2 * 2)
    visible = np.asarray(chunks.bias(2))[:, 0] == 0.0
    whole = visible.all((1, 2))
    assert 0.4 < whole.mean() < 0.6
    widths, index = set(), np.arange(12)
    for row in np.flatnonzero(~whole):
        start = int(prefix[row]) // 2
        width = int(visible[row, start, start:].sum())
        widths.add(width)
        chunk = np.where(index < start, -1, (index - start) // width)
        begin = np.where(chunk < 0, 0, start + chunk * width)[:, None]
        seen = (chunk[None] <= chunk[:, None]) & ((index >= begin - 2) | (index < start))
        np.testing.assert_array_equal(visible[row], seen)
    assert widths == {3, 4, 5, 6}


def test_what_cannot_stream_is_refused():
    objective = FlowMatchingObjective(mel=MEL, stream_probability=1.0)
    model = nnx.eval_shape(lambda: FLOW.make(nnx.Rngs(0)))
    with pytest.raises(UserError, match="FlowMatching cannot stream"):
        objective._chunks(model, jnp.zeros(2, jnp.int32), np.zeros((2, 10)), jax.random.key(0))
    with pytest.raises(UserError, match="stream_chunk_positions"):
        FlowMatchingObjective(stream_chunk_positions=(4, 3))


def test_prior_adds_the_squared_error_of_mu(batch):
    model = _make()
    conditions = model.conditions(batch["codes"], batch["code_lengths"], batch["speaker_embedding"])
    mel = mel_spectrogram(batch["audio"], MEL, batch["audio_lengths"])[:, : conditions.mu.shape[1]]
    codes, audio = (np.asarray(batch[f"{k}_lengths"]) for k in ("code", "audio"))
    errors = []
    for row, frames in enumerate(np.minimum(codes * 8 // 5, audio // 240)):
        wanted = model.normalise(mel[row, :frames])
        errors.append(np.asarray(conditions.mu[row, :frames] - wanted).ravel())
    wanted = np.mean(np.square(np.concatenate(errors)))
    objective = FlowMatchingObjective(mel=MEL, prior_weight=0.5)
    loss, metrics = objective(model, batch, jax.random.key(0), False)
    assert metrics["mu_mse"][0] / metrics["mu_mse"][1] == pytest.approx(wanted, rel=1e-4)
    plain = OBJECTIVE(model, batch, jax.random.key(0), False)[0]
    assert loss - plain == pytest.approx(0.5 * wanted, rel=1e-3)


def test_with_a_prior_mu_learns_from_it_alone(batch):
    """Draws of times and noise change the loss, but not what the encoder learns."""
    graph, params = nnx.split(_make())
    params["estimator"]["project"]["kernel"][...] += 0.3

    def encoder_gradient(objective, seed):
        def loss(params):
            return objective(nnx.merge(graph, params), batch, jax.random.key(seed), False)[0]

        return jax.grad(loss)(params)["project"]["kernel"][...]

    prior = FlowMatchingObjective(mel=MEL, prior_weight=1.0)
    np.testing.assert_allclose(encoder_gradient(prior, 0), encoder_gradient(prior, 1), rtol=1e-4)
    assert not np.allclose(encoder_gradient(OBJECTIVE, 0), encoder_gradient(OBJECTIVE, 1), rtol=0.1)


def test_velocity_share_takes_the_first_rows_and_mu_all(batch):
    objective = FlowMatchingObjective(mel=MEL, prior_weight=1.0, velocity_share=0.5)
    codes, audio = (np.asarray(batch[f"{k}_lengths"]) for k in ("code", "audio"))
    frames = np.minimum(codes * 8 // 5, audio // 240)
    assert len(frames) > 1
    first = frames[: round(len(frames) / 2)].sum()
    for train, wanted in ((True, first), (False, frames.sum())):
        _, metrics = objective(_make(), batch, jax.random.key(0), train)
        assert metrics["mu_mse"][1] == frames.sum() * MEL.num_mels
        assert metrics["velocity_mse"][1] == wanted * MEL.num_mels


@pytest.mark.parametrize(("weight", "share"), [(0.0, 0.5), (1.0, 1.5), (1.0, -0.1)])
def test_a_share_that_would_train_nothing_is_refused(weight, share):
    with pytest.raises(UserError, match=f"velocity_share={share}"):
        FlowMatchingObjective(prior_weight=weight, velocity_share=share)


def test_prefix_is_short_and_in_about_half_of_the_rows():
    frames = jnp.full(400, 50)
    lengths = np.asarray(OBJECTIVE._prefix(frames, jax.random.key(0)))
    assert lengths.max() <= 15
    assert 0.4 < (lengths > 0).mean() < 0.6


def test_embeddings_of_another_width_are_named(batch):
    other = batch | {"speaker_embedding": jnp.zeros((4, 192))}
    with pytest.raises(UserError, match="have 192 numbers, FlowConfig.speaker_dim is 4"):
        jax.eval_shape(lambda: OBJECTIVE(FLOW.make(nnx.Rngs(0)), other, jax.random.key(0), False))
