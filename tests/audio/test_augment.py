import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.audio import augment

augmented = jax.jit(
    functools.partial(
        augment.spec_augment,
        num_time_masks=2,
        max_time_frames=10,
        num_frequency_masks=1,
        max_frequency_bins=5,
    )
)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), lengths=st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_blanks_whole_spans_and_bands_within_bounds(seed, lengths):
    ones = np.ones((2, 60, 16), np.float32)
    result = np.asarray(augmented(jax.random.key(seed), ones, np.array(lengths)))
    assert set(np.unique(result)) <= {0.0, 1.0}
    for row, length in zip(result, lengths, strict=True):
        bins = ~row.any(axis=0)
        kept = row[:, ~bins]
        frames = ~kept.any(axis=1)
        np.testing.assert_array_equal(kept[~frames], 1.0)  # nothing but spans and bands
        assert not frames[length:].any()
        assert frames.sum() <= 2 * min(10, int(0.2 * length))
        assert bins.sum() <= 5
        assert len(np.flatnonzero(np.diff(bins.astype(int)) == 1)) <= 1


def test_follows_the_key_and_differs_between_utterances():
    x = jnp.ones((4, 60, 16))
    lengths = jnp.full(4, 60)
    first = augmented(jax.random.key(0), x, lengths)
    np.testing.assert_array_equal(first, augmented(jax.random.key(0), x, lengths))
    assert len({np.asarray(row).tobytes() for row in first}) > 1
    assert not np.array_equal(first, augmented(jax.random.key(1), x, lengths))


def test_mask_widths_reach_their_bound():
    x = jnp.ones((256, 60, 16))
    result = np.asarray(augmented(jax.random.key(0), x, jnp.full(256, 60)))
    bands = (~result.any(axis=1)).sum(-1)
    assert set(bands) == set(range(6))
