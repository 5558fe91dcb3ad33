"""The exact method: Newton's iteration on sums over the clients; what it finds is scikit-learn's optimum on all rows.
Before it, the same for the scaler (counts, sums, squares).

    F(w) = sum of loss(coef x + intercept, y) + strength / 2 |coef|^2      w: coef row by row, then the intercept

A client's contribution is one vector, and only the sum over the clients is needed: its rows, its loss, its gradient
(p,) and the upper triangle of its Hessian (p (p + 1) / 2,), p = m (d + 1), row by row. The full Newton step is tried;
while F does not fall enough, the step is halved. The state between rounds is a dictionary of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit

from parties.errors import LocalError
from vfl.horizontal.local import LOSSES, Objective, softmax
from vfl.horizontal.strategies import State
from vfl.losses import Matrix, Vector

LARGEST = 2.0**40  # of any number a client sends: the headroom of the secure sum follows from it
CHUNK = 4096  # rows whose part of a Hessian is made at a time
TOO_LARGE = "sums over the rows exceed 2^40; standardise the columns and scale the targets"
SMALLEST_STEP = 2.0**-30
SMALLEST_GAP = 1e-9  # of the objective, expected after the last step
CURVATURE: dict[str, Callable[[Matrix], Any]] = {  # second derivative of the loss by the score
    "logistic": lambda scores: expit(scores) * expit(-scores),
    "squared": np.ones_like,
    "poisson": lambda scores: np.exp(np.minimum(scores, 700.0)),
}
FAMILIES = {"logistic": "logistic", "linear": "squared", "poisson": "poisson"}


@dataclass(frozen=True)
class Exact:
    """A generalised linear model as all clients agreed on it, with scikit-learn's parameters.

    family: "logistic" (C; two classes or more, in scikit-learn's sorted order), "linear" (alpha of Ridge; 0 is least
    squares) or "poisson" (alpha of PoissonRegressor). tolerance: of the largest error of a weight that is
    expected after the last step (relative to weights above 1000). Raises LocalError for what cannot be.
    """

    family: str
    features: int
    classes: tuple[Any, ...] = ()
    C: float = 1.0
    alpha: float = 0.0
    fit_intercept: bool = True
    rounds: int = 50
    tolerance: float = 4e-6

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise LocalError(f"unknown family {self.family!r}; known: {', '.join(FAMILIES)}")
        if (self.family == "logistic") != (len(self.classes) > 1) or list(self.classes) != sorted(set(self.classes)):
            raise LocalError("logistic regression needs two classes or more, sorted and distinct; the others have none")
        if not self.C > 0 or not 0 <= self.alpha < np.inf or self.rounds < 1 or not self.tolerance > 0:
            raise LocalError("C and the tolerance are positive, alpha is 0 or more, rounds 1 or more")

    @property
    def objective(self) -> Objective:
        """Loss and layout of the weights, without penalty."""
        outputs = len(self.classes) if len(self.classes) > 2 else 1
        loss = "multinomial" if outputs > 1 else FAMILIES[self.family]
        return Objective(loss, self.features, outputs, intercept=self.fit_intercept)

    @property
    def length(self) -> int:
        """Of a contribution."""
        size = self.objective.size
        return 2 + size + size * (size + 1) // 2

    def targets(self, y: NDArray[Any]) -> Vector:
        """y as the losses take it: 0 and 1, class numbers, values, counts. Raises LocalError, counting the misfits."""
        if self.family != "logistic":
            values = np.asarray(y, np.float64)
            wrong = ~np.isfinite(values) | ((values < 0) & (self.family == "poisson"))
            if wrong.any():
                raise LocalError(f"{wrong.sum()} of {len(y)} targets are not finite, or negative where counts are due")
            return values
        classes = np.asarray(self.classes)
        known = np.isin(y, classes)
        if not known.all():
            raise LocalError(f"{(~known).sum()} of {len(y)} labels are none of the {len(classes)} agreed classes")
        return np.searchsorted(classes, y).astype(np.float64)

    def contribution(self, weights: Vector, x: Matrix, y: Vector) -> Vector:
        """What a client with x (n, d) and y (n,) from `targets` sends, (length,): also with no rows or one class only.

        Weights that take a number beyond `LARGEST` are refused by a loss of `LARGEST`: the server halves its step.
        Raises LocalError when that happens at zero coefficients, where the columns themselves are to blame.
        """
        objective = self.objective
        sums = np.zeros(self.length)
        sums[0] = len(y)
        size = objective.size
        upper = np.triu_indices(size)
        for start in range(0, len(y), CHUNK):
            rows, targets = x[start : start + CHUNK], y[start : start + CHUNK]
            scores = objective.scores(weights, rows)
            sums[1] += LOSSES[objective.loss].value(scores, targets).sum()
            sums[2 : 2 + size] += len(rows) * objective.gradient(weights, rows, targets)
            sums[2 + size :] += self._hessian(objective, scores, rows)[upper]
        if np.abs(sums).max() <= LARGEST:  # false for NaN
            return sums
        if not objective.coef(weights).any():
            raise LocalError(TOO_LARGE)
        return np.concatenate([[len(y), LARGEST], np.zeros(self.length - 2)])

    @staticmethod
    def _hessian(objective: Objective, scores: Matrix, x: Matrix) -> Matrix:
        """(p, p), summed over the rows; rows and columns in the order of the weights."""
        if objective.intercept:
            x = np.column_stack([x, np.ones(len(x))])
        outputs, width = objective.outputs, x.shape[1]
        if outputs == 1:
            return np.asarray(x.T @ (x * CURVATURE[objective.loss](scores)), np.float64)
        chances = softmax(scores)
        outer = (chances[:, :, None] * x[:, None, :]).reshape(len(x), -1)
        hessian = -(outer.T @ outer).reshape(outputs, width, outputs, width)
        for k in range(outputs):
            hessian[k, :, k] += x.T @ (x * chances[:, k, None])
        if not objective.intercept:
            return hessian.reshape(outputs * width, -1)
        order = np.arange(outputs * width).reshape(outputs, width)  # the intercepts go last
        order = np.concatenate([order[:, :-1].ravel(), order[:, -1]])
        return np.asarray(hessian.reshape(outputs * width, -1)[np.ix_(order, order)], np.float64)

    def start(self) -> State:
        """The server's state before round 0: `weights` is where the clients evaluate next, until `done`."""
        zeros, none = np.zeros(self.objective.size), np.zeros(1)
        search = np.array([np.inf, 0.0, 1.0])  # of `origin`: objective, squared decrement, length of the step tried
        return {"weights": zeros, "origin": zeros, "direction": zeros, "search": search} | {
            "rounds": none,
            "done": none,
            "converged": none,
        }

    def step(self, state: State, total: Vector) -> State:
        """The server's next state, from the sum of the contributions. Raises LocalError where there is no optimum."""
        rows, loss = total[:2]
        if rows < 1:
            raise LocalError("no client has a row to fit")
        if not state["rounds"][0] and loss >= LARGEST:  # what clients refuse later must exceed every loss seen
            raise LocalError(TOO_LARGE)
        objective, weights, rounds = self.objective, state["weights"], state["rounds"] + 1
        size, coefficients = objective.size, objective.outputs * objective.features
        strength = self.alpha * rows if self.family == "poisson" else self.alpha
        strength = 1 / self.C if self.family == "logistic" else strength
        reached = loss + strength / 2 * (weights[:coefficients] ** 2).sum()
        before, decrement, length = state["search"]
        if not reached <= before - 1e-4 * length * decrement + 1e-11 * abs(before):
            return self._halved(state, rounds)
        gradient, hessian = total[2 : 2 + size].copy(), np.zeros((size, size))
        hessian[np.triu_indices(size)] = total[2 + size :]
        hessian += np.triu(hessian, 1).T
        gradient[:coefficients] += strength * weights[:coefficients]
        hessian[np.arange(coefficients), np.arange(coefficients)] += strength
        first = rounds[0] == 1 and self.fit_intercept
        if first and self.family != "linear":
            self._require_all(rows, gradient[coefficients:])
        if first and self.family == "poisson":
            direction = np.append(np.zeros(coefficients), np.log1p(-gradient[-1] / rows))  # to the mean: never worse
            decrement, length, converged = 0.0, 0.0, False
        else:
            direction = _newton_direction(hessian, gradient, objective, penalised=strength > 0)
            decrement = float(-gradient @ direction)
            now, last = np.abs(direction).max(), np.abs(state["direction"]).max() * (length == 1)
            error = now**3 / last**2 if last > now else now  # errors square: now / last^2 is the factor
            gap = decrement / 2 * (error / now) ** 2 if now else 0.0
            small = error <= self.tolerance * max(1.0, np.abs(weights).max() / 1000)
            converged = self.family == "linear" or bool(small and gap <= SMALLEST_GAP * abs(reached))
            length = 1.0
        given_up = rounds[0] >= self.rounds and not converged
        return {
            "weights": weights if given_up else weights + direction,
            "origin": weights,
            "direction": direction,
            "search": np.array([reached, decrement, length]),
            "rounds": rounds,
            "done": np.full(1, float(converged or given_up)),
            "converged": np.full(1, float(converged)),
        }

    def _halved(self, state: State, rounds: Vector) -> State:
        """The step just tried was too long: half of it next, or the end where it began."""
        before, decrement, length = state["search"]
        length /= 2
        stop = length < SMALLEST_STEP or rounds[0] >= self.rounds
        weights = state["origin"] if stop else state["origin"] + length * state["direction"]
        search = np.array([before, decrement, length])
        return state | {"weights": weights, "search": search, "rounds": rounds, "done": np.full(1, float(stop))}

    def _require_all(self, rows: float, gradient: Vector) -> None:
        """At zero weights the intercepts' gradient counts a class's rows, or the events: without any, no optimum."""
        if self.family == "poisson":
            if rows - gradient[0] < 0.5:
                raise LocalError("no client has a count above zero; there is no finite optimum")
            return
        counts = rows / max(len(self.classes), 2) - gradient
        if counts.min() < 0.5 or (len(self.classes) == 2 and counts[0] > rows - 0.5):
            raise LocalError("an agreed class has no row at any client; take it off the classes")

    def estimator(self, state: State, names: Sequence[str] | None = None) -> Any:
        """A fitted LogisticRegression, LinearRegression (alpha 0), Ridge or PoissonRegressor of scikit-learn."""
        from sklearn import linear_model

        kind: dict[str, Any] = {"fit_intercept": self.fit_intercept}
        y: list[Any] = [1.0]
        if self.family == "logistic":
            model, y = linear_model.LogisticRegression(C=self.C, **kind), list(self.classes)
        elif self.family == "poisson":
            model = linear_model.PoissonRegressor(alpha=self.alpha, **kind)
        else:
            model = linear_model.Ridge(self.alpha, **kind) if self.alpha else linear_model.LinearRegression(**kind)
        model.fit(np.zeros((len(y), self.features)), y)  # every attribute that scikit-learn sets, whatever its version
        objective, weights = self.objective, state["weights"]
        coef, intercept = objective.coef(weights), weights[-objective.outputs :] if self.fit_intercept else np.zeros(1)
        rounds = int(state["rounds"][0])
        if self.family == "logistic":
            model.coef_, model.n_iter_ = coef.copy(), np.array([rounds], np.int32)
            model.intercept_ = np.broadcast_to(intercept, objective.outputs).copy()
        else:
            model.coef_, model.intercept_, model.n_iter_ = coef[0].copy(), float(intercept[0]), rounds
        if names is not None:
            model.feature_names_in_ = np.asarray(names, object)
        return model


