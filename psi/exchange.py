"""The masked exchange: k sets go round a ring, everybody masks every set, a judge intersects what nobody can read.

Ring order is the agreement's, the label holder (the hub) first. After k-1 hops the set of party i is masked by all and
sits with party i-1, its holder, as tokens. Lists stream in parts; only a shuffle waits for the whole of a list.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
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
from psi.messages import PART, MaskedPoints, Seen, SetSize, Tokens, part_count, parts

TO_HUB = "rows to the label holder"
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


def judge_of(result: str, parties: int) -> int:
    """The place of who gets all tokens and intersects: the hub; but where only the hub is to get rows, the holder of
    its set, who then decides over the minimum, and has nothing to gain."""
    return parties - 1 if result == TO_HUB else 0


@dataclass
class Ring:
    """Our place in the ring, and what one step of the exchange leaves with us."""

    session: Session
    names: list[str]
    place: int
    step: int = 0
    told: bytes = b""  # digest of what everybody has committed to
    sizes: list[int] = field(default_factory=list)
    shuffles: dict[int, Array] = field(default_factory=dict, repr=False)
    flows: list[Flow] = field(default_factory=list)
    done: int = 0

    @classmethod
    def of(cls, session: Session, step: int = 0, told: bytes = b"") -> Ring:
        names = [party.name for party in session.agreement.ring]
        return cls(session, names, names.index(session.name), step, told)

    @property
    def judge(self) -> int:
        """The place of who gets all tokens and intersects."""
        return judge_of(self.session.agreement.intersection.result, len(self.names))

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
    outgoing = _counted(ring, _ours(ring.workers.map(partial(hash_and_mask, agreed.suite, key), inputs)))
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
        masked, landed = _theirs(ring, ring.workers.map(work, _swap(ring, outgoing, ring.at(1 - hop), owner))), 0
        for piece in _counted(ring, masked):
            current[place[landed : landed + len(piece)]] = piece
            landed += len(piece)
        with blame(ring.previous.peer):
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
        if size < CANARIES + agreed.decoys:
            raise ProtocolViolation(
                f"{name} announces a set of {size} points, fewer than canaries and decoys", peer=name
            )
        if size % agreed.bucket:
            raise ProtocolViolation(f"{name} announces a set of {size} points, no multiple of the bucket", peer=name)
    ring.sizes = [announced[name] for name in ring.names]
    counts = b"".join(size.to_bytes(8, "big") for size in ring.sizes)
    seen = hashlib.sha256(b"colonnade/psi/seen/1" + session.id + ring.step.to_bytes(4, "big") + ring.told + counts)
    session.broadcast(Seen(seen.digest()))
    for name, theirs in session.gather(Seen).items():
        if theirs.digest != seen.digest():
            raise ProtocolViolation(f"{name} was told other sizes or commitments than we were: a party is lying")


def _swap(ring: Ring, outgoing: Iterable[Array], ours: int, theirs: int) -> Iterator[Array]:
    """Send one set onward while another arrives: its parts, as they come."""
    watched = ring.watch(outgoing, "sent", ring.next.peer, "points", ours)
    stream = (MaskedPoints(ours, piece) for piece in watched)
    arriving = relay(stream, ring.next, part_count(ring.sizes[theirs]), MaskedPoints, ring.previous)
    due = _due(arriving, ring.previous.peer, theirs, ring.sizes[theirs], "points")
    yield from ring.watch(due, "received", ring.previous.peer, "points", theirs)


def _due(
    arriving: Iterable[MaskedPoints | Tokens], source: str, owner: int, count: int, what: str, width: int = 32
) -> Iterator[Array]:
    """The arrays of the messages that make up one list, as long as it was announced."""
    rows = 0
    for message in arriving:
        rows += len(message.data)
        with blame(source):
            if message.owner != owner or message.data.shape[1] != width:
                raise ValueError(f"{what} of a set that is not due")
            if rows > count:
                raise ValueError(f"{what}: more than the {count} rows that were announced")
        yield message.data
    with blame(source):
        if rows < count:
            raise ValueError(f"{what}: {rows} rows where {count} were announced")


def _ours(pieces: Iterator[Array]) -> Iterator[Array]:
    """Our own set, masked; a fault in it must not look like the peer's."""
    try:
        yield from pieces
    except ValueError as error:
        raise LocalError(f"cannot mask our own set: {type(error).__name__}") from None


def _theirs(ring: Ring, pieces: Iterator[Array]) -> Iterator[Array]:
    """What the previous party sent, masked; what is wrong with it is that party's fault."""
    with blame(ring.previous.peer):  # a generator's `with` does not see what its consumer does with a piece
        yield from pieces


def _counted(ring: Ring, pieces: Iterable[Array]) -> Iterator[Array]:
    for piece in pieces:
        ring.advance(len(piece))
        yield piece


def gather_tokens(ring: Ring, held: Array) -> list[Array] | None:
    """Send the tokens that we hold to the judge; the judge collects all k lists, in ring order, and gets them back.

    Reveals:
        To the judge: for every set a list of tokens that are equal where ids are; it cannot tell whose id a token is.
    Raises:
        ProtocolViolation: a token comes twice within a list, or a list is not as long as announced.
    """
    session, width = ring.session, held.shape[1]
    if ring.place != ring.judge:
        judge = session.channels[ring.names[ring.judge]]
        for part in ring.watch(parts(held), "sent", judge.peer, "tokens", ring.at(1)):
            judge.send(Tokens(ring.at(1), part))
        return None
    lists = {ring.at(1): held}
    for place in (place for place in range(len(ring.names)) if place != ring.place):
        holder, owner = session.channels[ring.names[place]], (place + 1) % len(ring.names)
        arriving = (holder.receive(Tokens) for _ in range(part_count(ring.sizes[owner])))
        lists[owner], landed = session.scratch.array((ring.sizes[owner], width), np.uint8), 0
        due = _due(arriving, holder.peer, owner, ring.sizes[owner], "tokens", width)
        for piece in ring.watch(due, "received", holder.peer, "tokens", owner):
            lists[owner][landed : landed + len(piece)] = piece
            landed += len(piece)
        with blame(holder.peer):
            check_distinct(lists[owner], "tokens")
    return [lists[owner] for owner in range(len(ring.names))]
