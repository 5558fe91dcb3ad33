"""Noise on per-row gradients, for a label holder that sends them: two defences of Li et al. 2021 (ICLR 2022).

    marvell    the Gaussian noise that makes both classes' gradients most alike for its power (section 4.2, theorem 2)
    max_norm   every gradient gets the largest one's norm, on average, by noise along itself (section 4.1)

Both hide a label in *one* message. Whoever sees the same row in many epochs averages the noise away: `sum_kl_within`
therefore divides what may leak by the number of epochs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri

from parties.errors import LocalError
from vfl.losses import Matrix, Vector

Randomness = Callable[[int], bytes]
FLOOR = 1e-9  # relative: gradients without any spread of their own count as having so much
GRID, ZOOMS = 65, 3


@dataclass(frozen=True)
class Noise:
    """Variances of the noise of a class: along the difference of the class means, and across it; (negative, positive).

    `sum_kl` is KL(P1 || P0) + KL(P0 || P1) of the gradients with this noise, taken as isotropic Gaussians before it.
    """

    along: tuple[float, float]
    across: tuple[float, float]
    sum_kl: float


def sum_kl_within(leak_auc: float, epochs: int = 1) -> float:
    """The largest sum of both KL divergences at which no attack on single gradients has an AUC above `leak_auc`.

    AUC <= 1/2 + sqrt(s) / 2 - s / 8 (Li et al., theorem 1); s adds up over the epochs that send the same row.
    """
    if not 0.5 < leak_auc < 1 or epochs < 1:
        raise ValueError("leak_auc is between 0.5 and 1, epochs at least 1")
    root = 2 - np.sqrt(8 - 8 * leak_auc)
    return float(root**2) / epochs


def marvell(gradients: Matrix, y: Vector, sum_kl: float, randomness: Randomness = os.urandom) -> Matrix:
    """gradients (b, k) of a batch with as much optimal noise as brings the sum of KL divergences down to `sum_kl`.

    y (b,) in {0, 1}. Class means, variances and the share of positives are the batch's own. The bound holds as far as
    a class's gradients are isotropic Gaussians: measure what remains (`vfl.leakage.meter.gradient_leak`).

    Raises:
        LocalError: all rows of the batch have the same label: there is no other class to hide among.
        ValueError: `sum_kl` is not positive.
    """
    if not sum_kl > 0:
        raise ValueError("no noise makes two classes entirely alike: sum_kl must be positive")
    positive = y == 1
    if positive.all() or not positive.any():
        raise LocalError("a batch of rows with one and the same label: use larger batches")
    means = [gradients[rows].mean(axis=0) for rows in (~positive, positive)]
    u, v = (float(gradients[rows].var(axis=0).mean()) for rows in (~positive, positive))
    gap, size = means[1] - means[0], gradients.shape[1]
    squared, share = float(gap @ gap), float(positive.mean())
    if squared + u + v == 0:
        return gradients.copy()

    def noise(power: float) -> Noise:
        return optimal_noise(u, v, size, squared, share, power)

    low, high = 0.0, squared + u + v
    if noise(low).sum_kl <= sum_kl:
        return gradients.copy()
    while noise(high).sum_kl > sum_kl:
        low, high = high, 4 * high
    chosen = noise(brentq(lambda power: noise(power).sum_kl - sum_kl, low, high, rtol=1e-3))
    along, across = (np.sqrt(pair)[positive.astype(int)][:, None] for pair in (chosen.along, chosen.across))
    drawn = normal(gradients.shape, randomness)
    axis = gap / np.sqrt(squared) if squared else np.zeros(size)
    out: Matrix = gradients + across * drawn + (along - across) * np.outer(drawn @ axis, axis)
    return out


def optimal_noise(u: float, v: float, size: int, squared: float, share: float, power: float) -> Noise:
    """The noise of a given power that makes the classes' gradients most alike (Li et al., theorem 2).

    Negative gradients are N(m0, u I), positive ones N(m1, v I) in `size` dimensions, |m1 - m0|^2 = squared. Power is
    share tr(S1) + (1 - share) tr(S0) of the noise covariances S0, S1. With a, b the total variances along m1 - m0 and
    e, f those across it (of negatives, positives), minimise

        (size - 1) (e / f + f / e) + (a + squared) / b + (b + squared) / a,   a >= e >= u, b >= f >= v

    For u <= v more than v is never wanted across, so f = v and e lies in [u, v]: one search. Given e, all the power
    that is left goes along, and the ratio's stationary point in b is the root of a quadratic.
    """
    if u > v:
        swapped = optimal_noise(v, u, size, squared, 1 - share, power)
        return Noise(swapped.along[::-1], swapped.across[::-1], swapped.sum_kl)
    v = max(v, FLOOR * squared)
    u = max(u, FLOOR * v)
    total = power + size * ((1 - share) * u + share * v)

    def best_along(e: Vector) -> tuple[Vector, Vector]:
        alpha = (total - (size - 1) * ((1 - share) * e + share * v)) / (1 - share)  # a = alpha - beta b
        beta = share / (1 - share)
        n1, n0 = squared * (1 - beta) - 2 * alpha * beta, alpha**2 + squared * alpha
        root = np.sqrt((n0 * beta) ** 2 + ((beta**2 + 1) * alpha + n1 * beta) * n0 * alpha)
        b = np.clip(n0 * alpha / (n0 * beta + root), v, np.maximum((alpha - e) / beta, v))
        return alpha - beta * b, b

    low, high = u, min(v, u + power / (1 - share) / size)  # a >= e leaves no more
    for _ in range(ZOOMS):
        e = np.linspace(low, high, GRID)
        a, b = best_along(e)
        value = (size - 1) * (e / v + v / e) + (a + squared) / b + (b + squared) / a
        at = int(np.argmin(value))
        low, high = e[max(at - 1, 0)], e[min(at + 1, GRID - 1)]
    along = float(a[at]) - u, float(b[at]) - v
    return Noise(
        (max(along[0], 0.0), max(along[1], 0.0)), (float(e[at]) - u, 0.0), max(float(value[at]) / 2 - size, 0.0)
    )


def max_norm(gradients: Matrix, randomness: Randomness = os.urandom) -> Matrix:
    """gradients (b, k), each with Gaussian noise along itself that brings its mean square up to the batch's largest."""
    squares = np.einsum("ij,ij->i", gradients, gradients)
    spread = np.sqrt(squares.max(initial=0) / np.where(squares > 0, squares, 1) - 1, where=squares > 0, out=0 * squares)
    out: Matrix = gradients * (1 + spread * normal((len(gradients),), randomness))[:, None]
    return out


def normal(shape: tuple[int, ...], randomness: Randomness = os.urandom) -> Matrix:
    """Standard normal numbers from bytes that nobody can predict: the normal quantile of 52-bit uniform ones."""
    words = np.frombuffer(randomness(8 * int(np.prod(shape))), "<u8")
    out: Matrix = ndtri(((words >> np.uint64(12)) + 0.5) * 2.0**-52).reshape(shape)
    return out
