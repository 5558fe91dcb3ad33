"""The ledger beside a report: whether it records what the report says that left, and no other class of message."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import msgspec

from parties.errors import LocalError
from parties.files import read_bytes
from parties.identity import PublicIdentity
from parties.ledger import check_ledger
from parties.message import CLASSES, class_of
from parties.session import transcript_statement
from psi.report import HEADER, Check, Report

Keys = dict[str, PublicIdentity]
REPORT = "psi_report.json"
LET_OUT = {"control", "masked", "aggregate"}  # the classes of an intersection's messages
LISTS = {"MaskedPoints", "Tokens", "Positions"}  # messages as long as the sets; all others are short
ONCE = {"ReportDigest", "Countersignature", "Closing", "Abort"}  # what may follow a report, to each peer
TOLERANCE = timedelta(seconds=1)  # a report's time has whole seconds


def ask(question: str, odd: Iterable[str], note: str = "") -> Check:
    """The answer is yes where nothing is odd; `note` says what it rests on."""
    listed = ", ".join(odd)
    return Check(name=question, status="FAIL" if listed else "PASS", detail=listed or note)


def is_hex(text: str, size: int) -> bool:
    """Whether a text is `size` bytes in lower-case hex, the one spelling that colonnade writes."""
    return re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text) is not None


def from_hex(text: str) -> bytes:
    """What lower-case hex stands for; nothing for any other text."""
    return bytes.fromhex(text) if re.fullmatch("([0-9a-f]{2})*", text) else b""


def signed(key: PublicIdentity, purpose: str, data: bytes, signature: str) -> bool:
    """Whether `signature`, in hex, is that of `key`."""
    return is_hex(signature, 64) and key.signed(purpose, data, bytes.fromhex(signature))


def known_class(kind: str) -> str | None:
    """The class of the messages of that name; None for a name that nothing loaded here has."""
    try:
        return class_of(kind)
    except KeyError:
        return None


def longest(report: Report) -> int:
    """Bytes of a message that holds no list, at most: the first one names the task."""
    return HEADER + len(report.task)


def beside(path: Path, name: str) -> Path | None:
    """Another piece of the same run's evidence, such as "ledger.jsonl"; None where the report's file was renamed."""
    return path.with_name(path.name.removesuffix(REPORT) + name) if path.name.endswith(REPORT) else None


class _Line(msgspec.Struct, frozen=True):
    """What the checks look at in a line of a ledger: a message that left, or an event."""

    time: str = ""
    event: str = ""
    to: str = ""
    kind: str = ""
    message_class: str = msgspec.field(name="class", default="")
    bytes: int = 0
    digest: str = ""
    session: str = ""
    agreement: str = ""
    party: str = ""
    task: str = ""
    peer: str = ""
    sent: str = ""
    received: str = ""
    signature: str = ""


def check_record(path: Path, report: Report, keys: Keys) -> Iterator[Check]:
    """The checks of the ledger that lies beside the report at `path`; one that says NOT RUN where there is none."""
    ledger, title = beside(path, "ledger.jsonl"), f"{report.party}: ledger: "
    chain = f"{title}its chain and its seal hold, and this report was written at a point of it"
    if ledger is None or not ledger.exists():
        yield Check(name=chain, status="NOT RUN", detail="no ledger beside the report")
        return
    try:
        heads = check_ledger(ledger, keys[report.party])
        *lines, _ = read_bytes(ledger, "the ledger").split(b"\n")
        entries = [msgspec.json.decode(line, type=_Line) for line in lines]
    except LocalError as error:
        yield Check(name=chain, status="FAIL", detail=str(error))
        return
    except msgspec.MsgspecError:
        yield Check(name=chain, status="FAIL", detail=f"{ledger}: a line is not as colonnade writes it")
        return
    known = heads.get(report.ledger.entries) == report.ledger.head
    yield ask(chain, [] if known else [f"{ledger} is not the ledger of this report"])
    if not known:
        return
    before = entries[: report.ledger.entries]
    opened = [(one.session, one.agreement, one.party, one.task) for one in before if one.event == "opened"]
    due = [(report.session, report.agreement, report.party, report.task)]
    yield ask(f"{title}it opens with this session", [] if opened == due else ["another session, agreement or task"])
    sent = [one for one in before if one.kind]
    count, size = Counter((one.to, one.kind) for one in sent), Counter[tuple[str, str]]()
    for one in sent:
        size[one.to, one.kind] += one.bytes
    stated = {(one.to, one.kind): (one.messages, one.bytes) for one in report.traffic}
    odd = [] if stated == {pair: (count[pair], size[pair]) for pair in count} else ["messages or bytes differ"]
    yield ask(f"{title}it records the traffic that the report states", odd)
    odd = sorted({one.message_class for one in sent} - LET_OUT)
    yield ask(f"{title}only {', '.join(sorted(LET_OUT))} messages left until then", ["another class"] if odd else [])
    yield ask(f"{title}each line is an event, or a message that was due, of its class", _odd_lines(report, entries))
    odd = [name for name, one in report.transcripts.items() if one.sent != _transcript(before, name)]
    yield ask(f"{title}its messages give the transcripts that the report states", odd)
    yield ask(f"{title}the report's time lies between the lines around it", _odd_time(report, entries))
    closing = _closing(report, keys, entries)
    yield closing
    yield _later(report, entries, closed=closing.status == "PASS")


def _transcript(lines: list[_Line], peer: str) -> str:
    """The digest of all that was sent to a peer, as a channel keeps it."""
    return hashlib.sha256(b"".join(from_hex(one.digest) for one in lines if one.to == peer)).hexdigest()


def _odd_lines(report: Report, lines: list[_Line]) -> Iterator[str]:
    """Lines that no run writes, by number. Kinds that come after the report may be a model's, unknown here: `_later`
    says so. How many came before it, the report's own traffic says."""
    classes = {kind: known_class(kind) for kind in {line.kind for line in lines}}
    early, after = {one.kind for one in report.traffic}, Counter[tuple[str, str]]()
    for number, line in enumerate(lines):
        if line.event:
            fine = not (line.to or line.kind or line.message_class or line.digest or line.bytes)
        else:
            known, short = classes[line.kind], line.bytes <= longest(report)
            fine = line.to in report.transcripts and is_hex(line.digest, 32) and line.bytes > 0 and line.kind != ""
            if number < report.ledger.entries:
                fine = fine and line.message_class == known and (short or line.kind in LISTS)
            else:
                after[line.to, line.kind] += 1
                once = line.kind in ONCE
                fine = fine and line.message_class in (CLASSES if known is None else [known])
                fine = fine and line.kind not in early and (not once or (short and after[line.to, line.kind] == 1))
        if not fine:
            yield f"line {number + 1}"


