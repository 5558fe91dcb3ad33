"""A search chooses what GridSearchCV chooses on the joined table, within one limit for all its fits together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes, load_wine
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from sklearn.metrics import d2_tweedie_score, make_scorer
from sklearn.model_selection import GridSearchCV, ParameterGrid, PredefinedSplit

from parties.errors import ColonnadeError, LocalError, ProtocolViolation, Refused
from parties.memory import outcomes
from parties.search import Search
from tests.leaks.test_reveals import KNOWN, rebuilt
from tests.test_family import counts, cut
from tests.training import Parts, agreed, altering, kinds, sent, table, with_fields
from vfl.estimator import VerticalLinearModel
from vfl.linear import (
    VerticalLinearRegression,
    VerticalLogisticRegression,
    VerticalPoissonRegressor,
    VerticalRidge,
)
from vfl.messages import PartialEmbedding, Plan
from vfl.neural import VerticalMLPClassifier, VerticalMLPRegressor
from vfl.search import Allowance, Outcome, search, split
from vfl.search_messages import Choice
from vfl.solver import Patience

EXACT = {"solver": "newton-cholesky", "tol": 1e-12, "max_iter": 1000}
SEED = 3


def run(
    parts: Parts,
    y: Any,
    make: Callable[[], VerticalLinearModel],
    wanted: Search,
    *,
    own: dict[str, Search] | None = None,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The search at every party; `own` is what one party wants instead, `model` the agreement's."""

    def role(session: Any) -> Outcome:
        labels = y if session.is_label_holder else None
        return search(session, make, parts[session.name], labels, (own or {}).get(session.name, wanted), SEED)

    tables = {"encryption": {"scheme": "lattice"}, "model": {"allow_reconstruction": True} | (model or {})}
    ended = outcomes(dict.fromkeys(parts, role), **agreed(list(parts), **tables), **options)
    for outcome in ended.values():
        if isinstance(outcome, Exception) and not isinstance(outcome, ColonnadeError):
            raise outcome
    return ended


def refused(ended: dict[str, Any], name: str, error: type[Exception]) -> str:
    assert type(ended[name]) is error
    return str(ended[name])


# The same choice as on the joined table


def binary() -> tuple[np.ndarray, np.ndarray]:
    x, y = counts(200)
    return x, (y > 1).astype(int)


def few_counts() -> tuple[np.ndarray, np.ndarray]:
    return counts(200)


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    return load_diabetes(return_X_y=True)


def wine() -> tuple[np.ndarray, np.ndarray]:
    return load_wine(return_X_y=True)


LOGISTIC = (VerticalLogisticRegression, LogisticRegression(**EXACT), "C", (0.003, 0.1))
RIDGE = (VerticalRidge, Ridge(), "alpha", (1.0, 30.0))
POISSON = (VerticalPoissonRegressor, PoissonRegressor(**EXACT), "alpha", (0.01, 0.3))


@pytest.mark.parametrize(
    ("data", "widths", "family", "metric", "scorer"),
    [
        (binary, (3,), LOGISTIC, "auc", "roc_auc"),
        (binary, (2, 3), LOGISTIC, "log_loss", "neg_log_loss"),
        (wine, (9,), LOGISTIC, "log_loss", "neg_log_loss"),
        (diabetes, (2, 4), RIDGE, "r2", "r2"),
        (few_counts, (3,), POISSON, "d2", make_scorer(d2_tweedie_score, power=1)),
    ],
    ids=["AUC", "log loss", "three classes", "R2", "D2"],
)
def test_the_choice_is_that_of_a_grid_search_on_the_joined_table(data, widths, family, metric, scorer):
    x, y = data()
    vertical, oracle, name, values = family
    parts = cut(x, *widths)
    wanted = Search(folds=3, grid={name: values}, metric=metric)
    ended = run(parts, y, lambda: vertical(tol=1e-8), wanted, model={"residual_range": 1024})

    folds = ended["bank"].folds
    grid = GridSearchCV(oracle, {name: values}, scoring=scorer, cv=PredefinedSplit(folds))
    grid.fit(np.hstack(list(parts.values())), y)
    expected = np.column_stack([grid.cv_results_[f"split{fold}_test_score"] for fold in range(3)])
    figures = -ended["bank"].figures if metric == "log_loss" else ended["bank"].figures
    np.testing.assert_allclose(figures, expected, atol=1e-6)
    assert {outcome.index for outcome in ended.values()} == {grid.best_index_}
    assert {outcome.parameters[name] for outcome in ended.values()} == set(grid.best_params_.values())
    coef = np.hstack([outcome.model.coef_ for outcome in ended.values()])
    np.testing.assert_allclose(coef, np.atleast_2d(grid.best_estimator_.coef_), atol=1e-3)


