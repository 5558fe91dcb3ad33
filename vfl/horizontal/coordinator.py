"""The coordinator: it asks its clients and adds up. It holds no rows, unless it is a client too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parties.channel import Channel
from parties.errors import ColonnadeError, PeerAborted, PeerLost, ProtocolViolation, blame
from parties.horizontal import Horizontal
from parties.identity import Identity, PublicIdentity
from parties.ledger import Ledger
from parties.memory import links
from parties.message import CLASSES
from vfl.checkpoint import Bound
from vfl.horizontal.client import take_part
from vfl.horizontal.models import Model
from vfl.horizontal.outcome import Outcome
from vfl.horizontal.privacy_budget import PrivacyBudget
from vfl.horizontal.round_messages import Table
from vfl.horizontal.rounds import Leader, Progress, Server, checked, lead, restore
from vfl.horizontal.settings import Job, Schema, Spending, parse_table, reference, refuse_differences
from vfl.horizontal.star import Rejoined, Star
from vfl.horizontal.trainer import Data

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
    agreement: bytes = b"",
    budget: PrivacyBudget | None = None,
    purpose: str = "training",
    rejoined: Rejoined | None = None,
) -> Outcome:
    """Train with the clients behind `channels`, by name, in the agreed order.

    own, model: our rows or own model, where we are a client too, the first one. start: the first weights of an own
    model, (size,); others begin at zero. tick: called between two clients' messages. folder: for the checkpoint, from
    which training goes on; agreement: the digest that it is bound to. budget: charged for central noise. rejoined: the
    new channels of clients that were killed and came back, asked for between two sums, and while a sum lacks clients.

    Reveals:
        To us: what every table looks like, which clients answer and how fast, every client's loss and accuracy before
        and after and over how many rows (not under privacy), and the sum of each round: its weights follow from it.
        With secure aggregation nothing else of an update but its largest number up to a power of 2^8, and that only
        above 2^24; without it, each client's update. With leave_one_out also how the others score without each client.
        To every client: the weights of each round that it is asked in, the number of clients and of rows in all, the
        categories and classes of all clients' tables together, and with secure aggregation who is in each sum, or was
        asked again with all others of the sum before. Who is drawn in secret hears of no other.
    Raises:
        Refused: the number of clients or a table does not go with what was agreed; the text says which and how.
        PeerLost: a round has fewer clients than its quorum, and who was killed did not come back before its deadline;
        the text names who is missing and why.
        LocalError: training diverges, with the round; no optimum exists; the checkpoint cannot be used.
    """
    with ExitStack() as stack:
        if own is not None or model is not None:
            ours = partial(
                take_part,
                data=own,
                model=model,
                budget=budget,
                purpose=purpose,
                folder=folder,
                agreement=agreement,
            )
            channels = {
                me.name: stack.enter_context(_client_within(me, identities, session_id, settings, ours)),
                **channels,
            }
        checked(settings, len(channels), me.name in channels)
        tables, gone = _tables(me, channels, settings, len(identities))
        names, channels = tuple(tables), {name: channels[name] for name in tables}
        job = Job(settings, reference(settings, tables), len(names))
        star = Star(job, channels, identities, session_id, me.name, tick, tables, rejoined, gone=gone)
        leader = Leader(job, names, star, Server(job, start), whose=Bound(agreement=agreement, party=me.name))
        if folder is not None and settings.checkpoint:
            restore(folder, leader)
        for one in leader.history:
            star.counted |= dict.fromkeys(one.clients, one.number)
        for name in names:
            star.admit(name, leader.server.round)
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
                tables[name] = parse_table(channel.receive(Table, max(0.0, until - time.monotonic())))
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
        except PeerAborted as error:
            failed.append(error)
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
