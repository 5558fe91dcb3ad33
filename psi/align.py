"""From masked exchanges to the same rows in the same order at every party: gate, reveal, and proof that it worked."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from parties.agreement import Intersection
from parties.errors import LocalError, ProtocolViolation, Refused, blame
from parties.message import Array
from parties.session import Session
from parties.workers import Workers
from psi.commitment import commit, joint_seed, root
from psi.exchange import Flow, Randomness, Ring, gather_tokens, masked_exchange
from psi.group import match, suite
from psi.identifiers import Identifiers, Key, canonical, sorted_groups
from psi.inputs import CANARIES, InputSet, decoys_for
from psi.masking import salted_leaves
from psi.messages import (
    PART,
    Gate,
    InputCommitment,
    IntersectionSize,
    OrderPoint,
    OrderTag,
    Positions,
    SeedReveal,
    part_count,
    parts,
)

POSITIONS = PART * 8


@dataclass(frozen=True)
class Step:
    """One key's exchange: everybody's set sizes, and how many rows are common under it (-1: only "below" is known)."""

    key: str
    set_sizes: dict[str, int]
    decoys: int
    size: int


@dataclass(frozen=True, eq=False)
class Secrets:
    """What only we and our own auditors may have: the salts' key and the leaves of our commitment; for each step our
    masking key, the seed of our set's first shuffle, and the seed of our decoys."""

    salts: bytes
    leaves: Array
    steps: tuple[tuple[bytes, bytes, bytes], ...]


@dataclass(frozen=True, eq=False)
class Alignment:
    """`rows[i]` is our position (in the ids given) of the i-th common customer; position i means the same customer at
    every party, and nothing else. It is None where the agreement keeps the rows from us. The rest is evidence."""

    rows: Array | None = field(repr=False)
    size: int
    steps: tuple[Step, ...]
    flows: tuple[Flow, ...] = field(repr=False)
    roots: dict[str, str]
    audit_seed: str
    checks: tuple[tuple[str, bool | None], ...]
    secrets: Secrets = field(repr=False)


def align(
    session: Session,
    ids: Identifiers | Sequence[str],
    *,
    minimum: int | None = None,
    randomness: Randomness = os.urandom,
) -> Alignment:
    """Private set intersection of k parties' ids -> the common rows, in one order for all; or only what the agreement's
    `result` allows. `ids` are canonical ones of `psi.identifiers`, or plain texts where the agreement has one field.

    ECDH-based: Meadows 1986, Huberman et al. 1999, on a ring. With several keys one exchange follows another, each over
    the rows still unmatched; the size that the minimum is held against is then that of all so far. `minimum` is our
    own, stricter than the agreement's.

    Reveals:
        To every party: everyone's set size (with canaries and decoys) and the size of the intersection, or only that it
        is below the agreed minimum (the hub always learns the size); a salted commitment to everyone's input.
        To each party: which of its own rows are in the intersection of all, and under which key; unless the agreement
        keeps rows to the label holder, or lets nobody have them.
        To the hub, with three or more parties: the sizes of the partial intersections, never whose rows (semi-honest).
    Raises:
        Refused: below the minimum, above the cap, or a party's gate says no.
        ProtocolViolation: a check failed; nothing is released.
    """
    agreed = session.agreement.intersection
    if not isinstance(ids, Identifiers):
        ids = canonical(dict.fromkeys(session.agreement.identifiers.fields, ids), session.agreement.identifiers)
    if len(ids) > agreed.maximum_rows:
        raise LocalError(f"our set has more rows than the agreement's cap of {agreed.maximum_rows}")
    salts, share = randomness(32), randomness(32)
    committed = _leaves(session, ids, salts)
    roots, commitments = _commit(session, root(committed), commit(share, session.id, session.name))
    smallest = least_rows(agreed, session.task)
    run = _Run(session, smallest, max(smallest, minimum or 0), randomness)
    rest, matched = np.arange(len(ids)), [np.zeros(0, np.int64)]
    for key in ids.keys:
        entries = unambiguous(key, ids.rows, rest)
        found = run.step(key, ids.rows[entries])
        if found is not None:
            matched.append(entries[found])
            rest = np.setdiff1d(rest, matched[-1], assume_unique=True)
    return Alignment(
        rows=np.concatenate(matched) if run.sees_rows else None,
        size=run.total,
        steps=tuple(run.steps),
        flows=tuple(run.flows),
        roots=roots,
        audit_seed=_reveal_seed(session, share, commitments).hex(),
        checks=tuple(run.checks()),
        secrets=Secrets(salts, committed, tuple(run.secrets)),
    )


def least_rows(agreed: Intersection, task: str) -> int:
    """The agreed minimum: scoring has one of its own."""
    return agreed.minimum_to_score if task.startswith("score") else agreed.minimum


