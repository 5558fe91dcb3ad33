"""The encrypted gradient exchange: one protocol for all models, two roles.

    G -> k   Enc_G(R)                      SealedResidual   (lattice: a fresh key first, SchemeKey)
    k -> G   X_k^T Enc_G(R) + mask         SealedGradient
    G -> k   its decryption                OpenedGradient

R is what the loss says at the label holder G, X_k stays at the feature holder k. See docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from parties.agreement import Agreement
from parties.errors import LocalError, blame
from parties.session import Session
from vfl.encryption.choice import REFERENCE, Cost, Scheme, choose, predict
from vfl.encryption.fixedpoint import quantise, restore, sum_bits
from vfl.encryption.lattice import PLAIN_BITS, Columns, LatticeKey, LatticeWeigher, Layout
from vfl.encryption.paillier import ROOTS, PublicKey, SecretKey, check_public_key, generate
from vfl.encryption.scheme import Fixed, Opener, Weigher, from_wire, to_wire
from vfl.encryption.weigh import PaillierOpener, PaillierWeigher
from vfl.losses import Vector
from vfl.messages import REPLIES_PER_PART, OpenedGradient, Plan, SchemeKey, SealedGradient, SealedResidual
from vfl.solver import Matrix

WORTH_WORKERS = 20_000  # values in a batch; below, starting processes takes longer than they save

MEAN_BITS = 8  # a slot leaves room for a column whose mean |x| is below 2^8
FEATURE_BOUND_BITS = 42
COARSE = 2**8  # a column whose standard deviation is fewer steps of the fixed point would be another column
LEAST_RESIDUAL_BITS = 20  # lattice: rather several partial sums than coarser residuals


@dataclass(frozen=True)
class Scales:
    """Fixed-point scales and slot width, the same at both ends: they follow from the agreement and the rows alone."""

    feature_bits: int
    residual_bits: int
    slot_bits: int

    @classmethod
    def of(cls, agreement: Agreement, rows: int) -> Scales:
        e = agreement.encryption
        slot = e.feature_bits + e.residual_bits + MEAN_BITS + max(rows, 1).bit_length() + 2
        return cls(e.feature_bits, e.residual_bits, slot)

    def exact(self, x: Fixed) -> Vector:
        """The X (n, d) that is weighed, as floats: embeddings come from it, so that a loss fits its gradient."""
        return np.ldexp(x.astype(np.float64), -self.feature_bits)

    def features(self, x: Vector, names: Sequence[str]) -> Fixed:
        """X (n, d) in fixed point; |x| below 2^(42 - feature_bits), and sums that fit. LocalError names the columns."""
        bound = 2.0 ** (FEATURE_BOUND_BITS - self.feature_bits)
        large = [name for name, top in zip(names, np.abs(x).max(axis=0, initial=0), strict=True) if not top < bound]
        if large:
            raise LocalError(f"values of {bound:.0f} or more in {', '.join(large)}; standardise the features")
        fixed = quantise(x, self.feature_bits, bound_bits=FEATURE_BOUND_BITS, what="features")
        coarse = [name for name, spread in zip(names, fixed.std(axis=0), strict=True) if 0 < spread < COARSE]
        if coarse:
            raise LocalError(f"values too small for fixed point in {', '.join(coarse)}; standardise the features")
        sums = np.abs(fixed).sum(axis=0)  # no overflow below 2^21 rows of 2^42
        large = [
            name
            for name, total in zip(names, sums, strict=True)
            if sum_bits(int(total), 1 << self.residual_bits) + 2 > self.slot_bits
        ]
        if large:
            raise LocalError(f"values too large for the agreed slots in {', '.join(large)}; standardise the features")
        return fixed

    def magnitude(self, x: Fixed, batches: Sequence[NDArray[np.int64]] = ()) -> int:
        """ceil(log2(sum |x|)) of our largest column in any batch; at least what rows of 1 need, so that standardised
        columns all tell the same."""
        rows = max(map(len, batches), default=len(x))
        sums = [int(np.abs(part).sum(axis=0).max()) for part in ([x[batch] for batch in batches] or [x])]
        return max(sum_bits(max(sums), 1), self.feature_bits + rows.bit_length())


@dataclass(frozen=True)
class Terms:
    """What both ends derive from the agreement and everybody's plan before the first exchange.

    `columns` and `parts` (partial sums, so that none overflows; lattice only) of every feature holder; `width` residual
    columns; the most `exchanges`, and what these are predicted to cost on the reference machine.
    """

    scheme: Scheme
    scales: Scales
    columns: dict[str, int]
    parts: dict[str, int]
    exchanges: int
    costs: dict[Scheme, Cost]
    width: int = 1

    @classmethod
    def of(
        cls,
        agreement: Agreement,
        rows: int,
        plans: Mapping[str, Plan],
        exchanges: int,
        *,
        width: int = 1,
        cached: bool = True,
    ) -> Terms:
        """`rows` of the largest batch; `plans` of the feature holders; `cached`: all batches are the same."""
        columns = {name: plan.columns for name, plan in plans.items()}
        scales, units = Scales.of(agreement, rows), REFERENCE[agreement.encryption.key_bits]
        costs = predict(units, rows, tuple(columns.values()), width, exchanges, cached=cached)
        scheme = choose(agreement.encryption.scheme, costs)
        if scheme == "paillier":
            return cls(scheme, scales, columns, dict.fromkeys(columns, 1), exchanges, costs, width)
        room = PLAIN_BITS - 2
        largest = max(plan.magnitude for plan in plans.values())
        bits = min(scales.residual_bits, max(room - largest, LEAST_RESIDUAL_BITS))
        parts = {name: 1 << max(plan.magnitude + bits - room, 0) for name, plan in plans.items()}
        return cls(scheme, replace(scales, residual_bits=bits), columns, parts, exchanges, costs, width)

    @property
    def residual_bound(self) -> int:
        return 1 << self.scales.residual_bits

    def layout(self, rows: int) -> Layout:
        return Layout.of(rows, tuple(self.columns.values()), self.width)


@dataclass
class LabelEnd:
    """The label holder's end of the exchanges of one training."""

    session: Session
    terms: Terms
    secret: SecretKey | None = None

    def opener(self, exchange: int, rows: int) -> Opener:
        """What seals and opens this exchange. The lattice scheme has a fresh key each: it goes out now."""
        if self.secret is not None:
            return PaillierOpener(self.secret, self.terms.scales.slot_bits, self.terms.width)
        key = LatticeKey(_context(self.session, exchange), self.terms.layout(rows))
        self.session.broadcast(SchemeKey(key.public()))
        return key


