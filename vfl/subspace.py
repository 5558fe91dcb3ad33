"""Subspace minimisation, full batch, for a convex loss: two roles in step. The default solver.

Each exchange adds one direction: the feature holders' gradient, made orthogonal to the earlier directions. The label
holder has the embeddings of all of them, so it can minimise over its own weights and all directions at once, exactly
and by itself; the feature holders' weights are the resulting combination (sequential subspace optimisation: Narkiss and
Zibulevsky 2005; on a quadratic it is the method of conjugate gradients).

    F(w) = mean loss + penalty / 2 |w|^2, penalty = 1 / (C n), the intercept not penalised: scikit-learn's / (C n).

D directions, D the number of the feature holders' columns, span everything: then the optimum is reached without one
exchange more. One exchange: gradient (encrypted), scalar products (masked sums), direction, its embedding (masked sum),
weights.
"""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.linear_model import LogisticRegression

from parties.errors import ProtocolViolation, blame
from parties.session import Session
from vfl.exchange import FeatureEnd, LabelEnd, open_gradients, weigh_gradient
from vfl.losses import Logistic, Matrix, Vector
from vfl.messages import LARGEST, Direction, Weights
from vfl.secure_sum import Contribution, sum_embeddings, sum_scalars
from vfl.solver import Limits, Result, expected

INNER_TOLERANCE = 1e-10  # of the label holder's own minimisation, far below any outer one


def label_holder(
    session: Session,
    x: Matrix,
    y: Vector,
    alone: LogisticRegression,
    limits: Limits,
    end: LabelEnd,
) -> Result:
    """Train our weights, (d,) and the intercept last where there is one, while every feature holder trains its own.

    x (n, d): our columns; y (n,) in {0, 1}; alone: the model of our columns, where we begin (never at constant scores:
    those residuals take two values) and whose C and intercept are ours.

    Reveals:
        To us, per exchange: the sum of the feature holders' embeddings along one more direction, the square of their
        gradient's norm and its products with earlier directions. With one feature holder these are its own. As many
        embeddings as these columns have independent directions let us rebuild them up to a linear map; the last
        exchange adds the square of what was new in the gradient. Choosing coefficients freely gives no more than that.
        To a feature holder: its own aggregate gradient, its weights as a combination of its earlier gradients, and the
        norm of all feature holders' gradients together and their products with earlier directions. With two feature
        holders it can subtract its own part.
    Raises:
        ProtocolViolation: a peer sent what its step does not allow.
    """
    n, penalty = len(y), 1 / (alone.C * len(y))
    model = LogisticRegression(
        C=alone.C,
        fit_intercept=alone.fit_intercept,
        solver="newton-cholesky",
        tol=INNER_TOLERANCE,
        max_iter=1000,
        warm_start=True,
    )
    model.coef_, model.intercept_, model.classes_ = alone.coef_, alone.intercept_, alone.classes_
    known, first = x, 0.0  # our columns, then one embedding a direction
    for exchange in range(limits.exchanges):
        if exchange:
            model.coef_ = np.append(model.coef_, [[0.0]], axis=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a minimum that is not exact shows in the gradient's norm, which decides
            model.fit(known, y)
        weights, directions = model.coef_[0], exchange
        if exchange:
            session.broadcast(Weights(exchange - 1, weights[x.shape[1] :]))
        scores = known @ weights + model.intercept_[0]
        residual = Logistic.derivative(scores, y)
        open_gradients(end, residual, exchange)
        products = sum_scalars(session, directions + 1, exchange)
        if products[-1] < 0:
            raise ProtocolViolation("the feature holders' scalar products cannot be: a square is negative")
        ours = x.T @ residual / n + penalty * weights[: x.shape[1]]
        norm = float(np.sqrt(products[-1] + ours @ ours + (float(residual.mean()) ** 2 if alone.fit_intercept else 0)))
        across = float(products[-1] - products[:-1] @ products[:-1])  # the square of what is new in the gradient
        first, converged = first or norm, norm <= limits.tolerance
        done = converged or across <= max(2.0**-70, 1e-14 * products[-1]) or exchange + 1 == limits.exchanges
        session.advance(exchange + 1, exchange + 1 if done else expected(first, norm, exchange, limits))
        if done:
            session.broadcast(Direction(exchange, converged, np.empty(0)))
            objective = Logistic.value(scores, y) + penalty / 2 * float(weights @ weights)
            own = weights[: x.shape[1]]
            own = np.append(own, model.intercept_) if alone.fit_intercept else own
            return Result(own, exchange + 1, converged, objective, norm)
        session.broadcast(Direction(exchange, False, np.append(products[:-1], -1.0) / np.sqrt(across)))
        known = np.column_stack([known, sum_embeddings(session, n, exchange)])
    raise ValueError("limits.exchanges is at least 1")


def feature_holder(
    session: Session,
    penalty: float,
    limits: Limits,
    end: FeatureEnd,
    contribution: Contribution,
) -> Result:
    """Train our weights, (d,), from zero. The mirror of `label_holder`.

    Reveals:
        To the label holder, per exchange: our part of the sum of embeddings along one more direction and of the sums of
        scalar products; with one feature holder, these themselves. After as many exchanges as the feature holders have
        columns it can rebuild these columns up to a linear map. `limits.exchanges` bounds that.
    Raises:
        ProtocolViolation: the label holder sent what its step does not allow, or does not stop when it must.
    """
    channel = contribution.label_holder
    exact = end.scales.exact(end.x)
    directions, weights, first = np.empty((exact.shape[1], 0)), np.zeros(exact.shape[1]), 0.0
    for exchange in range(limits.exchanges):
        if exchange:
            combination = channel.receive(Weights)
            with blame(channel.peer):
                if combination.exchange != exchange - 1 or len(combination.data) != exchange:
                    raise ValueError("weights of another step or size than is due")
                weights = directions @ combination.data
                if not np.abs(weights).max() < LARGEST**0.5:
                    raise ValueError("weights that cannot be")
        gradient = weigh_gradient(end, exchange)[:, 0] / len(exact) + penalty * weights
        contribution.send_scalars([*(gradient @ directions).tolist(), float(gradient @ gradient)], exchange)
        order = channel.receive(Direction)
        with blame(channel.peer):
            if order.exchange != exchange or len(order.data) not in (0, exchange + 1):
                raise ValueError("a direction of another step or size than is due")
        done = not len(order.data)
        norm = float(np.linalg.norm(gradient))
        first = first or norm
        session.advance(exchange + 1, exchange + 1 if done else expected(first, norm, exchange, limits))
        if done:
            return Result(weights, exchange + 1, order.converged)
        if exchange + 1 == limits.exchanges:
            break
        direction = np.column_stack([directions, gradient]) @ order.data
        with blame(channel.peer):
            if not np.linalg.norm(direction) < 1.001:  # ours is part of a vector of length 1
                raise ValueError("a direction that cannot be")
        directions = np.column_stack([directions, direction])
        contribution.send_embedding(exact @ direction, exchange)
    raise ProtocolViolation(f"{channel.peer} wants more than {limits.exchanges} exchanges", peer=channel.peer)
