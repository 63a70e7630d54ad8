"""The Pallas kernels, interpreted, against attention in float64; where they are used and how split.

That Mosaic compiles them for the chips is shown by programs compiled for a TPU, not here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.backbone import attention, flash_attention
from t5x_audio.backbone.alibi import alibi_slopes

BATCH = 2


def segments_of(length):
    """Row 0: two packed segments and padding; row 1: one segment."""
    first = length // 3
    row = [1] * first + [2] * (length - first - 7) + [0] * 7
    return np.array([row, [1] * length], np.int32)


def reference(query, key, value, segments, slopes, d_output):
    """(output, log-sum-exp, d_query, d_key, d_value) in float64."""
    query, key, value, d_output = (np.asarray(x, np.float64) for x in (query, key, value, d_output))
    length = query.shape[3]
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (segments[:, :, None] == segments[:, None])
    scores = np.einsum("bkgqd,bktd->bkgqt", query, key)
    if slopes is not None:
        scores -= np.asarray(slopes, np.float64)[..., None, None] * np.sqrt(np.maximum(distance, 0))
    scores = np.where(seen[:, None, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    weights = np.exp(scores - top) / total
    output = np.einsum("bkgqt,bktd->bkgqd", weights, value)
    d_weights = np.einsum("bkgqd,bktd->bkgqt", d_output, value)
    d_scores = weights * (d_weights - (d_output * output).sum(-1, keepdims=True))
    return (
        output,
        (top + np.log(total))[..., 0],
        np.einsum("bkgqt,bktd->bkgqd", d_scores, key),
        np.einsum("bkgqt,bkgqd->bktd", d_scores, query),
        np.einsum("bkgqt,bkgqd->bktd", weights, d_output),
    )


def made(groups, heads, length, dim, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    query, d_output = rng.normal(size=(2, BATCH, groups, heads, length, dim))
    key, value = rng.normal(size=(2, BATCH, groups, length, dim))
    return [jnp.asarray(x, dtype) for x in (query * dim**-0.5, key, value, d_output)]


@pytest.mark.parametrize(
    ("groups", "heads", "length", "dim", "biased", "dtype", "within"),
    [
        (2, 3, 300, 64, True, jnp.float32, 1e-5),  # two whole blocks and a part
        (1, 2, 129, 128, True, jnp.float32, 1e-5),
        (1, 2, 256, 64, False, jnp.float32, 1e-5),
        (2, 2, 100, 64, True, jnp.bfloat16, 2e-2),
    ],
)
def test_output_and_gradients(groups, heads, length, dim, biased, dtype, within):
    query, key, value, d_output = made(groups, heads, length, dim, dtype)
    segments = segments_of(length)
    slopes = np.float32(alibi_slopes(groups * heads)).reshape(groups, heads) if biased else None
    options = dict(block_size=128, interpret=True)
    output, log_sum = flash_attention.forward(query, key, value, (segments,) * 2, slopes, **options)
    correction = (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(-1)
    gradients = flash_attention.backward(
        query, key, value, (segments,) * 2, log_sum, correction, d_output, slopes, **options
    )
    expected = reference(query, key, value, segments, slopes, d_output)
    assert output.dtype == dtype and log_sum.dtype == jnp.float32
    for got, want in zip((output, log_sum, *gradients), expected, strict=True):
        assert got.shape == want.shape
        scale = np.abs(want).max()
        np.testing.assert_allclose(np.float64(got) / scale, want / scale, atol=within)


@pytest.mark.parametrize("length", [640, 500])
def test_queries_take_turns_where_their_gradient_does_not_fit(monkeypatch, length):
    query, key, value, d_output = made(2, 2, length, 64)
    places = (segments_of(length),) * 2
    slopes = np.float32(alibi_slopes(4)).reshape(2, 2)
    options = dict(block_size=128, interpret=True)
    output, log_sum = flash_attention.forward(query, key, value, places, slopes, **options)
    saved = (log_sum, (output * d_output).sum(-1), d_output)
    block = 2 * 128 * 64 * 4
    monkeypatch.setattr(flash_attention, "_VMEM_BYTES", 4 * 2 * block)
    kernels = jax.make_jaxpr(
        lambda *arrays: flash_attention.backward(*arrays, places, *saved, slopes, **options)
    )(query, key, value)
    calls = [e.params["cost_estimate"] for e in kernels.eqns if e.primitive.name == "pallas_call"]
    assert len(calls) == -(-length // 256)
    blocks = -(-length // 128)
    pairs = BATCH * 4 * blocks * (blocks + 1) // 2 * 128**2
    assert sum(call.flops for call in calls) == 5 * 2 * pairs * 64
    got = flash_attention.backward(query, key, value, places, *saved, slopes, **options)
    expected = reference(query, key, value, segments_of(length), slopes, d_output)[2:]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_large_scores_stay_finite():
    query, key, value, d_output = made(1, 2, 140, 64)
    slopes = np.full((1, 2), 0.5, np.float32)
    options = dict(block_size=128, interpret=True)
    rest = (key, value, (segments_of(140),) * 2)
    output, log_sum = flash_attention.forward(1e4 * query, *rest, slopes, **options)
    gradients = flash_attention.backward(
        1e4 * query, *rest, log_sum, (output * d_output).sum(-1), d_output, slopes, **options
    )
    assert all(np.isfinite(x).all() for x in (output, log_sum, *gradients))


def run_on_4_devices():
    query, key, value, d_output = made(2, 2, 130, 64)
    positions = jnp.broadcast_to(jnp.arange(130), (BATCH, 130))
    places = (positions, jnp.asarray(segments_of(130))) * 2
    slopes = alibi_slopes(4)
    options = dict(block_size=128, interpret=True)

    @jax.jit
    def both(query, key, value, d_output):
        output, log_sum = attention.flash_forward(
            query, key, value, places, slopes=slopes, **options
        )
        correction = (output * d_output).sum(-1)
        saved = (query, key, value, places, log_sum, correction, d_output)
        return output, *attention.flash_backward(*saved, slopes=slopes, **options)

    alone = both(query, key, value, d_output)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        shared = both(query, key, value, d_output)
    assert shared[0].addressable_shards[0].data.shape == (1, 1, 2, 130, 64)
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_every_device_has_its_share_of_batch_and_groups(on_devices):
    on_devices(4, "run_on_4_devices")


def run_on_3_devices_along_the_sequence():
    length, chunk = 3 * 2 * 128, 128
    *arrays, d_output = made(1, 2, length, 64)
    segments = segments_of(length)
    slopes = alibi_slopes(2)
    expected = reference(*arrays, segments, np.float32(slopes).reshape(1, 2), d_output)
    # Balanced order: a device has one chunk of the first half and its mirror image.
    order = np.concatenate([np.arange(c * chunk, c * chunk + chunk) for c in (0, 5, 1, 4, 2, 3)])
    query, key, value, d_output = (x[..., order, :] for x in (*arrays, d_output))
    places = (None, jnp.asarray(segments[:, order]))
    options = dict(block_size=128, interpret=True, slopes=slopes)
    mesh = jax.make_mesh((3,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        output, log_sum = attention.flash_forward(query, key, value, places, **options)
        saved = (query, key, value, places, log_sum, (output * d_output).sum(-1), d_output)
        gradients = attention.flash_backward(*saved, **options)
    assert output.addressable_shards[0].data.shape == (BATCH, 1, 2, 256, 64)
    assert gradients[1].addressable_shards[0].data.shape == (BATCH, 1, 256, 64)
    got = (output, log_sum[..., None], *gradients)
    expected = (expected[0], expected[1][..., None], *expected[2:])
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other[..., order, :], atol=1e-4)


def test_every_device_has_its_chunks_of_the_sequence(on_devices):
    on_devices(3, "run_on_3_devices_along_the_sequence")


@pytest.mark.parametrize(
    ("platform", "dim", "same_tokens", "kernels"),
    [("tpu", 128, True, 2), ("cpu", 128, True, 0), ("tpu", 48, True, 0), ("tpu", 128, False, 0)],
)
def test_kernels_are_used_where_they_can_serve(platform, dim, same_tokens, kernels):
    arrays = made(1, 2, 128, dim, jnp.bfloat16)[:3]
    place = (jnp.zeros((BATCH, 128), jnp.int32),) * 2
    run = functools.partial(
        attention.attention, query_place=place, key_place=place, slopes=(0.5, 0.25),
        same_tokens=same_tokens,
    )  # fmt: skip
    gradient = jax.grad(lambda *arrays: run(*arrays).astype(jnp.float32).sum(), (0, 1, 2))
    lowered = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("@tpu_custom_call") == kernels
