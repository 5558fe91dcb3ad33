"""Simulated clients: every row to one of them, the promised skew, the same again for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parties.errors import LocalError
from vfl.horizontal.partition import Partition

specs = (
    st.just("iid")
    | st.floats(1e-3, 1e3).map(lambda a: f"dirichlet:{a}")
    | st.floats(1e-3, 1e3).map(lambda a: f"quantity:{a}")
    | st.integers(1, 4).map(lambda n: f"labels:{n}")
)


@settings(max_examples=200)
@given(specs, st.integers(1, 20), st.integers(0, 200), st.integers(0, 2**32))
def test_every_row_goes_to_exactly_one_client(text, clients, extra, seed):
    y = np.random.default_rng(seed).integers(0, 4, 80 + extra)
    try:
        parts = Partition.parse(text).deal(y, clients, seed)
    except LocalError:
        assume(False)
    assert len(parts) == clients
    assert min(len(part) for part in parts) >= 1
    assert (np.sort(np.concatenate(parts)) == np.arange(len(y))).all()
    assert all((np.diff(part) > 0).all() for part in parts)
    again = Partition.parse(text).deal(y, clients, seed)
    assert all((one == other).all() for one, other in zip(parts, again, strict=True))


def shares(text, clients=10, seed=0):
    """(clients, classes): the part of each class in a client's rows."""
    y = np.repeat(np.arange(5), 400)
    parts = Partition.parse(text).deal(y, clients, seed)
    return np.array([np.bincount(y[part], minlength=5) / len(part) for part in parts]), [len(part) for part in parts]


def test_the_skew_is_what_was_asked_for():
    even, sizes = shares("iid")
    assert np.abs(even - 0.2).max() < 0.12
    assert set(sizes) == {200}
    mild, strong = shares("dirichlet:100")[0], shares("dirichlet:0.05")[0]
    assert np.abs(mild - 0.2).max() < 0.12
    assert np.mean(strong.max(axis=1)) > 0.7
    for number in (1, 2, 3):
        assert ((shares(f"labels:{number}")[0] > 0).sum(axis=1) == number).all()
    classes, sizes = shares("quantity:0.2")
    assert max(sizes) > 5 * np.median(sizes)
    assert np.abs(classes[np.argmax(sizes)] - 0.2).max() < 0.12


def test_dirichlet_shares_have_the_right_mean_and_spread():
    """A client's share of a class has mean 1/K and variance (K - 1) / (K^2 (K a + 1))."""
    y, clients, alpha = np.zeros(10_000, int), 4, 0.5
    got = (
        np.array([[len(p) for p in Partition("dirichlet", alpha).deal(y, clients, seed)] for seed in range(800)]) / 1e4
    )
    assert got.mean() == pytest.approx(0.25)
    assert got.var() == pytest.approx(3 / (16 * (clients * alpha + 1)), rel=0.1)


def test_another_seed_deals_otherwise():
    y = np.arange(100) % 5
    for text in ("iid", "dirichlet:0.3", "labels:2", "quantity:0.5"):
        one, other = (np.concatenate(Partition.parse(text).deal(y, 10, seed)) for seed in (1, 2))
        assert len(one) == len(other) and (one != other).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown partition ''; write iid, dirichlet:0.3"),
        ("iid:1", "unknown partition"),
        ("dirichlet", "unknown partition"),
        ("dirichlet:", "'' is no number"),
        ("Dirichlet:0.3", "unknown partition"),
        ("dirichlet:x", "'x' is no number"),
        ("dirichlet:0", "positive and finite"),
        ("dirichlet:nan", "positive and finite"),
        ("quantity:inf", "positive and finite"),
        ("labels:-1", "positive and finite"),
        ("labels:1.5", "whole number"),
    ],
)
def test_a_wrong_text_is_refused(text, message):
    with pytest.raises(LocalError, match=message):
        Partition.parse(text)


@pytest.mark.parametrize(
    ("text", "y", "clients", "message"),
    [
        ("iid", np.zeros(3), 4, "3 rows cannot be dealt to 4 clients"),
        ("iid", np.zeros(3), 0, "cannot be dealt to 0 clients"),
        ("labels:3", np.array([0, 1] * 5), 4, "4 clients with 3 classes each do not go with 2"),
        ("labels:1", np.arange(9), 4, "4 clients with 1 classes each do not go with 9"),
        ("labels:2", np.array([0] * 9 + [1]), 4, "a class has 1 rows for 4 clients"),
        ("dirichlet:1", np.array([0.5, 1.5, 2.0]), 2, "the target is continuous"),
        ("labels:1", np.array([0.5, 1.5, 2.0]), 2, "the target is continuous"),
    ],
)
def test_a_table_that_does_not_go_with_it_is_refused(text, y, clients, message):
    with pytest.raises(LocalError, match=message):
        Partition.parse(text).deal(y, clients, 0)


def test_words_and_continuous_targets_where_they_make_sense():
    words = np.array(["b", "a", "c"] * 20)
    assert sum(len(part) for part in Partition.parse("dirichlet:0.3").deal(words, 5, 0)) == 60
    assert sum(len(part) for part in Partition.parse("quantity:0.3").deal(np.linspace(0, 1, 60), 5, 0)) == 60
