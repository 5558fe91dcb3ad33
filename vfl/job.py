"""The main job at one party, as `run`, `predict` and the demo all do it: prepare, align, train, score."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from parties.agreement import Agreement
from parties.errors import LocalError, Refused
from parties.party_file import Party
from parties.session import TRAIN, Progress, Session
from parties.tables import Source
from psi import job as psi_job
from psi.report import Report
from psi.verify import load_report
from vfl.checkpoint import read_checkpoint, write_checkpoint
from vfl.estimator import VerticalLinearModel
from vfl.evaluation import Evaluation
from vfl.information import measure
from vfl.job_input import Prepared, fitted_on, prepare
from vfl.losses import Matrix, Vector
from vfl.neural_estimator import VerticalMLP
from vfl.own_code import own_module
from vfl.preparation import FittedColumns, FittedNumber
from vfl.resume import EVERY, OPEN_EVERY, Checkpoints
from vfl.search import Outcome as Searched
from vfl.search import search
from vfl.task import estimator, evaluate, load_share, outputs_for, scores

WRITTEN = ("model.json", "information.json", "report.html")
TRAINED = (*psi_job.ALIGNED, *WRITTEN)
RESUMED = ("resumed_ledger.jsonl", *WRITTEN, "rows.csv", "summary.json")
ALIGNMENT = "alignment.checkpoint"
SCORED = tuple(f"score_{name}" for name in psi_job.EVIDENCE)


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
    model: VerticalLinearModel | VerticalMLP
    fitted: FittedColumns = field(repr=False)
    scores: Matrix | Vector | None = field(default=None, repr=False)
    evaluation: Evaluation | None = field(default=None, repr=False)
    searched: Searched | None = field(default=None, repr=False)
    information: dict[str, Any] = field(default_factory=dict, repr=False)


def train(
    session: Session,
    prepared: Prepared,
    minimum: int = 0,
    house: psi_job.House | None = None,
    folder: Path | None = None,
) -> Outcome:
    """The job in an open session. The same function at every party; the label holder's table has the label. `house`
    keeps the evidence of the intersection as soon as rows are known, whatever happens later; `folder` keeps what
    `resume` needs.

    The joint model is compared with the label holder alone, and with `leave_out` in the agreement with itself without
    each feature holder: the difference tells the label holder what that one's embedding of each held-out row is.

    Reveals:
        To every party: what `align`, `measure` (with [information]), `VerticalLinearModel.fit` and its
        `decision_function` reveal; no more.
    """
    common, report = _common(session, prepared, minimum, house)
    if not len(common):
        raise Refused("no customer is common to all parties; are the ids of one kind, and the rule right?")
    told = _information(session, prepared, common)
    if folder is None or session.agreement.search is not None:
        return _train_on(session, prepared, common, report, None, False, told)
    job, name = _job(session.agreement, session.name, prepared), session.id.hex()
    write_checkpoint(folder / ALIGNMENT, job, {"session": name, "information": told}, {"rows": common.astype("<i8")})
    return _train_on(session, prepared, common, report, _checkpoints(folder, session.agreement, job, name), False, told)


def _information(session: Session, prepared: Prepared, common: NDArray[np.int64]) -> dict[str, Any]:
    """[information] of the agreement, on the rows to train on."""
    settings = session.agreement.model
    rows = common[~split(len(common), settings.test_fraction, settings.seed)]
    label = None if prepared.label is None else prepared.label[rows]
    return measure(session, prepared.features.iloc[rows], prepared.plan, label)


def _job(agreement: Agreement, party: str, prepared: Prepared) -> bytes:
    """What an interrupted training was: the agreement, who we are, our own columns and label, our own module's code."""
    plan = msgspec.json.encode([list(prepared.features), prepared.plan], order="sorted")
    whose = hashlib.sha256(party.encode()).digest()
    digest = hashlib.sha256(b"colonnade/job/2" + agreement.digest + whose + hashlib.sha256(plan).digest())
    for values in (
        *(prepared.features[name] for name in prepared.features),
        *map(pd.Series, (prepared.label, prepared.weights)),
    ):
        digest.update(pd.util.hash_pandas_object(values, index=False).to_numpy().tobytes())
    digest.update(b"" if prepared.own is None else prepared.own.digest)
    return digest.digest()


def _checkpoints(folder: Path, agreement: Agreement, job: bytes, session: str) -> Checkpoints:
    """Of a job on the rows that a session found. In open mode the leak meter's state is large, and steps are quick."""
    of = hashlib.sha256(job + bytes.fromhex(session)).digest()
    return Checkpoints(folder, of, OPEN_EVERY if agreement.network.mode == "open" else EVERY)


