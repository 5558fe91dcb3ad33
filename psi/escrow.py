"""What a party keeps for its own auditors beside its report: what opens its commitment and, sealed to its compliance
team's key, the secrets with which it masked. `psi.audit` reads both.
"""

from __future__ import annotations

import msgspec
import numpy as np

from parties.identity import PublicIdentity
from parties.sealing import seal
from psi.align import Alignment, Secrets

ESCROW = "psi escrow"  # what a sealed escrow file is sealed for


class EscrowedStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The secrets of one step: our masking key, the seed of our set's shuffle, the seed of our decoys; and, where more
    steps follow, the entries of our input that they leave out, being common under this key: little-endian u4."""

    mask: bytes
    shuffle: bytes
    decoys: bytes
    matched: bytes = b""

    def __repr__(self) -> str:
        return "EscrowedStep(...)"  # no secret in a traceback or a log


class Escrow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What our compliance team needs to compute again what we sent."""

    session: bytes
    steps: list[EscrowedStep]


def opening(secrets: Secrets) -> bytes:
    """What opens our commitment, 32 (n + 1) bytes: the salts' key, then every leaf."""
    return secrets.salts + secrets.leaves.tobytes()


def sealed_escrow(recipient: PublicIdentity, session: bytes, alignment: Alignment) -> bytes:
    """The secrets of a run, sealed to our compliance team's key. Raises LocalError."""
    if alignment.secrets is None:
        raise ValueError("this alignment's secrets are gone")
    matched = [b""] * len(alignment.steps)
    if alignment.rows is not None:
        ends = np.cumsum([step.size for step in alignment.steps])
        matched[:-1] = [part.tobytes() for part in np.split(alignment.rows.astype("<u4"), ends)[: len(matched) - 1]]
    steps = [EscrowedStep(*one, part) for one, part in zip(alignment.secrets.steps, matched, strict=True)]
    return seal(recipient, msgspec.msgpack.encode(Escrow(session, steps)), ESCROW)
