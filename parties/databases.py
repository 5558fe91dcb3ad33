"""Tables in SQLite and PostgreSQL, read in one read-only transaction that sees one state of the database.

SQLite comes with Python. PostgreSQL is read through ADBC, whose driver hands over Arrow batches and makes no Python
object of a row; it is built on libpq, so that PGPASSWORD, PGPASSFILE, ~/.pgpass and PGSERVICE work as everywhere.
Errors of a database may quote values: their text is never shown.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from parties.columns import Use, check_header
from parties.errors import LocalError

if TYPE_CHECKING:
    from parties.tables import Source

CHUNK_ROWS = 1 << 15  # SQLite
CHUNK_BYTES = 8 << 20  # PostgreSQL
CONNECT_SECONDS = 10
READ_SECONDS = 3600  # for a table to be read, waits for locks included


def batches(source: Source, uses: Mapping[str, Use]) -> Iterator[pa.RecordBatch]:
    """The declared columns in chunks: text or a type that has one ISO form, numbers also as float64.

    Raises:
        LocalError: no connection, no such table or column, or ids stored as something that has no one text.
    """
    return (_read_sqlite if source.kind == "sqlite" else _read_postgresql)(source, uses)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _table(source: Source) -> str:
    return ".".join(map(_quoted, source.sql_table.split(".", 1)))


def _select(source: Source, header: Sequence[str], expressions: Sequence[str]) -> str:
    if source.order_by and source.order_by not in header:
        raise LocalError(f"{source} lacks the column {source.order_by!r}; correct order_by in [table]")
    order = f" ORDER BY {_quoted(source.order_by)}" if source.order_by else ""
    return f"SELECT {', '.join(expressions)} FROM {_table(source)}{order}"  # noqa: S608  # names are quoted


# ---- SQLite: a column may hold any type in any row


@contextmanager
def _sqlite(source: Source) -> Iterator[sqlite3.Connection]:
    path = Path(source.path)
    if not path.exists():
        raise LocalError(f"{path} does not exist; correct the path of the table")
    connection = None
    try:
        address = path.resolve().as_uri() + "?mode=ro"
        connection = sqlite3.connect(address, uri=True, isolation_level=None, timeout=CONNECT_SECONDS)
        connection.execute("BEGIN")
        yield connection
    except sqlite3.Error as error:
        text, code = str(error), getattr(error, "sqlite_errorname", "")
        if "no such table" in text:
            raise LocalError(
                f"{path} has no table or view {source.sql_table!r}; correct sql_table in [table]"
            ) from None
        if "decode" in text:
            raise LocalError(f"{source} holds text that is not UTF-8; store it as UTF-8") from None
        if code == "SQLITE_NOTADB":
            raise LocalError(f"{path} is not an SQLite database; correct the path of the table") from None
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise LocalError(f"{path} is locked by another program; try again when it has finished") from None
        raise LocalError(f"cannot read {source} ({code or 'database error'}); check the file") from None
    finally:
        if connection:
            connection.close()


def _sqlite_header(source: Source, connection: sqlite3.Connection) -> list[str]:
    found = connection.execute(f"SELECT * FROM {_table(source)} LIMIT 0")  # noqa: S608  # names are quoted
    return [column[0] for column in found.description]


def _read_sqlite(source: Source, uses: Mapping[str, Use]) -> Iterator[pa.RecordBatch]:
    with _sqlite(source) as connection:
        names = _sqlite_header(source, connection)
        check_header(str(source), names, list(uses))
        mixed = _sqlite_types(source, connection, uses)
        fields = [
            (name, pa.float64() if use == "numbers" and not mixed[name] else pa.string()) for name, use in uses.items()
        ]
        expressions = [
            f"CAST({_quoted(name)} AS {'REAL' if pa.types.is_floating(type) else 'TEXT'})"
            if not mixed[name]
            else _MIXED.replace("?", _quoted(name))
            for name, type in fields
        ]
        cursor, schema = connection.execute(_select(source, names, expressions)), pa.schema(fields)
        while rows := cursor.fetchmany(CHUNK_ROWS):
            arrays = [
                pa.array(values, type) for values, type in zip(zip(*rows, strict=True), schema.types, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


# Real numbers in all their digits, whole ones as integers; a blob as a word that is no number.
_MIXED = """CASE typeof(?) WHEN 'blob' THEN 'blob' WHEN 'real' THEN CASE WHEN ? = CAST(? AS INTEGER)
THEN CAST(CAST(? AS INTEGER) AS TEXT) ELSE printf('%!.17g', ?) END ELSE CAST(? AS TEXT) END"""


def _sqlite_types(source: Source, connection: sqlite3.Connection, uses: Mapping[str, Use]) -> dict[str, bool]:
    """Which columns mix types: numbers with text, labels with floats. Raises LocalError for ids or categories with
    floats, and for blobs that are to be text."""
    counts = [
        f"total(typeof({column}) IN ('text', 'blob')), 0"
        if use == "numbers"
        else f"total(typeof({column}) = 'real'), total(typeof({column}) = 'blob')"
        for column, use in zip(map(_quoted, uses), uses.values(), strict=True)
    ]
    found = connection.execute(f"SELECT {', '.join(counts)} FROM {_table(source)}").fetchone()  # noqa: S608  # names are quoted
    mixed = {}
    for at, (name, use) in enumerate(uses.items()):
        first, blobs = map(int, found[2 * at : 2 * at + 2])
        floats = 0 if use in ("numbers", "labels") else first
        if floats or blobs:
            wrong = (
                f"{count} {use} are stored as {word}" for count, word in ((floats, "floats"), (blobs, "blobs")) if count
            )
            raise LocalError(f"{source}, column {name!r}: {' and '.join(wrong)}; store them as text")
        mixed[name] = first > 0
    return mixed


# ---- PostgreSQL

_WHOLE = ("smallint", "integer", "bigint")
_FLOATS = ("real", "double precision")
_TYPES = """
SELECT a.attname::text, format_type(b.oid, CASE WHEN t.typtype = 'd' THEN t.typtypmod ELSE a.atttypmod END)::text,
       b.typcategory::text
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
JOIN pg_type b ON b.oid = CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END
WHERE a.attrelid = to_regclass($1::text) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""


