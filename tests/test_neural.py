"""Networks over several parties' columns: the ones that PyTorch trains on the joined table, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LinearRegression
from sklearn.neural_network import MLPClassifier

from parties.agreement import Agreement
from parties.errors import LocalError, PeerAborted, ProtocolViolation, Refused
from parties.memory import outcomes
from parties.message import CLASSES, name_of, parse_header
from parties.session import Session
from tests.conftest import NAMES, Stream, agree, parties
from tests.training import altering, with_fields
from vfl import sgd
from vfl.bottoms import Linear, initial
from vfl.encryption.paillier import generate
from vfl.messages import Plan
from vfl.neural import VerticalMLPClassifier, VerticalMLPRegressor
from vfl.neural_estimator import VerticalMLP
from vfl.neural_plan import Clauses
from vfl.open_messages import OpenGradient, SeparateEmbedding
from vfl.optimisers import Adam, Rule, Sgd, load_torch
from vfl.search_messages import EpochEnd

torch = pytest.importorskip("torch", reason="networks need the extra 'torch'")
torch.set_num_threads(1)  # small matrices, and a thread for each party

LATTICE = {"scheme": "lattice", "key_bits": 2048, "numbers_per_key": 4096}
CONSENT = Clauses(open_gradients=True, separate_embeddings=True)
WIDTHS = (2, 3, 4)
STEPS = {
    "sgd": {"optimiser": "sgd", "learning_rate": 0.1, "momentum": 0.9, "alpha": 0.01},
    "adam": {"optimiser": "adam", "learning_rate": 0.01, "alpha": 0.01},
}
Parts = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agreement that consents to rows in clear also between three."""
    monkeypatch.setattr("parties.memory.allowed_classes", lambda agreement: frozenset(CLASSES))


def agreement(count: int, model: Mapping[str, Any] | None = None, encryption: Mapping[str, Any] = LATTICE) -> Agreement:
    consents = {"allow_reconstruction": True, "residual_range": 4.0} | dict(model or {})
    return agree(count, model=consents, encryption=dict(encryption))


def table(count: int, rows: int = 120, widths: tuple[int, ...] = WIDTHS) -> tuple[Parts, np.ndarray]:
    """Columns split over the first parties, and 0/1 labels that products of columns of all of them decide."""
    generator = np.random.default_rng(count)
    parts = {name: generator.normal(size=(rows, width)) for name, width in zip(NAMES[:count], widths, strict=False)}
    score = sum(part @ generator.normal(size=part.shape[1]) for part in parts.values() if part.size)
    last = parts[NAMES[count - 1]]
    return parts, (score + last[:, 0] * last[:, 1] > 0).astype(int)


def train(
    parts: Mapping[str, Any],
    y: Any,
    params: Mapping[str, Any],
    *,
    kind: type[VerticalMLP] = VerticalMLPClassifier,
    clauses: Clauses = CONSENT,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    then: Callable[[VerticalMLP, Session], Any] | None = None,
    agreed: Agreement | None = None,
    secret: Any = None,
    fit: Callable[[str], Mapping[str, Any]] = lambda name: {},
    **options: Any,
) -> dict[str, Any]:
    """What each party ended with: its model (or `then(model, session)`), or its exception. `fit`: what else a party
    gives to `fit`."""

    def role(name: str) -> Callable[[Session], Any]:
        def run(session: Session) -> Any:
            model = kind(**{**params, **(own or {}).get(name, {})})
            labels = y if session.is_label_holder else None
            key = secret if session.is_label_holder else None
            given = {"session": session, "clauses": clauses, "secret": key, "randomness": Stream(name), **fit(name)}
            model.fit(parts[name], labels, **given)
            return model if then is None else then(model, session)

        return run

    count = len(parts)
    return outcomes({name: role(name) for name in parts}, agreed or agreement(count), parties(count), **options)


