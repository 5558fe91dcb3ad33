"""Mini-batch stochastic gradient descent: two roles in step. Batches follow from a seed that all share.

Per batch: partial embeddings (masked sum), encrypted gradient, one step w -= rate * (gradient / b + penalty * w).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from parties.session import Session
from vfl.exchange import FeatureEnd, LabelEnd, open_gradients, weigh_gradient
from vfl.losses import Logistic, Matrix, Vector
from vfl.secure_sum import Contribution, sum_embeddings
from vfl.solver import Result


def batches(rows: int, size: int, epochs: int, seed: int) -> list[NDArray[np.int64]]:
    """Row numbers of every batch of every epoch; a remainder joins the last batch, so none is smaller than `size`."""

    def epoch(generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        order = generator.permutation(rows)
        starts = range(0, max(rows - size, 0) + 1, size)
        for start in starts:
            yield order[start : start + size if start != starts[-1] else rows]

    generator = np.random.default_rng(seed)  # not a secret: all parties share it
    return [batch for _ in range(epochs) for batch in epoch(generator)]


def label_holder(
    session: Session,
    x: Matrix,
    y: Vector,
    start: Vector,
    penalty: Vector,
    rate: float,
    plan: list[NDArray[np.int64]],
    end: LabelEnd,
    complete: bool = True,
) -> Result:
    """Train our weights (d,) from `start`; `penalty` (d,) is zero where a weight is not penalised.

    Reveals:
        To us, per batch: the sum of the feature holders' partial embeddings; with one, its own.
        To a feature holder: its own aggregate gradient.
    """
    weights = start.copy()
    for exchange, rows in enumerate(plan):
        scores = x[rows] @ weights + sum_embeddings(session, len(rows), exchange)[:, 0]
        residual = Logistic.derivative(scores, y[rows])
        open_gradients(end, residual, exchange)
        weights = weights - rate * (x[rows].T @ residual / len(rows) + penalty * weights)
        session.advance(exchange + 1, len(plan))
    return Result(weights, len(plan), complete)


def feature_holder(
    session: Session,
    penalty: float,
    rate: float,
    plan: list[NDArray[np.int64]],
    end: FeatureEnd,
    contribution: Contribution,
    complete: bool = True,
) -> Result:
    """Train our weights (d,) from zero; the mirror of `label_holder`.

    Reveals:
        To the label holder, per batch: our part of the sum of partial embeddings; with one feature holder, ours itself:
        after d batches it can rebuild our columns up to a linear map.
    """
    exact = end.scales.exact(end.x)
    weights = np.zeros(exact.shape[1])
    for exchange, rows in enumerate(plan):
        contribution.send_embedding(exact[rows] @ weights, exchange)
        gradient = weigh_gradient(end, exchange, rows)[:, 0]
        weights = weights - rate * (gradient / len(rows) + penalty * weights)
        session.advance(exchange + 1, len(plan))
    return Result(weights, len(plan), complete)
