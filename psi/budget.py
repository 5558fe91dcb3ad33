"""A budget per peer, kept across jobs: what repeated intersections may tell one peer in a period.

One intersection is bounded by its caps and its minimum. A series is not: two inputs that differ in one id show whether
that id is in both sets (differencing), and ever new ids read a set out slowly (enumeration). So every run is recorded,
before anything is sent, and three things are limited per peer: runs in the period, distinct ids in the period, and
how little an input may differ from earlier ones.

Rules, each on the strict side:
- A run is spent when it begins; one that fails later stays spent, a refused one was never spent.
- A peer is who has the same key *or* the same name: a new key under the old name, or an old key under a new name, goes
  on with the old budget. Only a new key under a new name starts a new one.
- An input is compared with every input of the period, and with the last one however old it is: against the last one
  alone, A, B, A + one id would pass. An input that this peer has had already (difference 0) is allowed: it makes no new
  pair of our sets. What a peer learns by changing its own set meanwhile, `runs` bounds.
- The period ends now and is open at its start: a run exactly `days` days old no longer counts.
- Time never goes back: when the clock stands before the last run, the run counts at that run's time (a run recorded
  by a clock that was ahead counts until the period has passed from then).
- What no longer counts is erased, fingerprints too; a longer period later on counts from what is still there.
- Whoever can delete the file can delete the budget: keep and back it up as the key file.

The file is SQLite: `house`, one row with all fingerprints in use, sorted, raw little-endian; `inputs`, one bit per
fingerprint; `runs`. Fingerprints are keyed by our signing key, and a keyed seal over all of it shows damage.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from parties.errors import LocalError, Refused
from parties.identity import Identity
from parties.party_file import Budget as Limits

_APPLICATION = int.from_bytes(b"ClnB")  # PRAGMA application_id: a budget file, and no other SQLite file
_VERSION = 1  # PRAGMA user_version
_SCHEMA = (
    "CREATE TABLE house (owner BLOB NOT NULL, ids BLOB NOT NULL, seal BLOB NOT NULL)",
    "CREATE TABLE inputs (input INTEGER PRIMARY KEY, members BLOB NOT NULL)",
    "CREATE TABLE runs (run INTEGER NOT NULL, peer TEXT NOT NULL, key BLOB NOT NULL, session BLOB NOT NULL,"
    " task TEXT NOT NULL, time INTEGER NOT NULL, input INTEGER NOT NULL, PRIMARY KEY (run, peer))",
)
_MOST_IDS = 120_000_000  # a row of SQLite holds 10^9 bytes
_UNUSABLE = {  # the file may be sound, but we cannot use it now; any other error of SQLite means damage
    sqlite3.SQLITE_PERM: "we may not use it",
    sqlite3.SQLITE_BUSY: "another run holds it; try again",
    sqlite3.SQLITE_READONLY: "it cannot be written",
    sqlite3.SQLITE_IOERR: "reading or writing failed",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
}


class Use(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a peer has had of us in the period, this run included. Counts only.

    `difference` is the smallest to an earlier input; 0: it has had this input; None: it has had none that still counts.
    """

    peer: str
    runs: int
    distinct_ids: int
    difference: int | None
    limits: Limits

    @property
    def limited(self) -> bool:
        """Whether any limit is set at all."""
        return any((self.limits.runs, self.limits.distinct_ids, self.limits.smallest_difference))

    @property
    def refusal(self) -> str | None:
        """Which limit is exceeded and what to do, in one line; None when the run is within the budget."""
        limits, spent = self.limits, f"the budget for {self.peer} is used up"
        if 0 < limits.runs < self.runs:
            return (
                f"{spent}: {limits.runs} runs in {limits.days} days allowed, and this would be number {self.runs}; "
                "wait, or raise runs in [policy.budget]"
            )
        if 0 < limits.distinct_ids < self.distinct_ids:
            return (
                f"{spent}: {limits.distinct_ids} distinct ids in {limits.days} days allowed, and this run would make "
                f"{self.distinct_ids}; offer ids that were offered before, wait, or raise distinct_ids in "
                "[policy.budget]"
            )
        if self.difference and self.difference < limits.smallest_difference:
            return (
                f"the input for {self.peer} differs from an earlier one in {self.difference} ids, and at least "
                f"{limits.smallest_difference} are required: two such runs single people out; offer the earlier ids "
                "unchanged, or wait until more have changed"
            )
        return None


