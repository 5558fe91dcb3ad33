"""The real link: what arrives, in which order, and how every failure ends in a typed error soon enough."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from parties import curve
from parties.channel import Channel
from parties.delivery import BEAT, BYE, FIXED, FRAME_LIMIT, MORE, OPEN, PIECE, VERSION, WINDOW, Delivery
from parties.descriptors import Descriptors
from parties.errors import ColonnadeError, LocalError, PeerAborted, PeerLost, ProtocolViolation, Refused
from parties.identity import Identity
from parties.ledger import Ledger
from parties.message import Abort
from parties.zeromq import Link, Patience, Peer, Post

ANY = "tcp://127.0.0.1:*"
BANK, GROCER, MILL, STRANGER = (Identity.generate(name) for name in ("bank", "grocer", "mill", "stranger"))
QUICK = Patience(connect=2.0, silence=2.5, stall=3.0, handshake=3.0, flush=2.0)
SOON = 15.0  # seconds within which every error must come, on a busy machine


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def listening(*peers: Identity, patience: Patience = QUICK, **options: object) -> Post:
    """The bank, to which the peers connect."""
    coming = [Peer(peer.name, peer.public, None) for peer in peers]
    return Post(BANK, coming, listen=ANY, patience=patience, **options)  # type: ignore[arg-type]


def connecting(me: Identity, endpoint: str | None, server: Identity = BANK, patience: Patience = QUICK) -> Post:
    return Post(me, [Peer("bank", server.public, endpoint)], listen=None, patience=patience)


@contextlib.contextmanager
def pair(patience: Patience = QUICK) -> Iterator[tuple[Link, Link]]:
    with listening(GROCER, patience=patience) as bank, connecting(GROCER, bank.endpoint, patience=patience) as grocer:
        yield bank.link("grocer"), grocer.link("bank")


def fails(kind: type[ColonnadeError], text: str, act: Callable[[], object]) -> str:
    """It fails soon, so, with one line that names the peer."""
    start = time.monotonic()
    with pytest.raises(kind, match=text) as caught:
        act()
    assert time.monotonic() - start < SOON
    assert "\n" not in str(caught.value)
    assert caught.value.peer in (None, "grocer", "bank", "mill")
    return str(caught.value)


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Cheater:
    """A raw socket that holds a listed key and speaks as it likes."""

    def __init__(self, endpoint: str | None, me: Identity = GROCER, routing_id: bytes = b"") -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.curve_publickey, self.socket.curve_secretkey = me.public.curve_z85, me.curve_secret_z85
        self.socket.curve_serverkey = BANK.public.curve_z85
        if routing_id:
            self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
        self.socket.connect(str(endpoint))

    def greet(self) -> int:
        """Say something proper; the number of the bank's process."""
        self.socket.send(fixed(BEAT))
        assert self.socket.poll(int(SOON * 1000))
        return int(FIXED.unpack_from(self.socket.recv())[3])

    def __enter__(self) -> Cheater:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)


def fixed(
    kind: int,
    number: int = 0,
    target: int = 0,
    length: int = 0,
    *,
    source: int = 7,
    received: int = 0,
    consumed: int = 0,
    version: int = VERSION,
    header: int = 0,
) -> bytes:
    return FIXED.pack(version, kind, header, source, target, number, received, consumed, 1, length)


# ---- what arrives


def test_round_trips() -> None:
    with pair() as (bank, grocer):
        for i in range(200):
            bank.send(b"to %d" % i, bytes([i]) * i, SOON)
            assert grocer.receive(SOON) == (b"to %d" % i, bytes([i]) * i)
            grocer.send(b"fro %d" % i, memoryview(b"x"), SOON)
            assert bank.receive(SOON) == (b"fro %d" % i, b"x")


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 64 << 20])
def test_sizes(size: int) -> None:
    payload = random.Random(size).randbytes(min(size, 1 << 20)) * max(1, size >> 20)
    with pair() as (bank, grocer):
        bank.send(b"", payload, SOON)
        grocer.send(b"h", payload[::-1], SOON)
        assert grocer.receive(SOON) == (b"", payload)
        assert bank.receive(SOON) == (b"h", payload[::-1])


def test_a_slow_consumer_blocks_the_sender() -> None:
    with pair() as (bank, grocer):
        grocer.ready(SOON)
        for i in range(WINDOW):
            bank.send(b"%d" % i, b"", SOON)
        fails(PeerLost, "grocer took no message within 0 s", lambda: bank.send(b"", b"", 0.4))
        assert grocer.receive(SOON)[0] == b"0"
        bank.send(b"16", b"", SOON)
        assert [grocer.receive(SOON)[0] for _ in range(WINDOW)] == [b"%d" % i for i in range(1, WINDOW + 1)]
        assert len(grocer.books.inbox) == 0


