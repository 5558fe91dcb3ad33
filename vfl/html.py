"""The report of a trained model as one self-contained page, at the label holder, in the look of the validation report.

No script and no outside request; whatever it says is text and stays text. Charts are SVG in the page's own colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from psi.html import environment
from vfl.evaluation import Curve, Evaluation
from vfl.metrics import FIGURES

LEFT, RIGHT, TOP, BOTTOM = 56, 388, 30, 272  # of the plot, in a chart of 400 x 320
MOST_CLASSES = 15  # whose confusion matrix fits the page
Cell = str | int | float | None


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


RANKING = (
    Plot(
        "roc",
        "ROC curve",
        "How many negatives are taken along to find how many positives. Nearer to the upper left corner is better.",
        "false positive rate",
        "true positive rate",
        "guessing",
    ),
    Plot(
        "precision_recall",
        "Precision and recall",
        "How pure the selected rows are when this share of all positives is found. Higher is better.",
        "recall",
        "precision",
        "",
    ),
    Plot(
        "gain",
        "Cumulative gain",
        "The share of all positives among the rows that score highest, tenth by tenth. Higher is better.",
        "share of rows, highest scores first",
        "share of positives found",
        "random order",
    ),
    Plot(
        "lift",
        "Lift",
        "How many times more positives than on average are among the rows that score highest. Higher is better.",
        "share of rows, highest scores first",
        "times the average",
        "average",
        level=True,
    ),
)
CALIBRATION = Plot(
    "deciles",
    "Calibration",
    "Predicted probability and what happened, tenth by tenth. On the diagonal, 30 percent happen 3 times in 10.",
    "mean predicted probability",
    "share of positives",
    "perfect",
    include=(0.0,),
    same_scale=True,
)
DECILES = Plot(
    "deciles",
    "Predicted and actual",
    "Mean prediction and mean label, tenth by tenth. On the diagonal, predictions are right on average.",
    "mean prediction",
    "mean label",
    "perfect",
    include=(),
    same_scale=True,
)
PLOTS = {"binary": (*RANKING, CALIBRATION), "multiclass": (), "regression": (DECILES,), "poisson": (DECILES,)}


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


def render(
    evaluation: Evaluation,
    *,
    title: str,
    party: str,
    session: str,
    cost: Sequence[Mapping[str, Cell]] = (),
    leakage: Sequence[Mapping[str, Cell]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page, HTML 5. The same arguments give the same page.

    Args:
        title: the agreement's.
        party: the label holder; it writes the report.
        session: its id, in hex.
        cost: what the run took, as rows of a table; the keys of the first head the columns.
        leakage: what attacks on this run found, likewise; PASS, FAIL and NOT RUN stand out.
        notes: what everybody should know about this run.
    """
    models = evaluation.models
    shown = [name for name in models if name in ("joint", "alone")]
    curves = [
        (plot, {name: models[name].curves[plot.curve] for name in shown if plot.curve in models[name].curves})
        for plot in PLOTS[evaluation.kind]
    ]
    figures = FIGURES[evaluation.kind]
    return _ENVIRONMENT.get_template("report.html").render(
        evaluation=evaluation,
        joint=models["joint"],
        alone=models.get("alone"),
        without={name.removeprefix("without "): one for name, one in models.items() if name.startswith("without ")},
        figures=figures,
        headline=next(iter(figures)),
        charts=[Chart.of(plot, lines) for plot, lines in curves if lines],
        missing=[plot for plot, lines in curves if not lines],
        frame={"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        most_classes=MOST_CLASSES,
        title=title,
        party=party,
        session=session,
        cost=cost,
        leakage=leakage,
        notes=notes,
    )


def _figure(value: float) -> str:
    """Four decimals; more of what is tiny, fewer of what is large."""
    size = abs(value)
    return f"{value:,.1f}" if size >= 100 else f"{value:.4f}" if size >= 0.001 or not value else f"{value:.2g}"


def _signed(value: float) -> str:
    return "+" * (value > 0) + _figure(value).replace("-", "−", 1)


def _tick(value: float) -> str:
    """Short: 0.2, 20k, -1.5M."""
    size = abs(value)
    return f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k" if size >= 1e4 else f"{value:g}"


def _cell(value: Cell) -> str:
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def _numeric(rows: Sequence[Mapping[str, Cell]]) -> set[str]:
    """Columns with a number."""
    return {key for row in rows for key, value in row.items() if isinstance(value, int | float)}


_ENVIRONMENT = environment("vfl")
_ENVIRONMENT.filters |= {"figure": _figure, "signed": _signed, "tick": _tick, "cell": _cell, "numeric": _numeric}
