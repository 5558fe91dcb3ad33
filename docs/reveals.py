"""Collects the Reveals sections of all docstrings into threats.md. Run: python docs/reveals.py

A test compares the two, so that the document cannot drift from the code.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

PAGE = Path(__file__).with_name("threats.md")
BEGIN, END = "<!-- reveals: begin -->", "<!-- reveals: end -->"


def sections() -> dict[str, str]:
    """`{"psi.align.align": "To every party: ...", ...}` for every function or method that has such a section."""
    found = {}
    for package in ("parties", "psi", "vfl"):
        for info in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
            module = importlib.import_module(info.name)
            for name, thing in vars(module).items():
                if getattr(thing, "__module__", None) != info.name:
                    continue
                members = {name: thing}
                if inspect.isclass(thing):
                    members |= {f"{name}.{key}": value for key, value in vars(thing).items() if callable(value)}
                for path, member in members.items():
                    text = inspect.getdoc(member) or ""
                    match = re.search(r"^Reveals:(.*?)(?=^Raises:|\Z)", text, re.S | re.M)
                    if match:
                        found[f"{info.name}.{path}".removesuffix(".__init__")] = " ".join(match[1].split())
    return dict(sorted(found.items()))


def table() -> str:
    rows = [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in sections().items()]
    return "\n".join([BEGIN, "| role | reveals |", "|---|---|", *rows, END])


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + table() + page[page.index(END) + len(END) :])
