import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.errors import UserError
from t5x_audio.tokenizers import kmeans


def clusters(num=6, each=40, spread=0.05, seed=0):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(num, 8)) * 3
    points = centres[:, None] + spread * generator.normal(size=(num, each, 8))
    return centres, generator.permutation(points.reshape(-1, 8)).astype(np.float32)


def test_fit_finds_the_clusters():
    centres, points = clusters()
    found, metrics = kmeans.fit(np.split(points, 4), 6, seed=0)
    distance = np.linalg.norm(centres[:, None] - np.asarray(found), axis=-1)
    assert distance.min(axis=1).max() < 0.05
    assert metrics["usage"] == 1.0 and metrics["perplexity"] == pytest.approx(6, rel=1e-3)
    assert metrics["inertia"] == pytest.approx(8 * 0.05**2, rel=0.2)


def test_the_same_seed_gives_the_same_codebook():
    points = np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32)
    one, _ = kmeans.fit(np.split(points, 4), 16, seed=3, num_epochs=3)
    two, _ = kmeans.fit(np.split(points, 4), 16, seed=3, num_epochs=3)
    other, _ = kmeans.fit(np.split(points, 4), 16, seed=4, num_epochs=3)
    np.testing.assert_array_equal(one, two)
    assert np.abs(np.asarray(one) - np.asarray(other)).max() > 0.1


def test_passes_lower_the_inertia():
    points = np.random.default_rng(1).normal(size=(400, 8)).astype(np.float32)
    history = []
    kmeans.fit(np.split(points, 4), 16, on_epoch=lambda _, metrics: history.append(metrics))
    assert history[-1]["inertia"] < 0.95 * history[0]["inertia"]


def test_plus_plus_draws_distinct_points_and_reaches_every_cluster():
    centres, points = clusters(num=8)
    seeds = np.asarray(kmeans.plus_plus(jnp.asarray(points), 8, jax.random.key(0)))
    nearest = np.linalg.norm(centres[:, None] - seeds, axis=-1).argmin(axis=1)
    assert len(set(nearest)) == 8
    same = jnp.ones((20, 8))
    assert np.isfinite(kmeans.plus_plus(same, 8, jax.random.key(0))).all()


def test_nearest_is_the_euclidean_nearest():
    generator = np.random.default_rng(0)
    points, centres = generator.normal(size=(3, 7, 8)), generator.normal(size=(5, 8))
    want = np.linalg.norm(points[..., None, :] - centres, axis=-1).argmin(-1)
    np.testing.assert_array_equal(kmeans.nearest(jnp.asarray(points), jnp.asarray(centres)), want)


def test_a_dead_centre_is_moved_onto_a_point():
    points = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    centres = jnp.concatenate([jnp.asarray(points[:4]), jnp.full((1, 8), 1e3)])
    state, usage, _ = kmeans.update(kmeans.KMeansState(centres, jnp.zeros(5)), points)
    assert usage[4] == 0
    state, moved = kmeans.revive(state, usage, jnp.asarray(points), jax.random.key(0))
    assert int(moved) == 1
    assert np.abs(points - np.asarray(state.centres)[4]).sum(axis=1).min() == 0


def test_too_few_frames_are_refused():
    with pytest.raises(UserError, match="only 5 frames"):
        kmeans.fit([np.zeros((5, 8), np.float32)], 6)


def eight_devices_agree_with_one():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    generator = np.random.default_rng(0)
    places = 10 * generator.normal(size=(12, 4))
    batches = [(places[generator.integers(12, size=240)] + generator.normal(size=(240, 4)))
               .astype(np.float32) for _ in range(3)]  # fmt: skip
    one, alone = kmeans.fit(batches, 12, num_epochs=4)
    other, spread = kmeans.fit(batches, 12, num_epochs=4, sharding=sharding)
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)
    assert spread["inertia"] == pytest.approx(alone["inertia"], rel=1e-4)
    assert spread["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)


def test_eight_devices_agree_with_one(on_devices):
    on_devices(8, "eight_devices_agree_with_one")
