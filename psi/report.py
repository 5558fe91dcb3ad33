"""The validation report: what one party saw of the intersection, signed. It holds no id, no row and no secret."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from parties.agreement import Agreement, Identifiers
from parties.session import Session
from psi.align import Alignment
from psi.exchange import CANARIES, Flow


class PartyFacts(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A party as the report knows it; `approval` is its signature under the agreement's digest, in hex."""

    role: str
    public_key: str
    fingerprint: str
    approval: str


class Counts(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Rows of our table, by what became of their ids."""

    read: int
    empty: int
    invalid: int
    duplicate: int
    kept: int


class LedgerPoint(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How long our ledger was when the report was written, and the hash of its last line."""

    entries: int
    head: str


class Terms(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What the agreement says about the intersection."""

    title: str
    suite: str
    identifiers: Identifiers
    minimum: int
    minimum_to_score: int
    decoys: int

    @classmethod
    def of(cls, agreement: Agreement) -> Terms:
        agreed = agreement.intersection
        return cls(
            title=agreement.title,
            suite=agreed.suite,
            identifiers=agreement.identifiers,
            minimum=agreed.minimum,
            minimum_to_score=agreed.minimum_to_score,
            decoys=agreed.decoys,
        )


class Report(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The file's fields. `signature` is Ed25519 over all the others, see `canonical`."""

    colonnade_psi_report: Literal[1]
    party: str
    time: str
    agreement: str
    session: str
    task: str
    parties: dict[str, PartyFacts]
    terms: Terms
    our_rows: Counts
    set_sizes: dict[str, int]
    canaries: int
    intersection: int
    flows: list[Flow]
    checks: list[str]
    ledger: LedgerPoint
    signature: str = ""


def make_report(session: Session, alignment: Alignment, counts: Mapping[str, int]) -> dict[str, Any]:
    """The signed report as plain values, ready for JSON. `counts` are those of the identifiers (read, empty, ...)."""
    agreement = session.agreement
    report = Report(
        colonnade_psi_report=1,
        party=session.name,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        agreement=agreement.digest.hex(),
        session=session.id.hex(),
        task=session.task,
        parties=party_facts(agreement, session.approvals),
        terms=Terms.of(agreement),
        our_rows=Counts(**counts),
        set_sizes=alignment.set_sizes,
        canaries=CANARIES,
        intersection=len(alignment.rows),
        flows=list(alignment.flows),
        checks=list(alignment.checks),
        ledger=LedgerPoint(entries=session.ledger.entries, head=session.ledger.head),
    )
    plain: dict[str, Any] = msgspec.to_builtins(report)
    return plain | {"signature": session.me.sign("psi-report", canonical(plain)).hex()}


def party_facts(agreement: Agreement, approvals: Mapping[str, bytes]) -> dict[str, PartyFacts]:
    """The parties of an agreement in ring order."""
    return {
        party.name: PartyFacts(
            role=party.role,
            public_key=party.public_key,
            fingerprint=party.identity.fingerprint,
            approval=approvals[party.name].hex(),
        )
        for party in agreement.ring
    }


def canonical(report: Mapping[str, Any]) -> bytes:
    """What is signed: the report's plain values without the signature, keys sorted, no spaces."""
    unsigned = {key: value for key, value in report.items() if key != "signature"}
    return json.dumps(unsigned, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
