"""Secure aggregation: the coordinator learns the sum over the clients that stay, and no client's part. Two roles.

    0  u -> C   KeyOffer           C -> u   KeyList          fresh keys, signed by their owners
    1  u -> C   SealedShares       C -> u   ShareList        shares of both of u's secrets, sealed to their holders
    2  u -> C   MaskedInput        C -> u   Survivors        from here on the set is fixed
    3  u -> C   SurvivorSignature  C -> u   SignatureList    all sign the same set, and their keys for the next sum
    4  u -> C   Unmasking                                    one share per client: of its self mask or of its mask key

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017, figure 4 with the
consistency check; on a k-regular graph Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead,
CCS 2020. Clients have a channel to the coordinator only. A client may vanish before any step; the coordinator goes on
while the threshold is met.

**Keys ahead.** Who has signed a sum has told the others its keys for the next one. If just these take part there, its
first attempt begins with step 2: steps 0 and 1 are done within the conversation around it (round_messages.py). On a
k-regular graph neighbours change from sum to sum, and nobody uses them.

**Late clients.** A client that misses a step's deadline is out of the attempt: the coordinator tells it so (a table
without rows), reads nothing more from it, and notes in `owed` which message it still owes. When that has come, `settle`
drops it unread and the client may be asked again. One that never sends it stays out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from parties.channel import Channel
from parties.errors import ColonnadeError, blame
from parties.identity import Identity, PublicIdentity
from parties.message import Array
from vfl.horizontal.attempt import Attempt, Owed, data_of, step_of
from vfl.horizontal.context import Company, Context
from vfl.horizontal.masking import (
    Dealt,
    Keys,
    Offer,
    check_keys,
    deal,
    dealt_rows,
    open_sum,
    pairwise_masks,
    read_offer,
    read_survivors,
    rows_of,
    self_mask,
    share_table,
    sign_offer,
    sign_survivors,
    table,
    unseal,
)
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
    Unmasking,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Ahead:
    """Keys for the next sum, of all who signed one, by name in order. former: what that sum is bound to."""

    former: bytes
    offers: Mapping[str, Offer]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended for a client: whose values the sum has (nobody's: we are left out), and whose shares came
    altered. Whether the sum was opened in the end, the coordinator knows. ahead: the keys for the next one, if any, and
    what we have drawn for it."""

    survivors: tuple[str, ...]
    unopened: tuple[str, ...] = ()
    ahead: tuple[Ahead, Keys] | None = field(default=None, compare=False, repr=False)


@dataclass
class Course:
    """How an attempt went for the coordinator, also if it failed: who is out, and why; whether clients may have opened
    the sum; and which survivors signed and have not heard that they may."""

    lost: dict[str, ColonnadeError] = field(default_factory=dict)
    shown: bool = False
    unheard: tuple[str, ...] = ()


