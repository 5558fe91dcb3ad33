"""The masked exchange: k sets go round a ring, everybody masks every set, the hub intersects what nobody can read.

Ring order is the agreement's, the label holder (the hub) first. After k-1 hops the set of party i is masked by all and
sits with party i-1, its holder, as tokens. Lists stream in parts; only a shuffle waits for the whole of a list.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np

from parties.channel import Channel, relay
from parties.errors import LocalError, ProtocolViolation, Refused, blame
from parties.message import Array
from parties.session import Session
from parties.workers import Workers
from psi.group import check_distinct, shuffle_order, token_width
from psi.inputs import CANARIES, InputSet
from psi.masking import check_and_mask, check_mask_and_hide, hash_and_mask
from psi.messages import PART, MaskedPoints, SetSize, Tokens, part_count, parts

Randomness = Callable[[int], bytes]
Way = Literal["sent", "received"]
What = Literal["points", "tokens", "positions"]


@dataclass(frozen=True)
class Flow:
    """Evidence of one list that passed between two parties: how many entries, and the digest of their bytes."""

    step: int
    direction: Way
    peer: str
    what: What
    owner: str
    count: int
    digest: str


@dataclass
class Ring:
    """Our place in the ring, and what one step of the exchange leaves with us."""

    session: Session
    names: list[str]
    place: int
    step: int = 0
    sizes: list[int] = field(default_factory=list)
    shuffles: dict[int, Array] = field(default_factory=dict, repr=False)
    flows: list[Flow] = field(default_factory=list)
    done: int = 0

    @classmethod
    def of(cls, session: Session, step: int = 0) -> Ring:
        names = [party.name for party in session.agreement.ring]
        return cls(session, names, names.index(session.name), step)

    def at(self, offset: int) -> int:
        """The place `offset` steps onward from ours."""
        return (self.place + offset) % len(self.names)

    @property
    def next(self) -> Channel:
        return self.session.channels[self.names[self.at(1)]]

    @property
    def previous(self) -> Channel:
        return self.session.channels[self.names[self.at(-1)]]

    @property
    def workers(self) -> Workers:
        """The party's workers; small sets are done in this process, since starting others takes longer."""
        return self.session.workers if sum(self.sizes) > 4 * PART else Workers(1)

    def watch(self, pieces: Iterable[Array], direction: Way, peer: str, what: What, owner: int) -> Iterator[Array]:
        """Pass the pieces of a list on; once all have passed, keep count and digest as evidence."""
        count, digest = 0, hashlib.sha256()
        for piece in pieces:
            count += len(piece)
            digest.update(np.ascontiguousarray(piece).data)
            yield piece
        self.flows.append(Flow(self.step, direction, peer, what, self.names[owner], count, digest.hexdigest()))

    def advance(self, entries: int) -> None:
        self.done += entries
        self.session.advance(self.done, sum(self.sizes))


def masked_exchange(
    ring: Ring, ours: InputSet, key: bytes, shuffle: bytes, randomness: Randomness = os.urandom
) -> Array:
    """Announce sizes, send our set round the ring and mask everybody else's; returns the tokens of the set that we hold
    at the end, masked by all and shuffled by all, (n, width) uint8: that of the next party in the ring.

    `key` is our fresh secret scalar, `shuffle` the seed of our own set's order. The ring keeps our shuffle of every set
    for the way back.

    Reveals:
        To every party: the size of our set, with canaries and decoys.
        To the next party: our points under a fresh key of ours, in random order; it cannot test an id against them.
    Raises:
        Refused: a set above the agreed cap. ProtocolViolation: points that no honest party sends.
    """
    session, agreed = ring.session, ring.session.agreement.intersection
    _announce(ring, len(ours))
    width = token_width(sum(ring.sizes))
    order = ring.shuffles[ring.place] = shuffle_order(len(ours), shuffle).astype(np.uint32)
    inputs = (ours.take(piece) for piece in parts(order))
    outgoing = _counted(ring, ring.workers.map(partial(hash_and_mask, agreed.suite, key), inputs))
    for hop in range(1, len(ring.names)):
        owner, last = ring.at(-hop), hop == len(ring.names) - 1
        order = ring.shuffles[owner] = shuffle_order(ring.sizes[owner], randomness(32)).astype(np.uint32)
        place = np.empty_like(order)  # of the i-th that arrives, such that out[j] = in[order[j]]
        place[order] = np.arange(len(order), dtype=np.uint32)
        work = (
            partial(check_mask_and_hide, agreed.suite, key, session.id, width)
            if last
            else partial(check_and_mask, agreed.suite, key)
        )
        current = session.scratch.array((len(order), width if last else 32), np.uint8)
        incoming, landed = _swap(ring, outgoing, ring.at(1 - hop), owner), 0
        with blame(ring.previous.peer):  # the channels name whom they blame themselves
            for piece in _counted(ring, _in_groups(ring.workers, work, incoming)):
                current[place[landed : landed + len(piece)]] = piece
                landed += len(piece)
            check_distinct(current)
        outgoing = parts(current)
    return current


