"""The encrypted gradient exchange: one protocol for all models, two roles.

    G -> k   Enc_G(R)                      SealedResidual   (lattice: under fresh keys, each with a SchemeKey first)
    k -> G   X_k^T Enc_G(R) + mask         SealedGradient
    G -> k   its decryption                OpenedGradient

R is what the loss says at the label holder G, X_k stays at the feature holder k. See docs/protocol.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from parties.agreement import Agreement
from parties.errors import LocalError, Refused, blame
from parties.session import Session
from vfl.encryption.choice import REFERENCE, Cost, Scheme, choose, predict
from vfl.encryption.fixedpoint import quantise, restore, sum_bits
from vfl.encryption.lattice import CACHE_BYTES, PLAIN_BITS, Columns, LatticeKey, LatticeWeigher
from vfl.encryption.layout import NUMBERS_PER_KEY, Layout, passes
from vfl.encryption.paillier import ROOTS, PublicKey, SecretKey, check_public_key, generate
from vfl.encryption.scheme import Fixed, Opener, Weigher, Wire, from_wire, to_wire
from vfl.encryption.weigh import PaillierOpener, PaillierWeigher
from vfl.losses import Matrix, Vector
from vfl.messages import REPLIES_PER_PART, OpenedGradient, Plan, SchemeKey, SealedGradient, SealedResidual

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
    range_bits: int = 0

    @classmethod
    def of(cls, agreement: Agreement, rows: int, range_bits: int = 0) -> Scales:
        """|residuals| are at most 2^range_bits."""
        e = agreement.encryption
        slot = e.feature_bits + e.residual_bits + range_bits + MEAN_BITS + max(rows, 1).bit_length() + 2
        return cls(e.feature_bits, e.residual_bits, slot, range_bits)

    @property
    def residual_bound(self) -> int:
        return 1 << self.residual_bits + self.range_bits

    def residual(self, values: Matrix) -> Fixed:
        """Residuals in fixed point. Raises LocalError beyond their range."""
        limit = 2.0**self.range_bits
        if np.isfinite(values).all() and values.size and np.abs(values).max() > limit:
            raise LocalError(f"residuals exceed {limit:g}; agree on a larger residual_range in [model]")
        bound_bits = self.residual_bits + self.range_bits + 1
        return quantise(values, self.residual_bits, bound_bits=bound_bits, what="residuals")

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
        sums = np.abs(fixed).sum(axis=0, dtype=np.float64)
        large = [
            name
            for name, total in zip(names, sums, strict=True)
            if sum_bits(int(total), self.residual_bound) + 2 > self.slot_bits
        ]
        if large:
            raise LocalError(f"values too large for the agreed slots in {', '.join(large)}; standardise the features")
        return fixed

    def magnitude(self, x: Fixed, batches: Sequence[NDArray[np.int64]] = ()) -> int:
        """ceil(log2(sum |x|)) of our largest column in any batch; at least what rows of 1 need, so that standardised
        columns all tell the same."""
        rows = max(map(len, batches), default=len(x))
        parts = [x[batch] for batch in batches] or [x]
        largest = max(float(np.abs(part).sum(axis=0, dtype=np.float64).max()) for part in parts)
        return max(sum_bits(math.ceil(largest), 1), self.feature_bits + rows.bit_length())


@dataclass(frozen=True)
class Terms:
    """What both ends derive from the agreement and everybody's plan before the first exchange.

    For every feature holder its `columns`, its `scales` (of residuals: as fine as its sums leave room for) and how many
    partial sums its overflow takes (`parts`; lattice only). `width` residual columns; at most `exchanges`, and what
    these are predicted to cost on the reference machine.
    """

    scheme: Scheme
    columns: dict[str, int]
    scales: dict[str, Scales]
    parts: dict[str, int]
    exchanges: int
    costs: dict[Scheme, Cost]
    width: int = 1
    numbers_per_key: int = NUMBERS_PER_KEY

    @classmethod
    def of(
        cls,
        agreement: Agreement,
        rows: int,
        plans: Mapping[str, Plan],
        exchanges: int,
        *,
        width: int = 1,
        range_bits: int = 0,
        cached: bool = True,
    ) -> Terms:
        """`rows` of the largest batch; `plans` of the feature holders; `cached`: all batches are the same.

        Raises:
            Refused: a feature holder without columns, or with sums larger than its features may have: more partial sums
            would be opened for it.
        """
        e, scales = agreement.encryption, Scales.of(agreement, rows, range_bits)
        most = scales.feature_bits + MEAN_BITS + rows.bit_length()
        for name, plan in plans.items():
            if not plan.columns or plan.magnitude > most:
                raise Refused(f"{name} plans with {plan.columns} columns and sums of {plan.magnitude} bits", peer=name)
        columns = {name: plan.columns for name, plan in plans.items()}
        units, widths = REFERENCE[e.key_bits], tuple(columns.values())
        costs = predict(units, rows, widths, width, exchanges, cached=cached, numbers=e.numbers_per_key)
        scheme = choose(e.scheme, costs)
        if scheme == "paillier":
            parts = dict.fromkeys(columns, 1)
            return cls(scheme, columns, dict.fromkeys(columns, scales), parts, exchanges, costs, width)
        room = PLAIN_BITS - 2
        bits = {name: max(room - plan.magnitude, LEAST_RESIDUAL_BITS) - range_bits for name, plan in plans.items()}
        own = {name: replace(scales, residual_bits=min(scales.residual_bits, bits[name])) for name in plans}
        over = {name: plan.magnitude + own[name].residual_bits + range_bits - room for name, plan in plans.items()}
        parts = {name: 2 << excess if excess > 0 else 1 for name, excess in over.items()}  # uneven ones need more
        for name, count in parts.items():
            if count > e.numbers_per_key or own[name].residual_bits < 0:
                raise Refused(f"{name}: sums of {plans[name].magnitude} bits are too large; standardise", peer=name)
        return cls(scheme, columns, own, parts, exchanges, costs, width, e.numbers_per_key)

    @property
    def residual_range(self) -> float:
        """No residual is larger."""
        return float(2 ** next(iter(self.scales.values())).range_bits)

    def passes(self, name: str, rows: int) -> list[tuple[slice, slice]]:
        """The columns of X and of R, in turn, that a key opens for this feature holder. Paillier: all at once."""
        columns, width = self.columns[name], self.width
        step = (columns, width)
        if self.scheme == "lattice":
            step = passes(rows, columns, width, self.parts[name], self.numbers_per_key)
        return [
            (slice(c, min(c + step[0], columns)), slice(r, min(r + step[1], width)))
            for c in range(0, columns, step[0])
            for r in range(0, width, step[1])
        ]


@dataclass
class LabelEnd:
    """The label holder's end of the exchanges of one training."""

    session: Session
    terms: Terms
    secret: SecretKey | None = None

    def openers(self, exchange: int, number: int, rows: int) -> list[tuple[Opener, dict[str, tuple[slice, slice]]]]:
        """What seals and opens the exchange's pass of this number, and for whom. Lattice: fresh keys, which go out."""
        terms = self.terms
        due = {name: terms.passes(name, rows) for name in terms.columns}
        now = {name: all_[number] for name, all_ in due.items() if number < len(all_)}
        if self.secret is not None:
            slot = next(iter(terms.scales.values())).slot_bits
            return [(PaillierOpener(self.secret, slot, terms.width), now)] if now else []
        openers: list[tuple[Opener, dict[str, tuple[slice, slice]]]] = []
        for name, cut in now.items():
            key = LatticeKey(_context(self.session, name, exchange, number), _layout(rows, cut))
            self.session.channels[name].send(SchemeKey(key.public()))
            openers.append((key, {name: cut}))
        return openers


