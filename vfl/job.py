"""The main job at one party, as `run`, `predict` and the demo all do it: prepare, align, train, score."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from parties.agreement import Model
from parties.errors import LocalError, Refused
from parties.files import set_aside, write_json
from parties.message import Array
from parties.party_file import Party
from parties.session import TRAIN, Progress, Session, open_session
from parties.tables import Table, read_table
from psi.align import Alignment, align
from psi.identifiers import Identifiers, canonical
from psi.report import make_report
from vfl.exchange import Scales
from vfl.inputs import check_columns
from vfl.linear import VerticalLogisticRegression
from vfl.losses import Vector
from vfl.metrics import evaluate
from vfl.share import Scaling

log = logging.getLogger("colonnade")
Keep = Callable[[dict[str, Any]], None]
TRAINED = ("ledger.jsonl", "psi_report.json", "model.json", "rows.csv", "summary.json")
SCORED = ("score_ledger.jsonl", "score_psi_report.json")


@dataclass(frozen=True)
class Prepared:
    """Our input, checked: nothing has been sent yet."""

    table: Table
    ids: Identifiers

    @property
    def features(self) -> pd.DataFrame:
        """The features of the rows that take part, in the order of `ids.values`."""
        return self.table.features.iloc[self.ids.rows]

    @property
    def label(self) -> Vector | None:
        return None if self.table.label is None else self.table.label[self.ids.rows]


@dataclass
class Outcome:
    """What the job left at this party. `rows[i]` is the row of our table (from 0) that is the i-th common customer."""

    session: str
    task: str
    rows: NDArray[np.int64] = field(repr=False)
    test: NDArray[np.bool_] = field(repr=False)
    psi_report: dict[str, Any] = field(repr=False)
    seconds: dict[str, float]
    bytes_sent: dict[str, dict[str, int]]
    bytes_by_phase: dict[str, int]
    model: VerticalLogisticRegression
    scaler: StandardScaler | None = field(repr=False)
    probability: Vector | None = field(default=None, repr=False)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


def prepare(
    party: Party, *, path: Path | None = None, features: list[str] | None = None, train: bool = True
) -> Prepared:
    """Read and check our table. Raises LocalError, naming file, column and count."""
    choice, agreement = party.file.table, party.agreement
    names = list(choice.features) if features is None else features
    table = read_table(
        path or party.table_path,
        choice.id,
        names,
        label=choice.label if train else "",
        positive=choice.positive,
        separator=choice.separator,
    )
    ids = canonical(
        table.ids,
        agreement.identifiers.rule,
        duplicates=agreement.identifiers.duplicates,
        empty=agreement.identifiers.empty,
        column=choice.id,
        source=table.source,
    )
    if not ids.values:
        raise LocalError(f"{table.source}, column {choice.id!r}: no row has a usable id")
    if len(ids.values) > agreement.intersection.maximum_rows:
        raise LocalError(
            f"{table.source}: {len(ids.values)} rows, the agreement's cap is {agreement.intersection.maximum_rows}"
        )
    prepared = Prepared(table, ids)
    if train and not party.is_label_holder:
        check_columns(prepared.features.to_numpy(), names, agreement.model.minimum_rows_off_mode, table.source)
    agreed = agreement.party(party.name).columns
    if agreed and len(names) > agreed:
        raise Refused(f"{party.path}: {len(names)} columns; the agreement allows us {agreed}")
    if train and not agreement.model.standardise:
        Scales.of(agreement, len(ids.values)).features(prepared.features.to_numpy(), names)
    if train and len(ids.values) <= len(names):
        raise LocalError(f"{table.source}: {len(ids.values)} rows for {len(names)} columns; bring more rows")
    return prepared


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


def train(session: Session, prepared: Prepared, minimum: int = 0, keep: Keep = lambda report: None) -> Outcome:
    """The job in an open session. The same function at every party; the label holder's table has the label. `keep` gets
    the PSI report as soon as rows are known, whatever happens later.

    Reveals:
        To every party: what `align`, `VerticalLogisticRegression.fit` and its `decision_function` reveal; no more.
    """
    settings = session.agreement.model
    alignment, report = _align(session, prepared, minimum, keep)
    if not len(alignment.rows):
        raise Refused("no customer is common to all parties; are the ids of one kind, and the rule right?")
    features = prepared.features.iloc[alignment.rows].reset_index(drop=True)
    test = split(len(features), settings.test_fraction, settings.seed)
    label = None if prepared.label is None else prepared.label[alignment.rows]
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
    return _outcome(session, prepared, alignment, report, test, model, scaler, probability, metrics)


def score(
    session: Session,
    prepared: Prepared,
    model: VerticalLogisticRegression,
    minimum: int = 0,
    keep: Keep = lambda report: None,
) -> Outcome:
    """Align new rows and score them; the scores stay with the label holder.

    Reveals:
        To every party: what `align` and `VerticalLogisticRegression.decision_function` reveal; no more.
    """
    alignment, report = _align(session, prepared, minimum, keep)
    features = prepared.features.iloc[alignment.rows].reset_index(drop=True)
    scaler = None if model.scaler_ is None else _restored(model.scaler_)
    with session.phase("score"):
        both = model.predict_proba(_scaled(features, scaler), session=session)
    probability = None if both is None else both[:, 1]
    test = np.ones(len(features), bool)
    return _outcome(session, prepared, alignment, report, test, model, scaler, probability, {})


def split(rows: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which of the aligned rows are held out: the same at every party, from a shared seed; at least one row trains."""
    test = np.zeros(rows, bool)
    test[np.random.default_rng(seed).permutation(rows)[: min(round(rows * fraction), rows - 1)]] = True
    return test


