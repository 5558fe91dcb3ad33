"""Training a network whose first layer is split by columns: two roles in step.

    k -> G   X_k W_k, or what a module makes of X_k       merged by sum (masked) or side by side (in clear)
    G        S = merged + bias; loss(top(S)), its derivative R (b, width), and a step of its own
    G -> k   X_k^T R by the encrypted exchange; open mode: R itself, under noise

Batches follow from a seed that all share. After an epoch the label holder says whether to keep these weights and
whether to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from parties.session import Session
from vfl.bottoms import Deep, Linear, Rows, Tensors
from vfl.exchange import FeatureEnd, LabelEnd, open_gradients, weigh_gradient
from vfl.losses import Matrix, Vector
from vfl.meter import Meter
from vfl.open_messages import OpenGradient, SeparateEmbedding
from vfl.open_split import Guard, check_size, receive_rows, send_rows
from vfl.resume import ANEW, Start, under, within
from vfl.search_messages import EpochEnd
from vfl.secure_sum import Contribution, sum_embeddings
from vfl.solver import Patience, Schedule, check_finite, verdict
from vfl.top import Top


@dataclass(frozen=True)
class Merge:
    """How embeddings become the top's input: `blocks` are each party's columns of it. Sum: all the same ones."""

    blocks: dict[str, slice]
    separate: bool

    @classmethod
    def of(cls, names: Sequence[str], width: int, separate: bool, label_holder_too: bool = True) -> Merge:
        """`names` begin with the label holder's; without columns of its own it has no block beside the others."""
        first = width if label_holder_too else 0
        places = [0, *(first + width * place for place in range(len(names)))]
        cuts = list(pairwise(places)) if separate else [(0, width)] * len(names)
        return cls({name: slice(*cut) for name, cut in zip(names, cuts, strict=True)}, separate)

    @property
    def width(self) -> int:
        return max(int(block.stop) for block in self.blocks.values())


@dataclass
class Course:
    """How training went at the label holder: mean losses, an epoch each; why it was stopped."""

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    stopped: str = ""


def collect(session: Session, merge: Merge, ours: Matrix, step: int) -> Matrix:
    """At the label holder: all parties' embeddings of the same rows, merged with `ours`, (b, merge.width).

    Reveals:
        To us: the sum of the feature holders' embeddings; with one, or side by side, each one's itself.
    """
    merged = np.zeros((len(ours), merge.width))
    merged[:, merge.blocks[session.name]] = ours
    if not merge.separate:
        return merged + sum_embeddings(session, len(ours), step, merge.width)
    for name, channel in session.channels.items():
        block = merge.blocks[name]
        merged[:, block] = receive_rows(channel, SeparateEmbedding, step, len(ours), block.stop - block.start)
    return merged


def contribute(
    session: Session, merge: Merge, contribution: Contribution, values: Matrix, step: int, context: bytes = b""
) -> None:
    """At a feature holder: our embedding (b, m) for `collect`. `context`: see `Contribution.send_embedding`.

    Reveals:
        To the label holder: the sum over the feature holders; with one, or side by side, our embedding itself.
    """
    if merge.separate:
        send_rows(session.channels[session.label_holder], SeparateEmbedding, values, step)
    else:
        check_size(values, step)
        contribution.send_embedding(values, step, context)


