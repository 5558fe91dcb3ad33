"""The budget per peer against plain Python sets; two processes, crashes, damage, and what the file holds."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.errors import LocalError, Refused
from parties.identity import Identity
from psi import budget
from psi.budget import Budget, Limits, OverBudget, Use, fingerprints

ROOT = Path(__file__).resolve().parents[1]
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where a synced write costs nothing
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
OWNER = Identity.generate("bank")
GROCER = {"grocer": b"grocer's key id."}
sessions = (number.to_bytes(32, "big") for number in range(1, 10**9))


def ids(budget: Budget, values: Iterable[int]) -> np.ndarray:
    return fingerprints(budget.key, (f"soc_sec_id {value}".encode() for value in values))


def spend(budget: Budget, values: Iterable[int], day: float = 0, peers: dict[str, bytes] = GROCER) -> list[Use]:
    return budget.spend(peers, next(sessions), "churn", ids(budget, values), NOW + timedelta(days=day))


def check(budget: Budget, values: Iterable[int], day: float = 0, peers: dict[str, bytes] = GROCER) -> list[Use]:
    return budget.check(peers, ids(budget, values), NOW + timedelta(days=day))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "budget.sqlite"


# ---- fingerprints


@given(st.lists(st.binary(max_size=300)), st.binary(min_size=16, max_size=64))
def test_fingerprints_are_keyed_hashes_sorted_and_distinct(values: list[bytes], key: bytes) -> None:
    found = fingerprints(key, iter(values))
    hashes = {hashlib.blake2b(value, key=key, digest_size=8).digest() for value in values}
    assert found.dtype == np.uint64
    assert found.tolist() == sorted(int.from_bytes(one, "little") for one in hashes)


@pytest.mark.parametrize("key", [b"", bytes(15), bytes(65)])
def test_a_fingerprint_needs_a_key(key: bytes) -> None:
    with pytest.raises(ValueError, match="16 to 64 bytes"):
        fingerprints(key, [b"a"])


def test_another_owner_has_another_key(path: Path, tmp_path: Path) -> None:
    other = Budget(tmp_path / "other", Identity.generate("bank"), Limits())
    ours, again = Budget(path, OWNER, Limits()), Budget(tmp_path / "again", OWNER, Limits())
    assert ours.key == again.key
    assert not set(ids(ours, range(100)).tolist()) & set(ids(other, range(100)).tolist())
    assert OWNER.sign_secret != ours.key


# ---- against plain sets

Offer = tuple[float, dict[str, bytes], frozenset[int]]


def plain(history: list[Offer], offer: Offer, limits: Limits) -> list[Use]:
    """The rules of psi/budget.py, said again over everything that ever was; `history` holds the accepted runs."""
    day, peers, new = offer
    uses = []
    for peer, key in peers.items():
        by_name = [(at, had) for at, who, had in history if peer in who]
        by_key = [(at, had) for at, who, had in history if key in who.values()]
        recent = [
            (at, had) for at, who, had in history if (peer in who or key in who.values()) and at > day - limits.days
        ]
        earlier = recent + by_name[-1:] + by_key[-1:]
        uses.append(
            Use(
                peer=peer,
                runs=len(recent) + 1,
                distinct_ids=len(new.union(*(had for _, had in recent))),
                difference=min((len(new ^ had) for _, had in earlier), default=None),
                limits=limits,
            )
        )
    return uses


def refused(use: Use) -> bool:
    limits = use.limits
    return (
        (limits.runs > 0 and use.runs > limits.runs)
        or (limits.distinct_ids > 0 and use.distinct_ids > limits.distinct_ids)
        or (use.difference is not None and 0 < use.difference < limits.smallest_difference)
    )


keys = st.sampled_from([b"1" * 16, b"2" * 16, b"3" * 16])
peers = st.dictionaries(st.sampled_from(["grocer", "shop", "mart"]), keys, min_size=1)
inputs = st.frozensets(st.integers(0, 20)) | st.sampled_from([frozenset(range(9)), frozenset(range(10))])
offers = st.lists(
    st.tuples(st.sampled_from([-9, -0.25, 0, 0.5, 1, 3, 10, 11, 40]), peers, inputs), min_size=2, max_size=10
)
limits = st.builds(
    Limits,
    days=st.sampled_from([1, 10, 30]),
    runs=st.integers(0, 4),
    distinct_ids=st.sampled_from([0, 10, 15, 25]),
    smallest_difference=st.integers(0, 5),
)


@settings(max_examples=100)
@given(offers, limits)
def test_any_sequence_of_runs_counts_as_plain_sets_do(offers: list[Offer], limits: Limits) -> None:
    history: list[Offer] = []
    day = 0.0
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder) / "budget"
        for step, peers, new in offers:
            day += step
            counted = max([day, *(at for at, _, _ in history)])
            expected = plain(history, (counted, peers, new), limits)
            opened = Budget(path, OWNER, limits)
            if over := [use for use in expected if refused(use)]:
                for ask in (check, spend):
                    with pytest.raises(OverBudget) as caught:
                        ask(opened, new, day, peers)
                    assert caught.value.uses == expected
                    assert caught.value.peer == over[0].peer
            else:
                assert check(opened, new, day, peers) == expected
                assert spend(opened, new, day, peers) == expected
                history.append((counted, peers, new))


# ---- each limit


def refusal(limits: Limits, path: Path, *runs: Iterable[int]) -> str:
    opened = Budget(path, OWNER, limits)
    for values in runs[:-1]:
        spend(opened, values)
    with pytest.raises(Refused) as caught:
        spend(opened, runs[-1])
    assert caught.value.kind == "refused"
    assert caught.value.peer == "grocer"
    return str(caught.value)


def test_too_many_runs(path: Path) -> None:
    assert refusal(Limits(runs=2), path, range(5), range(5), range(5)) == (
        "the budget for grocer is used up: 2 runs in 30 days allowed, and this would be number 3; wait, or raise runs "
        "in [policy.budget]"
    )


def test_too_many_distinct_ids(path: Path) -> None:
    assert refusal(Limits(distinct_ids=10, days=7), path, range(8), range(5, 11)) == (
        "the budget for grocer is used up: 10 distinct ids in 7 days allowed, and this run would make 11; offer ids "
        "that were offered before, wait, or raise distinct_ids in [policy.budget]"
    )


def test_too_small_a_difference(path: Path) -> None:
    assert refusal(Limits(smallest_difference=4), path, range(50), range(50), range(1, 52)) == (
        "the input for grocer differs from an earlier one in 3 ids, and at least 4 are required: two such runs single "
        "people out; offer the earlier ids unchanged, or wait until more have changed"
    )


def test_a_detour_hides_no_difference(path: Path) -> None:
    opened = Budget(path, OWNER, Limits(smallest_difference=10))
    spend(opened, range(100))
    spend(opened, range(50))
    assert spend(opened, range(100))[0].difference == 0
    spend(opened, range(50))
    with pytest.raises(Refused, match="in 1 ids"):
        spend(opened, range(101))


def test_the_last_input_is_compared_however_old(path: Path) -> None:
    opened = Budget(path, OWNER, Limits(smallest_difference=10, days=30))
    spend(opened, range(100))
    with pytest.raises(Refused, match="in 1 ids"):
        spend(opened, range(101), day=400)
    assert spend(opened, range(200), day=400)[0] == Use(
        peer="grocer", runs=1, distinct_ids=200, difference=100, limits=opened.limits
    )


def test_a_new_key_or_a_new_name_alone_starts_no_new_budget(path: Path) -> None:
    opened = Budget(path, OWNER, Limits(runs=1))
    spend(opened, range(5))
    for peers in ({"grocer": b"another key id.."}, {"shop": GROCER["grocer"]}):
        with pytest.raises(Refused, match=f"the budget for {next(iter(peers))} is used up: 1 runs"):
            spend(opened, range(5), peers=peers)
    assert spend(opened, range(5), peers={"shop": b"another key id.."})[0].runs == 1


def test_one_peer_over_its_budget_stops_the_run_for_all(path: Path) -> None:
    opened, pair = Budget(path, OWNER, Limits(runs=1)), {"insurer": b"insurer's key id", **GROCER}
    spend(opened, range(5))
    with pytest.raises(OverBudget) as caught:
        spend(opened, range(5), peers=pair)
    assert [(use.peer, use.runs, use.refusal is None) for use in caught.value.uses] == [
        ("insurer", 1, True),
        ("grocer", 2, False),
    ]
    assert spend(opened, range(5), peers={"insurer": pair["insurer"]})[0].runs == 1


def test_a_clock_that_goes_back_wins_nothing(path: Path) -> None:
    opened = Budget(path, OWNER, Limits(runs=2, days=30))
    spend(opened, range(5), day=100)
    assert spend(opened, range(5), day=0)[0].runs == 2  # counted at day 100
    with pytest.raises(Refused):
        spend(opened, range(5), day=129.9)
    assert spend(opened, range(5), day=130)[0].runs == 1


def test_a_session_is_spent_once(path: Path) -> None:
    opened = Budget(path, OWNER, Limits())
    some = ids(opened, range(3))
    opened.spend(GROCER, b"session", "churn", some, NOW)
    with pytest.raises(Refused, match="this session was spent before"):
        opened.spend({"shop": b"?" * 16}, b"session", "churn", some, NOW)
    assert opened.check(GROCER, some, NOW)[0].runs == 2


def test_wrong_calls(path: Path) -> None:
    opened = Budget(path, OWNER, Limits())
    some = ids(opened, range(3))
    for wrong in (some[::-1], some[[0, 0, 1]], some.astype(np.int64), some.reshape(-1, 1)):
        with pytest.raises(ValueError, match="sorted, each once"):
            opened.spend(GROCER, b"s", "churn", wrong, NOW)
    with pytest.raises(ValueError, match="its zone"):
        opened.check(GROCER, some, NOW.replace(tzinfo=None))
    with pytest.raises(ValueError, match="has peers"):
        opened.check({}, some, NOW)
    with pytest.raises(ValueError, match="has a session"):
        opened.spend(GROCER, b"", "churn", some, NOW)
    assert opened.check(GROCER, some)[0].runs == 1


def test_limits_and_use_are_plain_data() -> None:
    use = Use(peer="grocer", runs=1, distinct_ids=2, difference=None, limits=Limits())
    assert msgspec.json.decode(msgspec.json.encode(use), type=Use) == use
    for wrong in ({"days": 0}, {"runs": -1}, {"distinct_ids": -1}, {"smallest_difference": 1.5}, {"ids": 3}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, Limits)


# ---- the file


def test_the_file_is_ours_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        spend(Budget(path, OWNER, Limits()), range(5))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(LocalError, match=r"can be read by other users; run 'chmod 600 "):
        Budget(path, OWNER, Limits())


def test_nothing_of_an_id_is_in_the_file(path: Path) -> None:
    opened, marker = Budget(path, OWNER, Limits()), b"MARKER-0815"
    found = fingerprints(opened.key, [marker])
    opened.spend(GROCER, b"session", "churn", found, NOW)
    raw = path.read_bytes()
    assert found.tobytes() in raw  # the search would find what is there
    unkeyed = [hashlib.new(name, marker).digest()[:8] for name in ("sha256", "blake2b", "sha1", "md5")]
    unkeyed.append(hashlib.blake2b(marker, digest_size=8).digest())
    secrets = [OWNER.sign_secret, OWNER.curve_secret, opened.key]
    for one in [b"MARKER", b"0815", marker[::-1], *unkeyed, *secrets]:
        assert one not in raw
        assert one.hex().encode() not in raw.lower()


def test_what_no_longer_counts_leaves_the_file(path: Path) -> None:
    opened = Budget(path, OWNER, Limits(days=30))
    old = ids(opened, [1])
    spend(opened, [1])
    spend(opened, [2], day=20)
    assert old.tobytes() in path.read_bytes()
    spend(opened, [2], day=30)
    assert old.tobytes() not in path.read_bytes()
    assert ids(opened, [2]).tobytes() in path.read_bytes()


def test_any_changed_byte_is_harmless_or_found(path: Path) -> None:
    opened = Budget(path, OWNER, Limits())
    spend(opened, range(100))
    spend(opened, range(50, 150))
    expected = check(opened, range(150))
    sound = path.read_bytes()
    found = 0
    for place in [*range(120), *range(120, len(sound), 17)]:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 0xFF]) + sound[place + 1 :])
        try:
            assert check(Budget(path, OWNER, Limits()), range(150)) == expected
        except LocalError as error:
            assert "\n" not in str(error)
            found += 1
    assert found > 100


@pytest.mark.parametrize("size", [1, 99, 4096, -1])
def test_a_file_cut_short_is_found(path: Path, size: int) -> None:
    spend(Budget(path, OWNER, Limits()), range(2000))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        LocalError, match="is damaged or no budget file; restore it from a backup, or name another file"
    ):
        Budget(path, OWNER, Limits())


@pytest.mark.parametrize("change", ["UPDATE runs SET time = time - 1", "DELETE FROM runs", "UPDATE house SET ids = ''"])
def test_an_edited_file_is_found(path: Path, change: str) -> None:
    spend(Budget(path, OWNER, Limits()), range(5))
    with sqlite3.connect(path) as database:
        database.execute(change)
    database.close()
    with pytest.raises(LocalError, match="is damaged"):
        Budget(path, OWNER, Limits())


def test_foreign_files_are_left_alone(path: Path, tmp_path: Path) -> None:
    def told(where: Path) -> str:
        before = where.read_bytes() if where.is_file() else None
        with pytest.raises(LocalError) as caught:
            Budget(where, OWNER, Limits())
        assert before == (where.read_bytes() if where.is_file() else None)
        return str(caught.value).replace(str(tmp_path), "")

    damaged = "is damaged or no budget file; restore it from a backup, or name another file"
    path.write_text("id,amount\n1,2\n" * 100)
    path.chmod(0o600)
    assert told(path) == f"/budget.sqlite {damaged}"

    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE runs (run INTEGER)")
    database.close()
    path.chmod(0o600)
    assert told(path) == f"/budget.sqlite {damaged}"

    path.unlink()
    Budget(path, Identity.generate("bank"), Limits())
    assert told(path) == "/budget.sqlite is the budget of another key than ours; name another file"

    path.unlink()
    Budget(path, OWNER, Limits())
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()
    assert told(path) == "/budget.sqlite is a budget of version 2, and we read 1; update colonnade"

    missing = "No such file or directory"
    assert told(tmp_path / "no" / "b") == f"cannot use the budget file /no/b: {missing}; choose another place"
    assert told(tmp_path) == "cannot use the budget file : Is a directory; choose another place"


def test_a_full_disk_spends_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Budget(path, OWNER, Limits())
    spend(opened, range(5))
    connect = sqlite3.connect

    def small(*args: object, **options: object) -> sqlite3.Connection:
        database = connect(*args, **options)  # type: ignore[call-overload]
        database.execute("PRAGMA max_page_count = 10")
        return database

    with monkeypatch.context() as patch:
        patch.setattr(budget.sqlite3, "connect", small)
        with pytest.raises(LocalError, match="the disk is full"):
            spend(opened, range(10_000))
    assert check(opened, range(5))[0].runs == 2


def test_more_ids_than_a_file_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_MOST_IDS", 10)
    opened = Budget(path, OWNER, Limits())
    with pytest.raises(LocalError, match="cannot hold 11 distinct ids; at most 10"):
        spend(opened, range(11))
    assert spend(opened, range(10))[0].runs == 1


# ---- other processes

SPENDER = """
import sys
from pathlib import Path
from parties.errors import Refused
from parties.identity import Identity
from psi.budget import Budget, Limits, fingerprints
folder, me = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()
budget = Budget(folder / "budget.sqlite", Identity.load(folder / "bank.key"), Limits(runs=15))
done = 0
for i in range(12):
    try:
        ids = fingerprints(budget.key, [f"{me} {i} {j}".encode() for j in range(1000)])
        budget.spend({"grocer": bytes(16)}, f"{me} {i}".encode(), "churn", ids)
        done += 1
    except Refused:
        pass
