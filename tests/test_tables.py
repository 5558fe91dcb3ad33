"""Tables from CSV, Parquet, SQLite and PostgreSQL: what is read, what is refused, and how much memory it takes."""

from __future__ import annotations

import csv
import errno
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import parties.databases
import parties.tables
from parties.errors import LocalError
from parties.files import Scratch
from parties.tables import Source, Table, read_table

ROOT = Path(__file__).resolve().parents[1]
relaxed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(folder: Path, content: Any, name: str = "") -> Path:
    """A table of CSV text, CSV bytes, or whatever Parquet can hold."""
    path = folder / (name or ("clients.csv" if isinstance(content, (str, bytes)) else "clients.parquet"))
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, pd.DataFrame):
        content.to_parquet(path)
    else:
        pq.write_table(content if isinstance(content, pa.Table) else pa.table(content), path)
    return path


def table(folder: Path, content: Any, name: str = "", separator: str = ",", **options: Any) -> Table:
    source = Source(written(folder, content, name), separator)
    return read_table(source, ["id"], options.pop("features", ["x"]), **options)


def ids(found: Table, name: str = "id") -> list[str]:
    return found.ids[name].to_pylist()


def complaint(read: Callable[[], Any]) -> str:
    with pytest.raises(LocalError) as caught:
        read()
    said = str(caught.value)
    assert "\n" not in said and "hush" not in said
    return said


# ---- what is read, of files


STRANGE_IDS = ["007", "NA", "null", "None", "nan", "1e5", "True", "-0", " a b ", "1.23E+10"]


def test_csv_ids_are_text_as_written(tmp_path: Path) -> None:
    text = "id,x\n" + "".join(f"{value},{number}\n" for number, value in enumerate(STRANGE_IDS))
    assert ids(table(tmp_path, text)) == STRANGE_IDS


def test_parquet_text_that_is_not_utf8_is_refused_without_a_quotation(tmp_path: Path) -> None:
    spoilt = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ab\xff\xfe")]
    )
    pq.write_table(pa.table({"id": spoilt}), tmp_path / "t.parquet")
    with pytest.raises(LocalError, match=r"t.parquet, column 'id': the text is not UTF-8; write it as UTF-8") as caught:
        read_table(Source(tmp_path / "t.parquet"), ["id"])
    assert "xff" not in str(caught.value)


def test_parquet_ids_are_text_as_stored(tmp_path: Path) -> None:
    numbers = list(range(len(STRANGE_IDS)))
    assert ids(table(tmp_path, {"id": STRANGE_IDS, "x": numbers})) == STRANGE_IDS
    assert ids(table(tmp_path, {"id": [7, 2**60 + 1], "x": [1, 2]})) == ["7", str(2**60 + 1)]
    assert ids(table(tmp_path, {"id": pd.Categorical(["b", "a"]), "x": [1, 2]})) == ["b", "a"]


def test_an_empty_id_is_kept_for_the_identifiers_to_judge(tmp_path: Path) -> None:
    assert ids(table(tmp_path, "id,x\n,1\nb,2\n")) == ["", "b"]
    assert ids(table(tmp_path, {"id": [None, "b"], "x": [1, 2]})) == ["", "b"]


def test_only_the_declared_columns_are_read_in_the_declared_order(tmp_path: Path) -> None:
    content = "z,b,id,a,y,born\nsecret,2,k,1,1,1970\nsecret,4,l,3,0,1980\n"
    found = read_table(Source(written(tmp_path, content)), ["id", "born"], ["a", "b"], "y")
    assert {name: values.tolist() for name, values in found.features.items()} == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert list(found.features) == ["a", "b"]
    assert {name: ids(found, name) for name in found.ids} == {"id": ["k", "l"], "born": ["1970", "1980"]}
    assert found.label is not None and found.label.tolist() == [1.0, 0.0]
    assert {values.dtype for values in found.features.values()} == {np.dtype(np.float64)}
    assert repr(found) == "Table(source='clients.csv', rows=2)"


CATEGORIES: dict[str, tuple[Any, list[str]]] = {
    "CSV": ("id,x,c\na,1,NA\nb,2,\nc,3, red \n", ["NA", "", " red "]),
    "dictionary": ({"id": list("abc"), "x": [1, 2, 3], "c": pd.Categorical(["b", None, "r"])}, ["b", "", "r"]),
    "whole numbers": ({"id": list("abc"), "x": [1, 2, 3], "c": pa.array([7, None, 2**60])}, ["7", "", str(2**60)]),
    "truth values": ({"id": list("abc"), "x": [1, 2, 3], "c": [True, None, False]}, ["True", "", "False"]),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), CATEGORIES.values(), ids=CATEGORIES)
def test_categories_are_text_as_written_among_the_features(content: Any, expected: list[str], tmp_path: Path) -> None:
    found = table(tmp_path, content, features=["c", "x"], categories=["c"])
    assert list(found.features) == ["c", "x"] and found.features["x"].dtype == np.float64
    assert found.features["c"].dtype == object and found.features["c"].tolist() == expected


def test_equal_categories_share_memory(tmp_path: Path) -> None:
    content = {"id": list(map(str, range(1000))), "c": ["red", "blue"] * 500}
    found = table(tmp_path, content, features=["c"], categories=["c"])
    assert found.features["c"].tolist() == content["c"]
    assert len({id(word) for word in found.features["c"]}) == 2


def test_categories_of_several_chunks(small_chunks: None, tmp_path: Path) -> None:
    content = {"id": list(map(str, range(20))), "c": ["red", "", "blue", "red"] * 5}
    assert table(tmp_path, content, features=["c"], categories=["c"]).features["c"].tolist() == content["c"]


def test_numbers_may_be_missing_where_that_is_said(tmp_path: Path) -> None:
    content = "id,x,z\na,,1\nb,NA,2\nc,3,4\n"
    found = table(tmp_path, content, features=["x", "z"], gaps=["x"])
    np.testing.assert_array_equal(found.features["x"], [np.nan, np.nan, 3.0])
    stored = {"id": ["a", "b"], "x": pa.array([None, 2], pa.int64())}
    np.testing.assert_array_equal(table(tmp_path, stored, gaps=["x"]).features["x"], [np.nan, 2.0])
    said = complaint(lambda: table(tmp_path, content.replace("NA", "hush"), features=["x", "z"], gaps=["x"]))
    assert "unusable values: 'x' 1 not numbers;" in said
    assert "'x' 2 missing" in complaint(lambda: table(tmp_path, content, features=["x", "z"], gaps=["z"]))