def test_a_ring_while_the_last_one_is_read_silences_none_that_follow() -> None:
    descriptors = Descriptors()
    hook = descriptors._hook

    class Rung:
        def recv(self, size: int) -> bytes:
            descriptors.ring()
            return hook.recv(size)

    descriptors._hook = Rung()  # type: ignore[assignment]
    descriptors._hear()
    descriptors.ring()
    assert hook.recv(1) == b"\0"
    descriptors._hook = hook
    descriptors.close()


@pytest.mark.parametrize("room", [64, 3], ids=["frames that wait", "room for more"])
def test_no_sign_is_lost(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both send, then receive: sending takes signs away, and who then waits would wait for the next look."""
    plain, sizes, lost = Descriptors.wait, random.Random(0), list[bool]()
    opens = curve.open_socket

    def narrow(*given: Any, **more: Any) -> curve.Socket:
        socket = opens(*given, **more)
        socket.setsockopt(zmq.SNDHWM, room)
        return socket

    def wait(descriptors: Descriptors, seconds: float, *, bell_only: bool = False) -> list[int]:
        ready = plain(descriptors, seconds, bell_only=bell_only)
        post = next(one for one in (bank._post, grocer._post) if one._descriptors is descriptors)
        if not ready and not bell_only:
            with post.lock:
                silent = not plain(descriptors, 0.0)
                lost.extend(silent for socket, _ in post._data if int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
                lost.extend(silent and link.deliver(time.monotonic(), False) for link in post._links.values())
        return ready

    def talk(link: Link, sent: list[int]) -> None:
        for size in sent:
            link.send(b"", bytes(size), SOON)
            link.receive(SOON)

    monkeypatch.setattr(curve, "open_socket", narrow)
    with pair() as (bank, grocer):
        bank.ready(SOON)
        grocer.ready(SOON)
        monkeypatch.setattr(Descriptors, "wait", wait)
        mixed = [sizes.choice([0, 10, 10_000, 300_000, *([5_000_000] if room < 64 else [])]) for _ in range(500)]
        other = threading.Thread(target=talk, args=(grocer, mixed[::-1]))
        other.start()
        talk(bank, mixed)
        other.join()
    assert not any(lost)


def test_a_socket_that_cannot_be_asked_ends_the_transport_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> bool:
        raise zmq.ZMQError(zmq.ENOTSUP)

    with pair() as (bank, grocer):
        bank.send(b"a", b"", SOON)
        grocer.receive(SOON)
        grocer.send(b"b", b"", SOON)
        bank.receive(SOON)
        bank.send(b"c", b"", SOON)
        monkeypatch.setattr(Post, "_collect", broken)
        fails(LocalError, "stopped on an internal error", lambda: bank.receive(SOON))


def test_a_message_above_the_limit_stays_here() -> None:
    with pair() as (bank, _):
        fails(LocalError, "split it", lambda: bank.send(b"", bytes((64 << 20) + 1), SOON))


def test_data_before_the_goodbye_is_delivered() -> None:
    with listening(GROCER) as bank:
        with connecting(GROCER, bank.endpoint) as grocer:
            for i in range(5):
                grocer.link("bank").send(b"%d" % i, b"", SOON)
            grocer.link("bank").ready(SOON)
        with Cheater(bank.endpoint) as again:  # already its next run: what the last one said still counts
            again.greet()
        assert [bank.link("grocer").receive(SOON)[0] for _ in range(5)] == [b"%d" % i for i in range(5)]
        start = time.monotonic()
        fails(PeerLost, "grocer closed", lambda: bank.link("grocer").receive(SOON))
        fails(PeerLost, "grocer closed", lambda: bank.link("grocer").send(b"", b"", SOON))
        assert time.monotonic() - start < 1.0


@pytest.mark.parametrize("seed", range(10))
def test_in_order_and_once_over_a_lossy_line(seed: int) -> None:
    chance = random.Random(seed)
    ours, theirs = Delivery("theirs", 1 << 20), Delivery("ours", 1 << 20)
    sizes = [chance.choice([0, 1, PIECE, 2 * PIECE + 1]) for _ in range(30)]
    got: list[tuple[bytes, bytes]] = []
    pushed = 0
    while len(got) < len(sizes):
        if pushed < len(sizes) and ours.room:
            ours.push(b"%d" % pushed, bytes(sizes[pushed]))
            pushed += 1
        line = []
        while frame := ours.due(0):
            ours.gone()
            line += [frame] * chance.choice([0, 1, 1, 2])
        for frame in line:
            theirs.accept(frame)
        if theirs.inbox and chance.random() < 0.7:
            got.append(theirs.take())
        if chance.random() < 0.7:
            ours.accept(theirs.beat(0))
        if chance.random() < 0.5:
            ours.rewind()
    assert got == [(b"%d" % i, bytes(size)) for i, size in enumerate(sizes)]


# ---- connections that break


class Proxy:
    """Forwards TCP connections to `port`, at `rate` bytes a second, until they are cut."""

    def __init__(self, port: int, rate: float = float("inf")) -> None:
        self._port, self._rate = port, rate
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near = self._server.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            self._open += [near, far]
            for one, other in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=self._pump, args=(one, other)))
                self._threads[-1].start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
                time.sleep(len(data) / self._rate)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut_for_good(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.cut()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut_for_good()
        self._server.close()
        for thread in self._threads:
            thread.join()
        for end in self._open:
            end.close()


def port_of(post: Post) -> int:
    return int(str(post.endpoint).rpartition(":")[2])


def test_everything_arrives_once_and_in_order_over_a_line_that_breaks() -> None:
    count, calm = 120, Patience()
    payloads = [bytes([i]) * (i * 5000) for i in range(count)]

    def send(link: Link) -> None:
        for i in range(count):
            link.send(b"%d" % i, payloads[i], SOON)

    with (
        listening(GROCER, patience=calm) as bank,
        Proxy(port_of(bank)) as proxy,
        connecting(GROCER, proxy.endpoint, patience=calm) as grocer,
    ):
        ends = [bank.link("grocer"), grocer.link("bank")]
        senders = [threading.Thread(target=send, args=(end,)) for end in ends]
        for sender in senders:
            sender.start()
        for i in range(count):
            for end in ends:
                assert end.receive(SOON) == (b"%d" % i, payloads[i])
            if i in (10, 40, 41, 90):
                proxy.cut()
        for sender in senders:
            sender.join()


def test_a_big_message_over_a_slow_line_is_no_silence() -> None:
    patience = Patience(silence=2.0, flush=1.0)
    payload = random.Random(0).randbytes(6 << 20)
    with (
        listening(GROCER, patience=patience) as bank,
        Proxy(port_of(bank), rate=2e6) as proxy,
        connecting(GROCER, proxy.endpoint, patience=patience) as grocer,
    ):
        grocer.link("bank").send(b"", payload, SOON)
        start = time.monotonic()
        assert bank.link("grocer").receive(2 * SOON) == (b"", payload)
        assert time.monotonic() - start > patience.silence


def test_a_line_that_stays_broken() -> None:
    with listening(GROCER) as bank, Proxy(port_of(bank)) as proxy, connecting(GROCER, proxy.endpoint) as grocer:
        bank.link("grocer").ready(SOON)
        grocer.link("bank").ready(SOON)
        proxy.cut_for_good()
        fails(PeerLost, "bank has been silent", lambda: grocer.link("bank").receive(SOON))
        fails(PeerLost, "grocer has been silent", lambda: bank.link("grocer").receive(SOON))


def test_a_peer_that_starts_again_is_noticed() -> None:
    with listening(GROCER) as bank:
        with Cheater(bank.endpoint) as first:
            first.greet()
        with connecting(GROCER, bank.endpoint, patience=Patience(flush=0.1)):
            fails(PeerLost, "grocer was started again", lambda: bank.link("grocer").receive(SOON))


def test_a_killed_peer_gets_a_new_link_and_frames_of_its_former_process_count_nothing() -> None:
    with listening(GROCER, takes_back=True) as bank:
        old = bank.link("grocer")
        with Cheater(bank.endpoint) as killed:
            former = killed.greet()
        with connecting(GROCER, bank.endpoint) as grocer:
            grocer.link("bank").send(b"hello", b"", SOON)
            found: dict[str, Link] = {}
            until(lambda: bool(found.update(bank.returned()) or found))
            assert found["grocer"].receive(SOON) == (b"hello", b"")
            fails(PeerLost, "grocer was started again", lambda: old.receive(SOON))
            with Cheater(bank.endpoint) as replayed:
                replayed.socket.send(fixed(OPEN, 1, former, header=3) + b"old")
                assert not replayed.socket.poll(1000)
                grocer.link("bank").send(b"new", b"", SOON)
                assert found["grocer"].receive(SOON) == (b"new", b"")
                found["grocer"].send(b"answer", b"", SOON)
                assert grocer.link("bank").receive(SOON) == (b"answer", b"")


def test_of_two_live_processes_with_one_key_the_first_stays() -> None:
    said: list[str] = []
    with (
        listening(GROCER, takes_back=True, log=said.append) as bank,
        connecting(GROCER, bank.endpoint) as first,
    ):
        bank.link("grocer").ready(SOON)
        with connecting(GROCER, bank.endpoint) as second:
            fails(PeerLost, "bank closed the connection", lambda: second.link("bank").receive(SOON))
        first.link("bank").send(b"still here", b"", SOON)
        assert bank.link("grocer").receive(SOON) == (b"still here", b"")
        assert bank.returned() == {} and "a second process with the key of grocer was refused" in said[0]


def test_a_peer_of_an_earlier_run_of_ours_is_ignored() -> None:
    with listening(GROCER) as bank, Cheater(bank.endpoint) as old:
        old.socket.send(fixed(OPEN, 5, target=99, received=17))
        assert old.socket.poll(int(SOON * 1000))  # but it is told who we are
        old.context.destroy(linger=0)
        with connecting(GROCER, bank.endpoint) as grocer:
            grocer.link("bank").send(b"fresh", b"", SOON)
            assert bank.link("grocer").receive(SOON) == (b"fresh", b"")


# ---- keys


def test_an_unlisted_key() -> None:
    lines: list[str] = []
    with listening(GROCER, log=lines.append) as bank:
        for _ in range(2):
            with connecting(STRANGER, bank.endpoint) as stranger:
                text = fails(Refused, "bank does not list our key", lambda: stranger.link("bank").receive(SOON))
                assert STRANGER.public.fingerprint in text
        fails(PeerLost, "grocer did not come .*2 connections with unlisted", lambda: bank.link("grocer").receive(SOON))
    assert len(lines) == 1
    assert curve.transport_print(STRANGER.public.curve) in lines[0]


def test_a_wrong_server_key() -> None:
    with listening(GROCER) as bank, connecting(GROCER, bank.endpoint, server=MILL) as grocer:
        start = time.monotonic()
        text = fails(Refused, "no handshake with bank", lambda: grocer.link("bank").receive(SOON))
        assert time.monotonic() - start < QUICK.handshake
        assert MILL.public.fingerprint in text
        assert GROCER.public.fingerprint in text
        fails(PeerLost, "grocer did not come .* handshakes failed", lambda: bank.link("grocer").receive(SOON))


def test_another_program_at_the_endpoint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with connecting(GROCER, endpoint) as grocer:
            fails(Refused, "no handshake with bank", lambda: grocer.link("bank").receive(SOON))


@pytest.mark.parametrize("verdict", ["yes to all", "no answer"])
def test_the_probe_refuses_to_start(monkeypatch: pytest.MonkeyPatch, verdict: str) -> None:
    def answer(gate: curve.Gate) -> list[str]:
        if verdict == "yes to all":
            while gate.socket.poll(0):
                request = gate.socket.recv_multipart()[1]
                gate.socket.send_multipart([b"1.0", request, b"200", b"OK", b"anyone", b""])
        return []

    monkeypatch.setattr(curve.Gate, "answer", answer)
    monkeypatch.setattr(curve.probe, "__defaults__", (2.0,))
    fails(LocalError, "refusing to start", lambda: listening(GROCER))


@pytest.mark.parametrize("claim", [None, b"grocer"])
def test_a_claimed_routing_id_gets_nothing_of_anothers(claim: bytes | None) -> None:
    """The mill claims a name, or even the very id that the router gave to the grocer's connection."""
    lines: list[str] = []
    with listening(GROCER, MILL, log=lines.append) as bank, connecting(GROCER, bank.endpoint) as grocer:
        bank.link("grocer").ready(SOON)
        route = bank.link("grocer").route
        assert route is not None
        with Cheater(bank.endpoint, MILL, claim or route[0]) as mill:
            for _ in range(5):
                mill.socket.send(fixed(BEAT))
            bank.link("grocer").send(b"for the grocer", b"", SOON)
            assert grocer.link("bank").receive(SOON) == (b"for the grocer", b"")
            assert not mill.socket.poll(800)
            assert bank.link("grocer").route == route
            grocer.link("bank").send(b"back", b"", SOON)
            assert bank.link("grocer").receive(SOON) == (b"back", b"")
            if claim:
                fails(ProtocolViolation, "mill claims a routing id", lambda: bank.link("mill").receive(SOON))
    assert not lines


def test_a_key_that_connects_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "OFTEN", 3)
    lines: list[str] = []
    patience = Patience(flush=0.1)
    with listening(GROCER, MILL, patience=patience, log=lines.append) as bank, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Cheater(bank.endpoint)).greet()
        with connecting(GROCER, bank.endpoint) as fourth:
            fails(Refused, "bank does not list our key", lambda: fourth.link("bank").receive(SOON))
        with connecting(MILL, bank.endpoint) as mill:
            mill.link("bank").ready(SOON)
    assert len(lines) == 1


