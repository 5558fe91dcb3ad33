"""One table of what the benchmarks measured: figure, value, what is wanted, whether it is met, and with which keys.

    python benchmarks/report.py out/bench-exchange.json out/bench-psi.json

Each file is what `--json` of `exchange.py` or `psi.py` wrote. Exit code 1 when a figure is missed or was not measured.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHARED = 0.05  # of the CPU time used by anybody: more of it by others spoils a measurement
DRIFT = 0.1  # between two measurements of the parts
WORDS = {True: "[green]yes", False: "[bold red]NO", None: "[yellow]not measured"}


@dataclass(frozen=True)
class Row:
    """One figure; `met` is None where it was not measured."""

    figure: str
    size: str
    value: str
    wanted: str
    met: bool | None
    keys: str


def of_exchange(found: dict[str, Any]) -> list[Row]:
    size = f"{found['rows']:,} rows x {found['columns']}"
    lattice = "lattice, 128-bit security; phe 2048 bit"
    told = {  # figure: what it is, keys
        "lattice_over_phe_cached": ("encrypted exchange, phe's time / lattice's, cached", lattice),
        "lattice_over_phe_cold": ("encrypted exchange, phe's time / lattice's, first", lattice),
        "paillier_over_phe": ("encrypted exchange, phe's time / our Paillier's", "both 2048 bit"),
    }
    return [
        Row(
            what,
            size,
            f"{found[name]:,.0f}",
            f">= {found['targets'][name]:,}",
            found[name] >= found["targets"][name],
            keys,
        )
        for name, (what, keys) in told.items()
    ]


def of_psi(found: dict[str, Any]) -> list[Row]:
    curve = f"{found['suite']}, 255 bit"
    told = {  # figure: what it is, how it is written, keys
        "cpu_over_parts": ("PSI, CPU / its parts", "{:.2f}", 1.0, curve),
        "cpu_over_openmined": ("PSI, CPU / openmined-psi's", "{:.2f}", 1.0, f"{curve}; theirs P-256, 256 bit"),
        "wall_over_half_cpu": ("PSI, time / half the CPU", "{:.2f}", 1.0, curve),
        "bytes_1m": ("PSI, bytes both ways", "{:.2f} MB", 1e6, curve),
        "rss_mb": ("PSI, memory of a party", "{:.0f} MB", 1.0, curve),
        "ro_over_two_maps": ("hash to curve / two maps", "{:.2f}", 1.0, curve),
    }
    rows = []
    for name, (what, form, unit, keys) in told.items():
        value, wanted, size = found[name], found["wanted"][name], found["measured_at"].get(name)
        rows.append(
            Row(
                what,
                "" if size is None else f"{size:,} ids a side",
                "" if value is None else form.format(value / unit),
                f"<= {form.format(wanted / unit)}",
                None if value is None else value <= wanted,
                keys,
            )
        )
    return rows


def of_horizontal(found: dict[str, Any]) -> list[Row]:
    told = {
        "over_bare_loop": "FedAvg, 10 clients x 10 rounds, CPU / a bare loop's",
        "over_bare_loop_100": "FedAvg, 100 clients x 5 rounds, CPU / a bare loop's",
        "over_bare_program": "the same, 10 x 10, with all imports",
        "over_bare_program_100": "the same, 100 x 5, with all imports",
        "over_flower": "the same, 10 x 10, Flower's time / ours",
        "over_flower_100": "the same, 100 x 5, Flower's time / ours",
        "rss_mb": "the same, 10 x 10, memory, MB",
        "round_overhead_ms": "a round over sockets, 10 clients and a coordinator, ms",
        "simulate_1000_seconds": "1,000 clients x 20 rounds, seconds",
    }
    rows = []
    for name, what in told.items():
        value, (wanted, how) = found.get(name), found["targets"][name]
        sign = "<=" if how == "at most" else ">="
        met = None if value is None else value <= wanted if how == "at most" else value >= wanted
        secure = "X25519, ChaCha20, 128 bit" if name == "round_overhead_ms" else "none: no secure aggregation"
        rows.append(Row(what, "", "" if value is None else f"{value:.2f}", f"{sign} {wanted:g}", met, secure))
    return rows


def read(path: Path) -> list[Row]:
    if not path.exists():
        return [Row(f"{path.name} is missing", "", "", "", None, "")]
    found = json.loads(path.read_text())
    if "over_bare_loop" in found:
        return of_horizontal(found)
    return of_psi(found) if "cpu_over_parts" in found else of_exchange(found)


def notes_of(path: Path) -> list[str]:
    """What a reader must know before he believes a figure."""
    found = json.loads(path.read_text()) if path.exists() else {}
    notes = []
    if "parts_us" in found:
        before, after = (sum(found["parts_us"][when].values()) for when in ("before", "after"))
        if abs(before / after - 1) > DRIFT:
            notes.append(f"PSI: its parts took {abs(before / after - 1):.0%} more or less after the run than before")
    for run in found.get("runs", {}).values():
        if run["others_share"] > SHARED:
            notes.append(
                f"PSI, {run['ids']:,} ids a side: other processes took {run['others_share']:.0%} of the CPU time used; "
                "repeat on a quiet machine"
            )
    return notes


def main() -> None:
    rows = [row for name in sys.argv[1:] for row in read(Path(name))]
    notes = [note for name in sys.argv[1:] for note in notes_of(Path(name))]
    table = Table(title="Benchmarks", title_justify="left", caption="\n".join(notes), caption_justify="left")
    for title in ("figure", "size", "value", "wanted", "met", "keys"):
        table.add_column(title, justify="right" if title in ("value", "wanted") else "left", overflow="fold")
    for row in rows:
        table.add_row(row.figure, row.size, row.value, row.wanted, WORDS[row.met], row.keys)
    console = Console()
    Console(width=max(console.width, 150)).print(table)
    sys.exit(0 if all(row.met for row in rows) else 1)


if __name__ == "__main__":
    main()
