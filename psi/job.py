"""The intersection at one party, from its own file to its evidence: what every command that meets others does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError, Refused
from parties.files import Scratch, set_aside, write_whole
from parties.parsing import parse_json
from parties.party_file import Party
from parties.sealing import seal
from parties.session import Progress, Session, open_session
from parties.tables import Source, Table, read_table
from parties.workers import Workers
from psi import html
from psi.align import Alignment, align
from psi.budget import Budget, Use, fingerprints
from psi.escrow import ESCROW, opening, sealed_escrow
from psi.exchange import judge_of
from psi.identifiers import CHUNK, Identifiers, canonical
from psi.report import SELFTEST, Report, SelfTest, as_file, countersigned, make_report

ALIGN = "align"
BUDGET = "budget.sqlite"
EVIDENCE = ("ledger.jsonl", "psi_report.json", "psi_report.html", "psi_opening.bin", "psi_escrow.bin")
ALIGNED = (*EVIDENCE, "rows.csv", "summary.json")


@dataclass(frozen=True)
class Prepared:
    """Our input, checked: nothing has been sent yet."""

    table: Table
    ids: Identifiers


def prepare(
    party: Party,
    *,
    source: Source | None = None,
    features: Sequence[str] = (),
    label: str = "",
    categories: Collection[str] = (),
    gaps: Collection[str] = (),
    look: Callable[[Table], None] = lambda table: None,
) -> Prepared:
    """Read and check our table: its id columns, and of the others those that are named; `categories` and `gaps` as
    `read_table` takes them. `look` sees what was read before its ids are judged.

    Raises:
        LocalError: names file, column and count. Refused: our budget for a peer is used up.
    """
    choice, agreement = party.file.table, party.agreement
    _check_forbidden(party)
    table = read_table(
        source or party.source,
        list(party.id_columns.values()),
        features,
        label=label,
        positive=choice.positive,
        categories=categories,
        gaps=gaps,
        scratch=Scratch(party.output if party.output.is_dir() else None),
    )
    look(table)
    ids = canonical(
        {name: table.ids[column] for name, column in party.id_columns.items()},
        agreement.identifiers,
        duplicates=choice.duplicates,
        empty=choice.empty,
        names=party.id_columns,
        source=table.source,
    )
    if not len(ids):
        raise LocalError(f"{table.source}, column {choice.id!r}: no row has a usable id")
    if len(ids) > agreement.intersection.maximum_rows:
        raise LocalError(
            f"{table.source}: {len(ids)} rows, the agreement's cap is {agreement.intersection.maximum_rows}"
        )
    return Prepared(table, ids)


def _check_forbidden(party: Party) -> None:
    """Raises Refused for a policy under which no intersection can run, before anything is sent."""
    ring = party.agreement.ring
    judge = ring[judge_of(party.agreement.intersection.result, len(ring))].name
    needed = {"masked"} | ({"aggregate"} if party.name == judge else set())
    for one in sorted(needed & set(party.file.policy.forbid)):
        what = "the number of common rows, which we tell the others" if one == "aggregate" else "every masked id"
        raise Refused(f"{party.path}: [policy] forbids {one} messages, hence {what}; take it out of forbid")


class House:
    """What a party does around an intersection on its own premises: budget, evidence, escrow. `rehearsal` is the last
    self-test under its agreement, if any."""

    def __init__(self, party: Party, prefix: str = "", *, spends: bool = True) -> None:
        """Raises LocalError for what would otherwise go wrong once rows are known."""
        self.party, self._prefix = party, prefix
        self.rehearsal = self._last_rehearsal()
        self.escrow = party.escrow
        if self.escrow is not None:
            seal(self.escrow, b"", ESCROW)
        self._limits = party.file.policy.budget if spends else None
        self._offered: tuple[Identifiers, NDArray[np.uint64]] | None = None

    def path(self, name: str) -> Path:
        """Where a piece of evidence goes."""
        return self.party.output / f"{self._prefix}{name}"

    def check_budget(self, ids: Identifiers) -> list[Use]:
        """What the budget says before anything is sent; makes no file. Raises Refused."""
        if self._limits is None:
            return []
        kept = self.party.output / BUDGET
        with tempfile.TemporaryDirectory() as empty:
            path = kept if kept.exists() else Path(empty) / BUDGET
            budget = Budget(path, self.party.identity, self._limits)
            return budget.check(self._peers(), self._fingerprints(budget, ids))

    def spend(self, session: Session, ids: Identifiers) -> list[Use]:
        """Record this run with every peer, before a point is sent. Raises Refused."""
        if self._limits is None:
            return []
        budget = Budget(self.party.output / BUDGET, self.party.identity, self._limits)
        return budget.spend(self._peers(), session.id, session.task, self._fingerprints(budget, ids))

    def _fingerprints(self, budget: Budget, ids: Identifiers) -> NDArray[np.uint64]:
        """Once for the check and the run: a microsecond an id."""
        if self._offered is None or self._offered[0] is not ids:
            self._offered = ids, offered(budget.key, ids)
        return self._offered[1]

    def _peers(self) -> dict[str, bytes]:
        ring = self.party.agreement.ring
        return {one.name: one.identity.key_id for one in ring if one.name != self.party.name}

    def _last_rehearsal(self) -> SelfTest | None:
        path = self.party.output / "selftest.json"
        if not path.exists():
            return None
        kept: dict[str, SelfTest] = parse_json(path, dict[str, SelfTest], "the self-test's result")
        return kept.get(self.party.agreement.digest.hex())

    def keep(self, report: Report, alignment: Alignment) -> None:
        """Write what opens our commitment, the escrow if our policy says so, and the report."""
        secrets = alignment.secrets
        if secrets is None:
            raise ValueError("this alignment's secrets are gone")
        write_whole(self.path("psi_opening.bin"), opening(secrets), mode=0o600)
        if self.escrow is not None:
            sealed = sealed_escrow(self.escrow, bytes.fromhex(report.session), alignment)
            write_whole(self.path("psi_escrow.bin"), sealed, mode=0o600)
        self.write_report(report)

    def write_report(self, report: Report) -> None:
        """The report, and the page made from it."""
        write_whole(self.path("psi_report.json"), as_file(report))
        write_whole(self.path("psi_report.html"), html.render(report).encode())


def offered(key: bytes, ids: Identifiers) -> NDArray[np.uint64]:
    """Fingerprints of all keys of all rows that take part."""

    def values() -> Iterator[bytes]:
        for one in ids.keys:
            for start in range(0, len(ids.rows), CHUNK):
                taken = one.take(ids.rows[start : start + CHUNK])
                yield from (one.type + value for value in taken if value is not None)

    return fingerprints(key, values())


def intersect(
    session: Session, prepared: Prepared, minimum: int = 0, house: House | None = None
) -> tuple[Alignment, Report]:
    """Align, then report; with `house`, spend from its budget before and keep the evidence as soon as it is there.

    Reveals:
        To every party: what `align` and `countersigned` reveal; no more.
    """
    ids = prepared.ids
    with session.phase("align"):
        spent = house.spend(session, ids) if house else []
        alignment = align(session, ids, minimum=minimum)
    with session.phase("report"):
        report = make_report(
            session,
            alignment,
            ids,
            columns=house.party.id_columns if house else None,
            minimum=minimum,
            escrow=house.escrow.fingerprint if house and house.escrow else "",
            budget=spent,
            selftest=house.rehearsal if house and session.task != SELFTEST else None,
        )
        if house:  # before the peers sign: whoever leaves now takes no evidence with it
            house.keep(report, alignment)
        report = countersigned(session, report)
        if house:
            house.write_report(report)
    return replace(alignment, secrets=None), report


@contextmanager
def meeting(
    house: House, approval: bytes, task: str, names: Sequence[str], progress: Progress, note: Callable[[str], None]
) -> Iterator[Session]:
    """A session that writes its ledger into the party's folder. What an earlier run left (`names`) is set aside once
    this one has begun."""
    party, ledger = house.party, house.path("ledger.jsonl")
    unopened = ledger.with_name(f"unopened_{ledger.name}")
    workers = Workers(party.file.workers)
    try:
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
            session.workers, session.scratch = workers, Scratch(party.output)
            yield session
    finally:
        workers.close()


@dataclass(frozen=True)
class Outcome:
    """What `colonnade align` leaves: the report; which rows of our table are common, None where we may not know."""

    report: Report
    rows: NDArray[np.int64] | None


def run(party: Party, progress: Progress, note: Callable[[str], None]) -> Outcome:
    """`colonnade align`: the intersection alone, at one party, over the network."""
    approval = party.approval
    house = House(party)
    prepared = prepare(party)
    house.check_budget(prepared.ids)
    with meeting(house, approval, ALIGN, ALIGNED, progress, note) as session:
        alignment, report = intersect(session, prepared, party.file.policy.minimum_intersection, house)
    rows = None if alignment.rows is None else prepared.ids.rows[alignment.rows]
    if rows is not None:
        keys = [step.key for step in report.steps for _ in range(step.size)] if len(report.steps) > 1 else []
        write_whole(house.path("rows.csv"), _listed(rows, keys).encode(), mode=0o600)
    return Outcome(report, rows)


def _listed(rows: NDArray[np.int64], keys: Sequence[str]) -> str:
    """CSV: our common rows and, of a cascade, the key under which each was found."""
    if not keys:
        return "row\n" + "".join(f"{row}\n" for row in rows.tolist())
    quoted = {key: '"' + key.replace('"', '""') + '"' for key in set(keys)}
    return "row,key\n" + "".join(f"{row},{quoted[key]}\n" for row, key in zip(rows.tolist(), keys, strict=True))
