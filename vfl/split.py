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

from parties.errors import blame
from parties.session import Session
from vfl.bottoms import Deep, Linear, Rows, Tensors
from vfl.exchange import FeatureEnd, LabelEnd, open_gradients, weigh_gradient
from vfl.losses import Matrix
from vfl.open_messages import EpochEnd, OpenGradient, SeparateEmbedding
from vfl.open_split import Guard, check_size, receive_rows, send_rows
from vfl.secure_sum import Contribution, sum_embeddings
from vfl.solver import check_finite
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


@dataclass(frozen=True)
class Schedule:
    """Which rows are when, the same at all parties: `epochs` of batches, the rows of validation (maybe none), and after
    how many epochs without a loss smaller by `tolerance` to stop."""

    epochs: Sequence[Sequence[Rows]]
    validation: Rows
    patience: int
    tolerance: float

    @classmethod
    def of(cls, batches: Sequence[Rows], an_epoch: int, validation: Rows, patience: int, tolerance: float) -> Schedule:
        """From the batches of all epochs in a row, `an_epoch` of them each."""
        epochs = [batches[start : start + an_epoch] for start in range(0, len(batches), an_epoch)]
        return cls(epochs, validation, patience, tolerance)

    @property
    def exchanges(self) -> int:
        return sum(map(len, self.epochs))


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


def contribute(session: Session, merge: Merge, contribution: Contribution, values: Matrix, step: int) -> None:
    """At a feature holder: our embedding (b, m) for `collect`.

    Reveals:
        To the label holder: the sum over the feature holders; with one, or side by side, our embedding itself.
    """
    if merge.separate:
        send_rows(session.channels[session.label_holder], SeparateEmbedding, values, step)
    else:
        check_size(values, step)
        contribution.send_embedding(values, step)


def label_holder(
    session: Session,
    bottom: Linear,
    top: Top,
    target: NDArray[np.float64] | NDArray[np.int64],
    schedule: Schedule,
    merge: Merge,
    exchange: LabelEnd | Guard,
) -> Course:
    """Train our bottom and top in place on target (n,), while every feature holder trains its bottom.

    Reveals:
        To us: per batch what `collect` says.
        To a feature holder: encrypted, its own aggregate gradient X_k^T R; open, R a row, under noise: it leaks labels,
        which the guard bounds. Which epoch was the best, and when training stops.
    Raises:
        LocalError: the loss explodes, or residuals exceed the agreed range; the first names the exchange.
    """
    course, kept, ours = Course(), dict[str, Tensors](), merge.blocks[session.name]
    step = done = stale = 0
    for batches in schedule.epochs:
        total = 0.0
        for rows in batches:
            merged = collect(session, merge, bottom.embed(rows), step)
            loss, residual = top.learn(merged, target[rows])
            check_finite(np.append(residual, loss), done)
            _return(session, merge, exchange, residual, rows, step)
            bottom.back(rows, residual[:, ours] / len(rows))
            total += loss * len(rows)
            step, done = step + 1, done + 1
            session.advance(done, schedule.exchanges)
        course.losses.append(total / sum(map(len, batches)))
        better = False
        if len(schedule.validation):
            merged = collect(session, merge, bottom.embed(schedule.validation), step)
            course.validation.append(top.loss(merged, target[schedule.validation]))
            check_finite(np.array(course.validation[-1:]), done)
            better = course.validation[-1] < min(course.validation[:-1], default=np.inf) - schedule.tolerance
            stale = 0 if better else stale + 1
            step += 1
        if better:
            kept = {"bottom": bottom.tensors(), "top": top.tensors()}
        if stale >= schedule.patience:
            course.stopped = f"the validation loss has not improved for {stale} epochs"
        if isinstance(exchange, Guard) and (halt := exchange.end_epoch()):
            course.stopped = halt.reason
        session.broadcast(EpochEnd(step, better, bool(course.stopped)))
        if course.stopped:
            break
    if kept:
        bottom.restore(kept["bottom"])
        top.restore(kept["top"])
    return course


def _return(
    session: Session, merge: Merge, exchange: LabelEnd | Guard, residual: Matrix, rows: Rows, step: int
) -> None:
    """Give every feature holder what it learns from; residual (b, width): the derivative of a batch's summed loss."""
    if isinstance(exchange, Guard):
        noisy = exchange.protect(residual / len(rows), rows)
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
) -> int:
    """Train our bottom in place, the mirror of `label_holder`; `end` is None in open mode. Returns the epochs.

    Reveals:
        To the label holder, per batch: our embedding, or our part of the sum. A row is embedded in every epoch: once
        these m numbers an epoch are as many as our columns' rank, it can rebuild them up to a linear map.
    Raises:
        ProtocolViolation: a message of another step than is due. LocalError: the weights explode; names the step.
    """
    channel, block = session.channels[session.label_holder], merge.blocks[session.name]
    kept: Tensors = {}
    step = done = 0
    epochs = 0
    for epochs, batches in enumerate(schedule.epochs, start=1):  # noqa: B007
        for rows in batches:
            contribute(session, merge, contribution, bottom.embed(rows), step)
            if end is not None and isinstance(bottom, Linear):
                bottom.learn(weigh_gradient(end, step, rows) / len(rows))
            else:
                width = block.stop - block.start
                bottom.back(rows, receive_rows(channel, OpenGradient, step, len(rows), width))
            step, done = step + 1, done + 1
            session.advance(done, schedule.exchanges)
        if len(schedule.validation):
            contribute(session, merge, contribution, bottom.embed(schedule.validation, learning=False), step)
            step += 1
        verdict = channel.receive(EpochEnd)
        with blame(channel.peer):
            if verdict.exchange != step:
                raise ValueError("the end of another epoch than is due")
        if verdict.better:
            kept = bottom.tensors()
        if verdict.stop:
            break
    if kept:
        bottom.restore(kept)
    return epochs
