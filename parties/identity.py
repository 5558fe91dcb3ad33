"""A party's keys: CURVE for the transport, Ed25519 for signatures; fresh, independent, both kept in one 0600 file.

The public half is one line of text to send to the other parties, who put it into the agreement. Its fingerprint is
what two people compare over the telephone.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import stat
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.bindings import crypto_sign_BYTES, crypto_sign_open
from nacl.exceptions import BadSignatureError
from zmq.utils import z85

from parties.errors import LocalError
from parties.files import read_bytes, write_whole

_PREFIX = "colonnade1:"


@dataclass(frozen=True)
class PublicIdentity:
    """What others know of a party: `curve` and `verify`, 32 bytes each."""

    curve: bytes
    verify: bytes

    def __post_init__(self) -> None:
        if len(self.curve) != 32 or len(self.verify) != 32:
            raise ValueError("a public identity is two keys of 32 bytes")

    @classmethod
    def parse(cls, text: str) -> PublicIdentity:
        """From the one-line text. Raises ValueError."""
        try:
            raw = base64.urlsafe_b64decode(text.removeprefix(_PREFIX) + "==")
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) != 64 or str(identity := cls(raw[:32], raw[32:])) != text:  # one spelling a key
            raise ValueError(f"not a public key: it begins with {_PREFIX!r} and is printed by 'colonnade keygen'")
        return identity

    def __str__(self) -> str:
        return _PREFIX + base64.urlsafe_b64encode(self.curve + self.verify).decode().rstrip("=")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both keys, cut to 128 bits, in groups of four hex digits."""
        digest = self.key_id.hex()
        return "-".join(digest[i : i + 4] for i in range(0, 32, 4))

    @property
    def key_id(self) -> bytes:
        """16 bytes that name this party in every message header."""
        return hashlib.sha256(b"colonnade/identity/1" + self.curve + self.verify).digest()[:16]

    @property
    def curve_z85(self) -> bytes:
        return z85.encode(self.curve)

    def signed(self, purpose: str, data: bytes, signature: bytes) -> bool:
        """Whether `signature` is ours over `data` for `purpose` (a signature for one purpose fits no other)."""
        if len(signature) != crypto_sign_BYTES:
            return False
        try:
            crypto_sign_open(signature + _framed(purpose, data), self.verify)
        except BadSignatureError:
            return False
        return True


def check_name(name: str) -> None:
    """A party's name, as agreements and file names take it. Raises LocalError."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,31}", name):
        raise LocalError(f"{name!r} cannot name a party: use up to 32 of a-z, 0-9, '-' and '_'")


class _KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    colonnade_key: int
    name: str
    curve_secret: str
    sign_secret: str


@dataclass(frozen=True)
class Identity:
    """A party's own keys. The secrets are in no repr."""

    name: str
    public: PublicIdentity
    curve_secret: bytes = field(repr=False)
    sign_secret: bytes = field(repr=False)

    @classmethod
    def generate(cls, name: str) -> Identity:
        """Fresh keys from the operating system's randomness. Raises LocalError for a name that no agreement takes."""
        check_name(name)
        _, curve_secret = zmq.curve_keypair()
        return cls._from_secrets(name, z85.decode(curve_secret), Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def _from_secrets(cls, name: str, curve_secret: bytes, sign_secret: bytes) -> Identity:
        curve = z85.decode(zmq.curve_public(z85.encode(curve_secret)))
        verify = Ed25519PrivateKey.from_private_bytes(sign_secret).public_key().public_bytes_raw()
        return cls(name, PublicIdentity(curve, verify), curve_secret, sign_secret)

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a key file. Raises LocalError when it is missing, readable by others, or not a key file."""
        data = read_bytes(path, "the key file")
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise LocalError(f"{path} can be read by other users; run 'chmod 600 {path}'")
        try:
            file = msgspec.json.decode(data, type=_KeyFile)
            return cls._from_secrets(file.name, bytes.fromhex(file.curve_secret), bytes.fromhex(file.sign_secret))
        except (msgspec.DecodeError, ValueError, zmq.ZMQError):
            raise LocalError(f"{path} is not a key file; make one with 'colonnade keygen'") from None

    def save(self, path: Path) -> None:
        """Write the key file, mode 0600; never over an existing one."""
        if path.exists():
            raise LocalError(f"{path} exists; a key is never overwritten, choose another name or folder")
        file = _KeyFile(1, self.name, self.curve_secret.hex(), self.sign_secret.hex())
        write_whole(path, msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n", mode=0o600)

    @property
    def curve_secret_z85(self) -> bytes:
        return z85.encode(self.curve_secret)

    def sign(self, purpose: str, data: bytes) -> bytes:
        """Ed25519 (RFC 8032) over the purpose and the data; 64 bytes."""
        return self._signer.sign(_framed(purpose, data))

    @cached_property
    def _signer(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.sign_secret)


def _framed(purpose: str, data: bytes) -> bytes:
    tag = f"colonnade/{purpose}/1".encode()
    return len(tag).to_bytes(2, "big") + tag + data
