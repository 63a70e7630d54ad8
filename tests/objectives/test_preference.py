"""Audio-masked DPO against hand-made log-probabilities, and what the mask leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.backbone.transformer import TransformerConfig
from t5x_audio.objectives.preference import MaskedDpo, answer_log_probs

CONFIG = TransformerConfig(
    num_layers=2, embed=16, mlp=32, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=40,
    dtype="float32", remat="none", init_std=0.3,
)  # fmt: skip


def make_batch(seed, rows=3, length=12):
    rng = np.random.default_rng(seed)
    batch = {}
    for side in ("chosen", "rejected"):
        batch[f"{side}_tokens"] = rng.integers(0, 40, (rows, length), dtype=np.int32)
        batch[f"{side}_targets"] = rng.integers(0, 40, (rows, length), dtype=np.int32)
        batch[f"{side}_weights"] = rng.integers(0, 2, (rows, length)).astype(np.float32)
        batch[f"{side}_weights"][:, -1] = 1
        batch[f"{side}_segment_ids"] = np.ones((rows, length), np.int32)
        batch[f"{side}_positions"] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return batch


@pytest.fixture(scope="module")
def models():
    return CONFIG.make(nnx.Rngs(0)), CONFIG.make(nnx.Rngs(1))


def by_hand(model, batch, side):
    logits = np.float64(model(batch[f"{side}_tokens"]))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    of_target = np.take_along_axis(log_probs, batch[f"{side}_targets"][..., None], -1)[..., 0]
    return (of_target * batch[f"{side}_weights"]).sum(-1)


def test_equal_models_give_log_two(models):
    loss, metrics = MaskedDpo()(models[0], models[0], make_batch(0), None, True)
    assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
    assert float(metrics["reward_margin"][0]) == pytest.approx(0, abs=1e-5)


def test_loss_by_hand(models):
    model, reference = models
    batch = make_batch(1)
    r = {s: by_hand(model, batch, s) - by_hand(reference, batch, s) for s in ("chosen", "rejected")}
    margin = 0.3 * (r["chosen"] - r["rejected"])
    loss, metrics = MaskedDpo(beta=0.3)(model, reference, batch, None, True)
    assert float(loss) == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
    assert float(metrics["reward_accuracy"][0]) == (margin > 0).sum()


def test_targets_without_weight_do_not_count(models):
    batch = make_batch(2)
    changed = {k: v.copy() for k, v in batch.items()}
    masked = batch["chosen_weights"] == 0
    changed["chosen_targets"][masked] = (changed["chosen_targets"][masked] + 7) % 40
    before = answer_log_probs(models[0], batch, "chosen_")
    np.testing.assert_array_equal(before, answer_log_probs(models[0], changed, "chosen_"))


def test_rows_of_padding_are_no_pairs(models):
    model, reference = models
    batch = make_batch(3)
    padded = {k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in batch.items()}
    loss = MaskedDpo()(model, reference, batch, None, False)[0]
    assert float(MaskedDpo()(model, reference, padded, None, False)[0]) == pytest.approx(
        float(loss), rel=1e-5
    )


def test_gradient_reaches_the_policy_only(models):
    batch = jax.tree.map(jnp.asarray, make_batch(4))

    def loss(policy, reference):
        return MaskedDpo()(policy, reference, batch, None, True)[0]

    into_policy, into_reference = nnx.grad(loss, argnums=(0, 1))(*models)
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(into_policy)) > 0
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(into_reference)) == 0
