"""The page made from a report: it says all that the report says, and asks nobody for anything; also in a browser."""

from __future__ import annotations

import html as markup
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jsonschema
import msgspec
import pytest
from PIL import Image
from pypdf import PdfReader

from parties.memory import play
from psi import html
from psi.align import align
from psi.budget import Use
from psi.identifiers import canonical
from psi.report import Check, Report, SelfTest, as_file, countersigned, make_report, schema
from tests.conftest import NAMES, agree, parties

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    "title": "Joint credit risk model of bank, grocer and mill, 2026",
    "purpose": "Find the customers that all partners share, so that one credit risk model can be trained on the "
    "columns of all parties for the bank's credit decisions; no other use",
    "legal_basis": "GDPR Art. 6(1)(f), legitimate interest; data processing contract of 12 March 2026, annex 3, "
    "reviewed by the data protection officers of all parties",
    "expires": "2999-12-31",
}
REHEARSAL = SelfTest(
    time="2026-11-20T09:12:44+00:00", session="5e" * 32, rows=5000, expected=1234, found=1234, passed=True
)


def used(peer: str, **counts: int | None) -> Use:
    limits = {"runs": 12, "distinct_ids": 2_000_000, "smallest_difference": 1_000}
    usual = {"runs": 3, "distinct_ids": 123_456, "difference": 5_000}
    return msgspec.convert({"peer": peer, "limits": limits} | usual | counts, Use)


def some_id(number: int) -> str:
    return f"Zqx-Customer-{number:05d}"


def reports(count: int, rows: int = 300, *, full: bool = True, **tables: Any) -> dict[str, Report]:
    """What parties report after a real run. `full`: with budget, rehearsal and escrow."""
    agreement, names = agree(count, **TEXTS | tables), NAMES[:count]

    def role(name: str) -> Any:
        start = 50 * names.index(name)
        column = [some_id(number) for number in range(start, start + rows)]
        column += [None, "  ", column[0], column[1].upper()]

        def run(session: Any) -> Report:
            columns = dict.fromkeys(agreement.identifiers.fields, column)
            ids = canonical(columns, agreement.identifiers, duplicates="first", empty="drop")
            with session.phase("align"):
                alignment = align(session, ids)
            use = [used(peer) for peer in session.channels]
            report = make_report(
                session,
                alignment,
                ids,
                columns={field: f"crm_{field}" for field in columns},
                escrow="0123-4567-89ab-cdef-0123-4567-89ab-cdef" if full else "",
                budget=use if full else None,
                selftest=REHEARSAL if full else None,
            )
            return countersigned(session, report)

        return run

    out: dict[str, Report] = play({name: role(name) for name in names}, agreement, identities=parties(count))
    return out


@pytest.fixture(scope="module")
def two() -> Report:
    return reports(2)["bank"]


@pytest.fixture(scope="module")
def three() -> Report:
    """That of the party with the most evidence: the hub has one more list of positions a peer."""
    return reports(3)["bank"]


