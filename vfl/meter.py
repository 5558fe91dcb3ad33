"""The live leak meter: fed by a role while it trains, it counts and measures what training discloses. Nothing is sent.

Label holder and feature holder each have one. What the agreement's [leakage] says is held by `Meter.read`; its readings
are plain rows for report and summary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parties.leakage import Leakage
from vfl.leakage.meter import Reading, Stop, correlation_of, label_correlation, moments, stop
from vfl.losses import Matrix, Vector

Cell = str | int | float | None


@dataclass
class Meter:
    """One training at one party.

    `ranks`: independent directions by feature holder, as their plans say them, where the label holder sees each one's
    embeddings (`separate`, or there is only one); else of all together, as it sees only sums. `y` (rows,), at the label
    holder: numbers with which embeddings are correlated.
    """

    ranks: Mapping[str, int]
    rows: int
    agreed: Leakage
    allow_reconstruction: bool
    y: Vector | None = field(default=None, repr=False)
    separate: bool = False
    readings: list[Reading] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.separate:
            self.ranks = {" + ".join(sorted(self.ranks)): sum(self.ranks.values())}
        self._times = np.zeros(self.rows, np.int32)
        self._disclosed, self._correlation = 0, None if self.y is None else 0.0
        self._epoch = np.empty((0, 0))

    def embedded(self, values: Matrix, rows: NDArray[np.int64] | None = None) -> None:
        """The label holder has embeddings (b, m), or sums of them, of these rows (None: of all)."""
        place = slice(None) if rows is None else rows
        self._count(place, values.shape[1])
        if self.y is not None:
            self._correlation = max(self._correlation or 0.0, label_correlation(values, self.y[place]))

    def of_epoch(self, values: Matrix, rows: NDArray[np.int64], width: int) -> None:
        """The same of some of an epoch's rows, to be read with all of them; side by side, `width` of the embeddings are
        each feature holder's."""
        self._count(rows, width)
        if self.y is not None:
            sums = moments(values, self.y[rows])
            self._epoch = self._epoch + sums if self._epoch.size else sums

    def _count(self, rows: NDArray[np.int64] | slice, width: int) -> None:
        self._times[rows] += width
        self._disclosed = max(self._disclosed, int(self._times[rows].max(initial=0)))

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        """What a training that goes on later must still count."""
        read = [
            [max(one.disclosed.values(), default=0), _number(one.leak_auc), _number(one.correlation)]
            for one in self.readings
        ]
        return {
            "meter.times": self._times.astype("<i8"),
            "meter.correlation": np.array([self._correlation or 0.0]),
            "meter.epoch": self._epoch,
            "meter.readings": np.array(read, np.float64).reshape(-1, 3),
        }

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where the meter stood that had this state."""
        self._times, self._epoch = state["meter.times"].astype(np.int32), state["meter.epoch"]
        self._disclosed = int(self._times.max(initial=0))
        if self.y is not None:
            self._correlation = float(state["meter.correlation"][0])
        for disclosed, leak, correlation in state["meter.readings"].tolist():
            of = dict.fromkeys(self.ranks, int(disclosed))
            self.readings.append(Reading(of, dict(self.ranks), _or_none(leak), _or_none(correlation)))

    def read(self, width: int, leak_auc: float | None = None) -> Stop | None:
        """After an exchange, or an epoch of batches: a reading, and whether the agreement forbids to disclose another
        embedding of `width` columns. `leak_auc`: of gradients a row, where they were sent."""
        disclosed = dict.fromkeys(self.ranks, self._disclosed)
        if self._epoch.size:
            self._correlation, self._epoch = correlation_of(self._epoch), np.empty((0, 0))
        reading = Reading(disclosed, dict(self.ranks), leak_auc, self._correlation)
        self.readings.append(reading)
        self._correlation = None if self.y is None else 0.0
        consent, limit = self.allow_reconstruction, self.agreed.leak_auc
        halt = stop(reading, width=width, allow_reconstruction=consent, leak_limit=limit)
        return halt or self._beyond_share(width)

    def _beyond_share(self, width: int) -> Stop | None:
        for name, rank in self.ranks.items():
            if not self.allow_reconstruction and self._disclosed + width > self.agreed.most_embeddings(rank):
                return Stop(
                    f"{self._disclosed} embeddings over the same rows and {width} more would be above the agreed share "
                    f"{self.agreed.most_exchanges_share:g} of the {rank} independent columns of {name}"
                )
        return None


def reading_rows(readings: Sequence[Reading]) -> list[dict[str, Cell]]:
    """A row a reading and feature holder (or all together), for report and summary."""
    return [
        {
            "reading": number,
            "columns of": name,
            "embeddings": reading.disclosed.get(name),
            "independent columns": reading.ranks.get(name),
            "correlation with the label": _short(reading.correlation),
            "leak AUC": _short(reading.leak_auc),
        }
        for number, reading in enumerate(readings, start=1)
        for name in reading.ranks or {"": 0}
    ]


def _short(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(value, 4)


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
