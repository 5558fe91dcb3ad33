"""One table's rows dealt to simulated clients: every row to exactly one client, the same for the same seed.

    iid                 equal parts at random
    dirichlet:0.3       each class's rows by shares from Dir(0.3): label skew (Hsu, Qi and Brown 2019)
    labels:2            every client has rows of 2 classes only (McMahan et al. 2017, Zhao et al. 2018)
    quantity:0.5        the clients' sizes by shares from Dir(0.5), the classes as they are (Li et al. 2022)

With dirichlet and quantity, a client left without rows takes some from the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError

Rows = NDArray[np.int64]
FORMS = "iid, dirichlet:0.3, labels:2 or quantity:0.5"


@dataclass(frozen=True)
class Partition:
    """A kind of skew and its parameter: alpha of the Dirichlet distribution, or the number of classes a client."""

    kind: str
    parameter: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Partition:
        """From the text forms above. Raises LocalError for any other."""
        kind, colon, number = text.partition(":")
        try:
            parameter = float(number) if colon else 0.0
        except ValueError:
            raise LocalError(f"partition {text!r}: {number!r} is no number; write {FORMS}") from None
        if kind not in _DEAL or bool(colon) != (kind != "iid"):
            raise LocalError(f"unknown partition {text!r}; write {FORMS}")
        if colon and not 0 < parameter < np.inf:
            raise LocalError(f"partition {text!r}: the number must be positive and finite")
        if kind == "labels" and parameter != int(parameter):
            raise LocalError(f"partition {text!r}: a client has a whole number of classes")
        return cls(kind, parameter)

    def deal(self, y: NDArray[Any], clients: int, seed: int) -> list[Rows]:
        """Row numbers of each client, ascending; y (n,) holds the classes (or any targets, for iid and quantity).

        Raises LocalError when there are fewer rows than clients, or y does not go with this partition.
        """
        if not 1 <= clients <= len(y):
            raise LocalError(f"{len(y)} rows cannot be dealt to {clients} clients, at least one row each")
        parts = _DEAL[self.kind](np.asarray(y), clients, self.parameter, np.random.default_rng(seed))
        return [np.sort(part) for part in parts]


def _iid(y: NDArray[Any], clients: int, _: float, generator: np.random.Generator) -> list[Rows]:
    return np.array_split(generator.permutation(len(y)), clients)


def _quantity(y: NDArray[Any], clients: int, alpha: float, generator: np.random.Generator) -> list[Rows]:
    return _filled(_by_shares(generator.permutation(len(y)), clients, alpha, generator))


def _dirichlet(y: NDArray[Any], clients: int, alpha: float, generator: np.random.Generator) -> list[Rows]:
    per_class = [
        _by_shares(generator.permutation(rows), clients, alpha, generator) for rows in _classes(y, "dirichlet")
    ]
    return _filled([np.concatenate(parts) for parts in zip(*per_class, strict=True)])


def _labels(y: NDArray[Any], clients: int, number: float, generator: np.random.Generator) -> list[Rows]:
    classes, each = _classes(y, "labels"), int(number)
    if each > len(classes) or clients * each < len(classes):
        raise LocalError(f"{clients} clients with {each} classes each do not go with {len(classes)} classes in all")
    order, places = generator.permutation(len(classes)), generator.permutation(clients)
    parts: list[list[Rows]] = [[] for _ in range(clients)]
    for turn, label in enumerate(order):  # the classes go round the clients, `each` neighbours to a client
        holders = [places[slot // each] for slot in range(turn, clients * each, len(order))]
        rows = classes[label]
        if len(rows) < len(holders):
            raise LocalError(f"a class has {len(rows)} rows for {len(holders)} clients; take fewer clients")
        for holder, dealt in zip(holders, np.array_split(generator.permutation(rows), len(holders)), strict=True):
            parts[holder].append(dealt)
    return [np.concatenate(part) for part in parts]


_DEAL: dict[str, Callable[[NDArray[Any], int, float, np.random.Generator], list[Rows]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "labels": _labels,
    "quantity": _quantity,
}


def _classes(y: NDArray[Any], kind: str) -> list[Rows]:
    """The rows of each class."""
    if y.dtype.kind == "f" and (y != np.rint(y)).any():
        raise LocalError(f"partition {kind} needs classes and the target is continuous; take iid or quantity")
    numbers = np.unique(y, return_inverse=True)[1]
    return [np.flatnonzero(numbers == label) for label in range(numbers.max() + 1)]


def _by_shares(rows: Rows, clients: int, alpha: float, generator: np.random.Generator) -> list[Rows]:
    shares = generator.dirichlet(np.full(clients, alpha))
    return np.split(rows, np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int))


def _filled(parts: list[Rows]) -> list[Rows]:
    for place, part in enumerate(parts):
        if not len(part):
            largest = max(range(len(parts)), key=lambda other: len(parts[other]))
            parts[place], parts[largest] = parts[largest][:1], parts[largest][1:]
    return parts
