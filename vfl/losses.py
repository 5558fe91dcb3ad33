"""Losses and their exact derivatives: never a Taylor sigmoid. Scores are (n, m), m = 1 but for several classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logsumexp, softmax, xlogy

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


class Loss(Protocol):
    """A convex loss of scores, row by row; `bounded`: |dL/ds| is at most 1."""

    @property
    def bounded(self) -> bool: ...

    def values(self, scores: Matrix, y: Matrix) -> Vector:
        """(n,), of scores (n, m) and targets (n, m)."""

    def derivative(self, scores: Matrix, y: Matrix) -> Matrix:
        """dL/ds, (n, m)."""


@dataclass(frozen=True)
class Logistic:
    """log(1 + exp(s)) - y s for y in {0, 1}: scikit-learn's half binomial loss with the logit link."""

    bounded: bool = True

    def values(self, scores: Matrix, y: Matrix) -> Vector:
        return np.asarray((np.logaddexp(0.0, scores) - y * scores)[:, 0])

    def derivative(self, scores: Matrix, y: Matrix) -> Matrix:
        out: Any = expit(scores) - y
        return np.asarray(out, np.float64)


@dataclass(frozen=True)
class Multinomial:
    """log sum_l exp(s_l) - sum_l y_l s_l for one-hot y: scikit-learn's half multinomial loss."""

    bounded: bool = True

    def values(self, scores: Matrix, y: Matrix) -> Vector:
        return np.asarray(logsumexp(scores, axis=1) - (y * scores).sum(axis=1))

    def derivative(self, scores: Matrix, y: Matrix) -> Matrix:
        return np.asarray(softmax(scores, axis=1) - y)


@dataclass(frozen=True)
class Squared:
    """(s - y)^2 / 2."""

    bounded: bool = False

    def values(self, scores: Matrix, y: Matrix) -> Vector:
        return np.asarray((scores - y)[:, 0] ** 2 / 2)

    def derivative(self, scores: Matrix, y: Matrix) -> Matrix:
        return np.asarray(scores - y)


@dataclass(frozen=True)
class Poisson:
    """exp(s) - y s, less its least value y - y log y: half of scikit-learn's Poisson deviance with the log link."""

    bounded: bool = False

    def values(self, scores: Matrix, y: Matrix) -> Vector:
        return np.asarray((np.exp(scores) - y * scores + xlogy(y, y) - y)[:, 0])

    def derivative(self, scores: Matrix, y: Matrix) -> Matrix:
        return np.asarray(np.exp(scores) - y)
