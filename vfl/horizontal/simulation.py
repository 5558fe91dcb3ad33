"""`colonnade simulate`: one table dealt to many made-up clients, the agreed job on them, figures and curves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.table import Table

from parties.agreement import Columns
from parties.errors import LocalError
from parties.files import write_json
from parties.horizontal import Horizontal
from parties.parsing import parse_toml
from parties.session import Progress
from parties.tables import Source
from parties.workers import Workers
from vfl.horizontal.job import read_rows
from vfl.horizontal.models import Model
from vfl.horizontal.outcome import Outcome
from vfl.horizontal.own import adapt, read_public
from vfl.horizontal.report import training, training_rows, write_curves
from vfl.horizontal.simulate import deal, simulate
from vfl.horizontal.trainer import Data
from vfl.own_code import load as load_code

Own = Callable[[Data], Model]


class SimulatedJob(msgspec.Struct, frozen=True, kw_only=True):
    """What of an agreement a simulation needs; the rest of the file is not looked at."""

    horizontal: Horizontal
    columns: Columns | None = None
    title: str = "simulation"


def load(path: Path) -> SimulatedJob:
    """Raises LocalError that names the field."""
    job: SimulatedJob = parse_toml(path, SimulatedJob, "the job")
    return job


def own_models(job: SimulatedJob, model: str, public: Path | None) -> Own | None:
    """What every client makes of its rows, where the job trains own models. Raises LocalError."""
    if (job.horizontal.model == "own") != bool(model) or (job.horizontal.public is None) != (public is None):
        raise LocalError("own models need --model model.py:build, a distillation --public too; other jobs have neither")
    if not model:
        return None
    build: Any = load_code(model, Path())
    if public is None:
        return lambda rows: adapt(build, job.horizontal, rows)
    if job.columns is None:
        raise LocalError("the job has no [columns]; name features and label of the tables")
    table = read_public(Source(public), job.columns.features)
    return lambda rows: adapt(build, job.horizontal, rows, table)


def digits() -> Data:
    """scikit-learn's digits, 1,797 images of 64 pixels, scaled to 0..1."""
    from sklearn.datasets import load_digits

    images = load_digits()
    names = tuple(images.feature_names)
    return Data(images.data / 16, images.target, names, tuple(range(10)))


def table(job: SimulatedJob, path: Path) -> Data:
    """The job's columns of a CSV or Parquet file. Raises LocalError."""
    if job.columns is None:
        raise LocalError("the job has no [columns]; name features and label of the table")
    if job.horizontal.model == "logistic" and not job.horizontal.classes:
        raise LocalError("classes of [horizontal] must list the values of the label")
    return read_rows(Source(path), job.horizontal, job.columns, {}, {})


def run(
    job: SimulatedJob,
    rows: Data,
    clients: int,
    partition: str,
    workers: Workers,
    progress: Progress,
    own: Own | None = None,
) -> dict[str, Any]:
    """Deal, train, and tell as plain values; with compression also without it, to compare. own: what every client makes
    of its rows, where the job trains own models.

    Raises LocalError, Refused, PeerLost.
    """
    parts = deal(rows, partition, clients, job.horizontal.seed)
    start = time.perf_counter()
    outcome = simulate(job.horizontal, _taking_part(parts, own), workers=workers, progress=progress)
    seconds = time.perf_counter() - start
    compression = None
    if job.horizontal.compression:
        plain = msgspec.structs.replace(job.horizontal, compression="")
        compression = compared(outcome, simulate(plain, _taking_part(parts, own), workers=workers, progress=progress))
    sizes = [len(part.y) for part in parts]
    return {
        "title": job.title,
        "clients": clients,
        "partition": partition,
        "rows": int(np.sum(sizes)),
        "rows_a_client": {"least": min(sizes), "median": float(np.median(sizes)), "most": max(sizes)},
        **training(job.horizontal, outcome),
        "compression": compression,
        "seconds": round(seconds, 3),
    }


def _taking_part(parts: list[Data], own: Own | None) -> list[Data] | list[Model]:
    return parts if own is None else [own(part) for part in parts]


def compared(packed: Outcome, plain: Outcome) -> dict[str, float | None]:
    """What compression saves of the clients' bytes and what it costs: the last models' scores over all rows."""
    size, dense = (sum(one.bytes for one in run.rounds) for run in (packed, plain))
    lost = plain.overall.accuracy - packed.overall.accuracy
    return {
        "bytes": size,
        "saved": 1 - size / dense,
        "loss_added": packed.overall.loss - plain.overall.loss,
        "accuracy_lost": None if np.isnan(lost) else lost,
    }


def write(folder: Path, summary: dict[str, Any]) -> list[str]:
    """summary.json, and the curves of loss and accuracy where there are any; the names of the files."""
    write_json(folder / "summary.json", summary)
    runs = {"": summary["progress"]}
    return [
        "summary.json",
        *(f"{key}.svg" for key in ("loss", "accuracy") if write_curves(folder / f"{key}.svg", runs, key)),
    ]


def closing_table(summary: dict[str, Any]) -> Table:
    """A simulation at a glance."""
    shown = Table(title=f"{summary['title']}: simulated", show_header=False, title_justify="left")
    each = summary["rows_a_client"]
    spread = f"{each['least']} to {each['most']} rows, median {each['median']:g}"
    shown.add_row("clients", f"{summary['clients']:,} ({summary['partition']}), {spread}")
    for row in training_rows(summary):
        shown.add_row(*row)
    last = [one["accuracy"] for one in summary["progress"] if one["accuracy"] is not None]
    if last:
        shown.add_row("accuracy", f"{last[-1]:.4f} of the model with which the last round began")
    if one := summary["compression"]:
        lost = "" if one["accuracy_lost"] is None else f", accuracy lower by {one['accuracy_lost']:.4f}"
        shown.add_row(
            "compression", f"{one['saved']:.0%} fewer bytes than without; loss higher by {one['loss_added']:.4f}{lost}"
        )
    shown.add_row("time", f"{summary['seconds']:.1f} s")
    return shown
