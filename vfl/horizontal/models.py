"""What a client can train: our linear models, scikit-learn's estimators, torch modules, and clients written for Flower.

Each adapter holds a client's own rows. Its weights go in and out as one flat float64 vector, in an order that is the
same at all clients. scikit-learn and torch are imported only when they are used; flwr never is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from vfl.horizontal.local import Correction, Mask, Objective, Plan, Trained, train
from vfl.horizontal.strategies import Strategy
from vfl.losses import Matrix, Vector


@dataclass(frozen=True)
class Score:
    """On a client's rows: mean loss, and the fraction of right classes; NaN where the model has none."""

    rows: int
    loss: float = np.nan
    accuracy: float = np.nan


class Model(Protocol):
    """`corrects`: whether it trains with what a strategy adds to the loss; `rows`: of the client."""

    corrects: ClassVar[bool]
    rows: int

    def get(self) -> Vector:
        """The weights, (size,)."""

    def set(self, weights: Vector) -> None:
        """Take these weights, (size,)."""

    def fit_local(self, plan: Plan, correction: Correction, seed: Sequence[int]) -> Trained:
        """One round of local training from the present weights."""

    def evaluate(self) -> Score:
        """The present weights on the client's rows."""


def require_compatible(strategy: Strategy, model: Model) -> None:
    """Raises LocalError when the strategy changes the loss or the steps of a model that trains by itself."""
    if strategy.corrects and not model.corrects:
        raise LocalError(
            f"{type(model).__name__} trains by itself, so this strategy cannot correct its steps; take fedavg, "
            "fedavgm, fedadagrad, fedadam or fedyogi, or a linear or torch model"
        )


class LinearModel:
    """One of our objectives with the local solver; x (n, d), y (n,) as the loss takes it."""

    corrects: ClassVar[bool] = True

    def __init__(self, objective: Objective, x: Matrix, y: Vector) -> None:
        self.objective, self._x, self._y = objective, x, y
        self.rows, self._weights = len(y), np.zeros(objective.size)

    def get(self) -> Vector:
        return self._weights

    def set(self, weights: Vector) -> None:
        self._weights = weights

    def fit_local(self, plan: Plan, correction: Correction, seed: Sequence[int]) -> Trained:
        trained = train(self.objective, self._x, self._y, self._weights, plan, correction, seed)
        self._weights = trained.weights
        return trained

    def evaluate(self) -> Score:
        if not self.rows:
            return Score(0)
        loss = self.objective.value(self._weights, self._x, self._y)
        scores = self.objective.scores(self._weights, self._x)
        if self.objective.loss not in ("logistic", "multinomial"):
            return Score(self.rows, loss)
        chosen = scores.argmax(axis=1) if self.objective.outputs > 1 else scores[:, 0] > 0
        return Score(self.rows, loss, float(np.mean(chosen == self._y)))


