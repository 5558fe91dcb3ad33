"""Gradient steps with exactly the arithmetic of `torch.optim`, so that a party without torch takes the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from vfl.losses import Matrix

BETAS, EPSILON = (0.9, 0.999), 1e-8


def load_torch() -> Any:
    """The module torch. Raises LocalError that names the extra."""
    try:
        import torch
    except ImportError:
        raise LocalError("this part of a network needs torch: pip install 'colonnade[torch]'") from None
    return torch


class Sgd:
    """torch.optim.SGD: momentum without dampening, `decay` times the weights added to the gradient."""

    def __init__(self, rate: float, momentum: float, decay: float) -> None:
        self._rate, self._momentum, self._decay = rate, momentum, decay
        self._velocity: Matrix | None = None

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        """What the next step depends on besides the weights."""
        return {} if self._velocity is None else {"velocity": self._velocity}

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where one stood that had this state."""
        self._velocity = state.get("velocity")

    def step(self, weights: Matrix, gradient: Matrix) -> Matrix:
        """The next weights; shapes alike."""
        gradient = gradient + self._decay * weights
        self._velocity = gradient if self._velocity is None else self._momentum * self._velocity + gradient
        return weights - self._rate * self._velocity


class Adam:
    """torch.optim.Adam (Kingma and Ba, ICLR 2015, algorithm 1), `decay` times the weights added to the gradient."""

    def __init__(self, rate: float, decay: float) -> None:
        self._rate, self._decay = rate, decay
        self._mean: Any = 0.0
        self._square: Any = 0.0
        self._steps = 0

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        """What the next step depends on besides the weights."""
        mean, square = np.asarray(self._mean), np.asarray(self._square)
        return {"mean": mean, "square": square, "steps": np.array(self._steps, "<i8")}

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where one stood that had this state."""
        self._mean, self._square, self._steps = state["mean"], state["square"], int(state["steps"])

    def step(self, weights: Matrix, gradient: Matrix) -> Matrix:
        """The next weights; shapes alike."""
        gradient = gradient + self._decay * weights
        self._steps += 1
        self._mean = self._mean + (1 - BETAS[0]) * (gradient - self._mean)
        self._square = BETAS[1] * self._square + (1 - BETAS[1]) * gradient**2
        spread = np.sqrt(self._square) / np.sqrt(1 - BETAS[1] ** self._steps) + EPSILON
        out: Matrix = weights - self._rate / (1 - BETAS[0] ** self._steps) * self._mean / spread
        return out


@dataclass(frozen=True)
class Rule:
    """How every party steps: `name` "sgd" or "adam"; `decay` is the L2 penalty's derivative over the weights."""

    name: str
    rate: float
    momentum: float
    decay: float

    def fresh(self) -> Sgd | Adam:
        """For weights in numpy."""
        return Adam(self.rate, self.decay) if self.name == "adam" else Sgd(self.rate, self.momentum, self.decay)

    def over(self, parameters: Iterable[Any]) -> Any:
        """For parameters of torch."""
        optim = load_torch().optim
        if self.name == "adam":
            return optim.Adam(parameters, lr=self.rate, betas=BETAS, eps=EPSILON, weight_decay=self.decay)
        return optim.SGD(parameters, lr=self.rate, momentum=self.momentum, weight_decay=self.decay)


def torch_state(optimiser: Any) -> dict[str, NDArray[Any]]:
    """What the next step of `Rule.over` depends on besides the parameters, and torch's own randomness, which a dropout
    layer draws from: arrays alone."""
    torch = load_torch()
    moments = {
        f"{number}.{name}": torch.as_tensor(value).numpy().astype(np.float64)
        for number, own in optimiser.state_dict()["state"].items()
        for name, value in own.items()
        if value is not None
    }
    return moments | {"randomness": torch.get_rng_state().numpy()}


def resume_torch(optimiser: Any, state: Mapping[str, NDArray[Any]]) -> None:
    """Go on where one stood that had this state."""
    torch, own = load_torch(), dict[int, dict[str, Any]]()
    for key in state.keys() - {"randomness"}:
        number, name = key.split(".", 1)
        own.setdefault(int(number), {})[name] = torch.as_tensor(state[key])
    optimiser.load_state_dict(optimiser.state_dict() | {"state": own})
    torch.set_rng_state(torch.as_tensor(state["randomness"]))
