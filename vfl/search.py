"""Model selection in one session: cross-validation over a grid of hyper-parameters, then the winner on all rows.

Every party runs the same fits over the same rows, which follow from a shared seed. What the label holder gets of a row
adds up over all of them: X_i w, under any model and without any fold, is linear in the same X_i. So where a single
training has a limit of its own, a search has one for all its fits together:

    sum over the fits of the embeddings of a row < independent directions of the feature holders' columns
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import is_classifier

from parties.errors import LocalError, ProtocolViolation, Refused, blame
from parties.search import Search
from parties.session import Session
from vfl.estimator import VerticalLinearModel
from vfl.inputs import check_columns, class_labels, matrix, numeric_targets, rank
from vfl.linear import VerticalPoissonRegressor
from vfl.losses import Matrix
from vfl.messages import Plan
from vfl.metrics import FEWEST, FIGURES, Array, Figure, Kind
from vfl.neural_estimator import VerticalMLP
from vfl.search_messages import Choice
from vfl.training import NO_LIMIT, agree

log = logging.getLogger("colonnade")
Folds = NDArray[np.int64]
Estimator = VerticalLinearModel | VerticalMLP


@dataclass(frozen=True)
class Outcome:
    """What a search left at a party: the winner, trained on all rows, its number among `Search.candidates`; which fold
    each row was held out in; and at the label holder the figures, (candidates, folds)."""

    model: Estimator
    index: int
    parameters: dict[str, float]
    folds: Folds = field(repr=False)
    figures: Array | None = field(default=None, repr=False)


@dataclass
class Allowance:
    """How many more `embeddings` of any row the label holder may get, from so many more `fits`.

    A fit counts in full for every row, whether it is trained on or held out: a row that is held out is embedded once,
    to be scored. All candidates get the same, so that none wins by it; what they do not use is left to the last fit,
    the winner's.
    """

    embeddings: int
    fits: int
    outputs: int

    def __post_init__(self) -> None:
        self._each = self.embeddings // (self.fits * self.outputs)

    @property
    def times(self) -> int:
        """How often the next fit may embed a row, `outputs` numbers at a time."""
        return self._each if self.fits > 1 else self.embeddings // self.outputs

    def spend(self, times: int) -> None:
        self.embeddings -= max(times, 1) * self.outputs
        self.fits -= 1


@dataclass(frozen=True)
class _Judge:
    """At the label holder: the figure, and the labels as it wants them (n,)."""

    figure: Figure
    y: Array
    outputs: int

    @classmethod
    def of(cls, model: Estimator, y: Any, folds: Folds, metric: str) -> _Judge:
        """Raises LocalError where a fold would have no figure, or rows to train on would lack a class."""
        kind: Kind = "poisson" if isinstance(model, VerticalPoissonRegressor) else "regression"
        outputs = 1
        if is_classifier(model):
            classes, coded = class_labels(y, len(folds))
            kind, truth = "binary" if len(classes) == 2 else "multiclass", coded.astype(np.float64)
            outputs = 1 if len(classes) == 2 else len(classes)
            if any(len(np.unique(coded[folds != fold])) < len(classes) for fold in range(folds.max() + 1)):
                raise LocalError("a class has all its rows in one fold; drop rare classes, or use another seed")
        else:
            truth = numeric_targets(y, len(folds))
        if metric not in FIGURES[kind]:
            raise LocalError(f"labels of {outputs} classes have no {metric}; choose among {', '.join(FIGURES[kind])}")
        judge = cls(FIGURES[kind][metric], truth, outputs)
        for fold in range(folds.max() + 1):  # any scores will do: labels alone decide
            rows = folds == fold
            judge._check(rows, np.ones((rows.sum(), outputs))[:, 0 if outputs == 1 else slice(None)])
        return judge

    def measure(self, model: Estimator, scores: Any, rows: NDArray[np.bool_]) -> float:
        """Our figure on rows that were held out, from what the model predicts of them."""
        scores = scores[:, 1] if is_classifier(model) and self.outputs == 1 else scores
        self._check(rows, scores)
        return float(self.figure.compute(self.y[rows], scores, 0.5))

    def _check(self, rows: NDArray[np.bool_], scores: Array) -> None:
        if why := self.figure.lacks(self.y[rows], scores, 0.5):
            raise LocalError(f"a fold has no {self.figure.title}: {why}; use fewer folds or another metric")


def split(rows: int, folds: int, seed: int) -> Folds:
    """In which fold, from 0, each of the aligned rows is held out: the same at every party, from a shared seed; sizes
    differ by at most 1. Not stratified: labels are the label holder's alone."""
    return np.random.default_rng([seed, 2]).permutation(rows) % folds


