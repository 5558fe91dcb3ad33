"""The private set intersection as users run it, against the sum of its parts and against openmined-psi.

    python benchmarks/psi.py --json psi.json --ids 10000,100000,1000000

For each size two organisations are written to a temporary folder and two real `colonnade align` meet over loopback
ZeroMQ with CURVE: 12-digit customer numbers in CSV files, half of them common. CPU seconds are those of all processes
from start to end: Python's start-up, files, workers and report included. Linux only. `make bench` makes the
environment in which openmined-psi runs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import zmq
from numpy.typing import NDArray
from pyarrow import csv

if not sys.flags.safe_path:
    sys.path.pop(0)  # this folder, in which this very file would hide the package psi

from parties.identity import Identity
from parties.launch import launch
from parties.party_file import Party
from psi import curve25519
from psi.group import suite
from psi.hash_to_curve import BATCH
from psi.identifiers import encode

HERE = Path(__file__).parent
NAMES = ("bank", "grocer")
RATIOS_AT = 100_000  # ids a side: the size at which CPU is compared
PARTS_BATCH = 8192
LINES_EVERY = 15.0  # seconds between two lines of a party's progress
WANTED = {
    "cpu_over_parts": 1.3,
    "cpu_over_openmined": 0.85,
    "wall_over_half_cpu": 1.25,
    "bytes_1m": 82e6,
    "rss_mb": 700.0,
    "ro_over_two_maps": 1.25,
}
PACKAGES = ("colonnade", "cryptography", "gmpy2", "joblib", "msgspec", "numpy", "pyarrow", "pyzmq")
AGREEMENT = """
title = "Benchmark"
purpose = "to measure"
legal_basis = "none needed: made-up ids"
expires = 2999-12-31
{parties}
[identifiers]
fields = {{ customer = "digits/1" }}
[intersection]
minimum = 1
maximum_rows = {rows}
[deadlines]
connect = 3600
silence = 600
stall = 3600
message = 36000
"""
BURNER = """
import os, time
if os.fork() == 0:
    if os.fork() == 0:  # an orphan, which nobody waits for but the launcher
        while time.process_time() < 0.5: pass
    os._exit(0)
