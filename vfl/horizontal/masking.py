"""Secure aggregation without a channel: keys, shares, masks, and how a sum is opened.

Client u draws a mask key and a self mask b_u and sends

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)   modulo 2^64,

s_uv the Diffie-Hellman secret of u's and v's mask keys (Bonawitz et al., Practical Secure Aggregation for
Privacy-Preserving Machine Learning, CCS 2017, section 4). Every key is bound to the sum through HKDF and is used for
one stream or one ciphertext only, which is why nonces are zero. What a client offers is signed for that sum and
attempt, or, together with the survivors of a sum, for the first attempt at the next one.
"""

from __future__ import annotations

import secrets
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from parties.errors import PeerLost, blame
from parties.identity import Identity, PublicIdentity
from parties.message import Array
from psi.curve25519 import SMALL_ORDER, P
from vfl.horizontal.context import Company, Context
from vfl.horizontal.shamir import PRIME, recover, split

Words = NDArray[np.uint64]
KEYS, SURVIVORS = "aggregation keys", "aggregation survivors"  # what a client signs


def _derive(salt: bytes, secret: bytes, purpose: str, size: int = 32) -> bytes:
    return HKDF(SHA256(), size, salt=salt, info=f"colonnade/aggregation/{purpose}/1".encode()).derive(secret)


def _cipher(key: bytes) -> CipherContext:
    """ChaCha20 (RFC 8439)."""
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()


def _stream(key: bytes, size: int) -> bytes:
    return _cipher(key).update(bytes(size))


def _commitment(origin: bytes, name: str, self_seed: int) -> bytes:
    return _derive(origin, self_seed.to_bytes(32, "big"), f"commitment {name}")


@dataclass(frozen=True)
class Secrets:
    """What a client draws for one attempt. A seed is a number below Shamir's prime."""

    sealing: X25519PrivateKey = field(repr=False)
    mask_seed: int = field(repr=False)
    self_seed: int = field(repr=False)
    _rest: CipherContext = field(repr=False)

    @cached_property
    def mask(self) -> X25519PrivateKey:
        return mask_key(self.mask_seed)

    @classmethod
    def draw(cls, seed: bytes | None = None) -> Secrets:
        """Fresh; a `seed` of 32 bytes replays them."""
        rest = _cipher(seed or secrets.token_bytes(32))
        sealing = X25519PrivateKey.from_private_bytes(rest.update(bytes(32)))
        mask_seed, self_seed = _numbers(rest, 2)
        return cls(sealing, mask_seed, self_seed, rest)

    def coefficients(self, count: int) -> list[int]:
        """The next ones, for a polynomial."""
        return _numbers(self._rest, count)


def _numbers(stream: CipherContext, count: int) -> list[int]:
    """Modulo Shamir's prime; each is 2^-248 from uniform."""
    raw = stream.update(bytes(32 * count))
    return [int.from_bytes(raw[i : i + 32], "big") % PRIME for i in range(0, len(raw), 32)]


def mask_key(mask_seed: int) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(mask_seed.to_bytes(32, "big"))


# ---- tables: one row per client of a neighbourhood, zeros where it is absent


def table(near: Sequence[int], rows: Mapping[int, bytes], width: int) -> Array:
    return np.frombuffer(b"".join(rows.get(client, bytes(width)) for client in near), np.uint8).reshape(-1, width)


def rows_of(near: Sequence[int], data: Array) -> dict[int, bytes]:
    """Raises ValueError: another number of rows than the neighbourhood has clients."""
    if len(data) != len(near):
        raise ValueError(f"{len(data)} rows where {len(near)} are due")
    raw, width = data.tobytes(), data.shape[1]
    present = np.flatnonzero(data.any(axis=1)).tolist()
    return {near[i]: raw[i * width : (i + 1) * width] for i in present}


# ---- step 0: keys


@dataclass(frozen=True)
class Offer:
    """A client's public keys for one attempt and its commitment to its self mask, 32 bytes each."""

    sealing: bytes
    mask: bytes
    commitment: bytes

    @property
    def raw(self) -> bytes:
        return self.sealing + self.mask + self.commitment

    @classmethod
    def of(cls, raw: bytes) -> Offer:
        return cls(raw[:32], raw[32:64], raw[64:96])


@dataclass(frozen=True)
class Keys:
    """What a client has drawn for one attempt, and what it shows of it."""

    drawn: Secrets = field(repr=False)
    shown: Offer

    @classmethod
    def draw(cls, origin: bytes, name: str, seed: bytes | None = None) -> Keys:
        """Fresh; a `seed` of 32 bytes replays them."""
        drawn = Secrets.draw(seed)
        sealing, mask = (key.public_key().public_bytes_raw() for key in (drawn.sealing, drawn.mask))
        return cls(drawn, Offer(sealing, mask, _commitment(origin, name, drawn.self_seed)))