def _newton_direction(hessian: Matrix, gradient: Vector, objective: Objective, *, penalised: bool) -> Vector:
    """-H^-1 g, (p,); where H is singular, the least coefficients that solve it, as scikit-learn's least squares."""
    if objective.outputs > 1:  # one constant added to all classes changes no probability: make that direction regular
        for number in np.unique(objective.columns):
            if number < 0 or not penalised:
                group = np.flatnonzero(objective.columns == number)
                hessian[np.ix_(group, group)] += np.trace(hessian) / len(hessian)
    diagonal = np.sqrt(np.diag(hessian))
    if diagonal.min() > 0:
        try:
            factor, lower = cho_factor(hessian / diagonal / diagonal[:, None])
        except np.linalg.LinAlgError:
            pass
        else:
            if np.diag(factor).min() > 1e-6:  # else columns depend on each other
                return np.asarray(cho_solve((factor, lower), -gradient / diagonal) / diagonal, np.float64)
    cut = objective.outputs * objective.features
    cross, corner = hessian[cut:, :cut], hessian[cut:, cut:]
    eliminated = np.linalg.solve(corner, np.column_stack([cross, gradient[cut:]]))  # empty without intercept
    reduced = hessian[:cut, :cut] - cross.T @ eliminated[:, :-1]
    coef = np.linalg.lstsq(reduced, cross.T @ eliminated[:, -1] - gradient[:cut], rcond=1e-12)[0]
    return np.concatenate([coef, -eliminated[:, -1] - eliminated[:, :-1] @ coef])


