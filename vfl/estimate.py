"""What a run will cost, before it starts: a few operations measured on this machine, times how often they occur."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from parties.agreement import Agreement
from psi.group import POINT_BYTES, suite, token_width
from psi.inputs import CANARIES
from vfl.encryption.paillier import generate
from vfl.encryption.weigh import PaillierWeigher, slots
from vfl.exchange import Scales

T = TypeVar("T")
SAMPLE = 256
USUAL_EXCHANGES = {"subspace": 15, "lbfgs": 30}  # at C = 1 on standardised columns, see docs/operations.md


@dataclass(frozen=True)
class Cost:
    """Upper estimates for one party: all its rows in the intersection, every peer's set and columns like its own."""

    align_seconds: float
    align_bytes: int
    exchanges: int
    exchange_seconds: float
    exchange_bytes: int

    @property
    def seconds(self) -> float:
        return self.align_seconds + self.exchanges * self.exchange_seconds

    @property
    def bytes(self) -> int:
        return self.align_bytes + self.exchanges * self.exchange_bytes


def predict_cost(agreement: Agreement, rows: int, columns: int, *, label_holder: bool) -> Cost:
    """Seconds and bytes for a party with `rows` and `columns`; the peers are taken to be of the same size."""
    parties, points = len(agreement.parties), rows + CANARIES + agreement.intersection.decoys
    inputs = [number.to_bytes(4, "big") for number in range(SAMPLE)]
    curve = suite(agreement.intersection.suite)
    scalar = curve.scalar()
    hashed, hash_seconds = _timed(lambda: curve.hash_to_points(inputs))
    _, mask_seconds = _timed(lambda: curve.mask(hashed, scalar))
    align_seconds = points * (hash_seconds + parties * mask_seconds) / SAMPLE
    width = token_width(parties * points)
    align_bytes = points * ((parties - 1) * POINT_BYTES + width + 4 * parties)

    train_rows = max(1, round(rows * (1 - agreement.model.test_fraction)))
    scales = Scales.of(agreement, train_rows)
    secret = generate(agreement.encryption.key_bits)
    small = min(SAMPLE, train_rows)
    residual = np.full(small, 1 << scales.residual_bits - 1)
    secret.encrypt(residual[:1])  # the tables are built once
    sealed, seal_seconds = _timed(lambda: secret.encrypt(residual))
    x = np.random.default_rng(0).normal(0, 1 << scales.feature_bits, (small, 2)).astype(np.int64)
    weigher = PaillierWeigher(secret.public, 2, 1 << scales.residual_bits, slot_bits=scales.slot_bits)
    _, weigh_seconds = _timed(lambda: weigher.add(sealed, x))
    reply, finish_seconds = _timed(weigher.finish)
    _, open_seconds = _timed(lambda: secret.open(reply))
    packs = -(-columns // slots(secret.public, scales.slot_bits))
    seal, weigh = train_rows * seal_seconds / small, train_rows * columns * weigh_seconds / (small * 2)
    replies = packs * (finish_seconds + open_seconds * (parties - 1))
    ciphertext = 2 * secret.public.n_bytes
    sent = (
        (parties - 1) * (train_rows * ciphertext + packs * ciphertext // 2)
        if label_holder
        else packs * ciphertext + 8 * train_rows
    )
    model = agreement.model
    exchanges = USUAL_EXCHANGES.get(model.solver, model.epochs)  # of sgd, one stands for an epoch's batches
    exchanges = min(exchanges, model.max_exchanges)
    if not model.allow_reconstruction:
        exchanges = min(exchanges, columns * (parties - 1))
    return Cost(align_seconds, align_bytes, exchanges, seal + weigh + replies, sent)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
