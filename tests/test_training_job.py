"""The main job on tables as organisations have them, with text, gaps and long tails: real processes, the model that
scikit-learn finds on the joined table, and one line for what cannot be prepared."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import KBinsDiscretizer, OneHotEncoder, StandardScaler

from parties.agreement import Agreement
from tests.world import build, colonnade, edit, together

JOBS = ["clerk", "nurse", "smith"]
CONTACTS = ["cellular", "telephone", "letter"]
PREPARE = {
    "bank": """
[prepare.numbers.age]
missing = "median"
indicator = true
[prepare.numbers.balance]
bins = 4
[prepare.categories.job]
values = ["clerk", "nurse", "smith"]
unseen = "other"
""",
    "telco": """
[prepare.categories.contact]
values = ["cellular", "telephone", "letter"]
fill = "telephone"
[prepare.numbers.minutes]
missing = "mean"
scale = "standard"
""",
}
NAMES = {
    "bank": ["age", "age missing", *(f"balance bin {n}" for n in (2, 3, 4)), "job=nurse", "job=smith", "job other"],
    "telco": ["contact=telephone", "contact=letter", "minutes", "calls"],
}


def customers(rows: int, seed: int) -> dict[str, pd.DataFrame]:
    """A bank and a telephone company: gaps in age, contact and minutes; jobs that nobody declared."""
    rng = np.random.default_rng(seed)
    jobs = rng.choice([*JOBS, "diver", "mime"], rows, p=[0.3, 0.3, 0.25, 0.1, 0.05])
    contacts = rng.choice(CONTACTS, rows, p=[0.5, 0.3, 0.2])
    age, balance, minutes = rng.normal(41, 11, rows), rng.lognormal(6, 1.5, rows), rng.normal(5, 2, rows)
    score = (minutes - 5) / 2 + (contacts == "letter") * 1.5 - (jobs == "nurse") + (age - 41) / 20 - 0.3
    bad = np.where(rng.random(rows) < 1 / (1 + np.exp(-score)), "yes", "no")
    ids = [f"customer-{seed}-{number:04d}" for number in range(rows)]
    bank = pd.DataFrame({"id": ids, "age": age, "balance": balance, "job": jobs, "bad": bad})
    telco = pd.DataFrame({"id": ids, "contact": contacts, "minutes": minutes, "calls": rng.poisson(4, rows)})
    bank.loc[rng.random(rows) < 0.15, "age"] = np.nan
    telco.loc[rng.random(rows) < 0.1, "contact"] = np.nan
    telco.loc[rng.random(rows) < 0.1, "minutes"] = np.nan
    return {"bank": bank.sample(frac=0.95, random_state=1), "telco": telco.sample(frac=0.95, random_state=2)}


def organisations(folder: Path, tables: dict[str, pd.DataFrame], model: str = "") -> dict[str, Path]:
    paths = build(folder, tables, model=model, connect=20)
    for name, path in paths.items():
        path.write_text(path.read_text() + PREPARE[name])
    return paths


def theirs() -> dict[str, object]:
    """Scikit-learn's own preparation of each party's columns."""
    quantiles = KBinsDiscretizer(4, encode="ordinal", quantile_method="averaged_inverted_cdf", subsample=None)
    job = OneHotEncoder(categories=[[*JOBS, "other"]], drop="first", sparse_output=False)
    contact = OneHotEncoder(categories=[CONTACTS], drop="first", sparse_output=False)
    bank = make_column_transformer(
        (SimpleImputer(strategy="median", add_indicator=True), ["age"]),
        (make_pipeline(quantiles, OneHotEncoder(drop="first", sparse_output=False)), ["balance"]),
        (job, ["job"]),
    )
    telco = make_column_transformer(
        (make_pipeline(SimpleImputer(strategy="constant", fill_value="telephone"), contact), ["contact"]),
        (SimpleImputer(strategy="mean"), ["minutes"]),
        ("passthrough", ["calls"]),
    )
    return {name: make_pipeline(one, StandardScaler()) for name, one in (("bank", bank), ("telco", telco))}


def with_others(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """As scikit-learn wants them: what is not declared is "other"."""
    bank = tables["bank"]
    return tables | {"bank": bank.assign(job=bank["job"].where(bank["job"].isin(JOBS), "other"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of two parties, and new rows that they have scored."""
    folder = tmp_path_factory.mktemp("raw")
    tables, new = customers(400, 1), customers(120, 2)
    paths = organisations(folder, tables, "test_fraction = 0.25\nallow_reconstruction = true")
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes == dict.fromkeys(tables, 0), errors
    for name, table in new.items():
        table.drop(columns="bad", errors="ignore").to_csv(folder / f"new_{name}.csv", index=False)
    commands = {name: ["predict", path, "--input", folder / f"new_{name}.csv"] for name, path in paths.items()}
    commands["bank"] += ["--output", folder / "scores.csv"]
    codes, errors = together(commands)
    assert codes == dict.fromkeys(tables, 0), errors
    return folder, tables, paths, new


