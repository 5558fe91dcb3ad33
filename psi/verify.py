"""Offline checks of PSI reports, one alone and several together, for people who did not watch the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import msgspec

from parties.agreement import Agreement, parse_json
from parties.errors import LocalError
from parties.identity import PublicIdentity
from parties.ledger import check_ledger
from psi.exchange import CANARIES
from psi.report import Report, Terms, canonical


@dataclass(frozen=True)
class Check:
    """One question and its answer; `detail` says what differs, or what the answer rests on."""

    name: str
    passed: bool | None  # None: it could not be made
    detail: str = ""


def load_report(path: Path) -> Report:
    """Raises LocalError when the file is not a PSI report of this version."""
    report: Report = parse_json(path, Report, "the report")
    return report


def verify(paths: Sequence[Path], agreement: Agreement | None = None) -> list[Check]:
    """All checks of the given reports. Without `agreement` the public keys are those that the reports state.

    A ledger that lies beside a report is checked with it: chain, signature, and that it contains the point at which
    the report was written.
    """
    reports = [(path, load_report(path)) for path in paths]
    checks = [check for path, report in reports for check in _alone(path, report, agreement)]
    if len(reports) > 1 and all(check.passed is not False for check in checks):
        checks += _together([report for _, report in reports])
    return checks


def _alone(path: Path, report: Report, agreement: Agreement | None) -> list[Check]:
    name, checks = report.party, []
    if agreement is not None:
        wrong = _differs(report, agreement)
        checks.append(Check(f"{name}: is of the given agreement", not wrong, ", ".join(wrong)))
        if wrong:
            return checks
    try:
        keys = {party: PublicIdentity.parse(facts.public_key) for party, facts in report.parties.items()}
        digest, signature = bytes.fromhex(report.agreement), bytes.fromhex(report.signature)
        approvals = {party: bytes.fromhex(facts.approval) for party, facts in report.parties.items()}
        known = {name, *report.set_sizes} == {*keys} == {name, *(flow.owner for flow in report.flows), *keys}
    except ValueError:
        known = False
    if not known:
        return [*checks, Check(f"{name}: its parties, keys and signatures are well formed", False)]
    origin = "keys of the given agreement" if agreement else "keys as the report states them; --agreement compares them"
    checks.append(
        Check(
            f"{name}: signature",
            keys[name].signed("psi-report", canonical(msgspec.to_builtins(report)), signature),
            origin,
        )
    )
    odd = [party for party, facts in report.parties.items() if facts.fingerprint != keys[party].fingerprint]
    checks.append(Check(f"{name}: fingerprints are those of the keys", not odd, ", ".join(odd)))
    odd = [party for party in keys if not keys[party].signed("approval", digest, approvals[party])]
    checks.append(Check(f"{name}: every party approved the agreement", not odd, ", ".join(odd)))
    rows, extra = report.our_rows, report.canaries + report.terms.decoys
    adds_up = (
        report.canaries == CANARIES
        and min(msgspec.structs.astuple(rows)) >= 0
        and rows.kept + extra == report.set_sizes[name]
        and rows.read == rows.kept + rows.empty + rows.invalid + rows.duplicate
        and 0 <= report.intersection <= min(report.set_sizes.values()) - extra
    )
    checks.append(Check(f"{name}: counts add up", adds_up))
    positions = report.intersection + report.canaries
    due = [positions if flow.what == "positions" else report.set_sizes[flow.owner] for flow in report.flows]
    right = [flow.count for flow in report.flows] == due
    checks.append(Check(f"{name}: every list has as many entries as announced", right))
    checks.append(_ledger(path, report, keys[name]))
    return checks


def _differs(report: Report, agreement: Agreement) -> list[str]:
    """What the report says otherwise than the agreement."""
    names = {party.name for party in agreement.parties}
    if report.party not in names or set(report.parties) != names:
        return ["the parties"]
    stated = {name: (facts.role, facts.public_key) for name, facts in report.parties.items()}
    agreed = {party.name: (party.role, party.public_key) for party in agreement.parties}
    compared: dict[str, tuple[Any, Any]] = {
        "digest": (report.agreement, agreement.digest.hex()),
        "roles or keys": (stated, agreed),
        "terms": (report.terms, Terms.of(agreement)),
    }
    return [what for what, (theirs, ours) in compared.items() if theirs != ours]


def _ledger(path: Path, report: Report, owner: PublicIdentity) -> Check:
    ledger = path.with_name(path.name.replace("psi_report.json", "ledger.jsonl"))
    title = f"{report.party}: ledger chain, its signature, and that it holds this report's point"
    if ledger == path or not ledger.exists():
        return Check(title, None, "no ledger beside the report")
    try:
        return Check(title, check_ledger(ledger, owner).get(report.ledger.entries) == report.ledger.head)
    except LocalError as error:
        return Check(title, False, str(error))


def _together(reports: list[Report]) -> list[Check]:
    names, first = [report.party for report in reports], reports[0]
    checks = [
        Check(f"all reports: same {what}", all(getattr(one, field) == getattr(first, field) for one in reports))
        for field, what in (
            ("agreement", "agreement"),
            ("session", "session"),
            ("task", "task"),
            ("intersection", "size of the intersection"),
            ("set_sizes", "set sizes"),
            ("parties", "parties, keys and approvals"),
            ("terms", "terms"),
        )
    ]
    checks.append(Check("all reports: each of another party", len(set(names)) == len(names)))
    missing = ", ".join(sorted(set(first.parties) - set(names)))
    checks.append(Check("every party's report is here", None if missing else True, missing and f"not given: {missing}"))
    for sender in reports:
        for receiver in reports:
            if sender.party != receiver.party:
                sent, got = _flows(sender, "sent", receiver.party), _flows(receiver, "received", sender.party)
                title = f"what {sender.party} sent to {receiver.party} is what arrived ({len(sent)} lists)"
                checks.append(Check(title, sent == got))
    return checks


def _flows(report: Report, direction: str, peer: str) -> list[tuple[Any, ...]]:
    return sorted(astuple(flow)[2:] for flow in report.flows if (flow.direction, flow.peer) == (direction, peer))