def run(party: Party, progress: Progress, note: Callable[[str], None]) -> Outcome:
    """`colonnade run`: everything at one party, over the network. Writes ledger and PSI report, the caller the rest."""
    approval = party.approval
    prepared = prepare(party)
    policy = party.file.policy
    with _open(party, approval, TRAIN, TRAINED, progress, note) as (session, keep):
        outcome = train(session, prepared, policy.minimum_intersection, keep)
    return _closed(outcome, session)


def predict(
    party: Party, path: Path, share: Path, progress: Progress, note: Callable[[str], None]
) -> tuple[Outcome, Prepared]:
    """`colonnade predict`: align the rows of `path` with the others' new rows afresh, and score them."""
    model = VerticalLogisticRegression.load(share)
    if model.agreement_ != party.agreement.digest.hex() or model.party_ != party.name:
        raise Refused(f"{share} was trained under another agreement or by another party; train again")
    approval = party.approval
    prepared = prepare(party, path=path, features=list(model.feature_names_in_), train=False)
    task = f"score with {model.training_[:32]}"
    with _open(party, approval, task, SCORED, progress, note) as (session, keep):
        outcome = score(session, prepared, model, party.file.policy.minimum_to_score, keep)
    return _closed(outcome, session), prepared


@contextmanager
def _open(
    party: Party,
    approval: bytes,
    task: str,
    names: tuple[str, ...],
    progress: Progress,
    note: Callable[[str], None],
) -> Iterator[tuple[Session, Keep]]:
    """A session that writes to the party's folder. What an earlier run left is set aside once this one has begun."""
    ledger, report = party.output / names[0], party.output / names[1]
    unopened = ledger.with_name(f"unopened_{ledger.name}")
    with open_session(
        party.identity,
        party.agreement,
        approval=approval,
        task=task,
        ledger_path=unopened,
        forbidden=frozenset(party.file.policy.forbid),
        listen=party.file.listen or None,
        progress=progress,
        log=note,
    ) as session:
        set_aside(party.output, names)
        unopened.replace(ledger)
        yield session, lambda value: write_json(report, value)


def _align(session: Session, prepared: Prepared, minimum: int, keep: Keep) -> tuple[Alignment, dict[str, Any]]:
    with session.phase("align"):
        alignment = align(session, prepared.ids.values, minimum=minimum)
        report = make_report(session, alignment, prepared.ids.counts)
        keep(report)
    return alignment, report


def _outcome(
    session: Session,
    prepared: Prepared,
    alignment: Alignment,
    report: dict[str, Any],
    test: NDArray[np.bool_],
    model: VerticalLogisticRegression,
    scaler: StandardScaler | None,
    probability: Vector | None,
    metrics: dict[str, dict[str, float]],
) -> Outcome:
    rows: Array = prepared.ids.rows[alignment.rows]
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
