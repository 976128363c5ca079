"""Measure how the code reads: `python -m tests.style [FOLDER]` prints a table, a row for each part
of the package.

Counted are shares of annotations that say nothing, of long lines, of docstrings that open with a
clause instead of a verb, of variables named after no thing, the lengths of functions, and
dataclasses of many fields that are built by position.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lca_posthoc"
LONG = 100
MANY_FIELDS = 5
CLAUSES = ("What", "Whether", "How", "Where", "Which")
NAMELESS = frozenset(
    (
        *("found", "each", "held", "made", "at", "kept", "given", "taken", "told", "said"),
        *("wanted", "meant", "asked", "heard", "left", "its", "ours", "theirs", "here", "there"),
    )
)


@dataclass(kw_only=True)
class Style:
    """Counts of one part of the code.

    Attributes:
        lines: of code, comments and docstrings.
        long_lines: of more than `LONG` characters.
        annotations: of arguments, results and variables.
        loose: annotations that are `Any`, hold `dict[str, Any]`, or are an alias of either.
        docstrings: of modules, classes and functions.
        clauses: docstrings that open with one of `CLAUSES`.
        variables: names that are assigned, looped over or arguments; each occurrence counts.
        nameless: variables of `NAMELESS`, by name.
        bodies: statements' lines of each function, without its docstring.
        arguments: of each function.
        undescribed: "path:line: function" for each public function of two or more arguments whose
            docstring has no `Args:`.
        positional: "path:line: class" for each dataclass of more than `MANY_FIELDS` fields that is
            built by position.
    """

    lines: int = 0
    long_lines: int = 0
    annotations: int = 0
    loose: int = 0
    docstrings: int = 0
    clauses: int = 0
    variables: int = 0
    nameless: Counter[str] = field(default_factory=Counter)
    bodies: list[int] = field(default_factory=list)
    arguments: list[int] = field(default_factory=list)
    undescribed: list[str] = field(default_factory=list)
    positional: list[str] = field(default_factory=list)

    def add(self, other: Style) -> None:
        """Add the counts of another part."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def trees(folder: Path) -> dict[Path, ast.Module]:
    """Return the syntax tree of every Python file below a folder."""
    return {
        path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))
    }


def measure(path: Path, tree: ast.Module, aliases: frozenset[str], many: frozenset[str]) -> Style:
    """Measure one file.

    Args:
        path: of the file.
        tree: its syntax tree.
        aliases: names of `Any` and of dictionaries of it, see `loose_aliases`.
        many: dataclasses of many fields, see `large_dataclasses`.
    """
    style = Style()
    for line in path.read_text(encoding="utf-8").splitlines():
        style.lines += 1
        style.long_lines += len(line) > LONG
    for annotation in _annotations(tree):
        style.annotations += 1
        style.loose += _is_loose(annotation, aliases)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                style.docstrings += 1
                style.clauses += text.split(maxsplit=1)[0].strip(".,:") in CLAUSES
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            style.bodies.append(_body(node))
            style.arguments.append(len(_parameters(node)))
        if isinstance(node, ast.Call) and len(node.args) > MANY_FIELDS and _called(node) in many:
            style.positional.append(f"{path}:{node.lineno}: {_called(node)}")
    style.undescribed = [
        f"{path}:{node.lineno}: {node.name}"
        for node in _public_functions(tree)
        if len(_parameters(node)) > 1 and "Args:" not in (ast.get_docstring(node) or "")
    ]
    for name in _variables(tree):
        style.variables += 1
        if name.strip("_") in NAMELESS:
            style.nameless[name.strip("_")] += 1
    return style


def loose_aliases(modules: dict[Path, ast.Module]) -> frozenset[str]:
    """Return `Any` and the names that module-level assignments give to it or to dictionaries of
    it.
    """
    aliases = {"Any"}
    for tree in modules.values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Subscript):
                names = {target.id for target in node.targets if isinstance(target, ast.Name)}
                aliases |= names if _is_loose(node.value, frozenset({"Any"})) else set()
    return frozenset(aliases)


