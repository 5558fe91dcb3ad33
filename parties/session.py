"""From links to a session that all parties agree on, and back: handshake, phases, close."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parties.agreement import Agreement, differences
from parties.channel import Channel, Link, M
from parties.errors import ColonnadeError, PeerAborted, PeerLost, ProtocolViolation, Refused
from parties.files import Scratch
from parties.identity import Identity
from parties.ledger import Ledger
from parties.message import PAYLOAD_LIMIT, Array, Message, kind
from parties.workers import Workers
from parties.zeromq import Patience, Peer, Post

_LOG = logging.getLogger("colonnade")
TRAIN = "train"
Progress = Callable[[str, int, int], None]


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
        if sizes != (32, 64, 32) or not re.fullmatch(r"[a-z0-9 ]{1,64}", self.task):
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


@kind(4, "control")
@dataclass(frozen=True, eq=False)
class Closing(Message):
    """Digests of all we sent to the receiver and got from it, signed."""

    sent: bytes
    received: bytes
    signature: bytes


@dataclass
class Session:
    """An open session: who we are, the agreement, one channel per peer, what left us so far.

    `channels` stand in the order of the agreement's ring (label holder first), without ourselves. `workers` and
    `scratch` are this party's own cores and disk.
    """

    me: Identity
    agreement: Agreement
    id: bytes
    channels: dict[str, Channel]
    ledger: Ledger
    approvals: dict[str, bytes]
    task: str = TRAIN
    tick: Callable[[], None] = lambda: None
    progress: Progress = lambda phase, done, total: None
    seconds: dict[str, float] = field(default_factory=dict)
    workers: Workers = field(default_factory=Workers)
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def name(self) -> str:
        return self.me.name

    @property
    def label_holder(self) -> str:
        return self.agreement.ring[0].name

    @property
    def is_label_holder(self) -> bool:
        return self.name == self.label_holder

    def broadcast(self, message: Message) -> None:
        for channel in self.channels.values():
            channel.send(message)

    def gather(self, expected: type[M]) -> dict[str, M]:
        """One message of a kind from every peer."""
        return {name: channel.receive(expected) for name, channel in self.channels.items()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens now, for progress, timing and error texts."""
        outer, self.ledger.phase = self.ledger.phase, name
        start = time.perf_counter()
        try:
            yield
        except ColonnadeError as error:
            if not hasattr(error, "phase"):
                error.phase = name  # type: ignore[attr-defined]
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            _LOG.info("%s: %.2f s", name, self.seconds[name])
            self.ledger.phase = outer

    def advance(self, done: int, total: int) -> None:
        """Called by the working loop: shows progress here and tells the peers that we are alive."""
        self.tick()
        self.progress(self.ledger.phase, done, total)

    def close(self) -> None:
        """Compare transcripts with every peer and countersign them into the ledger."""
        transcripts = {name: channel.transcripts for name, channel in self.channels.items()}
        for name, (sent, received) in transcripts.items():
            theirs = self.agreement.party(name).identity.key_id
            statement = transcript_statement(self.id, self.me.public.key_id, theirs, sent, received)
            signature = self.me.sign("transcript", statement)
            self.channels[name].send(Closing(sent, received, signature))
        for name, (sent, received) in transcripts.items():
            closing = self.channels[name].receive(Closing)
            if (closing.sent, closing.received) != (received, sent):
                raise ProtocolViolation(f"{name}: its record of this session differs from ours", peer=name)
            identity = self.agreement.party(name).identity
            statement = transcript_statement(self.id, self.me.public.key_id, identity.key_id, sent, received)
            if not identity.signed("transcript", statement, closing.signature):
                raise ProtocolViolation(f"{name}: its signature under the transcript is wrong", peer=name)
            self.ledger.note(
                "countersigned", peer=name, sent=sent.hex(), received=received.hex(), signature=closing.signature.hex()
            )


def transcript_statement(session: bytes, ours: bytes, theirs: bytes, sent: bytes, received: bytes) -> bytes:
    """What both sides of a pair sign at the close, whoever computes it: the smaller key id comes first."""
    return session + (ours + theirs + sent + received if ours < theirs else theirs + ours + received + sent)


def handshake(
    me: Identity, agreement: Agreement, approval: bytes, task: str, channels: Mapping[str, Channel], nonce: bytes
) -> tuple[bytes, dict[str, bytes]]:
    """Agree on the agreement, the task and a session id; returns the id and everybody's approval.

    Reveals:
        To every peer: the agreement's digest and our approval; where digests differ, the agreement's text.
    Raises:
        Refused: a peer has another agreement (field by field), another task, or has not approved.
    """
    ours = Hello(agreement.digest, approval, task, nonce)
    for channel in channels.values():
        channel.send(ours)
    try:
        hellos = {me.name: ours} | {name: channel.receive(Hello) for name, channel in channels.items()}
    except PeerLost as lost:  # one that did not come may have left because of another, who has told us why
        aborts = (other.unread_abort() for other in channels.values())
        raise next(filter(None, aborts), lost) from None
    others = [name for name in channels if hellos[name].digest != agreement.digest]
    for name in others:  # all tell before anybody stops, so that all learn what differs
        channels[name].send(AgreementText(np.frombuffer(agreement.canonical, np.uint8)))
    texts = {name: channels[name].receive(AgreementText).data.tobytes() for name in others}
    if others:
        raise Refused("; ".join(_difference(name, agreement, texts[name]) for name in others), peer=others[0])
    for name in channels:
        hello = hellos[name]
        if not agreement.approved(name, hello.approval):
            raise Refused(f"{name} has not approved this agreement: it must run 'colonnade sign' first", peer=name)
        if hello.task != task:
            raise Refused(f"{name} wants to {hello.task}, we want to {task}; start the same command", peer=name)
    session = hashlib.sha256(b"colonnade/session/1" + agreement.digest + len(task).to_bytes(2, "big") + task.encode())
    for party in agreement.parties:
        session.update(party.identity.curve + party.identity.verify + hellos[party.name].nonce)
    for channel in channels.values():
        channel.session = session.digest()
    return session.digest(), {name: hello.approval for name, hello in hellos.items()}


