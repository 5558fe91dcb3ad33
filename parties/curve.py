"""The encrypted sockets: CURVE keys, the list of keys let in, and the probe that the list works.

The handler of ZAP (https://rfc.zeromq.org/spec/27/) is our own, a REP socket answered by the thread that owns all the
others: pyzmq's ThreadAuthenticator is one more thread with one more way to die, and decides per domain string.

Two rules come from how libzmq behaves. ZAP_DOMAIN is not empty, because ZAP_ENFORCE_DOMAIN with an empty one bypasses
the handler. ROUTER_HANDOVER stays off: a client may claim any routing id, also one of the form that the router itself
gives out, and with handover it would take over the route of the peer that has it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import zmq
from zmq.utils import z85

from parties.errors import LocalError
from parties.identity import Identity

DOMAIN = b"colonnade"
OFTEN, WHILE = 100, 600.0  # connections let in with one key within so many seconds: more is no broken line
_BURST = 64  # handled of one kind before the others have their turn
_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
HANDSHAKE_FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

Socket = zmq.Socket[bytes]


def transport_print(key: bytes) -> str:
    """A short fingerprint of a CURVE key alone: all that a listening party sees of a stranger."""
    digest = hashlib.sha256(b"colonnade/transport/1" + key).hexdigest()
    return "-".join(digest[i : i + 4] for i in range(0, 16, 4))


def user_id(key: bytes) -> str:
    """What the handler calls the owner of a listed key; libzmq attaches it to every frame from that connection."""
    return key.hex()


@contextlib.contextmanager
def files() -> Iterator[None]:
    """As many file descriptors as the system allows, since everybody who knocks takes one; LocalError without any."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows; macOS may refuse its own limit
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    except (zmq.ZMQError, OSError) as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise LocalError("too many open files to start the transport; raise the limit with 'ulimit -n'") from None


class Gate:
    """Answers, for every key that knocks, whether it is listed."""

    def __init__(self, context: zmq.Context[Socket], listed: Iterable[bytes], log: Callable[[str], None]) -> None:
        self._let_in: dict[bytes, deque[float]] = {key: deque(maxlen=OFTEN) for key in listed}  # and when
        self._log = log
        self._logged: set[bytes] = set()
        self.refused = 0
        self.probe = b""
        self.socket = context.socket(zmq.REP)
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self) -> list[str]:
        """Handle what waits; the user ids let in."""
        admitted = []
        for _ in range(_BURST):
            if not self.socket.poll(0):
                break
            version, request, domain, _, _, mechanism, key = [*self.socket.recv_multipart(), *[b""] * 6][:7]
            times = self._let_in.get(key) if (version, domain, mechanism) == (b"1.0", DOMAIN, b"CURVE") else None
            now = time.monotonic()
            welcome = times is not None and (len(times) < OFTEN or now - times[0] > WHILE)
            verdict = [b"200", b"OK", user_id(key).encode()] if welcome else [b"400", b"refused", b""]
            self.socket.send_multipart([b"1.0", request, *verdict, b""])
            if times is None:
                self.refused += key != self.probe
                self._note(key, "with an unlisted key")
            elif welcome:
                times.append(now)
                admitted.append(user_id(key))
            else:
                self._note(key, f"with a key let in {OFTEN} times in {WHILE / 60:.0f} minutes")
        return admitted

    def _note(self, key: bytes, what: str) -> None:
        if key != self.probe and key not in self._logged and len(self._logged) < 16:
            self._logged.add(key)
            self._log(f"a connection {what} was refused (transport key {transport_print(key)})")


