"""Weight of evidence and information value from encrypted labels: the same numbers as a plain computation on the joined
table; bins that would tell labels are refused, and so are counts that cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import KBinsDiscretizer

from parties.errors import ColonnadeError, LocalError, PeerAborted, ProtocolViolation, Refused
from parties.memory import outcomes
from parties.preparation import Preparation
from parties.session import Session
from tests.training import agreed, altering, kinds, sent, with_data
from vfl.encryption.paillier import SecretKey
from vfl.exchange import Scales, Terms, accept_key, offer_key, open_gradients, weigh_gradient
from vfl.information import feature_holder, label_holder
from vfl.messages import OpenedGradient, Plan
from vfl.training import agree
from vfl.weight_of_evidence import Information, bin_columns, evidence

ROWS, COUNTS = 400, 40
PLAN = msgspec.toml.decode(
    """
    [numbers.income]
    missing = "median"
    indicator = true
    [numbers.visits]
    missing = "constant"
    fill = 0.0
    bins = 3
    [categories.job]
    values = ["clerk", "nurse", "smith"]
    unseen = "other"
    """,
    type=Preparation,
)


def customers(seed: int = 1) -> tuple[dict[str, pd.DataFrame], np.ndarray]:
    """Gaps, long tails, values that come often, text; labels that depend on some of it. The index is no row number."""
    rng = np.random.default_rng(seed)
    age, income = rng.normal(41, 11, ROWS), rng.lognormal(8, 1.5, ROWS)
    visits = np.where(rng.random(ROWS) < 0.7, 0, rng.integers(1, 30, ROWS)).astype(float)
    job = rng.choice(["clerk", "nurse", "smith", "diver"], ROWS, p=[0.3, 0.3, 0.3, 0.1])
    y = (rng.random(ROWS) < 1 / (1 + np.exp(2 - (age - 41) / 8 - 1.5 * (visits > 0)))).astype(int)
    income[rng.random(ROWS) < 0.1] = np.nan
    visits[rng.random(ROWS) < 0.1] = np.nan
    index = rng.permutation(ROWS) + 1000
    parts = {
        "bank": pd.DataFrame({"age": age}, index=index),
        "grocer": pd.DataFrame({"income": income, "job": job}, index=index),
        "mobile": pd.DataFrame({"visits": visits, "noise": rng.normal(size=ROWS), "flag": age > 48}, index=index),
    }
    return parts, y


def plan_for(frame: pd.DataFrame) -> Preparation:
    return Preparation(
        numbers={name: one for name, one in PLAN.numbers.items() if name in frame},
        categories={name: one for name, one in PLAN.categories.items() if name in frame},
    )


PARTS, Y = customers()
THREE = np.where(PARTS["bank"]["age"] > 48, "old", np.where(Y == 1, "late", "never"))
BINNED = {name: bin_columns(part, plan_for(part)) for name, part in PARTS.items()}


def run(
    binned: dict[str, pd.DataFrame],
    y: Any = Y,
    *,
    scheme: str = "lattice",
    secret: SecretKey | None = None,
    allowed: dict[str, int] | None = None,
    roles: dict[str, Callable[[Session], Any]] | None = None,
    smoothing: float = 0.5,
    **options: Any,
) -> dict[str, Any]:
    """What each party ended with, in memory."""

    def role(session: Session) -> Information:
        own = {"allowed_counts": (allowed or {}).get(session.name, COUNTS), "smoothing": smoothing}
        if session.is_label_holder:
            return label_holder(session, binned[session.name], y, secret=secret, **own)
        return feature_holder(session, binned[session.name], **own)

    known = agreed(list(binned), encryption={"scheme": scheme, "key_bits": 2048})
    ended = outcomes(dict.fromkeys(binned, role) | (roles or {}), **known, **options)
    for outcome in ended.values():
        if isinstance(outcome, Exception) and not isinstance(outcome, ColonnadeError):
            raise outcome
    return ended


def plain(column: pd.Series, y: np.ndarray, smoothing: float = 0.5) -> tuple[dict[str, tuple[int, int, float]], float]:
    """Rows, positives and WOE of every bin, and IV, bin by bin as the textbook has it."""
    counts = pd.crosstab(column.to_numpy(), y)
    good, bad = (counts[label] + smoothing for label in (1, 0))
    bins, total = {}, 0.0
    for name in counts.index:
        p, q = good[name] / good.sum(), bad[name] / bad.sum()
        bins[name] = (int(counts.loc[name].sum()), int(counts.loc[name, 1]), math.log(p / q))
        total += (p - q) * math.log(p / q)
    return bins, total


def assert_plain(information: Information, binned: pd.DataFrame, y: np.ndarray, smoothing: float = 0.5) -> None:
    """Every class against the rest; of two classes, the larger."""
    classes = np.unique(y)
    assert list(information.values.index) == list(binned)
    assert information.by_class.shape == (binned.shape[1], len(classes) if len(classes) > 2 else 1)
    for feature, of_feature in information.bins.groupby("feature"):
        totals = []
        for label, (_, lines) in zip(
            classes[-information.by_class.shape[1] :], of_feature.groupby("class"), strict=True
        ):
            bins, total = plain(binned[feature], (y == label).astype(int), smoothing)
            totals.append(total)
            assert list(zip(lines["bin"], lines["rows"], lines["positives"], strict=True)) == [
                (name, *bins[name][:2]) for name in binned[feature].cat.categories
            ]
            np.testing.assert_allclose(lines["woe"], [bins[name][2] for name in lines["bin"]], rtol=1e-12)
        np.testing.assert_allclose(information.by_class.loc[feature], totals, rtol=1e-12)
        assert information.values[feature] == pytest.approx(sum(totals), rel=1e-12)


# What it computes


@pytest.mark.parametrize("scheme", ["lattice", "paillier"])
@pytest.mark.parametrize("names", [("bank", "grocer"), ("bank", "grocer", "mobile")])
def test_every_party_gets_what_a_plain_computation_gives_for_its_own_columns(names, scheme, secret):
    binned = {name: BINNED[name] for name in names}
    ended = run(binned, scheme=scheme, secret=secret)
    for name, part in binned.items():
        assert_plain(ended[name], part, Y)


@pytest.mark.parametrize("scheme", ["lattice", "paillier"])
def test_of_several_classes_each_is_set_against_the_rest(scheme, secret):
    ended = run(BINNED, THREE, scheme=scheme, secret=secret)
    for name, part in BINNED.items():
        assert_plain(ended[name], part, THREE)
    assert list(ended["bank"].by_class) == ["late", "never", "old"]
    assert list(ended["grocer"].by_class) == ["0", "1", "2"]  # no names where there are no labels


@pytest.mark.parametrize("smoothing", [0.0, 2.0])
def test_the_smoothing_is_what_one_says(smoothing):
    ended = run({name: BINNED[name] for name in ("bank", "grocer")}, smoothing=smoothing)
    for name in ended:
        assert_plain(ended[name], BINNED[name], Y, smoothing)


def test_a_label_holder_without_columns_and_labels_that_are_words():
    ended = run({"bank": BINNED["bank"][[]], "grocer": BINNED["grocer"]}, np.where(Y == 1, "yes", "no"))
    assert_plain(ended["grocer"], BINNED["grocer"], Y)
    assert ended["bank"].bins.empty and ended["bank"].above() == []


def test_columns_that_tell_something_are_picked():
    ended = run(BINNED)
    assert ended["mobile"].above(0.1) == ["visits", "flag"]
    assert ended["bank"].above() == ["age"]
    assert ended["mobile"].above(100.0) == []


def test_a_bin_of_one_class_has_finite_evidence_unless_smoothing_is_0():
    bins = pd.DataFrame({"feature": "job", "bin": ["clerk", "nurse"], "rows": [30, 50]})
    smooth, sharp = (evidence(bins, np.array([0.0, 20.0]), smoothing).bins for smoothing in (0.5, 0.0))
    assert smooth["woe"].tolist() == [math.log((0.5 / 21) / (30.5 / 61)), math.log((20.5 / 21) / (30.5 / 61))]
    assert sharp["woe"].tolist() == [-math.inf, math.log(2)]


# Bins


@pytest.mark.parametrize("rows", [400, 403])
@pytest.mark.parametrize("bins", [2, 5, 7])
def test_numbers_without_ties_fall_into_scikit_learns_quantile_bins(rows, bins):
    column = np.random.default_rng(rows).lognormal(3, 2, rows)
    ours = bin_columns(pd.DataFrame({"x": column}), Preparation(), bins=bins)["x"]
    theirs = KBinsDiscretizer(bins, encode="ordinal", quantile_method="averaged_inverted_cdf", subsample=None)
    assert ours.cat.codes.tolist() == theirs.fit_transform(column[:, np.newaxis])[:, 0].tolist()


@pytest.mark.parametrize("rare", [1, 30, 200, 370, 399])
def test_equal_numbers_stay_together_and_two_values_are_two_bins(rare):
    column = np.r_[np.ones(rare), np.zeros(ROWS - rare)]
    ours = bin_columns(pd.DataFrame({"x": column}), Preparation())["x"]
    assert pd.crosstab(ours, column).to_numpy().tolist() == [[ROWS - rare, 0], [0, rare]]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=40, max_size=120), st.integers(2, 8))
def test_bins_of_few_rows_join_their_neighbours(numbers, bins):
    column = np.r_[numbers, 0, 9].astype(float)
    ours = bin_columns(pd.DataFrame({"x": column}), Preparation(), bins=bins, minimum=10)["x"]
    assert ours.value_counts().min() >= 10
    ranges = pd.Series(column).groupby(ours, observed=True).agg(["min", "max"])
    assert (ranges["min"].to_numpy()[1:] > ranges["max"].to_numpy()[:-1]).all()  # in order, and equals together


def test_missing_numbers_and_declared_levels():
    income, job = (BINNED["grocer"][name] for name in ("income", "job"))
    missing = PARTS["grocer"]["income"].isna()
    assert ((income == "income missing") == missing).all() and income.nunique() == 6
    assert job.cat.categories.tolist() == ["job=clerk", "job=nurse", "job=smith", "job other"]
    assert ((job == "job other") == (PARTS["grocer"]["job"] == "diver")).all()
    visits, filled = BINNED["mobile"]["visits"], PARTS["mobile"]["visits"].fillna(0.0)
    assert visits[filled == 0].nunique() == 1 and visits.nunique() == 2


# Who learns what


@pytest.mark.parametrize("scheme", ["lattice", "paillier"])
def test_nothing_crosses_but_plans_and_one_exchange(scheme, secret):
    recorded: Any = {}
    run(BINNED, scheme=scheme, secret=secret, recorded=recorded)
    for name in ("grocer", "mobile"):
        ours = kinds(recorded, name, "bank")
        assert set(ours) == {"Hello", "Plan", "SealedGradient", "Closing"} and ours.count("Plan") == 1
        theirs = {"Hello", "Plan", "SchemeKey", "SealedResidual", "OpenedGradient", "Closing"}
        assert set(kinds(recorded, "bank", name)) == theirs
        (plan,) = sent(recorded, "bank", name, Plan)
        assert (plan.columns, plan.outputs) == (0, 1)  # not even how many bins the label holder has
        (plan,) = sent(recorded, name, "bank", Plan)
        assert plan.columns == sum(BINNED[name].nunique())
    assert kinds(recorded, "grocer", "mobile") == ["Hello", "Plan", "Closing"]


def test_bins_of_few_rows_are_refused_before_anything_is_sent():
    few = BINNED["grocer"].assign(rare=pd.Categorical(["rare"] * 9 + ["common"] * (ROWS - 9)))
    recorded: Any = {}
    ended = run({"bank": BINNED["bank"], "grocer": few}, recorded=recorded)
    assert isinstance(ended["grocer"], LocalError)
    assert "bins of fewer than 10 rows: rare (1 of 2)" in str(ended["grocer"])
    assert "Plan" not in kinds(recorded, "grocer", "bank")


def test_bins_of_two_columns_that_differ_in_one_row_are_refused():
    """The difference of their counts is that row's label."""
    first = np.arange(ROWS) < 200
    second = first.copy()
    second[17] = False
    twins = pd.DataFrame({"first": first, "second": second}).astype("category")
    ended = run({"bank": BINNED["bank"], "grocer": twins})
    assert isinstance(ended["grocer"], LocalError) and "leverage 1.00" in str(ended["grocer"])


