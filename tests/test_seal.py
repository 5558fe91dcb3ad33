"""Microsoft SEAL as an independent oracle: its products, its switch, its decryption, its table of security."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import Stream
from tests.test_lattice import BOUND, CONTEXT, Exchange, random
from tests.test_ring import canonical, centred
from vfl.encryption import lattice, ring
from vfl.encryption.layout import REPLY_PRIMES
from vfl.encryption.ring import DEGREE, PRIMES

pytest.importorskip("tenseal.sealapi", reason="Microsoft SEAL, the oracle, comes with tenseal")

from tests import seal

BELOW = 7438337  # the next prime of the same kind: SEAL wants one that no ciphertext has


# Its files


@pytest.fixture(scope="module")
def sealed() -> tuple[Any, Any, np.ndarray]:
    """SEAL's context, a ciphertext of it, and its residues."""
    context = seal.parameters([*PRIMES, BELOW])
    encryptor = seal.api.Encryptor(context, seal.api.KeyGenerator(context).secret_key())
    values = np.random.default_rng(5).integers(-(2**50), 2**50, DEGREE)
    ciphertext = seal.api.Ciphertext()
    encryptor.encrypt_symmetric(seal.plain_of(context, values), ciphertext)
    return context, ciphertext, seal.residues_of(ciphertext)


def test_what_is_written_for_seal_is_read_from_it(sealed):
    context, ciphertext, residues = sealed
    assert residues.shape == (2, len(PRIMES), DEGREE)
    again = seal.ciphertext_of(context, ciphertext.parms_id(), residues)
    assert (seal.residues_of(again) == residues).all()
    values = np.random.default_rng(6).integers(-(2**58), 2**58, DEGREE)
    assert (seal.values_of(seal.plain_of(context, values)) == values).all()


def test_a_changed_format_of_seal_is_told_apart_from_a_wrong_result():
    good = seal._wrap(b"content")
    assert seal.body(good) == b"content"
    for place in (0, 2, 3, 4, 5, 8):
        with pytest.raises(ValueError, match=r"files have changed.*adapt tests/seal.py"):
            seal.body(good[:place] + b"\1" + good[place + 1 :])


@pytest.mark.parametrize("bits", [1, 20, 42])
def test_seal_multiplies_by_a_plaintext_as_we_do(sealed, bits):
    context, ciphertext, residues = sealed
    factor = np.random.default_rng(bits).integers(-(2**bits), 2**bits + 1, DEGREE)
    product = seal.api.Ciphertext()
    seal.api.Evaluator(context).multiply_plain(ciphertext, seal.plain_of(context, factor), product)
    ours = ring.forward(ring.reduce_all(residues.copy())) * ring.forward(ring.residues(factor))
    assert (canonical(ring.inverse(ring.reduce_all(ours))) == seal.residues_of(product)).all()


@pytest.mark.parametrize("primes", [7, 4, 3])
def test_seal_switches_the_modulus_as_we_do(sealed, primes):
    context, ciphertext, residues = sealed
    switched = seal.api.Ciphertext()
    seal.api.Evaluator(context).mod_switch_to(ciphertext, seal.level_with(context, primes), switched)
    ours = ring.switch(ring.reduce_all(residues.copy()), primes)
    assert (canonical(ours) == seal.residues_of(switched)).all()


def test_seal_holds_these_parameters_for_128_bit_secure_and_no_longer_ones():
    assert seal.parameters([*PRIMES, BELOW]).parameters_set()
    assert ring.modulus().bit_length() == 184
    longer = seal.parameters([*PRIMES, BELOW, 7340033])
    assert longer.parameters_error_name() == "invalid_parameters_insecure"


# Its keys and ciphertexts, our scheme


def test_seal_opens_with_our_key_what_we_seal():
    """Its plaintexts are modulo 2^59, ours modulo 2^64: multiples of 32 are the same numbers."""
    context = seal.parameters([*PRIMES, BELOW])
    r = np.random.default_rng(1).integers(-(2**57), 2**57, (DEGREE, 1))
    exchange = Exchange(np.zeros((DEGREE, 1), np.int64), 32 * r)
    secret = ring.inverse(exchange.key._secret)
    decryptor = seal.api.Decryptor(context, seal.secret_of(context, centred(secret)[0].astype(np.int64)))
    for number, (row, plain) in enumerate([(exchange.public[0], 0 * r), (exchange.sealed[0][0], r)]):
        c0, c1 = ring.unpack(row, len(PRIMES)), ring.uniform(lattice._seed(CONTEXT, number))
        residues = canonical(ring.inverse(np.stack([c0, c1])))
        ciphertext, opened = seal.ciphertext_of(context, context.first_parms_id(), residues), seal.api.Plaintext()
        assert 184 - 60 - 5 <= decryptor.invariant_noise_budget(ciphertext) <= 184 - 60 - 3  # noise of 8 to 21
        decryptor.decrypt(ciphertext, opened)
        assert (seal.values_of(opened) == plain[:, 0]).all()


@pytest.mark.parametrize(("rows", "count"), [(DEGREE, 1), (12_000, 2), (500, 5)])
def test_what_seal_seals_and_we_weigh_seal_opens_to_the_sums(rows, count):
    """Its own key and ciphertexts; our products, masks, flood and switch in between."""
    context = seal.parameters([*PRIMES, BELOW])
    secret = seal.api.KeyGenerator(context).secret_key()
    encryptor, decryptor = seal.api.Encryptor(context, secret), seal.api.Decryptor(context, secret)

    def sealed(values: np.ndarray) -> np.ndarray:
        ciphertext = seal.api.Ciphertext()
        encryptor.encrypt_symmetric(seal.plain_of(context, values), ciphertext)
        return ring.forward(ring.reduce_all(seal.residues_of(ciphertext))).astype(np.float32)

    x, r = random(rows, count, bits=12)
    exchange = Exchange(x, r, bound=32 * BOUND)
    block = exchange.layout.block
    stream = Stream("masks")
    masks = np.frombuffer(stream(8 * count), "<i8") // 32 * 32
    weigher = exchange.weigher(entropy=lambda size: masks.tobytes() if size == 8 * count else stream(size))
    parts = [r[start : start + block, 0] for start in range(0, rows, block)]
    weigher._sealed = [sealed(np.zeros(DEGREE, np.int64)), *(sealed(part) for part in parts)]

    start = 0
    for reply, held in zip(weigher.finish(), exchange.layout.held(count), strict=True):
        values = ring.unpack(reply, REPLY_PRIMES)
        residues = np.zeros((2, REPLY_PRIMES, DEGREE))
        residues[1] = values[:, :DEGREE]
        residues[0][:, exchange.layout.wanted()] = values[:, DEGREE:]
        level = seal.level_with(context, REPLY_PRIMES)
        opened = seal.api.Plaintext()
        decryptor.decrypt(seal.ciphertext_of(context, level, canonical(residues)), opened)
        got = seal.values_of(opened)[exchange.layout.wanted()[held]]
        want = (exchange.expected()[:, 0] + masks // 32)[start : start + len(held)]
        assert [int(v) % 2**59 for v in got] == [int(v) % 2**59 for v in want]
        start += len(held)
    assert start == count