@dataclass
class FeatureEnd:
    """A feature holder's end: its X (n, d) in fixed point, and what of it is kept between exchanges."""

    session: Session
    terms: Terms
    x: Fixed
    public: PublicKey | None = None
    _kept: Columns | None = field(default=None, init=False)

    def weigher(self, exchange: int, rows: NDArray[np.int64] | None) -> Weigher:
        """What weighs this exchange's residuals with these rows (None: all)."""
        session, terms = self.session, self.terms
        x = self.x if rows is None else self.x[rows]
        if self.public is not None:
            return PaillierWeigher(
                self.public,
                x,
                terms.residual_bound,
                width=terms.width,
                slot_bits=terms.scales.slot_bits,
                tick=session.tick,
                workers=session.workers if x.size >= WORTH_WORKERS else None,
            )
        columns = self._kept or Columns(x, terms.layout(len(x)), terms.parts[session.name])
        if rows is None:
            self._kept = columns
        with blame(session.label_holder):
            public = session.channels[session.label_holder].receive(SchemeKey).data
            return LatticeWeigher(
                columns,
                public,
                _context(session, exchange),
                terms.residual_bound,
                exchanges=terms.exchanges,
                tick=session.tick,
            )


def offer_key(session: Session, terms: Terms, secret: SecretKey | None = None) -> LabelEnd:
    """At the label holder, Paillier: a fresh key pair for this session; its public half, with proof, to all.

    Reveals:
        To every feature holder: the public key, and that gcd(n, phi(n)) = 1. Lattice: nothing yet.
    """
    if terms.scheme == "lattice":
        return LabelEnd(session, terms)
    secret = secret or generate(session.agreement.encryption.key_bits)
    proof = secret.prove(_context(session))
    session.broadcast(SchemeKey(to_wire([secret.public.n, *proof], secret.public.n_bytes)))
    return LabelEnd(session, terms, secret)