@pytest.mark.parametrize("allowed", [{"bank": 0}, {"grocer": 0}, {"grocer": 9}, {"bank": 9}, {"bank": 41}])
def test_counts_that_are_not_agreed_are_refused(allowed):
    recorded: Any = {}
    ended = run({name: BINNED[name] for name in ("bank", "grocer")}, allowed=allowed, recorded=recorded)
    assert Refused in {type(outcome) for outcome in ended.values()}
    assert not any(isinstance(outcome, Information) for outcome in ended.values())
    assert "SealedResidual" not in kinds(recorded, "bank", "grocer")


def test_a_feature_holder_that_wants_more_counts_than_are_allowed_is_refused():
    def greedy(session: Session) -> None:
        agree(session, "information value", {"counts": COUNTS}, np.zeros((ROWS, COUNTS + 1)), magnitude=29)

    ended = run({name: BINNED[name] for name in ("bank", "grocer")}, roles={"grocer": greedy})
    assert isinstance(ended["bank"], Refused) and ended["bank"].peer == "grocer"


def test_as_many_counts_as_bins_times_classes_less_one():
    bins = sum(BINNED["grocer"].nunique())
    binned = {name: BINNED[name] for name in ("bank", "grocer")}
    enough, few = (dict.fromkeys(binned, 2 * bins - less) for less in (0, 1))
    assert_plain(run(binned, THREE, allowed=enough)["grocer"], BINNED["grocer"], THREE)
    ended = run(binned, THREE, allowed=few)
    assert isinstance(ended["bank"], Refused) and "20 counts of 400 rows, 19 are allowed" in str(ended["bank"])


