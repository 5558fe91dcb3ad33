"""Subspace minimisation, full batch, for a convex loss: two roles in step. The default solver.

Each exchange adds directions: the feature holders' gradient (D, m), one column an output, made orthogonal to the
earlier directions and to each other. The label holder has the embeddings of all of them, so it can minimise over its
own weights and all directions at once, exactly and by itself; the feature holders' weights are the resulting
combinations (sequential subspace optimisation: Narkiss and Zibulevsky 2005; on a quadratic it is the method of
conjugate gradients, with m > 1 its block form: O'Leary 1980).

    F(w) = mean loss + penalty / 2 |w|^2, the intercept not penalised

D directions, D the number of the feature holders' columns, span everything: then the optimum is reached without one
exchange more. One exchange: gradient (encrypted), scalar products (masked sums), directions, their embeddings (masked
sums), weights.
"""

from __future__ import annotations

import numpy as np

from parties.errors import ProtocolViolation, blame
from parties.session import Session
from vfl.exchange import FeatureEnd, LabelEnd, open_gradients, weigh_gradient
from vfl.inner import Inner, Problem
from vfl.losses import Matrix
from vfl.messages import LARGEST, Direction, Weights
from vfl.meter import Meter
from vfl.resume import ANEW, Start
from vfl.secure_sum import Contribution, sum_embeddings, sum_scalars
from vfl.solver import Limits, Result, check_finite, expected

NEW = 1e-12  # of the gradient's square: less than that is no new direction


