"""The documents say what the code does."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import psi.align
import vfl.cli
import vfl.horizontal.job
import vfl.job
import vfl.neural
import vfl.scoring
from parties.message import _REGISTRY

ROOT = Path(__file__).resolve().parents[1]


def test_threats_lists_what_the_docstrings_reveal():
    reveals = runpy.run_path(str(ROOT / "docs" / "reveals.py"))
    assert len(reveals["sections"]()) >= 12
    assert reveals["table"]() in (ROOT / "docs" / "threats.md").read_text(), "run python docs/reveals.py"


def test_protocol_lists_every_message_with_its_number_and_class():
    assert psi.align and vfl.job and vfl.neural and vfl.scoring and vfl.horizontal.job  # these fill the registry
    page = (ROOT / "docs" / "protocol.md").read_text()
    rows = {
        (int(number), name, kind)
        for number, name, kind in re.findall(r"^\| (\d+) \| (\w+) \| [^|]+ \| (\w+) \|", page, re.M)
    }
    assert rows == {(number, cls.__name__, cls.ledger_class) for number, cls in _REGISTRY.items()}


VERIFY = """
from pathlib import Path
import vfl.cli
from parties.errors import LocalError
from parties.message import _REGISTRY
try:
    vfl.cli.verify([Path("no report")])
except LocalError:
    print(*_REGISTRY)
"""


def test_verify_knows_every_kind_that_a_vertical_ledger_can_have():
    done = subprocess.run([sys.executable, "-c", VERIFY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {number for number in _REGISTRY if number < 300} <= set(map(int, done.stdout.split()))


def test_readme_commands_exist():
    page = (ROOT / "README.md").read_text()
    known = {command.name or command.callback.__name__ for command in vfl.cli.app.registered_commands}
    assert set(re.findall(r"^    colonnade (\w+)", page, re.M)) <= known
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^    make (\w+)", page, re.M))
