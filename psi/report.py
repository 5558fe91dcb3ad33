"""The validation report: what one party saw of the intersection, signed, and countersigned by its peers. It holds no
id, no row and no secret. docs/psi_report.schema.json is its JSON schema."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

import msgspec

from parties import agreement as agreements
from parties.agreement import Agreement
from parties.errors import ProtocolViolation
from parties.message import class_of
from parties.session import Session
from psi.align import Alignment, Step, checks_made
from psi.budget import Use
from psi.due import predicted_arrays
from psi.exchange import Flow
from psi.group import token_width
from psi.hash_to_curve import TAG
from psi.identifiers import Identifiers
from psi.inputs import CANARIES
from psi.messages import Countersignature, ReportDigest

VERSIONS = ("colonnade", "cryptography", "gmpy2", "msgspec", "numpy", "phonenumbers", "pyarrow", "pynacl", "pyzmq")
HEADER = 300  # bytes of a message beside its array, at most
SELFTEST = "selftest"  # the task of a rehearsal
Status = Literal["PASS", "FAIL", "NOT RUN"]
_AS_PREDICTED = "what left us is as long as the set sizes imply"
_REHEARSED = "rehearsal on synthetic ids with a known overlap"
_WITHIN_BUDGET = "every peer is within its budget"


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the report's parts: no field that is not declared, none that changes."""


class PartyFacts(Part, frozen=True):
    """A party as the report knows it; `approval` is its signature under the agreement's digest, in hex."""

    role: str
    public_key: str
    fingerprint: str
    approval: str


class Governance(Part, frozen=True):
    """What was agreed: why, until when, how much is revealed."""

    title: str
    purpose: str
    legal_basis: str
    expires: str
    identifiers: agreements.Identifiers
    intersection: agreements.Intersection

    @classmethod
    def of(cls, agreement: Agreement) -> Governance:
        return cls(
            title=agreement.title,
            purpose=agreement.purpose,
            legal_basis=agreement.legal_basis,
            expires=agreement.expires.isoformat(),
            identifiers=agreement.identifiers,
            intersection=agreement.intersection,
        )


class Software(Part, frozen=True):
    """What computed this."""

    suite: str
    separation_tag: str
    python: str
    packages: dict[str, str]


class Counts(Part, frozen=True):
    """Rows of our table, by what became of their ids."""

    read: int
    empty: int
    invalid: int
    duplicate: int
    kept: int


class Input(Part, frozen=True):
    """What we put in. `columns` are our names of the agreement's fields; `merkle_root` is that of our salted ids;
    `minimum` is our own, below which we let no row be revealed."""

    rows: Counts
    minimum: int
    columns: dict[str, str]
    empty: str
    duplicates: str
    merkle_root: str


class Traffic(Part, frozen=True):
    """What left us for one peer, of one kind and the ledger's class. `predicted` are the bytes of its arrays as the set
    sizes imply them, or None for kinds that do not depend on them."""

    to: str
    kind: str
    ledger_class: str
    messages: int
    bytes: int
    predicted: int | None


class Keys(Part, frozen=True):
    """Our masking keys: one a step. They live in the memory of our processes only, which Python cannot overwrite."""

    created: int
    escrow: str


class Check(Part, frozen=True):
    """One question, and its answer."""

    name: str
    status: Status
    detail: str = ""


class SelfTest(Part, frozen=True):
    """The last rehearsal under the same agreement, on synthetic ids with a known overlap."""

    time: str
    session: str
    rows: int
    expected: int
    found: int
    passed: bool


class Transcript(Part, frozen=True):
    """Digests of all that we sent to a peer and got from it, up to this report."""

    sent: str
    received: str


class LedgerPoint(Part, frozen=True):
    """How long our ledger was when the report was written, and the hash of its last line."""

    entries: int
    head: str


