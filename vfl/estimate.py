"""What a run will cost, before it starts: a few operations measured on this machine, times how often they occur."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parties.agreement import Agreement
from psi.group import POINT_BYTES, suite, token_width
from psi.inputs import CANARIES
from vfl.encryption.choice import REFERENCE, Cost, Scheme, choose, measured, predict, timed

SAMPLE = 256
USUAL_EXCHANGES = 15  # of subspace, at C = 1 on standardised columns, see docs/operations.md


@dataclass(frozen=True)
class Estimate:
    """Upper estimates for one run: every table has as many rows as ours, all of them common. `columns` are those taken
    for the feature holders: our own, of others as many as the agreement allows, or as we have where it has no number.

    `schemes`: what the encrypted exchanges take under each additive scheme; `scheme` is the one that will be used.
    Seconds are of one core, at all parties at the same time; bytes those that all send together. `unit`: what is
    counted, exchanges over all rows or epochs of batches; `allowed` is the most of them, by the agreement and by what
    they disclose.
    """

    rows: int
    columns: dict[str, int]
    align_seconds: float
    align_bytes: int
    unit: Literal["exchanges", "epochs"]
    exchanges: int
    allowed: int
    scheme: Scheme
    schemes: dict[Scheme, Cost]

    @property
    def seconds(self) -> float:
        return self.align_seconds + self.schemes[self.scheme].seconds

    @property
    def bytes(self) -> int:
        return self.align_bytes + self.schemes[self.scheme].bytes


def estimate(agreement: Agreement, name: str, rows: int, columns: int) -> Estimate:
    """Seconds and bytes of a run of all, as the party `name` with `rows` and `columns` can tell them beforehand."""
    parties, points = len(agreement.parties), rows + CANARIES + agreement.intersection.decoys
    inputs = [number.to_bytes(4, "big") for number in range(SAMPLE)]
    curve = suite(agreement.intersection.suite)
    scalar = curve.scalar()
    hashed, hash_seconds = timed(lambda: curve.hash_to_points(inputs))
    _, mask_seconds = timed(lambda: curve.mask(hashed, scalar))
    align_seconds = points * (hash_seconds + parties * mask_seconds) / SAMPLE
    width = token_width(parties * points)
    align_bytes = parties * points * ((parties - 1) * POINT_BYTES + width + 4 * parties)

    train_rows = max(1, round(rows * (1 - agreement.model.test_fraction)))
    holders = {one.name: columns if one.name == name else one.columns or max(columns, 1) for one in agreement.ring[1:]}
    model, batched = agreement.model, agreement.is_network or agreement.model.solver == "sgd"
    wanted = model.epochs if batched else model.max_exchanges  # the batches of an epoch stand for one exchange
    unit: Literal["exchanges", "epochs"] = "epochs" if batched else "exchanges"
    allowed = (
        wanted if model.allow_reconstruction else min(wanted, _harmless(agreement, sum(holders.values()), batched))
    )
    exchanges = min(allowed, USUAL_EXCHANGES) if model.solver == "subspace" and not batched else allowed
    key_bits = agreement.encryption.key_bits
    reference, ours = (
        predict(units, train_rows, tuple(holders.values()), 1, exchanges, cached=not batched)
        for units in (REFERENCE[key_bits], measured(key_bits))
    )
    chosen = choose(agreement.encryption.scheme, reference)
    return Estimate(rows, holders, align_seconds, align_bytes, unit, exchanges, allowed, chosen, ours)


def _harmless(agreement: Agreement, columns: int, batched: bool) -> int:
    """As many exchanges, or epochs of batches, as the label holder may have without consent to reconstruction, where so
    many of the feature holders' columns are independent. The last exchange over all rows embeds nothing; batches leave
    room for a scoring of their rows."""
    most = agreement.leakage.most_embeddings(columns)
    if not batched:
        return most + 1
    return max(most // (agreement.network.hidden[0] if agreement.is_network else 1) - 1, 0)
