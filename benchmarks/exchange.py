"""One encrypted gradient exchange, X^T Enc(r), by our Paillier scheme and by phe alone: same rows, same key length.

    python benchmarks/exchange.py --rows 2000 --columns 20 --bits 2048 --json exchange.json

Both run in this process on one core. phe works on floats, as its documentation shows, and masks nothing; ours also
masks, packs and checks what it receives. `--phe-rows K` measures phe on the first K rows only and scales by rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phe

from vfl.encryption import fixedpoint, paillier
from vfl.encryption.weigh import PaillierWeigher

RESIDUAL_BITS, FEATURE_BITS = 30, 20  # fraction bits; standardised features then take 24 bits with the sign
TARGET = 10


def timed(work: Callable[[], Any], into: dict[str, float], step: str) -> Any:
    start = time.perf_counter()
    result = work()
    into[step] = time.perf_counter() - start
    return result


def ours(x: np.ndarray, r: np.ndarray, bits: int) -> tuple[np.ndarray, dict[str, float]]:
    """The exchange as trained with: quantise, encrypt, check and weigh, mask, decrypt, unmask."""
    seconds: dict[str, float] = {}
    secret = timed(lambda: paillier.generate(bits), seconds, "key")
    timed(lambda: secret.encrypt([0]), seconds, "tables")  # once a key
    weigher = PaillierWeigher(secret.public, x.shape[1], 1 << RESIDUAL_BITS)
    whole_r = fixedpoint.quantise(r, RESIDUAL_BITS, bound_bits=RESIDUAL_BITS, what="residual")
    whole_x = fixedpoint.quantise(x, FEATURE_BITS, bound_bits=FEATURE_BITS + 4, what="features")
    sealed = timed(lambda: secret.encrypt(whole_r), seconds, "encrypt")
    timed(lambda: weigher.add(sealed, whole_x), seconds, "weigh")
    masked = timed(weigher.finish, seconds, "mask")
    opened = timed(lambda: secret.open(masked), seconds, "decrypt")
    exact = timed(lambda: weigher.open(opened), seconds, "unmask")
    return fixedpoint.restore(exact, RESIDUAL_BITS + FEATURE_BITS).ravel(), seconds


def theirs(x: np.ndarray, r: np.ndarray, bits: int) -> tuple[np.ndarray, dict[str, float]]:
    """phe alone: one EncryptedNumber a residual, a scalar product and a sum a column."""
    seconds: dict[str, float] = {}
    public, private = timed(lambda: phe.generate_paillier_keypair(n_length=bits), seconds, "key")
    sealed = timed(lambda: [public.encrypt(v) for v in r.tolist()], seconds, "encrypt")
    columns = timed(
        lambda: [sum(c * v for c, v in zip(sealed, column, strict=True)) for column in x.T.tolist()], seconds, "weigh"
    )
    timed(lambda: [c.obfuscate() for c in columns], seconds, "mask")  # re-randomised before it is sent, as ours
    opened = timed(lambda: [private.decrypt(c) for c in columns], seconds, "decrypt")
    return np.array(opened), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--bits", type=int, default=2048, choices=paillier.KEY_BITS)
    parser.add_argument("--phe-rows", type=int, help="measure phe on this many rows and scale (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    generator = np.random.default_rng(secrets.randbits(64))
    x = np.clip(generator.normal(size=(args.rows, args.columns)), -15, 15)
    r = generator.uniform(-0.99, 0.99, args.rows)
    phe_rows = min(args.phe_rows or args.rows, args.rows)

    got, mine = ours(x, r, args.bits)
    expected, phes = theirs(x[:phe_rows], r[:phe_rows], args.bits)
    for step in ("encrypt", "weigh"):
        phes[step] *= args.rows / phe_rows
    np.testing.assert_allclose(got, x.T @ r, atol=args.rows * 2.0**-FEATURE_BITS)
    np.testing.assert_allclose(expected, x[:phe_rows].T @ r[:phe_rows], atol=1e-9)

    totals = [sum(s for step, s in part.items() if step not in ("key", "tables")) for part in (mine, phes)]
    ratio = totals[1] / totals[0]
    scaled = "all rows measured" if phe_rows == args.rows else f"scaled from {phe_rows} rows"
    print(f"{args.rows} rows x {args.columns} columns, {args.bits}-bit key, one core; phe: {scaled}\n")
    print(f"{'step':<22}{'ours, s':>10}{'phe, s':>10}")
    for step in ("key", "tables", "encrypt", "weigh", "mask", "decrypt", "unmask"):
        cells = "".join(f"{part[step]:>10.3f}" if step in part else f"{'':>10}" for part in (mine, phes))
        print(f"{f'{step} ({args.bits} bit)':<22}{cells}")
    print(f"{f'exchange ({args.bits} bit)':<22}{totals[0]:>10.3f}{totals[1]:>10.3f}   (without key and tables)")
    met = "met" if ratio >= TARGET else "MISSED"
    print(f"\nphe / ours = {ratio:.1f}, target at least {TARGET}: {met}")
    versions = {name: importlib.metadata.version(name) for name in ("gmpy2", "cryptography", "phe", "numpy")}
    versions |= {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if args.json:
        figures = {
            "rows": args.rows,
            "columns": args.columns,
            "bits": args.bits,
            "phe_rows_measured": phe_rows,
            "seconds": {"ours": mine, "phe": phes},
            "exchange_seconds": {"ours": totals[0], "phe": totals[1]},
            "ratio": ratio,
            "versions": versions,
        }
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(0 if ratio >= TARGET else 1)


if __name__ == "__main__":
    main()
