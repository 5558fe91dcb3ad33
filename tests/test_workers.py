"""The party's own map: the same results in the same order, in this process, in others, or on a Dask cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from joblib._parallel_backends import LokyBackend

from parties.errors import LocalError
from parties.memory import play
from parties.session import Session
from parties.workers import Workers
from psi.align import align
from psi.masking import hash_and_mask
from tests.conftest import Stream, agree, nonces, parties

SUITE = "curve25519_XMD:SHA-512_ELL2_RO_"


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def broken(number: int) -> int:
    if number == 3:
        raise ValueError("the fourth is bad")
    return number


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    distributed = pytest.importorskip("distributed", reason="colonnade[dask] is not installed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, protocol="tcp://", host="127.0.0.1"
    ) as local:
        yield f"dask://{local.scheduler_address}"


@pytest.fixture(params=["one", "two processes", "dask"])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    setting = {"one": 1, "two processes": 2, "dask": None}[request.param]
    found = Workers(request.getfixturevalue("cluster") if setting is None else setting)
    yield found
    found.close()


def test_results_come_in_order_and_two_maps_may_run_at_once(workers: Workers) -> None:
    first, second = workers.map(square, range(12)), workers.map(square, range(100, 104))
    results = [next(first), next(first), *second, *first]
    assert [value for value, _ in results] == [0, 1, *(n * n for n in range(100, 104)), *(n * n for n in range(2, 12))]
    assert (os.getpid() in {process for _, process in results}) == (workers.count == 1)


def test_two_maps_never_start_workers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """joblib, asked for other workers than it has, ends those: a map that got them a moment before would hang."""
    configure, inside, most = LokyBackend.configure, [0], [0]

    def slow(self: LokyBackend, *given: Any, **named: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.1)
        inside[0] -= 1
        return configure(self, *given, **named)

    monkeypatch.setattr(LokyBackend, "configure", slow)
    workers = Workers(2)
    assert [value for value, _ in workers.map(square, range(12))] == [n * n for n in range(12)]
    assert most == [1]
    workers.close()


def test_an_error_is_the_callers(workers: Workers) -> None:
    found = workers.map(broken, range(6))
    with pytest.raises(ValueError, match="the fourth is bad"):
        list(found)
    assert [value for value, _ in workers.map(square, [2])] == [4]


def test_masking_is_the_same_wherever_it_is_done(workers: Workers) -> None:
    work = partial(hash_and_mask, SUITE, Stream("key")(32))
    items = [[b"a", b"b"], [b"c"]]
    found = list(workers.map(work, items))
    assert all(np.array_equal(got, work(item)) for got, item in zip(found, items, strict=True))


def test_an_alignment_is_the_same_with_workers(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, and workers for however few: the same bytes as in one process."""
    for name in ("parts", "part_count"):
        monkeypatch.setattr(f"psi.messages.{name}.__defaults__", (50,))
    monkeypatch.setattr("psi.exchange.PART", 1)
    sets = {"bank": range(200), "grocer": range(100, 330), "mill": range(50, 190)}

    def role(session: Session, means: Workers) -> list[int]:
        session.workers = means
        ids = [f"customer {number}" for number in sets[session.name]]
        rows = align(session, ids, randomness=Stream(session.name)).rows
        assert rows is not None
        return [sets[session.name][row] for row in rows]

    def run(means: Workers) -> dict[str, list[int]]:
        roles = {name: partial(role, means=means) for name in sets}
        return play(roles, agree(3), identities=parties(3), nonces=nonces(3))

    found = run(workers)
    assert found == run(Workers())
    assert set(found["mill"]) == set(range(100, 190))


def test_workers_that_hang_are_given_up_and_others_take_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parties.workers.PATIENCE", 2.0)
    start = time.monotonic()
    with pytest.raises(LocalError, match="our workers gave no result within 2 s"):
        list(Workers(2).map(time.sleep, [60.0]))
    assert time.monotonic() - start < 30
    monkeypatch.setattr("parties.workers.PATIENCE", 60.0)
    assert [value for value, _ in Workers(2).map(square, [3])] == [9]


def test_zero_is_one_process_a_core() -> None:
    assert Workers(0).count == len(os.sched_getaffinity(0))


def test_a_cluster_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="colonnade[dask] is not installed")
    monkeypatch.setattr("parties.workers.CONNECT", 1.0)
    with pytest.raises(LocalError, match=r"no Dask scheduler answers at 127.0.0.1:1; start it, or set workers = 0"):
        Workers("dask://127.0.0.1:1")
