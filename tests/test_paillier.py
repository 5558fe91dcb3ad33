"""Paillier: the arithmetic against phe and plain integers, and every refusal."""

from __future__ import annotations

import json
import pickle
import random
from math import gcd
from pathlib import Path
from unittest.mock import patch

import gmpy2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.errors import LocalError
from parties.workers import Workers
from vfl.encryption import weigh as weighing
from vfl.encryption.paillier import (
    ROOTS,
    PublicKey,
    SecretKey,
    _challenge,
    check_ciphertexts,
    check_public_key,
    generate,
)
from vfl.encryption.scheme import from_wire, to_wire
from vfl.encryption.weigh import PaillierOpener, PaillierWeigher, slots

VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors"
BITS, SESSION, BOUND = 512, b"session 1", 2**30


def primes_of(secret: SecretKey) -> tuple[int, int]:
    return int(secret._p.prime), int(secret._q.prime)


@pytest.fixture(scope="module")
def secret() -> SecretKey:
    return generate(BITS, insecure_for_tests=True, randomness=random.Random(1).randrange)


@pytest.fixture(scope="module")
def proof(secret) -> list[int]:
    return secret.prove(SESSION)


@pytest.fixture(scope="module")
def real() -> SecretKey:
    return generate(2048)


def numbers(secret: SecretKey, values: list[int]) -> np.ndarray:
    return to_wire(values, 2 * secret.public.n_bytes)


# The cipher


