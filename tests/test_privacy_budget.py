"""The privacy budget across jobs: exact composition, refusals, many at a time, and a file that was tampered with."""

from __future__ import annotations

import json
import math
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.errors import LocalError, Refused
from parties.identity import Identity
from vfl.horizontal.accounting import Cost, gaussian_epsilon, noise_multiplier
from vfl.horizontal.privacy_budget import PrivacyBudget

OWNER = Identity.generate("hospital")
DELTA = 1e-5


@pytest.fixture
def budget(tmp_path: Path) -> PrivacyBudget:
    return PrivacyBudget(tmp_path / "privacy.json", OWNER)


def charge(budget: PrivacyBudget, cost: Cost, epsilon: float = 2.0, purpose: str = "sepsis", job: str = "a") -> float:
    return budget.charge(purpose, job, cost, epsilon=epsilon, delta=DELTA)


def test_rounds_of_several_jobs_compose_as_one(budget: PrivacyBudget) -> None:
    """Forty rounds over two jobs cost what forty rounds cost, not the sum of two epsilons."""
    one = Cost(mu_squared=noise_multiplier(2.0, DELTA, 40) ** -2)
    for round in range(40):
        spent = PrivacyBudget(budget.path, OWNER).charge(
            "sepsis", "a" if round < 20 else "b", one, epsilon=2.0, delta=DELTA
        )
        assert spent == pytest.approx(gaussian_epsilon(math.sqrt((round + 1) * one.mu_squared), DELTA), rel=1e-9)
    assert spent == pytest.approx(2.0, rel=1e-6)
    before = budget.path.read_bytes()
    with pytest.raises(Refused, match=r"for sepsis is used up: epsilon 2 at delta 1e-05 allowed, .* would make 2\.0"):
        charge(budget, one, job="c")
    assert budget.path.read_bytes() == before  # a refused release was never charged
    assert charge(budget, one, epsilon=2.1, job="c") < 2.1  # agreed anew, it goes on from there
    jobs = json.loads(before)["purposes"]["sepsis"]
    assert {name: job["releases"] for name, job in jobs.items()} == {"a": 20, "b": 20}


def test_other_releases_add_their_epsilons(budget: PrivacyBudget) -> None:
    sampled = Cost(epsilon=0.7, delta=3e-6)
    assert budget.charge("sepsis", "a", sampled, epsilon=2, delta=DELTA, releases=50) == pytest.approx(0.7)
    gaussian = Cost(mu_squared=0.01)
    assert charge(budget, gaussian) == pytest.approx(0.7 + gaussian_epsilon(0.1, 7e-6))
    with pytest.raises(Refused, match="would make inf"):
        budget.charge("sepsis", "b", Cost(epsilon=0.1, delta=8e-6), epsilon=9, delta=DELTA)
    assert budget.spent("sepsis") == sampled + gaussian
    assert json.loads(budget.path.read_text())["purposes"]["sepsis"]["a"]["releases"] == 51


def test_a_purpose_has_a_budget_of_its_own(budget: PrivacyBudget) -> None:
    assert charge(budget, Cost(epsilon=1.9)) == 1.9
    assert charge(budget, Cost(epsilon=1.5), purpose="stroke") == 1.5
    assert budget.spent("asthma") == Cost()
    with pytest.raises(Refused, match="budget for stroke"):
        charge(budget, Cost(epsilon=1.0), purpose="stroke")


@settings(max_examples=20)
@given(st.lists(st.floats(0.01, 0.6), min_size=1, max_size=12))
def test_no_series_of_charges_exceeds_the_budget(tmp_path_factory: pytest.TempPathFactory, mus: list[float]) -> None:
    budget, granted = PrivacyBudget(tmp_path_factory.mktemp("budget") / "p.json", OWNER), 0.0
    for mu in mus:
        allowed = gaussian_epsilon(math.sqrt(granted + mu**2), DELTA) <= 3
        try:
            charge(budget, Cost(mu_squared=mu**2), epsilon=3.0)
            granted += mu**2
        except Refused:
            assert not allowed
        else:
            assert allowed
    assert budget.spent("sepsis").mu_squared == pytest.approx(granted)


def test_eight_at_a_time_lose_nothing(budget: PrivacyBudget) -> None:
    def spend(job: int) -> None:
        for _ in range(5):
            charge(PrivacyBudget(budget.path, OWNER), Cost(mu_squared=2.0**-10), epsilon=9.0, job=f"{job}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(spend, range(8)))
    assert budget.spent("sepsis").mu_squared == 40 / 1024


def test_the_file_is_ours_alone_and_signed(budget: PrivacyBudget) -> None:
    charge(budget, Cost(mu_squared=0.25))
    assert stat.S_IMODE(budget.path.stat().st_mode) == 0o600
    with pytest.raises(LocalError, match="no privacy budget of ours"):
        PrivacyBudget(budget.path, Identity.generate("hospital")).spent("sepsis")
    text = budget.path.read_text()
    for changed in (
        text.replace("0.25", "0.05"),
        text.replace("sepsis", "stroke"),
        text.replace('"releases": 1', '"releases": 0'),
        text.replace('"version": 1', '"version": 2'),
        text.replace('"signature": "', '"signature": "zz'),
        text.replace("0.25", "-1.0"),
        text.replace("{", '{"more": 1,', 1),
        text[:-20],
        "",
    ):
        assert changed != text
        budget.path.write_text(changed)
        for use in (lambda: budget.spent("sepsis"), lambda: charge(budget, Cost())):
            with pytest.raises(LocalError, match="was changed; restore it from a backup"):
                use()
    budget.path.write_text(text)
    assert budget.spent("sepsis") == Cost(mu_squared=0.25)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"cannot use the privacy budget .* choose another place"):
        charge(PrivacyBudget(tmp_path / "none" / "privacy.json", OWNER), Cost())
