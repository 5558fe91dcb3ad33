"""Federated transfer and personalisation of torch modules, against loops in plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from parties.horizontal import Horizontal  # noqa: E402
from vfl.horizontal.federated import train  # noqa: E402
from vfl.horizontal.models import TorchModel  # noqa: E402
from vfl.horizontal.simulate import simulate  # noqa: E402

LOSS = torch.nn.functional.cross_entropy
ROWS = (12, 30, 20)
ROUNDS, EPOCHS, RATE = 4, 3, 0.3


class Net(torch.nn.Module):
    """A body with a buffer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh())
        self.head = torch.nn.Linear(6, 3)
        self.register_buffer("scale", torch.full((6,), 1.5))
        self.double()

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x) * self.scale)


def clients() -> list[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for rows in ROWS:
        x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        parts.append((x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()))
    return parts


def pretrained() -> Any:
    """As from another task: trained, and then its body is frozen."""
    torch.manual_seed(3)
    net = Net()
    for parameter in net.body.parameters():
        parameter.requires_grad_(False)
    return net


def plain(net: Any, x: Any, y: Any, parameters: list[Any]) -> None:
    """A client's round: torch's own gradient descent on all its rows."""
    optimiser = torch.optim.SGD(parameters, lr=RATE)
    for _ in range(EPOCHS):
        optimiser.zero_grad()
        LOSS(net(x), y).backward()
        optimiser.step()


def mean(states: list[Any], names: list[str]) -> dict[str, Any]:
    """FedAvg: weighted by rows."""
    total = sum(ROWS)
    return {name: sum(rows / total * one[name] for rows, one in zip(ROWS, states, strict=True)) for name in names}


def settings(secure: str, **given: Any) -> Horizontal:
    return Horizontal(
        model="own",
        strategy="fedavg",
        rounds=ROUNDS,
        epochs=EPOCHS,
        batch=0,
        rate=RATE,
        secure_aggregation=secure,  # type: ignore[arg-type]
        **given,
    )


@pytest.mark.parametrize("secure", ["on", "none"])
def test_of_a_frozen_body_nothing_travels_and_nothing_changes(secure: str) -> None:
    server, names = pretrained(), ["head.weight", "head.bias"]
    nets = [copy.deepcopy(server) for _ in ROWS]
    body = {name: value.clone() for name, value in server.state_dict().items() if name not in names}
    models = {f"c{i}": TorchModel(net, LOSS, *part) for i, (net, part) in enumerate(zip(nets, clients(), strict=True))}
    outcome = train(models, settings(secure), start=models["c0"].get())
    assert len(outcome.weights) == 6 * 3 + 3
    if secure == "none":  # head, rows and four numbers of the score
        assert outcome.rounds[0].bytes == len(ROWS) * 8 * (21 + 1 + 4)
    for net in nets:
        assert all(torch.equal(net.state_dict()[name], value) for name, value in body.items())
    for _ in range(ROUNDS):
        ends = [copy.deepcopy(server) for _ in ROWS]
        for net, part in zip(ends, clients(), strict=True):
            plain(net, *part, list(net.head.parameters()))
        server.load_state_dict(server.state_dict() | mean([net.state_dict() for net in ends], names))
    for name in names:
        np.testing.assert_allclose(nets[1].state_dict()[name], server.state_dict()[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("secure", ["on", "none"])
def test_a_local_head_is_the_clients_own_and_the_body_is_everybodys(secure: str) -> None:
    """Arivazhagan et al. 2019, algorithm 1, with heads that begin differently."""
    torch.manual_seed(4)
    first, heads = Net(), [Net().head for _ in ROWS]
    names = [name for name, _ in first.named_parameters() if name.startswith("body.")]
    nets = [copy.deepcopy(first) for _ in ROWS]
    for net, head in zip(nets, heads, strict=True):
        net.head = copy.deepcopy(head)
    models = {f"c{i}": TorchModel(net, LOSS, *part) for i, (net, part) in enumerate(zip(nets, clients(), strict=True))}
    start = models["c0"].get()[~models["c0"].coordinates("head.")]
    outcome = train(models, settings(secure, personal="head."), start=start)
    assert len(outcome.weights) == 5 * 6 + 6
    body = {name: first.state_dict()[name] for name in names}
    ends = [copy.deepcopy(first) for _ in ROWS]
    for net, head in zip(ends, heads, strict=True):
        net.head = copy.deepcopy(head)
    for _ in range(ROUNDS):
        for net, part in zip(ends, clients(), strict=True):
            net.load_state_dict(net.state_dict() | body)
            plain(net, *part, list(net.parameters()))
        body = mean([net.state_dict() for net in ends], names)
    for net, end in zip(nets, ends, strict=True):
        for name, value in (end.state_dict() | body).items():
            np.testing.assert_allclose(net.state_dict()[name], value, rtol=0, atol=1e-7)
    assert not torch.allclose(nets[0].head.weight, nets[1].head.weight)


def test_a_head_on_a_frozen_body_may_be_fine_tuned_at_the_client_alone() -> None:
    models = {f"c{i}": TorchModel(pretrained(), LOSS, *part) for i, part in enumerate(clients())}
    outcome = train(models, settings("none", fine_tune=5), start=models["c0"].get())
    tuned = pretrained()
    head = dict(zip(("head.weight", "head.bias"), np.split(outcome.weights, [18]), strict=True))
    shaped = {name: torch.as_tensor(value).reshape(tuned.state_dict()[name].shape) for name, value in head.items()}
    tuned.load_state_dict(tuned.state_dict() | shaped)
    optimiser = torch.optim.SGD(tuned.head.parameters(), lr=RATE)
    for _ in range(5):
        optimiser.zero_grad()
        LOSS(tuned(clients()[2][0]), clients()[2][1]).backward()
        optimiser.step()
    np.testing.assert_allclose(models["c2"].module.head.weight.detach(), tuned.head.weight.detach(), rtol=0, atol=1e-10)


def test_a_simulation_begins_with_the_first_clients_body_and_leaves_the_heads_alone() -> None:
    def models() -> list[TorchModel]:
        torch.manual_seed(4)
        return [TorchModel(Net(), LOSS, *part) for part in clients()]

    played, simulated = models(), models()
    start = played[0].get()[~played[0].coordinates("head.")]
    agreed = settings("none", personal="head.")
    outcome = train({f"client-{i}": one for i, one in enumerate(played)}, agreed, start=start)
    np.testing.assert_array_equal(simulate(agreed, simulated).weights, outcome.weights)
    for one, other in zip(simulated, played, strict=True):
        np.testing.assert_array_equal(one.get(), other.get())
