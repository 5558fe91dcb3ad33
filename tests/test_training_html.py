"""The page about a trained model: it says what was measured, and asks nobody for anything; also in a browser."""

from __future__ import annotations

import html as markup
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from pypdf import PdfReader

from psi.html import _csp_hash
from vfl.evaluation import Evaluation, compare
from vfl.html import render
from vfl.metrics import FIGURES
from vfl.pages import Axis

RNG = np.random.default_rng(3)
Y = (RNG.random(1000) < 0.3).astype(float)
STRENGTHS = {"joint": 0.4, "alone": 0.1, "without grocer": 0.2, "without telco": 0.45}
CLASSES = RNG.integers(0, 3, 400)
COST = [
    {"phase": "align", "seconds": 12.3456, "bytes": 4_812_331, "exchanges": None, "scheme": "curve25519"},
    {"phase": "train", "seconds": 1812.2, "bytes": 48_123_310, "exchanges": 14, "scheme": "Paillier, 3072 bit"},
]
LEAKAGE = [
    {"attack": "label from gradient norm", "measured AUC": 0.5123, "limit": 0.6, "result": "PASS"},
    {"attack": "solving for residuals", "measured AUC": 0.9912, "limit": 0.6, "result": "FAIL"},
]
WORDS: dict[str, Any] = {"title": "Joint credit risk model", "party": "bank", "session": "ab" * 32}


def scores(strength: float) -> Any:
    return np.clip(0.3 + strength * (Y - 0.3) + 0.1 * RNG.normal(size=len(Y)), 0.01, 0.99)


def evaluated(kind: str) -> Evaluation:
    if kind == "multiclass":
        return compare(kind, CLASSES, {"joint": np.eye(3)[CLASSES], "alone": RNG.dirichlet([1, 1, 1], 400)})
    if kind == "binary":
        return compare(kind, Y, {name: scores(strength) for name, strength in STRENGTHS.items()}, threshold=0.45)
    labels = RNG.poisson(3, 300).astype(float) * (1 if kind == "poisson" else 10_000)
    return compare(kind, labels, {"joint": labels + 0.5, "alone": labels + 2 * labels.mean() * RNG.random(300)})


@pytest.fixture(scope="module")
def binary() -> Evaluation:
    return evaluated("binary")


@pytest.fixture(scope="module")
def page(binary: Evaluation) -> str:
    return render(binary, **WORDS, cost=COST, leakage=LEAKAGE, notes=["One feature holder: nothing to hide behind."])


def text_of(page: str) -> str:
    """What a reader sees, with single spaces."""
    body = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(markup.unescape(re.sub(r"<[^>]*>", " ", body)).split())


# ---- what it says


def test_every_figure_stands_beside_that_of_the_label_holder_alone(binary: Evaluation, page: str) -> None:
    text = text_of(page)
    joint, alone = binary.models["joint"].figures, binary.models["alone"].figures
    for name, figure in FIGURES["binary"].items():
        assert f"{figure.title} {figure.meaning}" in text
        change = joint[name] - alone[name]
        word = "better" if (change > 0) != figure.lower_is_better else "worse"
        sign = "+" if change > 0 else "−"
        assert f"is better. {joint[name]:.4f} {alone[name]:.4f} {sign}{abs(change):.4f} {word}" in text
    assert f"Joining helped: AUC {joint['auc']:.4f} together, {alone['auc']:.4f} alone." in text
    assert "1,000 test rows" in text and "above the threshold 0.45" in text


def test_columns_are_listed_by_information_value(binary: Evaluation) -> None:
    values = [("bank", "age", 0.0412), ("telco", "minutes", 0.31)]
    rows = [{"party": party, "column": column, "iv": iv, "by_class": []} for party, column, iv in values]
    text = text_of(render(binary, **WORDS, information=rows))
    assert "party column information value telco minutes 0.31 bank age 0.0412" in text
    assert "What single columns tell" not in text_of(render(binary, **WORDS))
    rows = [rows[0] | {"by_class": [0.01, 0.0112, 0.02]}]
    assert "value class 0 class 1 class 2 bank age 0.0412 0.01 0.0112 0.02" in text_of(
        render(evaluated("multiclass"), **WORDS, information=rows)
    )


