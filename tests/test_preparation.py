"""A party's preparation of its own columns: the same numbers as scikit-learn's own transformers, saved
as JSON and loaded too; what cannot be prepared is refused by column and count, never by value."""

from __future__ import annotations

import json
import warnings

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import KBinsDiscretizer, OneHotEncoder, StandardScaler

from parties.errors import LocalError
from parties.parsing import parse_json
from parties.preparation import Preparation
from vfl.preparation import FittedColumns, fit

JOBS = ["clerk", "nurse", "smith", "tailor", "diver"]


def customers(rows: int, seed: int) -> pd.DataFrame:
    """Ages with gaps, long-tailed balances, days of which most are -1, jobs of which the last is rare."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": rng.normal(41, 11, rows),
            "balance": rng.lognormal(6, 1.5, rows),
            "days": np.where(rng.random(rows) < 0.7, -1, rng.integers(1, 300, rows)),
            "job": rng.choice(JOBS, rows, p=[0.2, 0.3, 0.3, 0.18, 0.02]),
        },
        index=rng.permutation(rows) + 1000,
    )
    frame.loc[rng.random(rows) < 0.1, "age"] = np.nan
    return frame


TRAIN, NEW = customers(600, 1), customers(200, 2)


def plan(text: str) -> Preparation:
    """As a party's file has it under [prepare]."""
    return msgspec.toml.decode(text, type=Preparation)


def through_json(fitted: FittedColumns) -> FittedColumns:
    return msgspec.json.decode(msgspec.json.encode(fitted), type=FittedColumns)


def categories(values: list[str] = JOBS, **options: str) -> Preparation:
    return msgspec.convert({"categories": {"job": {"values": values, **options}}}, Preparation)


# ---- the same as scikit-learn

NUMBERS = {
    "mean": ('missing = "mean"', SimpleImputer(strategy="mean")),
    "median": ('missing = "median"', SimpleImputer(strategy="median")),
    "constant": ('missing = "constant"\nfill = -7.5', SimpleImputer(strategy="constant", fill_value=-7.5)),
    "indicator": ('missing = "median"\nindicator = true', SimpleImputer(strategy="median", add_indicator=True)),
    "bins": (
        'missing = "mean"\nbins = 6',
        make_pipeline(
            SimpleImputer(strategy="mean"),
            KBinsDiscretizer(6, encode="onehot-dense", quantile_method="averaged_inverted_cdf"),
        ),
    ),
}