def test_categories_stored_as_floats_are_refused(tmp_path: Path) -> None:
    stored = {"id": ["a", "b"], "x": [1.5, 2.0]}
    said = complaint(lambda: table(tmp_path, stored, categories=["x"]))
    assert "column 'x': categories are stored as double; store them as text" in said


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (b"\xef\xbb\xbfid,x\na,1\n", {}),
        ("id;x\na;1\n", {"separator": ";"}),
        ("id\tx\na\t1\n", {"separator": "\t"}),
        ('"id","x"\r\n"a","1"\r\n', {}),
        ("id,x\n\na,1\n\n", {}),
        ("id,x\na,1", {}),
        ("id,x,z,z\na,1,2,3\n", {}),
        (pd.DataFrame({"id": ["a"], "x": [1]}), {"name": "CLIENTS.PARQUET"}),
        (pd.DataFrame({"id": ["a"], "x": [1]}).set_index("id"), {}),
        ({"id": ["a"], "x": pa.array([1], pa.decimal128(5, 2))}, {"name": "clients.pq"}),
        ({"id": pa.array(["a"], pa.large_string()), "x": pa.array([np.float16(1)])}, {}),
        ({"id": ["a"], "x": [True]}, {}),
    ],
    ids=["BOM", "semicolon", "tab", "quotes and CRLF", "blank lines", "no last newline", "other columns twice",
         "PARQUET", "index", "pq decimal", "large and small", "truth value"],
)  # fmt: skip
def test_common_ways_to_write_a_table_all_read(content: Any, options: dict[str, Any], tmp_path: Path) -> None:
    found = table(tmp_path, content, **options)
    assert (ids(found), found.features["x"].tolist(), len(found), found.rows) == (["a"], [1.0], 1, 1)


def test_ids_of_a_megabyte_and_lines_within_values_are_read(tmp_path: Path) -> None:
    long = ["a" * 10**6, "b\n" * 400_000, "c"]
    text = "id,x\n" + "".join(f'"{value}",1\n' for value in long * 5)
    assert ids(table(tmp_path, text)) == long * 5
    assert ids(table(tmp_path, {"id": long, "x": [1, 2, 3]})) == long
    said = complaint(lambda: table(tmp_path, f"id,x\n{'hush' * 5 * 10**6},1\n"))
    assert "a row of more than 2 MiB" in said


# ---- what is refused, of files


def two(column: list[Any]) -> dict[str, Any]:
    return {"id": ["hush1", "hush2", "hush3"][: len(column)], "x": column}


BAD_TABLES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty file": ("", {}, "is empty"),
    "header only": ("id,x\n", {}, "has no rows"),
    "header only, no newline": ("id,x", {}, "has no rows"),
    "no rows in Parquet": ({"id": pa.array([], pa.string()), "x": pa.array([], pa.float64())}, {}, "has no rows"),
    "missing column": ("id,z\nhush,1\n", {}, "lacks the columns 'x'"),
    "missing id": ("ID,x\nhush,1\n", {}, "lacks the columns 'id'"),
    "missing in Parquet": ({"id": ["hush"]}, {}, "lacks the columns 'x'"),
    "wrong separator": ("id;x\nhush;1\n", {}, "one field with ';' in it; set separator = ';'"),
    "unnamed column": ("id,x,,\nhush,1,2,3\n", {}, "2 columns without a name"),
    "unnamed with blanks": ("id,x, \nhush,1,2\n", {}, "1 columns without a name"),
    "duplicate feature": ("id,x,x\nhush,1,2\n", {}, "2 columns named 'x'"),
    "duplicate id": ("id,x,id,id\nhush,1,2,3\n", {}, "3 columns named 'id'"),
    "duplicate in Parquet": (
        pa.Table.from_arrays([pa.array(["hush"]), pa.array([1]), pa.array([2])], names=["id", "x", "x"]),
        {},
        "2 columns named 'x'",
    ),
    "declared twice": ("id,x\nhush,1\n", {"features": ["x", "x"]}, "'x' is declared more than once"),
    "label is a feature": ("id,x\nhush,1\n", {"label": "x"}, "'x' is declared more than once"),
    "Latin-1": ("id,x\nhushé,1\n".encode("latin-1"), {}, "is not UTF-8"),
    "UTF-16": ("id,x\nhush,1\n".encode("utf-16"), {}, "is not UTF-8"),
    "open quote": ('id,x\n"hush,1\nb,2\n', {}, "check quotes"),
    "long open quote": ('id,x\n"hush,1\n' + "b,2\n" * 3_000_000, {}, "check quotes"),
    "missing values": ("id,x\nhush,\nb,NA\nc,1\n", {}, "'x' 2 missing"),
    "NaN": ("id,x\na,nan\nb,NaN\nc,1\nd,-nan\n", {}, "'x' 2 missing; 'x' 1 not numbers"),
    "not numbers": ("id,x\na,hush\nb,12 hush\nc,1\n", {}, "'x' 2 not numbers"),
    "infinite": ("id,x\na,inf\nb,-inf\nc,1e999\n", {}, "'x' 3 infinite"),
    "several faults": ("id,x,z\na,,hush\nb,1,2\n", {"features": ["x", "z"]}, "'x' 1 missing; 'z' 1 not numbers"),
    "a short row": ("id,x\nhush\nb,1\n", {}, "not a table of rows as long as its header"),
    "a long row": ("id,x,z\nhush,1,2,3\nb,4,5,6\n", {}, "not a table of rows as long as its header"),
    "long rows": ("id,x\nhush,1,2\nb,3,4\n", {}, "not a table of rows as long as its header"),
    "a long last row": ("id,x\na,1\n" + "b,2\n" * 2_000_000 + "hush,2,3\n", {}, "not a table of rows as long as"),
    "missing in Parquet values": (two([1.5, None, float("nan")]), {}, "'x' 2 missing"),
    "infinite in Parquet": (two([1.5, float("inf")]), {}, "'x' 1 infinite"),
    "text in Parquet": (two(["hush", "1"]), {}, "'x' 1 not numbers"),
    "lists in Parquet": (two([[1], [2]]), {}, "'x' 2 not numbers"),
    "float ids in Parquet": ({"id": [1234567.0], "x": [1]}, {}, "column 'id': ids are stored as floats"),
    "bytes as ids in Parquet": ({"id": [b"hush"], "x": [1]}, {}, "column 'id': ids are stored as binary"),
    "lists as ids in Parquet": ({"id": [["hush"]], "x": [1]}, {}, "column 'id': ids are stored as list"),
    "decimal ids": ({"id": [Decimal("1.50")], "x": [1]}, {}, "column 'id': ids are stored as decimal128(3, 2)"),
    "spans as ids": ({"id": [timedelta(1)], "x": [1]}, {}, "column 'id': ids are stored as duration[us]"),
    "dates as features": (two([date(1970, 1, 1), None]), {}, "'x' 1 missing; 'x' 1 not numbers"),
    "times as features": (two([datetime(1970, 1, 1)]), {}, "'x' 1 not numbers"),
    "spans as features": (two([timedelta(1)]), {}, "'x' 1 not numbers"),
    "not Parquet": (b"hush", {"name": "clients.parquet"}, "is not a readable Parquet file"),
    "label missing": ("id,x,y\na,1,0\nb,1,\nc,1,1\n", {"label": "y"}, "column 'y': 1 labels are missing"),
    "label of blanks": ("id,x,y\na,1,0\nb,1, \nc,1,1\n", {"label": "y"}, "column 'y': 1 labels are missing"),
    "label missing in Parquet": (two([1, 2]) | {"y": [1, None]}, {"label": "y"}, "column 'y': 1 labels are missing"),
    "label NaN": (two([1, 2, 3]) | {"y": [0.0, math.nan, 1.0]}, {"label": "y"}, "column 'y': 1 labels are missing"),
    "label constant": ("id,x,y\na,1,hush\nb,1,hush\n", {"label": "y"}, "column 'y': the label is constant"),
    "label of three": ("id,x,y\na,1,0\nb,1,hush\nc,1,1\n", {"label": "y"}, "column 'y': the label is one of 3 values"),
    "label not 0 and 1": ("id,x,y\na,1,hush\nb,1,no\n", {"label": "y"}, "column 'y': the label is not 0 and 1"),
    "positive not there": ("id,x,y\na,1,hush\nb,1,no\n", {"label": "y", "positive": "yes"}, "column 'y': no label"),
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_a_bad_table_is_refused_with_file_column_and_count_but_no_value(what: str, tmp_path: Path) -> None:
    content, options, text = BAD_TABLES[what]
    said = complaint(lambda: table(tmp_path, content, **options))
    assert text in said
    assert "clients" in said or "declared" in said


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "nowhere.csv does not exist" in complaint(lambda: read_table(Source(tmp_path / "nowhere.csv"), ["id"]))
    assert "the folder has no .parquet files" in complaint(lambda: read_table(Source(tmp_path), ["id"]))
    assert "the folder has no .parquet files" in complaint(lambda: read_table(Source(tmp_path), ["id"]))