NETWORK = {"hidden_layer_sizes": (3,), "batch_size": 45, "epochs": 4}


def test_a_network_that_cannot_learn_at_its_rate_loses():
    pytest.importorskip("torch", reason="needs colonnade[torch]")
    x, y = wine()
    parts = cut((x - x.mean(axis=0)) / x.std(axis=0), 4, 5)
    wanted = Search(folds=2, grid={"learning_rate": (1e-9, 0.1), "alpha": (0.0,)}, metric="log_loss")
    make = lambda: VerticalMLPClassifier(**NETWORK)
    ended = run(parts, (y > 0).astype(int), make, wanted, model={"residual_range": 16})
    idle, learning = ended["bank"].figures.mean(axis=1)
    assert learning < 0.7 * idle
    assert {outcome.index for outcome in ended.values()} == {1}
    assert {outcome.model.learning_rate for outcome in ended.values()} == {0.1}
    assert {outcome.model.epochs_ for outcome in ended.values()} == {NETWORK["epochs"]}
    assert ended["grocer"].figures is None


@pytest.mark.parametrize(
    ("params", "grid", "consent", "why"),
    [
        ({}, "learning_rate", False, "agree on allow_reconstruction"),
        ({"mode": "open"}, "learning_rate", True, "under noise of its own"),
        ({}, "C", True, "has no C; it has alpha"),
        ({}, "l1_ratio", True, "a network has no l1_ratio"),
    ],
)
def test_a_search_of_networks_is_refused_where_it_would_disclose_more_or_has_no_such_parameter(
    params, grid, consent, why
):
    x, y = diabetes()
    wanted = Search(folds=2, grid={grid: (0.5,)}, metric="r2")
    recorded: Any = {}
    make = lambda: VerticalMLPRegressor(**NETWORK | params)
    ended = run(cut(x, 4), y, make, wanted, model={"allow_reconstruction": consent}, recorded=recorded)
    assert why in refused(ended, "bank", LocalError)
    assert set(kinds(recorded, "bank", "grocer")) <= {"Hello", "Abort"}


def test_rows_are_held_out_once_in_folds_of_equal_size_the_same_for_all():
    folds = split(103, 5, SEED)
    assert sorted(np.bincount(folds)) == [20, 20, 21, 21, 21]
    assert (folds == split(103, 5, SEED)).all() and (folds != split(103, 5, SEED + 1)).any()


# Who learns what


def test_feature_holders_learn_who_won_and_no_figure():
    x, y = binary()
    recorded: Any = {}
    wanted = Search(folds=2, grid={"C": (0.01, 1.0)}, metric="auc")
    ended = run(cut(x, 3), y, VerticalLogisticRegression, wanted, recorded=recorded)
    assert ended["grocer"].figures is None
    (choice,) = sent(recorded, "bank", "grocer", Choice)
    assert vars(choice) == {"index": ended["bank"].index} and Choice.ledger_class == "aggregate"
    assert set(kinds(recorded, "bank", "grocer")) - {"Choice"} == {
        "Hello",
        "Plan",
        "SchemeKey",
        "SealedResidual",
        "OpenedGradient",
        "Direction",
        "Weights",
        "Closing",
    }


ROWS, WIDTH = 180, 16
GRID = Search(folds=3, grid={"C": (0.1, 1.0)}, metric="log_loss")


def attacked() -> tuple[Parts, np.ndarray]:
    return table(2, ROWS, widths=(2, WIDTH))


def seen_of_rows(recorded: Any, folds: np.ndarray) -> dict[int, np.ndarray]:
    """By fold, all that the label holder was sent of its rows in the whole search: (rows of the fold, embeddings)."""
    columns: dict[int, list[np.ndarray]] = {fold: [] for fold in range(3)}

    def note(rows: np.ndarray, values: np.ndarray) -> None:
        for fold in set(folds[rows].tolist()):
            columns[fold].append(values[folds[rows] == fold])

    messages = [message.data for message in sent(recorded, "grocer", "bank", PartialEmbedding)]
    for _ in GRID.candidates:
        for fold in range(3):
            rest, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            while len(messages[0]) == len(rest):
                note(rest, messages.pop(0))
            note(held, messages.pop(0))
    for values in messages:
        note(np.arange(ROWS), values)
    return {fold: np.column_stack(values) for fold, values in columns.items()}


def errors_of_the_attack(recorded: Any, folds: np.ndarray, x: np.ndarray) -> list[float]:
    seen = seen_of_rows(recorded, folds)
    return [float(np.abs(rebuilt(seen[fold], x[folds == fold]) - x[folds == fold][KNOWN:]).max()) for fold in seen]