print(done)
"""


def test_two_processes_share_one_budget(tmp_path: Path) -> None:
    OWNER.save(tmp_path / "bank.key")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SPENDER, str(tmp_path), me],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in "ab"
    ]
    for process in started:  # both open, and make, the file at about the same time
        process.stdin.write("go\n")
        process.stdin.flush()
    done = [int(process.communicate(timeout=60)[0]) for process in started]
    assert sum(done) == 15
    opened = Budget(tmp_path / "budget.sqlite", OWNER, Limits())
    use = opened.check({"grocer": bytes(16)}, ids(opened, []))[0]
    assert (use.runs, use.distinct_ids) == (16, 15_000)


def test_nobody_counts_while_another_does(path: Path) -> None:
    class Slow(Budget):
        def _enter(self, *arguments: object) -> list[Use]:
            time.sleep(0.3)  # between reading the file and writing it
            return super()._enter(*arguments)  # type: ignore[arg-type]

    opened = Slow(path, OWNER, Limits(runs=1))
    with ThreadPoolExecutor() as pool:
        errors = [future.exception() for future in [pool.submit(spend, opened, range(5)) for _ in range(2)]]
    assert sorted(type(error).__name__ for error in errors) == ["NoneType", "OverBudget"]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from parties.identity import Identity
from psi.budget import Budget, Limits
class Killed(Budget):
    def _store(self, database, books):
        super()._store(database, books)
        if books.runs:
            os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
budget = Killed(folder / "budget.sqlite", Identity.load(folder / "bank.key"), Limits())
budget.spend({"grocer": bytes(16)}, b"killed", "churn", np.arange(1_000_000, dtype=np.uint64))
"""


def test_a_killed_process_leaves_nothing_half_written(tmp_path: Path) -> None:
    OWNER.save(tmp_path / "bank.key")
    opened = Budget(tmp_path / "budget.sqlite", OWNER, Limits())
    some = ids(opened, range(500_000))
    opened.spend({"grocer": bytes(16)}, b"before", "churn", some)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    journal = tmp_path / "budget.sqlite-journal"  # the new ids were on their way to the disk
    assert journal.stat().st_mode & 0o777 == 0o600
    use = opened.check({"grocer": bytes(16)}, some)[0]
    assert (use.runs, use.distinct_ids, use.difference) == (2, 500_000, 0)
    assert not journal.exists()
    opened.spend({"grocer": bytes(16)}, b"killed", "churn", some)


def test_a_file_that_is_held_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, connect = Budget(path, OWNER, Limits()), sqlite3.connect
    holder = connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(
        budget.sqlite3, "connect", lambda *args, **options: connect(*args, **options | {"timeout": 0.1})
    )
    with pytest.raises(LocalError, match="another run holds it; try again"):
        spend(opened, range(5))
    assert check(opened, range(5))[0].runs == 1
    holder.close()
    assert spend(opened, range(5))[0].runs == 1
