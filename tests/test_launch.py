"""Parties as processes of this machine: what they say, how they end, and that nothing is left running."""

from __future__ import annotations

import sys

import pytest

from parties.launch import launch


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_codes_and_lines_of_every_party_are_told() -> None:
    output: list[tuple[str, str]] = []
    errors: list[tuple[str, str]] = []
    commands = {"bank": python("print('one'); print('two')"), "grocer": python("import sys; sys.exit('no table')")}
    codes = launch(
        commands,
        timeout=60,
        on_output=lambda name, line: output.append((name, line)),
        on_error=lambda name, line: errors.append((name, line)),
    )
    assert codes == {"bank": 0, "grocer": 1}
    assert output == [("bank", "one"), ("bank", "two")] and errors == [("grocer", "no table")]


@pytest.mark.parametrize("why", ["the other failed", "time is up"])
def test_who_would_wait_for_ever_is_ended(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parties.launch.GRACE", 0.2)
    waits = python("import time; time.sleep(600)")
    other, code = (python("raise SystemExit(3)"), 3) if why == "the other failed" else (waits, -15)
    timeout = 60 if why == "the other failed" else 0.5
    assert launch({"bank": waits, "grocer": other}, timeout=timeout) == {"bank": -15, "grocer": code}
