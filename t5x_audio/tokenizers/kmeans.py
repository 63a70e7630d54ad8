"""Mini-batch k-means over feature vectors: how the linguistic codebook is made.

Choices: k-means++ start on a sample (Arthur and Vassilvitskii, 2007); then mini-batch updates
with a learning rate per centre of 1 / its count (Sculley, "Web-scale k-means clustering", 2010);
centres that win almost nothing are moved onto random points of the batch. Every step is a pure
jitted function of (state, batch), so a batch that is sharded over a mesh gives the same result
as on one device, up to the order of summation. Deterministic from the seed.
"""

import functools
from collections.abc import Iterable

import flax.struct
import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError

REVIVAL_SHARE = 0.02  # of an even share; below it, over one pass, a centre counts as dead


@flax.struct.dataclass
class KMeansState:
    """Centres [K, D] and the number of points [K] each has absorbed since the last forgetting."""

    centres: jax.Array
    counts: jax.Array


def squared_distances(points: jax.Array, centres: jax.Array) -> jax.Array:
    """Squared Euclidean distances float32 [..., K] of points [..., D] to centres [K, D].

    The term of the point's own norm is left out: it does not change which centre is nearest.
    """
    points = points.astype(jnp.float32)
    cross = jnp.einsum("...d,kd->...k", points, centres, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(centres), axis=-1) - 2.0 * cross


def nearest(points: jax.Array, centres: jax.Array) -> jax.Array:
    """Index int32 [...] of the nearest of centres [K, D], Euclidean; of equals the lowest."""
    return jnp.argmin(squared_distances(points, centres), axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="num_centres")
def plus_plus(points: jax.Array, num_centres: int, rng: jax.Array) -> jax.Array:
    """k-means++ seeding: [N, D] points -> [K, D] of them, drawn by their squared distance."""
    points = points.astype(jnp.float32)
    norms = jnp.sum(jnp.square(points), axis=-1)

    def distance_to(index):
        centre = points[index]
        return jnp.maximum(norms - 2.0 * points @ centre + norms[index], 0.0)

    def draw(carry, key):
        distances, index = carry
        # Rounding leaves a chosen point at a tiny distance from itself; it must not be drawn again.
        distances = jnp.minimum(distances, distance_to(index)).at[index].set(0.0)
        # Once every distinct point is taken, any point will do.
        logits = jnp.where(distances > 0, jnp.log(distances), -jnp.inf)
        logits = jnp.where(jnp.any(distances > 0), logits, 0.0)
        return (distances, jax.random.categorical(key, logits)), index

    first_key, *keys = jax.random.split(rng, num_centres + 1)
    first = jax.random.randint(first_key, (), 0, points.shape[0])
    start = (jnp.full_like(norms, jnp.inf), first)
    _, chosen = jax.lax.scan(draw, start, jnp.stack(keys))
    return points[chosen]


@jax.jit
def update(state: KMeansState, points: jax.Array) -> tuple[KMeansState, jax.Array, jax.Array]:
    """One mini-batch step on [N, D] points.

    Returns:
      The new state, the number of points [K] of this batch per centre, and the mean squared
      distance of the points to the centres they had before the step.
    """
    points = points.astype(jnp.float32)
    distances = squared_distances(points, state.centres)
    winners = jnp.argmin(distances, axis=-1)
    inertia = jnp.mean(jnp.min(distances, axis=-1) + jnp.sum(jnp.square(points), axis=-1))
    num_centres = state.centres.shape[0]
    batch_counts = jax.ops.segment_sum(jnp.ones(winners.shape), winners, num_centres)
    sums = jax.ops.segment_sum(points, winners, num_centres)
    counts = state.counts + batch_counts
    rate = 1.0 / jnp.maximum(counts, 1.0)[:, None]
    centres = state.centres + (sums - batch_counts[:, None] * state.centres) * rate
    return KMeansState(centres, counts), batch_counts, inertia


@functools.partial(jax.jit, donate_argnums=0)
def revive(state: KMeansState, usage: jax.Array, points: jax.Array, rng: jax.Array):
    """Moves centres of little `usage` [K] onto random points [N, D]; (state, how many moved)."""
    dead = usage < REVIVAL_SHARE * jnp.mean(usage)
    replace = points.shape[0] < usage.shape[0]
    drawn = jax.random.choice(rng, points.shape[0], usage.shape, replace=replace)
    centres = jnp.where(dead[:, None], points[drawn].astype(jnp.float32), state.centres)
    return KMeansState(centres, jnp.where(dead, 0.0, state.counts)), jnp.sum(dead)


def fit(
    batches: Iterable,
    num_centres: int,
    *,
    seed: int = 0,
    num_epochs: int = 10,
    on_epoch=None,
    sharding: jax.sharding.Sharding | None = None,
) -> tuple[jax.Array, dict[str, float]]:
    """Fits `num_centres` centres.

    Args:
      batches: re-iterable of [N, D] float arrays, the same each time; the first seeds the start
        and so should be a random sample. Few distinct N, as each is compiled.
      num_centres: K.
      seed: of the start and of the revivals.
      num_epochs: passes; between passes the counts are forgotten, so that late passes are not
        anchored to early assignments, and dead centres are revived (not after the last two).
      on_epoch: called with (epoch, metrics) after every pass.
      sharding: how the points of a batch lie on devices; None = on one.

    Returns:
      (centres float32 [K, D], {'inertia', 'usage', 'perplexity'} of the last pass): inertia = mean
      squared distance, usage = share of centres that won any point, perplexity of the codes.

    Raises:
      UserError: there are fewer points than centres in the first batch.
    """
    rng = jax.random.key(seed)
    first = next(iter(batches))
    if first.shape[0] < num_centres:
        raise UserError(
            f"codebook of {num_centres} codes from only {first.shape[0]} frames; "
            "use more audio or a smaller codebook"
        )
    place = jnp.asarray if sharding is None else functools.partial(jax.device_put, device=sharding)
    rng, key = jax.random.split(rng)
    centres = plus_plus(place(first), num_centres, key)
    state = KMeansState(centres, jnp.zeros(num_centres))
    metrics = {}
    for epoch in range(num_epochs):
        usage, inertia, weight = jnp.zeros(num_centres), 0.0, 0
        for points in batches:
            state, batch_usage, batch_inertia = update(state, place(points))
            usage = usage + batch_usage
            inertia, weight = inertia + batch_inertia * len(points), weight + len(points)
        metrics = {"inertia": float(inertia) / weight, **code_statistics(usage)}
        if on_epoch is not None:
            on_epoch(epoch, metrics)
        if epoch < num_epochs - 2:
            rng, key = jax.random.split(rng)
            state, _ = revive(state, usage, place(first), key)
        state = KMeansState(state.centres, jnp.minimum(state.counts, 1.0))
    return state.centres, metrics


def code_statistics(counts: jax.Array) -> dict[str, float]:
    """Share of codes in use and the perplexity of a histogram [K] of codes."""
    share = counts / jnp.maximum(jnp.sum(counts), 1.0)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0))
    return {"usage": float(jnp.mean(counts > 0)), "perplexity": float(jnp.exp(entropy))}
