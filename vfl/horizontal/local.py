"""The one local solver: mini-batch gradient descent on a client's own rows, with what a strategy adds to the loss.

    F(w) = mean of loss(coef x + intercept, y) + penalty / 2 |coef|^2       the intercept is not penalised
    w    = coef (m, d) row by row, then the intercept (m,), as one vector   m = classes, or 1 for a single output

The exact method and the family share these losses; their derivatives are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, gammaln

from parties.errors import LocalError
from vfl.losses import Matrix, Vector

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Loss:
    """Per row: the loss, (n,), and its derivative by the scores, (n, m). y: 0/1, class numbers, values or counts."""

    value: Callable[[Matrix, Vector], Vector]
    derivative: Callable[[Matrix, Vector], Matrix]


def softmax(scores: Matrix) -> Matrix:
    """Class probabilities, (n, m)."""
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float64)


def _multinomial(scores: Matrix, y: Vector) -> Vector:
    top = scores.max(axis=1)
    chosen = scores[np.arange(len(y)), y.astype(np.intp)]
    return np.asarray(np.log(np.exp(scores - top[:, None]).sum(axis=1)) + top - chosen, np.float64)


def _multinomial_derivative(scores: Matrix, y: Vector) -> Matrix:
    residual = softmax(scores)
    residual[np.arange(len(y)), y.astype(np.intp)] -= 1
    return residual


def _expm(scores: Matrix) -> Matrix:
    with np.errstate(over="ignore"):  # a step too far: infinite, and refused for it
        return np.asarray(np.exp(scores), np.float64)


LOSSES = {
    "logistic": Loss(lambda s, y: np.logaddexp(0.0, s[:, 0]) - y * s[:, 0], lambda s, y: expit(s) - y[:, None]),
    "multinomial": Loss(_multinomial, _multinomial_derivative),
    "squared": Loss(lambda s, y: (s[:, 0] - y) ** 2 / 2, lambda s, y: s - y[:, None]),
    "poisson": Loss(lambda s, y: _expm(s[:, 0]) - y * s[:, 0] + gammaln(y + 1.0), lambda s, y: _expm(s) - y[:, None]),
}


@dataclass(frozen=True)
class Objective:
    """F above, for `features` columns d and `outputs` m. Raises LocalError for what does not fit together."""

    loss: str
    features: int
    outputs: int = 1
    penalty: float = 0.0
    intercept: bool = True

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise LocalError(f"unknown loss {self.loss!r}; known: {', '.join(LOSSES)}")
        if self.features < 1 or (self.outputs < 2) == (self.loss == "multinomial"):
            raise LocalError("a model has one column or more; multinomial has two outputs or more, the others have one")

    @property
    def size(self) -> int:
        return self.outputs * (self.features + self.intercept)

    @property
    def columns(self) -> NDArray[np.int64]:
        """(size,): the number of the column that a coordinate belongs to; -1 for an intercept."""
        return np.append(np.tile(np.arange(self.features), self.outputs), [-1] * (self.outputs * self.intercept))

    def coef(self, weights: Vector) -> Matrix:
        """The view (m, d) of the coefficients."""
        return weights[: self.outputs * self.features].reshape(self.outputs, self.features)

    def scores(self, weights: Vector, x: Matrix) -> Matrix:
        """(n, m) for x (n, d)."""
        scores = x @ self.coef(weights).T
        return scores + weights[-self.outputs :] if self.intercept else scores

    def value(self, weights: Vector, x: Matrix, y: Vector) -> float:
        """F over these rows."""
        losses = LOSSES[self.loss].value(self.scores(weights, x), y)
        return float(losses.mean() + self.penalty / 2 * (self.coef(weights) ** 2).sum())

    def gradient(self, weights: Vector, x: Matrix, y: Vector) -> Vector:
        """dF/dw, (size,)."""
        residual = LOSSES[self.loss].derivative(self.scores(weights, x), y)
        gradient = np.empty(self.size)
        self.coef(gradient)[...] = residual.T @ x
        if self.intercept:
            gradient[-self.outputs :] = residual.sum(axis=0)
        gradient /= len(y)
        if self.penalty:
            self.coef(gradient)[...] += self.penalty * self.coef(weights)
        return gradient


@dataclass(frozen=True)
class Plan:
    """Local work of one round: epochs, rows a batch (0: all), length of a step. Raises LocalError when impossible."""

    epochs: int = 1
    batch: int = 32
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 0 or not 0 < self.rate < np.inf:
            raise LocalError("local training needs 1 epoch or more, batch 0 (all rows) or more and a positive rate")


@dataclass(frozen=True, eq=False)
class Correction:
    """What a strategy makes of the loss: scale F(w) + linear . w + pull / 2 |w - anchor|^2.

    `linear`, `pull` and `anchor` are numbers, or vectors (size,). `free` (size,) says which coordinates may move.
    """

    scale: float = 1.0
    linear: Vector | float = 0.0
    pull: Vector | float = 0.0
    anchor: Vector | float = 0.0
    free: Mask | None = None

    @property
    def needed(self) -> bool:
        """Whether it changes anything."""
        return self.scale != 1 or bool(np.any(self.linear) or np.any(self.pull)) or self.free is not None

    def apply(self, gradient: Vector, weights: Vector) -> Vector:
        """The gradient of the corrected loss at `weights`."""
        corrected = self.scale * gradient + self.linear + self.pull * (weights - self.anchor)
        return corrected if self.free is None else np.where(self.free, corrected, 0.0)


@dataclass(frozen=True, eq=False)
class Trained:
    """What local training ends with: weights (size,), rows of the client, steps taken, sum of their lengths."""

    weights: Vector
    rows: int
    steps: int = 0
    length: float = 0.0


def train(
    objective: Objective,
    x: Matrix,
    y: Vector,
    weights: Vector,
    plan: Plan,
    correction: Correction,
    seed: Sequence[int],
) -> Trained:
    """Mini-batch gradient descent from `weights`, (size,), over x (n, d) and y (n,); without rows nothing moves.

    seed: any whole numbers, such as job, round and client; the same numbers give the same result.
    """
    generator = np.random.default_rng(seed)  # the order of our own rows, not a secret
    weights, rows, steps = weights.astype(np.float64), len(y), 0
    size, corrected = plan.batch or max(rows, 1), correction.needed
    for _ in range(plan.epochs if rows else 0):
        if size < rows:
            order = generator.permutation(rows)
            x, y = x[order], y[order]
        for start in range(0, rows, size):
            gradient = objective.gradient(weights, x[start : start + size], y[start : start + size])
            weights -= plan.rate * (correction.apply(gradient, weights) if corrected else gradient)
            steps += 1
    return Trained(weights, rows, steps, steps * plan.rate)
