"""Input commitment: the tree against the RFC and the vectors of Certificate Transparency, salted leaves, audits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from psi import commitment
from psi.commitment import (
    MAX_LEAVES,
    commit,
    framed,
    joint_seed,
    leaf,
    leaves,
    path,
    paths,
    root,
    root_of_path,
    salts,
    sample,
)

KEY = bytes(range(32))


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def rows(hashes: Sequence[bytes]) -> Any:
    return np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32)


def hashes(count: int) -> list[bytes]:
    return [sha(b"leaf", count.to_bytes(4, "big"), number.to_bytes(4, "big")) for number in range(count)]


# ---- the tree, straight from RFC 6962: D[n] splits at the largest power of two below n


def split(count: int) -> int:
    return max(2**power for power in range(40) if 2**power < count)


def tree(nodes: Sequence[bytes]) -> bytes:
    """RFC 6962, 2.1, over leaf hashes."""
    if len(nodes) < 2:
        return nodes[0] if nodes else sha()
    k = split(len(nodes))
    return sha(b"\x01", tree(nodes[:k]), tree(nodes[k:]))


def audit_path(number: int, nodes: Sequence[bytes]) -> list[bytes]:
    """RFC 6962, 2.1.1."""
    if len(nodes) == 1:
        return []
    k = split(len(nodes))
    if number < k:
        return [*audit_path(number, nodes[:k]), tree(nodes[k:])]
    return [*audit_path(number - k, nodes[k:]), tree(nodes[:k])]


def turns(number: int, size: int) -> str:
    """On which side each sibling of the audit path stands: all that a path tells of number and size."""
    if size == 1:
        return ""
    k = split(size)
    return turns(number, k) + "r" if number < k else turns(number - k, size - k) + "l"


CT_LEAVES = ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
CT_ROOTS = (
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
CT_PATHS = {
    (0, 1): (),
    (0, 8): (
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ),
    (5, 8): (
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 3): ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",),
    (1, 5): (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ),
}
CT_HASHES = [sha(b"\x00", bytes.fromhex(data)) for data in CT_LEAVES]


@pytest.mark.parametrize("size", range(9))
def test_the_roots_of_certificate_transparency(size: int) -> None:
    assert root(rows(CT_HASHES[:size])).hex() == CT_ROOTS[size]


@pytest.mark.parametrize(("number", "size"), CT_PATHS)
def test_the_audit_paths_of_certificate_transparency(number: int, size: int) -> None:
    found = path(rows(CT_HASHES[:size]), number)
    assert [node.hex() for node in found] == list(CT_PATHS[number, size])
    assert root_of_path(CT_HASHES[number], number, size, found).hex() == CT_ROOTS[size]


@given(st.integers(0, 3000))
def test_the_root_is_that_of_the_recursion(count: int) -> None:
    nodes = hashes(count)
    assert root(rows(nodes)) == tree(nodes)


def test_every_path_of_every_small_tree_is_that_of_the_recursion_and_leads_to_the_root() -> None:
    for size in range(1, 41):
        nodes = hashes(size)
        top = tree(nodes)
        for number, found in enumerate(paths(rows(nodes), range(size))):
            assert found == path(rows(nodes), number) == audit_path(number, nodes)
            assert root_of_path(nodes[number], number, size, found) == top


@given(st.integers(1, 200), st.data())
def test_blocks_change_no_hash(size: int, data: st.DataObject) -> None:
    nodes = hashes(size)
    numbers = data.draw(st.lists(st.integers(0, size - 1), max_size=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commitment, "_BLOCK", 2 ** data.draw(st.integers(0, 6)))
        assert root(rows(nodes)) == tree(nodes)
        assert paths(rows(nodes), numbers) == [audit_path(number, nodes) for number in numbers]


def test_a_tree_of_more_than_one_block() -> None:
    size = 2**16 + 3
    many = leaves(KEY, 0, [b""] * size)
    nodes = [node.tobytes() for node in many]
    top = tree(nodes)
    assert root(many) == top
    for number in (0, 2**16 - 1, 2**16, size - 1):
        assert root_of_path(nodes[number], number, size, path(many, number)) == top


@given(st.integers(1, 300), st.integers(0, 5))
def test_the_root_over_the_roots_of_runs_is_the_root(size: int, power: int) -> None:
    nodes = hashes(size)
    runs = [root(rows(nodes[start : start + 2**power])) for start in range(0, size, 2**power)]
    assert root(rows(runs)) == tree(nodes)


def leads_elsewhere(top: bytes, *arguments: Any) -> bool:
    try:
        return root_of_path(*arguments) != top
    except ValueError:
        return True


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 8, 13, 16, 31])
def test_an_altered_leaf_number_size_or_path_is_refused(size: int) -> None:
    nodes = hashes(size)
    top, other = tree(nodes), sha(b"other")
    for number, found in enumerate(paths(rows(nodes), range(size))):
        assert leads_elsewhere(top, other, number, size, found)
        for wrong in range(-1, size + 2):
            assert (wrong == number) != leads_elsewhere(top, nodes[number], wrong, size, found)
        for wrong in range(2 * size + 2):  # sizes in which the leaf has the same way up cannot be told apart
            same = wrong > number and turns(number, wrong) == turns(number, size)
            assert same != leads_elsewhere(top, nodes[number], number, wrong, found)
        for at in range(len(found)):
            assert leads_elsewhere(top, nodes[number], number, size, [*found[:at], other, *found[at + 1 :]])
            assert leads_elsewhere(top, nodes[number], number, size, [*found[:at], *found[at + 1 :]])
        for longer in ([*found, other], [other, *found], [*found, top]):
            with pytest.raises(ValueError, match="longer"):
                root_of_path(nodes[number], number, size, longer)
        for one, two in pairwise(range(len(found))):
            swapped = found.copy()
            swapped[one], swapped[two] = swapped[two], swapped[one]
            assert leads_elsewhere(top, nodes[number], number, size, swapped)


def test_a_node_does_not_pass_for_a_leaf() -> None:
    """The tree of two leaves whose values are the concatenated hashes of four others has another root."""
    nodes = hashes(4)
    forged = [sha(b"\x00", nodes[0] + nodes[1]), sha(b"\x00", nodes[2] + nodes[3])]
    assert root(rows(forged)) != tree(nodes)


def test_odd_shapes_and_lengths_are_refused() -> None:
    for wrong in (np.zeros((3, 31), np.uint8), np.zeros(32, np.uint8), np.zeros((3, 32), np.int64)):
        with pytest.raises(ValueError, match="shape"):
            root(wrong)  # type: ignore[arg-type]
    for number in (-1, 3):
        with pytest.raises(ValueError, match="leaves 0 to 2 only"):
            path(rows(hashes(3)), number)
    for node, found in ((bytes(31), [bytes(32)]), (bytes(32), [bytes(33)])):
        with pytest.raises(ValueError, match="32 bytes"):
            root_of_path(node, 0, 2, found)


# ---- salted leaves


def test_salts_by_number_are_one_stream() -> None:
    stream = Cipher(algorithms.ChaCha20(KEY, bytes(4) + b"psi/salts/1\x00"), mode=None).encryptor()
    whole = rows([stream.update(bytes(32)) for _ in range(301)])
    assert np.array_equal(salts(KEY, 0, 301), whole)
    for start, count in ((0, 0), (0, 1), (1, 1), (1, 2), (2, 5), (7, 100), (300, 1)):
        assert np.array_equal(salts(KEY, start, count), whole[start : start + count])
    assert len({salt.tobytes() for salt in whole}) == 301
    assert not np.array_equal(salts(bytes(32), 0, 301), whole)


def test_salts_end_where_the_counter_does() -> None:
    assert np.array_equal(salts(KEY, MAX_LEAVES - 3, 3)[1:], salts(KEY, MAX_LEAVES - 2, 2))
    for start, count in ((MAX_LEAVES - 1, 2), (-1, 1), (0, -1)):
        with pytest.raises(ValueError, match="at most"):
            salts(KEY, start, count)
    with pytest.raises(ValueError, match="key"):
        salts(KEY[:31], 0, 1)


values = st.lists(st.binary(max_size=100), max_size=20)


@given(st.integers(0, 2**20), values)
def test_leaves_are_what_the_docstring_says(start: int, given_values: list[bytes]) -> None:
    found = leaves(KEY, start, given_values)
    assert found.shape == (len(given_values), 32)
    assert found.dtype == np.uint8
    for number, (value, node) in enumerate(zip(given_values, found, strict=True), start):
        salt = salts(KEY, number, 1).tobytes()
        written = number.to_bytes(8, "big") + salt + len(value).to_bytes(4, "big") + value
        assert node.tobytes() == leaf(number, salt, value) == sha(b"\x00colonnade/psi/leaf/1", written)


def test_another_key_number_salt_or_value_gives_another_leaf() -> None:
    salt = sha(b"salt")
    others = {
        leaf(0, salt, b"id"),
        leaf(1, salt, b"id"),
        leaf(0, sha(b"other"), b"id"),
        leaf(0, salt, b"Id"),
        leaf(0, salt, b""),
    }
    assert len(others) == 5
    assert leaf(np.int64(7), salt, b"id") == leaf(7, salt, b"id")  # as `sample` gives it
    same_id_twice = leaves(KEY, 0, [b"id", b"id"])
    assert len({node.tobytes() for node in (*same_id_twice, *leaves(bytes(32), 0, [b"id", b"id"]))}) == 4
    with pytest.raises(ValueError, match="salt has 32 bytes"):
        leaf(0, salt[:31], b"id")


def test_a_megabyte_is_a_value_like_another() -> None:
    value = bytes(2**20)
    assert leaves(KEY, 5, [value])[0].tobytes() == leaf(5, salts(KEY, 5, 1).tobytes(), value)


parts = st.lists(st.binary(max_size=6), max_size=4)


@given(parts, parts)
def test_framed_parts_are_told_apart(one: list[bytes], two: list[bytes]) -> None:
    assert (framed(*one) == framed(*two)) == (one == two)


# ---- the seed


def test_a_commitment_holds_share_session_and_party() -> None:
    share = sha(b"share")
    commitments = {
        commit(share, b"session", "bank"),
        commit(sha(b"other"), b"session", "bank"),
        commit(share, b"sessio", "bank"),
        commit(share, b"session", "grocer"),
        commit(share, b"sessionb", "ank"),
        commit(share, b"sessio", "nbank"),
    }
    assert len(commitments) == 6
    assert commit(share, b"session", "bank") == commit(share, b"session", "bank")
    with pytest.raises(ValueError, match="share of a seed has 32 bytes"):
        commit(share[:31], b"session", "bank")


def test_every_share_and_its_place_decide_the_seed() -> None:
    one, two, three = (sha(name) for name in (b"1", b"2", b"3"))
    seeds = [
        joint_seed(b"session", [one, two]),
        joint_seed(b"session", [two, one]),
        joint_seed(b"session", [one, three]),
        joint_seed(b"session", [three, two]),
        joint_seed(b"session", [one, two, three]),
        joint_seed(b"sessioN", [one, two]),
    ]
    assert len(set(seeds)) == 6
    assert not {sha(one, two), one, two} & set(seeds)
    with pytest.raises(ValueError, match="under its control"):
        joint_seed(b"session", [one])
    with pytest.raises(ValueError, match="32 bytes"):
        joint_seed(b"session", [one, two + two])


# ---- the sample


def replayed(seed: bytes, size: int, count: int) -> list[int]:
    """The docstring of `sample`, one word at a time."""
    needed, positions, counter = min(count, size - count), [], 0
    while len(positions) < needed:
        data = b"colonnade/psi/sample/1" + len(seed).to_bytes(4, "big") + seed + size.to_bytes(8, "big")
        digest = sha(data, counter.to_bytes(8, "big"))
        for at in range(0, 32, 8):
            word = int.from_bytes(digest[at : at + 8], "big")
            if word < 2**64 // size * size and word % size not in positions and len(positions) < needed:
                positions.append(word % size)
        counter += 1
    chosen = set(positions) if needed == count else set(range(size)) - set(positions)
    return sorted(chosen)


@given(st.binary(max_size=40), st.integers(1, 300), st.data())
def test_a_sample_replays(seed: bytes, size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, size))
    found = sample(seed, size, count)
    assert found.dtype == np.int64
    assert found.tolist() == replayed(seed, size, count)
    assert len(found) == count


@pytest.mark.parametrize(("size", "count"), [(0, 0), (0, 5), (1, 1), (7, 7), (7, 459), (1, 0)])
def test_a_sample_of_all_or_nothing(size: int, count: int) -> None:
    assert sample(b"seed", size, count).tolist() == list(range(min(size, count)))


def test_a_large_sample_is_distinct_ascending_and_another_for_another_seed() -> None:
    for count in (1, 459, 40_000, 70_000, 99_999):
        found = sample(b"seed", 100_000, count)
        assert len(found) == count
        assert (np.diff(found) > 0).all()
        assert found[0] >= 0
        assert found[-1] < 100_000
        assert not np.array_equal(found, sample(b"Seed", 100_000, count))
    assert not set(sample(b"seed", 10**9, 459)) & set(sample(b"seed", 10**9 + 1, 459))
    for size, count in ((-1, 1), (1, -1)):
        with pytest.raises(ValueError, match="negative"):
            sample(b"seed", size, count)


@pytest.mark.parametrize("count", [1, 12, 40])
def test_every_position_is_as_likely_as_another(count: int) -> None:
    size, audits = 50, 10_000
    hits = np.zeros(size)
    for number in range(audits):
        hits[sample(number.to_bytes(4, "big"), size, count)] += 1
    share = count / size
    statistic = ((hits - audits * share) ** 2).sum() / (audits * share * (1 - share)) * (size - 1) / size
    assert chi2.cdf(statistic, size - 1) < 0.999
    assert chi2.sf(statistic, size - 1) < 0.999


def test_a_size_that_does_not_divide_the_words_favours_no_position() -> None:
    """Modulo without rejection would put a quarter, not a third, into the last third."""
    size = 3 * 2**61
    found = sample(b"seed", size, 20_000)
    assert abs((found >= size // 3 * 2).mean() - 1 / 3) < 0.015


def test_459_positions_find_one_percent() -> None:
    bad = np.zeros(20_000, dtype=np.bool_)
    bad[sample(b"where the deviation is", len(bad), len(bad) // 100)] = True
    caught = sum(bad[sample(b"audit" + bytes([n % 256, n // 256]), len(bad), 459)].any() for n in range(2000))
    assert caught >= 0.98 * 2000
    assert caught < 2000  # and it is a sample
