"""Read the declared columns of a table, in chunks; nothing else is ever loaded, and never all rows as Python objects.

A table is a CSV file, a Parquet file, a folder of Parquet files, an SQLite file or a PostgreSQL table or view. Every
complaint names the place, the column and the count, never a value.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from parties import databases
from parties.columns import NUMBERS, Faults, Use, as_text, check_header, check_label, check_text, filled, kind, words
from parties.errors import LocalError
from parties.files import Scratch

BLOCK = 2 << 20  # bytes of CSV per chunk, hence the longest row; Arrow reads up to 32 of them ahead
ROWS = 1 << 16  # rows of Parquet per chunk


@dataclass(frozen=True)
class Source:
    """Where a party's table is, as the party's file says.

    path: a CSV, Parquet or SQLite file (.sqlite, .sqlite3, .db), a folder of .parquet files (read in the order of their
        names), or "postgresql://user@host:port/database". No password: the driver reads PGPASSWORD or ~/.pgpass.
    sql_table: databases: the table or view, "schema.table" allowed.
    order_by: databases: the column that fixes the row order; without one the order is the database's own.

    Raises:
        LocalError: the address holds a password, or a database comes without sql_table, or a file with one.
    """

    path: str | Path
    separator: str = ","
    sql_table: str = ""
    order_by: str = ""

    def __post_init__(self) -> None:
        if "://" in str(self.path):
            _check_address(str(self.path))
        if self.kind in ("postgresql", "sqlite") and not self.sql_table:
            raise LocalError(f"{self.name} is a database; set sql_table to the table or view in [table]")
        if self.kind in ("csv", "parquet") and (self.sql_table or self.order_by):
            raise LocalError(f"{self.name} is no database; leave sql_table and order_by out of [table]")

    @property
    def kind(self) -> str:
        """One of csv, parquet, sqlite, postgresql."""
        text = str(self.path)
        if text.startswith(("postgresql://", "postgres://")):
            return "postgresql"
        suffix = Path(text).suffix.lower()
        if suffix in (".parquet", ".pq") or Path(text).is_dir():
            return "parquet"
        return "sqlite" if suffix in (".sqlite", ".sqlite3", ".db") else "csv"

    @property
    def name(self) -> str:
        """Short, for reports and error texts: the file's name, or table and database; never a user or a password."""
        if self.kind != "postgresql":
            return Path(self.path).name + (f", table {self.sql_table!r}" if self.sql_table else "")
        url = urlsplit(str(self.path))
        return f"postgresql://{url.netloc.rpartition('@')[2]}{url.path}, table {self.sql_table!r}"

    def __str__(self) -> str:
        return self.name if self.kind in ("sqlite", "postgresql") else str(self.path)


def _check_address(address: str) -> None:
    """A password may itself hold "/", "?" or "@": what stands before the last "@" is never taken for anything else."""
    scheme, _, rest = address.partition("://")
    if ":" in rest.rpartition("@")[0] or "password" in rest.rpartition("?")[2]:
        raise LocalError(
            "the table's address holds a password; take it out and set PGPASSWORD, or write a line in ~/.pgpass"
        )
    if scheme not in ("postgresql", "postgres"):
        raise LocalError("the table's address is not postgresql://user@host:port/database; no other server is read")
    try:
        urlsplit(address)
    except ValueError:
        raise LocalError("the table's address is not postgresql://user@host:port/database; correct it") from None


@dataclass(frozen=True)
class Table:
    """The declared columns in one row order, nothing of which is shown.

    ids: column -> text exactly as written, "" where empty. features: column -> shape (rows,): float64, finite, or NaN
    where a gap is allowed; of a category Python strings (dtype object), "" where empty. label: 0.0 or 1.0, shape
    (rows,), or None.
    """

    source: str
    ids: dict[str, pa.ChunkedArray] = field(repr=False)
    features: dict[str, NDArray[Any]] = field(repr=False)
    label: NDArray[np.float64] | None = field(repr=False)
    rows: int

    def __len__(self) -> int:
        return self.rows


