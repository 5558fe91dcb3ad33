"""The two roles of the horizontal mode: results equal to the pooled rows', whoever drops out; every failure typed."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor, Ridge
from sklearn.preprocessing import StandardScaler

from parties.channel import Channel
from parties.errors import ColonnadeError, LocalError, PeerAborted, PeerLost, ProtocolViolation, Refused
from parties.horizontal import Array, Clients, Horizontal, Privacy, Public
from parties.identity import Identity
from parties.ledger import Ledger
from parties.memory import links
from parties.message import CLASSES, PAYLOAD_LIMIT, decode, encode, name_of, parse_header
from vfl.checkpoint import Bound
from vfl.horizontal import masking, secure_aggregation
from vfl.horizontal.client import Admitted, _End, former_session, take_part
from vfl.horizontal.context import Company
from vfl.horizontal.coordinator import coordinate
from vfl.horizontal.federated import (
    FederatedLinearRegression,
    FederatedLogisticRegression,
    FederatedPoissonRegressor,
    train,
)
from vfl.horizontal.local import Correction, Objective, Plan, Trained
from vfl.horizontal.masking import Offer
from vfl.horizontal.messages import KeyList, KeyOffer, SealedShares, SurvivorSignature
from vfl.horizontal.models import FlowerClient, LinearModel, Score, TorchModel
from vfl.horizontal.privacy_budget import PrivacyBudget
from vfl.horizontal.report import protection, training, training_rows
from vfl.horizontal.round_messages import (
    OVER_BUDGET,
    SIGNED,
    Admission,
    Ready,
    ReadyWithShares,
    Scores,
    Task,
    Turn,
    Update,
)
from vfl.horizontal.round_messages import Table as TableMessage
from vfl.horizontal.rounds import Collected, checked, combine
from vfl.horizontal.settings import TAIL, Job, Schema
from vfl.horizontal.simulate import simulate
from vfl.horizontal.star import Star
from vfl.horizontal.strategies import Part, Population, broadcast, client_round, server_round, strategy
from vfl.horizontal.trainer import Data, describe

NAMES = ("c0", "c1", "c2", "c3")
DOZEN = tuple(f"c{number}" for number in range(12))
KEYS = {name: Identity.generate(name) for name in ("hub", *DOZEN)}
PUBLIC = {name: key.public for name, key in KEYS.items()}
QUICK = Clients(deadline=2.0)


def cancer() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(x), y


def dealt(x: np.ndarray, y: np.ndarray, clients: int = 4) -> dict[str, Data]:
    """Sorted by target: no two clients' rows are alike, and some have one class only."""
    columns = tuple(f"x{j}" for j in range(x.shape[1]))
    order = np.array_split(np.argsort(y, kind="stable"), clients)
    return {f"c{i}": Data(x[rows], y[rows], columns) for i, rows in enumerate(order)}


def family(name: str, **given: Any) -> Horizontal:
    return Horizontal(strategy=name, **{"rounds": 3, "epochs": 2, "batch": 16, "rate": 0.05, **given})


@dataclass
class Table:
    """A coordinator and its clients in threads; `dies` says at which of its messages a client vanishes, `again` which
    clients then come back, over a new channel, and at which message they vanish once more (-1: not)."""

    settings: Horizontal
    parts: Mapping[str, Any]
    dies: Mapping[str, int] = field(default_factory=dict)
    again: Mapping[str, int] = field(default_factory=dict)
    back: dict[str, Channel] = field(default_factory=dict)
    ends: list[tuple[Channel, Any]] = field(default_factory=list)
    hub: Mapping[str, Any] = field(default_factory=dict)
    client: Callable[[str], Mapping[str, Any]] = lambda name: {}
    outcomes: dict[str, Any] = field(default_factory=dict)
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    kinds: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    session: bytes = bytes(range(32))

    @property
    def roll(self) -> dict[str, Any]:
        """Of the clients that signed the session."""
        return {name: PUBLIC[name] for name in (*self.parts, *(["hub"] if "own" in self.hub else []))}

    def rejoined(self) -> dict[str, Channel]:
        return {name: self.back.pop(name) for name in list(self.back)}

    def run(self) -> Any:
        """What the coordinator ends with, also when that is an error; `outcomes` has the clients'."""
        back = {"rejoined": self.rejoined} if self.again else {}
        mesh = links(["hub", *self.parts], self._count)
        threads = [threading.Thread(target=self._client, args=(mesh, name), daemon=True) for name in self.parts]
        for thread in threads:
            thread.start()
        channels = {name: self._channel(mesh, "hub", name) for name in self.parts}
        result: Any
        try:
            result = coordinate(channels, KEYS["hub"], self.roll, self.session, self.settings, **back, **self.hub)
        except (ColonnadeError, InterruptedError) as error:
            result = error
        for channel, link in [*((channels[name], mesh["hub"][name]) for name in self.parts), *self.ends]:
            channel.abort("error")
            link.leave()
        for thread in threads:
            thread.join()
        return result

    def _count(self, sender: str, receiver: str, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        self.sent[sender, receiver] += 1
        self.kinds[sender, receiver].append(name_of(parse_header(header).kind))
        return header, payload

    def _channel(self, mesh: Any, me: str, peer: str) -> Channel:
        ledger = Ledger(KEYS[me], None, frozenset(CLASSES) - ({"plaintext"} if self.settings.secure else set()))
        ids = {"our_id": PUBLIC[me].key_id, "peer_id": PUBLIC[peer].key_id}
        made = Channel(mesh[me][peer], peer=peer, ledger=ledger, timeout=20.0, **ids)
        made.session = self.session
        return made

    def _client(self, mesh: Any, name: str) -> None:
        self._one(mesh, name, self.dies.get(name, -1))
        if name in self.again:
            self._one(self._new_links(name), name, self.again[name])

    def _new_links(self, name: str) -> Any:
        mesh = links(["hub", name], self._count)
        self.back[name] = self._channel(mesh, "hub", name)
        self.ends.append((self.back[name], mesh["hub"][name]))
        return mesh

    def _one(self, mesh: Any, name: str, left: int) -> None:
        channel, part = self._channel(mesh, name, "hub"), self.parts[name]
        plain = channel.send

        def send(message: Any, timeout: float | None = None) -> None:
            nonlocal left
            if left == 0:
                raise InterruptedError
            left -= 1
            plain(message, timeout)

        channel.send = send  # type: ignore[method-assign]
        rows, model = (part, None) if isinstance(part, Data) else (None, part)
        try:
            self.outcomes[name] = take_part(
                channel, KEYS[name], self.roll, self.session, self.settings, rows, model=model, **self.client(name)
            )
        except (ColonnadeError, InterruptedError) as error:
            self.outcomes[name] = error
            if not isinstance(error, InterruptedError):
                channel.abort(error.kind if error.kind != "aborted" else "error")
        mesh[name]["hub"].leave()


class Toy:
    """An own model: its weights move by one a round, unless it is told otherwise."""

    corrects = False

    def __init__(self, rows: int = 10, acts: Mapping[int, Callable[[np.ndarray], np.ndarray]] | None = None) -> None:
        self.rows, self.acts, self.weights, self.fits = rows, acts or {}, np.zeros(3), 0

    def get(self) -> np.ndarray:
        return self.weights

    def set(self, weights: np.ndarray) -> None:
        self.weights = weights.copy()

    def fit_local(self, plan: Plan, correction: Correction, seed: Any) -> Trained:
        act = self.acts.get(self.fits, lambda weights: weights + 1)
        self.fits += 1
        return Trained(act(self.weights), self.rows)

    def evaluate(self) -> Score:
        return Score(self.rows, float(self.weights[0]), np.nan)


def own(**given: Any) -> Horizontal:
    return Horizontal(model="own", strategy="fedavg", **{"rounds": 4, "clients": QUICK, **given})


# ---- the exact method is scikit-learn on the pooled rows


def test_exact_logistic_regression_is_scikit_learns_optimum() -> None:
    x, y = cancer()
    found = FederatedLogisticRegression(C=0.5).fit(dealt(x, y))
    oracle = LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x, y)
    assert type(found) is LogisticRegression
    np.testing.assert_allclose(found.coef_, oracle.coef_, atol=1e-5)
    np.testing.assert_allclose(found.intercept_, oracle.intercept_, atol=1e-5)
    assert found.score(x, y) == oracle.score(x, y)


def test_three_classes_with_text_labels_and_a_federated_scaler() -> None:
    x, y = load_wine(return_X_y=True)
    y = np.array(["barolo", "grignolino", "barbera"])[y]
    found = FederatedLogisticRegression(standardise=True, classes=("grignolino", "barolo", "barbera")).fit(
        dealt(x, y, 3)
    )
    oracle = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(StandardScaler().fit_transform(x), y)
    np.testing.assert_allclose(
        found.predict_proba(x), oracle.predict_proba(StandardScaler().fit_transform(x)), atol=1e-5
    )
    np.testing.assert_allclose(found.steps[0][1].mean_, x.mean(axis=0), rtol=1e-9)
    assert (found.predict(x) == oracle.predict(StandardScaler().fit_transform(x))).all()


def test_exact_linear_and_poisson_regression() -> None:
    x, y = load_diabetes(return_X_y=True)
    x, y = x * 10, y / 100
    counts = np.random.default_rng(0).poisson(np.exp(x @ np.linspace(-1, 1, 10) / 5))
    plain = FederatedLinearRegression().fit(dealt(x, y))
    np.testing.assert_allclose(plain.coef_, LinearRegression().fit(x, y).coef_, atol=1e-5)
    ridge = FederatedLinearRegression(alpha=3.0).fit(dealt(x, y))
    np.testing.assert_allclose(ridge.coef_, Ridge(alpha=3.0).fit(x, y).coef_, atol=1e-6)
    poisson = FederatedPoissonRegressor(alpha=0.1).fit(dealt(x, counts))
    oracle = PoissonRegressor(alpha=0.1, solver="newton-cholesky", tol=1e-12).fit(x, counts)
    np.testing.assert_allclose(poisson.coef_, oracle.coef_, atol=1e-5)


