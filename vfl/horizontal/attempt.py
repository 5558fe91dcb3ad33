"""The clients of one attempt at a secure sum, as the coordinator goes through its steps with all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NoReturn, TypeVar

import numpy as np

from parties.channel import Channel
from parties.errors import ColonnadeError, PeerAborted, PeerLost, ProtocolViolation, blame
from parties.message import Array
from vfl.horizontal.context import Context
from vfl.horizontal.messages import (
    KeyList,
    KeyOffer,
    MaskedInput,
    SealedShares,
    ShareList,
    SignatureList,
    Step,
    Survivors,
    SurvivorSignature,
)

S = TypeVar("S", bound=Step)
T = TypeVar("T")
Owed = dict[str, type[Step]]
_ANSWERS: dict[type[Step], type[Step]] = {
    KeyOffer: KeyList,
    SealedShares: ShareList,
    MaskedInput: Survivors,
    SurvivorSignature: SignatureList,
}


def step_of(step: type[S], context: Context, data: Array) -> S:
    return step(context.round, context.attempt, data)


def data_of(step: Step, context: Context) -> Array:
    """Raises ValueError: of another attempt."""
    if (step.round, step.attempt) != (context.round, context.attempt):
        raise ValueError(f"{type(step).__name__} of another attempt")
    return step.data


def settle(channels: Mapping[str, Channel], owed: Owed) -> dict[str, ColonnadeError]:
    """At the coordinator, before it chooses whom to ask: whose late message has come by now owes nothing any more. Who
    stopped or sent something else instead is returned with the reason.

    Reveals:
        To nobody anything; nothing is sent.
    """
    left: dict[str, ColonnadeError] = {}
    for name, late in list(owed.items()):
        try:
            channels[name].receive(late, 0.0)
        except PeerLost:
            continue
        except (PeerAborted, ProtocolViolation) as error:
            left[name] = error
        del owed[name]
    return left


class Attempt:
    """The clients that are still in the attempt, at first those that are `here`, and why the others are not."""

    def __init__(
        self,
        channels: Mapping[str, Channel],
        context: Context,
        owed: Owed,
        seconds: float,
        lost: dict[str, ColonnadeError],
        here: Iterable[int],
    ) -> None:
        names = {client: context.names[client] for client in here}
        if late := owed.keys() & set(names.values()):
            raise ValueError(f"{', '.join(sorted(late))} still owe a message; settle first, and leave them out")
        self._lost = lost
        self._live = {client: channels[name] for client, name in names.items()}
        self._first = len(names)
        self._context, self._owed, self._seconds = context, owed, seconds

    def gather(self, expected: type[Step], check: Callable[[int, Array], T]) -> dict[int, T]:
        """What `check(client, data)` makes of each client's message; who sends none in time, or a bad one, is out."""
        deadline = time.monotonic() + self._seconds
        found = {}
        for client, channel in list(self._live.items()):
            try:
                with blame(channel.peer):
                    step = channel.receive(expected, max(0.0, deadline - time.monotonic()))
                    found[client] = check(client, data_of(step, self._context))
            except PeerLost as error:
                self._drop(client, error, expected)
                self._leave_out(channel, expected)
            except PeerAborted as error:
                self._drop(client, error)
            except ProtocolViolation as error:
                self._drop(client, error)
                channel.abort(error.kind)
        if len(found) < self._context.threshold:
            self.stop(expected)
        return found

    def tell(self, step: type[Step], data: Callable[[int], Array]) -> None:
        """One message to every client that is left."""
        for client, channel in list(self._live.items()):
            try:
                channel.send(step_of(step, self._context, data(client)), self._seconds)
            except (PeerLost, PeerAborted) as error:
                self._drop(client, error)

    def _drop(self, client: int, error: ColonnadeError, owes: type[Step] | None = None) -> None:
        name = self._context.names[client]
        del self._live[client]
        self._lost[name] = error
        if owes is not None:
            self._owed[name] = owes

    def _leave_out(self, channel: Channel, step: type[Step]) -> None:
        """Tell a client that will wait for the answer to `step` that there is none."""
        if answer := _ANSWERS.get(step):
            nothing = np.empty((0, answer.width) if answer.ndim == 2 else 0, np.uint8)
            with suppress(PeerLost, PeerAborted):
                channel.send(step_of(answer, self._context, nothing), 0.0)

    def stop(self, step: type[Step]) -> NoReturn:
        for channel in self._live.values():
            self._leave_out(channel, step)
        missing = ", ".join(f"{name} ({error.kind})" for name, error in self._lost.items())
        context = self._context
        raise PeerLost(
            f"round {context.round}, attempt {context.attempt}: {len(self._live)} of {self._first} clients are "
            f"left at {step.__name__}, {context.threshold} are needed, within reach of each other; "
            f"missing: {missing}; nothing was opened"
        )