def text_of(page: str) -> str:
    """What a reader sees, with single spaces."""
    body = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(markup.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def altered(report: Report, *path: str | int, to: Any) -> Report:
    """The report with one value changed, whatever its signature then says."""
    plain = msgspec.to_builtins(report)
    inner = plain
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to
    return msgspec.convert(plain, Report)


# ---- what it says

CLOSED = {"status", "role", "what", "direction", "result", "keys", "fields"}  # what msgspec lets nobody choose freely
KEPT = CLOSED - {"fields"} | {"suite", "empty", "duplicates", "party"}  # or what the page treats by its value
NAMED = ("parties", "roots", "seconds", "transcripts", "countersignatures")


class Marker:
    """Replaces every value of a report that may be anything by one that occurs nowhere else, and notes how the page
    should spell it."""

    def __init__(self) -> None:
        self.numbers, self.facts = iter(range(10_007, 60_000, 37)), list[str]()

    def __call__(self, value: Any, *path: str) -> Any:
        if isinstance(value, dict):
            return {key: self(inner, *path, key) for key, inner in value.items()}
        if isinstance(value, list):
            return [self(inner, *path) for inner in value]
        if value is None or isinstance(value, bool) or path == ("colonnade_psi_report",):
            return value
        if isinstance(value, str):
            new: Any = value if KEPT & set(path) else f"text{next(self.numbers)}"
            self.facts.append(new)
        elif isinstance(value, float):
            new = next(self.numbers) + 0.125
            self.facts.append(f"{new:,.3f} s" if path[0] == "seconds" else f"{new:.2g}")
        else:
            new = next(self.numbers)
            self.facts.append(f"key {new + 1:,}" if path[-1] == "step" else f"{new:,}")
        return new


@pytest.mark.parametrize("count", [2, 3])
def test_every_fact_of_the_report_is_on_the_page(count: int) -> None:
    keys = {"fields": {"ssn": "text/1", "name": "text/1"}, "keys": [["ssn"], ["name"]]}
    real = json.loads(as_file(reports(count, identifiers=keys)["bank"]))
    mark = Marker()
    report = msgspec.convert(mark(real), Report)
    shown = text_of(html.render(report))
    names = [name for field in NAMED for name in real[field]] + list(real["software"]["packages"])
    assert len(mark.facts) > 150 and real.keys() == {field.name for field in msgspec.structs.fields(Report)}
    assert [fact for fact in mark.facts + names if fact not in shown] == []


def test_a_real_report_in_its_own_words(two: Report) -> None:
    shown = text_of(html.render(two))
    for words in (
        "All checks passed.",
        f"{len(two.checks)} PASS, 0 FAIL, 0 NOT RUN",
        "300 rows of ours, by customer",
        "250 rows are common to all 2 parties",
        "Signed by bank, countersigned by grocer.",
        "No id and no row left in readable form, up to this point; the model’s messages that followed are only in the",
        "bank.toml --replay compliance.key",
        "Rows read Empty id Invalid id Duplicate Took part 304 2 0 2 300",
        "less than 1 in 10^1",
        two.time.replace("T", " ").replace("+00:00", " UTC"),
        "5,000 synthetic rows: 1,234 expected in common, 1,234 found",
        "verify psi_report.json --agreement agreement.toml --party bank.toml --sample 459 --against extract.csv",
        "docs/threats.md",
    ):
        assert words in shown, words
    assert all(f"{check.name} {check.status}" in shown for check in two.checks)


@pytest.mark.parametrize("task", ["align", "selftest", "train", "score with it"])
def test_only_where_nothing_follows_the_page_speaks_of_all_that_left(task: str, two: Report) -> None:
    shown = text_of(html.render(msgspec.structs.replace(two, task=task)))
    whole = task in ("align", "selftest")
    assert ("No id and no row left in readable form." in shown) == whole
    assert ("the model’s messages that followed are only in the ledger." in shown) != whole
    assert ("the signatures that follow it are in the ledger." in shown) == whole


def test_every_command_names_the_agreement(two: Report) -> None:
    commands = re.findall(r"<pre><code>(.*?)</code></pre>", html.render(two))
    assert len(commands) == 4 and all("--agreement agreement.toml" in command for command in commands)


def test_the_totals_are_those_of_the_messages(three: Report) -> None:
    shown = text_of(html.render(three))
    for peer in ("grocer", "mill"):
        by_class: dict[str, int] = {"aggregate": 0, "control": 0, "masked": 0}
        for one in three.traffic:
            if one.to == peer:
                by_class[one.ledger_class] += one.bytes
        assert f"{peer} {' '.join(f'{size:,}' for size in by_class.values())} {sum(by_class.values()):,}" in shown
    assert f"In all {sum(one.bytes for one in three.traffic):,} bytes to 2 peers" in shown


def test_the_verdict_is_in_words(two: Report) -> None:
    def first(*statuses: Literal["PASS", "FAIL", "NOT RUN"]) -> str:
        checks = [Check(name=f"check {number}", status=status) for number, status in enumerate(statuses)]
        shown = text_of(html.render(msgspec.structs.replace(two, checks=checks)))
        return shown[: shown.index("In short")]

    assert "Do not rely on this result: 1 check failed. 1 PASS, 1 FAIL, 1 NOT RUN" in first("PASS", "FAIL", "NOT RUN")
    assert "No check failed; 2 checks were not run. 1 PASS, 0 FAIL, 2 NOT RUN" in first("NOT RUN", "PASS", "NOT RUN")
    assert "All checks passed. 2 PASS, 0 FAIL, 0 NOT RUN" in first("PASS", "PASS")
    assert "Do not rely on this result: nothing was checked." in first()


def test_every_result_says_what_it_reveals() -> None:
    said = {}
    for result in ("rows", "rows to the label holder", "size"):
        out = reports(3, 150, full=False, intersection={"result": result, "bucket": 400})
        said[result] = {name: text_of(html.render(report)) for name, report in out.items()}
    for shown in said.values():
        assert all("Set sizes are rounded up to multiples of 400." in page for page in shown.values())
        assert all("Our policy sets no budget" in page for page in shown.values())
        assert all(f"{name} states that no copy was kept" in page for name, page in shown.items())
    assert "“rows”: to each party, which of its own rows" in said["rows"]["mill"]
    assert "to bank, which of its own rows are common to all; to the others, only" in said[
        "rows to the label holder"]["mill"]  # fmt: skip
    assert "Nobody learns which." in said["size"]["bank"]
    for result, page in (("rows", "mill"), ("rows to the label holder", "bank")):
        assert "We know which of our rows these are" in said[result][page]
    for result, page in (("rows to the label holder", "mill"), ("size", "bank")):
        assert "Which rows these are was not revealed to us." in said[result][page]
        assert "NOT RUN" in said[result][page]


def test_what_is_missing_is_said(two: Report) -> None:
    bare = msgspec.structs.replace(two, signature="", countersignatures={}, selftest=None, budget=[])
    shown = text_of(html.render(bare))
    assert "Do not rely on this report: not signed by bank, grocer." in shown and "All checks passed" not in shown
    assert "Not signed; no countersignature of grocer." in shown
    left = html.render(msgspec.structs.replace(two, countersignatures={}))
    assert "Do not rely on this report: not signed by grocer." in text_of(left) and '<div class="verdict fail">' in left
    assert "NOT RUN No rehearsal" in shown
    spent = used("grocer", runs=13, difference=None)
    shown = text_of(html.render(msgspec.structs.replace(two, budget=[spent])))
    assert "FAIL the budget for grocer is used up: 12 runs in 30 days allowed" in shown and "first input" in shown
    failed = msgspec.structs.replace(two, selftest=msgspec.structs.replace(REHEARSAL, found=1233, passed=False))
    assert "FAIL On 2026-11-20 09:12:44 UTC" in text_of(html.render(failed))


def test_an_unknown_or_readable_message_is_not_glossed_over(two: Report) -> None:
    odd = altered(altered(two, "traffic", 0, "kind", to="SomethingNew"), "traffic", 0, "ledger_class", to="odd")
    shown = text_of(html.render(odd))
    assert "SomethingNew (odd)" in shown and "This includes data that the receiver can read." in shown


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        (9.1e-13, "less than 1 in 10^12 (1 in 1,000,000,000,000)"),
        (1e-12, "less than 1 in 10^11 (1 in 100,000,000,000)"),
        (3e-40, "less than 1 in 10^39"),
        (0.05, "less than 1 in 10^1 (1 in 10)"),
        (0.5, "at most 0.5"),
        (0.0, "at most 0"),
    ],
)
def test_odds_in_words(bound: float, words: str, two: Report) -> None:
    assert words in text_of(html.render(msgspec.structs.replace(two, false_match_bound=bound)))


