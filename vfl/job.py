"""The main job at one party, as `run`, `predict` and the demo all do it: prepare, align, train, score."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from parties.agreement import Model
from parties.errors import LocalError, Refused
from parties.party_file import Party, TableChoice
from parties.session import TRAIN, Progress, Session
from parties.tables import Source, Table
from psi import job as psi_job
from psi.report import Report
from vfl.exchange import Scales
from vfl.inputs import check_columns
from vfl.linear import VerticalLogisticRegression
from vfl.losses import Vector
from vfl.metrics import evaluate
from vfl.share import Scaling

log = logging.getLogger("colonnade")
TRAINED = (*psi_job.ALIGNED, "model.json")
SCORED = tuple(f"score_{name}" for name in psi_job.EVIDENCE)


@dataclass(frozen=True)
class Prepared(psi_job.Prepared):
    """Our input, checked: nothing has been sent yet. Features (DataFrame, float64) and label are those of the rows that
    take part, in the order of `ids.rows`."""

    features: pd.DataFrame = field(repr=False)
    label: Vector | None = field(repr=False)


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
    scaler: StandardScaler | None = field(repr=False)
    probability: Vector | None = field(default=None, repr=False)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


def prepare(
    party: Party,
    *,
    source: Source | None = None,
    features: list[str] | None = None,
    train: bool = True,
    look: Callable[[Table], None] = lambda table: None,
) -> Prepared:
    """Read and check our table. Raises LocalError, naming file, column and count."""
    choice, agreement = party.file.table, party.agreement
    names = list(choice.features) if features is None else features
    if not names:
        raise LocalError(f"{party.path}: name our columns as features in [table]; 'colonnade align' needs none")
    if train and party.is_label_holder and not choice.label:
        raise LocalError(f"{party.path}: the label holder names its label in [table]; 'colonnade align' needs none")
    agreed = agreement.party(party.name).columns
    if agreed and len(names) > agreed:
        raise Refused(f"{party.path}: {len(names)} columns; the agreement allows us {agreed}")
    if agreement.intersection.result != "rows":
        raise Refused(f'the agreement reveals only {agreement.intersection.result!r}: a model needs result = "rows"')
    read = psi_job.prepare(party, source=source, features=names, label=choice.label if train else "", look=look)
    prepared = Prepared(read.table, read.ids, *_taking_part(read, choice))
    if train and not party.is_label_holder:
        minimum = agreement.model.minimum_rows_off_mode
        check_columns(prepared.features.to_numpy(), names, minimum, read.table.source)
    if train and not agreement.model.standardise:
        Scales.of(agreement, len(prepared.ids)).features(prepared.features.to_numpy(), names)
    if train and len(prepared.ids) <= len(names):
        raise LocalError(f"{read.table.source}: {len(prepared.ids)} rows for {len(names)} columns; bring more rows")
    return prepared


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
        scaler = StandardScaler().fit(features[~test].to_numpy()) if settings.standardise else None
        scaled = _scaled(features, scaler)
        model = estimator(settings)
        model.fit(scaled[~test], None if label is None else label[~test], session=session)
    probability, metrics = None, {}
    if test.any():
        with session.phase("score"):
            both = model.predict_proba(scaled[test], session=session)
        if both is not None and label is not None:
            probability = both[:, 1]
            alone = model.alone_.predict_proba(scaled[test].to_numpy())[:, 1]
            metrics = {"joint": evaluate(label[test], probability), "alone": evaluate(label[test], alone)}
    return _outcome(session, prepared, common, report, test, model, scaler, probability, metrics)


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
    features = prepared.features.iloc[common].reset_index(drop=True)
    scaler = None if model.scaler_ is None else _restored(model.scaler_)
    with session.phase("score"):
        both = model.predict_proba(_scaled(features, scaler), session=session)
    probability = None if both is None else both[:, 1]
    test = np.ones(len(features), bool)
    return _outcome(session, prepared, common, report, test, model, scaler, probability, {})


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
    prepared = prepare(party, source=source, features=list(model.feature_names_in_), train=False)
    house.check_budget(prepared.ids)
    task = f"score with {model.training_[:32]}"
    with psi_job.meeting(house, approval, task, SCORED, progress, note) as session:
        outcome = score(session, prepared, model, party.file.policy.minimum_to_score, house)
    return _closed(outcome, session), prepared


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
    scaler: StandardScaler | None,
    probability: Vector | None,
    metrics: dict[str, dict[str, float]],
) -> Outcome:
    rows = prepared.ids.rows[common]
    return Outcome(session.id.hex(), session.task, rows, test, report, {}, {}, {}, model, scaler, probability, metrics)


def _closed(outcome: Outcome, session: Session) -> Outcome:
    """Add what is known only after the close."""
    outcome.seconds = {name: round(value, 3) for name, value in session.seconds.items()}
    for (peer, kind, phase), size in session.ledger.bytes_sent.items():
        kinds = outcome.bytes_sent.setdefault(peer, {})
        kinds[kind] = kinds.get(kind, 0) + size
        outcome.bytes_by_phase[phase] = outcome.bytes_by_phase.get(phase, 0) + size
    return outcome


def _scaled(features: pd.DataFrame, scaler: StandardScaler | None) -> pd.DataFrame:
    if scaler is None:
        return features
    return pd.DataFrame(scaler.transform(features.to_numpy()), columns=features.columns)


def _restored(saved: Scaling) -> StandardScaler:
    scaler = StandardScaler()
    scaler.mean_, scaler.scale_ = np.array(saved.mean), np.array(saved.scale)
    scaler.n_features_in_ = len(scaler.mean_)
    return scaler