def large_dataclasses(modules: dict[Path, ast.Module]) -> frozenset[str]:
    """Return the names of dataclasses of more than `MANY_FIELDS` fields."""
    classes = [
        node
        for tree in modules.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    return frozenset(
        node.name
        for node in classes
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
        and sum(isinstance(statement, ast.AnnAssign) for statement in node.body) > MANY_FIELDS
    )


def _public_functions(
    scope: ast.Module | ast.ClassDef,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions of a module and the methods of its classes whose names are public; not
    commands of click, whose docstrings are their help.
    """
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_command = any("click" in ast.unparse(one) for one in node.decorator_list)
            if not node.name.startswith("_") and not is_command:
                yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public_functions(node)


def _annotations(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (
                argument.annotation
                for argument in _parameters(node)
                if argument.annotation is not None
            )
            if node.returns is not None:
                yield node.returns
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation


def _is_loose(annotation: ast.expr, aliases: frozenset[str]) -> bool:
    """Tell whether an annotation is `Any`, alone or beside None, or is or holds a dictionary of
    it.
    """
    if isinstance(annotation, ast.Name):
        return annotation.id in aliases
    if isinstance(annotation, ast.BinOp):
        return _is_loose(annotation.left, aliases) or _is_loose(annotation.right, aliases)
    if not isinstance(annotation, ast.Subscript):
        return False
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    if isinstance(annotation.value, ast.Name) and annotation.value.id in (
        "dict",
        "Mapping",
        "MutableMapping",
    ):
        return _is_loose(inner[-1], aliases)
    return any(isinstance(part, ast.Subscript) and _is_loose(part, aliases) for part in inner)


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    arguments = [
        *node.args.posonlyargs,
        *node.args.args,
        *node.args.kwonlyargs,
        node.args.vararg,
        node.args.kwarg,
    ]
    return [
        argument
        for argument in arguments
        if argument is not None and argument.arg not in ("self", "cls")
    ]


def _body(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _variables(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg) and node.arg not in ("self", "cls"):
            yield node.arg


def style_of(folder: Path = PACKAGE) -> dict[str, Style]:
    """Measure every part of a package, and the whole under the name ""."""
    modules = trees(folder)
    aliases, many = loose_aliases(modules), large_dataclasses(modules)
    parts: dict[str, Style] = {"": Style()}
    for path, tree in modules.items():
        style = measure(path, tree, aliases, many)
        part = path.relative_to(folder).parts[0].removesuffix(".py")
        parts.setdefault(part, Style()).add(style)
        parts[""].add(style)
    return parts


def _row(name: str, style: Style) -> str:
    quantiles = (
        statistics.quantiles(style.bodies, n=10, method="inclusive")
        if len(style.bodies) > 1
        else [0.0] * 9
    )
    body = f"{statistics.median(style.bodies or [0]):.0f}/{quantiles[-1]:.0f}/{max(style.bodies or [0])}"
    shares = (
        style.loose / max(1, style.annotations),
        style.long_lines / max(1, style.lines),
        style.clauses / max(1, style.docstrings),
        style.nameless.total() / max(1, style.variables),
    )
    cells = "  ".join(f"{share:7.1%}" for share in shares)
    return (
        f"{name or 'all':14}{style.lines:7}  {body:>9}  {max(style.arguments or [0]):4}  {cells}  "
        f"{len(style.positional):4}"
    )


def main() -> None:
    """Print the table."""
    parts = style_of(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
    print(
        f"{'':14}{'lines':>7}  {'body':>9}  args      Any     >100  clauses  nameless  positional"
    )
    for name, style in parts.items():
        print(_row(name, style))
    print("\n".join(parts[""].positional))
    print(parts[""].nameless.most_common())


if __name__ == "__main__":
    main()