# ---- what it does not say, and cannot do


def test_no_id_appears(three: Report) -> None:
    page = html.render(three).casefold()
    assert "zqx" not in page and not any(some_id(number).casefold() in page for number in range(500))


def test_it_asks_nobody_for_anything(three: Report) -> None:
    page = html.render(three)
    for banned in ("http://", "https://", "src=", "url(", "<script", "@import", "<link", "<iframe", "javascript:"):
        assert banned not in page.lower(), banned
    assert re.findall(r'href="([^"]*)"', page) == ["#checks", "#verify", "#verify"]
    assert not re.search(r"\s(on\w+|style)=", page)


def test_the_policy_allows_this_style_sheet_and_nothing_else(two: Report) -> None:
    page = html.render(two)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert policy and style and page.index(policy[0]) < page.index(style[0])
    hashed = html._csp_hash(style[1])
    assert policy[1] == f"default-src 'none'; style-src '{hashed}'; base-uri 'none'; form-action 'none'"


HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)></style>{{ 7*7 }}&amp;"""


def test_injected_markup_is_inert(two: Report) -> None:
    def poison(value: Any, *path: str) -> Any:
        if isinstance(value, dict):
            hostile = HOSTILE if path[-1:] in {(name,) for name in (*NAMED, "packages", "columns")} else ""
            return {hostile + key: poison(inner, *path, key) for key, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner, *path) for inner in value]
        if not isinstance(value, str) or path == ("governance", "intersection", "suite"):
            return value
        return value if CLOSED & set(path) else HOSTILE

    poisoned = poison(json.loads(as_file(two)))
    page = html.render(msgspec.convert(poisoned, Report))
    assert text_of(page).count("{{ 7*7 }}&amp;") > 50 and "49&amp;" not in page
    for live in ("<script", "<img", "'><", "onerror=alert(1)>"):
        assert live not in page
    clean = html.render(two)
    assert {*re.findall(r"<(\w+)", page)} <= {*re.findall(r"<(\w+)", clean)}
    assert page.count("</style>") == page.count("<style>") == 1


def test_the_same_report_gives_the_same_page(two: Report) -> None:
    again = msgspec.json.decode(as_file(two), type=Report)
    assert html.render(again) == html.render(two)


def test_the_page_names_the_file_it_was_made_from(two: Report, tmp_path: Path) -> None:
    path = tmp_path / "psi_report.json"
    path.write_bytes(as_file(two))
    done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] in html.render(two)


def test_importing_it_is_light() -> None:
    code = (
        "import sys, psi.report; before = set(sys.modules); import psi.html\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))\n"
        "print(sorted({'sklearn', 'scipy', 'vfl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['jinja2', 'markupsafe', 'psi']\n[]\n"


def palettes(page: str) -> list[dict[str, str]]:
    blocks = re.findall(r":root \{([^}]*--[^}]*)\}", page)
    return [dict(re.findall(r"(--[\w-]+): (#\w{6})", block)) for block in blocks]


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_in_both_palettes(two: Report) -> None:
    """WCAG 2.2 AA: a contrast of 4.5 for text of any size."""
    light, dark = palettes(html.render(two))
    assert light.keys() == dark.keys() and len(light) == 13
    pairs = [(ink, back) for ink in ("--ink", "--soft", "--accent") for back in ("--paper", "--head", "--page")]
    pairs += [(f"--{word}", f"--{word}-back") for word in ("pass", "fail", "open")]
    for colours in (light, dark):
        for ink, back in pairs:
            low, high = sorted(luminance(colours[name]) for name in (ink, back))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, back)


# ---- the schema


def test_the_schema_file_is_current() -> None:
    kept = json.loads((ROOT / "docs" / "psi_report.schema.json").read_bytes())
    assert kept == json.loads(msgspec.json.encode(schema())), "write msgspec.json.encode(psi.report.schema()) to it"


def test_real_reports_validate_against_the_schema(two: Report, three: Report) -> None:
    kept = json.loads((ROOT / "docs" / "psi_report.schema.json").read_bytes())
    jsonschema.Draft202012Validator.check_schema(kept)
    validator = jsonschema.Draft202012Validator(kept)
    for report in (two, three, reports(2, 100, full=False)["grocer"]):
        plain = json.loads(as_file(report))
        validator.validate(plain)
        for broken in (plain | {"more": 1}, plain | {"size": "1"}, {k: v for k, v in plain.items() if k != "flows"}):
            assert not validator.is_valid(broken)


# ---- in a real browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium")


class Browser:
    """A headless Chromium without a network, for one action at a time. `asked`: what pages tried to load, so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()

    def run(self, page: str, *options: str) -> str:
        path, log = self.folder / "page.html", self.folder / "net.json"
        path.write_text(page)
        command = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--hide-scrollbars", "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={self.folder / 'profile'}",
            f"--log-net-log={log}", *options, path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
        for event in json.loads(log.read_bytes())["events"]:
            request = event.get("params", {})
            if request.get("initiator", "not an origin") != "not an origin":  # else it is the browser's own
                self.asked.append(request["url"])
        return done.stdout.decode()

    def screenshot(self, page: str, *options: str) -> Image.Image:
        path = self.folder / "shot.png"
        self.run(page, "--window-size=1000,1400", f"--screenshot={path}", *options)
        with Image.open(path) as image:
            return image.convert("RGB")

    def printed(self, page: str) -> PdfReader:
        path = self.folder / "page.pdf"
        self.run(page, "--no-pdf-header-footer", f"--print-to-pdf={path}")
        return PdfReader(path)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser(tmp_path_factory.mktemp("chromium"))