def _difference(peer: str, agreement: Agreement, text: bytes) -> str:
    try:
        found = differences(agreement, text)
    except ValueError as error:
        raise ProtocolViolation(f"{peer}: {error}", peer=peer) from None
    listed = "; ".join(f"{path}: ours {ours!r:.60}, theirs {theirs!r:.60}" for path, ours, theirs in found[:20])
    return f"{peer} has another agreement ({len(found)} fields differ): {listed}"


@contextmanager
def converse(
    me: Identity,
    agreement: Agreement,
    links: Mapping[str, Link],
    *,
    ledger: Ledger,
    approval: bytes | None = None,
    task: str = TRAIN,
    tick: Callable[[], None] = lambda: None,
    progress: Progress = lambda phase, done, total: None,
    nonce: bytes | None = None,
) -> Iterator[Session]:
    """A session over links that exist already: handshake, your block, close. Errors in the block abort the peers.

    `approval` is our signature under the agreement; None signs it here and now (notebooks, tests).
    """
    agreement.check_expiry()
    if agreement.party(me.name).identity != me.public:
        raise Refused(f"the agreement lists another key for {me.name} than ours ({me.public.fingerprint})")
    channels = {
        party.name: Channel(
            links[party.name],
            peer=party.name,
            our_id=me.public.key_id,
            peer_id=party.identity.key_id,
            ledger=ledger,
            timeout=agreement.deadlines.message,
        )
        for party in agreement.ring
        if party.name != me.name
    }
    try:
        approval = agreement.approve(me) if approval is None else approval
        start = time.perf_counter()
        session_id, approvals = handshake(
            me, agreement, approval, task, channels, secrets.token_bytes(32) if nonce is None else nonce
        )
        ledger.note("opened", session=session_id.hex(), agreement=agreement.digest.hex(), party=me.name, task=task)
        session = Session(me, agreement, session_id, channels, ledger, approvals, task, tick, progress)
        session.seconds["agree"] = time.perf_counter() - start
        yield session
        with session.phase("close"):
            session.close()
    except BaseException as error:
        for channel in channels.values():
            channel.abort(_reason(error), relayed=isinstance(error, PeerAborted))
        raise
    finally:
        ledger.seal()


def _reason(error: BaseException) -> str:
    """The kind of an error, which is all that peers are told; of an abort its own kind, so that it gets around."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, PeerAborted):
        return error.reason
    return error.kind if isinstance(error, ColonnadeError) else "error"


def allowed_classes(agreement: Agreement) -> frozenset[str]:
    """What the agreement lets out: with one feature holder its partial embeddings go in clear, there is no one to hide
    behind; with two or more nothing does."""
    return frozenset(
        ("control", "ciphertext", "masked", "aggregate", "plaintext")[: 5 if agreement.feature_holders == 1 else 4]
    )


@contextmanager
def open_session(
    me: Identity,
    agreement: Agreement,
    *,
    approval: bytes | None = None,
    task: str = TRAIN,
    ledger_path: Path | None = None,
    forbidden: frozenset[str] = frozenset(),
    listen: str | None = None,
    progress: Progress = lambda phase, done, total: None,
    log: Callable[[str], None] = lambda line: None,
) -> Iterator[Session]:
    """A session over ZeroMQ with every other party of the agreement.

    `listen` overrides the address we bind (behind a firewall it differs from the endpoint in the agreement);
    `forbidden` are message classes that our own policy does not let out.

    Raises:
        LocalError, Refused, PeerLost, PeerAborted, ProtocolViolation; see docs/operations.md for their exit codes.
    """
    agreement.check_expiry()
    peers = [
        Peer(party.name, party.identity, None if agreement.listens(me.name, party.name) else party.endpoint)
        for party in agreement.ring
        if party.name != me.name
    ]
    deadlines = agreement.deadlines
    patience = Patience(connect=deadlines.connect, silence=deadlines.silence, stall=deadlines.stall)
    waits = any(peer.endpoint is None for peer in peers)
    address = (listen or agreement.party(me.name).endpoint) if waits else None
    ledger = Ledger(me, ledger_path, allowed_classes(agreement) - forbidden)
    with (
        Post(me, peers, listen=address, patience=patience, frame_limit=PAYLOAD_LIMIT, log=log) as post,
        converse(
            me,
            agreement,
            {peer.name: post.link(peer.name) for peer in peers},
            ledger=ledger,
            approval=approval,
            task=task,
            tick=post.tick,
            progress=progress,
        ) as session,
    ):
        yield session