@dataclass(eq=False)
class Begun:
    """An attempt for which keys came ahead, at the coordinator: who takes part, with which keys, in the order of the
    names, and what each client has dealt so far."""

    company: Company
    offers: Sequence[Offer]
    sealed: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def take(self, name: str, data: Array) -> None:
        """A client's shares, (clients, 80). Raises ValueError: for others than the company."""
        client = self.company.names.index(name)
        self.sealed[client] = dealt_rows(self.company, client, range(len(self.offers)), data)

    def shown(self, name: str) -> Array:
        """What the others have dealt to a client, (clients, 80)."""
        return share_table(self.company, self.company.names.index(name), self.sealed)


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The sum (size,), over whom, and the others with the reason of each; the keys for the next one, where all who have
    signed this one have also heard of each other."""

    total: NDArray[np.float64]
    survivors: tuple[str, ...]
    lost: Mapping[str, ColonnadeError]
    ahead: Ahead | None


def contribute(
    channel: Channel,
    me: Identity,
    identities: Mapping[str, PublicIdentity],
    context: Context,
    values: NDArray[np.float64],
    used: set[bytes],
    timeout: float | None = None,
    seed: bytes | None = None,
    before_signing: Callable[[], None] = lambda: None,
    dealt: tuple[Dealt, Array] | None = None,
) -> Outcome:
    """At a client: add our values (size,) to the sum.

    used: the digests of the companies in which we took part, kept for as long as the session; we take part in each
    once. timeout: seconds per answer of the coordinator, more than it gives all clients for a step; None: the channel's
    own. seed: 32 bytes that replay our secrets. before_signing: called once the survivors are known: when it returns we
    sign them, and the sum may be opened. dealt: the shares that we have dealt for this attempt already, with keys that
    came ahead, and the rows that a ShareList would have; None: keys and shares are exchanged now.

    Reveals:
        To the coordinator: the sum over the survivors, at least `context.threshold` of the agreed clients, or nothing.
        One that cheats learns no other sum; it can spoil this one. If it colludes with c clients, that holds for a
        threshold above (n + c) / 2. On a k-regular graph it holds for a coordinator that follows the protocol and
        colludes with at most k/2 neighbours of each: a client sees the signatures of its neighbours only.
        To the other clients: who takes part and who survives; with keys that came ahead also who was asked.
    Raises:
        LocalError: a value that is not finite or beyond the agreed bound; nothing more is sent.
        ProtocolViolation: the coordinator repeats an attempt, forges or swaps keys or signatures, or shows us
        survivors that are too few, without us, or not those that the others signed; nothing is unmasked.
        PeerLost, PeerAborted: the coordinator is gone.
    """
    words = context.quantisation.words(values)
    with blame(channel.peer):
        if me.name not in context.names or context.digest in used:
            raise ValueError(f"asks for round {context.round}, attempt {context.attempt}, once more or without us")
        used.add(context.digest)
        us = context.names.index(me.name)
        near, names = context.neighbourhood(us), context.names
        if dealt is None:
            if context.former:
                raise ValueError("asks for a sum with keys that came ahead, and we have dealt no shares with them")
            given = _exchange(channel, me, identities, context, us, timeout, seed)
            if given is None:
                return Outcome(())
            channel.send(step_of(SealedShares, context, given.sealed))
            if (data := _answer(channel, ShareList, context, timeout)) is None:
                return Outcome(())
        else:
            given, data = dealt
            if given.company.digest != context.digest:
                raise ValueError("asks for another sum than that for which we have dealt shares")
        rows = {j: raw for j, raw in rows_of(near, data).items() if j != us}
        if not rows.keys() <= given.offers.keys():
            raise ValueError("shares of a client without keys")
        drawn, partners = given.keys.drawn, {j: given.offers[j] for j in rows}
        held = {j: unseal(given.openers[j], raw) for j, raw in rows.items()} | {us: given.shares[us]}
        _enough(context, held, "shares")

        words = words + self_mask(context, us, drawn.self_seed, len(words))
        words += pairwise_masks(context, us, drawn.mask, partners, len(words))
        channel.send(step_of(MaskedInput, context, words))
        if (flags := _answer(channel, Survivors, context, timeout)) is None:
            return Outcome(())
        survivors = _check_flags(context, us, flags, held)

        before_signing()
        own = Keys.draw(context.full_digest, me.name, None if seed is None else hashlib.sha256(seed).digest())
        signed = sign_survivors(context, us, me, flags, own.shown)
        channel.send(step_of(SurvivorSignature, context, np.frombuffer(signed, np.uint8)))
        if (data := _answer(channel, SignatureList, context, timeout)) is None:
            return Outcome(())
        rows = _enough(context, rows_of(near, data) | {us: signed}, "signatures")
        offers = {
            names[j]: own.shown if j == us else read_survivors(context, j, identities[names[j]], flags, rows[j])
            for j in sorted(rows)
        }

    opened = {j: pair[32:] if flags[j] else pair[:32] for j, pair in held.items() if pair is not None}
    channel.send(step_of(Unmasking, context, table(near, opened, Unmasking.width)))
    unopened = tuple(names[j] for j, pair in held.items() if pair is None)
    ahead = (Ahead(context.full_digest, offers), own) if context.degree is None else None
    return Outcome(tuple(names[j] for j in survivors), unopened, ahead)


def _exchange(
    channel: Channel,
    me: Identity,
    identities: Mapping[str, PublicIdentity],
    context: Context,
    us: int,
    timeout: float | None,
    seed: bytes | None,
) -> Dealt | None:
    """Step 0, and what step 1 sends; None when the attempt ends here for us."""
    keys = Keys.draw(context.origin, me.name, seed)
    shown = sign_offer(context, me, keys.shown)
    channel.send(step_of(KeyOffer, context, np.frombuffer(shown, np.uint8)))
    if (data := _answer(channel, KeyList, context, timeout)) is None:
        return None
    rows = rows_of(context.neighbourhood(us), data)
    if rows.pop(us, None) != shown:
        raise ValueError("our own keys did not come back")
    offers = {j: read_offer(context, j, identities[context.names[j]], raw) for j, raw in rows.items()}
    return deal(context, us, keys, offers)


def _answer(channel: Channel, expected: type[Step], context: Context, timeout: float | None) -> Array | None:
    """What the coordinator answers to our step; None when the attempt ends here for us."""
    data = data_of(channel.receive(expected, timeout), context)
    return data if len(data) else None


def _enough(context: Context, rows: Mapping[int, T], what: str) -> dict[int, T]:
    if len(rows) < context.quorum:
        raise ValueError(f"{what} of {len(rows)} clients where {context.quorum} are needed")
    return dict(rows)


def _check_flags(context: Context, us: int, flags: Array, held: Mapping[int, object]) -> list[int]:
    """The survivors' positions. Raises ValueError."""
    if len(flags) != len(context.names):
        raise ValueError("survivors of another number of clients")
    survivors = [int(j) for j in np.flatnonzero(flags)]
    if not context.connected(survivors):
        raise ValueError("survivors whose masks do not hold them together")
    if us not in survivors or len(survivors) < context.threshold:
        raise ValueError(f"{len(survivors)} survivors: too few, or we are not among them")
    if not held.keys() >= set(context.neighbourhood(us)).intersection(survivors):
        raise ValueError("a survivor that dealt no shares")
    return survivors