class Joined(torch.nn.Module):
    """One network over all columns: the parties' first weights stacked, or side by side, below the top."""

    def __init__(self, firsts: list[np.ndarray], top: Any, separate: bool = False) -> None:
        super().__init__()
        self.blocks = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(first)) for first in firsts])
        width = sum(first.shape[1] for first in firsts) if separate else firsts[0].shape[1]
        self.bias = torch.nn.Parameter(torch.zeros(width, dtype=torch.float64))
        self.top, self.separate = top, separate

    def forward(self, parts: list[Any]) -> Any:
        embedded = [part @ block for part, block in zip(parts, self.blocks, strict=True)]
        merged = torch.cat(embedded, dim=1) if self.separate else torch.stack(embedded).sum(dim=0)
        return self.top(merged + self.bias)


def centralised(
    network: Any, parts: Parts, y: np.ndarray, loss: Any, params: Mapping[str, Any], weights: Any = None
) -> None:
    """PyTorch's own training of the joined network, in double precision; with weights, `loss` is one a row."""
    rate, decay = params["learning_rate"], params["alpha"]
    if params["optimiser"] == "adam":
        optimiser: Any = torch.optim.Adam(network.parameters(), lr=rate, weight_decay=decay)
    else:
        optimiser = torch.optim.SGD(network.parameters(), lr=rate, momentum=params["momentum"], weight_decay=decay)
    for rows in sgd.batches(len(y), params["batch_size"], params["epochs"], 0):
        optimiser.zero_grad()
        value = loss(network([torch.tensor(part[rows]) for part in parts.values()]), torch.tensor(y[rows]))
        (value if weights is None else (value * torch.tensor(weights[rows])).mean()).backward()
        optimiser.step()


def top_of(*sizes: int) -> Any:
    torch.manual_seed(5)
    layers = [layer for pair in pairwise(sizes) for layer in (torch.nn.Tanh(), torch.nn.Linear(*pair))]
    return torch.nn.Sequential(*layers).double()


def assert_same(ended: Mapping[str, Any], network: Joined) -> None:
    """Every weight within 1e-4."""
    bank = ended["bank"]
    for model, block in zip(ended.values(), network.blocks, strict=True):
        assert np.abs(model.tensors_["weights"] - block.detach().numpy()).max(initial=0) < 1e-4
    assert np.abs(bank.tensors_["bias"] - network.bias.detach().numpy()).max() < 1e-4
    for name, value in network.top.state_dict().items():
        assert np.abs(bank.tensors_[f"top.{name}"] - value.numpy()).max() < 1e-4


# The same network


