"""[information] in the agreement: a run of real processes counts before it trains, each party gets what is its own."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from parties.agreement import Agreement
from parties.errors import PeerAborted, ProtocolViolation, Refused
from parties.memory import outcomes
from parties.preparation import CategoryColumn, NumberColumn, Preparation
from parties.session import Session
from tests.training import agreed, altering, kinds, sent, with_fields
from tests.world import build, colonnade, together
from vfl.console import out
from vfl.information import measure
from vfl.information_messages import ColumnValue
from vfl.report import closing_table
from vfl.weight_of_evidence import bin_columns

INFORMATION = """test_fraction = 0.25
allow_reconstruction = true
[information]
allowed_counts = 60
bins = 4
values_to_label_holder = true
"""
GAPS = '\n[prepare.numbers.late]\nmissing = "median"\nindicator = true\n'
PLANS = {"telco": Preparation(numbers={"late": NumberColumn(missing="median", indicator=True)})}


def customers(rows: int) -> dict[str, pd.DataFrame]:
    """Three classes that need columns of all; a telephone company with gaps."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(rows, 5))
    scores = x @ rng.normal(size=(5, 3)) * 1.5
    classes = np.array(["late", "never", "soon"])[scores.argmax(axis=1)]
    late = np.where(rng.random(rows) < 0.15, np.nan, x[:, 4])
    ids = [f"customer-{number:04d}" for number in range(rows)]
    return {
        "bank": pd.DataFrame({"id": ids, "income": x[:, 0], "pays": classes}),
        "grocer": pd.DataFrame({"id": ids, "baskets": x[:, 1], "returns": x[:, 2]}),
        "telco": pd.DataFrame({"id": ids, "minutes": x[:, 3], "late": late}),
    }


def ivs(column: pd.Series, y: np.ndarray) -> list[float]:
    """Of every class against the rest: counts by bin, half a row added to each."""
    values = []
    for label in np.unique(y):
        good, bad = (pd.crosstab(column.to_numpy(), y == label)[side].to_numpy() + 0.5 for side in (True, False))
        p, q = good / good.sum(), bad / bad.sum()
        values.append(float(((p - q) * np.log(p / q)).sum()))
    return values


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of three parties; where, and each one's bins and the labels of its training rows."""
    folder, tables = tmp_path_factory.mktemp("information"), customers(420)
    paths = build(folder, tables, model=INFORMATION, sign=False)
    text = paths["bank"].read_text().replace("'income', 'pays'", "'income'")
    paths["bank"].write_text(text + 'label = "pays"\n')
    paths["telco"].write_text(paths["telco"].read_text() + GAPS)
    for path in paths.values():
        assert colonnade("sign", path)[0] == 0
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == dict.fromkeys(tables, 0), errors
    bins, y = {}, np.empty(0)
    for name, whole in tables.items():
        rows = pd.read_csv(folder / "out" / name / "rows.csv")
        part = whole.iloc[rows["row"][rows["part"] == "train"]].reset_index(drop=True)
        y = part["pays"].to_numpy() if name == "bank" else y
        own = part.drop(columns=["id", "pays"], errors="ignore")
        bins[name] = bin_columns(own, PLANS.get(name, Preparation()), bins=4)
    return folder, bins, y


def read(folder: Any, name: str, file: str) -> Any:
    return json.loads((folder / "out" / name / file).read_text())


def test_each_party_finds_the_values_of_its_own_columns(finished):
    folder, bins, y = finished
    for name, binned in bins.items():
        ours = [row for row in read(folder, name, "summary.json")["information"] if row["party"] == name]
        assert [row["column"] for row in ours] == list(binned)
        for row in ours:
            assert row["by_class"] == pytest.approx(ivs(binned[row["column"]], y), rel=1e-9)
            assert row["iv"] == pytest.approx(sum(row["by_class"]), rel=1e-12)


