"""From masked exchanges to the same rows in the same order at every party: gate, reveal, and proof that it worked."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from parties.agreement import Intersection
from parties.errors import LocalError, ProtocolViolation, Refused
from parties.message import Array
from parties.session import Session
from psi.commitment import commit, input_root, joint_seed, leaves, root
from psi.exchange import Flow, Randomness, Ring, gather_tokens, masked_exchange
from psi.group import match, suite
from psi.identifiers import Identifiers, Key, canonical, sorted_groups
from psi.inputs import CANARIES, InputSet, decoys_for
from psi.messages import PART, Gate, InputCommitment, IntersectionSize, SeedReveal
from psi.reveal import bring_back, check_entries, hash_order, order_test

_UNCONFIRMED = "did not confirm the intersection"


@dataclass(frozen=True)
class Step:
    """One key's exchange: everybody's set sizes, and how many rows are common under it."""

    key: str
    set_sizes: dict[str, int]
    decoys: int
    size: int


@dataclass(frozen=True, eq=False)
class Secrets:
    """What only we and our own auditors may have: the salts' key and the leaves of our commitment; for each step our
    masking key, the seed of our set's first shuffle, and the seed of our decoys."""

    salts: bytes = field(repr=False)
    leaves: Array = field(repr=False)
    steps: tuple[tuple[bytes, bytes, bytes], ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Alignment:
    """`rows[i]` is our position (in the ids given) of the i-th common customer; position i means the same customer at
    every party, and nothing else. It is None where the agreement keeps the rows from us. The rest is evidence:
    `merkle_root` that of our input, `roots` what every party committed to (see `psi.commitment.input_root`)."""

    rows: Array | None = field(repr=False)
    size: int
    steps: tuple[Step, ...]
    flows: tuple[Flow, ...] = field(repr=False)
    merkle_root: str
    roots: dict[str, str]
    audit_seed: str
    checks: tuple[tuple[str, bool | None], ...]
    secrets: Secrets | None = field(repr=False)


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
        is below the agreed minimum (the judge always learns the size); a salted commitment to everyone's input.
        To each party: which of its own rows are in the intersection of all, and under which key; unless the agreement
        keeps rows to the label holder, or lets nobody have them.
        To the judge, with three or more parties: the sizes of the partial intersections, never whose rows. The judge
        is the hub; where only the label holder gets rows, it is the last party of the ring, so that the minimum holds
        against a label holder that deviates. In the other modes it holds against a semi-honest hub only.
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
    tree = root(committed)
    ours = InputCommitment(input_root(len(ids), tree), commit(share, session.id, session.name))
    commitments = _commit(session, ours)
    told = hashlib.sha256(b"".join(one.root + one.seed for one in commitments.values())).digest()
    smallest = least_rows(agreed, session.task)
    run = _Run(session, told, smallest, max(smallest, minimum or 0), randomness)
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
        merkle_root=tree.hex(),
        roots={name: one.root.hex() for name, one in commitments.items()},
        audit_seed=_reveal_seed(session, share, commitments).hex(),
        checks=tuple(checks_made(agreed.result, run.sees_rows, list(session.channels))),
        secrets=Secrets(salts, committed, tuple(run.secrets)),
    )


def least_rows(agreed: Intersection, task: str) -> int:
    """The agreed minimum: scoring has one of its own."""
    return agreed.minimum_to_score if task.startswith("score") else agreed.minimum


def _leaves(session: Session, ids: Identifiers, salts: bytes) -> Array:
    """One salted leaf for every row that takes part: all its keys. A microsecond each: no work for other processes."""
    out = session.scratch.array((len(ids), 32), np.uint8)
    for start in range(0, len(ids), PART):
        values = ids.leaf_values(np.arange(start, min(start + PART, len(ids))))
        out[start : start + len(values)] = leaves(salts, start, values)
        session.tick()
    return out


def _commit(session: Session, ours: InputCommitment) -> dict[str, InputCommitment]:
    """Everybody commits to its input, and to its share of the auditors' seed, before anything else is said."""
    session.broadcast(ours)
    known = session.gather(InputCommitment) | {session.name: ours}
    return {party.name: known[party.name] for party in session.agreement.ring}


def _reveal_seed(session: Session, ours: bytes, commitments: Mapping[str, InputCommitment]) -> bytes:
    """The seed that picks the auditors' sample: nobody could foresee it when the inputs were committed."""
    session.broadcast(SeedReveal(ours))
    shares = {session.name: ours}
    for name, message in session.gather(SeedReveal).items():
        if not hmac.compare_digest(commit(message.share, session.id, name), commitments[name].seed):
            raise ProtocolViolation(f"{name} reveals another share of the seed than it committed to", peer=name)
        shares[name] = message.share
    return joint_seed(session.id, [shares[party.name] for party in session.agreement.ring])