@pytest.mark.parametrize("merge", ["sum", "concatenation"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_after_five_epochs_it_is_the_network_that_pytorch_trains_on_the_joined_table(optimiser, count, merge):
    parts, y = table(count)
    separate, width = merge == "concatenation", 4
    params = {"hidden_layer_sizes": (width,), "batch_size": 40, "epochs": 5, "merge": merge} | STEPS[optimiser]
    top = top_of(width * count if separate else width, 3, 2)
    ended = train(parts, y, params, own={"bank": {"top": top}})
    assert all(isinstance(model, VerticalMLP) for model in ended.values()), ended
    firsts = [initial((part.shape[1], width), part.shape[1], Stream(name)) for name, part in parts.items()]
    network = Joined(firsts, top, separate)
    centralised(network, parts, y, torch.nn.functional.cross_entropy, params)
    assert_same(ended, network)
    assert np.abs(ended["grocer"].tensors_["weights"] - firsts[1]).max() > 1e-2


def test_a_regressor_for_a_label_holder_without_columns_is_that_network_too():
    parts, _ = table(3)
    y = np.tanh(parts["grocer"][:, 0] + parts["mill"][:, 1])
    params = {"hidden_layer_sizes": (4,), "batch_size": 40, "epochs": 5} | STEPS["adam"]
    top = top_of(4, 1)

    def then(model: Any, session: Session) -> Any:
        none = np.empty((len(y), 0))
        return model, model.score(none if session.is_label_holder else parts[session.name], y, session=session)

    ended = train(parts | {"bank": None}, y, params, kind=VerticalMLPRegressor, own={"bank": {"top": top}}, then=then)
    own = parts | {"bank": np.empty((len(y), 0))}
    network = Joined([initial((x.shape[1], 4), x.shape[1], Stream(name)) for name, x in own.items()], top)
    centralised(network, own, y, lambda out, wanted: (out[:, 0] - wanted).square().mean() / 2, params)
    assert_same({name: model for name, (model, _) in ended.items()}, network)
    with torch.no_grad():
        predicted = network([torch.tensor(x) for x in own.values()])[:, 0].numpy()
    expected = 1 - np.square(y - predicted).sum() / np.square(y - y.mean()).sum()
    assert ended["bank"][1] == pytest.approx(expected, abs=1e-4)
    assert [score for _, score in ended.values()][1:] == [None, None]


@pytest.mark.parametrize("kind", [VerticalMLPClassifier, VerticalMLPRegressor])
def test_with_row_weights_it_is_the_network_that_pytorch_trains_with_the_weighted_loss(kind):
    parts, y = table(3)
    weights = np.random.default_rng(2).uniform(0, 3, len(y))
    params = {"hidden_layer_sizes": (4,), "batch_size": 40, "epochs": 5} | STEPS["adam"]
    outputs, loss = 2, torch.nn.CrossEntropyLoss(reduction="none")
    if kind is VerticalMLPRegressor:
        y, outputs, loss = np.tanh(parts["bank"][:, 0]), 1, lambda out, wanted: (out[:, 0] - wanted).square() / 2
    top = top_of(4, outputs)
    given = {"own": {"bank": {"top": top}}, "kind": kind, "agreed": agreement(3, {"residual_range": 16.0})}
    ended = train(parts, y, params, fit=lambda name: {"sample_weight": weights} if name == "bank" else {}, **given)
    network = Joined([initial((x.shape[1], 4), x.shape[1], Stream(name)) for name, x in parts.items()], top)
    centralised(network, parts, y, loss, params, weights)
    assert_same(ended, network)
    plain = train(parts, y, params, **given)["bank"].tensors_["weights"]
    assert np.abs(plain - ended["bank"].tensors_["weights"]).max() > 1e-3
    bad = train(parts, y, params, fit=lambda name: {"sample_weight": -weights}, **given)["bank"]
    assert isinstance(bad, LocalError) and "none negative" in str(bad)


@pytest.mark.parametrize("merge", ["sum", "concatenation"])
def test_with_paillier_it_is_the_same_network_as_with_lattices(merge):
    parts, y = table(3)
    params = {"hidden_layer_sizes": (1,), "batch_size": 60, "epochs": 1, "merge": merge, "learning_rate": 0.01}
    secret = generate(2048)
    known = agreement(3, encryption={"scheme": "paillier", "key_bits": 2048})
    sealed, lattice = train(parts, y, params, agreed=known, secret=secret), train(parts, y, params)
    assert sealed["bank"].terms_.scheme == "paillier"
    for name in parts:
        for what, value in lattice[name].tensors_.items():
            assert np.abs(sealed[name].tensors_[what] - value).max() < 1e-6


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_step_is_the_one_that_torch_optim_takes(name, decay, momentum):
    generator = np.random.default_rng(1)
    weights = generator.normal(size=(3, 2))
    rule = Rule(name, 0.05, momentum, decay)
    ours, theirs = rule.fresh(), torch.nn.Parameter(torch.tensor(weights))
    assert isinstance(ours, {"sgd": Sgd, "adam": Adam}[name])
    settings = {"lr": 0.05, "weight_decay": decay} | ({"momentum": momentum} if name == "sgd" else {})
    optimiser = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]([theirs], **settings)
    for scale in (1.0, 1e-6, 10.0, 0.0, 1.0, 1.0):
        gradient = scale * generator.normal(size=weights.shape)
        weights = ours.step(weights, gradient)
        theirs.grad = torch.tensor(gradient)
        optimiser.step()
        assert np.abs(weights - theirs.detach().numpy()).max() < 1e-13


def test_digits_need_both_halves():
    pixels, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    train_rows, test_rows = order[:1437], order[1437:]
    halves = dict(zip(("bank", "grocer"), np.split(pixels.reshape(-1, 8, 8), 2, axis=2), strict=True))
    parts = {name: half.reshape(len(y), -1) for name, half in halves.items()}
    often = (parts["grocer"] > 0).mean(axis=0)  # pixels that few rows have would reveal these rows' labels
    parts["grocer"] = parts["grocer"][:, (often > 0.15) & (parts["grocer"].std(axis=0) > 1)]
    parts = {name: part[:, part.std(axis=0) > 0] for name, part in parts.items()}
    scaled = {n: (p - p[train_rows].mean(axis=0)) / (p[train_rows].std(axis=0) + 1e-9) for n, p in parts.items()}
    params = {"hidden_layer_sizes": (16,), "learning_rate": 0.02, "batch_size": 128, "epochs": 12}

    def then(model: VerticalMLPClassifier, session: Session) -> Any:
        return model.score(scaled[session.name][test_rows], y[test_rows], session=session)

    known = agreement(2, {"max_exchanges": 200})
    ended = train({n: p[train_rows] for n, p in scaled.items()}, y[train_rows], params, agreed=known, then=then)
    alone = MLPClassifier((16,), batch_size=128, learning_rate_init=0.02, max_iter=12, alpha=0, random_state=0)
    alone.fit(scaled["bank"][train_rows], y[train_rows])
    assert ended["bank"] >= 0.96
    assert alone.score(scaled["bank"][test_rows], y[test_rows]) < 0.92


# Modules below


class Pixels(torch.nn.Module):
    """A small bottom for images of 4 x 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(8, width)
        )

    def forward(self, images: Any) -> Any:
        return self.layers(images[:, None])


def images(rows: int = 120) -> tuple[dict[str, np.ndarray], np.ndarray]:
    generator = np.random.default_rng(8)
    own, seen = generator.normal(size=(rows, 2)), generator.normal(size=(rows, 4, 4))
    return {"bank": own, "grocer": seen}, (own[:, 0] + seen[:, 1:3, 1:3].sum(axis=(1, 2)) > 0).astype(int)


@pytest.mark.parametrize("numpy_too", [False, True])
def test_a_frozen_module_below_is_the_linear_network_on_its_features(numpy_too):
    parts, y = images()
    module = Pixels(5).double().eval()
    with torch.no_grad():
        features = module(torch.tensor(parts["grocer"])).numpy()
    bottom = (lambda x: module(torch.tensor(x)).detach().numpy()) if numpy_too else Pixels(5)
    params = {"hidden_layer_sizes": (3,), "batch_size": 60, "epochs": 2}
    ended = train(parts, y, params, own={"grocer": {"bottom": bottom}})
    direct = train(parts | {"grocer": features}, y, params)
    for name in parts:
        for what, value in direct[name].tensors_.items():
            assert np.abs(ended[name].tensors_[what] - value).max() < 1e-6


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_open_without_noise_trains_the_whole_module_as_pytorch_does(optimiser, monkeypatch):
    monkeypatch.setattr("vfl.open_split.marvell", lambda gradients, *rest: gradients)
    monkeypatch.setattr("vfl.open_split.stop", lambda *reading, **limits: None)
    parts, y = images()
    params = {"hidden_layer_sizes": (3,), "batch_size": 40, "epochs": 3, "mode": "open"} | STEPS[optimiser]
    top, bottom = top_of(3, 2), Pixels(3)
    before = {name: value.clone() for name, value in bottom.state_dict().items()}
    ended = train(parts, y, params, own={"bank": {"top": top}, "grocer": {"bottom": bottom}})
    network = Joined([initial((2, 3), 2, Stream("bank")), np.eye(3)], top)
    network.blocks[1].requires_grad_(False)  # the module gives the embedding itself
    network.below = Pixels(3).double()
    whole = network.forward
    network.forward = lambda given: whole([given[0], network.below(given[1])])
    centralised(network, parts, y, torch.nn.functional.cross_entropy, params)
    assert np.abs(ended["bank"].tensors_["weights"] - network.blocks[0].detach().numpy()).max() < 1e-10
    for name, value in network.below.state_dict().items():
        assert np.abs(ended["grocer"].tensors_[f"bottom.{name}"] - value.numpy()).max() < 1e-10
        assert torch.equal(bottom.state_dict()[name], before[name])  # ours learns as a copy
        assert np.abs(ended["grocer"].tensors_[f"bottom.{name}"] - before[name].numpy()).max() > 1e-3


def test_open_with_linear_bottoms_and_noise_learns():
    parts, y = table(3, 300)
    params = {"hidden_layer_sizes": (8,), "mode": "open", "batch_size": 50, "epochs": 20, "learning_rate": 0.02}

    def then(model: VerticalMLPClassifier, session: Session) -> Any:
        return model.score(parts[session.name], y, session=session), getattr(model, "readings_", None)

    ended = train(
        parts, y, params, clauses=Clauses(True, False, 0.95), then=then, agreed=agreement(3, {"max_exchanges": 200})
    )
    score, readings = ended["bank"]
    assert score > 0.8 > max(y.mean(), 1 - y.mean()) + 0.1
    assert len(readings) == 20
    assert all(0.5 <= reading.leak_auc <= 0.95 for reading in readings)


# What the agreement must consent to


@pytest.mark.parametrize(
    ("params", "clauses", "model"),
    [
        ({"mode": "open"}, Clauses(), {}),
        ({"mode": "open"}, CONSENT, {"allow_reconstruction": False}),
        ({"merge": "concatenation"}, Clauses(), {}),
        ({"merge": "concatenation"}, CONSENT, {"allow_reconstruction": False}),
    ],
)
def test_rows_in_clear_need_consent(params, clauses, model):
    parts, y = table(3)
    recorded: Any = {}
    ended = train(parts, y, params, clauses=clauses, agreed=agreement(3, model), recorded=recorded)
    assert {type(error) for error in ended.values()} <= {Refused, PeerAborted}
    assert "consent" in str(ended["bank"])
    assert {name_of(parse_header(head).kind) for head, _ in recorded["grocer"]["bank"].sent} <= {"Hello", "Abort"}


@pytest.mark.parametrize("network", [{"mode": "open"}, {"merge": "concatenation"}])
def test_an_agreement_without_these_consents_is_refused_when_it_is_read(network):
    consents = {"open_gradients": True, "separate_embeddings": True}
    for given, allowed in ((consents, False), ({}, True), (consents, True)):
        model = {"kind": "network classifier", "allow_reconstruction": allowed}
        tables: Any = {"model": model, "network": network | given}
        if given and allowed:
            assert agree(3, **tables).network.open_gradients
            continue
        with pytest.raises(msgspec.ValidationError, match="rows travel in clear"):
            agree(3, **tables)
    if "merge" in network:  # one feature holder's embedding stands alone by sum too
        assert agree(2, model={"kind": "network classifier"}, network=network)


def test_without_consent_training_ends_before_the_embeddings_span_the_columns():
    """Four columns at each of two: two epochs and the scoring make six embeddings a row, of eight directions."""
    parts, y = table(3, widths=(2, 4, 4))
    params = {"hidden_layer_sizes": (2,), "batch_size": 60, "epochs": 5}
    ended = train(parts, y, params, agreed=agreement(3, {"allow_reconstruction": False}))
    assert [model.epochs_ for model in ended.values()] == [2, 2, 2]
    ended = train(parts, y, params | {"hidden_layer_sizes": (4,)}, agreed=agreement(3, {"allow_reconstruction": False}))
    assert isinstance(ended["bank"], Refused)
    assert "allow_reconstruction" in str(ended["bank"])


def test_parties_with_other_parameters_or_clauses_stop_before_they_train():
    parts, y = table(2)
    ended = train(parts, y, {}, own={"grocer": {"hidden_layer_sizes": (3,)}})
    assert isinstance(ended["grocer"], Refused)
    assert isinstance(ended["bank"], (Refused, PeerAborted))


@pytest.mark.parametrize("merge", ["sum", "concatenation"])
def test_the_meter_counts_embeddings_of_every_epoch_against_the_columns(merge):
    parts, y = table(3)
    params = {"hidden_layer_sizes": (2,), "batch_size": 40, "epochs": 3, "merge": merge}
    whose = {"grocer + mill": 7} if merge == "sum" else {"grocer": 3, "mill": 4}
    for model in train(parts, y, params).values():
        assert [reading.disclosed for reading in model.readings_] == [dict.fromkeys(whose, 2 * n) for n in (1, 2, 3)]
        assert all(reading.ranks == whose for reading in model.readings_)
    whole = train(parts, y, params | {"batch_size": len(y), "epochs": 1})
    first = [x @ initial((x.shape[1], 2), x.shape[1], Stream(name)) for name, x in list(parts.items())[1:]]
    seen = sum(first) if merge == "sum" else np.hstack(first)
    expected = np.sqrt(LinearRegression().fit(seen, y).score(seen, y))  # with weights that have not learnt yet
    assert whole["bank"].readings_[0].correlation == pytest.approx(expected, abs=1e-6)
    assert whole["grocer"].readings_[0].correlation is None


# What goes wrong


class Explodes(torch.nn.Module):
    """Infinite from the third batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.batches = torch.nn.Linear(3, 2), 0

    def forward(self, merged: Any) -> Any:
        self.batches += self.training
        return self.linear(merged) / (self.batches < 3)


def test_an_exploding_loss_stops_with_its_step():
    parts, y = table(2)
    params = {"batch_size": 40, "hidden_layer_sizes": (3,)}
    ended = train(parts, y, params, own={"bank": {"top": Explodes()}})
    assert isinstance(ended["bank"], LocalError)
    assert "exploded in exchange 3" in str(ended["bank"])
    assert isinstance(ended["grocer"], PeerAborted)


@pytest.mark.parametrize("merge", ["sum", "concatenation"])
def test_exploding_weights_stop_with_their_step(merge):
    parts, y = table(3)
    params = {"optimiser": "sgd", "learning_rate": 1e200, "batch_size": 60, "hidden_layer_sizes": (3,), "merge": merge}
    ended = train(parts, y, params)
    exploded = [error for error in ended.values() if isinstance(error, LocalError)]
    assert exploded
    assert all("step 2" in str(error) or "exchange 2" in str(error) for error in exploded)
    assert all(isinstance(error, (LocalError, PeerAborted)) for error in ended.values())


def test_residuals_beyond_the_agreed_range_are_refused_with_the_remedy():
    parts, _ = table(2)
    y = 1000 * parts["bank"][:, 0]
    ended = train(parts, y, {"batch_size": 60}, kind=VerticalMLPRegressor)
    assert isinstance(ended["bank"], LocalError)
    assert "residual_range" in str(ended["bank"])
    assert isinstance(ended["grocer"], PeerAborted)


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"mode": "half"}, "mode"),
        ({"merge": "product"}, "merge"),
        ({"optimiser": "lbfgs"}, "optimiser"),
        ({"hidden_layer_sizes": ()}, "hidden_layer_sizes"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"top": torch.nn.Linear(16, 3)}, "top"),
        ({"top": torch.nn.Linear(15, 2)}, "top"),
        ({"bottom": np.tanh}, "bottom"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_sent(params, word):
    parts, y = table(2)
    recorded: Any = {}
    ended = train(parts, y, {}, own={"bank": params}, recorded=recorded)
    assert isinstance(ended["bank"], LocalError)
    assert word in str(ended["bank"])
    assert {name_of(parse_header(head).kind) for head, _ in recorded["bank"]["grocer"].sent} == {"Hello", "Abort"}


def test_without_torch_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    parts, y = table(2)
    ended = train(parts, y, {})
    assert "colonnade[torch]" in str(ended["bank"])
    assert isinstance(ended["bank"], LocalError)
    with pytest.raises(LocalError, match="torch"):
        load_torch()


def test_a_feature_holder_with_a_linear_bottom_never_loads_torch():
    code = (
        "import sys, vfl.neural; from vfl.bottoms import Linear; from vfl.optimisers import Rule; import numpy as np\n"
    )
    code += "one = Linear(np.ones((2, 1)), np.ones((1, 1)), Rule('adam', 0.1, 0.0, 0.0))\n"
    code += "one.learn(one.embed(np.arange(2))[:1]); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        (EpochEnd, {"exchange": 7}),
        (OpenGradient, {"exchange": 7}),
        (OpenGradient, {"data": np.zeros((60, 2))}),
        (OpenGradient, {"data": np.zeros((59, 3))}),
    ],
)
def test_a_label_holder_that_sends_another_step_or_shape_is_named(expected, change):
    parts, y = table(2)
    params = {"hidden_layer_sizes": (3,), "batch_size": 60, "epochs": 1, "mode": "open"}
    ended = train(parts, y, params, tamper=altering("bank", "grocer", expected, with_fields(**change)))
    assert isinstance(ended["grocer"], ProtocolViolation)
    assert ended["grocer"].peer == "bank"


