"""A client's part of a round, without a channel: from a task to the numbers that the sum needs, and its memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from parties.errors import LocalError
from parties.horizontal import Horizontal
from vfl.horizontal.categories import Categories, encode
from vfl.horizontal.compression import compress, compressor
from vfl.horizontal.layout import require_agreed, shared, with_shared
from vfl.horizontal.local import LOSSES, Correction, Plan, Trained
from vfl.horizontal.models import LinearModel, Model, Score, require_compatible
from vfl.horizontal.newton import column_sums
from vfl.horizontal.privacy import clip
from vfl.horizontal.round_messages import LEVELS, NOT_FINITE, TOO_LARGE, Task
from vfl.horizontal.settings import Job, Schema
from vfl.horizontal.strategies import Population, State, client_round, strategy
from vfl.own_code import blamed_on


@dataclass(frozen=True, eq=False)
class Data:
    """A client's rows: x (n, d) float64, y (n,) labels, numbers or counts, the columns' names (d,).

    classes: the labels that may occur, if declared. units, dtypes: as declared, by column; all clients' must agree.
    categories: as declared, by column; x has positions in that list there.
    Raises LocalError: shapes that do not fit, or values that are not finite, counted.
    """

    x: NDArray[np.float64]
    y: NDArray[Any]
    names: tuple[str, ...]
    classes: tuple[Any, ...] = ()
    units: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    categories: Categories = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.shape != self.x.shape[:1] or len(self.names) != self.x.shape[1]:
            raise LocalError(f"{self.x.shape} numbers, {self.y.shape} targets and {len(self.names)} names do not fit")
        if broken := int(np.count_nonzero(~np.isfinite(self.x))):
            raise LocalError(f"{broken} of {self.x.size} values are NaN or infinite; fill or drop them")

    def rows(self, some: NDArray[Any]) -> Data:
        """Only these rows."""
        return replace(self, x=self.x[some], y=self.y[some])


def describe(settings: Horizontal, data: Data | None, model: Model | None) -> Schema:
    """What a client says of its table before training. Raises LocalError when there is nothing to train on."""
    if settings.model == "own":
        if model is None:
            raise LocalError("the agreement trains own models, and none was given")
        require_compatible(strategy(settings.strategy, settings.parameters), model)
        require_agreed(settings, model)
        return Schema(
            model="own",
            size=int(np.count_nonzero(shared(settings, model))),
            columns=data.names if data else (),
            units=dict(data.units) if data else {},
            rows=_told(settings, model.rows),
            short="rows" if data and len(data.y) < settings.clients.minimum_rows else "",
        )
    if data is None:
        raise LocalError("no table was given to train on")
    occurring: tuple[Any, ...] = ()
    short: Literal["", "rows", "classes"] = "" if len(data.y) >= settings.clients.minimum_rows else "rows"
    if settings.model == "logistic":
        occurring = tuple(np.unique(data.y).tolist())
        if not short and len(occurring) < settings.clients.minimum_classes:
            short = "classes"
    return Schema(
        model=settings.model,
        columns=data.names,
        dtypes=dict(data.dtypes),
        units=dict(data.units),
        categories={name: tuple(values) for name, values in data.categories.items()},
        classes=tuple(sorted(settings.classes or data.classes or occurring)),
        declared=bool(settings.classes or data.classes),
        rows=_told(settings, len(data.y)),
        short=short,
    )


def _told(settings: Horizontal, rows: int) -> int:
    return rows if settings.clients.selection == "rows" else 0


@dataclass(frozen=True, eq=False)
class _Prepared:
    """To train and to judge; x and y as the training sees them, of the linear families."""

    model: Any
    judge: Model
    x: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    y: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))


@dataclass(eq=False)
class Trainer:
    """One client. state: what it keeps between rounds: the strategy's, the compression's memory, its own weights."""

    job: Job
    number: int  # its place among the clients, for seeds
    data: Data | None = None
    model: Model | None = None
    state: State = field(default_factory=dict)
    pending: State = field(default_factory=dict)
    packed: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        self._prepared: tuple[bytes, _Prepared] | None = None
        if self.data is None:
            return
        self._y = self.job.exact.targets(self.data.y) if self.job.settings.model != "own" else self.data.y
        self._x = encode(self.data.x, self.data.names, self.data.categories, self.job.schema.categories)
        held_out = np.random.default_rng((self.job.settings.seed, self.number, 1)).permutation(len(self._y))
        cut = round(self.job.settings.test_fraction * len(held_out))
        self._train, self._test = np.sort(held_out[cut:]), np.sort(held_out[:cut] if cut else held_out)

    @property
    def rows(self) -> int:
        """On which it trains."""
        if self.job.settings.model == "own":
            return self.model.rows if self.model else 0
        return len(self._train)

    def answer(self, task: Task) -> NDArray[np.float64]:
        """What the sum needs, (job.length(stage, round),). Raises LocalError when it cannot be made."""
        with np.errstate(over="ignore", invalid="ignore"), self._guarded():  # a rate that diverges: seen by its numbers
            return self._answer(task)

    def _answer(self, task: Task) -> NDArray[np.float64]:
        if task.stage == "rows":
            return np.array([float(self.rows)])
        if task.stage in ("means", "scales"):
            if self.data is None:
                raise LocalError("no table was given to standardise")
            return column_sums(self._x[self._train], task.data if task.stage == "scales" else None)
        prefix, received = self._split(task)
        ours = self._prepare(task, prefix)
        settings = self.job.settings
        if settings.strategy == "exact":
            sums = self.job.exact.contribution(received, ours.x, ours.y)
            return np.concatenate([sums, self._tail(ours.judge, received)])
        if settings.privacy.level == "record":
            return self._summed_gradients(ours, received)
        return self._update(task, ours, received)

    def level(self, message: NDArray[np.float64]) -> int:
        """Which of the agreed bounds holds for a message, or why it has none: what Ready says."""
        if not np.isfinite(message).all():
            return NOT_FINITE
        largest = np.abs(message).max(initial=0.0)
        if self.job.settings.private:  # one bound, whatever the rows
            return 0 if largest <= self.job.noise_bound else TOO_LARGE
        return next((level for level, bound in enumerate(LEVELS) if largest <= bound), TOO_LARGE)

    def keep(self) -> None:
        """The sum has our last message: what followed from it counts."""
        self.state, self.pending = self.pending, {}

    def score(self, task: Task) -> Score:
        """The task's weights on our test rows."""
        prefix, received = self._split(task)
        judge = self._prepare(task, prefix).judge
        with self._guarded():
            judge.set(self._whole(judge, received))
            return judge.evaluate()

    def finish(self, task: Task) -> NDArray[np.float64]:
        """Our weights at the end, fine-tuned where that was agreed; an own model has them then."""
        prefix, received = self._split(task)
        model = self._prepare(task, prefix).model
        s = self.job.settings
        with self._guarded():
            model.set(self._whole(model, received))
            if s.fine_tune:
                model.fit_local(Plan(s.fine_tune, s.batch, s.rate), Correction(), (s.seed, s.rounds, self.number))
            weights: NDArray[np.float64] = model.get()
        return weights

    def estimator(self, task: Task, weights: NDArray[np.float64]) -> Any:
        """scikit-learn's fitted estimator with these weights; None for an own model."""
        prefix = self._split(task)[0]
        scaling = (prefix[: self.job.features], prefix[self.job.features :]) if len(prefix) else None
        return self.job.estimator(weights, task.round, scaling, task.rows)

    # ---- parts of it

    def _guarded(self) -> AbstractContextManager[None]:
        return blamed_on("our own model") if self.job.settings.model == "own" else nullcontext()

    def _split(self, task: Task) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        cut = 2 * self.job.features if self.job.settings.standardise else 0
        return task.data[:cut], task.data[cut:]

    def _prepare(self, task: Task, prefix: NDArray[np.float64]) -> _Prepared:
        if self.job.settings.model == "own":
            if self.model is None:
                raise LocalError("no model was given to train")
            return _Prepared(self.model, self.model)
        if self.data is None:
            raise LocalError("no table was given to train on")
        key = prefix.tobytes()
        if self._prepared is None or self._prepared[0] != key:
            x, objective = self.job.standardised(self._x, prefix, task.rows), self.job.objective(max(task.rows, 1))
            train, test = ((x[some], self._y[some]) for some in (self._train, self._test))
            model = LinearModel(objective, *train)
            judge = LinearModel(objective, *test) if self.job.settings.test_fraction else model
            self._prepared = key, _Prepared(model, judge, *train)
        return self._prepared[1]

    def _whole(self, model: Model, received: NDArray[np.float64]) -> NDArray[np.float64]:
        return with_shared(self.job.settings, model, self.state.get("own", model.get()), received)

    def _tail(self, judge: Model, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """How good the weights are that the round begins with."""
        judge.set(weights)
        score = judge.evaluate()
        known = [score.rows * (not np.isnan(value)) for value in (score.loss, score.accuracy)]
        values = [n * v if n else 0.0 for n, v in zip(known, (score.loss, score.accuracy), strict=True)]
        return np.array([known[0], values[0], known[1], values[1]], np.float64)

    def _update(self, task: Task, ours: _Prepared, received: NDArray[np.float64]) -> NDArray[np.float64]:
        s, job, model, private = self.job.settings, self.job, ours.model, self.job.settings.private
        travelling = shared(s, model) if s.personal else None
        part = job.part(task.round, travelling)
        own = self.state.get("own", model.get())
        state = {name: values for name, values in self.state.items() if name not in ("memory", "own")}
        state = state or job.strategy.client(len(own))
        population = Population(task.clients, max(task.rows, 1))

        def fit(start: NDArray[np.float64], correction: Correction) -> Trained:
            model.set(start)
            trained: Trained = model.fit_local(job.plan, correction, (s.seed, task.round, self.number))
            return trained

        tail = np.empty(0)
        if not private:
            weights = own.copy() if travelling is not None else np.zeros(job.size)
            travels = part.travels
            weights[travels] = received[: np.count_nonzero(travels)]
            tail = self._tail(ours.judge, weights)
        share = population.share(self.rows)
        message, state, trained = client_round(job.strategy, part, received, own, state, share, fit)
        self.pending = dict(state)
        if travelling is not None:
            self.pending["own"] = trained.weights.copy()
        if private:
            moved = message[:-1] / message[-1] if message[-1] else np.zeros(job.size)
            return np.ldexp(job.mechanism.contribution(moved).astype(np.float64), -job.mechanism.fraction_bits)
        if s.robust == "norm_bound":
            moved = message[:-1] / max(message[-1], 1.0)
            message[:-1] = clip(moved, s.norm_bound) * message[-1]
        if s.compression:
            memory = self.state.get("memory", np.zeros(len(message) - 1))
            generator = np.random.default_rng((s.seed, task.round, self.number, 2))
            data, self.pending["memory"] = compress(compressor(s.compression), message[:-1], memory, generator)
            self.packed = np.concatenate([np.append(message[-1:], tail).view(np.uint8), data])
        return np.concatenate([message, tail])

    def _summed_gradients(self, ours: _Prepared, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Minus the sum of our examples' gradients, each clipped; multiples of the grid's step."""
        objective, x, mechanism = ours.model.objective, ours.x, self.job.mechanism
        residuals = LOSSES[objective.loss].derivative(objective.scores(weights, x), ours.y)
        if objective.intercept:
            x = np.column_stack([x, np.ones(len(x))])
        sums = mechanism.sum_examples(x, residuals).reshape(x.shape[1], objective.outputs)
        flat = np.concatenate([sums[: objective.features].T.ravel(), sums[objective.features :].ravel()])
        return -np.ldexp(flat.astype(np.float64), -mechanism.fraction_bits)
