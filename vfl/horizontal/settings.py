"""What follows from the agreement's settings, the same for all: model, solver, noise, who is asked."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import msgspec
import numpy as np

from parties.errors import LocalError, Refused
from parties.horizontal import MOST_CATEGORIES, Horizontal, Words
from vfl.horizontal.accounting import noise_multiplier, sampled
from vfl.horizontal.categories import encoder, expanded, union
from vfl.horizontal.context import Company
from vfl.horizontal.local import Objective, Plan
from vfl.horizontal.newton import Exact, scaler
from vfl.horizontal.privacy import GaussianMechanism
from vfl.horizontal.privacy_budget import PrivacyBudget
from vfl.horizontal.round_messages import Table, Task
from vfl.horizontal.strategies import Part, Strategy, kept, strategy
from vfl.losses import Matrix, Vector

PRECISION = 20  # bits of the grid below the noise: what it adds to the noise is nothing
TAIL = 4  # numbers at the end of a training message: rows and loss * rows, rows and accuracy * rows


def made_up_names(width: int) -> tuple[str, ...]:
    """Of columns without names."""
    return tuple(f"x{place}" for place in range(width))


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a client's table looks like: no number in it depends on a row, but `rows` where clients are chosen by them.

    categories: declared, by column. classes: of the labels, declared or those that occur; size: of the weights that
    travel (own models only). short: what the agreed minimum lacks.
    """

    model: Literal["logistic", "linear", "poisson", "own"]
    columns: tuple[str, ...] = ()
    dtypes: dict[str, str] = {}
    units: dict[str, str] = {}
    categories: dict[str, Words] = {}
    classes: tuple[int | float | str | bool, ...] = ()
    declared: bool = False
    size: int = 0
    rows: int = 0
    short: Literal["", "rows", "classes"] = ""

    def difference(self, other: Schema) -> str:
        """The first one that matters, as one line; empty where there is none."""
        if self.model != other.model or self.size != other.size:
            return f"a {other.model} of {other.size} weights instead of a {self.model} of {self.size}"
        for column in self.columns:
            if column not in other.columns:
                return f"no column {column!r}"
        for column in other.columns:
            if column not in self.columns:
                return f"a column {column!r} more"
        if self.columns != other.columns:
            return f"the columns in another order, from {_first(self.columns, other.columns)!r} on"
        for column in sorted(self.categories.keys() ^ other.categories.keys()):
            return f"{'numbers' if column in self.categories else 'categories'} in column {column!r}"
        for column, declared in other.categories.items():
            if beyond := len({*declared} - {*self.categories[column]}):
                return f"{beyond} categories of column {column!r} that are not declared"
        for what, mine, theirs in (("dtype", self.dtypes, other.dtypes), ("unit", self.units, other.units)):
            for column in sorted(mine.keys() | theirs.keys()):
                if mine.get(column) != theirs.get(column):
                    return f"{what} {theirs.get(column)!r} of column {column!r} instead of {mine.get(column)!r}"
        if other.declared and self.classes != other.classes:
            return f"{len(other.classes)} declared classes that are not the same {len(self.classes)}"
        return ""


def _first(mine: Sequence[str], theirs: Sequence[str]) -> str:
    return next(a for a, b in zip(mine, theirs, strict=True) if a != b)


def parse_table(message: Table) -> Schema:
    """Raises ValueError."""
    try:
        return msgspec.json.decode(message.data.tobytes(), type=Schema)
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("the description of its table does not parse") from None