@pytest.fixture(scope="module")
def central(finished):
    """Scikit-learn on the joined table: the preparations, the model, and the training rows' part of the truth."""
    folder, tables, _, _ = finished
    rows = {name: pd.read_csv(folder / "out" / name / "rows.csv") for name in tables}
    test = (rows["bank"]["part"] == "test").to_numpy()
    joined = {name: one.iloc[rows[name]["row"]].reset_index(drop=True) for name, one in with_others(tables).items()}
    y = (joined["bank"]["bad"] == "yes").to_numpy()
    prepared = {name: one.fit(joined[name][~test]) for name, one in theirs().items()}
    x = np.hstack([one.transform(joined[name]) for name, one in prepared.items()])
    model = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x[~test], y[~test])
    return {"prepared": prepared, "model": model, "x": x[test], "y": y[test], "scores": rows["bank"]["score"][test]}


def share(folder: Path, name: str) -> dict:
    return json.loads((folder / "out" / name / "model.json").read_text())


# ---- the model


def test_raw_columns_give_the_model_of_the_joined_table(finished, central):
    folder, tables, _, _ = finished
    shares = [share(folder, name) for name in tables]
    assert [one["features"] for one in shares] == list(NAMES.values())
    coefficients = np.concatenate([one["coef"][0] for one in shares])
    assert np.abs(coefficients - central["model"].coef_[0]).max() < 1e-3
    expected = central["model"].predict_proba(central["x"])[:, 1]
    assert np.abs(central["scores"] - expected).max() < 1e-3


def test_new_rows_are_prepared_as_the_training_rows_were(finished, central):
    folder, _, _, new = finished
    scores = pd.read_csv(folder / "scores.csv").set_index("id")["score"]
    both = sorted(set(new["bank"]["id"]) & set(new["telco"]["id"]))
    assert sorted(scores.index) == both
    rows = {name: table.set_index("id").loc[both] for name, table in with_others(new).items()}
    x = np.hstack([one.transform(rows[name]) for name, one in central["prepared"].items()])
    expected = central["model"].predict_proba(x)[:, 1]
    assert np.abs(scores.loc[both] - expected).max() < 1e-3


def test_the_label_holder_sees_what_joining_brought(finished, central):
    folder, _, _, _ = finished
    summary = json.loads((folder / "out" / "bank" / "summary.json").read_text())
    models = summary["evaluation"]["models"]
    assert set(models) == {"joint", "alone"}
    assert summary["metrics"] == {name: one["figures"] for name, one in models.items()}
    assert summary["metrics"]["joint"]["auc"] == pytest.approx(roc_auc_score(central["y"], central["scores"]))
    assert summary["metrics"]["joint"]["log_loss"] == pytest.approx(log_loss(central["y"], central["scores"]))
    page = (folder / "out" / "bank" / "report.html").read_text()
    assert f"{summary['metrics']['joint']['auc']:.4f}" in page and f"{summary['metrics']['alone']['auc']:.4f}" in page
    assert all(phase in page for phase in ("align", "train", "score")) and summary["encryption"]["strength"] in page
    assert "customer-1" not in page.lower()


def test_feature_holders_get_no_figures(finished):
    folder, _, _, _ = finished
    assert not (folder / "out" / "telco" / "report.html").exists()
    summary = json.loads((folder / "out" / "telco" / "summary.json").read_text())
    assert not {"metrics", "evaluation"} & set(summary)


def test_check_shows_the_columns_once_they_are_prepared(finished):
    _, _, paths, _ = finished
    code, out, _ = colonnade("check", paths["telco"])
    plain = " ".join(out.replace("│", " ").split())
    assert code == 0 and "columns 3: contact, minutes, calls prepared 4: contact=telephone" in plain


