"""One peer: what the role sends to it and receives from it, and how whoever serves the sockets judges it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq

from parties.curve import Socket
from parties.delivery import Delivery
from parties.errors import ColonnadeError, LocalError, PeerLost, ProtocolViolation, Refused
from parties.identity import PublicIdentity

if TYPE_CHECKING:
    from parties.zeromq import Post

LOOK = 0.05  # seconds between two looks at the clock
BEHIND = 4  # frames or messages that a peer may not know to have arrived or been consumed until the next look
RESEND = 30.0  # seconds without acknowledgement; a backstop (new connections send again), doubled up to ten times


@dataclass(frozen=True)
class Peer:
    """A party that we talk to. `endpoint` is the tcp://host:port to connect to, or None when it connects to us."""

    name: str
    public: PublicIdentity
    endpoint: str | None


@dataclass(frozen=True)
class Patience:
    """Seconds. `silence` and `stall` begin once the peer has come; `stall` runs only while we wait for it."""

    connect: float = 600.0  # for a peer to come at all: people start at different times
    silence: float = 15.0  # no frame at all
    stall: float = 120.0  # frames, but no progress of the peer's working loop
    handshake: float = 20.0  # connections that never become a conversation; half of it for another protocol
    flush: float = 10.0  # at close, for what is not yet acknowledged