class Report(Part, frozen=True):
    """The file's fields. `signature` is Ed25519 over all above it, see `canonical`; `countersignatures` are the peers'
    under the same bytes' digest."""

    colonnade_psi_report: Literal[2]
    party: str
    time: str
    agreement: str
    session: str
    task: str
    governance: Governance
    parties: dict[str, PartyFacts]
    software: Software
    input: Input
    roots: dict[str, str]
    seconds: dict[str, float]
    traffic: list[Traffic]
    steps: list[Step]
    canaries: int
    size: int
    rows_revealed: bool
    false_match_bound: float
    flows: list[Flow]
    keys: Keys
    budget: list[Use]
    selftest: SelfTest | None
    audit_seed: str
    transcripts: dict[str, Transcript]
    ledger: LedgerPoint
    checks: list[Check]
    signature: str = ""
    countersignatures: dict[str, str] = {}


def make_report(
    session: Session,
    alignment: Alignment,
    ids: Identifiers,
    *,
    columns: Mapping[str, str] | None = None,
    minimum: int = 0,
    escrow: str = "",
    budget: list[Use] | None = None,
    selftest: SelfTest | None = None,
) -> Report:
    """The report of an alignment, signed by us; `countersigned` adds the peers' signatures. `escrow` is the fingerprint
    of the key to which our masking keys are sealed.
    """
    agreement, agreed = session.agreement, session.agreement.intersection
    report = Report(
        colonnade_psi_report=2,
        party=session.name,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        agreement=agreement.digest.hex(),
        session=session.id.hex(),
        task=session.task,
        governance=Governance.of(agreement),
        parties=party_facts(agreement, session.approvals),
        software=Software(
            suite=agreed.suite,
            separation_tag=TAG.decode() + agreed.suite,
            python=sys.version.split()[0],
            packages={name: version(name) for name in VERSIONS},
        ),
        input=Input(
            rows=Counts(**ids.counts),
            minimum=minimum,
            columns=dict(columns or {name: name for name in agreement.identifiers.fields}),
            empty=ids.empty,
            duplicates=ids.duplicates,
            merkle_root=alignment.merkle_root,
        ),
        roots=alignment.roots,
        seconds={name: round(value, 3) for name, value in session.seconds.items()},
        traffic=_traffic(session, alignment),
        steps=list(alignment.steps),
        canaries=CANARIES,
        size=alignment.size,
        rows_revealed=alignment.rows is not None,
        false_match_bound=false_match_bound(alignment.steps),
        flows=list(alignment.flows),
        keys=Keys(created=len(alignment.steps), escrow=escrow),
        budget=budget or [],
        selftest=selftest,
        audit_seed=alignment.audit_seed,
        transcripts={
            name: Transcript(sent=sent.hex(), received=received.hex())
            for name, (sent, received) in ((name, one.transcripts) for name, one in session.channels.items())
        },
        ledger=LedgerPoint(entries=session.ledger.entries, head=session.ledger.head),
        checks=[],
    )
    report = msgspec.structs.replace(report, checks=_checks(report, alignment))
    return msgspec.structs.replace(report, signature=session.me.sign("psi-report", canonical(report)).hex())


def countersigned(session: Session, report: Report) -> Report:
    """Our report with the signatures of all peers, each under its digest and what all parties know of the run.

    Reveals:
        To every peer: the digest of our report, which holds salted and random values that nobody can guess.
    Raises:
        ProtocolViolation: a peer's countersignature is wrong: it knows the run otherwise than our report tells it.
    """
    ours, known = report_digest(report), common_facts(report)
    session.broadcast(ReportDigest(ours))
    for name, theirs in session.gather(ReportDigest).items():
        statement = countersigned_statement(session.id, name, theirs.digest, known)
        session.channels[name].send(Countersignature(session.me.sign("psi-countersignature", statement)))
    signatures, statement = {}, countersigned_statement(session.id, session.name, ours, known)
    for name, message in session.gather(Countersignature).items():
        identity = session.agreement.party(name).identity
        if not identity.signed("psi-countersignature", statement, message.signature):
            raise ProtocolViolation(f"{name}: its signature under our report is wrong", peer=name)
        signatures[name] = message.signature.hex()
    return msgspec.structs.replace(report, countersignatures=signatures)


def canonical(report: Report) -> bytes:
    """What is signed: the report without signatures, as JSON with sorted keys and no spaces."""
    return msgspec.json.encode(msgspec.structs.replace(report, signature="", countersignatures={}), order="sorted")


