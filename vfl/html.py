"""The report of a trained model as one self-contained page, at the label holder, in the look of the validation report.

No script and no outside request; whatever it says is text and stays text. Charts are SVG in the page's own colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vfl.evaluation import Evaluation
from vfl.metrics import FIGURES
from vfl.pages import BOTTOM, LEFT, PAGES, RIGHT, TOP, Cell, Chart, Plot

MOST_CLASSES = 15  # whose confusion matrix fits the page


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
CONFIDENCE = Plot(
    "deciles",
    "Calibration",
    "Probability of the predicted class and how often it was right, tenth by tenth. On the diagonal, of rows that are "
    "sure to 90 percent 9 in 10 are right.",
    "mean probability of the predicted class",
    "share that is right",
    "perfect",
    include=(),
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
PLOTS = {
    "binary": (*RANKING, CALIBRATION),
    "multiclass": (CONFIDENCE,),
    "regression": (DECILES,),
    "poisson": (DECILES,),
}


def render(
    evaluation: Evaluation,
    *,
    title: str,
    party: str,
    session: str,
    information: Sequence[Mapping[str, Any]] = (),
    cost: Sequence[Mapping[str, Cell]] = (),
    leakage: Sequence[Mapping[str, Cell]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page, HTML 5. The same arguments give the same page.

    Args:
        title: the agreement's.
        party: the label holder; it writes the report.
        session: its id, in hex.
        information: what columns tell of the label, as `vfl.information.measure` has it.
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
    return PAGES.get_template("report.html").render(
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
        information=_information(information, evaluation.classes),
        cost=cost,
        leakage=leakage,
        notes=notes,
    )


def _information(values: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[dict[str, Cell]]:
    """Rows of a table, the largest first; of several classes, so many as fit the page, also each against the rest."""
    shown = classes if len(classes) <= MOST_CLASSES else []
    return [
        {"party": one["party"], "column": one["column"], "information value": one["iv"]}
        | {f"class {name}": value for name, value in zip(shown, one["by_class"], strict=False)}
        for one in sorted(values, key=lambda one: one["iv"], reverse=True)
    ]


def _figure(value: float) -> str:
    """Four decimals; more of what is tiny, fewer of what is large."""
    size = abs(value)
    return f"{value:,.1f}" if size >= 100 else f"{value:.4f}" if size >= 0.001 or not value else f"{value:.2g}"


def _signed(value: float) -> str:
    return "+" * (value > 0) + _figure(value).replace("-", "−", 1)


def _numeric(rows: Sequence[Mapping[str, Cell]]) -> set[str]:
    """Columns with a number."""
    return {key for row in rows for key, value in row.items() if isinstance(value, int | float)}


PAGES.filters |= {"figure": _figure, "signed": _signed, "numeric": _numeric}
