"""A training that was interrupted goes on from the last state that all parties have, to the same result."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from parties.errors import LocalError, Refused
from parties.memory import outcomes
from parties.preparation import Preparation
from parties.session import Session
from tests.training import Dies, agreed, sent, table
from tests.world import Command, build, colonnade, customers, together
from vfl import sgd
from vfl.inner import Inner, Problem
from vfl.job import _job
from vfl.linear import VerticalLogisticRegression
from vfl.losses import Logistic, Multinomial, Poisson, Squared
from vfl.messages import PartialEmbedding
from vfl.resume import Checkpoints

JOB = b"j" * 32


def train(
    folder: Path,
    *,
    stop_at: dict[str, int] | None = None,
    resume: bool = False,
    parties: int = 3,
    other_labels: bool = False,
    recorded: Any = None,
    **params: Any,
) -> dict[str, Any]:
    """All parties' models, or what stopped them; `stop_at` kills a party in place of its n-th checkpoint."""
    parts, y = table(parties, 100)
    y = 1 - y if other_labels else y

    def role(session: Session) -> Any:
        target = y if session.is_label_holder else None
        model = VerticalLogisticRegression(**params)
        checkpoints = Dies(folder / session.name, (stop_at or {}).get(session.name))
        return model.fit(parts[session.name], target, session=session, checkpoints=checkpoints, resume=resume)

    tables = {"encryption": {"scheme": "lattice"}, "model": {"allow_reconstruction": True}}
    return outcomes(dict.fromkeys(parts, role), **agreed(list(parts), **tables), recorded=recorded)


SMALL = {"solver": "sgd", "batch_size": 25, "epochs": 4}
STOPS = SMALL | {"early_stopping": True, "n_iter_no_change": 2, "learning_rate": 3.0, "validation_fraction": 0.5}


@pytest.mark.parametrize("params", [{}, SMALL, STOPS], ids=["subspace", "sgd", "sgd that stops early"])
@pytest.mark.parametrize("killed", [{"bank": 4}, {"grocer": 4}, {"mobile": 5, "bank": 5}])
def test_it_ends_with_the_model_of_an_undisturbed_run(tmp_path, params, killed):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = train(tmp_path / "a", **params)
    broken = train(tmp_path / "b", stop_at=killed, **params)
    assert all(isinstance(outcome, Exception) for outcome in broken.values())
    resumed = train(tmp_path / "b", resume=True, **params)
    for name, model in whole.items():
        np.testing.assert_array_equal(resumed[name].coef_, model.coef_)
        assert (resumed[name].n_iter_, resumed[name].converged_) == (model.n_iter_, model.converged_)
        assert resumed[name].validation_losses_ == model.validation_losses_
        assert resumed[name].readings_ == model.readings_  # what went before counts
        assert not list((tmp_path / "b" / name).iterdir())  # a training that has ended leaves no state


@pytest.mark.parametrize("gone", ["grocer", "bank"])
def test_a_label_holder_cannot_ask_for_more_embeddings_by_starting_over(tmp_path, gone):
    """A state that one has lost, or hides: going back further than an exchange would tell more of the same rows."""
    train(tmp_path, stop_at={"mobile": 5})
    for path in (tmp_path / gone).iterdir():
        path.unlink()
    for ended in train(tmp_path, resume=True).values():
        assert isinstance(ended, Refused)
        assert str(ended).endswith("run without --resume")


@pytest.mark.parametrize("params", [{}, SMALL], ids=["subspace", "sgd"])
def test_a_label_holder_that_goes_back_and_answers_otherwise_gets_no_other_embedding(tmp_path, params):
    """It hides its last state, so that an exchange is done again, and steers the feature holder elsewhere."""
    first, second = {}, {}
    train(tmp_path, stop_at={"grocer": 2}, parties=2, recorded=first, **params)
    for _ in range(2):  # stopped once, it is not forgotten
        (tmp_path / "bank" / "training-000002.checkpoint").unlink(missing_ok=True)
        ended = train(tmp_path, resume=True, parties=2, other_labels=True, recorded=second, **params)
        assert isinstance(ended["grocer"], Refused) and "came out otherwise" in str(ended["grocer"])
        before, again = (sent(one, "grocer", "bank", PartialEmbedding) for one in (first, second))
        told = {one.exchange: one.data.tolist() for one in before}
        assert all(told[one.exchange] == one.data.tolist() for one in again)


def test_a_state_of_another_job_and_a_damaged_one_are_refused(tmp_path):
    kept = Checkpoints(tmp_path, JOB, every=1)
    kept.keep(1, {"directions": np.eye(3)})
    assert kept.kept() == [1]
    with pytest.raises(LocalError, match="of another job"):
        Checkpoints(tmp_path, b"k" * 32).kept()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(LocalError, match="damaged"):
        kept.kept()


