"""What a party keeps and sees of a horizontal job: model, summary, a page, and a table to read at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from parties.files import write_json, write_whole
from parties.horizontal import Horizontal
from parties.party_file import Party
from vfl.horizontal.job import Finished, agreed, budget_path
from vfl.horizontal.newton import Exact
from vfl.horizontal.outcome import Outcome
from vfl.horizontal.own import save
from vfl.horizontal.privacy_budget import PrivacyBudget
from vfl.horizontal.share import HorizontalModel
from vfl.pages import BOTTOM, LEFT, PAGES, RIGHT, TOP, Chart, Plot

CURVES = {  # {} says over which rows
    "loss": Plot("loss", "Loss", "Of the model with which each round began, over {}.", "round", "mean loss", "", ()),
    "accuracy": Plot(
        "accuracy", "Accuracy", "Of the model with which each round began, over {}.", "round", "accuracy", "", ()
    ),
}
FRAME = {"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
_SVG_STYLE = "text{fill:#566273;font:12px sans-serif}.grid{stroke:#d9dfe6}polyline{fill:none;stroke-width:2.2}"
_COLOURS = ("#1d4f7c", "#7a5200", "#1a6b3c", "#a3161f")


def write_outcome(party: Party, finished: Finished, warnings: Sequence[str]) -> dict[str, Any]:
    """Write the model, summary.json and report.html into the party's output folder; returns the summary.

    The model is model.json, or of an own one what `own.save` writes.
    """
    folder, agreement = party.output, party.agreement
    plan, columns = agreed(agreement)
    if finished.model is not None:
        save(finished.model, folder)
    else:
        exact = Exact(plan.model, len(columns.features), plan.classes, plan.C, plan.alpha, plan.fit_intercept)
        HorizontalModel.of(
            finished.outcome.model,
            exact,
            list(columns.features),
            finished.outcome.earlier + len(finished.outcome.rounds),
            agreement.digest.hex(),
            finished.session,
        ).save(folder / "model.json")
    summary = summarise(party, finished, warnings)
    write_json(folder / "summary.json", summary)
    write_whole(folder / "report.html", render(summary, plan).encode())
    return summary


def summarise(party: Party, finished: Finished, warnings: Sequence[str]) -> dict[str, Any]:
    """The run as plain values; no row, no label, no coefficient."""
    agreement, outcome = party.agreement, finished.outcome
    plan, columns = agreed(agreement)
    return {
        "party": party.name,
        "role": agreement.party(party.name).role,
        "title": agreement.title,
        "agreement": agreement.digest.hex(),
        "session": finished.session,
        "clients": list(agreement.clients),
        "absent": finished.missing,
        "rows": None if finished.data is None else len(finished.data.y),
        "columns": list(columns.features),
        "complete": _complete(outcome, finished.missing),
        **training(plan, outcome),
        "epsilon": _epsilon(party, plan, finished),
        "seconds": finished.seconds,
        "bytes_sent": finished.bytes_sent,
        "notes": [*dict.fromkeys([*outcome.warnings, *warnings])],
    }


def _epsilon(party: Party, plan: Horizontal, finished: Finished) -> dict[str, float] | None:
    """What the noise that we add has cost by now, all jobs of this purpose together; None where we add none."""
    central = plan.privacy.noise == "central"
    if not plan.private or (party.name != party.agreement.ring[0].name if central else finished.data is None):
        return None
    spent = PrivacyBudget(budget_path(party), party.identity).spent(party.agreement.purpose)
    return {"spent": spent.total(plan.privacy.delta), "allowed": plan.privacy.epsilon, "delta": plan.privacy.delta}


def training(plan: Horizontal, outcome: Outcome) -> dict[str, Any]:
    """What training did, as plain values."""
    facts = outcome.facts()
    return {
        "model": plan.model,
        "strategy": plan.strategy,
        "test_fraction": plan.test_fraction,
        "secure_aggregation": plan.secure_aggregation,
        "progress": facts["rounds"],
        "evaluation": facts["clients"],
        "worst": facts["worst"],
        "spread": facts["spread"],
        "gone": facts["gone"],
        "earlier": facts["earlier"],
    }


def _complete(outcome: Outcome, missing: dict[str, str]) -> bool:
    return not (missing or outcome.gone or any(one.missing for one in outcome.rounds))


def render(summary: dict[str, Any], plan: Horizontal) -> str:
    """The page, HTML 5, self-contained. The same arguments give the same page."""
    progress = summary["progress"]
    gaps: dict[str, dict[str, Any]] = {}
    for one in progress:
        for name, reason in one["missing"].items():
            gap = gaps.setdefault(name, {"rounds": [], "reason": reason})
            gap["rounds"].append(one["number"])
    for gap in gaps.values():
        gap["rounds"] = ", ".join(map(str, gap["rounds"]))
    rows = "the rows kept from training" if summary["test_fraction"] else "all rows"
    sent = sum(sum(kinds.values()) for kinds in summary["bytes_sent"].values())
    per_round = [one["seconds"] for one in progress]
    cost = [
        ("rounds", f"{summary['earlier'] + len(progress)}"),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items())),
        ("seconds a round", f"{sum(per_round) / len(per_round):.3f}" if per_round else "–"),
        ("sent by us", decimal(sent)),
    ]
    if plan.compression and (saved := sum(one["saved"] for one in progress)):
        dense = saved + sum(one["bytes"] for one in progress)
        cost.append(("saved by compression", f"{decimal(saved)} of the clients' {decimal(dense)}, {saved / dense:.0%}"))
    return PAGES.get_template("horizontal.html").render(
        summary=summary,
        rounds=progress,
        last=progress[-1] if progress else None,
        clients=summary["evaluation"],
        charts=[one for one in (_chart(key, {"": progress}, rows) for key in CURVES) if one is not None],
        frame=FRAME,
        gaps=gaps,
        protection=[*protection(plan), *_spent(summary)],
        cost=cost,
    )


def protection(plan: Horizontal) -> list[tuple[str, str]]:
    """What is agreed to protect the clients, in words."""
    privacy, secure = plan.privacy, "on: the coordinator learns sums over the clients, no client's own update"
    private = "none"
    if privacy.level != "none":
        what = "example" if privacy.level == "record" else "client"
        private = f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for one {what}, {privacy.noise} noise"
        if plan.clients.rate < 1:
            private += f"; each drawn with chance {plan.clients.rate:g} a round, which only the coordinator sees"
    return [
        ("Secure aggregation", secure if plan.secure else "off: the coordinator sees every client's update"),
        ("Differential privacy", private),
        ("Aggregation", plan.robust + (f", at most {plan.poisoned} poisoned" if plan.poisoned else "")),
        ("Compression", plan.compression or "none"),
    ]


def _spent(summary: dict[str, Any]) -> list[tuple[str, str]]:
    if summary["epsilon"] is None:
        return []
    one = summary["epsilon"]
    text = "epsilon {spent:.4g} of {allowed:g} at delta {delta:g}, by all jobs of this purpose".format(**one)
    return [("Privacy spent by us", text)]


def _chart(key: str, runs: dict[str, Sequence[dict[str, Any]]], rows: str) -> Chart | None:
    curves = {
        name: [(float(one["number"]), float(one[key])) for one in rounds if one[key] is not None]
        for name, rounds in runs.items()
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    plot = replace(CURVES[key], meaning=CURVES[key].meaning.format(rows))
    return Chart.of(plot, curves) if curves else None


def write_curves(path: Path, runs: dict[str, Sequence[dict[str, Any]]], key: str = "loss") -> bool:
    """The learning curves of one or several runs (name -> rounds as plain values) as an SVG picture.

    False when no round has this figure; then nothing is written.
    """
    chart = _chart(key, runs, "its rows")  # a picture has no caption
    if chart is None:
        return False
    colours = "".join(f".line{n}{{stroke:{_COLOURS[n % len(_COLOURS)]}}}" for n in range(len(chart.lines)))
    drawn = str(PAGES.get_template("curve.html").module.drawn(chart, FRAME))  # type: ignore[attr-defined]
    write_whole(path, drawn.replace(">", f"><style>{_SVG_STYLE}{colours}</style>", 1).encode())
    return True


def closing_table(summary: dict[str, Any]) -> Table:
    """One party's run at a glance."""
    table = Table(
        title=f"{summary['title']}: {summary['party']} ({summary['role']})", show_header=False, title_justify="left"
    )
    if summary["rows"] is not None:
        table.add_row("our rows", f"{summary['rows']:,}, each with {len(summary['columns'])} columns")
    for row in training_rows(summary):
        table.add_row(*row)
    for row in _spent(summary):
        table.add_row(*row)
    if summary["absent"]:
        table.add_row("never came", ", ".join(sorted(summary["absent"])))
    table.add_row("time", ", ".join(f"{name} {value:.1f} s" for name, value in summary["seconds"].items()))
    for peer, kinds in list(summary["bytes_sent"].items())[:5]:
        table.add_row(f"sent to {peer}", decimal(sum(kinds.values())))
    for text in summary["notes"]:
        table.add_row(Text("note", "bold"), text)
    return table


