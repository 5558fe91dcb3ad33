"""The ring's arithmetic in floats against exact integers, and the distributions of what is drawn."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Stream
from vfl.encryption import ring
from vfl.encryption.ring import DEGREE, PRIMES

Q = ring.modulus()


def canonical(values: np.ndarray) -> np.ndarray:
    """Residues in [0, p), int64."""
    primes = np.array(PRIMES[: values.shape[-2]])[:, np.newaxis]
    return values.astype(np.int64) % primes


def centred(values: np.ndarray) -> np.ndarray:
    """The residues nearest to zero, float64."""
    primes = np.array(PRIMES[: values.shape[-2]])[:, np.newaxis]
    low = canonical(values)
    return (low - primes * (low > primes // 2)).astype(np.float64)


def negacyclic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b modulo X^N + 1 for residues of one prime in [0, 2^23), exactly: one product of two integers of 64 kB."""
    left, right = (int.from_bytes(v.astype("<u8").tobytes(), "little") for v in (a, b))
    digits = np.frombuffer((left * right).to_bytes(16 * DEGREE, "little"), "<i8")  # N * 2^46 is below 2^63
    return np.asarray(digits[:DEGREE] - digits[DEGREE:])


def polynomial(seed: int) -> np.ndarray:
    """(primes, N) uniform residues, nearest to zero."""
    generator = np.random.default_rng(seed)
    return centred(np.stack([generator.integers(0, prime, DEGREE) for prime in PRIMES]))