@dataclass
class FeatureEnd:
    """A feature holder's end: its X (n, d) in fixed point, and what of it is kept between exchanges."""

    session: Session
    terms: Terms
    x: Fixed
    public: PublicKey | None = None
    _kept: dict[tuple[int, int], Columns] = field(default_factory=dict, init=False)

    @property
    def scales(self) -> Scales:
        return self.terms.scales[self.session.name]

    def weigher(self, exchange: int, number: int, cut: tuple[slice, slice], rows: NDArray[np.int64] | None) -> Weigher:
        """What weighs the residuals of a pass with these rows (None: all)."""
        session, terms, scales = self.session, self.terms, self.scales
        if self.public is not None:
            x = self.x if rows is None else self.x[rows]
            return PaillierWeigher(
                self.public,
                x,
                scales.residual_bound,
                width=terms.width,
                slot_bits=scales.slot_bits,
                tick=session.tick,
                workers=session.workers if x.size >= WORTH_WORKERS else None,
            )
        with blame(session.label_holder):
            public = session.channels[session.label_holder].receive(SchemeKey).data
            return LatticeWeigher(
                self._columns(cut, rows),
                public,
                _context(session, session.name, exchange, number),
                scales.residual_bound,
                sums=terms.exchanges * terms.parts[session.name] * terms.columns[session.name] * terms.width,
                tick=session.tick,
            )

    def _columns(self, cut: tuple[slice, slice], rows: NDArray[np.int64] | None) -> Columns:
        parts, bound = self.terms.parts[self.session.name], self.scales.residual_bound
        if rows is not None:
            return Columns(self.x[rows, cut[0]], _layout(len(rows), cut), parts, bound, 0)
        layout = _layout(len(self.x), cut)
        place = (cut[0].start, layout.width)
        if place not in self._kept:
            room = CACHE_BYTES * (cut[0].stop - cut[0].start) // self.x.shape[1]
            self._kept[place] = Columns(self.x[:, cut[0]], layout, parts, bound, room)
        return self._kept[place]


