"""The encrypted gradient exchange: one protocol for all models, two roles.

    G -> k   Enc_G(R)                      SealedResidual
    k -> G   X_k^T Enc_G(R) + mask         SealedGradient
    G -> k   its decryption                OpenedGradient

R is what the loss says at the label holder G, X_k stays at the feature holder k. See docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parties.agreement import Agreement
from parties.errors import LocalError, blame
from parties.session import Session
from vfl.encryption.fixedpoint import quantise, restore, sum_bits
from vfl.encryption.paillier import ROOTS, PublicKey, SecretKey, check_public_key, generate
from vfl.encryption.scheme import Fixed, from_wire, to_wire
from vfl.encryption.weigh import PaillierWeigher, slots
from vfl.losses import Vector
from vfl.messages import ROWS_PER_PART, OpenedGradient, SchemeKey, SealedGradient, SealedResidual

WORTH_WORKERS = 20_000  # values in a batch; below, starting processes takes longer than they save

MEAN_BITS = 8  # a slot leaves room for a column whose mean |x| is below 2^8
FEATURE_BOUND_BITS = 42
COARSE = 2**8  # a column whose standard deviation is fewer steps of the fixed point would be another column


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


def offer_key(session: Session, secret: SecretKey | None = None) -> SecretKey:
    """At the label holder: a fresh key pair for this session; its public half, with proof, to every feature holder.

    Reveals:
        To every feature holder: the public key, and that gcd(n, phi(n)) = 1.
    """
    secret = secret or generate(session.agreement.encryption.key_bits)
    proof = secret.prove(_context(session))
    session.broadcast(SchemeKey(to_wire([secret.public.n, *proof], secret.public.n_bytes)))
    return secret


def accept_key(session: Session) -> PublicKey:
    """At a feature holder: the label holder's public key, checked. Raises ProtocolViolation.

    Without the check an owner of a bad key reads X through mask and re-randomisation.

    Reveals:
        To the label holder: nothing; nothing is sent.
    """
    with blame(session.label_holder):
        wire = session.channels[session.label_holder].receive(SchemeKey).data
        if len(wire) != ROOTS + 1:
            raise ValueError("a key comes with its modulus and the roots of its proof")
        n, *proof = from_wire(wire)
        check_public_key(n, session.agreement.encryption.key_bits, proof, _context(session))
    return PublicKey(n)


def _context(session: Session) -> bytes:
    return session.id + session.agreement.party(session.label_holder).identity.key_id


def open_gradients(
    session: Session, secret: SecretKey, residual: Vector, columns: dict[str, int], scales: Scales, exchange: int
) -> None:
    """One exchange at the label holder: seal R (b,), let every feature holder weigh it, open what comes back.

    Reveals:
        To feature holder k: its own aggregate gradient X_k^T R, columns[k] numbers. If it deviates, any linear function
        of R that fits in as many numbers: its mask makes that look like an honest reply.
        To us: nothing; every plaintext that we open is uniform in Z_n.
    Raises:
        ProtocolViolation: a reply of another shape than d_k columns need, or no ciphertexts under our key.
    """
    fixed = quantise(residual, scales.residual_bits, bound_bits=scales.residual_bits + 1, what="residuals")
    for start in range(0, len(fixed), ROWS_PER_PART):
        sealed = secret.encrypt(fixed[start : start + ROWS_PER_PART])
        session.broadcast(SealedResidual(exchange, sealed))
        session.tick()
    per_pack = slots(secret.public, scales.slot_bits)
    for name, channel in session.channels.items():
        reply = channel.receive(SealedGradient)
        with blame(name):
            if reply.exchange != exchange or len(reply.data) != -(-columns[name] // per_pack):
                raise ValueError("a gradient of another step or size than is due")
            opened = secret.open(reply.data)
        channel.send(OpenedGradient(exchange, opened))


def weigh_gradient(session: Session, public: PublicKey, x: Fixed, scales: Scales, exchange: int) -> Vector:
    """One exchange at a feature holder: X^T R (d,) for our rows x (b, d) in fixed point, R never seen.

    Reveals:
        To the label holder: ciphertexts whose plaintexts are uniform in Z_n, freshly randomised; their number follows
        from the column count.
    Raises:
        ProtocolViolation: bad ciphertexts, another number of rows, or an opened sum that cannot be.
        LocalError: the sums do not fit the agreed slots.
    """
    weigher = PaillierWeigher(
        public,
        x.shape[1],
        1 << scales.residual_bits,
        slot_bits=scales.slot_bits,
        tick=session.tick,
        workers=session.workers if x.size >= WORTH_WORKERS else None,
    )
    channel = session.channels[session.label_holder]
    with blame(channel.peer):
        for start in range(0, len(x), ROWS_PER_PART):
            part = channel.receive(SealedResidual)
            rows = x[start : start + ROWS_PER_PART]
            if part.exchange != exchange or len(part.data) != len(rows):
                raise ValueError("residuals of another step or size than is due")
            weigher.add(part.data, rows)
        channel.send(SealedGradient(exchange, weigher.finish()))
        opened = channel.receive(OpenedGradient)
        if opened.exchange != exchange:
            raise ValueError("a gradient of another step than is due")
        sums = weigher.open(opened.data)
    return restore(sums[:, 0], scales.feature_bits + scales.residual_bits)