# ---- the family


def gradient_descent(x: np.ndarray, y: np.ndarray, rounds: int, rate: float, C: float = 1.0) -> np.ndarray:
    """Of the mean log loss + |w|^2 / (2 C n), in plain numpy."""
    weights = np.zeros(x.shape[1] + 1)
    for _ in range(rounds):
        residual = 1 / (1 + np.exp(-(x @ weights[:-1] + weights[-1]))) - y
        gradient = np.append(x.T @ residual / len(y) + weights[:-1] / (C * len(y)), residual.mean())
        weights = weights - rate * gradient
    return weights


@pytest.mark.parametrize("secure", ["on", "none"])
def test_fedsgd_and_one_local_step_of_fedavg_are_gradient_descent_on_all_rows(secure: Any) -> None:
    x, y = cancer()
    centralised = gradient_descent(x, y, 5, 0.5)
    sgd = train(dealt(x, y), family("fedsgd", rounds=5, parameters={"rate": 0.5}, secure_aggregation=secure))
    one = train(dealt(x, y), family("fedavg", rounds=5, epochs=1, batch=0, rate=0.5, secure_aggregation=secure))
    np.testing.assert_allclose(sgd.weights, centralised, rtol=0, atol=1e-10)
    np.testing.assert_allclose(one.weights, centralised, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["fedavg", "feddyn", "scaffold", "fedadam", "fedprox"])
def test_the_roles_add_nothing_to_the_strategy(name: str) -> None:
    """Against the same pure steps, called one after another."""
    x, y = cancer()
    parts, chosen, plan = dealt(x, y), strategy(name), Plan(2, 16, 0.05)
    models = [
        LinearModel(Objective("logistic", 30, penalty=1 / len(y)), p.x, p.y.astype(float)) for p in parts.values()
    ]
    part, population = Part.whole(31), Population(4, len(y))
    server, states = chosen.server(np.zeros(31)), [chosen.client(31) for _ in models]
    for number in range(3):
        received, total = broadcast(chosen, part, server), np.zeros(0)
        for k, model in enumerate(models):

            def fit(start: Any, correction: Any, model: Any = model, seed: Any = (0, number, k)) -> Trained:
                model.set(start)
                return model.fit_local(plan, correction, seed)

            share = population.share(model.rows)
            message, states[k], _ = client_round(chosen, part, received, model.get(), states[k], share, fit)
            total = total + message if len(total) else message
        server = server_round(chosen, part, server, total, population)
    for secure in ("on", "none"):
        outcome = train(parts, family(name, secure_aggregation=secure))
        np.testing.assert_allclose(outcome.weights, server["weights"], atol=1e-9)
        assert [one.clients for one in outcome.rounds] == [NAMES] * 3


def test_every_client_has_the_model_and_its_own_scores() -> None:
    x, y = cancer()
    table = Table(Horizontal(), dealt(x, y))
    outcome = table.run()
    for name, one in table.outcomes.items():
        np.testing.assert_array_equal(one.model.coef_, outcome.model.coef_)
        assert one.clients[name].after == outcome.clients[name].after
    assert outcome.rounds[0].loss == pytest.approx(np.log(2))
    losses = {name: one.after.loss for name, one in outcome.clients.items()}
    assert outcome.worst == max(losses, key=lambda name: losses[name])
    assert outcome.spread == pytest.approx(max(losses.values()) - min(losses.values()))
    assert outcome.facts()["clients"]["c0"]["contribution"] is None


def test_scores_on_rows_kept_from_training() -> None:
    x, y = cancer()
    whole = train(dealt(x, y), Horizontal(test_fraction=0.25))
    assert sum(one.after.rows for one in whole.clients.values()) == pytest.approx(len(y) / 4, abs=2)


def test_the_coordinator_may_be_a_client_itself() -> None:
    x, y = cancer()
    parts = dealt(x, y)
    table = Table(Horizontal(), {name: parts[name] for name in NAMES[1:]}, hub={"own": parts["c0"]})
    outcome = table.run()
    np.testing.assert_allclose(outcome.weights, train(parts, Horizontal()).weights, atol=1e-9)
    assert outcome.rounds[0].clients == ("hub", "c1", "c2", "c3")


# ---- who drops out


@pytest.mark.parametrize("message", range(1, 12))
def test_whenever_a_client_vanishes_the_others_finish(message: int) -> None:
    """Its messages: Table, then Ready and the five steps of a sum, its score, Ready and three steps, for keys came
    ahead; the last of them in round 0."""
    table = Table(own(), {name: Toy() for name in NAMES}, dies={"c2": 1 + message})
    outcome = table.run()
    np.testing.assert_allclose(outcome.weights, 4.0)
    np.testing.assert_array_equal([table.outcomes[name].weights for name in ("c0", "c1", "c3")], [outcome.weights] * 3)
    assert isinstance(table.outcomes["c2"], InterruptedError)
    assert all("c2" in one.missing for one in outcome.rounds[1:])


def test_below_its_quorum_a_round_stops_and_names_who_is_missing() -> None:
    settings = own(clients=Clients(deadline=0.3))
    table = Table(settings, {name: Toy() for name in NAMES}, dies={"c1": 8, "c3": 8})
    with pytest.raises(PeerLost, match=r"round 0, train: 2 clients are left, 3 are needed; missing: c1: .*; c3: "):
        raise table.run()


def test_when_every_client_fails_the_job_fails() -> None:
    def fails(weights: np.ndarray) -> np.ndarray:
        raise LocalError("the client's own reason")

    table = Table(own(), {name: Toy(acts={1: fails}) for name in NAMES})
    with pytest.raises(PeerLost, match=r"round 1, train: 0 clients are left.*c0: it could not train"):
        raise table.run()
    assert "the client's own reason" in str(table.outcomes["c0"])


def test_a_late_client_misses_its_round_and_comes_back() -> None:
    def sleeps(weights: np.ndarray) -> np.ndarray:
        time.sleep(0.6)
        return weights + 1

    settings = Horizontal(
        model="own", strategy="fedavg", rounds=8, clients=Clients(deadline=0.4), secure_aggregation="none"
    )
    parts = {name: Toy(acts={1: sleeps} if name == "c0" else {}) for name in NAMES}
    for other in NAMES[1:]:
        parts[other].acts = {n: lambda w: (time.sleep(0.1), w + 1)[1] for n in range(2, 8)}
    outcome = Table(settings, parts).run()
    present = ["c0" in one.clients for one in outcome.rounds]
    assert present[0] and not present[1] and present[-1]
    assert "sent nothing" in outcome.rounds[1].missing["c0"]
    assert outcome.gone == ()


def test_why_a_late_client_stopped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_late(end: _End, task: Task) -> bool:
        if end.me.name == "c0" and task.round == 1:
            time.sleep(0.6)
            raise LocalError("the client's own reason")
        return plain(end, task)

    plain = _End.answer
    monkeypatch.setattr(_End, "answer", fails_late)
    parts = {name: Toy() for name in NAMES}
    for other in NAMES[1:]:
        parts[other].acts = {n: lambda w: (time.sleep(0.2), w + 1)[1] for n in range(2, 5)}
    outcome = Table(openly(clients=Clients(deadline=0.4)), parts).run()
    assert outcome.gone == ("c0",)
    assert "a problem with its own input or machine" in outcome.rounds[3].missing["c0"]