def test_a_stale_target_does_not_postpone_the_deadline() -> None:
    with listening(GROCER, patience=Patience(connect=1.0, flush=0.1)) as bank, Cheater(bank.endpoint) as old:
        start = time.monotonic()
        while bank.link("grocer").failure is None:
            assert time.monotonic() - start < SOON
            old.socket.send(fixed(BEAT, target=99))
            time.sleep(0.1)
        fails(PeerLost, "grocer did not come", lambda: bank.link("grocer").receive(SOON))


# ---- cheaters with a listed key

SHAPELESS: list[list[bytes]] = [
    [b""],
    [b"x" * (FIXED.size - 1)],
    [b"x" * FIXED.size],
    [b"x" * 1000],
    [b"x" * 1000, b"y"],
    [fixed(BEAT) + b"more"],
    [fixed(BEAT), b"more"],
    [fixed(BEAT)] + [b""] * 500,
    [fixed(BEAT, number=3)],
    [fixed(BEAT, source=0)],
    [fixed(BEAT, version=9)],
    [fixed(9)],
    [fixed(BEAT, received=1)],
    [fixed(BEAT, consumed=1 << 63)],
    [fixed(OPEN, 1)],
]


@pytest.mark.parametrize("frame", SHAPELESS, ids=range(len(SHAPELESS)))
def test_garbage_after_the_handshake(frame: list[bytes]) -> None:
    with listening(GROCER, MILL) as bank, Cheater(bank.endpoint) as cheater:
        cheater.socket.send_multipart(frame)
        fails(ProtocolViolation, "grocer sent", lambda: bank.link("grocer").receive(SOON))
        fails(ProtocolViolation, "grocer sent", lambda: bank.link("grocer").send(b"", b"", SOON))
        with connecting(MILL, bank.endpoint) as mill:
            mill.link("bank").send(b"unharmed", b"", SOON)
            assert bank.link("mill").receive(SOON) == (b"unharmed", b"")


