"""Offline checks of PSI reports, one alone and several together, for people who did not watch the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parties.agreement import Agreement
from parties.errors import ColonnadeError, LocalError
from parties.files import read_bytes
from parties.identity import PublicIdentity
from parties.ledger import check_ledger
from psi.report import FORMAT, canonical


@dataclass(frozen=True)
class Check:
    """One question and its answer; `detail` says what differs, or what the answer rests on."""

    name: str
    passed: bool
    detail: str = ""


def load_report(path: Path) -> dict[str, Any]:
    """Raises LocalError when the file is not a PSI report."""
    try:
        report = json.loads(read_bytes(path, "the report"))
        if report["colonnade_psi_report"] != FORMAT:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise LocalError(f"{path} is not a PSI report of format {FORMAT}") from None
    return dict(report)


def verify(paths: Sequence[Path], agreement: Agreement | None = None) -> list[Check]:
    """All checks of the given reports. Without `agreement` the public keys are those that the reports state.

    A ledger that lies beside a report (ledger.jsonl) is checked with it: chain, signature, and that it contains the
    point at which the report was written.
    """
    reports = [(path, load_report(path)) for path in paths]
    checks: list[Check] = []
    for path, report in reports:
        try:
            checks += _alone(path, report, agreement)
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
            checks.append(Check(f"{path}: complete and well formed", False, "a field is missing or malformed"))
    if len(reports) > 1 and all(check.passed for check in checks):
        checks += _together([report for _, report in reports])
    return checks


def _alone(path: Path, report: dict[str, Any], agreement: Agreement | None) -> list[Check]:
    name, parties = report["party"], report["parties"]
    keys = {party: PublicIdentity.parse(facts["public_key"]) for party, facts in parties.items()}
    origin = "keys as the report states them; give --agreement to compare"
    checks = []
    if agreement is not None:
        agreed = {party.name: party.identity for party in agreement.parties}
        same = report["agreement"] == agreement.digest.hex() and keys == agreed
        checks.append(Check(f"{name}: agreement and keys are the given ones", same))
        keys, origin = agreed, "keys from the given agreement"
    signed = keys[name].signed("psi-report", canonical(report), bytes.fromhex(report["signature"]))
    checks.append(Check(f"{name}: signature", signed, origin))
    digest = bytes.fromhex(report["agreement"])
    unapproved = [
        party
        for party, facts in parties.items()
        if not keys[party].signed("approval", digest, bytes.fromhex(facts["approval"]))
    ]
    checks.append(Check(f"{name}: every party approved the agreement", not unapproved, ", ".join(unapproved)))
    rows, size, extra = report["our_rows"], report["intersection"], report["canaries"] + report["decoys"]
    adds_up = (
        rows["kept"] + extra == report["set_sizes"][name]
        and rows["read"] == rows["kept"] + rows["empty"] + rows["invalid"] + rows["duplicate"]
        and 0 <= size <= min(report["set_sizes"].values()) - extra
    )
    checks.append(Check(f"{name}: counts add up", adds_up))
    wrong = [
        flow
        for flow in report["flows"]
        if flow["count"]
        != (size + report["canaries"] if flow["what"] == "positions" else report["set_sizes"][flow["owner"]])
    ]
    checks.append(Check(f"{name}: every list has as many entries as announced", not wrong))
    ledger = path.with_name("ledger.jsonl")
    if ledger.exists():
        try:
            heads = check_ledger(ledger, keys[name])
            holds = heads.get(report["ledger"]["entries"]) == report["ledger"]["head"]
            checks.append(Check(f"{name}: ledger chain, its signature, and that it holds this report's point", holds))
        except ColonnadeError as error:
            checks.append(Check(f"{name}: ledger chain and signature", False, str(error)))
    return checks


def _together(reports: list[dict[str, Any]]) -> list[Check]:
    names = [report["party"] for report in reports]
    checks = [
        Check(f"all reports: same {what}", len({json.dumps(report[key], sort_keys=True) for report in reports}) == 1)
        for key, what in (
            ("agreement", "agreement"),
            ("session", "session"),
            ("intersection", "size of the intersection"),
            ("set_sizes", "set sizes"),
            ("parties", "parties, keys and approvals"),
            ("suite", "suite"),
        )
    ]
    checks.append(Check("all reports: each of another party", len(set(names)) == len(names)))
    missing = sorted(set(reports[0]["parties"]) - set(names))
    checks.append(
        Check("every party's report is here", True, f"not given: {', '.join(missing)}" if missing else "all of them")
    )
    for sender in reports:
        for receiver in reports:
            if sender is receiver:
                continue
            sent, got = _flows(sender, "sent", receiver["party"]), _flows(receiver, "received", sender["party"])
            title = f"what {sender['party']} sent to {receiver['party']} is what arrived ({len(sent)} lists)"
            checks.append(Check(title, sent == got))
    return checks


def _flows(report: dict[str, Any], direction: str, peer: str) -> set[tuple[str, str, int, str]]:
    return {
        (flow["what"], flow["owner"], flow["count"], flow["digest"])
        for flow in report["flows"]
        if flow["direction"] == direction and flow["peer"] == peer
    }