def reference(settings: Horizontal, tables: Mapping[str, Schema]) -> Schema:
    """What all must look like: the first table's columns, the union of the declared categories, the agreed, declared or
    all occurring classes.

    Raises Refused: the labels are of several types, there are fewer than two classes to tell apart, or too many
    categories.
    """
    first = next(iter(tables.values()))
    classes: tuple[Any, ...] = tuple(sorted(settings.classes)) or next(
        (one.classes for one in tables.values() if one.declared), ()
    )
    if not classes and settings.model == "logistic":
        occurring: set[Any] = {value for one in tables.values() for value in one.classes}
        if len({type(value) for value in occurring}) > 1:
            raise Refused("the clients' labels are of several types; agree on the classes")
        classes = tuple(sorted(occurring))
    if settings.model == "logistic" and len(classes) < 2:
        raise Refused("all clients together have fewer than two classes; there is nothing to tell apart")
    found = union(one.categories for one in tables.values())
    categories = {column: found[column] for column in first.categories}
    for column, words in categories.items():
        if len(words) > MOST_CATEGORIES:
            raise Refused(
                f"column {column!r}: all clients together declare {len(words)} categories, and a column has at most "
                f"{MOST_CATEGORIES}; leave it out, or merge some"
            )
    return msgspec.structs.replace(
        first, categories=categories, classes=classes, declared=bool(classes), rows=0, short=""
    )


def refuse_differences(tables: Mapping[str, Schema], wanted: Schema) -> None:
    """Raises Refused: a client's table differs, or has less than the agreed minimum; names it and the difference."""
    for name, table in tables.items():
        if difference := wanted.difference(table):
            raise Refused(f"{name} has {difference}, as {next(iter(tables))} has; align the tables", peer=name)
        if table.short:
            raise Refused(f"{name} has fewer {table.short} than the agreed minimum; leave it out", peer=name)


@lru_cache(maxsize=2)  # a client asks twice, and a task may have millions of numbers
def _subject(job: bytes, task: Task) -> bytes:
    plain = msgspec.json.encode([task.number, task.round, task.stage, task.clients, task.rows])
    return hashlib.sha256(job + plain + task.data.tobytes()).digest()


