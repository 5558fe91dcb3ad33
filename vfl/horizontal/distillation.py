"""Distillation on a public table: clients of different model types exchange predictions, never weights.

FedMD (Li and Wang 2019, algorithm 1), the consensus learnt as soft labels (Hinton, Vinyals and Dean 2015), by a student
at the server too (as in FedDF: Lin et al., NeurIPS 2020). What travels is one matrix a client, (rows, classes) of the
public table, and its mean over the clients is the consensus: the strategy's "weights" are predictions. So what the
other strategies have, this one has too: secure sums, robust rules, late clients, checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from parties.horizontal import Public
from vfl.horizontal.local import Correction, Plan, Trained
from vfl.horizontal.models import Score, chances, score
from vfl.losses import Matrix, Vector

SMALLEST = 1e-6  # a soft label below this is none: it is within the noise of a secure sum's fixed point


@dataclass(frozen=True, eq=False)
class PublicTable:
    """The rows that all parties have: x (n, d) float64, the columns' names (d,)."""

    x: Matrix
    names: tuple[str, ...]

    @cached_property
    def agreed(self) -> Public:
        """What the agreement says of this table. The digest is of its values, whatever file they lie in."""
        head = msgspec.json.encode([self.names, self.x.shape])
        values = np.ascontiguousarray(self.x, "<f8").tobytes()
        return Public(rows=len(self.x), digest=hashlib.sha256(b"colonnade/public/1" + head + values).hexdigest())

    def require(self, agreed: Public) -> None:
        """Raises LocalError: another table than the agreed one, with the difference."""
        if (agreed.rows, agreed.digest) != (self.agreed.rows, self.agreed.digest):
            raise LocalError(
                f"our public table has {len(self.x)} rows and the digest {self.agreed.digest}, the agreement's "
                f"{agreed.rows} and {agreed.digest}; copy the agreed table"
            )


class Distilled:
    """A client's own scikit-learn classifier or regressor, of any type, taught by all clients' mean predictions.

    It is fitted from scratch on our rows, x (n, d) and y (n,), and on the public rows with the consensus: a classifier
    on every public row once a class, weighed by the class's chance; a regressor on the consensus as targets. `weight`
    is of a public row against one of ours. Its "weights" are the consensus, (rows * classes,) row by row, or (rows,);
    all zeros mean that nobody has predicted yet. test: rows to score it on, else our own. Without rows it is a student
    of the others, and its predictions do not count.

    Raises:
        LocalError: the estimator cannot take soft labels, or has no chances; columns or labels that do not fit.
    """

    corrects: ClassVar[bool] = False

    def __init__(
        self,
        estimator: Any,
        x: Matrix,
        y: NDArray[Any],
        public: PublicTable,
        classes: Sequence[Any] = (),
        weight: float = 1.0,
        test: tuple[Matrix, NDArray[Any]] | None = None,
    ) -> None:
        if not (hasattr(estimator, "fit") and hasattr(estimator, "predict")):
            raise LocalError(f"a distillation takes scikit-learn's estimators, and {type(estimator).__name__} is none")
        self.public, self.rows = public, len(y)
        self._given, self._x, self._y, self._weight = estimator, x, y, weight
        self._classes = np.sort(np.asarray(classes))
        self._test = (x, y) if test is None else test
        self._consensus, self._fitted = np.zeros(len(public.x) * max(len(self._classes), 1)), None
        self._takes, name = _weight_name(estimator), type(estimator).__name__
        if len(self._classes) and not (self._takes and hasattr(estimator, "predict_proba")):
            raise LocalError(f"{name} lacks predict_proba or sample_weight in fit, so it has no soft labels")
        if weight != 1 and not self._takes:
            raise LocalError(
                f"{name} takes no sample_weight, so public rows weigh as much as ours: agree on weight = 1"
            )
        if x.shape[1:] != public.x.shape[1:]:
            raise LocalError(f"our rows have {x.shape[1]} columns, those of the public table {public.x.shape[1]}")
        if len(self._classes) and not np.isin(y, self._classes).all():
            raise LocalError(f"{np.count_nonzero(~np.isin(y, self._classes))} labels are none of the agreed classes")

    def get(self) -> Vector:
        return self._consensus

    def set(self, weights: Vector) -> None:
        if (weights != self._consensus).any():
            self._consensus, self._fitted = weights.copy(), None

    def fit_local(self, plan: Plan, correction: Correction, seed: Sequence[int]) -> Trained:
        """Predictions for the public table of our model, taught by the present consensus."""
        if correction.needed:
            raise LocalError("a distillation has no steps that a strategy could correct")
        if not self.rows:
            return Trained(self._consensus, 0)
        x = self.public.x
        predicted = chances(self.estimator, x, self._classes) if len(self._classes) else self.estimator.predict(x)
        return Trained(np.asarray(predicted, np.float64).ravel(), self.rows)

    def evaluate(self) -> Score:
        if not self.rows or not len(self._test[1]):
            return Score(0)
        return score(self.estimator, *self._test, self._classes)

    @property
    def estimator(self) -> Any:
        """Fitted with the present consensus. Raises LocalError without rows and without a consensus."""
        if self._fitted is None:
            self._fitted = self._fit()
        return self._fitted

    def _fit(self) -> Any:
        from sklearn.base import clone
        from sklearn.dummy import DummyClassifier

        x, y = self._x, self._y
        weights: dict[str, Vector] = {}
        if self._consensus.any():
            x, y, weights = self._taught()
        elif not self.rows:
            raise LocalError("a student without rows needs the others' predictions")
        if len(self._classes) and len(np.unique(y)) < 2:  # of one class there is nothing to learn
            return DummyClassifier().fit(x, y)
        return clone(self._given).fit(x, y, **weights)

    def _taught(self) -> tuple[Matrix, NDArray[Any], dict[str, Vector]]:
        """Our rows, then the public ones with the consensus, and what all weigh where the estimator takes that."""
        if len(self._classes):
            soft, each = np.clip(self._consensus, 0, 1), len(self._classes)
            targets = np.tile(self._classes, len(self.public.x))
        else:
            soft, each, targets = np.ones(len(self._consensus)), 1, self._consensus
        taken = np.append(np.ones(self.rows, np.bool_), soft > SMALLEST)
        x = np.vstack([self._x, np.repeat(self.public.x, each, axis=0)])[taken]
        weight = np.append(np.ones(self.rows), self._weight * soft)[taken]
        return x, np.concatenate([self._y, targets])[taken], {self._takes: weight} if self._takes else {}


def _weight_name(estimator: Any) -> str:
    """What `fit` calls the weights of rows, in a pipeline of its last step; empty where it takes none."""
    from sklearn.utils.validation import has_fit_parameter

    steps = getattr(estimator, "steps", None)
    prefix, last = (f"{steps[-1][0]}__", steps[-1][1]) if steps else ("", estimator)
    return f"{prefix}sample_weight" if has_fit_parameter(last, "sample_weight") else ""
