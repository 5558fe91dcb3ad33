"""What a run will cost, before it starts: a few operations measured on this machine, times how often they occur."""

from __future__ import annotations

from dataclasses import dataclass

from parties.agreement import Agreement
from psi.group import POINT_BYTES, suite, token_width
from psi.inputs import CANARIES
from vfl.encryption.choice import REFERENCE, Cost, Scheme, choose, measured, predict, timed

SAMPLE = 256
USUAL_EXCHANGES = 15  # of subspace, at C = 1 on standardised columns, see docs/operations.md


@dataclass(frozen=True)
class Estimate:
    """Upper estimates for one run: all our rows in the intersection, every peer's set and columns like ours.

    `schemes`: what the encrypted exchanges take under each additive scheme; `scheme` is the one that will be used.
    Bytes are those of all parties in training, ours in the intersection.
    """

    align_seconds: float
    align_bytes: int
    exchanges: int
    scheme: Scheme
    schemes: dict[Scheme, Cost]

    @property
    def seconds(self) -> float:
        return self.align_seconds + self.schemes[self.scheme].seconds

    @property
    def bytes(self) -> int:
        return self.align_bytes + self.schemes[self.scheme].bytes


def estimate(agreement: Agreement, rows: int, columns: int) -> Estimate:
    """Seconds and bytes for a party with `rows` and `columns`; the peers are taken to be of the same size."""
    parties, points = len(agreement.parties), rows + CANARIES + agreement.intersection.decoys
    inputs = [number.to_bytes(4, "big") for number in range(SAMPLE)]
    curve = suite(agreement.intersection.suite)
    scalar = curve.scalar()
    hashed, hash_seconds = timed(lambda: curve.hash_to_points(inputs))
    _, mask_seconds = timed(lambda: curve.mask(hashed, scalar))
    align_seconds = points * (hash_seconds + parties * mask_seconds) / SAMPLE
    width = token_width(parties * points)
    align_bytes = points * ((parties - 1) * POINT_BYTES + width + 4 * parties)

    train_rows = max(1, round(rows * (1 - agreement.model.test_fraction)))
    model = agreement.model
    exchanges = (
        USUAL_EXCHANGES if model.solver == "subspace" else model.epochs
    )  # sgd: one stands for an epoch's batches
    exchanges = min(exchanges, model.max_exchanges)
    holders = (max(columns, 1),) * (parties - 1)  # a label holder may have none, feature holders have some
    if not model.allow_reconstruction:
        exchanges = min(exchanges, sum(holders))
    key_bits, cached = agreement.encryption.key_bits, model.solver == "subspace"
    reference, ours = (
        predict(units, train_rows, holders, 1, exchanges, cached=cached)
        for units in (REFERENCE[key_bits], measured(key_bits))
    )
    chosen = choose(agreement.encryption.scheme, reference)
    return Estimate(align_seconds, align_bytes, exchanges, chosen, ours)
