"""Each room imports only rooms above it, no file imports in a circle, and every file has its
room.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lca_posthoc

ROOT = Path(lca_posthoc.__file__).parent
ORDER = (
    *("errors", "base", "checkpoints", "recording", "tasks", "numerics", "results", "cluster"),
    *("replay", "convert", "findings", "plots", "report", "export", "demo", "cli"),
)
# the public face re-exports
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def unit(path: Path) -> str:
    """The room, a module or package of the top level, that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_names(path: Path, *, for_types: bool = True) -> Iterator[tuple[str, int]]:
    """Each of the package's own names a file imports, anywhere in it, with the line; those for
    annotations alone only on request.
    """
    package = ("lca_posthoc", *path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in guarded and not for_types:
            continue
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
                yield rest, node.lineno


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Each room a file imports from, with the line."""
    for name, line in imported_names(path):
        yield name.partition(".")[0], line


def module_of(path: Path) -> str:
    """The dotted name of a file, below the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def circles(imports: dict[str, set[str]]) -> list[str]:
    """The modules that import themselves by way of others."""
    behind = {module: set(others) for module, others in imports.items()}
    for middle in behind:
        for others in behind.values():
            if middle in others:
                others |= behind[middle]
    return sorted(module for module, others in behind.items() if module in others)


def test_every_file_has_its_room() -> None:
    assert {unit(path) for path in FILES} - set(ORDER) == set()


def test_the_page_on_the_design_shows_the_order() -> None:
    page = (ROOT.parent / "docs" / "design.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_rooms_above_it(path: Path) -> None:
    above = ORDER[: ORDER.index(unit(path))]
    wrong = {
        f"line {line}: {name or 'the package itself'}"
        for name, line in imported(path)
        if name not in (*above, unit(path))
    }
    assert wrong == set()


def test_no_file_imports_in_a_circle() -> None:
    modules = {module_of(path) for path in FILES}
    imports: dict[str, set[str]] = {}
    for path in FILES:
        names = [name for name, _ in imported_names(path, for_types=False)]
        # a name is a module, or something of the module before its last dot
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        imports[module_of(path)] = targets & modules
    assert circles(imports) == []


def test_circles_are_noticed() -> None:
    """The test above can fail."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


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


def test_only_results_knows_zarr_and_only_cluster_knows_distributed() -> None:
    """Where results lie and where work runs are one room's business each."""
    owners = {
        "zarr": {"results"},
        "numcodecs": {"results"},
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


# --- the files of a run ---------------------------------------------------------------------------

FILE_CALLS = frozenset(
    (
        *("open", "fdopen", "fsync", "truncate", "ftruncate", "pwrite", "utime", "flock", "chmod"),
        *("rename", "unlink", "rmdir", "rmtree", "removedirs", "copytree", "copyfile", "move"),
        *("mkdir", "makedirs", "touch", "symlink", "symlink_to", "hardlink_to", "mkstemp"),
        *("listdir", "scandir", "iterdir", "glob", "rglob", "walk", "stat", "lstat", "fstat"),
        *("exists", "lexists", "is_file", "is_dir", "is_symlink", "isfile", "isdir", "islink"),
        *("read_bytes", "read_text", "write_bytes", "write_text", "getsize", "getmtime"),
    )
)
RUN_FILES = re.compile(
    r"run\.jsonl?\b|\bdata\.zarr\b|\bzarr\.json\b|^lock$|(^|/)(commits(/|$)|partial/)|\.partial-"
)


def file_calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Each call that opens, looks up, renames or removes a file, but for verbs of `disk` and
    constructors of classes, with its line.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, name = called.rpartition(".")
        if owner in ("disk", "_home(directory)") or (
            re.fullmatch(r"[A-Z]\w*", owner) and owner != "Path"
        ):
            continue
        # that of a text has two arguments, and that of dataclasses no owner
        replaces = name == "replace" and bool(owner) and len(node.args) == 1
        removes = called in ("os.remove", "os.replace")
        of_a_path = name in FILE_CALLS and (bool(owner) or name == "open")
        if of_a_path or replaces or removes:
            yield node.lineno, called


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Each text of a file that is no docstring, with its line."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.lineno, node.value


def test_in_results_only_local_files_touches_a_file() -> None:
    """Another home of runs is another module with the verbs of `disk`."""
    calls = {
        f"{path.name}:{line}: {called}"
        for path in FILES
        if unit(path) == "results" and path.name != "local_files.py"
        for line, called in file_calls(ast.parse(path.read_text()))
    }
    assert calls == set()


def test_outside_results_nothing_names_a_file_of_a_run() -> None:
    named = {
        (path.relative_to(ROOT).as_posix(), text)
        for path in FILES
        if unit(path) != "results"
        for _, text in texts(ast.parse(path.read_text()))
        if RUN_FILES.search(text)
    }
    # a table being exported has a name of its own until it is whole; it is no run
    assert named - {("export/write.py", ".partial-")} == set()


def test_nothing_is_imported_from_what_zarr_keeps_to_itself() -> None:
    private = re.compile(r"^\s*(from|import) zarr\.(core|_)", re.MULTILINE)
    assert [path.name for path in FILES if private.search(path.read_text())] == []


@pytest.mark.parametrize(
    "line",
    [
        "open(path)",
        "path.open('rb')",
        "io.open(path)",
        "os.replace(a, b)",
        "temporary.replace(path)",
        "os.rename(a, b)",
        "path.rename(b)",
        "shutil.rmtree(a)",
        "(run / 'x').exists()",
        "os.path.lexists(a)",
        "os.remove(a)",
        "a.unlink(missing_ok=True)",
        "Path(a).mkdir()",
        "Path.stat(a)",
        "fcntl.flock(a, 1)",
        "os.fsync(a)",
    ],
)
def test_every_way_to_touch_a_file_is_noticed(line: str) -> None:
    """The test above can fail."""
    assert [line for line, _ in file_calls(ast.parse(f"def f():\n    {line}\n"))] == [2]


@pytest.mark.parametrize(
    "line",
    [
        "disk.read(path)",
        "replace(state, stage=text)",
        "text.replace('a', 'b')",
        "RunWriter.open(run)",
        "exists(run)",
        "names.remove('c')",
    ],
)
def test_what_touches_no_file_is_not_noticed(line: str) -> None:
    assert [*file_calls(ast.parse(line))] == []


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("run / 'run.json'", 1),
        ("run / 'log' / 'run.jsonl'", 1),
        ("f'{run}/data.zarr/x'", 1),
        ("run / 'lock'", 1),
        ("run / 'commits' / key", 1),
        ("f'{name}.partial-{pid}'", 1),
        ("'a lock that two hold'", 0),
        ("'''What `run.json` holds.'''", 0),
    ],
)
def test_every_name_of_a_file_of_a_run_is_noticed(line: str, number: int) -> None:
    """The test above can fail."""
    assert sum(bool(RUN_FILES.search(text)) for _, text in texts(ast.parse(line))) == number


def test_what_replays_and_writes_does_not_load_what_only_readers_need() -> None:
    """Xarray takes 80 MB with what it imports, in every worker."""
    script = (
        "import sys, lca_posthoc.replay.run, lca_posthoc.replay.worker.spans\n"
        "import lca_posthoc.numerics.objective, lca_posthoc.results.writer\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "lca_posthoc"} <= {*loaded}
    assert {"xarray", "pandas", "scipy", "matplotlib", "bokeh"} & {*loaded} == set()
