"""Accelerated proximal gradient, full batch, for a convex loss with an L1 penalty: two roles in step.

FISTA (Beck and Teboulle 2009) with backtracking, and the adaptive restart of O'Donoghue and Candes (2015).

    F(w) = mean loss + l2 / 2 |w|^2 + l1 |w|_1, the intercept not penalised

One exchange: gradient at the extrapolated point z (encrypted); then, until the quadratic model holds, a step length,
the new point w+ = prox(z - g / L) at every party, scalar products and embedding of w+ (masked sums). The scores at z
follow from those at the last two points: nothing is sent for them.
"""

from __future__ import annotations

import numpy as np

from parties.errors import ProtocolViolation, Refused, blame
from parties.session import Session
from vfl.exchange import FeatureEnd, LabelEnd, open_gradients, weigh_gradient
from vfl.inner import Inner, Problem
from vfl.losses import Matrix
from vfl.messages import LARGEST, Step
from vfl.meter import Meter
from vfl.secure_sum import Contribution, sum_embeddings, sum_scalars
from vfl.solver import Limits, Result, check_finite, expected

SCALARS = 6
TRIALS = 60  # doublings of L in a whole training: from 1 beyond anything that fixed point can hold


class _Slice:
    """A party's own weights (d, m): the point w, and z beyond it."""

    def __init__(self, start: Matrix, l1: float) -> None:
        self.w = self.z = self.trial = start
        self.l1 = l1

    def step(self, gradient: Matrix, length: float) -> list[float]:
        """Try w+ from z; the scalar products of our slice: <g, w+ - z>, |w+ - z|^2, <z - w+, w+ - w>, |w+|^2, |z|^2 and
        |w+|_1."""
        moved = self.z - gradient / length
        self.trial = np.sign(moved) * np.maximum(np.abs(moved) - self.l1 / length, 0.0)
        change = self.trial - self.z
        pairs = ((gradient, change), (change, change), (-change, self.trial - self.w))
        inner = [float((a * b).sum()) for a, b in pairs]
        return [*inner, *(float((a**2).sum()) for a in (self.trial, self.z)), float(np.abs(self.trial).sum())]

    def accept(self, momentum: float) -> None:
        self.w, self.z = self.trial, self.trial + momentum * (self.trial - self.w)


def _allowed(limits: Limits, width: int) -> int:
    """How many points may be embedded: each is `width` embeddings. Raises Refused where none may."""
    if limits.embeddings < width:
        raise Refused("without allow_reconstruction the agreement leaves no embedding for solver = 'proximal'")
    return limits.embeddings // width