def test_a_label_holder_that_plans_with_more_gradients_a_row_is_refused():
    parts, y = table(2)
    wider = altering("bank", "grocer", Plan, with_fields(outputs=5))
    ended = train(parts, y, {"hidden_layer_sizes": (3,), "batch_size": 60, "epochs": 1}, tamper=wider)
    assert isinstance(ended["grocer"], Refused)
    assert "width 5, not 3" in str(ended["grocer"])


def test_a_feature_holder_whose_embedding_has_another_width_is_named():
    parts, y = table(3)
    params = {"hidden_layer_sizes": (3,), "batch_size": 60, "epochs": 1, "merge": "concatenation"}
    wrong = with_fields(data=np.zeros((60, 4)))
    ended = train(parts, y, params, tamper=altering("mill", "bank", SeparateEmbedding, wrong))
    assert isinstance(ended["bank"], ProtocolViolation)
    assert ended["bank"].peer == "mill"


# Early stopping


def test_early_stopping_keeps_the_weights_of_the_best_epoch_at_all_parties():
    parts, y = table(2, 200)
    y = np.random.default_rng(0).integers(0, 2, len(y))  # nothing to learn: validation gets worse
    params = {"hidden_layer_sizes": (6,), "batch_size": 80, "epochs": 15, "learning_rate": 0.1}
    params |= {"early_stopping": True, "validation_fraction": 0.2, "n_iter_no_change": 2}

    def then(model: VerticalMLPClassifier, session: Session) -> Any:
        return model, model.predict_proba(parts[session.name], session=session)

    ended = train(parts, y, params, then=then)
    (bank, chances), (grocer, _) = ended["bank"], ended["grocer"]
    losses = bank.course_.validation
    assert bank.epochs_ == grocer.epochs_ == len(losses) < 15
    assert "not improved for 2 epochs" in bank.course_.stopped
    order = np.random.default_rng([0, 1]).permutation(len(y))[:40]
    assert -np.log(chances[order, y[order]]).mean() == pytest.approx(losses[-3], rel=1e-6)
    assert losses[-3] == min(losses)


