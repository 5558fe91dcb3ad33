"""Organisations on disk, as users have them: tables, keys, agreement, own files. Small keys of 2048 bits, for speed."""

from __future__ import annotations

import contextlib
import io
import socket
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

from parties.identity import Identity
from parties.launch import launch
from parties.party_file import Party
from vfl import cli

AGREEMENT = """
title = "A test"
purpose = "to test"
legal_basis = "none needed"
expires = 2099-12-31
{parties}
[identifiers]
fields = {{ customer = "text/1" }}
{identifiers}
[intersection]
minimum = {minimum}
[model]
{model}
[encryption]
key_bits = 2048
[deadlines]
connect = {connect}
silence = 6
"""


def customers(rows: int, seed: int = 0) -> dict[str, pd.DataFrame]:
    """A bank with a label, a grocer and a telco; partly the same customers, ids in several spellings."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6))
    label = rng.random(rows) < 1 / (1 + np.exp(-(x @ np.array([0.5, -0.4, 1.0, -1.2, 0.8, 0.3]))))
    ids = np.array([f"Customer-{number:06d}" for number in rng.permutation(900_000)[:rows]])
    bank = pd.DataFrame({"id": ids, "income": x[:, 0], "years": x[:, 1], "bad": np.where(label, "yes", "no")})
    grocer = pd.DataFrame({"id": [f" {one.upper()}" for one in ids], "baskets": x[:, 2], "returns": x[:, 3]})
    telco = pd.DataFrame({"id": [f"{one.lower()}  " for one in ids], "minutes": x[:, 4], "late": x[:, 5]})
    tables = {"bank": bank, "grocer": grocer, "telco": telco}
    return {name: table.sample(frac=0.9, random_state=n) for n, (name, table) in enumerate(tables.items())}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def build(
    folder: Path,
    tables: dict[str, pd.DataFrame],
    *,
    minimum: int = 10,
    model: str = "",
    identifiers: str = "",
    connect: float = 30,
    sign: bool = True,
) -> dict[str, Path]:
    """Write everything and approve it; the party files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    identities = {name: Identity.generate(name) for name in tables}
    ports = free_ports(len(tables))
    parties = "".join(
        f'[[parties]]\nname = "{name}"\nrole = "{"feature" if place else "label"} holder"\n'
        f'public_key = "{identities[name].public}"\nendpoint = "tcp://127.0.0.1:{ports[place]}"\n'
        for place, name in enumerate(tables)
    )
    text = AGREEMENT.format(parties=parties, minimum=minimum, model=model, identifiers=identifiers, connect=connect)
    (folder / "agreement.toml").write_text(text)
    paths = {}
    for name, table in tables.items():
        identities[name].save(folder / f"{name}.key")
        table.to_csv(folder / f"{name}.csv", index=False)
        features = [column for column in table.columns if column not in ("id", "bad")]
        label = 'label = "bad"\npositive = "yes"\n' if "bad" in table.columns else ""
        paths[name] = folder / f"{name}.toml"
        paths[name].write_text(
            f'agreement = "agreement.toml"\nkey = "{name}.key"\noutput = "out/{name}"\n'
            f'[table]\npath = "{name}.csv"\nid = "id"\nfeatures = {features!r}\n{label}'
        )
        if sign:
            Party(paths[name]).sign()
    return paths


def edit(path: Path, old: str, new: str) -> None:
    """Replace what must stand in a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def colonnade(*arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["colonnade", *map(str, arguments)]),
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(out),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def together(commands: dict[str, list[object]], timeout: float = 120) -> tuple[dict[str, int], dict[str, str]]:
    """One real process a party; exit codes and standard errors."""
    errors: dict[str, list[str]] = {name: [] for name in commands}
    codes = launch(
        {name: [sys.executable, "-m", "vfl", *map(str, rest)] for name, rest in commands.items()},
        timeout=timeout,
        on_error=lambda name, line: errors[name].append(line),
    )
    return codes, {name: "\n".join(lines) for name, lines in errors.items()}
