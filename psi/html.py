"""The validation report as one self-contained page, for people who have never seen the code.

No script and no outside request; whatever the report says is text and stays text. The page proves nothing by itself: it
is made from psi_report.json, which `colonnade verify` checks.
"""

from __future__ import annotations

import hashlib
import math
from base64 import b64encode
from collections import Counter

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from psi.group import POINT_BYTES, token_width
from psi.report import SELFTEST, Report, Traffic, as_file, report_digest

KINDS = {  # what messages carry, in the reader's words
    "Hello": "which agreement, our approval, a fresh random number",
    "InputCommitment": "commitments to our input and to our share of the audit seed",
    "SetSize": "how many entries our set has",
    "MaskedPoints": "entries, hashed and masked with secret keys",
    "Tokens": "masked entries, hashed again and cut short",
    "IntersectionSize": "how many rows are in common",
    "Gate": "our yes to going on",
    "Positions": "where common entries stand in lists of secret order",
    "OrderPoint": "proof that our row order equals theirs, masked",
    "OrderTag": "proof that our row order equals theirs, hashed",
    "SeedReveal": "our share of the audit seed",
}
CLASSES = {
    "control": "sizes, approvals, commitments, yes or no",
    "masked": "data under a secret key or in a secret order",
    "aggregate": "one number over all rows",
    "ciphertext": "encrypted data",
    "plaintext": "data that the receiver can read",
}
OPAQUE = {"control", "masked", "aggregate", "ciphertext"}


def render(report: Report) -> str:
    """The page, HTML 5. The same report gives the same page."""
    classes = sorted({one.ledger_class for one in report.traffic})
    return (
        environment("psi")
        .get_template("report.html")
        .render(
            report=report,
            agreed=report.governance.intersection,
            identifiers=report.governance.identifiers,
            tally=Counter(check.status for check in report.checks),
            peers=[name for name in report.parties if name != report.party],
            hub=next((name for name, facts in report.parties.items() if facts.role == "label holder"), ""),
            kinds=_by_kind(report.traffic),
            classes=classes,
            models=report.task not in ("align", SELFTEST),  # then a model's messages follow this report
            readable=not OPAQUE.issuperset(classes),
            sent={name: _by_class(report.traffic, name) for name in dict.fromkeys(one.to for one in report.traffic)},
            point_bytes=POINT_BYTES,
            token_bytes=sorted({token_width(sum(step.set_sizes.values())) for step in report.steps}),
            file_digest=hashlib.sha256(as_file(report)).hexdigest(),
            report_digest=report_digest(report).hex(),
            KINDS=KINDS,
            CLASSES=CLASSES,
        )
    )


def environment(package: str) -> Environment:
    """For pages from the templates of `package`, in our style, in which every value is escaped."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("psi")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": _number,
        "size": _size,
        "seconds": _seconds,
        "time": _time,
        "odds": _odds,
        "plural": _plural,
        "csp_hash": _csp_hash,
    }
    return made


def _by_kind(traffic: list[Traffic]) -> dict[str, list[tuple[list[str], Traffic]]]:
    """Kinds in the order in which they were first sent; peers that got equally much of a kind stand together."""
    kinds: dict[str, dict[tuple[int, int, int | None], list[Traffic]]] = {}
    for one in traffic:
        kinds.setdefault(one.kind, {}).setdefault((one.messages, one.bytes, one.predicted), []).append(one)
    return {kind: [([one.to for one in same], same[0]) for same in rows.values()] for kind, rows in kinds.items()}


def _by_class(traffic: list[Traffic], peer: str) -> Counter[str]:
    """Bytes that left us for a peer."""
    total: Counter[str] = Counter()
    for one in traffic:
        if one.to == peer:
            total[one.ledger_class] += one.bytes
    return total


def _number(value: int) -> str:
    return f"{value:,}"


def _size(count: int) -> str:
    """Bytes as people read them: 812 bytes, 5.9 kB, 81.2 MB."""
    if count < 1000:
        return f"{count} bytes"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"


def _seconds(value: float) -> str:
    return f"{value:,.3f} s" + (f" ({value / 60:,.0f} min)" if value >= 60 else "")


def _time(text: str) -> str:
    """An ISO 8601 time with a space for the T; what is none stays as it is."""
    return text.replace("T", " ", 1).replace("+00:00", " UTC")


def _odds(bound: float) -> str:
    """A small probability in words: less than 1 in a power of ten."""
    power = math.ceil(-math.log10(bound)) - 1 if bound > 0 else 0
    if power < 1:
        return f"at most {bound:g}"
    return f"less than 1 in 10^{power}" + (f" (1 in {10**power:,})" if power <= 18 else "")


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _csp_hash(text: str) -> str:
    """How a Content-Security-Policy names the one style sheet that it allows."""
    return "sha256-" + b64encode(hashlib.sha256(text.encode()).digest()).decode()
