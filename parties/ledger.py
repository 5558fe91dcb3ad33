"""What left this party: a hash-chained, signed record of every outbound message. JSON Lines, readable with `jq`.

Every line carries the SHA-256 of the line before it (the first one that of the format's name); the last one carries our
signature over all else in it. Each line has one spelling only, so that any byte that is changed, dropped or added later
is seen by whoever holds our public key.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import msgspec

from parties.errors import LocalError, Refused
from parties.files import read_bytes
from parties.identity import Identity, PublicIdentity

_START = hashlib.sha256(b"colonnade/ledger/1").hexdigest()


class Ledger:
    """An append-only record. `allowed` are the message classes that the agreement and our policy let out."""

    def __init__(self, owner: Identity, path: Path | None = None, allowed: frozenset[str] = frozenset()) -> None:
        self._owner = owner
        self._file: IO[bytes] | None = None
        self.allowed = allowed
        self.head = _START
        self.entries = 0
        self.phase = "agree"
        self.bytes_sent: Counter[tuple[str, str, str]] = Counter()  # by peer, kind and phase
        self.messages_sent: Counter[tuple[str, str, str]] = Counter()
        if path is not None:
            try:
                self._file = path.open("wb")
            except OSError as error:
                raise LocalError(f"cannot write the ledger {path}: {error.strerror}") from None

    def _append(self, entry: dict[str, Any], *, signed: bool = False) -> None:
        entry = {
            "entry": self.entries,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "phase": self.phase,
            **entry,
            "previous": self.head,
        }
        if signed:
            entry["signature"] = self._owner.sign("ledger", _canonical(entry)).hex()
        line = _canonical(entry)
        if self._file is not None:
            try:
                self._file.write(line + b"\n")
                self._file.flush()
            except OSError as error:
                raise LocalError(f"cannot write the ledger: {error.strerror}; nothing is sent unrecorded") from None
        self.head = hashlib.sha256(line).hexdigest()
        self.entries += 1

    def note(self, event: str, **facts: str | int | float) -> None:
        """Record something that is not a message: the session's opening, a peer's countersignature.

        Raises ValueError for a number that JSON does not have.
        """
        if not all(math.isfinite(fact) for fact in facts.values() if isinstance(fact, float)):
            raise ValueError(f"{event}: a number that is not finite is not JSON compliant")
        self._append({"event": event} | facts)

    def record(self, to: str, kind: str, message_class: str, shape: tuple[int, ...], size: int, digest: bytes) -> None:
        """Record a message before it is sent. Raises Refused when its class may not leave this party."""
        if message_class not in self.allowed:
            raise Refused(f"{kind} is {message_class}: neither the agreement nor our policy lets that out", peer=to)
        self._append(
            {
                "to": to,
                "kind": kind,
                "class": message_class,
                "shape": list(shape),
                "bytes": size,
                "digest": digest.hex(),
            }
        )
        self.bytes_sent[to, kind, self.phase] += size
        self.messages_sent[to, kind, self.phase] += 1

    def seal(self) -> None:
        """Sign the chain and close the file."""
        self._append({"event": "sealed"}, signed=True)
        if self._file is not None:
            self._file.close()
            self._file = None


def check_ledger(path: Path, owner: PublicIdentity) -> dict[int, str]:
    """Check chain, spelling and signature of a ledger file; the hash after each number of entries, from 1 on.

    Raises:
        LocalError: a byte is not as it was written, or the file is not signed by `owner`; says at which line.
    """
    head, heads = _START, {0: _START}
    sealed = False
    *lines, rest = read_bytes(path, "the ledger").split(b"\n")
    for number, line in enumerate(lines):
        try:
            entry = msgspec.json.decode(line)
            if sealed or _canonical(entry) != line or entry["entry"] != number or entry["previous"] != head:
                raise ValueError
            if entry.get("event") == "sealed":
                sealed = _is_sealed(entry, owner)
                if not sealed:
                    raise ValueError
        except (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise LocalError(f"{path}, line {number + 1}: the chain is broken here; the file was changed") from None
        head = hashlib.sha256(line).hexdigest()
        heads[number + 1] = head
    if rest:
        raise LocalError(
            f"{path} ends within line {len(lines) + 1}: the file was changed, or writing it was interrupted"
        )
    if not sealed:
        raise LocalError(f"{path} ends without a signature: the session did not finish, or lines were cut off")
    return heads


def _is_sealed(entry: dict[str, Any], owner: PublicIdentity) -> bool:
    """Whether the last field is the owner's signature, in lower-case hex, over all the others."""
    *_, (name, text) = entry.items()
    signature = bytes.fromhex(text)
    statement = {key: value for key, value in entry.items() if key != "signature"}
    return name == "signature" and signature.hex() == text and owner.signed("ledger", _canonical(statement), signature)


def _canonical(entry: dict[str, Any]) -> bytes:
    """The one spelling of a line."""
    return msgspec.json.encode(entry)