def test_columns_that_depend_on_others_are_named_and_solved_for(tmp_path):
    tables = customers(150, 3)
    tables["telco"] = tables["telco"][["id", "calls"]].assign(again=3 * tables["telco"]["calls"] - 1)
    tables["bank"] = tables["bank"].drop(columns=["job", "balance"]).dropna()
    paths = build(tmp_path, tables, model="test_fraction = 0.0\nallow_reconstruction = true")
    codes, errors = together({name: ["run", path] for name, path in paths.items()})
    assert set(codes.values()) == {0}, errors
    assert re.search("columns that others of ours add up to: '(calls|again)'", errors["telco"])
    assert "add up to" not in errors["bank"]
    joined = tables["bank"].merge(tables["telco"], on="id")
    x = StandardScaler().fit_transform(joined[["age", "calls", "again"]])
    oracle = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x, joined["bad"] == "yes")
    coefficients = np.concatenate([share(tmp_path, name)["coef"][0] for name in tables])
    assert np.abs(coefficients - oracle.coef_[0]).max() < 1e-3
    assert not (tmp_path / "out" / "bank" / "report.html").exists()  # nothing was held out


# ---- what cannot be prepared


def spoil(column, change):
    def act(folder: Path) -> None:
        table = pd.read_csv(folder / "telco.csv", dtype=str, keep_default_na=False)
        table[column] = change(table[column])
        table.to_csv(folder / "telco.csv", index=False)

    return act


def few_gaps(folder: Path) -> None:
    edit(folder / "telco.toml", 'missing = "mean"', 'missing = "mean"\nindicator = true')
    spoil("minutes", lambda c: ["", "", "", *(f"{number}.5" for number in range(len(c) - 3))])(folder)


def limited(folder: Path) -> None:
    edit(folder / "agreement.toml", 'name = "telco"', 'name = "telco"\ncolumns = 3')


