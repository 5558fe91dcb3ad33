"""How a session begins: all show which agreement they are here for and that they approved it, and a session id is made.

In a mesh every pair exchanges `Hello`. In a star clients talk to the coordinator alone, which relays:

    1  u <-> C   Hello      digest of the agreement, our approval, the task, a fresh nonce
    2  C -> u    Roster     nonce and approval of everybody who came in time
    3  u -> C    Joining    our signature under the session id, which follows from the roster
    4  C -> u    Roll       the signatures of all who joined

A client signs one session id only, with its own fresh nonce in it, and takes part with those only who signed the same
one. So a coordinator that shows clients different rosters splits them into groups that know their members; it cannot
make a client believe that somebody takes part who does not, nor play an earlier session again.

A client that was killed and remembers the session's id may come back to it, by the same four messages: `Roster` and
`Roll` are those of the beginning, and it signs the id of the new conversation, which the headers have from then on:

    SHA-256("colonnade/rejoin/1" || session || the client's fresh nonce || the coordinator's fresh nonce)

So frames of the former conversation, and a greeting that is played again, are refused.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from parties.agreement import Agreement, differences
from parties.channel import Channel
from parties.errors import ColonnadeError, PeerAborted, PeerLost, ProtocolViolation, Refused, blame
from parties.identity import Identity
from parties.message import Array, Message, kind

_LOG = logging.getLogger("colonnade")
_SIGNED, _SIGNED_AGAIN = "session", "rejoin"  # for what a signature is
NONCE, SIGNATURE = 32, 64
T = TypeVar("T")


@kind(2, "control")
@dataclass(frozen=True, eq=False)
class Hello(Message):
    """Which agreement we are here for, that we approved it, what we want to do under it, and a fresh nonce."""

    digest: bytes
    approval: bytes
    task: str
    nonce: bytes

    def __post_init__(self) -> None:
        sizes = len(self.digest), len(self.approval), len(self.nonce)
        if sizes != (32, SIGNATURE, NONCE) or not re.fullmatch(r"[a-z0-9 ]{1,64}", self.task):
            raise ValueError("Hello holds a digest, a signature, a task and a nonce")


@kind(3, "control", "|u1", 1)
@dataclass(frozen=True, eq=False)
class AgreementText(Message):
    """Our agreement's canonical bytes, in answer to a Hello with another digest."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.size > 1 << 16:
            raise ValueError("an agreement is at most 64 KiB")


@kind(5, "control", "|u1", 2)
@dataclass(frozen=True, eq=False)
class Roster(Message):
    """C -> u: for every party of the agreement in order its nonce and approval; zeros for who did not come."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.shape[1] != NONCE + SIGNATURE:
            raise ValueError("a roster has a nonce and an approval a row")


@kind(6, "control", "|u1", 1)
@dataclass(frozen=True, eq=False)
class Joining(Message):
    """u -> C: our signature under the session id."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.size != SIGNATURE:
            raise ValueError("a signature has 64 bytes")


