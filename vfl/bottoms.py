"""What turns a party's columns into its partial embedding: a linear map, or a module of torch below or in its place.

Linear   X W; learns from its aggregate gradient X^T R, which the encrypted exchange returns: no torch needed
Deep     any torch.nn.Module; learns from a gradient a row, which only the open mode sends
frozen   a module that does not learn, below Linear
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from vfl.inputs import matrix
from vfl.losses import Matrix
from vfl.optimisers import Rule, load_torch, resume_torch, torch_state
from vfl.resume import State, under, within

Randomness = Callable[[int], bytes]
Tensors = dict[str, NDArray[np.float64]]
Rows = NDArray[np.int64]


def initial(shape: tuple[int, ...], inputs: int, randomness: Randomness = os.urandom) -> Matrix:
    """Weights uniform within 1 / sqrt(inputs), as torch.nn.Linear draws them, from bytes that nobody can predict:
    whoever knew them would read columns from the first embedding."""
    words = np.frombuffer(randomness(8 * int(np.prod(shape))), "<u8") >> np.uint64(11)
    uniform = 2 * (words + 0.5) * 2.0**-53 - 1
    return np.asarray(uniform.reshape(shape) / np.sqrt(max(inputs, 1)), np.float64)


class Linear:
    """X W for our x (n, d) and weights (d, m)."""

    def __init__(self, x: Matrix, weights: Matrix, rule: Rule) -> None:
        self._x, self.weights, self._optimiser = x, weights, rule.fresh()

    def embed(self, rows: Rows, learning: bool = True) -> Matrix:
        """(b, m). `learning` makes a difference to modules only."""
        out: Matrix = self._x[rows] @ self.weights
        return out

    def learn(self, gradient: Matrix) -> None:
        """One step, from the gradient (d, m) of the mean loss."""
        self.weights = self._optimiser.step(self.weights, gradient)

    def back(self, rows: Rows, residual: Matrix) -> None:
        """One step, from the derivative (b, m) of the mean loss at the embedding of these rows."""
        self.learn(self._x[rows].T @ residual)

    def tensors(self) -> Tensors:
        return {"weights": self.weights}

    def restore(self, tensors: Mapping[str, NDArray[np.float64]]) -> None:
        self.weights = tensors["weights"]

    def state(self) -> State:
        """All that training depends on, by name."""
        return self.tensors() | under("bottom optimiser", self._optimiser.state)

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where a bottom stood that had this state."""
        self.restore(state)
        self._optimiser.resume(within("bottom optimiser", state))


class Deep:
    """A copy of a torch.nn.Module, (b, ...) to (b, m), for our inputs x (n, ...), in float64.

    Raises LocalError: no module, or one for other inputs.
    """

    def __init__(self, x: NDArray[np.float64], module: Any, width: int, rule: Rule) -> None:
        if not hasattr(module, "state_dict"):
            raise LocalError("in open mode the bottom is a torch.nn.Module, or None for a linear one")
        self.module = copy.deepcopy(module).double()
        self._x, self._optimiser = load_torch().tensor(x), rule.over(self.module.parameters())
        self._embedded: Any = None
        try:
            fits = self.embed(np.arange(min(len(x), 2)), learning=False).shape[1:] == (width,)
        except (RuntimeError, ValueError):  # as torch puts it
            fits = False
        if not fits:
            raise LocalError(
                f"the bottom does not make {width} numbers, the first of hidden_layer_sizes, of a row of our shape"
            )

    def embed(self, rows: Rows, learning: bool = True) -> Matrix:
        """(b, m); with `learning`, `back` is to follow."""
        self.module.train(learning)
        with load_torch().set_grad_enabled(learning):
            self._embedded = self.module(self._x[rows])
        out: Matrix = self._embedded.detach().numpy()
        return out

    def back(self, rows: Rows, residual: Matrix) -> None:
        """One step, from the derivative (b, m) of the mean loss at the embedding of these rows."""
        self._optimiser.zero_grad()
        self._embedded.backward(load_torch().as_tensor(np.array(residual)))
        self._optimiser.step()

    def tensors(self) -> Tensors:
        return state_of(self.module, "bottom")

    def restore(self, tensors: Mapping[str, NDArray[np.float64]]) -> None:
        put_state(self.module, "bottom", tensors)

    def state(self) -> State:
        """All that training depends on, by name."""
        return self.tensors() | under("bottom optimiser", torch_state(self._optimiser))

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where a bottom stood that had this state."""
        self.restore(state)
        resume_torch(self._optimiser, within("bottom optimiser", state))


def columns_of(X: Any, may_be_empty: bool, rows: int | None = None) -> tuple[Matrix, list[str]]:
    """What a linear bottom takes, and its columns' names; None stands for `rows` rows of none. Raises LocalError."""
    if X is None and (rows is None or not may_be_empty):
        raise LocalError("give our columns of the rows; a label holder without any, an array (n, 0)")
    return matrix(np.empty((rows or 0, 0)) if X is None else X, may_be_empty=may_be_empty)


def inputs_of(X: Any) -> tuple[NDArray[np.float64], list[str]]:
    """What a deep bottom takes, (n, ...), and its shape as a name. Raises LocalError."""
    x = np.asarray(X, np.float64)
    bad = np.count_nonzero(~np.isfinite(x))
    if bad or not x.ndim:
        raise LocalError(f"inputs of shape {x.shape} with {bad} missing or infinite values; fill or drop them")
    return x, ["x".join(map(str, x.shape[1:]))]


def frozen(bottom: Any, X: Any) -> Matrix:
    """What a module that does not learn makes of X: (n, d) float64, flattened behind the rows.

    `bottom` is a torch.nn.Module (used as in evaluation, on a copy) or any function of an array.
    """
    torch = sys.modules.get("torch")  # whoever has a module has loaded it
    if torch is not None and isinstance(bottom, torch.nn.Module):
        with torch.no_grad():
            out = copy.deepcopy(bottom).eval().double()(torch.tensor(np.asarray(X, np.float64))).numpy()
    else:
        out = np.asarray(bottom(X), np.float64)
    return np.asarray(out.reshape(len(out), -1))


def state_of(module: Any, prefix: str) -> Tensors:
    """A module's parameters and buffers by name, as float64 copies."""
    return under(prefix, {name: value.numpy().astype(np.float64) for name, value in module.state_dict().items()})


def put_state(module: Any, prefix: str, tensors: Mapping[str, NDArray[np.float64]]) -> None:
    """The reverse. Raises LocalError: the module has other names or shapes."""
    torch, own = load_torch(), module.state_dict()
    given = within(prefix, tensors)
    if {name: tuple(value.shape) for name, value in own.items()} != {name: v.shape for name, v in given.items()}:
        raise LocalError(f"the {prefix} module has other parameters than the one that was trained; construct that one")
    module.load_state_dict({name: torch.as_tensor(given[name]).to(value.dtype) for name, value in own.items()})
