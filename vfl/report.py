"""What a party keeps and sees at the end: files in its output folder, and a table to read at a glance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from parties.agreement import Agreement
from parties.errors import LocalError
from parties.files import write_json, write_whole
from parties.party_file import Party
from vfl import html
from vfl.encryption.choice import strength
from vfl.estimator import VerticalLinearModel
from vfl.job import Outcome
from vfl.job_input import Prepared
from vfl.meter import Cell, reading_rows
from vfl.neural_estimator import VerticalMLP
from vfl.task import shown

SINGLE_HOLDER = (
    "One feature holder: its partial embeddings have nothing to hide behind. After as many exchanges as it has columns "
    "the label holder can rebuild these columns up to a linear map, and exactly once it knows as many rows."
)
SEVERAL_HOLDERS = (
    "The agreement allows more exchanges than the feature holders have columns together: the label holder, once it "
    "knows as many rows of one of them, can then rebuild that one's other rows."
)

COUNTED = (
    "Before training each feature holder counts the classes in its bins, up to {} exact numbers about the label; a bin "
    "whose rows are all of one class tells it their labels."
)

MOST_COLUMNS = 5  # of the closing table, those of the highest information value
SHOWN = {  # of a model's figures, in the closing table
    "auc": "AUC",
    "accuracy": "accuracy",
    "log_loss": "log loss",
    "r2": "R2",
    "rmse": "RMSE",
    "d2": "D2",
    "deviance": "mean deviance",
}


def write_outcome(party: Party, outcome: Outcome, warnings: Sequence[str]) -> dict[str, Any]:
    """Write model.json, rows.csv, summary.json, information.json (with [information] in the agreement) and, at the
    label holder, report.html into the party's output folder; returns the summary."""
    folder = party.output
    outcome.model.save(folder / "model.json", prepared=outcome.fitted)
    rows = pd.DataFrame({"row": outcome.rows, "part": np.where(outcome.test, "test", "train")})
    if outcome.scores is not None:
        held_out = pd.DataFrame(shown(outcome.model, outcome.scores), index=np.flatnonzero(outcome.test))
        rows = rows.join(held_out)
    write_whole(folder / "rows.csv", rows.to_csv(index=False).encode(), mode=0o600)
    summary = summarise(party, outcome, warnings)
    write_json(folder / "summary.json", summary)
    if outcome.information:
        write_whole(folder / "information.json", json.dumps(outcome.information, indent=2).encode() + b"\n", mode=0o600)
    if outcome.evaluation is not None:
        page = html.render(
            outcome.evaluation,
            title=summary["title"],
            party=summary["party"],
            session=summary["session"],
            information=outcome.information.get("values", ()),
            cost=cost_rows(summary),
            leakage=leakage_rows(outcome.model, party.agreement),
            notes=summary["notes"],
        )
        write_whole(folder / "report.html", page.encode())
    return summary


def summarise(party: Party, outcome: Outcome, warnings: Sequence[str]) -> dict[str, Any]:
    """The run as plain values; no id, no row, no coefficient."""
    agreement = party.agreement
    terms = getattr(outcome.model, "terms_", agreement.encryption)  # None: the open mode encrypts no gradient
    summary: dict[str, Any] = {
        "party": party.name,
        "role": agreement.party(party.name).role,
        "title": agreement.title,
        "agreement": agreement.digest.hex(),
        "session": outcome.session,
        "parties": [one.name for one in agreement.ring],
        "rows": msgspec.to_builtins(outcome.psi_report.input.rows),
        "intersection": len(outcome.rows),
        "rows_train": int((~outcome.test).sum()),
        "rows_test": int(outcome.test.sum()),
        "exchanges": outcome.model.n_iter_,
        "converged": outcome.model.converged_,
        "scheme": None if terms is None else terms.scheme,
        "key_bits": agreement.encryption.key_bits,
        "encryption": encryption(outcome.model, agreement),
        "seconds": round(sum(outcome.seconds.values()), 3),
        "seconds_by_phase": outcome.seconds,
        "bytes_sent": outcome.bytes_sent,
        "bytes_by_phase": outcome.bytes_by_phase,
        "leakage": reading_rows(getattr(outcome.model, "readings_", [])),
        "notes": [*notes(agreement), *warnings, *([] if outcome.model.converged_ else [remedy(agreement)])],
    }
    if outcome.information:
        summary["information"] = outcome.information["values"]
    if outcome.searched is not None:
        summary["search"] = {
            "folds": agreement.search.folds if agreement.search else 0,
            "chosen": outcome.searched.parameters,
        }
        if outcome.searched.figures is not None:
            summary["search"]["figures"] = outcome.searched.figures.tolist()
    if party.is_label_holder:
        found = outcome.evaluation
        summary |= {
            "metrics": {} if found is None else {name: one.figures for name, one in found.models.items()},
            "evaluation": msgspec.to_builtins(found),
            "gradient_norm": outcome.model.gradient_norm_,
        }
    return summary


def encryption(model: VerticalLinearModel | VerticalMLP, agreement: Agreement) -> dict[str, Any]:
    """The scheme that was agreed, the one that was used, and what both were predicted to cost."""
    terms = getattr(model, "terms_", None)  # a loaded model has not been trained here
    if terms is None:
        return {}
    return {
        "agreed": agreement.encryption.scheme,
        "scheme": terms.scheme,
        "strength": strength(terms.scheme, agreement.encryption.key_bits),
        "exchanges": terms.exchanges,
        "predicted": {
            scheme: {"seconds": round(cost.seconds, 3), "bytes": cost.bytes} for scheme, cost in terms.costs.items()
        },
    }


