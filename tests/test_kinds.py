"""Every kind of model that an agreement can name, through the command line and real processes."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from tests.world import build, colonnade, customers, together

BOLD = "allow_reconstruction = true\ntest_fraction = 0.3\n"


def tables(label: pd.Series) -> dict[str, pd.DataFrame]:
    """Three organisations' customers; the bank's label is the given one, of 400 customers in their order."""
    held = customers(400)
    base = customers(400)["bank"]
    held["bank"] = base.assign(bad=label.to_numpy()[base.index])
    return held


def counted() -> pd.Series:
    rng = np.random.default_rng(5)
    return pd.Series(rng.poisson(2.0, 400))


KINDS = {
    "linear": ("kind = 'linear regression'\nresidual_range = 64\n", pd.Series(np.arange(400) % 37 / 7.0), "r2"),
    "poisson": ("kind = 'poisson regression'\nresidual_range = 64\nalpha = 0.01\n", counted(), "d2"),
    "three classes": ("", pd.Series(np.array(["low", "middle", "high"])[np.arange(400) % 3]), "accuracy"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_train_and_predict(tmp_path, kind):
    model, label, figure = KINDS[kind]
    held = tables(label)
    paths = build(tmp_path, held, model=BOLD + model, sign=False)
    bank = paths["bank"].read_text()
    paths["bank"].write_text(bank.replace('positive = "yes"\n', ""))
    for path in paths.values():
        assert colonnade("sign", path)[0] == 0
    code, shown, error = colonnade("check", paths["bank"])
    assert code == 0, error
    assert "different values" in shown
    codes, errors = together({name: ["run", path, "--events"] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    summary = json.loads((tmp_path / "out" / "bank" / "summary.json").read_text())
    assert figure in summary["metrics"]["joint"] and figure in summary["metrics"]["alone"]
    assert (tmp_path / "out" / "bank" / "report.html").exists()
    rows = pd.read_csv(tmp_path / "out" / "bank" / "rows.csv")
    column = "predicted" if kind == "three classes" else "score"
    assert rows[column].notna().sum() == (rows["part"] == "test").sum() > 0

    for name, table in held.items():
        table.drop(columns="bad", errors="ignore").to_csv(tmp_path / f"new_{name}.csv", index=False)
    commands = {name: ["predict", path, "--input", tmp_path / f"new_{name}.csv"] for name, path in paths.items()}
    commands["bank"] += ["--output", tmp_path / "scores.csv"]
    codes, errors = together(commands)
    assert set(codes.values()) == {0}, errors
    assert len(pd.read_csv(tmp_path / "scores.csv")) == summary["intersection"]


def test_a_search_chooses_and_says_so(tmp_path):
    paths = build(
        tmp_path,
        customers(400),
        model=BOLD + "tolerance = 1e-4\n",
        identifiers='[search]\nfolds = 2\nmetric = "auc"\ngrid = { C = [0.01, 1.0] }\n',
    )
    codes, errors = together({name: ["run", path, "--events"] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    summary = json.loads((tmp_path / "out" / "bank" / "summary.json").read_text())
    assert summary["search"]["chosen"]["C"] in (0.01, 1.0) and len(summary["search"]["figures"]) == 2
    assert "figures" not in json.loads((tmp_path / "out" / "telco" / "summary.json").read_text())["search"]


def test_a_network(tmp_path):
    pytest.importorskip("torch", reason="needs colonnade[torch]")
    network = "[network]\nhidden = [4]\n"
    model = BOLD + "kind = 'network classifier'\nepochs = 2\nbatch_size = 64\nresidual_range = 4\n"
    paths = build(tmp_path, customers(400), model=model, identifiers=network)
    codes, errors = together({name: ["run", path, "--events"] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    summary = json.loads((tmp_path / "out" / "bank" / "summary.json").read_text())
    assert 0.4 < summary["metrics"]["joint"]["auc"] <= 1
    share = json.loads((tmp_path / "out" / "grocer" / "model.json").read_text())
    assert share["colonnade_network"] == 1
    for name, table in customers(400).items():
        table.drop(columns="bad", errors="ignore").to_csv(tmp_path / f"new_{name}.csv", index=False)
    commands = {name: ["predict", path, "--input", tmp_path / f"new_{name}.csv"] for name, path in paths.items()}
    commands["bank"] += ["--output", tmp_path / "scores.csv"]
    codes, errors = together(commands)
    assert set(codes.values()) == {0}, errors
    assert pd.read_csv(tmp_path / "scores.csv")["score"].between(0, 1).all()


IN_CLEAR = {
    "open": ("mode = 'open'\nopen_gradients = true\n[leakage]\nleak_auc = 0.9\n", "OpenGradient"),
    "side by side": ("merge = 'concatenation'\nseparate_embeddings = true\n", "SeparateEmbedding"),
}


@pytest.mark.parametrize("way", list(IN_CLEAR))
def test_a_network_whose_rows_travel_in_clear_where_all_consent(tmp_path, way):
    pytest.importorskip("torch", reason="needs colonnade[torch]")
    network, message = IN_CLEAR[way]
    held = customers(400)
    if way == "side by side":  # a label holder without columns of its own
        held["bank"] = held["bank"][["id", "bad"]]
    model = BOLD + "kind = 'network classifier'\nepochs = 2\nbatch_size = 64\nresidual_range = 4\n"
    paths = build(tmp_path, held, model=model, identifiers="[network]\nhidden = [4]\n" + network)
    code, _, error = colonnade("check", paths["bank"])
    assert code == 0, error
    codes, errors = together({name: ["run", path, "--events"] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    summary = json.loads((tmp_path / "out" / "bank" / "summary.json").read_text())
    assert set(summary["metrics"]) == {"joint", "alone"} - ({"alone"} if way == "side by side" else set())
    assert (summary["scheme"] is None) == (way == "open")
    sent = [json.loads((tmp_path / "out" / name / "summary.json").read_text())["bytes_sent"] for name in held]
    kinds = {kind for one in sent for kinds in one.values() for kind in kinds}
    assert kinds & {one for _, one in IN_CLEAR.values()} == {message}
    told = {(one["columns of"], one["reading"]): one for one in summary["leakage"]}
    holders = ["grocer", "telco"] if way == "side by side" else ["grocer + telco"]
    assert set(told) == {(name, epoch) for name in holders for epoch in (1, 2)}
    assert {one["embeddings"] for one in told.values()} == {4, 8}
    assert all((one["leak AUC"] is None) == (way == "side by side") for one in told.values())


def test_rows_may_have_weights(tmp_path):
    held = customers(400)
    held["bank"]["exposure"] = np.random.default_rng(1).uniform(0.5, 3, len(held["bank"]))
    paths = build(tmp_path, held, model=BOLD + "residual_range = 8\n", sign=False)
    bank = paths["bank"].read_text().replace(", 'exposure'", "")
    paths["bank"].write_text(bank + 'weight = "exposure"\n')
    for path in paths.values():
        assert colonnade("sign", path)[0] == 0
    codes, errors = together({name: ["run", path, "--events"] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    x, coef, y, weights = [], [], np.empty(0), np.empty(0)
    for name, table in held.items():
        rows = pd.read_csv(tmp_path / "out" / name / "rows.csv")
        train = rows["part"].to_numpy() == "train"
        share = json.loads((tmp_path / "out" / name / "model.json").read_text())
        part = table.iloc[rows["row"]][train]
        x.append(StandardScaler().fit_transform(part[share["features"]]))
        coef += share["coef"][0]
        if name == "bank":
            y, weights = part["bad"] == "yes", part["exposure"]
    oracle = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(np.hstack(x), y, sample_weight=weights)
    assert np.abs(oracle.coef_[0] - coef).max() < 1e-3


def test_what_each_feature_holder_brings_is_measured_where_all_consent(tmp_path):
    held = customers(400)
    paths = build(tmp_path, held, model=BOLD + "leave_out = true\n")
    codes, errors = together({name: ["run", path, "--events"] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    figures = json.loads((tmp_path / "out" / "bank" / "summary.json").read_text())["metrics"]
    scored, bad = {}, np.empty(0)
    for name, table in held.items():
        rows = pd.read_csv(tmp_path / "out" / name / "rows.csv")
        share = json.loads((tmp_path / "out" / name / "model.json").read_text())
        part, test = table.iloc[rows["row"]], (rows["part"] == "test").to_numpy()
        values = part[share["features"]].to_numpy()
        scored[name] = StandardScaler().fit(values[~test]).transform(values)[test] @ share["coef"][0]
        bad = (part["bad"] == "yes").to_numpy()[test] if name == "bank" else bad
    for name in ("grocer", "telco"):
        others = sum(one for holder, one in scored.items() if holder != name)
        assert figures[f"without {name}"]["auc"] == pytest.approx(roc_auc_score(bad, others), abs=1e-3)
    assert set(figures) == {"joint", "alone", "without grocer", "without telco"}
    assert figures["joint"]["auc"] > figures["without grocer"]["auc"]  # its columns weigh most
    page = (tmp_path / "out" / "bank" / "report.html").read_text()
    heads = re.search(r"<th[^>]*>Joint</th>(<th[^>]*>Without \w+</th>)+</tr>", page)
    assert heads and re.findall(r"Without (\w+)", heads[0]) == ["grocer", "telco"]
    told = re.findall(r'<td class="n">([\d.]+)<span', page[heads.end() :])[:2]  # the first figure is the AUC
    assert [float(one) for one in told] == pytest.approx(
        [figures[f"without {name}"]["auc"] for name in ("grocer", "telco")], abs=1e-3
    )