def aggregate(
    channels: Mapping[str, Channel],
    identities: Mapping[str, PublicIdentity],
    context: Context,
    size: int,
    owed: Owed,
    seconds: float = 60.0,
    course: Course | None = None,
    begun: Begun | None = None,
) -> Aggregate:
    """At the coordinator: the sum of the values (size,) of the clients that stay.

    owed: what late clients of earlier attempts still owe; those of this one are entered. Nobody in it may take part.
    seconds: the deadline of each step, for all clients together. course: to be told how it goes: once clients may have
    opened the sum, they open no other of that round. begun: where keys came ahead, what has been dealt with them, all
    of which has been shown; None: keys and shares are exchanged now.

    Reveals:
        To us: the sum over the survivors, who they are, and which clients dropped out at which step.
        To every client: the same without the sum.
    Raises:
        PeerLost: fewer than the threshold are left; the text names those that are missing. Nothing is opened.
        ProtocolViolation: a client's shares do not open its masks.
    """
    n, near = len(context.names), [context.neighbourhood(client) for client in range(len(context.names))]
    if (begun.company.digest if begun else b"") != (context.digest if context.former else b""):
        raise ValueError("keys that came ahead are for one sum")
    course = course or Course()
    attempt = Attempt(channels, context, owed, seconds, course.lost, range(n) if begun is None else begun.sealed)
    if begun is None:
        shown = attempt.gather(KeyOffer, _offered(context, identities))
        attempt.tell(KeyList, lambda u: table(near[u], shown, KeyList.width))
        known = {client: Offer.of(raw) for client, raw in shown.items()}
        sealed = attempt.gather(SealedShares, lambda client, data: dealt_rows(context, client, known, data))
        attempt.tell(ShareList, lambda u: share_table(context, u, sealed))
    else:
        known, sealed = dict(enumerate(begun.offers)), begun.sealed

    def sized(client: int, data: Array) -> Array:
        if len(data) != size:
            raise ValueError(f"{len(data)} values where {size} are due")
        return data

    masked = attempt.gather(MaskedInput, sized)
    if not context.connected(masked):
        attempt.stop(MaskedInput)
    flags = np.array([client in masked for client in range(n)], np.uint8)
    attempt.tell(Survivors, lambda u: flags)

    taken, offers = set[bytes](), dict[int, Offer]()

    def signed(client: int, data: Array) -> bytes:
        name = context.names[client]
        offer = read_survivors(context, client, identities[name], flags, data.tobytes())
        offers[client] = check_keys(name, offer, taken)
        return data.tobytes()

    signatures = attempt.gather(SurvivorSignature, signed)
    course.shown = True
    attempt.tell(SignatureList, lambda u: table(near[u], signatures, SignatureList.width))
    course.unheard = tuple(context.names[j] for j in masked if context.names[j] in course.lost)

    replies = attempt.gather(Unmasking, lambda client, data: rows_of(near[client], data))
    total = open_sum(context, masked, {client: known[client] for client in sealed}, replies)
    ahead = None
    if context.degree is None and replies.keys() == offers.keys():
        ahead = Ahead(context.full_digest, {context.names[client]: offers[client] for client in sorted(offers)})
    survivors = tuple(context.names[j] for j in sorted(masked))
    return Aggregate(context.quantisation.restore(total), survivors, course.lost, ahead)


def _offered(context: Context, identities: Mapping[str, PublicIdentity]) -> Callable[[int, Array], bytes]:
    taken = set[bytes]()

    def offered(client: int, data: Array) -> bytes:
        name, raw = context.names[client], data.tobytes()
        check_keys(name, read_offer(context, client, identities[name], raw), taken)
        return raw

    return offered