def label_holder(
    session: Session,
    x: Matrix,
    problem: Problem,
    inner: Inner,
    limits: Limits,
    end: LabelEnd,
    meter: Meter,
    start: Start = ANEW,
) -> Result:
    """Train our weights while every feature holder trains its own, from the model of our columns x (n, d) alone.

    Where that model gives few different scores (no columns, or binary ones), the first residual is taken at scores that
    are blurred: a residual of few values makes it easier to take labels from a gradient.

    Reveals:
        To us, per exchange: the sum of the feature holders' embeddings along at most m more directions, the products of
        their gradients (m columns) with each other and with earlier directions. With one feature holder these are its
        own. As many embeddings as these columns have independent directions let us rebuild them up to a linear map; the
        last exchange adds the products of what was new in the gradient. Choosing coefficients freely gives no more.
        To a feature holder: its own aggregate gradient, its weights as a combination of its earlier gradients, and the
        products of all feature holders' gradients together. With two feature holders it can subtract its own part.
    Raises:
        ProtocolViolation: a peer sent what its step does not allow.
    """
    n, width = problem.y.shape
    known = np.column_stack([x, start.arrays.get("embeddings", np.empty((n, 0)))])  # our columns, then the embeddings
    directions, first = known.shape[1] - x.shape[1], 0.0
    if start.exchanges:
        inner.resume(start.arrays)
        meter.resume(start.arrays)
    for exchange in range(start.exchanges, limits.exchanges):
        weights, intercept = inner.fit(known)
        own = weights[: x.shape[1]]
        if exchange:
            session.broadcast(Weights(exchange - 1, weights[x.shape[1] :].ravel()))
        scores = known @ weights + intercept
        blurred = False
        if exchange:
            residual = problem.residual(scores)
        else:
            residual, blurred = problem.first_residual(scores, end.terms.residual_range)
        check_finite(residual, exchange)
        open_gradients(end, residual, exchange)
        products = sum_scalars(session, directions * width + width * (width + 1) // 2, exchange)
        across, square = _unpacked(products, directions, width)
        if np.diag(square).min() < 0:
            raise ProtocolViolation("the feature holders' scalar products cannot be: a square is negative")
        ours = x.T @ residual / n + problem.penalty * own
        free = residual.mean(axis=0) if problem.fit_intercept else np.zeros(width)
        norm = float(np.sqrt(np.trace(square) + (ours**2).sum() + (free**2).sum())) / problem.scale
        first, converged = first or norm, norm <= limits.tolerance and not blurred
        new = min(width, limits.embeddings - directions)
        combination = _orthonormal(across, square, new)
        done = converged or not combination.shape[1] or exchange + 1 == limits.exchanges
        session.advance(exchange + 1, exchange + 1 if done else expected(first, norm, exchange, limits))
        if done:
            session.broadcast(Direction(exchange, converged, np.empty(0)))
            return Result(own, intercept, exchange + 1, converged, problem.value(scores, weights), norm)
        session.broadcast(Direction(exchange, False, combination.ravel()))
        embedded = sum_embeddings(session, n, exchange, combination.shape[1])
        meter.embedded(embedded)
        meter.read(0)
        known = np.column_stack([known, embedded])
        directions += combination.shape[1]
        start.keep(exchange + 1, {"embeddings": known[:, x.shape[1] :]} | inner.state | meter.state)
    raise ValueError("limits.exchanges is at least 1")


def feature_holder(
    session: Session,
    penalty: float,
    limits: Limits,
    end: FeatureEnd,
    contribution: Contribution,
    meter: Meter,
    start: Start = ANEW,
) -> Result:
    """Train our weights (d, m) from zero. The mirror of `label_holder`.

    Reveals:
        To the label holder, per exchange: our part of the sum of embeddings along at most m more directions and of the
        sums of scalar products; with one feature holder, these themselves. After as many embeddings as the feature
        holders have columns it can rebuild these columns up to a linear map. `limits.embeddings` bounds that.
    Raises:
        ProtocolViolation: the label holder sent what its step does not allow, or does not stop when it must.
    """
    channel, width = contribution.label_holder, end.terms.width
    exact = end.scales.exact(end.x)
    n, d = exact.shape
    directions, weights, first = start.arrays.get("directions", np.empty((d, 0))), np.zeros((d, width)), 0.0
    if start.exchanges:
        meter.resume(start.arrays)
    for exchange in range(start.exchanges, limits.exchanges):
        count = directions.shape[1]
        if exchange:
            combination = channel.receive(Weights)
            with blame(channel.peer):
                if combination.exchange != exchange - 1 or len(combination.data) != count * width:
                    raise ValueError("weights of another step or size than is due")
                weights = directions @ combination.data.reshape(count, width)
                if not np.abs(weights).max() < LARGEST**0.5:
                    raise ValueError("weights that cannot be")
        gradient = weigh_gradient(end, exchange) / n + penalty * weights
        upper = np.triu_indices(width)
        scalars = [*(directions.T @ gradient).ravel(), *(gradient.T @ gradient)[upper]]
        contribution.send_scalars([float(one) for one in scalars], exchange)
        order = channel.receive(Direction)
        new, odd = divmod(len(order.data), count + width)
        with blame(channel.peer):
            if order.exchange != exchange or odd or new > min(width, limits.embeddings - count):
                raise ValueError("a direction of another step or size than is due")
        norm = float(np.linalg.norm(gradient))
        first = first or norm
        session.advance(exchange + 1, expected(first, norm, exchange, limits) if new else exchange + 1)
        if not new:
            return Result(weights, np.zeros(width), exchange + 1, order.converged)
        if exchange + 1 == limits.exchanges:
            break
        added = np.column_stack([directions, gradient]) @ order.data.reshape(count + width, new)
        with blame(channel.peer):
            if not np.linalg.norm(added, axis=0).max() < 1.001:  # ours is part of vectors of length 1
                raise ValueError("a direction that cannot be")
        directions = np.column_stack([directions, added])
        embedding = exact @ added
        meter.embedded(embedding)
        meter.read(0)
        start.keep(exchange + 1, {"directions": directions} | meter.state)  # before it goes: whoever resumes knows that
        contribution.send_embedding(embedding, exchange)
    raise ProtocolViolation(f"{channel.peer} wants more than {limits.exchanges} exchanges", peer=channel.peer)


def _unpacked(products: Matrix, directions: int, width: int) -> tuple[Matrix, Matrix]:
    """P^T G (directions, m) and G^T G (m, m) from their sums in the order in which they are sent."""
    across = products[: directions * width].reshape(directions, width)
    square = np.zeros((width, width))
    square[np.triu_indices(width)] = products[directions * width :]
    return across, square + np.triu(square, 1).T


def _orthonormal(across: Matrix, square: Matrix, most: int) -> Matrix:
    """Coefficients (directions + m, r) over [P, G] of new directions, r <= `most`: minus what is new in the gradient,
    orthogonal to P, orthonormal, the largest first."""
    values, vectors = np.linalg.eigh(square - across.T @ across)
    kept = np.argsort(-values)[: max(most, 0)]
    kept = kept[values[kept] > max(2.0**-70, NEW * np.trace(square))]
    mixed = vectors[:, kept] / np.sqrt(values[kept])
    return np.vstack([across @ mixed, -mixed])