def test_a_client_whose_update_is_late_is_left_out_and_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum cannot do without it, waits for it in vain, and fails; the client has broken no rule, nor have others."""
    plain = _End._send

    def late(end: _End, task: Task, *given: Any) -> bool:
        time.sleep(0.6 * (end.me.name == "c0" and task.stage == "train"))
        return plain(end, task, *given)

    monkeypatch.setattr(_End, "_send", late)
    table = Table(openly(clients=Clients(quorum=4, deadline=0.4)), {name: Toy() for name in NAMES})
    error = table.run()
    assert isinstance(error, PeerLost) and "3 clients are left, 4 are needed; missing: c0: c0 sent" in str(error)
    assert all(isinstance(one, PeerAborted) for one in table.outcomes.values())


def test_updates_that_are_not_finite_are_left_out_by_name() -> None:
    parts = {name: Toy(acts={1: lambda weights: weights * np.nan} if name == "c1" else {}) for name in NAMES}
    outcome = Table(own(), parts).run()
    assert outcome.rounds[1].missing == {"c1": "its numbers are not finite"}
    assert outcome.rounds[2].clients == NAMES
    np.testing.assert_allclose(outcome.weights, 4.0)


def test_large_numbers_widen_the_fixed_point_and_too_large_ones_are_left_out() -> None:
    parts = {name: Toy(acts={0: lambda weights: weights + 1e9}) for name in NAMES}
    np.testing.assert_allclose(Table(own(rounds=1), parts).run().weights, 1e9)
    parts = {name: Toy(acts={0: lambda weights: weights + 1e30} if name == "c3" else {}) for name in NAMES}
    outcome = Table(own(rounds=1), parts).run()
    assert outcome.rounds[0].missing == {"c3": "its numbers exceed 2^40"}


@pytest.mark.parametrize("secure", ["on", "none"])
def test_a_rate_that_diverges_stops_with_the_round(secure: Any) -> None:
    x, y = load_diabetes(return_X_y=True)
    settings = Horizontal(
        model="linear", strategy="fedavg", rate=1e60, rounds=20, secure_aggregation=secure, clients=QUICK
    )
    with pytest.raises(LocalError, match=r"^round [0-9]+: training diverges"):
        train(dealt(x, y), settings)


def test_clients_are_chosen_as_agreed() -> None:
    x, y = cancer()
    settings = family("fedavg", clients=Clients(fraction=0.75), rounds=6)
    rounds = train(dealt(x, y), settings).rounds
    assert {len(one.clients) for one in rounds} == {3}
    assert len({one.clients for one in rounds}) > 1
    again = train(dealt(x, y), settings).rounds
    assert [one.clients for one in again] == [one.clients for one in rounds]
    parts = dealt(x, y)
    parts["c1"] = parts["c1"].rows(np.arange(0))
    by_rows = family("fedavg", clients=Clients(fraction=0.75, selection="rows"), rounds=3)
    assert all("c1" not in one.clients for one in train(parts, by_rows).rounds)


SPEED = Clients(fraction=0.25, minimum=2, selection="speed")


def test_the_quickest_are_asked_and_never_fewer_than_the_minimum() -> None:
    job = Job(own(clients=SPEED), Schema(model="own", size=3), 4)
    assert job.choose(7, [], [0.3, 0.1, 0.4, 0.2]) == [1, 3]


def test_a_quick_client_is_not_timed_by_the_slow_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """c0 answers once c1's answer has been read, which therefore does not wait for c0's."""
    read, order, plain = threading.Event(), [], Star._gather

    def watched(star: Star, *given: Any) -> Any:
        for name, message in plain(star, *given):
            if star.task.stage == "train" and isinstance(message, Ready):
                order.append(name)
                read.set()
            yield name, message

    def waits(weights: np.ndarray) -> np.ndarray:
        assert read.wait(20)
        return weights + 1

    monkeypatch.setattr(Star, "_gather", watched)
    parts = {name: Toy(acts={0: waits} if name == "c0" else {}) for name in NAMES}
    table = Table(
        own(rounds=1, clients=msgspec.structs.replace(SPEED, deadline=20.0), secure_aggregation="none"), parts
    )
    assert table.run().rounds[0].clients == ("c0", "c1")
    assert order == ["c1", "c0"]


# ---- tables that do not go together


def unlike(what: str) -> dict[str, Data]:
    x, y = cancer()
    parts = dealt(x, y)
    odd = parts["c2"]
    names, given = list(odd.names), {}
    if what == "column":
        names[3] = "income"
    if what == "order":
        names[3], names[4] = names[4], names[3]
    if what == "unit":
        given = {"units": {"x1": "EUR"}}
    if what == "dtype":
        given = {"dtypes": {"x1": "int64"}}
    if what == "classes":
        given = {"classes": (0, 1, 2)}
        parts["c0"] = Data(parts["c0"].x, parts["c0"].y, parts["c0"].names, (0, 1))
    parts["c2"] = Data(odd.x, odd.y, tuple(names), **given)
    return parts


@pytest.mark.parametrize(
    ("what", "difference"),
    [
        ("column", "no column 'x3'"),
        ("order", "the columns in another order, from 'x3' on"),
        ("unit", "unit 'EUR' of column 'x1' instead of None"),
        ("dtype", "dtype 'int64' of column 'x1' instead of None"),
        ("classes", "3 declared classes that are not the same 2"),
    ],
)
def test_tables_that_differ_are_refused_before_training(what: str, difference: str) -> None:
    table = Table(Horizontal(), unlike(what))
    error = table.run()
    assert isinstance(error, Refused)
    assert error.peer == "c2"
    assert str(error).startswith(f"c2 has {difference}")
    assert isinstance(table.outcomes["c2"], Refused)
    assert difference in str(table.outcomes["c2"])
    assert isinstance(table.outcomes["c0"], PeerAborted)
    assert table.sent["c0", "hub"] <= 2


def test_a_client_without_rows_or_with_one_class_trains_unless_the_minimum_refuses_it() -> None:
    x, y = cancer()
    parts = dealt(x, y)
    parts["c3"] = parts["c3"].rows(np.arange(0))
    keep = np.concatenate([parts[name].x for name in NAMES]), np.concatenate([parts[name].y for name in NAMES])
    oracle = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(*keep)
    np.testing.assert_allclose(FederatedLogisticRegression().fit(parts).coef_, oracle.coef_, atol=1e-5)
    for minimum in (Clients(minimum_rows=1), Clients(minimum_classes=2)):
        with pytest.raises(Refused, match=r"fewer (rows|classes) than the agreed minimum"):
            train(parts, Horizontal(clients=minimum))


def test_labels_beyond_the_agreed_classes_are_the_clients_own_error() -> None:
    x, y = cancer()
    with pytest.raises(LocalError, match="are none of the 2 agreed classes"):
        train(dealt(x, y + 1), Horizontal(classes=(0, 1)))


# ---- what the agreement refuses

TWO = {"secure_aggregation": "none"}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"strategy": "fedavg", "compression": "8bit"}, "no sum under masks"),
        ({"strategy": "fedavg", "robust": "median"}, "each client's own update"),
        ({"leave_one_out": True}, "by difference"),
        ({"model": "own"}, "an own model needs another"),
        ({"degree": 3}, "even"),
        ({"strategy": "fedavg", "robust": "krum", **TWO}, "needs poisoned"),
        ({"strategy": "feddyn", "privacy": Privacy(level="client", rows=9), "classes": (0, 1)}, "averaging strategies"),
        ({"strategy": "fedavg", "privacy": Privacy(level="record", rows=9), "classes": (0, 1)}, "each example"),
        ({"strategy": "fedavg", "privacy": Privacy(level="client"), "classes": (0, 1)}, "a public number of rows"),
        (
            {
                "strategy": "fedavg",
                "privacy": Privacy(level="client", rows=9),
                "classes": (0, 1),
                "clients": Clients(selection="rows"),
            },
            "how many rows each client has",
        ),
        ({"strategy": "fedavg", "clients": Clients(selection="poisson")}, "keeps secret who is drawn"),
        (
            {
                "strategy": "fedavg",
                "privacy": Privacy(level="client", noise="central", rows=9),
                "classes": (0, 1),
                "clients": Clients(selection="poisson", quorum=3),
                **TWO,
            },
            "no minimum and no quorum",
        ),
        (
            {"strategy": "fedavg", "privacy": Privacy(level="client", rows=9), "classes": (0, 1), **TWO},
            "hide only the sum",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Horizontal(**given)


@pytest.mark.parametrize(
    ("clients", "settings", "reason"),
    [
        (2, Horizontal(), "protects nothing with 2 clients"),
        (4, Horizontal(clients=Clients(quorum=5)), "a quorum of 5 where 4"),
        (4, Horizontal(clients=Clients(quorum=2)), "a quorum of 2 of 4 clients; secure aggregation needs 3"),
        (3, Horizontal(clients=Clients(quorum=2)), "a quorum of 2 of 3 clients; secure aggregation needs 3"),
        (4, Horizontal(degree=4), "a degree of 4 needs more"),
        (4, Horizontal(degree=2), "a degree of 2 is small for 4 clients"),
    ],
)
def test_too_few_clients_for_what_was_agreed(clients: int, settings: Horizontal, reason: str) -> None:
    x, y = cancer()
    with pytest.raises(Refused, match=reason):
        train(dealt(x, y, clients), settings)


def test_a_model_that_no_message_can_carry_is_refused_before_any_is_sent() -> None:
    most = PAYLOAD_LIMIT // 8 - TAIL - 1

    def agreed(name: Any, size: int) -> None:
        checked(Horizontal(model="own", strategy=name, arrays=(Array(name="w", shape=(size, 1)),)), 4)

    agreed("fedavg", most)
    encode(Update(0, 0, np.zeros(most + TAIL + 1)), bytes(32), bytes(32), bytes(32), 0)
    for name, size in (("fedavg", most + 1), ("scaffold", most // 2 + 1)):
        with pytest.raises(LocalError, match="numbers a message are agreed"):
            agreed(name, size)
    public = Public(rows=most, digest="0" * 64)
    with pytest.raises(LocalError, match="take fewer public rows"):
        checked(Horizontal(model="own", strategy="distillation", classes=(0, 1), public=public), 4)


def test_two_clients_train_without_secure_aggregation() -> None:
    x, y = cancer()
    found = FederatedLogisticRegression(secure_aggregation="none").fit(dealt(x, y, 2))
    oracle = LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(x, y)
    np.testing.assert_allclose(found.coef_, oracle.coef_, atol=1e-5)


# ---- checkpoints


def stored(folder: Path) -> dict[str, Any]:
    for who in ("hub", *NAMES):
        (folder / who).mkdir()
    return {"client": lambda who: {"folder": folder / who}, "hub": {"folder": folder / "hub"}}


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fedavgm", "exact"])
def test_killed_and_restarted_training_ends_where_undisturbed_training_does(name: str, tmp_path: Path) -> None:
    x, y = cancer()
    settings, parts = family(name, rounds=6), dealt(x, y)
    folders = {who: tmp_path / who for who in ("hub", *NAMES)}
    for folder in folders.values():
        folder.mkdir()

    def killed(phase: str, done: int, total: int) -> None:
        if done == 3:
            raise InterruptedError

    stores = {"client": lambda who: {"folder": folders[who]}}
    hub = {"folder": folders["hub"]}
    first = Table(settings, parts, hub={**hub, "progress": killed}, **stores).run()
    assert isinstance(first, InterruptedError)
    again = Table(settings, parts, hub=hub, session=bytes(32), **stores).run()
    undisturbed = Table(settings, parts).run()
    np.testing.assert_array_equal(again.weights, undisturbed.weights)
    assert [one.number for one in again.rounds] == [one.number for one in undisturbed.rounds]


@pytest.mark.parametrize("what", ["scaffold", "personal"])
def test_who_lost_what_it_had_learnt_cannot_go_on(what: str, tmp_path: Path) -> None:
    """A control variate or a head of its own, which nobody else has."""

    class Headed(Toy):
        def coordinates(self, prefix: str) -> np.ndarray:
            return np.array([False, False, True])

    if what == "scaffold":
        settings, parts = family("scaffold"), lambda: dealt(*cancer())
    else:
        settings, parts = own(personal="head."), lambda: {name: Headed() for name in NAMES}
    stores = stored(tmp_path)
    Table(settings, parts(), **stores).run()
    (tmp_path / "c1" / "client.checkpoint").unlink()
    table = Table(settings, parts(), session=bytes(32), **stores)
    table.run()
    assert isinstance(table.outcomes["c1"], LocalError)
    assert "client.checkpoint is missing, or older than round" in str(table.outcomes["c1"])


def test_resuming_a_finished_job_says_that_nothing_was_left_to_do(tmp_path: Path) -> None:
    x, y = cancer()
    settings, parts, stores = family("fedavg", rounds=2), dealt(x, y), stored(tmp_path)
    first = Table(settings, parts, **stores).run()
    table = Table(settings, parts, session=bytes(32), **stores)
    again = table.run()
    np.testing.assert_array_equal(again.weights, first.weights)
    for one in (again, *table.outcomes.values()):
        assert one.warnings == ("all 2 rounds were done before this start: nothing was trained, the model is theirs",)
        assert one.earlier + len(one.rounds) == 2
    shown = dict(training_rows(training(settings, table.outcomes["c0"])))
    assert shown["training"] == "logistic, fedavg, 2 rounds, 2 of them before this start"


@pytest.mark.parametrize("secure", ["on", "none"])
def test_a_sum_that_the_coordinator_has_saved_counts_for_clients_that_never_heard(
    secure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies between its checkpoint and the confirmation: SCAFFOLD's control variates must still agree."""
    x, y = cancer()
    settings, parts = family("scaffold", rounds=4, secure_aggregation=secure), dealt(x, y)
    stores = stored(tmp_path)

    def dies(star: Star, collected: Collected) -> None:
        if star.task.stage == "train" and star.task.round == 2:
            raise InterruptedError
        confirm(star, collected)

    confirm = Star.confirm
    monkeypatch.setattr(Star, "confirm", dies)
    assert isinstance(Table(settings, parts, **stores).run(), InterruptedError)
    monkeypatch.undo()
    again = Table(settings, parts, session=bytes(32), **stores).run()
    np.testing.assert_array_equal(again.weights, Table(settings, parts).run().weights)


