"""Columns of words across clients: the union of what each declares, against scikit-learn's encoder on all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from parties.errors import LocalError, Refused
from parties.horizontal import Horizontal
from parties.party_file import Party
from tests.test_horizontal_job import build, colonnade, patients, said
from tests.world import together
from vfl.horizontal.categories import codes, encode, encoder, expanded, union
from vfl.horizontal.federated import FederatedLogisticRegression, train
from vfl.horizontal.round_messages import Table
from vfl.horizontal.settings import Schema, reference
from vfl.horizontal.share import HorizontalModel
from vfl.horizontal.star import parse_table
from vfl.horizontal.trainer import Data

WARDS = {"site0": ["heart", "eye"], "site1": ["lung"], "site2": ["eye", "lung", "ear"]}  # nobody lies in "ear"
ALL = ["ear", "eye", "heart", "lung"]


def wards() -> dict[str, pd.DataFrame]:
    """Three sites with a column of words, in the middle; no site knows all of them."""
    generator, tables = np.random.default_rng(4), patients(3, rows=60)
    for name, table in tables.items():
        known = [ward for ward in WARDS[name] if ward != "ear"]
        table.insert(1, "ward", generator.choice(known, len(table)))
        sick = generator.random(len(table)) < table["ward"].map({"heart": 0.9, "eye": 0.2, "lung": 0.6})
        table["ill"] = np.where(sick, "yes", "no")
    return tables


def central(tables: dict[str, pd.DataFrame], standardise: bool) -> tuple[pd.DataFrame, Any]:
    """The rows of all, and scikit-learn's pipeline on them: words, then numbers."""
    rows = pd.concat(tables.values(), ignore_index=True)
    words = OneHotEncoder(categories=[ALL], sparse_output=False).fit_transform(rows[["ward"]].to_numpy(object))
    x = np.hstack([rows[["age"]], words, rows[["dose", "weight"]]])
    solver = LogisticRegression(solver="newton-cholesky", tol=1e-12)
    return rows, make_pipeline(*([StandardScaler()] if standardise else []), solver).fit(x, rows["ill"]).predict_proba(
        x
    )


@pytest.mark.parametrize("standardise", [False, True])
def test_clients_with_different_categories_fit_what_scikit_learn_fits_on_all_rows(standardise: bool) -> None:
    tables = wards()
    parts = {
        name: (
            table[["age", "ward", "dose", "weight"]].astype({"ward": pd.CategoricalDtype(WARDS[name])}),
            table["ill"],
        )
        for name, table in tables.items()
    }
    fitted = FederatedLogisticRegression(standardise=standardise).fit(parts)
    rows, expected = central(tables, standardise)
    np.testing.assert_allclose(fitted.predict_proba(rows), expected, atol=1e-5)


def test_on_the_command_line_every_site_declares_its_own_and_all_have_the_same_model(tmp_path: Path) -> None:
    tables = wards()
    paths = build(tmp_path, tables, sign=False)
    agreed(tmp_path, paths)
    codes_, errors = together({name: ["run", path] for name, path in paths.items()})
    assert codes_ == dict.fromkeys(paths, 0), errors
    rows, expected = central(tables, standardise=False)
    for name in paths:
        model = HorizontalModel.load(tmp_path / "out" / name / "model.json")
        assert model.categories == {"ward": ALL} and len(model.coef[0]) == 7
        np.testing.assert_allclose(model.estimator().predict_proba(rows[model.features]), expected, atol=1e-5)
    new = rows.assign(ward="knee")[model.features]  # a word that nobody declared counts as none
    assert np.isfinite(model.estimator().predict_proba(new)).all()


def agreed(folder: Path, paths: dict[str, Path], declared: dict[str, list[str]] | None = None) -> None:
    """Make `ward` a column of the agreement, let the sites declare, and sign."""
    file = folder / "agreement.toml"
    text = file.read_text().replace('["age", "dose", "weight"]', '["age", "ward", "dose", "weight"]')
    file.write_text(text.replace('label = "ill"', 'label = "ill"\ncategories = ["ward"]'))
    for name, path in paths.items():
        if name in WARDS:
            path.write_text(path.read_text() + f"categories = {{ ward = {(declared or WARDS)[name]} }}\n")
        if declared is None:
            Party(path).sign()


def test_check_and_sign_name_words_that_are_not_declared(tmp_path: Path) -> None:
    paths = build(tmp_path, wards(), sign=False)
    plain = paths["site0"].read_text()
    agreed(tmp_path, paths, WARDS | {"site0": ["heart"]})
    for command in ("check", "sign"):
        assert "'ward': " in said(2, command, paths["site0"])
    assert "none of the 1 declared categories" in said(2, "check", paths["site0"])
    paths["site0"].write_text(plain)
    assert "lists categories of the columns that the agreement names, and of no other: see 'ward'" in said(
        2, "check", paths["site0"]
    )
    paths["site0"].write_text(plain + 'categories = { ward = ["heart", "eye"], age = ["old"] }\n')
    assert "see 'age'" in said(2, "check", paths["site0"])