def _announce(ring: Ring, points: int) -> None:
    session, agreed = ring.session, ring.session.agreement.intersection
    cap = agreed.maximum_rows + CANARIES + agreed.decoys + agreed.bucket - 1
    if points > cap:
        raise LocalError(f"our set has more rows than the agreement's cap of {agreed.maximum_rows}")
    session.broadcast(SetSize(points))
    announced = {session.name: points} | {peer: size.points for peer, size in session.gather(SetSize).items()}
    for name, size in announced.items():
        if size > cap:
            raise Refused(f"{name} announces a set of {size} points, above the agreed cap", peer=name)
        if size % agreed.bucket:
            raise ProtocolViolation(f"{name} announces a set of {size} points, no multiple of the bucket", peer=name)
    ring.sizes = [announced[name] for name in ring.names]


def _swap(ring: Ring, outgoing: Iterable[Array], ours: int, theirs: int) -> Iterator[Array]:
    """Send one set onward while another arrives: its parts, as they come."""
    watched = ring.watch(outgoing, "sent", ring.next.peer, "points", ours)
    stream = (MaskedPoints(ours, piece) for piece in watched)
    arriving = relay(stream, ring.next, part_count(ring.sizes[theirs]), MaskedPoints, ring.previous)
    yield from ring.watch(
        _due(arriving, theirs, ring.sizes[theirs], "points"), "received", ring.previous.peer, "points", theirs
    )


def _due(
    arriving: Iterable[MaskedPoints | Tokens], owner: int, count: int, what: str, width: int = 32
) -> Iterator[Array]:
    """The arrays of the messages that make up one list, as long as it was announced. Raises ValueError."""
    rows = 0
    for message in arriving:
        if message.owner != owner or message.data.shape[1] != width:
            raise ValueError(f"{what} of a set that is not due")
        rows += len(message.data)
        if rows > count:
            raise ValueError(f"{what}: more than the {count} rows that were announced")
        yield message.data
    if rows < count:
        raise ValueError(f"{what}: {rows} rows where {count} were announced")


def _in_groups(workers: Workers, work: Callable[[Array], Array], incoming: Iterator[Array]) -> Iterator[Array]:
    """`map(work, incoming)`; while the workers are at one group of parts, the next one arrives."""
    started: Iterator[Array] = iter(())
    while group := list(islice(incoming, 2 * workers.count)):
        ahead = workers.map(work, group)
        yield from started
        started = ahead
    yield from started


def _counted(ring: Ring, pieces: Iterable[Array]) -> Iterator[Array]:
    for piece in pieces:
        ring.advance(len(piece))
        yield piece


def gather_tokens(ring: Ring, held: Array) -> list[Array] | None:
    """Send the tokens that we hold to the hub; the hub collects all k lists, in ring order, and gets them back.

    Reveals:
        To the hub: for every set a list of tokens that are equal where ids are; it cannot tell whose id a token is.
    Raises:
        ProtocolViolation: a token comes twice within a list, or a list is not as long as announced.
    """
    session, width = ring.session, held.shape[1]
    if ring.place != 0:
        hub = session.channels[ring.names[0]]
        for part in ring.watch(parts(held), "sent", hub.peer, "tokens", ring.at(1)):
            hub.send(Tokens(ring.at(1), part))
        return None
    lists = {1: held}
    for place in range(1, len(ring.names)):
        holder, owner = session.channels[ring.names[place]], (place + 1) % len(ring.names)
        arriving = (holder.receive(Tokens) for _ in range(part_count(ring.sizes[owner])))
        lists[owner], landed = session.scratch.array((ring.sizes[owner], width), np.uint8), 0
        with blame(holder.peer):
            due = _due(arriving, owner, ring.sizes[owner], "tokens", width)
            for piece in ring.watch(due, "received", holder.peer, "tokens", owner):
                lists[owner][landed : landed + len(piece)] = piece
                landed += len(piece)
            check_distinct(lists[owner])
    return [lists[owner] for owner in range(len(ring.names))]
