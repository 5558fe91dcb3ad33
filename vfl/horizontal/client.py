"""A client: it answers the coordinator's tasks, one after another, and keeps what it learnt once a sum has it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from parties.channel import Channel
from parties.errors import ColonnadeError, LocalError, PeerAborted, Refused, blame
from parties.horizontal import Horizontal
from parties.identity import Identity, PublicIdentity
from vfl.checkpoint import Bound, Checkpoint, read_checkpoint, write_checkpoint
from vfl.horizontal.context import Company
from vfl.horizontal.masking import Dealt, Keys, deal
from vfl.horizontal.models import Model, Score
from vfl.horizontal.outcome import Client, Outcome, Round, already_done
from vfl.horizontal.privacy_budget import PrivacyBudget
from vfl.horizontal.round_messages import (
    DECLINED,
    LEVELS,
    OVER_BUDGET,
    SIGNED,
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
from vfl.horizontal.secure_aggregation import Ahead, contribute
from vfl.horizontal.settings import Job, Schema, Spending
from vfl.horizontal.trainer import Data, Trainer, describe

NAME = "client.checkpoint"
BEFORE = ("rows", "means", "scales")  # sums before training, in round 0


class Admitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client is told when it is admitted: what all tables look like, its place among so many clients, the round
    that comes next, and the last one that has its message (-1: none)."""

    schema: Schema
    clients: Annotated[int, Meta(ge=1)]
    place: Annotated[int, Meta(ge=0)]
    round: Annotated[int, Meta(ge=0)] = 0
    counted: Annotated[int, Meta(ge=-1)] = -1