while time.process_time() < 0.5: pass
"""
Ids = NDArray[np.int64]


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def on_cores(count: int) -> Iterator[list[int]]:
    """This process, and whatever it starts, on so many of the cores that it may use."""
    allowed = os.sched_getaffinity(0)
    chosen = sorted(allowed)[:count]
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, allowed)


def cpu_of(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def parts(batches: int = 5) -> dict[str, float]:
    """CPU microseconds of one hash to the curve and of one multiplication: medians over batches, on one core."""
    curve, seconds = suite(curve25519.NAME), dict[str, list[float]](hash=[], mask=[])
    with on_cores(1):
        for batch in range(batches):
            messages = [
                encode(bytes(32), b"id customer", b"%012d" % (batch * PARTS_BATCH + i)) for i in range(PARTS_BATCH)
            ]
            start = time.process_time()
            points = curve.hash_to_points(messages)
            seconds["hash"].append(time.process_time() - start)
            key = curve.scalar()
            seconds["mask"].append(cpu_of(lambda points=points, key=key: curve.mask(points, key)))
    return {name: median(values) / PARTS_BATCH * 1e6 for name, values in seconds.items()}


def ro_over_two_maps(rounds: int = 15) -> dict[str, float]:
    """The whole hash to the curve without expand_message, over the two maps with y that it consists of."""
    messages = [encode(bytes(32), b"id customer", b"%012d" % i) for i in range(BATCH * 8)]
    batches = [messages[start : start + BATCH] for start in range(0, len(messages), BATCH)]
    us = [[u for message in batch for u in curve25519.fields(message)] for batch in batches]
    seconds: dict[str, list[float]] = {"all": [], "fields": [], "maps": []}
    with on_cores(1):
        for _ in range(rounds):  # in turn, so that a noisy moment meets all three
            seconds["all"].append(cpu_of(lambda: suite(curve25519.NAME).hash_to_points(messages)))
            seconds["fields"].append(cpu_of(lambda: [curve25519.fields(message) for message in messages]))
            seconds["maps"].append(cpu_of(lambda: [curve25519.map_to_curve(batch) for batch in us]))
    us_each = {name: median(values) / len(messages) * 1e6 for name, values in seconds.items()}
    return us_each | {"ratio": (us_each["all"] - us_each["fields"]) / us_each["maps"]}


def made_up(rows: int) -> dict[str, Ids]:
    """Two sets of distinct 12-digit numbers, half of each in common, in random order."""
    generator = np.random.default_rng(rows)
    pool = np.unique(generator.integers(0, 10**12, 2 * rows))
    pool = generator.permutation(pool)[: rows + rows - rows // 2]
    return {"bank": pool[:rows], "grocer": generator.permutation(pool[-rows:])}


def as_text(ids: Ids) -> list[str]:
    return np.char.zfill(ids.astype("U12"), 12).tolist()


def write_parties(folder: Path, tables: dict[str, Ids]) -> dict[str, Path]:
    """Everything that two organisations have on disk, approved; the party files by name."""
    identities = {name: Identity.generate(name) for name in tables}
    with ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.create_server(("127.0.0.1", 0))) for name in tables}
        ports = {name: one.getsockname()[1] for name, one in sockets.items()}
    listed = "".join(
        f'[[parties]]\nname = "{name}"\nrole = "{"feature" if place else "label"} holder"\n'
        f'public_key = "{identities[name].public}"\nendpoint = "tcp://127.0.0.1:{ports[name]}"\n'
        for place, name in enumerate(tables)
    )
    largest = max(len(ids) for ids in tables.values())
    (folder / "agreement.toml").write_text(AGREEMENT.format(parties=listed, rows=largest))
    paths = {name: folder / f"{name}.toml" for name in tables}
    for name, ids in tables.items():
        identities[name].save(folder / f"{name}.key")
        csv.write_csv(pa.table({"customer_no": as_text(ids)}), folder / f"{name}.csv")
        paths[name].write_text(
            f'agreement = "agreement.toml"\nkey = "{name}.key"\noutput = "out/{name}"\n'
            f'[table]\npath = "{name}.csv"\nid = "customer_no"\n'
        )
        Party(paths[name]).sign()
    return paths


def together(folder: Path, commands: dict[str, list[str]], title: str) -> dict[str, dict[str, float]]:
    """Run one command a name, at the same time, each measured. SystemExit with what they say when one fails."""
    lines: list[str] = []
    told = dict.fromkeys(commands, 0.0)

    def progress(name: str, line: str) -> None:
        lines.append(f"{name}: {line}")
        if time.monotonic() - told[name] > LINES_EVERY:
            told[name] = time.monotonic()
            say(f"  {title}, {name}: {line}")

    measured = {name: [sys.executable, str(HERE / "measured.py"), str(folder / f"{name}.json")] for name in commands}
    codes = launch(
        {name: measured[name] + command for name, command in commands.items()},
        timeout=86400,
        on_output=progress,
        on_error=lambda name, line: lines.append(f"{name}: {line}"),
    )
    if any(codes.values()):
        sys.exit("\n".join([f"{title}: exit codes {codes}", *lines[-20:]]))
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in commands}


def check_accounting() -> float:
    """CPU seconds that are counted of a process and an orphan that burn 0.5 each. SystemExit when they are not 1."""
    with tempfile.TemporaryDirectory() as folder:
        counted = together(Path(folder), {"burner": [sys.executable, "-c", BURNER]}, "burner")["burner"]["cpu"]
    if not 0.98 <= counted <= 1.15:
        sys.exit(f"the accounting is wrong: 1 CPU second was burnt, {counted:.2f} were counted")
    return counted


def align(rows: int) -> dict[str, Any]:
    """Two `colonnade align` with so many ids each: what they used, and whether their result is numpy's."""
    tables, title = made_up(rows), f"{rows:,} ids"
    with tempfile.TemporaryDirectory(prefix="colonnade-bench-") as name, on_cores(2) as cores:
        folder = Path(name)
        paths = write_parties(folder, tables)
        before = busy(cores)
        used = together(
            folder,
            {one: [sys.executable, "-m", "vfl", "align", str(path)] for one, path in paths.items()},
            title,
        )
        machine = busy(cores) - before
        output = {one: folder / "out" / one for one in paths}
        check_result(tables, output)
        ledgers = {one: [json.loads(line) for line in (output[one] / "ledger.jsonl").open()] for one in output}
        reports = {one: json.loads((output[one] / "psi_report.json").read_text()) for one in output}
    return figures(rows, used, ledgers, reports, len(cores), machine)


