"""Distributed L-BFGS, full batch, for a convex loss: two roles in step.

Every party keeps its own slices of the history; the direction needs only scalar products of whole vectors, which are
sums over the parties (vector-free L-BFGS: Chen, Wang and Zhou, NIPS 2014). The label holder minimises exactly along
the direction by itself: it has the scores, and after an accepted step the next scores are known.

    F(w) = mean loss + penalty / 2 |w|^2, penalty = 1 / (C n), the intercept not penalised: scikit-learn's / (C n).

One exchange: gradient (encrypted), Gram matrix (masked sums), direction, its embedding (masked sum), step.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from scipy.optimize import brentq

from parties.errors import ProtocolViolation, blame
from parties.session import Session
from vfl.encryption.paillier import PublicKey, SecretKey
from vfl.encryption.scheme import Fixed
from vfl.exchange import Scales, open_gradients, weigh_gradient
from vfl.losses import Logistic, Vector
from vfl.messages import LARGEST, Direction, Step
from vfl.secure_sum import Contribution, sum_embeddings, sum_scalars
from vfl.solver import Limits, Matrix, Result, expected

DEPTH = 10


class _History:
    """Our slices of the last steps s and gradient differences y, and of gradient and weights: columns of the basis."""

    def __init__(self, weights: Vector) -> None:
        self.weights = weights
        self.gradient: Vector | None = None
        self._pairs: deque[tuple[Vector, Vector]] = deque(maxlen=DEPTH)
        self._step: Vector | None = None
        self.first = 0.0

    def see(self, gradient: Vector) -> None:
        self.norm = float(np.linalg.norm(gradient))
        self.first = self.first or self.norm
        if self._step is not None and self.gradient is not None:
            self._pairs.append((self._step, gradient - self.gradient))
        self.gradient = gradient

    @property
    def basis(self) -> Matrix:
        """(d, 2h + 1): s_1 .. s_h, y_1 .. y_h, g."""
        steps, differences = [s for s, _ in self._pairs], [y for _, y in self._pairs]
        return np.column_stack([*steps, *differences, self.gradient])  # type: ignore[list-item]

    def go(self, direction: Vector, length: float) -> None:
        self._step = length * direction
        self.weights = self.weights + self._step


def _scalars(basis: Matrix, penalised: Vector) -> tuple[Matrix, Vector, float]:
    """Gram matrix of the basis, its products with the (penalised) weights, and the square of those."""
    return basis.T @ basis, basis.T @ penalised, float(penalised @ penalised)


def _packed(gram: Matrix, cross: Vector, square: float) -> list[float]:
    return [*gram[np.triu_indices(len(gram))].tolist(), *cross.tolist(), square]


def _unpacked(values: Vector, size: int) -> tuple[Matrix, Vector, float]:
    gram = np.zeros((size, size))
    rows, columns = np.triu_indices(size)
    count = len(rows)
    gram[rows, columns] = gram[columns, rows] = values[:count]
    return gram, values[count : count + size], float(values[-1])


def two_loops(gram: Matrix) -> Vector:
    """Coefficients of the L-BFGS direction over the basis s_1 .. s_h, y_1 .. y_h, g, from its Gram matrix alone.

    Nocedal and Wright, algorithm 7.4, with every scalar product read from the matrix.
    """
    h = (len(gram) - 1) // 2
    direction = np.zeros(len(gram))
    direction[-1] = -1.0
    curvature = [gram[i, h + i] for i in range(h)] + [gram[h + i, h + i] for i in range(h)]
    if any(value <= 2.0**-70 for value in curvature):  # rounding at the very end: steepest descent is always safe
        return direction
    alpha = np.zeros(h)
    for i in reversed(range(h)):
        alpha[i] = direction @ gram[:, i] / gram[i, h + i]
        direction[h + i] -= alpha[i]
    if h:
        direction *= gram[h - 1, 2 * h - 1] / gram[2 * h - 1, 2 * h - 1]
    for i in range(h):
        beta = direction @ gram[:, h + i] / gram[i, h + i]
        direction[i] += alpha[i] - beta
    return direction


def _exact_step(scores: Vector, along: Vector, y: Vector, linear: float, quadratic: float) -> float:
    """The minimum of mean loss(scores + a * along) + linear * a + quadratic / 2 * a^2 over a >= 0 (convex)."""

    def slope(a: float) -> float:
        return float(np.mean(Logistic.derivative(scores + a * along, y) * along) + linear + quadratic * a)

    high = 1.0
    if slope(0.0) >= 0:
        return 0.0
    while slope(high) < 0:
        high *= 2
        if high > 1e9:
            return high
    return float(brentq(slope, 0.0, high, xtol=1e-12, rtol=1e-12))


def label_holder(
    session: Session,
    x: Matrix,
    y: Vector,
    start: Vector,
    free: Vector,
    penalty: float,
    limits: Limits,
    columns: dict[str, int],
    scales: Scales,
    secret: SecretKey,
) -> Result:
    """Train our weights, (d,), while every feature holder trains its own.

    x (n, d): our columns, one of ones for the intercept among them; y (n,) in {0, 1}; start (d,): where we begin
    (never at constant scores: those residuals take two values); free (d,): 1 for a weight without penalty, else 0.

    Reveals:
        To us, per exchange: the sum of the feature holders' embeddings along the search direction, and the sums of
        scalar products of their slices. With one feature holder these are its own.
        To a feature holder: its own aggregate gradient, the coefficients of the direction, the step length.
    Raises:
        ProtocolViolation: a peer sent what its step does not allow.
    """
    history = _History(start.copy())
    scores = x @ start
    length, stuck = 1.0, False
    for exchange in range(limits.exchanges):
        residual = Logistic.derivative(scores, y)
        open_gradients(session, secret, residual, columns, scales, exchange)
        history.see(x.T @ residual / len(y) + penalty * (1 - free) * history.weights)
        penalised = (1 - free) * history.weights
        basis = history.basis
        ours = _packed(*_scalars(basis, penalised))
        theirs = sum_scalars(session, len(ours), exchange)
        if (np.diag(_unpacked(theirs, basis.shape[1])[0]) < -(2.0**-70)).any():
            raise ProtocolViolation("the feature holders' scalar products cannot be: a square is negative")
        gram, cross, square = _unpacked(np.array(ours) + theirs, basis.shape[1])
        norm = float(np.sqrt(max(gram[-1, -1], 0.0)))
        converged = norm <= limits.tolerance
        last = converged or stuck or exchange + 1 == limits.exchanges
        session.advance(exchange + 1, exchange + 1 if last else expected(history.first, history.norm, exchange, limits))
        if last:
            session.broadcast(Direction(exchange, converged, np.empty(0)))
            objective = Logistic.value(scores, y) + penalty / 2 * square
            return Result(history.weights, exchange + 1, converged, objective, norm)
        steepest = np.where(np.arange(len(gram)) == len(gram) - 1, -1.0, 0.0)
        coefficients = steepest if length == 0 else two_loops(gram)
        if not (coefficients @ gram[:, -1] < 0 and np.abs(coefficients).max() < LARGEST):
            coefficients = steepest
        session.broadcast(Direction(exchange, False, coefficients))
        direction = basis @ coefficients
        along = x @ direction + sum_embeddings(session, len(y), exchange)
        not_penalised = float(direction @ (free * direction))
        linear = penalty * float(coefficients @ cross)
        quadratic = penalty * (float(coefficients @ gram @ coefficients) - not_penalised)
        length = _exact_step(scores, along, y, linear, quadratic)
        stuck = length == 0 and bool((coefficients == steepest).all())  # at the floor of the fixed point
        session.broadcast(Step(exchange, length))
        history.go(direction, length)
        scores = scores + length * along
    raise ValueError("limits.exchanges is at least 1")


def feature_holder(
    session: Session,
    x: Fixed,
    penalty: float,
    limits: Limits,
    scales: Scales,
    public: PublicKey,
    contribution: Contribution,
) -> Result:
    """Train our weights, (d,), from zero; x (n, d) in fixed point. The mirror of `label_holder`.

    Reveals:
        To the label holder, per exchange: our part of the sum of embeddings X p along the search direction and of the
        sums of scalar products; with one feature holder, these themselves: after d exchanges it can rebuild X up to a
        linear map. `limits.exchanges` bounds that.
    Raises:
        ProtocolViolation: the label holder sent what its step does not allow, or does not stop when it must.
    """
    channel = contribution.label_holder
    exact = scales.exact(x)
    history = _History(np.zeros(x.shape[1]))
    for exchange in range(limits.exchanges):
        gradient = weigh_gradient(session, public, x, scales, exchange)
        history.see(gradient / len(x) + penalty * history.weights)
        basis = history.basis
        contribution.send_scalars(_packed(*_scalars(basis, history.weights)), exchange)
        order = channel.receive(Direction)
        session.advance(
            exchange + 1, expected(history.first, history.norm, exchange, limits) if len(order.data) else exchange + 1
        )
        with blame(channel.peer):
            if order.exchange != exchange or len(order.data) not in (0, basis.shape[1]):
                raise ValueError("a direction of another step or size than is due")
        if not len(order.data):
            return Result(history.weights, exchange + 1, order.converged)
        if exchange + 1 == limits.exchanges:
            break
        direction = basis @ order.data
        with blame(channel.peer):
            if not np.abs(direction).max() < LARGEST:
                raise ValueError("a direction that cannot be")
        contribution.send_embedding(exact @ direction, exchange)
        step = channel.receive(Step)
        with blame(channel.peer):
            if step.exchange != exchange or not np.abs(step.length * direction).max() < LARGEST:
                raise ValueError("a step that is not due or cannot be")
        history.go(direction, step.length)
    raise ProtocolViolation(f"{channel.peer} wants more than {limits.exchanges} exchanges", peer=channel.peer)
