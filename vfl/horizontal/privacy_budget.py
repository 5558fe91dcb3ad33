"""What the differential privacy of earlier jobs has used up: one signed JSON file, kept across jobs.

Rules, each on the strict side:
- A release is charged before it is made. One that fails later stays charged, and its repetition is charged again: it
  has fresh noise, so the two together tell more than one. A refused one was never charged.
- Gaussian releases add up exactly, over all jobs of a purpose (`Cost.mu_squared`); others by their epsilon and delta.
- Nothing is ever given back: what has been told is not forgotten. A purpose that must begin anew needs new data.
- Each purpose has a budget of its own. What all purposes together tell about the same people is the sum of theirs.
- Whoever can delete the file, or put an old copy in its place, can delete the budget: keep and back it up as the key.

The file lists, per purpose and job, the number of releases and their cost; our signature under it shows any change.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import Literal

import msgspec

from parties.errors import LocalError, Refused
from parties.files import read_bytes, write_whole
from parties.identity import Identity
from vfl.horizontal.accounting import Cost

_SIGNED = "privacy-budget"


class Charge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one job has released: how often, and at what cost together."""

    releases: int
    cost: Cost


class _Books(msgspec.Struct, forbid_unknown_fields=True):
    version: Literal[1] = 1
    purposes: dict[str, dict[str, Charge]] = {}
    signature: str = ""

    @property
    def signed(self) -> bytes:
        return msgspec.json.encode((self.version, self.purposes), order="sorted")


class PrivacyBudget:
    """The budget file of one party, which serves all its jobs; safe to use from several processes."""

    def __init__(self, path: Path, owner: Identity) -> None:
        """Nothing is read or written yet; a file that is missing is an empty one."""
        self.path, self._owner = path, owner

    def spent(self, purpose: str) -> Cost:
        """What all jobs of this purpose have cost. Raises LocalError as `charge` does."""
        with self._locked():
            return _sum(self._load(), purpose)

    def charge(self, purpose: str, job: str, cost: Cost, *, epsilon: float, delta: float, releases: int = 1) -> float:
        """Enter releases of this cost together, before they are made. Returns the epsilon spent by then at `delta`.

        `epsilon` and `delta` are the agreement's, for its purpose; `job` tells jobs apart in the file (the session).

        Raises:
            Refused: that would be more than `epsilon`; nothing is charged.
            LocalError: the file cannot be used, is damaged, or is not ours.
        """
        with self._locked():
            books = self._load()
            total = (_sum(books, purpose) + cost).total(delta)
            if not total <= epsilon * (1 + 1e-9):  # the noise is calibrated to epsilon, up to rounding
                raise Refused(
                    f"the privacy budget for {purpose} is used up: epsilon {epsilon:g} at delta {delta:g} allowed, and "
                    f"this release would make {total:.4g}; add noise, run fewer rounds, or agree on a larger epsilon"
                )
            jobs = books.purposes.setdefault(purpose, {})
            before = jobs.get(job, Charge(0, Cost()))
            jobs[job] = Charge(before.releases + releases, before.cost + cost)
            books.signature = self._owner.sign(_SIGNED, books.signed).hex()
            write_whole(self.path, msgspec.json.format(msgspec.json.encode(books), indent=2) + b"\n", mode=0o600)
        return total

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time from reading to writing; the lock is beside the file, which is replaced as a whole."""
        try:
            lock = self.path.with_name(f".{self.path.name}.lock").open("w")
        except OSError as error:
            why = f"{error.strerror}; choose another place"
            raise LocalError(f"cannot use the privacy budget {self.path}: {why}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _load(self) -> _Books:
        if not self.path.exists():
            return _Books()
        try:
            books = msgspec.json.decode(read_bytes(self.path, "the privacy budget"), type=_Books)
            signature = bytes.fromhex(books.signature)
        except (msgspec.MsgspecError, ValueError):
            raise self._strange() from None
        if not self._owner.public.signed(_SIGNED, books.signed, signature):
            raise self._strange()
        return books

    def _strange(self) -> LocalError:
        return LocalError(f"{self.path} is no privacy budget of ours, or was changed; restore it from a backup")


def _sum(books: _Books, purpose: str) -> Cost:
    return reduce(add, (charge.cost for charge in books.purposes.get(purpose, {}).values()), Cost())