# Shares on disk


def scored(parts: Parts, models: Mapping[str, Any], agreed: Agreement) -> dict[str, Any]:
    def role(name: str) -> Callable[[Session], Any]:
        return lambda session: models[name].predict_proba(parts[name], session=session)

    return outcomes({name: role(name) for name in parts}, agreed, parties(len(parts)))


def test_a_saved_share_is_numbers_and_scores_as_before(tmp_path):
    parts, y = images()
    params = {"hidden_layer_sizes": (3,), "mode": "open", "batch_size": 60, "epochs": 1}
    known, top, bottom = agreement(2), top_of(3, 2), Pixels(3)
    trained = train(parts, y, params, own={"bank": {"top": top}, "grocer": {"bottom": bottom}}, agreed=known)
    for name, model in trained.items():
        model.save(tmp_path / name)
        assert set(json.loads((tmp_path / name).read_text())["tensors"]) == set(model.tensors_)
        assert (tmp_path / name).stat().st_mode & 0o77 == 0
    load = VerticalMLPClassifier.load
    models = {"bank": load(tmp_path / "bank", top=top_of(3, 2)), "grocer": load(tmp_path / "grocer", bottom=Pixels(3))}
    before, after = scored(parts, trained, known), scored(parts, models, known)
    assert np.array_equal(before["bank"], after["bank"])
    assert before["grocer"] is after["grocer"] is None
    with pytest.raises(LocalError, match="top"):
        load(tmp_path / "bank")
    with pytest.raises(LocalError, match="other parameters"):
        load(tmp_path / "bank", top=top_of(3, 4, 2))
    with pytest.raises(LocalError, match="other parameters"):
        load(tmp_path / "grocer", bottom=Pixels(4))
    with pytest.raises(LocalError, match="VerticalMLPClassifier"):
        VerticalMLPRegressor.load(tmp_path / "bank", top=top_of(3, 2))


