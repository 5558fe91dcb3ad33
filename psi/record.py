"""The ledger beside a report: whether it records what the report says that left, and no other class of message."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from parties.errors import LocalError
from parties.files import read_bytes
from parties.identity import PublicIdentity
from parties.ledger import check_ledger
from parties.session import transcript_statement
from psi.report import Check, Report

Keys = dict[str, PublicIdentity]
REPORT = "psi_report.json"
LET_OUT = {"control", "masked", "aggregate"}  # the classes of an intersection's messages


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


def beside(path: Path, name: str) -> Path | None:
    """Another piece of the same run's evidence, such as "ledger.jsonl"; None where the report's file was renamed."""
    return path.with_name(path.name.removesuffix(REPORT) + name) if path.name.endswith(REPORT) else None


class _Line(msgspec.Struct, frozen=True):
    """What the checks look at in a line of a ledger: a message that left, or an event."""

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
    odd = [name for name, one in report.transcripts.items() if one.sent != _transcript(before, name)]
    yield ask(f"{title}its messages give the transcripts that the report states", odd)
    yield _closing(report, keys, entries)


def _transcript(lines: list[_Line], peer: str) -> str:
    """The digest of all that was sent to a peer, as a channel keeps it."""
    return hashlib.sha256(b"".join(from_hex(one.digest) for one in lines if one.to == peer)).hexdigest()


def _closing(report: Report, keys: Keys, lines: list[_Line]) -> Check:
    """At the end every peer signed for all that was exchanged: a ledger made up later has no such signatures."""
    name = f"{report.party}: ledger: every peer signed for all that it records"
    closings = {line.peer: line for line in lines if line.event == "countersigned"}
    if not closings:
        return Check(name=name, status="NOT RUN", detail="the session did not close; a later step of it failed")
    messages, odd = [line for line in lines if line.kind != "Closing"], []
    ours = keys[report.party].key_id
    for peer in report.transcripts:
        closing, theirs = closings.get(peer, _Line()), keys[peer].key_id
        sent, received = from_hex(closing.sent), from_hex(closing.received)
        statement = transcript_statement(bytes.fromhex(report.session), ours, theirs, sent, received)
        stands = signed(keys[peer], "transcript", statement, closing.signature)
        if not stands or closing.sent != _transcript(messages, peer):
            odd.append(peer)
    return ask(name, odd)