@pytest.mark.parametrize(
    ("kind", "number", "length", "header", "rest"),
    [
        (OPEN, 1, 9, 0, b"short"),
        (OPEN, 1, 3, 0, b"too long"),
        (OPEN, 1, 1 << 40, 0, bytes(PIECE)),
        (OPEN, 1, 0, 4097, bytes(4097)),
        (OPEN, 1, 0, 65_535, bytes(65_535)),
        (OPEN, 1, 0, 1, b""),
        (OPEN, 0, 0, 0, b""),
        (OPEN, 1 << 63, 0, 0, b""),
        (MORE, 1, 0, 0, b"piece of nothing"),
        (MORE, 1, 0, 0, b""),
        (MORE, 1, 0, 1, b"x"),
        (BEAT, 0, 0, 1, b"x"),
        (BYE, 1, 0, 0, b"x"),
        (BYE, 1, 0, 1, b"x"),
    ],
)
def test_data_that_the_format_forbids(kind: int, number: int, length: int, header: int, rest: bytes) -> None:
    with listening(GROCER) as bank, Cheater(bank.endpoint) as cheater:
        target = cheater.greet()
        cheater.socket.send(fixed(kind, number, target, length, header=header) + rest)
        fails(ProtocolViolation, "grocer sent", lambda: bank.link("grocer").receive(SOON))


