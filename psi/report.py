"""The validation report: what one party saw of the intersection, signed. It holds no id, no row and no secret."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from parties.session import Session
from psi.align import Alignment
from psi.exchange import CANARIES

FORMAT = 1


def make_report(session: Session, alignment: Alignment, counts: Mapping[str, int]) -> dict[str, Any]:
    """The signed report as plain values, ready for JSON. `counts` are those of the identifiers (read, empty, ...)."""
    agreement = session.agreement
    report: dict[str, Any] = {
        "colonnade_psi_report": FORMAT,
        "party": session.name,
        "role": agreement.party(session.name).role,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "agreement": agreement.digest.hex(),
        "title": agreement.title,
        "session": session.id.hex(),
        "task": session.task,
        "parties": {
            party.name: {
                "role": party.role,
                "public_key": party.public_key,
                "fingerprint": party.identity.fingerprint,
                "approval": session.approvals[party.name].hex(),
            }
            for party in agreement.ring
        },
        "suite": agreement.intersection.suite,
        "identifier": {"type": agreement.identifiers.type, "rule": agreement.identifiers.rule},
        "our_rows": dict(counts),
        "set_sizes": alignment.set_sizes,
        "canaries": CANARIES,
        "decoys": agreement.intersection.decoys,
        "minimum": agreement.intersection.minimum,
        "intersection": len(alignment.rows),
        "flows": [asdict(flow) for flow in alignment.flows],
        "checks": list(alignment.checks),
        "ledger": {"entries": session.ledger.entries, "head": session.ledger.head},
    }
    report["signature"] = session.me.sign("psi-report", canonical(report)).hex()
    return report


def canonical(report: Mapping[str, Any]) -> bytes:
    """What is signed: the report without its signature, keys sorted, no spaces."""
    unsigned = {key: value for key, value in report.items() if key != "signature"}
    return json.dumps(unsigned, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
