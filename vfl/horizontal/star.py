"""The clients behind their channels: who is asked, who is late, gone or back, and the two ways to add up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from parties.channel import Channel
from parties.errors import ColonnadeError, PeerAborted, PeerLost, ProtocolViolation, Refused, blame
from parties.identity import PublicIdentity
from vfl.horizontal.attempt import Owed, settle
from vfl.horizontal.client import Admitted
from vfl.horizontal.compression import unpacked
from vfl.horizontal.context import Company
from vfl.horizontal.messages import Step
from vfl.horizontal.models import Score
from vfl.horizontal.round_messages import (
    LEVELS,
    NOT_FINITE,
    REASONS,
    TOO_LARGE,
    Admission,
    Packed,
    Ready,
    ReadyWithShares,
    Scores,
    Table,
    Task,
    Turn,
    TurnWithShares,
    Update,
)
from vfl.horizontal.rounds import Collected, combine, diverged
from vfl.horizontal.secure_aggregation import Ahead, Begun, Course, aggregate
from vfl.horizontal.settings import TAIL, Job, Schema, parse_table

S = TypeVar("S", bound=Step)
LOOK = 0.01  # seconds for a client that may not have answered yet, while others may have
Rejoined = Callable[[], Mapping[str, Channel]]


@dataclass(eq=False)
class Star:
    """The clients behind their channels. owed: which message of a late one is still to come; gone: who left, why;
    barred: who broke the protocol, and may not come back; counted: the last round that has a client's numbers."""

    job: Job
    channels: dict[str, Channel]
    identities: Mapping[str, PublicIdentity]
    session: bytes
    me: str
    tick: Callable[[], None] = lambda: None
    tables: Mapping[str, Schema] = field(default_factory=dict)
    rejoined: Rejoined | None = None
    owed: Owed = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    barred: set[str] = field(default_factory=set)
    counted: dict[str, int] = field(default_factory=dict)
    task: Task = field(default_factory=lambda: Task(0, 0, "rows", 1, 0, np.empty(0)))
    asked: Sequence[str] = ()
    codes: dict[str, int] = field(default_factory=dict)  # what each one's Ready said
    ahead: Ahead | None = None  # the keys of those who signed the former sum
    begun: Begun | None = None  # what they have dealt with these for this one
    unheard: Sequence[str] = ()  # survivors that have not heard that the sum is opened
    waiting: list[str] = field(default_factory=list)  # for their turn
    missing: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    needed: int = 1

    def admit(self, name: str, number: int) -> None:
        """Tell a client its place, and that round `number` comes next."""
        place, counted = list(self.channels).index(name), self.counted.get(name, -1)
        admitted = Admitted(self.job.schema, self.job.clients, place, number, counted)
        self.channels[name].send(Admission(np.frombuffer(msgspec.json.encode(admitted), np.uint8)))

    def collect(self, task: Task, names: Sequence[str]) -> Collected:
        """One sum. Raises PeerLost below the quorum, LocalError where the numbers of all who answer diverge."""
        settings, began = self.job.settings, time.monotonic()
        self.task, self.asked, self.needed = task, names, self.job.needed(task.stage, len(self.identities))
        if task.stage == "train" and settings.clients.rate < 1 and any(map(self._free, self.channels)):
            self.needed = 0  # that nobody was drawn, or came of those, is as good: the sum's divisor is fixed
        self.codes, self.waiting, self.missing, self.seconds, self.unheard = {}, [], {}, {}, ()
        self._settle(names, began + settings.clients.deadline)
        self._enough(present := self._present(names))
        ahead, self.ahead, self.begun = self.ahead, None, None
        if ahead is not None and ahead.offers.keys() == set(present):
            company = self._company(0, tuple(ahead.offers), ahead.former)
            self.begun = Begun(company, tuple(ahead.offers.values()))
            self.task = replace(task, again=True)
        until = time.monotonic() + settings.clients.deadline
        self._ask(names, until)
        if self.codes and set(self.codes.values()) <= {NOT_FINITE, TOO_LARGE}:
            raise diverged(task.round)
        if settings.secure:
            total, survivors, attempt = self._add_masked(until)
            parts, size = None, 8 * len(total) * len(survivors)
        else:
            parts, size = self._add_open(until)
            total = combine(self.job, parts) if task.stage == "train" else np.asarray(sum(parts.values()))
            survivors, attempt = tuple(parts), 0
        missing = {name: reason for name, reason in self.missing.items() if name not in survivors}
        return Collected(total, survivors, missing, parts, size, attempt + 1, self.seconds)

    def confirm(self, collected: Collected) -> None:
        if self.task.stage == "train":
            self.counted |= dict.fromkeys(collected.survivors, self.task.round)
        for name in self.waiting:
            if name not in collected.survivors:
                self._turn(name, "left out")
            elif not self.job.settings.secure or name in self.unheard:  # who has unmasked the sum knows
                self._turn(name, "kept")
        self.waiting = []

    def scores(self, task: Task) -> dict[str, Score]:
        self.task, self.missing = task, {}
        self._settle((), 0.0)
        asked = self._tell(list(self.channels), task)
        until = time.monotonic() + self.job.settings.clients.deadline
        return {name: one.score for name, one in self._gather(asked, Scores, until)}

    def finish(self, task: Task) -> None:
        self.task = task
        self._settle((), 0.0)
        told = self._tell(list(self.channels), task)
        self.gone |= {name: self.missing[name] for name in self.channels if name not in told}  # it has no model

    # ---- who takes part

    def _ask(self, names: Sequence[str], until: float) -> None:
        """Give the task to these; who is ready before the deadline waits for its turn."""
        began = time.monotonic()
        for name, ready in self._gather(self._tell(names, self.task), Ready, until):
            self.seconds[name] = time.monotonic() - began
            try:
                with blame(name):
                    self._note(name, ready)
            except ProtocolViolation as error:
                self._leave(name, error)
        self.waiting = [name for name in self.channels if self.codes.get(name, NOT_FINITE) < len(LEVELS)]

    def _note(self, name: str, ready: Ready) -> None:
        """Raises ValueError: without shares where they are due, or with them where they are not."""
        if ready.code >= len(LEVELS):
            self.missing[name] = REASONS[ready.code]
            self._turn(name, "left out")
        elif isinstance(ready, ReadyWithShares) != (self.begun is not None):
            raise ValueError("shares where none are due, or none where they are")
        elif self.begun is not None and isinstance(ready, ReadyWithShares):
            self.begun.take(name, ready.shares)
        self.codes[name] = ready.code

    def _settle(self, names: Sequence[str], until: float) -> None:
        """Before a task: late and killed clients come back, before the deadline if too few are there without them."""
        while True:
            self._take_back()
            self._drop_late()
            left = [name for name in names if self._free(name)]
            if not self._wait(len(left), until, any(name in self.owed or self._may_return(name) for name in names)):
                return

    def _roll(self, until: float, have: Sequence[str] = ()) -> list[str]:
        """Who adds up now, besides those that we have; who was killed and comes back is asked once more.

        Raises PeerLost where they are too few by the deadline.
        """
        while True:
            back = [name for name in self._take_back() if name in self.asked and name not in have]
            if back:
                self._ask(back, until)
            self._drop_late()
            roll = [name for name in self.waiting if name not in have and self._free(name)]
            late = any(name in self.owed for name in self.waiting) or any(map(self._may_return, self.asked))
            if not self._wait(len(roll) + len(have), until, late):
                self._enough([*roll, *have])
                return roll

    def _drop_late(self) -> None:
        for name, error in settle(self.channels, self.owed).items():
            self._leave(name, error)

    def _wait(self, left: int, until: float, late: bool) -> bool:
        """Whether to look again, a moment later."""
        if left >= self.needed or not late or time.monotonic() > until:
            return False
        self.tick()
        time.sleep(0.02)
        return True

    def _free(self, name: str) -> bool:
        return name not in self.owed and name not in self.gone

    def _present(self, names: Sequence[str]) -> list[str]:
        """Those whom we can talk to; of the others it is noted why not."""
        for name in names:
            if not self._free(name):
                self.missing[name] = self.gone.get(name, "its answer to an earlier round is still to come")
        return [name for name in names if self._free(name)]

    def _may_return(self, name: str) -> bool:
        return self.rejoined is not None and name not in self.barred and not self._free(name)

    def _take_back(self) -> list[str]:
        """Clients that were killed and are back, each over a new channel; they owe nothing and wait for no turn."""
        back = []
        for name, channel in (self.rejoined() if self.rejoined is not None else {}).items():
            try:
                if name not in self.tables or name in self.barred:
                    raise Refused(f"{name} has no place to come back to", peer=name)
                with blame(name):
                    table = parse_table(channel.receive(Table, self.job.settings.clients.deadline))
                if table != self.tables[name]:
                    raise Refused(f"{name} came back with another table", peer=name)
                self.channels[name] = channel
                self.admit(name, self.task.round)
            except (Refused, PeerLost, PeerAborted, ProtocolViolation) as error:
                channel.abort(error.reason if isinstance(error, PeerAborted) else error.kind)
                self.missing[name] = self.gone[name] = str(error)
                if isinstance(error, ProtocolViolation):
                    self.barred.add(name)
                continue
            self.owed.pop(name, None)
            self.gone.pop(name, None)
            self._out(name)
            back.append(name)
        if back:  # they know no keys
            self.task, self.ahead, self.begun = replace(self.task, again=False), None, None
        return back

    def _out(self, name: str) -> None:
        """It waits for no turn of this sum any more."""
        self.codes.pop(name, None)
        self.waiting = [other for other in self.waiting if other != name]

    # ---- the two ways to add up

    def _bound(self, roll: Sequence[str]) -> float:
        if self.job.settings.private:
            return self.job.noise_bound
        return LEVELS[max((self.codes[name] for name in roll), default=0)]

    def _add_open(self, until: float) -> tuple[dict[str, NDArray[np.float64]], int]:
        """Each client's numbers, and the bytes that they took."""
        clients, packed = self.job.settings.clients, self.job.settings.compression and self.task.stage == "train"
        parts: dict[str, NDArray[np.float64]] = {}
        size = 0
        for attempt in range(clients.attempts):
            roll = self._roll(until, list(parts))
            for name in roll:
                self._say(name, Turn.of(self.task.number, attempt, "add", self._bound(roll)))
            until = time.monotonic() + clients.deadline
            for name, message in self._gather(roll, Packed if packed else Update, until):
                try:
                    with blame(name):
                        parts[name] = self._numbers(message)
                except ProtocolViolation as error:
                    self._leave(name, error)
                else:
                    size += message.data.nbytes
            if len(parts) >= self.needed:
                break
        self.waiting = [name for name in self.waiting if name in parts]
        self._enough(list(parts))
        return {name: parts[name] for name in self.waiting}, size

    def _numbers(self, message: Step) -> NDArray[np.float64]:
        """Raises ValueError: of another length than is due."""
        length, numbers = self.job.length(self.task.stage, self.task.round), message.data
        if isinstance(message, Packed):
            numbers = unpacked(self.job.settings.compression, numbers, length, TAIL + 1)
        if len(numbers) != length:
            raise ValueError(f"{len(numbers)} numbers where {length} are due")
        return numbers

    def _add_masked(self, until: float) -> tuple[NDArray[np.float64], tuple[str, ...], int]:
        """The sum, over whom, and at which attempt."""
        clients, length = self.job.settings.clients, self.job.length(self.task.stage, self.task.round)
        for attempt in range(clients.attempts):
            roll = tuple(self._roll(until))
            begun, self.begun, course, bound = self.begun, None, Course(), self._bound(roll)
            company, number = self._company(attempt, roll), self.task.number
            if begun is not None and (begun.company.threshold > company.threshold or len(begun.sealed) > len(roll)):
                begun = None  # with fresh keys more may drop out, or nobody waits for who has dealt and is gone
            if begun is not None:
                company = begun.company
            plain = Turn.of(number, attempt, "add", bound, roll)  # the same to all
            for name in roll:
                shown = None if begun is None else begun.shown(name)
                self._say(name, plain if shown is None else TurnWithShares(number, attempt, shown, "add", bound))
            context, deadline = company.within(bound), clients.deadline
            try:
                done = aggregate(self.channels, self.identities, context, length, self.owed, deadline, course, begun)
            except (PeerLost, ProtocolViolation) as error:
                self._lose(course.lost)
                self.missing |= {error.peer: str(error)} if error.peer else {}
                if isinstance(error, ProtocolViolation) and error.peer:
                    self._leave(error.peer, error)
                if course.shown:
                    raise PeerLost(
                        f"round {self.task.round}: {error}; who has opened this sum opens no second one of the round: "
                        "run again with --resume"
                    ) from None
                last, until = error, time.monotonic() + clients.deadline
                continue
            self._lose(course.lost)
            self.unheard, self.ahead = course.unheard, done.ahead
            return done.total, done.survivors, attempt
        raise PeerLost(f"round {self.task.round}: {clients.attempts} attempts failed, the last one so: {last}")

    def _company(self, attempt: int, names: tuple[str, ...], former: bytes = b"") -> Company:
        own = self.me in names
        return self.job.company(self.session, self.task, attempt, names, len(self.identities), own, former)

    def _lose(self, lost: Mapping[str, ColonnadeError]) -> None:
        """Whom an attempt was made without."""
        for name, error in lost.items():
            self.missing[name] = str(error)
            if not isinstance(error, PeerLost):
                self.gone[name] = str(error)
            if isinstance(error, ProtocolViolation):
                self.barred.add(name)

    # ---- talking

    def _tell(self, names: Sequence[str], message: Task) -> list[str]:
        """One message to all who can take it: their names."""
        told = []
        for name in self._present(names):
            try:
                self.channels[name].send(message)
                told.append(name)
            except (PeerLost, PeerAborted) as error:
                self._leave(name, error)
        return told

    def _turn(self, name: str, what: str) -> None:
        self._say(name, Turn.of(self.task.number, 0, what))

    def _say(self, name: str, turn: Turn) -> None:
        """Tell a client how it goes on; who is gone shows when its answer is read."""
        with suppress(PeerLost, PeerAborted):
            self.channels[name].send(turn)

    def _gather(self, names: Sequence[str], expected: type[S], until: float) -> Iterator[tuple[str, S]]:
        """Each client's message, while it comes before the common deadline; the others are out of the sum. In the order
        of arrival where their speed is measured, else as named."""
        waiting = list(names)
        by_arrival = expected is Ready and self.job.settings.clients.selection == "speed"
        while waiting:
            name = waiting.pop(0)
            self.tick()
            left = max(0.0, until - time.monotonic())
            patience = min(left, LOOK) if by_arrival and waiting else left
            try:
                with blame(name):
                    message = self.channels[name].receive(expected, patience)
                    if message.round != self.task.number:
                        raise ValueError(f"{expected.__name__} of another sum")
            except PeerLost as error:
                if patience < left:
                    waiting.append(name)
                    time.sleep(LOOK / 10)  # a lost one answers at once
                    continue
                self.missing[name], self.owed[name] = str(error), expected
                if expected is not Scores:
                    self._turn(name, "left out")
                    self._out(name)
            except (PeerAborted, ProtocolViolation) as error:
                self._leave(name, error)
            else:
                yield name, message

    def _leave(self, name: str, error: ColonnadeError) -> None:
        """It is out for the rest of the session, unless it comes back over another channel."""
        self.missing[name] = self.gone[name] = str(error)
        if isinstance(error, ProtocolViolation):
            self.barred.add(name)
            self.channels[name].abort(error.kind)

    def _enough(self, left: Sequence[str]) -> None:
        if len(left) >= self.needed:
            return
        for name in self.waiting:
            self._turn(name, "left out")
            if name in self.owed:
                self.missing.setdefault(name, f"its {self.owed[name].__name__} did not come")
        missing = "; ".join(f"{name}: {reason}" for name, reason in self.missing.items()) or "nobody answered"
        stand = f"{len(left)} clients are left, {self.needed} are needed"
        raise PeerLost(f"round {self.task.round}, {self.task.stage}: {stand}; missing: {missing}")
