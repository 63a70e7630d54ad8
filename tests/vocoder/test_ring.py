"""What stands in a ring, and how far away it is, against a list of frames."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.vocoder.ring import RingSize, ring


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.integers(0, 3),
    spare=st.integers(0, 2),
    look_back=st.integers(1, 5),
    chunks=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
def test_the_prompt_and_the_last_frames_stand_side_by_side(prompt, spare, look_back, chunks):
    size = RingSize(prompt + spare, look_back)
    cache = jnp.full((1, size.places), -1)
    seen, kept = 0, []
    for number, length in enumerate(([prompt] if prompt else []) + chunks):
        first = prompt > 0 and number == 0
        new = list(range(seen, seen + length))
        places = ring(
            size, jnp.int32(seen), jnp.int32(prompt if seen else 0), length, length, first
        )
        joined = np.concatenate([np.asarray(cache)[0], new])
        visible = np.asarray(places.mask) > 0
        assert sorted(joined[visible]) == kept + new
        # Distance to a new frame = how many of the visible frames stand after it.
        order = {frame: place for place, frame in enumerate(kept + new)}
        for row, frame in zip(np.asarray(places.distances), new, strict=True):
            assert [order[frame] - order[f] for f in joined[visible]] == row[visible].tolist()
        cache = places.keep(cache, jnp.asarray([new]))
        seen += length
        kept = list(range(prompt)) + list(range(prompt, seen))[-look_back:] * (seen > prompt)


def test_frames_that_do_not_count_are_not_kept():
    places = ring(RingSize(0, 4), jnp.int32(0), jnp.int32(0), 3, jnp.int32(2), False)
    assert places.mask.tolist() == [0, 0, 0, 0, 1, 1, 0]
    kept = places.keep(jnp.full((1, 4), -1), jnp.array([[7, 8, 9]]))
    assert kept.tolist() == [[7, 8, -1, -1]]
