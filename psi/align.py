"""From a masked exchange to the same rows in the same order at every party: gate, reveal, and proof that it worked."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from parties.errors import ProtocolViolation, Refused, blame
from parties.message import Array
from parties.session import TRAIN, Session
from psi.exchange import CANARIES, Flow, Randomness, Ring, common_positions, gather_tokens, masked_exchange
from psi.group import check_points, hash_to_points, mask
from psi.identifiers import encode
from psi.messages import (
    PART,
    Gate,
    IntersectionSize,
    OrderPoint,
    OrderTag,
    Positions,
    part_count,
    parts,
    whole,
)

POSITIONS = PART * 8


@dataclass(frozen=True)
class Alignment:
    """`rows[i]` is our position (in the ids given) of the i-th common customer; position i means the same customer at
    every party, and nothing else. The rest is evidence for the report."""

    rows: Array = field(repr=False)
    set_sizes: dict[str, int]
    flows: tuple[Flow, ...] = field(repr=False)
    checks: tuple[str, ...]


def align(
    session: Session, values: Sequence[str], *, minimum: int | None = None, randomness: Randomness = os.urandom
) -> Alignment:
    """Private set intersection of k parties' canonical ids (each once) -> the common rows, in one order for all.

    ECDH-based: Meadows 1986, Huberman et al. 1999, on a ring. `minimum` is our own, stricter than the agreement's.

    Reveals:
        To every party: everyone's set size (with canaries and decoys) and the size of the intersection, or only that it
        is below the agreed minimum (the hub always learns the size).
        To each party: which of its own rows are in the intersection of all.
        To the hub, with three or more parties: the sizes of the partial intersections, never whose rows (semi-honest).
    Raises:
        Refused: below the minimum, above the cap, or a party's gate says no.
        ProtocolViolation: a check failed; nothing is released.
    """
    agreed = session.agreement.intersection
    id_type, rule = session.agreement.identifiers.type, session.agreement.identifiers.rule
    inputs = [encode(session.id, f"id/{id_type}/{rule}", value) for value in values]
    inputs += [encode(session.id, "canary", str(number)) for number in range(CANARIES)]
    inputs += [encode(session.id, "decoy", randomness(32).hex()) for _ in range(agreed.decoys)]
    ring = Ring.of(session)
    hashed = []
    for start in range(0, len(inputs), PART):
        hashed.append(hash_to_points(inputs[start : start + PART]))
        session.tick()
    held = masked_exchange(ring, np.concatenate(hashed), randomness)
    lists = gather_tokens(ring, held)
    positions = None if lists is None else common_positions(lists)
    smallest = agreed.minimum if session.task == TRAIN else agreed.minimum_to_score
    size = _gate(session, ring, positions, smallest, max(smallest, minimum or 0))
    rows = _reveal(ring, positions, size + CANARIES)

    real = rows[rows < len(values)]
    canaries = (rows >= len(values)) & (rows < len(values) + CANARIES)
    if canaries.sum() != CANARIES:
        raise ProtocolViolation("canaries are missing from the intersection: a party dropped or replaced rows")
    if len(real) != size:
        raise ProtocolViolation("our private decoys are in the intersection: a party claims rows that it lacks")
    _order_test(session, [inputs[row] for row in rows], randomness)
    session.broadcast(Gate(True))  # nobody uses rows before everybody's checks have passed
    _all_open(session, "did not confirm the intersection")
    return Alignment(
        rows=real.astype(np.int64),
        set_sizes=dict(zip(ring.names, ring.sizes, strict=True)),
        flows=tuple(ring.flows),
        checks=(
            "every point received was canonical, of large order, distinct; a sample lies on the curve",
            "counts equal the announced sizes",
            f"all {CANARIES} canaries are in the intersection",
            f"none of our {agreed.decoys} decoys is in the intersection",
            *(f"row order equals that of {name}" for name in session.channels),
        ),
    )


def _gate(session: Session, ring: Ring, positions: list[Array] | None, agreed: int, ours: int) -> int:
    """The hub tells the size; all gates must say yes. Below the agreed minimum only that is told, and all stop."""
    if positions is not None:
        size = len(positions[0]) - CANARIES
        if not 0 <= size <= min(ring.sizes) - CANARIES - session.agreement.intersection.decoys:
            raise ProtocolViolation("the intersection lacks canaries or is too large: a party did not use its own set")
        session.broadcast(IntersectionSize(size if size >= agreed else -1))
        size = size if size >= agreed else -1
    else:
        size = session.channels[ring.names[0]].receive(IntersectionSize).rows
    if size == -1:
        raise Refused(f"the intersection is below the agreed minimum of {agreed} rows; no row was revealed")
    if size < agreed or size + CANARIES + session.agreement.intersection.decoys > min(ring.sizes):
        raise ProtocolViolation(f"{ring.names[0]} tells a size that cannot be", peer=ring.names[0])
    session.broadcast(Gate(size >= ours))
    if size < ours:
        raise Refused(f"the intersection of {size} rows is below our own minimum of {ours}; no row was revealed")
    _all_open(session, "does not let these rows be revealed: its own policy")
    return size


def _all_open(session: Session, otherwise: str) -> None:
    closed = [name for name, gate in session.gather(Gate).items() if not gate.open]
    if closed:
        raise Refused(f"{closed[0]} {otherwise}; ask them", peer=closed[0])


def _reveal(ring: Ring, positions: list[Array] | None, count: int) -> Array:
    """Positions go from the hub to the holders, then back along the ring, each party undoing its own shuffle."""
    session = ring.session
    hub = session.channels.get(ring.names[0])
    if positions is not None:
        for place in range(1, len(ring.names)):
            _send_positions(
                ring, ring.names[place], (place + 1) % len(ring.names), positions[(place + 1) % len(ring.names)]
            )
        current = positions[1]
    else:
        current = _receive_positions(ring, hub.peer if hub else "", ring.at(1), count)
    for step in range(1, len(ring.names)):
        _send_positions(ring, ring.previous.peer, ring.at(step), ring.shuffles[ring.at(step)][current])
        current = _receive_positions(ring, ring.next.peer, ring.at(step + 1), count)
    return ring.shuffles[ring.place][current]


def _send_positions(ring: Ring, to: str, owner: int, positions: Array) -> None:
    positions = positions.astype(np.uint32)
    ring.saw("sent", to, "positions", owner, positions)
    for part in parts(positions, POSITIONS):
        ring.session.channels[to].send(Positions(owner, part))


def _receive_positions(ring: Ring, source: str, owner: int, count: int) -> Array:
    received = []
    with blame(source):
        for _ in range(part_count(count, POSITIONS)):
            message = ring.session.channels[source].receive(Positions)
            if message.owner != owner:
                raise ValueError("positions of a set that is not due")
            received.append(message.data)
        positions = whole(received, count, "positions")
        if positions.max() >= ring.sizes[owner] or len(np.unique(positions)) < count:
            raise ValueError("positions that are not distinct or not in the set")
    ring.saw("received", source, "positions", owner, positions)
    return positions


def _order_test(session: Session, ordered: list[bytes], randomness: Randomness = os.urandom) -> None:
    """Every pair of parties tests that their row orders are one list, without showing it: Diffie-Hellman on a base
    that is the hash of the order, then tags over the shared point. Never the hash itself: a dictionary could be tried.

    Reveals:
        To each peer: whether its order equals ours; one guess of the whole order per run, no more.
    """
    hashed = hashlib.sha256(b"order" + session.id + len(ordered).to_bytes(8, "big"))
    for value in ordered:
        hashed.update(len(value).to_bytes(4, "big") + value)
    base = hash_to_points([b"colonnade/psi/order/1" + hashed.digest()])
    scalars = {name: randomness(32) for name in session.channels}
    ours = {name: mask(base, scalar)[0] for name, scalar in scalars.items()}
    for name, channel in session.channels.items():
        channel.send(OrderPoint(ours[name]))
    expected = {}
    for name, channel in session.channels.items():
        theirs = channel.receive(OrderPoint).data
        with blame(name):
            check_points(theirs[np.newaxis], sample=1)
            if np.array_equal(theirs, ours[name]):
                raise ValueError("sent our own point back")
            shared = mask(theirs[np.newaxis], scalars[name])[0]
        me, peer = session.me.public.key_id, session.agreement.party(name).identity.key_id
        channel.send(OrderTag(_tag(session.id, me, peer, ours[name], theirs, shared)))
        expected[name] = _tag(session.id, peer, me, theirs, ours[name], shared)
    for name, channel in session.channels.items():
        if not hmac.compare_digest(channel.receive(OrderTag).data.tobytes(), expected[name].tobytes()):
            raise ProtocolViolation(
                f"our row order differs from that of {name}: a party on the ring moved or invented rows", peer=name
            )


def _tag(session: bytes, sender: bytes, receiver: bytes, sent: Array, got: Array, shared: Array) -> Array:
    data = (
        b"colonnade/psi/order-tag/1" + session + sender + receiver + sent.tobytes() + got.tobytes() + shared.tobytes()
    )
    return np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
