"""The benchmarks can be run: at sizes of which the figures say nothing."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", ["exchange", "horizontal", "psi", "report"])
def test_a_benchmark_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    assert callable(runpy.run_path(str(FOLDER / f"{name}.py"))["main"])


def test_what_is_measured_of_secure_sums_and_rounds() -> None:
    horizontal = runpy.run_path(str(FOLDER / "horizontal.py"))
    cost = horizontal["secure_sum"](5, 100, 1)  # compares the sum itself
    assert cost["client_bytes"] > cost["plain_bytes"] == 800
    assert horizontal["round_overhead"](clients=3, rounds=60, columns=2) > 0
