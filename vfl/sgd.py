"""Mini-batch stochastic gradient descent: two roles in step. Batches follow from a seed that all share.

Per batch: partial embeddings (masked sum), encrypted gradient, one step w -= rate * (gradient / b + penalty * w).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from parties.session import Session
from vfl.exchange import FeatureEnd, LabelEnd, open_gradients, weigh_gradient
from vfl.inner import Inner, Problem
from vfl.losses import Matrix
from vfl.meter import Meter
from vfl.resume import ANEW, Start
from vfl.secure_sum import Contribution, sum_embeddings
from vfl.solver import Result, check_finite

Plan = Sequence[NDArray[np.int64]]


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
    problem: Problem,
    inner: Inner,
    rate: float,
    plan: Plan,
    end: LabelEnd,
    meter: Meter,
    start: Start = ANEW,
) -> Result:
    """Train our weights (d, m) from the model of our columns x (n, d) alone.

    Reveals:
        To us, per batch: the sum of the feature holders' partial embeddings; with one, its own.
        To a feature holder: its own aggregate gradient.
    Raises:
        LocalError: the loss explodes; names the exchange.
    """
    weights, intercept = inner.fit(x)
    if start.exchanges:
        weights, intercept = start.arrays["weights"], start.arrays["intercept"]
    for exchange, rows in list(enumerate(plan))[start.exchanges :]:
        batch = problem.rows(rows)
        embedded = sum_embeddings(session, len(rows), exchange, weights.shape[1])
        meter.embedded(embedded, rows)
        scores = x[rows] @ weights + intercept + embedded
        residual = batch.residual(scores) if exchange else batch.first_residual(scores, end.terms.residual_range)[0]
        check_finite(residual, exchange)
        open_gradients(end, residual, exchange)
        weights = weights - rate * (x[rows].T @ residual / len(rows) + problem.penalty * weights)
        if problem.fit_intercept:
            intercept = intercept - rate * residual.mean(axis=0)
        start.keep(exchange + 1, {"weights": weights, "intercept": intercept})
        session.advance(exchange + 1, len(plan))
    meter.read(0)
    return Result(weights, intercept, len(plan), True)


def feature_holder(
    session: Session,
    penalty: float,
    rate: float,
    plan: Plan,
    end: FeatureEnd,
    contribution: Contribution,
    meter: Meter,
    start: Start = ANEW,
) -> Result:
    """Train our weights (d, m) from zero; the mirror of `label_holder`.

    Reveals:
        To the label holder, per batch: our part of the sum of partial embeddings; with one feature holder, ours itself:
        after d batches it can rebuild our columns up to a linear map.
    """
    exact, width = end.scales.exact(end.x), end.terms.width
    weights = start.arrays.get("weights", np.zeros((exact.shape[1], width)))
    for exchange, rows in list(enumerate(plan))[start.exchanges :]:
        embedding = exact[rows] @ weights
        contribution.send_embedding(embedding, exchange)
        meter.embedded(embedding, rows)
        gradient = weigh_gradient(end, exchange, rows)
        weights = weights - rate * (gradient / len(rows) + penalty * weights)
        start.keep(exchange + 1, {"weights": weights})
        session.advance(exchange + 1, len(plan))
    meter.read(0)
    return Result(weights, np.zeros(width), len(plan), True)