def test_words_at_one_client_and_numbers_at_another_are_refused_with_the_difference() -> None:
    y = np.array([0, 1])
    words = Data(np.array([[0.0], [1.0]]), y, ("ward",), categories={"ward": ("eye", "ear")})
    parts = {"c0": words, "c1": words, "c2": Data(np.ones((2, 1)), y, ("ward",))}
    with pytest.raises(Refused, match="c2 has numbers in column 'ward', as c0 has"):
        train(parts, Horizontal())
    with pytest.raises(Refused, match="c1 has categories in column 'ward', as c0 has"):
        train({"c0": parts["c2"], "c1": words, "c2": words}, Horizontal())


def test_what_a_peer_declares_is_bounded_in_number_length_and_wording() -> None:
    """Every other client would make a column of each."""

    def told(**given: Any) -> Schema:
        return parse_table(Table(np.frombuffer(msgspec.json.encode({"model": "linear", **given}), np.uint8)))

    many = [str(place) for place in range(10_001)]
    assert told(categories={"ward": many[1:]}, short="rows").short == "rows"
    for wrong in ({"categories": {"ward": many}}, {"categories": {"ward": ["x" * 257]}}, {"short": "rows\nof theirs"}):
        with pytest.raises(ValueError, match="does not parse"):
            told(**wrong)
    with pytest.raises(ValueError, match="does not parse"):
        told(model="linear\x1b[2J")
    halves = {name: told(categories={"ward": part}) for name, part in (("c0", many[:6000]), ("c1", many[5000:]))}
    with pytest.raises(Refused, match="column 'ward': all clients together declare 10001 categories"):
        reference(Horizontal(model="linear"), halves)


def test_simulate_takes_the_words_that_occur(tmp_path: Path) -> None:
    pd.concat(wards().values()).to_csv(tmp_path / "all.csv", index=False)
    (tmp_path / "job.toml").write_text(
        '[horizontal]\nclasses = ["no", "yes"]\n[columns]\nfeatures = ["age", "ward"]\ncategories = ["ward"]\n'
        'label = "ill"\n'
    )
    options = ["--data", tmp_path / "all.csv", "--clients", 4, "--out", tmp_path, "--workers", 1]
    code, _, error = colonnade("simulate", tmp_path / "job.toml", *options)
    assert code == 0, error


def test_encoding_is_scikit_learns() -> None:
    generator, columns = np.random.default_rng(0), ("a", "b", "c")
    ours, wanted = {"a": ["y", "x"], "c": ["p"]}, union([{"a": ["y", "x"], "c": ["p"]}, {"a": ["z"], "c": ["q", "p"]}])
    assert wanted == {"a": ("x", "y", "z"), "c": ("p", "q")}
    assert expanded(columns, wanted) == ("a=x", "a=y", "a=z", "b", "c=p", "c=q")
    x = np.column_stack([generator.integers(0, 2, 20), generator.normal(size=20), np.zeros(20)])
    table = pd.DataFrame({"a": np.array(ours["a"])[x[:, 0].astype(int)], "b": x[:, 1], "c": "p"})
    got = encode(x, columns, ours, wanted)
    np.testing.assert_array_equal(got, encoder(columns, wanted).transform(table))
    dummies = pd.get_dummies(table["a"]).reindex(columns=list("xyz"), fill_value=False)
    np.testing.assert_array_equal(got[:, :3], dummies)
    np.testing.assert_array_equal(codes(np.array(["x", "y "]), ours["a"], "t"), [1, 0])


def test_codes_without_a_category_are_counted() -> None:
    with pytest.raises(LocalError, match="column 'a': 2 values are none of the 1 declared"):
        encode(np.array([[0.0], [-1.0], [0.5]]), ("a",), {"a": ["x"]}, {"a": ("x",)})
    with pytest.raises(LocalError, match="t: 1 of 2 values are none of the 1 declared categories"):
        codes(np.array(["x", "q"]), ["x"], "t")


def test_an_agreement_calls_features_categories_and_nothing_else(tmp_path: Path) -> None:
    paths = build(tmp_path, patients(3), sign=False)
    file = tmp_path / "agreement.toml"
    file.write_text(file.read_text().replace('label = "ill"', 'label = "ill"\ncategories = ["ill"]'))
    assert "categories name the column 'ill', which is no feature" in said(2, "check", paths["site0"])