def sign_offer(company: Company, me: Identity, offer: Offer) -> bytes:
    """The offer and a signature; 160 bytes."""
    return offer.raw + me.sign(KEYS, company.digest + offer.raw)


def read_offer(company: Company, client: int, identity: PublicIdentity, raw: bytes) -> Offer:
    """Raises ValueError: not signed by that client for this attempt."""
    if not identity.signed(KEYS, company.digest + raw[:96], raw[96:]):
        raise ValueError(f"the keys of {company.names[client]} are not signed by it for this attempt")
    return Offer.of(raw)


def check_keys(name: str, offer: Offer, taken: set[bytes]) -> Offer:
    """At the coordinator; `taken` are the keys offered so far, to which these are added.

    Raises ValueError: a key that is taken, no canonical one, or one of small order, with which every secret would be 0.
    Others would blame the coordinator for these.
    """
    for key in (offer.sealing, offer.mask):
        if key in taken:
            raise ValueError(f"{name} offers a key that it or another client has offered already")
        if int.from_bytes(key, "little") >= P or key in SMALL_ORDER:
            raise ValueError(f"{name} offers a key that is no canonical point of large order")
        taken.add(key)
    return offer


# ---- step 1: shares, sealed from client to client


@dataclass(frozen=True)
class Dealt:
    """What a client knows once it has dealt its shares: the others' offers, which shares each holder has of ours, and
    per neighbour the key to open what it sealed to us. sealed: what we show, (neighbours, 80)."""

    company: Company
    keys: Keys
    offers: Mapping[int, Offer]
    shares: Mapping[int, bytes] = field(repr=False)
    openers: Mapping[int, bytes] = field(repr=False)
    sealed: Array


def deal(company: Company, client: int, keys: Keys, offers: Mapping[int, Offer]) -> Dealt:
    """To every neighbour in `offers`: its share of our mask key, then of our self mask, sealed.

    Raises ValueError: too few neighbours, a key that came twice, one of small order.
    """
    near = company.neighbourhood(client)
    if len(offers) + 1 < company.quorum:
        raise ValueError(f"keys of {len(offers) + 1} clients where {company.quorum} are needed")
    seen = [key for offer in (keys.shown, *offers.values()) for key in (offer.sealing, offer.mask)]
    if len(set(seen)) < len(seen):
        raise ValueError("a key came twice")
    shares, sealed, openers = _make_shares(company, near, keys.drawn), {}, {}
    for other, offer in offers.items():
        ours, openers[other] = _agree(company, client, other, keys.drawn.sealing, offer.sealing)
        sealed[other] = ChaCha20Poly1305(ours).encrypt(bytes(12), shares[other], None)
    return Dealt(company, keys, offers, shares, openers, table(near, sealed, 80))


def _make_shares(company: Company, near: Sequence[int], drawn: Secrets) -> dict[int, bytes]:
    holders = [holder + 1 for holder in near]
    of_mask, of_self = (
        split(seed, company.quorum, holders, drawn.coefficients(company.quorum - 1))
        for seed in (drawn.mask_seed, drawn.self_seed)
    )
    return {
        holder: of_mask[holder + 1].to_bytes(32, "big") + of_self[holder + 1].to_bytes(32, "big") for holder in near
    }


def _agree(company: Company, client: int, other: int, ours: X25519PrivateKey, theirs: bytes) -> tuple[bytes, bytes]:
    """Two keys: for what we seal to the other, and for what it seals to us. Raises ValueError: one of small order."""
    shared = ours.exchange(X25519PublicKey.from_public_bytes(theirs))
    low, high = sorted((client, other))
    both = _derive(company.digest, shared, f"shares {low} {high}", 64)  # from low to high, from high to low
    return (both[:32], both[32:]) if client == low else (both[32:], both[:32])


def dealt_rows(company: Company, client: int, known: Container[int], data: Array) -> dict[int, bytes]:
    """At the coordinator: what a client has sealed to whom. Raises ValueError."""
    near = company.neighbourhood(client)
    rows = rows_of(near, data)
    if rows.keys() != {j for j in near if j in known and j != client}:  # else masks would not cancel
        raise ValueError("shares for others than those whose keys it has")
    return rows


