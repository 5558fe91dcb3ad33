"""The label holder learns the sum over the feature holders, not the parts: pairwise masks that cancel.

Every two feature holders agree on a key (X25519, HKDF-SHA256 bound to the session) and expand it with ChaCha20 under a
nonce of (exchange, kind). The earlier in the ring adds the words, the later subtracts them; all is modulo a power of
two. With one feature holder there is nothing to hide behind: its values travel in clear, in messages that the ledger
calls plaintext or aggregate.

With two feature holders, the label holder and one of them together know the other's part.
"""

from __future__ import annotations

import hmac
import math
import os
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from parties.channel import Channel
from parties.errors import LocalError, ProtocolViolation, blame
from parties.message import Array, Message
from parties.session import Session
from vfl.losses import Matrix, Vector
from vfl.messages import (
    LARGEST,
    VALUES_PER_PART,
    MaskedEmbedding,
    MaskedScalars,
    MaskKey,
    PartialEmbedding,
    PartialScalars,
)

SCALAR_FRACTION = 80  # of 128 bits: sums of squares down to 2^-80 and up to 2^47
SCALAR_MODULUS = 1 << 128


class Contribution:
    """A feature holder's side: sends its parts to the label holder, masked when there are others."""

    def __init__(self, session: Session, secret: bytes | None = None) -> None:
        """Agree on mask keys with every other feature holder.

        Reveals:
            To the other feature holders: a fresh public key. To the label holder: nothing.
        """
        self.label_holder = session.channels[session.label_holder]
        self._bits = session.agreement.encryption.embedding_bits
        self._holders = session.agreement.feature_holders
        ring = [party.name for party in session.agreement.ring]
        others = [name for name in ring[1:] if name != session.name]
        ours = X25519PrivateKey.from_private_bytes(secret or os.urandom(32))
        for name in others:
            session.channels[name].send(MaskKey(np.frombuffer(ours.public_key().public_bytes_raw(), np.uint8)))
        self._keys: list[tuple[int, bytes]] = []
        for name in others:
            theirs = session.channels[name].receive(MaskKey).data.tobytes()
            with blame(name):
                if theirs == ours.public_key().public_bytes_raw():
                    raise ValueError("sent our own mask key back")
                shared = ours.exchange(X25519PublicKey.from_public_bytes(theirs))  # refuses small order
            first, second = sorted((session.name, name), key=ring.index)
            info = f"colonnade/masks/1 {first} {second}".encode()
            key = HKDF(SHA256(), 32, salt=session.id, info=info).derive(shared)
            self._keys.append((1 if session.name == first else -1, key))
        self._used: set[tuple[int, int]] = set()

    def send_embedding(self, values: Vector | Matrix, exchange: int, context: bytes = b"") -> None:
        """Our partial embedding, (n,) or (n, m). Raises LocalError when a value would wrap around modulo 2^64.

        Masks cancel only between parties that say the same `context`, such as which rows the label holder chose.

        Reveals:
            To the label holder: the sum over all feature holders; with one, our embedding itself.
        """
        limit = LARGEST if not self._keys else 2.0 ** (63 - self._bits) / self._holders
        if values.size and not np.abs(values).max() < limit:
            raise LocalError(
                f"a partial embedding reaches {limit:.0f}, where its sum could overflow; "
                "standardise the features or agree on fewer embedding_bits"
            )
        flat = np.asarray(values, "<f8").ravel()
        if not self._keys:
            for start in range(0, max(len(flat), 1), VALUES_PER_PART):
                self.label_holder.send(PartialEmbedding(exchange, flat[start : start + VALUES_PER_PART]))
            return
        words = np.rint(np.ldexp(flat, self._bits)).astype(np.int64).astype("<u8")
        for sign, stream in self._streams(exchange, MaskedEmbedding, 8 * len(words), context):
            mask = np.frombuffer(stream, "<u8")
            words = words + mask if sign > 0 else words - mask
        for start in range(0, max(len(words), 1), VALUES_PER_PART):
            self.label_holder.send(MaskedEmbedding(exchange, words[start : start + VALUES_PER_PART]))

    def send_scalars(self, values: Sequence[float], exchange: int) -> None:
        """Scalar products of our slices, in the order that both sides know.

        Reveals:
            To the label holder: their sums over all parties; with one feature holder, ours.
        """
        if any(not abs(value) < LARGEST / self._holders for value in values):
            raise LocalError("a scalar product of the solver exceeds its range; standardise the features")
        if not self._keys:
            self.label_holder.send(PartialScalars(exchange, np.array(values, "<f8")))
            return
        numbers = [round(math.ldexp(value, SCALAR_FRACTION)) for value in values]
        for sign, stream in self._streams(exchange, MaskedScalars, 16 * len(numbers)):
            masks = (int.from_bytes(stream[i : i + 16], "little") for i in range(0, len(stream), 16))
            numbers = [number + sign * mask for number, mask in zip(numbers, masks, strict=True)]
        raw = b"".join((number % SCALAR_MODULUS).to_bytes(16, "little") for number in numbers)
        self.label_holder.send(MaskedScalars(exchange, np.frombuffer(raw, np.uint8).reshape(-1, 16)))

    def _streams(self, exchange: int, kind: type[Message], size: int, context: bytes = b"") -> list[tuple[int, bytes]]:
        if (exchange, kind.kind) in self._used:  # a mask used twice reveals a difference
            raise RuntimeError("a mask may be used only once")
        self._used.add((exchange, kind.kind))
        nonce = bytes(4) + exchange.to_bytes(8, "little") + kind.kind.to_bytes(4, "little")
        keys = [(sign, hmac.digest(key, context, "sha256") if context else key) for sign, key in self._keys]
        return [
            (sign, Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(size)))
            for sign, key in keys
        ]


