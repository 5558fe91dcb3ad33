"""The main job at one party, as `run`, `predict` and the demo all do it: prepare, align, train, score."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.linalg import lapack

from parties.agreement import Model
from parties.errors import LocalError, Refused
from parties.party_file import Party, TableChoice
from parties.preparation import Preparation
from parties.session import TRAIN, Progress, Session
from parties.tables import Source, Table
from psi import job as psi_job
from psi.report import Report
from vfl.evaluation import Evaluation, compare
from vfl.exchange import Scales
from vfl.inputs import RANK_TOLERANCE, check_columns
from vfl.linear import VerticalLogisticRegression
from vfl.losses import Vector
from vfl.preparation import FittedCategory, FittedColumns, FittedNumber, fit

log = logging.getLogger("colonnade")
TRAINED = (*psi_job.ALIGNED, "model.json", "report.html")
SCORED = tuple(f"score_{name}" for name in psi_job.EVIDENCE)


@dataclass(frozen=True)
class Prepared(psi_job.Prepared):
    """Our input, checked: nothing has been sent yet. Features and label are those of the rows that take part, in the
    order of `ids.rows`; features as our table has them: float64, NaN where one is missing and will be filled, or text.

    `plan` is our file's [prepare]; `fitted` what it comes to on all these rows or, when scoring, what our share brings.
    """

    features: pd.DataFrame = field(repr=False)
    label: Vector | None = field(repr=False)
    plan: Preparation = field(repr=False)
    fitted: FittedColumns = field(repr=False)


@dataclass
class Outcome:
    """What the job left at this party. `rows[i]` is the row of our table (from 0) that is the i-th common customer."""

    session: str
    task: str
    rows: NDArray[np.int64] = field(repr=False)
    test: NDArray[np.bool_] = field(repr=False)
    psi_report: Report = field(repr=False)
    seconds: dict[str, float]
    bytes_sent: dict[str, dict[str, int]]
    bytes_by_phase: dict[str, int]
    model: VerticalLogisticRegression
    fitted: FittedColumns = field(repr=False)
    probability: Vector | None = field(default=None, repr=False)
    evaluation: Evaluation | None = field(default=None, repr=False)


def prepare(
    party: Party,
    *,
    source: Source | None = None,
    trained: FittedColumns | None = None,
    look: Callable[[Table], None] = lambda table: None,
) -> Prepared:
    """Read and check our table, for training; or for scoring, with the preparation that a share was `trained` with.

    Raises:
        LocalError: names file, column and count. Refused: the agreement does not allow a model, or as many columns.
    """
    choice, plan, agreement = party.file.table, party.file.prepare, party.agreement
    names = list(choice.features if trained is None else trained.columns)
    if not names:
        raise LocalError(f"{party.path}: name our columns as features in [table]; 'colonnade align' needs none")
    if trained is None and party.is_label_holder and not choice.label:
        raise LocalError(f"{party.path}: the label holder names its label in [table]; 'colonnade align' needs none")
    if agreement.intersection.result != "rows":
        raise Refused(f'the agreement reveals only {agreement.intersection.result!r}: a model needs result = "rows"')
    categories, gaps = _declared(plan) if trained is None else _learnt(trained)
    label = choice.label if trained is None else ""
    read = psi_job.prepare(
        party, source=source, features=names, label=label, categories=categories, gaps=gaps, look=look
    )
    features, truth = _taking_part(read, choice)
    try:
        fitted = trained or _fitted(features, plan, agreement.model, party.is_label_holder)
        columns = fitted.transform(features)
    except LocalError as error:
        raise LocalError(f"{read.table.source}: {error}") from None
    if trained is None:
        _rehearse(party, columns, read.table.source)
    return Prepared(read.table, read.ids, features, truth, plan, fitted)


def _declared(plan: Preparation) -> tuple[set[str], set[str]]:
    """Which columns are text, and in which numbers may be missing."""
    return set(plan.categories), {name for name, column in plan.numbers.items() if column.missing != "refuse"}


def _learnt(fitted: FittedColumns) -> tuple[set[str], set[str]]:
    """Likewise, of a preparation that has been fitted."""
    texts = {name for name, column in fitted.columns.items() if isinstance(column, FittedCategory)}
    return texts, {name for name, column in fitted.columns.items() if name not in texts and column.fill is not None}


def _fitted(features: pd.DataFrame, plan: Preparation, model: Model, is_label_holder: bool) -> FittedColumns:
    """Every level of a feature holder's columns has the agreed number of rows: its gradients are sums over them."""
    minimum = 1 if is_label_holder else model.minimum_rows_off_mode
    return fit(features, plan, standardise=model.standardise, minimum=minimum)