def test_bins_stay_with_their_owner_in_a_file_of_its_own(finished):
    folder, bins, y = finished
    for name, binned in bins.items():
        path = folder / "out" / name / "information.json"
        lines = pd.DataFrame(read(folder, name, "information.json")["bins"])
        assert path.stat().st_mode & 0o077 == 0 and "woe" not in (folder / "out" / name / "summary.json").read_text()
        assert set(lines["feature"]) == set(binned) and (lines["rows"] >= 10).all()
        for feature, of_feature in lines.groupby("feature"):
            counts = pd.crosstab(binned[feature].to_numpy(), y).loc[of_feature["bin"].unique()]
            assert of_feature["positives"].tolist() == counts.to_numpy().ravel().tolist()
    assert "late missing" in set(lines["bin"]) and set(lines["class"]) == {"0", "1", "2"}


def test_the_label_holder_hears_names_and_values_and_its_page_shows_them(finished):
    folder, bins, y = finished
    rows = read(folder, "bank", "summary.json")["information"]
    assert [(row["party"], row["column"]) for row in rows] == [(n, column) for n in bins for column in bins[n]]
    for row in rows[1:]:
        assert row["by_class"] == np.round(ivs(bins[row["party"]][row["column"]], y), 3).tolist()
    page = (folder / "out" / "bank" / "report.html").read_text()
    assert "What single columns tell of the label" in page and "class never" in page
    for row in rows:
        assert f">{row['column']}</td>" in page and f"{row['iv']:.4g}</td>" in page
    assert "late missing" not in page
    assert {row["party"] for row in read(folder, "grocer", "summary.json")["information"]} == {"grocer"}


def test_the_ledger_has_one_word_a_column_and_the_counts_a_phase(finished):
    folder, bins, _ = finished
    lines = [json.loads(line) for line in (folder / "out" / "telco" / "ledger.jsonl").read_text().splitlines()]
    told = [line for line in lines if line.get("kind") == "ColumnValue"]
    assert len(told) == bins["telco"].shape[1] and {(line["to"], line["class"]) for line in told} == {
        ("bank", "aggregate")
    }
    assert {line["phase"] for line in told} == {"information"}


def test_the_closing_table_shows_a_columns_name_as_it_is():
    summary: Any = dict.fromkeys(("title", "party", "role"), "") | dict.fromkeys(("rows_train", "rows_test"), 1)
    summary |= {"rows": {"kept": 1, "read": 1}, "intersection": 1, "parties": [], "converged": True, "exchanges": 1}
    summary |= {"seconds": 0.0, "seconds_by_phase": {}, "bytes_by_phase": {}, "bytes_sent": {}, "notes": []}
    summary |= {"encryption": {}, "information": [{"party": "", "column": "spent [eur]", "iv": 0.5}]}
    with out.capture() as shown:
        out.print(closing_table(summary))
    assert "spent [eur] 0.500" in shown.get()


# ---- what is refused before anything is sent


@pytest.mark.parametrize("kind", ["linear regression", "poisson regression", "network regressor"])
def test_a_label_without_classes_is_refused_with_the_agreement(kind):
    with pytest.raises(ValueError, match=r"\[information\] is about classes, and a .* has none; take it out"):
        agreed(["bank", "grocer"], model={"kind": kind}, information={"allowed_counts": 10})


def test_more_counts_than_agreed_stop_us_before_anybody_is_met(tmp_path):
    tables = customers(100)
    bank = tables["bank"].assign(bad=np.where(tables["bank"].pop("pays") == "late", "yes", "no"))
    paths = build(tmp_path, {"bank": bank, "grocer": tables["grocer"]}, model=INFORMATION.replace("60", "7"))
    code, _, error = colonnade("run", paths["grocer"])
    assert code == 3 and "8 counts of the label by bin, 7 allowed" in error
    assert not (tmp_path / "out" / "grocer" / "ledger.jsonl").exists()
    code, out, _ = colonnade("check", paths["bank"])
    assert code == 0 and "up to 7 exact numbers about the label" in " ".join(out.replace("│", " ").split())


