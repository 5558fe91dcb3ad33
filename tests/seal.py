"""Microsoft SEAL as an oracle: its ciphertexts, plaintexts and keys as arrays and back.

Its Python module saves and loads by path only, so this reads and writes the files of SEAL 4.3: a header of 16 bytes, a
body that may be compressed, in it a head and an array with a header of its own.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tenseal.sealapi as api

DEGREE, PLAIN_BITS = 8192, 59
HEADER = struct.Struct("<HBBBBHQ")  # magic, its own length, version (2), compression, 0, length of header and body
MAGIC, VERSION, PLAIN, ZSTD = 0xA15E, (4, 3), 0, 2
CIPHERTEXT = struct.Struct("<32s?QQQdQ")  # parameters, transformed, polynomials, degree, primes, scale, correction
PLAINTEXT = struct.Struct("<32sQd")  # parameters (0: coefficients), length, scale


def parameters(primes: Sequence[int], level: Any = api.SEC_LEVEL_TYPE.TC128) -> Any:
    """SEAL's context for BFV with these primes (the last is special: no ciphertext has it), plaintexts modulo 2^59."""
    chosen = api.EncryptionParameters(api.SCHEME_TYPE.BFV)
    chosen.set_poly_modulus_degree(DEGREE)
    chosen.set_coeff_modulus([api.Modulus(prime) for prime in primes])
    chosen.set_plain_modulus(1 << PLAIN_BITS)
    return api.SEALContext(chosen, True, level)


def body(raw: bytes) -> bytes:
    """What follows a header; raises ValueError where it is not the header that we know."""
    magic, own, *version, compression, _, length = HEADER.unpack(raw[: HEADER.size])
    known = (MAGIC, HEADER.size, *VERSION, len(raw))
    if (magic, own, *version, length) != known or compression not in (PLAIN, ZSTD):
        raise ValueError(
            f"SEAL's files have changed: expected {known} and compression 0 or 2 in the header, got "
            f"{(magic, own, *version, length)} and {compression}; adapt tests/seal.py"
        )
    rest = raw[HEADER.size :]
    return rest if compression == PLAIN else pa.CompressedInputStream(pa.BufferReader(rest), "zstd").read()


def _wrap(content: bytes) -> bytes:
    return HEADER.pack(MAGIC, HEADER.size, *VERSION, PLAIN, 0, HEADER.size + len(content)) + content


def _saved(thing: Any, head: struct.Struct) -> tuple[tuple[Any, ...], np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        thing.save(str(path))
        content = body(path.read_bytes())
    words = np.frombuffer(body(content[head.size :]), "<u8")
    if words[0] != len(words) - 1:
        raise ValueError("SEAL's arrays have changed: no count comes first; adapt tests/seal.py")
    return head.unpack(content[: head.size]), words[1:]


def _loaded(thing: Any, context: Any, head: bytes, words: np.ndarray) -> Any:
    array = len(words).to_bytes(8, "little") + words.astype("<u8").tobytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loaded"
        path.write_bytes(_wrap(head + _wrap(array)))
        thing.load(context, str(path))
    return thing


def residues_of(ciphertext: Any) -> np.ndarray:
    """A ciphertext in coefficients, (polynomials, primes, N), each residue below its prime."""
    (_, transformed, size, degree, primes, _, _), words = _saved(ciphertext, CIPHERTEXT)
    if transformed or degree != DEGREE:
        raise ValueError("expected a ciphertext of 8192 coefficients, not transformed")
    return words.reshape(size, primes, degree).astype(np.float64)


def ciphertext_of(context: Any, level: Any, residues: np.ndarray) -> Any:
    """The inverse of `residues_of`; `level` is the parms_id of as many primes."""
    size, primes, degree = residues.shape
    name = np.array(level, "<u8").tobytes()
    head = CIPHERTEXT.pack(name, False, size, degree, primes, 1.0, 1)
    return _loaded(api.Ciphertext(), context, head, residues.ravel())


def plain_of(context: Any, values: np.ndarray) -> Any:
    """A plaintext with these coefficients, taken modulo 2^59."""
    words = values.astype(np.int64).view(np.uint64) & np.uint64((1 << PLAIN_BITS) - 1)
    return _loaded(api.Plaintext(), context, PLAINTEXT.pack(bytes(32), len(words), 1.0), words)


def values_of(plain: Any) -> np.ndarray:
    """The coefficients of a plaintext, nearest to zero, int64 (N,)."""
    _, words = _saved(plain, PLAINTEXT)
    padded = np.pad(words, (0, DEGREE - len(words))).astype(np.int64)
    return padded - (padded >> PLAIN_BITS - 1 << PLAIN_BITS)


def secret_of(context: Any, ternary: np.ndarray) -> Any:
    """A secret key of our choice: SEAL itself transforms it, in its own order."""
    plain = plain_of(context, ternary)
    api.Evaluator(context).transform_to_ntt_inplace(plain, context.key_parms_id())
    (name, count, scale), words = _saved(plain, PLAINTEXT)
    return _loaded(api.SecretKey(), context, PLAINTEXT.pack(name, count, scale), words)


def level_with(context: Any, primes: int) -> Any:
    """The parms_id of ciphertexts with so many primes."""
    data = context.first_context_data()
    while len(data.parms().coeff_modulus()) > primes:
        data = data.next_context_data()
    return data.parms_id()
