"""Shamir's secret sharing (1979) modulo a prime: any `threshold` shares give the secret, fewer nothing.

The secret is the value at 0 of a random polynomial of degree threshold - 1, holder x's share its value at x.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

PRIME = 2**256 - 189  # the largest below 2^256: secrets and shares have 32 bytes


def split(
    secret: int, threshold: int, holders: Sequence[int], coefficients: Sequence[int] | None = None
) -> dict[int, int]:
    """One share for each of the distinct `holders` (from 1). Raises ValueError.

    `coefficients`, threshold - 1 uniform numbers below the prime, replay a sharing.
    """
    if not 1 <= threshold <= len(holders) or len(set(holders)) < len(holders):
        raise ValueError("a threshold is from 1 to the number of holders, who are distinct")
    if not 0 <= secret < PRIME or not all(0 < x < PRIME for x in holders):
        raise ValueError("a secret is from 0 and a holder from 1, both below the prime")
    if coefficients is None:
        coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    if len(coefficients) != threshold - 1:
        raise ValueError("a polynomial needs one coefficient less than its threshold")
    shares = {}
    for x in holders:
        value = 0
        for coefficient in reversed(coefficients):  # Horner's rule
            value = (value + coefficient) * x % PRIME
        shares[x] = (value + secret) % PRIME
    return shares


def recover(shares: Sequence[tuple[int, int]], threshold: int, fits: Callable[[int], bool]) -> int:
    """The secret, from at least `threshold` pairs (holder, share).

    A wrong share gives a wrong secret, which only the dealer's public commitment shows: `fits` says whether a secret
    agrees with it. With more shares than needed one wrong share, or several that stand together, are passed over.

    Raises:
        ValueError: too few shares, two of one holder, numbers out of range, or no secret that fits.
    """
    if len(shares) < threshold or threshold < 1:
        raise ValueError(f"{len(shares)} shares where {threshold} are needed")
    if len({x for x, _ in shares}) < len(shares):
        raise ValueError("two shares of one holder")
    if not all(0 < x < PRIME and 0 <= y < PRIME for x, y in shares):
        raise ValueError("a share out of range")
    for start in range(len(shares) if len(shares) > threshold else 1):
        window = [shares[(start + i) % len(shares)] for i in range(threshold)]
        weights = _weights(tuple(x for x, _ in window))
        secret = sum(weight * y for weight, (_, y) in zip(weights, window, strict=True)) % PRIME
        if fits(secret):
            return secret
    raise ValueError("the shares do not give the secret that was committed to")


@lru_cache(maxsize=256)
def _weights(holders: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's coefficients at 0: prod x_j / (x_j - x_i) over j != i. The same holders answer for many secrets."""
    others = [[other for other in holders if other != x] for x in holders]
    return tuple(
        prod(rest) * pow(prod(other - x for other in rest), -1, PRIME) % PRIME
        for x, rest in zip(holders, others, strict=True)
    )