def _odd_time(report: Report, lines: list[_Line]) -> Iterator[str]:
    opened = [line for line in lines[: report.ledger.entries] if line.event == "opened"][:1]
    around = [_instant(line.time) for line in (*opened, *lines[report.ledger.entries :][:1])]
    match around:
        case [datetime() as start, datetime() as end]:
            if not start - TOLERANCE <= datetime.fromisoformat(report.time) <= end + TOLERANCE:
                yield f"the report says {report.time}"
        case _:
            yield "they have no time"


def _instant(text: str) -> datetime | None:
    with suppress(ValueError):
        time = datetime.fromisoformat(text)
        return time if time.tzinfo else None
    return None


def _closing(report: Report, keys: Keys, lines: list[_Line]) -> Check:
    """At the end every peer signed for the digests of all that arrived: a ledger made up later has no such signatures.
    They do not cover the labels and times in our ledger."""
    name = f"{report.party}: ledger: every peer signed for all that it records"
    closings = {line.peer: line for line in lines if line.event == "countersigned"}
    messages, odd = [line for line in lines if line.kind not in ("Closing", "Abort")], []
    ours = keys[report.party].key_id
    for peer in (peer for peer in report.transcripts if peer in closings):
        closing, theirs = closings[peer], keys[peer].key_id
        sent, received = from_hex(closing.sent), from_hex(closing.received)
        statement = transcript_statement(bytes.fromhex(report.session), ours, theirs, sent, received)
        stands = signed(keys[peer], "transcript", statement, closing.signature)
        if not stands or closing.sent != _transcript(messages, peer):
            odd.append(peer)
    missing = ", ".join(peer for peer in report.transcripts if peer not in closings)
    aborted = any(line.kind == "Abort" for line in lines)
    if not odd and (missing or aborted):
        why = "we stopped it" if aborted else "a later step of it failed, or a peer left"
        unsigned = f"; not signed by {missing}" if missing else ""
        return Check(name=name, status="NOT RUN", detail=f"the session did not close: {why}{unsigned}")
    return ask(name, odd)


def _later(report: Report, lines: list[_Line], *, closed: bool) -> Check:
    """What left between the report and the end of its session, a model's messages among it."""
    name = f"{report.party}: ledger: classes of the messages that left after this report"
    after = [line for line in lines[report.ledger.entries :] if line.kind]
    found = Counter(line.message_class for line in after)
    listed = ", ".join(f"{found[one]:,} {one}" for one in sorted(CLASSES) if found[one]) or "none left"
    unknown = sum(known_class(kind) is None for kind in {line.kind for line in after})
    if unknown:
        listed += f"; {unknown} of their kinds not known here"
    if not closed:
        listed += "; the session did not close"
    return Check(name=name, status="PASS" if after and closed and not unknown else "NOT RUN", detail=listed)