def encryption_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    if not found:
        return []
    predicted = ", ".join(
        f"{scheme} {cost['seconds']:,.1f} s and {decimal(cost['bytes'])}" for scheme, cost in found["predicted"].items()
    )
    return [
        ("encryption", found["strength"] + (" (chosen: it costs less here)" if found["agreed"] == "auto" else "")),
        ("  predicted", f"{predicted}, for up to {found['exchanges']} exchanges"),
    ]


def notes(agreement: Agreement) -> list[str]:
    """What everybody should know about this agreement before and after it runs."""
    allowed = agreement.model.allow_reconstruction
    counted = [] if agreement.information is None else [COUNTED.format(agreement.information.allowed_counts)]
    if agreement.feature_holders > 1:
        return counted + [SEVERAL_HOLDERS] * allowed
    return [*counted, f"{SINGLE_HOLDER} {'The agreement allows to go beyond.' if allowed else 'Training stops there.'}"]


def remedy(agreement: Agreement) -> str:
    """What can be done when training stopped before the optimum."""
    further = "a larger max_exchanges, epochs or tolerance in [model]"
    if not agreement.model.allow_reconstruction:
        further = (
            "more independent columns or another feature holder, which allow more exchanges and disclose no column; "
            f"allow_reconstruction = true in [model], after reading what that discloses; or {further}"
        )
    return (
        "What you can do: the model is whole, so use it if its figures suffice. For the optimum agree on one of these, "
        f"sign and run again: {further}"
    )


def closing_table(summary: dict[str, Any]) -> Table:
    """One party's run at a glance."""
    table = Table(
        title=f"{summary['title']}: {summary['party']} ({summary['role']})", show_header=False, title_justify="left"
    )
    rows = summary["rows"]
    table.add_row("our rows", f"{rows['kept']:,} of {rows['read']:,} take part")
    table.add_row("intersection", f"{summary['intersection']:,} rows of {len(summary['parties'])} parties")
    table.add_row("train / test", f"{summary['rows_train']:,} / {summary['rows_test']:,} rows")
    for name, values in summary.get("metrics", {}).items():
        who = {"alone": "label holder alone", "joint": "joint model"}.get(name, name)
        told = ", ".join(f"{text} {values[figure]:.4f}" for figure, text in SHOWN.items() if figure in values)
        table.add_row(who, f"{told or 'nothing to measure'} on the test rows")
    ours = [row for row in summary.get("information", []) if row["party"] == summary["party"]]
    if ours:
        best = sorted(ours, key=lambda row: row["iv"], reverse=True)[:MOST_COLUMNS]
        table.add_row("information value", ", ".join(f"{row['column']} {row['iv']:.3f}" for row in best))
    state = "complete" if summary["converged"] else "stopped before the optimum, see the note"
    table.add_row("exchanges", f"{summary['exchanges']} ({state})")
    for row in encryption_rows(summary["encryption"]):
        table.add_row(*row)
    for row in phase_rows(summary):
        table.add_row(*row)
    for peer, kinds in summary["bytes_sent"].items():
        table.add_row(f"sent to {peer}", f"{decimal(sum(kinds.values()))}")
    for text in summary["notes"]:
        table.add_row(Text("note", "bold"), text)
    return table


def phase_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Seconds and bytes sent by phase, and in all."""
    seconds, sent = summary["seconds_by_phase"], summary["bytes_by_phase"]
    phases = [(f"  {name}", f"{value:.1f} s, {decimal(sent.get(name, 0))} sent") for name, value in seconds.items()]
    return [("time", f"{summary['seconds']:.1f} s, {decimal(sum(sent.values()))} sent"), *phases]


def cost_rows(summary: dict[str, Any]) -> list[dict[str, str | int | float | None]]:
    """What the run took at us, phase by phase; the encryption and the exchanges belong to training."""
    scheme = summary["encryption"].get("strength")
    return [
        {
            "phase": phase,
            "seconds": seconds,
            "bytes we sent": summary["bytes_by_phase"].get(phase, 0),
            "exchanges": summary["exchanges"] if phase == "train" else None,
            "encryption": scheme if phase == "train" else None,
        }
        for phase, seconds in summary["seconds_by_phase"].items()
    ]


def leakage_rows(model: VerticalLinearModel | VerticalMLP, agreement: Agreement) -> list[dict[str, Cell]]:
    """Whether the label holder can have rebuilt the feature holders' columns from embeddings of the same rows.

    Unless the agreement allows it, training itself stops before it has as many as these have independent directions.
    """
    last = reading_rows(model.readings_[-1:])
    result = "allowed by the agreement" if agreement.model.allow_reconstruction else "PASS"
    return [
        {"what": "rebuilding columns from embeddings of the same rows"} | row | {"result": result}
        for row in ({name: value for name, value in one.items() if name != "reading"} for one in last)
    ]


def write_scores(path: Path, prepared: Prepared, outcome: Outcome) -> None:
    """The label holder's scores: its own ids as it wrote them, in its own row order."""
    written = {column: ids.take(pa.array(outcome.rows)).to_pylist() for column, ids in prepared.table.ids.items()}
    if outcome.scores is None:
        raise LocalError("scores stay with the label holder")
    scores = pd.DataFrame(written | shown(outcome.model, outcome.scores), index=outcome.rows)
    write_whole(path, scores.sort_index().to_csv(index=False).encode(), mode=0o600)
