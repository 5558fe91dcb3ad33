"""What joining brought: the joint model beside the label holder alone, and beside the joint model without one feature
holder, all on the same test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec
import numpy as np
from sklearn.metrics import confusion_matrix

from vfl.metrics import FEWEST, Array, Kind, by_piece, confidence, measure, pieces, ranking

Curve = list[tuple[float, float]]
RANKED = ("roc", "precision_recall", "gain", "lift")
CURVES: dict[Kind, tuple[str, ...]] = {
    "binary": (*RANKED, "deciles"),
    "multiclass": ("confusion", "deciles"),
    "regression": ("deciles",),
    "poisson": ("deciles",),
}


class Assessment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model on the test rows. `absent`: why a figure or a curve is not there. A count below 10 in `confusion`
    (rows: true class; columns: predicted) is None."""

    figures: dict[str, float]
    curves: dict[str, Curve]
    absent: dict[str, str]
    confusion: list[list[int | None]] = []


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All models on the same test rows: aggregates only, for summary.json and report.html."""

    kind: Kind
    rows: int
    threshold: float
    classes: list[str]
    models: dict[str, Assessment]


def compare(
    kind: Kind, y: Array, scores: Mapping[str, Array], *, threshold: float = 0.5, classes: Sequence[str] = ()
) -> Evaluation:
    """Measure every model on the same rows.

    Figures are those of `vfl.metrics.FIGURES[kind]`. Curves, each a list of (x, y): for a binary label `roc`,
    `precision_recall`, `gain` and `lift` (cumulated, against the share of rows), of at most 101 points; for all kinds
    `deciles` (mean prediction, mean label): for classes the reliability curve, of several that of the predicted class
    (mean probability, share that is right).

    No row's label or score is in the result. Whoever walks a model's curves from point to point always crosses at
    least 10 rows, not knowing which; no point tells its threshold, but the scores of a decile their mean. Below 10
    rows a figure or count is absent.

    Args:
        y: labels, shape (n,), as `vfl.metrics.measure` takes them.
        scores: by model, as `measure` takes them: "joint", "alone" (if the label holder has features) and
            "without <name>" for each feature holder left out.
        classes: names of a multiclass label's classes, for the reader; their numbers if not given.
    """
    if kind == "multiclass" and not classes:
        classes = [str(number) for number in range(scores["joint"].shape[1])]
    models = {name: _assess(kind, y, one, threshold) for name, one in scores.items()}
    return Evaluation(kind=kind, rows=len(y), threshold=threshold, classes=list(classes), models=models)


def _assess(kind: Kind, y: Array, scores: Array, threshold: float) -> Assessment:
    figures, absent = measure(kind, y, scores, threshold)
    curves, confusion = dict[str, Curve](), list[list[int | None]]()
    if not figures:  # too few rows, or scores that are no numbers
        why = next(iter(absent.values()))
        return Assessment(figures=figures, curves=curves, absent=absent | dict.fromkeys(CURVES[kind], why))
    if kind == "multiclass":
        counts = confusion_matrix(y, scores.argmax(axis=1), labels=range(scores.shape[1])).tolist()
        confusion = [[count if count >= FEWEST else None for count in row] for row in counts]
        y, scores = confidence(y, scores)
    predicted, observed, _ = by_piece(y, scores)
    curves["deciles"] = _curve(predicted, observed)
    if "auc" in figures and kind == "binary":
        curves |= _ranked(y, scores)
    elif kind == "binary":
        absent |= dict.fromkeys(RANKED, absent["auc"])
    return Assessment(figures=figures, curves=curves, absent=absent, confusion=confusion)


def _ranked(y: Array, scores: Array) -> dict[str, Curve]:
    """What the ranking of the rows shows: at the ends of ten pieces, and at those of ten pieces of each."""
    rows, false, true = ranking(y, scores)
    ranked = -np.sort(-scores)
    tenths = pieces(ranked)
    cuts = np.unique(np.concatenate([start + pieces(ranked[start:end]) for start, end in pairwise(tenths)]))
    at, found = np.searchsorted(rows, cuts), true[np.searchsorted(rows, tenths)]
    return {
        "roc": _curve(false[at], true[at]),
        "precision_recall": _curve(true[at][1:], true[at][1:] * np.count_nonzero(y) / cuts[1:]),
        "gain": _curve(tenths / len(y), found),
        "lift": _curve(tenths[1:] / len(y), found[1:] * len(y) / tenths[1:]),
    }


def _curve(x: Array, y: Array) -> Curve:
    return list(zip(x.tolist(), y.tolist(), strict=True))