@pytest.mark.parametrize("options, theirs", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("scale, standardise", [("agreed", False), ("agreed", True), ("standard", False)])
def test_numbers(options, theirs, scale, standardise):
    ours = fit(TRAIN[["age"]], plan(f'[numbers.age]\n{options}\nscale = "{scale}"'), standardise=standardise)
    known, new = theirs.fit_transform(TRAIN[["age"]]), theirs.transform(NEW[["age"]])
    if "bins" in options:
        known, new = known[:, 1:], new[:, 1:]
    if standardise or scale == "standard":
        scaler = StandardScaler().fit(known)
        known, new = scaler.transform(known), scaler.transform(new)
    for got, expected in ((ours.transform(TRAIN), known), (ours.transform(NEW), new)):
        assert got.dtypes.unique().tolist() == [np.float64]
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_quantile_bins_of_which_most_are_one_value(caplog):
    ours = fit(TRAIN[["days"]], plan("[numbers.days]\nbins = 8"), standardise=False)
    assert "'days'" in caplog.text and "of 8 quantile bins" in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KBinsDiscretizer(8, encode="onehot-dense", quantile_method="averaged_inverted_cdf").fit(
            TRAIN[["days"]]
        )
    assert 2 <= theirs.n_bins_[0] < 8
    np.testing.assert_array_equal(ours.transform(NEW), theirs.transform(NEW[["days"]])[:, 1:])


def test_bins_beyond_the_training_rows_are_the_outermost():
    ours = fit(TRAIN[["balance"]], plan("[numbers.balance]\nbins = 4"), standardise=False)
    far = ours.transform(pd.DataFrame({"balance": [-1e100, 1e100]}))
    assert far.to_numpy().tolist() == [[0, 0, 0], [0, 0, 1]]


def test_declared_categories():
    ours = fit(TRAIN[["job"]], categories(), standardise=False)
    theirs = OneHotEncoder(categories=[JOBS], drop="first", sparse_output=False).fit(TRAIN[["job"]])
    got = ours.transform(NEW)
    assert list(got) == ["job=nurse", "job=smith", "job=tailor", "job=diver"]
    np.testing.assert_array_equal(got, theirs.transform(NEW[["job"]]))


def test_a_value_that_is_not_declared_counts_as_the_baseline_if_we_say_so():
    strange = NEW.assign(job=np.where(NEW.index % 3, NEW["job"], "wizard"))
    ours = fit(TRAIN[["job"]], categories(unseen="baseline"), standardise=False)
    theirs = OneHotEncoder(categories=[JOBS], drop="first", handle_unknown="ignore", sparse_output=False)
    theirs.fit(TRAIN[["job"]])
    with pytest.warns(UserWarning, match="unknown categories"):
        expected = theirs.transform(strange[["job"]])
    np.testing.assert_array_equal(ours.transform(strange), expected)


@pytest.mark.filterwarnings("ignore:Found unknown categories")
def test_rare_and_strange_values_share_a_column_if_we_say_so():
    strange = NEW.assign(job=np.where(NEW.index % 3, NEW["job"], "wizard"))
    rows = TRAIN["job"].value_counts()
    minimum = int(rows["tailor"]) + 1
    assert rows["diver"] < minimum < min(rows[JOBS[:3]])
    ours = fit(TRAIN[["job"]], categories(unseen="other"), standardise=False, minimum=minimum)
    theirs = OneHotEncoder(
        categories=[JOBS],
        min_frequency=minimum,
        handle_unknown="infrequent_if_exist",
        drop="first",
        sparse_output=False,
    )
    theirs.fit(TRAIN[["job"]])
    assert list(ours.transform(NEW)) == ["job=nurse", "job=smith", "job other"]
    for rows in (TRAIN, NEW, strange):
        np.testing.assert_array_equal(ours.transform(rows), theirs.transform(rows[["job"]]))


def test_values_that_were_never_declared_are_other_in_training_too():
    ours = fit(TRAIN[["job"]], categories(["nurse", "clerk"], unseen="other"), standardise=False)
    expected = np.column_stack([NEW["job"] == "clerk", ~NEW["job"].isin(["nurse", "clerk"])])
    np.testing.assert_array_equal(ours.transform(NEW), expected)


@pytest.mark.parametrize("missing", ["", None, np.nan])
def test_a_missing_category_becomes_the_declared_one(missing):
    train = TRAIN.assign(job=TRAIN["job"].where(TRAIN.index % 4 > 0, missing))
    ours = fit(train[["job"]], categories(fill="smith"), standardise=False)
    theirs = OneHotEncoder(categories=[JOBS], drop="first", sparse_output=False)
    filled = TRAIN["job"].where(TRAIN.index % 4 > 0, "smith")
    np.testing.assert_array_equal(ours.transform(train), theirs.fit_transform(filled.to_frame()))


WHOLE = f"""
[numbers.age]
missing = "median"
indicator = true
[numbers.balance]
bins = 5
[numbers.days]
scale = "none"
[categories.job]
values = {JOBS}
"""


def test_a_whole_table_against_a_column_transformer():
    ours = fit(TRAIN, plan(WHOLE), standardise=True, minimum=10)
    bins = KBinsDiscretizer(5, encode="ordinal", quantile_method="averaged_inverted_cdf")
    one_hot = {"drop": "first", "sparse_output": False}
    theirs = ColumnTransformer(
        [
            ("a", make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler()), ["age"]),
            ("b", make_pipeline(bins, OneHotEncoder(**one_hot), StandardScaler()), ["balance"]),
            ("c", "passthrough", ["days"]),
            ("d", make_pipeline(OneHotEncoder(categories=[JOBS], **one_hot), StandardScaler()), ["job"]),
        ]
    ).fit(TRAIN)
    got = through_json(ours).transform(NEW)
    assert list(got) == [
        *("age", "age missing", "balance bin 2", "balance bin 3", "balance bin 4", "balance bin 5", "days"),
        *("job=nurse", "job=smith", "job=tailor", "job=diver"),
    ]
    np.testing.assert_allclose(got, theirs.transform(NEW), rtol=1e-12, atol=1e-12)
    pd.testing.assert_index_equal(got.index, NEW.index)


