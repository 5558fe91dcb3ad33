"""What the packages may not contain, read from their source: no unsafe loaders, no checks that -O removes, imports in
one direction, and a word on what every role reveals."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("parties", "psi", "vfl")
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}

UNSAFE = re.compile(
    r"\b(c?[Pp]ickle|cloudpickle|marshal|shelve|dill)\b\.|torch\.load|joblib\.(load|dump)\b|yaml\.(\w+_)?load"
    r"|allow_pickle\s*=\s*True|(recv|send)_(pyobj|serialized)|(read|to)_pickle"
)
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "marshal", "shelve", "dill", "jsonpickle", "yaml"}


def imports(name: str) -> Iterator[str]:
    """The full dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_packages(name: str) -> set[str]:
    return {full.split(".")[0] for full in imports(name)}


def test_the_packages_are_found() -> None:
    assert {"parties/message.py", "psi/align.py", "vfl/secure_sum.py", "vfl/encryption/paillier.py"} <= set(SOURCES)


def test_no_loader_that_runs_what_it_reads() -> None:
    assert [name for name, text in SOURCES.items() if UNSAFE.search(text)] == []
    assert [name for name in SOURCES if UNSAFE_MODULES & imported_packages(name)] == []


def test_nothing_is_evaluated() -> None:
    calls = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("eval", "exec", "compile", "__import__")
    ]
    assert calls == []


def test_no_check_is_an_assert() -> None:
    found = [f"{name}:{node.lineno}" for name, tree in TREES.items() for node in ast.walk(tree) if is_assert(node)]
    assert found == []


def test_no_other_check_is_an_assert() -> None:
    found = {name for name, tree in TREES.items() for node in ast.walk(tree) if is_assert(node)}
    assert found <= {"parties/zeromq.py"}


def is_assert(node: ast.AST) -> bool:
    return isinstance(node, ast.Assert)


def test_imports_point_one_way() -> None:
    upwards = [
        f"{name} imports {other}"
        for name in SOURCES
        for other in imported_packages(name) & set(PACKAGES[PACKAGES.index(name.split("/")[0]) + 1 :])
    ]
    assert upwards == []
    assert [name for name in SOURCES if any(full.startswith(".") for full in imports(name))] == []


def test_phe_is_no_part_of_the_product() -> None:
    assert [name for name in SOURCES if "phe" in imported_packages(name)] == []


CAREFUL = (
    "psi/",
    "vfl/encryption/",
    "vfl/secure_sum",
    *(f"vfl/horizontal/{name}" for name in ("shamir", "context", "masking", "secure")),
)


def test_secrets_do_not_come_from_a_statistical_generator() -> None:
    careful = [name for name in SOURCES if name.startswith(CAREFUL)]
    generator = re.compile(r"\b(np|numpy)\.random\b|from numpy import random|default_rng|RandomState")
    assert [name for name in careful if generator.search(SOURCES[name])] == []
    assert [name for name in careful if "random" in imported_packages(name)] == []


def test_only_the_model_knows_scikit_learn() -> None:
    below = [name for name in SOURCES if not name.startswith("vfl/")]
    assert [name for name in below if {"sklearn", "scipy"} & imported_packages(name)] == []


INTERSECTION = """
import sys
from pathlib import Path
import psi.audit, psi.hygiene, psi.job, psi.selftest, psi.verify
from parties.memory import play
from parties.tables import Source, read_table
from psi.align import align
from psi.identifiers import canonical
from psi.report import make_report

def role(session):
    table = read_table(Source(Path(sys.argv[1])), ["id"])
    ids = canonical({"customer": table.ids["id"]}, session.agreement.identifiers)
    make_report(session, align(session, ids), ids)

play({"bank": role, "grocer": role})
print(sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[2:])))
"""


def test_an_intersection_loads_no_library_that_only_models_need(tmp_path: Path) -> None:
    """They would be hundreds of megabytes, in processes that hold millions of ids."""
    (tmp_path / "ids.csv").write_text("id\n" + "\n".join(map(str, range(200))))
    heavy = ["sklearn", "scipy", "pandas", "matplotlib", "phe", "torch", "vfl"]
    command = [sys.executable, "-c", INTERSECTION, str(tmp_path / "ids.csv"), *heavy]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- what roles reveal


def roles() -> dict[str, str]:
    """Public functions of psi and vfl over a Session, Channel or Ring, with their docstrings."""
    found = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if name.startswith("parties/") or not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
            first = arguments[0].annotation if arguments else None
            if first is not None and ast.unparse(first) in ("Session", "Channel", "Ring"):
                found[f"{name}:{node.name}"] = ast.get_docstring(node) or ""
    return found


def silent(package: str) -> set[str]:
    told = re.compile(r"^Reveals:\n +To ", re.MULTILINE)
    return {name for name, text in roles().items() if name.startswith(package) and not told.search(text)} - NO_ROLES


# They read a session and tell nobody anything.
NO_ROLES = {"psi/exchange.py:of", "psi/job.py:spend", "psi/report.py:make_report", "psi/reveal.py:hash_order"}


def test_every_role_of_the_intersection_says_what_it_reveals() -> None:
    assert {"psi/align.py:align", "psi/exchange.py:masked_exchange", *NO_ROLES} <= set(roles())
    assert silent("psi/") == set()


def test_every_role_of_the_model_says_what_it_reveals() -> None:
    assert silent("vfl/") == set()
