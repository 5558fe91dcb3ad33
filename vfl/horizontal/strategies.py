"""The federated strategies: what a client adds to its loss, what it sends, how the server steps. Pure arithmetic.

Everything works under secure aggregation: a client sends one vector, its parts times its weight and then the weight
itself, and the server needs nothing but the sum of these vectors. Per strategy, with D = local weights - received:

    FedSGD, FedAvg, FedAvgM, FedProx,
    FedAdagrad, FedAdam, FedYogi         rows * D, rows
    FedDyn, distillation                 D, 1
    SCAFFOLD                             rows * D, rows * (new - old control variate), rows

A state is a dictionary of arrays, each of the weights' size, so that a checkpoint is a file of arrays and any strategy
runs on some of the coordinates only (`Part`): federated dropout and personalisation are no strategies of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from vfl.horizontal.local import Correction, Mask, Plan, Trained
from vfl.losses import Vector

State = dict[str, Vector]


@dataclass(frozen=True)
class Population:
    """All clients of the job, present in this round or not: how many, and their rows together (a secure sum)."""

    clients: int
    rows: int

    def __post_init__(self) -> None:
        if self.clients < 1 or self.rows < 1:
            raise LocalError("no client has a row to train on")

    def share(self, rows: int) -> float:
        """A client's rows against the mean over the clients: its weight in the loss over all rows."""
        return rows * self.clients / self.rows


class Strategy(Protocol):
    """One pair of pure methods for the client and one for the server; they know neither rows nor the model."""

    vectors: ClassVar[int]  # of the weights' size, that the server sends and that a client sends before its weight

    @property
    def corrects(self) -> bool:
        """Whether it changes the client's loss or steps, so that a solver which is not ours cannot serve."""

    def plan(self, plan: Plan) -> Plan:
        """The local work of a round, made of what was agreed."""

    def server(self, weights: Vector) -> State:
        """The server's state before round 0; "weights" is always in it."""

    def client(self, size: int) -> State:
        """A client's state before its first round."""

    def broadcast(self, server: State) -> Vector:
        """What every client of a round receives, (vectors * size,)."""

    def correction(self, received: Vector, client: State, share: float) -> Correction:
        """What a client with this `share` of the rows adds to its loss."""

    def reply(self, received: Vector, client: State, trained: Trained) -> tuple[Vector, State]:
        """What a client sends, (vectors * size + 1,), and its next state: to be kept once the sum contains it."""

    def step(self, server: State, total: Vector, population: Population) -> State:
        """The server's next state, from the sum of the replies."""


@dataclass(frozen=True)
class Momentum:
    """Server step w += rate v, v = momentum v + D (Hsu, Qi and Brown 2019); momentum 0 is plain averaging."""

    rate: float = 1.0
    momentum: float = 0.0

    def start(self, size: int) -> State:
        return {"velocity": np.zeros(size)} if self.momentum else {}

    def step(self, server: State, mean: Vector) -> State:
        if not self.momentum:
            return {"weights": server["weights"] + self.rate * mean}
        velocity = self.momentum * server["velocity"] + mean
        return {"weights": server["weights"] + self.rate * velocity, "velocity": velocity}


@dataclass(frozen=True)
class Adaptive:
    """Server step of FedAdagrad, FedAdam and FedYogi (Reddi et al., ICLR 2021, algorithm 2); v starts at tau^2."""

    rule: str
    rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def start(self, size: int) -> State:
        return {"first": np.zeros(size), "second": np.full(size, self.tau**2)}

    def step(self, server: State, mean: Vector) -> State:
        first = self.beta1 * server["first"] + (1 - self.beta1) * mean
        second, square = server["second"], mean**2
        if self.rule == "adagrad":
            second = second + square
        elif self.rule == "adam":
            second = self.beta2 * second + (1 - self.beta2) * square
        else:
            second = second - (1 - self.beta2) * square * np.sign(second - square)
        weights = server["weights"] + self.rate * first / (np.sqrt(second) + self.tau)
        return {"weights": weights, "first": first, "second": second}


