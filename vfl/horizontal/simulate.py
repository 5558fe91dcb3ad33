"""Thousands of clients in one process: the same server's loop and the same client's part, without channels between.

With secure aggregation there are channels: the real roles run, each client in a thread of its own (federated.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError, PeerLost
from parties.horizontal import Horizontal
from parties.workers import Workers
from vfl.horizontal.compression import unpacked
from vfl.horizontal.layout import shared
from vfl.horizontal.models import Model, Score
from vfl.horizontal.outcome import Outcome
from vfl.horizontal.partition import Partition
from vfl.horizontal.round_messages import DECLINED, LEVELS, NOT_FINITE, REASONS, TOO_LARGE, Task
from vfl.horizontal.rounds import Collected, Leader, Server, checked, combine, diverged, lead, restore
from vfl.horizontal.settings import TAIL, Job, Spending, reference, refuse_differences
from vfl.horizontal.strategies import State
from vfl.horizontal.trainer import Data, Trainer, describe

R = TypeVar("R")
CHUNK = 64  # clients that a worker takes at a time


def deal(data: Data, partition: str, clients: int, seed: int) -> list[Data]:
    """The rows dealt to so many clients: `iid`, `dirichlet:0.3`, `labels:2` or `quantity:0.5` (partition.py).

    Every client declares the classes of all. Raises LocalError as `Partition` does.
    """
    parts = Partition.parse(partition).deal(data.y, clients, seed)
    return [data.rows(rows) for rows in parts]


def simulate(
    settings: Horizontal,
    clients: Sequence[Data] | Sequence[Model],
    *,
    start: NDArray[np.float64] | None = None,
    workers: Workers | None = None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    folder: Path | None = None,
) -> Outcome:
    """Train with these clients. start: the first weights of own models; without, those of the first client's.

    workers: all train, which pays where a client's training takes longer than sending its rows, every round; own models
    stay in this process. folder: for the server's checkpoint, from which the simulation goes on.
    Raises what `coordinate` does; LocalError for a checkpoint where the clients, too, have something to remember.
    """
    remembers = settings.strategy in ("feddyn", "scaffold") or settings.compression or settings.personal
    if folder is not None and (remembers or settings.secure):
        raise LocalError(
            "a simulation saves the server's state alone; this one needs its clients', too: run it at once"
        )
    rows = [one if isinstance(one, Data) else None for one in clients]
    models = [None if isinstance(one, Data) else one for one in clients]
    names = [f"client-{place:0{len(str(len(rows) - 1))}}" for place in range(len(rows))]
    if start is None and models and models[0] is not None:
        start = models[0].get()[shared(settings, models[0])]
    if settings.secure:
        from vfl.horizontal.federated import train  # with the transport, which nobody else here needs

        return train(dict(zip(names, clients, strict=True)), settings, start=start, progress=progress)
    checked(settings, len(names))
    tables = {name: describe(settings, data, model) for name, data, model in zip(names, rows, models, strict=True)}
    job = Job(settings, reference(settings, tables), len(names))
    refuse_differences(tables, job.schema)
    trainers = [Trainer(job, place, data, model) for place, (data, model) in enumerate(zip(rows, models, strict=True))]
    fleet = Fleet(job, dict(zip(names, trainers, strict=True)), workers or Workers(1))
    leader = Leader(job, names, fleet, Server(job, start))
    if folder is not None and settings.checkpoint:
        restore(folder, leader)
    told = [table.rows for table in tables.values()]
    return lead(leader, Spending(job), rows=told, progress=progress, folder=folder if settings.checkpoint else None)


class Answer(NamedTuple):
    """Of one client to one task: its numbers, what it keeps if they count, their level, what its message takes, and why
    there are none."""

    message: NDArray[np.float64]
    pending: State
    level: int
    packed: NDArray[np.uint8] | None
    seconds: float
    reason: str = ""


@dataclass(eq=False)
class Fleet:
    """Clients in this process."""

    job: Job
    trainers: dict[str, Trainer]
    workers: Workers

    def collect(self, task: Task, names: Sequence[str]) -> Collected:
        """One sum. Raises PeerLost below the quorum, LocalError where all diverge."""
        job, settings = self.job, self.job.settings
        parts, missing, seconds, size = {}, {}, {}, 0
        packs = bool(settings.compression) and task.stage == "train"
        for name, answer in zip(names, self._answers(task, names), strict=True):
            seconds[name] = answer.seconds
            if answer.level >= len(LEVELS):
                missing[name] = answer.reason or REASONS[answer.level]
                continue
            self.trainers[name].pending = answer.pending
            message = answer.message
            if packs and answer.packed is not None:
                message = unpacked(settings.compression, answer.packed, len(message), TAIL + 1)
                size += len(answer.packed)
            else:
                size += message.nbytes
            if settings.private and task.stage == "train" and settings.privacy.noise == "local":
                message = job.noised(message)
            parts[name] = message
        if not parts and set(missing.values()) & {REASONS[NOT_FINITE], REASONS[TOO_LARGE]}:
            raise diverged(task.round)
        needed = settings.needed(len(names)) if names else 0
        if len(parts) < needed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(missing.items())[:10])
            raise PeerLost(
                f"round {task.round}: {len(parts)} clients are left, {needed} are needed; missing: {reasons}"
            )
        total = combine(job, parts) if task.stage == "train" else np.asarray(sum(parts.values()))
        return Collected(total, tuple(parts), missing, parts, size, 1, seconds)

    def confirm(self, collected: Collected) -> None:
        for name in collected.survivors:
            self.trainers[name].keep()

    def scores(self, task: Task) -> dict[str, Score]:
        scores = _each(self.workers, partial(_score, task), list(self.trainers.values()))
        return dict(zip(self.trainers, scores, strict=True))

    def finish(self, task: Task) -> None:
        for trainer in self.trainers.values():
            if self.job.settings.model == "own":  # it has the weights afterwards
                trainer.finish(task)

    def _answers(self, task: Task, names: Sequence[str]) -> Iterator[Answer]:
        return _each(self.workers, partial(_answer, task), [self.trainers[name] for name in names])


def _each(workers: Workers, work: Callable[[Trainer], R], trainers: Sequence[Trainer]) -> Iterator[R]:
    """`work` of each in order; with several workers on all of them, where the model is not of this process alone."""
    if workers.count == 1 or not trainers or trainers[0].model is not None:
        return map(work, trainers)
    chunks = (
        [replace(one, pending={}) for one in trainers[start : start + CHUNK]]
        for start in range(0, len(trainers), CHUNK)
    )
    return chain.from_iterable(workers.map(partial(_chunk, work), chunks))


def _chunk(work: Callable[[Trainer], R], trainers: Sequence[Trainer]) -> list[R]:
    return [work(one) for one in trainers]


def _answer(task: Task, trainer: Trainer) -> Answer:
    start = time.perf_counter()
    try:
        message = trainer.answer(task)
    except LocalError as error:
        reason = f"it could not train: {error}"
        return Answer(np.empty(0), {}, DECLINED, None, time.perf_counter() - start, reason)
    level = trainer.level(message)
    return Answer(message, trainer.pending, level, trainer.packed, time.perf_counter() - start)


def _score(task: Task, trainer: Trainer) -> Score:
    return trainer.score(task)