def accept_key(session: Session, terms: Terms, x: Fixed) -> FeatureEnd:
    """At a feature holder, Paillier: the label holder's public key, checked. Raises ProtocolViolation.

    Without the check an owner of a bad key reads X through mask and re-randomisation.

    Reveals:
        To the label holder: nothing; nothing is sent.
    """
    if terms.scheme == "lattice":
        return FeatureEnd(session, terms, x)
    with blame(session.label_holder):
        wire = session.channels[session.label_holder].receive(SchemeKey).data
        if len(wire) != ROOTS + 1:
            raise ValueError("a key comes with its modulus and the roots of its proof")
        n, *proof = from_wire(wire)
        check_public_key(n, session.agreement.encryption.key_bits, proof, _context(session))
    return FeatureEnd(session, terms, x, PublicKey(n))


def _context(session: Session, exchange: int | None = None) -> bytes:
    """What ties a key to this session, this label holder and (lattice) this exchange."""
    whose = session.id + session.agreement.party(session.label_holder).identity.key_id
    return whose if exchange is None else whose + exchange.to_bytes(8, "little")


def open_gradients(end: LabelEnd, residual: Matrix | Vector, exchange: int) -> None:
    """One exchange at the label holder: seal R (b, m) or (b,), let every feature holder weigh it, open what comes back.

    Reveals:
        To feature holder k: its own aggregate gradient X_k^T R, columns[k] * m numbers. If it deviates, any linear
        function of R that fits in as many numbers: its mask makes that look like an honest reply.
        To us: nothing; every plaintext that we open is uniform in Z_n (Paillier), modulo 2^64 (lattice).
    Raises:
        ProtocolViolation: a reply of another shape than d_k columns need, or no ciphertexts under our key.
    """
    session, terms = end.session, end.terms
    bits = terms.scales.residual_bits
    fixed = quantise(residual.reshape(len(residual), -1), bits, bound_bits=bits + 1, what="residuals")
    opener = end.opener(exchange, len(fixed))
    for start in range(0, len(fixed), opener.rows):
        session.broadcast(SealedResidual(exchange, opener.encrypt(fixed[start : start + opener.rows])))
        session.tick()
    for name, channel in session.channels.items():
        due = opener.replies(terms.columns[name], terms.parts[name])
        replies = [channel.receive(SealedGradient) for _ in range(0, due, REPLIES_PER_PART)]
        with blame(name):
            if any(reply.exchange != exchange for reply in replies) or sum(len(reply.data) for reply in replies) != due:
                raise ValueError("a gradient of another step or size than is due")
            sealed = np.concatenate([reply.data for reply in replies])
            opened = opener.open(sealed, terms.columns[name], terms.parts[name])
        channel.send(OpenedGradient(exchange, opened))


def weigh_gradient(end: FeatureEnd, exchange: int, rows: NDArray[np.int64] | None = None) -> Matrix:
    """One exchange at a feature holder: X^T R (d, m) over these rows of our x (None: all), R never seen.

    Reveals:
        To the label holder: ciphertexts whose plaintexts are uniform, freshly randomised (lattice: flooded); their
        number follows from the plans.
    Raises:
        ProtocolViolation: bad ciphertexts, another number of rows, or an opened sum that cannot be.
        LocalError: the sums do not fit the agreed slots.
    """
    channel = end.session.channels[end.session.label_holder]
    weigher = end.weigher(exchange, rows)
    with blame(channel.peer):
        for _ in range(weigher.parts):
            part = channel.receive(SealedResidual)
            if part.exchange != exchange:
                raise ValueError("residuals of another step than is due")
            weigher.add(part.data)
        replies = weigher.finish()
        for start in range(0, len(replies), REPLIES_PER_PART):
            channel.send(SealedGradient(exchange, replies[start : start + REPLIES_PER_PART]))
        opened = channel.receive(OpenedGradient)
        if opened.exchange != exchange:
            raise ValueError("a gradient of another step than is due")
        sums = weigher.open(opened.data)
    return restore(sums, end.terms.scales.feature_bits + end.terms.scales.residual_bits)
