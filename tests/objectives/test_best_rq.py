"""BEST-RQ: spans, what counts, what learns, and the way on to supervised training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.objectives import best_rq, ctc
from t5x_audio.objectives.augmentation import Noise, SpecAugment
from t5x_audio.objectives.best_rq import BestRq
from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.masked_prediction import MaskedPredictionConfig
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig
from t5x_audio.training import checkpoints, learner
from t5x_audio.training.optimizers import AdamW

LINGUISTIC = LinguisticTokenizerConfig(
    SanmConfig(num_layers=2, width=16, num_heads=2, mlp_dim=32), 4, text_size=0
)
SEMANTIC = SemanticTokenizerConfig(16, 2, 32, 1, 4, 0, text_size=0)
TOKENIZERS = {"linguistic": LINGUISTIC, "semantic": SEMANTIC}
AUGMENTED = BestRq(
    start_probability=0.02, noise=Noise(), spec_augment=SpecAugment(num_time_masks=0)
)


def config(name):
    return MaskedPredictionConfig(TOKENIZERS[name], num_labels=8, label_dim=4)


def batch(rows=4, samples=16000, seed=0, padding=0):
    """Noise that brightens over a second: what is hidden follows from where it is."""
    rng = np.random.default_rng(seed)
    audio = np.zeros((rows, samples + padding), np.float32)
    lengths = samples - rng.integers(0, samples // 4, rows)
    for row, length in enumerate(lengths):
        noise = rng.normal(size=samples + 16)
        dark, bright = np.convolve(noise, np.ones(16), "same")[:samples], np.diff(noise)[:samples]
        tilt = np.linspace(-3, 3, samples)
        sound = 0.01 * (10.0**-tilt * dark + 10.0**tilt * bright) / (10.0**tilt + 10.0**-tilt)
        audio[row, :length] = sound[:length]
    return {"audio": audio, "audio_lengths": lengths.astype(np.int32)}


@settings(max_examples=40)
@given(st.integers(0, 9999), st.integers(1, 9), st.floats(0.05, 0.9))
def test_spans_are_whole_and_inside(seed, span, start):
    lengths = jnp.array([40, 17, 1, 0])
    mask = np.asarray(best_rq.span_mask(jax.random.key(seed), lengths, 40, start, span))
    for row, length in zip(mask, lengths, strict=True):
        assert not row[length:].any()
        edges = np.flatnonzero(np.diff(np.pad(row.astype(int), 1)))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            assert end - begin >= span or end == length


@pytest.mark.parametrize(
    ("name", "start", "span"), [("linguistic", 1 - 0.99**6, 7), ("semantic", 1 - 0.99**4, 10)]
)
def test_the_share_that_is_hidden_is_the_published_one(name, start, span):
    rate = config(name).make(nnx.Rngs(0)).tokenizer.frame_rate
    got = BestRq().of_codes(rate)
    assert got[0] == pytest.approx(start) and got[1] == span
    lengths = jnp.full(400, 500)
    mask = np.asarray(best_rq.span_mask(jax.random.key(0), lengths, 500, *got))[:, span:]
    # A place stays visible if none of the frames of the spans that reach it has started one.
    assert mask.mean() == pytest.approx(1 - (1 - start) ** span, abs=0.01)
    assert 0.3 < mask.mean() < 0.37


def test_noise_stands_for_what_is_hidden_and_nothing_else():
    features = jnp.full((2, 203, 16), 5.0)
    hidden = jnp.asarray(np.random.default_rng(0).random((2, 51)) < 0.5)
    filled = np.asarray(best_rq.fill_with_noise(jax.random.key(0), features, hidden, 4, 0.1))
    places = np.repeat(np.asarray(hidden), 4, axis=1)[:, :203]
    np.testing.assert_array_equal(filled[~places], 5.0)
    assert filled[places].std() == pytest.approx(0.1, rel=0.05)
    assert abs(filled[places].mean()) < 0.01


def test_draws_do_not_depend_on_the_padding():
    key, lengths = jax.random.key(0), jnp.array([20, 12])
    short = best_rq.span_mask(key, lengths, 20, 0.1, 4)
    longer = best_rq.span_mask(key, lengths, 33, 0.1, 4)
    np.testing.assert_array_equal(longer[:, :20], short)
    features = jnp.zeros((2, 33, 3))
    noise = functools.partial(best_rq.fill_with_noise, key, stack=1, std=1.0)
    np.testing.assert_array_equal(
        noise(features=features, hidden=longer)[:, :20],
        noise(features=features[:, :20], hidden=short),
    )


@pytest.fixture(params=TOKENIZERS)
def model(request):
    return config(request.param).make(nnx.Rngs(0))


@functools.partial(nnx.jit, static_argnames=("train", "objective"))
def prepare(model, batch, seed, train=False, objective=AUGMENTED):
    return objective.prepare(model, batch, jax.random.key(seed), train)


@nnx.jit
def predict(model, prepared):
    loss, metrics, _, _ = AUGMENTED.predict(model, prepared, train=False)
    return loss, metrics


@nnx.jit
def evaluate(model, batch):
    loss, metrics = AUGMENTED(model, batch, jax.random.key(0), train=False)
    return loss, {name: total / weight for name, (total, weight) in metrics.items()}


def test_only_hidden_places_count(model):
    prepared = prepare(model, batch(), 1)
    assert prepared.hidden.any() and not (prepared.hidden & ~prepared.valid).any()
    loss, metrics = predict(model, prepared)
    elsewhere = jnp.where(prepared.hidden, prepared.labels, (prepared.labels + 3) % 8)
    same = predict(model, prepared.replace(labels=elsewhere))[0]
    assert float(loss) == float(same)
    there = jnp.where(prepared.hidden, (prepared.labels + 3) % 8, prepared.labels)
    assert float(predict(model, prepared.replace(labels=there))[0]) != float(loss)
    # The loss is the mean of plain cross-entropies.
    logits = model.hidden(prepared.features, prepared.lengths) @ model.head_kernel[...]
    losses = -jax.nn.log_softmax(logits)[prepared.hidden]
    losses = np.take_along_axis(
        np.asarray(losses), np.asarray(prepared.labels)[prepared.hidden][:, None], 1
    )
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    assert float(metrics["masked_loss"][1]) == losses.size == prepared.hidden.sum()


def test_the_input_shows_nothing_of_what_is_hidden(model):
    """Other sounds at hidden places leave the input as it is."""
    prepared = prepare(model, batch(), 1, objective=BestRq(0.03))
    stack = model.tokenizer.frames_per_code
    places = jnp.repeat(prepared.hidden, stack, axis=1)[:, : prepared.features.shape[1]]
    assert float(jnp.std(prepared.features[places])) == pytest.approx(0.1, rel=0.1)
    assert float(jnp.std(prepared.features[~places])) > 0.2


def test_labels_are_of_the_clean_recording(model):
    noisy = dataclasses.replace(AUGMENTED, noise=Noise(1.0, max_snr_db=6.0))
    one = prepare(model, batch(), 0, train=True, objective=noisy)
    two = prepare(model, batch(), 0)
    np.testing.assert_array_equal(one.labels, two.labels)
    np.testing.assert_array_equal(one.hidden, two.hidden)
    assert float(jnp.abs(one.features - two.features).max()) > 0.1


def test_padding_and_neighbours_change_nothing(model):
    short, _ = evaluate(model, batch())
    padded, _ = evaluate(model, batch(padding=4000))
    np.testing.assert_allclose(short, padded, rtol=1e-5)
    prepared = prepare(model, batch(padding=4000), 0)
    totals = np.zeros(2)
    for row in range(4):
        frames = int(prepared.lengths[row])
        codes = int(prepared.valid[row].sum())
        alone = best_rq.MaskedBatch(
            prepared.features[row : row + 1, :frames],
            prepared.lengths[row : row + 1],
            *(x[row : row + 1, :codes] for x in (prepared.labels, prepared.valid, prepared.hidden)),
        )
        totals += np.asarray(predict(model, alone)[1]["masked_loss"])
    np.testing.assert_allclose(totals, predict(model, prepared)[1]["masked_loss"], 1e-5)


def test_metrics_show_a_collapsed_quantiser(model):
    _, values = evaluate(model, batch(8))
    assert 0.2 < values["masked_share"] < 0.8
    assert values["codebook_perplexity"] > 2 and values["codebook_usage"] > 0.4
    assert 1 / 8 <= values["commonest_label"] < 0.9
    model.codes[...] = jnp.broadcast_to(model.codes[...][:1], model.codes.shape)
    _, values = evaluate(model, batch(8))
    assert values["codebook_perplexity"] == pytest.approx(1.0)
    assert values["codebook_usage"] == 1 / 8 and values["commonest_label"] == 1.0


@functools.cache
def trainer(name):
    """(learner, its compiled init and step)."""
    optimizer = AdamW(peak_lr=1e-2, end_lr=1e-3, warmup_steps=5, total_steps=40)
    made = learner.GradientLearner(config(name), BestRq(start_probability=0.02), optimizer)
    return made, jax.jit(made.init), jax.jit(made.step)


def train(name, steps):
    made, init, step = trainer(name)
    state, history = init(jax.random.key(0)), []
    for index in range(steps):
        state, metrics = step(state, batch(8, seed=index), jax.random.key(index))
        history.append({k: float(v / w) for k, (v, w) in metrics.items()})
    return made, state, history


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_hidden_is_learnt(name):
    made, state, history = train(name, 40)
    early = np.mean([h["masked_loss"] for h in history[:5]])
    late = np.mean([h["masked_loss"] for h in history[-5:]])
    accuracy = np.mean([h["masked_accuracy"] for h in history[-5:]])
    assert late < 0.8 * early
    assert accuracy > 1.3 * np.mean([h["commonest_label"] for h in history[-5:]])
    before = trainer(name)[1](jax.random.key(0))
    for field in ("projection", "codes"):
        np.testing.assert_array_equal(
            state.variables["model"][field][...], before.variables["model"][field][...]
        )
        assert field not in state.params["model"]
        assert field not in before.opt_state["model"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_same_seed_gives_the_same_training(name):
    (_, one, _), (_, two, _) = train(name, 2), train(name, 2)
    jax.tree.map(np.testing.assert_array_equal, one, two)


OPTIMIZER = AdamW(peak_lr=1e-3, end_lr=1e-4, warmup_steps=1, total_steps=10)
SUPERVISED = {
    "linguistic": (
        dataclasses.replace(LINGUISTIC, text_size=11, num_supervision_layers=1),
        ctc.LinguisticCtc(),
        ("supervision", "head"),
    ),
    "semantic": (
        dataclasses.replace(SEMANTIC, text_size=11, num_supervision_layers=1),
        ctc.SemanticCtc(),
        ("supervision", "head_norm", "head"),
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_supervised_training_starts_from_the_pretrained_encoder(name, tmp_path):
    made, state, _ = train(name, 2)
    model = made.live(state)
    checkpoints.save_model(tmp_path / "pretrained", {"model": made.model}, {"model": model})
    tokenizer, objective, fresh = SUPERVISED[name]
    tuned = learner.GradientLearner(
        tokenizer, objective, OPTIMIZER, init_from="pretrained", run_dir=str(tmp_path),
        init_part="tokenizer", init_fresh=fresh,
    )  # fmt: skip
    begun = tuned.init(jax.random.key(7))
    started = tuned.warm_start(begun)
    want = nnx.to_flat_state(nnx.state(model.tokenizer))
    pretrained = {path: variable[...] for path, variable in want}
    seen = 0
    for kind in ("params", "variables"):
        old = dict(nnx.to_flat_state(getattr(begun, kind)["model"]))
        for path, variable in nnx.to_flat_state(getattr(started, kind)["model"]):
            own = path[0] in fresh
            expected = old[path][...] if own else pretrained.pop(path)
            np.testing.assert_array_equal(variable[...], expected, err_msg=str(path))
            seen += own
    assert not pretrained and seen  # all of the encoder was taken over
    text = {"text_ids": np.ones((4, 8), np.int32), "text_lengths": np.full(4, 2, np.int32)}
    after, _ = jax.eval_shape(tuned.step, started, batch() | text, jax.random.key(0))
    assert jax.tree.structure(after) == jax.tree.structure(started)


def test_a_start_that_does_not_fit_is_named(tmp_path):
    made, *_ = trainer("semantic")
    model = made.model.make(nnx.Rngs(0))
    checkpoints.save_model(tmp_path / "pretrained", {"model": made.model}, {"model": model})
    tokenizer, objective, fresh = SUPERVISED["semantic"]

    def start(config=tokenizer, **settings):
        tuned = learner.GradientLearner(
            config, objective, OPTIMIZER, str(tmp_path / "pretrained"), **settings
        )
        tuned.warm_start(tuned.init(jax.random.key(0)))

    with pytest.raises(UserError, match="has no params/blocks"):
        start(init_part="")
    with pytest.raises(UserError, match="has no params/tokenizer/head/"):
        start(init_part="tokenizer", init_fresh=("supervision", "head_norm"))
    with pytest.raises(UserError, match="width|is .* there but"):
        start(dataclasses.replace(tokenizer, width=32), init_part="tokenizer", init_fresh=fresh)
    with pytest.raises(UserError, match="has params/tokenizer/conv1"):
        start(init_part="tokenizer", init_fresh=(*fresh, "conv1"))


def test_the_chance_of_a_span_is_checked():
    with pytest.raises(UserError, match="start_probability=0.0"):
        BestRq(start_probability=0.0)