class Standing(Bound, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a client remembers besides its states.

    pending: the last round that the pending state has. told: how many tasks of each stage of `session` we answered so
    that something may be known; signed, signed_round: the newest sum that may be open, and the newest of training;
    subject: of the newest one, where sums are in clear.
    """

    session: bytes
    pending: int
    told: dict[str, int]
    signed: int
    signed_round: int
    subject: bytes


def former_session(folder: Path, whose: Bound) -> bytes:
    """The session in which we took part before we were killed, if any. Raises LocalError: a file that is not ours."""
    found = read_checkpoint(folder / NAME, None, Standing, whose)
    return found.facts.session if found else b""


def take_part(
    channel: Channel,
    me: Identity,
    identities: Mapping[str, PublicIdentity],
    session_id: bytes,
    settings: Horizontal,
    data: Data | None,
    *,
    model: Model | None = None,
    tick: Callable[[], None] = lambda: None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    folder: Path | None = None,
    agreement: bytes = b"",
    budget: PrivacyBudget | None = None,
    purpose: str = "training",
) -> Outcome:
    """Train with all others, through the coordinator at the other end of `channel`.

    identities: of the clients that signed the session; how many clients a sum has at least follows from their number.
    data: our rows; model: our own model, where the agreement says so, which has the weights in the end. folder: for
    the checkpoint; agreement: the digest that it is bound to. budget: charged for the noise that we add.

    Reveals:
        To the coordinator: what our table looks like, our loss and accuracy before and after training and over how
        many rows, hence about how many we have (not under privacy), when we are ready, and the largest of our numbers
        up to a power of 2^8, above 2^24. Of our update with secure aggregation what the sum tells, without it the
        update itself.
        A coordinator that deviates chooses the weights that all clients of a sum are asked about, and within the bounds
        of the quorum who they are: of consecutive rounds at the same weights it learns our part by difference. Of each
        round we open one sum; of rounds, scores and the sums before training we answer no more than was agreed, also
        when we were killed and came back.
        To the other clients: that we take part, what the weights of a round tell of the sum, and, among those of all,
        the categories that we declare and the classes that we declare or else have. With secure aggregation also in
        which sums we are, and, when just those who signed the sum before are asked again, that we were asked.
    Raises:
        Refused: our table is not what all others have; the text has the difference.
        LocalError: our rows or our model cannot be trained on.
        ProtocolViolation, PeerLost, PeerAborted: of the coordinator.
    """
    ours = describe(settings, data, model)
    channel.send(Table(np.frombuffer(msgspec.json.encode(ours), np.uint8)))
    if ours.short:
        raise Refused(f"our table has fewer {ours.short} than the agreed minimum; agree on less, or stay out")
    with blame(channel.peer):
        admitted = _admitted(channel.receive(Admission))
        if admitted.clients > len(identities) or admitted.place >= admitted.clients:
            raise ValueError("more clients than have signed the session, or no place among them")
        if difference := admitted.schema.difference(ours):
            raise Refused(f"we have {difference}; align the table with the others'", peer=channel.peer)
    trainer = Trainer(Job(settings, admitted.schema, admitted.clients), admitted.place, data, model)
    end = _End(channel, me, identities, session_id, trainer, Spending(trainer.job, budget, purpose))
    if folder is not None and settings.checkpoint:
        end.restore(folder / NAME, Bound(agreement=agreement, party=me.name), admitted)
    patience = None  # of its channel; who is not asked waits for others' rounds
    if trainer.job.leaves_out:
        patience = settings.clients.longest * (settings.rounds + 1)
    scores: list[Score] = []
    rounds: list[Round] = []
    try:
        while (task := end.next_task(patience)).stage != "finish":
            tick()
            if task.stage == "score":
                scores.append(trainer.score(task))
                end.save()
                channel.send(Scores.of(task.number, scores[-1]))
                continue
            kept = end.answer(task)
            if task.stage == "train":
                progress("train", task.round, settings.rounds)
                missing = {} if kept else {me.name: str(end.declined or "the sum has not our numbers")}
                rounds.append(Round(task.round, np.nan, np.nan, (me.name,) if kept else (), missing))
    except PeerAborted:
        if end.declined is not None:
            raise end.declined from end.declined.__cause__
        raise
    weights = trainer.finish(task)
    estimator = trainer.estimator(task, weights)
    own = Client(scores[0], scores[-1]) if len(scores) > 1 else Client(after=scores[0]) if scores else Client()
    notes = (already_done(task.round),) if admitted.round == task.round else ()
    return Outcome(estimator, weights, rounds, {me.name: own}, notes, earlier=admitted.round)


class _End:
    """One end of the conversation: what a client holds besides its trainer."""

    def __init__(
        self,
        channel: Channel,
        me: Identity,
        identities: Mapping[str, PublicIdentity],
        session: bytes,
        trainer: Trainer,
        spending: Spending,
    ) -> None:
        self.channel, self.me, self.identities, self.session = channel, me, identities, session
        self.trainer, self.spending = trainer, spending
        self.used: set[bytes] = set()
        self.ahead: tuple[Ahead, Keys] | None = None
        self.number = self.round = -1  # the newest task's, the newest training's
        self.given: Counter[str] = Counter()  # tasks by stage
        self.signed = self.signed_round = -1  # the newest task whose sum may be open, the newest training
        self.subject = b""  # of the newest task, where sums are in clear: it may be answered again, it tells the same
        self.counted = self.pending = -1  # the last round that our state has, and our pending one
        self.declined: ColonnadeError | None = None
        self.path: Path | None = None
        self.whose = Bound()

    def next_task(self, patience: float | None) -> Task:
        """Raises ProtocolViolation: a task that was not agreed, or once more."""
        task, job = self.channel.receive(Task, patience), self.trainer.job
        self.given[task.stage] += not self._asked_before(task)
        with blame(self.channel.peer):
            if task.number <= self.number or (task.stage == "train" and task.round <= self.round):
                raise ValueError("a task that it has given before")
            if self.given[task.stage] > job.often(task.stage):
                raise ValueError(f"a task of stage {task.stage}, of which {job.often(task.stage)} are agreed")
            if task.round >= job.settings.rounds if task.stage == "train" else task.stage in BEFORE and task.round:
                raise ValueError(f"a task of stage {task.stage} in round {task.round}")
            if len(task.data) != (due := job.told(task.stage, task.round)):
                raise ValueError(f"a task with {len(task.data)} numbers where {due} are due")
        self.number = task.number
        if task.stage == "train":
            self.round = task.round
        return task

    def answer(self, task: Task) -> bool:
        """One sum; whether it has our numbers."""
        job, level, trains = self.trainer.job, DECLINED, task.stage == "train"
        noisy = job.settings.private and job.settings.privacy.noise != "central" and trains
        message, self.declined = np.empty(0), None
        try:
            if self._may_be_open(task):
                level = SIGNED
            else:
                message = self.trainer.answer(task)
                level = self.trainer.level(message)
                self.pending = task.round if trains else self.pending
            if noisy and level != SIGNED:
                self.spending.charge(task.round)
        except (LocalError, Refused) as error:
            self.declined, level = error, OVER_BUDGET if isinstance(error, Refused) else DECLINED
        if level != SIGNED and not job.settings.secure:
            self.sign(task, job.subject(task))
        elif trains and self.trainer.pending:
            self.save(task)
        ahead, self.ahead, dealt = self.ahead, None, None  # keys are for the sum that follows, or for none
        if task.again and level < len(LEVELS):
            with blame(self.channel.peer):
                dealt = self._deal(task, ahead)
        code = np.array([level], np.uint8)
        if dealt is None:
            self.channel.send(Ready(task.number, 0, code))
        else:
            self.channel.send(ReadyWithShares(task.number, 0, np.concatenate([code, dealt.sealed.ravel()])))
        kept, opened, last = False, False, -1
        while not kept and (turn := self._turn(task, level)).what == "add":
            with blame(self.channel.peer):
                if opened or turn.attempt <= last:  # two sums of a round would tell their difference
                    raise ValueError("a turn that it has given before, or one after a sum that may be open")
                if isinstance(turn, TurnWithShares) and dealt is None:
                    raise ValueError("shares for an attempt for which we have dealt none")
            if noisy and last >= 0:
                self.spending.charge(task.round)
            last = turn.attempt
            opened = self._send(task, turn, job.noised(message) if noisy else message, dealt)
            kept = opened and job.settings.secure  # who has unmasked a sum need not be told
        if kept or turn.what == "kept":
            self.trainer.keep()
            self.counted = task.round if trains else self.counted
            return True
        return False

    def _turn(self, task: Task, level: int) -> Turn:
        turn = self.channel.receive(Turn)
        with blame(self.channel.peer):
            if level >= len(LEVELS) and turn.what != "left out":
                raise ValueError(f"asked us to {turn.what!r} where our numbers are out of the sum")
            if turn.what == "kept" and self.trainer.job.settings.secure and self.signed != task.number:
                raise ValueError("says that it has our numbers, and we have signed no sum of them")
            if turn.round != task.number or turn.attempt >= self.trainer.job.settings.clients.attempts:
                raise ValueError("a turn of another sum, or one attempt too many")
            bounds = (self.trainer.job.noise_bound,) if self.trainer.job.settings.private else LEVELS
            if turn.what == "add" and not any(math.isclose(turn.bound, bound, rel_tol=1e-6) for bound in bounds):
                raise ValueError("a bound that was not agreed")
        return turn

    def _deal(self, task: Task, known: tuple[Ahead, Keys] | None) -> Dealt:
        """Shares for those who signed the former sum. Raises ValueError."""
        if known is None:
            raise ValueError("asks again those who signed a sum before, and we have not")
        ahead, own = known
        names = tuple(ahead.offers)
        company, us = self._company(task, 0, names, ahead.former), names.index(self.me.name)
        return deal(company, us, own, {j: ahead.offers[name] for j, name in enumerate(names) if j != us})

    def _send(self, task: Task, turn: Turn, message: NDArray[np.float64], dealt: Dealt | None) -> bool:
        """Whether the coordinator may have opened the sum."""
        settings = self.trainer.job.settings
        if settings.secure:
            with blame(self.channel.peer):
                if dealt is not None and isinstance(turn, TurnWithShares):
                    company, given = dealt.company, (dealt, turn.data)
                else:
                    company, given = self._company(task, turn.attempt, turn.names), None
                context = company.within(turn.bound)
            terms = (self.channel, self.me, self.identities, context, message, self.used)
            outcome = contribute(*terms, before_signing=partial(self.sign, task), dealt=given)
            self.ahead = outcome.ahead
            return bool(outcome.survivors)
        if settings.compression and task.stage == "train" and self.trainer.packed is not None:
            self.channel.send(Packed(task.number, turn.attempt, self.trainer.packed))
        else:
            self.channel.send(Update(task.number, turn.attempt, message))
        return True

    def _company(self, task: Task, attempt: int, names: tuple[str, ...], former: bytes = b"") -> Company:
        """What we agree to: the coordinator says who adds up; how many it takes at least, we know."""
        if any(name not in self.identities for name in names):
            raise ValueError("a sum with clients that the agreement does not have")
        signed, own = len(self.identities), self.channel.peer in names
        return self.trainer.job.company(self.session, task, attempt, names, signed, own, former)

    # ---- checkpoints

    def _asked_before(self, task: Task) -> bool:
        """Whether we were killed after we had agreed to open the sum of this task, or of its round."""
        trains = task.stage == "train"
        return (trains and task.round <= self.signed_round) or (
            (trains or task.stage in BEFORE) and task.number <= self.signed
        )

    def _may_be_open(self, task: Task) -> bool:
        return self._asked_before(task) and self.trainer.job.subject(task) != self.subject

    def sign(self, task: Task, subject: bytes = b"") -> None:
        """To be called before a sum can be opened: we open no other one for this task, whatever happens to us."""
        self.signed, self.subject = task.number, subject
        if task.stage == "train":
            self.signed_round = task.round
        self.save()

    def save(self, task: Task | None = None) -> None:
        """Both states: which of them counts, the coordinator says when we come back. task: of which nothing is told."""
        if self.path is None:
            return
        told, trainer = self.given - Counter([task.stage] if task else []), self.trainer
        ahead = self.pending > self.counted
        facts = Standing(
            agreement=self.whose.agreement,
            party=self.whose.party,
            session=self.session,
            pending=self.pending if ahead else self.counted,
            told=dict(told),
            signed=self.signed,
            signed_round=self.signed_round,
            subject=self.subject,
        )
        state = {f"state.{name}": values for name, values in trainer.state.items()}
        pending = trainer.pending if ahead else trainer.state
        arrays = state | {f"pending.{name}": values for name, values in pending.items()}
        write_checkpoint(self.path, trainer.job.digest, facts, arrays)

    def restore(self, path: Path, whose: Bound, admitted: Admitted) -> None:
        """Go on where the coordinator does. Raises LocalError when our file does not go with that."""
        self.path, self.whose, self.counted = path, whose, admitted.counted
        known = admitted.counted >= 0  # else no sum has anything of ours: what lies there may be of an earlier run
        found = read_checkpoint(path, self.trainer.job.digest if known else None, Standing, whose)
        if found is not None and found.facts.session == self.session:
            self.signed, self.signed_round = found.facts.signed, found.facts.signed_round
            self.subject = found.facts.subject
            self.given = Counter(found.facts.told)
        if known:
            self._recall(found, admitted)
        self.save()

    def _recall(self, found: Checkpoint[Any] | None, admitted: Admitted) -> None:
        if found is None or found.facts.pending < admitted.counted:
            settings = self.trainer.job.settings
            if settings.strategy in ("feddyn", "scaffold") or settings.personal:
                raise LocalError(
                    f"training goes on from round {admitted.round} and {self.path} is missing, or older than round "
                    f"{admitted.counted}; restore it, or all begin anew"
                )
            return
        which = "pending." if found.facts.pending == admitted.counted else "state."
        self.trainer.state = {
            name.removeprefix(which): values for name, values in found.arrays.items() if name.startswith(which)
        }


def _admitted(message: Admission) -> Admitted:
    try:
        return msgspec.json.decode(message.data.tobytes(), type=Admitted)
    except (msgspec.MsgspecError, RecursionError):
        raise ValueError("its admission does not parse") from None