def test_checkpoints_that_are_damaged_or_of_another_job_are_refused(tmp_path: Path) -> None:
    x, y = cancer()
    Table(family("fedavg", rounds=1), dealt(x, y), hub={"folder": tmp_path}).run()
    with pytest.raises(LocalError, match="of another job"):
        raise Table(family("fedavg", rounds=2), dealt(x, y), hub={"folder": tmp_path}).run()
    file = tmp_path / "coordinator.checkpoint"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LocalError, match="damaged"):
        raise Table(family("fedavg", rounds=1), dealt(x, y), hub={"folder": tmp_path}).run()


# ---- a client that was killed comes back while the others wait, or go on


READY = 8 + 4 * 2  # the number of a client's Ready in round 2: after its table, a sum of rows, a score and two rounds
KILLED = {"Ready": 0, "MaskedInput": 1, "SurvivorSignature": 2, "Unmasking": 3}  # where keys came ahead


def waits(table: Table) -> None:
    """From round 3 on the coordinator goes on only once the killed client is there again."""

    def progress(phase: str, done: int, total: int) -> None:
        until = time.monotonic() + 10
        while done >= 3 and not table.ends and time.monotonic() < until:
            time.sleep(0.01)

    table.hub = {**table.hub, "progress": progress}


def same(table: Table, settings: Horizontal, parts: Mapping[str, Any]) -> Any:
    """What a disturbed run ends with, which is what an undisturbed one does, at every client."""
    outcome = table.run()
    if isinstance(outcome, Exception):
        raise outcome
    np.testing.assert_array_equal(outcome.weights, Table(settings, parts).run().weights)
    for one in table.outcomes.values():
        np.testing.assert_array_equal(one.weights, outcome.weights)
    return outcome


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fedavgm", "exact"])
@pytest.mark.parametrize("message", ["Ready", "MaskedInput"])
def test_a_sum_that_lacks_a_killed_client_waits_for_it(name: str, message: str, tmp_path: Path) -> None:
    x, y = cancer()
    settings, parts = family(name, rounds=4, clients=Clients(quorum=4, deadline=10.0)), dealt(x, y)
    table = Table(settings, parts, dies={"c1": READY + KILLED[message]}, again={"c1": -1}, **stored(tmp_path))
    outcome = same(table, settings, parts)
    assert all(one.clients == NAMES and not one.missing for one in outcome.rounds)
    assert table.outcomes["c1"].earlier == 2 and table.outcomes["c1"].rounds[0].number == 2


@pytest.mark.parametrize("message", ["SurvivorSignature", "Unmasking"])
def test_a_client_killed_once_its_sum_may_be_opened_comes_back_for_the_next(message: str, tmp_path: Path) -> None:
    """The others open the sum, with its numbers; it must not train the round again, and must know that it counted."""
    x, y = cancer()
    settings, parts = family("scaffold", rounds=6, clients=Clients(deadline=10.0)), dealt(x, y)
    table = Table(settings, parts, dies={"c1": READY + KILLED[message]}, again={"c1": -1}, **stored(tmp_path))
    waits(table)
    assert all("c1" in one.clients for one in same(table, settings, parts).rounds)


@pytest.mark.parametrize("rounds", [3, 4])  # the last round, and another
def test_a_client_that_agreed_to_open_a_sum_opens_no_second_one_of_it(rounds: int, tmp_path: Path) -> None:
    """It is killed before the others have its signature: all four are needed, so that the sum cannot be opened."""
    x, y = cancer()
    settings, parts = family("fedavg", rounds=rounds, clients=Clients(quorum=4, deadline=5.0)), dealt(x, y)
    dies = {"c1": READY + KILLED["SurvivorSignature"]}
    table = Table(settings, parts, dies=dies, again={"c1": -1}, **stored(tmp_path))
    error = table.run()
    assert isinstance(error, PeerLost) and "c1: it was killed after it had agreed to open this sum" in str(error)
    assert "round 2, train: 3 clients are left, 4 are needed" in str(error)


