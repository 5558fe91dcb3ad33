"""The server's part, without a channel: from sum to sum until training is done. Whoever adds up is a `Crowd`:
clients behind channels (star.py), or in this process (simulate.py).

    rows, then means and scales of the scaler, one sum each; the rounds of training; every client's score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError, Refused
from parties.horizontal import Horizontal
from parties.message import PAYLOAD_LIMIT
from vfl.checkpoint import Bound, read_checkpoint, write_checkpoint
from vfl.horizontal.accounting import noise_multiplier
from vfl.horizontal.compression import compressor
from vfl.horizontal.models import Score
from vfl.horizontal.newton import column_means, scaler
from vfl.horizontal.outcome import NO_SCORE, Client, Outcome, Round, already_done
from vfl.horizontal.robust import rule
from vfl.horizontal.round_messages import Task
from vfl.horizontal.settings import TAIL, Job, Spending
from vfl.horizontal.strategies import Population, State, broadcast, server_round, strategy

Vector = NDArray[np.float64]
NAME = "coordinator.checkpoint"
MOST = PAYLOAD_LIMIT // 8 - TAIL - 1  # numbers of a message, besides weight and score
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Collected:
    """One sum: over whom, who is missing and why. parts: each client's message, where they come in clear."""

    total: Vector
    survivors: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Vector] | None = None
    bytes: int = 0
    attempts: int = 1
    seconds: Mapping[str, float] = field(default_factory=dict)


class Crowd(Protocol):
    """The clients, as the server's loop sees them."""

    def collect(self, task: Task, names: Sequence[str]) -> Collected:
        """The sum of what these clients answer. Raises PeerLost below the quorum, LocalError where all diverge."""

    def confirm(self, collected: Collected) -> None:
        """Tell the clients that the sum counts, and who is in it."""

    def scores(self, task: Task) -> dict[str, Score]:
        """Each client's own; of those that answer."""

    def finish(self, task: Task) -> None:
        """Hand out the model."""


def checked(settings: Horizontal, clients: int, own: bool = False) -> None:
    """What the settings alone decide, before any data is read. own: the coordinator is one of the clients.

    Raises Refused when so many clients cannot do it, LocalError for a strategy, compression or rule that cannot be, or
    a model that no message can carry.
    """
    try:
        settings.check(clients, own)
    except ValueError as error:
        raise Refused(str(error)) from None
    if settings.strategy != "exact":
        numbers = settings.listed * strategy(settings.strategy, settings.parameters).vectors
        if numbers > MOST:
            raise LocalError(
                f"{numbers:,} numbers a message are agreed, and it carries at most {MOST:,}; freeze a part of the "
                "model, or take fewer public rows"
            )
    elif settings.parameters:
        raise LocalError('strategy "exact" has no parameters; take them out')
    if settings.compression:
        compressor(settings.compression)
    if settings.private:  # kept: where clients are drawn in secret this takes seconds
        noise_multiplier(settings.privacy.epsilon, settings.privacy.delta, settings.releases, settings.clients.rate)
    asked = settings.clients.asked(clients)
    rule(settings.robust, poisoned=settings.poisoned, bound=settings.norm_bound, clients=asked)


@dataclass(eq=False)
class Server:
    """What the server knows: never a row, and of an update only what its crowd shows it. Pure."""

    job: Job
    start: Vector | None = None
    rows: int = 0
    scaling: tuple[Vector, Vector] | None = None
    state: State = field(default_factory=dict)
    round: int = 0

    def begin(self) -> None:
        """To be called once rows and scaler are known. Raises LocalError without the weights of an own model."""
        if self.job.settings.strategy == "exact":
            self.state = self.job.exact.start()
            return
        start = np.zeros(self.job.size) if self.start is None else self.start
        if len(start) != self.job.size:
            raise LocalError(f"{len(start)} start weights where the clients' models share {self.job.size}")
        self.state = self.job.strategy.server(start.astype(np.float64))

    @property
    def done(self) -> bool:
        if self.job.settings.strategy == "exact" and self.state["done"][0]:
            return True
        return self.round >= self.job.settings.rounds

    def told(self, vectors: Vector) -> Vector:
        """The data of a task: the scaler, if there is one, and these vectors."""
        return np.concatenate([*(self.scaling or ()), vectors])

    def vectors(self) -> Vector:
        """What the clients of the round receive."""
        if self.job.settings.strategy == "exact":
            return self.state["weights"]
        return broadcast(self.job.strategy, self.job.part(self.round), self.state)

    def next_state(self, total: Vector) -> State:
        """From a sum of the clients' messages, without their tails. Raises LocalError where training diverges."""
        job, privacy = self.job, self.job.settings.privacy
        try:
            if job.settings.strategy == "exact":
                return job.exact.step(self.state, total)
            population = Population(job.clients, max(self.rows, 1))
            with np.errstate(over="ignore", invalid="ignore"):
                if privacy.level == "record":
                    mean = total / privacy.rows
                    objective = job.objective(privacy.rows)
                    coefficients = objective.outputs * objective.features
                    mean[:coefficients] -= objective.penalty * self.state["weights"][:coefficients]
                    total = np.append(mean, 1.0)
                elif privacy.level == "client":
                    total = np.append(total, float(job.asked))  # a public number: those asked, not those who came
                state = server_round(job.strategy, job.part(self.round), self.state, total, population)
        except LocalError as error:
            raise LocalError(f"round {self.round}: {error}") from None
        if not all(np.isfinite(values).all() for values in state.values()):
            raise diverged(self.round)
        return state


