"""A small character model, pre-trained on one author and fine-tuned federally on the speaking roles of Shakespeare.

Every role is a client: its lines stay in its own part of the program, and secure sums of the updates are all that the
coordinator sees. Printed: the loss by round, and what the model writes before and after.

Run it: python examples/shakespeare/speak.py [NOVEL.txt PLAYS.txt] [--rounds 15]       needs colonnade[torch]
Plays are as in "tiny Shakespeare": a name and a colon, then the lines, then an empty line. Without files a short
excerpt of both is used, which shows the way and no more.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from excerpts import NOVEL, PLAYS
from torch import nn

from parties.horizontal import Horizontal
from vfl.horizontal.models import TorchModel
from vfl.horizontal.simulate import simulate

LETTERS = "\n !',-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LENGTH = 48  # characters that the model looks back when it learns
ROLES, MOST = 12, 6000  # the roles that speak most, and the most characters of each


class Characters(nn.Module):
    """From characters (n, length) to the logits of the next ones, (n, length, letters)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), 24)
        self.memory = nn.GRU(24, 96, batch_first=True)
        self.head = nn.Linear(96, len(LETTERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(self.embedding(x))[0])


def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def windows(text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every stretch of LENGTH characters, one after the other, and the same moved by one."""
    codes = torch.tensor([LETTERS.index(letter) for letter in text if letter in LETTERS])
    count = (len(codes) - 1) // LENGTH
    return tuple(codes[at : at + count * LENGTH].reshape(count, LENGTH) for at in (0, 1))


def roles(plays: str) -> dict[str, str]:
    """Who speaks most, and what."""
    spoken: dict[str, list[str]] = {}
    for name, lines in re.findall(r"^([A-Z][A-Za-z ]+):\n(.+?)(?:\n\n|\Z)", plays, re.M | re.S):
        spoken.setdefault(name, []).append(lines)
    texts = {name: "\n\n".join(lines)[:MOST] for name, lines in spoken.items()}
    longest = sorted(texts, key=lambda name: -len(texts[name]))[:ROLES]
    return {name: texts[name] for name in longest if len(texts[name]) > 2 * LENGTH}


def pretrain(model: nn.Module, text: str, steps: int) -> None:
    x, y = windows(text)
    optimiser, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        optimiser.zero_grad()
        loss(model(x[batch]), y[batch]).backward()
        optimiser.step()


def sample(model: nn.Module, start: str = "My lord, ", length: int = 160) -> str:
    """What the model writes after `start`, the same every time."""
    text, generator = start, torch.Generator().manual_seed(7)
    model.eval()
    with torch.no_grad():
        for _ in range(length):
            codes = torch.tensor([[LETTERS.index(letter) for letter in text[-LENGTH:]]])
            chances = torch.softmax(model(codes)[0, -1] / 0.7, 0)
            text += LETTERS[int(torch.multinomial(chances, 1, generator=generator))]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*", type=Path, metavar="NOVEL.txt PLAYS.txt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=400, help="of pre-training")
    options = parser.parse_args()
    if len(options.texts) not in (0, 2):
        parser.error("give both texts, the novel and the plays, or none")
    novel, plays = (path.read_text("utf-8") for path in options.texts) if options.texts else (NOVEL, PLAYS)

    torch.set_num_threads(1)  # the clients are threads already
    torch.manual_seed(0)
    model = Characters()
    pretrain(model, novel, options.steps)
    print(f"--- before, having read the novel:\n{sample(model)}\n")

    spoken = roles(plays)
    clients = []
    for text in spoken.values():
        own = Characters()
        own.load_state_dict(model.state_dict())
        clients.append(TorchModel(own, loss, *windows(text)))
    print(f"{len(spoken)} roles: " + ", ".join(f"{name} ({len(text):,})" for name, text in spoken.items()))
    settings = Horizontal(model="own", strategy="fedavg", rounds=options.rounds, epochs=2, batch=16, rate=0.5)
    outcome = simulate(settings, clients)
    for one in outcome.rounds:
        print(f"round {one.number:2}: loss {one.loss:.4f} when it began, accuracy {one.accuracy:.4f}")
    after = [one.after for one in outcome.clients.values()]
    mean = np.average([one.loss for one in after], weights=[one.rows for one in after])
    print(f"in the end: loss {mean:.4f}\n\n--- after, having heard the roles:\n{sample(clients[0].module)}")


if __name__ == "__main__":
    main()