def as_file(report: Report) -> bytes:
    """The file's one spelling: whatever else is in a file is not what was written."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def report_digest(report: Report) -> bytes:
    """SHA-256 of what is signed; what the peers countersign."""
    return hashlib.sha256(b"colonnade/psi/report/2" + canonical(report)).digest()


def common_facts(report: Report) -> bytes:
    """Digest of what every party knows of the run, whoever's report it is: a peer signs for what it knows itself."""
    steps = [(step.key, step.set_sizes, step.size) for step in report.steps]
    terms = (report.agreement, report.task, report.governance, report.parties, report.software.suite)
    facts = (*terms, report.roots, steps, report.size, report.audit_seed)
    return hashlib.sha256(b"colonnade/psi/facts/1" + msgspec.json.encode(facts, order="sorted")).digest()


def countersigned_statement(session: bytes, owner: str, digest: bytes, known: bytes) -> bytes:
    """What a peer signs: in this session this party committed to this report, and these are the common facts."""
    return session + len(owner).to_bytes(4, "big") + owner.encode() + digest + known


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


def false_match_bound(steps: tuple[Step, ...] | list[Step]) -> float:
    """A bound on the odds that any two different ids of the run had equal tokens: N^2 / 2^(8t + 1) for each step of N
    points and t bytes a token."""
    totals = [sum(step.set_sizes.values()) for step in steps]
    return float(sum(total**2 / 2 ** (8 * token_width(total) + 1) for total in totals))


def _traffic(session: Session, alignment: Alignment) -> list[Traffic]:
    predicted = predicted_arrays(session.name, list(alignment.steps), session.agreement.intersection.result)
    ledger, totals = session.ledger, dict[tuple[str, str], tuple[int, int]]()
    for (to, kind, phase), size in ledger.bytes_sent.items():
        messages, so_far = totals.get((to, kind), (0, 0))
        totals[to, kind] = messages + ledger.messages_sent[to, kind, phase], so_far + size
    return [
        Traffic(
            to=to,
            kind=kind,
            ledger_class=class_of(kind),
            messages=messages,
            bytes=size,
            predicted=predicted.get((to, kind)),
        )
        for (to, kind), (messages, size) in totals.items()
    ]


def as_predicted(report: Report) -> bool:
    """Whether every list that left us is as long as the announced sizes imply, but for the messages' headers."""
    predicted = predicted_arrays(report.party, report.steps, report.governance.intersection.result)
    told = {(one.to, one.kind): one.predicted for one in report.traffic if one.predicted is not None}
    return told == predicted and all(
        0 < one.bytes - one.predicted <= HEADER * one.messages for one in report.traffic if one.predicted is not None
    )


def _checks(report: Report, alignment: Alignment) -> list[Check]:
    words: dict[bool | None, Status] = {True: "PASS", False: "FAIL", None: "NOT RUN"}
    unseen = f"the agreement's result is {report.governance.intersection.result!r}"
    checks = [
        Check(name=name, status=words[passed], detail=unseen if passed is None else "")
        for name, passed in alignment.checks
    ]
    checks.append(Check(name=_AS_PREDICTED, status=words[as_predicted(report)]))
    rehearsal = report.selftest
    checks.append(
        Check(
            name=_REHEARSED,
            status=words[None if rehearsal is None else rehearsal.passed],
            detail="" if rehearsal else "colonnade selftest was not run under this agreement",
        )
    )
    limited = any(use.limited for use in report.budget)
    within = not any(use.refusal for use in report.budget)
    no_budget = "a rehearsal spends none" if report.task == SELFTEST else "our policy sets no budget"
    checks.append(
        Check(name=_WITHIN_BUDGET, status=words[within if limited else None], detail="" if limited else no_budget)
    )
    return checks


def due_check_names(report: Report) -> list[str]:
    """The names of all checks that a report of this result and these parties lists, in order."""
    result, peers = report.governance.intersection.result, list(report.transcripts)
    made = [name for name, _ in checks_made(result, report.rows_revealed, peers)]
    return [*made, _AS_PREDICTED, _REHEARSED, _WITHIN_BUDGET]


def schema() -> dict[str, Any]:
    """The JSON schema of the report."""
    known = msgspec.json.schema(Report)
    for part in known["$defs"].values():
        if "description" in part:  # Python versions indent docstrings differently
            part["description"] = " ".join(part["description"].split())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "psi_report.json"} | known
