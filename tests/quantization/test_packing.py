"""Packed weights: the numbers of fake quantisation, in as few bytes as their bits take."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.quantization import packing
from t5x_audio.quantization.fake_quant import quantize_weight
from t5x_audio.quantization.packing import (
    WIDTHS,
    _to_bytes,
    _to_integers,
    pack,
    unpack,
    unpack_rows,
)


def weight(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_it_stands_for_what_fake_quantisation_gives(bits):
    """Of a stack of layers too, with a channel of zeros and inputs that fill no whole bytes."""
    whole = weight(3, 21, 5)
    whole[1, :, 2] = 0.0
    got = jax.jit(unpack)(pack(whole, bits))
    want = quantize_weight(whole, bits, channel_axes=(0, -1))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes(bits):
    packed = pack(weight(64, 10), bits)
    assert packed.packed.dtype == np.uint8 and packed.packed.size == 64 * 10 * bits // 8
    assert packed.nbytes == 80 * bits + 40 and packed.shape == (64, 10)


def test_three_bits_by_hand():
    """0 1 2 3 -4 -3 -2 -1 are 000 001 010 011 100 101 110 111, the first in the lowest bits."""
    made = _to_bytes(np.array([0, 1, 2, 3, -4, -3, -2, -1], np.int8)[:, None], 3)
    assert made[:, 0].tolist() == [0b10_001_000, 0b1_100_011_0, 0b111_110_10]


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    eights=st.integers(1, 5),
    outputs=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_integers_come_back(bits, eights, outputs, seed):
    half = 2 ** (bits - 1)
    shape = (2, 8 * eights, outputs)
    integers = np.random.default_rng(seed).integers(-half, half, shape).astype(np.int8)
    np.testing.assert_array_equal(_to_integers(_to_bytes(integers, bits), bits), integers)


@pytest.mark.parametrize("bits", (4, 2))
def test_groups_have_scales_of_their_own(bits):
    """Each group as if it were a matrix; the last is filled up."""
    whole = weight(40, 6)
    whole[:16] *= 100.0
    packed = pack(whole, bits, group=16)
    assert packed.scales.shape == (3, 6)
    got = np.asarray(unpack(packed))
    for start in (0, 16, 32):
        part = whole[start : start + 16]
        np.testing.assert_allclose(got[start : start + 16], unpack(pack(part, bits)), rtol=1e-6)
    plain = np.asarray(unpack(pack(whole, bits)))
    lost, plainly = (np.abs(one - whole)[16:].mean() for one in (got, plain))
    assert lost < 0.5 * plainly


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pack(weight(8, 8), 5), "5 bits: weights are packed to 8, 4, 3, 2"),
        (lambda: pack(weight(8, 8), 4, group=12), "group=12: give a multiple of 8"),
        (lambda: pack(weight(8), 4), r"shape \(8,\) is no matrix"),
        (lambda: pack(weight(8, 8) * np.nan, 4), "not finite"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("group", (None, 16))
@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_those_of_the_whole(bits, group):
    packed = pack(weight(37, 6), bits, group)
    rows = np.random.default_rng(1).integers(0, 37, (2, 5))
    got = jax.jit(unpack_rows)(packed, rows)
    np.testing.assert_array_equal(got, np.asarray(unpack(packed))[rows])


@pytest.mark.parametrize("shape", [(40, 23), (3, 16, 9)])
def test_some_outputs_at_a_time_change_nothing(monkeypatch, shape):
    whole = pack(weight(*shape), 4, group=8)
    monkeypatch.setattr(packing, "_AT_ONCE", 100)
    parts = pack(weight(*shape), 4, group=8)
    np.testing.assert_array_equal(parts.packed, whole.packed)
    np.testing.assert_array_equal(parts.scales, whole.scales)