def test_all_embeddings_of_a_search_do_not_rebuild_a_row_without_consent():
    (parts, y), recorded = attacked(), {}
    ended = run(
        parts,
        y,
        lambda: VerticalLogisticRegression(tol=1e-12),
        GRID,
        model={"allow_reconstruction": False},
        recorded=recorded,
    )
    folds, x = ended["bank"].folds, parts["grocer"].to_numpy()
    for seen in seen_of_rows(recorded, folds).values():
        assert 2 * 3 * 2 < seen.shape[1] < WIDTH
    assert min(errors_of_the_attack(recorded, folds, x)) > 0.1
    assert ended["grocer"].model.n_iter_ > 2


@pytest.mark.parametrize("consent", [True, False], ids=["consent", "a limit for each fit alone"])
def test_the_same_attack_succeeds_on(consent, monkeypatch):
    """With consent; and where nobody adds up, although each fit keeps the limit of a single training."""
    if not consent:
        monkeypatch.setattr(Allowance, "times", WIDTH)
    (parts, y), recorded = attacked(), {}
    model = {"allow_reconstruction": consent}
    ended = run(parts, y, lambda: VerticalLogisticRegression(tol=1e-4), GRID, model=model, recorded=recorded)
    folds, x = ended["bank"].folds, parts["grocer"].to_numpy()
    trained = [message.exchange for message in sent(recorded, "grocer", "bank", PartialEmbedding)]
    assert max(trained) + 1 < WIDTH
    assert max(errors_of_the_attack(recorded, folds, x)) < 1e-3


def test_a_search_of_more_fits_than_the_columns_can_hide_is_refused_before_any_row_is_embedded():
    parts, y = table(2, ROWS, widths=(2, WIDTH))
    wanted = msgspec.structs.replace(GRID, grid={"C": (0.01, 0.1, 1.0, 3.0, 10.0)})
    recorded: Any = {}
    ended = run(parts, y, VerticalLogisticRegression, wanted, model={"allow_reconstruction": False}, recorded=recorded)
    for name in parts:
        text = refused(ended, name, Refused)
        assert text.startswith("a search of 16 fits embeds every row 16 times or more") and "at most 15 fits" in text
    assert "PartialEmbedding" not in kinds(recorded, "grocer", "bank")


def test_what_matters_is_the_rank_of_a_fold_not_of_the_table():
    """All rows have 16 independent directions, those of one fold 12: fewer embeddings would rebuild these."""
    parts, y = attacked()
    alike, fold = parts["grocer"].copy(), split(ROWS, 3, SEED) == 1
    alike.iloc[fold, 12:] = alike.iloc[fold, :4].to_numpy()
    wanted = msgspec.structs.replace(GRID, grid={"C": (0.01, 0.1, 1.0, 10.0)})
    ended = run(parts | {"grocer": alike}, y, VerticalLogisticRegression, wanted, model={"allow_reconstruction": False})
    assert "13 fits" in refused(ended, "bank", Refused)
    assert "12 independent directions" in refused(ended, "grocer", Refused)


def test_two_feature_holders_have_the_independent_directions_of_both():
    parts, y = table(3, ROWS)
    wanted = Search(folds=2, grid={"C": (0.1, 1.0, 10.0)}, metric="auc")
    ended = run(parts, y, VerticalLogisticRegression, wanted, model={"allow_reconstruction": False})
    for name in parts:
        assert "7 independent directions" in refused(ended, name, Refused)
        assert "at most 6 fits" in str(ended[name])


def test_a_label_holder_that_claims_directions_of_its_own_lifts_no_limit():
    parts, y = attacked()
    wanted = msgspec.structs.replace(GRID, grid={"C": (0.01, 0.1, 1.0, 3.0, 10.0)})
    tamper = altering("bank", "grocer", Plan, with_fields(rank=100, columns=100))
    ended = run(parts, y, VerticalLogisticRegression, wanted, model={"allow_reconstruction": False}, tamper=tamper)
    assert "16 independent directions" in refused(ended, "grocer", Refused)


def test_proximal_steps_are_not_counted_beforehand_so_they_need_consent():
    parts, y = attacked()
    make = lambda: VerticalLogisticRegression(solver="proximal")
    wanted = Search(folds=2, grid={"l1_ratio": (0.5,)}, metric="auc")
    ended = run(parts, y, make, wanted, model={"allow_reconstruction": False})
    assert "solver = 'proximal'" in refused(ended, "grocer", Refused)


