"""Differential privacy: clip what one client or one example contributes, put it on the integer grid, add noise to it.

Contributions and noise are integers, multiples of 2^-fraction_bits: no low bit of a float betrays what the noise hides
(Mironov 2012), and sums are exact in any order. Neighbours differ in one contribution: there, or replaced by zeros.
Divide a sum by a number that is public, never by the count of contributions.

Who adds the noise decides whom to trust, and `contributors`:
- central, 1: the coordinator adds it once, to a sum that it has seen.
- local, 1: every client adds all of it to what it sends.
- distributed, the quorum of secure aggregation: every client adds its share, and nobody sees a sum of fewer (Kairouz,
  Liu and Steinke 2021). A client knows its own share: where c clients may conspire with who sees the sum, quorum - c.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from vfl.encryption.fixedpoint import quantise
from vfl.horizontal.accounting import ROUNDED, SMOOTHING, Cost, sum_drift

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Entropy = Callable[[int], bytes]  # so many bytes: os.urandom, or a replay in tests

BITS = 52  # of a clipped contribution: float64 holds it exactly
LARGEST_SCALE = 1 << 40  # of the noise, in grid steps
INSIDE = 1 - 2.0**-30  # a norm of 2^20 numbers is wrong by less: the clip holds in real numbers, too
ELEMENTS = 1 << 20  # of a chunk of examples


def clip(vectors: Array, bound: float) -> Array:
    """Shrink each vector (the last axis) to an L2 norm of at most `bound`; shorter ones stay as they are."""
    factors = _factors(np.asarray(np.linalg.norm(vectors, axis=-1)), bound)
    with np.errstate(invalid="ignore"):  # 0 * inf is NaN, which nothing further on accepts
        return vectors * factors[..., None]


def _factors(norms: Array, bound: float) -> Array:
    return np.asarray(bound * INSIDE / np.maximum(norms, bound * INSIDE))


@dataclass(frozen=True)
class GaussianMechanism:
    """The noise of one release.

    Args:
        bound: the L2 norm to which each contribution is clipped.
        multiplier: sigma / sensitivity, from `accounting.noise_multiplier`.
        parameters: numbers in a contribution.
        fraction_bits: of the grid, whose step is 2^-fraction_bits.
        contributors: how many noises a released sum has at least.
    Raises:
        LocalError: the grid is too coarse or too fine for this noise.
    """

    bound: float
    multiplier: float
    parameters: int
    fraction_bits: int
    contributors: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.bound < 2.0**BITS and 0 < self.multiplier < LARGEST_SCALE and 0 <= self.fraction_bits <= BITS):
            raise LocalError(
                "clipping bound and noise multiplier are positive, below 2^52 and 2^40, with at most 52 fraction bits; "
                "change the agreement"
            )
        if self.parameters < 1 or self.contributors < 1:
            raise LocalError("noise needs parameters and somebody who adds it; change the agreement")
        if self.variance < SMOOTHING:
            raise LocalError(f"the noise is finer than the grid at {self.fraction_bits} fraction bits; agree on more")
        if self.sensitivity >= 2.0**BITS or math.isqrt(self.variance) >= LARGEST_SCALE:
            raise LocalError(f"the noise is too large for {self.fraction_bits} fraction bits; agree on fewer")

    @property
    def sensitivity(self) -> float:
        """In grid steps: rounding to the grid moves a contribution by up to half a step per parameter."""
        return math.ldexp(self.bound, self.fraction_bits) + math.sqrt(self.parameters) / 2

    @property
    def variance(self) -> int:
        """Of the noise that each contributor adds, in grid steps squared."""
        return math.ceil(((self.multiplier * self.sensitivity) ** 2 + SMOOTHING) / self.contributors)

    @property
    def cost(self) -> Cost:
        """Of one release. More noises than `contributors` are further processing, which costs nothing."""
        drift = sum_drift(self.variance, self.contributors) + ROUNDED
        hidden = self.contributors * self.variance - SMOOTHING
        return Cost(mu_squared=self.sensitivity**2 / hidden, drift=self.parameters * drift)

    @property
    def largest(self) -> int:
        """What no coordinate of a noised contribution exceeds, but with a chance of 1e-31: for the sum's headroom."""
        return math.ceil(self.sensitivity + 12 * math.sqrt(self.variance))

    def contribution(self, update: Array) -> Ints:
        """A client's update (parameters,) clipped, on the grid. Raises LocalError when it is not finite."""
        if update.shape != (self.parameters,):
            raise ValueError("not an update of this model")
        return quantise(clip(update, self.bound), self.fraction_bits, bound_bits=BITS, what="the update")

    def sum_examples(self, x: Array, residuals: Array) -> Ints:
        """The sum over examples of each one's gradient, clipped and on the grid: (d,), or (d, m) for m outputs.

        x (n, d), with a column of ones for an intercept; residuals (n,) or (n, m): dL/dscores of any linear model. An
        example's gradient is the outer product of its two rows, and so is its norm the product of theirs. Rounding
        comes before the sum, so an example changes the sum by its own contribution and nothing else.

        Raises LocalError: a gradient is not finite, or there are too many examples for this grid.
        """
        outputs = math.prod(residuals.shape[1:])
        if x.shape[1] * outputs != self.parameters or len(x) != len(residuals):
            raise ValueError("not the gradients of this model")
        if len(x) * self.sensitivity >= 2.0**62:
            raise LocalError(f"{len(x)} examples overflow a grid of {self.fraction_bits} fraction bits; agree on fewer")
        out = np.zeros((x.shape[1], outputs), np.int64)
        rows = max(ELEMENTS // self.parameters, 1)
        for start in range(0, len(x), rows):
            left, right = x[start : start + rows], residuals[start : start + rows].reshape(-1, outputs)
            with np.errstate(invalid="ignore"):
                factors = _factors(np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1), self.bound)
                each = left[:, :, None] * (right * factors[:, None])[:, None, :]
            out += quantise(each, self.fraction_bits, bound_bits=BITS, what="the gradients").sum(axis=0)
        return out.reshape(x.shape[1], *residuals.shape[1:])

    def add_noise(self, ints: Ints, entropy: Entropy = os.urandom) -> Ints:
        """The same numbers, on the grid, with one contributor's noise."""
        return ints + discrete_gaussian(self.variance, ints.size, entropy).reshape(ints.shape)


