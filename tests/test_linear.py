"""Vertical logistic regression is scikit-learn's on the joined table, and refuses what it must before data moves."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from parties.errors import LocalError, PeerAborted, ProtocolViolation, Refused
from parties.memory import outcomes
from tests.training import agreed, centralised, fit, joined, kinds, objective, sent, table
from vfl import sgd
from vfl.inputs import leverage, rank
from vfl.linear import VerticalLogisticRegression
from vfl.messages import PartialEmbedding

DATA_MESSAGES = {
    "PartialEmbedding",
    "MaskedEmbedding",
    "SealedResidual",
    "SealedGradient",
    "OpenedGradient",
    "PartialScalars",
    "MaskedScalars",
    "Direction",
    "Step",
}
CASES = [
    pytest.param((2, 1.0, True), id="2 parties, C=1, intercept"),
    pytest.param((2, 10.0, False), id="2 parties, C=10, no intercept"),
    pytest.param((3, 0.1, True), id="3 parties, C=0.1, intercept"),
    pytest.param((3, 1.0, False), id="3 parties, C=1, no intercept"),
    pytest.param((4, 1.0, True), id="4 parties, C=1, intercept"),
    pytest.param((4, 10.0, False), id="4 parties, C=10, no intercept"),
]
NEW = 17


@pytest.fixture(scope="module")
def runs(secret, tmp_path_factory) -> Any:
    """case -> everything one run left: train on the first rows, score the last NEW, in one session; kept."""
    cache: dict[Any, Any] = {}

    def run(case: tuple[int, float, bool]) -> dict[str, Any]:
        if case in cache:
            return cache[case]
        parties, C, fit_intercept = case
        parts, y = table(parties, 117, seed=parties)
        words = np.where(y == 1, "good", "bad") if parties == 3 else y
        new = {name: part.iloc[-NEW:] for name, part in parts.items()}
        old = {name: part.iloc[:-NEW] for name, part in parts.items()}
        agreement = agreed(list(parts), model={"allow_reconstruction": True})
        folder = tmp_path_factory.mktemp("shares")

        def then(model: VerticalLogisticRegression, session: Any) -> dict[str, Any]:
            x, truth = new[session.name], words[-NEW:] if session.is_label_holder else None
            model.save(folder / f"{session.name}.json")
            return {
                "model": model,
                "scores": model.decision_function(x, session=session),
                "probabilities": model.predict_proba(x, session=session),
                "classes": model.predict(x, session=session),
                "accuracy": model.score(x, truth, session=session),
            }

        params = {"C": C, "fit_intercept": fit_intercept}
        ended = fit(old, words[:-NEW], secret, params=params, then=then, **agreement)
        oracle = centralised(old, words[:-NEW], C, fit_intercept)
        cache[case] = {
            "parts": old, "new": new, "y": y[:-NEW], "truth": words[-NEW:], "ended": ended, "oracle": oracle,
            "folder": folder, "agreement": agreement, "C": C,
        }  # fmt: skip
        return cache[case]

    return run


@pytest.fixture(scope="module")
def three(runs) -> dict[str, Any]:
    return runs((3, 0.1, True))


def joint(run: dict[str, Any]) -> tuple[np.ndarray, float]:
    models = [ended["model"] for ended in run["ended"].values()]
    return np.hstack([model.coef_[0] for model in models]), float(models[0].intercept_[0])


# The optimum


@pytest.mark.parametrize("case", CASES)
def test_all_parties_together_hold_the_coefficients_that_scikit_learn_finds_on_the_joined_table(runs, case):
    run = runs(case)
    coef, intercept = joint(run)
    assert np.abs(coef - run["oracle"].coef_[0]).max() < 1e-3
    assert abs(intercept - run["oracle"].intercept_[0]) < 1e-3
    assert (intercept == 0) == (not case[2])


@pytest.mark.parametrize("case", CASES)
def test_no_objective_is_left_on_the_table(runs, case):
    run = runs(case)
    x, y, C = joined(run["parts"]), run["y"], run["C"]
    ours = objective(x, y, *joint(run), C)
    best = objective(x, y, run["oracle"].coef_[0], run["oracle"].intercept_[0], C)
    assert -1e-9 < ours - best < 1e-6
    told = next(iter(run["ended"].values()))["model"].objective_
    assert told == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_scores_of_new_rows_are_the_centralised_ones_and_stay_with_the_label_holder(runs, case):
    run = runs(case)
    holder, *others = run["ended"].values()
    x = joined(run["new"])
    np.testing.assert_allclose(holder["scores"], run["oracle"].decision_function(x), atol=1e-3)
    np.testing.assert_allclose(holder["probabilities"], run["oracle"].predict_proba(x), atol=1e-4)
    assert holder["classes"].tolist() == run["oracle"].predict(x).tolist()
    assert holder["accuracy"] == pytest.approx(run["oracle"].score(x, run["truth"]))
    for ended in others:
        assert [ended[what] for what in ("scores", "probabilities", "classes", "accuracy")] == [None] * 4


def test_all_parties_agree_that_it_converged_and_after_how_many_exchanges(runs):
    for case in (param.values[0] for param in CASES):
        models = [ended["model"] for ended in runs(case)["ended"].values()]
        assert {model.converged_ for model in models} == {True}
        assert len({model.n_iter_ for model in models}) == 1
        assert models[0].gradient_norm_ <= models[0].tol


def test_training_that_reaches_max_iter_stops_there_and_every_party_knows_that_it_did_not_converge(secret):
    parts, y = table(3, 80)
    recorded: Any = {}
    ended = fit(parts, y, secret, params={"max_iter": 2}, recorded=recorded)
    assert [(model.n_iter_, model.converged_) for model in ended.values()] == [(2, False)] * 3
    assert kinds(recorded, "bank", "grocer").count("SealedResidual") == 2


# scikit-learn's contract, per party


def test_every_party_has_scikit_learns_attributes_for_its_own_columns(three):
    for name, ended in three["ended"].items():
        model, part = ended["model"], three["parts"][name]
        assert model.coef_.shape == (1, part.shape[1])
        assert model.intercept_.shape == (1,)
        assert list(model.feature_names_in_) == list(part.columns)
        assert model.n_features_in_ == part.shape[1]
        assert isinstance(model.n_iter_, int)


def test_the_intercept_and_the_classes_are_the_label_holders_alone(three):
    bank, grocer, mobile = (ended["model"] for ended in three["ended"].values())
    assert bank.classes_.tolist() == ["bad", "good"]
    assert bank.intercept_[0] != 0
    for model in (grocer, mobile):
        assert model.intercept_.tolist() == [0.0]
        assert not hasattr(model, "classes_")


def test_an_array_without_names_trains_the_same_model_as_a_table(secret):
    parts, y = table(3, 80)
    named = fit(parts, y, secret)
    bare = fit({name: part.to_numpy() for name, part in parts.items()}, y, secret)
    for name, model in bare.items():
        assert model.n_features_in_ == parts[name].shape[1]
        np.testing.assert_allclose(model.coef_, named[name].coef_, atol=1e-5)


def test_hyper_parameters_can_be_read_set_and_cloned():
    model = VerticalLogisticRegression(C=3.0, solver="sgd", batch_size=9)
    assert model.get_params()["C"] == 3.0
    assert model.set_params(C=4.0) is model
    twin = clone(model)
    assert twin is not model
    assert twin.get_params() == model.get_params() | {"C": 4.0}
    with pytest.raises(ValueError, match="Invalid parameter"):
        model.set_params(nonsense=1)


def test_a_model_that_was_not_trained_scores_nothing(secret):
    parts, _ = table(3, 20)
    roles = {n: lambda s: VerticalLogisticRegression().predict_proba(parts[s.name], session=s) for n in parts}
    assert {type(error) for error in outcomes(roles, **agreed(list(parts))).values()} == {NotFittedError}


# sgd


def test_the_batches_of_an_epoch_hold_every_row_once_and_none_is_smaller_than_agreed():
    for rows, size in ((100, 32), (96, 32), (31, 32), (65, 32)):
        plan = sgd.batches(rows, size, 3, seed=5)
        per_epoch = max(rows // size, 1)
        assert len(plan) == 3 * per_epoch
        assert all(len(batch) >= min(size, rows) for batch in plan)
        for start in range(0, len(plan), per_epoch):
            assert sorted(np.concatenate(plan[start : start + per_epoch])) == list(range(rows))
    assert sgd.batches(100, 32, 1, seed=5)[0].tolist() != sgd.batches(100, 32, 1, seed=6)[0].tolist()


@pytest.mark.parametrize("parties", [2, 3])
def test_sgd_takes_exactly_the_steps_of_a_plain_loop_over_the_joined_table(secret, parties):
    parts, y = table(parties, 100)
    rate, C, seed = 0.3, 2.0, 7
    params = {"solver": "sgd", "C": C, "epochs": 3, "batch_size": 32, "learning_rate": rate, "random_state": seed}
    ended = fit(parts, y, secret, params=params, policy={"allow_reconstruction": True})

    bank = parts["bank"].to_numpy()
    alone = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12).fit(bank, y)
    x = np.hstack([bank, *(np.rint(parts[name] * 2**20) / 2**20 for name in list(parts)[1:]), np.ones((100, 1))])
    weights = np.zeros(x.shape[1])
    weights[: bank.shape[1]], weights[-1] = alone.coef_[0], alone.intercept_[0]
    penalty = np.append(np.full(x.shape[1] - 1, 1 / (C * 100)), 0.0)
    for rows in sgd.batches(100, 32, 3, seed):
        residual = expit(x[rows] @ weights) - y[rows]
        weights -= rate * (x[rows].T @ residual / len(rows) + penalty * weights)

    coef = np.hstack([model.coef_[0] for model in ended.values()])
    np.testing.assert_allclose(coef, weights[:-1], atol=1e-5)
    assert ended["bank"].intercept_[0] == pytest.approx(weights[-1], abs=1e-5)
    assert {(model.n_iter_, model.converged_) for model in ended.values()} == {(9, ended["bank"].converged_)}


# Shares


def test_a_saved_and_loaded_share_is_the_model_that_was_saved(three):
    for name, ended in three["ended"].items():
        model, loaded = ended["model"], VerticalLogisticRegression.load(three["folder"] / f"{name}.json")
        assert loaded.get_params() == model.get_params()
        for what in ("coef_", "intercept_", "feature_names_in_"):
            assert getattr(loaded, what).tolist() == getattr(model, what).tolist()
        for what in ("n_features_in_", "n_iter_", "converged_", "training_", "agreement_", "party_"):
            assert getattr(loaded, what) == getattr(model, what)
    assert loaded.prepared_ is None


def test_a_share_is_private_to_its_user(three):
    assert (three["folder"] / "bank.json").stat().st_mode & 0o077 == 0


def score_loaded(run: dict[str, Any], folders: dict[str, Path], **options: Any) -> dict[str, Any]:
    def role(session: Any) -> Any:
        model = VerticalLogisticRegression.load(folders[session.name] / f"{session.name}.json")
        return model.predict_proba(run["new"][session.name], session=session)

    return outcomes(dict.fromkeys(folders, role), **run["agreement"], **options)


def test_loaded_shares_score_in_a_new_session_as_the_models_did(three):
    ended = score_loaded(three, dict.fromkeys(three["parts"], three["folder"]))
    np.testing.assert_allclose(ended["bank"], three["ended"]["bank"]["probabilities"], atol=1e-9)
    assert ended["grocer"] is ended["mobile"] is None


def test_a_share_of_another_training_is_refused_before_data_moves(three, runs):
    other = runs((3, 1.0, False))
    recorded: Any = {}
    folders = dict.fromkeys(three["parts"], three["folder"]) | {"mobile": other["folder"]}
    ended = score_loaded(three, folders, recorded=recorded)
    assert isinstance(ended["bank"], Refused)
    assert ended["bank"].peer == "mobile"
    assert all(isinstance(error, (Refused, PeerAborted)) for error in ended.values())
    assert nothing_left(recorded)


def altered_share(run: dict[str, Any], folder: Path, **fields: Any) -> Path:
    share = json.loads((run["folder"] / "bank.json").read_text()) | fields
    path = folder / "bank.json"
    path.write_text(json.dumps(share))
    return path


TWO = [0.25, 0.5]
CLASSES = ["bad", "good"]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"coef": [[float("nan"), 0.5]]}, id="NaN coefficient"),
        pytest.param({"coef": [[0.25]]}, id="a coefficient missing"),
        pytest.param({"coef": "0.25"}, id="coefficients of another type"),
        pytest.param({"params": {"C": 1.0, "depth": 3}}, id="unknown parameter"),
        pytest.param({"params": {"C": -1.0}}, id="parameter out of range"),
        pytest.param({"params": {"solver": "newton"}}, id="unknown solver"),
        pytest.param({"params": {"C": "high"}}, id="parameter of another type"),
        pytest.param({"surprise": 1}, id="unknown field"),
        pytest.param(
            {"colonnade_model": 2},
            id="another version",
        ),
        pytest.param(
            {"prepared": {"columns": {"bank_0": {"type": "number"}}, "mean": [1.0], "scale": [1.0]}},
            id="a preparation of another width",
        ),
        pytest.param(
            {"prepared": {"columns": {"bank_0": {"type": "number"}, "bank_1": {"type": "number"}}, "mean": TWO}},
            id="a preparation without scale",
        ),
        pytest.param(
            {
                "prepared": {
                    "columns": {"bank_0": {"type": "number"}, "bank_1": {"type": "number"}},
                    "mean": TWO,
                    "scale": [1.0, 0.0],
                }
            },
            id="a preparation that divides by zero",
        ),
        pytest.param(
            {"classes": ["good"]},
            id="one class",
        ),
    ],
)
def test_a_damaged_share_is_refused_by_name(three, tmp_path, fields):
    path = altered_share(three, tmp_path, **fields)
    with pytest.raises(LocalError, match=re.escape(str(path))) if "params" not in fields else pytest.raises(LocalError):
        VerticalLogisticRegression.load(path)


def test_a_truncated_or_missing_share_is_refused_by_name(three, tmp_path):
    path = tmp_path / "bank.json"
    with pytest.raises(LocalError, match=r"bank\.json"):
        VerticalLogisticRegression.load(path)
    path.write_bytes((three["folder"] / "bank.json").read_bytes()[:-20])
    with pytest.raises(LocalError, match=r"bank\.json"):
        VerticalLogisticRegression.load(path)


def test_a_model_of_boolean_labels_can_be_saved_and_loaded(secret, tmp_path):
    parts, y = table(3, 80)
    ended = fit(parts, y == 1, secret, params={"max_iter": 1})
    ended["bank"].save(tmp_path / "bank.json")
    assert VerticalLogisticRegression.load(tmp_path / "bank.json").classes_.tolist() == [False, True]


def test_scoring_wants_the_columns_of_training_in_their_order(three):
    model = three["ended"]["grocer"]["model"]
    wrong = three["new"]["grocer"].iloc[:, ::-1]
    with pytest.raises(LocalError, match="grocer_0, grocer_1, grocer_2"):
        model.predict_proba(wrong, session=None)


# Refused before data moves


def nothing_left(recorded: Any) -> bool:
    """Whether no frame between any two parties carried anything computed from data."""
    return not any(set(kinds(recorded, a, b)) & DATA_MESSAGES for a in recorded for b in recorded[a])


@pytest.mark.parametrize(
    "own",
    [
        {"C": 2.0},
        {"tol": 1e-5},
        {"max_iter": 7},
        {"fit_intercept": False},
        {"solver": "sgd"},
        {"batch_size": 50},
        {"learning_rate": 0.2},
        {"random_state": 1},
    ],
    ids=str,
)
def test_hyper_parameters_that_differ_are_refused_before_data_moves(secret, own):
    parts, y = table(3, 80)
    recorded: Any = {}
    ended = fit(parts, y, secret, own={"mobile": own}, recorded=recorded)
    assert isinstance(ended["bank"], (Refused, PeerAborted))
    assert all(isinstance(error, (Refused, PeerAborted)) for error in ended.values())
    assert any(isinstance(error, Refused) for error in ended.values())
    assert nothing_left(recorded)


@pytest.mark.parametrize("C", [1, np.float64(1.0)], ids=["int", "numpy"])
def test_equal_hyper_parameters_are_equal_however_they_are_written(secret, C):
    parts, y = table(3, 80)
    ended = fit(parts, y, secret, params={"C": 1.0, "max_iter": 1}, own={"mobile": {"C": C}})
    assert all(isinstance(model, VerticalLogisticRegression) for model in ended.values())


@pytest.mark.parametrize(
    "params", [{"C": 0.0}, {"C": float("nan")}, {"tol": -1.0}, {"max_iter": 0}, {"solver": "adam"}]
)
def test_hyper_parameters_without_meaning_are_refused_before_data_moves(secret, params):
    parts, y = table(3, 80)
    recorded: Any = {}
    ended = fit(parts, y, secret, params=params, recorded=recorded)
    assert all(isinstance(error, (LocalError, PeerAborted)) for error in ended.values())
    assert any(isinstance(error, LocalError) for error in ended.values())
    assert nothing_left(recorded)


def test_tables_of_different_length_are_refused_before_data_moves(secret):
    parts, y = table(3, 80)
    recorded: Any = {}
    ended = fit(parts | {"grocer": parts["grocer"].iloc[:79]}, y, secret, recorded=recorded)
    assert isinstance(ended["bank"], ProtocolViolation)
    assert "79 rows where we have 80" in str(ended["bank"])
    assert ended["bank"].peer == "grocer"
    assert nothing_left(recorded)


MARK = 211.625


def damaged(column: int, value: Any, rows: int = 3) -> Any:
    def change(part: pd.DataFrame) -> pd.DataFrame:
        part = part.astype(object if isinstance(value, str) else float)
        part.iloc[10 : 10 + rows, column] = value
        part.iloc[0, column] = MARK if not isinstance(value, str) else str(MARK)
        return part

    return change


def rare(part: pd.DataFrame) -> pd.DataFrame:
    part = part.copy()
    part.iloc[:, 1] = 0.0
    part.iloc[3:10, 1] = MARK
    return part


BAD_FEATURES = [
    pytest.param("grocer", damaged(1, np.nan), {}, ["grocer_1", "3"], id="NaN"),
    pytest.param("grocer", damaged(2, np.inf, 4), {}, ["grocer_2", "4"], id="infinite"),
    pytest.param("bank", damaged(0, -np.inf, 5), {}, ["bank_0", "5"], id="infinite at the label holder"),
    pytest.param("bank", damaged(1, np.nan, 2), {}, ["bank_1", "2"], id="NaN at the label holder"),
    pytest.param(
        "grocer",
        damaged(0, "211.625 euros"),
        {},
        ["grocer_0"],
        id="text",
    ),
    pytest.param("grocer", rare, {}, ["grocer_1", "7"], id="rare column"),
    pytest.param("grocer", lambda p: p.assign(grocer_1=MARK), {}, ["grocer_1", "0"], id="constant column"),
]


def refusal(ended: dict[str, Any], who: str) -> str:
    """The text with which `who` refused its own input, having checked that everybody else stopped too."""
    assert isinstance(ended[who], LocalError), ended[who]
    assert all(isinstance(error, PeerAborted) for name, error in ended.items() if name != who)
    return str(ended[who])


@pytest.mark.parametrize(("who", "change", "params", "named"), BAD_FEATURES)
def test_bad_features_fail_before_anything_is_sent_and_are_named_by_column_and_count(
    secret, who, change, params, named
):
    parts, y = table(3, 80)
    recorded: Any = {}
    ended = fit(parts | {who: change(parts[who])}, y, secret, params=params, recorded=recorded)
    text = refusal(ended, who)
    assert all(word in text for word in named), text
    assert "211.6" not in text
    assert nothing_left(recorded)
    assert all(set(kinds(recorded, who, peer)) <= {"Hello", "Abort"} for peer in recorded[who])


def test_a_batch_of_few_rows_is_refused_at_every_feature_holder(secret):
    parts, y = table(3, 80)
    recorded: Any = {}
    params, policy = {"solver": "sgd", "batch_size": 4}, {"minimum_rows_off_mode": 1}
    ended = fit(parts, y, secret, params=params, policy=policy, recorded=recorded)
    assert "4 rows for 4 columns" in str(ended["mobile"])
    assert isinstance(ended["mobile"], LocalError)
    assert nothing_left(recorded)


def test_one_row_more_than_columns_is_too_few_because_residuals_add_up_to_zero(secret):
    parts, y = table(2, 11, widths=(2, 10))
    ended = fit(parts, y, secret, policy={"minimum_rows_off_mode": 1})
    assert isinstance(ended["grocer"], LocalError)
    assert "11 rows for 10 columns" in str(ended["grocer"])


def test_a_row_that_alone_decides_a_combination_of_columns_is_refused(secret):
    parts, y = table(3, 80)
    parts["grocer"].iloc[5, 0] = 500.0  # far out in a tail: the gradient's sign would be its label
    text = refusal(fit(parts, y, secret), "grocer")
    assert "leverage" in text
    assert "log-transform" in text


def test_leverage_and_rank_are_those_of_the_design_matrix():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 4)) * [1, 1e-6, 1e6, 3] + [0, 5, -7, 1e3]
    q, _ = np.linalg.qr(np.column_stack([np.ones(50), x]))
    np.testing.assert_allclose(leverage(x), np.square(q).sum(axis=1), rtol=1e-6)
    assert rank(x) == 4
    assert rank(np.column_stack([x, x[:, 0] + 2 * x[:, 3], np.ones(50)])) == 4
    assert rank(np.eye(3)[generator.integers(0, 3, 50)]) == 2  # a complete one-hot set


def test_columns_that_fixed_point_would_turn_into_others_are_refused(secret):
    parts, y = table(3, 80)
    parts["grocer"]["grocer_1"] *= 1e-5
    text = refusal(fit(parts, y, secret), "grocer")
    assert "too small for fixed point in grocer_1" in text


def test_a_feature_holder_that_claims_more_columns_than_agreed_is_refused_by_all(secret):
    parts, y = table(3, 80)
    settings = agreed(list(parts))
    bounded = [
        msgspec.structs.replace(party, columns=3 if party.name == "mobile" else 0)
        for party in settings["agreement"].parties
    ]
    settings["agreement"] = msgspec.structs.replace(settings["agreement"], parties=tuple(bounded))
    ended = fit(parts, y, secret, **settings)  # mobile brings four
    assert {type(ended[name]) for name in ("bank", "grocer")} == {Refused}
    assert "the agreement allows 3" in str(ended["grocer"])


def test_no_more_rows_than_columns_are_refused_before_anything_is_sent(secret):
    parts, _ = table(3, 4, widths=(2, 3, 4))
    recorded: Any = {}
    ended = fit(parts, [0, 1, 0, 1], secret, policy={"minimum_rows_off_mode": 1}, recorded=recorded)
    text = refusal({name: ended[name] for name in ("bank", "mobile")}, "mobile")
    assert "4 rows" in text
    assert "4 columns" in text
    assert nothing_left(recorded)


def test_features_too_large_for_fixed_point_are_named_before_anything_is_sent_too(secret):
    parts, y = table(3, 80)
    recorded: Any = {}
    ended = fit(parts | {"grocer": parts["grocer"] * 1e9}, y, secret, recorded=recorded)
    text = refusal(ended, "grocer")
    assert "grocer_0" in text
    assert nothing_left(recorded)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        pytest.param(np.ones(80), "constant", id="constant"),
        pytest.param(np.arange(80.0), "one of 80 values", id="all different"),
        pytest.param((np.arange(79) % 2).astype(float), "80 rows", id="too few"),
        pytest.param(np.zeros((80, 1)), "80 rows", id="a column, not a vector"),
        pytest.param(
            np.where(np.arange(80) % 2 == 0, MARK, np.nan),
            "40",
            id="one value and NaN",
        ),
        pytest.param(
            np.array(["yes", "no", None, "211.625"] * 20, dtype=object),
            "20",
            id="missing among text",
        ),
    ],
)
def test_a_label_that_is_no_class_fails_before_anything_is_sent(secret, labels, named):
    parts, _ = table(3, 80)
    recorded: Any = {}
    text = refusal(fit(parts, labels, secret, recorded=recorded, params={"max_iter": 1}), "bank")
    assert named in text
    assert "211.6" not in text
    assert nothing_left(recorded)


def test_labels_come_from_the_label_holder_and_nobody_else(secret):
    parts, y = table(3, 80)
    for who, given in (("grocer", y), ("bank", None)):
        recorded: Any = {}
        assert "label holder" in refusal(fit(parts, y, secret, labels={who: given}, recorded=recorded), who)
        assert nothing_left(recorded)


def test_a_column_that_is_rare_in_a_batch_is_refused_for_sgd(secret):
    parts, y = table(3, 100)
    parts["grocer"]["flag"] = (np.arange(100) < 12).astype(float)  # common enough in the table
    ended = fit(parts, y, secret, params={"max_iter": 1})
    assert ended["grocer"].coef_.shape == (1, 4)
    recorded: Any = {}
    text = refusal(fit(parts, y, secret, params={"solver": "sgd", "batch_size": 50}, recorded=recorded), "grocer")
    assert "flag (" in text
    assert "grocer_0" not in text
    assert nothing_left(recorded)


# One feature holder


def test_with_one_feature_holder_training_stops_after_as_many_exchanges_as_it_has_columns(secret, caplog):
    parts, y = table(2, 100)
    recorded: Any = {}
    with caplog.at_level(logging.WARNING, logger="colonnade"):
        ended = fit(parts, y, secret, recorded=recorded)
    assert [(model.n_iter_, model.converged_) for model in ended.values()] == [(3, False)] * 2
    assert len(sent(recorded, "grocer", "bank", PartialEmbedding)) < 3
    warnings = [record.getMessage() for record in caplog.records if "training stopped" in record.getMessage()]
    assert len(warnings) == 2  # each side says it
    assert "after 3 exchanges" in warnings[0]
    assert "allow_reconstruction" in warnings[0]


def test_with_one_feature_holder_sgd_stops_there_too(secret):
    parts, y = table(2, 100)
    recorded: Any = {}
    ended = fit(parts, y, secret, params={"solver": "sgd", "batch_size": 25, "epochs": 4}, recorded=recorded)
    assert {(model.n_iter_, model.converged_) for model in ended.values()} == {
        (4, False)
    }  # 3 columns: an epoch, a scoring
    assert len(sent(recorded, "grocer", "bank", PartialEmbedding)) == 4


def test_with_consent_one_feature_holder_goes_to_the_optimum(runs):
    run = runs((2, 1.0, True))
    assert run["ended"]["bank"]["model"].n_iter_ > run["parts"]["grocer"].shape[1]
    assert run["ended"]["bank"]["model"].converged_
