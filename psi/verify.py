"""Offline checks of PSI reports, one alone and several together, for people who did not watch the run.

One report alone shows that its owner stands by it, that its peers countersigned the same bytes at the end of the run,
and that nothing in it contradicts anything else or the ledger beside it. Two or more show that the parties saw the same
run. Neither shows what ids a party put in: that is `psi.audit`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime
from itertools import permutations
from pathlib import Path
from typing import Any

import msgspec

from parties.agreement import Agreement
from parties.errors import LocalError
from parties.files import read_bytes
from parties.identity import PublicIdentity, check_name
from parties.parsing import parse_json
from psi.align import Step, least_rows
from psi.commitment import input_root
from psi.due import due_flows, due_messages
from psi.exchange import TO_HUB, Flow, Way
from psi.hash_to_curve import TAG
from psi.inputs import CANARIES, decoys_for
from psi.record import LISTS, Keys, ask, check_record, from_hex, is_hex, known_class, longest, signed
from psi.report import (
    SELFTEST,
    Check,
    Governance,
    Report,
    as_file,
    as_predicted,
    canonical,
    common_facts,
    countersigned_statement,
    due_check_names,
    false_match_bound,
    party_facts,
    report_digest,
)

MOST_PARTIES = 16  # as in an agreement
MOST = 2**63  # whatever a party counts is below that
UNGIVEN = "none was given: keys, purpose, legal basis and limits only as the report states them"
SHARED: dict[str, Callable[[Report], Any]] = {
    "agreement": lambda one: one.agreement,
    "session": lambda one: one.session,
    "task": lambda one: one.task,
    "governance": lambda one: one.governance,
    "parties, keys and approvals": lambda one: (list(one.parties), one.parties),
    "suite and separation tag": lambda one: (one.software.suite, one.software.separation_tag),
    "committed inputs": lambda one: one.roots,
    "keys, set sizes and results of the steps": lambda one: [(s.key, s.set_sizes, s.size) for s in one.steps],
    "size of the intersection": lambda one: one.size,
    "seed of the auditors' sample": lambda one: one.audit_seed,
}


def load_report(path: Path) -> Report:
    """Raises LocalError when the file is not a PSI report of this version."""
    report: Report = parse_json(path, Report, "the report")
    return report


def verify(paths: Sequence[Path], agreement: Agreement | None = None) -> list[Check]:
    """All checks of the given reports. Without `agreement` keys and terms are those that the reports state.

    A ledger that lies beside a report is checked with it.

    Raises:
        LocalError: a file cannot be read, or is not a report at all.
    """
    return list(each_check(paths, agreement))


def each_check(paths: Sequence[Path], agreement: Agreement | None = None) -> Iterator[Check]:
    """The same, one by one as they are made."""
    sound: list[Report] = []
    for path, report in [(path, load_report(path)) for path in paths]:  # a file that is none is told before all else
        if odd := list(_malformed(report)):
            yield ask(f"{path}: names, keys and digests are well formed", odd)
            continue
        sound.append(report)
        yield from _alone(path, report, agreement)
    if len(paths) > 1 and sound:
        yield from _together(sound)


# ---- one report alone


def _malformed(report: Report) -> Iterator[str]:
    """What keeps the other checks from being made. Nothing of the report is quoted: it may be anything."""
    names, bits = list(report.parties), report.input
    if any(abs(number) >= MOST for number in _integers(msgspec.to_builtins(report))):
        yield "a number is too large"
    try:
        for name in names:
            check_name(name)
        keys = [PublicIdentity.parse(facts.public_key) for facts in report.parties.values()]
        if not 2 <= len(set(keys)) == len(names) <= MOST_PARTIES or report.party not in names:
            yield "the parties"
    except (LocalError, ValueError):
        yield "a party's name or public key"
    peers = [name for name in names if name != report.party]
    roles = [facts.role for facts in report.parties.values()]
    if roles != ["label holder", *["feature holder"] * len(peers)]:
        yield "the parties' roles or order"
    flows, transcripts = report.flows, report.transcripts.values()
    digests = [
        *(report.agreement, report.session, report.audit_seed, report.ledger.head, bits.merkle_root),
        *(*report.roots.values(), *(flow.digest for flow in flows)),
        *(digest for one in transcripts for digest in (one.sent, one.received)),
        *([report.selftest.session] if report.selftest else []),
    ]
    if not all(is_hex(digest, 32) for digest in digests):
        yield "a digest is not 64 lower-case hex digits"
    if any(list(step.set_sizes) != names for step in report.steps) or list(report.roots) != names:
        yield "set sizes or roots are not those of the parties, in their order"
    if list(report.transcripts) != peers or not set(report.countersignatures) <= set(peers):
        yield "transcripts or countersignatures are not those of the peers"
    if [step.key for step in report.steps] != [" + ".join(key) for key in report.governance.identifiers.cascade]:
        yield "the steps are not the agreed keys"
    if not all(text.isprintable() for check in report.checks for text in (check.name, check.detail)):
        yield "a check's text"
    if not re.fullmatch(r"[a-z0-9 ]{1,64}", report.task):  # as in a Hello
        yield "the task"
    if not {use.peer for use in report.budget} <= set(peers):
        yield "the budget is not that of the peers"
    times = [report.time, *([report.selftest.time] if report.selftest else [])]
    if not (all(map(_is_time, times)) and _is_date(report.governance.expires)):
        yield "a time is not written as it should be"


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _integers(inner)
    elif isinstance(value, int):
        yield value


def _alone(path: Path, report: Report, agreement: Agreement | None) -> Iterator[Check]:
    party, keys = report.party, {name: PublicIdentity.parse(facts.public_key) for name, facts in report.parties.items()}

    def about(question: str, odd: Iterable[str], note: str = "") -> Check:
        return ask(f"{party}: {question}", odd, note)

    what = f"task {report.task}, session {report.session[:8]}…, {report.size:,} rows in common"
    yield about(what, [], "a rehearsal, not a run" if report.task == SELFTEST else "")
    odd = [] if as_file(report) == read_bytes(path, "the report") else ["its spelling was changed"]
    yield about("the file reads byte for byte as it was written", odd)
    if agreement is None:
        yield Check(name=f"{party}: is of the given agreement", status="NOT RUN", detail=UNGIVEN)
    else:
        odd = list(_differs(report, agreement))
        yield about("is of the given agreement", odd)
        if odd:  # its keys are not those of the parties
            return
    origin = "keys of the given agreement" if agreement else "keys as the report states them; --agreement compares them"
    right = signed(keys[party], "psi-report", canonical(report), report.signature)
    yield about("its owner's signature stands under it", [] if right else ["another key, or other facts"], origin)
    yield about("every peer countersigned it at the end of the run", _not_countersigned(report, keys), origin)
    odd = [name for name, facts in report.parties.items() if facts.fingerprint != keys[name].fingerprint]
    yield about("fingerprints are those of the keys", odd)
    digest = bytes.fromhex(report.agreement)
    odd = [name for name in keys if not signed(keys[name], "approval", digest, report.parties[name].approval)]
    yield about("every party approved the agreement", odd, origin)
    when = f"{report.time}; the last day is {report.governance.expires}"
    late = datetime.fromisoformat(report.time).date() > date.fromisoformat(report.governance.expires)
    yield about("the agreement had not expired", [when] if late else [], when)
    yield about("what is stated follows from what was agreed", _inconsistent(report))
    yield about("counts add up", [*_odd_rows(report), *_odd_steps(report)])
    found = Counter((f.step, f.direction, f.peer, f.what, f.owner, f.count) for f in report.flows)
    odd = ["a list is missing, not due, or of another length"] if found != Counter(due_flows(*_run(report))) else []
    yield about("every list that must have passed did, as long as announced", odd, f"{len(report.flows)} lists")
    odd = [] if as_predicted(report) and _due_traffic(report) else ["bytes, or messages, of a kind"]
    yield about("what left is as long as the set sizes imply", odd)
    odd = [] if all(one.ledger_class == known_class(one.kind) for one in report.traffic) else ["unknown, or another"]
    yield about("each kind of message that left is known, and of its class", odd)
    if report.budget:
        odd = [use.peer for use in report.budget if use.refusal]
        odd += [] if [use.peer for use in report.budget] == list(report.transcripts) else ["the peers"]
        within, some = (
            about("every peer's use is within the stated limits", odd),
            any(use.limited for use in report.budget),
        )
        yield within if odd or some else Check(name=within.name, status="NOT RUN", detail="no limit is stated")
    if rehearsal := report.selftest:
        right = rehearsal.passed and rehearsal.expected == rehearsal.found and rehearsal.time <= report.time
        title = f"{party} states: the rehearsal found what it had to"
        yield ask(title, [] if right else ["it did not"], rehearsal.time)
    due = [check.name for check in report.checks] == due_check_names(report)
    yield about("it lists the checks made during the run", [] if due else ["one is missing, or not one of them"])
    for check in report.checks:
        yield Check(name=f"{party} found: {check.name}", status=check.status, detail=check.detail)
    yield from check_record(path, report, keys)


def _differs(report: Report, agreement: Agreement) -> Iterator[str]:
    """What the report says otherwise than the agreement."""
    names = [party.name for party in agreement.ring]
    if list(report.parties) != names:
        yield "the parties"
        return
    if report.agreement != agreement.digest.hex():
        yield "digest"
    if report.parties != party_facts(agreement, {name: from_hex(report.parties[name].approval) for name in names}):
        yield "roles or keys"
    agreed = Governance.of(agreement)
    yield from (
        name for name in Governance.__struct_fields__ if getattr(report.governance, name) != getattr(agreed, name)
    )


def _not_countersigned(report: Report, keys: Keys) -> Iterator[str]:
    session, known = bytes.fromhex(report.session), common_facts(report)
    statement = countersigned_statement(session, report.party, report_digest(report), known)
    for name in report.transcripts:
        if not signed(keys[name], "psi-countersignature", statement, report.countersignatures.get(name, "")):
            yield name


def _inconsistent(report: Report) -> Iterator[str]:
    """Facts that follow from others, but do not here."""
    governance, result = report.governance, report.governance.intersection.result
    follows: dict[str, tuple[Any, Any]] = {
        "suite": (report.software.suite, governance.intersection.suite),
        "separation tag": (report.software.separation_tag, TAG.decode() + governance.intersection.suite),
        "canaries": (report.canaries, CANARIES),
        "size": (report.size, sum(step.size for step in report.steps)),
        "who sees rows": (report.rows_revealed, result in (["rows"], ["rows", TO_HUB])[_is_hub(report)]),
        "bound on false matches": (report.false_match_bound, false_match_bound(report.steps)),
        "masking keys": (report.keys.created, len(report.steps)),
        "our commitment": (
            report.roots[report.party],
            input_root(max(0, report.input.rows.kept), from_hex(report.input.merkle_root)).hex(),
        ),
        "columns": (set(report.input.columns), set(governance.identifiers.fields)),
        "key of the escrow": (bool(re.fullmatch(FINGERPRINT, report.keys.escrow)), True),
    }
    yield from (what for what, (stated, due) in follows.items() if stated != due)


FINGERPRINT = "(([0-9a-f]{4}-){7}[0-9a-f]{4})?"  # or none


def _is_hub(report: Report) -> bool:
    return report.party == next(iter(report.parties))


def _odd_rows(report: Report) -> Iterator[str]:
    rows, policy = report.input.rows, report.input
    if min(msgspec.structs.astuple(rows)) < 0 or rows.read != rows.empty + rows.invalid + rows.duplicate + rows.kept:
        yield "rows read are not the sum of the others"
    if not 0 < rows.kept <= report.governance.intersection.maximum_rows:
        yield "rows kept are none, or above the cap"
    if policy.empty not in ("fail", "drop") or (policy.empty == "fail" and (rows.empty or rows.invalid)):
        yield "rows dropped against the policy for empty ids"
    if policy.duplicates not in ("fail", "first", "last", "aggregate") or (
        policy.duplicates == "fail" and rows.duplicate
    ):
        yield "rows dropped against the policy for duplicates"


def _odd_steps(report: Report) -> Iterator[str]:
    agreed, rest, total = report.governance.intersection, report.input.rows.kept, 0
    smallest = max(least_rows(agreed, report.task), report.input.minimum)
    least, cap = CANARIES + agreed.decoys, CANARIES + agreed.decoys + agreed.maximum_rows + agreed.bucket - 1
    for number, step in enumerate(report.steps, 1):
        sizes, ids = step.set_sizes, step.set_sizes[report.party] - CANARIES - step.decoys
        if not 0 <= ids <= rest or (len(report.steps) == 1 and ids != rest):
            yield f"step {number}: our set holds other than the rows kept, canaries and decoys"
        if step.decoys != decoys_for(ids, agreed.decoys, agreed.bucket):
            yield f"step {number}: our decoys"
        yield from (
            f"step {number}: set of {name}"
            for name, size in sizes.items()
            if size % agreed.bucket or not least <= size <= cap
        )
        if not 0 <= step.size <= min(ids, min(sizes.values()) - least):
            yield f"step {number}: more rows in common than in a set"
        total, rest = total + step.size, rest - step.size
        if total < smallest:
            yield f"step {number}: fewer rows in common than the minimum"


def _run(report: Report) -> tuple[str, list[Step], str]:
    """What decides what must have passed."""
    return report.party, report.steps, report.governance.intersection.result


def _due_traffic(report: Report) -> bool:
    """Whether each peer and kind is listed once, with as many messages as are due; those without a list are short."""
    stated = Counter({(one.to, one.kind): one.messages for one in report.traffic})
    short = all(
        one.messages <= one.bytes and (one.kind in LISTS or one.bytes <= longest(report) * one.messages)
        for one in report.traffic
    )
    return short and len(stated) == len(report.traffic) and stated == due_messages(*_run(report))


# ---- several reports


def _together(reports: list[Report]) -> Iterator[Check]:
    names, first = [report.party for report in reports], reports[0]
    for what, value in SHARED.items():
        odd = [report.party for report in reports if value(report) != value(first)]
        yield ask(f"all reports: same {what}", [f"{name} says otherwise than {first.party}" for name in odd])
    yield ask("all reports: each of another party", sorted({name for name in names if names.count(name) > 1}))
    missing = ", ".join(name for name in first.parties if name not in names)
    yield Check(
        name="all reports: every party's is here",
        status="NOT RUN" if missing else "PASS",
        detail=missing and f"not given: {missing}",
    )
    for one, other in permutations(reports, 2):
        if one.party == other.party:
            continue
        sent, got = _lists(one, "sent", other.party), _lists(other, "received", one.party)
        title = f"what {one.party} sent to {other.party} is what arrived"
        yield ask(title, ["a list differs"] if sent != got else [], f"{len(sent)} lists")
        ours, theirs = one.transcripts.get(other.party), other.transcripts.get(one.party)
        same = ours is not None and theirs is not None and ours.sent == theirs.received
        yield ask(f"{title}, message by message", [] if same else ["the transcripts differ"])
        key = PublicIdentity.parse(other.parties[other.party].public_key)
        odd = [name for name in _not_countersigned(one, dict.fromkeys(one.parties, key)) if name == other.party]
        odd += [] if other.party in one.transcripts else [other.party]
        yield ask(f"{other.party} countersigned the report of {one.party} with the key of its own report", odd)


def _lists(report: Report, direction: Way, peer: str) -> list[tuple[Any, ...]]:
    def facts(flow: Flow) -> tuple[Any, ...]:
        return flow.step, flow.what, flow.owner, flow.count, flow.digest

    return sorted(facts(flow) for flow in report.flows if (flow.direction, flow.peer) == (direction, peer))


def _is_time(text: str) -> bool:
    with suppress(ValueError):
        return datetime.fromisoformat(text).astimezone(UTC).isoformat(timespec="seconds") == text
    return False


def _is_date(text: str) -> bool:
    with suppress(ValueError):
        return date.fromisoformat(text).isoformat() == text
    return False
