"""The horizontal job at one party, as `colonnade run` does it: read our rows, meet the others, train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parties.agreement import Agreement, Columns
from parties.errors import LocalError, Refused
from parties.files import set_aside
from parties.horizontal import Horizontal
from parties.party_file import Party
from parties.session import Progress, Session, open_session
from parties.tables import Source, read_table
from vfl.checkpoint import Bound
from vfl.horizontal.categories import Categories, codes
from vfl.horizontal.client import former_session, take_part
from vfl.horizontal.coordinator import coordinate
from vfl.horizontal.layout import shared, with_shared
from vfl.horizontal.models import Model
from vfl.horizontal.outcome import Outcome
from vfl.horizontal.own import own_model
from vfl.horizontal.privacy_budget import PrivacyBudget
from vfl.horizontal.rounds import checked
from vfl.horizontal.trainer import Data, describe

CHECKPOINTS = ("coordinator.checkpoint", "client.checkpoint")
LEFT = ("ledger.jsonl", "model.json", "weights.npz", "model.skops", "summary.json", "report.html")
TASK = "train"


@dataclass
class Finished:
    """What the job left at this party."""

    session: str
    outcome: Outcome
    missing: dict[str, str]
    seconds: dict[str, float]
    bytes_sent: dict[str, dict[str, int]]
    data: Data | None = field(repr=False)
    model: Model | None = field(default=None, repr=False)


def agreed(agreement: Agreement) -> tuple[Horizontal, Columns]:
    """The plan and the columns of a horizontal agreement. Raises LocalError for another."""
    if agreement.horizontal is None or agreement.columns is None:
        raise LocalError("this agreement is not of a horizontal job")
    return agreement.horizontal, agreement.columns


def prepare(party: Party) -> Data | None:
    """Our rows, checked against the agreement; None at a coordinator that has none. Nothing has been sent yet.

    Raises:
        LocalError: names file, column and count, or what of the agreement cannot be. Refused: too few clients, or rows.
    """
    plan, columns = agreed(party.agreement)
    checked(plan, len(party.agreement.clients), party.agreement.job.coordinator_trains)
    if not party.trains:
        return None
    choice = party.file.table
    data = read_rows(party.source, plan, columns, choice.columns, choice.units, choice.categories)
    if plan.model != "own" and (short := describe(plan, data, None).short):
        raise Refused(f"{party.source} has fewer {short} than the agreed minimum; agree on less, or stay out")
    return data


def read_rows(
    source: Source,
    plan: Horizontal,
    columns: Columns,
    names: dict[str, str],
    units: dict[str, str],
    categories: Categories | None = None,
) -> Data:
    """The agreed columns of a table; `names` are ours where they differ, `units` those in which we measure,
    `categories` those that may occur (None: those that do).

    Raises:
        LocalError: names file, column and count.
    """
    ours = {name: names.get(name, name) for name in (*columns.features, columns.label)}
    label = ours[columns.label]
    classified = plan.model == "logistic" or (plan.model == "own" and bool(plan.classes))
    words = [ours[name] for name in columns.categories] + [label] * classified
    table = read_table(source, [], [*ours.values()], categories=words, least=0)
    y = table.features[label]
    if categories is None:
        categories = {name: sorted({one.strip() for one in table.features[ours[name]]}) for name in columns.categories}

    def numbers(name: str) -> NDArray[np.float64]:
        values: NDArray[Any] = table.features[ours[name]]
        if name not in categories:
            return values
        return codes(values, categories[name], f"{table.source}, column {ours[name]!r}")

    return Data(
        np.column_stack([numbers(name) for name in columns.features]),
        _classes(table.source, label, y, plan.classes) if classified else y,
        columns.features,
        plan.classes,
        columns.units | units,
        categories=categories,
    )


def _classes(source: str, column: str, texts: NDArray[Any], classes: tuple[int | str, ...]) -> NDArray[Any]:
    """The labels as the agreement lists them. Raises LocalError that counts those it does not list."""
    known = {str(one): place for place, one in enumerate(classes)}
    places = np.array([known.get(text.strip(), -1) for text in texts], np.int64)
    if strange := int(np.count_nonzero(places < 0)):
        raise LocalError(
            f"{source}, column {column!r}: {strange} labels are none of the {len(classes)} agreed classes; correct them"
        )
    return np.asarray(classes)[places]


def train(
    session: Session,
    data: Data | None,
    folder: Path | None = None,
    budget: PrivacyBudget | None = None,
    model: Model | None = None,
) -> Outcome:
    """The job in an open session, the same function at every party. `folder` keeps checkpoints, `budget` what privacy
    has cost. model: our own one, where own ones are agreed; it has the weights in the end, the coordinator's also gives
    those to begin with.

    Reveals:
        To every party: what `coordinate` and `take_part` reveal; no more.
    Raises:
        LocalError: our noise is to pay for privacy, and nobody counts it. What both roles raise.
    """
    agreement = session.agreement
    plan, _ = agreed(agreement)
    identities = {name: agreement.party(name).identity for name in agreement.clients if name in session.approvals}
    coordinator = agreement.ring[0].name
    noisy = session.name == coordinator if plan.privacy.noise == "central" else data is not None
    if plan.private and noisy and budget is None:
        raise LocalError("privacy needs the file that keeps what earlier jobs have cost; give its PrivacyBudget")
    common: dict[str, Any] = {
        "tick": session.tick,
        "progress": session.progress,
        "folder": folder,
        "agreement": agreement.digest,
        "budget": budget,
        "purpose": agreement.purpose,
    }
    with session.phase("train"):
        if session.name != coordinator:
            return take_part(
                session.channels[coordinator], session.me, identities, session.id, plan, data, model=model, **common
            )
        start = None if model is None else model.get()[shared(plan, model)]
        common |= {"own": data, "model": None if data is None else model, "start": start}
        common["rejoined"] = partial(session.rejoined, plan.clients.deadline)
        outcome = coordinate(session.channels, session.me, identities, session.id, plan, **common)
    if model is not None and data is None:
        model.set(with_shared(plan, model, model.get(), outcome.weights))
    session.leave_out(outcome.gone)
    return outcome


def run(party: Party, progress: Progress, note: Callable[[str], None], *, resume: bool = False) -> Finished:
    """`colonnade run`: everything at one party, over the network. Writes ledger and checkpoints, the caller the rest.

    Without `resume` what an earlier run left is set aside, its checkpoints too.

    Raises:
        LocalError: our table or our folder; nothing was sent. Refused, PeerLost, PeerAborted, ProtocolViolation.
    """
    approval, data, folder, former = party.approval, prepare(party), party.output, b""
    model = own_model(party, data)
    if resume and not any((folder / name).exists() for name in CHECKPOINTS):
        note(f"{folder} has no checkpoint: we begin anew, or where the coordinator is")
    elif resume:
        former = former_session(folder, Bound(agreement=party.agreement.digest, party=party.name))
    unopened = folder / "unopened_ledger.jsonl"
    with open_session(
        party.identity,
        party.agreement,
        approval=approval,
        task=TASK,
        ledger_path=unopened,
        forbidden=frozenset(party.file.policy.forbid),
        listen=party.file.listen or None,
        former=former,
        progress=progress,
        log=note,
    ) as session:
        set_aside(folder, LEFT if resume else (*LEFT, *CHECKPOINTS))  # not sooner: a job that goes on refuses us
        unopened.replace(folder / "ledger.jsonl")
        outcome = train(session, data, folder, PrivacyBudget(budget_path(party), party.identity), model)
    return _finished(session, outcome, data, model)


def budget_path(party: Party) -> Path:
    """Of what privacy has cost: beside the key, one for all jobs of that key, whatever their output folders."""
    return (party.path.parent / Path(party.file.key).expanduser()).with_suffix(".privacy.json")


def _finished(session: Session, outcome: Outcome, data: Data | None, model: Model | None) -> Finished:
    """What is known after the close."""
    sent: dict[str, dict[str, int]] = {}
    for (peer, kind, _), size in session.ledger.bytes_sent.items():
        kinds = sent.setdefault(peer, {})
        kinds[kind] = kinds.get(kind, 0) + size
    seconds = {name: round(value, 3) for name, value in session.seconds.items()}
    missing = {name: error.kind for name, error in session.missing.items()}
    return Finished(session.id.hex(), outcome, missing, seconds, sent, data, model)
