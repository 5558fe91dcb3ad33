"""Networks in the long run: a training that was interrupted goes on to the same network, and one that is trained scores
on request."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from parties.errors import LocalError, Refused
from parties.message import CLASSES
from tests.test_neural import STEPS, Pixels, agreement, images, table, top_of, train
from tests.training import Dies, sent
from tests.world import Command, build, customers, together
from vfl.neural import VerticalMLPClassifier
from vfl.open_messages import OpenGradient
from vfl.scoring import answer, serve
from vfl.scoring_messages import ScoreRequest

torch = pytest.importorskip("torch", reason="networks need the extra 'torch'")


@pytest.fixture(autouse=True)
def plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agreement that consents to rows in clear also between three."""
    monkeypatch.setattr("parties.memory.allowed_classes", lambda agreement: frozenset(CLASSES))


SMALL = {"hidden_layer_sizes": (3, 2), "batch_size": 40, "epochs": 4}
STOPS = {"early_stopping": True, "validation_fraction": 0.3, "n_iter_no_change": 1, "learning_rate": 0.3}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "encrypted, adam": (3, SMALL | STEPS["adam"]),
    "encrypted, momentum, side by side": (3, SMALL | STEPS["sgd"] | {"merge": "concatenation"}),
    "encrypted, stops early": (2, SMALL | {"batch_size": 28} | STOPS),
    "encrypted, dropout": (2, SMALL | STEPS["sgd"]),
    "open, noise": (3, SMALL | {"mode": "open"}),
    "open, deep bottom, adam": (2, SMALL | STEPS["adam"] | {"mode": "open"}),
    "open, deep bottom, momentum": (2, SMALL | STEPS["sgd"] | {"mode": "open", "hidden_layer_sizes": (3,)}),
}


def data(run: str) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    """Columns, labels and modules of our own."""
    if "deep" in run:
        parts, y = images()
        return parts, y, {"bank": {"top": top_of(3, 2)}, "grocer": {"bottom": Pixels(3)}}
    parts, y = table(RUNS[run][0])
    if "dropout" in run:
        return parts, y, {"bank": {"top": torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(3, 2))}}
    if "early" in run:
        y = np.random.default_rng(0).integers(0, 2, len(y))  # nothing to learn: validation gets worse
    return parts, y, {}


def trained(
    run: str,
    folder: Path,
    *,
    stop_at: Mapping[str, int] | None = None,
    resume: bool = False,
    every: int = 1,
    written: bool = True,
    own: Mapping[str, Any] | None = None,
    recorded: Any = None,
) -> dict[str, Any]:
    torch.manual_seed(4)  # of dropout; a party that resumes draws on as if nothing had happened
    parts, y, modules = data(run)

    def fit(name: str) -> Mapping[str, Any]:
        return {"checkpoints": Dies(folder / name, (stop_at or {}).get(name), every, written), "resume": resume}

    known = agreement(len(parts), {"max_exchanges": 400})
    return train(parts, y, RUNS[run][1], own=own or modules, agreed=known, fit=fit, recorded=recorded)


@pytest.mark.parametrize(
    ("run", "killed"), [*((run, "bank") for run in RUNS), ("encrypted, adam", "mill"), ("open, noise", "grocer")]
)
def test_it_ends_with_the_network_of_an_undisturbed_run(tmp_path, run, killed):
    whole = trained(run, tmp_path / "whole")
    broken = trained(run, tmp_path / "broken", stop_at={killed: 4})
    assert all(isinstance(outcome, Exception) for outcome in broken.values()), broken
    resumed = trained(run, tmp_path / "broken", resume=True)
    for name, model in whole.items():
        assert resumed[name].epochs_ == model.epochs_
        assert resumed[name].tensors_.keys() == model.tensors_.keys()
        for what, value in model.tensors_.items():
            np.testing.assert_array_equal(resumed[name].tensors_[what], value)
        assert not list((tmp_path / "broken" / name).iterdir())  # a training that has ended leaves no state
    bank, again = whole["bank"], resumed["bank"]
    assert (again.course_.losses, again.course_.validation) == (bank.course_.losses, bank.course_.validation)
    assert again.course_.stopped == bank.course_.stopped
    assert again.readings_ == bank.readings_
    assert ("early" in run) == bool(bank.course_.validation)
    assert [one.leak_auc is not None for one in bank.readings_] == ["open" in run] * bank.epochs_


def test_states_that_are_kept_now_and_then_do_as_well(tmp_path):
    """Three steps are done again, with the same noise: the feature holder has nothing to average."""
    run, recorded, again = "open, noise", {}, {}
    whole = trained(run, tmp_path / "whole", every=3)
    trained(run, tmp_path / "broken", every=3, stop_at={"bank": 6}, written=False, recorded=recorded)
    resumed = trained(run, tmp_path / "broken", every=3, resume=True, recorded=again)
    for name, model in whole.items():
        for what, value in model.tensors_.items():
            np.testing.assert_array_equal(resumed[name].tensors_[what], value)
    first = {one.exchange: one.data for one in sent(recorded, "bank", "mill", OpenGradient)}
    second = {one.exchange: one.data for one in sent(again, "bank", "mill", OpenGradient)}
    assert first.keys() & second.keys() == {3, 4, 5}
    for step in (3, 4, 5):
        np.testing.assert_array_equal(first[step], second[step])