def diverged(number: int) -> LocalError:
    return LocalError(f"round {number}: training diverges, the numbers are no longer finite; agree on a smaller rate")


def combine(job: Job, parts: Mapping[str, Vector]) -> Vector:
    """The sum of messages that came in clear, under the agreed robust rule. Raises LocalError as the rule does."""
    if not parts:  # nobody was drawn
        return np.zeros(job.length("train", 0))
    messages = np.array(list(parts.values()))
    total = np.asarray(messages.sum(axis=0))
    if job.settings.robust == "mean":
        return total
    cut = messages.shape[1] - TAIL - 1
    weights = messages[:, cut]
    present = weights >= 1  # rows, or 1 for a client
    if not present.any():
        return total
    updates = messages[present, :cut] / weights[present, None]
    chosen = rule(job.settings.robust, poisoned=job.settings.poisoned, bound=job.settings.norm_bound)
    total[cut] = weights[present].sum()
    if job.settings.robust != "norm_bound":  # what a client claims scales no sum either
        total[cut] = np.median(weights[present]) * np.count_nonzero(present)
    total[:cut] = chosen(updates, weights[present]) * total[cut]
    return total


@dataclass(eq=False)
class Leader:
    """The server's loop over one crowd."""

    job: Job
    names: Sequence[str]
    crowd: Crowd
    server: Server
    history: list[Round] = field(default_factory=list)
    before: dict[str, Score] = field(default_factory=dict)
    number: int = 0  # of the next task
    whose: Bound = field(default_factory=Bound)  # the checkpoint

    def task(self, stage: str, vectors: Vector) -> Task:
        self.number += 1
        server = self.server
        return Task(self.number - 1, server.round, stage, self.job.clients, server.rows, server.told(vectors))

    def add_up(self, stage: str, vectors: Vector | None = None) -> Vector:
        """A sum over all clients that counts whatever follows."""
        collected = self.crowd.collect(self.task(stage, np.empty(0) if vectors is None else vectors), self.names)
        self.crowd.confirm(collected)
        return collected.total

    def scores(self, weights: Vector) -> dict[str, Score]:
        return self.crowd.scores(self.task("score", weights))

    def prepare(self) -> None:
        """Rows, scaler, the first scores. Raises LocalError when nobody has a row."""
        settings, server = self.job.settings, self.server
        server.rows = settings.privacy.rows
        if not settings.private:
            server.rows = round(self.add_up("rows")[0])
            if server.rows < 1 and settings.model != "own":
                raise LocalError("no client has a row to train on")
        if settings.standardise:
            means = column_means(self.add_up("means"))
            fitted = scaler(means, self.add_up("scales", means))
            server.scaling = fitted.mean_, fitted.var_
        server.begin()
        if not settings.private:
            self.before = self.scores(server.state["weights"])

    def one_round(self, asked: Sequence[str], spending: Spending) -> Collected:
        """Ask, add up, step. The sum is not confirmed yet."""
        settings, server = self.job.settings, self.server
        start = time.perf_counter()
        collected = self.crowd.collect(self.task("train", server.vectors()), asked)
        total, tail = collected.total, np.zeros(TAIL)
        if not settings.private:
            total, tail = total[:-TAIL], total[-TAIL:]
        elif settings.privacy.noise == "central":
            spending.charge(server.round)
            total = self.job.noised(total)
        server.state = server.next_state(total)
        loss, accuracy = (float(value / rows) if rows else np.nan for rows, value in (tail[:2], tail[2:]))
        seconds = time.perf_counter() - start
        saved = collected.total.nbytes * len(collected.survivors) - collected.bytes
        facts = collected.survivors, collected.missing, collected.bytes, seconds, collected.attempts, saved
        self.history.append(Round(server.round, loss, accuracy, *facts))
        server.round += 1
        return collected

    def contributions(self, start: State, parts: Mapping[str, Vector], after: Mapping[str, Score]) -> dict[str, float]:
        """By how much the others' loss is larger when the last round leaves a client out."""
        last, found = replace(self.server, state=start, round=self.server.round - 1), {}
        for name in parts:
            others = {other: part for other, part in parts.items() if other != name}
            without = self.scores(last.next_state(combine(self.job, others)[:-TAIL])["weights"])
            judges = [other for other in without if other != name and other in after and after[other].rows]
            rows = [after[other].rows for other in judges]
            if judges:
                found[name] = float(np.average([without[o].loss - after[o].loss for o in judges], weights=rows))
        return found