def test_not_caught_a_bin_of_one_row_tells_its_label():
    """It is the feature holder that refuses such bins; to the label holder they look like any others."""

    def crafted(session: Session) -> np.ndarray:
        scales = Scales.of(session.agreement, ROWS)
        x = np.eye(ROWS, COUNTS, dtype=np.int64) << scales.feature_bits
        plans = agree(session, "information value", {"counts": COUNTS}, x, magnitude=scales.magnitude(x))
        terms = Terms.of(session.agreement, ROWS, {"grocer": plans["grocer"]}, 1)
        return weigh_gradient(accept_key(session, terms, x), 0)[:, 0]

    ended = run({name: BINNED[name] for name in ("bank", "grocer")}, roles={"grocer": crafted})
    assert ended["grocer"].tolist() == Y[:COUNTS].tolist()  # one label a count: allowed_counts bounds them


def test_not_caught_a_feature_holder_that_deviates_reads_many_labels_from_one_count():
    """Powers of two in place of a bin's ones. To the label holder everything looks as it does with honest bins."""
    rows = 30

    def crafted(session: Session) -> np.ndarray:
        x = np.zeros((ROWS, 1), np.int64)
        x[:rows, 0] = 1 << np.arange(rows)
        plans = agree(session, "information value", {"counts": COUNTS}, x, magnitude=29)
        terms = Terms.of(session.agreement, ROWS, {"grocer": plans["grocer"]}, 1)
        count = weigh_gradient(accept_key(session, terms, x), 0)[0, 0]
        return int(count * 2 ** terms.scales["grocer"].feature_bits) >> np.arange(rows) & 1

    ended = run({name: BINNED[name] for name in ("bank", "grocer")}, roles={"grocer": crafted})
    assert ended["grocer"].tolist() == Y[:rows].tolist()
    assert_plain(ended["bank"], BINNED["bank"], Y)


