"""Messages in order, once, over connections that break: what is sent, acknowledged, received and consumed.

Pure bookkeeping for one peer, without sockets, clocks or threads. A frame is one string of bytes; it begins with the
same fixed part

    version, kind, size of the header, source, target, number, received, consumed, progress, length

so that every frame acknowledges (`received` frames in order, `consumed` messages) and shows the progress of the
sender's working loop. `source` and `target` are random numbers of the two running processes: a frame meant for an
earlier run of ours is ignored, and a peer that starts again is noticed.

    BEAT  nothing else
    OPEN  a message's header, then the first piece of its payload, which is `length` bytes long
    MORE  its next piece
    BYE   nothing follows

OPEN, MORE and BYE are numbered from 1. The receiver takes number `received + 1` and ignores the rest; the sender goes
back when told to. Pieces are small, so that on a slow line neither acknowledgements nor signs of life wait long behind
data, and so that libzmq never has to hold a large frame of somebody who has yet to prove anything.
"""

from __future__ import annotations

import secrets
import struct
from collections import deque

from parties.errors import LocalError, PeerLost, ProtocolViolation

BEAT, OPEN, MORE, BYE = range(4)
VERSION = 1
FIXED = struct.Struct("!BBH7Q")
PIECE = 256 * 1024
HEADER_LIMIT = 4096
FRAME_LIMIT = PIECE + HEADER_LIMIT + 1024  # on the wire, with the fixed part and what CURVE adds
WINDOW = 16  # messages that the peer has not consumed; it has room for one more, the last
FLIGHT = 16  # frames that the peer has not received
_Queued = tuple[int, int, bytes, memoryview]  # kind, length, header, piece
_NOTHING = memoryview(b"")


def no_room(target: int) -> bytes:
    """A goodbye to a process that we never talked to, since another one of the same peer has its place."""
    return FIXED.pack(VERSION, BYE, 0, secrets.randbits(63) + 1, target, 1, 0, 0, 0, 0)