MINUTES = "[prepare.numbers.minutes]"
AGGREGATE = '[table]\nduplicates = "aggregate"\naggregate = { contact = "max", minutes = "sum", calls = "sum" }'
REFUSED = {
    "a category that is not declared": (
        spoil("contact", lambda c: ["pigeon", "pigeon", *c[2:]]),
        r"telco.csv: column 'contact': 2 values that are not declared; declare them, or set unseen",
    ),
    "a rare category": (
        spoil("contact", lambda c: ["letter" if n < 4 else "cellular" for n in range(len(c))]),
        r"telco.csv: column 'contact': 2 of 3 declared values have fewer than 10 training rows; merge them",
    ),
    "a constant column": (
        spoil("calls", lambda c: ["4"] * len(c)),
        r"telco.csv: column 'calls': constant among the training rows; drop the column",
    ),
    "a constant category": (
        spoil("contact", lambda c: ["letter"] * len(c)),
        r"telco.csv: column 'contact': 2 of 3 declared values have fewer than 10",
    ),
    "a column without a value": (
        spoil("minutes", lambda c: [""] * len(c)),
        r"telco.csv: column 'minutes': no value among the training rows; drop the column",
    ),
    "a gap that nobody fills": (spoil("calls", lambda c: ["", *c[1:]]), r"telco.csv: .*'calls' 1 missing"),
    "text among numbers with gaps": (spoil("minutes", lambda c: ["", "pigeon", *c[2:]]), r"'minutes' 1 not numbers"),
    "an indicator of few gaps": (
        few_gaps,
        r"'minutes': 3 of \d+ training values are missing and an indicator needs 10 of either kind",
    ),
    "more bins than values": (
        lambda f: edit(f / "telco.toml", MINUTES, "[prepare.numbers.calls]\nbins = 50\n" + MINUTES),
        r"'calls': 50 bins for \d+ distinct training values; set fewer bins",
    ),
    "a column that is no feature": (
        lambda f: edit(f / "telco.toml", MINUTES, "[prepare.numbers.minute]"),
        r"telco.csv: .*'minutes' \d+ missing",
    ),
    "another column that is no feature": (
        lambda f: edit(f / "telco.toml", MINUTES, "[prepare.numbers.second]\nbins = 3\n" + MINUTES),
        r"telco.csv: \[prepare\] names 'second', no features of ours; correct it",
    ),
    "an option that is none": (
        lambda f: edit(f / "telco.toml", 'missing = "mean"', 'missing = "guess"'),
        r"telco.toml.*missing",
    ),
    "text that is to be summed": (
        lambda f: edit(f / "telco.toml", "[table]", AGGREGATE),
        r"telco.toml.*numbers, none missing: see 'contact' in \[prepare\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_prepared_is_one_line_before_anything_is_sent(tmp_path, case):
    spoiled, expected = REFUSED[case]
    paths = organisations(tmp_path, customers(110, 4))
    spoiled(tmp_path)
    colonnade("sign", paths["telco"])
    code, out, err = colonnade("run", paths["telco"])
    lines = [line for line in err.splitlines() if line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("colonnade: "), err
    assert re.search(expected, lines[0]), lines[0]
    assert "Traceback" not in err + out and "pigeon" not in err and "customer-" not in err
    assert not (tmp_path / "out" / "telco" / "ledger.jsonl").exists()


def test_a_weight_below_zero_is_refused_before_anything_is_sent(tmp_path):
    tables = customers(110, 4)
    tables["bank"]["worth"] = np.linspace(-1, 2, len(tables["bank"]))
    paths = organisations(tmp_path, tables)
    edit(paths["bank"], ", 'worth']", "]\nweight = 'worth'")
    code, _, err = colonnade("run", paths["bank"])
    assert code == 2 and "bank.csv, column 'worth': sample weights are" in err and "none negative" in err, err
    assert not (tmp_path / "out" / "bank" / "ledger.jsonl").exists()


def test_fewer_rows_than_prepared_columns_are_refused(tmp_path):
    tables = customers(110, 4)
    tables["bank"] = tables["bank"].iloc[:25].assign(job=[f"job {number}" for number in range(25)])
    paths = organisations(tmp_path, tables)
    edit(paths["bank"], f'{json.dumps(JOBS)}\nunseen = "other"', json.dumps(tables["bank"]["job"].tolist()))
    code, _, err = colonnade("run", paths["bank"])
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert re.search(r"bank.csv: 25 rows for \d\d prepared columns; bring more rows", err)


def test_more_prepared_columns_than_agreed_are_refused(tmp_path):
    paths = organisations(tmp_path, customers(110, 4))
    limited(tmp_path)
    colonnade("sign", paths["telco"])
    code, _, err = colonnade("run", paths["telco"])
    assert code == 3 and "4 columns once they are prepared; the agreement allows us 3" in err


# ---- what cannot be scored


def scoring(finished, tmp_path: Path, change) -> tuple[int, str]:
    """The telephone company's new rows, changed; nobody else is there."""
    _, _, paths, new = finished
    change(new["telco"].copy()).to_csv(tmp_path / "new.csv", index=False)
    code, _, err = colonnade("predict", paths["telco"], "--input", tmp_path / "new.csv")
    assert len(err.strip().splitlines()) == 1 and "pigeon" not in err
    return code, err


def test_a_category_that_was_not_declared_at_training_is_refused_at_scoring(finished, tmp_path):
    code, err = scoring(finished, tmp_path, lambda t: t.assign(contact=["pigeon", *t["contact"][1:]]))
    assert code == 2 and "new.csv: column 'contact': 1 values that are not declared" in err


def test_a_gap_that_was_not_filled_at_training_is_refused_at_scoring(finished, tmp_path):
    code, err = scoring(finished, tmp_path, lambda t: t.assign(calls=[np.nan, *t["calls"][1:]]))
    assert code == 2 and "new.csv: features with unusable values: 'calls' 1 missing" in err


def test_a_share_of_another_agreement_is_refused(finished, tmp_path):
    folder, _, _, _ = finished
    for name in ("agreement.toml", "telco.key", "telco.csv", "telco.toml"):
        shutil.copy(folder / name, tmp_path / name)
    edit(tmp_path / "agreement.toml", "to test", "to sell")
    assert Agreement.load(tmp_path / "agreement.toml").digest != Agreement.load(folder / "agreement.toml").digest
    assert colonnade("sign", tmp_path / "telco.toml")[0] == 0
    trained = folder / "out" / "telco" / "model.json"
    code, _, err = colonnade("predict", tmp_path / "telco.toml", "--input", tmp_path / "telco.csv", "--model", trained)
    assert code == 3 and len(err.strip().splitlines()) == 1
    assert "was trained under another agreement or by another party; train again" in err


def test_a_share_whose_preparation_was_changed_is_refused(finished, tmp_path):
    folder, _, paths, _ = finished
    altered = share(folder, "telco")
    altered["prepared"]["columns"]["contact"]["values"].pop()
    (tmp_path / "model.json").write_text(json.dumps(altered))
    code, _, err = colonnade(
        "predict", paths["telco"], "--input", folder / "new_telco.csv", "--model", tmp_path / "model.json"
    )
    assert code == 2 and "model.json" in err and len(err.strip().splitlines()) == 1