def lead(
    leader: Leader,
    spending: Spending,
    *,
    rows: Sequence[int] = (),
    progress: Progress = lambda phase, done, total: None,
    folder: Path | None = None,
) -> Outcome:
    """Train from where the leader stands. rows: of the clients, where they are chosen by them; folder: for checkpoints.

    Raises LocalError where training diverges or has no optimum, and what the crowd raises.
    """
    job, server, crowd = leader.job, leader.server, leader.crowd
    if not server.state:
        leader.prepare()
    began, seconds = server.round, dict.fromkeys(leader.names, 0.0)
    start, parts = server.state, None
    while not server.done:
        progress("train", server.round, job.settings.rounds)
        chosen = job.choose(server.round, rows, [seconds[name] for name in leader.names])
        start = server.state
        asked = [leader.names[i] for i in chosen]
        collected = leader.one_round(asked, spending)
        seconds |= dict.fromkeys(asked, np.inf) | dict(collected.seconds)  # who does not answer is the slowest
        parts = collected.parts
        if folder is not None:
            save(folder, leader)
        crowd.confirm(collected)
    weights, after, contributions = server.state["weights"], {}, {}
    if not job.settings.private:
        after = leader.scores(weights)
        if job.settings.leave_one_out and parts is not None and len(parts) > 1:
            contributions = leader.contributions(start, parts, after)
    crowd.finish(leader.task("finish", weights))
    progress("train", server.round, server.round)
    clients = {
        name: Client(leader.before.get(name, NO_SCORE), after.get(name, NO_SCORE), contributions.get(name, np.nan))
        for name in leader.names
    }
    estimator = job.estimator(weights, server.round, server.scaling, server.rows)
    return Outcome(estimator, weights, leader.history, clients, warnings(server, began))


def warnings(server: Server, began: int) -> tuple[str, ...]:
    """began: the round from which training went on."""
    said = []
    if began and began == server.round:
        said.append(already_done(began))
    if "converged" in server.state and not server.state["converged"][0]:
        reached = f"the optimum is not reached after {server.round} rounds"
        said.append(f"{reached}; agree on more, or standardise the columns")
    return tuple(said)


# ---- checkpoints


class Standing(Bound, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the server stands besides its state: rounds done, the next task's number, all rows, what was seen."""

    round: int
    number: int
    rows: int
    history: tuple[Round, ...]
    before: dict[str, Score]


def save(folder: Path, leader: Leader) -> None:
    """Where the server stands after a round."""
    server, whose = leader.server, leader.whose
    facts = Standing(
        agreement=whose.agreement,
        party=whose.party,
        round=server.round,
        number=leader.number,
        rows=server.rows,
        history=tuple(leader.history),
        before=leader.before,
    )
    scaling = dict(zip(("means", "variances"), server.scaling or (), strict=False))
    arrays = {f"state.{name}": values for name, values in server.state.items()} | scaling
    write_checkpoint(folder / NAME, leader.job.digest, facts, arrays)


def restore(folder: Path, leader: Leader) -> None:
    """Go on from the checkpoint, if there is one. Raises LocalError: it is damaged, or of another agreement or job."""
    found = read_checkpoint(folder / NAME, leader.job.digest, Standing, leader.whose)
    if found is None:
        return
    server, facts, arrays = leader.server, found.facts, found.arrays
    server.round, server.rows, leader.number = facts.round, facts.rows, facts.number
    server.state = {name.removeprefix("state."): values for name, values in arrays.items() if name.startswith("state.")}
    if "means" in arrays:
        server.scaling = arrays["means"], arrays["variances"]
    leader.history, leader.before = list(facts.history), facts.before
