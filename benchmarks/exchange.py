"""One encrypted gradient exchange, X^T Enc(r): phe alone, our Paillier, the lattice scheme, numpy without encryption.

    python benchmarks/exchange.py --rows 1000,10000,100000 --columns 10,50 --json exchange.json

Everything runs in this process on one core: sealing, weighing, masking, opening. phe works with fixed precision
2^-20 and masks nothing; ours also masks, packs, re-randomises and checks what it receives. phe and our Paillier are
measured on the first rows of long tables and scaled by rows (`--phe-rows`, `--paillier-rows`); the table says so.
"cold" encodes the columns, "cached" is every later exchange of a training. "predicted" is what `colonnade check`
computes with.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # one core, as for the others

import argparse
import importlib.metadata
import json
import platform
import secrets
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import phe
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vfl.encryption.choice import SLOT_BITS, measured, predict, strength
from vfl.encryption.fixedpoint import restore
from vfl.encryption.lattice import PLAIN_BITS, Columns, LatticeKey, LatticeWeigher
from vfl.encryption.layout import SEALED_BYTES, Layout, passes
from vfl.encryption.paillier import generate
from vfl.encryption.weigh import PaillierOpener, PaillierWeigher

FEATURE_BITS = 20
TARGETS = {"lattice_over_phe_cached": 1000, "lattice_over_phe_cold": 600, "paillier_over_phe": 10}


@dataclass(frozen=True)
class Row:
    """One way at one size. `measured_rows` below `rows`: scaled."""

    scheme: str
    strength: str
    rows: int
    columns: int
    measured_rows: int
    seconds: float
    bytes: int
    predicted_seconds: float | None


def with_numpy(x: np.ndarray, r: np.ndarray) -> Row:
    start = time.perf_counter()
    _ = x.T @ r
    return Row("numpy", "none", *x.shape, len(x), time.perf_counter() - start, 0, None)


def with_phe(x: np.ndarray, r: np.ndarray, bits: int, measured_rows: int) -> Row:
    """One EncryptedNumber a residual, a product a cell, a sum a column."""
    public, private = phe.generate_paillier_keypair(n_length=bits)
    part, residual = x[:measured_rows], r[:measured_rows]
    precision = 2.0**-FEATURE_BITS
    start = time.perf_counter()
    sealed = [public.encrypt(v, precision=precision) for v in residual.tolist()]
    columns = []
    for column in part.T.tolist():
        encoded = (phe.EncodedNumber.encode(public, v, precision=precision) for v in column)
        columns.append(sum(c * v for c, v in zip(sealed, encoded, strict=True)))
    long = (time.perf_counter() - start) * len(x) / len(part)
    start = time.perf_counter()
    for column in columns:
        column.obfuscate()  # re-randomised before it is sent, as ours
    opened = [private.decrypt(column) for column in columns]
    seconds = long + time.perf_counter() - start
    np.testing.assert_allclose(opened, part.T @ residual, atol=len(part) * 2.0 ** (3 - FEATURE_BITS))
    return Row("phe", f"paillier, {bits} bit", *x.shape, len(part), seconds, (len(x) + x.shape[1]) * bits // 4, None)


def with_paillier(x: np.ndarray, r: np.ndarray, bits: int, measured_rows: int) -> Row:
    secret, residual_bits = generate(bits), 30
    secret.encrypt([0])  # the tables, once a key
    part, residual = x[:measured_rows], r[:measured_rows]
    whole_x, whole_r = fixed(part, FEATURE_BITS), fixed(residual, residual_bits)[:, np.newaxis]
    opener = PaillierOpener(secret, SLOT_BITS)
    weigher = PaillierWeigher(secret.public, whole_x, 1 << residual_bits, slot_bits=SLOT_BITS)
    start = time.perf_counter()
    for low in range(0, len(part), opener.rows):
        weigher.add(opener.encrypt(whole_r[low : low + opener.rows]))
    long = (time.perf_counter() - start) * len(x) / len(part)
    start = time.perf_counter()
    masked = weigher.finish()
    exact = weigher.open(opener.open(masked, x.shape[1]))
    seconds = long + time.perf_counter() - start
    check(restore(exact, FEATURE_BITS + residual_bits)[:, 0], part, residual)
    size = len(x) * bits // 4 + masked.nbytes * 3 // 2
    predicted = predict(measured(bits), len(x), (x.shape[1],))["paillier"].seconds
    return Row("paillier", strength("paillier", bits), *x.shape, len(part), seconds, size, predicted)


def with_lattice(x: np.ndarray, r: np.ndarray) -> list[Row]:
    residual_bits = min(30, PLAIN_BITS - 2 - FEATURE_BITS - len(x).bit_length())
    whole_x, whole_r = fixed(x, FEATURE_BITS), fixed(r, residual_bits)[:, np.newaxis]
    step = passes(len(x), x.shape[1], 1)[0]  # so many columns under one key
    cuts = [whole_x[:, low : low + step] for low in range(0, x.shape[1], step)]
    every = [Columns(cut, Layout.of(len(x), (cut.shape[1],))) for cut in cuts]
    one, two = (predict(measured(2048), len(x), (x.shape[1],), exchanges=n)["lattice"].seconds for n in (1, 2))
    rows = []
    for number, (name, predicted) in enumerate((("lattice, cold", one), ("lattice, cached", two - one))):
        sums, size = [], 8 * x.shape[1]
        start = time.perf_counter()
        for columns in every:
            context = b"%d %d" % (number, len(sums))
            key = LatticeKey(context, columns.layout)
            weigher = LatticeWeigher(columns, key.public(), context, 1 << residual_bits, sums=100 * x.shape[1])
            for low in range(0, len(x), columns.layout.block):
                weigher.add(key.encrypt(whole_r[low : low + columns.layout.block]))
            masked = weigher.finish()
            sums.append(weigher.open(key.open(masked, columns.x.shape[1])))
            size += columns.layout.sealed * SEALED_BYTES + masked.nbytes
        seconds = time.perf_counter() - start
        check(restore(np.vstack(sums), FEATURE_BITS + residual_bits)[:, 0], x, r)
        rows.append(Row(name, strength("lattice", 0), *x.shape, len(x), seconds, size, predicted))
    return rows


def fixed(values: np.ndarray, bits: int) -> np.ndarray:
    return np.rint(np.ldexp(values, bits)).astype(np.int64)


def check(got: np.ndarray, x: np.ndarray, r: np.ndarray) -> None:
    np.testing.assert_allclose(got, x.T @ r, atol=len(x) * 2.0**-FEATURE_BITS)


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=numbers, default=[1000, 10_000, 100_000])
    parser.add_argument("--columns", type=numbers, default=[10, 50])
    parser.add_argument("--phe-rows", type=int, default=300, help="measure phe on at most so many rows and scale")
    parser.add_argument("--paillier-rows", type=int, default=20_000, help="the same for our Paillier")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    generator = np.random.default_rng(secrets.randbits(64))
    found: list[Row] = []
    sizes = [(n, d) for n in args.rows for d in args.columns]
    for n, d in track(sizes, "measuring", console=Console(stderr=True)):
        x = np.clip(generator.normal(size=(n, d)), -15, 15)
        r = generator.uniform(-0.99, 0.99, n)
        found += [with_numpy(x, r), with_phe(x, r, 2048, args.phe_rows)]
        found += [with_paillier(x, r, bits, args.paillier_rows) for bits in (2048, 3072)]
        found += with_lattice(x, r)
    show(found)
    ratios = compare(found)
    for name, value in ratios.items():
        word = "met" if value >= TARGETS[name] else "MISSED"
        print(
            f"{name} = {value:,.0f} ({sizes[-1][0]:,} rows x {sizes[-1][1]}), target at least {TARGETS[name]:,}: {word}"
        )
    versions = {name: importlib.metadata.version(name) for name in ("gmpy2", "cryptography", "phe", "numpy")}
    versions |= {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if args.json:
        figures: dict[str, Any] = dict(ratios) | {
            "rows": sizes[-1][0],
            "columns": sizes[-1][1],
            "targets": TARGETS,
            "measurements": [asdict(row) for row in found],
            "versions": versions,
        }
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(0 if all(value >= TARGETS[name] for name, value in ratios.items()) else 1)


def compare(found: list[Row]) -> dict[str, float]:
    """phe's seconds over ours, both at 2048 bit or its security level and above, at the last size."""
    n, d = found[-1].rows, found[-1].columns
    last = [row for row in found if (row.rows, row.columns) == (n, d)]
    seconds = {row.scheme if row.scheme != "paillier" else row.strength: row.seconds for row in last}
    return {
        "lattice_over_phe_cached": seconds["phe"] / seconds["lattice, cached"],
        "lattice_over_phe_cold": seconds["phe"] / seconds["lattice, cold"],
        "paillier_over_phe": seconds["phe"] / seconds["paillier, 2048 bit"],
    }


def show(found: list[Row]) -> None:
    table = Table(title="X^T Enc(r), one core", title_justify="left")
    for title in ("rows", "columns", "scheme", "strength"):
        table.add_column(title)
    for title in ("seconds", "predicted", "MB", "measured on"):
        table.add_column(title, justify="right")
    for row in found:
        table.add_row(
            f"{row.rows:,}",
            str(row.columns),
            row.scheme,
            row.strength.split(" (")[0],
            f"{row.seconds:,.3f}",
            "" if row.predicted_seconds is None else f"{row.predicted_seconds:,.3f}",
            f"{row.bytes / 1e6:,.2f}",
            "all rows" if row.measured_rows == row.rows else f"{row.measured_rows:,} rows, scaled",
        )
    console = Console()
    Console(width=max(console.width, 140)).print(table)


if __name__ == "__main__":
    main()
