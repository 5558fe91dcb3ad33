"""Fixed point: rounding, bounds, exact restoration, and a bit budget that no sum can exceed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parties.errors import LocalError
from vfl.encryption.fixedpoint import quantise, restore, sum_bits


def test_rounds_half_to_even():
    halves = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantise(halves, 0, bound_bits=8, what="x").tolist() == [0, 2, 2, 0, -2, -2]
    assert quantise(halves, 1, bound_bits=8, what="x").tolist() == [1, 3, 5, -1, -3, -5]


@given(st.lists(st.floats(-1000, 1000), max_size=20), st.integers(0, 50))
def test_round_trip_is_within_half_a_step(values, fraction_bits):
    there = quantise(np.array(values), fraction_bits, bound_bits=62, what="x")
    back = restore(there, fraction_bits)
    assert there.dtype == np.int64
    assert np.all(np.abs(back - values) <= 2.0 ** -(fraction_bits + 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_no_number(bad):
    with pytest.raises(LocalError, match="column income: 2 of 3 values are NaN or infinite") as error:
        quantise(np.array([bad, 123.456, bad]), 10, bound_bits=40, what="column income")
    assert "123" not in str(error.value)


def test_refuses_its_bound_and_accepts_one_less():
    assert quantise(np.array([-255.0, 255.0]), 0, bound_bits=8, what="x").tolist() == [-255, 255]
    for bad in (256.0, -256.0, 255.5, 1e300):
        with pytest.raises(LocalError, match="residual: 1 of 2 values reach the bound") as error:
            quantise(np.array([bad, 1.0]), 0, bound_bits=8, what="residual")
        assert str(bad) not in str(error.value)
    with pytest.raises(LocalError, match="64-bit"):
        quantise(np.array([1.0]), 0, bound_bits=63, what="x")
    with pytest.raises(LocalError, match="reach the bound"):
        quantise(np.array([1e300]), 1000, bound_bits=62, what="x")  # overflows float64 on the way


@given(st.lists(st.integers(-(2**200), 2**200), max_size=20), st.integers(0, 150))
def test_restores_integers_of_any_size_to_the_nearest_float(ints, fraction_bits):
    expected = [float(Fraction(v, 2**fraction_bits)) for v in ints]
    assert restore(ints, fraction_bits).tolist() == expected
    assert restore(np.array(ints, dtype=object), fraction_bits).tolist() == expected


def test_restore_keeps_the_shape():
    assert restore(np.array([[2, 4], [6, 8]]), 1).tolist() == [[1, 2], [3, 4]]


@given(st.lists(st.tuples(st.integers(-(2**40), 2**40), st.integers(-(2**30), 2**30)), max_size=20))
def test_no_sum_exceeds_its_bits(pairs):
    bits = sum_bits(sum(abs(x) for x, _ in pairs), 2**30)
    assert abs(sum(x * r for x, r in pairs)) <= 2**bits


def test_sum_bits_is_the_exact_logarithm():
    assert [sum_bits(v, 1) for v in (0, 1, 2, 3, 4, 5, 8, 9)] == [0, 0, 1, 2, 2, 3, 3, 4]
    assert sum_bits(10**5 * 2**23, 2**30) + 2 == 72  # 28 slots in a 2048-bit key, 42 in a 3072-bit one