def test_shares_of_another_training_or_agreement_do_not_score(tmp_path):
    parts, y = table(2)
    known, params = agreement(2), {"hidden_layer_sizes": (2,), "batch_size": 60, "epochs": 1}
    first, second = train(parts, y, params, agreed=known), train(parts, y, params, agreed=known)
    mixed = scored(parts, {"bank": first["bank"], "grocer": second["grocer"]}, known)
    assert {type(error) for error in mixed.values()} <= {Refused, PeerAborted}
    elsewhere = scored(parts, first, agreement(2, {"tolerance": 1e-3}))
    assert all(isinstance(error, (LocalError, PeerAborted)) for error in elsewhere.values())
    assert "another agreement" in str(elsewhere["bank"])


def test_a_damaged_share_is_refused(tmp_path):
    parts, y = table(2)
    ended = train(parts, y, {"hidden_layer_sizes": (2,), "batch_size": 60, "epochs": 1})
    for name, change in (
        ("grocer", lambda share: share["tensors"]["weights"].update(shape=[2, 2])),
        ("grocer", lambda share: share["tensors"]["weights"].update(shape=[6], values=[0.0] * 6)),
        ("grocer", lambda share: share["tensors"].clear()),
        ("grocer", lambda share: share.update(params={"depth": 3})),
        ("bank", lambda share: share["tensors"].pop("top.1.bias")),
        ("bank", lambda share: share["classes"].append(2)),
        ("bank", lambda share: share.update(code="print()")),
    ):
        ended[name].save(tmp_path / "share")
        share = json.loads((tmp_path / "share").read_text())
        change(share)
        (tmp_path / "share").write_bytes(msgspec.json.encode(share))
        with pytest.raises(LocalError):
            VerticalMLPClassifier.load(tmp_path / "share")


def test_linear_bottoms_step_alike_from_rows_and_from_their_sum():
    generator = np.random.default_rng(0)
    x, weights, residual = generator.normal(size=(6, 3)), generator.normal(size=(3, 2)), generator.normal(size=(4, 2))
    by_row, by_sum = (Linear(x, weights, Rule("sgd", 0.1, 0.0, 0.0)) for _ in range(2))
    rows = np.array([5, 0, 2, 3])
    by_row.back(rows, residual)
    by_sum.learn(x[rows].T @ residual)
    assert np.array_equal(by_row.weights, by_sum.weights)
    assert np.allclose(by_row.weights, weights - 0.1 * x[rows].T @ residual)