@pytest.mark.parametrize("loss", [Logistic(), Multinomial(), Poisson(), Squared()], ids=lambda one: type(one).__name__)
def test_the_label_holders_own_fit_goes_on_to_the_last_bit(loss):
    rng = np.random.default_rng(4)
    x, classes = rng.normal(size=(60, 4)), rng.integers(0, 3 if isinstance(loss, Multinomial) else 2, 60)
    y = np.eye(3)[classes] if isinstance(loss, Multinomial) else classes[:, np.newaxis].astype(float)
    problem = Problem(loss, y, np.ones(60), 0.1, True)
    whole, again = Inner(problem), Inner(problem)
    whole.fit(x[:, :2])
    again.resume(whole.state)
    for ours, theirs in zip(again.fit(x), whole.fit(x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_training_is_of_one_party_under_one_agreement():
    held: Any = SimpleNamespace(
        features=pd.DataFrame({"a": [1.0, 2.0]}), plan=Preparation(), label=None, weights=None, own=None
    )
    digests = {_job(agreed(["bank", name])["agreement"], name, held) for name in ("grocer", "mobile")}
    known = agreed(["bank", "grocer", "mobile"])["agreement"]
    digests |= {_job(known, name, held) for name in ("grocer", "mobile")}
    assert len(digests) == 4 and _job(known, "grocer", held) in digests


def test_two_states_are_kept_whatever_happens(tmp_path):
    kept = Checkpoints(tmp_path, JOB, every=2)
    for exchanges in range(1, 10):
        kept.keep(exchanges, {"weights": np.arange(3.0)})
    assert kept.kept() == [6, 8]
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


SGD = "solver = 'sgd'\nepochs = 12\nbatch_size = 60\nmax_exchanges = 1000\nallow_reconstruction = true"


def test_a_run_whose_process_was_killed_goes_on_with_resume(tmp_path):
    tables = customers(400)
    paths = build(tmp_path, tables, model=f"{SGD}\n[information]\nallowed_counts = 20")
    running = {name: Command("run", path, "--events") for name, path in paths.items()}
    telco = tmp_path / "out" / "telco"
    end = time.monotonic() + 60
    while not list(telco.glob("training-*.checkpoint")) and time.monotonic() < end:
        time.sleep(0.01)
    running["telco"].kill()
    assert {name: process.wait(60) for name, process in running.items() if name != "telco"} == {"bank": 4, "grocer": 4}

    code, _, error = colonnade("run", paths["bank"].with_name("nobody.toml"), "--resume")
    assert (code, error.count("\n")) == (2, 1)
    codes, errors = together({name: ["run", path, "--resume", "--events"] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    assert not list(telco.glob("*.checkpoint")) and (telco / "resumed_ledger.jsonl").exists()
    summary = json.loads((telco / "summary.json").read_text())
    assert [row["column"] for row in summary["information"]] == ["minutes", "late"]
    assert "information" not in summary["seconds_by_phase"]  # counted once, before the kill
    assert colonnade("run", paths["bank"], "--resume")[0] == 2  # nothing is left to go on with

    coef, x, y, test = [], [], np.empty(0), np.empty(0, bool)
    for name, held in tables.items():
        rows = pd.read_csv(tmp_path / "out" / name / "rows.csv")
        share = json.loads((tmp_path / "out" / name / "model.json").read_text())
        test = rows["part"].to_numpy() == "test"
        part = held.iloc[rows["row"]]
        values = part[share["features"]].to_numpy()
        values = StandardScaler().fit(values[~test]).transform(values)[~test]
        coef += share["coef"][0]
        x.append(values if name == "bank" else np.rint(values * 2**20) / 2**20)
        if name == "bank":
            y = (part["bad"] == "yes").to_numpy(float)[~test]
            assert share["exchanges"] == 12 * (len(y) // 60)
    alone = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x[0], y)
    joined = np.column_stack([*x, np.ones(len(y))])
    weights = np.zeros(joined.shape[1])
    weights[:2], weights[-1] = alone.coef_[0], alone.intercept_[0]
    penalty = np.append(np.full(len(weights) - 1, 1 / len(y)), 0.0)
    for batch in sgd.batches(len(y), 60, 12, 0):
        residual = expit(joined[batch] @ weights) - y[batch]
        weights -= 0.1 * (joined[batch].T @ residual / len(batch) + penalty * weights)
    np.testing.assert_allclose(coef, weights[:-1], atol=1e-5)