def test_phe_opens_ours_and_we_open_phe(real):
    phe = pytest.importorskip("phe")
    n = real.public.n
    theirs = phe.PaillierPublicKey(n)
    private = phe.PaillierPrivateKey(theirs, *primes_of(real))
    values = [0, 1, -1, 2**40, -(2**40), n // 2, -(n // 2)]
    assert [private.raw_decrypt(c) for c in from_wire(real.encrypt(values))] == [v % n for v in values]
    assert real.decrypt(numbers(real, [theirs.raw_encrypt(v % n) for v in values])) == [v % n for v in values]
    assert theirs.raw_encrypt(12345, r_value=67890) == PublicKey(n).encrypt(12345, 67890)


def test_known_answers():
    path = VECTORS / "paillier" / "phe_kat.json"
    if not path.exists():
        pytest.skip("the vectors are not beside this checkout")
    for case in json.loads(path.read_text())["cases"]:
        assert PublicKey(case["n"]).encrypt(case["m"], case["r"]) == case["c"]
        secret = SecretKey(case["p"], case["q"])
        assert secret.decrypt(numbers(secret, [case["c"]])) == [case["m"]]


@given(st.lists(st.integers(-(2**400), 2**400), max_size=5))
def test_round_trip(secret, values):
    assert secret.decrypt(secret.encrypt(values)) == [v % secret.public.n for v in values]


def test_encryption_is_fresh_replays_and_sums(secret):
    twice = secret.encrypt([5, 5])
    assert twice.shape == (2, 2 * secret.public.n_bytes)
    assert twice.dtype == np.uint8
    assert (twice[0] != twice[1]).any()
    assert (
        secret.encrypt([5, 6], random.Random(2).randrange) == secret.encrypt([5, 6], random.Random(2).randrange)
    ).all()
    a, b = from_wire(secret.encrypt(np.array([[40], [2]])))
    assert secret.decrypt(numbers(secret, [a * b % secret.public.n**2])) == [42]


def test_noise_is_an_nth_residue_and_its_base_has_no_small_index(secret):
    for prime, half in zip(primes_of(secret), (secret._p, secret._q), strict=True):
        noise = half.noise(random.Random(3).randrange)
        assert pow(int(noise), prime - 1, prime**2) == 1
        orders = [(prime - 1) // f for f in range(2, 5000) if gmpy2.is_prime(f) and (prime - 1) % f == 0]
        assert orders
        assert all(pow(int(half.base), order, prime**2) != 1 for order in orders)
        last = half.prime - 2  # the exponent drawn must reach the whole table
        assert half.noise(lambda _, e=int(last): e) == pow(int(half.base), int(last), prime**2)


def test_a_plaintext_whose_sign_would_be_lost_is_refused(secret):
    for value in (secret.public.n // 2 + 1, -secret.public.n):
        with pytest.raises(ValueError, match="sign would be lost"):
            secret.encrypt([1, value])


def test_numbers_that_are_no_ciphertexts_are_refused_before_decryption(secret, monkeypatch):
    n, (p, q) = secret.public.n, primes_of(secret)
    width, good = 2 * secret.public.n_bytes, from_wire(secret.encrypt([7]))[0]
    decrypted = []
    monkeypatch.setattr(type(secret._p), "decrypt", lambda _, c: decrypted.append(c))
    for bad in (0, n, n * n, 7 * n, n * n - n, p, q * q, p * 12345, good + n * n, 256**width - 1):
        with pytest.raises(ValueError, match="1 of 2 numbers are no ciphertexts") as error:
            secret.decrypt(numbers(secret, [good, bad]))
        assert str(bad) not in str(error.value).replace("1 of 2", "")
    for wrong in (numbers(secret, [good])[:, 1:], numbers(secret, [good]).astype(np.int64), numbers(secret, [good])[0]):
        with pytest.raises(ValueError, match="expected ciphertexts of shape"):
            secret.decrypt(wrong)
    with pytest.raises(ValueError, match="expected ciphertexts of shape"):
        check_ciphertexts(secret.public, numbers(secret, [good]), 2)
    assert not decrypted


# Weighing


def weigh(secret, x, r, bound=BOUND, width=1, **options):
    weigher = PaillierWeigher(secret.public, x, bound, width=width, **options)
    opener = PaillierOpener(secret, options.get("slot_bits") or 0, width)
    for part in range(weigher.parts):
        weigher.add(opener.encrypt(r[part * opener.rows : (part + 1) * opener.rows]))
    return weigher.open(secret.open(weigher.finish()))


@settings(max_examples=150)
@given(st.data())
def test_weighing_equals_exact_integers(secret, data):
    rows, columns, width = (data.draw(st.integers(*limits)) for limits in ((0, 12), (1, 9), (1, 2)))
    size = 2 ** data.draw(st.integers(0, 62)) - 1
    cells = st.one_of(st.just(0), st.integers(-size, size), st.sampled_from([size, -size]))
    residuals = st.one_of(st.integers(-BOUND, BOUND), st.sampled_from([0, BOUND, -BOUND]))
    x = np.array(data.draw(st.lists(cells, min_size=rows * columns, max_size=rows * columns)), np.int64)
    r = np.array(data.draw(st.lists(residuals, min_size=rows * width, max_size=rows * width)), np.int64)
    x, r = x.reshape(rows, columns), r.reshape(rows, width)
    with patch.object(weighing, "ROWS_PER_PART", data.draw(st.integers(1, 20))):
        got = weigh(secret, x, r, width=width)
    assert got.shape == (columns, width)
    assert (got == x.astype(object).T @ r.astype(object)).all()


def test_many_rows_and_several_packs(secret):
    generator = np.random.default_rng(0)
    x, r = generator.integers(-(2**23), 2**23, (300, 30)), generator.integers(-BOUND, BOUND, (300, 1))
    x[:, 0], x[:, 1] = 0, generator.integers(0, 2, 300)
    weigher = PaillierWeigher(secret.public, x, BOUND)
    weigher.add(secret.encrypt(r))
    masked = weigher.finish()
    assert len(masked) > 2
    assert (weigher.open(secret.open(masked)) == x.astype(object).T @ r.astype(object)).all()


def test_workers_change_nothing(secret):
    generator = np.random.default_rng(1)
    x, r = generator.integers(-99, 99, (20, 3)), generator.integers(-BOUND, BOUND, (20, 2))
    assert (weigh(secret, x, r, width=2, workers=Workers(2)) == x.T @ r).all()


def test_sums_that_do_not_fit_are_refused(secret):
    x, r = np.array([[2**20], [-(2**20)]]), np.array([[5], [5]])
    for options in ({"bound": 2**500}, {"slot_bits": 52}):  # 2^21 * 2^30, and two bits
        with pytest.raises(LocalError, match="do not fit"):
            weigh(secret, x, r, **options)
    assert weigh(secret, x, r, slot_bits=53).tolist() == [[0]]
    edge = BITS - 1 - 2 - 21  # the largest sum one slot holds
    assert weigh(secret, x * [[1], [-1]], [2**edge, 2**edge], bound=2**edge).tolist() == [[2 ** (edge + 21)]]
    with pytest.raises(LocalError, match="do not fit"):
        weigh(secret, x, r, bound=2**edge + 1)
    for bad in (np.zeros(2, np.int64), np.array([[2**62], [0]]), np.array([[-(2**63)], [0]])):
        with pytest.raises(LocalError, match="below 2\\^62"):
            PaillierWeigher(secret.public, bad, BOUND)


def test_an_agreed_slot_fixes_the_number_of_packs(secret):
    per_pack = slots(secret.public, 64)
    for x in (np.ones((4, 20), np.int64), np.full((4, 20), 2**29)):
        weigher = PaillierWeigher(secret.public, x, BOUND, slot_bits=64)
        weigher.add(secret.encrypt([1, 2, 3, 4]))
        assert len(weigher.finish()) == -(-20 // per_pack)


def test_bad_ciphertexts_are_refused_on_arrival(secret):
    x = np.array([[1], [2]])
    for bad in (0, secret.public.n, secret.public.n**2):
        with pytest.raises(ValueError, match="1 of 2 numbers"):
            PaillierWeigher(secret.public, x, BOUND).add(numbers(secret, [from_wire(secret.encrypt([1]))[0], bad]))
    with pytest.raises(ValueError, match="shape"):
        PaillierWeigher(secret.public, x, BOUND).add(secret.encrypt([1, 2, 3]))


def test_an_exchange_is_used_once(secret):
    weigher = PaillierWeigher(secret.public, np.array([[4]]), BOUND)
    with pytest.raises(RuntimeError):
        weigher.open(to_wire([0], secret.public.n_bytes))
    with pytest.raises(RuntimeError, match="after all rows"):
        weigher.finish()
    sealed = secret.encrypt([3])
    weigher.add(sealed)
    opened = secret.open(weigher.finish())
    for again in (weigher.finish, lambda: weigher.add(sealed)):
        with pytest.raises(RuntimeError, match="once"):
            again()
    assert weigher.open(opened).tolist() == [[12]]
    with pytest.raises(RuntimeError, match="once"):
        weigher.open(opened)


# What the label holder sees


def masked_by(secret, x, r, masks, bound=BOUND):
    """The weigher and its reply when its masks are the given ones."""
    draws = iter([v for mask in masks for v in (mask, 3)])  # per pack: the mask, then the unit 3
    weigher = PaillierWeigher(secret.public, x, bound, randomness=lambda _: next(draws))
    weigher.add(secret.encrypt(r))
    return weigher, weigher.finish()


def test_it_sees_the_packs_plus_a_mask_modulo_n(secret):
    x, r, n = np.array([[3, -5], [7, 11]]), [-2, 9], secret.public.n
    slot = (16 * BOUND - 1).bit_length() + 2  # column 1: 5 + 11
    packed = sum((int(v) + 2 ** (slot - 1)) << slot * k for k, v in enumerate(x.T @ np.array(r)))
    for mask in (0, 1, n - 1, n // 3):
        weigher, masked = masked_by(secret, x, r, [mask])
        assert secret.decrypt(masked) == [(packed + mask) % n]
        assert weigher.open(secret.open(masked)).tolist() == [[57], [109]]


@pytest.mark.parametrize("residual", [1, 2**450])
def test_every_table_explains_what_it_sees(secret, residual):
    """One mask for each table gives the same plaintext, whatever the residual: uniform masks hide the table."""
    n, x, other = secret.public.n, np.array([[1000]]), np.array([[-7]])
    seen = {}
    for table in (x, other):
        slot = (int(abs(table[0, 0])) * BOUND - 1).bit_length() + 2
        plain = int(table[0, 0]) * residual + 2 ** (slot - 1)
        weigher, masked = masked_by(secret, table, [residual], [(12345 - plain) % n])
        seen[int(table[0, 0])] = secret.decrypt(masked)
        if residual > BOUND:
            with pytest.raises(ValueError, match="out of their range"):
                weigher.open(secret.open(masked))
    assert seen == {1000: [12345], -7: [12345]}


def test_masks_are_spread_over_all_of_z_n(secret):
    draw, n, seen = random.Random(4).randrange, secret.public.n, []
    sealed = secret.encrypt([1], draw)
    for _ in range(400):
        weigher = PaillierWeigher(secret.public, np.array([[1]]), BOUND, randomness=draw)
        weigher.add(sealed)
        seen.append(secret.decrypt(weigher.finish())[0])
    counts = np.bincount([8 * v // n for v in seen], minlength=8)
    assert ((counts - 50) ** 2 / 50).sum() < 24.3  # chi-squared, 7 degrees of freedom, 0.1 %


def test_replies_are_rerandomised_and_replay(secret):
    x, sealed = np.array([[1, 2]]), secret.encrypt([1])

    def reply(randomness):
        weigher = PaillierWeigher(secret.public, x, BOUND, randomness=randomness)
        weigher.add(sealed)
        return weigher.finish().tobytes()

    fixed = [iter([42, unit]) for unit in (5, 7)]  # the same mask, another unit
    first, second = (reply(lambda _, d=draws: next(d)) for draws in fixed)
    assert first != second
    assert len({secret.decrypt(np.frombuffer(f, np.uint8)[None])[0] for f in (first, second)}) == 1
    assert reply(random.Random(5).randrange) == reply(random.Random(5).randrange)


def test_a_false_decryption_is_refused(secret):
    n, width = secret.public.n, secret.public.n_bytes
    lies = (lambda v: (v + (1 << 400)) % n, lambda v: (v + 1000 * BOUND) % n, lambda v: v + n, lambda _: 0)
    for lie in lies:
        weigher, masked = masked_by(secret, np.array([[1000]]), [5], [n // 5])
        with pytest.raises(ValueError, match="out of their range"):
            weigher.open(to_wire([lie(secret.decrypt(masked)[0])], width + 1)[:, :width])
    weigher, masked = masked_by(secret, np.array([[1000]]), [5], [n // 5])
    with pytest.raises(ValueError, match="expected 1 plaintexts"):
        weigher.open(masked)


# Keys


def test_an_honest_key_is_accepted_in_its_session_only(secret, proof, real):
    check_public_key(secret.public.n, BITS, proof, SESSION)
    check_public_key(real.public.n, 2048, real.prove(SESSION), SESSION)
    assert PublicKey.from_bytes(secret.public.to_bytes()) == secret.public
    with pytest.raises(ValueError, match="in this session"):
        check_public_key(secret.public.n, BITS, proof, b"session 2")
    n = secret.public.n
    for forged in (proof[::-1], [n - s for s in proof], [proof[0] + n, *proof[1:]], [0] * ROOTS, [-s for s in proof]):
        with pytest.raises(ValueError, match="in this session"):
            check_public_key(n, BITS, forged, SESSION)
    for short in ([], proof[:-1], [*proof, 1]):
        with pytest.raises(ValueError, match="roots, not 7"):
            check_public_key(n, BITS, short, SESSION)


def test_malformed_keys_are_refused(secret, proof):
    n, p = secret.public.n, primes_of(secret)[0]
    below, cofactor = int(gmpy2.prev_prime(1 << 20)), int(gmpy2.next_prime(3 << BITS - 22))
    cases = {
        "exactly 512 bits": [n >> 1, n * 2 + 1, -n, 0, n + 1],
        "small factor": [3 * int(gmpy2.next_prime(2 ** (BITS - 2))), below * cofactor],
        "prime or a perfect power": [int(gmpy2.next_prime(n)), p * p],
    }
    for reason, moduli in cases.items():
        for bad in moduli:
            with pytest.raises(ValueError, match=reason):
                check_public_key(bad, BITS, proof, SESSION)


def test_a_key_that_sees_through_masks_has_no_proof():
    """q = 2kp + 1: p divides gcd(n, phi(n)). Its owner, with all that it knows, finds no root of a challenge."""
    p = int(gmpy2.next_prime(3 << 126))
    q = next(q for k in range(1 << 124, 1 << 125) if gmpy2.is_prime(q := 2 * k * p + 1))
    n = p * q
    with pytest.raises(ValueError, match="do not make a Paillier key"):
        SecretKey(p, q)
    roots = []
    for index in range(ROOTS):
        challenge = int(_challenge(n, SESSION, index))
        assert gcd(challenge, n) == 1
        assert pow(challenge, (q - 1) // p, q) != 1  # no p-th power modulo q, so no n-th power
        root = pow(challenge, pow(n, -1, p - 1), p)  # a root modulo p there is
        roots.append(root + p * ((1 - root) * pow(p, -1, q) % q))
        assert pow(roots[-1], n, p) == challenge % p
    with pytest.raises(ValueError, match="in this session"):
        check_public_key(n, n.bit_length(), roots, SESSION)


def test_primes_are_refused_as_keys():
    path = VECTORS / "wycheproof" / "primality_test.json"
    if not path.exists():
        pytest.skip("the vectors are not beside this checkout")
    tests = [t for group in json.loads(path.read_text())["testGroups"] for t in group["tests"]]
    for value in (int(t["value"], 16) for t in tests if t["result"] == "valid"):
        with pytest.raises(ValueError, match="exactly" if value == 2 else "small factor|prime or a perfect power"):
            check_public_key(value, value.bit_length(), [1] * ROOTS, SESSION)


def test_generation_refuses_short_keys():
    for bits, options in ((1024, {}), (2047, {}), (512, {}), (128, {"insecure_for_tests": True})):
        with pytest.raises(ValueError, match="2048, 3072, 4096"):
            generate(bits, **options)


def test_a_real_key_has_its_exact_length(real):
    p, q = primes_of(real)
    assert (real.public.bits, p.bit_length(), q.bit_length()) == (2048, 1024, 1024)
    assert real.public.n_bytes == 256


def test_a_secret_key_shows_and_gives_away_nothing(secret):
    text = f"{secret!r} {secret} {secret.public!r} {secret._p!r}"
    for number in (*primes_of(secret), secret.public.n):
        assert str(number)[:12] not in text
        assert f"{number:x}"[:12] not in text
    with pytest.raises(TypeError):
        pickle.dumps(secret)
