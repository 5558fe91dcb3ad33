"""What the label holder can do by itself: fit scikit-learn's own estimator to its columns and all embeddings so far.

F(w) = (1 / n) sum_i v_i loss_i + penalty / 2 |w|^2, the intercept not penalised
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge

from vfl.leakage.defences import normal
from vfl.losses import Logistic, Loss, Matrix, Multinomial, Poisson, Squared, Vector

TOLERANCE = 1e-10  # far below any outer one
ITERATIONS = 1000
FEW_SCORES = 10


@dataclass(frozen=True)
class Problem:
    """Targets y (n, m), row weights (n,) and the penalty of F, as the label holder knows them."""

    loss: Loss
    y: Matrix
    weights: Vector
    penalty: float
    fit_intercept: bool

    def rows(self, rows: NDArray[np.int64]) -> Problem:
        """The same over some rows."""
        return replace(self, y=self.y[rows], weights=self.weights[rows])

    @property
    def scale(self) -> float:
        """What a gradient is measured against: the rows' mean weight, times the spread of unbounded targets."""
        spread = 1.0 if self.loss.bounded else max(float(np.std(self.y)), np.finfo(float).tiny)
        return spread * float(self.weights.mean())

    def value(self, scores: Matrix, weights: Matrix) -> float:
        """F, at scores (n, m) of weights (d, m)."""
        return self.mean(scores) + self.penalty / 2 * float((weights**2).sum())

    def mean(self, scores: Matrix) -> float:
        """F without its penalty."""
        return float(self.weights @ self.loss.values(scores, self.y)) / len(self.y)

    def first_residual(self, scores: Matrix, largest: float) -> tuple[Matrix, bool]:
        """`residual`, but of blurred scores where these take few values (no columns, or binary ones): a residual of few
        values makes it easier to take labels from a gradient. Whether it is blurred."""
        if len(np.unique(np.round(scores, 6), axis=0)) >= FEW_SCORES:
            return self.residual(scores), False
        spread = float(np.std(self.y)) if isinstance(self.loss, Squared) else 1.0
        return np.clip(self.residual(scores + spread * normal(scores.shape)), -largest, largest), True

    def residual(self, scores: Matrix) -> Matrix:
        """R (n, m): n times the gradient of F's first part with respect to the scores."""
        return self.weights[:, np.newaxis] * self.loss.derivative(scores, self.y)


class Inner:
    """Minimises F over the weights of given columns, from where it stopped before."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._empty = problem, True
        n, common = len(problem.y), {"fit_intercept": problem.fit_intercept}
        exact = {"solver": "newton-cholesky", "tol": TOLERANCE, "max_iter": ITERATIONS, "warm_start": True}
        if isinstance(problem.loss, Logistic | Multinomial):
            self.estimator: Any = LogisticRegression(C=1 / (problem.penalty * n), **exact, **common)
            self._target = problem.y[:, 0] if isinstance(problem.loss, Logistic) else problem.y.argmax(axis=1)
        elif isinstance(problem.loss, Squared):
            self.estimator = Ridge(alpha=problem.penalty * n, solver="cholesky", **common)
            self._target = problem.y[:, 0]
        elif isinstance(problem.loss, Poisson):
            alpha = problem.penalty / float(problem.weights.mean())
            self.estimator = PoissonRegressor(alpha=alpha, **exact, **common)
            self._target = problem.y[:, 0]
        else:
            raise TypeError(f"no estimator for {problem.loss!r}")

    def fit(self, x: Matrix) -> tuple[Matrix, Vector]:
        """Weights (p, m) and intercepts (m,) for columns x (n, p): those of the last call, then new ones.

        p may be 0.
        """
        some = x if x.shape[1] else np.zeros((len(x), 1))  # scikit-learn wants a column
        if not self._empty and not isinstance(self._problem.loss, Squared):
            self._widen(some.shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a minimum that is not exact shows in the gradient's norm, which decides
            self.estimator.fit(some, self._target, sample_weight=self._problem.weights)
        self._empty = False
        coef = np.atleast_2d(self.estimator.coef_).T
        return coef[: x.shape[1]], np.full(coef.shape[1], self.estimator.intercept_, np.float64)

    def _widen(self, columns: int) -> None:
        """Start new columns at zero."""
        coef = np.atleast_2d(self.estimator.coef_)
        wide = np.zeros((len(coef), columns))
        wide[:, : coef.shape[1]] = coef[:, :columns]
        self.estimator.coef_ = wide if isinstance(self.estimator, LogisticRegression) else wide[0]

    @property
    def state(self) -> dict[str, Matrix]:
        """Where the next fit starts."""
        coef, intercept = np.asarray(self.estimator.coef_), np.atleast_1d(self.estimator.intercept_)
        return {"inner.coef": coef, "inner.intercept": intercept.astype(np.float64)}

    def resume(self, state: Mapping[str, Matrix]) -> None:
        """Go on where one stood that had this state."""
        coef, intercept = state["inner.coef"], state["inner.intercept"]
        several = isinstance(self.estimator, LogisticRegression)
        self.estimator.coef_, self.estimator.intercept_ = coef, intercept if several else float(intercept[0])
        self._empty = False

    def snapshot(self) -> Any:
        """The fitted estimator as it is now."""
        return copy.deepcopy(self.estimator)
