"""Who learns what from a training, asserted: what stays hidden, and the attacks that the protocol does not stop."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from parties.errors import LocalError
from parties.memory import outcomes
from parties.message import parse_header
from parties.session import Session
from tests.training import Parts, agreed, fit, kinds, planned, sent, table
from vfl import subspace
from vfl.encryption.paillier import generate
from vfl.encryption.scheme import from_wire
from vfl.encryption.weigh import PaillierWeigher
from vfl.exchange import FeatureEnd, Terms, offer_key, open_gradients
from vfl.linear import VerticalLogisticRegression
from vfl.messages import (
    Direction,
    MaskedEmbedding,
    MaskedScalars,
    OpenedGradient,
    PartialEmbedding,
    Plan,
    SealedGradient,
    SealedResidual,
    Weights,
)
from vfl.secure_sum import Contribution, sum_embeddings, sum_scalars

KNOWN = 30  # rows that the label holder knows from elsewhere


@pytest.fixture(scope="module")
def three(secret) -> dict[str, Any]:
    """One training of three parties, twice: as it is, and with permuted labels."""
    parts, y = table(3, 100)
    run: dict[str, Any] = {"parts": parts, "y": y}
    for which, labels in (("recorded", y), ("permuted", np.random.default_rng(3).permutation(y))):
        run[which], run[f"ledgers of {which}"] = {}, {}
        run[f"ended {which}"] = fit(
            parts, labels, secret, recorded=run[which], ledgers=run[f"ledgers of {which}"], params={"max_iter": 12}
        )
    return run


def embeddings(recorded: Any, sender: str, kind: Any = PartialEmbedding) -> np.ndarray:
    """What the label holder was sent, exchange by exchange: (n, t)."""
    return np.column_stack([message.data for message in sent(recorded, sender, "bank", kind)])


def rebuilt(seen: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The attack: x = seen @ M for one M, which the known rows fix; our guess of the other rows."""
    linear_map = np.linalg.lstsq(seen[:KNOWN], x[:KNOWN], rcond=None)[0]
    return seen[KNOWN:] @ linear_map


# What the label holder sees


def test_with_two_feature_holders_the_label_holder_sees_sums_and_ciphertexts_only(three):
    for name in ("grocer", "mobile"):
        assert set(kinds(three["recorded"], name, "bank")) == {
            "Hello",
            "Plan",
            "SealedGradient",
            "MaskedScalars",
            "MaskedEmbedding",
            "Closing",
        }


def test_what_a_feature_holder_sends_does_not_show_its_embedding(three):
    for name in ("grocer", "mobile"):
        x = three["parts"][name].to_numpy()
        gradient_like = x.T @ (three["y"] - 0.5)
        for seen in embeddings(three["recorded"], name, MaskedEmbedding).T:
            for along in (*x.T, x @ gradient_like):
                assert abs(np.corrcoef(seen.astype(np.int64).astype(float), along)[0, 1]) < 0.55  # 5.5 deviations


def test_the_feature_holders_tell_each_other_nothing_but_a_plan_and_a_mask_key(three):
    for pair in (("grocer", "mobile"), ("mobile", "grocer")):
        assert kinds(three["recorded"], *pair) == ["Hello", "Plan", "MaskKey", "Closing"]


