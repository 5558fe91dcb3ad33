"""Every role in one process: for tests and notebooks. The same roles, messages, ledger and checks as over a network."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from parties.agreement import Agreement, Party
from parties.errors import PeerAborted, PeerLost
from parties.identity import Identity
from parties.ledger import Ledger
from parties.session import TRAIN, Session, allowed_classes, converse

Role = Callable[[Session], Any]
Tamper = Callable[[str, str, bytes, bytes], tuple[bytes, bytes]]
_GONE = (b"", b"")


class _Mailbox:
    """One direction of a pair: a queue in which at most `window` messages wait."""

    def __init__(self, window: int) -> None:
        self.queue: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()
        self.room = threading.Semaphore(window)


class MemoryLink:
    """One end of a pair. `tamper(sender, receiver, header, payload)` may alter a frame, for tests."""

    def __init__(self, me: str, peer: str, out: _Mailbox, inbox: _Mailbox, tamper: Tamper | None) -> None:
        self._me, self._peer, self._out, self._in, self._tamper = me, peer, out, inbox, tamper
        self.sent: list[tuple[bytes, bytes]] = []

    def send(self, header: bytes, payload: bytes | memoryview, timeout: float) -> None:
        frames = header, bytes(payload)
        if self._tamper is not None:
            frames = self._tamper(self._me, self._peer, *frames)
        self.sent.append(frames)
        if not self._out.room.acquire(timeout=timeout):
            raise PeerLost(f"{self._peer} takes no more messages", peer=self._peer)
        self._out.queue.put(frames)

    def receive(self, timeout: float) -> tuple[bytes, bytes]:
        try:
            frames = self._in.queue.get(timeout=timeout)
        except queue.Empty:
            raise PeerLost(f"{self._peer} sent nothing for {timeout:.0f} s", peer=self._peer) from None
        if frames == _GONE:
            self._in.queue.put(_GONE)
            raise PeerLost(f"{self._peer} has closed the connection", peer=self._peer)
        self._in.room.release()
        return frames

    def leave(self) -> None:
        self._out.queue.put(_GONE)


def links(names: list[str], tamper: Tamper | None = None, window: int = 16) -> dict[str, dict[str, MemoryLink]]:
    """A full mesh: `links(...)["bank"]["grocer"]` is the bank's end of that pair."""
    boxes = {(me, peer): _Mailbox(window) for me in names for peer in names if me != peer}
    return {
        me: {peer: MemoryLink(me, peer, boxes[me, peer], boxes[peer, me], tamper) for peer in names if peer != me}
        for me in names
    }


def make_agreement(identities: Mapping[str, Identity], **tables: Any) -> Agreement:
    """An agreement for parties in this process: the first is the label holder, or with `horizontal` the coordinator.
    `tables` are its fields, as in the file.

    For example `make_agreement(ids, model={"C": 10.0}, intersection={"minimum": 5})`.
    """
    first, others = ("coordinator", "client") if "horizontal" in tables else ("label holder", "feature holder")
    if "horizontal" in tables:
        tables = {"job": {"mode": "horizontal"}} | tables
    parties = [
        Party(
            name=name,
            role=others if number else first,  # type: ignore[arg-type]
            public_key=str(identity.public),
            endpoint=f"tcp://127.0.0.1:{7001 + number}",
        )
        for number, (name, identity) in enumerate(identities.items())
    ]
    job = {
        "title": "in memory",
        "purpose": "a notebook or a test",
        "legal_basis": "none: all parties are this process",
        "expires": datetime.now(UTC).date() + timedelta(days=1),
        "parties": parties,
    }
    return msgspec.convert(msgspec.to_builtins(job | tables), Agreement)


def outcomes(
    roles: Mapping[str, Role],
    agreement: Agreement | None = None,
    identities: Mapping[str, Identity] | None = None,
    *,
    tamper: Tamper | None = None,
    nonces: Mapping[str, bytes] | None = None,
    task: str = TRAIN,
    ledgers: dict[str, Ledger] | None = None,
    recorded: dict[str, dict[str, MemoryLink]] | None = None,
    again: Mapping[str, Role] | None = None,
) -> dict[str, Any]:
    """Run every role in a thread of its own; what each returned, or the exception with which it ended.

    `nonces` make a session replayable; `ledgers` and `recorded` are filled for inspection. `again`: clients that are
    started again when their first role has ended, with this one, to come back into the session.
    """
    identities = identities or {name: Identity.generate(name) for name in roles}
    agreement = agreement or make_agreement(identities)
    mesh = links([party.name for party in agreement.parties], tamper)  # a party without a role does not come
    if recorded is not None:
        recorded.update(mesh)
    results: dict[str, Any] = {}
    back: dict[str, MemoryLink] = {}

    def returned() -> dict[str, MemoryLink]:
        return {name: back.pop(name) for name in list(back)}

    def run(name: str) -> None:
        former = play_one(name, roles[name], mesh[name], {"nonce": nonces[name] if nonces else None})
        if again and name in again:
            hub = agreement.ring[0].name
            ends = links([hub, name], tamper)
            back[name] = ends[hub][name]
            play_one(name, again[name], ends[name], {"former": former})

    def play_one(name: str, role: Role, ends: Mapping[str, MemoryLink], options: dict[str, Any]) -> bytes:
        """The session's id."""
        ledger, opened = Ledger(identities[name], None, allowed_classes(agreement)), b""
        if ledgers is not None:
            ledgers[name] = ledger
        try:
            with converse(
                identities[name], agreement, ends, ledger=ledger, task=task, returned=returned, **options
            ) as session:
                opened = session.id
                result = role(session)
            results[name] = result
        except BaseException as error:  # a thread's exception belongs to its caller, whatever it is
            results[name] = error
        finally:
            for link in ends.values():
                link.leave()
        return opened

    threads = [threading.Thread(target=run, args=(name,), name=name, daemon=True) for name in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: results[name] for name in roles}


def play(roles: Mapping[str, Role], agreement: Agreement | None = None, **options: Any) -> dict[str, Any]:
    """Run `{"bank": role, "grocer": role, ...}` in one process and return what each role returned.

    The first party is the label holder. A role is a function of its `Session`. Without an agreement a default one is
    made, with fresh keys. The first party's own error is raised, if any; that it was told of another's comes last.
    """
    results = outcomes(roles, agreement, **options)
    errors = [result for result in results.values() if isinstance(result, BaseException)]
    errors.sort(key=lambda error: isinstance(error, (PeerAborted, PeerLost)))
    if errors:
        raise errors[0]
    return results