@dataclass(frozen=True)
class Averaging:
    """The mean D over the rows, and a server step: FedAvg and its kin (McMahan et al., AISTATS 2017).

    `mu`: FedProx's pull to the received weights (Li et al., MLSys 2020). `gradient`: a client's one step has length 1
    over all its rows, so that D is minus its gradient: FedSGD. `alike`: every client with rows counts the same,
    however many it has, as in a consensus of predictions (FedMD: Li and Wang 2019, distillation.py).
    """

    server_step: Momentum | Adaptive = Momentum()
    mu: float = 0.0
    gradient: bool = False
    alike: bool = False
    vectors: ClassVar[int] = 1

    @property
    def corrects(self) -> bool:
        return self.mu > 0 or self.gradient

    def plan(self, plan: Plan) -> Plan:
        return Plan(epochs=1, batch=0, rate=1.0) if self.gradient else plan

    def server(self, weights: Vector) -> State:
        return {"weights": weights, **self.server_step.start(len(weights))}

    def client(self, size: int) -> State:
        return {}

    def broadcast(self, server: State) -> Vector:
        return server["weights"]

    def correction(self, received: Vector, client: State, share: float) -> Correction:
        return Correction(pull=self.mu, anchor=received)

    def reply(self, received: Vector, client: State, trained: Trained) -> tuple[Vector, State]:
        weight = min(trained.rows, 1) if self.alike else trained.rows
        return np.append(weight * (trained.weights - received), weight), client

    def step(self, server: State, total: Vector, population: Population) -> State:
        return self.server_step.step(server, total[:-1] / total[-1])


@dataclass(frozen=True)
class FedDyn:
    """Dynamic regularisation (Acar et al., ICLR 2021, algorithm 1); "h" is a client's gradient at its last weights.

    Clients of unequal size count by their share of the rows: theirs is share F(w), so that the fixed point is the
    optimum over all rows; with equal rows it is the paper's algorithm.
    """

    alpha: float = 0.1
    vectors: ClassVar[int] = 1
    corrects: ClassVar[bool] = True

    def plan(self, plan: Plan) -> Plan:
        return plan

    def server(self, weights: Vector) -> State:
        return {"weights": weights, "h": np.zeros(len(weights))}

    def client(self, size: int) -> State:
        return {"h": np.zeros(size)}

    def broadcast(self, server: State) -> Vector:
        return server["weights"]

    def correction(self, received: Vector, client: State, share: float) -> Correction:
        much = max(share, 1.0)  # the same minimum, and no step longer than agreed for a client with many rows
        return Correction(share / much, -client["h"] / much, self.alpha / much, received)

    def reply(self, received: Vector, client: State, trained: Trained) -> tuple[Vector, State]:
        moved = trained.weights - received
        return np.append(moved, 1.0), {"h": client["h"] - self.alpha * moved}

    def step(self, server: State, total: Vector, population: Population) -> State:
        h = server["h"] - self.alpha / population.clients * total[:-1]
        return {"weights": server["weights"] + total[:-1] / total[-1] - h / self.alpha, "h": h}


@dataclass(frozen=True)
class Scaffold:
    """SCAFFOLD with control variates of option II (Karimireddy et al., ICML 2020, algorithm 1), weighted by rows.

    With equal rows it is the paper's algorithm. The server sends weights, then its control variate.
    """

    rate: float = 1.0
    vectors: ClassVar[int] = 2
    corrects: ClassVar[bool] = True

    def plan(self, plan: Plan) -> Plan:
        return plan

    def server(self, weights: Vector) -> State:
        return {"weights": weights, "control": np.zeros(len(weights))}

    def client(self, size: int) -> State:
        return {"control": np.zeros(size)}

    def broadcast(self, server: State) -> Vector:
        return np.concatenate([server["weights"], server["control"]])

    def correction(self, received: Vector, client: State, share: float) -> Correction:
        return Correction(linear=np.split(received, 2)[1] - client["control"])

    def reply(self, received: Vector, client: State, trained: Trained) -> tuple[Vector, State]:
        weights, control = np.split(received, 2)
        if not trained.steps:  # without rows there is nothing to say
            return np.zeros(2 * len(weights) + 1), client
        moved = trained.weights - weights
        change = -control - moved / trained.length
        message = np.concatenate([trained.rows * moved, trained.rows * change, [trained.rows]])
        return message, {"control": client["control"] + change}

    def step(self, server: State, total: Vector, population: Population) -> State:
        moved, change = np.split(total[:-1], 2)
        weights = server["weights"] + self.rate * moved / total[-1]
        return {"weights": weights, "control": server["control"] + change / population.rows}


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fedsgd": lambda rate=0.1: Averaging(Momentum(rate), gradient=True),
    "fedavg": lambda rate=1.0: Averaging(Momentum(rate)),
    "fedavgm": lambda rate=1.0, momentum=0.9: Averaging(Momentum(rate, momentum)),
    "fedadagrad": lambda **given: Averaging(Adaptive("adagrad", **{"beta1": 0.0, **given})),
    "fedadam": lambda **given: Averaging(Adaptive("adam", **given)),
    "fedyogi": lambda **given: Averaging(Adaptive("yogi", **given)),
    "fedprox": lambda mu=0.01, rate=1.0: Averaging(Momentum(rate), mu),
    "feddyn": FedDyn,
    "scaffold": Scaffold,
    "distillation": lambda: Averaging(alike=True),
}


