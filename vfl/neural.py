"""Multilayer perceptrons over the columns of several parties, with scikit-learn's contract at each of them.

Every party calls `fit` with its own columns of the aligned rows, in the same order; the label holder alone gives y.
With linear bottoms the result is the perceptron that PyTorch trains on the joined table from the same weights: exact
loss, exact gradient up to fixed point. Feature holders with linear bottoms need no torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import r2_score

from parties.errors import LocalError
from parties.session import Session
from vfl.inputs import class_labels, numeric_targets
from vfl.losses import Matrix
from vfl.neural_estimator import VerticalMLP


class VerticalMLPClassifier(ClassifierMixin, VerticalMLP):  # type: ignore[misc]
    """Two or more classes: one output each, cross entropy of their softmax. Parameters: see `VerticalMLP`."""

    def predict_proba(self, X: Any = None, *, session: Session) -> Matrix | None:
        """(n, classes) at the label holder, None at a feature holder; every party calls it with its columns of the rows
        (a label holder without columns: an array (n, 0)).

        Reveals:
            To the label holder: per row, the sum over the feature holders of their embeddings; with one, or side by
            side, each one's. To a feature holder: nothing but the number of rows.
        """
        outputs = self._outputs(X, session)
        return None if outputs is None else np.asarray(softmax(outputs, axis=1), np.float64)

    def predict(self, X: Any = None, *, session: Session) -> Any:
        """The class per row at the label holder, None at a feature holder. Reveals what `predict_proba` does."""
        outputs = self._outputs(X, session)
        return None if outputs is None else self.classes_[outputs.argmax(axis=1)]

    def score(self, X: Any = None, y: Any = None, *, session: Session) -> float | None:
        """Mean accuracy at the label holder, None at a feature holder. Reveals what `predict_proba` does."""
        predicted = self.predict(X, session=session)
        return None if predicted is None else float(np.mean(predicted == np.asarray(y)))

    def _target(self, y: Any, rows: int) -> tuple[NDArray[Any], int]:
        self.classes_, coded = class_labels(y, rows)
        return coded, len(self.classes_)

    def _hidden(self, target: NDArray[Any]) -> Matrix:
        if len(self.classes_) == 2:
            return np.asarray(target[:, None], np.float64)
        if self.mode == "open" and self.defence == "marvell":
            raise LocalError("marvell hides one of two classes; use defence = 'max_norm', or the encrypted mode")
        return np.asarray(np.eye(len(self.classes_))[target])


class VerticalMLPRegressor(RegressorMixin, VerticalMLP):  # type: ignore[misc]
    """One output, half the squared error, as scikit-learn's MLPRegressor. Residuals grow with the target's units:
    standardise it, or agree on a larger residual_range. In open mode the guard hides which targets are above the
    median, no more. Parameters: see `VerticalMLP`."""

    def predict(self, X: Any = None, *, session: Session) -> Any:
        """The value per row at the label holder, None at a feature holder (as for the classifier's `predict_proba`).

        Reveals:
            To the label holder: per row, the sum over the feature holders of their embeddings; with one, or side by
            side, each one's. To a feature holder: nothing but the number of rows.
        """
        outputs = self._outputs(X, session)
        return None if outputs is None else np.asarray(outputs[:, 0])

    def score(self, X: Any = None, y: Any = None, *, session: Session) -> float | None:
        """R^2 at the label holder, None at a feature holder. Reveals what `predict` does."""
        predicted = self.predict(X, session=session)
        return None if predicted is None else float(r2_score(y, predicted))

    def _target(self, y: Any, rows: int) -> tuple[NDArray[Any], int]:
        return numeric_targets(y, rows), 1

    def _hidden(self, target: NDArray[Any]) -> Matrix:
        return np.asarray(target > np.median(target), np.float64)[:, None]
