"""A bank and a telephone company, each in a process of its own, on UCI's bank marketing table (45,211 customers)."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from tests.world import build, together
from vfl.losses import Logistic

DATA = Path(__file__).parents[2] / "shared" / "data" / "bank" / "bank-full.csv.gz"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"needs UCI's bank marketing table at {DATA}")
CUT = 8  # columns 1-8 and the label at the bank, 9-16 at the telephone company


def tables() -> dict[str, pd.DataFrame]:
    whole = pd.read_csv(DATA, sep=";").rename(columns={"y": "bad"})
    ids = pd.Series([f"C{number:06d}" for number in range(len(whole))], name="id")
    columns = list(whole.columns[:-1])
    bank = pd.concat([ids, whole[columns[:CUT]], whole["bad"]], axis=1)
    telco = pd.concat([ids, whole[columns[CUT:]]], axis=1)
    return {"bank": bank, "telco": telco.sample(frac=1, random_state=1)}


def categories(table: pd.DataFrame) -> dict[str, list[str]]:
    """The text columns and their values."""
    features = table.drop(columns=["id", "bad"], errors="ignore")
    return {name: sorted(column.unique()) for name, column in features.items() if column.dtype.kind not in "if"}


def prepared(table: pd.DataFrame, training: np.ndarray) -> np.ndarray:
    """What scikit-learn makes of one party's columns, fitted on its training rows."""
    values, features = categories(table), table.drop(columns=["id", "bad"], errors="ignore")
    parts = [
        (OneHotEncoder(categories=[values[name]], drop="first") if name in values else "passthrough", [name])
        for name in features
    ]
    both = make_pipeline(make_column_transformer(*parts, sparse_threshold=0), StandardScaler())
    return both.fit(features[training]).transform(features)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    held = tables()
    paths = build(folder, held)
    for name, path in paths.items():
        declared = "".join(
            f"[prepare.categories.{one}]\nvalues = {all}\n" for one, all in categories(held[name]).items()
        )
        path.write_text(path.read_text() + declared)
    start = time.perf_counter()
    codes, errors = together({name: ["run", path] for name, path in paths.items()}, timeout=300)
    print(f"\nboth parties, from start to exit: {time.perf_counter() - start:.1f} s")
    assert set(codes.values()) == {0}, errors
    summaries = {name: json.loads((folder / "out" / name / "summary.json").read_text()) for name in held}
    print(json.dumps(summaries["bank"] | {"agreement": "", "notes": [], "evaluation": {}}, indent=1))
    return folder, held, summaries


def common_rows(folder: Path, held: dict[str, pd.DataFrame]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Joined features as scikit-learn prepares them, y, which rows were held out, and the joint weights."""
    rows = {name: pd.read_csv(folder / "out" / name / "rows.csv") for name in held}
    test = rows["bank"]["part"].to_numpy() == "test"
    blocks, weights = [], []
    for name, table in held.items():
        share = json.loads((folder / "out" / name / "model.json").read_text())
        ordered = table.iloc[rows[name]["row"]]
        blocks.append(prepared(ordered, ~test))
        weights.append(np.array(share["coef"][0]))
        if name == "bank":
            y, offset = (ordered["bad"] == "yes").to_numpy(float), share["intercept"][0]
    return np.hstack(blocks), y, test, np.append(np.concatenate(weights), offset)


def test_the_joint_model_is_scikit_learns_on_the_joined_table(run):
    folder, held, summaries = run
    x, y, test, weights = common_rows(folder, held)
    assert len(y) == 45_211 and summaries["bank"]["scheme"] == "lattice" and summaries["bank"]["converged"]
    central = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x[~test], y[~test])

    def objective(coef: np.ndarray, offset: float) -> float:
        return float(Logistic().values((x[~test] @ coef + offset)[:, None], y[~test][:, None]).mean()) + float(
            coef @ coef
        ) / (2 * (~test).sum())

    best = objective(central.coef_[0], float(central.intercept_[0]))
    gap = (objective(weights[:-1], weights[-1]) - best) / best
    ours, theirs = (roc_auc_score(y[test], x[test] @ coef) for coef in (weights[:-1], central.coef_[0]))
    print(
        f"gap {gap:.1e}, AUC {ours:.4f} against {theirs:.4f}, alone {summaries['bank']['metrics']['alone']['auc']:.4f}"
    )
    assert gap < 1e-6
    assert abs(ours - theirs) < 0.001
    assert summaries["bank"]["metrics"]["joint"]["auc"] == pytest.approx(ours, abs=1e-6)
    assert ours - summaries["bank"]["metrics"]["alone"]["auc"] > 0.2
