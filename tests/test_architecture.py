"""Each module imports only modules above it, and every module has its place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lca_posthoc

ROOT = Path(lca_posthoc.__file__).parent
ORDER = (
    *(
        "errors",
        "text",
        "locks",
        "available_memory",
        "quadrature",
        "precisions",
        "paths",
        "headers",
        "layouts",
        "leftovers",
        "spacing",
        "trajectory",
        "recorder",
        "schema",
        "settings",
        "task_bundle",
        "task",
        "objective",
        "allocation",
        "statistics",
    ),
    *(
        "store",
        "cluster",
        "requests",
        "worker",
        "prepare",
        "resume_checks",
        "progress",
        "display",
        "replay",
        "plan",
        "convert",
    ),
    *("declarations", "findings", "colours", "plots", "report", "export", "demo", "cli"),
)
# the public face re-exports
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def unit(path: Path) -> str:
    """The module or subpackage of the top level a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Each of the package's own units a file imports, anywhere in it, with the line."""
    package = ("lca_posthoc", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
            names = [f"lca_posthoc{name}" if name.startswith(".") else name for name in names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "lca_posthoc" and rest != "__version__":
                yield rest.partition(".")[0], node.lineno


def test_every_module_has_its_place_in_the_order() -> None:
    assert {unit(path) for path in FILES} - set(ORDER) == set()


def test_the_page_on_the_design_shows_the_order() -> None:
    page = (ROOT.parent / "docs" / "design.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_modules_above_it(path: Path) -> None:
    above = ORDER[: ORDER.index(unit(path))]
    wrong = {
        f"line {line}: {name or 'the package itself'}"
        for name, line in imported(path)
        if name not in (*above, unit(path))
    }
    assert wrong == set()


def test_imports_are_found_however_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "store" / "files.py"
    path.parent.mkdir()
    path.write_text(
        "import lca_posthoc.a.x, numpy\nfrom ..b import x\nfrom .. import c, __version__\nfrom . "
        "import keys\nfrom .keys import x\n"
        "def f():\n    from lca_posthoc import d\n    from lca_posthoc.e.x import y\n    import "
        "importlib\n"
        "    importlib.import_module('lca_posthoc.g')\nif TYPE_CHECKING:\n    from ..f import "
        "x\nimport lca_posthoc\n"
    )
    assert sorted(name for name, _ in imported(path)) == [
        "",
        "a",
        "b",
        "c",
        "d",
        "e",
        "f",
        "g",
        "store",
        "store",
    ]


def test_only_store_knows_zarr_and_only_cluster_knows_distributed() -> None:
    """Where results lie and where work runs are one module's business each."""
    owners = {
        "zarr": {"store"},
        "numcodecs": {"store"},
        "distributed": {"cluster"},
        "dask": {"cluster"},
    }
    found: dict[str, set[str]] = {name: set() for name in owners}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += (
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            )
            for name in names:
                if name.partition(".")[0] in found:
                    found[name.partition(".")[0]].add(unit(path))
    assert found == owners