def test_what_the_label_holder_decrypts_is_uniform_below_n():
    key = generate(512, insecure_for_tests=True, randomness=random.Random(5).randrange)
    x = np.array([[3, -5], [7, 11], [0, 2]])
    sealed = key.encrypt([1, -2, 3])
    values = []
    for _ in range(600):
        weigher = PaillierWeigher(key.public, x, 1 << 30, slot_bits=60)
        weigher.add(sealed)
        values.append(key.decrypt(weigher.finish())[0])
    assert len(set(values)) == 600
    top = np.bincount([value * 16 // key.public.n for value in values], minlength=16)
    low = np.bincount([value & 15 for value in values], minlength=16)
    for counts in (top, low):
        assert ((counts - 37.5) ** 2 / 37.5).sum() < 55  # 15 degrees of freedom: 1e-6


def test_the_same_residuals_are_answered_differently_every_time(secret):
    replies, opened = [], []
    parts, y = table(3, 60)
    for _ in range(2):
        recorded: Any = {}
        fit(parts, y, secret, params={"max_iter": 1}, recorded=recorded)
        replies.append(sent(recorded, "grocer", "bank", SealedGradient)[0].data.tobytes())
        opened.append(sent(recorded, "bank", "grocer", OpenedGradient)[0].data.tobytes())
    assert replies[0] != replies[1]
    assert opened[0] != opened[1]


# What a feature holder sees


CLEAR = {"Hello", "Plan", "SchemeKey", "Direction", "Weights", "Closing"}


def test_a_feature_holder_gets_ciphertexts_its_masked_gradient_and_the_solvers_numbers(three):
    for which in ("recorded", "permuted"):
        for name in ("grocer", "mobile"):
            assert set(kinds(three[which], "bank", name)) == CLEAR | {"SealedResidual", "OpenedGradient"}


def test_the_solvers_numbers_are_few_and_do_not_grow_with_the_rows(secret, three):
    recorded: Any = {}
    parts, y = table(3, 200)
    fit(parts, y, secret, params={"max_iter": 4}, recorded=recorded)
    for run in (three["recorded"], recorded):
        for exchange, message in enumerate(sent(run, "bank", "grocer", Direction)[:3]):
            assert message.data.shape == (exchange + 1,)
        for exchange, weights in enumerate(sent(run, "bank", "grocer", Weights)):
            assert weights.data.shape == (exchange + 1,)
    slots = [len(message.data) for message in sent(recorded, "bank", "grocer", OpenedGradient)]
    assert slots == [1] * 4  # three columns: one plaintext an exchange, whatever the rows


def test_no_residual_and_no_label_leaves_the_label_holder_in_any_readable_form(three):
    y, bank = three["y"], three["parts"]["bank"].to_numpy()
    alone = three["ended recorded"]["bank"].alone_
    residual = expit(bank @ alone.coef_[0] + alone.intercept_[0]) - y  # the first exchange's
    needles = [np.rint(residual * 2**30).astype("<i8").tobytes()[i : i + 8] for i in range(0, 8 * len(y), 8)]
    needles += [value.tobytes() for value in residual.astype("<f8")]
    needles += [y.astype(dtype).tobytes()[:24] for dtype in ("<f8", "<i8", "u1")]
    for name in ("grocer", "mobile"):
        wire = b"".join(payload for _, payload in three["recorded"]["bank"][name].sent)
        assert not [needle for needle in needles if needle in wire]


def test_residuals_are_sealed_afresh_every_time_so_that_equal_ones_cannot_be_told(secret, three):
    parts = {"bank": three["parts"]["bank"] * 0, "grocer": three["parts"]["grocer"], "mobile": three["parts"]["mobile"]}
    recorded: Any = {}
    fit(parts, three["y"], secret, params={"max_iter": 1}, recorded=recorded)  # equal columns: two residuals in all
    for run in (recorded, three["recorded"]):
        sealed = [row.tobytes() for part in sent(run, "bank", "grocer", SealedResidual) for row in part.data]
        assert len(set(sealed)) == len(sealed) >= 100


def test_other_labels_change_nothing_in_the_first_exchange_that_can_be_read_without_the_key(three):
    def shapes(run: Any) -> list[Any]:
        headers = [parse_header(head) for head, _ in run["bank"]["grocer"].sent]
        first = [header for header in headers if header.kind in (Plan.kind, SealedResidual.kind, OpenedGradient.kind)]
        return [(header.kind, header.shape) for header in first[:3]]

    assert shapes(three["recorded"]) == shapes(three["permuted"])
    lengths = [len(sent(three[which], "bank", "grocer", Direction)[0].data) for which in ("recorded", "permuted")]
    assert lengths == [1, 1]


# Reconstruction from the embeddings


def test_one_feature_holder_reconstruction(secret):
    parts, y = table(2, 100, widths=(2, 10))
    recorded: Any = {}
    ended = fit(
        parts,
        y,
        secret,
        params={"tol": 1e-12, "max_iter": 11},
        policy={"allow_reconstruction": True},
        recorded=recorded,
    )
    assert ended["bank"].n_iter_ == 11
    seen, x = embeddings(recorded, "grocer")[:, :10], parts["grocer"].to_numpy()
    assert np.abs(rebuilt(seen, x) - x[KNOWN:]).max() < 1e-3
    assert np.abs(rebuilt(seen[:, :9], x) - x[KNOWN:]).max() > 0.1  # one exchange fewer is not enough


def test_without_consent_training_stops_before_the_label_holder_has_as_many_embeddings_as_columns(secret):
    parts, y = table(2, 100, widths=(2, 10))
    recorded: Any = {}
    ended = fit(parts, y, secret, params={"tol": 1e-12}, recorded=recorded)
    assert {model.n_iter_ for model in ended.values()} == {10}
    seen, x = embeddings(recorded, "grocer"), parts["grocer"].to_numpy()
    assert seen.shape == (100, 9)
    assert np.abs(rebuilt(seen, x) - x[KNOWN:]).max() > 0.1


def test_columns_that_follow_from_others_do_not_lift_the_limit(secret):
    """A total beside its parts: three embeddings span four columns, so two are all that the label holder gets."""
    parts, y = table(2, 100, widths=(2, 3))
    total = parts["grocer"].assign(total=parts["grocer"].sum(axis=1))
    recorded: Any = {}
    params = {"tol": 1e-9}
    ended = fit(parts | {"grocer": total}, y, secret, params=params, recorded=recorded)
    assert {model.n_iter_ for model in ended.values()} == {3}
    seen, x = embeddings(recorded, "grocer"), total.to_numpy()
    assert seen.shape == (100, 2)
    assert np.abs(rebuilt(seen, x) - x[KNOWN:]).max() > 0.1
    recorded = {}
    fit(parts | {"grocer": total}, y, secret, params=params, policy={"allow_reconstruction": True}, recorded=recorded)
    seen = embeddings(recorded, "grocer")[:, :3]
    assert np.abs(rebuilt(seen, x) - x[KNOWN:]).max() < 1e-3  # with consent, three embeddings rebuild all four


def test_the_same_attack_on_the_masked_embeddings_of_one_of_two_feature_holders_fails():
    rows, generator = 2000, np.random.default_rng(1)
    x = {name: generator.normal(size=(rows, 10)) for name in ("grocer", "mobile")}
    directions = generator.normal(size=(10, 10))

    def feature_holder(session: Session) -> None:
        contribution = Contribution(session)
        for exchange, direction in enumerate(directions):
            contribution.send_embedding(x[session.name] @ direction, exchange)

    def label_holder(session: Session) -> None:
        for exchange in range(len(directions)):
            sum_embeddings(session, rows, exchange)

    roles: dict[str, Callable[[Session], Any]] = {"bank": label_holder} | dict.fromkeys(x, feature_holder)
    recorded: Any = {}
    assert outcomes(roles, recorded=recorded, **agreed(list(roles))) == dict.fromkeys(roles)
    for name, truth in x.items():
        seen = embeddings(recorded, name, MaskedEmbedding).astype(np.int64) / 2.0**62
        for guess, column in zip(rebuilt(seen, truth).T, truth[KNOWN:].T, strict=True):
            assert abs(np.corrcoef(guess, column)[0, 1]) < 0.2  # 9 deviations
        assert np.abs(rebuilt(truth @ directions.T, truth) - truth[KNOWN:]).max() < 1e-6  # in clear it would succeed


def sums_of_embeddings(recorded: Any) -> np.ndarray:
    """What the label holder computes anyway: the masks cancel."""
    total = sum(embeddings(recorded, name, MaskedEmbedding) for name in ("grocer", "mobile"))
    return np.ldexp(total.astype(np.int64).astype(float), -40)


def test_not_caught_sums_of_embeddings_rebuild_the_columns_of_all_feature_holders_together(secret):
    """Masks hide whose part is whose, not the sum: it is one embedding of all feature columns side by side. After as
    many exchanges as the feature holders have columns together, the rows known of ONE of them give its other rows."""
    parts, y = table(3, 100)  # 3 + 4 columns
    recorded: Any = {}
    params, policy = {"tol": 1e-12, "max_iter": 9}, {"allow_reconstruction": True}
    fit(parts, y, secret, params=params, policy=policy, recorded=recorded)
    seen = sums_of_embeddings(recorded)
    for name in ("grocer", "mobile"):
        x = parts[name].to_numpy()
        assert np.abs(rebuilt(seen[:, :7], x) - x[KNOWN:]).max() < 1e-3
        assert np.abs(rebuilt(seen[:, :6], x) - x[KNOWN:]).max() > 0.1


def test_without_consent_two_feature_holders_stop_before_their_sum_can_be_rebuilt_too(secret):
    parts, y = table(3, 100)
    recorded: Any = {}
    ended = fit(parts, y, secret, params={"tol": 1e-12}, recorded=recorded)
    assert {model.n_iter_ for model in ended.values()} == {3 + 4}
    assert sums_of_embeddings(recorded).shape[1] < 3 + 4


# Deviations that nobody notices


def at_the_grocer(monkeypatch: Any, replacement: Callable[..., np.ndarray]) -> None:
    """Let the grocer, alone, run something else in place of `weigh_gradient`."""
    honest = subspace.weigh_gradient

    def weigh(*arguments: Any) -> np.ndarray:
        chosen = replacement if threading.current_thread().name == "grocer" else honest
        return chosen(*arguments)

    monkeypatch.setattr(subspace, "weigh_gradient", weigh)


def test_not_caught_crafted_gradient_reply(secret, monkeypatch):
    """A feature holder weighs with unit vectors in place of its columns: one residual a column, in every exchange."""
    parts, y = table(3, 60)
    honest, learnt = subspace.weigh_gradient, {}

    def crafted(end: FeatureEnd, exchange: int) -> np.ndarray:
        targets = range(3 * exchange, 3 * exchange + 3)
        units = np.zeros_like(end.x)
        for column, row in enumerate(targets):
            units[row, column] = 1 << end.scales.feature_bits
        residuals = honest(dataclasses.replace(end, x=units), exchange)
        learnt.update(zip(targets, residuals[:, 0], strict=True))
        return residuals  # keeps the solver busy with something

    shapes = {}
    for deviates in (False, True):
        if deviates:
            at_the_grocer(monkeypatch, crafted)
        recorded: Any = {}
        ended = fit(parts, y, secret, params={"max_iter": 4}, recorded=recorded)
        assert {type(model) for model in ended.values()} == {VerticalLogisticRegression}  # nobody sees anything odd
        headers = [parse_header(head) for head, _ in recorded["grocer"]["bank"].sent]
        shapes[deviates] = [(header.kind, header.shape) for header in headers]
    assert shapes[True] == shapes[False]
    assert len(learnt) == 4 * 3  # what G returns bounds it: exchanges x columns
    assert {row: int(residual < 0) for row, residual in learnt.items()} == {row: y[row] for row in learnt}


def test_not_caught_label_holder_chooses_residual(secret):
    """R = a unit vector: the gradient is one row of X, and the next embedding its scalar product with every row."""
    parts, y = table(2, 60)
    target, n = 17, 60
    stolen: dict[str, Any] = {}

    def deviates(session: Session) -> None:
        plans = planned(session, parts["bank"], max_iter=2)
        holders = {"grocer": plans["grocer"]}
        end = offer_key(session, Terms.of(session.agreement, n, holders, 2), secret)
        open_gradients(end, np.eye(n)[target], 0)
        stolen["square"] = sum_scalars(session, 1, 0)[0] * n**2
        session.broadcast(Direction(0, False, np.array([-1.0])))
        stolen["products"] = sum_embeddings(session, n, 0)[:, 0] * -n
        session.broadcast(Weights(0, np.zeros(1)))
        open_gradients(end, np.zeros(n), 1)
        sum_scalars(session, 2, 1)
        session.broadcast(Direction(1, True, np.empty(0)))

    ended = fit(parts, y, secret, params={"max_iter": 2}, roles={"bank": deviates})
    assert isinstance(ended["grocer"], VerticalLogisticRegression)  # sees nothing odd
    x = parts["grocer"].to_numpy()
    np.testing.assert_allclose(stolen["products"], x @ x[target], atol=1e-4)
    assert stolen["square"] == pytest.approx(x[target] @ x[target], abs=1e-4)


def with_rare_column(parts: Parts, rows: list[int]) -> Parts:
    flag = np.zeros(len(parts["grocer"]))
    flag[rows] = 1.0
    return parts | {"grocer": pd.DataFrame(parts["grocer"].assign(flag=flag))}


def test_a_rare_column_yields_that_rows_label_which_is_why_it_is_refused(secret, monkeypatch):
    parts, y = table(3, 60)
    honest, gradients = subspace.weigh_gradient, []

    def curious(*arguments: Any) -> np.ndarray:
        gradients.append(honest(*arguments))
        return gradients[-1]

    at_the_grocer(monkeypatch, curious)
    monkeypatch.setattr("vfl.inputs.LEVERAGE_REFUSED", 2.0)
    for row in (int(np.flatnonzero(y == 1)[4]), int(np.flatnonzero(y == 0)[4])):
        gradients.clear()
        rare = with_rare_column(parts, [row])
        fit(
            rare, y, secret, params={"max_iter": 1}, policy={"minimum_rows_off_mode": 1}
        )  # the check is off: it follows along
        assert int(gradients[0][-1, 0] < 0) == y[row]
        recorded: Any = {}
        ended = fit(rare, y, secret, params={"max_iter": 1}, recorded=recorded)
        assert isinstance(ended["grocer"], LocalError)
        assert "flag (1)" in str(ended["grocer"])
        assert "SealedResidual" not in kinds(recorded, "bank", "grocer")


def test_two_columns_that_differ_in_one_row_yield_its_label_which_is_why_they_are_refused(secret, monkeypatch):
    """Each column alone is common enough; their difference is not."""
    parts, y = table(3, 60)
    flag = (np.arange(60) % 2).astype(float)
    row = 8
    twins = parts["grocer"].assign(flag=flag, twin=np.where(np.arange(60) == row, 1.0, flag))
    honest, gradients = subspace.weigh_gradient, []
    at_the_grocer(monkeypatch, lambda *arguments: gradients.append(honest(*arguments)) or gradients[-1])
    refused = fit(parts | {"grocer": twins}, y, secret, params={"max_iter": 1})["grocer"]
    assert isinstance(refused, LocalError)
    assert "leverage" in str(refused)
    assert not gradients
    monkeypatch.setattr("vfl.inputs.LEVERAGE_REFUSED", 2.0)
    ended = fit(parts | {"grocer": twins}, y, secret, params={"max_iter": 1})
    assert {type(model) for model in ended.values()} == {VerticalLogisticRegression}
    assert int(gradients[0][-1, 0] - gradients[0][-2, 0] < 0) == y[row]


def test_scalar_products_are_masked_and_only_their_sum_is_right(three):
    bank, alone, n = three["parts"]["bank"].to_numpy(), three["ended recorded"]["bank"].alone_, len(three["y"])
    residual = expit(bank @ alone.coef_[0] + alone.intercept_[0]) - three["y"]
    true, masked = [], []
    for name in ("grocer", "mobile"):
        gradient = three["parts"][name].to_numpy().T @ residual / n
        true.append(float(gradient @ gradient))
        masked.append(from_wire(sent(three["recorded"], name, "bank", MaskedScalars)[0].data)[0])
        assert abs(masked[-1] / 2.0**80 - true[-1]) > 1.0  # equal by chance once in 2^47
    assert sum(masked) % 2**128 / 2.0**80 == pytest.approx(sum(true), rel=1e-3)