def search(
    session: Session,
    make: Callable[[], Estimator],
    X: pd.DataFrame | Matrix,
    y: Any,
    agreed: Search,
    seed: int,
) -> Outcome:
    """Fit every candidate to all folds but one in turn, choose by the mean of the figure over the folds held out, and
    fit the winner to all rows: scikit-learn's `GridSearchCV` on the joined table with the same folds (ties: the first),
    as long as every fit converges. All parties give the same `make`, `agreed` and `seed`; X (n, d) and y as `fit` takes
    them, X prepared beforehand.

    Without `allow_reconstruction` in the agreement the fits share, for every row, one embedding fewer than the feature
    holders' columns have independent directions; they then stop earlier. A grid too large for even one exchange a fit
    is refused, and so are networks, which need that consent, and the encrypted mode.

    Reveals:
        To all: what `agree` reveals, and which candidate won: a few bits about the labels of all rows. No figure.
        To the label holder: what each `fit` does; of a held-out row the sum over the feature holders of its partial
        embeddings (one feature holder: its own). Of embeddings it gets no more than the limit from all fits together;
        each fit adds one number, the square of its last gradient.
        To a feature holder: what each `fit` does, so its aggregate gradients over all rows but a fold's; the difference
        of two is about the gradient over a fold or two. So a fold must pass what a table must.
    Raises:
        LocalError: a fold that cannot be trained on or measured, before anything is sent. Refused: too many fits.
        ProtocolViolation, PeerLost: see the errors.
    """
    x, names = matrix(X, may_be_empty=session.is_label_holder)
    if session.is_label_holder != (y is not None):
        raise LocalError("the label holder gives y, feature holders give None")
    folds, candidates, template = split(len(x), agreed.folds, seed), agreed.candidates, make()
    _check_grid(agreed, template, len(x), session.agreement.model.allow_reconstruction)
    judge, ours = None, dict[str, int]()
    if y is None:
        ours["rank"] = _check_folds(session, x, names, folds)
    else:
        judge = _Judge.of(template, y, folds, agreed.metric)
        ours["outputs"] = template.hidden_layer_sizes[0] if isinstance(template, VerticalMLP) else judge.outputs
    params = {"search": msgspec.to_builtins(agreed), "seed": seed}
    plans = agree(session, f"search {type(template).__name__}", params, x, **ours)
    allowance = _allow(session, plans, template, len(candidates) * agreed.folds + 1, len(x) // agreed.folds)
    table, labels = pd.DataFrame(x, columns=names), None if y is None else np.asarray(y)

    def fit(candidate: int, rows: NDArray[np.bool_]) -> Estimator:
        model = make().set_params(**candidates[candidate])
        return _fit(session, model, table[rows], None if labels is None else labels[rows], allowance)

    figures = np.empty((len(candidates), agreed.folds))
    for candidate, fold in np.ndindex(figures.shape):
        held = folds == fold
        model = fit(candidate, ~held)
        predict = model.predict_proba if is_classifier(model) else model.predict
        scores = predict(table[held], session=session)
        if judge is not None:
            figures[candidate, fold] = judge.measure(model, scores, held)
    index = _choose(session, judge, figures)
    winner = fit(index, np.ones(len(x), bool))
    return Outcome(winner, index, candidates[index], folds, None if judge is None else figures)


def _choose(session: Session, judge: _Judge | None, figures: Array) -> int:
    """The label holder's choice, at every party."""
    if judge is not None:
        means = figures.mean(axis=1)
        index = int(means.argmin() if judge.figure.lower_is_better else means.argmax())
        session.broadcast(Choice(index))
        return index
    channel = session.channels[session.label_holder]
    chosen = channel.receive(Choice)
    with blame(channel.peer):
        if chosen.index >= len(figures):
            raise ValueError("chose a candidate that the grid does not have")
    return chosen.index


def _fit(session: Session, model: Estimator, X: pd.DataFrame, y: Any, allowance: Allowance) -> Estimator:
    """One fit, which the allowance bounds and pays: sgd and networks embed a row once an epoch; of the exchanges of the
    others the last embeds nothing."""
    by_epochs, times = isinstance(model, VerticalMLP) or model.solver == "sgd", allowance.times
    if by_epochs:
        model.set_params(epochs=min(model.epochs, times))
    else:
        model.set_params(max_iter=min(model.max_iter, times + 1))
    model.fit(X, y, session=session)
    width = model.terms_.width if model.terms_ else 0
    if width != allowance.outputs:
        peer = session.label_holder
        raise ProtocolViolation(f"{peer} trains {width} outputs, not as many as it planned", peer=peer)
    allowance.spend(model.epochs if by_epochs else model.n_iter_ - 1)
    return model


def _check_grid(agreed: Search, model: Estimator, rows: int, consent: bool) -> None:
    """Raises LocalError when the estimator has no such parameter, or rows are too few to be split so often."""
    try:
        if isinstance(model, VerticalMLP):
            kind = "network classifier" if is_classifier(model) else "network regressor"
            agreed.check(kind, "sgd", model.mode, consent)
        else:
            kind = "poisson" if isinstance(model, VerticalPoissonRegressor) else "linear"
            agreed.check(f"{'logistic' if is_classifier(model) else kind} regression", model.solver, "", consent)
    except ValueError as error:
        raise LocalError(f"[search]: {error}") from None
    if unknown := sorted(agreed.grid.keys() - model.get_params().keys()):
        raise LocalError(f"[search]: grid: {type(model).__name__} has no {unknown[0]}")
    if rows // agreed.folds < FEWEST:
        raise LocalError(f"{rows} rows in {agreed.folds} folds are fewer than {FEWEST} each; use fewer folds")


def _check_folds(session: Session, x: Matrix, names: list[str], folds: Folds) -> int:
    """The least rank of our columns in any fold, whose rows are all embedded along the same directions. Raises
    LocalError: a fold must pass what a table must, as the gradients of two fits differ by about its own."""
    parts = [x[folds == fold] for fold in range(folds.max() + 1)]
    for part in parts:
        check_columns(part, names, session.agreement.model.minimum_rows_off_mode, "a fold")
        session.tick()
    return min(map(rank, parts))


def _allow(session: Session, plans: Mapping[str, Plan], model: Estimator, fits: int, smallest: int) -> Allowance:
    """What all fits may use together; every party computes it, so that none can be led beyond it. Raises Refused."""
    consent, peer = session.agreement.model.allow_reconstruction, session.label_holder
    holders = {name: plan for name, plan in plans.items() if name != peer}
    outputs = plans[peer].outputs
    if not outputs:
        raise ProtocolViolation(f"{peer} plans a search without outputs", peer=peer)
    for name, plan in holders.items():
        if plan.columns + 1 >= smallest:
            raise Refused(
                f"{name} brings {plan.columns} columns, a fold has {smallest} rows: gradients would give it labels; "
                "use fewer folds",
                peer=name,
            )
    solver = "sgd" if isinstance(model, VerticalMLP) else model.solver
    together = sum(plan.rank for plan in holders.values())
    scoring = outputs if solver == "sgd" else 0  # of the same rows by the winner, as `training` leaves room for it
    most = max(session.agreement.leakage.most_embeddings(together) - scoring, 0)
    allowance = Allowance(NO_LIMIT * fits * outputs if consent else most, fits, outputs)
    if not consent and solver == "proximal":
        raise Refused(
            "a search with solver = 'proximal' embeds rows more often than can be counted beforehand; agree on "
            "allow_reconstruction or on another solver"
        )
    if not allowance.times:
        raise Refused(
            f"a search of {fits} fits embeds every row {fits * outputs} times or more, and the feature holders' "
            f"columns have {together} independent directions: the label holder could rebuild them; at most "
            f"{most // outputs} fits are possible: agree on fewer folds, a smaller grid, or "
            "allow_reconstruction"
        )
    if not consent:
        log.warning(
            "each of %d fits embeds a row at most %d times, the last maybe oftener: with more the label holder could "
            "rebuild the feature holders' columns; allow_reconstruction in the agreement lifts this",
            fits,
            allowance.times,
        )
    most = session.agreement.model.max_exchanges
    exchanges = fits * (most if isinstance(model, VerticalMLP) else min(model.max_iter, most))
    if solver == "subspace":
        exchanges = min(exchanges, allowance.embeddings // outputs + fits)
    numbers = outputs * max(plan.columns for plan in holders.values())
    if smallest <= session.agreement.encryption.feature_bits * numbers * exchanges:
        log.warning(
            "folds of %d rows are few for up to %d gradients of %d numbers in all fits: a feature holder with a "
            "lattice attack might learn labels, see docs/threats.md",
            smallest,
            exchanges,
            numbers,
        )
    return allowance