@kind(7, "control", "|u1", 2)
@dataclass(frozen=True, eq=False)
class Roll(Message):
    """C -> u: for every party of the agreement in order its signature under the session id; zeros for who is absent."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.shape[1] != SIGNATURE:
            raise ValueError("a roll has a signature a row")


@dataclass(frozen=True)
class Opened:
    """A session's id, the approvals of those who signed it, the same at all, and why others do not take part or do not
    any more (at the coordinator only). conversation: what stands in the headers: the session's id, or for who came back
    another one. roster, roll: at the coordinator, for who comes back."""

    id: bytes
    approvals: dict[str, bytes]
    missing: dict[str, ColonnadeError] = field(default_factory=dict)
    conversation: bytes = b""
    shown: tuple[Roster, Roll] | None = None


def open_by_handshake(
    me: Identity,
    agreement: Agreement,
    approval: bytes,
    task: str,
    channels: Mapping[str, Channel],
    nonce: bytes,
    former: bytes = b"",
) -> Opened:
    """Agree on the agreement, the task and a session id, which then stands in all our channels.

    former: at a client, the session in which it took part before it was killed; it comes back if that goes on.

    Reveals:
        To every party: the agreement's digest, our approval and our signature under the session id; to those that we
        have a channel to, where digests differ, the agreement's text.
    Raises:
        Refused: a peer has another agreement (field by field), another task, or has not approved.
        PeerLost: somebody did not come; in a star, too few clients did.
        ProtocolViolation: a coordinator whose roster or roll is not true.
    """
    ours = Hello(agreement.digest, approval, task, nonce)
    for channel in channels.values():
        channel.send(ours)
    if agreement.is_horizontal and agreement.ring[0].name != me.name:
        opened = _join(me, agreement, ours, channels, former)
    else:
        opened = (_gather if agreement.is_horizontal else _mesh)(me, agreement, ours, channels)
    for name, channel in channels.items():
        if name not in opened.missing:
            channel.session = opened.conversation or opened.id
    return opened


def take_back(me: Identity, agreement: Agreement, opened: Opened, task: str, channel: Channel, seconds: float) -> None:
    """At the coordinator: a client that was killed comes back into the session, over a new channel.

    Reveals:
        To the client: what it was told when the session began.
    Raises:
        Refused: it is here for something else, or has no part in this session.
        ProtocolViolation: it signs another conversation. PeerLost, PeerAborted: it is not done after so many seconds.
    """
    name, until = channel.peer, time.monotonic() + seconds
    if name not in opened.approvals or opened.shown is None:
        raise Refused(f"{name} has no part in this session: it began without it", peer=name)
    ours = Hello(agreement.digest, opened.approvals[me.name], task, secrets.token_bytes(NONCE))
    channel.send(ours, seconds)
    hello = channel.receive(Hello, seconds)
    if hello.digest != agreement.digest:
        channel.send(AgreementText(np.frombuffer(agreement.canonical, np.uint8)), seconds)
        raise Refused(f"{name} came back with another agreement", peer=name)
    _same(agreement, ours.task, name, hello)
    roster, roll = opened.shown
    channel.send(roster, seconds)
    conversation = _conversation(opened.id, hello.nonce, ours.nonce)
    signature = channel.receive(Joining, max(0.0, until - time.monotonic())).data.tobytes()
    if not agreement.party(name).identity.signed(_SIGNED_AGAIN, conversation, signature):
        raise ProtocolViolation(f"{name}: signed another conversation than this one", peer=name)
    channel.send(roll, seconds)
    channel.session = conversation


def _mesh(me: Identity, agreement: Agreement, ours: Hello, channels: Mapping[str, Channel]) -> Opened:
    try:
        hellos = {me.name: ours} | {name: channel.receive(Hello) for name, channel in channels.items()}
    except PeerLost as lost:  # one that did not come may have left because of another, who has told us why
        aborts = (other.unread_abort() for other in channels.values())
        raise next(filter(None, aborts), lost) from None
    _check(agreement, ours.task, channels, hellos)
    nonces = {name: hello.nonce for name, hello in hellos.items()}
    return Opened(_session_id(agreement, ours.task, nonces), {name: hello.approval for name, hello in hellos.items()})


def _gather(me: Identity, agreement: Agreement, ours: Hello, channels: Mapping[str, Channel]) -> Opened:
    """At the coordinator: with those who come before the deadline, if they are enough."""
    missing: dict[str, ColonnadeError] = {}
    deadlines = agreement.deadlines
    hellos = _from_each(channels, lambda channel, left: channel.receive(Hello, left), deadlines.connect, missing)
    _check(agreement, ours.task, channels, hellos)
    hellos[me.name] = ours
    _require_quorum(agreement, hellos, missing)
    session = _session_id(agreement, ours.task, {name: hello.nonce for name, hello in hellos.items()})
    roster = Roster(_table(agreement, {n: one.nonce + one.approval for n, one in hellos.items()}, NONCE + SIGNATURE))

    def joined(channel: Channel, left: float) -> bytes:
        signature: bytes = channel.receive(Joining, left).data.tobytes()
        if not agreement.party(channel.peer).identity.signed(_SIGNED, session, signature):
            raise ProtocolViolation(f"{channel.peer}: signed another session than this one", peer=channel.peer)
        return signature

    _from_each(channels, lambda channel, left: channel.send(roster, left), deadlines.stall, missing)
    signatures = _from_each(channels, joined, deadlines.stall, missing)
    signatures[me.name] = me.sign(_SIGNED, session)
    _require_quorum(agreement, signatures, missing)
    roll = Roll(_table(agreement, signatures, SIGNATURE))
    _from_each(channels, lambda channel, left: channel.send(roll, left), deadlines.stall, missing)
    _require_quorum(agreement, signatures.keys() - missing.keys(), missing)
    for name, error in missing.items():
        _LOG.warning("%s does not take part: %s", name, error)
        channels[name].abort(error.reason if isinstance(error, PeerAborted) else error.kind)
    approvals = {name: hellos[name].approval for name in signatures}  # of the roll that all have
    return Opened(session, approvals, missing, shown=(roster, roll))


def _from_each(
    channels: Mapping[str, Channel],
    step: Callable[[Channel, float], T],
    seconds: float,
    missing: dict[str, ColonnadeError],
) -> dict[str, T]:
    """What `step`, given the seconds left for all together, returns for every client that is not missing; whoever is
    gone by then, or breaks the protocol, is entered among the missing."""
    found, until = {}, time.monotonic() + seconds
    for name, channel in channels.items():
        if name in missing:
            continue
        try:
            found[name] = step(channel, max(0.0, until - time.monotonic()))
        except (PeerLost, PeerAborted, ProtocolViolation) as error:
            missing[name] = error
    return found


def _require_quorum(agreement: Agreement, there: Iterable[str], missing: Mapping[str, ColonnadeError]) -> None:
    count, needed = len(set(there) & set(agreement.clients)), agreement.quorum
    if count < needed:
        stopped = "".join(f"; {error}" for error in missing.values() if not isinstance(error, PeerLost))
        raise PeerLost(
            f"{count} of {len(agreement.clients)} clients came within {agreement.deadlines.connect:.0f} s, {needed} "
            f"are needed; missing: {', '.join(sorted(missing))}{stopped}; ask whether they are running"
        )


def _join(me: Identity, agreement: Agreement, ours: Hello, channels: Mapping[str, Channel], former: bytes) -> Opened:
    """At a client: only with those who sign the same session, or signed the one that we remember."""
    ((coordinator, channel),) = channels.items()
    deadlines = agreement.deadlines
    try:  # who takes us back does so between two rounds
        hello = channel.receive(Hello, max(deadlines.connect, deadlines.message) if former else deadlines.connect)
    except PeerLost as lost:
        raise PeerLost(f"{lost}; it may have begun without us", peer=coordinator) from None
    _check(agreement, ours.task, channels, {coordinator: hello})
    patience = deadlines.connect + 3 * deadlines.stall  # it waits for the others
    roster = channel.receive(Roster, patience).data
    with blame(coordinator):
        rows = _rows(agreement, roster)
        session = _session_id(agreement, ours.task, {name: row[:NONCE] for name, row in rows.items()})
        for name, known in ((me.name, ours), (coordinator, hello)):
            if session != former and rows.get(name) != known.nonce + known.approval:
                raise ValueError(
                    f"its roster has another nonce or approval of {name}; if the job goes on from before we were "
                    "started, run with --resume where we kept its checkpoint"
                )
        approvals = {name: row[NONCE:] for name, row in rows.items()}
        for name, approval in approvals.items():
            if not agreement.approved(name, approval):
                raise ValueError(f"its roster has no approval of {name}")
    conversation = _conversation(session, ours.nonce, hello.nonce) if session == former else b""
    signature = me.sign(_SIGNED_AGAIN, conversation) if conversation else me.sign(_SIGNED, session)
    channel.send(Joining(np.frombuffer(signature, np.uint8)))
    roll = channel.receive(Roll, patience).data
    with blame(coordinator):
        signatures = _rows(agreement, roll)
        for name, signature in signatures.items():
            if name not in rows or not agreement.party(name).identity.signed(_SIGNED, session, signature):
                raise ValueError(f"{name} has not joined the session that we were shown")
        if not {me.name, coordinator} <= signatures.keys():
            raise ValueError("its roll lacks us or itself")
        if len(signatures.keys() & set(agreement.clients)) < agreement.quorum:
            raise ValueError(f"its roll has fewer clients than the quorum of {agreement.quorum}")
    return Opened(session, {name: approvals[name] for name in signatures}, conversation=conversation)


def _check(agreement: Agreement, task: str, channels: Mapping[str, Channel], hellos: Mapping[str, Hello]) -> None:
    """Raises Refused unless all who said Hello are here for the same, and approved it."""
    others = [name for name in channels if name in hellos and hellos[name].digest != agreement.digest]
    for name in others:  # all tell before anybody stops, so that all learn what differs
        channels[name].send(AgreementText(np.frombuffer(agreement.canonical, np.uint8)))
    texts = {name: channels[name].receive(AgreementText).data.tobytes() for name in others}
    if others:
        raise Refused("; ".join(_difference(name, agreement, texts[name]) for name in others), peer=others[0])
    for name in channels:
        if name in hellos:
            _same(agreement, task, name, hellos[name])


def _same(agreement: Agreement, task: str, name: str, hello: Hello) -> None:
    if not agreement.approved(name, hello.approval):
        raise Refused(f"{name} has not approved this agreement: it must run 'colonnade sign' first", peer=name)
    if hello.task != task:
        raise Refused(f"{name} wants to {hello.task}, we want to {task}; start the same command", peer=name)


def _difference(peer: str, agreement: Agreement, text: bytes) -> str:
    try:
        found = differences(agreement, text)
    except ValueError as error:
        raise ProtocolViolation(f"{peer}: {error}", peer=peer) from None
    listed = "; ".join(f"{path}: ours {ours!r:.60}, theirs {theirs!r:.60}" for path, ours, theirs in found[:20])
    return f"{peer} has another agreement ({len(found)} fields differ): {listed}"


def _session_id(agreement: Agreement, task: str, nonces: Mapping[str, bytes]) -> bytes:
    """Over the agreement, the task, everybody's keys, and the nonces of those who came (zeros for the others)."""
    session = hashlib.sha256(b"colonnade/session/1" + agreement.digest + len(task).to_bytes(2, "big") + task.encode())
    for party in agreement.parties:
        session.update(party.identity.curve + party.identity.verify + nonces.get(party.name, bytes(NONCE)))
    return session.digest()


def _conversation(session: bytes, theirs: bytes, ours: bytes) -> bytes:
    """theirs: the fresh nonce of the client that comes back; ours: the coordinator's."""
    return hashlib.sha256(b"colonnade/rejoin/1" + session + theirs + ours).digest()


def _table(agreement: Agreement, rows: Mapping[str, bytes], width: int) -> Array:
    raw = b"".join(rows.get(party.name, bytes(width)) for party in agreement.parties)
    return np.frombuffer(raw, np.uint8).reshape(-1, width)


def _rows(agreement: Agreement, data: Array) -> dict[str, bytes]:
    """Party -> its row, without the absent. Raises ValueError."""
    if len(data) != len(agreement.parties):
        raise ValueError("a list of another number of parties")
    rows = ((party.name, row.tobytes()) for party, row in zip(agreement.parties, data, strict=True))
    return {name: row for name, row in rows if any(row)}