def unambiguous(key: Key, rows: Array, rest: Array) -> Array:
    """Those of the entries `rest` that have this key, and have it alone: two rows of one key cannot be told apart."""
    having = rest[key.usable[rows[rest]]]
    order, begins = sorted_groups(key.prints[rows[having]])
    alone = begins & np.append(begins[1:], np.ones(min(1, len(begins)), np.bool_))
    return np.sort(having[order[alone]])


def checks_made(result: str, sees_rows: bool, peers: Sequence[str]) -> Iterator[tuple[str, bool | None]]:
    """What a run that gets to its end has checked (True), and what its result leaves unchecked (None)."""
    sees, all_see = True if sees_rows else None, True if result == "rows" else None
    yield "every point received was well formed and distinct; a sample, or all, lies on the curve", True
    yield "counts equal the announced sizes", True
    yield "all parties were told the same commitments and sizes", True
    yield "every party let the result be revealed: it is at or above its own minimum", True
    yield f"all {CANARIES} canaries are in the intersection", sees
    yield "none of our decoys is in the intersection", sees
    for name in peers:
        yield f"row order equals that of {name}", all_see
    yield "every share of the auditors' seed is the one committed to", True


class _Run:
    """The steps of one alignment, and what they leave."""

    def __init__(self, session: Session, told: bytes, agreed: int, ours: int, randomness: Randomness) -> None:
        self.session, self.told, self.agreed, self.ours, self.randomness = session, told, agreed, ours, randomness
        self.result = session.agreement.intersection.result
        self.sees_rows = self.result == "rows" or (session.is_label_holder and self.result != "size")
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
        ring = Ring.of(session, len(self.steps), self.told)
        ours = InputSet(session.id, ring.step, key, rows, decoys, decoy)
        held = masked_exchange(ring, ours, mask, shuffle, self.randomness)
        lists = gather_tokens(ring, held)
        positions = None if lists is None else match(lists)
        size = self._gate(ring, positions)
        found = self._open(ring, ours, positions, size)
        self._agree(size, _UNCONFIRMED)  # nobody uses rows before everybody's checks have passed
        self.total += size
        self.steps.append(Step(key.name, dict(zip(ring.names, ring.sizes, strict=True)), decoys, size))
        self.flows += ring.flows
        return found

    def _gate(self, ring: Ring, positions: list[Array] | None) -> int:
        """The judge tells the size; all gates must say yes. Below the agreed minimum only that is told: all stop."""
        session, agreed, ours, judge = self.session, self.agreed, self.ours, ring.names[ring.judge]
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
            size = session.channels[judge].receive(IntersectionSize).rows
        if size == -1:
            cascade = len(session.agreement.identifiers.cascade) > 1
            alone = " under its first key, which must meet it alone" if cascade else ""
            raise Refused(f"the intersection is below the agreed minimum of {agreed} rows{alone}; no row was revealed")
        if self.total + size < agreed or size + least > min(ring.sizes):
            raise ProtocolViolation(f"{judge} tells a size that cannot be", peer=judge)
        if self.total + size < ours:
            session.broadcast(Gate(False, size))
            raise Refused(f"the intersection is below our own minimum of {ours} rows; no row was revealed")
        self._agree(size, "does not let these rows be revealed: its own policy")
        return size

    def _agree(self, size: int, otherwise: str) -> None:
        """Go on only when everybody does, and was told the same size."""
        self.session.broadcast(Gate(True, size))
        for name, gate in self.session.gather(Gate).items():
            if not gate.open:
                raise Refused(f"{name} {otherwise}; ask them", peer=name)
            if gate.rows != size:
                raise ProtocolViolation(f"{name} was told another size than we were: a party is lying")

    def _open(self, ring: Ring, ours: InputSet, positions: list[Array] | None, size: int) -> Array | None:
        """Everybody's rows go back to it, the hub's last: the others have checked theirs before it learns a row."""
        if self.result == "size":
            return None
        session, count, hub = self.session, size + CANARIES, ring.names[0]
        others = [name for name in session.channels if name != hub]
        found: Array | None = None
        order = b""
        if self.result == "rows":
            for owner in range(1, len(ring.names)):
                entries = bring_back(ring, owner, positions, count)
                if entries is not None:
                    found = check_entries(entries, ours, size)
                    order = hash_order(ring, entries, ours)
            if ring.place:
                order_test(session, order, others, self.randomness)
            self._agree(size, _UNCONFIRMED)
        entries = bring_back(ring, 0, positions, count)
        if entries is not None:
            found = check_entries(entries, ours, size)
            order = hash_order(ring, entries, ours)
        if self.result == "rows":
            order_test(session, order, [hub] if ring.place else others, self.randomness)
        return found
