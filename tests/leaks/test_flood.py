"""What decryption noise tells the label holder about X, and what either side holds otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from tests.conftest import Stream
from vfl.encryption import lattice, ring
from vfl.encryption.lattice import DEGREE, PLAIN_BITS, Columns, LatticeKey, LatticeWeigher
from vfl.encryption.layout import Layout
from vfl.encryption.ring import PRIMES

ROWS, COLUMNS, EXCHANGES, BOUND = 16, 512, 20, 1 << 30
LAYOUT = Layout(ROWS, 1, ROWS, 1)  # 512 columns of 16 rows in one product: 8,192 unknown numbers
X = np.random.default_rng(1).normal(0, 1 << 20, (ROWS, COLUMNS)).astype(np.int64)
FEATURES = Columns(X, LAYOUT)
CHANCE = 0.05  # 4.5 deviations of a correlation of 8,192 independent pairs


def replies() -> Iterator[tuple[LatticeKey, np.ndarray, np.ndarray]]:
    """Exchange by exchange what the label holder has: its key, the noise of what it sealed (N,), the reply."""
    stream = Stream("attack")
    for number in range(EXCHANGES):
        context = number.to_bytes(8, "little")
        key, residual = LatticeKey(context, LAYOUT, stream), random_residual(number)
        public, sealed = key.public(), key.encrypt(residual)
        plain = np.zeros(DEGREE, np.int64)
        plain[:ROWS] = residual[:, 0]
        weigher = LatticeWeigher(FEATURES, public, context, BOUND, entropy=stream)
        weigher.add(sealed)
        yield key, noise_of(phase(sealed[0], context, key), plain), weigher.finish()[0]


def random_residual(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-BOUND, BOUND + 1, (ROWS, 1))


def phase(row: np.ndarray, context: bytes, key: LatticeKey) -> np.ndarray:
    """c0 + c1 s of what was sealed first after the zero, (primes, N)."""
    c0, c1 = ring.unpack(row, len(PRIMES)), ring.uniform(lattice._seed(context, 1))
    return ring.inverse(ring.reduce_all(c0 + ring.reduce_all(c1 * key._secret)))


def noise_of(values: np.ndarray, plain: np.ndarray | None = None) -> np.ndarray:
    """Residues (primes, k) less q m / t for the plaintexts m: the given ones, else the nearest."""
    q, out = ring.modulus(len(values)), []
    for place, value in enumerate(ring.to_integers(values)):
        nearest = ((value << PLAIN_BITS) + q // 2) // q if plain is None else int(plain[place])
        distance = ((value << PLAIN_BITS) - nearest * q) % (q << PLAIN_BITS)
        out.append((distance - (q << PLAIN_BITS) if distance > q << PLAIN_BITS - 1 else distance) / 2**PLAIN_BITS)
    return np.array(out)


def decryption_noise(key: LatticeKey, reply: np.ndarray) -> np.ndarray:
    """What is left of a reply in the wanted coefficients when key and plaintexts are taken off, in modulus steps."""
    places = DEGREE + LAYOUT.products
    values = ring.unpack(reply, len(reply) // places // ring.PRIME_BYTES)
    c1 = ring.forward(values[:, :DEGREE])
    opened = ring.inverse(ring.reduce_all(c1 * key._secret[: len(values)]))[:, LAYOUT.wanted()]
    return noise_of(ring.reduce_all(opened + values[:, DEGREE:]))


def guessed() -> np.ndarray:
    """Least squares for X from sum_i E_i(Z) P_i(Z) mod Z^k + 1, where E_i are the noises of row i, the same in every
    k-th place, and P_i is row i of X: a transform over k makes that `COLUMNS` systems of 16 unknowns."""
    twist = np.exp(1j * np.pi * np.arange(COLUMNS) / COLUMNS)
    known, seen = [], []
    for key, noise, reply in replies():
        known.append(np.fft.fft(noise.reshape(COLUMNS, ROWS) * twist[:, np.newaxis], axis=0))
        seen.append(np.fft.fft(decryption_noise(key, reply) * twist))
    systems, right = np.stack(known, axis=1), np.stack(seen, axis=1)
    solved = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(systems, right, strict=True)])
    return (np.fft.ifft(solved, axis=0) / twist[:, np.newaxis]).real.T


def correlation(guess: np.ndarray, truth: np.ndarray) -> float:
    return float(abs(np.corrcoef(guess.ravel(), truth.ravel())[0, 1]))


def bare(flood: bool, switch: bool):
    """`LatticeWeigher._cover` that leaves out the flood, or the switch of the modulus."""

    def cover(self: LatticeWeigher, total: np.ndarray, masks: np.ndarray, used: np.ndarray) -> np.ndarray:
        u = ring.forward(ring.residues(ring.ternary(self._entropy)))
        c0, c1 = ring.inverse(ring.reduce_all(total + ring.reduce_all(self._sealed[0] * u)))
        c1 = ring.reduce_all(c1 + ring.residues(ring.noise(self._entropy)))
        wanted = c0[:, LAYOUT.wanted()] + lattice._scaled(masks.view(np.int64))
        if flood:
            half = 1 << lattice.FLOOD_BITS - 1
            drawn = [(int.from_bytes(self._entropy(15), "little") >> 4) - half for _ in used]  # 116 bits
            wanted += ring.from_integers(drawn, len(PRIMES))
        reply = np.concatenate([c1, ring.reduce_all(wanted)], axis=1)
        return ring.pack(ring.switch(reply, lattice.REPLY_PRIMES) if switch else reply)

    return cover


# The attack


def test_without_flood_and_switch_the_label_holder_reads_x_from_the_noise(monkeypatch):
    monkeypatch.setattr(LatticeWeigher, "_cover", bare(flood=False, switch=False))
    guess = guessed()
    assert correlation(guess, X) > 0.99
    assert np.abs(guess - X).max() < 1e-2 * (1 << 20)  # in real numbers to the second digit


def test_the_flood_alone_hides_x(monkeypatch):
    monkeypatch.setattr(LatticeWeigher, "_cover", bare(flood=True, switch=False))
    assert correlation(guessed(), X) < CHANCE


def test_with_flood_and_switch_the_noise_tells_nothing_of_x():
    assert correlation(guessed(), X) < CHANCE


def test_the_copy_that_the_attack_is_shown_on_differs_in_flood_and_switch_only(monkeypatch):
    honest = next(reply for _, _, reply in replies())
    monkeypatch.setattr(LatticeWeigher, "_cover", bare(flood=True, switch=True))
    copied = next(reply for _, _, reply in replies())
    places = len(honest) // lattice.REPLY_PRIMES // ring.PRIME_BYTES
    assert places == DEGREE + COLUMNS
    assert (honest == copied).all()


# What the label holder sees otherwise


def exchange(entropy=os.urandom) -> tuple[LatticeKey, np.ndarray, np.ndarray]:
    key = LatticeKey(b"context", LAYOUT, Stream("key"))
    public, sealed = key.public(), key.encrypt(random_residual(0))
    weigher = LatticeWeigher(FEATURES, public, b"context", BOUND, entropy=entropy)
    weigher.add(sealed)
    return key, sealed, weigher.finish()


def test_the_same_input_is_answered_differently_in_every_number():
    (_, _, first), (_, _, second) = exchange(), exchange()
    first, second = (ring.unpack(reply[0], lattice.REPLY_PRIMES) for reply in (first, second))
    assert first.shape == (lattice.REPLY_PRIMES, DEGREE + COLUMNS)
    assert (first == second).sum() < 5  # by chance one number in 8 million


def test_a_zero_table_and_ours_give_replies_that_look_the_same():
    """Against what the mask does not cover: with one mask, c1 and the noise of the sums have one distribution."""
    seen = {}
    for name, x in (("ours", X), ("zero", 0 * X)):
        key = LatticeKey(b"context", LAYOUT, Stream("key"))
        public, sealed = key.public(), key.encrypt(random_residual(0))
        weigher = LatticeWeigher(Columns(x, LAYOUT), public, b"context", BOUND)
        weigher.add(sealed)
        seen[name] = np.sort(decryption_noise(key, weigher.finish()[0]))
    distance = np.abs(np.searchsorted(seen["ours"], seen["zero"]) - np.arange(COLUMNS)).max() / COLUMNS
    assert distance < 2.8 / (COLUMNS / 2) ** 0.5  # Kolmogorov and Smirnov: 3e-7


def test_what_the_label_holder_opens_is_uniform_modulo_2_64():
    opened = []
    for _ in range(8):
        key, _, reply = exchange()
        opened.append(key.open(reply, COLUMNS).view("<u8"))
    values = np.concatenate(opened).ravel()
    assert len(set(values.tolist())) == 8 * COLUMNS
    for cell in (values >> np.uint64(60), values >> np.uint64(30) & np.uint64(15), values & np.uint64(15)):
        counts = np.bincount(cell.astype(int), minlength=16)
        assert ((counts - 256.0) ** 2 / 256).sum() < 55  # chi-squared, 15 degrees of freedom: 1e-6
    sums = (X.T @ random_residual(0)).ravel()
    assert correlation(values[:COLUMNS].astype(float), sums.astype(float)) < 0.25  # 5.6 deviations


# What a feature holder sees


@pytest.mark.parametrize("equal", [False, True])
def test_what_is_sealed_correlates_with_no_residual(equal):
    """Also when all are equal; both halves, as coefficients and in the order of the wire."""
    layout = Layout(DEGREE, 1, DEGREE, 1)
    residual = np.random.default_rng(2).integers(-BOUND, BOUND + 1, (DEGREE, 1))
    if equal:
        residual[:] = BOUND
    key = LatticeKey(b"context", layout, Stream("key"))
    key.public()
    c0 = ring.unpack(key.encrypt(residual)[0], len(PRIMES))
    c1 = ring.uniform(lattice._seed(b"context", 1))
    plain, ramp = residual[:, 0].astype(float), np.arange(DEGREE, dtype=float)
    for half in (c0, c1):
        whole = np.array([float(v) for v in ring.to_integers(ring.inverse(half))])
        for seen in (whole, *half, *ring.inverse(half)):
            for secret in (ramp if equal else plain, np.abs(ramp - DEGREE / 2)):
                assert correlation(seen, secret) < 0.06  # 5.4 deviations
        for index, prime in enumerate(PRIMES):
            counts = np.bincount((half[index].astype(int) % prime) * 32 // prime, minlength=32)
            assert ((counts - 256.0) ** 2 / 256).sum() < 85  # 31 degrees of freedom: 1e-6


def test_equal_residuals_are_sealed_differently_in_every_exchange():
    layout, residual = Layout(100, 1, 100, 1), np.full((100, 1), 7)
    sealed = []
    for context in (b"first", b"first", b"second"):
        key = LatticeKey(context, layout)
        key.public()
        sealed.append(ring.unpack(key.encrypt(residual)[0], len(PRIMES)))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (sealed[one] == sealed[other]).sum() < 5