@dataclass(frozen=True)
class Job:
    """The settings over tables that look like `schema`, for so many clients."""

    settings: Horizontal
    schema: Schema
    clients: int

    @cached_property
    def digest(self) -> bytes:
        plain = msgspec.json.encode(
            [self.settings, self.schema, self.clients], order="sorted", enc_hook=np.generic.item
        )
        return hashlib.sha256(b"colonnade/horizontal/1" + plain).digest()

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """As the model sees them: one for each category."""
        return expanded(self.schema.columns, self.schema.categories)

    @property
    def features(self) -> int:
        return len(self.columns)

    @cached_property
    def exact(self) -> Exact:
        """The linear model with scikit-learn's parameters, whichever strategy trains it."""
        s = self.settings
        classes = self.schema.classes if s.model == "logistic" else ()
        return Exact(s.model, self.features, classes, s.C, s.alpha, s.fit_intercept, s.rounds)

    def objective(self, rows: int) -> Objective:
        """The same loss as a mean over so many rows in all, with its penalty."""
        s, plain = self.settings, self.exact.objective
        penalty = {"logistic": 1 / (s.C * rows), "linear": s.alpha / rows, "poisson": s.alpha}[s.model]
        return Objective(plain.loss, plain.features, plain.outputs, penalty, s.fit_intercept)

    @cached_property
    def strategy(self) -> Strategy:
        return strategy(self.settings.strategy, self.settings.parameters)

    @property
    def plan(self) -> Plan:
        return self.strategy.plan(Plan(self.settings.epochs, self.settings.batch, self.settings.rate))

    @property
    def size(self) -> int:
        """Weights that the server has."""
        return self.schema.size if self.settings.model == "own" else self.exact.objective.size

    def part(self, number: int, shared: Any = None) -> Part:
        """The coordinates that round `number` trains; `shared` (size,), at a client with a personal part."""
        whole = Part.whole(self.size if shared is None else len(shared))
        if shared is not None:
            return Part(shared, whole.kept)
        if self.settings.keep == 1:
            return whole
        groups = self.exact.objective.columns
        return Part(whole.shared, kept(groups, self.settings.keep, (self.settings.seed, number)))

    def length(self, stage: str, number: int) -> int:
        """Numbers in a client's message."""
        if stage == "rows":
            return 1
        if stage in ("means", "scales"):
            return 2 * self.features + 1
        if self.settings.strategy == "exact":
            return self.exact.length + TAIL
        travels = self.strategy.vectors * int(np.count_nonzero(self.part(number).travels))
        return travels if self.settings.private else travels + 1 + TAIL

    def told(self, stage: str, number: int) -> int:
        """Numbers that a task brings."""
        if stage in ("rows", "means"):
            return 0
        if stage == "scales":
            return self.features
        scaler = 2 * self.features if self.settings.standardise else 0
        if stage == "train" and self.settings.strategy != "exact":
            return scaler + self.strategy.vectors * int(np.count_nonzero(self.part(number).travels))
        return scaler + self.size

    def often(self, stage: str) -> int:
        """So many tasks of a stage a session has at the most: what a loss, a row count or a sum of columns tells, it
        tells at every weight that the coordinator likes."""
        s = self.settings
        open_ones = {"rows": 1, "score": 2 + (self.clients if s.leave_one_out else 0)}
        return (
            {"train": s.rounds, "finish": 1}
            | ({} if s.private else open_ones)
            | ({"means": 1, "scales": 1} if s.standardise else {})
        ).get(stage, 0)

    def needed(self, stage: str, roll: int) -> int:
        """So many clients a sum has at least, when so many signed the session. Whom the coordinator then admits, or
        asks, makes it no smaller."""
        return self.settings.needed(self.settings.clients.asked(roll) if stage == "train" else roll)

    def company(
        self,
        session: bytes,
        task: Task,
        attempt: int,
        names: tuple[str, ...],
        roll: int,
        own: bool,
        former: bytes = b"",
    ) -> Company:
        """Who adds up in a secure sum, and on what terms: coordinator and clients work that out each by itself.

        roll: how many signed the session; own: the coordinator is among the names. Raises as `Company` does.
        """
        s = self.settings
        asked = s.clients.asked(roll) if task.stage == "train" else roll
        degree = s.degree if s.degree < len(names) - 1 else 0
        threshold = s.threshold(asked, len(names), own)
        return Company(session, task.number, attempt, names, threshold, degree or None, self.subject(task), former)

    def subject(self, task: Task) -> bytes:
        """What a task asks, 32 bytes."""
        return _subject(self.digest, task)

    @property
    def asked(self) -> int:
        return self.settings.clients.asked(self.clients)

    @property
    def leaves_out(self) -> bool:
        """Whether a round may do without a client that is there; one drawn by itself may be missed at any number."""
        return self.asked < self.clients or self.settings.clients.rate < 1

    @cached_property
    def mechanism(self) -> GaussianMechanism:
        """The noise of one round, so that all rounds and the allowed repeats cost the agreed epsilon."""
        privacy = self.settings.privacy
        multiplier = noise_multiplier(
            privacy.epsilon, privacy.delta, self.settings.releases, self.settings.clients.rate
        )
        contributors = 1
        if privacy.noise == "distributed":  # each client knows its own share: the others' hide it from that one
            contributors = max(self.settings.needed(self.asked) - 1, 1)
        noise = privacy.clip * multiplier / math.sqrt(contributors)
        bits = min(max(PRECISION - math.frexp(noise)[1], 0), 52)
        return GaussianMechanism(privacy.clip, multiplier, self.size, bits, contributors)

    @property
    def noise_bound(self) -> float:
        """What no number of a noised message exceeds."""
        largest = self.mechanism.largest
        if self.settings.privacy.level == "record":
            largest += math.ceil(self.settings.privacy.rows * self.mechanism.sensitivity)
        return math.ldexp(largest, -self.mechanism.fraction_bits)

    def noised(self, numbers: Vector) -> Vector:
        """Numbers of the grid with one contributor's noise, fresh each time."""
        bits = self.mechanism.fraction_bits
        ints = np.rint(np.ldexp(numbers, bits)).astype(np.int64)
        return np.ldexp(self.mechanism.add_noise(ints).astype(np.float64), -bits)

    def scaler(self, means: Vector, variances: Vector, rows: int) -> Any:
        """scikit-learn's fitted StandardScaler."""
        return scaler(means, np.concatenate([[rows], np.zeros(self.features), variances * rows]))

    def estimator(self, weights: Vector, rounds: int, scaling: tuple[Vector, Vector] | None, rows: int) -> Any:
        """A plain fitted scikit-learn estimator, in a pipeline behind encoder and scaler where there are such; None for
        own."""
        if self.settings.model == "own":
            return None
        columns, categories = self.schema.columns, self.schema.categories
        steps = [encoder(columns, categories)] if categories else []
        if scaling is not None:
            steps.append(self.scaler(*scaling, rows))
        fitted = self.exact.estimator({"weights": weights, "rounds": np.array([float(rounds)])})
        if not categories and columns != made_up_names(self.features):
            (steps[0] if steps else fitted).feature_names_in_ = np.asarray(columns, object)
        if not steps:
            return fitted
        from sklearn.pipeline import make_pipeline

        return make_pipeline(*steps, fitted)

    def choose(self, number: int, rows: Sequence[int], seconds: Sequence[float]) -> list[int]:
        """Whom round `number` asks: positions, ascending. rows, seconds: of each client, where they count."""
        if self.settings.clients.selection == "poisson":
            return [
                i
                for i in range(self.clients)
                if secrets.randbelow(1 << 53) < self.settings.clients.fraction * (1 << 53)
            ]
        if self.asked == self.clients:
            return list(range(self.clients))
        if self.settings.clients.selection == "speed":
            return sorted(sorted(range(self.clients), key=lambda i: (seconds[i], i))[: self.asked])
        chances = None
        if self.settings.clients.selection == "rows":
            weights = np.asarray(rows, np.float64)
            if np.count_nonzero(weights) < self.asked:
                raise LocalError(f"fewer than {self.asked} clients have rows; choose clients at random")
            chances = weights / weights.sum()
        generator = np.random.default_rng((self.settings.seed, number))
        return sorted(generator.choice(self.clients, self.asked, replace=False, p=chances).tolist())

    def standardised(self, x: Matrix, prefix: Vector, rows: int) -> Matrix:
        """x as the model sees it, with the means and variances that a task brings."""
        if not self.settings.standardise:
            return x
        means, variances = np.split(prefix, 2)
        return np.asarray(self.scaler(means, variances, rows).transform(x), np.float64)