def read_table(
    source: Source,
    ids: Sequence[str],
    features: Sequence[str] = (),
    label: str = "",
    positive: str = "",
    *,
    categories: Collection[str] = (),
    gaps: Collection[str] = (),
    least: int = 1,
    scratch: Scratch | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Read ids, features and (label holder only) the label; `positive` is the label's value that counts as 1.

    Features are numbers, but those of `categories` text; numbers in those of `gaps` may be missing. `least` 0: there
    may be no row. What is large goes to `scratch`; `progress` hears how many rows have been read so far.

    Raises:
        LocalError: the table is missing, empty, unreadable, not UTF-8 or changed meanwhile; a column is missing, not
            numeric, has gaps or infinities, or is one of ids or categories stored as floats; the label is not
            two-valued; the disk is full.
    """
    columns = [*ids, *features, *([label] if label else [])]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise LocalError(f"column {twice[0]!r} is declared more than once; ids, features and label must differ")
    uses: dict[str, Use] = dict.fromkeys(ids, "ids")
    uses |= {name: "categories" if name in categories else "numbers" for name in features}
    uses |= {label: "labels"} if label else {}
    place, scratch = str(source), scratch or Scratch()
    faults = Faults(name for name, use in uses.items() if use == "numbers")
    schema = pa.schema([(name, pa.float64() if use == "numbers" else pa.string()) for name, use in uses.items()])

    def converted() -> Iterator[pa.RecordBatch]:
        done = 0
        for batch in _batches(source, uses):
            arrays = []
            for name, use in uses.items():
                if use == "numbers":
                    arrays.append(faults.numbers(name, batch.column(name)))
                else:
                    check_text(place, name, batch.schema.field(name).type, use)
                    arrays.append(as_text(place, name, batch.column(name)))
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)
            done += len(batch)
            if progress:
                progress(done)

    with _unchanged(source):
        table = scratch.table(converted(), schema)
    pa.default_memory_pool().release_unused()
    if table.num_rows < least:
        raise LocalError(f"{place} has no rows")
    remedy = "fill, encode ([prepare]) or drop them" if ids else "fill them in the table, or drop these rows"
    faults.check(place, remedy, gaps)  # without ids it is a horizontal job, which prepares nothing
    truth = None
    if label:
        one = check_label(place, label, table.column(label), positive)
        truth = filled(scratch.array(table.num_rows, np.float64), pc.equal(table.column(label), one))
    arrays: dict[str, NDArray[Any]] = {}
    for name in features:  # each column leaves the table when it is an array, so that memory holds one twice, not all
        if uses[name] == "categories":
            arrays[name] = words(table.column(name))
        else:
            arrays[name] = filled(scratch.array(table.num_rows, np.float64), table.column(name))
            scratch.release(arrays[name])
        scratch.release(table.column(name))
        table = table.drop_columns([name])
        pa.default_memory_pool().release_unused()
    return Table(source.name, {name: table.column(name) for name in ids}, arrays, truth, table.num_rows)


def _batches(source: Source, uses: Mapping[str, Use]) -> Iterator[pa.RecordBatch]:
    if source.kind in ("sqlite", "postgresql"):
        return databases.batches(source, uses)
    return _parquet(source, uses) if source.kind == "parquet" else _csv(source, list(uses))


def _files(source: Source) -> list[Path]:
    path = Path(source.path)
    if not path.exists():
        raise LocalError(f"{path} does not exist; correct the path of the table")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.parquet") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise LocalError(f"cannot read {path}: the folder has no .parquet files")
    return files


@contextmanager
def _unchanged(source: Source) -> Iterator[None]:
    """The files' bytes are the same before and after. A database is read in one transaction instead."""
    if source.kind in ("sqlite", "postgresql"):
        yield
        return
    before = _digest(source)
    try:
        yield
    except LocalError:  # what looked wrong may be half of a new version
        _check_digest(source, before)
        raise
    _check_digest(source, before)


def _check_digest(source: Source, before: list[tuple[str, str]]) -> None:
    if _digest(source) != before:
        raise LocalError(f"{source} changed while it was read; run again")


def _digest(source: Source) -> list[tuple[str, str]]:
    digests = []
    for path in _files(source):
        try:
            with path.open("rb") as file:
                digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
        except OSError as error:
            raise LocalError(f"cannot read {path}: {error.strerror}") from None
    return digests


@contextmanager
def _readable_csv(path: Path, separator: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise LocalError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except (pa.ArrowInvalid, csv.Error) as error:  # its text shows the row
        if "UTF8" in str(error):
            raise LocalError(f"{path} is not UTF-8 text; save it as UTF-8") from None
        if "Empty CSV" in str(error):
            raise LocalError(f"{path} has no rows") from None
        if "straddling" in str(error):
            raise LocalError(
                f"{path} has a row of more than {BLOCK >> 20} MiB or a quote that never closes; check quotes and lines"
            ) from None
        raise LocalError(
            f"{path} is not a table of rows as long as its header, separated by {separator!r}; check quotes and lines"
        ) from None
    except OSError as error:
        raise LocalError(f"cannot read {path}: {error.strerror}") from None


def _csv_header(path: Path, source: Source) -> list[str]:
    with _readable_csv(path, source.separator), path.open(encoding="utf-8-sig", newline="") as file:
        return next((row for row in csv.reader(file, delimiter=source.separator) if row), [])


def _csv(source: Source, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Every declared column as text: an id may well be "NA" or "007"."""
    path = _files(source)[0]
    check_header(str(source), _csv_header(path, source), columns)
    with _readable_csv(path, source.separator):
        yield from pa_csv.open_csv(
            path,
            read_options=pa_csv.ReadOptions(block_size=BLOCK),
            parse_options=pa_csv.ParseOptions(delimiter=source.separator, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
            ),
        )


@contextmanager
def _readable_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError):
        raise LocalError(f"{path} is not a readable Parquet file") from None


def _parquet_schema(path: Path) -> pa.Schema:
    with _readable_parquet(path):
        return pq.read_schema(path)


def _parquet(source: Source, uses: Mapping[str, Use]) -> Iterator[pa.RecordBatch]:
    """The files of a folder one after the other, checked first to store each column in the same way."""
    files = _files(source)
    schemas = [_parquet_schema(file) for file in files]
    for file, schema in zip(files, schemas, strict=True):
        check_header(str(file), schema.names, list(uses))
    for name, use in uses.items():
        stored = [(file.name, schema.field(name).type) for file, schema in zip(files, schemas, strict=True)]
        known = [one for one in stored if kind(one[1]) != "nothing"]
        kinds = [_word(stored, use) for _, stored in known]
        other = next((one for one, word in zip(known, kinds, strict=True) if word != kinds[0]), None)
        if other:
            raise LocalError(
                f"{source}, column {name!r}: stored as {known[0][1]} in {known[0][0]} and as {other[1]} in {other[0]}; "
                "store it in one way"
            )
    for file in files:
        with _readable_parquet(file), pq.ParquetFile(file, buffer_size=1 << 20) as opened:
            for batch in opened.iter_batches(ROWS, columns=list(uses)):
                yield batch.select(list(uses))


def _word(stored: pa.DataType, use: Use) -> str:
    return "number" if use == "numbers" and kind(stored) in NUMBERS else kind(stored)
