"""Shares against Lagrange's formula over fractions, written out here; what is wrong with shares is refused."""

from __future__ import annotations

import secrets
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfl.horizontal.shamir import PRIME, recover, split

ELEMENTS = st.integers(0, PRIME - 1)


def lagrange(points: list[tuple[int, int]], at: int) -> int:
    """The polynomial through the points, over the rationals first, its value taken modulo the prime at the end."""
    total = Fraction(0)
    for i, (x, y) in enumerate(points):
        term = Fraction(y)
        for j, (other, _) in enumerate(points):
            if i != j:
                term *= Fraction(at - other, x - other)
        total += term
    return total.numerator * pow(total.denominator, PRIME - 2, PRIME) % PRIME  # Fermat


@st.composite
def sharings(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    holders = draw(st.lists(st.integers(1, 2000), min_size=1, max_size=9, unique=True))
    coefficients = draw(st.lists(ELEMENTS, max_size=len(holders) - 1))
    return draw(ELEMENTS), coefficients, holders


def test_the_modulus_is_the_largest_prime_below_two_to_the_256():
    def probably_prime(n: int) -> bool:  # Miller and Rabin
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for _ in range(40):
            x = pow(secrets.randbelow(n - 3) + 2, odd, n)
            if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
                return False
        return True

    assert [n for n in range(PRIME, 2**256) if n % 2 and probably_prime(n)] == [PRIME]


@given(sharings())
def test_shares_are_values_of_the_polynomial(sharing):
    secret, coefficients, holders = sharing
    shares = split(secret, len(coefficients) + 1, holders, coefficients)
    polynomial = [secret, *coefficients]
    assert shares == {x: sum(c * x**power for power, c in enumerate(polynomial)) % PRIME for x in holders}


@given(sharings(), st.randoms(use_true_random=False))
def test_any_threshold_of_shares_gives_what_lagrange_gives(sharing, random):
    secret, coefficients, holders = sharing
    threshold = len(coefficients) + 1
    points = random.sample(list(split(secret, threshold, holders, coefficients).items()), threshold)
    assert recover(points, threshold, lambda found: found == secret) == secret == lagrange(points, 0)


def test_every_subset_of_fresh_shares_of_sufficient_size_gives_the_secret():
    shares = split(7, 3, range(1, 6))
    for count in (3, 4, 5):
        for points in combinations(shares.items(), count):
            assert recover(points, 3, lambda found: found == 7) == 7


@given(st.lists(ELEMENTS, min_size=3, max_size=3, unique=True))
def test_one_share_less_fits_every_secret(values):
    """For two of three shares and any secret there is a polynomial: two shares tell nothing."""
    first, second, other = values
    points = [(1, first), (2, second)]
    third = lagrange([(0, other), *points], 3)
    assert recover([*points, (3, third)], 3, lambda found: True) == other


def test_fresh_shares_are_random_every_time():
    first, second = split(0, 3, [1, 2, 3, 4]), split(0, 3, [1, 2, 3, 4])
    assert not set(first.values()) & set(second.values())
    bits = np.array([list(f"{share:0256b}") for _ in range(200) for share in split(0, 2, [1, 2]).values()], int)
    assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(bits.size / 2)


@pytest.mark.parametrize("position", range(5))
def test_one_wrong_share_among_more_than_needed_is_passed_over(position):
    shares = split(7, 3, range(1, 6))
    points = [(x, y if x != position + 1 else (y + 1) % PRIME) for x, y in shares.items()]
    assert recover(points, 3, lambda found: found == 7) == 7


@given(st.sampled_from([1, 2, 3]), st.integers(1, PRIME - 1))
def test_a_wrong_share_among_as_many_as_needed_is_refused(holder, error):
    points = [(x, (y + error * (x == holder)) % PRIME) for x, y in split(7, 3, [1, 2, 3]).items()]
    with pytest.raises(ValueError, match="committed"):
        recover(points, 3, lambda found: found == 7)


@pytest.mark.parametrize(
    ("points", "what"),
    [
        ([(1, 5), (2, 6)], "2 shares where 3"),
        ([], "0 shares where 3"),
        ([(1, 5), (1, 5), (2, 6)], "two shares of one holder"),
        ([(1, 5), (1, 6), (2, 6), (3, 7)], "two shares of one holder"),
        ([(0, 7), (1, 5), (2, 6)], "out of range"),
        ([(1, PRIME), (2, 6), (3, 7)], "out of range"),
        ([(1, -1), (2, 6), (3, 7)], "out of range"),
        ([(PRIME + 1, 5), (1, 5), (2, 6)], "out of range"),
    ],
)
def test_shares_that_cannot_be_are_refused(points, what):
    with pytest.raises(ValueError, match=what):
        recover(points, 3, lambda found: True)


@pytest.mark.parametrize(
    ("secret", "threshold", "holders", "coefficients"),
    [
        (7, 4, [1, 2, 3], None),
        (7, 0, [1, 2, 3], None),
        (7, 2, [1, 1, 3], None),
        (7, 2, [0, 1, 2], None),
        (7, 2, [1, PRIME], None),
        (PRIME, 2, [1, 2, 3], None),
        (-1, 2, [1, 2, 3], None),
        (7, 2, [1, 2, 3], [1, 2]),
        (7, 3, [1, 2, 3], [1]),
    ],
)
def test_sharings_that_cannot_be_are_refused(secret, threshold, holders, coefficients):
    with pytest.raises(ValueError):
        split(secret, threshold, holders, coefficients)