def test_a_feature_that_no_entry_names_is_a_number_scaled_as_agreed():
    frame = TRAIN[["balance", "days"]]
    scaled = fit(frame, Preparation(), standardise=True)
    np.testing.assert_array_equal(scaled.transform(NEW), StandardScaler().fit(frame).transform(NEW[list(frame)]))
    pd.testing.assert_frame_equal(
        fit(frame, Preparation(), standardise=False).transform(NEW), NEW[list(frame)].astype(np.float64)
    )


# ---- the same after saving, in any order, one row at a time


def test_saved_and_loaded_it_prepares_the_same():
    ours = fit(TRAIN, plan(WHOLE), standardise=True)
    again = through_json(ours)
    assert again == ours
    pd.testing.assert_frame_equal(again.transform(NEW), ours.transform(NEW), check_exact=True)


def test_one_row_is_prepared_as_among_many():
    ours = fit(TRAIN, plan(WHOLE), standardise=True)
    alone = [ours.transform(NEW.iloc[[row]]) for row in range(20)]
    pd.testing.assert_frame_equal(pd.concat(alone), ours.transform(NEW).iloc[:20], check_exact=True)
    assert ours.transform(NEW.iloc[:0]).shape == (0, len(ours.names))


def test_columns_are_found_by_name():
    ours = fit(TRAIN, plan(WHOLE), standardise=True)
    shuffled = NEW[["job", "days", "balance", "age"]].assign(more="text")
    pd.testing.assert_frame_equal(ours.transform(shuffled), ours.transform(NEW))


def test_columns_may_have_any_name_and_text_any_type():
    names = ["remainder", "a__b", "sparse_threshold", "columns"]
    frame = TRAIN.assign(age=1.0 * (TRAIN.index % 7), job=TRAIN["job"].astype("category")).set_axis(names, axis=1)
    options = {"categories": {"columns": {"values": JOBS}}}
    got = fit(frame, msgspec.convert(options, Preparation), standardise=False).transform(frame)
    assert list(got) == [*names[:3], *(f"columns={job}" for job in JOBS[1:])]
    assert got["columns=nurse"].sum() == (TRAIN["job"] == "nurse").sum()


def test_rows_may_share_an_index():
    frame = TRAIN.set_axis([7] * len(TRAIN), axis=0)
    got = fit(frame, plan(WHOLE), standardise=True).transform(frame)
    np.testing.assert_array_equal(got, fit(TRAIN, plan(WHOLE), standardise=True).transform(TRAIN))


def test_no_columns_at_all():
    ours = through_json(fit(TRAIN[[]], Preparation(), standardise=True))
    assert ours.transform(NEW).shape == (len(NEW), 0)


values = st.lists(st.none() | st.floats(-1e6, 1e6, allow_subnormal=False), min_size=2, max_size=30)


@settings(max_examples=60)
@given(values, st.sampled_from(["mean", "median"]), st.booleans())
def test_any_column_of_numbers(column, strategy, standardise):
    frame = pd.DataFrame({"x": pd.array(column, dtype="Float64")})
    theirs = SimpleImputer(strategy=strategy, keep_empty_features=True)
    expected = theirs.fit_transform(frame.astype(np.float64))
    options = plan(f'[numbers.x]\nmissing = "{strategy}"')
    if frame["x"].isna().all() or np.ptp(expected) == 0:
        with pytest.raises(LocalError, match="drop the column"):
            fit(frame, options, standardise=standardise)
        return
    ours = through_json(fit(frame, options, standardise=standardise))
    if standardise:
        expected = StandardScaler().fit_transform(expected)
    np.testing.assert_array_equal(ours.transform(frame), expected)


