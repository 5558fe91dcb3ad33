"""From links to a session that all parties agree on, and back: handshake, phases, close."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from parties.agreement import Agreement
from parties.channel import Channel, Link, M
from parties.errors import ColonnadeError, PeerAborted, PeerLost, ProtocolViolation, Refused
from parties.files import Scratch
from parties.handshake import Opened, open_by_handshake, take_back
from parties.identity import Identity
from parties.ledger import Ledger
from parties.message import PAYLOAD_LIMIT, Message, kind
from parties.workers import Workers
from parties.zeromq import Patience, Peer, Post

_LOG = logging.getLogger("colonnade")
TRAIN = "train"
Progress = Callable[[str, int, int], None]


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

    `channels` stand in the order of the agreement's ring (label holder or coordinator first), without ourselves and
    without who is `missing`; in a star a client has one, to the coordinator. `approvals` are of all who take part.
    `workers` and `scratch` are this party's own cores and disk. `returned`: new links of peers that were started again.
    """

    me: Identity
    agreement: Agreement
    opened: Opened
    channels: dict[str, Channel]
    ledger: Ledger
    task: str = TRAIN
    tick: Callable[[], None] = lambda: None
    progress: Progress = lambda phase, done, total: None
    seconds: dict[str, float] = field(default_factory=dict)
    workers: Workers = field(default_factory=Workers)
    scratch: Scratch = field(default_factory=Scratch)
    returned: Callable[[], Mapping[str, Link]] = dict

    @property
    def id(self) -> bytes:
        return self.opened.id

    @property
    def approvals(self) -> dict[str, bytes]:
        return self.opened.approvals

    @property
    def missing(self) -> dict[str, ColonnadeError]:
        return self.opened.missing

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

    def rejoined(self, seconds: float) -> dict[str, Channel]:
        """At a coordinator: the channels of clients that were killed and came back since we last asked, each within so
        many seconds. A client has one channel: nothing of the former one counts any more, and nobody countersigns it.

        Reveals:
            To such a client: what it was told when the session began.
        """
        found = {}
        for name, link in self.returned().items():
            channel = _channel(self.me, self.agreement, name, link, self.ledger)
            try:
                take_back(self.me, self.agreement, self.opened, self.task, channel, seconds)
            except ColonnadeError as error:
                _LOG.warning("%s does not come back: %s", name, error)
                channel.abort(_reason(error))
                continue
            if name in self.channels:
                self.ledger.note("not countersigned", peer=name, reason=PeerLost.kind)
            self.ledger.note("rejoined", peer=name)
            _LOG.info("%s came back", name)
            self.channels[name] = found[name] = channel
        return found

    def close(self) -> None:
        """Compare transcripts with every peer and countersign them into the ledger. A coordinator does without those
        of clients that dropped out; the ledger says so."""
        transcripts = {name: channel.transcripts for name, channel in self.channels.items()}
        for name, (sent, received) in transcripts.items():
            theirs = self.agreement.party(name).identity.key_id
            statement = transcript_statement(self.id, self.me.public.key_id, theirs, sent, received)
            with self._lenient(name):
                self.channels[name].send(Closing(sent, received, self.me.sign("transcript", statement)))
        for name, (sent, received) in transcripts.items():
            if name in self.channels:
                with self._lenient(name):
                    self._countersign(name, sent, received)

    def _countersign(self, name: str, sent: bytes, received: bytes) -> None:
        patience = self.agreement.deadlines.stall if self.agreement.is_horizontal else None
        closing = self.channels[name].receive(Closing, patience)
        if (closing.sent, closing.received) != (received, sent):
            raise ProtocolViolation(f"{name}: its record of this session differs from ours", peer=name)
        identity = self.agreement.party(name).identity
        statement = transcript_statement(self.id, self.me.public.key_id, identity.key_id, sent, received)
        if not identity.signed("transcript", statement, closing.signature):
            raise ProtocolViolation(f"{name}: its signature under the transcript is wrong", peer=name)
        self.ledger.note(
            "countersigned", peer=name, sent=sent.hex(), received=received.hex(), signature=closing.signature.hex()
        )

    @contextmanager
    def _lenient(self, name: str) -> Iterator[None]:
        """A coordinator notes that a client does not countersign, and goes on; any other party stops."""
        try:
            yield
        except (PeerLost, PeerAborted, ProtocolViolation) as error:
            if not self.agreement.is_horizontal or self.name != self.agreement.ring[0].name:
                raise
            self.leave_out([name], _reason(error))

    def leave_out(self, names: Iterable[str], reason: str = PeerLost.kind) -> None:
        """At a coordinator: these clients dropped out, so nobody countersigns what we and they said."""
        for name in [one for one in names if one in self.channels]:
            self.ledger.note("not countersigned", peer=name, reason=reason)
            self.channels.pop(name).abort(reason)