@contextmanager
def _postgresql(source: Source) -> Iterator[Any]:
    try:
        from adbc_driver_manager import Error
        from adbc_driver_postgresql import StatementOptions, dbapi
    except ImportError:
        raise LocalError("PostgreSQL needs a driver; run pip install 'colonnade[postgres]'") from None
    address = str(source.path)
    if "connect_timeout=" not in address and "PGCONNECT_TIMEOUT" not in os.environ:
        address += f"{'&' if '?' in address else '?'}connect_timeout={CONNECT_SECONDS}"
    try:
        connection = dbapi.connect(address)
    except Error as error:
        raise LocalError(f"{source}: {_no_connection(str(error))}") from None
    try:
        with connection, connection.cursor() as cursor:
            cursor.adbc_statement.set_options(**{StatementOptions.BATCH_SIZE_HINT_BYTES.value: str(CHUNK_BYTES)})
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            cursor.execute(f"SET LOCAL statement_timeout = '{READ_SECONDS}s'")
            yield cursor
    except (Error, pa.ArrowException, OSError) as error:
        raise LocalError(f"{source}: {_no_rows(getattr(error, 'sqlstate', None) or '')}") from None


def _no_connection(text: str) -> str:
    """The driver gives no code for a connection that fails, only libpq's text."""
    if "password" in text or "authentication" in text or "pg_hba" in text:
        return "the server refuses the login; check the user, and PGPASSWORD or ~/.pgpass"
    if "does not exist" in text:
        return "the server has no such database or user; correct the path in [table]"
    if "translate host" in text:
        return "the host is not known; correct the path in [table]"
    if "refused" in text or "timeout" in text or "timed out" in text or "No such file" in text:
        return "no server answers there; check host and port, and that the server runs"
    return "the connection failed; try the same address with psql"


def _no_rows(state: str) -> str:
    """By SQLSTATE (PostgreSQL's manual, appendix A)."""
    if state == "42501":
        return "we may not read it; ask for SELECT on the table and USAGE on its schema"
    if not state:  # after the first rows the driver gives no code
        return "reading stopped halfway, the connection was lost or a value is bad; run again, or try it with psql"
    return f"the server could not read it (SQLSTATE {state}); try the same columns with psql"


def _postgresql_types(source: Source, cursor: Any) -> dict[str, tuple[str, str]]:
    """Column -> the type's name and category, a domain's as that of its base."""
    cursor.execute(_TYPES, [_table(source)])
    found = {name: (type, category) for name, type, category in cursor.fetchall()}
    if not found:
        raise LocalError(f"{source}: there is no such table or view; correct sql_table in [table]")
    return found


def _read_postgresql(source: Source, uses: Mapping[str, Use]) -> Iterator[pa.RecordBatch]:
    with _postgresql(source) as cursor:
        types = _postgresql_types(source, cursor)
        check_header(str(source), list(types), list(uses))
        expressions = [
            _number(_quoted(name), types[name][0]) if use == "numbers" else _text(source, name, types[name], use)
            for name, use in uses.items()
        ]
        cursor.execute(_select(source, list(types), expressions))
        for batch in cursor.fetch_record_batch():
            yield pa.RecordBatch.from_arrays(batch.columns, names=list(uses))


def _number(column: str, type: str) -> str:
    if type in (*_WHOLE, *_FLOATS) or type.startswith("numeric"):
        return f"{column}::float8"
    return f"{column}::int::float8" if type == "boolean" else f"{column}::text"


def _text(source: Source, name: str, stored: tuple[str, str], use: Use) -> str:
    column, (type, category) = _quoted(name), stored
    if category in "SE" or type in ("uuid", *_WHOLE) or (type.startswith("numeric") and type.endswith(",0)")):
        return f"{column}::text"
    if type == "boolean" or (use == "labels" and type in _FLOATS):
        return column
    if use == "labels" and type.startswith("numeric"):
        return f"{column}::float8"
    if type == "date" or type.startswith("timestamp"):  # "infinity" is no date
        return f"CASE WHEN isfinite({column}) THEN {column} END"
    how = "floats" if type in _FLOATS else type
    raise LocalError(
        f"{source}, column {name!r}: {use} are stored as {how}; store them as text, or read a view that does"
    )