class Estimator:
    """A scikit-learn estimator with `coef_` and `intercept_` (or a multilayer perceptron's lists of them).

    It trains by `partial_fit`, once an epoch, or else by `fit` with `warm_start`, as its own parameters say. classes:
    all that were agreed, for a classifier; a client need not have rows of each, nor any rows at all.
    Raises LocalError for an estimator that would forget the weights it is given.
    """

    corrects: ClassVar[bool] = False

    def __init__(self, estimator: Any, x: Matrix, y: NDArray[Any], classes: Sequence[Any] = ()) -> None:
        from sklearn.base import clone

        self.estimator, self._x, self._y, self._classes = clone(estimator), x, y, np.sort(np.asarray(classes))
        self.rows = len(y)
        self._partial, parameters = hasattr(estimator, "partial_fit"), estimator.get_params()
        self._seeded, name = "random_state" in parameters, type(estimator).__name__
        if self._seeded:
            self.estimator.random_state = self._random = np.random.RandomState()
        if not self._partial and "warm_start" not in parameters:
            raise LocalError(f"{name} has neither partial_fit nor warm_start: each round would begin anew")
        if len(self._classes) and not np.isin(y, self._classes).all():
            raise LocalError(f"{np.count_nonzero(~np.isin(y, self._classes))} labels are none of the agreed classes")
        if not self._partial:
            self.estimator.set_params(warm_start=True)
        self._padded, self._weight = (x, y), None
        missing = self._classes[~np.isin(self._classes, y)]
        if not self._partial and self.rows and len(missing):
            # rows of weight zero: their classes are known and the loss is the same
            self._padded = np.vstack([x, np.zeros((len(missing), x.shape[1]))]), np.concatenate([y, missing])
            self._weight = np.repeat([1.0, 0.0], [len(y), len(missing)])
        self._seed((0,))
        targets = self._classes if len(self._classes) else np.ones(2)
        self._fit(np.zeros((len(targets), x.shape[1])), targets)  # every attribute that scikit-learn makes
        if hasattr(self.estimator, "coef_"):
            self.set(np.zeros(len(self.get())))
        elif not hasattr(self.estimator, "coefs_"):
            raise LocalError(f"{name} has no coef_ and intercept_, so its clients' models have no mean")

    def get(self) -> Vector:
        return _flat(self._arrays())

    def set(self, weights: Vector) -> None:
        arrays = _like(weights, self._arrays())
        if hasattr(self.estimator, "coefs_"):
            count = len(self.estimator.coefs_)
            self.estimator.coefs_, self.estimator.intercepts_ = arrays[:count], arrays[count:]
        else:
            self.estimator.coef_, intercept = arrays
            self.estimator.intercept_ = intercept if intercept.ndim else float(intercept)

    def fit_local(self, plan: Plan, correction: Correction, seed: Sequence[int]) -> Trained:
        if correction.needed:
            raise LocalError("a scikit-learn estimator trains by itself: no strategy can correct its steps")
        self._seed(seed)
        for _ in range((plan.epochs if self._partial else 1) if self.rows else 0):
            self._fit(*self._padded, self._weight)
        return Trained(self.get(), self.rows)

    def evaluate(self) -> Score:
        return score(self.estimator, self._x, self._y, self._classes) if self.rows else Score(0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What travels, by name, each as it is."""
        names = ["coef_", "intercept_"]
        if hasattr(self.estimator, "coefs_"):
            places = range(len(self.estimator.coefs_))
            names = [f"{name}.{place}" for name in ("coefs_", "intercepts_") for place in places]
        return dict(zip(names, self._arrays(), strict=True))

    def _fit(self, x: Matrix, y: NDArray[Any], weight: Vector | None = None) -> None:
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a few iterations a round are the plan
            if self._partial and len(self._classes):
                self.estimator.partial_fit(x, y, classes=self._classes)
            elif self._partial:
                self.estimator.partial_fit(x, y)
            elif weight is not None:
                self.estimator.fit(x, y, sample_weight=weight)
            else:
                self.estimator.fit(x, y)

    def _seed(self, seed: Sequence[int]) -> None:
        if self._seeded:  # the same generator anew: a number costs scikit-learn a new one in every fit
            self._random.seed(np.random.SeedSequence(seed).generate_state(1)[0])

    def _arrays(self) -> list[NDArray[Any]]:
        if hasattr(self.estimator, "coefs_"):
            return [*self.estimator.coefs_, *self.estimator.intercepts_]
        return [np.asarray(self.estimator.coef_), np.asarray(self.estimator.intercept_)]


class TorchModel:
    """A torch.nn.Module, stepped by plain gradient descent; the weights are its parameters that require a gradient.

    A frozen body and buffers, such as the statistics of batch normalisation, stay each client's own.
    loss: from outputs and targets to a scalar, the mean over the rows; x and y: tensors, or arrays of the right dtype.
    """

    corrects: ClassVar[bool] = True

    def __init__(self, module: Any, loss: Any, x: Any, y: Any) -> None:
        self.module, self._loss, self._x, self._y = module, loss, x, y
        self.rows = len(y)

    def get(self) -> Vector:
        return _flat([*self.arrays().values()])

    def set(self, weights: Vector) -> None:
        self.module.load_state_dict({**self.module.state_dict(), **self._slices(weights)})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What travels, by name, each as it is."""
        return {name: value.detach().cpu().numpy() for name, value in self._parameters().items()}

    def frozen(self) -> dict[str, NDArray[Any]]:
        """The parameters that are not trained, by name."""
        named = self.module.named_parameters()
        return {name: value.detach().cpu().numpy() for name, value in named if not value.requires_grad}

    def coordinates(self, prefix: str) -> Mask:
        """(size,): which weights belong to the parameters whose names begin so, such as "head."."""
        parameters = self._parameters()
        if not any(name.startswith(prefix) for name in parameters):
            raise LocalError(f"the module trains no parameter whose name begins with {prefix!r}")
        return np.concatenate([np.full(value.numel(), name.startswith(prefix)) for name, value in parameters.items()])

    def fit_local(self, plan: Plan, correction: Correction, seed: Sequence[int]) -> Trained:
        import torch

        generator = np.random.default_rng(seed)
        torch.manual_seed(int(generator.integers(2**63)))  # of the module's own dropout
        x, y = torch.as_tensor(self._x), torch.as_tensor(self._y)
        linear, pull, anchor = (self._slices(part) for part in (correction.linear, correction.pull, correction.anchor))
        free = self._slices(1.0 if correction.free is None else correction.free.astype(np.float64))
        size, steps, parameters = plan.batch or max(self.rows, 1), 0, self._parameters()
        self.module.train()
        for _ in range(plan.epochs if self.rows else 0):
            order = torch.as_tensor(generator.permutation(self.rows), device=x.device)
            for start in range(0, self.rows, size):
                batch = order[start : start + size]
                self.module.zero_grad()
                self._loss(self.module(x[batch]), y[batch]).backward()
                with torch.no_grad():
                    for name, weight in parameters.items():
                        if weight.grad is not None:
                            gradient = correction.scale * weight.grad + linear[name]
                            gradient += pull[name] * (weight - anchor[name])
                            weight -= plan.rate * free[name] * gradient
                steps += 1
        return Trained(self.get(), self.rows, steps, steps * plan.rate)

    def evaluate(self) -> Score:
        import torch

        if not self.rows:
            return Score(0)
        self.module.eval()
        with torch.no_grad():
            y = torch.as_tensor(self._y)
            outputs = self.module(torch.as_tensor(self._x))
            loss = float(self._loss(outputs, y))
        if y.is_floating_point() or outputs.ndim != y.ndim + 1:
            return Score(self.rows, loss)
        return Score(self.rows, loss, float((outputs.argmax(-1) == y).double().mean()))

    def _parameters(self) -> dict[str, Any]:
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    def _slices(self, values: Vector | float) -> dict[str, Any]:
        """Name -> tensor like the parameter of that name."""
        parameters = self._parameters()
        size = sum(value.numel() for value in parameters.values())
        shapes = [np.empty(tuple(value.shape)) for value in parameters.values()]
        arrays = _like(np.broadcast_to(values, size), shapes)
        return {name: parameters[name].new_tensor(array) for name, array in zip(parameters, arrays, strict=True)}


class FlowerClient:
    """A client written for Flower: `get_parameters(config)`, `fit` and `evaluate(parameters, config)`, unchanged.

    config: what the client's code reads, to which comes `server_round`, from 1 on: the rounds that we take part in. Its
    rows are known once it has trained.
    """

    corrects: ClassVar[bool] = False

    def __init__(self, client: Any, config: Mapping[str, Any] | None = None) -> None:
        self._client, self._config, self.rows = client, dict(config or {}), 0
        self._parameters = [np.asarray(one) for one in client.get_parameters(self._config)]

    def get(self) -> Vector:
        return _flat(self._parameters)

    def set(self, weights: Vector) -> None:
        self._parameters = _like(weights, self._parameters)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What travels, numbered, each as it is."""
        return {str(place): one for place, one in enumerate(self._parameters)}

    def fit_local(self, plan: Plan, correction: Correction, seed: Sequence[int]) -> Trained:
        if correction.needed:
            raise LocalError("a Flower client trains by itself: no strategy can correct its steps")
        self._config["server_round"] = self._config.get("server_round", 0) + 1
        parameters, rows, _ = self._client.fit(self._parameters, dict(self._config))
        arrays = [np.asarray(one) for one in parameters]
        if [one.shape for one in arrays] != [one.shape for one in self._parameters] or rows < 0:
            raise LocalError("fit returned arrays of other shapes than it was given, or fewer rows than none")
        self._parameters, self.rows = arrays, int(rows)
        return Trained(self.get(), self.rows)

    def evaluate(self) -> Score:
        loss, rows, metrics = self._client.evaluate(self._parameters, dict(self._config))
        return Score(int(rows), float(loss), float(metrics.get("accuracy", np.nan)))


def score(estimator: Any, x: Matrix, y: NDArray[Any], classes: NDArray[Any]) -> Score:
    """Of a fitted scikit-learn estimator: log loss and accuracy, or the mean squared error without classes."""
    predicted = estimator.predict(x)
    if not len(classes):
        return Score(len(y), float(np.mean((predicted - y) ** 2)))
    accuracy = float(np.mean(predicted == y))
    if not hasattr(estimator, "predict_proba"):
        return Score(len(y), accuracy=accuracy)
    found = chances(estimator, x, classes)[np.arange(len(y)), np.searchsorted(classes, y)]
    return Score(len(y), float(-np.mean(np.log(np.maximum(found, np.finfo(float).tiny)))), accuracy)


def chances(estimator: Any, x: Matrix, classes: NDArray[Any]) -> Matrix:
    """(n, classes): a fitted classifier's probabilities in the agreed order; 0 of classes that it has never met."""
    found = np.zeros((len(x), len(classes)))
    found[:, np.searchsorted(classes, estimator.classes_)] = estimator.predict_proba(x)
    return found


def _flat(arrays: Sequence[NDArray[Any]]) -> Vector:
    return np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])


def _like(weights: Vector, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The weights cut into arrays of these shapes and dtypes."""
    parts, start = [], 0
    for array in arrays:
        part = weights[start : start + array.size].reshape(array.shape)
        parts.append((np.rint(part) if array.dtype.kind in "iu" else part).astype(array.dtype))
        start += array.size
    return parts