def open_socket(
    context: zmq.Context[Socket],
    kind: int,
    me: Identity,
    endpoint: str,
    *,
    thread: int,
    frame: int,
    handshake: float,
    silence: float,
) -> Socket:
    """A CURVE socket with every limit (bytes) and interval (seconds) set, neither bound nor connected.

    `thread` is the number of the I/O thread that serves it: libzmq looks names up there, and all else there waits.
    """
    if not endpoint.startswith("tcp://"):
        raise LocalError(f"{endpoint} is not an endpoint; write tcp://host:port")
    socket = context.socket(kind)
    socket.curve_publickey = me.public.curve_z85
    socket.curve_secretkey = me.curve_secret_z85
    seconds = {
        zmq.HANDSHAKE_IVL: min(5.0, handshake / 4),
        zmq.CONNECT_TIMEOUT: min(5.0, handshake / 2),
        zmq.HEARTBEAT_IVL: min(2.0, silence / 4),
        zmq.HEARTBEAT_TIMEOUT: silence,
        zmq.HEARTBEAT_TTL: silence,
        zmq.RECONNECT_IVL: 0.1,
        zmq.RECONNECT_IVL_MAX: 2.0,
    }
    for option, value in seconds.items():
        socket.setsockopt(option, max(1, round(value * 1000)))
    plain = {
        zmq.AFFINITY: 1 << thread,
        zmq.LINGER: 0,
        zmq.SNDHWM: 64,
        zmq.RCVHWM: 64,
        zmq.MAXMSGSIZE: frame,
        zmq.IPV6: int(endpoint.startswith("tcp://[")),  # else a name with both kinds of address is tried over one only
    }
    if kind == zmq.ROUTER:
        plain |= {zmq.ROUTER_MANDATORY: 1, zmq.CURVE_SERVER: 1, zmq.ZAP_ENFORCE_DOMAIN: 1}
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
    else:
        plain[zmq.IMMEDIATE] = 1  # queue nothing for a connection that is not up: what is lost is sent again anyway
    for option, number in plain.items():
        socket.setsockopt(option, number)
    return socket


def bind(socket: Socket, endpoint: str) -> str:
    """Listen; the actual endpoint. Raises LocalError."""
    foreign = "this machine has no such address: use one of its own, or tcp://*:port"
    remedies = {
        errno.EADDRINUSE: "another program has this port: stop it or choose another port",
        errno.EINVAL: "write tcp://host:port",
        errno.EMFILE: "raise the limit of open files with 'ulimit -n'",
        errno.ENODEV: foreign,
        errno.EADDRNOTAVAIL: foreign,
    }
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        remedy = remedies.get(error.errno or 0, "choose another address or port")
        raise LocalError(f"cannot listen on {endpoint} ({os.strerror(error.errno or 0)}); {remedy}") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def watch(socket: Socket) -> Socket:
    """The socket's monitor."""
    monitor: Socket = socket.get_monitor_socket(_EVENTS)
    return monitor


def events(monitor: Socket) -> Iterator[int]:
    """The events that wait."""
    for _ in range(_BURST):
        if not monitor.poll(0):
            return
        yield struct.unpack("=hi", monitor.recv_multipart()[0])[0]


def probe(
    endpoint: str, server: bytes, keys: tuple[bytes, bytes], answer: Callable[[], object], within: float = 5.0
) -> None:
    """Knock at our own door with an unlisted key. Raises LocalError unless the handler refuses it.

    `answer` is called again and again, to make the handler answer.
    A handler that does not answer at all refuses nobody either, as far as libzmq can tell, so only its "no" counts.
    """
    context: zmq.Context[Socket] = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.curve_publickey, socket.curve_secretkey = keys
        socket.curve_serverkey = z85.encode(server)
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        monitor = watch(socket)
        socket.connect(endpoint.replace("//0.0.0.0:", "//127.0.0.1:").replace("[::]", "[::1]"))
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            answer()
            if monitor.poll(10):
                for event in events(monitor):
                    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                        return
                    if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                        raise LocalError("the transport accepts unlisted keys; refusing to start: reinstall pyzmq")
        raise LocalError(
            f"the transport did not refuse an unlisted key within {within:.0f} s; refusing to start: "
            "try again, then reinstall pyzmq"
        )
    finally:
        context.destroy(linger=0)