@browser
def test_chromium_shows_the_checks_and_runs_nothing(chromium: Browser, two: Report) -> None:
    hostile = msgspec.structs.replace(
        two, governance=msgspec.structs.replace(two.governance, title="<script>document.title='taken'</script>")
    )
    shown = chromium.run(html.render(hostile), "--dump-dom")
    assert "<title>&lt;script&gt;document.title='taken'&lt;/script&gt;: validation report of bank</title>" in shown
    text = text_of(shown)
    assert all(f"{check.name} {check.status}" in text for check in two.checks)


@browser
def test_chromium_asks_for_nothing_outside(chromium: Browser, three: Report) -> None:
    page = html.render(three)
    leaking = page.replace("<main>", '<main><img alt="" src="http://leak.example/pixel">')
    chromium.run(page, "--dump-dom")
    chromium.run(leaking, "--dump-dom")  # the policy stops even what should never be there
    assert chromium.asked == []
    chromium.run(re.sub(r"<meta http-equiv[^>]*>", "", leaking), "--dump-dom")
    assert chromium.asked.pop() == "http://leak.example/pixel"  # and this test sees it


@browser
@pytest.mark.parametrize("count", [2, 3])
def test_chromium_prints_it_on_two_pages_of_a4(chromium: Browser, count: int, two: Report, three: Report) -> None:
    report = {2: two, 3: three}[count]
    pdf = chromium.printed(html.render(report))
    assert len(pdf.pages) == 2
    texts = [re.sub(r"\s", "", page.extract_text()) for page in pdf.pages]
    for number, page in enumerate(pdf.pages):
        assert float(page.mediabox.width) * 25.4 / 72 == pytest.approx(210, abs=0.5)
        assert float(page.mediabox.height) * 25.4 / 72 == pytest.approx(297, abs=0.5)
        assert f"Page{number + 1}of2" in texts[number]
    for check in report.checks:
        assert re.sub(r"\s", "", check.name)[1:] + check.status.replace(" ", "") in texts[1]
    for digest in (report.audit_seed, report.ledger.head, report.signature, *(flow.digest for flow in report.flows)):
        assert digest in texts[1]  # wrapped, and not cut off


@browser
def test_chromium_in_dark_and_light(chromium: Browser, two: Report) -> None:
    page = html.render(two)
    for scheme, colours in zip((1, 0), palettes(page), strict=True):
        image = chromium.screenshot(page, f"--blink-settings=preferredColorScheme={scheme}")
        assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((3, 3))) == colours["--page"]
        shades = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in image.getcolors(1 << 20)}
        assert {colours["--paper"], colours["--ink"], colours["--accent"]} <= shades
        assert (luminance(colours["--page"]) < 0.05) == (scheme == 0)


@browser
def test_chromium_wraps_long_texts(chromium: Browser, two: Report) -> None:
    """Nothing sticks out at the right of a narrow window, however long a word is."""
    long = altered(two, "governance", "purpose", to="W" * 3000)
    long = altered(long, "input", "columns", to={"customer": "M" * 400})
    page = html.render(long)
    image = chromium.screenshot(page, "--blink-settings=preferredColorScheme=1", "--window-size=600,1400")
    margin = image.crop((image.width - 8, 0, image.width, image.height)).getcolors()
    assert [colour for _, colour in margin] == [tuple(bytes.fromhex(palettes(page)[0]["--page"][1:]))]
