"""What no honest party sends under the lattice scheme: refused at one end or the other, with one typed error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Stream
from tests.test_lattice import Exchange, random
from tests.test_ring import canonical
from vfl.encryption import ring
from vfl.encryption.layout import REPLY_PRIMES, SEALED_BYTES, Layout
from vfl.encryption.ring import DEGREE

# Malformed ciphertexts

MALFORMED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "empty": lambda data: data[:0],
    "one too many": lambda data: np.vstack([data, data[:1]]),
    "truncated": lambda data: data[:, :-1],
    "too wide": lambda data: np.hstack([data, data[:, :1]]),
    "no columns": lambda data: data[:, :0],
    "one row of all": lambda data: data.ravel(),
    "another type": lambda data: data.astype(np.int64),
    "zero": lambda data: 0 * data,
    "no residues": lambda data: 0 * data + np.uint8(255),
    "one residue too large": lambda data: np.hstack([0 * data[:, :-3] + np.uint8(1), 0 * data[:, :3] + np.uint8(255)]),
}
BY_NAME = pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)


@BY_NAME
def test_malformed_residuals_are_refused_by_the_feature_holder(change):
    x, r = random(60, 2)
    exchange = Exchange(x, r, layout=Layout(60, 1, 30, 1))
    weigher = exchange.weigher()
    with pytest.raises(ValueError, match=r"shape|zeros|residues"):
        weigher.add(change(exchange.sealed[0]))
    exchange.public = change(exchange.public)
    with pytest.raises(ValueError, match=r"shape|zeros|residues"):
        exchange.weigher()


@BY_NAME
def test_malformed_replies_are_refused_by_the_label_holder(change):
    x, r = random(60, 2)
    exchange = Exchange(x, r)
    replies = exchange.weighed().finish()
    with pytest.raises(ValueError, match=r"shape|not encrypted|residues"):
        exchange.opened(change(replies))
    for columns, parts in ((300, 1), (2, 2)):
        with pytest.raises(ValueError, match="expected ciphertexts of shape"):
            exchange.key.open(replies, columns, parts)


def test_malformed_plaintexts_are_refused_by_the_feature_holder():
    x, r = random(60, 3)
    exchange = Exchange(x, r)
    for change in (
        lambda data: data[:-1],
        lambda data: data[:, :-1],
        lambda data: data.astype(np.int64),
        lambda data: data.ravel(),
        lambda data: 0 * data,
        lambda data: data[::-1],
        lambda data: data ^ np.array([0] * 7 + [128], np.uint8),
    ):
        weigher = exchange.weighed()
        with pytest.raises(
            ValueError, match=r"expected 3 plaintexts|3 decrypted sums are out|2 decrypted sums are out"
        ):
            weigher.open(change(exchange.opened(weigher.finish())))


HONEST = Exchange(*random(50, 8, bits=4))


def flipped(data: np.ndarray, row: int, byte: int, bit: int) -> np.ndarray:
    out = data.copy()
    out[row, byte] ^= 1 << bit
    return out


NOTICED = r"more noise than an honest one|no residues"


@settings(max_examples=25)
@given(st.integers(0, SEALED_BYTES - 1), st.integers(0, 7), st.booleans())
def test_a_flipped_bit_in_what_is_sealed_is_seen_in_the_noise(byte, bit, zero):
    """Ciphertexts are transforms: one residue moves every coefficient. 8 sums: missed once in 10^8."""
    exchange = HONEST
    sealed, public = exchange.sealed, exchange.public
    try:
        if zero:
            exchange.public = flipped(public, 0, byte, bit)
        else:
            sealed = [flipped(sealed[0], 0, byte, bit)]
        with pytest.raises(ValueError, match=NOTICED):
            exchange.opened(exchange.weighed(sealed).finish())
    finally:
        exchange.public = public


@settings(max_examples=40)
@given(st.integers(0, REPLY_PRIMES - 1), st.integers(0, DEGREE - 1), st.integers(0, 23))
def test_a_flipped_bit_in_what_hides_a_reply_is_noticed_at_one_end_or_the_other(prime, place, bit):
    """It reaches the sums at whose distance the ternary secret is not 0: of 8, none once in 6,561."""
    byte = ring.PRIME_BYTES * (prime * (DEGREE + HONEST.layout.products) + place) + bit // 8
    weigher = HONEST.weighed()
    replies = flipped(weigher.finish(), 0, byte, bit % 8)
    secret = canonical(ring.inverse(HONEST.key._secret))[0]
    if secret[(HONEST.layout.wanted()[:8] - place) % DEGREE].any():
        with pytest.raises(ValueError, match=NOTICED + "|out of their range"):
            weigher.open(HONEST.opened(replies))


@settings(max_examples=40)
@given(st.integers(0, REPLY_PRIMES - 1), st.integers(0, 1000), st.integers(0, 23))
def test_a_flipped_bit_in_a_sum_is_noticed_at_one_end_or_the_other(prime, place, bit):
    """9 of 10 by the label holder's limit, the others by the range of sums; where no sum is, nothing changes."""
    products = HONEST.layout.products
    byte = ring.PRIME_BYTES * (prime * (DEGREE + products) + DEGREE + place % products) + bit // 8
    weigher = HONEST.weighed()
    replies = flipped(weigher.finish(), 0, byte, bit % 8)
    if place % products < 8:
        with pytest.raises(ValueError, match=NOTICED + "|out of their range"):
            weigher.open(HONEST.opened(replies))
        return
    try:
        opened = HONEST.opened(replies)
    except ValueError as error:
        assert "no residues" in str(error)
        return
    assert (weigher.open(opened) == HONEST.expected()).all()