def strategy(name: str, parameters: Mapping[str, float] | None = None) -> Strategy:
    """The strategy that the agreement names. Raises LocalError for an unknown name, parameter or range."""
    given = dict(parameters or {})
    if name not in STRATEGIES:
        raise LocalError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    for key, value in given.items():
        below_one = key in ("momentum", "beta1", "beta2")
        if not (0 <= value < 1 if below_one else 0 < value < np.inf):
            raise LocalError(f"strategy {name}: {key} must be {'in [0, 1)' if below_one else 'positive and finite'}")
    try:
        return STRATEGIES[name](**given)
    except TypeError:
        raise LocalError(f"strategy {name} does not know all of: {', '.join(given)}") from None


@dataclass(frozen=True, eq=False)
class Part:
    """The coordinates that travel in a round; both masks (size,).

    shared: False where every client keeps its own weight, such as a head (personalisation: Arivazhagan et al. 2019).
    kept: False where this round's model does without (federated dropout: Caldas et al. 2018), zero at the clients.
    """

    shared: Mask
    kept: Mask

    @classmethod
    def whole(cls, size: int) -> Part:
        """Everything travels."""
        return cls(np.ones(size, np.bool_), np.ones(size, np.bool_))

    @cached_property
    def travels(self) -> Mask:
        return self.shared & self.kept


def kept(groups: NDArray[np.int64], keep: float, seed: Sequence[int]) -> Mask:
    """Federated dropout: which coordinates a round keeps, the same at all who know the seed (job and round).

    groups (size,): coordinates of one number stay or go together, such as a model's column or a network's unit; -1
    always stays. Of the other groups ceil(keep * number) stay. Raises LocalError unless 0 < keep <= 1.
    """
    if not 0 < keep <= 1:
        raise LocalError("federated dropout keeps a fraction above 0 and at most 1")
    numbers = np.unique(groups[groups >= 0])
    chosen = np.random.default_rng(seed).permutation(numbers)[: int(np.ceil(keep * len(numbers)))]
    return np.isin(groups, chosen) | (groups < 0)


def client_round(
    strategy: Strategy,
    part: Part,
    received: Vector,
    own: Vector,
    client: State,
    share: float,
    fit: Callable[[Vector, Correction], Trained],
) -> tuple[Vector, State, Trained]:
    """A client's round: what it sends, its next state, what its model became.

    received: the server's vectors, over the coordinates that travel; own (size,): the client's weights, of which those
    not shared count; fit: the local solver, from start weights (size,) and the correction.
    The next state counts once it is known that the server's sum contains this message; otherwise the old one stays.
    """
    travels = part.travels
    start = np.where(part.shared, 0.0, own)
    start[travels] = received[: np.count_nonzero(travels)]
    mine = _only(client, travels)
    trained = fit(start, _spread(strategy.correction(received, mine, share), part))
    message, told = strategy.reply(received, mine, replace(trained, weights=trained.weights[travels]))
    return message, _put(client, told, travels), trained


def broadcast(strategy: Strategy, part: Part, server: State) -> Vector:
    """What every client of the round receives."""
    return strategy.broadcast(_only(server, part.travels))


def server_round(strategy: Strategy, part: Part, server: State, total: Vector, population: Population) -> State:
    """The server's next state from the sum of the clients' messages. Raises LocalError when no client has a row."""
    if not total[-1] > 0:
        raise LocalError("no client of this round has a row to train on")
    return _put(server, strategy.step(_only(server, part.travels), total, population), part.travels)


def _only(state: State, mask: Mask) -> State:
    return {name: values[mask] for name, values in state.items()}


def _put(state: State, told: State, mask: Mask) -> State:
    merged = {name: values.copy() for name, values in state.items()}
    for name, values in told.items():
        merged[name][mask] = values
    return merged


def _spread(correction: Correction, part: Part) -> Correction:
    """A correction of the coordinates that travel, as one of all."""

    def full(values: Vector | float) -> Vector:
        spread = np.zeros(len(part.kept))
        spread[part.travels] = values
        return spread

    if part.travels.all():
        return correction
    free = None if part.kept.all() else part.travels | ~part.shared
    return Correction(correction.scale, full(correction.linear), full(correction.pull), full(correction.anchor), free)