def extreme(seed: int | None) -> np.ndarray:
    """All residues as large as they come: (p-1)/2, or plus and minus that."""
    signs = np.ones(DEGREE) if seed is None else np.random.default_rng(seed).choice([-1.0, 1.0], DEGREE)
    return np.stack([prime // 2 * signs for prime in PRIMES])


SAMPLES = {"uniform": polynomial(1), "largest": extreme(None), "plus and minus": extreme(2)}
BY_NAME = pytest.mark.parametrize("x", SAMPLES.values(), ids=SAMPLES)


# Transform and product


def test_primes_are_the_largest_with_all_roots():
    def prime(n: int) -> bool:
        return all(n % d for d in range(2, int(n**0.5) + 1))

    found = [n for n in range((1 << 23) - 2 * DEGREE + 1, PRIMES[-1] - 1, -2 * DEGREE) if prime(n)]
    assert tuple(found) == PRIMES
    assert np.prod([int(p) for p in PRIMES], dtype=object) == Q


@given(st.lists(st.integers(1 - 2**52, 2**52 - 1), min_size=1, max_size=50), st.sampled_from(PRIMES))
def test_reduction_is_exact_below_2_52(values, prime):
    edges = [prime // 2, -(prime // 2), prime // 2 + 1, prime * (2**52 // prime), 2**52 - 1, 1 - 2**52]
    got = ring.reduce(np.array([*values, *edges], float), prime)
    for before, after in zip([*values, *edges], got, strict=True):
        assert (before - int(after)) % prime == 0
        assert 2 * abs(after) <= prime + 3


@BY_NAME
def test_transform_and_inverse(x):
    for there, back in ((ring.forward, ring.inverse), (ring.inverse, ring.forward)):
        assert (canonical(back(there(x))) == canonical(x)).all()
    several = np.stack([x, -x, 0 * x])[:, :3]  # any number of polynomials, any number of primes
    assert (canonical(ring.inverse(ring.forward(several))) == canonical(several)).all()


@BY_NAME
def test_the_transform_evaluates_at_every_root_of_x_to_the_n_plus_1(x):
    monomial = np.zeros((len(PRIMES), DEGREE))
    monomial[:, 1] = 1
    roots, values = canonical(ring.forward(monomial)), canonical(ring.forward(x))
    for index, prime in enumerate(PRIMES):
        assert len(set(roots[index])) == DEGREE
        assert {pow(int(root), DEGREE, prime) for root in roots[index, ::100]} == {prime - 1}
        for k in (0, 1, 63, 64, 4097, DEGREE - 1):
            value, root = 0, int(roots[index, k])
            for coefficient in canonical(x)[index, ::-1].tolist():
                value = (value * root + coefficient) % prime
            assert value == values[index, k]


@pytest.mark.parametrize(("a", "b"), [("uniform", "uniform"), ("largest", "largest"), ("uniform", "plus and minus")])
def test_a_product_modulo_x_to_the_n_plus_1(a, b):
    a, b = SAMPLES[a], SAMPLES[b]
    got = canonical(ring.inverse(ring.reduce_all(ring.forward(a) * ring.forward(b))))
    for index, prime in enumerate(PRIMES):
        assert (got[index] == negacyclic(canonical(a)[index], canonical(b)[index]) % prime).all()


def test_the_largest_dot_products_of_a_transform_are_exact():
    """Coefficients with the signs of one row of the matrix: the largest sum that 128 products can give."""
    for index, prime in enumerate(PRIMES):
        to, back = ring._transforms(prime)
        for matrix in (to.rows, back.rows, to.columns.T, back.columns.T):
            integers = matrix.astype(np.int64)
            for row in (1, 5, len(matrix) - 1):
                x = np.where(matrix[row] < 0, -1.0, 1.0) * ((prime + 3) // 2)
                exact = integers @ x.astype(np.int64)
                assert ((matrix @ x).astype(np.int64) == exact).all()
                assert 2**44 < np.abs(exact).max() < 2**51
        x = np.zeros((index + 1, DEGREE))
        x[index].reshape(ring.ROWS, ring.COLUMNS)[:] = (np.where(to.rows[5] < 0, -1, 1) * (prime // 2))[:, np.newaxis]
        assert (canonical(ring.inverse(ring.forward(x))) == canonical(x)).all()


def test_products_added_up_unreduced_are_exact():
    largest, total = extreme(None), np.zeros((len(PRIMES), DEGREE))
    for _ in range(ring.UNREDUCED - 1):
        total += largest * largest
    total += largest  # what is left of an earlier reduction
    assert total.max() < 2**53
    for index, prime in enumerate(PRIMES):
        half = prime // 2
        assert (total[index].astype(object) == (ring.UNREDUCED - 1) * half**2 + half).all()


def test_residues_of_large_integers():
    values = np.array([2**52 - 1, 1 - 2**52, 0, -1, 1, PRIMES[0]])
    got = canonical(ring.residues(values))
    assert got.tolist() == [[int(v) % prime for v in values] for prime in PRIMES]
    assert ring.residues(values, 3).shape == (3, 6)


@given(st.lists(st.integers(-(2**200), 2**200), min_size=1, max_size=20), st.integers(1, len(PRIMES)))
def test_integers_and_residues(values, primes):
    got = ring.to_integers(ring.from_integers(values, primes))
    assert got == [v % ring.modulus(primes) for v in values]


# Switching the modulus


def switched_error(before: list[int], after: list[int], primes: int) -> float:
    """The largest distance of `after` from before / dropped, modulo what is left."""
    kept = ring.modulus(primes)
    dropped = Q // kept
    distances = [(new * dropped - old) % Q for old, new in zip(before, after, strict=True)]
    return float(max(Fraction(min(v, Q - v), dropped) for v in distances))


@pytest.mark.parametrize("primes", [1, 4, 7])
def test_switching_divides_and_rounds(primes):
    half = Q // ring.modulus(primes) // 2  # the remainder that is furthest from every division
    edges = [0, 1, Q - 1, Q // 2, Q // 2 + 1, half, half + 1, Q - half, 7 * Q // 9, PRIMES[-1] // 2]
    values = np.concatenate([ring.from_integers(edges, len(PRIMES)), polynomial(3)[:, :500]], axis=1)
    values = np.concatenate([values, extreme(None)[:, :1], -extreme(None)[:, :1]], axis=1)
    got = ring.switch(values.copy(), primes)
    assert got.shape == (primes, values.shape[1])
    errors = switched_error(ring.to_integers(values), ring.to_integers(got), primes)
    assert 0.4 < errors < 0.51
    assert (ring.switch(got, primes) == got).all()


# Bytes


@given(st.integers(0, 2**32), st.integers(1, len(PRIMES)), st.integers(1, 9))
def test_what_is_packed_is_unpacked(seed, primes, count):
    generator = np.random.default_rng(seed)
    values = np.stack([generator.choice([0, 1, p // 2, p // 2 + 1, p - 1, p // 3], count) for p in PRIMES[:primes]])
    raw = ring.pack(centred(values))
    assert raw.tolist() == list(b"".join(int(v).to_bytes(3, "little") for v in values.ravel()))
    assert (ring.unpack(raw, primes) == centred(values)).all()
    several = np.stack([raw, raw])
    assert (ring.unpack(several, primes) == centred(values)).all()


@pytest.mark.parametrize("index", range(len(PRIMES)))
def test_numbers_that_are_no_residues_are_refused(index):
    for value, good in ((PRIMES[index] - 1, True), (PRIMES[index], False), (2**24 - 1, False)):
        raw = np.zeros((len(PRIMES), 2, 3), np.uint8)
        raw[index, 1] = list(value.to_bytes(3, "little"))
        if good:
            assert canonical(ring.unpack(raw.ravel(), len(PRIMES)))[index].tolist() == [0, value]
            continue
        with pytest.raises(ValueError, match="1 numbers are no residues"):
            ring.unpack(raw.ravel(), len(PRIMES))


@given(st.binary(max_size=200), st.integers(1, len(PRIMES)))
def test_any_bytes_unpack_or_are_refused(raw, primes):
    data = np.frombuffer(raw, np.uint8)
    try:
        values = ring.unpack(data, primes)
    except ValueError:
        return
    assert ring.pack(values).tobytes() == raw


# What is drawn


def test_a_uniform_polynomial_follows_from_its_seed_alone():
    def plainly(seed: bytes, index: int) -> list[int]:
        stream, out = hashlib.shake_128(seed + bytes([index])).digest(4 * DEGREE), []
        for start in range(0, len(stream), 3):
            value = int.from_bytes(stream[start : start + 3], "little") % 2**23
            if value < PRIMES[index]:
                out.append(value)
        return out[:DEGREE]

    first = canonical(ring.uniform(b"a seed"))
    for index in (0, 7):
        expected = plainly(b"a seed", index)
        assert first[index, : len(expected)].tolist() == expected
        assert len(expected) == DEGREE
    assert (first == canonical(ring.uniform(b"a seed"))).all()
    for other in (b"another", b"a seed\0", b""):
        assert (first == canonical(ring.uniform(other))).mean() < 1e-3  # by chance once in 8 million
    assert (first[0] == first[1]).mean() < 1e-3


def test_a_uniform_polynomial_is_uniform():
    drawn = np.concatenate([canonical(ring.uniform(bytes([number]))) for number in range(8)], axis=1)
    for index, prime in enumerate(PRIMES):
        values = drawn[index]
        assert values.min() >= 0
        assert values.max() < prime
        for cell in (values * 64 // prime, values % 64):
            counts = np.bincount(cell, minlength=64)
            assert ((counts - 1024.0) ** 2 / 1024).sum() < 140  # chi-squared, 63 degrees of freedom: 1e-7


def test_a_stream_with_many_rejections_is_prolonged(monkeypatch):
    class Stubborn:
        def __init__(self, seed: bytes) -> None:
            self.index = seed[-1]

        def digest(self, length: int) -> bytes:
            return (b"\xff" * 30_000 + bytes([self.index, 1, 0]) * length)[:length]

    monkeypatch.setattr(ring.hashlib, "shake_128", Stubborn)
    assert canonical(ring.uniform(b"")).tolist() == [[256 + index] * DEGREE for index in range(len(PRIMES))]


def test_ternary_takes_every_byte_below_255_modulo_3():
    sizes = []

    def counting(size: int) -> bytes:
        sizes.append(size)
        return bytes(i % 256 for i in range(size))

    drawn = ring.ternary(counting)
    assert drawn[:255].tolist() == [i % 3 - 1 for i in range(255)]
    assert np.bincount(drawn[:255].astype(int) + 1).tolist() == [85, 85, 85]
    assert drawn[255] == -1  # byte 255 is left out
    assert drawn.shape == (DEGREE,)
    assert len(sizes) == 1
    seen = iter([b"\xff" * (DEGREE + 256), b"\x02" * (DEGREE + 256)])
    assert (ring.ternary(lambda _: next(seen)) == 1).all()


def test_noise_is_the_difference_of_two_counts_of_21_bits():
    words = [0, 2**21 - 1, 2**32 - 1, 2**21, 0b1011, 2**20]
    first, second = np.array(words * DEGREE, "<u4")[:DEGREE], np.array(words[::-1] * DEGREE, "<u4")[:DEGREE]
    drawn = ring.noise(lambda size: (first.tobytes() + second.tobytes())[:size])
    ones = [bin(word % 2**21).count("1") for word in words]
    assert drawn[:6].tolist() == [a - b for a, b in zip(ones, ones[::-1], strict=True)]
    top = np.full(DEGREE, 2**32 - 1, "<u4").tobytes()
    assert (ring.noise(lambda _: top + bytes(4 * DEGREE)) == ring.NOISE_BOUND).all()
    assert (ring.noise(lambda _: bytes(4 * DEGREE) + top) == -ring.NOISE_BOUND).all()


def test_noise_has_the_centred_binomial_distribution():
    """Variance 10.5: standard deviation 3.24, no less than what the security estimate assumes."""
    from scipy.stats import binom

    stream = Stream("noise")
    drawn = np.concatenate([ring.noise(stream) for _ in range(40)])
    assert drawn.mean() == pytest.approx(0, abs=5 * (10.5 / drawn.size) ** 0.5)
    assert drawn.var() == pytest.approx(10.5, abs=5 * 10.5 * (2 / drawn.size) ** 0.5)
    expected = binom(42, 0.5).pmf(np.arange(21 - 11, 21 + 12)) * drawn.size
    counts = np.bincount(drawn[np.abs(drawn) <= 11].astype(int) + 11, minlength=23)
    assert ((counts - expected) ** 2 / expected).sum() < 68  # 22 degrees of freedom: 1e-6
    assert (ring.noise() != ring.noise()).any()
    assert (ring.ternary() != ring.ternary()).any()
