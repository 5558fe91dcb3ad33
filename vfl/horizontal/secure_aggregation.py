"""Secure aggregation: the coordinator learns the sum over the clients that stay, and no client's part. Two roles.

    0  u -> C   KeyOffer           C -> u   KeyList          fresh keys, signed by their owners; or exchanged before
    1  u -> C   SealedShares       C -> u   ShareList        shares of both of u's secrets, sealed to their holders
    2  u -> C   MaskedInput        C -> u   Survivors        from here on the set is fixed
    3  u -> C   SurvivorSignature  C -> u   SignatureList    all sign the same set
    4  u -> C   Unmasking                                    one share per client: of its self mask or of its mask key

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017, figure 4 with the
consistency check; on a k-regular graph Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead,
CCS 2020. Clients have a channel to the coordinator only. A client may vanish before any step; the coordinator goes on
while the threshold is met.

**Late clients.** A client that misses a step's deadline is out of the attempt: the coordinator tells it so (a table
without rows), reads nothing more from it, and notes in `owed` which message it still owes. When that has come, `settle`
drops it unread and the client may be asked again. One that never sends it stays out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from parties.channel import Channel
from parties.errors import ColonnadeError, blame
from parties.identity import Identity, PublicIdentity
from parties.message import Array
from vfl.horizontal.attempt import Attempt, Owed, data_of, step_of
from vfl.horizontal.context import Context
from vfl.horizontal.masking import (
    Offer,
    Secrets,
    agree,
    check_offer,
    check_survivors,
    key_table,
    make_offer,
    make_shares,
    open_sum,
    pairwise_masks,
    read_offer,
    rows_of,
    seal,
    self_mask,
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
class Outcome:
    """How an attempt ended for a client: whose values the sum has (nobody's: we are left out), and whose shares came
    altered. Whether the sum was opened in the end, the coordinator knows."""

    survivors: tuple[str, ...]
    unopened: tuple[str, ...] = ()


@dataclass
class Course:
    """How an attempt went for the coordinator, also if it failed: who is out, and why; whether clients may have opened
    the sum; and which survivors signed and have not heard that they may."""

    lost: dict[str, ColonnadeError] = field(default_factory=dict)
    shown: bool = False
    unheard: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The sum (size,), over whom, and the others with the reason of each."""

    total: NDArray[np.float64]
    survivors: tuple[str, ...]
    lost: Mapping[str, ColonnadeError]


@dataclass(frozen=True)
class Keys:
    """What a client has drawn for one attempt, and what it shows of it."""

    occasion: bytes
    drawn: Secrets = field(repr=False)
    shown: Offer

    @classmethod
    def offer(cls, occasion: bytes, me: Identity, seed: bytes | None = None) -> Keys:
        """Fresh; a `seed` of 32 bytes replays them."""
        drawn = Secrets.draw(seed)
        return cls(occasion, drawn, make_offer(occasion, me, drawn))


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
    exchanged: tuple[Keys, Array] | None = None,
) -> Outcome:
    """At a client: add our values (size,) to the sum.

    used: the digests of the contexts in which we took part, kept for as long as the session; we take part in each once.
    timeout: seconds per answer of the coordinator, more than it gives all clients for a step; None: the channel's own.
    seed: 32 bytes that replay our secrets. before_signing: called once the survivors are known: when it returns we sign
    them, and the sum may be opened. exchanged: the keys that we have offered for this attempt, and the rows that a
    KeyList would have; None: we offer fresh ones now.

    Reveals:
        To the coordinator: the sum over the survivors, at least `context.threshold` of the agreed clients, or nothing.
        One that cheats learns no other sum; it can spoil this one. If it colludes with c clients, that holds for a
        threshold above (n + c) / 2. On a k-regular graph it holds for a coordinator that follows the protocol and
        colludes with at most k/2 neighbours of each: a client sees the signatures of its neighbours only.
        To the other clients: who takes part and who survives.
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
        near = context.neighbourhood(us)

        if exchanged is None:
            keys = Keys.offer(context.occasion, me, seed)
            channel.send(step_of(KeyOffer, context, np.frombuffer(keys.shown.raw, np.uint8)))
            if (data := _answer(channel, KeyList, context, timeout)) is None:
                return Outcome(())
        else:
            keys, data = exchanged
            if keys.occasion != context.occasion:
                raise ValueError("asks for a sum of another occasion than that for which we have offered keys")
        own, drawn = keys.shown, keys.drawn
        rows = _enough(context, rows_of(near, data), "keys")
        if rows.pop(us, None) != own.raw:
            raise ValueError("our own keys did not come back")
        names = context.names
        offers = {j: read_offer(context.occasion, names[j], identities[names[j]], raw) for j, raw in rows.items()}
        seen = [key for offer in (own, *offers.values()) for key in (offer.sealing, offer.mask)]
        if len(set(seen)) < len(seen):
            raise ValueError("a key came twice")

        shares, agreed = make_shares(context, us, drawn), agree(context, us, drawn, offers)
        sealed = {j: seal(agreed[j][0], shares[j]) for j in offers}
        channel.send(step_of(SealedShares, context, table(near, sealed, SealedShares.width)))
        if (data := _answer(channel, ShareList, context, timeout)) is None:
            return Outcome(())
        rows = {j: raw for j, raw in rows_of(near, data).items() if j != us}
        if not rows.keys() <= offers.keys():
            raise ValueError("shares of a client without keys")
        dealt = {j: offers[j] for j in rows}
        held = {j: unseal(agreed[j][1], raw) for j, raw in rows.items()} | {us: shares[us]}
        _enough(context, held, "shares")

        words = words + self_mask(context, us, drawn.self_seed, len(words))
        words += pairwise_masks(context, us, drawn.mask, dealt, len(words))
        channel.send(step_of(MaskedInput, context, words))
        if (flags := _answer(channel, Survivors, context, timeout)) is None:
            return Outcome(())
        survivors = _check_flags(context, us, flags, held)

        before_signing()
        signature = sign_survivors(context, us, me, flags)
        channel.send(step_of(SurvivorSignature, context, np.frombuffer(signature, np.uint8)))
        if (data := _answer(channel, SignatureList, context, timeout)) is None:
            return Outcome(())
        signatures = _enough(context, rows_of(near, data) | {us: signature}, "signatures")
        for j in signatures.keys() - {us}:
            check_survivors(context, j, identities[names[j]], flags, signatures[j])

    opened = {j: pair[32:] if flags[j] else pair[:32] for j, pair in held.items() if pair is not None}
    channel.send(step_of(Unmasking, context, table(near, opened, Unmasking.width)))
    unopened = tuple(names[j] for j, pair in held.items() if pair is None)
    return Outcome(tuple(names[j] for j in survivors), unopened)


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
    offers: Mapping[int, Offer] | None = None,
) -> Aggregate:
    """At the coordinator: the sum of the values (size,) of the clients that stay.

    owed: what late clients of earlier attempts still owe; those of this one are entered. Nobody in it may take part.
    seconds: the deadline of each of the five steps, for all clients together. course: to be told how it goes: once
    clients may have opened the sum, they open no other of that round. offers: of all who take part, when they have come
    before, are checked, and all have been shown those of their neighbours; None: they come now.

    Reveals:
        To us: the sum over the survivors, who they are, and which clients dropped out at which step.
        To every client: the same without the sum.
    Raises:
        PeerLost: fewer than the threshold are left; the text names those that are missing. Nothing is opened.
        ProtocolViolation: a client's shares do not open its masks.
    """
    n, near = len(context.names), [context.neighbourhood(client) for client in range(len(context.names))]
    course, taken = course or Course(), set[bytes]()
    attempt = Attempt(channels, context, owed, seconds, course.lost)

    def offered(client: int, data: Array) -> Offer:
        name = context.names[client]
        return check_offer(context.occasion, name, identities[name], data.tobytes(), taken)

    if offers is None:
        known = attempt.gather(KeyOffer, offered)
        attempt.tell(KeyList, lambda u: key_table(context, u, known))
    else:
        known = dict(offers)

    def dealt(client: int, data: Array) -> dict[int, bytes]:
        rows = rows_of(near[client], data)
        if rows.keys() != {j for j in near[client] if j in known and j != client}:  # else masks would not cancel
            raise ValueError("shares for others than those whose keys it has")
        return rows

    sealed = attempt.gather(SealedShares, dealt)
    attempt.tell(
        ShareList,
        lambda u: table(near[u], {j: sealed[j][u] for j in near[u] if u in sealed.get(j, ())}, ShareList.width),
    )

    def sized(client: int, data: Array) -> Array:
        if len(data) != size:
            raise ValueError(f"{len(data)} values where {size} are due")
        return data

    masked = attempt.gather(MaskedInput, sized)
    if not context.connected(masked):
        attempt.stop(MaskedInput)
    flags = np.array([client in masked for client in range(n)], np.uint8)
    attempt.tell(Survivors, lambda u: flags)

    def signed(client: int, data: Array) -> bytes:
        check_survivors(context, client, identities[context.names[client]], flags, data.tobytes())
        return data.tobytes()

    signatures = attempt.gather(SurvivorSignature, signed)
    course.shown = True
    attempt.tell(SignatureList, lambda u: table(near[u], signatures, SignatureList.width))
    course.unheard = tuple(context.names[j] for j in masked if context.names[j] in course.lost)

    replies = attempt.gather(Unmasking, lambda client, data: rows_of(near[client], data))
    total = open_sum(context, masked, {client: known[client] for client in sealed}, replies)
    return Aggregate(context.quantisation.restore(total), tuple(context.names[j] for j in sorted(masked)), course.lost)
