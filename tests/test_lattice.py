"""The lattice scheme: exact whatever the shape, its noise within the bounds that it is refused by, used once."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parties.errors import LocalError
from tests.conftest import Stream
from tests.test_ring import canonical
from vfl.encryption import lattice, ring
from vfl.encryption.lattice import DEGREE, ERROR, FLOOD_BITS, PLAIN_BITS, Columns, LatticeKey, LatticeWeigher
from vfl.encryption.layout import REPLY_PRIMES, SEALED_BYTES, Layout, passes
from vfl.encryption.ring import PRIMES

CONTEXT, BOUND = b"session, label holder, exchange", 1 << 30


class Exchange:
    """Both ends of one exchange, step by step; deterministic."""

    def __init__(
        self,
        x: np.ndarray,
        r: np.ndarray,
        *,
        layout: Layout | None = None,
        parts: int = 1,
        bound: int = BOUND,
        seed: str = "seed",
        context: bytes = CONTEXT,
        cache_bytes: int = lattice.CACHE_BYTES,
    ) -> None:
        self.x, self.r, self.bound, self.context, self.seed = x, r, bound, context, seed
        self.layout = layout or Layout.of(len(x), (x.shape[1],), r.shape[1])
        self.columns = Columns(x, self.layout, parts, bound, cache_bytes)
        self.key = LatticeKey(context, self.layout, Stream(seed + "/key"))
        self.public = self.key.public()
        self.sealed = [self.key.encrypt(r[start : start + self.key.rows]) for start in range(0, len(r), self.key.rows)]

    def weigher(self, **options: Any) -> LatticeWeigher:
        return LatticeWeigher(
            self.columns,
            self.public,
            options.pop("context", self.context),
            self.bound,
            entropy=options.pop("entropy", Stream(self.seed + "/mask")),
            **options,
        )

    def weighed(self, sealed: list[np.ndarray] | None = None, **options: Any) -> LatticeWeigher:
        weigher = self.weigher(**options)
        for part in self.sealed if sealed is None else sealed:
            weigher.add(part)
        return weigher

    def opened(self, replies: np.ndarray) -> np.ndarray:
        return self.key.open(replies, self.x.shape[1], self.columns.parts)

    def sums(self) -> np.ndarray:
        weigher = self.weighed()
        return weigher.open(self.opened(weigher.finish()))

    def expected(self) -> np.ndarray:
        return self.x.astype(object).T @ self.r.astype(object)


def random(rows: int, columns: int, width: int = 1, seed: int = 0, bits: int = 20) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.integers(-(1 << bits), (1 << bits) + 1, (rows, columns))
    return x, generator.integers(-BOUND, BOUND + 1, (rows, width))


# Exactness


@st.composite
def shapes(draw: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """X, R and the parts, up to values whose sums reach the bound that is checked."""
    rows = draw(st.one_of(st.integers(1, 40), st.integers(1, 40), st.integers(1, 900), st.integers(4000, 9000)))
    columns = draw(st.integers(1, 12 if rows < 1000 else 2))
    width, parts = draw(st.integers(1, 2)), draw(st.integers(1, min(3, rows)))
    largest = (1 << PLAIN_BITS - 1) // BOUND * (parts // 2 + 1) // 2 // rows  # parts may be uneven
    top = max(min(draw(st.sampled_from([1, 1 << 20, largest])), largest, 1 << 42), 1)
    x, r = random(rows, columns, width, draw(st.integers(0, 99)))
    x %= 2 * top + 1
    x -= top
    if draw(st.booleans()):
        x, r = np.where(x < 0, -top, top), np.where(r < 0, -BOUND, BOUND)
    if draw(st.booleans()):
        x[:, 0] = np.where(r[:, 0] < 0, -top, top)  # the largest sum there is
    return x, r, parts


@settings(max_examples=60)
@given(shapes())
def test_the_whole_conversation_equals_exact_integers(drawn):
    x, r, parts = drawn
    exchange = Exchange(x, r, parts=parts)
    got = exchange.sums()
    assert got.shape == (x.shape[1], r.shape[1])
    assert (got == exchange.expected()).all()


@settings(max_examples=30)
@given(st.data())
def test_any_layout_gives_the_same_sums(data):
    rows, columns, width = (data.draw(st.integers(1, top)) for top in (50, 5, 3))
    together = data.draw(st.integers(1, width))
    block = data.draw(st.integers(-(-rows // 4), rows))
    x, r = random(rows, columns, width, rows)
    exchange = Exchange(x, r, layout=Layout(rows, width, block, together), parts=data.draw(st.integers(1, 2)))
    assert (exchange.sums() == exchange.expected()).all()


def test_sums_up_to_the_last_number_that_fits():
    top = (1 << PLAIN_BITS - 1) // BOUND // 8 - 1
    x, r = np.full((8, 2), top), np.full((8, 1), BOUND)
    x[:, 1] *= -1
    exchange = Exchange(x, r)
    assert exchange.sums().tolist() == [[8 * top * BOUND], [-8 * top * BOUND]]
    over = Columns(x + np.array([1, 0]), exchange.layout)
    with pytest.raises(LocalError, match="too large for the lattice scheme"):
        lattice.check(over, BOUND)


@pytest.mark.parametrize(("parts", "used"), [(2, 2), (3, 2), (8, 2)])
def test_sums_that_would_overflow_come_in_parts_of_which_some_may_be_empty(parts, used):
    x, r = np.full((8, 2), (1 << PLAIN_BITS - 1) // BOUND // 5), np.full((8, 1), BOUND)
    x[:, 1] *= -1
    exchange = Exchange(x, r, parts=parts)
    assert (exchange.sums() == exchange.expected()).all()
    assert abs(exchange.expected()[0, 0]) > 1 << PLAIN_BITS - 1
    assert [max(sums) > 0 for sums in exchange.columns.absolute] == [True] * used + [False] * (parts - used)
    with pytest.raises(LocalError, match="too large for the lattice scheme"):
        Columns(x * 5, exchange.layout, parts, BOUND)


def test_the_layout_is_the_same_for_any_order_and_sends_least():
    for rows, columns, width in ((45_211, (8, 8), 1), (10, (3,), 1), (100_000, (50,), 1), (3000, (9, 2), 3)):
        chosen = Layout.of(rows, columns, width)
        assert chosen == Layout.of(rows, columns[::-1], width)
        assert chosen.products * chosen.together * chosen.block <= DEGREE
        assert chosen.blocks * chosen.block >= rows
        assert chosen.sheets * chosen.together >= width

        def bytes_of(one: Layout, columns: tuple[int, ...] = columns) -> int:
            return sum(one.sealed * SEALED_BYTES + one.replies(d) * one.reply_bytes for d in columns)

        others = [
            Layout(rows, width, min(rows, DEGREE // (k * w)), w) for w in range(1, width + 1) for k in range(1, 60)
        ]
        assert bytes_of(chosen) <= min(map(bytes_of, others))


def test_many_blocks_are_added_up_unreduced_only_as_long_as_that_is_exact(monkeypatch):
    """Every residue at its largest: 700 blocks need two reductions on the way."""
    largest = np.array([[prime // 2] * DEGREE for prime in PRIMES], np.float32)
    blocks = 700
    layout = Layout(blocks * DEGREE, 1, DEGREE, 1)
    weigher = LatticeWeigher.__new__(LatticeWeigher)
    weigher._columns = Columns(np.zeros((1, 1), np.int64), layout)
    weigher._sealed = [np.stack([largest, -largest])] * (blocks + 1)
    monkeypatch.setattr(Columns, "tiles", lambda *_: ((block, largest) for block in range(blocks)))
    (got,) = canonical(weigher.weigh(0, 0))
    for index, prime in enumerate(PRIMES):
        assert set(got[0, index].tolist()) == {blocks * (prime // 2) ** 2 % prime}
        assert set(got[1, index].tolist()) == {-blocks * (prime // 2) ** 2 % prime}


def test_randomness_is_fresh_unless_it_is_given():
    x, r = random(20, 2)
    layout = Layout.of(20, (2,))
    assert (LatticeKey(CONTEXT, layout).public() != LatticeKey(CONTEXT, layout).public()).mean() > 0.9
    exchange = Exchange(x, r)
    first, second = (exchange.weighed(entropy=lattice.os.urandom).finish() for _ in range(2))
    assert (first != second).mean() > 0.9
    first, second = (exchange.weighed().finish() for _ in range(2))
    assert (first == second).all()


# Bounded memory


@pytest.mark.parametrize("tiles", [0, 1, 2, 100])
def test_a_small_cache_changes_nothing_but_what_is_kept(tiles, monkeypatch):
    built = []
    original = Columns._polynomial
    monkeypatch.setattr(Columns, "_polynomial", lambda *given: built.append(1) or original(*given))
    x, r = random(300, 1)
    tile = len(PRIMES) * DEGREE * 4
    exchange = Exchange(x, r, layout=Layout(300, 1, 100, 1), cache_bytes=tiles * tile + tile - 1)
    for _ in range(2):
        assert (exchange.sums() == exchange.expected()).all()
    kept = sum(value.nbytes for value in exchange.columns._kept.values())
    assert kept == min(tiles, 3) * tile  # a column, 3 blocks
    assert len(built) == 3 + (3 - min(tiles, 3))


# Noise


def test_noise_stays_within_the_bound_that_parameters_are_refused_by():
    """Before flood and switch; measured beside the bound, for random and for the worst columns."""
    for seed, (rows, columns, worst) in enumerate(
        [(6000, 1, False), (500, 16, False), (500, 16, True), (9000, 2, True)]
    ):
        x, r = random(rows, columns, seed=seed)
        if worst:
            x = np.where(x < 0, -(1 << 18), 1 << 18)
        exchange = Exchange(x, r, seed=str(seed))
        layout, secret, q = exchange.layout, exchange.key._secret, ring.modulus()
        weigher = exchange.weighed()
        measured = []
        for group in range(layout.groups(columns)):
            (c0, c1) = weigher.weigh(0, group)[0]
            phase = ring.inverse(ring.reduce_all(c0 + ring.reduce_all(c1 * secret)))
            values = ring.to_integers(phase[:, layout.wanted()])[:columns]
            for value, total in zip(values, exchange.expected()[group * layout.products :, 0], strict=False):
                distance = ((value << PLAIN_BITS) - int(total) * q) % (q << PLAIN_BITS)
                measured.append(min(distance, (q << PLAIN_BITS) - distance) >> PLAIN_BITS)
        bound = ERROR * layout.products * max(exchange.columns.absolute[0])
        assert len(measured) == columns
        assert 0 < max(measured) <= bound
        assert max(measured) > np.abs(x[:, 0]).max()  # more than one row's: it is measured
        assert math.log2(bound) < FLOOD_BITS - 60


def test_noise_of_sealed_coefficients_is_noise_and_rounding():
    x, r = random(DEGREE, 1)
    exchange, q = Exchange(x, r), ring.modulus()
    for number, (row, plain) in enumerate([(exchange.public[0], np.zeros(DEGREE)), (exchange.sealed[0][0], r[:, 0])]):
        c0, c1 = ring.unpack(row, len(PRIMES)), ring.uniform(lattice._seed(CONTEXT, number))
        phase = ring.inverse(ring.reduce_all(c0 + ring.reduce_all(c1 * exchange.key._secret)))
        errors = [
            (((value << PLAIN_BITS) - int(m) * q + (q << PLAIN_BITS - 1)) % (q << PLAIN_BITS)) - (q << PLAIN_BITS - 1)
            for value, m in zip(ring.to_integers(phase), plain, strict=True)
        ]
        errors = np.array([float(error) / 2.0**PLAIN_BITS for error in errors])
        assert np.abs(errors).max() <= ERROR
        assert errors.std() == pytest.approx(10.5**0.5, rel=0.05)


def test_after_the_switch_the_label_holder_has_room_to_spare():
    """What is left is the flood, almost up to the limit of `open`, which is ten times below a wrong decryption."""
    q, ratios = ring.modulus(REPLY_PRIMES), []
    limit = ((1 << FLOOD_BITS - 1) * q << PLAIN_BITS) // ring.modulus() + (DEGREE << PLAIN_BITS)
    assert 10 * limit < q // 2
    assert FLOOD_BITS == 8 * 15 - 4
    for seed in range(6):
        x, r = random(100, 80, seed=seed)
        exchange, flood = Exchange(x, r, seed=str(seed)), []
        stream = Stream("flood")

        def recording(size: int, stream: Stream = stream, flood: list[int] = flood) -> bytes:
            drawn = stream(size)
            if size == 15:
                flood.append((int.from_bytes(drawn, "little") >> 4) - (1 << FLOOD_BITS - 1))
            return drawn

        replies = exchange.weighed(entropy=recording).finish()
        start = 0
        for reply, held in zip(replies, exchange.layout.held(80), strict=True):
            values = ring.unpack(reply, REPLY_PRIMES)
            phase = ring.inverse(
                ring.reduce_all(ring.forward(values[:, :DEGREE]) * exchange.key._secret[:REPLY_PRIMES])
            )
            wanted = ring.reduce_all(phase[:, exchange.layout.wanted()] + values[:, DEGREE:])
            for value in ring.to_integers(wanted[:, held]):
                noise = (value << PLAIN_BITS) - ((value << PLAIN_BITS) + q // 2) // q * q
                ratios.append(abs(noise) / limit)
                rest = noise - (flood[start] * q << PLAIN_BITS) // ring.modulus()
                assert abs(rest) < 0.51 * DEGREE * 2**PLAIN_BITS
                start += 1
    assert 0.95 < max(ratios) < 1.0
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.1)


def test_more_sums_than_the_flood_hides_are_refused():
    x, _ = random(1000, 8)
    columns = Columns(x, Layout.of(1000, (8,)))
    noise = ERROR * columns.layout.products * max(columns.absolute[0]) + 2 * DEGREE * ring.NOISE_BOUND + 1
    most = int(2 ** (FLOOD_BITS - 40) / noise)
    assert most > 10**6
    lattice.check(columns, BOUND, most)
    for bad in (2 * most, most + most // 100):
        with pytest.raises(LocalError, match="too many sums"):
            lattice.check(columns, BOUND, bad)
        with pytest.raises(LocalError, match="too many sums"):
            LatticeWeigher(columns, np.zeros((1, SEALED_BYTES), np.uint8), CONTEXT, BOUND, sums=bad)


# How many numbers a key opens


@given(st.integers(1, 10**6), st.integers(1, 300), st.integers(1, 5), st.integers(1, 8), st.sampled_from([1, 32, 500]))
def test_no_key_opens_more_numbers_than_agreed(rows, columns, width, parts, numbers):
    some, residuals = passes(rows, columns, width, parts, numbers)
    assert 1 <= some <= columns
    assert 1 <= residuals <= width
    assert some * residuals * parts <= numbers or some == residuals == 1  # one sum is opened in all its parts


# Keys and exchanges are used once


def test_a_key_is_neither_shown_nor_copied():
    key = LatticeKey(CONTEXT, Layout.of(5, (1,)))
    assert repr(key) == str(key) == f"{key}" == "LatticeKey()"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="does not leave"):
            pickle.dumps(key, protocol)


def test_steps_come_in_their_order_and_once():
    x, r = random(60, 2)
    exchange = Exchange(x, r, layout=Layout(60, 1, 30, 1))
    fresh = LatticeKey(CONTEXT, exchange.layout)
    with pytest.raises(RuntimeError):
        fresh.encrypt(r[:30])
    for again in (exchange.key.public, lambda: exchange.key.encrypt(r[:30])):
        with pytest.raises(RuntimeError):
            again()
    weigher = exchange.weigher()
    for early in (weigher.finish, lambda: weigher.open(np.zeros((2, 8), np.uint8))):
        with pytest.raises(RuntimeError, match="finish"):
            early()
    for part in exchange.sealed:
        weigher.add(part)
    with pytest.raises(RuntimeError, match="more parts than there are rows"):
        weigher.add(exchange.sealed[0])
    opened = exchange.opened(weigher.finish())
    with pytest.raises(RuntimeError, match="once"):
        weigher.finish()
    assert (weigher.open(opened) == exchange.expected()).all()
    with pytest.raises(RuntimeError, match="once"):
        weigher.open(opened)


def test_a_weigher_that_has_finished_takes_nothing_more():
    x, r = random(60, 2)
    exchange = Exchange(x, r)
    weigher = exchange.weighed()
    weigher.open(exchange.opened(weigher.finish()))
    with pytest.raises(RuntimeError, match="used once"):
        weigher.add(exchange.sealed[0])
