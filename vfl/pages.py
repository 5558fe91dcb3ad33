"""What the pages of all reports share: templates in one style, short numbers, and charts to draw as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from psi.html import environment

LEFT, RIGHT, TOP, BOTTOM = 56, 388, 30, 272  # of the plot, in a chart of 400 x 320
Cell = str | int | float | None
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """A kind of chart: the curve it shows, in words; values that both axes always include; what to compare the curve
    with, a diagonal or a level of 1."""

    curve: str
    title: str
    meaning: str
    x: str
    y: str
    reference: str
    include: tuple[float, ...] = (0.0, 1.0)
    level: bool = False
    same_scale: bool = False


@dataclass(frozen=True)
class Axis:
    """Goes from the first tick to the last."""

    ticks: list[float]

    @classmethod
    def over(cls, values: Iterable[float]) -> Axis:
        """From the least value to the greatest, or a little beyond, in steps of 1, 2 or 5 times a power of ten."""
        low, high = min(values := [*values]), max(values)
        rough = (high - low or abs(high) or 1.0) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(times * power for times in (1, 2, 5, 10) if times * power > rough * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls([float(f"{number * step:.12g}") for number in range(first, max(last, first + 1) + 1)])

    def place(self, value: float, start: int, end: int) -> float:
        """Where a value is drawn, when the axis is drawn from `start` to `end`."""
        low, high = self.ticks[0], self.ticks[-1]
        return round(start + (value - low) / (high - low) * (end - start), 1)


@dataclass(frozen=True)
class Chart:
    """One plot of all models shown, in the chart's units: ticks and where they are, lines as lists of points."""

    plot: Plot
    x: list[tuple[float, float]]
    y: list[tuple[float, float]]
    lines: dict[str, list[tuple[float, float]]]

    @classmethod
    def of(cls, plot: Plot, curves: Mapping[str, Curve]) -> Chart:
        xs, ys = ([*plot.include, *(point[axis] for curve in curves.values() for point in curve)] for axis in (0, 1))
        x, y = (Axis.over(xs + ys), Axis.over(xs + ys)) if plot.same_scale else (Axis.over(xs), Axis.over(ys))

        def placed(curve: Curve) -> list[tuple[float, float]]:
            return [(x.place(one, LEFT, RIGHT), y.place(other, BOTTOM, TOP)) for one, other in curve]

        lines = {name: placed(curve) for name, curve in curves.items()}
        if plot.reference:
            ends = (1.0, 1.0) if plot.level else (y.ticks[0], y.ticks[-1])
            lines["reference"] = placed([(x.ticks[0], ends[0]), (x.ticks[-1], ends[1])])
        return cls(
            plot,
            [(tick, x.place(tick, LEFT, RIGHT)) for tick in x.ticks],
            [(tick, y.place(tick, BOTTOM, TOP)) for tick in y.ticks],
            lines,
        )


def _tick(value: float) -> str:
    """Short: 0.2, 20k, -1.5M."""
    size = abs(value)
    return f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k" if size >= 1e4 else f"{value:g}"


def _cell(value: Cell) -> str:
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


PAGES = environment("vfl")
PAGES.filters |= {"tick": _tick, "cell": _cell}
