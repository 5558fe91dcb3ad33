"""Polynomials modulo X^8192 + 1 and q = p_0 ... p_7: the arithmetic of the lattice scheme, on numpy and BLAS alone.

A polynomial is a float64 array (..., primes, N) of residues, each of magnitude below 2^22. Every number that appears is
an integer below 2^53, so float64 is exact, whatever order a sum is taken in: a dot product of 128 residues stays below
2^51, and 256 products of two residues may be added up before they are reduced.

The transform is the negacyclic number-theoretic one, in four steps (Bailey 1990): with i = 64 i1 + i2, k = k1 + 128 k2,

    x^[k] = sum_i x[i] psi^((2k+1) i)
          = sum_i2 psi^(256 i2 k2) psi^((2 k1+1) i2) sum_i1 psi^(64 (2 k1+1) i1) x[64 i1 + i2]

two products with small matrices, for which BLAS is as fast as compiled butterflies. Products are taken position by
position in k, whose order nothing else depends on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Residues = NDArray[np.float64]
Packed = NDArray[np.uint8]
Entropy = Callable[[int], bytes]  # so many bytes: os.urandom, or a replay in tests

DEGREE = 8192
ROWS, COLUMNS = 128, 64
# The eight largest primes below 2^23 that are 1 modulo 2 * 8192: all roots exist, all products are exact.
PRIMES = (8273921, 8257537, 8159233, 7979009, 7913473, 7815169, 7667713, 7569409)
PRIME_BYTES = 3
UNREDUCED = 256  # products of two residues that may be added up: 2^8 * 2^44 < 2^53
NOISE_BITS = 21  # of the centred binomial distribution: standard deviation 3.24, as in SEAL
NOISE_BOUND = NOISE_BITS


@dataclass(frozen=True)
class _Transform:
    rows: Residues
    twist: Residues
    columns: Residues


@cache
def _transforms(prime: int) -> tuple[_Transform, _Transform]:
    """The matrices of the transform and of its inverse."""
    roots = (pow(g, (prime - 1) // (2 * DEGREE), prime) for g in range(2, prime))
    psi = next(root for root in roots if pow(root, DEGREE, prime) == prime - 1)
    powers = np.array([pow(psi, e, prime) for e in range(2 * DEGREE)])
    k1, i1, i2, k2 = np.arange(ROWS), np.arange(ROWS), np.arange(COLUMNS), np.arange(COLUMNS)

    def table(exponents: Any, factor: int = 1) -> Residues:
        return reduce((powers[exponents % (2 * DEGREE)] * factor % prime).astype(np.float64), prime)

    rows, twist, columns = 64 * np.outer(2 * k1 + 1, i1), np.outer(2 * k1 + 1, i2), 256 * np.outer(i2, k2)
    return (
        _Transform(table(rows), table(twist), table(columns)),
        _Transform(table(-rows.T, pow(ROWS, -1, prime)), table(-twist), table(-columns.T, pow(COLUMNS, -1, prime))),
    )


def reduce(values: Residues, prime: int) -> Residues:
    """The residues nearest to zero, in place: magnitude at most (prime + 3) / 2 for integers below 2^52."""
    quotient = np.rint(values * (1.0 / prime))
    quotient *= prime
    values -= quotient
    return values


def reduce_all(values: Residues) -> Residues:
    """`reduce` for every prime of a polynomial (..., primes, N), in place."""
    for index in range(values.shape[-2]):
        values[..., index, :] = reduce(values[..., index, :], PRIMES[index])
    return values


def forward(x: Residues) -> Residues:
    """The transform of polynomials (..., primes, N)."""
    out = np.empty_like(x)
    for index, prime in enumerate(PRIMES[: x.shape[-2]]):
        to, _ = _transforms(prime)
        y = reduce(to.rows @ _folded(x[..., index, :]), prime)
        y *= to.twist
        _folded(out[..., index, :])[...] = reduce(reduce(y, prime) @ to.columns, prime)
    return out


def inverse(x: Residues) -> Residues:
    """The polynomials (..., primes, N) of which `x` is the transform."""
    out = np.empty_like(x)
    for index, prime in enumerate(PRIMES[: x.shape[-2]]):
        _, back = _transforms(prime)
        y = reduce(_folded(x[..., index, :]) @ back.columns, prime)
        y *= back.twist
        _folded(out[..., index, :])[...] = reduce(back.rows @ reduce(y, prime), prime)
    return out


def _folded(x: Residues) -> Residues:
    """(..., N) as (..., ROWS, COLUMNS): a view, since each polynomial lies in one piece."""
    return x.reshape(*x.shape[:-1], ROWS, COLUMNS)


def residues(values: NDArray[Any], primes: int = len(PRIMES)) -> Residues:
    """Integers (..., N) below 2^52 in magnitude as polynomials (..., primes, N)."""
    exact = np.asarray(values, np.float64)
    return np.stack([reduce(exact.copy(), prime) for prime in PRIMES[:primes]], axis=-2)


def modulus(primes: int = len(PRIMES)) -> int:
    return int(np.prod(np.array(PRIMES[:primes], dtype=object)))


def from_integers(values: Sequence[int], primes: int) -> Residues:
    """Integers of any size as residues (primes, count)."""
    return np.stack([reduce(np.array([float(v % p) for v in values]), p) for p in PRIMES[:primes]])


def to_integers(values: Residues) -> list[int]:
    """The integers in [0, q) behind residues (primes, count), by the Chinese remainder theorem."""
    q = modulus(len(values))
    lifts = [q // p * pow(q // p, -1, p) for p in PRIMES[: len(values)]]
    columns = [[int(v) for v in row] for row in values]
    return [sum(lift * v for lift, v in zip(lifts, column, strict=True)) % q for column in zip(*columns, strict=True)]


def switch(values: Residues, primes: int) -> Residues:
    """Divide polynomials (..., primes, N), in coefficients, by the last primes, rounding, until `primes` remain.

    Each division is off by at most one half, so the sum of all is off by less than 0.51.
    """
    values = values.copy()
    while values.shape[-2] > primes:
        last, values = values[..., -1, :], values[..., :-1, :]
        for index in range(values.shape[-2]):
            p, dropped = PRIMES[index], PRIMES[values.shape[-2]]
            part = values[..., index, :] - last
            part *= float((pow(dropped, -1, p) + p // 2) % p - p // 2)
            values[..., index, :] = reduce(part, p)
    return values


def pack(values: Residues) -> Packed:
    """Canonical residues as three little-endian bytes each: (..., primes, count) -> (..., primes * count * 3)."""
    primes = np.array(PRIMES[: values.shape[-2]], np.float64)[:, np.newaxis]
    canonical = (values + primes * (values < 0)).astype("<u4")
    three = canonical.view(np.uint8).reshape(*values.shape, 4)[..., :PRIME_BYTES]
    return np.ascontiguousarray(three).reshape(*values.shape[:-2], -1)


def unpack(raw: Packed, primes: int) -> Residues:
    """The inverse of `pack`. Raises ValueError on a residue that is not below its prime."""
    three = raw.reshape(*raw.shape[:-1], primes, -1, PRIME_BYTES)
    values: Residues = three[..., 0] + 256.0 * three[..., 1] + 65536.0 * three[..., 2]
    strange = sum(int(np.count_nonzero(values[..., i, :] >= PRIMES[i])) for i in range(primes))
    if strange:
        raise ValueError(f"{strange} numbers are no residues of their prime")
    return reduce_all(values)


def uniform(seed: bytes) -> Residues:
    """A polynomial (primes, N) that anyone derives from a public seed: SHAKE-128 with rejection, as FIPS 203 does.

    Being uniform it may be taken for a transform as well as for coefficients.
    """
    out = np.empty((len(PRIMES), DEGREE))
    for index, prime in enumerate(PRIMES):
        length = DEGREE + DEGREE // 5
        while True:
            stream = hashlib.shake_128(seed + bytes([index])).digest(PRIME_BYTES * length)
            three = np.frombuffer(stream, np.uint8).reshape(-1, PRIME_BYTES).astype(np.int64)
            drawn = three[:, 0] | three[:, 1] << 8 | (three[:, 2] & 0x7F) << 16
            drawn = drawn[drawn < prime]
            if len(drawn) >= DEGREE:
                break
            length *= 2  # the longer stream begins with the shorter
        out[index] = drawn[:DEGREE]
    return reduce_all(out)


def ternary(entropy: Entropy = os.urandom) -> Residues:
    """N coefficients uniform in {-1, 0, 1}: bytes below 255, modulo 3."""
    out = np.empty(0, np.uint8)
    while len(out) < DEGREE:
        drawn = np.frombuffer(entropy(DEGREE + 256), np.uint8)
        out = np.append(out, drawn[drawn < 255])
    return np.asarray(out[:DEGREE] % 3 - 1.0, np.float64)


def noise(entropy: Entropy = os.urandom) -> Residues:
    """N coefficients of the centred binomial distribution: the difference of two counts of ones among 21 bits."""
    drawn = np.frombuffer(entropy(8 * DEGREE), "<u4").reshape(2, DEGREE) & ((1 << NOISE_BITS) - 1)
    ones: Residues = np.bitwise_count(drawn).astype(np.float64)
    return np.asarray(ones[0] - ones[1], np.float64)
