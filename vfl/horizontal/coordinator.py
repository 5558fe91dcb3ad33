"""The coordinator: it asks its clients and adds up. It holds no rows, unless it is a client too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from parties.channel import Channel
from parties.errors import ColonnadeError, PeerAborted, PeerLost, ProtocolViolation, blame
from parties.horizontal import Horizontal
from parties.identity import Identity, PublicIdentity
from parties.ledger import Ledger
from parties.memory import links
from parties.message import CLASSES
from vfl.horizontal.client import Admitted, take_part
from vfl.horizontal.compression import compressor
from vfl.horizontal.messages import Step
from vfl.horizontal.models import Model, Score
from vfl.horizontal.outcome import Outcome
from vfl.horizontal.privacy_budget import PrivacyBudget
from vfl.horizontal.round_messages import (
    LEVELS,
    NOT_FINITE,
    REASONS,
    TOO_LARGE,
    Admission,
    Packed,
    Ready,
    Scores,
    Table,
    Task,
    Turn,
    Update,
)
from vfl.horizontal.rounds import Collected, Leader, Progress, Server, checked, combine, diverged, lead, restore
from vfl.horizontal.secure_aggregation import Owed, aggregate, settle
from vfl.horizontal.settings import TAIL, Job, Schema, Spending, reference, refuse_differences
from vfl.horizontal.trainer import Data

S = TypeVar("S", bound=Step)
JOIN = 60.0  # seconds for our own client to end once it was told


def coordinate(
    channels: Mapping[str, Channel],
    me: Identity,
    identities: Mapping[str, PublicIdentity],
    session_id: bytes,
    settings: Horizontal,
    *,
    own: Data | None = None,
    model: Model | None = None,
    start: NDArray[np.float64] | None = None,
    tick: Callable[[], None] = lambda: None,
    progress: Progress = lambda phase, done, total: None,
    folder: Path | None = None,
    budget: PrivacyBudget | None = None,
    purpose: str = "training",
) -> Outcome:
    """Train with the clients behind `channels`, by name, in the agreed order.

    own, model: our rows or own model, where we are a client too, the first one. start: the first weights of an own
    model, (size,); others begin at zero. tick: called between two clients' messages. folder: for the checkpoint, from
    which training goes on. budget: charged for central noise.

    Reveals:
        To us: what every table looks like, which clients answer and how fast, every client's loss and accuracy before
        and after (not under privacy), and the sum of each round: its weights follow from it. With secure aggregation
        nothing else of an update but its largest number up to a power of 2^8, and that only above 2^24; without it,
        each client's update. With leave_one_out also how the others score without each client.
        To every client: the weights of each round, the number of clients and of rows in all, and who is in each sum.
    Raises:
        Refused: the number of clients or a table does not go with what was agreed; the text says which and how.
        PeerLost: a round has fewer clients than its quorum; the text names who is missing and why.
        LocalError: training diverges, with the round; no optimum exists; the checkpoint cannot be used.
    """
    with ExitStack() as stack:
        if own is not None or model is not None:
            ours = partial(take_part, data=own, model=model, budget=budget, purpose=purpose, folder=folder)
            channels = {
                me.name: stack.enter_context(_client_within(me, identities, session_id, settings, ours)),
                **channels,
            }
        checked(settings, len(channels), me.name in channels)
        tables, gone = _tables(me, channels, settings, len(identities))
        names, channels = tuple(tables), {name: channels[name] for name in tables}
        job = Job(settings, reference(settings, tables), len(names))
        star = Star(job, channels, identities, session_id, me.name, tick, gone=gone)
        leader = Leader(job, names, star, Server(job, start))
        if folder is not None and settings.checkpoint:
            restore(folder, leader)
        for place, (name, channel) in enumerate(channels.items()):
            counted = max((one.number for one in leader.history if name in one.clients), default=-1)
            admitted = Admitted(job.schema, len(names), place, leader.server.round, counted)
            channel.send(Admission(np.frombuffer(msgspec.json.encode(admitted), np.uint8)))
        refuse_differences(tables, job.schema)
        outcome = lead(
            leader,
            Spending(job, budget, purpose),
            rows=[table.rows for table in tables.values()],
            progress=progress,
            folder=folder if settings.checkpoint else None,
        )
    return replace(outcome, gone=tuple(star.gone))


def _tables(
    me: Identity, channels: Mapping[str, Channel], settings: Horizontal, roll: int
) -> tuple[dict[str, Schema], dict[str, str]]:
    """What the clients' tables look like that come within one deadline, and why the others' did not.

    Raises PeerLost: too few came; the text has all reasons. What our own client raises.
    """
    tables, gone = {}, {}
    until = time.monotonic() + settings.clients.deadline
    for name, channel in channels.items():
        try:
            with blame(name):
                tables[name] = _parse(channel.receive(Table, max(0.0, until - time.monotonic())).data)
        except (PeerLost, PeerAborted, ProtocolViolation) as error:
            if name == me.name:
                raise
            gone[name] = str(error)
            channel.abort(error.reason if isinstance(error, PeerAborted) else error.kind)
    if len(tables) < (needed := settings.needed(settings.clients.asked(roll))):
        missing = "; ".join(f"{name}: {reason}" for name, reason in gone.items())
        raise PeerLost(f"{len(tables)} clients showed their tables, {needed} are needed; missing: {missing}")
    return tables, gone


@contextmanager
def _client_within(
    me: Identity,
    identities: Mapping[str, PublicIdentity],
    session_id: bytes,
    settings: Horizontal,
    part: Callable[..., Outcome],
) -> Iterator[Channel]:
    """A client in a thread of this process, for the rows of the coordinator itself; the channel to it."""
    ends = links([me.name, ""])
    ledger = Ledger(me, None, frozenset(CLASSES))  # of what never leaves this process
    key = me.public.key_id
    outer = Channel(ends[me.name][""], peer=me.name, our_id=key, peer_id=key, ledger=ledger)
    inner = Channel(ends[""][me.name], peer=me.name, our_id=key, peer_id=key, ledger=ledger)
    outer.session = inner.session = session_id
    failed: list[Exception] = []

    def run() -> None:
        try:
            part(inner, me, identities, session_id, settings)
        except Exception as error:
            failed.append(error)
            inner.abort(error.kind if isinstance(error, ColonnadeError) else "error")

    thread = threading.Thread(target=run, name="our own client", daemon=True)
    thread.start()
    try:
        yield outer
    except BaseException as error:
        outer.abort("error")
        thread.join(JOIN)
        if failed and not isinstance(failed[0], PeerAborted) and isinstance(error, ColonnadeError):
            raise failed[0] from None
        raise
    thread.join(JOIN)


@dataclass(eq=False)
class Star:
    """The clients behind their channels. owed: which message of a late one is still to come; gone: who left, why."""

    job: Job
    channels: Mapping[str, Channel]
    identities: Mapping[str, PublicIdentity]
    session: bytes
    me: str
    tick: Callable[[], None] = lambda: None
    owed: Owed = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)  # for their turn
    task: Task = field(default_factory=lambda: Task(0, 0, "rows", 1, 0, np.empty(0)))
    missing: dict[str, str] = field(default_factory=dict)
    needed: int = 1

    def collect(self, task: Task, names: Sequence[str]) -> Collected:
        """One sum. Raises PeerLost below the quorum, LocalError where the numbers of all who answer diverge."""
        settings = self.job.settings
        self.task, self.missing, self.needed = task, {}, self.job.needed(task.stage, len(self.identities))
        self._settle(names)
        began, codes, seconds = time.monotonic(), {}, {}
        for name, ready in self._gather(self._tell(names, task), Ready):
            seconds[name], codes[name] = time.monotonic() - began, int(ready.data[0])
        if codes and set(codes.values()) <= {NOT_FINITE, TOO_LARGE}:
            raise diverged(task.round)
        levels = {name: code for name, code in codes.items() if code < len(LEVELS)}
        self.waiting = list(levels)
        for name, code in codes.items():
            if name not in levels:
                self.missing[name] = REASONS[code]
                self._turn(name, "left out")
        bound = self.job.noise_bound if settings.private else LEVELS[max(levels.values(), default=0)]
        if settings.secure:
            total, survivors, attempt = self._add_masked(bound)
            size = 8 * len(total) * len(survivors)
            return Collected(total, survivors, self.missing, None, size, attempt + 1, seconds)
        parts, size = self._add_open(bound)
        total = combine(self.job, parts) if task.stage == "train" else np.asarray(sum(parts.values()))
        return Collected(total, tuple(parts), self.missing, parts, size, 1, seconds)

    def confirm(self, collected: Collected) -> None:
        for name in self.waiting:
            self._turn(name, "kept" if name in collected.survivors else "left out")
        self.waiting = []

    def scores(self, task: Task) -> dict[str, Score]:
        self.task, self.missing = task, {}
        settle(self.channels, self.owed)
        asked = self._tell(list(self.channels), task)
        return {name: one.score for name, one in self._gather(asked, Scores)}

    def finish(self, task: Task) -> None:
        settle(self.channels, self.owed)
        self._tell(list(self.channels), task)

    # ---- the two ways to add up

    def _add_open(self, bound: float) -> tuple[dict[str, NDArray[np.float64]], int]:
        """Each client's numbers, and the bytes that they took."""
        self._enough(self.waiting)
        packed = self.job.settings.compression if self.task.stage == "train" else ""
        for name in self.waiting:
            self._turn(name, "add", bound=bound)
        parts, size, kind = {}, 0, Packed if packed else Update
        for name, message in self._gather(self.waiting, kind):
            try:
                with blame(name):
                    parts[name] = self._numbers(message)
            except ProtocolViolation as error:
                self._leave(name, error)
            else:
                size += message.data.nbytes
        self.waiting = [name for name in self.waiting if name in parts]
        self._enough(list(parts))
        return parts, size

    def _numbers(self, message: Step) -> NDArray[np.float64]:
        """Raises ValueError: of another length than is due."""
        length, numbers = self.job.length(self.task.stage, self.task.round), message.data
        if isinstance(message, Packed):
            head = np.frombuffer(numbers[: 8 * (TAIL + 1)].tobytes(), "<f8")
            if len(head) != TAIL + 1 or not np.isfinite(head).all():
                raise ValueError("no weight and score before its update")
            update = compressor(self.job.settings.compression).decode(numbers[8 * (TAIL + 1) :], length - TAIL - 1)
            numbers = np.concatenate([update, head])
        if len(numbers) != length:
            raise ValueError(f"{len(numbers)} numbers where {length} are due")
        return numbers

    def _add_masked(self, bound: float) -> tuple[NDArray[np.float64], tuple[str, ...], int]:
        """The sum, over whom, and at which attempt."""
        clients, length = self.job.settings.clients, self.job.length(self.task.stage, self.task.round)
        shown: set[bytes] = set()
        for attempt in range(clients.attempts):
            roll = [name for name in self.waiting if name not in self.owed and name not in self.gone]
            self._enough(roll)
            signed, own = len(self.identities), self.me in roll
            context = self.job.context(self.session, self.task, attempt, tuple(roll), bound, signed, own)
            for name in roll:
                self._turn(name, "add", attempt, bound, roll)
            try:
                done = aggregate(self.channels, self.identities, context, length, self.owed, clients.deadline, shown)
            except (PeerLost, ProtocolViolation) as error:
                self.missing |= {error.peer: str(error)} if error.peer else {}
                if isinstance(error, ProtocolViolation) and error.peer:
                    self._leave(error.peer, error)
                if context.digest in shown:
                    raise PeerLost(
                        f"round {self.task.round}: {error}; who has opened this sum opens no second one of the round: "
                        "run again with --resume"
                    ) from None
                last = error
                self._settle(roll)
                continue
            for name, lost in done.lost.items():
                self.missing[name] = str(lost)
                if not isinstance(lost, PeerLost):
                    self.gone[name] = str(lost)
            return done.total, done.survivors, attempt
        raise PeerLost(f"round {self.task.round}: {clients.attempts} attempts failed, the last one so: {last}")

    # ---- talking

    def _settle(self, names: Sequence[str]) -> None:
        """Let late clients come back, at most for a deadline if there are too few without them."""
        until = time.monotonic() + self.job.settings.clients.deadline
        while True:
            settle(self.channels, self.owed)
            free = [name for name in names if name not in self.owed and name not in self.gone]
            if len(free) >= self.needed or not any(name in self.owed for name in names) or time.monotonic() > until:
                return
            self.tick()
            time.sleep(0.02)

    def _tell(self, names: Sequence[str], message: Task) -> list[str]:
        """One message to all who can take it: their names."""
        told = []
        for name in names:
            if name in self.owed or name in self.gone:
                self.missing[name] = self.gone.get(name, "its answer to an earlier round is still to come")
                continue
            try:
                self.channels[name].send(message)
                told.append(name)
            except (PeerLost, PeerAborted) as error:
                self._leave(name, error)
        return told

    def _turn(self, name: str, what: str, attempt: int = 0, bound: float = 1.0, roll: Sequence[str] = ()) -> None:
        """Tell a client how it goes on; who is gone shows when its answer is read."""
        names = np.frombuffer(msgspec.json.encode(roll), np.uint8)
        with suppress(PeerLost, PeerAborted):
            self.channels[name].send(Turn(self.task.number, attempt, names, what, bound))

    def _gather(self, names: Sequence[str], expected: type[S]) -> Iterator[tuple[str, S]]:
        """Each client's message, while it comes before the common deadline; the others are out of the sum."""
        deadline = time.monotonic() + self.job.settings.clients.deadline
        for name in list(names):
            self.tick()
            try:
                with blame(name):
                    message = self.channels[name].receive(expected, max(0.0, deadline - time.monotonic()))
                    if message.round != self.task.number:
                        raise ValueError(f"{expected.__name__} of another sum")
            except PeerLost as error:
                self.missing[name], self.owed[name] = str(error), expected
                if expected is not Scores:
                    self._turn(name, "left out")
            except (PeerAborted, ProtocolViolation) as error:
                self._leave(name, error)
            else:
                yield name, message

    def _leave(self, name: str, error: ColonnadeError) -> None:
        """It is out for the rest of the session."""
        self.missing[name] = self.gone[name] = str(error)
        if isinstance(error, ProtocolViolation):
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


def _parse(data: NDArray[np.uint8]) -> Schema:
    try:
        return msgspec.json.decode(data.tobytes(), type=Schema)
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("the description of its table does not parse") from None