def _leaves(session: Session, ids: Identifiers, salts: bytes) -> Array:
    """One salted leaf for every row that takes part: all its keys."""

    def items() -> Iterator[tuple[int, list[bytes]]]:
        for start in range(0, len(ids), PART):
            yield start, ids.leaf_values(np.arange(start, min(start + PART, len(ids))))

    workers = session.workers if len(ids) > 8 * PART else Workers()
    out, landed = session.scratch.array((len(ids), 32), np.uint8), 0
    for piece in workers.map(partial(salted_leaves, salts), items()):
        out[landed : landed + len(piece)] = piece
        landed += len(piece)
        session.tick()
    return out


def _commit(session: Session, ours: bytes, seed: bytes) -> tuple[dict[str, str], dict[str, bytes]]:
    """Everybody commits to its input, and to its share of the auditors' seed, before anything else is said."""
    session.broadcast(InputCommitment(ours, seed))
    theirs = session.gather(InputCommitment)
    names = [party.name for party in session.agreement.ring]
    roots = {name: (theirs[name].root if name in theirs else ours).hex() for name in names}
    return roots, {name: theirs[name].seed for name in theirs}


def _reveal_seed(session: Session, ours: bytes, commitments: dict[str, bytes]) -> bytes:
    """The seed that picks the auditors' sample: nobody could foresee it when the inputs were committed."""
    session.broadcast(SeedReveal(ours))
    shares = {session.name: ours}
    for name, message in session.gather(SeedReveal).items():
        if not hmac.compare_digest(commit(message.share, session.id, name), commitments[name]):
            raise ProtocolViolation(f"{name} reveals another share of the seed than it committed to", peer=name)
        shares[name] = message.share
    return joint_seed(session.id, [shares[party.name] for party in session.agreement.ring])


def unambiguous(key: Key, rows: Array, rest: Array) -> Array:
    """Those of the entries `rest` that have this key, and have it alone: two rows of one key cannot be told apart."""
    having = rest[key.usable[rows[rest]]]
    order, begins = sorted_groups(key.prints[rows[having]])
    alone = begins & np.append(begins[1:], np.ones(min(1, len(begins)), np.bool_))
    return np.sort(having[order[alone]])


class _Run:
    """The steps of one alignment, and what they leave."""

    def __init__(self, session: Session, agreed: int, ours: int, randomness: Randomness) -> None:
        self.session, self.agreed, self.ours, self.randomness = session, agreed, ours, randomness
        result = session.agreement.intersection.result
        self.sees_rows = result == "rows" or (session.is_label_holder and result != "size")
        self.total = 0
        self.steps: list[Step] = []
        self.flows: list[Flow] = []
        self.secrets: list[tuple[bytes, bytes, bytes]] = []

    def step(self, key: Key, rows: Array) -> Array | None:
        """One exchange: which of the given rows are common, in the common order; None where we may not know."""
        session, agreed = self.session, self.session.agreement.intersection
        mask, shuffle, decoy = suite(agreed.suite).scalar(self.randomness), self.randomness(32), self.randomness(32)
        self.secrets.append((mask, shuffle, decoy))
        decoys = decoys_for(len(rows), agreed.decoys, agreed.bucket)
        ring = Ring.of(session, len(self.steps))
        ours = InputSet(session.id, ring.step, key, rows, decoys, decoy)
        held = masked_exchange(ring, ours, mask, shuffle, self.randomness)
        lists = gather_tokens(ring, held)
        positions = None if lists is None else match(lists)
        size = self._gate(ring, positions)
        found = self._rows(ring, ours, positions, size)
        session.broadcast(Gate(True))  # nobody uses rows before everybody's checks have passed
        _all_open(session, "did not confirm the intersection")
        self.total += size
        self.steps.append(Step(key.name, dict(zip(ring.names, ring.sizes, strict=True)), decoys, size))
        self.flows += ring.flows
        return found

    def _rows(self, ring: Ring, ours: InputSet, positions: list[Array] | None, size: int) -> Array | None:
        result = self.session.agreement.intersection.result
        if result == "size":
            return None
        reveal = _reveal if result == "rows" else _reveal_to_hub
        entries = reveal(ring, positions, size + CANARIES)
        if entries is None:
            return None
        real = entries[entries < len(ours.rows)]
        if ((entries >= len(ours.rows)) & (entries < len(ours.rows) + CANARIES)).sum() != CANARIES:
            raise ProtocolViolation("canaries are missing from the intersection: a party dropped or replaced rows")
        if len(real) != size:
            raise ProtocolViolation("our private decoys are in the intersection: a party claims rows that it lacks")
        if result == "rows":
            encoded = (value for piece in parts(entries) for value in ours.take(piece))
            _order_test(self.session, ring.step, len(entries), encoded, self.randomness)
        return real.astype(np.int64)

    def _gate(self, ring: Ring, positions: list[Array] | None) -> int:
        """The hub tells the size; all gates must say yes. Below the agreed minimum only that is told, and all stop."""
        session, agreed, ours = self.session, self.agreed, self.ours
        least = CANARIES + session.agreement.intersection.decoys
        if positions is not None:
            size = len(positions[0]) - CANARIES
            if not 0 <= size <= min(ring.sizes) - least:
                raise ProtocolViolation(
                    "the intersection lacks canaries or is too large: a party did not use its own set"
                )
            size = size if self.total + size >= agreed else -1
            session.broadcast(IntersectionSize(size))
        else:
            size = session.channels[ring.names[0]].receive(IntersectionSize).rows
        if size == -1:
            raise Refused(f"the intersection is below the agreed minimum of {agreed} rows; no row was revealed")
        if self.total + size < agreed or size + least > min(ring.sizes):
            raise ProtocolViolation(f"{ring.names[0]} tells a size that cannot be", peer=ring.names[0])
        enough = self.total + size >= ours
        session.broadcast(Gate(enough))
        if not enough:
            raise Refused(f"the intersection is below our own minimum of {ours} rows; no row was revealed")
        _all_open(session, "does not let these rows be revealed: its own policy")
        return size

    def checks(self) -> Iterator[tuple[str, bool | None]]:
        """What was checked on the way here (True), and what this result leaves unchecked (None)."""
        result, session = self.session.agreement.intersection.result, self.session
        yield "every point received was well formed and distinct; a sample, or all, lies on the curve", True
        yield "counts equal the announced sizes", True
        yield "every party let the result be revealed: it is at or above its own minimum", True
        yield f"all {CANARIES} canaries are in the intersection", True if self.sees_rows else None
        yield "none of our decoys is in the intersection", True if self.sees_rows else None
        for name in session.channels:
            yield f"row order equals that of {name}", True if result == "rows" else None
        yield "every share of the auditors' seed is the one committed to", True