def _layout(rows: int, cut: tuple[slice, slice]) -> Layout:
    columns, residuals = cut
    return Layout.of(rows, (columns.stop - columns.start,), residuals.stop - residuals.start)


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


def _context(session: Session, *of_key: str | int) -> bytes:
    """What ties a key to this session, this label holder and (lattice) feature holder, exchange and pass."""
    whose = session.id + session.agreement.party(session.label_holder).identity.key_id
    return whose + "".join(f" {one}" for one in of_key).encode()


def open_gradients(end: LabelEnd, residual: Matrix | Vector, exchange: int) -> None:
    """One exchange at the label holder: seal R (b, m) or (b,), let every feature holder weigh it, open what comes back.

    Reveals:
        To feature holder k: its own aggregate gradient X_k^T R, columns[k] * m numbers. If it deviates, any linear
        function of R that fits in as many numbers: its mask makes that look like an honest reply. Lattice: with more
        than 32 numbers a key (`numbers_per_key`) less than 2^128 work, with 205 none, gives it all of R.
        To us: nothing; every plaintext that we open is uniform in Z_n (Paillier), modulo 2^64 (lattice).
    Raises:
        ProtocolViolation: a reply of another shape than d_k columns need, or no ciphertexts under our key.
    """
    session, terms, rows = end.session, end.terms, len(residual)
    fixed = {scales: scales.residual(residual.reshape(rows, -1)) for scales in set(terms.scales.values())}
    number = 0
    while openers := end.openers(exchange, number, rows):
        for opener, names in openers:
            for start in range(0, rows, opener.rows):
                first = next(iter(names))
                part = fixed[terms.scales[first]][start : start + opener.rows, names[first][1]]
                sealed = SealedResidual(exchange, opener.encrypt(part))
                for name in names:
                    session.channels[name].send(sealed)
                session.tick()
        for opener, names in openers:
            for name, (columns, _) in names.items():
                opened = _opened(end, opener, name, columns.stop - columns.start, exchange)
                session.channels[name].send(OpenedGradient(exchange, opened))
        number += 1


def _opened(end: LabelEnd, opener: Opener, name: str, columns: int, exchange: int) -> Wire:
    """A feature holder's reply, opened."""
    parts, replies = end.terms.parts[name], []
    due = opener.replies(columns, parts)
    with blame(name):
        for start in range(0, due, REPLIES_PER_PART):
            reply = end.session.channels[name].receive(SealedGradient)
            if reply.exchange != exchange or len(reply.data) != min(REPLIES_PER_PART, due - start):
                raise ValueError("a gradient of another step or size than is due")
            replies.append(reply.data)
        return opener.open(np.concatenate(replies), columns, parts)


def weigh_gradient(end: FeatureEnd, exchange: int, rows: NDArray[np.int64] | None = None) -> Matrix:
    """One exchange at a feature holder: X^T R (d, m) over these rows of our x (None: all), R never seen.

    Reveals:
        To the label holder: ciphertexts whose plaintexts are uniform, freshly randomised (lattice: flooded); their
        number follows from the plans.
    Raises:
        ProtocolViolation: bad ciphertexts, another number of rows, or an opened sum that cannot be.
        LocalError: the sums do not fit the agreed slots.
    """
    channel, terms = end.session.channels[end.session.label_holder], end.terms
    sums = np.zeros((end.x.shape[1], terms.width), dtype=object)
    count = len(end.x) if rows is None else len(rows)
    for number, cut in enumerate(terms.passes(end.session.name, count)):
        weigher = end.weigher(exchange, number, cut, rows)
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
            sums[cut] = weigher.open(opened.data)
    return restore(sums, end.scales.feature_bits + end.scales.residual_bits)
