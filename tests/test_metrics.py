"""Figures and curves against their definitions, written out in plain numpy, and against scikit-learn's curves."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_curve

from vfl.evaluation import CURVES, Evaluation, compare
from vfl.metrics import FIGURES, calibration_error, lift, measure, pieces

RNG = np.random.default_rng(7)
Y = (RNG.random(950) < 0.3).astype(float)
P = np.clip(0.3 + 0.25 * (Y - 0.3) + 0.15 * RNG.normal(size=950), 0.01, 0.99)


@st.composite
def labelled(draw: Any, least: int = 10) -> tuple[Any, Any]:
    """Both classes, and scores with few or many ties."""
    rows = draw(st.integers(least, 250))
    levels = draw(st.sampled_from([1, 2, 7, 50, 10**6]))
    scores = draw(hnp.arrays(np.int64, rows, elements=st.integers(0, levels))) / levels
    y = draw(hnp.arrays(np.int64, rows, elements=st.integers(0, 1))).astype(float)
    y[:2] = 0, 1
    return y, scores


# ---- figures


def test_binary_figures_by_definition() -> None:
    values, absent = measure("binary", Y, P, threshold=0.4)
    taken, ones = P > 0.4, Y == 1
    hits = (taken & ones).sum()
    precision, recall = hits / taken.sum(), hits / ones.sum()
    wins = np.sign(P[ones][:, None] - P[~ones]).mean()  # every positive against every negative; a tie is 0
    top = np.argsort(-P)[: len(Y) // 10]
    expected = {
        "auc": (wins + 1) / 2,
        "ks": max(abs((P[ones] <= cut).mean() - (P[~ones] <= cut).mean()) for cut in P),
        "average_precision": sum(Y[cut <= P].mean() for cut in P[ones]) / ones.sum(),
        "top_decile_lift": Y[top].mean() / Y.mean(),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "accuracy": (taken == ones).mean(),
        "log_loss": -(Y * np.log(P) + (1 - Y) * np.log(1 - P)).mean(),
        "brier": ((Y - P) ** 2).mean(),
        "ece": sum(abs((Y - P)[part].sum()) for part in np.split(np.argsort(-P), 10)) / len(Y),
    }
    assert not absent and values.keys() == expected.keys()
    assert values == pytest.approx(expected, rel=1e-12)


def by_tenths(happened: Any, probability: Any) -> float:
    """Calibration error over ten parts of equally many rows."""
    parts = np.split(np.argsort(probability), 10)
    return float(sum(abs((happened - probability)[part].sum()) for part in parts) / len(probability))


def test_multiclass_figures_by_definition() -> None:
    y = RNG.integers(0, 3, 300)
    p = RNG.dirichlet([1, 1, 1], 300) + 0.6 * np.eye(3)[y]
    p /= p.sum(axis=1, keepdims=True)
    best = p.argmax(axis=1)
    f1 = [2 * ((best == k) & (y == k)).sum() / ((best == k).sum() + (y == k).sum()) for k in range(3)]
    auc = [(np.sign(p[y == k, k][:, None] - p[y != k, k]).mean() + 1) / 2 for k in range(3)]
    expected = {
        "accuracy": (best == y).mean(),
        "f1_macro": np.mean(f1),
        "auc": np.mean(auc),
        "log_loss": -np.log(p[np.arange(300), y]).mean(),
        "ece": by_tenths(best == y, p.max(axis=1)),
        "classwise_ece": np.mean([by_tenths(y == k, p[:, k]) for k in range(3)]),
    }
    values, absent = measure("multiclass", y.astype(float), p)
    assert not absent and values == pytest.approx(expected, rel=1e-12)


def test_regression_and_poisson_figures_by_definition() -> None:
    mean = np.exp(RNG.normal(size=200))
    y = RNG.poisson(mean).astype(float)
    errors = y - mean
    expected = {
        "r2": 1 - (errors**2).sum() / ((y - y.mean()) ** 2).sum(),
        "rmse": np.sqrt((errors**2).mean()),
        "mae": np.abs(errors).mean(),
    }
    assert measure("regression", y, mean) == (pytest.approx(expected, rel=1e-12), {})

    def deviance(mu: Any) -> float:
        logs = np.where(y > 0, y * np.log(np.where(y > 0, y, 1) / mu), 0)
        return float(2 * (logs - y + mu).mean())

    d2 = 1 - deviance(mean) / deviance(np.full(200, y.mean()))
    assert measure("poisson", y, mean) == (pytest.approx({"d2": d2, "deviance": deviance(mean)}, rel=1e-12), {})


@settings(max_examples=60)
@given(labelled())
def test_ks_is_the_largest_distance_between_the_distributions(drawn: tuple[Any, Any]) -> None:
    y, scores = drawn
    ones, zeros = scores[y == 1], scores[y == 0]
    largest = max(abs((ones <= cut).mean() - (zeros <= cut).mean()) for cut in scores)
    assert FIGURES["binary"]["ks"].compute(y, scores, 0.5) == pytest.approx(largest, abs=1e-12)


@settings(max_examples=60)
@given(labelled(), st.sampled_from([0.1, 0.25, 1.0]))
def test_lift_counts_tied_rows_by_their_mean(drawn: tuple[Any, Any], share: float) -> None:
    y, scores = drawn
    mean_of_ties = np.array([y[scores == score].mean() for score in scores])[np.argsort(-scores, kind="stable")]
    whole, rest = divmod(share * len(y), 1)
    found = mean_of_ties[: int(whole)].sum() + (rest * mean_of_ties[int(whole)] if rest > 1e-9 else 0)
    assert lift(y, scores, share) == pytest.approx(found / y.sum() / share, rel=1e-9)


@settings(max_examples=60)
@given(labelled())
def test_calibration_error_over_pieces_of_equal_scores(drawn: tuple[Any, Any]) -> None:
    y, scores = drawn
    order = np.argsort(scores)[::-1]
    parts = [order[start:end] for start, end in itertools.pairwise(pieces(scores[order]))]
    expected = sum(abs(y[part].sum() - scores[part].sum()) for part in parts) / len(y)
    assert calibration_error(y, scores) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100)
@given(hnp.arrays(np.int64, st.integers(10, 400), elements=st.integers(0, 10**4)), st.sampled_from([1, 100, 10**4]))
def test_pieces_are_of_ten_rows_or_more_and_never_split_equals(numbers: Any, levels: int) -> None:
    ranked = np.sort(numbers % levels)[::-1].astype(float)
    cuts = pieces(ranked)
    assert cuts[0] == 0 and cuts[-1] == len(ranked) and len(cuts) <= 11
    assert (np.diff(cuts) >= 10).all()
    assert all(ranked[cut - 1] > ranked[cut] for cut in cuts[1:-1])
    if len(np.unique(ranked)) == len(ranked):
        assert len(cuts) - 1 == min(10, len(ranked) // 10)
        assert np.ptp(np.diff(cuts)) <= 1


# ---- curves


@settings(max_examples=60)
@given(labelled())
def test_curves_are_scikit_learns_at_fewer_points(drawn: tuple[Any, Any]) -> None:
    y, scores = drawn
    curves = compare("binary", y, {"joint": scores}).models["joint"].curves
    false, true, _ = roc_curve(y, scores, drop_intermediate=False)
    precision, recall, _ = precision_recall_curve(y, scores)
    for ours, theirs in (("roc", (false, true)), ("precision_recall", (recall, precision))):
        full = np.column_stack(theirs)
        assert all(np.abs(full - point).max(axis=1).min() < 1e-12 for point in curves[ours])
    assert curves["roc"][0] == curves["gain"][0] == (0, 0)
    assert curves["roc"][-1] == curves["gain"][-1] == curves["lift"][-1] == (1, 1)
    ranked = y[np.argsort(-scores, kind="stable")]
    for (share, found), (_, times) in zip(curves["gain"][1:], curves["lift"], strict=True):
        top = ranked[: round(share * len(y))]
        assert (found, times) == pytest.approx((top.sum() / y.sum(), top.mean() / y.mean()), rel=1e-12)
    assert [x for x, _ in curves["deciles"]] == sorted((x for x, _ in curves["deciles"]), reverse=True)


@settings(max_examples=60)
@given(labelled())
def test_curves_of_one_model_together_never_step_over_fewer_than_ten_rows(drawn: tuple[Any, Any]) -> None:
    y, scores = drawn
    curves = compare("binary", y, {"joint": scores}).models["joint"].curves
    ones, zeros = y.sum(), (1 - y).sum()
    stops = {round(x * zeros + t * ones) for x, t in curves["roc"]}
    stops |= {round(x * len(y)) for x, _ in (*curves["gain"], *curves["lift"])}
    stops |= {round(r * ones / p) for r, p in curves["precision_recall"] if p}
    assert len(stops) <= 101 and np.diff(sorted(stops)).min() >= 10


def test_no_score_of_a_row_is_in_the_result() -> None:
    text = json.dumps(msgspec.to_builtins(compare("binary", Y, {"joint": P, "alone": 1 - P})))
    kept = set[float]()
    json.loads(text, parse_float=lambda number: kept.add(float(number)))
    assert not kept & {*P.tolist(), *(1 - P).tolist()} and len(kept) > 200


def test_deciles_of_a_regression() -> None:
    y = RNG.normal(size=200)
    guess = y + RNG.normal(size=200)
    for kind in ("regression", "poisson"):
        deciles = compare(kind, np.abs(y), {"joint": np.abs(guess)}).models["joint"].curves["deciles"]
        parts = np.split(np.argsort(-np.abs(guess)), 10)
        expected = [[np.abs(guess)[part].mean(), np.abs(y)[part].mean()] for part in parts]
        assert np.array(deciles) == pytest.approx(np.array(expected), rel=1e-12)


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_the_reliability_curve_is_scikit_learns(kind: Any) -> None:
    y, scores = Y, P + 1e-9 * RNG.random(950)
    happened, sure = y, scores
    if kind == "multiclass":
        y = RNG.integers(0, 4, 950)
        scores = RNG.dirichlet([1, 1, 1, 1], 950) + 0.4 * np.eye(4)[y]
        scores /= scores.sum(axis=1, keepdims=True)
        happened, sure = scores.argmax(axis=1) == y, scores.max(axis=1)
    share, mean = calibration_curve(happened, sure, n_bins=10, strategy="quantile")
    deciles = np.array(compare(kind, y.astype(float), {"joint": scores}).models["joint"].curves["deciles"])
    assert deciles[::-1] == pytest.approx(np.column_stack([mean, share]), rel=1e-12)


def test_a_calibrated_model_of_several_classes_is_told_from_a_sure_one() -> None:
    """Labels drawn from the probabilities: errors near 0, and the accuracy is the mean confidence."""
    p = RNG.dirichlet([1, 1, 1], 20_000)
    y = (RNG.random(20_000)[:, None] > p.cumsum(axis=1)).sum(axis=1).astype(float)
    sharp = p**4 / (p**4).sum(axis=1, keepdims=True)
    honest, sure = measure("multiclass", y, p)[0], measure("multiclass", y, sharp)[0]
    assert honest["ece"] < 0.02 and honest["classwise_ece"] < 0.02
    assert sure["ece"] == pytest.approx(sharp.max(axis=1).mean() - honest["accuracy"], abs=0.01)
    assert sure["classwise_ece"] > 0.1


def test_confusion_leaves_small_counts_out() -> None:
    y = np.repeat([0, 1], [40, 25]).astype(float)
    predicted = np.r_[np.zeros(28), np.ones(12), np.ones(16), np.zeros(9)].astype(int)
    found = compare("multiclass", y, {"joint": np.eye(2)[predicted]}, classes=["no", "yes"])
    assert found.models["joint"].confusion == [[28, 12], [None, 16]] and found.classes == ["no", "yes"]


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_the_order_of_the_rows_does_not_matter(kind: Any) -> None:
    mixed, coarse = RNG.permutation(len(Y)), np.round(P, 1)
    one, other = (
        msgspec.to_builtins(compare(kind, Y[rows], {"joint": coarse[rows]}))["models"]["joint"]
        for rows in (slice(None), mixed)
    )
    assert (
        one["figures"] == pytest.approx(other["figures"], rel=1e-12) and one["curves"].keys() == other["curves"].keys()
    )
    for name, curve in one["curves"].items():
        assert np.array(curve) == pytest.approx(np.array(other["curves"][name]), rel=1e-12)


def test_it_survives_json() -> None:
    found = compare("binary", Y, {"joint": P, "alone": np.round(P, 1), "without grocer": P**2})
    plain = json.loads(json.dumps(msgspec.to_builtins(found), allow_nan=False))
    assert msgspec.convert(plain, Evaluation) == found
    assert list(plain["models"]) == ["joint", "alone", "without grocer"]


# ---- where there is nothing to say


def test_constant_scores_say_nothing_and_do_no_harm() -> None:
    one = compare("binary", Y, {"joint": np.full(len(Y), 0.25)}).models["joint"]
    assert (one.figures["auc"], one.figures["ks"], one.figures["top_decile_lift"]) == (0.5, 0, pytest.approx(1))
    assert one.figures["ece"] == pytest.approx(abs(Y.mean() - 0.25))
    assert one.curves["roc"] == one.curves["gain"] == [(0, 0), (1, 1)]
    assert one.absent["precision"] == "fewer than 10 test rows score above 0.5"


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.filterwarnings("error")
def test_one_class_only(label: float) -> None:
    one = compare("binary", np.full(len(Y), label), {"joint": P}).models["joint"]
    ranked = {"auc", "ks", "average_precision", "top_decile_lift", "roc", "precision_recall", "gain", "lift"}
    assert {name for name, why in one.absent.items() if "one class" in why} == ranked
    assert one.figures["brier"] == pytest.approx(((P - label) ** 2).mean())
    assert one.figures["log_loss"] == pytest.approx(-np.log(np.abs(1 - label - P)).mean())


@pytest.mark.filterwarnings("error")
def test_reasons_instead_of_figures() -> None:
    few = compare("binary", Y[:9], {"joint": P[:9]}).models["joint"]
    assert {*few.absent.values()} == {"fewer than 10 test rows"} and few.absent.keys() >= {*CURVES["binary"]}
    assert not few.figures and not few.curves
    broken = compare("regression", Y, {"joint": np.where(P > 0.5, np.inf, P)}).models["joint"]
    assert broken.absent == dict.fromkeys(("r2", "rmse", "mae", "deciles"), "a score is not a finite number")
    assert measure("regression", np.ones(50), P[:50])[1] == {"r2": "the labels of the test rows are all equal"}
    assert measure("poisson", Y, P - 0.5)[1] == dict.fromkeys(("d2", "deviance"), "a predicted mean is not above 0")
    assert measure("poisson", np.zeros(950), P)[1] == {"d2": "the labels of the test rows are all equal"}
    unseen = measure("multiclass", Y, np.eye(3)[Y.astype(int)])[1]
    assert unseen == {"auc": "a class has no test row"}
    values, absent = measure("binary", Y[:60], P[:60])
    assert absent["top_decile_lift"] == "a tenth of the test rows is fewer than 10" and "auc" in values


def test_better_means_lower_for_losses() -> None:
    assert FIGURES["binary"]["auc"].better_by(0.75, 0.5) == 0.25
    assert FIGURES["binary"]["log_loss"].better_by(0.75, 0.5) == -0.25
    losses = {name for kind in FIGURES.values() for name, figure in kind.items() if figure.lower_is_better}
    assert losses == {"log_loss", "brier", "ece", "classwise_ece", "rmse", "mae", "deviance"}