def label_holder(
    session: Session,
    bottom: Linear,
    top: Top,
    target: NDArray[np.float64] | NDArray[np.int64],
    weights: Vector,
    schedule: Schedule,
    merge: Merge,
    exchange: LabelEnd | Guard,
    meter: Meter,
    start: Start = ANEW,
) -> Course:
    """Train our bottom and top in place on target (n,), rows weighted by weights (n,), while every feature holder
    trains its bottom.

    Reveals:
        To us: per batch, and per epoch for the rows of validation, what `collect` says.
        To a feature holder: encrypted, its own aggregate gradient X_k^T R; open, R a row, under noise: it leaks labels,
        which the guard bounds. Which epoch was the best, and when training stops.
    Raises:
        LocalError: the loss explodes, or residuals exceed the agreed range; the first names the exchange.
    """
    ours, patience = merge.blocks[session.name], Patience(schedule.patience, schedule.tolerance)
    course, best, total, rows_seen = Course(validation=patience.losses), Tensors(), 0.0, 0
    width = max(block.stop - block.start for block in merge.blocks.values())
    if start.exchanges:
        meter.resume(start.arrays)
        bottom.resume(start.arrays)
        top.resume(start.arrays)
        if isinstance(exchange, Guard):
            exchange.resume(start.arrays)
        best = within("best", start.arrays)
        course.losses += start.arrays["losses"].tolist()
        patience.resume(start.arrays["validation"].tolist())
        total, rows_seen = start.arrays["total"].tolist()
    for done, rows in list(enumerate(schedule.batches, start=1))[start.exchanges :]:
        step = schedule.step(done - 1)
        embedded = bottom.embed(rows)
        merged = collect(session, merge, embedded, step)
        meter.of_epoch(_theirs(merged, ours, embedded), rows, width)
        loss, residual = top.learn(merged, target[rows], weights[rows])
        check_finite(np.append(residual, loss), done - 1)
        _return(session, merge, exchange, residual, rows, step)
        bottom.back(rows, residual[:, ours] / len(rows))
        total, rows_seen = total + loss * len(rows), rows_seen + len(rows)
        session.advance(done, len(schedule.batches))
        if schedule.ends_epoch(done):
            course.losses.append(total / rows_seen)
            total, rows_seen = 0.0, 0
            held, better = schedule.validation, False
            if len(held):
                embedded = bottom.embed(held)
                merged = collect(session, merge, embedded, step + 1)
                meter.of_epoch(_theirs(merged, ours, embedded), held, width)
                loss = top.loss(merged, target[held], weights[held])
                check_finite(np.array([loss]), done - 1)
                if patience.should_stop(loss):
                    course.stopped = f"the validation loss has not improved for {patience.patience} epochs"
                better = patience.improved
            best = bottom.tensors() | top.tensors() if better else best
            if isinstance(exchange, Guard) and (halt := exchange.end_epoch()):
                course.stopped = halt.reason
            meter.read(width, exchange.readings[-1].leak_auc if isinstance(exchange, Guard) else None)
            session.broadcast(EpochEnd(schedule.step(done), better, bool(course.stopped)))
            if course.stopped:
                break
        if start.due(done):
            state = bottom.state() | top.state() | (exchange.state() if isinstance(exchange, Guard) else {})
            seen = {"losses": np.array(course.losses), "validation": np.array(patience.losses)}
            seen |= {"total": np.array([total, rows_seen])} | meter.state
            start.keep(done, state | under("best", best) | seen)
    if best:
        bottom.restore(best)
        top.restore(best)
    return course


def _theirs(merged: Matrix, ours: slice, embedded: Matrix) -> Matrix:
    """Merged embeddings without our part."""
    told = merged.copy()
    told[:, ours] -= embedded
    return told


def _return(
    session: Session, merge: Merge, exchange: LabelEnd | Guard, residual: Matrix, rows: Rows, step: int
) -> None:
    """Give every feature holder what it learns from; residual (b, width): the derivative of a batch's summed loss."""
    if isinstance(exchange, Guard):
        noisy = exchange.protect(residual / len(rows), rows, step)
        for name, channel in session.channels.items():
            send_rows(channel, OpenGradient, noisy[:, merge.blocks[name]], step)
    elif merge.separate:
        for name in exchange.terms.columns:
            open_gradients(_for_one(exchange, name), residual[:, merge.blocks[name]], step)
    else:
        open_gradients(exchange, residual, step)


def _for_one(end: LabelEnd, name: str) -> LabelEnd:
    """The same end for one feature holder alone."""
    all_ = end.terms
    columns, scales, parts = {name: all_.columns[name]}, {name: all_.scales[name]}, {name: all_.parts[name]}
    return replace(end, terms=replace(all_, columns=columns, scales=scales, parts=parts))


def feature_holder(
    session: Session,
    bottom: Linear | Deep,
    schedule: Schedule,
    merge: Merge,
    contribution: Contribution,
    end: FeatureEnd | None,
    meter: Meter,
    start: Start = ANEW,
) -> int:
    """Train our bottom in place, the mirror of `label_holder`; `end` is None in open mode. Returns the epochs.

    Reveals:
        To the label holder, per batch: our embedding, or our part of the sum. A row is embedded in every epoch: once
        these m numbers an epoch are as many as our columns' rank, it can rebuild them up to a linear map.
    Raises:
        ProtocolViolation: a message of another step than is due. LocalError: the weights explode; names the step.
    """
    channel, block = session.channels[session.label_holder], merge.blocks[session.name]
    width = block.stop - block.start
    done, best = start.exchanges, within("best", start.arrays)
    if start.exchanges:
        meter.resume(start.arrays)
        bottom.resume(start.arrays)
    for done, rows in list(enumerate(schedule.batches, start=1))[start.exchanges :]:
        step = schedule.step(done - 1)
        embedded = bottom.embed(rows)
        meter.of_epoch(embedded, rows, width)
        contribute(session, merge, contribution, embedded, step)
        if end is not None and isinstance(bottom, Linear):
            bottom.learn(weigh_gradient(end, step, rows) / len(rows))
        else:
            bottom.back(rows, receive_rows(channel, OpenGradient, step, len(rows), width))
        session.advance(done, len(schedule.batches))
        if schedule.ends_epoch(done):
            held = schedule.validation
            if len(held):
                embedded = bottom.embed(held, learning=False)
                meter.of_epoch(embedded, held, width)
                contribute(session, merge, contribution, embedded, step + 1)
            meter.read(width)
            told = verdict(channel, schedule.step(done))
            best = bottom.tensors() if told.better else best
            if told.stop:
                break
        if start.due(done):
            start.keep(done, bottom.state() | under("best", best) | meter.state)
    if best:
        bottom.restore(best)
    return done // schedule.an_epoch