def test_every_feature_holder_is_left_out_once(binary: Evaluation, page: str) -> None:
    text = text_of(page)
    assert "Without grocer Without telco" in text
    joint, grocer, telco = (binary.models[name].figures["auc"] for name in ("joint", "without grocer", "without telco"))
    assert f"AUC {joint:.4f} {grocer:.4f} +{joint - grocer:.4f}, better {telco:.4f} −{telco - joint:.4f}, worse" in text


def test_cost_leakage_and_notes(page: str) -> None:
    text = text_of(page)
    assert "phase seconds bytes exchanges scheme align 12.35 4,812,331 – curve25519 train 1,812.2" in text
    assert "label from gradient norm 0.5123 0.6 PASS solving for residuals 0.9912 0.6 FAIL" in text
    assert "One feature holder: nothing to hide behind." in text


@pytest.mark.parametrize(
    ("kind", "titles"),
    [
        ("binary", ["ROC curve", "Precision and recall", "Cumulative gain", "Lift", "Calibration"]),
        ("regression", ["Predicted and actual"]),
        ("poisson", ["Predicted and actual"]),
        ("multiclass", ["Calibration"]),
    ],
)
def test_charts_show_joint_and_alone(kind: str, titles: list[str]) -> None:
    shown = render(evaluated(kind), **WORDS)
    charts = re.findall(r"<figure>.*?</figure>", shown, re.DOTALL)
    assert [re.search("<h3>(.*?)</h3>", chart)[1] for chart in charts] == titles  # type: ignore[index]
    for chart in charts:
        for model in ("joint", "alone"):
            assert chart.count(f'<polyline class="{model}"') == 2  # the curve, and its sample in the legend
        for points in re.findall(r'points="([^"]*)"', chart):
            places = np.array([point.split(",") for point in points.split()], float)
            assert ((places >= 0) & (places <= [400, 320])).all()
    text = text_of(shown)
    assert "Leakage NOT RUN Not measured in this run." in text and "Cost Not recorded." in text


def test_a_curve_is_drawn_where_it_is(binary: Evaluation, page: str) -> None:
    roc = re.search(r"<h3>ROC curve.*?</svg>", page, re.DOTALL)
    assert roc
    places = {float(tick): float(at) for at, tick in re.findall(r'x="([\d.]+)" y="288" [^>]*>([\d.]+)<', roc[0])}
    drawn = re.findall(r'<polyline class="joint" points="([^"]*)"', roc[0])[0].split()
    left, right = places[0], places[1]
    expected = [left + x * (right - left) for x, _ in binary.models["joint"].curves["roc"]]
    assert [float(point.split(",")[0]) for point in drawn] == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0, 1], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([0, 3.6], [0, 1, 2, 3, 4]),
        ([-15_000, 61_000], [-20_000, 0, 20_000, 40_000, 60_000, 80_000]),
        ([0, 0], [0, 0.2]),
        ([5, 5], [5, 6]),
        ([0, 0.00031], [0, 0.0001, 0.0002, 0.0003, 0.0004]),
    ],
)
def test_axes_have_round_ticks(values: list[float], ticks: list[float]) -> None:
    assert Axis.over(values).ticks == ticks


def test_confusion_matrix_and_its_limits() -> None:
    shown = render(
        compare("multiclass", CLASSES, {"joint": np.eye(3)[CLASSES]}, classes=["low", "middle", "high"]), **WORDS
    )
    counts = np.bincount(CLASSES)
    assert f"low middle high low {counts[0]} – – middle – {counts[1]} – high – – {counts[2]}" in text_of(shown)
    many = np.arange(400) % 20
    text = text_of(render(compare("multiclass", many, {"joint": np.eye(20)[many]}), **WORDS))
    assert "20 classes do not fit the page" in text


def test_without_an_own_model_or_a_figure() -> None:
    text = text_of(render(compare("binary", Y, {"joint": scores(0.4)}), **WORDS))
    assert "The joint model has AUC" in text and "bank has no columns of its own" in text
    assert "What each feature holder brought Not measured in this run." in text
    worse = text_of(render(compare("binary", Y, {"joint": scores(0.0), "alone": scores(0.4)}), **WORDS))
    assert "Joining did not help: AUC" in worse
    text = text_of(render(compare("binary", np.zeros(1000), {"joint": scores(0.4)}), **WORDS))
    assert "There is no AUC of the joint model: the test rows are all of one class." in text
    assert "Lift: not shown, the test rows are all of one class." in text and "Calibration" in text
    for kind in ("binary", "multiclass", "regression", "poisson"):
        few = {"joint": np.full((5, 3), 1 / 3) if kind == "multiclass" else np.full(5, 0.5)}
        assert "fewer than 10 test rows" in text_of(render(compare(kind, np.ones(5), few), **WORDS))  # type: ignore[arg-type]