def busy(cores: list[int]) -> float:
    """CPU seconds that anybody has used on these cores since the machine was started."""
    times = psutil.cpu_times(percpu=True)
    return sum(times[core].user + times[core].nice + times[core].system + times[core].irq + times[core].softirq
               for core in cores)  # fmt: skip


def check_result(tables: dict[str, Ids], output: dict[str, Path]) -> None:
    """Both parties' rows.csv must name the same customers in the same order, and numpy's intersection."""
    ours, theirs = (
        tables[name][np.loadtxt(output[name] / "rows.csv", dtype=np.int64, skiprows=1, ndmin=1)] for name in NAMES
    )
    truth = np.intersect1d(*tables.values(), assume_unique=True)
    if not np.array_equal(ours, theirs) or not np.array_equal(np.sort(ours), truth):
        sys.exit("wrong result: the rows that were aligned are not those that numpy finds")


def figures(
    rows: int,
    used: dict[str, Any],
    ledgers: dict[str, list[dict[str, Any]]],
    reports: dict[str, Any],
    cores: int,
    machine: float,
) -> dict[str, Any]:
    """What one run comes to. `machine` is the CPU time that anybody used meanwhile on the same cores."""
    met = max(at(entry) for lines in ledgers.values() for entry in lines if entry.get("event") == "opened")
    start, end = min(one["start"] for one in used.values()), max(one["end"] for one in used.values())
    cpu = sum(one["cpu"] for one in used.values())
    kinds: dict[str, int] = {}
    for entry in (entry for lines in ledgers.values() for entry in lines if "kind" in entry):
        kinds[entry["kind"]] = kinds.get(entry["kind"], 0) + entry["bytes"]
    return {
        "ids": rows,
        "size": reports[NAMES[0]]["size"],
        "suite": reports[NAMES[0]]["software"]["suite"],
        "cpu": cpu,
        "cores": cores,
        "wall": end - start,
        "wall_since_met": end - met,
        "wall_over_half_cpu": (end - met) / (cpu / 2),
        "wall_from_start_over_half_cpu": (end - start) / (cpu / 2),
        "others_share": max(0.0, 1 - cpu / machine),
        "idle_share": max(0.0, 1 - machine / (cores * (end - start))),
        "bytes": sum(kinds.values()),
        "bytes_by_kind": kinds,
        "rss_mb": max(one["rss"] for one in used.values()) / 1e6,
        "pss_mb": max(one["pss"] for one in used.values()) / 1e6,
        "seconds": {name: phases(lines, used[name]) for name, lines in ledgers.items()},
        "parties": used,
    }


def at(entry: dict[str, Any]) -> float:
    """When a line of the ledger was written, in seconds since 1970."""
    return datetime.fromisoformat(entry["time"]).timestamp()


def phases(ledger: list[dict[str, Any]], used: dict[str, float]) -> dict[str, list[float]]:
    """Seconds since the start at which a party met the others, sent the first and the last message of each kind, and
    ended."""
    times: dict[str, list[float]] = {}
    for entry in ledger:
        if what := entry.get("kind") or {"opened": "met"}.get(entry.get("event", "")):
            times.setdefault(what, []).append(round(at(entry) - used["start"], 3))
    return {what: [all_of[0], all_of[-1]] for what, all_of in times.items()} | {
        "end": [round(used["end"] - used["start"], 3)]
    }