def test_a_peer_that_ignores_the_window() -> None:
    with listening(GROCER) as bank, Cheater(bank.endpoint) as cheater:
        target = cheater.greet()
        for i in range(WINDOW + 2):
            cheater.socket.send(fixed(OPEN, i + 1, target))
        link = bank.link("grocer")
        until(lambda: link.failure is not None)
        fails(ProtocolViolation, "window", lambda: link.receive(SOON))
        assert not link.books.inbox


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.integers(0, 3),
            st.sampled_from([0, 1, PIECE, 1 << 63]),
            st.sampled_from([0, 1, 4097]),
            st.sampled_from([b"", b"x", bytes(5000), bytes(PIECE)]),
        ),
        max_size=12,
    ),
    st.binary(max_size=80),
)
def test_no_frame_breaks_the_books(frames: list[tuple[int, int, int, int, bytes]], noise: bytes) -> None:
    books = Delivery("grocer", 2 * PIECE)
    for kind, number, length, header, rest in frames:
        with contextlib.suppress(ProtocolViolation):
            books.accept(fixed(kind, number, books.source, length, header=header) + rest)
        with contextlib.suppress(ProtocolViolation, PeerLost):
            books.accept(noise + rest)
    assert len(books.inbox) <= WINDOW + 1


def test_a_peer_that_claims_to_consume_what_it_did_not_receive() -> None:
    books = Delivery("grocer", 2 * PIECE)
    books.accept(fixed(BEAT))
    books.push(b"", bytes(PIECE + 1))
    while books.due(0):
        books.gone()
    books.accept(fixed(BEAT, received=1))
    with pytest.raises(ProtocolViolation, match="never received"):
        books.accept(fixed(BEAT, received=1, consumed=1))
    books.accept(fixed(BEAT, received=2, consumed=1))


