"""Mini-batch stochastic gradient descent: two roles in step. Batches follow from a seed that all share.

Per batch: partial embeddings (masked sum), encrypted gradient, one step w -= rate * (gradient / b + penalty * w).
With rows of validation: after every epoch their partial embeddings, and whether their loss still falls.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from parties.session import Session
from vfl.exchange import FeatureEnd, LabelEnd, open_gradients, weigh_gradient
from vfl.inner import Inner, Problem
from vfl.losses import Matrix
from vfl.meter import Meter
from vfl.resume import ANEW, Start
from vfl.search_messages import EpochEnd
from vfl.secure_sum import Contribution, sum_embeddings
from vfl.solver import Patience, Result, Schedule, check_finite, verdict


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
    rate: float,
    schedule: Schedule,
    end: LabelEnd,
    meter: Meter,
    start: Start = ANEW,
) -> Result:
    """Train our weights (d, m) from the model of our columns x (n, d) alone. With rows of validation: the weights after
    the epoch at which their loss was least.

    Reveals:
        To us, per batch, and per epoch for the rows of validation: the sum of the feature holders' partial embeddings;
        with one, its own.
        To a feature holder: its own aggregate gradient. With rows of validation, which epoch was the best, and when
        training stops.
    Raises:
        LocalError: the loss explodes; names the exchange.
    """
    held, patience = schedule.validation, Patience(schedule.patience, schedule.tolerance)
    rest = np.setdiff1d(np.arange(len(x)), held)
    weights, intercept = best = Inner(problem.rows(rest)).fit(x[rest])
    if start.exchanges:
        weights, intercept = start.arrays["weights"], start.arrays["intercept"]
        best = start.arrays["best.weights"], start.arrays["best.intercept"]
        patience.resume(start.arrays["losses"].tolist())
        meter.resume(start.arrays)
    done, stopped = start.exchanges, False
    for rows in schedule.batches[start.exchanges :]:
        step, batch = schedule.step(done), problem.rows(rows)
        embedded = sum_embeddings(session, len(rows), step, weights.shape[1])
        meter.embedded(embedded, rows)
        scores = x[rows] @ weights + intercept + embedded
        residual = batch.residual(scores) if done else batch.first_residual(scores, end.terms.residual_range)[0]
        check_finite(residual, done)
        open_gradients(end, residual, step)
        weights = weights - rate * (x[rows].T @ residual / len(rows) + problem.penalty * weights)
        if problem.fit_intercept:
            intercept = intercept - rate * residual.mean(axis=0)
        done += 1
        session.advance(done, len(schedule.batches))
        if len(held) and schedule.ends_epoch(done):
            embedded = sum_embeddings(session, len(held), step + 1, weights.shape[1])
            meter.embedded(embedded, held)
            loss = problem.rows(held).mean(x[held] @ weights + intercept + embedded)
            check_finite(np.array([loss]), done - 1)
            stopped = patience.should_stop(loss)
            best = (weights, intercept) if patience.improved else best
            session.broadcast(EpochEnd(schedule.step(done), patience.improved, stopped))
            if stopped:
                break
        state = {"weights": weights, "intercept": intercept, "best.weights": best[0], "best.intercept": best[1]}
        start.keep(done, state | {"losses": np.array(patience.losses)} | meter.state)
    meter.read(0)
    if len(held):
        weights, intercept = best
    return Result(weights, intercept, done, stopped, validation=tuple(patience.losses))


def feature_holder(
    session: Session,
    penalty: float,
    rate: float,
    schedule: Schedule,
    end: FeatureEnd,
    contribution: Contribution,
    meter: Meter,
    start: Start = ANEW,
) -> Result:
    """Train our weights (d, m) from zero; the mirror of `label_holder`.

    Reveals:
        To the label holder, per batch, and per epoch for the rows of validation: our part of the sum of partial
        embeddings; with one feature holder, ours itself: after d of a row it can rebuild our columns up to a linear
        map.
    Raises:
        ProtocolViolation: a message of another step than is due.
    """
    exact, width, held = end.scales.exact(end.x), end.terms.width, schedule.validation
    weights = best = np.zeros((exact.shape[1], width))
    if start.exchanges:
        weights, best = start.arrays["weights"], start.arrays["best.weights"]
        meter.resume(start.arrays)
    done, stopped = start.exchanges, False
    for rows in schedule.batches[start.exchanges :]:
        step, embedding = schedule.step(done), exact[rows] @ weights
        contribution.send_embedding(embedding, step)
        meter.embedded(embedding, rows)
        weights = weights - rate * (weigh_gradient(end, step, rows) / len(rows) + penalty * weights)
        done += 1
        session.advance(done, len(schedule.batches))
        if len(held) and schedule.ends_epoch(done):
            embedding = exact[held] @ weights
            contribution.send_embedding(embedding, step + 1)
            meter.embedded(embedding, held)
            told = verdict(contribution.label_holder, schedule.step(done))
            best, stopped = weights if told.better else best, told.stop
            if stopped:
                break
        start.keep(done, {"weights": weights, "best.weights": best} | meter.state)
    meter.read(0)
    weights = best if len(held) else weights
    return Result(weights, np.zeros(width), done, stopped)