# ---- bad input: columns and counts, never a value

SECRET = "hemlock"
ROWS = 40
GOOD = pd.DataFrame(
    {"n": np.arange(ROWS) * 1.5, "m": np.arange(ROWS) % 5.0, "t": [["oak", "elm"][row % 2] for row in range(ROWS)]}
)
TREES = '[categories.t]\nvalues = ["oak", "elm"]\n'
GAPS = GOOD["n"].where(GOOD.index > 2)


def with_(column: str, changed, rows: slice = slice(0, 3)) -> pd.DataFrame:
    frame = GOOD.astype({column: object})
    frame.loc[frame.index[rows], column] = changed
    return frame


BAD = {
    "text among numbers": (with_("n", SECRET), TREES, "column 'n': 3 values that are not numbers"),
    "a text column without an entry": (
        GOOD,
        "",
        "column 't': 40 values that are not numbers; correct them, or declare",
    ),
    "a text column under numbers": (GOOD, "[numbers.t]\nbins = 2", "column 't': 40 values that are not numbers"),
    "numbers under categories": (with_("t", 31337), TREES, "column 't': 3 values that are not text"),
    "infinite": (with_("n", -np.inf), TREES, "column 'n': 3 values infinite or beyond 1e+150; correct"),
    "missing numbers": (with_("n", None), TREES, "column 'n': 3 missing values; fill them, or say under"),
    "missing categories": (with_("t", ""), TREES, "column 't': 3 missing values; fill them, or say under"),
    "not declared": (with_("t", SECRET), TREES, "column 't': 3 values that are not declared; declare them"),
    "all missing": (
        GOOD.assign(n=np.nan),
        TREES + '[numbers.n]\nmissing = "mean"',
        "column 'n': no value among the training rows; drop the column",
    ),
    "constant": (GOOD.assign(n=31337.0), TREES, "column 'n': constant among the training rows; drop the column"),
    "constant once filled": (
        GOOD.assign(n=np.where(GOOD.index > 9, 31337.0, np.nan)),
        TREES + '[numbers.n]\nmissing = "median"\nindicator = true',
        "column 'n': constant among the training rows",
    ),
    "an indicator of nothing": (
        GOOD,
        TREES + '[numbers.n]\nmissing = "mean"\nindicator = true',
        "column 'n': 0 of 40 training values are missing and an indicator needs 10 of either kind; set indicator",
    ),
    "an indicator of few": (
        GOOD.assign(n=GAPS),
        TREES + '[numbers.n]\nmissing = "mean"\nindicator = true',
        "column 'n': 3 of 40 training values are missing and an indicator needs 10",
    ),
    "more bins than values": (
        GOOD,
        TREES + "[numbers.m]\nbins = 6",
        "column 'm': 6 bins for 5 distinct training values",
    ),
    "bins of few rows": (GOOD, TREES + "[numbers.m]\nbins = 5", "column 'm': 5 quantile bins, 5 with fewer than 10"),
    "bins that are all one": (
        with_("n", 31337.0, slice(0, 39)).assign(m=GOOD["m"]),
        TREES + "[numbers.n]\nbins = 2",
        "column 'n': its values leave a single quantile bin; leave bins out",
    ),
    "a rare level": (
        with_("t", SECRET),
        f'[categories.t]\nvalues = ["oak", "elm", "{SECRET}"]',
        "column 't': 1 of 3 declared values have fewer than 10 training rows; merge them",
    ),
    "a rare baseline": (
        with_("t", SECRET),
        f'[categories.t]\nvalues = ["{SECRET}", "oak", "elm"]',
        "column 't': 1 of 3 declared values have fewer than 10 training rows; merge them",
    ),
    "few others": (
        with_("t", SECRET),
        TREES + 'unseen = "other"',
        "column 't': 3 of 40 training rows are other, with 2 levels of 10 rows beside; declare fewer",
    ),
    "all others": (
        with_("t", SECRET, slice(0, 40)),
        TREES + 'unseen = "other"',
        "column 't': 40 of 40 training rows are other, with 0 levels",
    ),
    "an entry for no feature": (GOOD, TREES + "[numbers.x]\nbins = 2", "[prepare] names 'x', no features of ours"),
    "two columns of one name": (
        pd.concat([GOOD, GOOD[["n"]]], axis=1),
        TREES,
        "the table has several columns named 'n'; rename all but one",
    ),
    "two prepared columns of one name": (
        GOOD.rename(columns={"n": "t=elm"}),
        TREES,
        "the columns 't=elm' and 't' prepare to one name; rename one",
    ),
    "too large to be squared": (with_("n", -1.1e150), TREES, "column 'n': 3 values infinite or beyond 1e+150"),
    "too large to standardise": (
        GOOD.assign(n=GAPS),
        TREES + '[numbers.n]\nmissing = "constant"\nfill = 1e300',
        "values too large to standardise in 'n'; clip or rescale them",
    ),
    "no rows": (GOOD[:0], TREES, "there are no training rows to prepare"),
}


