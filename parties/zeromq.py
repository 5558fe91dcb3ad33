"""The real Link: encrypted, authenticated, alive or in error; never silent.

One background thread, the post, owns every socket (ZeroMQ's are not thread-safe) and judges the peers; the role's
thread leaves messages with it, takes messages from it, and shows by `tick()` that it is at work. Each pair is one
DEALER, which connects, and one ROUTER, which listens for all peers that connect. Who a peer is comes from the CURVE key
of its connection, never from what it says.

A role must not hold Python's interpreter lock for longer than `Patience.silence`: the post could not beat.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket as sockets
import threading
import time
from collections.abc import Callable, Sequence, Set
from types import TracebackType

import zmq
from zmq.utils import z85

from parties import curve
from parties.delivery import FRAME_LIMIT, no_room
from parties.errors import ColonnadeError, LocalError, PeerLost, ProtocolViolation, Refused
from parties.identity import Identity
from parties.link import BEHIND, RESEND, TURN, Link, Patience, Peer

__all__ = ["Link", "Patience", "Peer", "Post"]

_USUAL = Patience()
_LOG = logging.getLogger("colonnade")
_LINGER = 200  # milliseconds for the last acknowledgement to leave the machine
_PAUSE = 0.05  # seconds to read on before that: who leaves with data unread resets the connection, and the last is lost
_THREADS = 63  # I/O threads that ZMQ_AFFINITY, a signed number here, can tell apart
_ALIVE = 1.0  # seconds after which a frame of a process was not under way when another one of the same peer knocked
_BURST = 64  # frames taken from one socket before the others have their turn


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
        self._progress = 1
        self.closing: float | None = None
        self._failed_handshakes = 0
        self._rung = False  # whether the post is called already
        self._next_look = 0.0
        self._links = {peer.name: Link(self, peer, frame_limit) for peer in peers}
        coming = [link for link in self._links.values() if link.peer.endpoint is None]
        self._by_user = {curve.user_id(link.peer.public.curve): link for link in coming}
        keys = {me.public.curve, *(peer.public.curve for peer in peers)}
        if len(keys) <= len(peers) or len(self._links) < len(peers):
            raise LocalError("two parties have the same name or key; every party needs its own")
        if coming and listen is None:
            raise LocalError(f"{coming[0].name} connects to us, but we have no endpoint to listen on; set one")
        self._router: curve.Socket | None = None
        self._router_monitor: curve.Socket | None = None
        dealers = [(link, link.peer.endpoint) for link in self._links.values() if link.peer.endpoint is not None]
        with curve.files():
            threads = min(1 + len(dealers), _THREADS)
            self._context: zmq.Context[curve.Socket] = zmq.Context(threads)  # our own: its one ZAP handler is ours
            self._bell, self._hook = sockets.socketpair()
            self._bell.setblocking(False)
            self._hook.setblocking(False)
            self._gate = curve.Gate(self._context, (link.peer.public.curve for link in coming), self._say)
            self._thread = threading.Thread(target=self._run, name=f"post of {me.name}", daemon=True)
            try:
                if listen is not None:
                    self._listen(listen)
                for link in coming:
                    link.socket = self._router
                for number, (link, endpoint) in enumerate(dealers):
                    self._connect(link, endpoint, 1 + number % (_THREADS - 1))
            except BaseException:
                self._release(0)
                raise
        self._thread.start()

    def _listen(self, endpoint: str) -> None:
        self._router = self._open(zmq.ROUTER, endpoint, 0)
        self._router_monitor = curve.watch(self._router)
        self.endpoint = curve.bind(self._router, endpoint)
        public, secret = zmq.curve_keypair()
        self._gate.probe = z85.decode(public)
        curve.probe(self.endpoint, self.me.public.curve, (public, secret), self._admit)

    def _connect(self, link: Link, endpoint: str, thread: int) -> None:
        link.socket = self._open(zmq.DEALER, endpoint, thread)
        link.socket.curve_serverkey = link.peer.public.curve_z85
        link.monitor = curve.watch(link.socket)
        try:
            link.socket.connect(endpoint)
        except zmq.ZMQError:
            raise LocalError(f"{endpoint} of {link.name} is not an endpoint; write tcp://host:port") from None

    def _open(self, kind: int, endpoint: str, thread: int) -> curve.Socket:
        handshake, silence = self.patience.handshake, self.patience.silence
        return curve.open_socket(
            self._context,
            kind,
            self.me,
            endpoint,
            thread=thread,
            frame=FRAME_LIMIT,
            handshake=handshake,
            silence=silence,
        )

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
        self._progress += 1

    def wake(self) -> None:
        """Make the post look at once."""
        if not self._rung:
            self._rung = True
            with contextlib.suppress(OSError):  # it is awake anyway, or gone
                self._bell.send(b"\0")

    def close(self) -> None:
        """Send what is left, say goodbye, release everything."""
        with self.lock:
            if self.closing is None:
                self.closing = time.monotonic()
                for link in self._links.values():
                    link.books.farewell()
                    link.touched = True
        self.wake()
        while self._thread.is_alive():
            self._thread.join(TURN)

    def __enter__(self) -> Post:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the post's own thread

    def _run(self) -> None:
        problem = "the transport is closed"
        try:
            poller = zmq.Poller()
            poller.register(self._hook.fileno(), zmq.POLLIN)
            dealers = [s for link in self._links.values() for s in (link.socket, link.monitor) if link.monitor]
            for socket in [self._gate.socket, self._router, self._router_monitor, *dealers]:
                if socket is not None:
                    poller.register(socket, zmq.POLLIN)
            turned = time.monotonic()
            while not self._finished():
                ready = {source for source, _ in poller.poll(int(TURN * 1000))}
                with self.lock:
                    slept = time.monotonic() - turned - 1.0
                    if slept > 0:
                        for link in self._links.values():
                            link.forgive(slept)
                    self._turn(ready)
                turned = time.monotonic()
        except BaseException as bug:
            problem = f"the transport stopped on an internal error ({type(bug).__name__}); please report it"
            self._say(problem)
        finally:
            try:
                with self.lock:
                    for link in self._links.values():
                        link.failure = link.failure or LocalError(problem)
                        link.changed.notify_all()
            finally:
                if any(link.route is not None for link in self._links.values()):
                    time.sleep(_PAUSE)
                self._release(_LINGER)

    def _release(self, linger: int) -> None:
        self._context.destroy(linger)
        self._bell.close()
        self._hook.close()

    def _finished(self) -> bool:
        """When closing: whether nobody is left who could still acknowledge."""
        with self.lock:
            return self.closing is not None and (
                time.monotonic() - self.closing > self.patience.flush
                or all(link.finished for link in self._links.values())
            )

    def _turn(self, ready: Set[object]) -> None:
        """Serve the sockets that have something, then the links that were touched; all links every now and then."""
        if self._rung:
            with contextlib.suppress(BlockingIOError):  # the byte is on its way
                self._hook.recv(4096)
                self._rung = False  # only then: a ring whose byte we had just read would silence all that follow
        if self._gate.socket in ready:
            self._admit()
        if self._router_monitor is not None and self._router_monitor in ready:
            for event in curve.events(self._router_monitor):
                self._failed_handshakes += bool(event & curve.HANDSHAKE_FAILED)
        if self._router is not None and self._router in ready:
            self._collect(self._router, None)
        for link in self._links.values():
            if link.monitor is not None and link.monitor in ready:
                self._observe(link, link.monitor)
            if link.monitor is not None and link.socket is not None and link.socket in ready:
                self._collect(link.socket, link)
        now = time.monotonic()
        look = now >= self._next_look
        if look:
            self._next_look = now + TURN / 4
        for link in self._links.values():
            if look and link.failure is None and not link.books.closed:
                self._fail(link, link.judge(now, self.patience, self._strangers()))
            if look or link.touched:
                self._deliver(link, now, look)

    def _strangers(self) -> str:
        return (
            f" ({self._gate.refused} connections with unlisted keys were refused and {self._failed_handshakes} "
            "handshakes failed: is the agreed key the one it uses?)"
            if self._gate.refused or self._failed_handshakes
            else ""
        )

    def _fail(self, link: Link, error: ColonnadeError | None) -> None:
        if error is not None and link.failure is None and not link.books.closed:  # then what it said still counts
            link.failure = error
            link.books.inbox.clear()
            link.changed.notify_all()

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

    def _collect(self, socket: curve.Socket, link: Link | None) -> None:
        """Take the frames that wait, a dealer's for its `link`, the router's for whom their key says."""
        for _ in range(_BURST):
            if not int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            route = None if link else socket.recv(zmq.NOBLOCK, copy=False)
            frame = socket.recv(zmq.NOBLOCK)
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

    def _sender(self, first: zmq.Frame, frame: bytes) -> Link | None:
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
            self._put(link, link.books.beat(self._progress), now)  # shows whether the connection is still there
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

    def _deliver(self, link: Link, now: float, look: bool) -> None:
        """Send what is due, and at least a beat when the peer waits for our counts or has not heard us lately. What we
        send tells the counts too: an answer that comes soon saves the beat."""
        books = link.books
        if books.waiting and now - link.acknowledged > link.resend:
            books.rewind()
            link.acknowledged, link.resend = now, min(2 * link.resend, 10 * RESEND)
        link.touched = False
        while frame := books.due(self._progress):
            if not books.waiting:
                link.acknowledged = now
            if not self._put(link, frame, now):
                link.touched = True
                break
            books.gone()
        urgent = look or books.closed or self.closing is not None or link.behind >= BEHIND
        if (urgent and link.behind) or now >= link.next_beat:
            self._put(link, books.beat(self._progress), now)

    def _put(self, link: Link, frame: bytes, now: float) -> bool:
        if link.route is None or link.socket is None or link.mute:
            return False
        try:
            link.socket.send_multipart([*link.route, frame], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            link.route = None
            return False
        link.told = (link.books.received, link.books.consumed)
        link.next_beat = now + min(2.0, self.patience.silence / 4)
        return True
