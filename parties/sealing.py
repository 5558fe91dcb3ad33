"""Bytes sealed to a public identity: only the holder of its key file opens them.

HPKE (RFC 9180) in base mode, with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and ChaCha20Poly1305, from `cryptography`.
Base mode does not say who sealed: sign what must have a sender.

The recipient's CURVE key doubles as its X25519 key. That is sound: CurveZMQ hashes each Diffie-Hellman result with
HSalsa20 and HPKE with HKDF under labels of its own, so that a key of the one is independent of any key of the other
(both reduce to gap Diffie-Hellman on Curve25519 in the random oracle model), and neither ever shows a raw result.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from parties.errors import LocalError
from parties.identity import Identity, PublicIdentity

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def seal(recipient: PublicIdentity, plaintext: bytes, purpose: str) -> bytes:
    """A fresh 32-byte key, then the ciphertext with its 16-byte tag: 48 bytes more than `plaintext`.

    Raises:
        LocalError: the recipient's key is not one that a key file can hold.
    """
    try:
        return _SUITE.encrypt(plaintext, X25519PublicKey.from_public_bytes(recipient.curve), info=_info(purpose))
    except ValueError:  # a point of small order: anybody could open it
        raise LocalError(
            f"nothing can be sealed to the key {recipient.fingerprint}: ask its owner for what 'colonnade keygen' shows"
        ) from None


def unseal(me: Identity, sealed: bytes, purpose: str) -> bytes:
    """What `seal` was given, for the same purpose.

    Raises:
        LocalError: sealed to another key, for another purpose, or altered since; these look the same.
    """
    try:
        return _SUITE.decrypt(sealed, X25519PrivateKey.from_private_bytes(me.curve_secret), info=_info(purpose))
    except InvalidTag:
        raise LocalError(
            f"the sealed {purpose} does not open with the key {me.public.fingerprint}: "
            "it was sealed to another key or for another purpose, or it was changed"
        ) from None


def _info(purpose: str) -> bytes:
    return f"colonnade/sealed/{purpose}/1".encode()
