"""Generalised linear models over the columns of several parties.

Every party calls `fit` with its own columns of the aligned rows, in the same order; the label holder alone gives y (and
sample weights). The result is the model that scikit-learn finds on the joined table: exact link, exact gradient up to
fixed point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import d2_tweedie_score, r2_score

from parties.session import Session
from vfl.estimator import VerticalLinearModel
from vfl.inner import Problem
from vfl.inputs import class_labels, numeric_targets
from vfl.losses import Logistic, Loss, Matrix, Multinomial, Poisson, Squared, Vector


class VerticalLogisticRegression(ClassifierMixin, VerticalLinearModel):  # type: ignore[misc]
    """Logistic regression, binary or (m = classes) multinomial: scikit-learn's `LogisticRegression(C=C)` on the joined
    table. C: inverse of the penalty, as in scikit-learn. See `VerticalLinearModel` for the rest."""

    _strength = "C"

    def __init__(
        self,
        C: float = 1.0,
        *,
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        solver: str = "subspace",
        tol: float = 1e-6,
        max_iter: int = 100,
        epochs: int = 5,
        learning_rate: float = 0.1,
        batch_size: int = 256,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        random_state: int = 0,
    ) -> None:
        self.C = C
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.random_state = random_state

    def _target(self, y: Any, rows: int) -> tuple[Loss, Matrix]:
        self.classes_, coded = class_labels(y, rows)
        if len(self.classes_) == 2:
            return Logistic(), coded[:, np.newaxis].astype(np.float64)
        return Multinomial(), np.eye(len(self.classes_))[coded]

    def _penalty(self, rows: int) -> float:
        return 1 / (self.C * rows)

    def predict_proba(self, X: pd.DataFrame | Matrix, *, session: Session) -> Matrix | None:
        """(n, classes) at the label holder, None at a feature holder. Reveals what `decision_function` does."""
        scores = self.decision_function(X, session=session)
        if scores is None:
            return None
        if scores.ndim == 1:
            positive = 1 / (1 + np.exp(-np.clip(scores, -700, 700)))
            return np.column_stack([1 - positive, positive])
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))

    def predict(self, X: pd.DataFrame | Matrix, *, session: Session) -> Any:
        """The class per row at the label holder, None at a feature holder. Reveals what `decision_function` does."""
        scores = self.decision_function(X, session=session)
        if scores is None:
            return None
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]

    def score(self, X: pd.DataFrame | Matrix, y: Any = None, *, session: Session) -> float | None:
        """Mean accuracy at the label holder, None at a feature holder. Reveals what `decision_function` does."""
        predicted = self.predict(X, session=session)
        return None if predicted is None else float(np.mean(predicted == np.asarray(y)))


class VerticalRidge(RegressorMixin, VerticalLinearModel):  # type: ignore[misc]
    """Linear regression with penalty: scikit-learn's `Ridge(alpha)` on the joined table, and with l1_ratio > 0 its
    `ElasticNet(alpha / n, l1_ratio)`. Residuals in units of y must stay within the agreement's residual_range."""

    _strength = "alpha"

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        solver: str = "subspace",
        tol: float = 1e-6,
        max_iter: int = 100,
        epochs: int = 5,
        learning_rate: float = 0.01,
        batch_size: int = 256,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        random_state: int = 0,
    ) -> None:
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.random_state = random_state

    def _target(self, y: Any, rows: int) -> tuple[Loss, Matrix]:
        return Squared(), numeric_targets(y, rows)[:, np.newaxis]

    def _penalty(self, rows: int) -> float:
        return self.alpha / rows

    def predict(self, X: pd.DataFrame | Matrix, *, session: Session) -> Vector | None:
        """(n,) at the label holder, None at a feature holder. Reveals what `decision_function` does."""
        return self.decision_function(X, session=session)

    def score(self, X: pd.DataFrame | Matrix, y: Any = None, *, session: Session) -> float | None:
        """R2 at the label holder, None at a feature holder. Reveals what `decision_function` does."""
        predicted = self.predict(X, session=session)
        return None if predicted is None else float(r2_score(y, predicted))


class VerticalLinearRegression(VerticalRidge):
    """Linear regression without penalty: scikit-learn's `LinearRegression` on the joined table."""

    def __init__(
        self,
        *,
        fit_intercept: bool = True,
        solver: str = "subspace",
        tol: float = 1e-6,
        max_iter: int = 100,
        epochs: int = 5,
        learning_rate: float = 0.01,
        batch_size: int = 256,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        random_state: int = 0,
    ) -> None:
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.random_state = random_state

    alpha = l1_ratio = 0.0


class VerticalPoissonRegressor(VerticalRidge):
    """Poisson regression with the log link: scikit-learn's `PoissonRegressor(alpha)` on the joined table. Residuals, in
    units of y, must stay within the agreement's residual_range."""

    def _target(self, y: Any, rows: int) -> tuple[Loss, Matrix]:
        return Poisson(), numeric_targets(y, rows, least=0.0)[:, np.newaxis]

    def _problem(self, loss: Loss, targets: Matrix, weights: Vector) -> Problem:
        return super()._problem(loss, targets, weights / weights.mean())

    def _penalty(self, rows: int) -> float:
        return self.alpha

    def predict(self, X: pd.DataFrame | Matrix, *, session: Session) -> Vector | None:
        """Expected counts (n,) at the label holder, None at a feature holder. Reveals what `decision_function` does."""
        scores = self.decision_function(X, session=session)
        return None if scores is None else np.exp(scores)

    def score(self, X: pd.DataFrame | Matrix, y: Any = None, *, session: Session) -> float | None:
        """D2, the share of deviance explained, at the label holder. Reveals what `decision_function` does."""
        predicted = self.predict(X, session=session)
        return None if predicted is None else float(d2_tweedie_score(y, predicted, power=1))
