"""Losses and their exact derivatives: never a Taylor sigmoid."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


class Logistic:
    """log(1 + exp(s)) - y s for y in {0, 1}: scikit-learn's half binomial loss with the logit link.

    `residual_bound` limits |dL/ds|: expit(s) - y lies in (-1, 1).
    """

    residual_bound = 1.0

    @staticmethod
    def value(scores: Vector, y: Vector) -> float:
        """Mean over the rows."""
        return float(np.mean(np.logaddexp(0.0, scores) - y * scores))

    @staticmethod
    def derivative(scores: Vector, y: Vector) -> Vector:
        """dL/ds row by row."""
        out: Any = expit(scores) - y
        return np.asarray(out, np.float64)