def transcript_statement(session: bytes, ours: bytes, theirs: bytes, sent: bytes, received: bytes) -> bytes:
    """What both sides of a pair sign at the close, whoever computes it: the smaller key id comes first."""
    return session + (ours + theirs + sent + received if ours < theirs else theirs + ours + received + sent)


def _channel(me: Identity, agreement: Agreement, peer: str, link: Link, ledger: Ledger) -> Channel:
    return Channel(
        link,
        peer=peer,
        our_id=me.public.key_id,
        peer_id=agreement.party(peer).identity.key_id,
        ledger=ledger,
        timeout=agreement.deadlines.message,
    )


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
    former: bytes = b"",
    returned: Callable[[], Mapping[str, Link]] = dict,
) -> Iterator[Session]:
    """A session over links that exist already: handshake, your block, close. Errors in the block abort the peers.

    `approval` is our signature under the agreement; None signs it here and now (notebooks, tests). `former`: at a
    client, the session to come back to, if it goes on. `returned`: see `Session`.
    """
    agreement.check_expiry()
    if agreement.party(me.name).identity != me.public:
        raise Refused(f"the agreement lists another key for {me.name} than ours ({me.public.fingerprint})")
    channels = {
        party.name: _channel(me, agreement, party.name, links[party.name], ledger) for party in agreement.peers(me.name)
    }
    try:
        approval = agreement.approve(me) if approval is None else approval
        start = time.perf_counter()
        opened = open_by_handshake(
            me, agreement, approval, task, channels, secrets.token_bytes(32) if nonce is None else nonce, former
        )
        ledger.note("opened", session=opened.id.hex(), agreement=agreement.digest.hex(), party=me.name, task=task)
        for name, error in opened.missing.items():
            ledger.note("missing", peer=name, reason=error.kind)
            del channels[name]
        session = Session(me, agreement, opened, channels, ledger, task, tick, progress, returned=returned)
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
    """What the agreement lets out. Plaintext: the partial embeddings of a single feature holder, as there is no one to
    hide them behind; what [network] consents to; single updates where secure aggregation is off; else nothing."""
    plan = agreement.horizontal
    consents = agreement.network.open_gradients or agreement.network.separate_embeddings
    clear = agreement.feature_holders == 1 or consents if plan is None else not plan.secure
    return frozenset(("control", "ciphertext", "masked", "aggregate", *(("plaintext",) if clear else ())))


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
    former: bytes = b"",
    progress: Progress = lambda phase, done, total: None,
    log: Callable[[str], None] = lambda line: None,
) -> Iterator[Session]:
    """A session over ZeroMQ with every other party of the agreement.

    `listen` overrides the address we bind (behind a firewall it differs from the endpoint in the agreement);
    `forbidden` are message classes that our own policy does not let out; `former`: see `converse`.

    Raises:
        LocalError, Refused, PeerLost, PeerAborted, ProtocolViolation; see docs/operations.md for their exit codes.
    """
    agreement.check_expiry()
    peers = [
        Peer(party.name, party.identity, None if agreement.listens(me.name, party.name) else party.endpoint)
        for party in agreement.peers(me.name)
    ]
    deadlines = agreement.deadlines
    patience = Patience(connect=deadlines.connect, silence=deadlines.silence, stall=deadlines.stall)
    waits = any(peer.endpoint is None for peer in peers)
    address = (listen or agreement.party(me.name).endpoint) if waits else None
    ledger = Ledger(me, ledger_path, allowed_classes(agreement) - forbidden)
    with (
        Post(
            me,
            peers,
            listen=address,
            patience=patience,
            frame_limit=PAYLOAD_LIMIT,
            takes_back=agreement.is_horizontal,
            log=log,
        ) as post,
        converse(
            me,
            agreement,
            {peer.name: post.link(peer.name) for peer in peers},
            ledger=ledger,
            approval=approval,
            task=task,
            tick=post.tick,
            progress=progress,
            former=former,
            returned=post.returned,
        ) as session,
    ):
        yield session
