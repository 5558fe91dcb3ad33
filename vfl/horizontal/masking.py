"""Secure aggregation without a channel: keys, shares, masks, and how a sum is opened.

Client u draws a mask key and a self mask b_u and sends

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)   modulo 2^64,

s_uv the Diffie-Hellman secret of u's and v's mask keys (Bonawitz et al., Practical Secure Aggregation for
Privacy-Preserving Machine Learning, CCS 2017, section 4). Every key is bound to the context through HKDF and is used
for one stream or one ciphertext only, which is why nonces are zero. What a client offers is signed for the occasion
(session, sum, what it asks, attempt), since it may do so before it is known who takes part; all that follows binds
that too.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
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
from vfl.horizontal.context import Context
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


def _commitment(occasion: bytes, name: str, self_seed: int) -> bytes:
    return _derive(occasion, self_seed.to_bytes(32, "big"), f"commitment {name}")


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
    """A client's public keys for one attempt, its commitment to its self mask, and its signature over the occasion and
    these; 32, 32, 32 and 64 bytes."""

    sealing: bytes
    mask: bytes
    commitment: bytes
    signature: bytes

    @property
    def raw(self) -> bytes:
        return self.sealing + self.mask + self.commitment + self.signature


def make_offer(occasion: bytes, me: Identity, drawn: Secrets) -> Offer:
    sealing = drawn.sealing.public_key().public_bytes_raw()
    mask = drawn.mask.public_key().public_bytes_raw()
    commitment = _commitment(occasion, me.name, drawn.self_seed)
    signature = me.sign(KEYS, occasion + sealing + mask + commitment)
    return Offer(sealing, mask, commitment, signature)


def read_offer(occasion: bytes, name: str, identity: PublicIdentity, raw: bytes) -> Offer:
    """Raises ValueError: not signed by that client for this attempt."""
    if not identity.signed(KEYS, occasion + raw[:96], raw[96:]):
        raise ValueError(f"the keys of {name} are not signed by it for this attempt")
    return Offer(raw[:32], raw[32:64], raw[64:96], raw[96:])


def check_offer(occasion: bytes, name: str, identity: PublicIdentity, raw: bytes, taken: set[bytes]) -> Offer:
    """At the coordinator; `taken` are the keys offered so far, to which these are added.

    Raises ValueError: as above, a key that is taken, no canonical one, or one of small order, with which every secret
    would be 0. Others would blame the coordinator for these.
    """
    offer = read_offer(occasion, name, identity, raw)
    for key in (offer.sealing, offer.mask):
        if key in taken:
            raise ValueError(f"{name} offers a key that it or another client has offered already")
        if int.from_bytes(key, "little") >= P or key in SMALL_ORDER:
            raise ValueError(f"{name} offers a key that is no canonical point of large order")
        taken.add(key)
    return offer


def key_table(context: Context, client: int, offers: Mapping[int, Offer]) -> Array:
    """What a client is shown: a row of 160 bytes for each of its neighbourhood."""
    near = context.neighbourhood(client)
    return table(near, {other: offers[other].raw for other in near if other in offers}, 160)


# ---- step 1: shares, sealed from client to client


def make_shares(context: Context, client: int, drawn: Secrets) -> dict[int, bytes]:
    """For every holder: its share of our mask key, then of our self mask, 32 bytes each."""
    near = context.neighbourhood(client)
    holders = [holder + 1 for holder in near]
    of_mask, of_self = (
        split(seed, context.quorum, holders, drawn.coefficients(context.quorum - 1))
        for seed in (drawn.mask_seed, drawn.self_seed)
    )
    return {
        holder: of_mask[holder + 1].to_bytes(32, "big") + of_self[holder + 1].to_bytes(32, "big") for holder in near
    }


def agree(context: Context, client: int, drawn: Secrets, offers: Mapping[int, Offer]) -> dict[int, tuple[bytes, bytes]]:
    """Two keys for each neighbour: for what we seal to it, and for what it seals to us.

    Raises ValueError: a key of small order.
    """
    keys = {}
    for other, offer in offers.items():
        shared = drawn.sealing.exchange(X25519PublicKey.from_public_bytes(offer.sealing))
        low, high = sorted((client, other))
        both = _derive(context.digest, shared, f"shares {low} {high}", 64)  # from low to high, from high to low
        keys[other] = (both[:32], both[32:]) if client == low else (both[32:], both[:32])
    return keys


def seal(key: bytes, shares: bytes) -> bytes:
    return ChaCha20Poly1305(key).encrypt(bytes(12), shares, None)


def unseal(key: bytes, sealed: bytes) -> bytes | None:
    """The shares, or None when they were sealed to another or changed since."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None)
    except InvalidTag:
        return None


# ---- step 2: masks


def self_mask(context: Context, client: int, self_seed: int, size: int) -> Words:
    """PRG(b_u), (size,)."""
    key = _derive(context.digest, self_seed.to_bytes(32, "big"), f"self {client}")
    return np.frombuffer(_stream(key, 8 * size), "<u8")


def pairwise_masks(
    context: Context, client: int, key: X25519PrivateKey, offers: Mapping[int, Offer], size: int
) -> Words:
    """The sum over the other clients in `offers` of +-PRG(s_uv), (size,). Raises ValueError: a key of small order."""
    total, mask, zeros = np.zeros(size, "<u8"), np.empty(size, "<u8"), bytes(8 * size)
    for other, offer in offers.items():
        shared = key.exchange(X25519PublicKey.from_public_bytes(offer.mask))
        low, high = sorted((client, other))
        _cipher(_derive(context.digest, shared, f"mask {low} {high}")).update_into(zeros, mask.view(np.uint8).data)
        if client == low:
            total += mask
        else:
            total -= mask
    return total


# ---- step 3: the survivors


def sign_survivors(context: Context, client: int, me: Identity, survivors: Array) -> bytes:
    return me.sign(SURVIVORS, _statement(context, client, survivors))


def check_survivors(
    context: Context, client: int, identity: PublicIdentity, survivors: Array, signature: bytes
) -> None:
    """Raises ValueError: the client did not sign these survivors in this attempt."""
    if not identity.signed(SURVIVORS, _statement(context, client, survivors), signature):
        raise ValueError(f"{context.names[client]} has not signed these survivors of this attempt")


def _statement(context: Context, client: int, survivors: Array) -> bytes:
    return context.digest + client.to_bytes(4, "little") + survivors.tobytes()


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
            return _commitment(context.occasion, context.names[owner], seed) == offer.commitment
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
