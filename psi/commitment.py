"""Input commitment: what a party puts into an intersection is fixed before it starts, and stays with the party.

A Merkle tree (RFC 6962, 2.1: SHA-256, leaves behind 0x00, nodes behind 0x01) over one salted leaf a value. The root and
the number of leaves go to the peers. Salts are a keyed stream, so an opened leaf tells nothing about another one, and
without its salt no leaf can be tried against a dictionary. An audit opens leaves that nobody could choose: every party
commits to a share of the sample's seed before it sees the others' shares.

A list of n hashes is a uint8 array of shape (n, 32). Integers inside hashes are big-endian.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import sha256
from operator import add

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

HASH_BYTES = 32
MAX_LEAVES = 2**32  # the stream of salts has 2**32 blocks of two under one nonce
_LEAF = b"\x00colonnade/psi/leaf/1"
_SALT_NONCE = b"psi/salts/1\x00"
_BLOCK = 2**16  # leaves whose subtree is hashed at once: bounds memory, changes no hash


def framed(*parts: bytes) -> bytes:
    """The parts behind their lengths (4 bytes each): no other list of parts gives the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def salts(key: bytes, start: int, count: int) -> Bytes:
    """The salts of leaves `start` .. `start + count - 1`, shape (count, 32): a ChaCha20 stream (RFC 8439), two a block.

    `key`, 32 bytes, serves for one commitment only; salts that are opened tell nothing about it.

    Raises:
        ValueError: a key that is not 32 bytes, or a leaf beyond MAX_LEAVES.
    """
    if not 0 <= start <= start + count <= MAX_LEAVES:
        raise ValueError(f"one commitment has at most {MAX_LEAVES} leaves")
    skip = start % 2
    nonce = (start // 2).to_bytes(4, "little") + _SALT_NONCE  # the block's counter comes first
    stream = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
    return _rows(stream.update(bytes(HASH_BYTES * (skip + count))))[skip:]


def leaf(number: int, salt: bytes, value: bytes) -> bytes:
    """SHA-256(0x00 || "colonnade/psi/leaf/1" || number, 8 bytes || salt || length of value, 4 bytes || value).

    A value of several parts is `framed` first. Raises ValueError for a salt that is not 32 bytes.
    """
    if len(salt) != HASH_BYTES:
        raise ValueError(f"a salt has {HASH_BYTES} bytes, not {len(salt)}")
    return sha256(_LEAF + int(number).to_bytes(8, "big") + salt + framed(value)).digest()


def leaves(key: bytes, start: int, values: Sequence[bytes]) -> Bytes:
    """`leaf` of many values, numbered from `start`, with the salts of `key`: shape (n, 32). Raises ValueError."""
    count = len(values)
    heads = np.empty((count, len(_LEAF) + 8 + HASH_BYTES + 4), dtype=np.uint8)
    tag, number, salt, length = np.split(heads, np.cumsum([len(_LEAF), 8, HASH_BYTES]), axis=1)
    tag[:] = np.frombuffer(_LEAF, dtype=np.uint8)
    salt[:] = salts(key, start, count)
    number[:] = np.arange(start, start + count, dtype=">u8").view(np.uint8).reshape(count, 8)
    length[:] = np.fromiter(map(len, values), dtype=">u4", count=count).view(np.uint8).reshape(count, 4)
    return _digests(map(add, _split(heads), values))


def root(leaves: Bytes) -> bytes:
    """The Merkle tree hash of n >= 0 leaves (RFC 6962, 2.1), 32 bytes; `leaves` may be memory-mapped.

    It is also the root over the roots of consecutive runs of 2^j leaves (the last run may be shorter), so that a party
    may hash run by run, in several processes, and keep one hash a run. Raises ValueError.
    """
    return _climb_blocks(leaves, [])[0]


def path(leaves: Bytes, number: int) -> list[bytes]:
    """The audit path of one leaf, from the bottom (RFC 6962, 2.1.1). Raises ValueError when there is no such leaf."""
    return paths(leaves, [number])[0]


def paths(leaves: Bytes, numbers: Sequence[int]) -> list[list[bytes]]:
    """`path` of many leaves for one pass over the tree. Raises ValueError when there is no such leaf."""
    if not all(0 <= number < len(leaves) for number in numbers):
        raise ValueError(f"the tree has leaves 0 to {len(leaves) - 1} only")
    return _climb_blocks(leaves, [int(number) for number in numbers])[1]


def root_of_path(leaf: bytes, number: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that leaf `number` of `size` and its audit path lead to (RFC 9162, 2.1.3.2); the caller compares it.

    `size` must be the one that was published with the root: a path proves a leaf's place, never the tree's size.

    Raises:
        ValueError: no such leaf in a tree of this size, a hash that is not 32 bytes, a path too long or too short.
    """
    if not 0 <= number < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {number}")
    if any(len(node) != HASH_BYTES for node in (leaf, *path)):
        raise ValueError(f"a hash has {HASH_BYTES} bytes")
    node, place, last = leaf, number, size - 1
    for sibling in path:
        if last == 0:
            raise ValueError("the audit path is longer than the tree is high")
        while place == last and place % 2 == 0:  # a node without a sibling is its own parent
            place, last = place // 2, last // 2
        pair = sibling + node if place % 2 else node + sibling
        node, place, last = sha256(b"\x01" + pair).digest(), place // 2, last // 2
    if last != 0:
        raise ValueError("the audit path is shorter than the tree is high")
    return node


def _climb_blocks(leaves: Bytes, numbers: list[int]) -> tuple[bytes, list[list[bytes]]]:
    """Root and audit paths, one block of leaves in memory at a time."""
    if leaves.ndim != 2 or leaves.shape[1] != HASH_BYTES or leaves.dtype != np.uint8:
        raise ValueError(f"hashes are a uint8 array of shape (n, {HASH_BYTES})")
    wanted: defaultdict[int, list[int]] = defaultdict(list)
    for order, number in enumerate(numbers):
        wanted[number // _BLOCK].append(order)
    roots: list[bytes] = []
    lower: dict[int, list[bytes]] = {}
    for block in range(-(-len(leaves) // _BLOCK)):
        places = [numbers[order] % _BLOCK for order in wanted[block]]
        node, found = _climb(leaves[block * _BLOCK : (block + 1) * _BLOCK], places)
        roots.append(node)
        lower |= dict(zip(wanted[block], found, strict=True))
    node, upper = _climb(_rows(b"".join(roots)), [number // _BLOCK for number in numbers])
    return node, [lower[order] + upper[order] for order in range(len(numbers))]


def _climb(level: Bytes, places: list[int]) -> tuple[bytes, list[list[bytes]]]:
    """Level by level: an odd last node moves up as it is, which is RFC 6962's split at the largest power of two."""
    found: list[list[bytes]] = [[] for _ in places]
    while len(level) > 1:
        for path, place in zip(found, places, strict=True):
            if place ^ 1 < len(level):
                path.append(level[place ^ 1].tobytes())
        pairs = len(level) // 2
        nodes = np.ones((pairs, 1 + 2 * HASH_BYTES), dtype=np.uint8)
        nodes[:, 1:] = level[: 2 * pairs].reshape(pairs, 2 * HASH_BYTES)
        level = np.concatenate([_digests(_split(nodes)), level[2 * pairs :]])
        places = [place // 2 for place in places]
    return level[0].tobytes() if len(level) else sha256().digest(), found


def _digests(messages: Iterable[bytes]) -> Bytes:
    return _rows(b"".join([sha256(message).digest() for message in messages]))


def _rows(raw: bytes) -> Bytes:
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, HASH_BYTES)


def _split(rows: Bytes) -> list[bytes]:
    """Every row's bytes: numpy cuts them faster than slices do."""
    whole: list[bytes] = rows.view(f"V{rows.shape[1]}").ravel().tolist()
    return whole


def input_root(count: int, root: bytes) -> bytes:
    """The commitment to an input of so many leaves, as it is sent and reported: a root does not tell how many."""
    return sha256(b"colonnade/psi/input/1" + framed(count.to_bytes(8, "big"), root)).digest()


# ---- audit of a sample


def commit(nonce: bytes, session: bytes, party: str) -> bytes:
    """Commit to our share of a seed, 32 random bytes; the share itself is sent when all commitments are here.

    The party's name is inside, so that nobody passes off a peer's commitment as its own. Raises ValueError.
    """
    return sha256(b"colonnade/psi/seed-share/1" + framed(session, party.encode(), _share(nonce))).digest()


def joint_seed(session: bytes, shares: Sequence[bytes]) -> bytes:
    """The seed out of every party's share, in ring order; one honest share makes it random. Raises ValueError."""
    if len(shares) < 2:
        raise ValueError("a seed that one party alone draws is under its control")
    return sha256(b"colonnade/psi/seed/1" + framed(session, *map(_share, shares))).digest()


def _share(nonce: bytes) -> bytes:
    if len(nonce) != HASH_BYTES:
        raise ValueError(f"a share of a seed has {HASH_BYTES} bytes, not {len(nonce)}")
    return nonce


def sample(seed: bytes, size: int, count: int) -> NDArray[np.int64]:
    """`count` distinct positions below `size` (all of them when there are no more), uniform, ascending.

    Anybody replays it. SHA-256("colonnade/psi/sample/1" || length of seed, 4 bytes || seed || size, 8 bytes || counter,
    8 bytes), for counters 0, 1, .., gives four 64-bit words each; a word at or above the largest multiple of `size` is
    skipped, others count modulo `size`. The first `count` distinct positions are the sample; where `count` is more than
    half of `size`, the first `size - count` are what it leaves out. Raises ValueError for a negative number.
    """
    if size < 0 or count < 0:
        raise ValueError("a sample has no negative size")
    needed = max(0, min(count, size - count))
    prefix = b"colonnade/psi/sample/1" + framed(seed) + size.to_bytes(8, "big")
    drawn: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    counter = 0
    while True:
        distinct, first = np.unique(np.concatenate(drawn), return_index=True)
        if len(distinct) >= needed:
            break
        counters = range(counter, counter + 8 + (needed - len(distinct)) // 3)
        words = _digests(prefix + number.to_bytes(8, "big") for number in counters).view(">u8").ravel()
        words = words[words < 2**64 - 2**64 % size] if 2**64 % size else words  # no position is favoured
        drawn.append((words % size).astype(np.int64))
        counter = counters.stop
    chosen = np.sort(distinct[np.argsort(first)[:needed]])
    return chosen if needed == count else np.setdiff1d(np.arange(size, dtype=np.int64), chosen, assume_unique=True)