@given(st.integers(1, 12), st.integers(2, 40), st.integers(0, 400), st.data())
def test_fits_never_use_more_than_the_allowance_and_all_candidates_get_the_same(outputs, fits, spare, data):
    allowance, used, given_out = Allowance(fits * outputs + spare, fits, outputs), 0, []
    limit = allowance.embeddings
    for _ in range(fits):
        given_out.append(allowance.times)
        times = data.draw(st.integers(0, allowance.times))
        allowance.spend(times)
        used += max(times, 1) * outputs  # a row that is held out is embedded once
    assert used <= limit
    assert len(set(given_out[:-1])) == 1 and given_out[-1] >= given_out[0] >= 1


def test_sgd_embeds_a_row_once_an_epoch_and_epochs_are_what_is_limited():
    (parts, y), recorded = attacked(), {}
    make = lambda: VerticalLogisticRegression(solver="sgd", batch_size=60, epochs=50, max_iter=400)
    ended = run(parts, y, make, GRID, model={"allow_reconstruction": False, "max_exchanges": 400}, recorded=recorded)
    rows = sum(len(message.data) for message in sent(recorded, "grocer", "bank", PartialEmbedding))
    trained = 6 * 2 * 120 + 6 * 60 + 2 * ROWS  # seven fits of two epochs, six scored; one embedding is left
    assert (ended["grocer"].model.epochs, rows) == (2, trained)  # for the winner's scores of the same rows


def test_the_gradients_of_all_fits_count_when_rows_are_few(caplog):
    x, y = binary()
    with caplog.at_level(logging.WARNING, "colonnade"):
        run(
            cut(x, 3),
            y,
            lambda: VerticalLogisticRegression(max_iter=2),
            Search(folds=2, grid={"C": (1.0,)}, metric="auc"),
        )
    assert "folds of 100 rows are few for up to 6 gradients of 4 numbers in all fits" in caplog.text


# Bad input and bad peers


def test_a_fold_must_pass_what_a_table_must():
    """Gradients of two fits differ by about that of a fold: a column rare in it would give labels."""
    x, y = binary()
    parts = cut(x, 3)
    rare = np.arange(len(y)) < 25
    parts["grocer"] = parts["grocer"].assign(flag=rare.astype(float))
    ended = run(parts, y, VerticalLogisticRegression, Search(grid={"C": (1.0,)}, metric="auc"))
    text = refused(ended, "grocer", LocalError)
    assert text.startswith("columns with fewer than 10 rows in a fold off their most frequent value: flag (")


def test_a_peer_with_as_many_columns_as_a_fold_has_rows_is_refused(monkeypatch):
    parts, y = table(2, 100, widths=(2, 24))
    monkeypatch.setattr("vfl.search.check_columns", lambda *_: None)  # the grocer, were it dishonest
    ended = run(parts, y, VerticalLogisticRegression, Search(folds=4, grid={"C": (1.0,)}, metric="auc"))
    assert refused(ended, "bank", Refused).startswith("grocer brings 24 columns, a fold has 25 rows")