# ---- what it cannot do

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)></style>{{ 7*7 }}&amp;"""


def test_injected_markup_is_inert() -> None:
    names = {"joint": np.eye(3)[CLASSES], f"without {HOSTILE}": np.eye(3)[CLASSES]}
    rows = [{HOSTILE: HOSTILE, f"2 {HOSTILE}": HOSTILE}]
    values = [{"party": HOSTILE, "column": HOSTILE, "iv": 0.1, "by_class": [0.1] * 3}]
    shown = render(
        compare("multiclass", CLASSES, names, classes=[HOSTILE] * 3),
        title=HOSTILE, party=HOSTILE, session=HOSTILE, information=values, cost=rows, leakage=rows, notes=[HOSTILE],
    )  # fmt: skip
    assert text_of(shown).count("{{ 7*7 }}&amp;") >= 18 and "49&amp;" not in shown
    for live in ("<script", "<img", "'><", "onerror=alert(1)>"):
        assert live not in shown
    assert shown.count("</style>") == shown.count("<style>") == 1


def test_it_asks_nobody_for_anything(page: str) -> None:
    for banned in ("http://", "https://", "src=", "href=", "url(", "<script", "@import", "<link", "<iframe"):
        assert banned not in page.lower(), banned
    assert not re.search(r"\s(on\w+|style)=", page)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert policy and style
    assert policy[1] == f"default-src 'none'; style-src '{_csp_hash(style[1])}'; base-uri 'none'; form-action 'none'"


def test_the_page_from_the_summary_is_the_same(binary: Evaluation) -> None:
    kept = json.loads(json.dumps(msgspec.to_builtins(binary)))
    assert render(msgspec.convert(kept, Evaluation), **WORDS) == render(binary, **WORDS)


# ---- in a real browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium")


def chromium(folder: Path, page: str, *options: str) -> str:
    (folder / "page.html").write_text(page)
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--hide-scrollbars", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}", *options, (folder / "page.html").as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()


def colours_of(page: str) -> list[dict[str, tuple[int, ...]]]:
    """The light palette and the dark one."""
    blocks = re.findall(r":root \{([^}]*--[^}]*)\}", page)
    return [{n: tuple(bytes.fromhex(c)) for n, c in re.findall(r"--([\w-]+): #(\w{6})", block)} for block in blocks]


@browser
def test_chromium_shows_text_and_runs_nothing(tmp_path: Path, binary: Evaluation) -> None:
    hostile = render(binary, **WORDS | {"title": "<script>document.title='taken'</script>"})
    shown = chromium(tmp_path, hostile, "--dump-dom")
    assert "<title>&lt;script&gt;document.title='taken'&lt;/script&gt;: training report of bank</title>" in shown
    assert text_of(shown) == text_of(hostile)


@browser
@pytest.mark.parametrize("scheme", [1, 0])
def test_chromium_draws_the_charts_at_800_pixels(tmp_path: Path, page: str, scheme: int) -> None:
    """In both palettes: curves as lines and not as areas, and nothing beyond the right margin."""
    options = ("--window-size=800,4200", f"--blink-settings=preferredColorScheme={scheme}")
    chromium(tmp_path, page, f"--screenshot={tmp_path / 'shot.png'}", *options)
    with Image.open(tmp_path / "shot.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    colours = colours_of(page)[1 - scheme]
    assert (pixels[:, -15:] == colours["page"]).all()
    shares = {name: float((pixels == colours[name]).all(axis=2).mean()) for name in ("accent", "open")}
    assert all(0.0002 < share < 0.005 for share in shares.values()), shares


@browser
def test_chromium_prints_it_on_a4(tmp_path: Path, page: str) -> None:
    chromium(tmp_path, page, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    pdf = PdfReader(tmp_path / "page.pdf")
    text = re.sub(r"\s", "", " ".join(sheet.extract_text() for sheet in pdf.pages))
    assert len(pdf.pages) == 2 and "Colonnadetrainingreport" in text and "Page2of2" in text
    for word in ("1.Figures", "ROCcurve", "Calibration", "4.Leakage", "Paillier,3072bit", "6.Notes", "ab" * 32):
        assert word in text