@pytest.mark.parametrize(
    ("values", "positive"),
    [(["1", "0"], ""), (["1.0", "0.0"], ""), (["yes", "no"], "yes"), (["0", "1"], "0"), (["B", "A"], "B")],
)
def test_a_label_of_two_values_is_read_as_declared(values: list[str], positive: str, tmp_path: Path) -> None:
    text = "id,x,y\n" + "".join(f"{number},1,{value}\n" for number, value in enumerate([*values, values[0]]))
    stored = {"id": ["a", "b", "c"], "x": [1, 2, 3], "y": [*values, values[0]]}
    for content in (text, stored):
        found = table(tmp_path, content, label="y", positive=positive)
        assert found.label is not None and found.label.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("values", "positive"),
    [([1, 0], ""), ([1.0, 0.0], ""), ([1.0, -0.0, 0.0], ""), ([True, False], "True"), ([0.5, 2.0], "0.5")],
)
def test_a_label_stored_as_a_number_or_truth_value_is_read(values: list[Any], positive: str, tmp_path: Path) -> None:
    found = table(tmp_path, two([5, 6, 7][: len(values)]) | {"y": values}, label="y", positive=positive)
    assert found.label is not None and found.label.tolist() == [1.0, 0.0, 0.0][: len(values)]


def test_whole_numbers_dates_times_and_uuids_become_their_text(tmp_path: Path) -> None:
    east = timezone(timedelta(hours=2))
    one = uuid.UUID("12345678-1234-5678-1234-567812345678")
    stored = {
        "id": pa.array([7, None, 2**60 + 1]),
        "numeric": pa.array([Decimal(12), None, Decimal(-(10**20))], pa.decimal128(38, 0)),
        "born": pa.array([date(1970, 1, 31), None, date(9999, 12, 31)]),
        "born64": pa.array([date(1970, 1, 31), None, date(9999, 12, 31)], pa.date64()),
        "seen": pa.array([datetime(2020, 1, 1, 10), None, datetime(2020, 1, 1, 10, 0, 0, 500_000)]),
        "second": pa.array([datetime(2020, 1, 1, 10), None, datetime(2020, 1, 1, 10, 0, 50)], pa.timestamp("s")),
        "zoned": pa.array([datetime(2020, 1, 1, 1, tzinfo=east), None, None], pa.timestamp("ms", "Europe/Paris")),
        "truth": pa.array([True, None, False]),
        "nothing": pa.nulls(3),
    }
    text = {
        "id": ["7", "", str(2**60 + 1)],
        "numeric": ["12", "", "-" + "1" + "0" * 20],
        "born": ["1970-01-31", "", "9999-12-31"],
        "born64": ["1970-01-31", "", "9999-12-31"],
        "seen": ["2020-01-01T10:00:00", "", "2020-01-01T10:00:00.5"],
        "second": ["2020-01-01T10:00:00", "", "2020-01-01T10:00:50"],
        "zoned": ["2019-12-31T23:00:00Z", "", ""],
        "truth": ["True", "", "False"],
        "nothing": ["", "", ""],
    }
    if hasattr(pa, "uuid"):  # an Arrow type since pyarrow 18
        stored["uuid"] = pa.ExtensionArray.from_storage(
            pa.uuid(), pa.array([one.bytes, None, bytes(16)], pa.binary(16))
        )
        text["uuid"] = [str(one), "", str(uuid.UUID(int=0))]
    found = read_table(Source(written(tmp_path, stored)), list(stored))
    assert {name: ids(found, name) for name in stored} == text


# ---- against plain Python and pandas


MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]


def plain_numbers(column: list[Any]) -> tuple[np.ndarray, dict[str, int]]:
    """What pandas makes of a feature, and the counts of what it cannot use."""
    cells = pd.Series([np.nan if cell is None or cell in MISSING else cell for cell in column], dtype=object)
    values = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    missing = int(cells.isna().sum())
    counts = {"missing": missing, "not numbers": int(np.isnan(values).sum()) - missing}
    return values, counts | {"infinite": int(np.isinf(values).sum())}


def check_numbers(read: Callable[[], Table], column: list[Any]) -> None:
    values, counts = plain_numbers(column)
    faults = [f"'x' {count} {word}" for word, count in counts.items() if count]
    if faults:
        assert "; ".join(faults) in complaint(read)
    else:  # pandas may miss the nearest float by one
        np.testing.assert_allclose(read().features["x"], values, rtol=1e-14, atol=0)