class OverBudget(Refused):
    """Refused, with every peer's use as it would have been, for the report."""

    def __init__(self, text: str, *, peer: str, uses: list[Use]) -> None:
        super().__init__(text, peer=peer)
        self.uses = uses


def fingerprints(key: bytes, values: Iterable[bytes]) -> NDArray[np.uint64]:
    """Keyed 8-byte BLAKE2b hashes (RFC 7693) of the ids, sorted, each once: shape (distinct,). `key`: 16 to 64 bytes.

    `values` are the ids of all identifier keys of a run, each with its id type inside; read once, in any chunks.
    Two of ten million ids share a fingerprint with a chance of 3e-6; then a count is one too small.
    """
    if not 16 <= len(key) <= 64:
        raise ValueError("a fingerprint's key has 16 to 64 bytes")
    keyed = hashlib.blake2b(key=key, digest_size=8)
    hashes = bytearray()
    for value in values:
        one = keyed.copy()  # the keyed first block is absorbed once
        one.update(value)
        hashes += one.digest()
    ordered = np.frombuffer(hashes, "<u8").astype(np.uint64)
    ordered.sort()
    first = np.ones(len(ordered), bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first]


class _Run(NamedTuple):
    """One run with one peer; `run` numbers them in order, `time` is in seconds (UTC), `input` a key of `inputs`."""

    run: int
    peer: str
    key: bytes
    session: bytes
    task: str
    time: int
    input: int


@dataclass
class _Books:
    """What the file holds: `ids` (n,) sorted; each input n bits, packed; runs in order."""

    ids: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    inputs: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    runs: list[_Run] = field(default_factory=list)

    def forget(self, start: int) -> None:
        """Drop what no longer counts at `start`, the beginning of the period: runs, their inputs, and their ids."""
        last_by_name = {run.peer: run.run for run in self.runs}
        last_by_key = {run.key: run.run for run in self.runs}
        self.runs = [
            run for run in self.runs if run.time > start or run.run in (last_by_name[run.peer], last_by_key[run.key])
        ]
        used = {run.input for run in self.runs}
        if used != self.inputs.keys():
            self.inputs = {number: self.inputs[number] for number in used}
            members = _either(self.inputs.values(), len(self.ids))
            self._move(self.ids[np.unpackbits(members, count=len(self.ids)).view(bool)])

    def add(self, ids: NDArray[np.uint64]) -> int:
        """Enter a set of ids; the number of its input, an old one if the set is."""
        # ids past the last known one get a place that does not exist: clip to any, the comparison fails there
        places = np.searchsorted(self.ids, ids)
        fresh = ids if not len(self.ids) else ids[self.ids.take(places, mode="clip") != ids]
        if len(fresh):  # a stable sort merges two sorted runs in one pass
            self._move(np.sort(np.concatenate([self.ids, fresh]), kind="stable"))
        bits = np.zeros(len(self.ids), bool)
        bits[np.searchsorted(self.ids, ids)] = True
        members = np.packbits(bits)
        for number, other in self.inputs.items():
            if np.array_equal(other, members):
                return number
        number = 1 + max(self.inputs, default=0)
        self.inputs[number] = members
        return number

    def _move(self, ids: NDArray[np.uint64]) -> None:
        """Take `ids` as the new order of bits; what they leave out is in no input."""
        old, self.ids = self.ids, ids
        places = np.searchsorted(old, ids)
        stay = old.take(places, mode="clip") == ids if len(old) else np.zeros(len(ids), bool)
        for number, members in self.inputs.items():
            bits = np.zeros(len(ids), bool)
            bits[stay] = np.unpackbits(members, count=len(old)).view(bool)[places[stay]]
            self.inputs[number] = np.packbits(bits)

    def use(self, peer: str, key: bytes, number: int, start: int, limits: Limits) -> Use:
        """What `peer` will have had with input `number` as its next."""
        by_name = [run for run in self.runs if run.peer == peer]
        by_key = [run for run in self.runs if run.key == key]
        recent = {run for run in by_name + by_key if run.time > start}
        earlier = {run.input for run in recent.union(by_name[-1:], by_key[-1:])}
        new = self.inputs[number]
        return Use(
            peer=peer,
            runs=len({run.run for run in recent}) + 1,
            distinct_ids=_ones(_either([new, *(self.inputs[run.input] for run in recent)], len(self.ids))),
            difference=min((_ones(new ^ self.inputs[other]) for other in earlier), default=None),
            limits=limits,
        )