def label_holder(
    session: Session, x: Matrix, problem: Problem, l1: float, inner: Inner, limits: Limits, end: LabelEnd, meter: Meter
) -> Result:
    """Train our weights while every feature holder trains its own, from the model of our columns x (n, d) alone.

    Reveals:
        To us, per exchange: the sum of the feature holders' embeddings at one point or more, and the sums of six scalar
        products of their slices. With one feature holder these are its own.
        To a feature holder: its own aggregate gradient, step lengths and momenta.
    Raises:
        ProtocolViolation: a peer sent what its step does not allow. LocalError: the loss exploded.
    """
    n, width = problem.y.shape
    start, free = inner.fit(x)
    slice_, intercept, beyond = _Slice(start, l1), free, free
    scores = ahead = x @ start + free  # at w and at z
    length, inertia, sent, first, allowed = 1.0, 1.0, 0, 0.0, _allowed(limits, width)
    objective = problem.value(scores, start) + l1 * float(np.abs(start).sum())
    norm = np.nan
    for exchange in range(limits.exchanges):
        residual = problem.residual(ahead) if exchange else problem.first_residual(ahead, end.terms.residual_range)[0]
        check_finite(residual, exchange)
        open_gradients(end, residual, exchange)
        gradient, slope = x.T @ residual / n + problem.penalty * slice_.z, residual.mean(axis=0) * problem.fit_intercept
        while True:
            if sent == allowed:
                session.broadcast(Step(exchange, 0.0, 0.0, False, True, False))
                return Result(slice_.w, intercept, exchange + 1, False, objective, norm)
            session.broadcast(Step(exchange, length, 0.0, False, False, False))
            moved = beyond - slope / length
            ours = np.array(slice_.step(gradient, length))
            theirs = sum_scalars(session, SCALARS, sent)
            embedded = sum_embeddings(session, n, sent, width)
            meter.embedded(embedded)
            sent += 1
            if min(theirs[1], theirs[3], theirs[4], theirs[5]) < 0:
                raise ProtocolViolation("the feature holders' scalar products cannot be: a square is negative")
            total = ours + theirs
            along = total[0] + float(slope @ (moved - beyond))
            change = total[1] + float(((moved - beyond) ** 2).sum())
            tried = x @ slice_.trial + moved + embedded
            model = problem.mean(ahead) + problem.penalty / 2 * total[4] + along + length / 2 * change
            if problem.mean(tried) + problem.penalty / 2 * total[3] <= model * (1 + 1e-12) or sent > TRIALS + exchange:
                break
            length *= 2
        norm = length * float(np.sqrt(change)) / problem.scale
        first, converged = first or norm, norm <= limits.tolerance
        turned = total[2] + float((beyond - moved) @ (moved - intercept)) > 0
        faster = 1.0 if turned else (1 + np.sqrt(1 + 4 * inertia**2)) / 2
        momentum = 0.0 if turned else float((inertia - 1) / faster)
        last = converged or exchange + 1 == limits.exchanges
        session.broadcast(Step(exchange, 0.0, momentum, True, last, converged))
        meter.read(0)
        session.advance(exchange + 1, exchange + 1 if last else expected(first, norm, exchange, limits))
        inertia, intercept, beyond = faster, moved, moved + momentum * (moved - intercept)
        scores, ahead = tried, tried + momentum * (tried - scores)
        slice_.accept(momentum)
        objective = problem.mean(scores) + problem.penalty / 2 * total[3] + l1 * total[5]
        if last:
            return Result(slice_.w, intercept, exchange + 1, converged, objective, norm)
    raise ValueError("limits.exchanges is at least 1")


def feature_holder(
    session: Session, l2: float, l1: float, limits: Limits, end: FeatureEnd, contribution: Contribution, meter: Meter
) -> Result:
    """Train our weights (d, m) from zero. The mirror of `label_holder`.

    Reveals:
        To the label holder, per exchange: our part of the sum of embeddings at one point or more, and of the sums of
        scalar products; with one feature holder, these themselves. After as many embeddings as the feature holders have
        columns it can rebuild these columns up to a linear map. `limits.embeddings` bounds that.
    Raises:
        ProtocolViolation: the label holder sent what its step does not allow, or does not stop when it must.
    """
    channel, exact = contribution.label_holder, end.scales.exact(end.x)
    slice_, sent, first = _Slice(np.zeros((exact.shape[1], end.terms.width)), l1), 0, 0.0
    allowed = _allowed(limits, end.terms.width)
    for exchange in range(limits.exchanges):
        gradient = weigh_gradient(end, exchange) / len(exact) + l2 * slice_.z
        first = first or float(np.linalg.norm(gradient))
        while True:
            order = channel.receive(Step)
            with blame(channel.peer):
                if order.exchange != exchange or (order.length and sent >= min(allowed, TRIALS + exchange + 2)):
                    raise ValueError("a step that is not due")
            if not order.length:
                break
            scalars = slice_.step(gradient, order.length)
            with blame(channel.peer):
                if not np.abs(slice_.trial).max() < LARGEST**0.5:
                    raise ValueError("a step that cannot be")
            contribution.send_scalars(scalars, sent)
            embedding = exact @ slice_.trial
            contribution.send_embedding(embedding, sent)
            meter.embedded(embedding)
            sent += 1
        if order.taken:
            slice_.accept(order.momentum)
        now = float(np.linalg.norm(gradient))
        meter.read(0)
        session.advance(exchange + 1, exchange + 1 if order.last else expected(first, now, exchange, limits))
        if order.last:
            return Result(slice_.w, np.zeros(end.terms.width), exchange + 1, order.converged)
    raise ProtocolViolation(f"{channel.peer} wants more than {limits.exchanges} exchanges", peer=channel.peer)