def test_who_violates_the_protocol_is_told_why_we_stop() -> None:
    with listening(GROCER) as bank, Cheater(bank.endpoint) as cheater:
        cheater.socket.send(fixed(9, target=cheater.greet()))
        fails(ProtocolViolation, "grocer sent", lambda: bank.link("grocer").receive(SOON))
        bank.link("grocer").last(b"why", b"")
        start = time.monotonic()
        bank.close()
        assert time.monotonic() - start < QUICK.flush
        frames = []
        while cheater.socket.poll(500):
            frames.append(cheater.socket.recv())
        said = [(FIXED.unpack_from(frame)[1], frame[FIXED.size :]) for frame in frames]
        assert [frame for frame in said if frame[0] != BEAT] == [(OPEN, b"why"), (BYE, b"")]


def test_an_oversized_frame_to_the_listener() -> None:
    with listening(GROCER, MILL) as bank, Cheater(bank.endpoint) as cheater:
        cheater.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        cheater.greet()
        cheater.socket.send(bytes(2 * FRAME_LIMIT))
        fails(PeerLost, "grocer has been silent", lambda: bank.link("grocer").receive(SOON))


def test_an_oversized_frame_to_the_connecting_side() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server = context.socket(zmq.ROUTER)
    server.curve_server, server.curve_secretkey = True, BANK.curve_secret_z85
    port = server.bind_to_random_port("tcp://127.0.0.1")
    with connecting(GROCER, f"tcp://127.0.0.1:{port}") as grocer:
        assert server.poll(int(SOON * 1000))
        server.send_multipart([server.recv_multipart()[0], bytes(2 * FRAME_LIMIT)])
        fails(PeerLost, "bank has been silent", lambda: grocer.link("bank").receive(SOON))
    context.destroy(linger=0)


# ---- peers that say nothing, or stop


def test_a_peer_that_never_answers() -> None:
    with listening(GROCER) as bank, Cheater(bank.endpoint):
        fails(PeerLost, "grocer has been silent", lambda: bank.link("grocer").receive(SOON))


def test_a_peer_that_never_comes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    with connecting(GROCER, endpoint) as grocer, listening(GROCER) as bank:
        assert endpoint in fails(PeerLost, "bank did not come", lambda: grocer.link("bank").receive(SOON))
        text = fails(PeerLost, "grocer did not come", lambda: bank.link("grocer").receive(SOON))
        assert str(bank.endpoint) in text
        assert "unlisted" not in text


CHILD = """
import sys, time
from pathlib import Path
from parties.identity import Identity, PublicIdentity
from parties.zeromq import Patience, Peer, Post
me, server, endpoint, role = Identity.load(Path(sys.argv[1])), PublicIdentity.parse(sys.argv[2]), *sys.argv[3:]
with Post(me, [Peer("bank", server, endpoint)], listen=None, patience=Patience(silence=3.0)) as post:
    post.link("bank").send(b"here", b"", 20)
    while role == "hang":
        time.sleep(1)
    post.link("bank").receive(60)
"""


@contextlib.contextmanager
def child(folder: Path, endpoint: str | None, role: str) -> Iterator[subprocess.Popen[bytes]]:
    GROCER.save(folder / "key")
    arguments = [str(folder / "key"), str(BANK.public), str(endpoint), role]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped(tmp_path: Path, number: int) -> None:
    with (
        listening(GROCER, patience=Patience(silence=3, flush=1)) as bank,
        child(tmp_path, bank.endpoint, "") as process,
    ):
        assert bank.link("grocer").receive(30) == (b"here", b"")
        process.send_signal(number)
        fails(PeerLost, "grocer has been silent", lambda: bank.link("grocer").receive(SOON))