def _either(sets: Iterable[NDArray[np.uint8]], bits: int) -> NDArray[np.uint8]:
    union = np.zeros((bits + 7) // 8, np.uint8)
    for members in sets:
        union |= members
    return union


def _ones(members: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(members).sum())


class Budget:
    """The budget file of one party; one file serves all its jobs and peers. Safe to use from several processes.

    `key` is for `fingerprints`: HKDF-SHA256 (RFC 5869) of our secret signing key under a label of its own, so the file
    says nothing to who lacks the key file. New keys of ours need a new budget file.
    """

    def __init__(self, path: Path, owner: Identity, limits: Limits) -> None:
        """Opens the file, or makes it with mode 0600. Raises LocalError: not usable, not ours, or damaged."""
        self.path, self.limits = path, limits
        self.key = HKDF(SHA256(), 32, salt=None, info=b"colonnade/budget/1").derive(owner.sign_secret)
        self._owner = owner.public.key_id
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            shared = os.fstat(descriptor).st_mode & (stat.S_IRWXG | stat.S_IRWXO)
            os.close(descriptor)
        except OSError as error:
            raise LocalError(f"cannot use the budget file {path}: {error.strerror}; choose another place") from None
        if shared:
            raise LocalError(f"{path} can be read by other users; run 'chmod 600 {path}'")
        with self._transaction("IMMEDIATE") as database:
            if not path.stat().st_size:  # new; we hold the write lock, so nobody else is making it
                for statement in _SCHEMA:
                    database.execute(statement)
                database.execute(f"PRAGMA application_id = {_APPLICATION}")
                database.execute(f"PRAGMA user_version = {_VERSION}")
                self._store(database, _Books())
            self._load(database)

    def check(self, peers: Mapping[str, bytes], ids: NDArray[np.uint64], now: datetime | None = None) -> list[Use]:
        """What `spend` would say now; records nothing. Same errors."""
        with self._transaction("DEFERRED") as database:
            books = self._load(database)
        return self._enter(books, peers, b"", "", ids, now)

    def spend(
        self,
        peers: Mapping[str, bytes],
        session: bytes,
        task: str,
        ids: NDArray[np.uint64],
        now: datetime | None = None,
    ) -> list[Use]:
        """Record a run with all of `peers`, or refuse it and record nothing. Call it before anything is sent.

        `peers` maps names to key ids (PublicIdentity.key_id); `ids` are fingerprints; `now` has a time zone.

        Raises:
            OverBudget (a Refused): a limit is exceeded for a peer; names the first one.
            Refused: the session was spent before.
            LocalError: the file cannot be used, is not ours, or is damaged.
            ValueError: `ids` are not sorted and distinct, no session, no peers, or `now` has no time zone.
        """
        if not session:
            raise ValueError("a run has a session")
        with self._transaction("IMMEDIATE") as database:
            books = self._load(database)
            uses = self._enter(books, peers, session, task, ids, now)
            self._store(database, books)
        return uses

    def _enter(
        self,
        books: _Books,
        peers: Mapping[str, bytes],
        session: bytes,
        task: str,
        ids: NDArray[np.uint64],
        now: datetime | None,
    ) -> list[Use]:
        if not peers:
            raise ValueError("a run has peers")
        now = now or datetime.now(UTC)
        if now.tzinfo is None:
            raise ValueError("a time needs its zone")
        if ids.dtype != np.uint64 or ids.ndim != 1 or not (ids[1:] > ids[:-1]).all():
            raise ValueError("ids are fingerprints: sorted, each once")
        if session in {run.session for run in books.runs}:
            raise Refused(f"{self.path}: this session was spent before; every run needs a session of its own")
        time, run = int(now.timestamp()), 1
        if books.runs:
            time, run = max(time, books.runs[-1].time), books.runs[-1].run + 1
        start = time - self.limits.days * 86400
        books.forget(start)
        number = books.add(ids)
        uses = [books.use(peer, key, number, start, self.limits) for peer, key in peers.items()]
        for use in uses:
            if refusal := use.refusal:
                raise OverBudget(refusal, peer=use.peer, uses=uses)
        books.runs += [_Run(run, peer, key, session, task, time, number) for peer, key in peers.items()]
        return uses

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        """All or nothing: whatever leaves this block by an error, or with the process, is rolled back."""
        try:
            address = f"{self.path.absolute().as_uri()}?mode=rw"
            with closing(sqlite3.connect(address, uri=True, timeout=60, isolation_level=None)) as database:
                database.execute("PRAGMA synchronous = EXTRA")
                database.execute("PRAGMA secure_delete = ON")  # what no longer counts leaves the file, too
                database.execute(f"BEGIN {kind}")
                yield database
                database.execute("COMMIT")
        except (sqlite3.Error, UnicodeDecodeError) as error:  # a damaged schema ends up in SQLite's own messages
            if why := _UNUSABLE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF):
                raise LocalError(f"cannot use the budget file {self.path}: {why}") from None
            raise self._damaged() from None

    def _damaged(self) -> LocalError:
        return LocalError(f"{self.path} is damaged or no budget file; restore it from a backup, or name another file")

    def _load(self, database: sqlite3.Connection) -> _Books:
        def number(pragma: str) -> Any:
            return database.execute(f"PRAGMA {pragma}").fetchone()[0]

        if number("application_id") != _APPLICATION:
            raise self._damaged()
        if (version := number("user_version")) != _VERSION:
            raise LocalError(f"{self.path} is a budget of version {version}, and we read {_VERSION}; update colonnade")
        house = database.execute("SELECT owner, ids, seal FROM house").fetchall()
        if len(house) != 1 or [type(value) for value in house[0]] != [bytes] * 3:
            raise self._damaged()
        owner, ids, seal = house[0]
        if owner != self._owner:
            raise LocalError(f"{self.path} is the budget of another key than ours; name another file")
        inputs = database.execute("SELECT input, members FROM inputs ORDER BY input").fetchall()
        runs = database.execute(
            "SELECT run, peer, key, session, task, time, input FROM runs ORDER BY run, peer"
        ).fetchall()
        if not hmac.compare_digest(seal, self._seal(ids, inputs, runs)):  # from here on, it is what we wrote
            raise self._damaged()
        return _Books(
            np.frombuffer(ids, "<u8").astype(np.uint64, copy=False),
            {number: np.frombuffer(members, np.uint8) for number, members in inputs},
            [_Run(*run) for run in runs],
        )

    def _store(self, database: sqlite3.Connection, books: _Books) -> None:
        if len(books.ids) > _MOST_IDS:
            raise LocalError(f"{self.path} cannot hold {len(books.ids)} distinct ids; at most {_MOST_IDS}")
        ids = books.ids.astype("<u8", copy=False).tobytes()
        inputs = [(number, members.tobytes()) for number, members in sorted(books.inputs.items())]
        runs = sorted(books.runs)
        for table in ("house", "inputs", "runs"):
            database.execute(f"DELETE FROM {table}")  # noqa: S608  # our own tables
        database.execute("INSERT INTO house VALUES (?, ?, ?)", (self._owner, ids, self._seal(ids, inputs, runs)))
        database.executemany("INSERT INTO inputs VALUES (?, ?)", inputs)
        database.executemany("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)", runs)

    def _seal(self, ids: bytes, inputs: Iterable[tuple[Any, ...]], runs: Iterable[tuple[Any, ...]]) -> bytes:
        """A keyed BLAKE2b over all that the file holds; `person` keeps it apart from fingerprints."""
        seal = hashlib.blake2b(key=self.key, person=b"colonnade/seal/1", digest_size=32)
        for part in (inputs, runs):
            seal.update(msgspec.msgpack.encode([tuple(row) for row in part]))
        seal.update(ids)
        return seal.digest()
