import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.backbone.alibi import alibi_slopes, sqrt_distance
from t5x_audio.errors import UserError


def test_power_of_two():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])


@pytest.mark.parametrize(
    ("heads", "main", "tail_step"), [(48, 32, 1 / 8), (96, 64, 1 / 16), (3, 2, 2.0)]
)
def test_tail_of_other_counts(heads, main, tail_step):
    slopes = alibi_slopes(heads)
    assert len(slopes) == heads
    np.testing.assert_allclose(slopes[:main], [2.0 ** (-8 * i / main) for i in range(1, main + 1)])
    tail = [2.0 ** (-tail_step * k) for k in range(1, 2 * (heads - main), 2)]
    np.testing.assert_allclose(slopes[main:], tail)


def test_no_heads():
    with pytest.raises(UserError, match="at least one head"):
        alibi_slopes(0)


def test_distance_is_masked_outside_the_segment_and_ahead():
    positions = jnp.array([[0, 1, 0, 1, 2]])
    segments = jnp.array([[1, 1, 2, 2, 2]])
    inf = np.inf
    expected = [
        [0, inf, inf, inf, inf],
        [1, 0, inf, inf, inf],
        [inf, inf, 0, inf, inf],
        [inf, inf, 1, 0, inf],
        [inf, inf, 2**0.5, 1, 0],
    ]
    table = sqrt_distance(positions, positions, segments, segments)
    np.testing.assert_allclose(table[0], expected, rtol=1e-6)