cell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
number = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(10**25), 10**25).map(str),
    st.sampled_from(["1.", ".5", "+1e5", "00.1", " 1", "1\t", "\n2 ", "1E+5", "-0", "1e-400"]),
)
odd = st.one_of(
    st.sampled_from([*MISSING, "inf", "-INF", "+Infinity", " inf", "NAN", "-nan", "True", "1,5", "1 2", "1e"]),
    st.sampled_from(
        [" ", ".", "+", "--1", "0x10", "1_0", "1d", "٣", "\u00a01", "1e5e", "e5", "1.2.3", "nan(1)", "NA "]
    ),
    st.text("0123456789+-.eE \t", max_size=4),
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, so that small tables have several."""
    monkeypatch.setattr(parties.tables, "BLOCK", 200)
    monkeypatch.setattr(parties.tables, "ROWS", 3)
    monkeypatch.setattr(parties.databases, "CHUNK_ROWS", 3)


@relaxed
@given(
    st.lists(st.tuples(cell, st.one_of(number, number, number, odd)), min_size=1, max_size=30),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_any_csv_reads_as_plain_python_reads_it(
    small_chunks: None, tmp_path: Path, rows: list[tuple[str, str]], end: str, quoted: bool
) -> None:
    path = tmp_path / "clients.csv"
    quoted = quoted or any("\r" in value for row in rows for value in row)  # which csv.writer leaves bare
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
        writer.writerows([("z", "id", "x"), *(("zz", *row) for row in rows)])
    assert ids(read_table(Source(path), ["id"])) == [row[0] for row in rows]
    check_numbers(lambda: read_table(Source(path), ["id"], ["x"]), [row[1] for row in rows])


stored_ids = st.one_of(
    st.lists(st.none() | cell, min_size=1, max_size=12),
    st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=12),
    st.lists(st.none() | st.dates(), min_size=1, max_size=12),
    st.lists(st.none() | st.datetimes(), min_size=1, max_size=12),
)
stored_numbers = st.one_of(
    st.lists(st.none() | st.floats(), min_size=12, max_size=12),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=12, max_size=12),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=12, max_size=12),
    st.lists(st.none() | number | odd, min_size=12, max_size=12),
    st.lists(st.decimals(-1000, 1000, places=3), min_size=12, max_size=12),
    st.lists(st.none() | st.booleans(), min_size=12, max_size=12),
)


def plain_text(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").rstrip("0").rstrip(".")
    return "" if value is None else value.isoformat() if isinstance(value, date) else str(value)


@relaxed
@given(stored_ids, stored_numbers, st.integers(1, 12))
def test_any_parquet_folder_reads_as_one_table(
    small_chunks: None, tmp_path: Path, column: list[Any], features: list[Any], split: int
) -> None:
    whole = pa.table({"id": pa.array(column), "x": pa.array(features[: len(column)]), "z": column})
    folder = tmp_path / "parts"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("notes.txt", "._part-00.parquet"):
        (folder / name).write_text("not a table")
    for part, start in enumerate(range(0, len(column), split)):
        pq.write_table(whole.slice(start, split), folder / f"part-{part:02}.parquet", row_group_size=2)
    assert ids(read_table(Source(folder), ["id"])) == [plain_text(value) for value in column]
    check_numbers(lambda: read_table(Source(folder), ["id"], ["x"]), features[: len(column)])


def test_the_files_of_a_folder_must_agree(tmp_path: Path) -> None:
    written(tmp_path, {"id": ["hush"], "x": [1]}, "a.parquet")
    written(tmp_path, {"id": ["hush"], "x": [1.5]}, "b.parquet")
    written(tmp_path, {"id": pa.nulls(1), "x": pa.array([2], pa.decimal128(3, 1))}, "c.parquet")
    found = read_table(Source(tmp_path), ["id"], ["x"])
    assert (ids(found), found.features["x"].tolist()) == (["hush", "hush", ""], [1.0, 1.5, 2.0])
    written(tmp_path, {"id": [7], "x": ["1"]}, "d.parquet")
    said = complaint(lambda: read_table(Source(tmp_path), ["id"], ["x"]))
    assert "column 'id': stored as string in a.parquet and as int64 in d.parquet" in said
    written(tmp_path, {"id": ["7"], "x": ["1"]}, "d.parquet")
    assert "column 'x': stored as int64 in a" in complaint(lambda: read_table(Source(tmp_path), ["id"], ["x"]))
    written(tmp_path, {"id": ["7"]}, "d.parquet")
    assert "d.parquet lacks the columns 'x'" in complaint(lambda: read_table(Source(tmp_path), ["id"], ["x"]))


# ---- a file that changes while it is read


def more(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"d,4\n")


@pytest.mark.parametrize("change", [more, lambda path: path.write_bytes(b"id,x\nhush,1\nb"), Path.unlink])
def test_a_csv_file_that_changes_while_it_is_read_is_refused(change: Callable[[Path], Any], tmp_path: Path) -> None:
    path = written(tmp_path, "id,x\nhush,1\nb,2\n")
    said = complaint(lambda: read_table(Source(path), ["id"], ["x"], progress=lambda rows: change(path)))
    assert f"{path} changed while it was read; run again" in said or f"{path} does not exist" in said


def test_a_csv_file_that_becomes_half_a_row_says_that_it_changed(small_chunks: None, tmp_path: Path) -> None:
    path = written(tmp_path, "id,x\n" + "hush,1\n" * 100_000)
    said = complaint(lambda: read_table(Source(path), ["id"], progress=lambda rows: os.truncate(path, 350_001)))
    assert "changed while it was read" in said


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    written(tmp_path, {"id": ["a"]}, "a.parquet")
    read_table(Source(tmp_path), ["id"])
    said = complaint(
        lambda: read_table(Source(tmp_path), ["id"], progress=lambda n: written(tmp_path, {"id": ["b"]}, "b.parquet"))  # type: ignore[arg-type,return-value]
    )
    assert f"{tmp_path} changed while it was read" in said


def test_progress_counts_the_rows_so_far(small_chunks: None, tmp_path: Path) -> None:
    heard: list[int] = []
    read_table(Source(written(tmp_path, {"id": list("abcdefgh")})), ["id"], progress=heard.append)
    assert heard == [3, 6, 8]


# ---- memory


MEASURE = """
import sys
import pandas  # pyarrow loads it when it converts values
from pathlib import Path
from parties.files import Scratch
from parties.tables import Source, read_table

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

path, folder, *features = sys.argv[1:]
before = status("VmRSS")
table = read_table(Source(path), ["id"], features, scratch=Scratch(Path(folder) if folder else None, 1 << 20))
kept = table.ids["id"].nbytes + sum(values.nbytes for values in table.features.values())
print(table.rows, kept, status("VmHWM") - before, status("VmRSS") - before, sep="\\n")
"""


def measured(*arguments: Path | str) -> list[int]:
    """Rows, bytes of what is kept, and by how many bytes memory grew at its peak and in the end."""
    run = subprocess.run([sys.executable, "-c", MEASURE, *arguments], cwd=ROOT, capture_output=True, check=True)
    return [int(line) for line in run.stdout.split()]


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc"
)


@needs_proc
def test_two_million_rows_take_little_more_memory_than_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "clients.csv"
    block = "".join(f"{'never loaded' * 12},{number:07},{number}\n" for number in range(100_000))
    with path.open("w") as file:
        file.write("other,id,x\n")
        for _ in range(20):
            file.write(block)
    size = path.stat().st_size
    rows, kept, peak, _ = measured(path, "", "x")
    assert rows == 2_000_000 and size > 300 << 20
    assert peak < kept + (160 << 20) < size - (80 << 20)  # Arrow reads some blocks ahead


@needs_proc
def test_with_scratch_files_what_is_kept_need_not_be_in_memory(tmp_path: Path) -> None:
    numbers = pa.array(range(1_000_000))
    features = {f"x{number}": numbers for number in range(10)}
    path = written(tmp_path, {"id": numbers} | features)
    rows, kept, _, after = measured(path, tmp_path, *features)
    assert rows == 1_000_000 and kept > 80 << 20
    assert after < kept - (20 << 20)
    assert list(tmp_path.iterdir()) == [path]


# ---- SQLite


def database(folder: Path, columns: str, rows: list[tuple[Any, ...]]) -> Source:
    path = folder / "clients.sqlite"
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute(f"CREATE TABLE clients ({columns})")
    connection.executemany(f"INSERT INTO clients VALUES ({', '.join('?' * len(rows[0]))})", rows)
    connection.commit()
    connection.close()
    return Source(path, sql_table="clients")


@relaxed
@given(
    st.lists(
        st.tuples(
            st.none() | st.integers(-(2**63), 2**63 - 1) | cell,
            st.none() | number | odd | st.floats(allow_nan=False) | st.integers(-(2**63), 2**63 - 1),
            st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_sqlite_table_reads_as_plain_python_reads_it(
    small_chunks: None, tmp_path: Path, rows: list[tuple[Any, ...]]
) -> None:
    source = database(tmp_path, "id, x, n", rows)
    found = read_table(source, ["id"], ["n"])
    assert ids(found) == [plain_text(row[0]) for row in rows]
    assert found.features["n"].tolist() == [float(row[2]) for row in rows]
    check_numbers(lambda: read_table(source, ["id"], ["x"]), [row[1] for row in rows])


def test_sqlite_reads_views_in_the_declared_order(small_chunks: None, tmp_path: Path) -> None:
    source = database(tmp_path, 'id TEXT, "a ""b"" -- ?" REAL, y', [("c", 3, 0), ("a", 1, 1.0), ("b", 2, 0)])
    with sqlite3.connect(source.path) as connection:
        connection.execute("CREATE VIEW some AS SELECT * FROM clients WHERE y = 0")
    name = 'a "b" -- ?'
    found = read_table(Source(source.path, sql_table="main.clients", order_by=name), ["id"], [name], "y")
    assert (ids(found), found.features[name].tolist()) == (["a", "b", "c"], [1.0, 2.0, 3.0])
    assert found.label is not None and found.label.tolist() == [1.0, 0.0, 0.0]
    assert ids(read_table(Source(source.path, sql_table="some"), ["id"])) == ["c", "b"]
    assert found.source == "clients.sqlite, table 'main.clients'"


def test_sqlite_numbers_beside_text_keep_all_their_digits(tmp_path: Path) -> None:
    source = database(tmp_path, "id, x", [("a", 0.1 + 0.2), ("b", " 3 "), ("c", 2**53 - 1), ("d", 1e300)])
    assert read_table(source, ["id"], ["x"]).features["x"].tolist() == [0.1 + 0.2, 3.0, 2.0**53 - 1, 1e300]


def test_sqlite_categories_and_gaps(small_chunks: None, tmp_path: Path) -> None:
    source = database(tmp_path, "id, x, c", [("a", None, "red"), ("b", 2.5, None), ("c", 3, 7)])
    found = read_table(source, ["id"], ["x", "c"], categories=["c"], gaps=["x"])
    np.testing.assert_array_equal(found.features["x"], [np.nan, 2.5, 3.0])
    assert found.features["c"].tolist() == ["red", "", "7"]
    said = complaint(lambda: read_table(source, ["id"], ["x"], categories=["x"]))
    assert "column 'x': 1 categories are stored as floats; store them as text" in said


SQLITE_FAULTS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no such table": ({"sql_table": 'clients" --'}, ["id"], "has no table or view 'clients\" --'"),
    "no such schema": ({"sql_table": "other.clients"}, ["id"], "has no table or view 'other.clients'"),
    "no such column": ({}, ["nowhere"], "lacks the columns 'nowhere'; it has 4 others"),
    "no such order": ({"order_by": "id desc"}, ["id"], "lacks the column 'id desc'; correct order_by"),
    "floats": ({}, ["f"], "column 'f': 2 ids are stored as floats and 1 ids are stored as blobs; store them as text"),
    "not UTF-8": ({}, ["bad"], "holds text that is not UTF-8"),
}


@pytest.mark.parametrize("what", SQLITE_FAULTS)
def test_what_sqlite_cannot_give_is_one_clear_line(what: str, tmp_path: Path) -> None:
    options, columns, text = SQLITE_FAULTS[what]
    rows = [("hush", 1.5, 0, "a"), ("b", 2.5, 0, "a"), ("c", b"hush", 0, "a"), ("d", 4, 0, "a")]
    source = database(tmp_path, "id, f, x, bad", rows)
    with sqlite3.connect(source.path) as connection:
        connection.execute("UPDATE clients SET bad = CAST(x'68757368ff' AS TEXT)")
    assert text in complaint(lambda: read_table(Source(source.path, **{"sql_table": "clients"} | options), columns))


def test_an_sqlite_file_that_is_none_or_is_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, b"hush" * 300, "clients.db")
    assert "is not an SQLite database" in complaint(lambda: read_table(Source(path, sql_table="t"), ["id"]))
    assert "nowhere.db does not exist" in complaint(
        lambda: read_table(Source(tmp_path / "nowhere.db", sql_table="t"), ["id"])
    )
    source = database(tmp_path, "id", [("hush",)])
    monkeypatch.setattr(parties.databases, "CONNECT_SECONDS", 0.1)
    writer = sqlite3.connect(source.path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    assert "is locked by another program" in complaint(lambda: read_table(source, ["id"]))
    writer.close()
    with sqlite3.connect(source.path) as connection:
        connection.execute("DELETE FROM clients")
    assert "has no rows" in complaint(lambda: read_table(source, ["id"]))


def test_sqlite_is_opened_for_reading_only(tmp_path: Path) -> None:
    source = database(tmp_path, "id", [("a",)])

    def write() -> None:
        with parties.databases._sqlite(source) as connection:
            connection.execute("DELETE FROM clients")

    assert "SQLITE_READONLY" in complaint(write)
    assert ids(read_table(source, ["id"])) == ["a"]


def test_sqlite_is_read_in_one_state(small_chunks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = database(tmp_path, "id", [(number,) for number in range(50)])
    sqlite3.connect(source.path).execute("PRAGMA journal_mode=WAL").close()

    def insert(rows: int) -> None:
        with sqlite3.connect(source.path) as connection:
            connection.execute("INSERT INTO clients VALUES (?)", (1000 + rows,))
        connection.close()

    select = parties.databases._select
    monkeypatch.setattr(parties.databases, "_select", lambda *given: insert(0) or select(*given))
    assert ids(read_table(source, ["id"], progress=insert)) == [str(number) for number in range(50)]
    monkeypatch.undo()
    assert read_table(source, ["id"]).rows == 50 + 1 + math.ceil(50 / 3)


# ---- PostgreSQL


ADDRESS = os.environ.get("COLONNADE_TEST_POSTGRES", "")
needs_server = pytest.mark.skipif(not ADDRESS, reason="no PostgreSQL server: COLONNADE_TEST_POSTGRES is not set")


def execute(*statements: str) -> None:
    from adbc_driver_postgresql import dbapi

    with dbapi.connect(ADDRESS) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        connection.commit()


@pytest.fixture
def schema() -> Iterator[str]:
    """A schema of our own, with a quote in its name."""
    name = f"it's {uuid.uuid4().hex[:8]}"
    execute(f'CREATE SCHEMA "{name}"')
    yield name
    execute(f'DROP SCHEMA "{name}" CASCADE')


@needs_server
def test_postgresql_reads_every_type_that_has_one_text(schema: str) -> None:
    columns = {
        "t": ("text", "' NA '", " NA "),
        "v": ("varchar(9)", "'007'", "007"),
        "c": ("char(5)", "'ab'", "ab"),
        "i": ("int", "7", "7"),
        "b": ("bigint", "1152921504606846977", str(2**60 + 1)),
        "n": ("numeric(30,0)", "100000000000000000000", "1" + "0" * 20),
        "d": ("date", "'1970-01-31'", "1970-01-31"),
        "s": ("timestamp", "'2020-01-01 10:00:00.50'", "2020-01-01T10:00:00.5"),
        "z": ("timestamptz", "'2020-01-01 01:00+02'", "2019-12-31T23:00:00Z"),
        "u": ("uuid", "'12345678-1234-5678-1234-567812345678'", "12345678-1234-5678-1234-567812345678"),
        "truth": ("boolean", "true", "True"),
        'q" -- %s $1': (f'"{schema}".mood', "'it''s'", "it's"),
        "e": (f'"{schema}".short', "42", "42"),
    }
    quoted = {name: '"' + name.replace('"', '""') + '"' for name in columns}
    execute(
        f"CREATE TYPE \"{schema}\".mood AS ENUM ('it''s')",
        f'CREATE DOMAIN "{schema}".short AS numeric(9,0)',
        f'CREATE TABLE "{schema}".clients ({", ".join(f"{quoted[name]} {one[0]}" for name, one in columns.items())})',
        f'INSERT INTO "{schema}".clients VALUES ({", ".join(one[1] for one in columns.values())})',
        f'INSERT INTO "{schema}".clients DEFAULT VALUES',
        f"INSERT INTO \"{schema}\".clients (d, s, z) VALUES ('infinity', '-infinity', 'infinity')",
    )
    source = Source(ADDRESS, sql_table=f"{schema}.clients", order_by="t")
    found = read_table(source, list(columns))
    assert {name: ids(found, name) for name in columns} == {name: [one[2], "", ""] for name, one in columns.items()}


@needs_server
def test_postgresql_numbers_labels_and_order(schema: str) -> None:
    name = f'"{schema}".clients'
    execute(
        f"CREATE TABLE {name} (id text, i smallint, r real, d float8, n numeric, b boolean, t text, y numeric)",
        f"INSERT INTO {name} SELECT n::text, n, n / 2.0, 0.1 * n, n / 4.0, n % 2 = 0, ' ' || n || 'e0', n % 2 "
        "FROM generate_series(100, 1, -1) n",
        f'CREATE MATERIALIZED VIEW "{schema}".odd AS SELECT * FROM {name} WHERE i <= 50',
    )
    source = Source(ADDRESS, sql_table=f"{schema}.clients", order_by="i")
    found = read_table(source, ["id"], ["i", "r", "d", "n", "b", "t"], "y")
    n = np.arange(1, 101)
    expected = {"i": n, "r": n / 2, "n": n / 4, "b": n % 2 == 0, "t": n}
    assert ids(found) == list(map(str, n))
    assert all(np.array_equal(found.features[name], values) for name, values in expected.items())
    np.testing.assert_allclose(found.features["d"], 0.1 * n)
    assert found.label is not None and np.array_equal(found.label, n % 2)
    found = read_table(Source(ADDRESS, sql_table=f"{schema}.odd"), ["id"], ["n"], "b", "False")
    assert found.label is not None and (len(found), found.label.sum()) == (50, 25.0)


@needs_server
def test_postgresql_categories_and_gaps(schema: str) -> None:
    name = f'"{schema}".clients'
    execute(
        f"CREATE TABLE {name} (id text, x float8, c text, n int)",
        f"INSERT INTO {name} VALUES ('a', NULL, 'red', 7), ('b', 2.5, NULL, NULL)",
    )
    source = Source(ADDRESS, sql_table=f"{schema}.clients", order_by="id")
    found = read_table(source, ["id"], ["x", "c", "n"], categories=["c", "n"], gaps=["x"])
    np.testing.assert_array_equal(found.features["x"], [np.nan, 2.5])
    assert {column: found.features[column].tolist() for column in "cn"} == {"c": ["red", ""], "n": ["7", ""]}
    said = complaint(lambda: read_table(source, ["id"], ["x"], categories=["x"]))
    assert "column 'x': categories are stored as floats; store them as text, or read a view that does" in said


@needs_server
@pytest.mark.parametrize(
    ("type", "value", "what", "text"),
    [
        ("float8", "1234567", "id", "column 'c': ids are stored as floats"),
        ("numeric(9,2)", "1.5", "id", "column 'c': ids are stored as numeric(9,2)"),
        ("numeric", "1", "id", "column 'c': ids are stored as numeric; store them as text"),
        ("bytea", "'hush'", "id", "column 'c': ids are stored as bytea"),
        ("text[]", "'{hush}'", "id", "column 'c': ids are stored as text[]"),
        ("jsonb", "'\"hush\"'", "id", "column 'c': ids are stored as jsonb"),
        ("date", "'1970-01-01'", "x", "'c' 1 missing; 'c' 1 not numbers"),
        ("text", "'hush'", "x", "'c' 1 missing; 'c' 1 not numbers"),
        ("float8", "'NaN'", "x", "'c' 2 missing"),
        ("numeric", "'-Infinity'", "x", "'c' 1 missing; 'c' 1 infinite"),
        ("numeric", "1e400", "x", "reading stopped halfway"),
    ],
)
def test_what_postgresql_cannot_give_is_one_clear_line(
    schema: str, type: str, value: str, what: str, text: str
) -> None:
    execute(
        f'CREATE TABLE "{schema}".clients (id text, c {type})',
        f"INSERT INTO \"{schema}\".clients VALUES ('hush', {value}), ('hush', NULL)",
    )
    source = Source(ADDRESS, sql_table=f"{schema}.clients")
    columns = (["c"], []) if what == "id" else (["id"], ["c"])
    assert text in complaint(lambda: read_table(source, *columns))


@needs_server
def test_a_password_comes_from_the_environment_or_a_file_and_is_never_shown(
    schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Path(os.environ["PGPASSFILE"]).read_text() if "PGPASSFILE" in os.environ else ""
    password = os.environ.get("PGPASSWORD") or lines.strip().rpartition(":")[2]
    execute(f'CREATE TABLE "{schema}".clients (id text)', f"INSERT INTO \"{schema}\".clients VALUES ('a')")
    source = Source(ADDRESS, sql_table=f"{schema}.clients")
    for name in ("PGPASSWORD", "PGPASSFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "PGPASSWORD or ~/.pgpass" in complaint(lambda: read_table(source, ["id"]))
    monkeypatch.setenv("PGPASSWORD", "hush")
    said = complaint(lambda: read_table(source, ["id"]))
    assert "the server refuses the login" in said and password not in said
    monkeypatch.setenv("PGPASSWORD", password)
    assert ids(read_table(source, ["id"])) == ["a"]
    monkeypatch.delenv("PGPASSWORD")
    (tmp_path / "pgpass").write_text(f"*:*:*:*:{password}\n")
    (tmp_path / "pgpass").chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    assert ids(read_table(source, ["id"])) == ["a"]


@needs_server
def test_a_database_that_is_not_there_is_one_clear_line() -> None:
    head = ADDRESS.rpartition("/")[0]
    said = complaint(lambda: read_table(Source(f"{head}/nowhere", sql_table="t"), ["id"]))
    assert "the server has no such database or user" in said


@needs_server
def test_what_is_not_there_or_not_allowed_is_one_clear_line(schema: str) -> None:
    execute(
        f'CREATE TABLE "{schema}".clients (id text)',
        f"INSERT INTO \"{schema}\".clients VALUES ('hush')",
        f"CREATE FUNCTION \"{schema}\".fails(t text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE '%', t; END $$",
        f'CREATE VIEW "{schema}".failing AS SELECT "{schema}".fails(id) AS id FROM "{schema}".clients',
    )

    def read(name: str, *columns: str, **options: str) -> str:
        return complaint(lambda: read_table(Source(ADDRESS, sql_table=name, **options), columns))

    assert "there is no such table or view" in read("nowhere", "id")
    assert "there is no such table or view" in read(f"{schema}.clients; DROP TABLE x", "id")
    assert "lacks the columns 'hidden'" in read(f"{schema}.clients", "hidden")
    assert "lacks the column 'id; --'; correct order_by" in read(f"{schema}.clients", "id", order_by="id; --")
    assert "reading stopped halfway" in read(f"{schema}.failing", "id")


@needs_server
def test_postgresql_is_read_in_one_state_and_without_the_right_to_write(
    schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mode = f'"{schema}".clients', f'"{schema}".mode'
    execute(
        f"CREATE TABLE {name} (id int)",
        f"INSERT INTO {name} VALUES (1)",
        f"CREATE VIEW {mode} AS SELECT current_setting('transaction_read_only') AS id",
    )
    select = parties.databases._select

    def late(*given: Any) -> str:
        execute(f"INSERT INTO {name} VALUES (2)")
        return select(*given)

    monkeypatch.setattr(parties.databases, "_select", late)
    assert ids(read_table(Source(ADDRESS, sql_table=f"{schema}.clients"), ["id"])) == ["1"]
    assert ids(read_table(Source(ADDRESS, sql_table=f"{schema}.clients", order_by="id"), ["id"])) == ["1", "2"]
    assert ids(read_table(Source(ADDRESS, sql_table=f"{schema}.mode"), ["id"])) == ["on"]


@needs_server
def test_a_connection_that_is_lost_is_told(schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parties.databases, "CHUNK_BYTES", 20_000)
    name = f'"{schema}".clients'
    execute(f"CREATE TABLE {name} (id int)", f"INSERT INTO {name} SELECT generate_series(1, 1000000)")
    heard: list[int] = []

    def kill(rows: int) -> None:
        ours = "pid <> pg_backend_pid() AND query LIKE '%" + schema.partition(" ")[2] + "%'"
        if not heard:
            execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {ours}")
        heard.append(rows)

    said = complaint(lambda: read_table(Source(ADDRESS, sql_table=f"{schema}.clients"), ["id"], progress=kill))
    assert "reading stopped halfway, the connection was lost" in said
    assert heard and heard[-1] < 1_000_000


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adbc_driver_postgresql", None)
    said = complaint(lambda: read_table(Source("postgresql://server/db", sql_table="t"), ["id"]))
    assert "pip install 'colonnade[postgres]'" in said


@pytest.mark.parametrize(
    ("server", "text"), [("127.0.0.1:1", "no server answers there"), ("nowhere.invalid", "the host is not known")]
)
def test_a_server_that_does_not_answer_is_told(server: str, text: str) -> None:
    pytest.importorskip("adbc_driver_postgresql", reason="the extra colonnade[postgres] is not installed")
    said = complaint(lambda: read_table(Source(f"postgresql://user@{server}/db", sql_table="t"), ["id"]))
    assert f"postgresql://{server}/db, table 't': {text}" in said


def test_a_server_that_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("adbc_driver_postgresql", reason="the extra colonnade[postgres] is not installed")
    monkeypatch.setattr(parties.databases, "CONNECT_SECONDS", 2)  # the least that libpq waits
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"postgresql://user@127.0.0.1:{silent.getsockname()[1]}/db"
        assert "no server answers there" in complaint(lambda: read_table(Source(address, sql_table="t"), ["id"]))


# ---- sources


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://user:hush@server/db",
        "postgres://user:hush@server:5432/db?sslmode=require",
        "postgresql://user:hu/sh@server/db",
        "postgresql://user:hu?sh@server/db",
        "postgresql://user:hu@sh@server/db",
        "postgresql://server/db?user=me&password=hush",
        "mysql://user:hush@server/db",
    ],
)
def test_a_password_in_the_address_is_refused_and_not_shown(address: str) -> None:
    said = complaint(lambda: Source(address, sql_table="t"))
    assert "set PGPASSWORD" in said and "sh@" not in said


def test_a_source_is_named_without_user_and_parameters() -> None:
    source = Source("postgresql://me@server:5432/db?sslmode=require", sql_table="sales.clients")
    assert source.name == str(source) == "postgresql://server:5432/db, table 'sales.clients'"
    assert (Source(Path("/data/a.csv")).name, str(Source("/data/a.csv"))) == ("a.csv", "/data/a.csv")


def test_sql_table_belongs_to_databases_only() -> None:
    assert "set sql_table" in complaint(lambda: Source("a.db"))
    assert "set sql_table" in complaint(lambda: Source("postgresql://server/db"))
    assert "leave sql_table and order_by out" in complaint(lambda: Source("a.csv", sql_table="t"))
    assert "leave sql_table and order_by out" in complaint(lambda: Source("a.parquet", order_by="t"))
    assert "no other server is read" in complaint(lambda: Source("mysql://server/db", sql_table="t"))
    assert "correct it" in complaint(lambda: Source("postgresql://[::1/db", sql_table="t"))


# ---- scratch files


def test_small_arrays_stay_in_memory_and_large_ones_are_mapped_files_without_a_name(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, 1000)
    small, large = scratch.array(125, np.float64), scratch.array((3, 100, 1), "<u4")
    assert small.base is None and large.base is not None
    assert (large.shape, large.dtype, large.any(), type(large)) == ((3, 100, 1), np.dtype("<u4"), np.False_, np.ndarray)
    large[1] = np.arange(100)[:, None]
    for array in (small, large, large[1:], large.reshape(-1)[5:]):
        scratch.release(array)
    assert large[1, :, 0].tolist() == list(range(100)) and not large[0].any() and not large[2].any()
    assert list(tmp_path.iterdir()) == []
    assert Scratch(None, 0).array(10**6, np.uint8).base is None
    assert scratch.array(0, np.uint8).size == Scratch(tmp_path, 0).array((0, 5), np.uint8).size == 0


def test_released_pages_leave_memory_and_keep_what_they_held(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil", reason="psutil measures the memory")
    process = psutil.Process()
    scratch = Scratch(tmp_path, 0)
    array = scratch.array(64 << 20, np.uint8)
    array[:] = 7
    before = process.memory_info().rss
    scratch.release(array[5:])
    assert process.memory_info().rss < before - (50 << 20)
    assert (array == 7).all()


def test_a_table_goes_to_disk_when_it_is_large_and_reads_back_the_same(tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.string()), ("x", pa.float64())])
    batches = [pa.record_batch([[f"{n}-{i}" for i in range(100)], [float(n)] * 100], schema=schema) for n in range(9)]
    batches.insert(4, batches[0].slice(0, 0))
    for memory in (0, 5000, 1 << 20):
        scratch = Scratch(tmp_path, memory)
        before = pa.total_allocated_bytes()
        found = scratch.table(iter(batches), schema)
        assert found.equals(pa.Table.from_batches(batches, schema))
        assert pa.total_allocated_bytes() - before < 5000
        scratch.release(found.column("id"))
        assert found.column("id").combine_chunks().to_pylist()[-1] == "8-99"
    assert list(tmp_path.iterdir()) == []
    assert Scratch(tmp_path, 0).table([], schema).num_rows == 0


def test_a_table_read_to_disk_is_the_same_table(small_chunks: None, tmp_path: Path) -> None:
    text = "id,x,y\n" + "".join(f"id-{number},{number},{number % 2}\n" for number in range(1000))
    path = written(tmp_path, text)
    plain = read_table(Source(path), ["id"], ["x"], "y")
    found = read_table(Source(path), ["id"], ["x"], "y", scratch=Scratch(tmp_path, 100))
    assert found.ids["id"].to_pylist() == plain.ids["id"].to_pylist() and found.rows == 1000
    assert found.features["x"].base is not None and np.array_equal(found.features["x"], plain.features["x"])
    assert np.array_equal(found.label, plain.label)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """A file system of one mebibyte."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("this user cannot mount a small file system")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_an_error_now_that_names_folder_and_bytes(full_disk: Path, tmp_path: Path) -> None:
    scratch = Scratch(full_disk, 1000)
    said = complaint(lambda: scratch.array(1 << 20, np.float64))
    assert f"cannot keep {8 << 20} bytes in {full_disk}: No space left on device; make room there" in said
    path = written(tmp_path, "id\n" + "".join(f"hush-{number:099}\n" for number in range(20_000)))
    said = complaint(lambda: read_table(Source(path), ["id"], scratch=scratch))
    assert f"bytes in {full_disk}: No space left on device" in said
    assert list(full_disk.iterdir()) == []
    assert shutil.disk_usage(full_disk).used == 0
    assert scratch.array(1 << 19, np.uint8).any() == np.False_


def test_a_disk_without_room_is_refused_where_nothing_can_be_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert "No space left on device" in complaint(lambda: Scratch(tmp_path, 0).array(5000, np.uint8))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delattr(os, "posix_fallocate")
    array = Scratch(tmp_path, 0).array((3 << 20) + 5, np.uint8)
    array[-1] = 1
    assert array.sum() == 1
    assert "cannot keep 5000 bytes in" in complaint(lambda: Scratch(tmp_path / "no", 0).array(5000, np.uint8))