@dataclass(eq=False)
class Spending:
    """The privacy that a role's noise pays for: charged before every release, repeats included.

    Where clients are drawn in secret, all releases together are charged before the first: their cost is no sum. Such a
    job is not resumed, its budget is spent.
    """

    job: Job
    budget: PrivacyBudget | None = None
    purpose: str = "training"
    releases: int = 0

    def charge(self, number: int) -> None:
        """One release, in round `number`. Raises Refused when the agreed epsilon does not allow it."""
        settings, privacy = self.job.settings, self.job.settings.privacy
        first = not self.releases
        self.releases = max(self.releases, number) + 1
        if self.releases > settings.releases:
            raise Refused(
                f"round {number}: epsilon {privacy.epsilon:g} pays for {settings.rounds} rounds and {privacy.repeats} "
                "repeats, and they are used up; agree on more repeats or a larger epsilon"
            )
        cost, paid = self.job.mechanism.cost, 1
        if settings.clients.rate < 1:
            if not first:
                return
            paid = settings.releases
            cost = sampled(cost, paid, settings.clients.rate, privacy.delta)
        if self.budget is not None:
            name, limit = self.job.digest.hex()[:16], {"epsilon": privacy.epsilon, "delta": privacy.delta}
            self.budget.charge(self.purpose, name, cost, **limit, releases=paid)
