"""What the generalised linear models share: scikit-learn's contract over the columns of several parties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from parties.agreement import Agreement
from parties.errors import LocalError
from parties.session import Session
from vfl import proximal, sgd, subspace
from vfl.encryption.paillier import SecretKey
from vfl.exchange import accept_key, offer_key
from vfl.inner import Inner, Problem
from vfl.inputs import matrix, row_weights
from vfl.losses import Loss, Matrix, Vector
from vfl.meter import Meter
from vfl.preparation import FittedColumns
from vfl.resume import ANEW, Checkpoints, Start
from vfl.secure_sum import Contribution, sum_embeddings
from vfl.share import ModelShare
from vfl.solver import Result, Schedule
from vfl.split import Merge
from vfl.training import Setup, agree, prepare, say_why, schedule

SOLVERS = ("subspace", "sgd", "proximal")


class VerticalLinearModel(BaseEstimator):  # type: ignore[misc]
    """Base of the estimators in `vfl.linear`.

    Parameters of all:
        fit_intercept: the intercept belongs to the label holder and is not penalised.
        solver: "subspace" (full batch, to the optimum in the fewest exchanges), "sgd" (mini-batches) or "proximal"
            (accelerated proximal gradient, for l1_ratio > 0, which takes many more exchanges).
        l1_ratio: the share of the L1 penalty, as in scikit-learn; above 0 only with the solver "proximal".
        tol: stop when the 2-norm of the gradient of F, the mean loss and its penalty, is at most this (squared and
            Poisson: times the standard deviation of y).
        max_iter: the most encrypted exchanges; sgd that needs more is refused.
        epochs, learning_rate, batch_size, random_state: sgd only; random_state is shared, it is no secret.
        early_stopping: sgd only: hold out validation_fraction of the rows; stop after n_iter_no_change epochs without a
            mean loss smaller by tol, and keep the weights of the best one.

    What protects the parties is not a parameter but in the agreement ([model]): max_exchanges, minimum_rows_off_mode,
    allow_reconstruction, residual_range.

    Attributes:
        coef_ (m, d) for our d columns; intercept_ (m,), zero but at the label holder; n_iter_ exchanges; converged_;
        terms_, how the exchanges were encrypted; readings_, what training disclosed; feature_names_in_; training_ the
        session's id in hex; alone_ (label holder) scikit-learn's model of its own columns, from which training started;
        objective_, gradient_norm_ (label holder); validation_losses_, an epoch each (label holder, early stopping);
        classes_ (label holder, classifiers).
    """

    _strength: ClassVar[str]  # the parameter that says how strong the penalty is

    def fit(
        self,
        X: pd.DataFrame | Matrix,
        y: Any = None,
        *,
        session: Session,
        sample_weight: Any = None,
        secret: SecretKey | None = None,
        checkpoints: Checkpoints | None = None,
        resume: bool = False,
    ) -> VerticalLinearModel:
        """Train with every other party of the session. X (n, d) float, rows aligned (the label holder may have d = 0);
        y (n,) and sample_weight (n,) at the label holder only. With `checkpoints` our state is kept every few exchanges
        (subspace and sgd); with `resume` all go on from the last that all have. `secret` replays a key pair in tests.

        Reveals:
            To the label holder: numbers of columns; per exchange, the sum over the feature holders of their embeddings
            (one feature holder: its own), m numbers a row, and of scalar products of the solver's history.
            To a feature holder: its own aggregate gradient, d * m numbers an exchange, and the solver's coefficients,
            among them products of all feature holders' gradients; with early stopping, which epoch was the best and
            when training stops. To all: everybody's number of columns, rank and magnitude, the number of outputs m.
        Raises:
            LocalError: input that cannot be trained on, before anything is sent. Refused, PeerLost,
            ProtocolViolation: see the errors.
        """
        x, names = matrix(X, may_be_empty=session.is_label_holder)
        self._check_parameters()
        if session.is_label_holder != (y is not None):
            raise LocalError("the label holder gives y, feature holders give None")
        loss, targets = (None, np.empty((len(x), 0))) if y is None else self._target(y, len(x))
        weights = row_weights(sample_weight, len(x))
        agreed = session.agreement.model
        plan = self._schedule(len(x), min(self.max_iter, agreed.max_exchanges)) if self.solver == "sgd" else None
        if plan is not None:
            _check_trainable(np.delete(targets, plan.validation, axis=0))
        setup = prepare(
            session,
            f"fit {type(self).__name__}",
            self._plain_params(),
            x,
            names,
            tolerance=self.tol,
            exchanges=self.max_iter,
            batches=() if plan is None else plan.batches,
            epochs=1 if plan is None else self.epochs,
            outputs=targets.shape[1],
            bounded=loss is not None and loss.bounded and weights.max(initial=1.0) <= 1,
        )
        meter = Meter(
            setup.ranks,
            len(x),
            session.agreement.leakage,
            agreed.allow_reconstruction,
            y=targets[:, 0]
            if len(targets.T) == 1
            else targets.argmax(axis=1).astype(float)
            if len(targets.T)
            else None,
        )
        start = ANEW if checkpoints is None else checkpoints.start(session, resume=resume)
        within = None if plan is None else replace(plan, batches=setup.batches)
        if loss is None:
            result = self._fit_feature_holder(session, setup, within, meter, start)
        else:
            problem = self._problem(loss, targets, weights)
            result = self._fit_label_holder(session, x, problem, setup, within, meter, start, secret)
        if checkpoints is not None:
            checkpoints.clear()
        if plan is not None and not result.converged:
            result = replace(result, converged=len(setup.batches) == len(plan.batches))
        if not result.converged:
            say_why(result, setup.limits, min(self.max_iter, agreed.max_exchanges))
        self.coef_, self.intercept_ = result.weights.T, result.intercept
        self.n_iter_, self.converged_, self.terms_ = result.exchanges, result.converged, setup.terms
        self.readings_ = meter.readings
        self.objective_, self.gradient_norm_ = result.objective, result.gradient_norm
        self.validation_losses_ = list(result.validation)
        self.n_features_in_, self.feature_names_in_ = x.shape[1], np.array(names, dtype=object)
        self.training_, self.agreement_, self.party_ = session.id.hex(), session.agreement.digest.hex(), session.name
        return self

    def _fit_label_holder(
        self,
        session: Session,
        x: Matrix,
        problem: Problem,
        setup: Setup,
        schedule: Schedule | None,
        meter: Meter,
        start: Start,
        secret: SecretKey | None,
    ) -> Result:
        inner = Inner(replace(problem, penalty=self._penalty(len(x))))  # all of it L2: where training starts
        inner.fit(x)
        self.alone_ = inner.snapshot()
        end = offer_key(session, setup.terms, secret)
        if schedule is not None:
            return sgd.label_holder(session, x, problem, self.learning_rate, schedule, end, meter, start)
        if self.solver == "proximal":
            return proximal.label_holder(session, x, problem, self._l1(len(x)), inner, setup.limits, end, meter)
        return subspace.label_holder(session, x, problem, inner, setup.limits, end, meter, start)

    def _fit_feature_holder(
        self, session: Session, setup: Setup, schedule: Schedule | None, meter: Meter, start: Start
    ) -> Result:
        end = accept_key(session, setup.terms, setup.x)
        contribution, n = Contribution(session), len(setup.x)
        if schedule is not None:
            rate = self.learning_rate
            return sgd.feature_holder(session, self._l2(n), rate, schedule, end, contribution, meter, start)
        if self.solver == "proximal":
            return proximal.feature_holder(session, self._l2(n), self._l1(n), setup.limits, end, contribution, meter)
        return subspace.feature_holder(session, self._l2(n), setup.limits, end, contribution, meter, start)

    def _schedule(self, rows: int, allowed: int) -> Schedule:
        held = self.validation_fraction if self.early_stopping else 0.0
        return schedule(
            rows,
            self.batch_size,
            self.epochs,
            self.random_state,
            allowed,
            held=held,
            patience=self.n_iter_no_change,
            tolerance=self.tol,
        )

    def _problem(self, loss: Loss, targets: Matrix, weights: Vector) -> Problem:
        return Problem(loss, targets, weights, self._l2(len(targets)), self.fit_intercept)

    def _target(self, y: Any, rows: int) -> tuple[Loss, Matrix]:
        """The loss and y as (n, m). Raises LocalError."""
        raise NotImplementedError

    def _penalty(self, rows: int) -> float:
        """The penalty of F = mean loss + penalty * ((1 - l1_ratio) / 2 |w|^2 + l1_ratio |w|_1)."""
        raise NotImplementedError

    def _l2(self, rows: int) -> float:
        return float(self._penalty(rows) * (1 - self.l1_ratio))

    def _l1(self, rows: int) -> float:
        return float(self._penalty(rows) * self.l1_ratio)

    def decision_function(self, X: pd.DataFrame | Matrix, *, session: Session) -> Matrix | Vector | None:
        """Scores (n,), or (n, m) with several outputs, at the label holder; None at a feature holder. Every party calls
        it with its columns of the rows.

        Reveals:
            To the label holder: per row, the sum over the feature holders of their partial embeddings; with one, its
            own. To a feature holder: nothing but the number of rows.
        """
        x = self.inputs(X, session)
        agree(session, f"score {self.training_}", self._plain_params(), x)
        ours = self.embed(x)
        if not session.is_label_holder:
            Contribution(session).send_embedding(ours, 0)
            return None
        scores: Matrix = ours + sum_embeddings(session, len(x), 0, ours.shape[1])
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def inputs(self, X: pd.DataFrame | Matrix, session: Session) -> Matrix:
        """X as the fitted model takes it, (n, d). Raises LocalError."""
        check_is_fitted(self)
        x, names = matrix(X, may_be_empty=not len(self.feature_names_in_))
        if names != list(self.feature_names_in_):
            raise LocalError(f"the model wants the columns {', '.join(self.feature_names_in_)}, in this order")
        return x

    def embed(self, x: Matrix) -> Matrix:
        """Our part of the scores of `inputs`, (n, m)."""
        return np.asarray(x @ self.coef_.T + self.intercept_)

    def merge_of(self, agreement: Agreement) -> Merge:
        """How all parties' parts become scores: their sum."""
        return Merge.of([party.name for party in agreement.ring], len(self.intercept_), separate=False)

    def head(self) -> Callable[[Matrix], Matrix]:
        """What the label holder makes of merged parts (n, m): they are the scores."""
        return lambda merged: merged

    def save(self, path: Path | str, prepared: FittedColumns | None = None) -> None:
        """Our share as JSON, never an object that runs on loading; `prepared` is what made X of our table's columns."""
        check_is_fitted(self)
        share = ModelShare(
            kind=type(self).__name__,
            party=self.party_,
            training=self.training_,
            agreement=self.agreement_,
            params=self._plain_params(),
            features=list(self.feature_names_in_),
            coef=self.coef_.tolist(),
            intercept=self.intercept_.tolist(),
            classes=self.classes_.tolist() if hasattr(self, "classes_") else [],
            exchanges=self.n_iter_,
            converged=self.converged_,
            prepared=prepared,
        )
        share.save(Path(path))

    @classmethod
    def load(cls, path: Path | str) -> VerticalLinearModel:
        """A share that `save` wrote, as the estimator that wrote it. Raises LocalError. `prepared_` is what was saved
        with it, or None."""
        share = ModelShare.load(Path(path))
        made = {one.__name__: one for one in _family(cls)}.get(share.kind)
        if made is None:
            raise LocalError(f"{path} is a share of {share.kind}, not of {cls.__name__}")
        try:
            model: VerticalLinearModel = made(**share.params)
            model._check_parameters()
        except TypeError:
            raise LocalError(f"{path} has parameters that this version does not know") from None
        model.coef_ = np.array(share.coef).reshape(len(share.intercept), len(share.features))
        model.intercept_ = np.array(share.intercept)
        model.feature_names_in_, model.n_features_in_ = np.array(share.features, dtype=object), len(share.features)
        model.n_iter_, model.converged_ = share.exchanges, share.converged
        model.training_, model.agreement_, model.party_ = share.training, share.agreement, share.party
        model.prepared_ = share.prepared
        if share.classes:
            model.classes_ = np.array(share.classes)
        return model

    def _plain_params(self) -> dict[str, Any]:
        """The parameters as Python's own types, so that 1, 1.0 and numpy's 1.0 are one value."""
        defaults = type(self)().get_params()
        return {name: type(defaults[name])(value) for name, value in self.get_params().items()}

    def _check_parameters(self) -> None:
        if self.solver not in SOLVERS:
            raise LocalError(f"unknown solver {self.solver!r}; known: {', '.join(SOLVERS)}")
        for name in ("tol", "max_iter", "epochs", "learning_rate", "batch_size", "n_iter_no_change"):
            if not getattr(self, name) > 0:
                raise LocalError(f"{name} must be positive")
        if not 0 < self.validation_fraction < 1:
            raise LocalError("validation_fraction is between 0 and 1")
        if self.early_stopping and self.solver != "sgd":
            raise LocalError("early_stopping needs solver = 'sgd': the other solvers go to the optimum")
        if not 0 <= self.l1_ratio <= 1:
            raise LocalError("l1_ratio is between 0 and 1")
        if self.l1_ratio and self.solver != "proximal":
            raise LocalError("l1_ratio above 0 needs solver = 'proximal'")
        strength = getattr(self, self._strength)
        if not (strength > 0 or (strength == 0 and self._strength == "alpha")):
            raise LocalError(f"{self._strength} must be positive")


def _check_trainable(targets: Matrix) -> None:
    """Raises LocalError when targets (b, m) of the rows that train have a constant column: a class lacks."""
    if len(targets) and any(np.ptp(column) == 0 for column in targets.T):
        raise LocalError(
            "without the rows that are held out for validation a class has no row, or all targets are alike; drop rare "
            "classes, or use another random_state"
        )


def _family(model: type[VerticalLinearModel]) -> Iterator[Any]:
    """A class and all below it."""
    yield model
    for one in model.__subclasses__():
        yield from _family(one)