class Link:
    """Messages to and from one peer. `send` and `receive` are for one thread, the role's; who waits in them serves the
    sockets."""

    def __init__(self, post: Post, peer: Peer, limit: int) -> None:
        now = time.monotonic()
        self.name, self.peer = peer.name, peer
        self._post = post
        self.touched = True  # there is something to do for it
        self.books = Delivery(peer.name, limit)
        self.failure: ColonnadeError | None = None
        self.socket: Socket | None = None  # the post's router, or our own dealer
        self.route: list[bytes] | None = None  # what to put before a frame; None while there is no connection
        self.came: float | None = None  # when the peer's key was first accepted, or its server accepted ours
        self.born = self.heard = self.progressed = self.acknowledged = now
        self.refusing: float | None = None  # since when every handshake fails
        self.vague = False  # whether the last one failed for a reason unknown, as with a wrong key
        self.awaited: float | None = None  # since when the role waits for this peer
        self.knocked: float | None = None  # since when another process of this peer wants its place
        self.next_beat = 0.0
        self.resend = RESEND
        self.told = (0, 0)  # the counts that the peer was last told

    def send(self, header: bytes, payload: bytes | memoryview, timeout: float) -> None:
        """Send a message, or queue it; waits while the peer has 16 unconsumed ones."""
        with self._post.interrupts, self._post.lock:
            self._wait(lambda: self.books.room and not self.books.closed, timeout, "took no message")
            self.books.push(header, payload)
            self._post.deliver(self)
            self._post.leave()

    def last(self, header: bytes, payload: bytes | memoryview) -> None:
        """Send or queue the last message, if the peer can still be told; never waits: the peer has room for it."""
        with self._post.interrupts, self._post.lock:
            if self._post.closing is None and not self.mute and not self.books.closed and self.books.last_room:
                self.books.push(header, payload)
                self.touched = True
                self._post.turn()

    def receive(self, timeout: float) -> tuple[bytes, bytes]:
        """The next header and payload. What a peer sent before it left is still delivered."""
        with self._post.interrupts, self._post.lock:
            self._wait(lambda: bool(self.books.inbox), timeout, "sent nothing")
            message = self.books.take()
            if self.behind >= BEHIND:
                self.touched = True
                self._post.turn()
            self._post.leave()
        return message

    def ready(self, timeout: float) -> None:
        """Wait until the peer is there."""
        with self._post.interrupts, self._post.lock:
            self._wait(lambda: bool(self.books.target), timeout, "did not come")

    def _wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        """With the post's lock. Waiting is progress: whoever waits for another is alive."""
        deadline = time.monotonic() + timeout
        self.awaited = time.monotonic()
        try:
            while True:
                self._post.tick()
                if self._post.closing is not None:
                    raise LocalError("the transport is closed")
                if self.failure is not None:
                    raise type(self.failure)(*self.failure.args, peer=self.name)
                if done():
                    return
                if self._post.look():
                    continue
                if self.books.closed:
                    raise PeerLost(
                        f"{self.name} closed the connection; see its own message for the reason", peer=self.name
                    )
                left = deadline - time.monotonic()
                if left <= 0:
                    raise PeerLost(
                        f"{self.name} {what} within {timeout:.0f} s; ask whether it is running", peer=self.name
                    )
                self._post.serve(min(LOOK, left))
        finally:
            self.awaited = None

    # ---- for whoever serves the sockets, with the lock

    @property
    def behind(self) -> int:
        """How many frames or messages the peer does not know to have arrived or been consumed."""
        return max(self.books.received - self.told[0], self.books.consumed - self.told[1])

    @property
    def mute(self) -> bool:
        """Whether nothing more is sent. A peer that violated the protocol may be honest: it hears why we stop."""
        return self.failure is not None and not isinstance(self.failure, ProtocolViolation)

    @property
    def finished(self) -> bool:
        """When closing: whether the peer cannot, or need not, acknowledge anything more."""
        if self.failure is not None:
            return self.mute or self.route is None or self.books.idle
        gone = self.route is None and not self.books.target  # else its first frame is on its way
        return self.books.closed or self.books.settled or gone

    def connected(self) -> None:
        """A new connection: send again what may be lost with the old one, and begin by showing ourselves."""
        self.books.rewind()
        self.refusing, self.next_beat, self.resend = None, 0.0, RESEND
        self.touched = True

    def greet(self, now: float) -> None:
        """The peer's key is accepted for the first time: from here on it must be heard."""
        if self.came is None:
            self.came = self.heard = now

    def accept(self, frame: bytes | memoryview, now: float) -> None:
        """One frame of this peer's."""
        before = self.books.acked, self.books.progress
        if not self.books.accept(frame):
            if not self.books.target:  # it speaks to an earlier run of ours, learns so from our beat, and may return
                self.came = None
            return
        self.greet(now)
        self.heard = now
        self.touched |= self.books.closed or self.behind >= BEHIND or not self.books.idle
        if self.books.acked != before[0]:
            self.acknowledged, self.resend = now, RESEND
        if self.books.progress != before[1]:
            self.progressed = now

    def deliver(self, now: float, look: bool) -> bool:
        """Send what is due, and at least a beat when the peer waits for our counts or has not heard us lately; whether
        anything went. What we send tells the counts too: an answer that comes soon saves the beat."""
        books, sent = self.books, False
        if books.waiting and now - self.acknowledged > self.resend:
            books.rewind()
            self.acknowledged, self.resend = now, min(2 * self.resend, 10 * RESEND)
        self.touched = False
        while frame := books.due(self._post.progress):
            if not books.waiting:
                self.acknowledged = now
            if not self.put(frame, now):
                self.touched = True
                break
            sent = True
            books.gone()
        urgent = look or books.closed or self._post.closing is not None or self.behind >= BEHIND
        if (urgent and self.behind) or now >= self.next_beat:
            sent |= self.put(books.beat(self._post.progress), now)
        return sent

    def put(self, frame: bytes, now: float) -> bool:
        """Hand one frame to the socket; whether it took it."""
        if self.route is None or self.socket is None or self.mute:
            return False
        try:
            self.socket.send_multipart([*self.route, frame], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self.route = None
            return False
        self.told = (self.books.received, self.books.consumed)
        self.next_beat = now + min(2.0, self._post.patience.silence / 4)
        return True

    def forgive(self, slept: float) -> None:
        """We were stopped or starved ourselves: that is no peer's silence."""
        self.heard += slept
        self.progressed += slept
        self.acknowledged += slept
        if self.knocked is not None:
            self.knocked += slept
        if self.awaited is not None:
            self.awaited += slept

    def judge(self, now: float, patience: Patience, strangers: str) -> ColonnadeError | None:
        """What is wrong with this peer by now."""
        where = self.peer.endpoint
        if self.came is None:
            late = now - self.born > patience.connect
            enough = patience.handshake if self.vague else patience.handshake / 2
            if self.refusing is not None and (late or now - self.refusing > enough):
                ours, agreed = self._post.me.public.fingerprint, self.peer.public.fingerprint
                return Refused(
                    f"no handshake with {self.name} at {where} succeeds: its key is not the agreed {agreed} (ours is "
                    f"{ours}), or another program answers there, or a forwarder with no program behind it; compare the "
                    "fingerprints and the endpoint, and ask whether it is running",
                    peer=self.name,
                )
            if not late:
                return None
            place = f"nobody answers at {where}" if where else f"it never connected to {self._post.endpoint}{strangers}"
            text = f"{self.name} did not come within {patience.connect:.0f} s: {place}; ask whether it is running"
        elif now - self.heard > patience.silence:
            text = f"{self.name} has been silent for {patience.silence:.0f} s; ask whether it and the network still run"
        elif self.awaited is not None and now - max(self.awaited, self.progressed) > patience.stall:
            text = (
                f"{self.name} is connected but has made no progress for {patience.stall:.0f} s; "
                "ask whether its program hangs"
            )
        else:
            return None
        return PeerLost(text, peer=self.name)