def discrete_gaussian(variance: int, size: int, entropy: Entropy = os.urandom) -> Ints:
    """Independent integers k with probability proportional to exp(-k^2 / (2 variance)), shape (size,).

    Algorithm 3 of Canonne, Kamath and Steinke 2020, many at a time. Exact, given uniform bytes: each chance is taken by
    comparing it with a uniform real, of which as many bits are drawn as decide that. Float64 decides when the two are
    more than 2^-40 apart, its error being below 2^-45, and otherwise decimals of growing precision. How long it takes
    depends on the numbers drawn, as in any rejection.
    """
    if not 1 <= variance < LARGEST_SCALE**2:
        raise ValueError("a variance from 1 to below 2^80")
    scale = math.isqrt(variance) + 1
    out = np.empty(0, np.int64)
    while len(out) < size:
        drawn = _discrete_laplace(scale, 2 * (size - len(out)) + 16, entropy)
        excess = (np.abs(drawn) - variance / scale) / math.sqrt(variance)

        def exactly(i: int, drawn: Ints = drawn) -> Fraction:
            return Fraction((abs(int(drawn[i])) * scale - variance) ** 2, 2 * variance * scale**2)

        out = np.append(out, drawn[_chances(excess**2 / 2, exactly, entropy)])
    return out[:size]


def _discrete_laplace(scale: int, tries: int, entropy: Entropy) -> Ints:
    """Some integers k, fewer than `tries`, with probability proportional to exp(-|k| / scale): their Algorithm 2."""
    fine = _below(scale, tries, entropy)
    fine = fine[_chances(fine / scale, lambda i: Fraction(int(fine[i]), scale), entropy)]
    coarse = np.zeros(len(fine), np.int64)
    going = np.arange(len(fine))
    while len(going):
        going = going[_chances(np.ones(len(going)), lambda i: Fraction(1), entropy)]
        coarse[going] += 1
    negative = np.frombuffer(entropy(len(fine)), np.uint8) & 1 == 1
    magnitude = fine + scale * coarse
    magnitude[negative] *= -1
    out: Ints = magnitude[~negative | (magnitude != 0)]  # zero has one sign
    return out


def _below(bound: int, size: int, entropy: Entropy) -> Ints:
    """Integers uniform in [0, bound)."""
    out = np.empty(0, np.int64)
    while len(out) < size:
        drawn = np.frombuffer(entropy(16 * (size - len(out))), "<i8") & ((1 << bound.bit_length()) - 1)
        out = np.append(out, drawn[drawn < bound])
    return out[:size]


def _chances(exponents: Array, exactly: Callable[[int], Fraction], entropy: Entropy) -> NDArray[np.bool_]:
    """Each true with probability exp(-exponent), where `exactly(i)` is the exponent and `exponents[i]` is near it."""
    bits = np.frombuffer(entropy(8 * len(exponents)), "<u8") >> 11
    distance = np.ldexp(bits.astype(np.float64), -53) - np.exp(-exponents)
    out = distance < 0
    for i in np.flatnonzero(np.abs(distance) < 2.0**-40):
        out[i] = _is_below(int(bits[i]), 53, exactly(int(i)), entropy)
    return out


def _is_below(bits: int, drawn: int, exponent: Fraction, entropy: Entropy) -> bool:
    """Whether the uniform real that begins with these bits after the point is below exp(-exponent)."""
    while True:
        with localcontext(prec=drawn // 3 + 30) as context:  # 2^-drawn and 20 digits more
            chance = (Decimal(-exponent.numerator) / exponent.denominator).exp(context) * (1 << drawn)
            if bits + 1 < chance - Decimal("1e-9"):
                return True
            if bits > chance + Decimal("1e-9"):
                return False
        bits, drawn = bits << 64 | int.from_bytes(entropy(8), "little"), drawn + 64