class Delivery:
    """Our side of the books with one peer."""

    def __init__(self, peer: str, limit: int) -> None:
        self.peer, self.limit = peer, limit
        self.source = secrets.randbits(63) + 1
        self.target = 0  # unknown until the peer is heard
        self.progress = 0  # the peer's
        self.closed = False  # the peer said goodbye
        self.inbox: deque[tuple[bytes, bytes]] = deque()
        self._out: deque[_Queued] = deque()  # not yet acknowledged; the first is number `acked + 1`
        self._flown = 0  # how many of them are sent
        self.acked = 0
        self._highest = 0  # the highest number ever sent
        self._sent = self._arrived = self._taken = 0  # messages: ours in all, those acknowledged, those consumed
        self.received = 0
        self.consumed = 0
        self._opened = 0  # messages begun by the peer
        self._header = b""
        self._pieces: list[memoryview] = []
        self._left = -1  # bytes of the current message yet to come; -1: between two messages

    # ---- what we send

    @property
    def room(self) -> bool:
        """Whether the window has room for one more message."""
        return self._sent - self._taken < WINDOW

    @property
    def last_room(self) -> bool:
        """Whether there is room for the last message, which need not wait for the window."""
        return self._sent - self._taken <= WINDOW

    @property
    def waiting(self) -> bool:
        """Whether the peer has yet to acknowledge something that is sent."""
        return self._flown > 0

    @property
    def idle(self) -> bool:
        """Whether nothing may be sent now."""
        return self._flown >= min(FLIGHT, len(self._out)) or not self.target

    @property
    def under_way(self) -> bool:
        """Whether part of a message has yet to come, or to go once the peer has acknowledged more."""
        return self._left >= 0 or FLIGHT <= self._flown < len(self._out)

    @property
    def settled(self) -> bool:
        """Whether the peer has received everything."""
        return not self._out

    def push(self, header: bytes, payload: bytes | memoryview) -> None:
        """Queue one message. The payload is copied if it could still change."""
        data = memoryview(bytes(payload))
        if len(header) > HEADER_LIMIT or len(data) > self.limit:
            raise LocalError(
                f"a message to {self.peer} has {len(data)} bytes, above the limit of {self.limit}; split it"
            )
        self._out.append((OPEN, len(data), header, data[:PIECE]))
        self._out.extend((MORE, 0, b"", data[at : at + PIECE]) for at in range(PIECE, len(data), PIECE))
        self._sent += 1

    def farewell(self) -> None:
        """Queue the goodbye."""
        self._out.append((BYE, 0, b"", _NOTHING))

    def rewind(self) -> None:
        """Send again from the first unacknowledged frame."""
        self._flown = 0

    def due(self, progress: int) -> bytes | None:
        """The next frame to send, if any may go now; `gone()` confirms that it went."""
        if self.idle:
            return None
        kind, length, header, piece = self._out[self._flown]
        number = self.acked + self._flown + 1
        return b"".join((self._fixed(kind, number, length, progress, len(header)), header, piece))

    def gone(self) -> None:
        self._flown += 1
        self._highest = max(self._highest, self.acked + self._flown)

    def beat(self, progress: int) -> bytes:
        return self._fixed(BEAT, 0, 0, progress, 0)

    def _fixed(self, kind: int, number: int, length: int, progress: int, header: int) -> bytes:
        return FIXED.pack(
            VERSION, kind, header, self.source, self.target, number, self.received, self.consumed, progress, length
        )

    # ---- what we receive

    def strange(self, frame: bytes | memoryview) -> tuple[int, int] | None:
        """Source and target of a frame that is of another process of this peer than the one we know; else None."""
        if len(frame) < FIXED.size or not self.target:
            return None
        _, _, _, source, target, *_ = FIXED.unpack_from(frame)
        return (source, target) if source != self.target else None

    def take(self) -> tuple[bytes, bytes]:
        """The next message, which must be there."""
        self.consumed += 1
        return self.inbox.popleft()

    def accept(self, frame: bytes | memoryview) -> bool:
        """Book one frame; False when it is meant for an earlier run of ours. Raises ProtocolViolation or PeerLost."""
        if len(frame) < FIXED.size:
            raise self._violation("a frame of the wrong form")
        version, kind, header, source, target, number, received, consumed, progress, length = FIXED.unpack_from(frame)
        if version != VERSION:
            raise self._violation(f"version {version} of the transport, ours is {VERSION}")
        begins = FIXED.size + header  # its piece
        if (
            kind not in (BEAT, OPEN, MORE, BYE)
            or source == 0
            or len(frame) < begins
            or (header and kind != OPEN)
            or (len(frame) > begins and kind in (BEAT, BYE))
        ):
            raise self._violation("a frame of the wrong form")
        if target not in (0, self.source):
            return False
        if self.target not in (0, source):
            raise PeerLost(
                f"{self.peer} was started again in the middle of the run; start all parties again", peer=self.peer
            )
        if received > self._highest:
            raise self._violation("an acknowledgement of what was never sent")
        self.target = source
        self.progress = max(self.progress, progress)
        self._acknowledge(received, consumed)
        if kind == BEAT:
            if number or length:
                raise self._violation("a frame of the wrong form")
        elif not target or not number:
            raise self._violation("a frame of the wrong form")
        elif number > self.received + FLIGHT:
            raise self._violation("more than the window allows")
        elif number == self.received + 1:
            self._book(kind, length, bytes(frame[FIXED.size : begins]), memoryview(frame)[begins:])
            self.received = number
        return True

    def _acknowledge(self, received: int, consumed: int) -> None:
        for _ in range(received - self.acked):
            kind = self._out.popleft()[0]
            self._flown = max(0, self._flown - 1)
            self.acked += 1
            self._arrived += kind != BYE and (not self._out or self._out[0][0] != MORE)  # its last piece
        if consumed > self._arrived:  # else the window opens while what it bounds piles up here
            raise self._violation("a count of messages that it never received")
        self._taken = max(self._taken, consumed)

    def _book(self, kind: int, length: int, header: bytes, piece: memoryview) -> None:
        if self.closed or (self._left >= 0) != (kind == MORE):
            raise self._violation("a frame out of place")
        if kind == BYE:
            self.closed = True
            return
        if kind == OPEN:
            self._opened += 1
            if self._opened - self.consumed > WINDOW + 1:
                raise self._violation("more than the window allows")
            if length > self.limit or len(header) > HEADER_LIMIT:
                raise self._violation(f"a message above the limit of {self.limit} bytes")
            self._header, self._left = header, length
        if len(piece) != min(PIECE, self._left):
            raise self._violation("a piece of the wrong length")
        self._pieces.append(piece)
        self._left -= len(piece)
        if self._left == 0:
            self.inbox.append((self._header, b"".join(self._pieces)))
            self._pieces, self._left = [], -1

    def _violation(self, what: str) -> ProtocolViolation:
        return ProtocolViolation(
            f"{self.peer} sent {what}; make sure that it runs the same version of Colonnade", peer=self.peer
        )
