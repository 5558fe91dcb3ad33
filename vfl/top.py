"""What the label holder puts on the merged embeddings: a bias, any torch.nn.Module, a loss."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from vfl.bottoms import Randomness, Tensors, initial, put_state, state_of
from vfl.losses import Matrix, Vector
from vfl.optimisers import Rule, load_torch, resume_torch, torch_state
from vfl.resume import State, under, within


def perceptron(sizes: Sequence[int], randomness: Randomness = os.urandom) -> Any:
    """The default top: ReLU and a linear layer for each step of `sizes`; the first is the embedding's width."""
    torch, layers = load_torch(), []
    for inputs, outputs in pairwise(sizes):
        linear = torch.nn.Linear(inputs, outputs, dtype=torch.float64)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(torch.as_tensor(initial(tuple(parameter.shape), inputs, randomness)))
        layers += [torch.nn.ReLU(), linear]
    return torch.nn.Sequential(*layers)


class Top:
    """loss(module(merged + bias)) for merged embeddings (b, width), in float64; the module is a copy of the given one.

    Cross entropy of `outputs` classes, or without classes half the squared error of one output; each row's times its
    weight.
    """

    def __init__(self, module: Any, width: int, outputs: int, classes: bool, rule: Rule) -> None:
        self._torch = torch = load_torch()
        self._module, self._classes = copy.deepcopy(module).double(), classes
        self._bias = torch.zeros(width, dtype=torch.float64, requires_grad=True)
        self._optimiser = rule.over([self._bias, *self._module.parameters()])
        try:
            fits = self.outputs(np.zeros((2, width))).shape == (2, outputs)
        except (RuntimeError, ValueError):  # as torch puts it
            fits = False
        if not fits:
            raise LocalError(f"the top does not make {outputs} outputs of {width} merged embeddings a row")

    def learn(self, merged: Matrix, target: NDArray[Any], weights: Vector) -> tuple[float, Matrix]:
        """One step on a batch's mean loss; returns it and the derivative (b, width) of the *sum*, from before."""
        self._module.train()
        inputs = self._torch.tensor(merged, requires_grad=True)
        loss = self._mean_loss(self._module(inputs + self._bias), target, weights)
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        return loss.item(), inputs.grad.numpy() * len(merged)

    def outputs(self, merged: Matrix) -> Matrix:
        """(b, outputs), as in evaluation."""
        self._module.eval()
        with self._torch.no_grad():
            out: Matrix = self._module(self._torch.as_tensor(merged) + self._bias).numpy()
        return out

    def loss(self, merged: Matrix, target: NDArray[Any], weights: Vector) -> float:
        """The mean loss, as in evaluation."""
        return float(self._mean_loss(self._torch.as_tensor(self.outputs(merged)), target, weights))

    def tensors(self) -> Tensors:
        return {"bias": self._bias.detach().numpy().copy(), **state_of(self._module, "top")}

    def restore(self, tensors: Mapping[str, NDArray[np.float64]]) -> None:
        """Raises LocalError: other names or shapes than ours."""
        put_state(self._module, "top", tensors)
        with self._torch.no_grad():
            self._bias.copy_(self._torch.as_tensor(tensors["bias"]))

    def state(self) -> State:
        """All that training depends on, by name."""
        return self.tensors() | under("top optimiser", torch_state(self._optimiser))

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where a top stood that had this state."""
        self.restore(state)
        resume_torch(self._optimiser, within("top optimiser", state))

    def _mean_loss(self, out: Any, target: NDArray[Any], weights: Vector) -> Any:
        wanted = self._torch.as_tensor(target)
        if self._classes:
            losses = self._torch.nn.functional.cross_entropy(out, wanted, reduction="none")
        else:
            losses = (out[:, 0] - wanted).square() / 2
        return (self._torch.as_tensor(weights) * losses).mean()