def _rehearse(party: Party, columns: pd.DataFrame, place: str) -> None:
    """What would stop training once rows are common stops us now, on all our rows and prepared columns."""
    agreement, names, rows = party.agreement, list(map(str, columns)), len(columns)
    agreed = agreement.party(party.name).columns
    if agreed and len(names) > agreed:
        raise Refused(f"{party.path}: {len(names)} columns once they are prepared; the agreement allows us {agreed}")
    if not party.is_label_holder:
        check_columns(columns.to_numpy(), names, agreement.model.minimum_rows_off_mode, place)
        Scales.of(agreement, rows).features(columns.to_numpy(), names)
    if rows <= len(names):
        raise LocalError(f"{place}: {rows} rows for {len(names)} prepared columns; bring more rows")
    _warn_dependent(columns)


def _warn_dependent(columns: pd.DataFrame) -> None:
    """Columns that depend on others are solved for all the same: the penalty says how they share a weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.nan_to_num(np.atleast_2d(np.corrcoef(columns.to_numpy(), rowvar=False)))
    _, order, independent, _ = lapack.dpstrf(correlations, tol=RANK_TOLERANCE**2)
    names = [columns.columns[number - 1] for number in sorted(order[independent:])]
    if names:
        log.warning(
            "columns that others of ours add up to: %s; the penalty alone decides how they share a weight: drop them",
            ", ".join(map(repr, names)),
        )


def _taking_part(read: psi_job.Prepared, choice: TableChoice) -> tuple[pd.DataFrame, Vector | None]:
    """One row of features and one label for every id; several rows of one id are aggregated if our file says so."""
    table, ids = read.table, read.ids
    features = pd.DataFrame(table.features, copy=False)
    label = table.label
    if choice.duplicates != "aggregate" or not ids.counts["duplicate"]:
        return features.iloc[ids.rows], None if label is None else label[ids.rows]
    part = ids.groups >= 0
    grouped = features[part].groupby(ids.groups[part], sort=True)
    if label is not None:
        spread = pd.Series(label[part]).groupby(ids.groups[part]).agg(["min", "max"])
        differing = int((spread["min"] != spread["max"]).sum())
        if differing:
            raise LocalError(
                f"{table.source}, column {choice.label!r}: {differing} ids have rows of both labels; correct them"
            )
    return grouped.agg(dict(choice.aggregate))[list(features)].astype(np.float64), (
        None if label is None else label[ids.rows]
    )


def estimator(model: Model) -> VerticalLogisticRegression:
    """The estimator that the agreement describes."""
    return VerticalLogisticRegression(
        C=model.C,
        fit_intercept=model.fit_intercept,
        solver=model.solver,
        tol=model.tolerance,
        max_iter=model.max_exchanges,
        epochs=model.epochs,
        learning_rate=model.learning_rate,
        batch_size=model.batch_size,
        random_state=model.seed,
    )


def train(session: Session, prepared: Prepared, minimum: int = 0, house: psi_job.House | None = None) -> Outcome:
    """The job in an open session. The same function at every party; the label holder's table has the label. `house`
    keeps the evidence of the intersection as soon as rows are known, whatever happens later.

    The joint model is compared with the label holder alone, but not with the model without one feature holder: that
    takes the sum of the others' embeddings of the held-out rows, and the difference would tell the label holder what
    that one's embedding of each row is. Of a single feature holder there is nobody else to leave.

    Reveals:
        To every party: what `align`, `VerticalLogisticRegression.fit` and its `decision_function` reveal; no more.
    """
    settings = session.agreement.model
    common, report = _common(session, prepared, minimum, house)
    if not len(common):
        raise Refused("no customer is common to all parties; are the ids of one kind, and the rule right?")
    features = prepared.features.iloc[common].reset_index(drop=True)
    test = split(len(features), settings.test_fraction, settings.seed)
    label = None if prepared.label is None else prepared.label[common]
    with session.phase("train"):
        fitted = _fitted(features[~test], prepared.plan, settings, session.is_label_holder)
        columns = fitted.transform(features)
        model = estimator(settings)
        model.fit(columns[~test], None if label is None else label[~test], session=session)
    probability, evaluation = None, None
    if test.any():
        with session.phase("score"):
            both = model.predict_proba(columns[test], session=session)
        if both is not None and label is not None:
            probability = both[:, 1]
            alone = model.alone_.predict_proba(columns[test].to_numpy())[:, 1]
            evaluation = compare("binary", label[test], {"joint": probability, "alone": alone})
    return _outcome(session, prepared, common, report, test, model, fitted, probability, evaluation)


def score(
    session: Session,
    prepared: Prepared,
    model: VerticalLogisticRegression,
    minimum: int = 0,
    house: psi_job.House | None = None,
) -> Outcome:
    """Align new rows and score them; the scores stay with the label holder.

    Reveals:
        To every party: what `align` and `VerticalLogisticRegression.decision_function` reveal; no more.
    """
    common, report = _common(session, prepared, minimum, house)
    columns = prepared.fitted.transform(prepared.features.iloc[common].reset_index(drop=True))
    with session.phase("score"):
        both = model.predict_proba(columns, session=session)
    probability = None if both is None else both[:, 1]
    test = np.ones(len(columns), bool)
    return _outcome(session, prepared, common, report, test, model, prepared.fitted, probability, None)


def split(rows: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which of the aligned rows are held out: the same at every party, from a shared seed; at least one row trains."""
    test = np.zeros(rows, bool)
    test[np.random.default_rng(seed).permutation(rows)[: min(round(rows * fraction), rows - 1)]] = True
    return test