@pytest.mark.parametrize(
    ("make", "wanted", "labels", "why"),
    [
        (VerticalLogisticRegression, {"grid": {"alpha": (1.0,)}}, None, "has no alpha; it has C"),
        (VerticalLinearRegression, {"grid": {"alpha": (1.0,)}, "metric": "r2"}, None, "has no alpha"),
        (VerticalRidge, {"grid": {"alpha": (1.0,)}}, None, "'auc' is none of a linear regression"),
        (VerticalLogisticRegression, {"grid": {"epochs": (2.0,)}}, None, "epochs is of solver = 'sgd'"),
        (VerticalLogisticRegression, {"folds": 20}, slice(0, 150), "fewer than 10 each"),
        (VerticalLogisticRegression, {"metric": "brier"}, "three", "have no brier"),
        (VerticalLogisticRegression, {}, "rare", "all of one class; use fewer folds"),
        (VerticalLogisticRegression, {}, "single", "a class has all its rows in one fold"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_sent(make, wanted, labels, why):
    x, y = binary()
    if isinstance(labels, slice):
        x, y = x[labels], y[labels]
    folds = split(len(y), 5, SEED)
    y = {"three": np.arange(len(y)) % 3, "rare": (folds > 1).astype(int), "single": (folds == 2).astype(int)}.get(
        labels if isinstance(labels, str) else "", y
    )
    recorded: Any = {}
    wanted = Search(**{"grid": {"C": (1.0,)}, "metric": "auc"} | wanted)
    ended = run(cut(x, 3), y, make, wanted, recorded=recorded)
    assert why in refused(ended, "bank", LocalError)
    assert set(kinds(recorded, "bank", "grocer")) <= {"Hello", "Abort"}


def test_parties_that_search_other_grids_do_not_begin():
    x, y = binary()
    one, other = (Search(folds=2, grid={"C": values}, metric="auc") for values in ((1.0,), (2.0,)))
    ended = run(cut(x, 3), y, VerticalLogisticRegression, one, own={"grocer": other})
    assert "is about to do something else" in refused(ended, "bank", Refused)


def test_a_choice_outside_the_grid_is_a_violation():
    x, y = binary()
    wanted = Search(folds=2, grid={"C": (1.0,)}, metric="auc")
    tamper = altering("bank", "grocer", Choice, with_fields(index=1))
    ended = run(cut(x, 3), y, VerticalLogisticRegression, wanted, tamper=tamper)
    assert "a candidate that the grid does not have" in refused(ended, "grocer", ProtocolViolation)


@pytest.mark.parametrize(("at", "outputs"), [(0, 0), (1, 2)], ids=["none planned", "more in a fit than planned"])
def test_a_label_holder_that_changes_the_number_of_outputs_is_found_out(at, outputs):
    parts, y = attacked()
    tamper = altering("bank", "grocer", Plan, with_fields(outputs=outputs), at)
    ended = run(parts, y, VerticalLogisticRegression, GRID, model={"allow_reconstruction": False}, tamper=tamper)
    assert isinstance(ended["grocer"], ProtocolViolation)


# [search], and early stopping


@given(
    st.dictionaries(
        st.sampled_from(["alpha", "learning_rate", "epochs"]),
        st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True),
        min_size=1,
    )
)
def test_candidates_are_those_of_scikit_learn_in_its_order(grid):
    wanted = msgspec.convert({"grid": grid, "metric": "r2"}, Search)
    assert list(wanted.candidates) == list(ParameterGrid(grid))
    assert all(type(one.get("epochs", 1)) is int for one in wanted.candidates)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"folds": 1}, "folds"),
        ({"grid": {}}, "length >= 1"),
        ({"grid": {"C": []}}, "length >= 1"),
        ({"grid": {"gamma": [1.0]}}, "Invalid enum value 'gamma'"),
        ({"grid": {"C": [1, 1.0]}}, "C has a value twice"),
        ({"grid": {"C": [0.0]}}, "C has a value that it cannot take"),
        ({"grid": {"C": [float("inf")]}}, "C has a value that it cannot take"),
        ({"grid": {"l1_ratio": [1.5]}}, "l1_ratio has a value that it cannot take"),
        ({"grid": {"epochs": [1.5]}}, "epochs has a value that it cannot take"),
        ({"grid": {"C": [1 + i for i in range(257)]}}, "more than 256 combinations"),
        ({"metric": "accuracy of sorts"}, "metric"),
    ],
)
def test_an_agreement_with_an_inconsistent_search_is_refused_with_the_reason(change, why):
    good = {"grid": {"C": [1, 10]}, "metric": "auc"}
    assert msgspec.convert(good, Search).candidates == ({"C": 1.0}, {"C": 10.0})
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(good | change, Search)


def test_an_alpha_of_zero_is_a_value_that_it_can_take():
    assert Search(grid={"alpha": (0.0, 1.0)}, metric="r2").candidates[0] == {"alpha": 0.0}


@pytest.mark.parametrize("index", [-1, 256])
def test_a_choice_is_the_number_of_a_candidate(index):
    with pytest.raises(ValueError, match="not the number"):
        Choice(index)


@given(st.lists(st.integers(-5, 20), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 3))
def test_patience_ends_after_so_many_losses_without_improvement(losses, patience, least):
    ours, stopped = Patience(patience, least), []
    for loss in losses:
        stopped.append(ours.should_stop(loss))
        if stopped[-1]:
            break
    better = [i for i, loss in enumerate(losses) if all(loss < earlier - least for earlier in losses[:i])]
    ends = [i for i in range(len(losses)) if i - max(one for one in better if one <= i) >= patience]
    assert stopped == [False] * ends[0] + [True] if ends else stopped == [False] * len(losses)
    assert ours.improved == (len(stopped) - 1 in better)


def test_the_search_takes_data_frames_with_any_index():
    x, y = binary()
    parts = {name: part.set_axis(np.arange(len(part)) + 7) for name, part in cut(x, 3).items()}
    wanted = Search(folds=2, grid={"C": (1.0,)}, metric="auc")
    ended = run(parts, pd.Series(y, index=np.arange(len(y)) + 7), VerticalLogisticRegression, wanted)
    assert isinstance(ended["bank"], Outcome)