def test_every_attempt_has_fresh_keys_and_a_higher_number(tmp_path: Path) -> None:
    x, y = cancer()
    settings, parts = family("fedavg", rounds=4, clients=Clients(quorum=4, deadline=10.0)), dealt(x, y)
    dies, again = {"c1": READY + KILLED["MaskedInput"]}, {"c1": 4}  # its masked input: Table, Ready, keys and shares
    offers: list[tuple[int, int, str, bytes]] = []

    class Watched(Table):
        def _count(self, sender: str, receiver: str, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
            for kind in (ReadyWithShares, KeyOffer, SealedShares):
                if sender == "c1" and parse_header(header).kind == kind.kind:
                    offer = decode(parse_header(header), payload, kind)
                    offers.append((offer.round, offer.attempt, kind.__name__, payload))
            return super()._count(sender, receiver, header, payload)

    class Twice(Watched):
        def _client(self, mesh: Any, name: str) -> None:
            super()._client(mesh, name)
            if name == "c1":
                self._one(self._new_links(name), name, -1)

    same(Twice(settings, parts, dies=dies, again=again, **stored(tmp_path)), settings, parts)
    repeated = [(attempt, kind) for number, attempt, kind, _ in offers if number == 4]  # after rows, score, two rounds
    exchanged = [(attempt, kind) for attempt in (1, 2) for kind in ("KeyOffer", "SealedShares")]
    assert repeated == [(0, "ReadyWithShares"), *exchanged]
    assert len({shown for *_, shown in offers}) == len(offers)


def test_without_secure_aggregation_too(tmp_path: Path) -> None:
    x, y = cancer()
    settings = family("scaffold", rounds=4, secure_aggregation="none", clients=Clients(quorum=4, deadline=10.0))
    parts = dealt(x, y)
    for number, message in enumerate((3 + 2 * 3, 4 + 2 * 3)):  # Ready or Update of round 2 or 3
        folder = tmp_path / str(number)
        folder.mkdir()
        table = Table(settings, parts, dies={"c1": message}, again={"c1": -1}, **stored(folder))
        outcome = same(table, settings, parts)
        assert all(one.clients == NAMES for one in outcome.rounds)


@pytest.mark.parametrize("kept", [True, False])
def test_without_masks_a_killed_client_answers_the_same_task_again_and_no_other(kept: bool, tmp_path: Path) -> None:
    """Each kill would give the coordinator one more update, at weights of its choice."""
    (tmp_path / "c0").mkdir()
    ready = []

    def asks(weight: float) -> Callable[[Channel], None]:
        def script(hub: Channel) -> None:
            hub.send(replace(task(0, 0), data=np.full(3, weight)))
            ready.append(int(hub.receive(Ready).data[0]))
            hub.abort("error")

        return script

    settings = openly(rounds=1)
    for weight in (1.0, 1.0 if kept else 2.0):
        cheat(asks(weight), settings, folder=tmp_path / "c0")
    assert ready == [0, 0 if kept else SIGNED]


def test_who_does_not_come_back_before_the_deadline_is_missing() -> None:
    x, y = cancer()
    settings, parts = family("fedavg", clients=Clients(quorum=4, deadline=0.5)), dealt(x, y)
    table = Table(settings, parts, dies={"c1": READY}, hub={"rejoined": dict})
    with pytest.raises(PeerLost, match=r"round 2, train: 3 clients are left, 4 are needed; missing: c1: "):
        raise table.run()


def test_who_comes_back_with_another_table_stays_out(tmp_path: Path) -> None:
    x, y = cancer()
    settings = family("fedavg", rounds=5, clients=Clients(deadline=5.0))
    parts = {**dealt(x, y)}
    table = Table(settings, parts, dies={"c1": READY}, again={"c1": -1}, **stored(tmp_path))
    waits(table)
    plain = table._one

    def changes(mesh: Any, name: str, left: int) -> None:
        if name == "c1" and left < 0:
            odd = parts["c1"]
            parts["c1"] = Data(odd.x[:, :-1], odd.y, odd.names[:-1])
        plain(mesh, name, left)

    table._one = changes  # type: ignore[method-assign]
    outcome = table.run()
    assert outcome.gone == ("c1",) and isinstance(table.outcomes["c1"], PeerAborted)
    assert [("c1" in one.clients) for one in outcome.rounds] == [True, True, False, False, False]


def test_who_broke_the_protocol_has_no_place_to_come_back_to(tmp_path: Path) -> None:
    settings = own(rounds=5, clients=Clients(deadline=5.0))
    table = Table(settings, {name: Toy() for name in NAMES}, again={"c1": -1}, **stored(tmp_path))
    waits(table)
    plain = table._one

    def lies(mesh: Any, name: str, left: int) -> None:
        if name != "c1" or "c1" in table.outcomes:
            plain(mesh, name, left)
            return
        channel = table._channel(mesh, "c1", "hub")
        channel.send(TableMessage(np.frombuffer(msgspec.json.encode(describe(settings, None, Toy())), np.uint8)))
        channel.receive(Admission)
        task = channel.receive(Task)
        channel.send(Ready(task.number + 1, 0, np.zeros(1, np.uint8)))
        table.outcomes["c1"] = None
        mesh["c1"]["hub"].leave()

    table._one = lies  # type: ignore[method-assign]
    outcome = table.run()
    assert "has no place to come back to" in outcome.rounds[-1].missing["c1"]
    assert isinstance(table.outcomes["c1"], PeerAborted) and table.outcomes["c1"].reason == "refused"


@pytest.mark.parametrize("what", ["agreement", "party"])
def test_a_checkpoint_of_another_agreement_or_party_is_refused(what: str, tmp_path: Path) -> None:
    x, y = cancer()
    settings, parts = family("fedavg", rounds=1), dealt(x, y)
    Table(settings, parts, hub={"folder": tmp_path, "agreement": b"one"}).run()
    if what == "agreement":
        with pytest.raises(LocalError, match=r"coordinator\.checkpoint is of another agreement"):
            raise Table(settings, parts, hub={"folder": tmp_path, "agreement": b"two"}).run()
        return
    (tmp_path / "coordinator.checkpoint").unlink()
    client = {"c0": {"folder": tmp_path}}
    Table(settings, parts, client=lambda name: client.get(name, {})).run()
    with pytest.raises(LocalError, match=r"client\.checkpoint is of another party, c0"):
        former_session(tmp_path, Bound(party="c1"))
    assert former_session(tmp_path, Bound(party="c0")) == bytes(range(32))


# ---- compression, robustness, contributions


@pytest.mark.parametrize(("how", "least"), [("8bit", 4), ("4bit", 5), ("topk:0.25", 2)])
def test_compression_saves_bytes_and_still_learns(how: str, least: float) -> None:
    x, y = load_wine(return_X_y=True)
    x = np.hstack([StandardScaler().fit_transform(x), np.random.default_rng(0).normal(size=(len(y), 200))])
    plain = train(dealt(x, y), family("fedavg", secure_aggregation="none", rounds=8))
    packed = train(dealt(x, y), family("fedavg", secure_aggregation="none", rounds=8, compression=how))
    assert packed.rounds[-1].bytes * least < plain.rounds[-1].bytes
    assert packed.rounds[-1].loss < 0.9 * packed.rounds[0].loss


def test_a_client_that_calls_its_numbers_fine_and_sends_nan_is_named_and_left_out() -> None:
    """It is taken off the same round, whose sum the others make; what it claims of itself does not matter."""
    table = Table(own(secure_aggregation="none"), {name: Toy() for name in NAMES})
    plain = _End._send

    def lies(end: _End, task: Task, turn: Turn, message: np.ndarray, *given: Any) -> bool:
        if end.me.name == "c1" and task.stage == "train" and task.round == 1:
            broken = Update(task.number, turn.attempt, message)
            object.__setattr__(broken, "data", message * np.nan)
            end.channel.send(broken)
            return True
        return plain(end, task, turn, message, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_End, "_send", lies)
        outcome = table.run()
    assert [one.clients for one in outcome.rounds] == [NAMES, *[("c0", "c2", "c3")] * 3]
    assert "not finite" in outcome.rounds[1].missing["c1"] and outcome.gone == ("c1",)
    np.testing.assert_allclose(outcome.weights, 4.0)


@pytest.mark.parametrize("dies", [{}, {"c3": 10, "c5": 11}], ids=["nobody", "two"])
def test_on_a_graph_a_client_is_shown_the_keys_of_its_neighbours_only(
    dies: Mapping[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight of eleven; two vanish in the first round, in the midst of a sum."""
    asked, shown = set[int](), set[int]()
    plain = Channel.send

    def send(channel: Channel, message: Any, timeout: float | None = None) -> None:
        if isinstance(message, Turn) and message.what == "add":
            asked.add(len(message.names))
        if isinstance(message, KeyList):
            shown.add(len(message.data))
        plain(channel, message, timeout)

    monkeypatch.setattr(Channel, "send", send)
    table = Table(own(degree=8), {name: Toy() for name in DOZEN}, dies=dies)
    outcome = table.run()
    np.testing.assert_allclose(outcome.weights, 4.0)
    left = tuple(name for name in DOZEN if name not in dies)
    assert [one.clients for one in outcome.rounds[1:]] == [left] * 3
    assert shown == {9} and asked == ({12} if not dies else {12, 10})


@pytest.mark.parametrize(
    "forge",
    [
        lambda company, shown: masking.sign_offer(company, KEYS["c2"], shown),
        lambda company, shown: masking.sign_offer(replace(company, attempt=1), KEYS["c1"], shown),
        lambda company, shown: masking.sign_offer(replace(company, subject=bytes(32)), KEYS["c1"], shown),
        lambda company, shown: masking.sign_offer(company, KEYS["c1"], shown)[32:64] * 5,
        lambda company, shown: masking.sign_offer(company, KEYS["c1"], replace(shown, sealing=bytes(32))),
        lambda company, shown: masking.sign_offer(company, KEYS["c1"], replace(shown, sealing=shown.mask)),
    ],
    ids=["of another", "of another attempt", "of another task", "altered", "small order", "twice the same"],
)
def test_a_client_that_offers_forged_keys_is_named_and_left_out(
    forge: Callable[[Company, Offer], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sign(company: Company, me: Identity, shown: Offer) -> bytes:
        return forge(company, shown) if me.name == "c1" else masking.sign_offer(company, me, shown)

    monkeypatch.setattr(secure_aggregation, "sign_offer", sign)
    table = Table(own(), {name: Toy() for name in NAMES})
    named_and_left_out(table.run())
    assert isinstance(table.outcomes["c1"], PeerAborted)


def named_and_left_out(outcome: Any) -> None:
    assert [one.clients for one in outcome.rounds] == [("c0", "c2", "c3")] * 4 and outcome.gone == ("c1",)
    assert outcome.rounds[0].missing["c1"].startswith("c1: ")
    np.testing.assert_allclose(outcome.weights, 4.0)


def test_a_survivor_whose_signature_is_late_is_told_that_its_numbers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others open the sum without it; it must neither take the next task for a fault nor forget the round."""
    plain = Channel.send

    def send(channel: Channel, message: Any, timeout: float | None = None) -> None:
        if isinstance(message, SurvivorSignature) and message.round == 2 and channel._our_id == PUBLIC["c1"].key_id:
            time.sleep(0.8)
        plain(channel, message, timeout)

    def slow(weights: np.ndarray) -> np.ndarray:
        time.sleep(0.2)
        return weights + 1

    monkeypatch.setattr(Channel, "send", send)
    parts = {name: Toy(acts=dict.fromkeys(range(1, 9), slow)) for name in NAMES}
    table = Table(own(rounds=8, clients=Clients(deadline=0.5)), parts)
    outcome = table.run()
    assert outcome.rounds[0].clients == NAMES and "c1" not in outcome.rounds[1].clients  # still late
    assert outcome.rounds[-1].clients == NAMES and outcome.gone == ()
    np.testing.assert_array_equal(table.outcomes["c1"].weights, outcome.weights)


def test_who_broke_the_protocol_in_an_attempt_that_failed_has_no_place_in_the_next(tmp_path: Path) -> None:
    """Not even over a new channel."""
    x, y = cancer()
    settings, parts = family("fedavg", rounds=4, clients=Clients(deadline=2.0)), dealt(x, y)

    class Broken(Table):
        def _count(self, sender: str, receiver: str, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
            number = self.sent[sender, receiver]
            header, payload = super()._count(sender, receiver, header, payload)
            broken = sender == "c1" and number == 9  # its masked input of the first round
            return header, payload[:-1] if broken else payload

    table = Broken(settings, parts, dies={"c2": 9}, again={"c1": -1, "c2": -1}, **stored(tmp_path))
    outcome = table.run()
    assert outcome.gone == ("c1",) and all("c1" not in one.clients for one in outcome.rounds)
    assert outcome.rounds[0].attempts == 2 and outcome.rounds[-1].clients == ("c0", "c2", "c3")


def test_a_claimed_weight_below_zero_moves_nothing_under_a_robust_rule() -> None:
    class Claims(Toy):
        def fit_local(self, *given: Any) -> Trained:
            return replace(super().fit_local(*given), rows=-1000)

    parts = {name: Claims() if name == "c3" else Toy() for name in NAMES}
    settings = own(rounds=2, robust="median", secure_aggregation="none")
    np.testing.assert_allclose(Table(settings, parts).run().weights, 2.0)


@pytest.mark.parametrize("strategy", ["fedavg", "feddyn", "scaffold"])
@pytest.mark.parametrize("robust", ["median", "trimmed_mean", "multi_krum"])
def test_no_claimed_weight_scales_a_robust_sum(robust: Any, strategy: str) -> None:
    """SCAFFOLD and FedDyn use sums besides means: a poisoner's rows would scale these."""
    settings = family(strategy, model="own", secure_aggregation="none", robust=robust, poisoned=1)
    job = Job(settings, Schema(model="own", size=3), 6)
    length = job.length("train", 0)
    honest = np.zeros(length)
    honest[: -TAIL - 1], honest[-TAIL - 1] = 20.0, 10.0
    parts = {f"c{place}": honest.copy() for place in range(5)}
    expected = combine(job, parts | {"c5": honest})
    assert expected[0] == pytest.approx(6 * 20.0)
    np.testing.assert_allclose(combine(job, parts | {"c5": honest * 1e9})[:-TAIL], expected[:-TAIL])
    tiny = honest.copy()
    tiny[-TAIL - 1] = 1e-308  # nobody's rows: an update that is beyond all numbers
    np.testing.assert_allclose(combine(job, parts | {"c5": tiny})[:-TAIL], expected[:-TAIL] * 5 / 6)


@pytest.mark.parametrize("robust", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_sign_flipping_clients_ruin_the_mean_and_not_the_robust_rules(robust: Any) -> None:
    x, y = cancer()
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]

    class Flipping(LinearModel):
        def fit_local(self, plan: Plan, correction: Correction, seed: Any) -> Trained:
            trained = super().fit_local(plan, correction, seed)
            return Trained(-10 * trained.weights, trained.rows, trained.steps, trained.length)

    def models(bad: int) -> dict[str, Any]:
        kinds = [Flipping] * bad + [LinearModel] * (10 - bad)
        split = np.array_split(np.arange(len(y)), 10)
        return {
            f"m{i}": kind(Objective("logistic", 30), x[r], y[r] * 1.0)
            for i, (kind, r) in enumerate(zip(kinds, split, strict=True))
        }

    def accuracy(bad: int, rule: Any) -> float:
        settings = family(
            "fedavg",
            model="own",
            rounds=5,
            secure_aggregation="none",
            robust=rule,
            poisoned=2,
            clients=Clients(deadline=20),
        )
        weights = train(models(bad), settings).weights
        return float(np.mean((x @ weights[:-1] + weights[-1] > 0) == y))

    honest = accuracy(0, "mean")
    assert accuracy(2, "mean") < honest - 0.3
    assert accuracy(2, robust) > honest - 0.03


@pytest.mark.parametrize("secure", ["on", "none"])
def test_the_norm_bound_holds_with_secure_aggregation_and_without(secure: Any) -> None:
    parts = {name: Toy(acts={0: lambda weights: weights + 1e6} if name == "c0" else {}) for name in NAMES}
    settings = own(rounds=1, robust="norm_bound", norm_bound=np.sqrt(3), secure_aggregation=secure)
    bounded = Table(settings, parts).run()
    np.testing.assert_allclose(bounded.weights, 1.0)


def test_what_a_client_contributes_is_the_others_loss_without_it_less_with_it() -> None:
    """One round against the same local training, averaged with and without each client in plain numpy."""
    x, y = cancer()
    order = np.random.default_rng(1).permutation(len(y))
    parts = dealt(x[order], np.arange(len(y)))
    parts = {name: Data(p.x, y[order][p.y] ^ (name == "c3"), p.names) for name, p in parts.items()}
    parts["c3"] = parts["c3"].rows(np.arange(30))
    rows = {name: len(p.y) for name, p in parts.items()}
    models = {
        name: LinearModel(Objective("logistic", 30, penalty=1 / sum(rows.values())), p.x, p.y.astype(float))
        for name, p in parts.items()
    }
    local = {
        n: m.fit_local(Plan(2, 16, 0.05), Correction(), (0, 0, k)).weights for k, (n, m) in enumerate(models.items())
    }

    def loss(weights: np.ndarray, judges: list[str]) -> float:
        values = []
        for name in judges:
            models[name].set(weights)
            values.append(models[name].evaluate().loss)
        return float(np.average(values, weights=[rows[name] for name in judges]))

    def mean(names: list[str]) -> np.ndarray:
        return np.average([local[name] for name in names], axis=0, weights=[rows[name] for name in names])

    outcome = train(parts, family("fedavg", rounds=1, secure_aggregation="none", leave_one_out=True))
    given = {name: one.contribution for name, one in outcome.clients.items()}
    for name in NAMES:
        others = [other for other in NAMES if other != name]
        assert given[name] == pytest.approx(loss(mean(others), others) - loss(mean(list(NAMES)), others), rel=1e-9)
    assert min(given, key=lambda name: given[name]) == "c3"  # whose labels are wrong


# ---- privacy


def private(**given: Any) -> Horizontal:
    told = {"level": "client", "epsilon": 5.0, "rows": 569} | given
    return Horizontal(
        strategy="fedsgd" if told["level"] == "record" else "fedavg",
        classes=(0, 1),
        rounds=3,
        epochs=1,
        batch=0,
        privacy=Privacy(**told),
        secure_aggregation="on" if told.get("noise", "distributed") == "distributed" else "none",
    )


@pytest.mark.parametrize("noise", ["central", "local", "distributed"])
@pytest.mark.parametrize("level", ["client", "record"])
def test_private_training_without_much_noise_is_clipped_training(noise: Any, level: Any) -> None:
    """At an epsilon of a million the noise is small against the tolerance, and clipping at 100 clips nothing."""
    x, y = cancer()
    outcome = train(dealt(x, y), private(noise=noise, level=level, epsilon=1e9, clip=100.0))
    if level == "record":
        expected = gradient_descent(x, y, 3, 0.1)
    else:
        expected = np.zeros(31)
        for _ in range(3):
            steps = []
            for part in dealt(x, y).values():
                chances = 1 / (1 + np.exp(-(part.x @ expected[:-1] + expected[-1])))
                slope = part.x.T @ (chances - part.y) / len(part.y) + expected[:-1] / 569
                steps.append(-0.1 * np.append(slope, np.mean(chances - part.y)))
            expected = expected + np.mean(steps, axis=0)
    np.testing.assert_allclose(outcome.weights, expected, atol=0.05)
    assert np.isnan(outcome.rounds[0].loss)
    assert outcome.clients["c0"].after.rows == 0


def test_noise_is_as_large_as_agreed() -> None:
    """With no rows at any client nothing but noise is left: sigma = clip * multiplier / clients asked."""
    from vfl.horizontal.accounting import noise_multiplier

    parts = {f"c{i}": Data(np.empty((0, 400)), np.empty(0, int), tuple(f"x{j}" for j in range(400))) for i in range(4)}
    settings = private(noise="central", rows=9)
    weights = train(parts, settings).weights
    sigma = noise_multiplier(5.0, 1e-5, 3 + 2) / 4 * np.sqrt(3)
    assert np.std(weights) == pytest.approx(sigma, rel=0.2)


@pytest.mark.parametrize("level", ["client", "record"])
@pytest.mark.parametrize("noise", ["central", "local", "distributed"])
def test_a_job_costs_the_agreed_epsilon_by_the_pld_accountant(noise: Any, level: Any) -> None:
    """Three rounds and two repeats. Of the noise that the sum has at least, as its definition says: per coordinate the
    variance of one contributor times their number, in steps of the grid, against the norm of what one may move."""
    settings = private(noise=noise, level=level, epsilon=2.0, clip=0.7)
    job = Job(settings, Schema(model="logistic", columns=("a", "b"), classes=(0, 1)), 7)
    one = job.mechanism
    sigma = np.sqrt(one.variance * one.contributors) / 2.0**one.fraction_bits
    accountant = PLDAccountant().compose(GaussianDpEvent(sigma / 0.7), 5)
    assert accountant.get_epsilon(1e-5) == pytest.approx(2.0, rel=0.01)
    zeros = np.zeros(3)
    drawn = np.array([job.noised(zeros) for _ in range(4000)])
    assert drawn.std() * np.sqrt(one.contributors) == pytest.approx(sigma, rel=0.03)


def drawn() -> Horizontal:
    clients = Clients(selection="poisson", fraction=0.25, deadline=5.0)
    return msgspec.structs.replace(private(noise="central", epsilon=1.0), clients=clients, rounds=8)


def test_clients_drawn_in_secret_cost_what_the_pld_accountant_says(tmp_path: Path) -> None:
    x, y = cancer()
    budget = PrivacyBudget(tmp_path / "hub", KEYS["hub"])
    table = Table(drawn(), dealt(x, y), hub={"budget": budget, "purpose": "risk"})
    outcome = table.run()
    assert len(outcome.rounds) == 8
    job = Job(drawn(), Schema(model="logistic", columns=tuple(f"x{j}" for j in range(30)), classes=(0, 1)), 4)
    event = PoissonSampledDpEvent(0.25, GaussianDpEvent(job.mechanism.multiplier))
    expected = PLDAccountant().compose(event, 8 + 2).get_epsilon(1e-5)
    assert budget.spent("risk").total(1e-5) == pytest.approx(expected, rel=0.01)
    assert 0.95 < expected <= 1.0
    sizes = np.array([np.bincount(job.choose(0, [], []), minlength=4) for _ in range(2000)])
    np.testing.assert_allclose(sizes.mean(axis=0), 0.25, atol=0.06)  # each by itself
    assert np.abs(np.corrcoef(sizes.T) - np.eye(4)).max() < 0.14
    whole = msgspec.structs.replace(drawn(), clients=QUICK)
    assert job.mechanism.multiplier < 0.5 * Job(whole, job.schema, 4).mechanism.multiplier
    with pytest.raises(Refused, match="the privacy budget for risk is used up"):
        raise table.run()


def test_a_client_hears_of_no_other_that_was_drawn() -> None:
    """It is asked when it is drawn itself; what it receives and keeps names nobody."""
    heard, plain = [], Channel.receive

    def receive(channel: Channel, *given: Any) -> Any:
        message = plain(channel, *given)
        if channel.peer == "hub":
            heard.append(message)
        return message

    table = Table(drawn(), dealt(*cancer()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "receive", receive)
        patch.setattr(Job, "choose", lambda job, number, *given: [number % 3, 3])
        outcome = table.run()
    assert {one.data.tobytes() for one in heard if isinstance(one, Turn)} == {msgspec.msgpack.encode(())}
    for name, ours in table.outcomes.items():
        assert {other for one in ours.rounds for other in (*one.clients, *one.missing)} <= {name}
        numbers = [one.number for one in outcome.rounds if name in one.clients]
        assert [one.number for one in ours.rounds] == numbers
    assert "each drawn with chance 0.25 a round" in dict(protection(drawn()))["Differential privacy"]


def test_who_is_not_drawn_waits_as_long_as_the_rounds_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the number asked, rounded up, is that of all."""
    waits, plain = [], _End.next_task

    def next_task(end: _End, patience: float | None) -> Task:
        waits.append(patience)
        return plain(end, patience)

    monkeypatch.setattr(_End, "next_task", next_task)
    clients = msgspec.structs.replace(drawn().clients, fraction=0.9)
    Table(msgspec.structs.replace(drawn(), clients=clients), dealt(*cancer())).run()
    assert set(waits) == {clients.longest * 9}


def test_a_round_for_which_nobody_is_drawn_has_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "choose", lambda *given: [])
    x, y = cancer()
    played, simulated = Table(drawn(), dealt(x, y)).run(), simulate(drawn(), list(dealt(x, y).values()))
    for outcome in (played, simulated):
        assert [one.clients for one in outcome.rounds] == [()] * 8
        assert 0 < np.abs(outcome.weights).max() < np.inf


def test_one_drawn_client_that_is_gone_does_not_end_the_job_and_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The epsilon of all rounds is spent by then, and nothing is resumed."""
    asked = [0]
    monkeypatch.setattr(Job, "choose", lambda job, number, *given: asked)
    settings = msgspec.structs.replace(drawn(), clients=msgspec.structs.replace(drawn().clients, deadline=1.0))
    dies = 3  # the number of a client's Ready in round 1: after its table, a Ready and an Update
    outcome = Table(settings, dealt(*cancer()), dies={"c0": dies}).run()
    assert [one.clients for one in outcome.rounds] == [("c0",), *[()] * 7]
    assert "c0" in outcome.rounds[-1].missing and np.isfinite(outcome.weights).all()
    asked = [0, 1, 2, 3]
    assert isinstance(Table(settings, dealt(*cancer()), dies=dict.fromkeys(NAMES, dies)).run(), PeerLost)


def test_the_budget_is_charged_before_every_release_and_stops_the_run(tmp_path: Path) -> None:
    x, y = cancer()
    settings = private(noise="local")
    books = {name: PrivacyBudget(tmp_path / name, KEYS[name]) for name in NAMES}
    table = Table(settings, dealt(x, y), client=lambda name: {"budget": books[name], "purpose": "risk"})
    table.run()
    spent = books["c0"].spent("risk").total(1e-5)
    assert 0 < spent <= 5.0
    with pytest.raises(PeerLost, match="its privacy budget is used up"):
        raise table.run()
    assert books["c0"].spent("risk").total(1e-5) <= 5.0 * (1 + 1e-9)


# ---- own models


def test_clients_written_for_flower_run_unchanged() -> None:
    class Client:
        def __init__(self, target: float) -> None:
            self.target = target

        def get_parameters(self, config: Any) -> list[np.ndarray]:
            return [np.zeros((2, 2), np.float32), np.zeros(1)]

        def fit(self, parameters: list[np.ndarray], config: Any) -> tuple[list[np.ndarray], int, dict[str, Any]]:
            return [part + (self.target - part) / 2 for part in parameters], 5, {}

        def evaluate(self, parameters: list[np.ndarray], config: Any) -> tuple[float, int, dict[str, Any]]:
            return float(abs(parameters[1][0] - self.target)), 5, {"accuracy": 0.5}

    models = {f"c{i}": FlowerClient(Client(float(i))) for i in range(4)}
    outcome = train(models, Horizontal(model="own", strategy="fedavg", rounds=30))
    np.testing.assert_allclose(outcome.weights, 1.5, atol=1e-6)
    assert outcome.clients["c0"].after.loss == pytest.approx(1.5)
    np.testing.assert_allclose(models["c2"].get(), outcome.weights)


def test_a_personal_head_stays_with_its_client() -> None:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)

        def forward(self, x: Any) -> Any:
            return self.head(torch.tanh(self.body(x)))[:, 0]

    torch.manual_seed(0)
    x = torch.randn(40, 2)
    models = {f"c{i}": TorchModel(Net(), torch.nn.functional.mse_loss, x, x[:, 0] * (i - 1)) for i in range(4)}
    start = next(iter(models.values())).get()[:9]
    settings = Horizontal(model="own", strategy="fedavg", rounds=15, epochs=5, personal="head.")
    outcome = train(models, settings, start=start)
    assert len(outcome.weights) == 9
    vectors = np.array([model.get() for model in models.values()])
    np.testing.assert_allclose(vectors[:, :9], np.tile(outcome.weights, (4, 1)), rtol=1e-6)
    assert np.ptp(vectors[:, 9:], axis=0).min() > 0
    assert all(one.after.loss < one.before.loss for name, one in outcome.clients.items() if name in ("c0", "c3"))


def test_fine_tuning_is_for_the_client_alone() -> None:
    x, y = cancer()
    table = Table(family("fedavg", fine_tune=3), dealt(x, y))
    outcome = table.run()
    tuned = [one.model.coef_ for one in table.outcomes.values()]
    assert all(np.abs(coef - outcome.model.coef_).max() > 1e-3 for coef in tuned)


def test_federated_dropout_sends_fewer_columns() -> None:
    x, y = cancer()
    outcome = train(dealt(x, y), family("fedavg", keep=0.5, rounds=8))
    whole = train(dealt(x, y), family("fedavg", rounds=8))
    assert outcome.rounds[0].bytes < 0.7 * whole.rounds[0].bytes
    assert outcome.rounds[-1].loss < 0.5 * outcome.rounds[0].loss


# ---- a coordinator that cheats


def cheat(script: Callable[[Channel], None], settings: Horizontal, clients: int = 4, **given: Any) -> Any:
    """What a client ends with against a coordinator that follows a script of its own. given: options of the client."""
    table = Table(settings, {name: Toy() for name in NAMES}, client=lambda name: given)
    mesh = links(["hub", "c0"])
    hub = table._channel(mesh, "hub", "c0")
    thread = threading.Thread(target=table._client, args=(mesh, "c0"), daemon=True)
    thread.start()
    schema = msgspec.json.decode(hub.receive(TableMessage).data.tobytes(), type=Schema)
    hub.send(Admission(np.frombuffer(msgspec.json.encode(Admitted(schema, clients, 0)), np.uint8)))
    script(hub)
    thread.join()
    return table.outcomes["c0"]


def turn(number: int, names: list[str], attempt: int = 0) -> Turn:
    return Turn.of(number, attempt, "add", 2.0**24, tuple(names))


def task(number: int, round_number: int, stage: str = "train") -> Task:
    return Task(number, round_number, stage, 4, 40, np.zeros(0 if stage in ("rows", "means") else 3))


def test_a_round_is_never_trained_twice_in_a_session() -> None:
    def repeats(hub: Channel) -> None:
        hub.send(task(0, 0))
        hub.receive(Ready)
        hub.send(Turn.of(0, 0, "left out"))
        hub.send(task(1, 0))

    error = cheat(repeats, own())
    assert isinstance(error, ProtocolViolation)
    assert "a task that it has given before" in str(error)


@pytest.mark.parametrize("names", [["c0", "c1"], ["c0", "c1", "stranger"], ["c1", "c2", "c3"], ["c0", "c1", "c2"]])
def test_a_client_adds_to_no_sum_with_too_few_strangers_or_without_it(names: list[str]) -> None:
    """Three of the four would do, but for the quorum of four that was agreed."""

    def invites(hub: Channel) -> None:
        hub.send(task(0, 0))
        hub.receive(Ready)
        hub.send(turn(0, names, attempt=1))  # of the first, keys come along: that would be refused without any

    error = cheat(invites, own(clients=Clients(quorum=4)))
    assert isinstance(error, (ProtocolViolation, Refused))


def test_attempts_are_no_more_than_agreed() -> None:
    def insists(hub: Channel) -> None:
        hub.send(task(0, 0))
        hub.receive(Ready)
        hub.send(turn(0, list(NAMES), attempt=3))

    assert "one attempt too many" in str(cheat(insists, own()))


def let_go(hub: Channel, number: int) -> None:
    hub.send(Turn.of(number, 0, "left out"))


def test_a_coordinator_that_calls_numbers_kept_that_no_sum_has_is_refused() -> None:
    def insists(hub: Channel) -> None:
        hub.send(task(0, 0))
        hub.receive(Ready)
        hub.send(Turn.of(0, 0, "kept"))

    assert "says that it has our numbers" in str(cheat(insists, own()))


def openly(**given: Any) -> Horizontal:
    return own(secure_aggregation="none", **given)


@pytest.mark.parametrize(("leave_one_out", "agreed"), [(False, 2), (True, 6)])
def test_scores_are_no_more_than_agreed(leave_one_out: bool, agreed: int) -> None:
    """Differences of the loss at weights of the coordinator's choice would give the gradient."""

    def asks(hub: Channel) -> None:
        for number in range(agreed):
            hub.send(task(number, 0, "score"))
            hub.receive(Scores)
        hub.send(task(agreed, 0, "score"))

    error = cheat(asks, openly(leave_one_out=leave_one_out))
    assert isinstance(error, ProtocolViolation)
    assert f"stage score, of which {agreed} are agreed" in str(error)


@pytest.mark.parametrize("stage", ["score", "rows", "means", "scales"])
def test_under_privacy_nothing_is_told_without_noise(stage: str) -> None:
    settings = own(privacy=Privacy(level="client", noise="distributed"))
    error = cheat(lambda hub: hub.send(task(0, 0, stage)), settings)
    assert isinstance(error, ProtocolViolation)
    assert f"stage {stage}, of which 0 are agreed" in str(error)


def test_sums_before_training_come_once_and_rounds_are_no_more_than_agreed() -> None:
    def again(hub: Channel) -> None:
        hub.send(task(0, 0, "rows"))
        hub.receive(Ready)
        let_go(hub, 0)
        hub.send(task(1, 0, "rows"))

    assert "stage rows, of which 1 are agreed" in str(cheat(again, own()))
    assert "stage rows in round 1" in str(cheat(lambda hub: hub.send(task(0, 1, "rows")), own()))
    assert "stage train in round 2" in str(cheat(lambda hub: hub.send(task(0, 2)), own(rounds=2)))
    assert "stage means, of which 0" in str(cheat(lambda hub: hub.send(task(0, 0, "means")), own()))


def test_a_task_of_another_length_is_refused() -> None:
    short = Task(0, 0, "train", 4, 40, np.zeros(2))
    error = cheat(lambda hub: hub.send(short), own())
    assert isinstance(error, ProtocolViolation)
    assert "2 numbers where 3 are due" in str(error)


def invite(hub: Channel, names: Sequence[str], attempt: int = 0, bound: float = 2.0**24) -> None:
    hub.send(Turn.of(0, attempt, "add", bound, tuple(names)))


def begin(hub: Channel) -> Ready:
    hub.send(task(0, 0))
    return hub.receive(Ready)


@pytest.mark.parametrize("babble", [b"\xc1", b"\x91\xa1\xff", msgspec.msgpack.encode(["c1"] * (1 << 16 | 1))])
def test_names_that_do_not_parse_are_a_violation(babble: bytes) -> None:
    def babbles(hub: Channel) -> None:
        begin(hub)
        hub.send(Turn(0, 0, np.frombuffer(babble, np.uint8), "add", 2.0**24))

    error = cheat(babbles, own())
    assert isinstance(error, ProtocolViolation) and "do not parse" in str(error)


def test_a_coordinator_that_admits_to_fewer_clients_makes_no_smaller_sum() -> None:
    """Four signed the session; with three of them said to be all, two would have been a majority."""

    def lies(hub: Channel) -> None:
        begin(hub)
        invite(hub, NAMES[:2])

    assert isinstance(cheat(lies, own(), clients=3), Refused)
    error = cheat(lambda hub: None, own(), clients=5)
    assert isinstance(error, ProtocolViolation) and "more clients than have signed" in str(error)


@pytest.mark.parametrize(("roll", "admitted", "least"), [(8, 3, 5), (8, 8, 5), (3, 3, 3), (4, 4, 3)])
def test_how_many_a_sum_has_follows_from_who_signed_the_session(roll: int, admitted: int, least: int) -> None:
    job = Job(Horizontal(), Schema(model="logistic", columns=("a",), classes=(0, 1)), admitted)
    names = tuple(f"c{i}" for i in range(roll))
    made = job.company(bytes(32), task(0, 0), 0, names, roll, False)
    assert made.threshold == least
    with_its_own = job.company(bytes(32), task(0, 0), 0, names, roll, True)
    assert 2 * with_its_own.threshold > roll + 1  # against a coordinator that colludes with one of them: itself


def test_a_coordinator_among_the_clients_needs_a_larger_quorum() -> None:
    with pytest.raises(ValueError, match="a quorum of 3 of 5 clients; secure aggregation needs 4"):
        Horizontal(clients=Clients(quorum=3)).check(5, own=True)
    Horizontal(clients=Clients(quorum=3)).check(5)


def test_with_three_clients_a_dropout_opens_no_sum_of_two() -> None:
    table = Table(own(rounds=1, clients=Clients(deadline=0.5)), {n: Toy() for n in NAMES[:3]}, dies={"c2": 9})
    error = table.run()
    assert isinstance(error, PeerLost) and "3 are needed" in str(error)
    assert not [kind for kind in table.kinds["c0", "hub"] if kind == "Unmasking"][1:]  # but for the sum of rows


@pytest.mark.parametrize("attempts", [(0, 0), (1, 0), (1, 1)])
def test_attempts_increase(attempts: tuple[int, int]) -> None:
    """The same attempt with other clients or another bound would be another sum; the difference is an update."""

    def repeats(hub: Channel) -> None:
        begin(hub)
        invite(hub, NAMES, attempts[0])
        hub.receive(KeyOffer)
        hub.send(KeyList(0, attempts[0], np.empty((0, 160), np.uint8)))  # left out: nothing was opened
        invite(hub, NAMES[:3], attempts[1])

    error = cheat(repeats, own())
    assert isinstance(error, ProtocolViolation) and "a turn that it has given before" in str(error)


def test_no_second_sum_of_a_round_is_opened() -> None:
    """A coordinator that calls a sum failed and tries again without one client, to see the difference."""
    plain = Star._add_masked

    def greedy(star: Star, until: float) -> Any:
        first = plain(star, until)
        if star.task.stage == "train":
            for name in NAMES[:3]:
                star._say(name, Turn.of(star.task.number, 1, "add", 2.0**24, NAMES[:3]))
            for name in NAMES[:3]:
                with pytest.raises(PeerAborted):
                    star.channels[name].receive(KeyOffer, 5.0)
        return first

    table = Table(own(rounds=1), {name: Toy() for name in NAMES})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Star, "_add_masked", greedy)
        table.run()
    for name in NAMES[:3]:
        assert "sent Turn where Task is due" in str(table.outcomes[name])


def test_a_killed_client_helps_to_open_no_second_sum_though_it_is_asked_to(tmp_path: Path) -> None:
    """It says that it has signed; its share of the others' masks would open their sum over other survivors."""
    settings = own(clients=Clients(quorum=4, deadline=0.5))
    dies = {"c0": 8 + KILLED["SurvivorSignature"]}
    Table(settings, {name: Toy() for name in NAMES}, dies=dies, **stored(tmp_path)).run()

    def insists(hub: Channel) -> None:
        hub.send(task(2, 0))  # after rows and a score
        assert hub.receive(Ready).data[0] == SIGNED
        hub.send(turn(2, list(NAMES), attempt=1))
        hub.abort("error")

    error = cheat(insists, settings, folder=tmp_path / "c0")
    assert isinstance(error, ProtocolViolation) and "our numbers are out of the sum" in str(error)


@pytest.mark.parametrize("what", ["add", "kept"])
def test_a_client_without_budget_adds_to_no_sum_though_it_is_asked_to(what: str) -> None:
    class Spent:
        def charge(self, *given: Any, **limits: Any) -> None:
            raise Refused("used up")

    settings = openly(privacy=Privacy(level="client", noise="local"))
    bound = Job(settings, describe(settings, None, Toy()), 4).noise_bound

    def insists(hub: Channel) -> None:
        hub.send(task(0, 0))
        assert hub.receive(Ready).data[0] == OVER_BUDGET
        hub.send(Turn.of(0, 0, what, bound, NAMES))
        hub.abort("error")

    error = cheat(insists, settings, budget=Spent())
    assert isinstance(error, ProtocolViolation) and f"asked us to {what!r} where our numbers are out" in str(error)


def test_a_sum_spoilt_after_it_may_be_open_ends_the_run_instead_of_a_second_one(monkeypatch: Any) -> None:
    def spoilt(*given: Any) -> Any:
        raise PeerLost("too few shares")

    monkeypatch.setattr(secure_aggregation, "open_sum", spoilt)
    error = Table(own(), {name: Toy() for name in NAMES}).run()
    assert isinstance(error, PeerLost) and "opens no second one of the round" in str(error)


@pytest.mark.parametrize("again", [True, False])
def test_clients_that_were_given_other_weights_have_no_sum(again: bool) -> None:
    """Pasquini, Francati and Ateniese (CCS 2022): one client's part shows when the others were asked something else."""
    plain = Star._tell

    def unequal(star: Star, names: Any, message: Task) -> list[str]:
        if message.stage != "train":
            return plain(star, names, message)
        if not again:
            star.begun, message = None, replace(message, again=False)
        assert message.again == again
        plain(star, ["c2"], replace(message, data=message.data + 1.0))
        return [*plain(star, [name for name in names if name != "c2"], message), "c2"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Star, "_tell", unequal)
        table = Table(own(rounds=1), {name: Toy() for name in NAMES})
        outcome = table.run()
    if again:  # nobody can open what it sealed, and nobody signs what it signs
        assert isinstance(outcome, PeerLost) and "round 0: c2: 0 shares where 3 are needed" in str(outcome)
        return
    assert "c2" not in outcome.rounds[0].clients
    assert "not signed by it" in outcome.rounds[0].missing["c2"]


@pytest.mark.parametrize("bound", [2.0**25, 1.0, 2.0**41])
def test_the_bound_is_one_of_those_agreed(bound: float) -> None:
    def chooses(hub: Channel) -> None:
        begin(hub)
        invite(hub, NAMES, bound=bound)

    assert "a bound that was not agreed" in str(cheat(chooses, own()))


def test_who_is_gone_before_its_table_is_left_out() -> None:
    outcome = Table(own(clients=Clients(deadline=1.0)), {name: Toy() for name in NAMES}, dies={"c3": 0}).run()
    assert outcome.rounds[-1].clients == NAMES[:3] and outcome.gone == ("c3",)
    table = Table(own(clients=Clients(deadline=1.0)), {name: Toy() for name in NAMES}, dies={"c3": 0, "c1": 0})
    with pytest.raises(PeerLost, match=r"2 clients showed their tables, 3 are needed; missing: c1: .*; c3: "):
        raise table.run()


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_restart_keeps_the_memory_of_clients_that_were_not_asked_last(after: int, tmp_path: Path) -> None:
    x, y = cancer()
    settings = family("scaffold", rounds=6, secure_aggregation="none", clients=Clients(fraction=0.5))
    for who in ("hub", *NAMES):
        (tmp_path / who).mkdir()

    def killed(phase: str, done: int, total: int) -> None:
        if done == after:
            raise InterruptedError

    stores = {"client": lambda who: {"folder": tmp_path / who}}
    hub = {"folder": tmp_path / "hub"}
    first = Table(settings, dealt(x, y), hub={**hub, "progress": killed}, **stores).run()
    assert isinstance(first, InterruptedError)
    again = Table(settings, dealt(x, y), hub=hub, session=bytes(32), **stores).run()
    np.testing.assert_array_equal(again.weights, Table(settings, dealt(x, y)).run().weights)


def test_each_clients_share_of_the_noise_hides_the_sum_from_every_other_client() -> None:
    made = Job(private(), Schema(model="logistic", columns=("a",), classes=(0, 1)), 9).mechanism
    assert made.contributors == 4  # five of nine are in the sum, and one of them looks
