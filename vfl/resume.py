"""Where a vertical training stood, every few exchanges, so that it can go on after any party was killed.

Each party keeps its own state: the label holder the embeddings that it got, a feature holder its directions or weights.
After a restart all tell which exchanges they have kept, and go on from the last that all have, to the same result: what
was kept is exact, and masks and keys are fresh, being tied to the new session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parties.errors import Refused
from parties.message import Array, Message, kind
from parties.session import Session
from vfl.checkpoint import read_checkpoint, write_checkpoint

EVERY, OPEN_EVERY = 1, 16  # exchanges
KEPT = 2  # a party may be one checkpoint ahead of another
State = dict[str, Array]


def under(prefix: str, arrays: Mapping[str, Array]) -> State:
    """One part's arrays, named as such within a state."""
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


def within(prefix: str, state: Mapping[str, Array]) -> State:
    """The reverse: of that part alone."""
    return {name.removeprefix(f"{prefix}."): state[name] for name in state if name.startswith(f"{prefix}.")}


@kind(213, "control", "<u4", 1)
@dataclass(frozen=True, eq=False)
class Kept(Message):
    """All to all: the exchanges after which we have kept our state."""

    data: Array

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.data) > KEPT or (self.data < 1).any():
            raise ValueError("a party keeps few states, of exchanges counted from 1")


@dataclass(frozen=True)
class Start:
    """Where a role begins: after `exchanges`, with `arrays`; `keep` is called with the state after each exchange, or
    when it is `due`: after every so many."""

    exchanges: int = 0
    arrays: Mapping[str, Array] = field(default_factory=dict)
    keep: Callable[[int, Mapping[str, Array]], None] = lambda exchanges, arrays: None
    every: int = 0

    def due(self, exchanges: int) -> bool:
        """Whether a state after so many is kept at all: a large one need not be put together for nothing."""
        return self.every > 0 and exchanges % self.every == 0


ANEW = Start()


class Checkpoints:
    """A party's own states, in files of `folder`. `job`: a digest of what is trained on what."""

    def __init__(self, folder: Path, job: bytes, every: int = EVERY) -> None:
        self._folder, self._job, self._every = folder, job, every
        self._before: dict[int, Mapping[str, Array]] = {}

    def _path(self, exchanges: int) -> Path:
        return self._folder / f"training-{exchanges:06d}.checkpoint"

    def kept(self) -> list[int]:
        """After which exchanges there is a state. Raises LocalError for a damaged file, or one of another job."""
        found = sorted(int(path.stem.split("-")[1]) for path in self._folder.glob("training-*.checkpoint"))[-KEPT:]
        for exchanges in found:
            read_checkpoint(self._path(exchanges), self._job)
        return found

    def keep(self, exchanges: int, arrays: Mapping[str, Array]) -> None:
        """Write a state when it is due; the oldest goes. Raises Refused: what was done again came out otherwise."""
        if exchanges % self._every:
            return
        before = self._before.pop(exchanges, arrays)
        if before.keys() != arrays.keys() or any(before[name].tobytes() != arrays[name].tobytes() for name in before):
            raise Refused(
                f"exchange {exchanges} was done again and came out otherwise: a peer, or another machine, computes "
                "other numbers; going on would tell more than was agreed: run without --resume"
            )
        write_checkpoint(self._path(exchanges), self._job, {}, arrays)
        for path in sorted(self._folder.glob("training-*.checkpoint"))[:-KEPT]:
            path.unlink()

    def clear(self) -> None:
        """Forget all: a training has ended, or begins anew."""
        for path in self._folder.glob("training-*.checkpoint"):
            path.unlink()

    def start(self, session: Session, *, resume: bool) -> Start:
        """Where all go on together: from the last state that all have kept, or from the beginning. What is done again
        are the last `every` exchanges at most. Whoever has their state holds it against the new one, and stops before
        the next if they differ: a peer that answers otherwise the second time learns nothing more from that.

        Reveals:
            To all: how far our last training came.
        Raises:
            Refused: there is no such state.
        """
        if not resume:
            self.clear()
            return Start(keep=self.keep, every=self._every)
        ours = self.kept()
        session.broadcast(Kept(np.array(ours, "<u4")))
        common = set(ours).intersection(*(set(one.data.tolist()) for one in session.gather(Kept).values()))
        last = max(common, default=0)
        if not ours:
            raise Refused("nothing was trained before it stopped; run without --resume")
        if not last or last < max(ours, default=0) - self._every:
            raise Refused(
                "no state that all parties have: going on would show the label holder more embeddings of the same rows "
                "than were agreed; run without --resume"
            )
        states = {one: read_checkpoint(self._path(one), self._job) for one in ours if one >= last}
        arrays = {one: state.arrays for one, state in states.items() if state is not None}
        first = arrays.pop(last, {})
        self._before = dict(arrays)  # ahead of the others; they stay, for whoever stops us again
        return Start(last, first, self.keep, self._every)