def test_a_label_holder_that_hides_its_states_gets_no_second_embeddings(tmp_path):
    trained("encrypted, adam", tmp_path, stop_at={"grocer": 5})
    for path in (tmp_path / "bank").iterdir():
        path.unlink()
    for ended in trained("encrypted, adam", tmp_path, resume=True).values():
        assert isinstance(ended, Refused) and str(ended).endswith("run without --resume")


def test_a_state_of_another_module_is_refused(tmp_path):
    run = "open, deep bottom, adam"
    trained(run, tmp_path, stop_at={"bank": 3})
    other = {"bank": {"top": top_of(3, 4, 2)}, "grocer": {"bottom": Pixels(3)}}
    ended = trained(run, tmp_path, resume=True, own=other)
    assert isinstance(ended["bank"], LocalError) and "other parameters" in str(ended["bank"])


# Scores on request


@pytest.mark.parametrize("merge", ["sum", "concatenation"])
@pytest.mark.parametrize("run", ["linear", "deep"])
def test_a_network_answers_requests_with_the_outputs_that_it_scores_all_rows_with(run, merge):
    parts, y, own = data("encrypted, adam" if run == "linear" else "open, deep bottom, adam")
    requests = [[3], [7, 1, 0], [-1, 3], []]
    recorded: Any = {}
    params = SMALL | {"merge": merge, "epochs": 1, "mode": "open" if run == "deep" else "encrypted"}
    if merge == "concatenation":
        own = own | {"bank": {}}  # the default top fits any width

    def then(model: VerticalMLPClassifier, session: Any) -> Any:
        x = parts[session.name]
        whole = model._outputs(x, session)
        return (
            (whole, list(serve(session, model, x, requests))) if session.is_label_holder else answer(session, model, x)
        )

    ended = train(parts, y, params, own=own, then=then, agreed=agreement(len(parts)), recorded=recorded)
    whole, answers = ended["bank"]
    for request, scores in zip(requests, answers, strict=True):
        request = np.array(request, int)
        expected = np.where((request >= 0)[:, np.newaxis], whole[request], np.nan)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)
    asked = [one.data.tolist() for one in sent(recorded, "bank", "grocer", ScoreRequest)]
    assert asked == [[3], [0, 1, 7], []]  # each row once over the network
    assert ended["grocer"] == 4


# The command line

MODEL = """kind = "network classifier"
epochs = 12
batch_size = 60
max_exchanges = 200
learning_rate = 0.02
residual_range = 16
allow_reconstruction = true
[network]
hidden = [3]
"""


def test_a_run_whose_process_was_killed_goes_on_and_serves(tmp_path):
    tables = {name: held for name, held in customers(400).items() if name != "grocer"}
    tables["bank"]["weight"] = np.random.default_rng(0).uniform(0.5, 2, len(tables["bank"]))
    paths = build(tmp_path, tables, model=MODEL)
    text = paths["bank"].read_text().replace("'weight', ", "").replace(", 'weight'", "")
    paths["bank"].write_text(text + 'weight = "weight"\n')
    running = {name: Command("run", path, "--events") for name, path in paths.items()}
    out = {name: tmp_path / "out" / name for name in paths}
    end = time.monotonic() + 60
    while not list(out["telco"].glob("training-*.checkpoint")) and time.monotonic() < end:
        time.sleep(0.01)
    running["telco"].kill()
    assert running["bank"].wait(60) == 4

    codes, errors = together({name: ["run", path, "--resume", "--events"] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    assert [json.loads((folder / "model.json").read_text())["epochs"] for folder in out.values()] == [12, 12]
    assert not list(out["telco"].glob("*.checkpoint"))
    ledger = (out["bank"] / "resumed_ledger.jsonl").read_text()
    rows = pd.read_csv(out["bank"] / "rows.csv")
    batches = 12 * int((rows["part"] != "test").sum() // 60)
    assert 0 < ledger.count('"OpenedGradient"') < batches  # it went on: what was done is not done again

    asked = tables["bank"]["id"].iloc[:5].tolist()
    (tmp_path / "requests.jsonl").write_text(json.dumps([*asked, "nobody"]) + "\n")
    scores = tmp_path / "scores.csv"
    serves = ["serve", paths["bank"], "--requests", tmp_path / "requests.jsonl", "--output", scores, "--events"]
    codes, errors = together({"bank": serves, "telco": ["serve", paths["telco"], "--events"]})
    assert set(codes.values()) == {0}, errors
    predicts = [
        "predict",
        paths["bank"],
        "--input",
        tmp_path / "bank.csv",
        "--output",
        tmp_path / "all.csv",
        "--events",
    ]
    answers = ["predict", paths["telco"], "--input", tmp_path / "telco.csv", "--events"]
    codes, errors = together({"bank": predicts, "telco": answers})
    assert set(codes.values()) == {0}, errors
    served, predicted = pd.read_csv(scores), pd.read_csv(tmp_path / "all.csv")
    assert served["id"].tolist() == [*asked, "nobody"] and served["score"].isna().tolist()[-1]
    known = predicted.set_index("id")["score"]
    for one, score in zip(served["id"], served["score"], strict=True):
        assert np.isnan(score) if one not in known.index else score == pytest.approx(known[one], abs=1e-9)
