"""Organisations on disk, as users have them: tables, keys, agreement, own files. Small keys of 2048 bits, for speed.
Their processes are forked from one that has imported everything, which takes longer than most jobs here."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

from parties.identity import Identity
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


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["vfl.cli", "vfl.report", "vfl.search", "vfl.horizontal.report", "torch"])


class Command:
    """The command in a process of its own. What it writes stands in two files of `folder`, without which it is lost."""

    def __init__(self, *arguments: object, folder: Path | None = None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("output", "errors"):
                (folder / name).write_bytes(b"")
        self._process = _FORKS.Process(target=_command, args=([*map(str, arguments)], dict(os.environ), folder))
        self._process.start()

    def output(self) -> str:
        """All that it has written so far."""
        assert self.folder is not None
        return (self.folder / "output").read_text(errors="replace")

    def errors(self) -> str:
        assert self.folder is not None
        return (self.folder / "errors").read_text(errors="replace").strip()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative when a signal ended it, None when it still runs."""
        self._process.join(max(0.0, seconds))
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _command(arguments: list[str], environment: dict[str, str], folder: Path | None) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    for stream, name in enumerate(("input", "output", "errors")):
        opened = os.open(os.devnull if folder is None or stream == 0 else folder / name, os.O_RDWR)
        os.dup2(opened, stream)
        os.close(opened)
    sys.argv = ["colonnade", *arguments]
    try:
        cli.main()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # ends a party's own workers: multiprocessing waits for them


def together(commands: dict[str, list[object]], timeout: float = 120) -> tuple[dict[str, int | None], dict[str, str]]:
    """One real process a party; exit codes and standard errors."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        running = {}
        for place, (name, arguments) in enumerate(commands.items()):
            running[name] = Command(*arguments, folder=Path(temporary) / str(place))
            stack.callback(running[name].kill)
        end = time.monotonic() + timeout
        codes = {name: one.wait(end - time.monotonic()) for name, one in running.items()}
        return codes, {name: one.errors() for name, one in running.items()}
