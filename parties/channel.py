"""A conversation with one peer: typed messages in order, each recorded, every wait with a deadline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Protocol, TypeVar

from parties.errors import ColonnadeError, LocalError, PeerAborted, PeerLost, ProtocolViolation
from parties.ledger import Ledger
from parties.message import Abort, Header, Message, decode, encode, name_of, parse_header

M = TypeVar("M", bound=Message)
NO_SESSION = bytes(32)


class Link(Protocol):
    """Carries frames to and from one peer, in order, once. Both methods raise PeerLost at their deadline (seconds).

    A link whose `send` waits for room may also have `last(header, payload)`, for a last message that does not wait.
    """

    def send(self, header: bytes, payload: bytes | memoryview, timeout: float) -> None: ...

    def receive(self, timeout: float) -> tuple[bytes, bytes]: ...


class Channel:
    """Typed messages over a Link. Both directions are hashed: at close the two sides compare what they saw."""

    def __init__(
        self, link: Link, *, peer: str, our_id: bytes, peer_id: bytes, ledger: Ledger, timeout: float = 3600.0
    ) -> None:
        self.peer = peer
        self.session = NO_SESSION
        self._link, self._ledger, self._timeout = link, ledger, timeout
        self._our_id, self._peer_id = our_id, peer_id
        self._sent = self._received = 0
        self._sent_hash, self._received_hash = hashlib.sha256(), hashlib.sha256()

    @property
    def transcripts(self) -> tuple[bytes, bytes]:
        """Digest of everything sent so far, and of everything received."""
        return self._sent_hash.digest(), self._received_hash.digest()

    def send(self, message: Message, timeout: float | None = None) -> None:
        """Record, then send. Raises Refused (class not allowed), PeerLost, PeerAborted, LocalError (too large)."""
        header, payload = self._record(message)
        try:
            self._link.send(header, payload, self._timeout if timeout is None else timeout)
        except PeerLost as lost:
            raise self.unread_abort() or lost from None

    def _record(self, message: Message) -> tuple[bytes, bytes | memoryview]:
        try:
            header, payload = encode(message, self.session, self._our_id, self._peer_id, self._sent)
        except ValueError as error:
            raise LocalError(f"cannot send to {self.peer}: {error}", peer=self.peer) from None
        digest = _digest(header, payload)
        shape = message.data.shape if message.dtype else ()  # type: ignore[attr-defined]
        size = len(header) + len(payload)
        self._ledger.record(self.peer, type(message).__name__, message.ledger_class, shape, size, digest)
        self._sent += 1
        self._sent_hash.update(digest)
        return header, payload

    def unread_abort(self) -> PeerAborted | None:
        """The abort that the lost peer sent, if it lies among what has arrived."""
        with suppress(ColonnadeError, ValueError):
            while True:
                head, payload = self._link.receive(0.0)
                if aborted := self._abort_in(parse_header(head), payload):
                    return aborted
        return None

    def _abort_in(self, header: Header, payload: bytes) -> PeerAborted | None:
        if header.sender != self._peer_id or header.receiver != self._our_id:
            raise ValueError("a message that names another sender or receiver")
        if header.kind != Abort.kind:
            return None
        abort = decode(header, payload, Abort)
        whose = "because another party did: " if abort.relayed else ""
        text = f"{self.peer} stopped ({whose}{_REASONS[abort.reason]}); its own message and log say more"
        return PeerAborted(text, peer=self.peer, reason=abort.reason)

    def receive(self, expected: type[M], timeout: float | None = None) -> M:
        """The next message, which must be of the `expected` kind, or one derived from it.

        Raises:
            ProtocolViolation: anything else came, or it is malformed, of another session, or out of order.
            PeerAborted: the peer stopped and told why. PeerLost: nothing came in time.
        """
        head, payload = self._link.receive(self._timeout if timeout is None else timeout)
        try:
            header = parse_header(head)
            if aborted := self._abort_in(header, payload):
                raise aborted
            if header.session != self.session:
                raise ValueError(f"{name_of(header.kind)} belongs to another session")
            if header.number != self._received:
                raise ValueError(f"message {header.number} where {self._received} is due")
            message = decode(header, payload, expected)
        except ValueError as error:
            raise ProtocolViolation(f"{self.peer}: {error}", peer=self.peer) from None
        self._received += 1
        self._received_hash.update(_digest(head, payload))
        return message

    def ask(self, stream: Iterable[Message], expected: type[M], window: int = 4) -> Iterator[M]:
        """Send a stream of questions and yield the answers in order, with `window` questions in flight."""
        if window < 1:
            raise ValueError("a window holds at least one question")
        waiting = 0
        for question in stream:
            self.send(question)
            waiting += 1
            if waiting == window:
                yield self.receive(expected)
                waiting -= 1
        for _ in range(waiting):
            yield self.receive(expected)

    def abort(self, reason: str, *, relayed: bool = False) -> None:
        """Tell the peer that we stop, if it can still be told; never raises."""
        with suppress(ColonnadeError):
            header, payload = self._record(Abort(reason, relayed))
            last = getattr(self._link, "last", None)  # links in memory have none
            if last is None:
                self._link.send(header, payload, 2.0)
            else:
                last(header, payload)


_REASONS = {
    "local": "a problem with its own input or machine",
    "refused": "its policy or agreement refuses",
    "lost": "it lost a party",
    "violation": "it saw a violation of the protocol",
    "interrupted": "somebody interrupted it",
    "error": "an internal error",
}


def relay(stream: Iterable[Message], to: Channel, count: int, expected: type[M], source: Channel) -> Iterator[M]:
    """Send a stream to one peer while receiving `count` messages from another, one for one.

    In a ring in which everybody does this, nobody runs more than a message ahead, so nobody blocks on a full queue.
    """
    outgoing = iter(stream)
    for _ in range(count):
        message = next(outgoing, None)
        if message is not None:
            to.send(message)
        yield source.receive(expected)
    for message in outgoing:
        to.send(message)


def _digest(header: bytes, payload: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(len(header).to_bytes(4, "big"))
    digest.update(header)
    digest.update(payload)
    return digest.digest()