def test_a_program_that_hangs_while_its_transport_lives(tmp_path: Path) -> None:
    patience = Patience(silence=10, stall=2, flush=1)
    with listening(GROCER, patience=patience) as bank, child(tmp_path, bank.endpoint, "hang"):
        assert bank.link("grocer").receive(30) == (b"here", b"")
        fails(PeerLost, "grocer is connected but has made no progress for 2 s", lambda: bank.link("grocer").receive(30))


def test_a_waiting_peer_has_not_stalled(tmp_path: Path) -> None:
    patience = Patience(silence=10, stall=2.5, flush=1)
    with listening(GROCER, patience=patience) as bank, child(tmp_path, bank.endpoint, ""):
        assert bank.link("grocer").receive(30) == (b"here", b"")
        fails(PeerLost, "sent nothing within 4 s", lambda: bank.link("grocer").receive(3.6))


def test_interrupting_a_wait(tmp_path: Path) -> None:
    with listening(GROCER, patience=Patience()) as bank, child(tmp_path, bank.endpoint, "") as process:
        assert bank.link("grocer").receive(30) == (b"here", b"")
        process.send_signal(signal.SIGINT)
        fails(PeerLost, "grocer closed", lambda: bank.link("grocer").receive(SOON))
        assert b"KeyboardInterrupt" in process.communicate(timeout=SOON)[1]


