"""The real Link: encrypted, authenticated, alive or in error; never silent.

Whoever holds the post's lock serves the sockets and judges the peers (ZeroMQ's sockets are not thread-safe, and may
pass from thread to thread under a lock): the role's thread while it waits, so that no thread need wake another for a
message; a background thread, the post, while the role computes and shows by `tick()` that it is at work. Both wait on
file descriptors, which touches no socket. What the role sends goes out at once. Each pair is one DEALER, which
connects, and one ROUTER, which listens for all peers that connect. Who a peer is comes from the CURVE key of its
connection, never from what it says.

A role must not hold Python's interpreter lock for longer than `Patience.silence`: the post could not beat.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

import zmq
from zmq.utils import z85

from parties import curve
from parties.delivery import FRAME_LIMIT, no_room
from parties.descriptors import Descriptors
from parties.errors import ColonnadeError, LocalError, PeerLost, ProtocolViolation, Refused
from parties.identity import Identity
from parties.interrupts import Interrupts
from parties.link import LOOK, Link, Patience, Peer

__all__ = ["Link", "Patience", "Peer", "Post"]

_USUAL = Patience()
_LOG = logging.getLogger("colonnade")
_LINGER = 200  # milliseconds for the last acknowledgement to leave the machine
_PAUSE = 0.05  # seconds to read on before that: who leaves with data unread resets the connection, and the last is lost
_THREADS = 63  # I/O threads that ZMQ_AFFINITY, a signed number here, can tell apart
_COPIED = 64 << 10  # bytes up to which a frame is copied: to free larger ones in our thread costs page faults
_ALIVE = 1.0  # seconds after which a frame of a process was not under way when another one of the same peer knocked
_POLLIN = int(zmq.POLLIN)  # with the enum "&" takes longer than to ask the socket
_BURST = 64  # frames taken from one socket before the others have their turn; and turns without a break


class Post:
    """Links to all peers. Listens before it returns; raises LocalError when it cannot.

    `listen` and the peers' endpoints are tcp://host:port. Addresses are of IPv4 unless written in brackets;
    tcp://[::]:port listens for both. `frame_limit` bounds the payload of one message. With `takes_back` a peer that
    connects to us and is started again gets a new link, once the process that had the old one is gone; else the run
    ends.
    """

    def __init__(
        self,
        me: Identity,
        peers: Sequence[Peer],
        *,
        listen: str | None,
        patience: Patience = _USUAL,
        frame_limit: int = 64 << 20,
        takes_back: bool = False,
        log: Callable[[str], None] = _LOG.warning,
    ) -> None:
        self.me, self.patience = me, patience
        self.lock = threading.RLock()
        self.endpoint: str | None = None
        self._log, self._takes_back = log, takes_back
        self._back: dict[str, Link] = {}
        self.progress = 1
        self.closing: float | None = None
        self._failed_handshakes = 0
        self._waiting = 0  # threads of the role that wait for the sockets
        self._left = 0.0  # when the last of them stopped to
        self._used = False  # whether we sent since we looked what came: that may have taken the sign away
        self._busy = False  # whether messages may be under way that were not when the role last went back to work
        self._turned, self._next_look = time.monotonic(), 0.0
        self._over = False  # the sockets are gone
        self._data: list[tuple[curve.Socket, Link | None]] = []  # those that carry frames: our router, links' dealers
        self._links = {peer.name: Link(self, peer, frame_limit) for peer in peers}
        coming = [link for link in self._links.values() if link.peer.endpoint is None]
        self._by_user = {curve.user_id(link.peer.public.curve): link for link in coming}
        keys = {me.public.curve, *(peer.public.curve for peer in peers)}
        if len(keys) <= len(peers) or len(self._links) < len(peers):
            raise LocalError("two parties have the same name or key; every party needs its own")
        if coming and listen is None:
            raise LocalError(f"{coming[0].name} connects to us, but we have no endpoint to listen on; set one")
        self._router: curve.Socket | None = None
        dealers = [(link, link.peer.endpoint) for link in self._links.values() if link.peer.endpoint is not None]
        with curve.files():
            threads = min(1 + len(dealers), _THREADS)
            self._context: zmq.Context[curve.Socket] = zmq.Context(threads)  # our own: its one ZAP handler is ours
            self._descriptors = Descriptors()
            self.interrupts = Interrupts(self._descriptors.ring)
            self._gate = curve.Gate(self._context, (link.peer.public.curve for link in coming), self._say)
            self._thread = threading.Thread(target=self._run, name=f"post of {me.name}", daemon=True)
            try:
                if listen is not None:
                    self._listen(listen)
                for link in coming:
                    link.socket = self._router
                for number, (link, endpoint) in enumerate(dealers):
                    self._connect(link, endpoint, 1 + number % (_THREADS - 1))
                self._descriptors.add(self._gate.socket, self._admit)
            except BaseException:
                self._release(0)
                raise
        self._thread.start()

    def _listen(self, endpoint: str) -> None:
        self._router = self._open(zmq.ROUTER, endpoint, 0)
        self._descriptors.add(monitor := curve.watch(self._router), lambda: self._count_failures(monitor))
        self._descriptors.add(self._router)
        self._data.append((self._router, None))
        self.endpoint = curve.bind(self._router, endpoint)
        public, secret = zmq.curve_keypair()
        self._gate.probe = z85.decode(public)
        curve.probe(self.endpoint, self.me.public.curve, (public, secret), self._admit)

    def _connect(self, link: Link, endpoint: str, thread: int) -> None:
        link.socket = self._open(zmq.DEALER, endpoint, thread)
        link.socket.curve_serverkey = link.peer.public.curve_z85
        self._descriptors.add(monitor := curve.watch(link.socket), lambda: self._observe(link, monitor))
        self._descriptors.add(link.socket)
        self._data.append((link.socket, link))
        try:
            link.socket.connect(endpoint)
        except zmq.ZMQError:
            raise LocalError(f"{endpoint} of {link.name} is not an endpoint; write tcp://host:port") from None

    def _open(self, kind: int, endpoint: str, thread: int) -> curve.Socket:
        waits = {"handshake": self.patience.handshake, "silence": self.patience.silence}
        return curve.open_socket(self._context, kind, self.me, endpoint, thread=thread, frame=FRAME_LIMIT, **waits)

    def _admit(self) -> None:
        for user in self._gate.answer():
            self._by_user[user].greet(time.monotonic())

    def _say(self, line: str) -> None:
        with contextlib.suppress(Exception):  # whatever the caller's log does, the post goes on
            self._log(line)

    def link(self, name: str) -> Link:
        return self._links[name]

    def returned(self) -> dict[str, Link]:
        """The new links of peers that were started again, and have greeted us, since we were last asked."""
        with self.lock:
            return {name: self._back.pop(name) for name, link in list(self._back.items()) if link.books.inbox}

    def tick(self) -> None:
        """The working loop is alive. Cheap: call it in every step that may take seconds."""
        self.progress += 1

    def look(self) -> bool:
        """With the lock, before a wait: whether we have sent since the sockets were last served; now they are."""
        used, self._used = self._used, False
        if used:
            self.turn()
        return used

    def serve(self, seconds: float) -> None:
        """With the lock, which is released meanwhile: wait for the sockets instead of the post, and serve them."""
        self._waiting += 1
        self.lock.release()
        try:
            ready = self._descriptors.wait(seconds)
        finally:
            self.lock.acquire()
            self._waiting -= 1
        self.interrupts.check()
        self._left = time.monotonic()
        if not ready:  # judge before the role's own patience ends: it says more
            self._next_look = 0.0
        self.turn(ready)

    def deliver(self, link: Link) -> None:
        """With the lock: send what is due to one peer. While the role serves the sockets that is all: what came it sees
        before it waits, or the post does when it takes over."""
        link.touched = True
        if not self._relieved:
            self.turn()
        elif not self._over:
            try:
                link.deliver(time.monotonic(), False)
            except Exception as bug:
                self._end(self._report(bug))
            self._used = True
            self._busy |= link.books.under_way

    def leave(self) -> None:
        """With the lock: the role goes back to work. Where a large message is under way the post takes over at once."""
        if self._busy and any(link.books.under_way for link in self._links.values()):
            self._left = 0.0
            self._descriptors.ring()
        self._busy = False

    def close(self) -> None:
        """Send what is left, say goodbye, release everything."""
        with self.interrupts, self.lock:
            if self.closing is None:
                self.closing = time.monotonic()
                for link in self._links.values():
                    link.books.farewell()
                    link.touched = True
        self._descriptors.ring()
        while self._thread.is_alive():
            self._thread.join(LOOK)
        self.interrupts.close()

    def __enter__(self) -> Post:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the post's own thread, and whoever serves the sockets in its place

    def _run(self) -> None:
        try:
            while not self._finished():
                relieved = self._relieved
                ready = self._descriptors.wait(LOOK, bell_only=relieved)
                with self.lock:
                    if (ready and not self._waiting) or not self._relieved:
                        self.turn(ready)
            problem = "the transport is closed"
        except BaseException as bug:
            problem = self._report(bug)
        finally:
            try:
                with self.lock:
                    self._end(problem)
            finally:
                if any(link.route is not None for link in self._links.values()):
                    time.sleep(_PAUSE)
                self._release(_LINGER)

    def _end(self, problem: str) -> None:
        self._over = True
        for link in self._links.values():
            link.failure = link.failure or LocalError(problem)

    def _release(self, linger: int) -> None:
        self._context.destroy(linger)
        self._descriptors.close()
        self.interrupts.close()

    def _finished(self) -> bool:
        """When closing: whether nobody is left who could still acknowledge."""
        with self.lock:
            return self._over or (
                self.closing is not None
                and (
                    time.monotonic() - self.closing > self.patience.flush
                    or all(link.finished for link in self._links.values())
                )
            )

    @property
    def _relieved(self) -> bool:
        """Whether the role serves the sockets, or did so a moment ago and may soon again."""
        return self.closing is None and (self._waiting > 0 or time.monotonic() < self._left + LOOK)

    def turn(self, ready: Iterable[int] = ()) -> None:
        """With the lock: serve the sockets that have something, then the links that were touched; all of them every now
        and then."""
        if self._over:
            return
        try:
            self._turn(ready)
        except Exception as bug:
            self._end(self._report(bug))

    def _report(self, bug: BaseException) -> str:
        problem = f"the transport stopped on an internal error ({type(bug).__name__}); please report it"
        self._say(problem)
        return problem

    def _turn(self, ready: Iterable[int]) -> None:
        now = time.monotonic()
        self._used, self._busy = False, True
        slept, self._turned = now - self._turned - 1.0, now
        look = now >= self._next_look
        if look:
            self._next_look = now + LOOK
        if slept > 0:
            for link in self._links.values():
                link.forgive(slept)
        self._descriptors.act(None if look else ready)
        for _ in range(_BURST):
            empty, sent = True, False
            for socket, reader in self._data:
                empty &= self._collect(socket, reader)
            now = time.monotonic()
            for link in self._links.values():
                if look and link.failure is None and not link.books.closed:
                    self._fail(link, link.judge(now, self.patience, self._strangers()))
                if look or link.touched:
                    sent |= link.deliver(now, look)
            look = False
            if empty and not sent:  # what we send may take away the sign that something came
                return
        self._descriptors.ring()

    def _count_failures(self, monitor: curve.Socket) -> None:
        for event in curve.events(monitor):
            self._failed_handshakes += bool(event & curve.HANDSHAKE_FAILED)

    def _strangers(self) -> str:
        refused, failed = self._gate.refused, self._failed_handshakes
        counts = f"{refused} connections with unlisted keys were refused and {failed} handshakes failed"
        return f" ({counts}: is the agreed key the one it uses?)" if refused or failed else ""

    def _fail(self, link: Link, error: ColonnadeError | None) -> None:
        if error is not None and link.failure is None and not link.books.closed:  # then what it said still counts
            link.failure = error
            link.books.inbox.clear()

    def _observe(self, link: Link, monitor: curve.Socket) -> None:
        """What happened to a connection of ours."""
        for event in curve.events(monitor):
            now = time.monotonic()
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                link.route = []
                link.greet(now)
                link.connected()
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                ours = self.me.public
                often = ", or our line breaks too often" if link.came is not None else ""
                text = (
                    f"{link.name} does not list our key {ours.fingerprint} (transport key "
                    f"{curve.transport_print(ours.curve)}) among those that connect to it{often}; "
                    "compare the agreements"
                )
                self._fail(link, Refused(text, peer=link.name))
            elif event & curve.HANDSHAKE_FAILED:
                link.refusing = link.refusing or now
                link.vague = event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            elif event == zmq.EVENT_CLOSED:  # nobody listens there: perhaps not yet
                link.refusing = None
            elif event == zmq.EVENT_DISCONNECTED:
                link.route = None

    def _collect(self, socket: curve.Socket, link: Link | None) -> bool:
        """Take the frames that wait, a dealer's for its `link`, the router's for whom their key says; is that all?"""
        for _ in range(_BURST):
            if not int(socket.getsockopt(zmq.EVENTS)) & _POLLIN:
                return True
            route = None if link else socket.recv(zmq.NOBLOCK, copy=False)
            received = socket.recv(zmq.NOBLOCK, copy=False)
            frame = received.buffer if len(received) > _COPIED else received.bytes
            while socket.getsockopt(zmq.RCVMORE):  # no frame of ours has parts
                frame = socket.recv(zmq.NOBLOCK)[:0]
            sender = link if route is None else self._sender(route, frame)
            if sender is not None and sender.failure is None and not sender.books.closed:
                try:
                    sender.accept(frame, time.monotonic())
                except ColonnadeError as error:
                    self._fail(sender, error)
                except Exception as error:
                    text = f"{sender.name} sent a frame that could not be read ({type(error).__name__})"
                    self._fail(sender, ProtocolViolation(text, peer=sender.name))
        return False

    def _sender(self, first: zmq.Frame, frame: bytes | memoryview) -> Link | None:
        """Whose frame this is, by the key of the connection; its newest connection is the way back. `first` is what the
        router puts before it."""
        route = first.bytes
        try:
            link = self._by_user[str(first.get("User-Id"))]
        except (KeyError, zmq.ZMQError):
            return None
        if len(route) != 5 or route[0]:  # chosen by the peer: ours come from the router and begin with a zero byte
            self._fail(link, ProtocolViolation(f"{link.name} claims a routing id, which ours never do", peer=link.name))
            return None
        if self._takes_back and (strange := link.books.strange(frame)):
            return self._knock(link, route, *strange)
        newest = link.route and int.from_bytes(link.route[0][1:])
        if not newest or 0 < (int.from_bytes(route[1:]) - newest) % 2**32 < 2**31:
            link.route = [route]
            link.connected()
        return link

    def _knock(self, link: Link, route: bytes, source: int, target: int) -> Link | None:
        """Another process of this peer: it takes the place of one that is gone. Of two live ones the first stays."""
        now = time.monotonic()
        if target or isinstance(link.failure, ProtocolViolation) or self.closing is not None:
            return None  # it spoke to a process that has lost its place, or to an earlier run of ours; or is not wanted
        if link.route is not None:
            link.put(link.books.beat(self.progress), now)  # shows whether the connection is still there
        if link.route is None or link.failure is not None or link.books.closed:
            self._fail(link, PeerLost(f"{link.name} was started again", peer=link.name))
            fresh = Link(self, link.peer, link.books.limit)
            fresh.socket, fresh.route = self._router, [route]
            self._links[link.name] = self._by_user[curve.user_id(link.peer.public.curve)] = fresh
            self._back[link.name] = fresh
            return fresh
        if link.knocked is None or now > link.knocked + self.patience.silence:
            link.knocked = now
        elif link.heard > link.knocked + _ALIVE and link.socket is not None:
            link.knocked = None
            self._say(f"a second process with the key of {link.name} was refused: the first one is still connected")
            with contextlib.suppress(zmq.ZMQError):
                link.socket.send_multipart([route, no_room(source)], zmq.NOBLOCK)
        return None