def column_sums(x: Matrix, mean: Vector | None = None) -> Vector:
    """A client's part of the scaler, (2 d + 1,): rows, sums and squares of x (n, d), around `mean` once it is known.

    Two passes: the first sum, made without a mean, gives the mean; the second is numerically safe around it.
    """
    centred = x if mean is None else x - mean
    squares = np.zeros(x.shape[1]) if mean is None else (centred**2).sum(axis=0)
    return np.concatenate([[len(x)], centred.sum(axis=0), squares])


def column_means(total: Vector) -> Vector:
    """The means over all rows, (d,), from the sum of the first pass. Raises LocalError when there are no rows."""
    if total[0] < 1:
        raise LocalError("no client has a row to standardise")
    return np.asarray(total[1 : 1 + len(total) // 2] / total[0], np.float64)


def scaler(mean: Vector, total: Vector) -> Any:
    """scikit-learn's fitted StandardScaler over all rows, from the first pass's mean and the sum of the second pass."""
    from sklearn.preprocessing import StandardScaler

    rows, width = total[0], len(mean)
    off = total[1 : 1 + width] / rows  # what rounding left of the mean (Chan, Golub and LeVeque 1983)
    exact, variance = mean + off, np.maximum(total[1 + width :] / rows - off**2, 0.0)
    noise = np.finfo(np.float64).eps * rows * (variance + np.finfo(np.float64).eps * rows * exact**2)
    fitted = StandardScaler().fit(np.zeros((1, width)))
    fitted.mean_, fitted.var_ = exact, variance
    fitted.scale_ = np.where(variance <= noise, 1.0, np.sqrt(variance))  # a constant column stays as it is
    fitted.n_samples_seen_ = int(rows)
    return fitted
