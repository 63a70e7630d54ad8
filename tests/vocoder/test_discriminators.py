import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.vocoder.discriminators import DiscriminatorConfig

SMALL = DiscriminatorConfig(
    periods=(2, 3),
    period_channels=(4, 8),
    resolutions=((64, 16, 64), (32, 8, 24)),
    resolution_channels=4,
)


_run = nnx.jit(lambda model, samples: model(samples))


def test_one_judgement_each_with_all_hidden_layers(build):
    judgements = _run(build(SMALL), jax.random.normal(jax.random.key(0), (2, 301)) * 0.1)
    assert [len(hidden) for _, hidden in judgements] == [3, 3, 6, 6]
    assert [score.shape[0] for score, _ in judgements] == [2 * 2, 2 * 3, 2, 2]
    for score, hidden in judgements:
        np.testing.assert_array_equal(score, hidden[-1][..., 0])


def test_a_period_sees_its_phases_apart(build):
    model = build(SMALL).parts[1]
    samples = jax.random.normal(jax.random.key(0), (1, 300))
    changed = samples.at[:, 1::3].add(1.0)
    before, after = _run(model, samples)[0], _run(model, changed)[0]
    np.testing.assert_allclose(before[0], after[0], atol=1e-6)
    np.testing.assert_allclose(before[2], after[2], atol=1e-6)
    assert jnp.abs(before[1] - after[1]).max() > 1e-3


def test_published_size():
    module = nnx.eval_shape(lambda: DiscriminatorConfig().make(nnx.Rngs(0)))
    sizes = [sum(x.size for x in jax.tree.leaves(part)) for part in module.parts]
    # Kernels, biases and weight-norm scales of HiFi-GAN's period and UnivNet's resolution parts.
    assert len(set(sizes[:5])) == len(set(sizes[5:])) == 1
    assert round(sizes[0] / 1e6, 2) == 8.22
    assert round(sizes[5] / 1e6, 3) == 0.094


def test_no_parts_is_allowed_and_gradients_are_finite(build):
    model = build(DiscriminatorConfig((), (4,), ((64, 16, 64),), 4))
    grad = jax.jit(jax.grad(lambda x: model(x)[0][0].sum()))(jnp.zeros((1, 128)))
    assert jnp.isfinite(grad).all()