def _train_on(
    session: Session,
    prepared: Prepared,
    common: NDArray[np.int64],
    report: Report,
    checkpoints: Checkpoints | None,
    resume: bool,
    told: dict[str, Any],
) -> Outcome:
    """Train, score and evaluate on rows that are known."""
    settings = session.agreement.model
    features = prepared.features.iloc[common].reset_index(drop=True)
    test = split(len(features), settings.test_fraction, settings.seed)
    label = None if prepared.label is None else prepared.label[common]
    with session.phase("train"):
        fitted = fitted_on(features[~test], prepared.plan, settings, session.is_label_holder)
        columns = fitted.transform(features)
        mine, target = columns[~test], None if label is None else label[~test]
        searched: Searched | None = None

        def made() -> VerticalLinearModel | VerticalMLP:
            new = estimator(session.agreement)
            if (own := prepared.own) is not None:
                new.set_params(**own.modules(session.agreement, mine.shape[1], outputs_for(settings, target)))
            return new

        if (grid := session.agreement.search) is not None:
            searched = search(session, made, mine, target, grid, settings.seed)
            model = searched.model
        else:
            model = made()
            weights = None if prepared.weights is None else prepared.weights[common][~test]
            model.fit(mine, target, session=session, sample_weight=weights, checkpoints=checkpoints, resume=resume)
    found, evaluation = None, None
    if test.any():
        with session.phase("score"):
            found = scores(model, columns[test], session)
            without = _left_out(session, model, columns[test]) if settings.leave_out else {}
        if found is not None and label is not None:
            evaluation = evaluate(model, label[test], found, columns[test].to_numpy(), without)
    outcome = _outcome(session, prepared, common, report, test, model, fitted, found, evaluation, searched)
    outcome.information = told
    return outcome


def _left_out(
    session: Session, model: VerticalLinearModel | VerticalMLP, columns: pd.DataFrame
) -> dict[str, Matrix | Vector]:
    """At the label holder, scores of the joint model in which one feature holder's prepared columns are all zero.

    Reveals:
        To the label holder: every feature holder's own embedding of these rows, as a difference.
    """
    found = {}
    for party in session.agreement.ring[1:]:
        mine = columns * 0 if session.name == party.name else columns
        told = scores(model, mine, session)
        if told is not None:
            found[f"without {party.name}"] = told
    return found


def score(
    session: Session,
    prepared: Prepared,
    model: VerticalLinearModel | VerticalMLP,
    minimum: int = 0,
    house: psi_job.House | None = None,
) -> Outcome:
    """Align new rows and score them; the scores stay with the label holder.

    Reveals:
        To every party: what `align` and `VerticalLinearModel.decision_function` reveal; no more.
    """
    common, report = _common(session, prepared, minimum, house)
    columns = prepared.fitted.transform(prepared.features.iloc[common].reset_index(drop=True))
    with session.phase("score"):
        found = scores(model, columns, session)
    test = np.ones(len(columns), bool)
    return _outcome(session, prepared, common, report, test, model, prepared.fitted, found, None, None)


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
        outcome = train(session, prepared, party.file.policy.minimum_intersection, house, party.output)
    (party.output / ALIGNMENT).unlink(missing_ok=True)
    return _closed(outcome, session)


def resume(party: Party, progress: Progress, note: Callable[[str], None]) -> Outcome:
    """`colonnade run --resume`: go on with a training that stopped, on the rows that its intersection found. Every
    party does so; what it needs is in our output folder.

    Raises:
        LocalError: there is nothing to go on with, or our table or the agreement has changed.
    """
    approval, house = party.approval, psi_job.House(party, "resumed_", spends=False)
    prepared = prepare(party)
    try:
        found = read_checkpoint(party.output / ALIGNMENT, _job(party.agreement, party.name, prepared))
    except LocalError:
        changed = "our table, [prepare] or the agreement has changed since"
        raise LocalError(f"{party.output}: {changed}; run without --resume") from None
    if found is None:
        raise LocalError(f"{party.output} holds no training that stopped; run without --resume")
    report = load_report(party.output / "psi_report.json")
    if report.session != found.facts["session"]:
        raise LocalError(f"{party.output / 'psi_report.json'} is of another run; run without --resume")
    task = f"resume {report.session[:32]}"
    with psi_job.meeting(house, approval, task, RESUMED, progress, note) as session:
        checkpoints = _checkpoints(party.output, party.agreement, found.job, report.session)
        rows, told = found.arrays["rows"], found.facts["information"]
        outcome = _train_on(session, prepared, rows, report, checkpoints, True, told)
    (party.output / ALIGNMENT).unlink(missing_ok=True)
    return _closed(outcome, session)


def predict(
    party: Party, source: Source, share: Path, progress: Progress, note: Callable[[str], None]
) -> tuple[Outcome, Prepared]:
    """`colonnade predict`: align the rows of `source` with the others' new rows afresh, and score them."""
    if not share.exists() and (party.output / "earlier").exists():
        raise LocalError(
            f"{share} does not exist; a run that was begun since has set it aside in {party.output}/earlier"
        )
    model = load_share(share, own_module(party))
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
    model: VerticalLinearModel | VerticalMLP,
    fitted: FittedColumns,
    found: Matrix | Vector | None,
    evaluation: Evaluation | None,
    searched: Searched | None,
) -> Outcome:
    rows, name = prepared.ids.rows[common], session.id.hex()
    return Outcome(name, session.task, rows, test, report, {}, {}, {}, model, fitted, found, evaluation, searched)


def _closed(outcome: Outcome, session: Session) -> Outcome:
    """Add what is known only after the close."""
    outcome.seconds = {name: round(value, 3) for name, value in session.seconds.items()}
    for (peer, kind, phase), size in session.ledger.bytes_sent.items():
        kinds = outcome.bytes_sent.setdefault(peer, {})
        kinds[kind] = kinds.get(kind, 0) + size
        outcome.bytes_by_phase[phase] = outcome.bytes_by_phase.get(phase, 0) + size
    return outcome
