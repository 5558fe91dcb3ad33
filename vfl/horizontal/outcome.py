"""How training ended: the model, what every round saw, and how well the model does for each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfl.horizontal.models import Score

NO_SCORE = Score(0)


@dataclass(frozen=True)
class Round:
    """loss, accuracy: of the weights that the round began with, over all rows or those kept from training; NaN where
    nobody tells. bytes: of the clients' numbers; saved: so many fewer than without compression."""

    number: int
    loss: float
    accuracy: float
    clients: tuple[str, ...]
    missing: Mapping[str, str]
    bytes: int = 0
    seconds: float = 0.0
    attempts: int = 1
    saved: int = 0


@dataclass(frozen=True)
class Client:
    """Its own score of the first weights and of the last; contribution: the others' loss without it, less with it."""

    before: Score = NO_SCORE
    after: Score = NO_SCORE
    contribution: float = np.nan


@dataclass(frozen=True, eq=False)
class Outcome:
    """model: a fitted scikit-learn estimator, or the own model that was given; weights (size,). earlier: how many
    rounds were done before a client was started again, of which `rounds` has nothing."""

    model: Any
    weights: NDArray[np.float64]
    rounds: Sequence[Round]
    clients: Mapping[str, Client]
    warnings: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    earlier: int = 0

    @property
    def overall(self) -> Score:
        """The last model's over all clients' rows."""
        scores = [one.after for one in self.clients.values() if one.after.rows]
        if not scores:
            return NO_SCORE
        rows = [one.rows for one in scores]
        loss, accuracy = np.average([(one.loss, one.accuracy) for one in scores], axis=0, weights=rows)
        return Score(sum(rows), float(loss), float(accuracy))

    @property
    def worst(self) -> str:
        """The client with the largest loss in the end; empty where nobody told."""
        known = {name: one.after.loss for name, one in self.clients.items() if np.isfinite(one.after.loss)}
        return max(known, key=lambda name: known[name], default="")

    @property
    def spread(self) -> float:
        """The largest less the smallest loss of the clients in the end."""
        known = [one.after.loss for one in self.clients.values() if np.isfinite(one.after.loss)]
        return max(known) - min(known) if known else np.nan

    def facts(self) -> dict[str, Any]:
        """Everything but the model, as plain values for JSON; None where a number is not known."""
        plain = {
            "rounds": [asdict(one) for one in self.rounds],
            "clients": {name: asdict(one) for name, one in self.clients.items()},
            "worst": self.worst,
            "spread": self.spread,
            "warnings": list(self.warnings),
            "gone": list(self.gone),
            "earlier": self.earlier,
        }
        known: dict[str, Any] = _known(plain)
        return known


def already_done(rounds: int) -> str:
    return f"all {rounds} rounds were done before this start: nothing was trained, the model is theirs"


def _known(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _known(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