def training_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Rounds, loss, and how the clients fare."""
    progress, evaluation = summary["progress"], summary["evaluation"]
    earlier = summary.get("earlier", 0)
    before = f", {earlier} of them before this start" if earlier else ""
    rows = [("training", f"{summary['model']}, {summary['strategy']}, {earlier + len(progress)} rounds{before}")]
    known = [one["loss"] for one in progress if one["loss"] is not None]
    which = "held-out rows" if summary["test_fraction"] else "rows"
    if known:
        rows.append((f"mean loss, all {which}", f"{known[0]:.4f} at first, {known[-1]:.4f} in the last round"))
    own = evaluation.get(summary.get("party", ""))
    if own and own["after"]["loss"] is not None and own["before"]["loss"] is not None:
        rows.append((f"loss, our {which}", f"{own['before']['loss']:.4f} before, {own['after']['loss']:.4f} after"))
    if summary["worst"] and len(evaluation) > 1:
        worst, spread = evaluation[summary["worst"]]["after"]["loss"], summary["spread"] or 0.0
        rows.append(("served worst", f"{summary['worst']}: loss {worst:.4f}; {spread:.4f} from best to worst"))
    if summary["gone"]:
        rows.append(("dropped out", ", ".join(sorted(summary["gone"]))))
    return rows