def test_what_was_sealed_or_weighed_elsewhere_is_seen_in_the_noise():
    x, r = random(60, 6)
    layout = Layout(60, 1, 30, 1)
    ours = Exchange(x, r, layout=layout)
    other_key = Exchange(x, r, layout=layout, seed="another key")
    other_context = Exchange(x, r, layout=layout, context=b"another exchange")
    swapped = ours.weighed(ours.sealed[::-1])
    foreign = ours.weighed([ours.sealed[0], other_key.sealed[1]])
    for replies in (
        swapped.finish(),
        foreign.finish(),
        ours.weighed(other_context.sealed).finish(),
        ours.weighed(context=b"another exchange").finish(),
        other_key.weighed().finish(),
    ):
        with pytest.raises(ValueError, match="more noise"):
            ours.opened(replies)
    ours.public, honest = other_key.public, ours.public
    with pytest.raises(ValueError, match="more noise"):
        ours.opened(ours.weighed().finish())
    ours.public = honest
    assert (ours.sums() == ours.expected()).all()


def test_replies_in_another_order_give_sums_that_cannot_be():
    x, r = random(60, 6)
    exchange = Exchange(x, r, layout=Layout(60, 1, DEGREE // 2, 1))
    weigher = exchange.weighed()
    replies = weigher.finish()
    assert len(replies) == 3
    with pytest.raises(ValueError, match=r"[46] decrypted sums are out of their range"):
        weigher.open(exchange.opened(replies[[1, 0, 2]]))


def test_replies_of_an_earlier_exchange_give_sums_that_cannot_be():
    """The label holder cannot tell (the key is the same only within an exchange); whose sums they are, can."""
    x, r = random(60, 6)
    exchange = Exchange(x, r)
    first, second = exchange.weighed(), exchange.weighed(entropy=Stream("second"))
    earlier = first.finish()
    second.finish()
    with pytest.raises(ValueError, match="6 decrypted sums are out of their range"):
        second.open(exchange.opened(earlier))


# Decoders


@st.composite
def wires(draw: Any, rows: int, width: int) -> np.ndarray:
    """Arrays of about this shape: random, constant, or of another type."""
    shape = draw(
        st.sampled_from(
            [(rows, width), (rows, width), (rows, width), (0, width), (rows + 1, width), (rows, 7), (width,)]
        )
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    data = generator.integers(0, draw(st.sampled_from([2, 100, 256])), shape, np.uint8)
    if draw(st.booleans()):
        data[..., 2::3] &= 63  # every number a residue
    return data.astype(draw(st.sampled_from([np.uint8, np.uint8, np.uint8, np.int8, np.uint16])))


@settings(max_examples=40)
@given(st.data())
def test_nothing_but_value_errors_comes_out_of_the_decoders(data):
    exchange, layout = HONEST, HONEST.layout
    with pytest.raises(ValueError, match=r"^[^\n]{10,150}$"):
        exchange.opened(data.draw(wires(layout.replies(8), layout.reply_bytes)))
    weigher, wire = exchange.weigher(), data.draw(wires(1, SEALED_BYTES))
    try:
        weigher.add(wire)
    except ValueError:
        weigher.add(exchange.sealed[0])
    else:  # well formed: any residues are a ciphertext, of rubbish
        with pytest.raises(ValueError, match="more noise"):
            exchange.opened(weigher.finish())
        return
    weigher.finish()
    with pytest.raises(ValueError, match=r"expected 8 plaintexts|out of their range"):
        weigher.open(data.draw(wires(8, 8)))
