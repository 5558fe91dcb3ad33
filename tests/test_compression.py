"""Compressed updates: exact bytes, no bias, nothing lost for good, nothing decoded that was not encoded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from parties.errors import LocalError
from vfl.horizontal.compression import Quantised, TopK, compress, compressor

updates = arrays(np.float64, st.integers(0, 40), elements=st.floats(-1e6, 1e6)) | st.integers(1000, 3000).map(
    lambda size: np.random.default_rng(size).normal(size=size)
)
forms = st.sampled_from(["topk:0.01", "topk:0.3", "topk:1", "8bit", "4bit"])


def generator(seed=0):
    return np.random.default_rng(seed)


def expected_bytes(text, size):
    if text.startswith("topk"):
        return 8 * int(np.ceil(float(text[5:]) * size))
    return 4 * -(-size // 1024) + (size if text == "8bit" else -(-size // 2))


@given(updates, forms)
def test_length_and_error(update, text):
    how, size = compressor(text), len(update)
    data = how.encode(update, generator())
    assert data.dtype == np.uint8 and data.ndim == 1 and len(data) == expected_bytes(text, size)
    got = how.decode(data, size)
    assert got.shape == update.shape
    if text.startswith("topk"):
        count = len(data) // 8
        sent = np.argsort(-np.abs(update), kind="stable")[:count]
        np.testing.assert_array_equal(np.sort(np.abs(got))[size - count :], np.sort(np.abs(update.astype("f4")[sent])))
        assert ((got == update.astype("f4")) | (got == 0)).all()
    else:
        for start in range(0, size, 1024):
            block = slice(start, start + 1024)
            step = np.abs(update[block]).max() / how.steps
            assert np.abs(got[block] - update[block]).max() <= step * (1 + 1e-6) + 1e-40


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_has_no_bias(bits):
    how, update, draw = Quantised(bits), generator(1).normal(size=64), generator(2)
    many = np.array([how.decode(how.encode(update, draw), 64) for _ in range(4000)])
    step = np.abs(update).max() / how.steps
    assert np.abs(many.mean(axis=0) - update).max() < 5 * step / 2 / np.sqrt(4000)
    assert np.abs(many - update).max() < step * (1 + 1e-6)


@given(forms, st.integers(1, 1500), st.integers(0, 2**32))
def test_what_is_left_out_comes_later(text, size, seed):
    """After any number of rounds, what was sent and what is remembered are together what was to be sent."""
    how, draw, memory, sent, wanted = compressor(text), generator(seed), np.zeros(size), np.zeros(size), np.zeros(size)
    for _ in range(5):
        update = draw.normal(size=size)
        data, memory = compress(how, update, memory, draw)
        sent, wanted = sent + how.decode(data, size), wanted + update
    np.testing.assert_allclose(sent + memory, wanted, rtol=0, atol=1e-12)


def test_gradient_descent_reaches_the_minimum_only_with_error_feedback():
    """Three clients whose largest coordinates cancel: top-1 without memory never moves the others."""
    how, targets = TopK(0.5), np.array([[10.0, 1.0], [-10.0, 1.0], [5.0, 1.0]])

    def descend(remember):
        w, memories = np.zeros(2), np.zeros((3, 2))
        for _ in range(400):
            total = np.zeros(2)
            for k, target in enumerate(targets):
                data, memory = compress(how, 0.02 * (target - w), memories[k] * remember, generator())
                total += how.decode(data, 2)
                memories[k] = memory
            w = w + total / 3
        return np.abs(w - targets.mean(axis=0)).max()

    assert descend(1) < 0.1
    assert descend(0) > 0.5


def test_the_same_generator_gives_the_same_bytes():
    update = generator(3).normal(size=2000)
    for text in ("topk:0.1", "8bit", "4bit"):
        how = compressor(text)
        assert (how.encode(update, generator(4)) == how.encode(update, generator(4))).all()


def sparse(places, values):
    return np.concatenate([np.array(places, "<i4").view("u1"), np.array(values, "<f4").view("u1")])


def quantised(scale, codes):
    return np.concatenate([np.array([scale], "<f4").view("u1"), np.array(codes, "u1")])


@pytest.mark.parametrize(
    ("how", "data", "text"),
    [
        (TopK(0.5), sparse([0], [1.0]), "another length"),
        (TopK(0.5), sparse([1, 0], [1.0, 1.0]), "do not ascend"),
        (TopK(0.5), sparse([2, 2], [1.0, 1.0]), "do not ascend"),
        (TopK(0.5), sparse([-1, 2], [1.0, 1.0]), "do not ascend"),
        (TopK(0.5), sparse([1, 4], [1.0, 1.0]), "do not ascend"),
        (TopK(0.5), sparse([1, 3], [1.0, np.nan]), "not finite"),
        (Quantised(8), quantised(1.0, [1, 2, 3]), "another length"),
        (Quantised(8), quantised(1.0, [1, 2, 3, 255]), "cannot be"),
        (Quantised(8), quantised(np.inf, [1, 2, 3, 4]), "cannot be"),
        (Quantised(8), quantised(-1.0, [1, 2, 3, 4]), "cannot be"),
        (Quantised(4), quantised(1.0, [0x11, 0xF0]), "cannot be"),
        (Quantised(4), quantised(1.0, [0x11, 0x0F]), "cannot be"),
        (Quantised(4), quantised(1.0, [0x11]), "another length"),
    ],
)
def test_bytes_that_nobody_encoded_are_refused(how, data, text):
    with pytest.raises(ValueError, match=text):
        how.decode(data, 4)


@pytest.mark.parametrize("text", ["", "topk", "topk:", "topk:0", "topk:1.1", "topk:nan", "2bit", "8bit:1", "gzip"])
def test_a_wrong_text_is_refused(text):
    with pytest.raises(LocalError, match=r"unknown compression .*; write topk:0\.01"):
        compressor(text)