@pytest.mark.parametrize("frame, text, complaint", BAD.values(), ids=BAD)
def test_refused_when_training(frame, text, complaint):
    with pytest.raises(LocalError) as caught:
        fit(frame, plan(text), standardise=True, minimum=10)
    said = str(caught.value)
    assert complaint in said
    assert SECRET not in said and "31337" not in said and "\n" not in said


NEW_BAD = {
    "not declared": (with_("t", SECRET), "column 't': 3 values that are not declared"),
    "missing category": (with_("t", None), "column 't': 3 missing values"),
    "missing number": (with_("n", None), "column 'n': 3 missing values"),
    "text": (with_("n", SECRET), "column 'n': 3 values that are not numbers"),
    "infinite": (with_("m", np.inf), "column 'm': 3 values infinite or beyond 1e+150"),
    "no such column": (GOOD.drop(columns=["m", "t"]), "the table lacks the columns 'm', 't'"),
    "a column twice": (pd.concat([GOOD, GOOD[["m"]]], axis=1), "the table has several columns named 'm'"),
}


@pytest.mark.parametrize("frame, complaint", NEW_BAD.values(), ids=NEW_BAD)
def test_refused_when_scoring(frame, complaint):
    fitted = fit(GOOD, plan(TREES), standardise=True, minimum=10)
    with pytest.raises(LocalError) as caught:
        fitted.transform(frame)
    said = str(caught.value)
    assert complaint in said
    assert SECRET not in said and "\n" not in said


def test_refused_when_scoring_leaves_the_range_of_numbers():
    """Training values within a hair of each other, new ones far away."""
    fitted = fit(GOOD.assign(m=GOOD["m"] * 1e-161), plan(TREES), standardise=True)
    with pytest.raises(LocalError, match=r"^values too large to standardise in 'm'; clip or rescale them$"):
        fitted.transform(GOOD.assign(m=1e149))


@pytest.mark.parametrize("unseen", ["refuse", "baseline", "other"])
def test_a_level_needs_the_agreed_number_of_rows_and_no_more(unseen):
    frame = pd.DataFrame({"t": ["oak"] * 10 + ["elm"] * 10 + ["yew"] * 10})
    values = ["oak", "elm"] if unseen == "other" else ["oak", "elm", "yew"]
    options = msgspec.convert({"categories": {"t": {"values": values, "unseen": unseen}}}, Preparation)
    assert fit(frame, options, standardise=False, minimum=10).transform(frame).sum().tolist() == [10, 10]
    with pytest.raises(LocalError, match="column 't'"):
        fit(frame, options, standardise=False, minimum=11)


