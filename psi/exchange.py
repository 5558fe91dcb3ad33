"""The masked exchange: k sets go round a ring, everybody masks every set, the hub intersects what nobody can read.

Ring order is the agreement's, the label holder (the hub) first. After k-1 hops the set of party i is masked by all and
sits with party i-1, its holder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from parties.channel import Channel, relay
from parties.errors import LocalError, ProtocolViolation, Refused, blame
from parties.message import Array
from parties.session import Session
from psi.group import check_distinct, check_points, mask, shuffle_order, token, token_width
from psi.messages import MaskedPoints, SetSize, Tokens, part_count, parts, whole

CANARIES = 64
Randomness = Callable[[int], bytes]
Way = Literal["sent", "received"]
What = Literal["points", "tokens", "positions"]


@dataclass(frozen=True)
class Flow:
    """Evidence of one list that passed between two parties: how many entries, and the digest of their bytes."""

    direction: Way
    peer: str
    what: What
    owner: str
    count: int
    digest: str


@dataclass
class Ring:
    """Our place in the ring, and what the exchange leaves with us."""

    session: Session
    names: list[str]
    place: int
    sizes: list[int] = field(default_factory=list)
    shuffles: dict[int, Array] = field(default_factory=dict, repr=False)
    flows: list[Flow] = field(default_factory=list)
    done: int = 0

    @classmethod
    def of(cls, session: Session) -> Ring:
        names = [party.name for party in session.agreement.ring]
        return cls(session, names, names.index(session.name))

    def at(self, offset: int) -> int:
        """The place `offset` steps onward from ours."""
        return (self.place + offset) % len(self.names)

    @property
    def next(self) -> Channel:
        return self.session.channels[self.names[self.at(1)]]

    @property
    def previous(self) -> Channel:
        return self.session.channels[self.names[self.at(-1)]]

    def saw(self, direction: Way, peer: str, what: What, owner: int, data: Array) -> None:
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        self.flows.append(Flow(direction, peer, what, self.names[owner], len(data), digest))

    def step(self, entries: int) -> None:
        self.done += entries
        self.session.advance(self.done, sum(self.sizes))


def masked_exchange(ring: Ring, points: Array, randomness: Randomness = os.urandom) -> Array:
    """Announce sizes, send our points round the ring and mask everybody else's; returns the set that we hold at the
    end, masked by all and shuffled by all, (n, 32) uint8: that of the next party in the ring.

    `points` are our hashed identifiers, canaries and decoys. The ring keeps our shuffle of every set for the way back.

    Reveals:
        To every party: the size of our set, with canaries and decoys.
        To the next party: our points under a fresh key of ours, in random order; it cannot test an id against them.
    Raises:
        Refused: a set above the agreed cap. ProtocolViolation: points that no honest party sends.
    """
    session, key = ring.session, randomness(32)
    cap = session.agreement.intersection.maximum_rows + CANARIES + session.agreement.intersection.decoys
    if len(points) > cap:
        raise LocalError(
            f"our set has more rows than the agreement's cap of {session.agreement.intersection.maximum_rows}"
        )
    session.broadcast(SetSize(len(points)))
    announced = {session.name: len(points)} | {peer: size.points for peer, size in session.gather(SetSize).items()}
    for name, size in announced.items():
        if size > cap:
            raise Refused(f"{name} announces a set of {size} points, above the agreed cap", peer=name)
    ring.sizes = [announced[name] for name in ring.names]

    order = ring.shuffles[ring.place] = shuffle_order(len(points), randomness(32))
    outgoing: Iterator[Array] = (_masked(ring, part, key) for part in parts(points[order]))
    for hop in range(1, len(ring.names)):
        owner = ring.at(-hop)
        sent: list[Array] = []
        received, masked = [], []
        stream = _collected(ring.at(1 - hop), outgoing, sent)
        for message in relay(stream, ring.next, part_count(ring.sizes[owner]), MaskedPoints, ring.previous):
            with blame(ring.previous.peer):
                if message.owner != owner:
                    raise ValueError("points of a set that is not due")
                check_points(message.data)
                received.append(message.data)
                masked.append(_masked(ring, message.data, key))
        ring.saw("sent", ring.next.peer, "points", ring.at(1 - hop), np.concatenate(sent))
        with blame(ring.previous.peer):
            incoming = whole(received, ring.sizes[owner], "points")
            check_distinct(incoming)
        ring.saw("received", ring.previous.peer, "points", owner, incoming)
        order = ring.shuffles[owner] = shuffle_order(len(incoming), randomness(32))
        current = np.concatenate(masked)[order]
        outgoing = parts(current)
    return current


def _collected(owner: int, pieces: Iterator[Array], sent: list[Array]) -> Iterator[MaskedPoints]:
    for piece in pieces:
        sent.append(piece)
        yield MaskedPoints(owner, piece)


def gather_tokens(ring: Ring, held: Array) -> list[Array] | None:
    """Turn the set that we hold into tokens; the hub collects all k lists, in ring order, and gets them back.

    Reveals:
        To the hub: for every set a list of tokens that are equal where ids are; it cannot tell whose id a token is.
    Raises:
        ProtocolViolation: a token comes twice within a list, or a list is not as long as announced.
    """
    session, width = ring.session, token_width(sum(ring.sizes))
    ours = token(held, session.id, width)
    if ring.place != 0:
        hub = session.channels[ring.names[0]]
        ring.saw("sent", hub.peer, "tokens", ring.at(1), ours)
        for part in parts(ours):
            hub.send(Tokens(ring.at(1), part))
        return None
    lists = {1: ours}
    for place in range(1, len(ring.names)):
        holder, owner = session.channels[ring.names[place]], (place + 1) % len(ring.names)
        with blame(holder.peer):
            received = []
            for _ in range(part_count(ring.sizes[owner])):
                message = holder.receive(Tokens)
                if message.owner != owner or message.data.shape[1] != width:
                    raise ValueError("tokens of a set that is not due")
                received.append(message.data)
            lists[owner] = whole(received, ring.sizes[owner], "tokens")
        ring.saw("received", holder.peer, "tokens", owner, lists[owner])
    for owner, tokens in lists.items():
        if len(np.unique(_keys(tokens))) < len(tokens):
            raise ProtocolViolation(f"the set of {ring.names[owner]} came back with a token twice")
    return [lists[owner] for owner in range(len(ring.names))]


def common_positions(lists: list[Array]) -> list[Array]:
    """Where the tokens that all lists share stand in each list, uint32, in ascending token order."""
    keys = [_keys(tokens) for tokens in lists]
    common = keys[0]
    for other in keys[1:]:
        common = np.intersect1d(common, other)
    common = np.sort(common)
    orders = [np.argsort(key) for key in keys]
    return [
        order[np.searchsorted(key, common, sorter=order)].astype(np.uint32)
        for key, order in zip(keys, orders, strict=True)
    ]


def _keys(tokens: Array) -> Array:
    """One sortable byte string a token; all have one width, so that the trailing zeros that S drops tell nothing."""
    return np.ascontiguousarray(tokens).view(f"S{tokens.shape[1]}")[:, 0]


def _masked(ring: Ring, part: Array, key: bytes) -> Array:
    out = mask(part, key)
    ring.step(len(part))
    return out
