"""Combining the clients' updates so that a few poisoned ones do not decide.

Every rule maps updates (clients, d) and weights (clients,) to one update (d,). All but the mean and the norm bound
ignore the weights: a client claims its own, and a poisoner would claim a large one. No rule depends on the clients'
order. What they assume, and no rule can do without: the honest clients' updates resemble each other.

Mean and norm bound (every client clips its own update) work on sums; the others need each client's own update.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.spatial.distance import pdist, squareform

from parties.errors import LocalError
from vfl.horizontal.privacy import Array, clip

Rule = Callable[[Array, Array], Array]

NAMES = ("mean", "norm_bound", "median", "trimmed_mean", "krum", "multi_krum")


def rule(name: str, *, poisoned: int = 0, bound: float = 0.0, clients: int | None = None) -> Rule:
    """The rule of an agreement: `poisoned` for trimmed mean, Krum and multi-Krum, `bound` for the norm bound.

    Raises LocalError: no such rule, it lacks its parameter, or it needs more than `clients`.
    """
    rules: dict[str, Rule] = {
        "mean": mean,
        "norm_bound": partial(bounded_mean, bound=bound),
        "median": median,
        "trimmed_mean": partial(trimmed_mean, poisoned=poisoned),
        "krum": partial(multi_krum, poisoned=poisoned, chosen=1),
        "multi_krum": partial(multi_krum, poisoned=poisoned),
    }
    if name not in rules:
        raise LocalError(f"no aggregation is called {name}; choose {', '.join(rules)}")
    if name == "norm_bound" and not 0 < bound < np.inf:
        raise LocalError("the norm bound of updates is a positive number; set it in the agreement")
    if name in ("trimmed_mean", "krum", "multi_krum") and poisoned < 1:
        raise LocalError(f"{name} needs the most clients that may be poisoned, at least 1; set it in the agreement")
    if clients is not None:
        _enough(clients, poisoned, name)
    return rules[name]


def mean(updates: Array, weights: Array) -> Array:
    """The weighted mean: one client can move it anywhere. Raises ValueError when no weight is positive."""
    _checked(updates, weights)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError("weights are finite, none negative and not all zero")
    return np.asarray(weights @ updates / weights.sum())


def bounded_mean(updates: Array, weights: Array, bound: float) -> Array:
    """The weighted mean of updates clipped to an L2 norm of `bound` (Sun et al. 2019)."""
    return mean(clip(updates, bound), weights)


def median(updates: Array, weights: Array) -> Array:
    """The coordinate-wise median (Yin et al. 2018, Definition 1)."""
    _checked(updates, weights)
    return np.asarray(np.median(updates, axis=0))


def trimmed_mean(updates: Array, weights: Array, poisoned: int) -> Array:
    """Per coordinate the mean without the `poisoned` largest and smallest values (Yin et al. 2018, Definition 2).

    Raises LocalError: fewer than 2 poisoned + 1 clients.
    """
    _checked(updates, weights)
    _enough(len(updates), poisoned, "trimmed_mean")
    return np.asarray(np.sort(updates, axis=0)[poisoned : len(updates) - poisoned].mean(axis=0))


def multi_krum(updates: Array, weights: Array, poisoned: int, chosen: int | None = None) -> Array:
    """The mean of the `chosen` updates (default: all but `poisoned`) with the nearest neighbours; 1 is Krum.

    An update's score is the sum of squared distances to its clients - poisoned - 2 nearest others (Blanchard et al.
    2017, Section 4).

    Raises LocalError: fewer than 2 poisoned + 3 clients. Time and memory grow with the square of the clients.
    """
    _checked(updates, weights)
    clients = len(updates)
    _enough(clients, poisoned, "krum")
    distances = np.sort(squareform(pdist(updates, "sqeuclidean")), axis=1)  # the first is 0, to itself
    scores = distances[:, 1 : clients - poisoned - 1].sum(axis=1)
    ranked = sorted(range(clients), key=lambda i: (scores[i], updates[i].tobytes()))  # ties: not by who comes first
    return np.asarray(updates[ranked[: chosen or clients - poisoned]].mean(axis=0))


def _checked(updates: Array, weights: Array) -> None:
    """Raises ValueError: no updates, not as many weights, or what is not finite."""
    if updates.ndim != 2 or not len(updates) or weights.shape != (len(updates),):
        raise ValueError("updates are (clients, d) of at least one client, weights (clients,)")
    if not np.isfinite(updates).all():
        raise ValueError("updates are not finite")


def _enough(clients: int, poisoned: int, name: str) -> None:
    least = {"trimmed_mean": 2 * poisoned + 1, "krum": 2 * poisoned + 3, "multi_krum": 2 * poisoned + 3}.get(name, 1)
    if clients < least:
        raise LocalError(
            f"{name} withstands {poisoned} poisoned clients among at least {least}, and there are {clients}; "
            "invite more clients or agree on fewer poisoned ones"
        )