# ---- what is told, in memory

ROWS = 300
RNG = np.random.default_rng(5)
COLUMNS = {
    "bank": pd.DataFrame({"age": RNG.normal(size=ROWS)}),
    "grocer": pd.DataFrame({"size": RNG.normal(size=ROWS), "job": RNG.choice(["clerk", "nurse"], ROWS, p=[0.2, 0.8])}),
}
JOB = Preparation(categories={"job": CategoryColumn(values=("clerk", "nurse"))})


def play(y: np.ndarray, *, tells: bool = True, **options: Any) -> dict[str, Any]:
    def role(session: Session) -> Any:
        mine = session.is_label_holder
        return measure(session, COLUMNS[session.name], Preparation() if mine else JOB, y if mine else None)

    information = {"allowed_counts": 20, "values_to_label_holder": tells}
    known = agreed(list(COLUMNS), encryption={"scheme": "lattice"}, information=information)
    return outcomes(dict.fromkeys(COLUMNS, role), **known, **options)


Y = RNG.integers(0, 2, ROWS)


def test_nothing_is_told_unless_the_agreement_says_so():
    recorded: Any = {}
    ended = play(Y, tells=False, recorded=recorded)
    assert [row["party"] for row in ended["bank"]["values"]] == ["bank"]
    assert "ColumnValue" not in kinds(recorded, "grocer", "bank")
    known = agreed(list(COLUMNS))
    without = outcomes(dict.fromkeys(COLUMNS, lambda s: measure(s, COLUMNS[s.name], JOB, Y)), **known)
    assert without == {"bank": {}, "grocer": {}}


def test_a_value_is_told_to_three_decimals_and_no_bin():
    recorded: Any = {}
    ended = play(Y, recorded=recorded)
    told = sent(recorded, "grocer", "bank", ColumnValue)
    values = [row["iv"] for row in ended["grocer"]["values"]]
    assert [(one.name, one.left, one.data.tolist()) for one in told] == [
        ("size", 1, [round(values[0], 3)]),
        ("job", 0, [round(values[1], 3)]),
    ]
    assert set(kinds(recorded, "grocer", "bank")) == {"Hello", "Plan", "SealedGradient", "ColumnValue", "Closing"}


@pytest.mark.parametrize("positives", [1, 9, ROWS - 9])
def test_a_label_holder_that_asks_for_the_bins_of_few_rows_hears_nothing(positives):
    """A single row as a class of its own: the value would tell which bin it is in, as bins have different sizes."""
    recorded: Any = {}
    ended = play((np.arange(ROWS) < positives).astype(int), recorded=recorded)
    assert isinstance(ended["grocer"], Refused) and "fewer than 10" in str(ended["grocer"])
    assert isinstance(ended["bank"], PeerAborted) and "ColumnValue" not in kinds(recorded, "grocer", "bank")


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        ({"left": 20}, 0),
        ({"left": 1}, 1),
        ({"data": np.ones(3)}, 0),
        ({"data": np.array([-0.1])}, 0),
        ({"data": np.array([np.nan])}, 0),
        ({"name": "x" * 201}, 1),
    ],
    ids=["more than counts", "one that was told", "other classes", "negative", "no number", "long"],
)
def test_values_that_cannot_be_are_noticed(fields, at):
    ended = play(Y, tamper=altering("grocer", "bank", ColumnValue, with_fields(**fields), at=at))
    assert isinstance(ended["bank"], ProtocolViolation) and ended["bank"].peer == "grocer"


def test_the_section_is_part_of_what_is_signed():
    one, other = (agreed(["bank", "grocer"], information={"allowed_counts": count})["agreement"] for count in (10, 11))
    assert isinstance(one, Agreement)
    assert one.digest != msgspec.structs.replace(one, information=other.information).digest
