"""How good a model is, at the label holder: each figure, what it means, and when there is none.

Scikit-learn and scipy compute; ours are only lift, the expected calibration error, and the cut of ranked rows into
pieces, on which every curve of a report rests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp
from sklearn import metrics

Kind = Literal["binary", "multiclass", "regression", "poisson"]
Array = NDArray[np.float64]
FEWEST = 10  # rows behind any number that a report shows
PIECES = 10


def measure(kind: Kind, y: Array, scores: Array, threshold: float = 0.5) -> tuple[dict[str, float], dict[str, str]]:
    """All figures of `FIGURES[kind]` that have a value, and for the others the reason.

    Args:
        y: shape (n,). Binary: 0 or 1; multiclass: the class's number, from 0; Poisson: counts.
        scores: what the model predicts, shape (n,). Binary: the probability of 1; multiclass: one probability for each
            class, shape (n, m); Poisson: the mean.
        threshold: binary only; a row with a higher probability counts as predicted 1.
    """
    values, absent = dict[str, float](), dict[str, str]()
    for name, figure in FIGURES[kind].items():
        if why := _unfit(y, scores) or figure.lacks(y, scores, threshold):
            absent[name] = why
        else:
            values[name] = float(figure.compute(y, scores, threshold))
    return values, absent


def pieces(ranked: Array) -> NDArray[np.int64]:
    """Cut rows, in falling order of their scores `ranked`, into at most ten pieces of nearly equal size.

    No piece has fewer than 10 rows (of 10 or more), so that no point of a curve stands for a few; rows of equal score
    stay together, so that no piece depends on the order of the rows.

    Returns:
        Where pieces begin and end, increasing from 0 to n.
    """
    ends = np.append(np.flatnonzero(np.diff(ranked)) + 1, len(ranked))
    cuts = [0]
    while (rest := len(ranked) - cuts[-1]) >= FEWEST:
        share = -(-rest // min(PIECES + 1 - len(cuts), rest // FEWEST))
        cuts.append(int(ends[np.searchsorted(ends, cuts[-1] + share)]))
    cuts[-1] = len(ranked)  # fewer than 10 are left: they join the last piece
    return np.array(cuts)


def by_piece(y: Array, scores: Array) -> tuple[Array, Array, NDArray[np.int64]]:
    """Of every piece: the mean score, the mean label and the number of rows; the highest scores first."""
    order = np.argsort(-scores, kind="stable")
    cuts = pieces(scores[order])
    rows, truth = np.diff(cuts), y[order].astype(np.float64)
    return np.add.reduceat(scores[order], cuts[:-1]) / rows, np.add.reduceat(truth, cuts[:-1]) / rows, rows


def calibration_error(y: Array, probability: Array) -> float:
    """Expected calibration error: |mean probability - share of ones| over ten bins of equal frequency, weighted by
    their rows (Naeini, Cooper, Hauskrecht, AAAI 2015)."""
    predicted, observed, rows = by_piece(y, probability)
    return float(np.average(np.abs(predicted - observed), weights=rows))


def confidence(y: Array, probabilities: Array) -> tuple[Array, Array]:
    """Of several classes, (n, m): whether the class of the highest probability is the true one, and that probability.
    Calibrated, it is right as often as it is sure (Guo, Pleiss, Sun, Weinberger, ICML 2017, section 2)."""
    return (probabilities.argmax(axis=1) == y).astype(np.float64), probabilities.max(axis=1)


def classwise_error(y: Array, probabilities: Array) -> float:
    """The calibration error of every class's probability, averaged over the classes (Kull et al., NeurIPS 2019,
    section 2; theirs has bins of equal width)."""
    return float(np.mean([calibration_error(y == k, one) for k, one in enumerate(probabilities.T)]))


def ranking(y: Array, scores: Array) -> tuple[Array, Array, Array]:
    """From the highest score down, one entry for each distinct score: rows so far; false and true positive rate."""
    false, true, _ = metrics.roc_curve(y, scores, drop_intermediate=False)
    positives = np.count_nonzero(y)
    return np.rint(true * positives + false * (len(y) - positives)), false, true


def lift(y: Array, scores: Array, share: float = 0.1) -> float:
    """How many times more ones than on average are among the `share` of rows with the highest scores; of rows tied at
    the border, as many as a random order would take."""
    rows, _, found = ranking(y, scores)
    return float(np.interp(share, rows / len(y), found)) / share


@dataclass(frozen=True)
class Figure:
    """One number about a model, in words, and how it is computed from (y, scores, threshold). `lacks` says why there
    is none, or nothing."""

    title: str
    meaning: str
    compute: Callable[[Array, Array, float], float]
    lower_is_better: bool = False
    lacks: Callable[[Array, Array, float], str] = lambda y, scores, threshold: ""

    def better_by(self, ours: float, theirs: float) -> float:
        """By how much `ours` is better than `theirs`; negative if it is worse."""
        return theirs - ours if self.lower_is_better else ours - theirs


def _unfit(y: Array, scores: Array) -> str:
    if len(y) < FEWEST:
        return f"fewer than {FEWEST} test rows"
    return "" if np.isfinite(scores).all() else "a score is not a finite number"


def _one_class(y: Array, *_: Any) -> str:
    return "" if np.ptp(y) else "the test rows are all of one class"


def _few_for_lift(y: Array, *_: Any) -> str:
    few = f"a tenth of the test rows is fewer than {FEWEST}" if len(y) < FEWEST * 10 else ""
    return _one_class(y) or few


def _few_positive(y: Array, *_: Any) -> str:
    return "" if np.count_nonzero(y) >= FEWEST else f"fewer than {FEWEST} test rows are positive"


def _few_predicted(y: Array, scores: Array, threshold: float) -> str:
    above = np.count_nonzero(scores > threshold)
    return "" if above >= FEWEST else f"fewer than {FEWEST} test rows score above {threshold:g}"


def _class_missing(y: Array, scores: Array, _: float) -> str:
    return "" if len(np.unique(y)) == scores.shape[1] else "a class has no test row"


def _all_equal(y: Array, *_: Any) -> str:
    return "" if np.ptp(y) else "the labels of the test rows are all equal"


def _not_positive(y: Array, scores: Array, _: float) -> str:
    return "" if (scores > 0).all() else "a predicted mean is not above 0"


_LOG_LOSS = "How surprising the true labels are under the predicted probabilities; 0 is perfect."
_ACCURACY = "The share of rows whose class is predicted rightly."
FIGURES: dict[Kind, dict[str, Figure]] = {
    "binary": {
        "auc": Figure(
            "AUC",
            "The chance that a positive row scores higher than a negative one; 0.5 is guessing, 1 is perfect.",
            lambda y, s, t: metrics.roc_auc_score(y, s),
            lacks=_one_class,
        ),
        "ks": Figure(
            "KS",
            "The largest distance between the score distributions of positives and negatives (Kolmogorov-Smirnov).",
            lambda y, s, t: ks_2samp(s[y == 1], s[y == 0], method="asymp").statistic,
            lacks=_one_class,
        ),
        "average_precision": Figure(
            "Average precision",
            "Precision, averaged over all recalls; the share of positives is guessing, 1 is perfect.",
            lambda y, s, t: metrics.average_precision_score(y, s),
            lacks=_one_class,
        ),
        "top_decile_lift": Figure(
            "Lift, top tenth",
            "How many times more positives than on average are among the tenth of rows that score highest.",
            lambda y, s, t: lift(y, s),
            lacks=_few_for_lift,
        ),
        "precision": Figure(
            "Precision",
            "Of the rows that score above the threshold, the share that is positive.",
            lambda y, s, t: metrics.precision_score(y, s > t),
            lacks=_few_predicted,
        ),
        "recall": Figure(
            "Recall",
            "Of the positive rows, the share that scores above the threshold.",
            lambda y, s, t: metrics.recall_score(y, s > t),
            lacks=_few_positive,
        ),
        "f1": Figure(
            "F1",
            "The harmonic mean of precision and recall.",
            lambda y, s, t: metrics.f1_score(y, s > t),
            lacks=lambda y, s, t: _few_positive(y) or _few_predicted(y, s, t),
        ),
        "accuracy": Figure("Accuracy", _ACCURACY, lambda y, s, t: metrics.accuracy_score(y, s > t)),
        "log_loss": Figure("Log loss", _LOG_LOSS, lambda y, s, t: metrics.log_loss(y, s, labels=[0, 1]), True),
        "brier": Figure(
            "Brier score",
            "The mean squared difference between predicted probability and what happened; 0 is perfect.",
            lambda y, s, t: metrics.brier_score_loss(y, s, pos_label=1),
            True,
        ),
        "ece": Figure(
            "Calibration error (ECE)",
            "How far predicted probabilities are from observed shares on average, in ten bins of equally many rows.",
            lambda y, s, t: calibration_error(y, s),
            True,
        ),
    },
    "multiclass": {
        "accuracy": Figure("Accuracy", _ACCURACY, lambda y, s, t: metrics.accuracy_score(y, s.argmax(axis=1))),
        "f1_macro": Figure(
            "Macro F1",
            "The F1 score of each class (harmonic mean of precision and recall), averaged over the classes.",
            lambda y, s, t: metrics.f1_score(y, s.argmax(axis=1), average="macro", zero_division=0),
        ),
        "auc": Figure(
            "AUC, one against the rest",
            "The chance that a row of a class scores higher for it than a row of another; averaged over the classes.",
            lambda y, s, t: np.mean([metrics.roc_auc_score(y == k, s[:, k]) for k in range(s.shape[1])]),
            lacks=_class_missing,
        ),
        "log_loss": Figure(
            "Log loss", _LOG_LOSS, lambda y, s, t: metrics.log_loss(y, s, labels=range(s.shape[1])), True
        ),
        "ece": Figure(
            "Calibration error (ECE)",
            "How far the probability of the predicted class is from how often it is right, in ten bins of equally many "
            "rows.",
            lambda y, s, t: calibration_error(*confidence(y, s)),
            True,
        ),
        "classwise_ece": Figure(
            "Class-wise calibration error",
            "How far the probability of a class is from its observed share, in ten bins of equally many rows; averaged "
            "over the classes.",
            lambda y, s, t: classwise_error(y, s),
            True,
        ),
    },
    "regression": {
        "r2": Figure(
            "R²",
            "The share of the labels' variance that the model explains; 0 is predicting the mean, 1 is perfect.",
            lambda y, s, t: metrics.r2_score(y, s),
            lacks=_all_equal,
        ),
        "rmse": Figure(
            "RMSE",
            "The typical error, in the label's unit; large errors weigh more.",
            lambda y, s, t: metrics.root_mean_squared_error(y, s),
            True,
        ),
        "mae": Figure(
            "MAE",
            "The mean absolute error, in the label's unit.",
            lambda y, s, t: metrics.mean_absolute_error(y, s),
            True,
        ),
    },
    "poisson": {
        "d2": Figure(
            "D²",
            "The share of the deviance that the model explains; 0 is predicting the mean, 1 is perfect.",
            lambda y, s, t: metrics.d2_tweedie_score(y, s, power=1),
            lacks=lambda y, s, t: _all_equal(y) or _not_positive(y, s, t),
        ),
        "deviance": Figure(
            "Mean Poisson deviance",
            "How far predicted means are from the counts, as the Poisson distribution measures it; 0 is perfect.",
            lambda y, s, t: metrics.mean_poisson_deviance(y, s),
            True,
            _not_positive,
        ),
    },
}