def openmined(rows: int, python: Path) -> dict[str, Any]:
    """The same two sets with openmined-psi, checked in the same way."""
    tables = made_up(rows)
    with tempfile.TemporaryDirectory(prefix="colonnade-bench-") as name:
        files = [Path(name) / one for one in NAMES]
        for file, ids in zip(files, tables.values(), strict=True):
            file.write_text("\n".join(as_text(ids)))
        done = subprocess.run([python, HERE / "openmined.py", *files], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"openmined-psi failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    truth = as_text(np.intersect1d(*tables.values(), assume_unique=True))
    if found["size"] != len(truth) or found["digest"] != hashlib.sha256("\n".join(truth).encode()).hexdigest():
        sys.exit(f"openmined-psi finds {found['size']} common ids, there are {len(truth)}")
    return found


def environment() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "machine": {
            "processor": model[0] if model else platform.processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "load_at_start": os.getloadavg()[0],
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version(), "libzmq": zmq.zmq_version()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", default="10000,100000,1000000", help="sizes, ids a side (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--openmined-python", type=Path, default=Path("out/bench-openmined/bin/python"))
    parser.add_argument("--skip-openmined", action="store_true")
    args = parser.parse_args()
    sizes = sorted({int(size) for size in args.ids.split(",")})
    if not args.skip_openmined and not args.openmined_python.exists():
        sys.exit(f"{args.openmined_python} is missing: `make bench` makes it; or --skip-openmined")

    out: dict[str, Any] = {"ids": sizes, **environment(), "accounting_cpu_of_1": check_accounting(), "runs": {}}
    say("hash to curve ...")
    out["hash_to_curve_us"] = ro_over_two_maps()
    compared = RATIOS_AT if RATIOS_AT in sizes else sizes[-1]
    for size in sizes:
        before = parts() if size == compared else None
        say(f"{size:,} ids a side ...")
        out["runs"][str(size)] = run = align(size)
        say(f"  cpu {run['cpu']:.1f} s, wall {run['wall']:.1f} s, {run['bytes'] / 1e6:.2f} MB, {run['rss_mb']:.0f} MB")
        if before is not None:
            both = before, parts()
            out["parts_us"] = {
                "before": both[0],
                "after": both[1],
                **{name: (both[0][name] + both[1][name]) / 2 for name in both[0]},
            }
            out["parts_cpu"] = size * (2 * out["parts_us"]["hash"] + 4 * out["parts_us"]["mask"]) / 1e6
            if not args.skip_openmined:
                say(f"openmined-psi, {size:,} ids a side ...")
                out["openmined"] = openmined(size, args.openmined_python)
                say(f"  cpu {out['openmined']['cpu']:.1f} s")

    ours, largest = out["runs"][str(compared)], out["runs"][str(sizes[-1])]
    values = {
        "cpu_over_parts": ours["cpu"] / out["parts_cpu"],
        "cpu_over_openmined": ours["cpu"] / out["openmined"]["cpu"] if "openmined" in out else None,
        "wall_over_half_cpu": largest["wall_over_half_cpu"],
        "bytes_1m": largest["bytes"],
        "rss_mb": largest["rss_mb"],
        "ro_over_two_maps": out["hash_to_curve_us"]["ratio"],
    }
    at = {name: compared if name.startswith("cpu") else sizes[-1] for name in values if name != "ro_over_two_maps"}
    wanted = WANTED | {"bytes_1m": WANTED["bytes_1m"] * sizes[-1] / 1_000_000}
    figures_out = values | {"measured_at": at, "wanted": wanted, "suite": largest["suite"], **out}
    met = {name: value is not None and value <= wanted[name] for name, value in values.items()}
    for name, value in values.items():
        where = f" at {at[name]:,} ids a side" if name in at else ""
        say(f"{name} = {value if value is None else round(value, 3)}{where}, wanted {wanted[name]:g} at most")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures_out, indent=1) + "\n")
    sys.exit(0 if all(met.values()) else 1)


if __name__ == "__main__":
    main()