@pytest.mark.parametrize(
    ("whose", "step"), [(zmq.Socket, "recv"), (zmq.Socket, "send"), (Delivery, "_book"), (Delivery, "push")]
)
def test_an_interrupt_in_the_middle_of_a_message_tears_nothing(
    whose: type, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first half that the router takes or gives; when a frame is booked and not counted, or queued."""
    plain, armed = getattr(whose, step), [True]

    def interrupted(one: object, *given: Any, **more: Any) -> object:
        result = plain(one, *given, **more)
        if one in (bank.books, bank.socket) and threading.current_thread() is threading.main_thread() and armed:
            armed.clear()
            signal.raise_signal(signal.SIGINT)
        return result

    with pair() as (bank, grocer):
        bank.ready(SOON)
        grocer.ready(SOON)
        grocer.send(b"in", b"", SOON)
        monkeypatch.setattr(whose, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            bank.send(b"out", b"", SOON)
            bank.receive(SOON)
        bank.last(b"why", b"")
        grocer.send(b"again", b"", SOON)
        heard = [grocer.receive(SOON)[0] for _ in range(2)]
        assert heard == [b"out", b"why"] and not armed
        until(lambda: bank.books.received == 2)
        assert bank.failure is None and grocer.failure is None


def test_the_handlers_of_others_are_left_and_python_s_own_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler
    with pair():
        assert signal.getsignal(signal.SIGINT) is not before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, ignored := lambda number, frame: None)
    try:
        with pair():
            assert signal.getsignal(signal.SIGINT) is ignored
    finally:
        signal.signal(signal.SIGINT, before)


# ---- aborts


@contextlib.contextmanager
def channels(patience: Patience = QUICK) -> Iterator[tuple[Channel, Channel, Post]]:
    """The bank's channel and the grocer's, and the grocer's post."""
    with listening(GROCER, patience=patience) as bank, connecting(GROCER, bank.endpoint, patience=patience) as grocer:
        ends = [(BANK, GROCER, bank), (GROCER, BANK, grocer)]
        for _, peer, post in ends:
            post.link(peer.name).ready(SOON)
        one, other = (
            Channel(
                post.link(peer.name),
                peer=peer.name,
                our_id=me.public.key_id,
                peer_id=peer.public.key_id,
                ledger=Ledger(me, None, frozenset({"control"})),
                timeout=SOON,
            )
            for me, peer, post in ends
        )
        yield one, other, grocer


def test_an_abort_does_not_wait_for_the_window() -> None:
    with channels() as (bank, grocer, post):
        for _ in range(WINDOW):
            grocer.send(Abort("error"))  # any message will do: the bank reads only the frames
        start = time.monotonic()
        grocer.abort("local")
        grocer.abort("local")  # once only: the bank has room for one
        post.close()
        assert time.monotonic() - start < QUICK.flush
        for _ in range(WINDOW):
            bank._link.receive(SOON)
        fails(PeerAborted, "grocer stopped .a problem with its own input", lambda: bank.receive(Abort))
        fails(PeerLost, "grocer closed", lambda: bank.receive(Abort))


def test_an_abort_is_learnt_while_sending() -> None:
    with channels() as (bank, grocer, post):
        grocer.abort("refused")
        post.close()
        fails(PeerAborted, "its policy or agreement refuses", lambda: bank.send(Abort("error")))
        fails(PeerLost, "grocer closed", lambda: bank.send(Abort("error")))


# ---- starting and ending


def test_endpoints_that_cannot_be() -> None:
    with listening(GROCER) as bank:
        peer = [Peer("grocer", GROCER.public, None)]
        fails(LocalError, "another program has this port", lambda: Post(MILL, peer, listen=bank.endpoint))
        fails(LocalError, "no such address", lambda: Post(MILL, peer, listen="tcp://192.0.2.1:5555"))
        fails(LocalError, "write tcp", lambda: Post(MILL, peer, listen="tcp://127.0.0.1"))
        fails(LocalError, "write tcp", lambda: Post(MILL, peer, listen="ipc:///tmp/x"))
        fails(LocalError, "no endpoint to listen", lambda: Post(MILL, peer, listen=None))
        fails(LocalError, "write tcp", lambda: connecting(GROCER, "nonsense"))
        fails(LocalError, "write tcp", lambda: connecting(GROCER, "tcp://nonsense"))
        fails(LocalError, "same name or key", lambda: Post(GROCER, peer, listen=ANY))


def test_closing_twice_and_using_it_afterwards() -> None:
    with pair() as (bank, _):
        bank.ready(SOON)
        start = time.monotonic()
        bank._post.close()
        bank._post.close()
        assert time.monotonic() - start < QUICK.flush + 2
        fails(LocalError, "closed", lambda: bank.receive(SOON))
        fails(LocalError, "closed", lambda: bank.send(b"", b"", SOON))


def test_closing_does_not_wait_for_a_peer_that_never_came() -> None:
    start = time.monotonic()
    listening(GROCER, patience=Patience(flush=60)).close()
    assert time.monotonic() - start < SOON


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    there = Post(BANK, [Peer("grocer", GROCER.public, None)], listen="tcp://[::1]:*")
    with there as bank, connecting(GROCER, bank.endpoint) as grocer:
        grocer.link("bank").ready(SOON)


def test_every_peer_has_its_own_thread_for_looking_up_names(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[object] = []
    opened = curve.open_socket

    def note(*arguments: object, **options: object) -> curve.Socket:
        socket = opened(*arguments, **options)  # type: ignore[arg-type]
        threads.append(socket.getsockopt(zmq.AFFINITY))
        return socket

    monkeypatch.setattr(curve, "open_socket", note)
    places = [(GROCER, None), (MILL, "tcp://127.0.0.1:1"), (STRANGER, "tcp://127.0.0.1:1")]
    with Post(BANK, [Peer(one.name, one.public, place) for one, place in places], listen=ANY) as post:
        assert threads == [1, 2, 4]
        assert post._context.get(zmq.IO_THREADS) == len(threads)


def test_too_many_open_files() -> None:
    code = """
import resource, sys
from parties.errors import LocalError
from parties.identity import Identity
from parties.zeromq import Peer, Post
resource.setrlimit(resource.RLIMIT_NOFILE, (10, int(sys.argv[1])))
me, peer = Identity.generate("bank"), Identity.generate("grocer")
try:
    Post(me, [Peer("grocer", peer.public, None)], listen="tcp://127.0.0.1:*").close()
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
except LocalError as error:
    print(error)
"""
    for limit, outcome in ((200, "(200, 200)"), (12, "too many open files")):
        output = subprocess.check_output([sys.executable, "-c", code, str(limit)], text=True)
        assert output.startswith(outcome)


def test_a_log_that_fails_stops_nothing() -> None:
    def log(line: str) -> None:
        raise BrokenPipeError

    with listening(GROCER, log=log) as bank, connecting(GROCER, bank.endpoint) as grocer:
        with connecting(STRANGER, bank.endpoint) as stranger:
            fails(Refused, "does not list", lambda: stranger.link("bank").receive(SOON))
        grocer.link("bank").send(b"unharmed", b"", SOON)
        assert bank.link("grocer").receive(SOON) == (b"unharmed", b"")


def test_a_bug_in_the_post_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pair() as (bank, grocer):
        bank.ready(SOON)
        grocer.ready(SOON)

        def bug(post: Post, ready: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Post, "_turn", bug)
        fails(LocalError, "ZeroDivisionError", lambda: bank.receive(SOON))
        fails(LocalError, "ZeroDivisionError", lambda: grocer.receive(SOON))