# Bad labels, and a label holder that lies


@pytest.mark.parametrize(
    "y", [np.zeros(ROWS, int), PARTS["bank"]["age"], Y[:-1]], ids=["one class", "numbers", "too short"]
)
def test_labels_without_classes_are_refused(y):
    ended = run({name: BINNED[name] for name in ("bank", "grocer")}, y)
    assert isinstance(ended["bank"], LocalError) and isinstance(ended["grocer"], PeerAborted)


@pytest.mark.parametrize(
    "bad", [lambda b: b.astype(str), lambda b: b[b.index > 1050].reindex(b.index)], ids=["text", "missing"]
)
def test_rows_without_a_bin_are_refused(bad):
    ended = run({"bank": BINNED["bank"], "grocer": bad(BINNED["grocer"])})
    assert isinstance(ended["grocer"], LocalError)


def lying(residual: np.ndarray) -> Callable[[Session], None]:
    """A label holder that seals something else than labels."""
    width = residual.reshape(ROWS, -1).shape[1]

    def role(session: Session) -> None:
        plans = agree(session, "information value", {"counts": COUNTS}, np.empty((ROWS, 0)), outputs=width)
        terms = Terms.of(session.agreement, ROWS, {"grocer": plans["grocer"]}, 1, width=width)
        open_gradients(offer_key(session, terms), residual, 0)

    return role


@pytest.mark.parametrize(
    ("residual", "text"),
    [
        (-1.0 * Y, "not whole, or not between"),
        (0.3 * Y, "not whole, or not between"),
        (np.ones(ROWS), "a class empty"),
        (np.zeros(ROWS), "a class empty"),
        (np.column_stack([Y, Y, np.ones(ROWS)]), "not between"),
        (np.column_stack([Y, 1 - Y]), "a class empty"),
        (np.column_stack([Y, np.zeros(ROWS)]), "a class empty"),
    ],
    ids=["negative", "fractions", "all", "none", "in two classes", "no first class", "no last class"],
)
def test_sums_that_no_labels_give_are_noticed(residual, text):
    ended = run({name: BINNED[name] for name in ("bank", "grocer")}, roles={"bank": lying(residual)})
    assert isinstance(ended["grocer"], ProtocolViolation) and ended["grocer"].peer == "bank"
    assert text in str(ended["grocer"])


@pytest.mark.parametrize(
    ("added", "text"),
    [(1 << 49, "not whole"), (1 << 50, "do not add up"), (ROWS << 50, "cannot be|range")],
    ids=["half a row", "a row", "all rows"],
)
def test_counts_that_were_altered_when_they_were_opened_are_noticed(added, text):
    def change(data: np.ndarray) -> np.ndarray:
        data.view("<u8")[0] += np.uint64(added)
        return data

    tamper = altering("bank", "grocer", OpenedGradient, with_data(change))
    ended = run({name: BINNED[name] for name in ("bank", "grocer")}, tamper=tamper)
    assert isinstance(ended["grocer"], ProtocolViolation) and ended["grocer"].peer == "bank"
    with pytest.raises(ProtocolViolation, match=text):
        raise ended["grocer"]
