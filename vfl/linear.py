"""Linear models over the columns of several parties, with scikit-learn's contract at each of them."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted

from parties.errors import LocalError, ProtocolViolation, Refused
from parties.session import Session
from vfl import sgd, subspace
from vfl.encryption.paillier import SecretKey
from vfl.encryption.scheme import Fixed
from vfl.exchange import Scales, Terms, accept_key, offer_key
from vfl.inputs import check_columns, matrix, rank, two_labels
from vfl.losses import Matrix, Vector
from vfl.messages import Plan
from vfl.secure_sum import Contribution, sum_embeddings
from vfl.share import ModelShare, Scaling
from vfl.solver import Limits, Result

log = logging.getLogger("colonnade")
FEW_SCORES = 10


class VerticalLogisticRegression(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Binary logistic regression with L2 penalty on columns that several parties hold: the model that scikit-learn's
    `LogisticRegression(C=C)` finds on the joined table.

    Every party calls `fit` with its own columns of the aligned rows, in the same order; the label holder alone gives y.

    Parameters:
        C: inverse of the L2 penalty, as in scikit-learn.
        fit_intercept: the intercept belongs to the label holder and is not penalised.
        solver: "subspace" (full batch, to the optimum in the fewest exchanges) or "sgd" (mini-batches).
        tol: subspace stops when the 2-norm of the gradient of F / (C n) is at most this.
        max_iter: the most encrypted exchanges; sgd that needs more is refused.
        epochs, learning_rate, batch_size, random_state: sgd only; random_state is shared, it is no secret.

    What protects the parties is not a parameter but in the agreement ([model]): max_exchanges, minimum_rows_off_mode,
    allow_reconstruction.

    Attributes:
        coef_ (1, d) for our d columns; intercept_ (1,), zero but at the label holder; n_iter_ exchanges; converged_;
        terms_, how the exchanges were encrypted;
        feature_names_in_; classes_ (label holder); training_ the session's id in hex; alone_ (label holder) the
        scikit-learn model of its own columns from which training started; objective_, gradient_norm_ (label holder).
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        fit_intercept: bool = True,
        solver: str = "subspace",
        tol: float = 1e-6,
        max_iter: int = 100,
        epochs: int = 5,
        learning_rate: float = 0.1,
        batch_size: int = 256,
        random_state: int = 0,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(
        self, X: pd.DataFrame | Matrix, y: Any = None, *, session: Session, secret: SecretKey | None = None
    ) -> VerticalLogisticRegression:
        """Train with every other party of the session. X (n, d) float, rows aligned; y (n,) at the label holder only.

        `secret` replays a key pair in tests.

        Reveals:
            To the label holder: numbers of columns; per exchange, the sum over the feature holders of their embeddings
            (one feature holder: its own) and of scalar products of the solver's history.
            To a feature holder: its own aggregate gradient, d numbers an exchange, and the solver's coefficients, among
            them the norm of all feature holders' gradients. To all: everybody's number of columns and their rank.
        Raises:
            LocalError: input that cannot be trained on, before anything is sent. Refused, PeerLost,
            ProtocolViolation: see the errors.
        """
        x, names = matrix(X)
        self._check_parameters()
        if session.is_label_holder != (y is not None):
            raise LocalError("the label holder gives y, feature holders give None")
        labels = two_labels(y, len(x)) if y is not None else None
        scales = Scales.of(session.agreement, len(x))
        batches = self._batches(len(x), session.agreement.model.max_exchanges)
        fixed = np.empty((0, 0), np.int64)
        if labels is None:
            self._check_columns(session, x, names, batches)
            fixed = scales.features(x, names)
        ours = (rank(x), scales.magnitude(fixed, batches)) if labels is None else (0, 0)
        plans = self._agree(session, "fit", x, *ours)
        smallest = min(map(len, batches), default=len(x))
        columns = self._check_holders(session, plans, smallest)
        limits = self._limits(session, plans, len(batches))
        weighed = max(columns.values()) if labels is not None else x.shape[1]
        self._warn_few_rows(session, smallest, weighed, limits)
        largest, holders = max(map(len, batches), default=len(x)), {name: plans[name] for name in columns}
        terms = Terms.of(session.agreement, largest, holders, limits.exchanges, cached=not batches)
        if labels is not None:
            self.classes_, coded = labels
            result = self._fit_label_holder(session, x, coded, limits, terms, batches, secret)
        else:
            result = self._fit_feature_holder(session, fixed, limits, terms, batches)
        if not result.converged:
            self._say_why(session, result, limits)
        intercept = session.is_label_holder and self.fit_intercept
        self.coef_ = result.weights[np.newaxis, : x.shape[1]]
        self.intercept_ = result.weights[-1:] if intercept else np.zeros(1)
        self.n_iter_, self.converged_, self.terms_ = result.exchanges, result.converged, terms
        self.objective_, self.gradient_norm_ = result.objective, result.gradient_norm
        self.n_features_in_, self.feature_names_in_ = x.shape[1], np.array(names, dtype=object)
        self.training_, self.agreement_, self.party_ = session.id.hex(), session.agreement.digest.hex(), session.name
        return self

    def _fit_label_holder(
        self,
        session: Session,
        x: Matrix,
        y: Vector,
        limits: Limits,
        terms: Terms,
        batches: list[NDArray[np.int64]],
        secret: SecretKey | None,
    ) -> Result:
        self.alone_ = LogisticRegression(C=self.C, fit_intercept=self.fit_intercept, max_iter=1000).fit(x, y)
        few = len(np.unique(np.round(self.alone_.decision_function(x), 6)))
        if few < FEW_SCORES:
            log.warning(
                "our own columns give only %d different scores to start from: gradients of few different residuals are "
                "easier to take labels from; add a column, see docs/threats.md",
                few,
            )
        end = offer_key(session, terms, secret)
        if self.solver == "subspace":
            return subspace.label_holder(session, x, y, self.alone_, limits, end)
        start, free, ones = self.alone_.coef_[0], np.zeros(x.shape[1]), x
        if self.fit_intercept:
            ones, start = np.column_stack([x, np.ones(len(x))]), np.append(start, self.alone_.intercept_)
            free = np.append(free, 1.0)
        plan, penalties = batches[: limits.exchanges], (1 - free) / (self.C * len(y))
        complete = len(plan) == len(batches)
        return sgd.label_holder(session, ones, y, start, penalties, self.learning_rate, plan, end, complete)

    def _fit_feature_holder(
        self, session: Session, x: Fixed, limits: Limits, terms: Terms, batches: list[NDArray[np.int64]]
    ) -> Result:
        end = accept_key(session, terms, x)
        contribution = Contribution(session)
        penalty = 1 / (self.C * len(x))
        if self.solver == "subspace":
            return subspace.feature_holder(session, penalty, limits, end, contribution)
        plan = batches[: limits.exchanges]
        complete = len(plan) == len(batches)
        return sgd.feature_holder(session, penalty, self.learning_rate, plan, end, contribution, complete)

    def _batches(self, rows: int, agreed: int) -> list[NDArray[np.int64]]:
        """All batches of sgd, known to every party in advance; none for other solvers. LocalError beyond the limits."""
        if self.solver != "sgd":
            return []
        batches = sgd.batches(rows, self.batch_size, self.epochs, self.random_state)
        if len(batches) > min(self.max_iter, agreed):
            raise LocalError(
                f"sgd over {rows} rows needs {len(batches)} encrypted exchanges, {min(self.max_iter, agreed)} are "
                "allowed; use larger batches, fewer epochs, or agree on more exchanges"
            )
        return batches

    def decision_function(self, X: pd.DataFrame | Matrix, *, session: Session) -> Vector | None:
        """Scores (n,) at the label holder, None at a feature holder: every party calls it with its columns of the rows.

        Reveals:
            To the label holder: per row, the sum over the feature holders of their partial embeddings; with one, its
            own. To a feature holder: nothing but the number of rows.
        """
        check_is_fitted(self)
        x, names = matrix(X)
        if names != list(self.feature_names_in_):
            raise LocalError(f"the model wants the columns {', '.join(self.feature_names_in_)}, in this order")
        self._agree(session, f"score {self.training_}", x)
        if not session.is_label_holder:
            Contribution(session).send_embedding(x @ self.coef_[0], 0)
            return None
        ours: Vector = x @ self.coef_[0] + self.intercept_[0]
        return ours + sum_embeddings(session, len(x), 0)[:, 0]

    def predict_proba(self, X: pd.DataFrame | Matrix, *, session: Session) -> Matrix | None:
        """(n, 2) at the label holder, None at a feature holder. Reveals what `decision_function` does."""
        scores = self.decision_function(X, session=session)
        if scores is None:
            return None
        positive = 1 / (1 + np.exp(-np.clip(scores, -700, 700)))
        return np.column_stack([1 - positive, positive])

    def predict(self, X: pd.DataFrame | Matrix, *, session: Session) -> Any:
        """The class per row at the label holder, None at a feature holder. Reveals what `decision_function` does."""
        scores = self.decision_function(X, session=session)
        return None if scores is None else self.classes_[(scores > 0).astype(int)]

    def score(self, X: pd.DataFrame | Matrix, y: Any = None, *, session: Session) -> float | None:
        """Mean accuracy at the label holder, None at a feature holder. Reveals what `decision_function` does."""
        predicted = self.predict(X, session=session)
        return None if predicted is None else float(np.mean(predicted == np.asarray(y)))

    def save(self, path: Path | str, scaler: Scaling | None = None) -> None:
        """Our share as JSON, never an object that runs on loading."""
        check_is_fitted(self)
        share = ModelShare(
            party=self.party_,
            training=self.training_,
            agreement=self.agreement_,
            params=self._plain_params(),
            features=list(self.feature_names_in_),
            coef=self.coef_[0].tolist(),
            intercept=float(self.intercept_[0]),
            classes=self.classes_.tolist() if hasattr(self, "classes_") else [],
            exchanges=self.n_iter_,
            converged=self.converged_,
            scaler=scaler,
        )
        share.save(Path(path))

    @classmethod
    def load(cls, path: Path | str) -> VerticalLogisticRegression:
        """A share that `save` wrote. Raises LocalError. `scaler_` is what was saved with it, or None."""
        share = ModelShare.load(Path(path))
        try:
            model = cls(**share.params)  # type: ignore[arg-type]
            model._check_parameters()
        except TypeError:
            raise LocalError(f"{path} has parameters that this version does not know") from None
        model.coef_, model.intercept_ = np.array([share.coef]), np.array([share.intercept])
        model.feature_names_in_, model.n_features_in_ = np.array(share.features, dtype=object), len(share.features)
        model.n_iter_, model.converged_ = share.exchanges, share.converged
        model.training_, model.agreement_, model.party_ = share.training, share.agreement, share.party
        model.scaler_ = share.scaler
        if share.classes:
            model.classes_ = np.array(share.classes)
        return model

    def _plain_params(self) -> dict[str, Any]:
        """The parameters as Python's own types, so that 1, 1.0 and numpy's 1.0 are one value."""
        defaults = type(self)().get_params()
        return {name: type(defaults[name])(value) for name, value in self.get_params().items()}

    def _check_parameters(self) -> None:
        if self.solver not in ("subspace", "sgd"):
            raise LocalError(f"unknown solver {self.solver!r}; known: subspace, sgd")
        for name in ("C", "tol", "max_iter", "epochs", "learning_rate", "batch_size"):
            if not getattr(self, name) > 0:
                raise LocalError(f"{name} must be positive")

    def _check_columns(self, session: Session, x: Matrix, names: list[str], batches: list[NDArray[np.int64]]) -> None:
        """Refuse columns whose gradients give labels to us, their holder; warn where they might."""
        minimum = session.agreement.model.minimum_rows_off_mode
        check_columns(x, names, minimum)
        for batch in batches:
            check_columns(x[batch], names, minimum, "a batch")
            session.tick()

    def _say_why(self, session: Session, result: Result, limits: Limits) -> None:
        """Training ended before the tolerance: for whose sake."""
        why = "fixed point allows no further progress; a larger tol would call this converged"
        if result.exchanges == limits.exchanges < min(self.max_iter, session.agreement.model.max_exchanges):
            why = (
                "with as many as the feature holders' columns have independent directions the label holder could "
                "rebuild them; allow_reconstruction in the agreement lifts this"
            )
        elif result.exchanges == limits.exchanges:
            why = "as many as were agreed"
        log.warning("training stopped after %d exchanges, before the optimum: %s", result.exchanges, why)

    def _check_holders(self, session: Session, plans: dict[str, Plan], rows: int) -> dict[str, int]:
        """The columns of every feature holder, none with more than agreed, nor so many that its gradient is R.

        All parties check all: claimed columns give labels, and lift the limit on exchanges for everybody.
        """
        columns = {name: plan.columns for name, plan in plans.items() if name != session.label_holder}
        for name, count in columns.items():
            agreed = session.agreement.party(name).columns
            if not count or count + 1 >= rows or (agreed and count > agreed):
                limit = f"the agreement allows {agreed}" if agreed else f"a batch has {rows} rows"
                raise Refused(f"{name} brings {count} columns, {limit}: its gradients would give it labels", peer=name)
        return columns

    def _warn_few_rows(self, session: Session, rows: int, columns: int, limits: Limits) -> None:
        """Both sides say it: gradients are sums over rows, and lattice reduction can undo sums of few."""
        if rows <= session.agreement.encryption.feature_bits * columns * limits.exchanges:
            log.warning(
                "%d rows are few for up to %d gradients of %d columns: a feature holder with a lattice attack might "
                "learn labels, see docs/threats.md",
                rows,
                limits.exchanges,
                columns,
            )

    def _agree(
        self, session: Session, purpose: str, x: Matrix, independent: int = 0, magnitude: int = 0
    ) -> dict[str, Plan]:
        """All parties compare what they are about to do, and count rows and columns, before any data moves.

        Returns everybody's plan, ours included.
        """
        text = msgspec.json.encode([purpose, self._plain_params()], order="sorted")
        digest = hashlib.sha256(b"colonnade/plan/1" + session.id + text).digest()
        ours = Plan(digest, len(x), x.shape[1], independent, magnitude)
        session.broadcast(ours)
        plans = session.gather(Plan)
        for name, plan in plans.items():
            if plan.digest != ours.digest:
                raise Refused(
                    f"{name} is about to do something else: other hyper-parameters, or a share of another training",
                    peer=name,
                )
            if plan.rows != ours.rows:
                raise ProtocolViolation(f"{name} has {plan.rows} rows where we have {ours.rows}", peer=name)
        return plans | {session.name: ours}

    def _limits(self, session: Session, plans: dict[str, Plan], batches: int) -> Limits:
        """The cap on exchanges; every party computes it, so that none can be led beyond it.

        Without consent it is the number of independent directions of the feature holders' columns together: so many
        embeddings, or sums of them, let the label holder rebuild these columns up to a linear map.
        """
        agreed = session.agreement.model
        wanted = batches or min(self.max_iter, agreed.max_exchanges)
        together = sum(plan.rank for name, plan in plans.items() if name != session.label_holder)
        return Limits(self.tol, wanted if agreed.allow_reconstruction else min(wanted, max(together, 1)))
