"""Sealing to a public identity: only its key file opens it, only for its purpose, only unchanged."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from zmq.utils import z85

from parties.errors import LocalError
from parties.identity import Identity, PublicIdentity
from parties.sealing import seal, unseal
from tests.conftest import IDENTITIES

BANK, GROCER = IDENTITIES["bank"], IDENTITIES["grocer"]
SECRET = b"an escrowed key of 32 bytes here"


@pytest.mark.parametrize("plaintext", [b"", b"\x00", SECRET, bytes(10**6)], ids=["empty", "zero", "key", "1 MB"])
def test_what_is_sealed_opens_with_the_key_file(plaintext: bytes) -> None:
    sealed = seal(BANK.public, plaintext, "escrow")
    assert len(sealed) == len(plaintext) + 48
    assert unseal(BANK, sealed, "escrow") == plaintext


def test_a_fresh_and_a_saved_identity_open(tmp_path) -> None:
    Identity.generate("officer").save(tmp_path / "officer.key")
    officer = Identity.load(tmp_path / "officer.key")
    sealed = seal(PublicIdentity.parse(str(officer.public)), SECRET, "escrow")
    assert unseal(officer, sealed, "escrow") == SECRET


def test_the_curve_key_is_an_x25519_key() -> None:
    """zmq's public key from a secret is that of RFC 7748; otherwise nothing would ever open."""
    for identity in (*IDENTITIES.values(), Identity.generate("fresh")):
        x25519 = X25519PrivateKey.from_private_bytes(identity.curve_secret)
        assert x25519.public_key().public_bytes_raw() == identity.public.curve == z85.decode(identity.public.curve_z85)


def test_another_hpke_user_opens_it_by_the_documented_suite() -> None:
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    private = X25519PrivateKey.from_private_bytes(BANK.curve_secret)
    sealed = seal(BANK.public, SECRET, "escrow")
    assert suite.decrypt(sealed, private, info=b"colonnade/sealed/escrow/1") == SECRET


def test_sealing_twice_tells_nothing() -> None:
    one, two = seal(BANK.public, SECRET, "escrow"), seal(BANK.public, SECRET, "escrow")
    assert one[:32] != two[:32]
    assert one[32:] != two[32:]
    assert SECRET not in one


def test_nobody_else_and_no_other_purpose_opens_it() -> None:
    sealed = seal(BANK.public, SECRET, "escrow")
    for me, purpose in ((GROCER, "escrow"), (BANK, "escro"), (BANK, ""), (BANK, "Escrow"), (BANK, "escrow/1")):
        with pytest.raises(LocalError, match="does not open with the key") as caught:
            unseal(me, sealed, purpose)
        assert me.public.fingerprint in str(caught.value)
        assert caught.value.__cause__ is None


def test_every_altered_bit_is_refused() -> None:
    """The top bit of the fresh key too, which X25519 itself ignores."""
    sealed = seal(BANK.public, SECRET, "escrow")
    for at in range(len(sealed)):
        for bit in range(8):
            altered = bytearray(sealed)
            altered[at] ^= 1 << bit
            with pytest.raises(LocalError, match="does not open"):
                unseal(BANK, bytes(altered), "escrow")


def test_any_other_length_is_refused() -> None:
    sealed = seal(BANK.public, SECRET, "escrow")
    for wrong in (*(sealed[:length] for length in range(len(sealed))), sealed + b"\x00", b"\x00" + sealed, sealed[1:]):
        with pytest.raises(LocalError, match="does not open"):
            unseal(BANK, wrong, "escrow")


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_a_key_of_small_order_is_no_recipient(point: bytes) -> None:
    with pytest.raises(LocalError, match="nothing can be sealed"):
        seal(PublicIdentity(point, BANK.public.verify), SECRET, "escrow")
    with pytest.raises(LocalError, match="does not open"):
        unseal(BANK, point + seal(BANK.public, SECRET, "escrow")[32:], "escrow")
