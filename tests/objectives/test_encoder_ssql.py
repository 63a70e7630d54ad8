"""Masked prediction and recognition by an encoder as it is and quantised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.objectives import ctc, encoder_ssql
from t5x_audio.objectives.best_rq import BestRq
from t5x_audio.objectives.encoder_ssql import EncoderSsql
from t5x_audio.quantization.simulate import observing, quantized
from t5x_audio.training.learner import GradientLearner
from t5x_audio.training.optimizers import AdamW
from tests.objectives.test_best_rq import batch, config
from tests.objectives.test_ctc import CASES
from tests.objectives.test_ctc import batch as spoken

RULES = {"linguistic": encoder_ssql.linguistic_rules(), "semantic": encoder_ssql.semantic_rules()}
MASKED = BestRq(start_probability=0.02)


@pytest.mark.parametrize("name", RULES)
def test_one_compiled_step_learns_both(name):
    """At all bits; the quantised branch too, and the features of both come together."""
    optimizer = AdamW(peak_lr=1e-2, end_lr=1e-3, warmup_steps=5, total_steps=30)
    made = GradientLearner(config(name), EncoderSsql(RULES[name], MASKED), optimizer)
    step, state, history = jax.jit(made.step), jax.jit(made.init)(jax.random.key(0)), []
    for seed in range(30):
        state, metrics = step(state, batch(8, seed=seed), jax.random.key(seed))
        history.append({k: float(v / w) for k, (v, w) in metrics.items()})
        if seed < 2:  # the first state is a fresh one's
            compiled = step._cache_size()
    early, late = (
        {k: np.mean([one[k] for one in some]) for k in history[0]}
        for some in (history[:5], history[-5:])
    )
    for branch in ("masked_loss", "quantized_masked_loss"):
        assert late[branch] < 0.85 * early[branch]
    assert late["agreement"] > 0.8
    drawn = {(one["weight_bits"], one["activation_bits"]) for one in history}
    assert len(drawn) > 10 and {w for w, _ in drawn} == set(range(2, 9))
    assert {a for _, a in drawn} == set(range(4, 9)) and step._cache_size() == compiled


@pytest.mark.parametrize("name", RULES)
def test_the_loss_is_the_mean_of_both_and_their_agreement(name):
    objective = EncoderSsql(RULES[name], MASKED, (3, 3), (5, 5), agreement_weight=0.5)
    model, rng = config(name).make(nnx.Rngs(0)), jax.random.key(3)
    loss, metrics = nnx.jit(lambda m, b: objective(m, b, rng, False))(model, batch())

    @nnx.jit
    def by_hand(model, batch):
        prepared = MASKED.prepare(model, batch, rng, False)
        with observing(model, RULES[name]) as ranges:
            plain = MASKED.predict(model, prepared, False)
        with quantized(model, RULES[name], ranges, (3, 5)):
            low = MASKED.predict(model, prepared, False)
        a, b = plain[2], low[2]
        cosine = jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
        return plain[0], low[0], jnp.mean(cosine, where=prepared.valid)

    plain, low, agreement = by_hand(model, batch())
    np.testing.assert_allclose(metrics["agreement"][0] / metrics["agreement"][1], agreement, 1e-5)
    wanted = 0.5 * (plain + low) + 0.5 * (1.0 - agreement)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert 0.5 < agreement < 1.0 and abs(float(plain - low)) > 1e-4


TASKS = {"linguistic": ctc.LinguisticCtc(), "semantic": ctc.SemanticCtc()}


@pytest.mark.parametrize("name", TASKS)
def test_a_recogniser_learns_as_it_is_and_quantised(name):
    """Features of both come together, and the codebook follows the plain ones alone."""
    rules = getattr(encoder_ssql, f"{name}_rules")("")
    objective = EncoderSsql(rules, TASKS[name], (4, 4), (6, 6))
    optimizer = AdamW(peak_lr=5e-3, end_lr=1e-3, warmup_steps=5, total_steps=40)
    made = GradientLearner(CASES[name][0], objective, optimizer)
    step, state, history = jax.jit(made.step), jax.jit(made.init)(jax.random.key(0)), []
    generator = np.random.default_rng(0)
    for seed in range(40):
        state, metrics = step(state, spoken(generator), jax.random.key(seed))
        history.append({k: float(v / w) for k, (v, w) in metrics.items()})
    for loss in ("ctc_loss", "quantized_ctc_loss"):
        assert np.mean([h[loss] for h in history[-5:]]) < 0.5 * history[0][loss]
    assert history[-1]["agreement"] > 0.9
    if name == "semantic":
        steps = state.variables["model"]["quantizer"]["steps"]
        assert float(jax.tree.leaves(steps)[0]) == 40  # once a batch, not once a forward


def test_a_further_forward_leaves_the_codebook():
    model, task = CASES["semantic"][0].make(nnx.Rngs(0)), TASKS["semantic"]

    @nnx.jit(static_argnames="first")
    def forward(model, batch, first):
        prepared = task.prepare(model, batch, jax.random.key(0), True)
        return task.predict(model, prepared, True, first)[0]

    def codebook():
        return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model.quantizer)))

    speech, before = spoken(np.random.default_rng(0)), codebook()
    forward(model, speech, False)
    jax.tree.map(np.testing.assert_array_equal, codebook(), before)
    forward(model, speech, True)
    assert codebook()["steps"] == 1 and (codebook()["codes"] != before["codes"]).any()


def test_bad_bits_are_named():
    with pytest.raises(UserError, match="EncoderSsql.weight_bits: 9 bits"):
        EncoderSsql(RULES["semantic"], MASKED, weight_bits=(2, 9))
    with pytest.raises(UserError, match="fewest first"):
        EncoderSsql(RULES["semantic"], MASKED, activation_bits=(8, 4))
    with pytest.raises(UserError, match="agreement_weight"):
        EncoderSsql(RULES["semantic"], MASKED, agreement_weight=-1.0)
    wrong = EncoderSsql(RULES["linguistic"], MASKED)
    with pytest.raises(UserError, match="matches no layer"):
        wrong(config("semantic").make(nnx.Rngs(0)), batch(), jax.random.key(0), False)
