"""Paillier keys and ciphertexts: Enc(m) = (1 + n)^m r^n mod n^2, the same n, g = n + 1 and ciphertexts as `phe`.

Python integers take a time that depends on their values: nobody untrusted may share this machine. What a peer could
time from afar, powers with a secret exponent, goes through GMP's constant-time ladder (`powmod_sec`).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import gmpy2
import numpy as np
from cryptography.hazmat.primitives.asymmetric import rsa
from gmpy2 import mpz

from vfl.encryption.scheme import Fixed, Randomness, Wire, from_wire, to_wire

KEY_BITS = (2048, 3072, 4096)
TRIAL_BITS = 20
ROOTS = -(-128 // TRIAL_BITS)  # soundness 2^-128 from 2^-20 a root: 7, see check_public_key
TABLE_BYTES = 16 << 20  # per prime


@dataclass(frozen=True)
class PublicKey:
    """A modulus n. One that a peer sent goes through `check_public_key` before anything else."""

    n: int

    @cached_property
    def modulus(self) -> Any:
        """n^2, ready for gmpy2."""
        return mpz(self.n) ** 2

    @property
    def bits(self) -> int:
        return self.n.bit_length()

    @property
    def n_bytes(self) -> int:
        """Width of a plaintext on the wire; a ciphertext is twice as wide."""
        return -(-self.bits // 8)

    def to_bytes(self) -> bytes:
        return self.n.to_bytes(self.n_bytes, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> PublicKey:
        return cls(int.from_bytes(data, "little"))

    def encrypt(self, plaintext: int, r: int) -> Any:
        """(1 + n)^plaintext r^n mod n^2, for r uniform in Z_n^*."""
        return (1 + self.n * mpz(plaintext % self.n)) * gmpy2.powmod(r, self.n, self.modulus) % self.modulus

    def unit(self, randomness: Randomness = secrets.randbelow) -> int:
        """A uniform element of Z_n^*."""
        while True:
            r = randomness(self.n)
            if gmpy2.gcd(r, self.n) == 1:
                return r

    def __repr__(self) -> str:
        return f"PublicKey({self.bits} bits, {hashlib.sha256(self.to_bytes()).hexdigest()[:16]})"


class _Half:
    """The owner's arithmetic modulo the square of one prime p of n = p * other.

    r^n mod p^2, for uniform r, is uniform in the cyclic subgroup of order p - 1 (raising to `other` permutes it). A
    fixed base h = u^p of that order and a uniform exponent below p - 1 give the same distribution: no new assumption.
    We check h^((p-1)/l) != 1 for every prime l < 2^20 that divides p - 1. What remains: for a larger l that divides
    p - 1, h misses a factor l of the order with probability 1/l, below 2^-23 over random primes; then r^n is uniform
    in a subgroup whose index a peer cannot know without the factors.
    """

    def __init__(self, prime: int, other: int, randomness: Randomness) -> None:
        self.prime, self.square, self._randomness = mpz(prime), mpz(prime) ** 2, randomness
        self._scale = gmpy2.invert(-other, prime)  # 1 / L((1+n)^(p-1)), since (1+n)^(p-1) = 1 - n mod p^2
        self._root = gmpy2.invert(other * prime, prime - 1)  # takes n-th roots modulo p

    def decrypt(self, c: Any) -> Any:
        """The plaintext modulo p: L(c^(p-1) mod p^2) / L((1+n)^(p-1)), L(x) = (x - 1) / p."""
        power = gmpy2.powmod_sec(c % self.square, self.prime - 1, self.square)
        return (power - 1) // self.prime * self._scale % self.prime

    def root(self, value: Any) -> Any:
        return gmpy2.powmod_sec(value % self.prime, self._root, self.prime)

    @cached_property
    def base(self) -> Any:
        order = self.prime - 1
        small = [order // prime for prime in _small_prime_factors(order)]
        while True:
            u = self._randomness(int(self.prime) - 1) + 1
            base = gmpy2.powmod_sec(u, self.prime, self.square)
            if all(gmpy2.powmod_sec(base, power, self.square) != 1 for power in small):
                return base

    @cached_property
    def table(self) -> list[list[Any]]:
        """table[i][d] = h^(d 2^(w i)); the widest window w <= 8 whose table stays within TABLE_BYTES."""
        bits = self.prime.bit_length()
        window = next(w for w in range(8, 0, -1) if -(-bits // w) * (bits // 4 + 32) << w <= TABLE_BYTES or w == 1)
        rows, step, square = [], self.base, self.square
        for _ in range(-(-bits // window)):
            row = [mpz(1)]
            for _ in range((1 << window) - 1):
                row.append(row[-1] * step % square)
            rows.append(row)
            step = row[-1] * step % square
        return rows

    def noise(self, randomness: Randomness) -> Any:
        """r^n mod p^2 for a fresh uniform r: one multiplication a window."""
        table, square, product = self.table, self.square, mpz(1)
        mask = len(table[0]) - 1
        window = mask.bit_length()
        exponent = randomness(int(self.prime) - 1)
        for row in table:
            product = product * row[exponent & mask] % square
            exponent >>= window
        return product


class SecretKey:
    """Both primes. Whoever holds it reads every plaintext; it is never printed, sent or stored."""

    def __init__(self, p: int, q: int, randomness: Randomness = secrets.randbelow) -> None:
        if p == q or gmpy2.gcd(p * q, (p - 1) * (q - 1)) != 1:
            raise ValueError("these primes do not make a Paillier key")
        self.public = PublicKey(int(p) * int(q))
        self._p, self._q = _Half(p, q, randomness), _Half(q, p, randomness)
        self._lift = gmpy2.invert(self._q.prime, self._p.prime)
        self._lift_square = gmpy2.invert(self._q.square, self._p.square)

    def __repr__(self) -> str:
        return f"SecretKey(of {self.public!r})"

    def __reduce__(self) -> str:
        raise TypeError("a secret key does not leave its process")

    def encrypt(self, values: Sequence[int] | Fixed, randomness: Randomness = secrets.randbelow) -> Wire:
        """Encrypt signed integers below n/2 in magnitude, row by row, shape (count, 2 n_bytes)."""
        p, q, n, modulus, lift = self._p, self._q, mpz(self.public.n), self.public.modulus, self._lift_square
        integers: Sequence[int] = values.ravel().tolist() if isinstance(values, np.ndarray) else values
        if any(2 * abs(m) >= n for m in integers):
            raise ValueError("a plaintext reaches n / 2: its sign would be lost")
        sealed = []
        for m in integers:
            noise_q = q.noise(randomness)
            noise = noise_q + q.square * ((p.noise(randomness) - noise_q) * lift % p.square)
            sealed.append((noise + n * (noise * m % n)) % modulus)  # noise * (1 + m n)
        return to_wire(sealed, 2 * self.public.n_bytes)

    def decrypt(self, sealed: Wire) -> list[int]:
        """Plaintexts in [0, n). ValueError, before anything is decrypted, when one is no ciphertext under this key."""
        opened = []
        for c in check_ciphertexts(self.public, sealed):
            opened.append(self._join(self._p.decrypt(c), self._q.decrypt(c)))
        return opened

    def open(self, sealed: Wire) -> Wire:
        """`decrypt`, as rows of n_bytes."""
        return to_wire(self.decrypt(sealed), self.public.n_bytes)

    def prove(self, context: bytes) -> list[int]:
        """Shows that gcd(n, phi(n)) = 1 for `check_public_key`: n-th roots of hashed elements, tied to `context`."""
        challenges = (_challenge(self.public.n, context, i) for i in range(ROOTS))
        return [self._join(self._p.root(value), self._q.root(value)) for value in challenges]

    def _join(self, a: Any, b: Any) -> int:
        """The number below n that is a modulo p and b modulo q."""
        return int(b + self._q.prime * ((a - b) * self._lift % self._p.prime))


def generate(
    bits: int = 3072, *, insecure_for_tests: bool = False, randomness: Randomness = secrets.randbelow
) -> SecretKey:
    """A fresh key. The primes are those of an RSA key of `cryptography`; below 2048 bits only tests may go.

    `randomness` draws the primes of a test key and the base of the encryption tables.
    """
    if bits in KEY_BITS:
        numbers = rsa.generate_private_key(public_exponent=65537, key_size=bits).private_numbers()
        p, q = numbers.p, numbers.q
    elif insecure_for_tests and bits >= 256 and bits % 2 == 0:
        top = 3 << bits // 2 - 2  # the two top bits set: the product has its full length
        p, q = (int(gmpy2.next_prime(top + randomness(1 << bits // 2 - 3))) for _ in range(2))
    else:
        raise ValueError(f"a Paillier key has {', '.join(map(str, KEY_BITS))} bits, not {bits}")
    if (p * q).bit_length() != bits or p.bit_length() != q.bit_length():
        raise RuntimeError("the prime generator returned primes of the wrong length")
    return SecretKey(p, q, randomness)


def check_ciphertexts(public: PublicKey, sealed: Wire, count: int | None = None) -> list[Any]:
    """The received numbers, if there are `count` of the right width, each with 0 < c < n^2 and gcd(c, n) = 1.

    Anything else factors n or tells of it when decrypted (c = 0 does). ValueError gives counts only.
    """
    shape = (len(sealed) if count is None else count, 2 * public.n_bytes)
    if sealed.dtype != np.uint8 or sealed.shape != shape:
        raise ValueError(f"expected ciphertexts of shape {shape}, got {sealed.shape}")
    n, modulus, product = mpz(public.n), public.modulus, mpz(1)
    values = [mpz(c) for c in from_wire(sealed)]
    for c in values:
        product = product * c % n  # a factor shared with n stays in the product: one gcd for all
    if gmpy2.gcd(product, n) != 1 or any(c >= modulus for c in values):
        bad = sum(not 0 < c < modulus or gmpy2.gcd(c, n) != 1 for c in values)
        raise ValueError(f"{bad} of {len(values)} numbers are no ciphertexts under this key")
    return values


def check_public_key(n: int, bits: int, proof: Sequence[int], context: bytes) -> None:
    """ValueError unless n is a key of `bits` bits under which masks and re-randomisation hide what they should.

    They do when gcd(n, phi(n)) = 1: then (m, r) -> (1 + n)^m r^n is a bijection from Z_n x Z_n^* to Z_{n^2}^*.
    The proof (Goldberg, Reyzin, Sagga, Baldimtsi, eprint 2018/057, its Paillier section) is an n-th root of each of
    ROOTS elements hashed from context, n and index. If a prime f divides gcd(n, phi(n)), at most one unit in f has an
    n-th root. No prime below 2^20 divides n, so a root exists with probability < 2^-20: 7 of them leave 2^-140 a try,
    against the paper's 2^-128. The hash is a random oracle; `context` must hold what both sides drew afresh.
    """
    if n <= 0 or n.bit_length() != bits or n % 2 == 0:
        raise ValueError(f"the public key is no odd number of exactly {bits} bits")
    if gmpy2.gcd(n, _primorial() % n) != 1:
        raise ValueError("the public key has a small factor")
    if gmpy2.is_prime(n, 40) or gmpy2.is_power(n):
        raise ValueError("the public key is a prime or a perfect power")
    if len(proof) != ROOTS:
        raise ValueError(f"the public key's proof has {len(proof)} roots, not {ROOTS}")
    for index, root in enumerate(proof):
        challenge = _challenge(n, context, index)
        if not 0 < root < n or gmpy2.gcd(challenge, n) != 1 or gmpy2.powmod(root, n, n) != challenge:
            raise ValueError("the proof of the public key does not hold in this session")


def _challenge(n: int, context: bytes, index: int) -> Any:
    """Uniform in Z_n up to 2^-128: n's length + 128 bits of SHAKE-256 over length-prefixed parts, modulo n."""
    parts = (b"colonnade/paillier/roots/1", context, n.to_bytes(-(-n.bit_length() // 8), "little"), bytes([index]))
    seed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return mpz(int.from_bytes(hashlib.shake_256(seed).digest(-(-n.bit_length() // 8) + 16), "little")) % n


@lru_cache(maxsize=1)
def _primorial() -> Any:
    return gmpy2.primorial(1 << TRIAL_BITS)


def _small_prime_factors(number: Any) -> list[int]:
    """The primes below 2^20 that divide `number`."""
    product, factors, candidate = gmpy2.gcd(number, _primorial() % number), [], mpz(2)
    while product > 1:
        if product % candidate == 0:  # the primorial is square-free
            factors.append(int(candidate))
            product //= candidate
        candidate = gmpy2.next_prime(candidate)
    return factors
