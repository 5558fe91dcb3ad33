"""After the gate: rows go back to their owners, and every pair proves to each other that they have the same."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from parties.errors import ProtocolViolation, blame
from parties.message import Array
from parties.session import Session
from psi.exchange import Randomness, Ring
from psi.group import suite
from psi.inputs import CANARIES, InputSet
from psi.messages import PART, OrderPoint, OrderTag, Positions, part_count, parts

POSITIONS = PART * 8


def bring_back(ring: Ring, owner: int, positions: Sequence[Array] | None, count: int) -> Array | None:
    """The common rows of one set, as its owner's entries, in the common order; None at all others.

    The judge, who alone has `positions`, sends those of this set to its holder; from there they go backwards along the
    ring, each party undoing its own shuffle of the set, to its owner. One set at a time: nobody waits in a circle.

    Reveals:
        To the owner: which of its entries are common. To the others: positions in lists of secret order.
    """
    k = len(ring.names)
    path = [(owner - 1 - step) % k for step in range(k)]  # holder .. owner
    here, source = path.index(ring.place), ring.names[ring.judge]
    if positions is not None and ring.place == path[0]:
        current = positions[owner]
    else:
        if positions is not None:
            _send(ring, ring.names[path[0]], owner, positions[owner])
        current = _receive(ring, ring.names[path[here - 1]] if here else source, owner, count)
    entries: Array = ring.shuffles[owner][current]
    if ring.place == owner:
        return entries
    _send(ring, ring.names[path[here + 1]], owner, entries)
    return None


def _send(ring: Ring, to: str, owner: int, positions: Array) -> None:
    for part in ring.watch(parts(positions.astype(np.uint32), POSITIONS), "sent", to, "positions", owner):
        ring.session.channels[to].send(Positions(owner, part))


def _receive(ring: Ring, source: str, owner: int, count: int) -> Array:
    messages = (ring.session.channels[source].receive(Positions) for _ in range(part_count(count, POSITIONS)))
    with blame(source):
        pieces = list(ring.watch(_due(messages, owner), "received", source, "positions", owner))
        positions: Array = np.concatenate(pieces)
        if len(positions) != count:
            raise ValueError(f"positions: {len(positions)} rows where {count} were announced")
        if positions.max() >= ring.sizes[owner] or len(np.unique(positions)) < count:
            raise ValueError("positions that are not distinct or not in the set")
    return positions


def _due(messages: Iterable[Positions], owner: int) -> Iterator[Array]:
    for message in messages:
        if message.owner != owner:
            raise ValueError("positions of a set that is not due")
        yield message.data


def check_entries(entries: Array, ours: InputSet, size: int) -> Array:
    """The rows among our common entries, int64. Raises ProtocolViolation: canaries are missing, or decoys are there."""
    real = entries[entries < len(ours.rows)]
    if ((entries >= len(ours.rows)) & (entries < len(ours.rows) + CANARIES)).sum() != CANARIES:
        raise ProtocolViolation("canaries are missing from the intersection: a party dropped or replaced rows")
    if len(real) != size:
        raise ProtocolViolation("our private decoys are in the intersection: a party claims rows that it lacks")
    return real.astype(np.int64)


def hash_order(ring: Ring, entries: Array, ours: InputSet) -> bytes:
    """What two parties have in common if, and only if, their common rows are the same ids in the same order."""
    hashed = hashlib.sha256(b"order" + ring.session.id + ring.step.to_bytes(4, "big") + len(entries).to_bytes(8, "big"))
    for piece in parts(entries):
        for value in ours.take(piece):
            hashed.update(len(value).to_bytes(4, "big") + value)
        ring.session.tick()
    return hashed.digest()


def order_test(session: Session, order: bytes, peers: Sequence[str], randomness: Randomness = os.urandom) -> None:
    """Test with each of `peers` that our row orders are one list, without showing it: Diffie-Hellman on a base that is
    the hash of the order, then tags over the shared point. Never the hash itself: a dictionary could be tried.

    Reveals:
        To each peer: whether its order equals ours; one guess of the whole order per run, no more.
    """
    curve = suite(session.agreement.intersection.suite)
    base = curve.hash_to_points([b"colonnade/psi/order/1" + order])
    scalars = {name: curve.scalar(randomness) for name in peers}
    ours = {name: curve.mask(base, scalar)[0] for name, scalar in scalars.items()}
    for name in peers:
        session.channels[name].send(OrderPoint(ours[name]))
    expected = {}
    for name in peers:
        theirs = session.channels[name].receive(OrderPoint).data
        with blame(name):
            curve.check_points(theirs[np.newaxis], sample=1)
            if np.array_equal(theirs, ours[name]):
                raise ValueError("sent our own point back")
            shared = curve.mask(theirs[np.newaxis], scalars[name])[0]
        me, peer = session.me.public.key_id, session.agreement.party(name).identity.key_id
        session.channels[name].send(OrderTag(_tag(session.id, me, peer, ours[name], theirs, shared)))
        expected[name] = _tag(session.id, peer, me, theirs, ours[name], shared)
    for name in peers:
        if not hmac.compare_digest(session.channels[name].receive(OrderTag).data.tobytes(), expected[name].tobytes()):
            guilty = name if len(session.channels) == 1 else None  # with three parties it may be any of them
            raise ProtocolViolation(
                f"our row order differs from that of {name}: a party on the ring moved or invented rows", peer=guilty
            )


def _tag(session: bytes, sender: bytes, receiver: bytes, sent: Array, got: Array, shared: Array) -> Array:
    data = (
        b"colonnade/psi/order-tag/1" + session + sender + receiver + sent.tobytes() + got.tobytes() + shared.tobytes()
    )
    return np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