def share_table(company: Company, client: int, sealed: Mapping[int, Mapping[int, bytes]]) -> Array:
    """What its neighbours have sealed to a client, (neighbours, 80)."""
    near = company.neighbourhood(client)
    return table(near, {j: sealed[j][client] for j in near if client in sealed.get(j, ())}, 80)


def unseal(key: bytes, sealed: bytes) -> bytes | None:
    """The shares, or None when they were sealed to another or changed since."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None)
    except InvalidTag:
        return None


# ---- step 2: masks


def self_mask(context: Context, client: int, self_seed: int, size: int) -> Words:
    """PRG(b_u), (size,)."""
    key = _derive(context.full_digest, self_seed.to_bytes(32, "big"), f"self {client}")
    return np.frombuffer(_stream(key, 8 * size), "<u8")


def pairwise_masks(
    context: Context, client: int, key: X25519PrivateKey, offers: Mapping[int, Offer], size: int
) -> Words:
    """The sum over the other clients in `offers` of +-PRG(s_uv), (size,). Raises ValueError: a key of small order."""
    total, mask, zeros = np.zeros(size, "<u8"), np.empty(size, "<u8"), bytes(8 * size)
    for other, offer in offers.items():
        shared = key.exchange(X25519PublicKey.from_public_bytes(offer.mask))
        low, high = sorted((client, other))
        _cipher(_derive(context.full_digest, shared, f"mask {low} {high}")).update_into(zeros, mask.view(np.uint8).data)
        if client == low:
            total += mask
        else:
            total -= mask
    return total


# ---- step 3: the survivors, and the keys for the next sum


def sign_survivors(context: Context, client: int, me: Identity, survivors: Array, ahead: Offer) -> bytes:
    """Our keys for the next sum, and a signature under these and the survivors; 160 bytes."""
    return ahead.raw + me.sign(SURVIVORS, _statement(context, client, survivors, ahead.raw))


def read_survivors(context: Context, client: int, identity: PublicIdentity, survivors: Array, raw: bytes) -> Offer:
    """The client's keys for the next sum. Raises ValueError: it did not sign these survivors in this attempt."""
    if not identity.signed(SURVIVORS, _statement(context, client, survivors, raw[:96]), raw[96:]):
        raise ValueError(f"{context.names[client]} has not signed these survivors of this attempt")
    return Offer.of(raw)


def _statement(context: Context, client: int, survivors: Array, ahead: bytes) -> bytes:
    return context.full_digest + client.to_bytes(4, "little") + survivors.tobytes() + ahead


# ---- step 4: the sum


def open_sum(
    context: Context,
    masked: Mapping[int, Words],
    offers: Mapping[int, Offer],
    replies: Mapping[int, Mapping[int, bytes]],
) -> Words:
    """The sum of the survivors' words, (size,).

    masked: what each survivor sent; offers: of those who dealt shares, since only they are in anybody's masks; replies:
    by holder and owner, a share of the owner's self mask if it survived, else of its mask key.

    Raises:
        PeerLost: too few holders of a client's shares replied.
        ProtocolViolation: the shares do not give what a client committed to; that client, which is named, dealt others,
        or holders returned others.
    """
    total = np.zeros_like(next(iter(masked.values())))
    for words in masked.values():
        total += words
    for owner in sorted(offers):
        if owner in masked:
            total -= self_mask(context, owner, _seed(context, owner, offers[owner], replies, True), len(total))
        elif partners := {j: offers[j] for j in context.neighbourhood(owner) if j in masked}:
            key = mask_key(_seed(context, owner, offers[owner], replies, False))
            total += pairwise_masks(context, owner, key, partners, len(total))
    return total


def _seed(
    context: Context, owner: int, offer: Offer, replies: Mapping[int, Mapping[int, bytes]], survived: bool
) -> int:
    """The seed of the owner's self mask if it survived, else of its mask key."""

    def fits(seed: int) -> bool:
        if survived:
            return _commitment(context.origin, context.names[owner], seed) == offer.commitment
        return mask_key(seed).public_key().public_bytes_raw() == offer.mask

    holders = [
        j
        for j in context.neighbourhood(owner)
        if j in replies and int.from_bytes(replies[j].get(owner, b""), "big") < PRIME  # no share of anybody's dealing
    ]
    if len(holders) < context.quorum:
        name = context.names[owner]
        text = (
            f"{len(holders)} of the clients that hold {name}'s shares are left, {context.quorum} are needed; try again"
        )
        raise PeerLost(text, peer=name)
    shares = [(j + 1, int.from_bytes(replies[j][owner], "big")) for j in holders if owner in replies[j]]
    with blame(context.names[owner]):
        return recover(shares, context.quorum, fits)