def run(party: Party, progress: Progress, note: Callable[[str], None]) -> Outcome:
    """`colonnade run`: everything at one party, over the network. Writes the evidence, the caller the rest."""
    approval, house = party.approval, psi_job.House(party)
    prepared = prepare(party)
    house.check_budget(prepared.ids)
    with psi_job.meeting(house, approval, TRAIN, TRAINED, progress, note) as session:
        outcome = train(session, prepared, party.file.policy.minimum_intersection, house)
    return _closed(outcome, session)


def predict(
    party: Party, source: Source, share: Path, progress: Progress, note: Callable[[str], None]
) -> tuple[Outcome, Prepared]:
    """`colonnade predict`: align the rows of `source` with the others' new rows afresh, and score them."""
    model = VerticalLogisticRegression.load(share)
    if model.agreement_ != party.agreement.digest.hex() or model.party_ != party.name:
        raise Refused(f"{share} was trained under another agreement or by another party; train again")
    approval, house = party.approval, psi_job.House(party, "score_")
    prepared = prepare(party, source=source, trained=model.prepared_ or _as_they_are(list(model.feature_names_in_)))
    house.check_budget(prepared.ids)
    task = f"score with {model.training_[:32]}"
    with psi_job.meeting(house, approval, task, SCORED, progress, note) as session:
        outcome = score(session, prepared, model, party.file.policy.minimum_to_score, house)
    return _closed(outcome, session), prepared


def _as_they_are(names: list[str]) -> FittedColumns:
    """For a share that was saved without a preparation: its columns are our table's."""
    return FittedColumns(
        columns={name: FittedNumber() for name in names}, mean=(0.0,) * len(names), scale=(1.0,) * len(names)
    )


def _common(
    session: Session, prepared: Prepared, minimum: int, house: psi_job.House | None
) -> tuple[NDArray[np.int64], Report]:
    alignment, report = psi_job.intersect(session, prepared, minimum, house)
    if alignment.rows is None:
        raise Refused('the agreement keeps the common rows from us: a model needs result = "rows"')
    return alignment.rows, report


def _outcome(
    session: Session,
    prepared: Prepared,
    common: NDArray[np.int64],
    report: Report,
    test: NDArray[np.bool_],
    model: VerticalLogisticRegression,
    fitted: FittedColumns,
    probability: Vector | None,
    evaluation: Evaluation | None,
) -> Outcome:
    rows, name = prepared.ids.rows[common], session.id.hex()
    return Outcome(name, session.task, rows, test, report, {}, {}, {}, model, fitted, probability, evaluation)


def _closed(outcome: Outcome, session: Session) -> Outcome:
    """Add what is known only after the close."""
    outcome.seconds = {name: round(value, 3) for name, value in session.seconds.items()}
    for (peer, kind, phase), size in session.ledger.bytes_sent.items():
        kinds = outcome.bytes_sent.setdefault(peer, {})
        kinds[kind] = kinds.get(kind, 0) + size
        outcome.bytes_by_phase[phase] = outcome.bytes_by_phase.get(phase, 0) + size
    return outcome
