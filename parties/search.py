"""`[search]` of the agreement: over which hyper-parameters cross-validation chooses, and by which figure.

Values that contradict each other are refused here, before any data is read, with the reason.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MOST_CANDIDATES = 256
METRICS = {
    "logistic regression": ("auc", "log_loss", "brier", "accuracy"),
    "linear regression": ("r2", "rmse", "mae"),
    "poisson regression": ("d2", "deviance"),
    "network classifier": ("auc", "log_loss", "brier", "accuracy"),
    "network regressor": ("r2", "rmse", "mae"),
}
SOLVERS = {"l1_ratio": "proximal", "learning_rate": "sgd", "batch_size": "sgd", "epochs": "sgd"}  # that use them
WHOLE = ("batch_size", "epochs")

Parameter = Literal["C", "alpha", "l1_ratio", "learning_rate", "batch_size", "epochs"]
Values = Annotated[tuple[float, ...], Meta(min_length=1)]


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Cross-validation over `folds` of every combination of the values in `grid`; the best mean of `metric` wins."""

    folds: Annotated[int, Meta(ge=2, le=20)] = 5
    grid: Annotated[dict[Parameter, Values], Meta(min_length=1)]
    metric: Literal["auc", "log_loss", "brier", "accuracy", "r2", "rmse", "mae", "d2", "deviance"]

    def __post_init__(self) -> None:
        for name, values in self.grid.items():
            if len(set(values)) < len(values):
                raise ValueError(f"grid: {name} has a value twice")
            if not all(_allowed(name, value) for value in values):
                raise ValueError(f"grid: {name} has a value that it cannot take")
        if math.prod(map(len, self.grid.values())) > MOST_CANDIDATES:
            raise ValueError(f"grid: more than {MOST_CANDIDATES} combinations")

    def check(self, model: str, solver: str, mode: str, consent: bool) -> None:
        """Raises ValueError when this kind of model, as [model] calls it, has no such figure or parameter, or when it
        is a network that discloses more by many fits: in this `mode`, without `consent` to reconstruction."""
        network = model.startswith("network")
        if network and mode == "open":
            raise ValueError("every fit would send the same rows' gradients under noise of its own; search encrypted")
        if network and not consent:
            raise ValueError("every fit of a network embeds the same rows; agree on allow_reconstruction in [model]")
        known = METRICS.get(model, ())
        if self.metric not in known:
            raise ValueError(f"metric {self.metric!r} is none of a {model}; choose among {', '.join(known) or 'none'}")
        strength, other = ("C", "alpha") if model == "logistic regression" else ("alpha", "C")
        if other in self.grid:
            raise ValueError(f"grid: a {model} has no {other}; it has {strength}")
        for name in sorted(self.grid.keys() & SOLVERS):
            if network and SOLVERS[name] != "sgd":
                raise ValueError(f"grid: a network has no {name}")
            if not network and SOLVERS[name] != solver:
                raise ValueError(f"grid: {name} is of solver = {SOLVERS[name]!r}, not of {solver!r}")

    @property
    def candidates(self) -> tuple[dict[str, float], ...]:
        """All combinations, in the order of scikit-learn's `ParameterGrid`."""
        names = sorted(self.grid)
        values = [[int(one) if name in WHOLE else one for one in self.grid[name]] for name in names]
        return tuple(dict(zip(names, chosen, strict=True)) for chosen in product(*values))


def _allowed(name: str, value: float) -> bool:
    if name == "l1_ratio":
        return 0 <= value <= 1
    if name in WHOLE:
        return value >= 1 and value.is_integer()
    return math.isfinite(value) and (value > 0 or (value == 0 and name == "alpha"))
