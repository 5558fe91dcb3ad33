"""A simulation is the real job without its channels: the same rounds, the same numbers, for any number of clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, SGDClassifier

from parties.errors import LocalError, PeerLost, Refused
from parties.horizontal import Clients, Horizontal, Privacy
from parties.workers import Workers
from vfl.horizontal.federated import train
from vfl.horizontal.models import Estimator
from vfl.horizontal.simulate import deal, simulate
from vfl.horizontal.trainer import Data


def digits() -> Data:
    images = load_digits()
    return Data(images.data / 16, images.target, tuple(images.feature_names), tuple(range(10)))


def open_family(name: str = "fedavg", **given: Any) -> Horizontal:
    return Horizontal(strategy=name, secure_aggregation="none", **{"rounds": 3, "rate": 0.5, **given})


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.3", "labels:2", "quantity:0.5"])
def test_every_row_goes_to_one_client(partition: str) -> None:
    whole = digits()
    parts = deal(whole, partition, 20, 0)
    assert sum(len(part.y) for part in parts) == len(whole.y)
    np.testing.assert_array_equal(np.sort(np.concatenate([part.y for part in parts])), np.sort(whole.y))
    assert all(part.classes == tuple(range(10)) for part in parts)


@pytest.mark.parametrize(
    "settings",
    [
        open_family(),
        open_family("scaffold", clients=Clients(fraction=0.5)),
        open_family(compression="4bit"),
        open_family(robust="trimmed_mean", poisoned=1),
        open_family("exact", rounds=4, standardise=True),
        open_family("fedprox", test_fraction=0.2, keep=0.5),
    ],
)
def test_a_simulation_is_the_roles_to_the_last_bit(settings: Horizontal) -> None:
    parts = deal(digits(), "dirichlet:0.3", 6, 0)
    simulated = simulate(settings, parts)
    played = train({f"client-{i}": part for i, part in enumerate(parts)}, settings)
    np.testing.assert_array_equal(simulated.weights, played.weights)
    assert [(r.loss, r.accuracy, r.clients, r.bytes) for r in simulated.rounds] == [
        (r.loss, r.accuracy, r.clients, r.bytes) for r in played.rounds
    ]
    assert str(simulated.clients) == str(played.clients)


def test_many_clients_learn_alike_on_one_core_and_on_all() -> None:
    parts = deal(digits(), "dirichlet:0.3", 200, 0)
    settings = open_family("scaffold", rounds=3)
    alone = simulate(settings, parts)
    workers = Workers(2)
    try:
        spread = simulate(settings, parts, workers=workers)
    finally:
        workers.close()
    np.testing.assert_array_equal(alone.weights, spread.weights)
    assert alone.rounds[-1].loss < 0.95 * alone.rounds[0].loss
    assert alone.rounds[-1].accuracy > 0.7


def test_with_secure_aggregation_the_roles_themselves_run_on_a_sparse_graph() -> None:
    parts = deal(digits(), "iid", 24, 0)
    given = {"strategy": "fedavg", "rounds": 1, "rate": 0.5, "clients": Clients(quorum=20)}
    secure = simulate(Horizontal(**given, degree=10), parts)
    plain = simulate(Horizontal(**given, secure_aggregation="none"), parts)
    np.testing.assert_allclose(secure.weights, plain.weights, atol=1e-9)


def test_feddyn_and_scaffold_beat_averaging_under_label_skew() -> None:
    parts = deal(digits(), "labels:2", 10, 0)
    losses = {
        name: simulate(open_family(name, rounds=15, epochs=3), parts).rounds[-1].loss
        for name in ("fedavg", "feddyn", "scaffold")
    }
    assert losses["feddyn"] < losses["fedavg"]
    assert losses["scaffold"] < losses["fedavg"]


@pytest.mark.parametrize("estimator", [LogisticRegression(max_iter=5), SGDClassifier(loss="log_loss")])
def test_estimators_of_scikit_learn_take_part_as_they_are(estimator: Any) -> None:
    models = [Estimator(estimator, p.x, p.y, range(10)) for p in deal(digits(), "dirichlet:0.5", 5, 0)]
    outcome = simulate(Horizontal(model="own", strategy="fedavg", rounds=5, secure_aggregation="none"), models)
    whole = digits()
    assert models[0].estimator.score(whole.x, whole.y) > 0.85
    assert outcome.model is None
    assert [one.accuracy for one in outcome.rounds][-1] > outcome.rounds[0].accuracy


def test_what_goes_wrong_is_told_as_in_a_job() -> None:
    parts = deal(digits(), "iid", 4, 0)
    with pytest.raises(Refused, match="a quorum of 9 where 4"):
        simulate(open_family(clients=Clients(quorum=9)), parts)
    odd = [*parts[:3], Data(parts[3].x[:, :5], parts[3].y, parts[3].names[:5])]
    with pytest.raises(Refused, match="client-3 has no column 'pixel_0_5'"):
        simulate(open_family(), odd)
    with pytest.raises(LocalError, match="training diverges"):
        simulate(Horizontal(model="linear", strategy="fedavg", rate=1e80, secure_aggregation="none"), parts)

    class Fails(Estimator):
        def fit_local(self, *given: Any) -> Any:
            raise LocalError("no")

    models = [Fails(SGDClassifier(), p.x, p.y, range(10)) for p in parts]
    with pytest.raises(PeerLost, match="round 0: 0 clients are left, 3 are needed; missing: client-0: it could not"):
        simulate(Horizontal(model="own", strategy="fedavg", secure_aggregation="none"), models)


def test_a_simulation_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    parts = deal(digits(), "iid", 4, 0)

    def stop(phase: str, done: int, total: int) -> None:
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        simulate(open_family("fedadam", rounds=4), parts, progress=stop, folder=tmp_path)
    again = simulate(open_family("fedadam", rounds=4), parts, folder=tmp_path)
    np.testing.assert_array_equal(again.weights, simulate(open_family("fedadam", rounds=4), parts).weights)
    with pytest.raises(LocalError, match="needs its clients', too"):
        simulate(open_family("scaffold"), parts, folder=tmp_path)


@pytest.mark.parametrize("noise", ["central", "local"])
def test_private_simulations_are_noisy_and_tell_no_scores(noise: Any) -> None:
    settings = open_family(classes=tuple(range(10)), privacy=Privacy(level="client", noise=noise, rows=1797))
    parts = deal(digits(), "iid", 4, 0)
    one, two = simulate(settings, parts), simulate(settings, parts)
    assert np.abs(one.weights - two.weights).max() > 1e-3
    assert np.isnan(one.rounds[0].loss)
    assert one.worst == ""
