"""The ledger file: any changed byte is found, every line has one spelling, and the totals are what was recorded."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parties.errors import LocalError, Refused
from parties.ledger import Ledger, check_ledger
from tests.conftest import IDENTITIES

BANK, GROCER = IDENTITIES["bank"], IDENTITIES["grocer"]


def write(path: Path, closing: str = "close") -> Ledger:
    """Five lines, with every kind of value that a line can hold."""
    ledger = Ledger(BANK, path, frozenset({"control", "masked"}))
    ledger.note("opened", party="bank", task="train")
    ledger.phase = "mask"
    ledger.record("grocer", "MaskedPoints", "masked", (3, 32), 200, hashlib.sha256(b"message").digest())
    ledger.record("mill", "Gate", "control", (), 10, bytes(range(32)))
    ledger.phase = closing
    ledger.note("measured", seconds=1.5e-7, share=0.1, tasks=-3, place="Köln\n")
    ledger.seal()
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "ledger.jsonl")
    return tmp_path / "ledger.jsonl"


def found(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        check_ledger(path, BANK.public)
    except LocalError as error:
        assert str(path) in str(error)
        return True
    return False


def spoilt(data: bytes) -> Iterator[tuple[str, bytes]]:
    for at, byte in enumerate(data):
        for other in {byte ^ 0x01, byte ^ 0x20, byte ^ 0x07, 0x20, 0x0A, 0x0D, 0x00} - {byte}:
            yield f"byte {at} is {other}", data[:at] + bytes([other]) + data[at + 1 :]
        yield f"byte {at} is missing", data[:at] + data[at + 1 :]
        yield f"cut off at byte {at}", data[:at]
    for at in range(len(data) + 1):
        for other in (b" ", b"\n"):
            yield f"{other!r} before byte {at}", data[:at] + other + data[at:]


def test_every_byte_changed_dropped_inserted_or_cut_off_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = path.read_bytes()
    assert data.count(b"\n") == 5
    assert not found(path, data)
    missed = []
    for what, changed in spoilt(data):
        monkeypatch.setattr("parties.ledger.read_bytes", lambda *_, changed=changed: changed)  # 13,000 files take long
        try:
            check_ledger(path, BANK.public)
            missed.append(what)
        except LocalError:
            pass
    assert missed == []


def test_a_file_without_its_last_newline_ends_within_a_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LocalError, match="ends within line 5"):
        check_ledger(path, BANK.public)


# ---- the seal


def last(data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(data.splitlines()[-1])
    return entry


def dumped(entry: Any, **options: Any) -> bytes:
    return json.dumps(entry, **({"separators": (",", ":")} | options)).encode()


SEALS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "time": lambda entry: dumped(entry | {"time": "2020-01-01T00:00:00.000+00:00"}),
    "phase": lambda entry: dumped(entry | {"phase": "agree"}),
    "a field more": lambda entry: dumped(entry | {"note": "all is well"}),
    "a field more before the signature": lambda entry: dumped(
        {key: value for key, value in entry.items() if key != "signature"}
        | {"note": 1, "signature": entry["signature"]}
    ),
    "a field less": lambda entry: dumped({key: value for key, value in entry.items() if key != "phase"}),
    "no signature": lambda entry: dumped({key: value for key, value in entry.items() if key != "signature"}),
    "signature in capitals": lambda entry: dumped(entry | {"signature": entry["signature"].upper()}),
    "signature with a space": lambda entry: dumped(entry | {"signature": entry["signature"] + " "}),
    "signature of no text": lambda entry: dumped(entry | {"signature": 7}),
    "signature over the chain alone": lambda entry: dumped(
        entry | {"signature": BANK.sign("ledger", bytes.fromhex(entry["previous"])).hex()}
    ),
    "signature for another purpose": lambda entry: dumped(
        entry | {"signature": BANK.sign("psi-report", dumped({**entry, "signature": None})).hex()}
    ),
    "signature first": lambda entry: dumped({"signature": entry["signature"]} | entry),
    "sorted keys": lambda entry: dumped(entry, sort_keys=True),
    "spaces": lambda entry: dumped(entry, separators=(", ", ": ")),
    "a key twice": lambda entry: b'{"entry":9,' + dumped(entry)[1:],
    "escaped": lambda entry: dumped(entry).replace(b"sealed", b"se\\u0061led"),
    "another event": lambda entry: dumped(entry | {"event": "opened"}),
    "number as float": lambda entry: dumped(entry | {"entry": float(entry["entry"])}),
    "NaN": lambda entry: dumped(entry | {"phase": float("nan")}),
}


@pytest.mark.parametrize("what", SEALS)
def test_a_changed_seal_is_found(what: str, path: Path) -> None:
    data = path.read_bytes()
    start = data.rindex(b"\n", 0, -1) + 1
    changed = SEALS[what](last(data))
    assert changed != data[start:-1]
    assert found(path, data[:start] + changed + b"\n")


def test_the_seal_of_another_ledger_does_not_fit(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "other.jsonl", closing="gate")
    ours, theirs = path.read_bytes().splitlines(True), (tmp_path / "other.jsonl").read_bytes().splitlines(True)
    assert found(path, b"".join([*ours[:-1], theirs[-1]]))


def test_only_the_owners_seal_counts(path: Path) -> None:
    with pytest.raises(LocalError, match="line 5: the chain is broken"):
        check_ledger(path, GROCER.public)


def test_lines_after_the_seal_are_found(path: Path) -> None:
    data = path.read_bytes()
    more = {"entry": 5, "event": "opened", "previous": hashlib.sha256(data.splitlines()[-1]).hexdigest()}
    assert found(path, data + dumped(more) + b"\n")
    assert found(path, data + data.splitlines(True)[-1])


@pytest.mark.parametrize(
    "line",
    [b"", b"null", b"[]", b'""', b"7", b"{}", b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b"\xef\xbb\xbf{}", b"NaN"],
)
def test_lines_that_are_no_entry_are_found(line: bytes, path: Path) -> None:
    data = path.read_bytes()
    assert found(path, line + b"\n" + data)
    assert found(path, line + b"\n")
    assert found(path, data.replace(b"\n", b"\n" + line + b"\n", 1))


def test_an_empty_file_has_no_signature(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").touch()
    with pytest.raises(LocalError, match="without a signature"):
        check_ledger(tmp_path / "ledger.jsonl", BANK.public)


# ---- what stays as it was


def test_a_ledger_reads_as_before_and_gives_the_hash_of_each_line(tmp_path: Path) -> None:
    ledger = write(tmp_path / "ledger.jsonl")
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines()
    heads = check_ledger(tmp_path / "ledger.jsonl", BANK.public)
    assert heads == {0: json.loads(lines[0])["previous"]} | {
        number: hashlib.sha256(line).hexdigest() for number, line in enumerate(lines, 1)
    }
    assert heads[ledger.entries] == ledger.head
    first, *_, sealed = (json.loads(line) for line in lines)
    assert list(first) == ["entry", "time", "phase", "event", "party", "task", "previous"]
    assert list(sealed) == ["entry", "time", "phase", "event", "previous", "signature"]


def test_totals_are_kept_by_peer_kind_and_phase() -> None:
    ledger = Ledger(BANK, None, frozenset({"masked"}))
    for phase, size in (("mask", 100), ("mask", 50), ("reveal", 7)):
        ledger.phase = phase
        ledger.record("grocer", "MaskedPoints", "masked", (1, 32), size, bytes(32))
    with pytest.raises(Refused):
        ledger.record("grocer", "Scores", "plaintext", (1,), 8, bytes(32))
    mask, reveal = ("grocer", "MaskedPoints", "mask"), ("grocer", "MaskedPoints", "reveal")
    assert ledger.bytes_sent == Counter({mask: 150, reveal: 7})
    assert ledger.messages_sent == Counter({mask: 2, reveal: 1})


def test_a_number_that_json_does_not_have_is_not_written(tmp_path: Path) -> None:
    ledger = Ledger(BANK, tmp_path / "ledger.jsonl")
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            ledger.note("measured", seconds=number)
    ledger.seal()
    assert len(check_ledger(tmp_path / "ledger.jsonl", BANK.public)) == 2


def test_a_long_ledger_is_checked_in_seconds(tmp_path: Path) -> None:
    ledger = Ledger(BANK, tmp_path / "ledger.jsonl", frozenset({"masked"}))
    for _ in range(20_000):
        ledger.record("grocer", "MaskedPoints", "masked", (4096, 32), 131_072, bytes(32))
    ledger.seal()
    start = time.process_time()
    check_ledger(tmp_path / "ledger.jsonl", BANK.public)
    assert time.process_time() - start < 2  # about 0.2 s