def sum_embeddings(session: Session, rows: int, exchange: int, width: int = 1) -> Matrix:
    """At the label holder: the sum of the partial embeddings over the feature holders, (rows, width).

    Reveals:
        To us: that sum; with one feature holder, its embedding itself.
    """
    channels, count = list(session.channels.values()), rows * width
    if len(channels) == 1:
        return _parts(channels[0], PartialEmbedding, exchange, count).astype(np.float64).reshape(rows, width)
    total = np.zeros(count, "<u8")
    for channel in channels:
        total = total + _parts(channel, MaskedEmbedding, exchange, count)
    exact = np.ldexp(total.astype(np.int64).astype(np.float64), -session.agreement.encryption.embedding_bits)
    return exact.reshape(rows, width)


def _parts(
    channel: Channel, expected: type[PartialEmbedding] | type[MaskedEmbedding], exchange: int, count: int
) -> Array:
    return np.concatenate(
        [
            _checked(channel, channel.receive(expected), exchange, min(VALUES_PER_PART, count - start))
            for start in range(0, max(count, 1), VALUES_PER_PART)
        ]
    )


def sum_scalars(session: Session, count: int, exchange: int) -> Vector:
    """At the label holder: the sums of the feature holders' scalar products, (count,).

    Reveals:
        To us: these sums; with one feature holder, its own.
    """
    channels = list(session.channels.values())
    if len(channels) == 1:
        return _checked(channels[0], channels[0].receive(PartialScalars), exchange, count).astype(np.float64)
    totals = [0] * count
    for channel in channels:
        for i, row in enumerate(_checked(channel, channel.receive(MaskedScalars), exchange, count)):
            totals[i] += int.from_bytes(row.tobytes(), "little")
    signed = ((total + SCALAR_MODULUS // 2) % SCALAR_MODULUS - SCALAR_MODULUS // 2 for total in totals)
    return np.array([math.ldexp(value, -SCALAR_FRACTION) for value in signed])


def _checked(channel: Channel, message: Message, exchange: int, rows: int) -> Array:
    data: Array = message.data  # type: ignore[attr-defined]
    if message.exchange != exchange or len(data) != rows:  # type: ignore[attr-defined]
        raise ProtocolViolation(
            f"{channel.peer}: {type(message).__name__} of another step or length than is due", peer=channel.peer
        )
    return data