def test_every_column_at_fault_is_named_at_once():
    frame = with_("n", None).assign(m=1.0)
    with pytest.raises(LocalError, match=r"^column 'n': 3 missing .*; column 'm': constant .*; column 't': 40 values"):
        fit(frame, Preparation(), standardise=True)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('[numbers.n]\nmissing = "constant"', "goes with fill"),
        ("[numbers.n]\nfill = 1.0", "goes with fill"),
        ('[numbers.n]\nmissing = "constant"\nfill = nan', "fill must be finite"),
        ("[numbers.n]\nindicator = true", "indicator goes with"),
        ("[numbers.n]\nbins = 1", ">= 2"),
        ("[numbers.n]\nbin = 3", "unknown field `bin`"),
        ('[categories.t]\nvalues = ["oak"]', "length >= 2"),
        ('[categories.t]\nvalues = ["oak", ""]', "length >= 1"),
        ('[categories.t]\nvalues = ["oak", "oak"]', "values must differ"),
        (TREES + 'fill = "yew"', "fill must be one of values"),
        (TREES + 'unseen = "ignore"', "Invalid enum value"),
        (TREES + "[numbers.t]\nbins = 3", "'t' is declared under numbers and under categories"),
    ],
)
def test_a_party_file_that_contradicts_itself_is_refused(text, complaint):
    with pytest.raises(msgspec.ValidationError, match=complaint):
        plan(text)


# ---- a share that somebody altered

SAVED = msgspec.json.encode(fit(TRAIN, plan(WHOLE), standardise=True))
ALTERED = {
    "another length": lambda saved: saved["mean"].pop(),
    "both shorter": lambda saved: (saved["mean"].pop(), saved["scale"].pop()),
    "no scale": lambda saved: saved.pop("scale"),
    "scale of zero": lambda saved: saved["scale"].__setitem__(0, 0),
    "negative scale": lambda saved: saved["scale"].__setitem__(0, -1.0),
    "scale whose inverse is infinite": lambda saved: saved["scale"].__setitem__(0, 5e-324),
    "text for a number": lambda saved: saved["mean"].__setitem__(0, "0"),
    "a column less": lambda saved: saved["columns"].pop("days"),
    "edges not increasing": lambda saved: saved["columns"]["balance"]["edges"].__setitem__(1, 1e9),
    "equal edges": lambda saved: saved["columns"]["balance"].__setitem__("edges", [1.0] * 6),
    "one bin": lambda saved: saved["columns"]["balance"].__setitem__("edges", [1.0, 2.0]),
    "equal values": lambda saved: saved["columns"]["job"]["values"].__setitem__(1, JOBS[0]),
    "empty value": lambda saved: saved["columns"]["job"]["values"].__setitem__(1, ""),
    "one value": lambda saved: saved["columns"]["job"].__setitem__("values", JOBS[:1]),
    "a fill that is no value": lambda saved: saved["columns"]["job"].__setitem__("fill", "wizard"),
    "an indicator without a fill": lambda saved: saved["columns"]["days"].__setitem__("indicator", True),
    "another kind": lambda saved: saved["columns"]["job"].__setitem__("type", "OneHotEncoder"),
    "an unknown field": lambda saved: saved["columns"]["job"].__setitem__("module", "os"),
    "one name twice": lambda saved: saved["columns"].__setitem__("job=nurse", saved["columns"].pop("days")),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_an_altered_file_is_refused(alter, tmp_path):
    saved = json.loads(SAVED)
    alter(saved)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(saved))
    with pytest.raises(LocalError, match=r"model\.json"):
        parse_json(path, FittedColumns, "the model share")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" * 400])
def test_a_number_that_is_none_is_refused(number, tmp_path):
    path = tmp_path / "model.json"
    path.write_bytes(SAVED.replace(b'"mean":[', b'"mean":[' + number.encode() + b",", 1))
    with pytest.raises(LocalError, match=r"model\.json"):
        parse_json(path, FittedColumns, "the model share")


@settings(max_examples=300)
@given(st.integers(0, len(SAVED) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_a_damaged_file_is_refused_or_prepares_finite_numbers(at, inserted, removed):
    try:
        fitted = msgspec.json.decode(SAVED[:at] + inserted + SAVED[at + removed :], type=FittedColumns)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    try:
        prepared = fitted.transform(NEW)
    except LocalError:
        return
    assert prepared.shape == (len(NEW), len(fitted.mean))
    assert np.isfinite(prepared.to_numpy()).all()