def _all_open(session: Session, otherwise: str) -> None:
    closed = [name for name, gate in session.gather(Gate).items() if not gate.open]
    if closed:
        raise Refused(f"{closed[0]} {otherwise}; ask them", peer=closed[0])


def _reveal(ring: Ring, positions: list[Array] | None, count: int) -> Array | None:
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


def _reveal_to_hub(ring: Ring, positions: list[Array] | None, count: int) -> Array | None:
    """The same for the hub's own set only: nobody else learns a row."""
    last = len(ring.names) - 1
    if positions is not None:
        _send_positions(ring, ring.names[last], 0, positions[0])
        current: Array = ring.shuffles[0][_receive_positions(ring, ring.next.peer, 0, count)]
        return current
    source = ring.names[0] if ring.place == last else ring.next.peer
    current = _receive_positions(ring, source, 0, count)
    _send_positions(ring, ring.previous.peer, 0, ring.shuffles[0][current])
    return None


def _send_positions(ring: Ring, to: str, owner: int, positions: Array) -> None:
    for part in ring.watch(parts(positions.astype(np.uint32), POSITIONS), "sent", to, "positions", owner):
        ring.session.channels[to].send(Positions(owner, part))


def _receive_positions(ring: Ring, source: str, owner: int, count: int) -> Array:
    messages = (ring.session.channels[source].receive(Positions) for _ in range(part_count(count, POSITIONS)))
    with blame(source):
        pieces = list(ring.watch(_due_positions(messages, owner), "received", source, "positions", owner))
        positions: Array = np.concatenate(pieces)
        if len(positions) != count:
            raise ValueError(f"positions: {len(positions)} rows where {count} were announced")
        if positions.max() >= ring.sizes[owner] or len(np.unique(positions)) < count:
            raise ValueError("positions that are not distinct or not in the set")
    return positions


def _due_positions(messages: Iterable[Positions], owner: int) -> Iterator[Array]:
    for message in messages:
        if message.owner != owner:
            raise ValueError("positions of a set that is not due")
        yield message.data


def _order_test(
    session: Session, step: int, count: int, ordered: Iterable[bytes], randomness: Randomness = os.urandom
) -> None:
    """Every pair of parties tests that their row orders are one list, without showing it: Diffie-Hellman on a base
    that is the hash of the order, then tags over the shared point. Never the hash itself: a dictionary could be tried.

    Reveals:
        To each peer: whether its order equals ours; one guess of the whole order per run, no more.
    """
    hashed = hashlib.sha256(b"order" + session.id + step.to_bytes(4, "big") + count.to_bytes(8, "big"))
    for value in ordered:
        hashed.update(len(value).to_bytes(4, "big") + value)
    curve = suite(session.agreement.intersection.suite)
    base = curve.hash_to_points([b"colonnade/psi/order/1" + hashed.digest()])
    scalars = {name: curve.scalar(randomness) for name in session.channels}
    ours = {name: curve.mask(base, scalar)[0] for name, scalar in scalars.items()}
    for name, channel in session.channels.items():
        channel.send(OrderPoint(ours[name]))
    expected = {}
    for name, channel in session.channels.items():
        theirs = channel.receive(OrderPoint).data
        with blame(name):
            curve.check_points(theirs[np.newaxis], sample=1)
            if np.array_equal(theirs, ours[name]):
                raise ValueError("sent our own point back")
            shared = curve.mask(theirs[np.newaxis], scalars[name])[0]
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
