"""Send the user's source to workers: a file and its imports from its folder, bound to one hash.

Workers import from the bundle, never from their own disk, so that every worker runs the code the
driver read. `__file__` is the path the driver read it from.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_MAIN = ""


def pack_files(file: Path) -> bytes:
    """Return the text of a file and of every module in its folder that its imports lead to, as
    JSON.

    Imports are parsed, not executed: modules imported under a name computed at run time are
    missing.
    """
    folder = file.parent
    packed: dict[str, list[str]] = {_MAIN: [file.name, _text(file)]}
    waiting = [_MAIN]
    while waiting:
        importer = waiting.pop()
        place, text = packed[importer]
        for name in _imported(text, importer, is_package=place.endswith("__init__.py")):
            if name not in packed and (path := _located(folder, name)) is not None:
                packed[name] = [
                    path.relative_to(folder).as_posix(),
                    _text(path) if path.is_file() else "",
                ]
                waiting.append(name)
    return json.dumps(packed, sort_keys=True).encode()


def _text(file: Path) -> str:
    # keep the bytes: the file itself declares its encoding
    return file.read_bytes().decode("latin-1")


def _located(folder: Path, name: str) -> Path | None:
    """Return the file of a module below a folder, the directory of a package without `__init__.py`,
    or None.
    """
    place = folder.joinpath(*name.split("."))
    for candidate in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if candidate.is_file():
            return candidate
    return (
        place
        if place.is_dir() and any(place.glob("*.py")) and not _is_installed(name, folder)
        else None
    )


def _is_installed(name: str, folder: Path) -> bool:
    """Return whether Python would import a module from elsewhere, instead of a directory that
    happens to have its name.
    """
    elsewhere = [place for place in sys.path if Path(place).resolve() != folder]
    spec = PathFinder.find_spec(name, elsewhere) if "." not in name else None
    return spec is not None and spec.origin is not None


def _imported(text: str, importer: str, is_package: bool) -> Iterator[str]:
    """Yield every module that a text may import, each after the packages that contain it."""
    try:
        nodes = list(ast.walk(ast.parse(text.encode("latin-1"))))
    except (SyntaxError, ValueError):  # importing it will report the error
        return
    package = importer if is_package else importer.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join(filter(None, [*parts, node.module]))
            names = [
                base,
                *(f"{base}.{alias.name}" if base else alias.name for alias in node.names),
            ]
        else:
            continue
        for name in filter(None, names):
            pieces = name.split(".")
            yield from (".".join(pieces[: end + 1]) for end in range(len(pieces)))


class Parcel(MetaPathFinder, SourceLoader):  # type: ignore[misc]
    """Import modules from a packed file while the parcel is in use.

    Args:
        data: the bytes from `pack_files`.
        file: path of the packed file on the driver.
    """

    def __init__(self, data: bytes, file: Path) -> None:
        self._folder = file.parent
        self._packed: dict[str, tuple[str, str]] = {
            name: tuple(pair) for name, pair in json.loads(data).items()
        }
        self._main = (
            f"lca_task_{file.stem}_{hashlib.sha256(f'{file} '.encode() + data).hexdigest()[:12]}"
        )
        self._packed[self._main] = self._packed.pop(_MAIN)
        self._texts = {str(self._folder / place): text for place, text in self._packed.values()}
        self._imported: dict[str, ModuleType] = {}

    def main(self) -> ModuleType:
        """Import the packed file itself, once, and return its module."""
        use(self)
        __import__(self._main)
        return sys.modules[self._main]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Implement `importlib.abc.MetaPathFinder`.

        Args:
            name: full name of the module.
            path: unused.
            target: unused.
        """
        if name not in self._packed:
            return None
        place = self._folder / self._packed[name][0]
        if place.suffix != ".py":
            bare = ModuleSpec(name, None, is_package=True)
            bare.submodule_search_locations = [str(place)]
            return bare
        inside = [str(place.parent)] if place.name == "__init__.py" else None
        return spec_from_file_location(name, place, loader=self, submodule_search_locations=inside)

    def get_filename(self, name: str) -> str:
        """Implement `importlib.abc.SourceLoader`."""
        return str(self._folder / self._packed[name][0])

    def get_data(self, path: str) -> bytes:
        """Implement `importlib.abc.SourceLoader`."""
        return (
            self._texts[path].encode("latin-1") if path in self._texts else Path(path).read_bytes()
        )

    def take_in(self) -> None:
        """Put this parcel into use, and restore the modules imported from it earlier."""
        sys.meta_path.insert(0, self)
        sys.modules.update(self._imported)
        if str(self._folder) not in sys.path:
            sys.path.insert(0, str(self._folder))

    def put_away(self) -> None:
        """Take this parcel out of use and remove its modules, because another parcel may have
        modules of the same names.
        """
        sys.meta_path.remove(self)
        for name in self._packed:
            module = sys.modules.get(name)
            if module is not None and self._is_from_here(module):
                self._imported[name] = sys.modules.pop(name)

    def _is_from_here(self, module: ModuleType) -> bool:
        spec = module.__spec__
        if spec is None or spec.loader is self:
            return spec is not None
        return list(spec.submodule_search_locations or []) == [self.get_filename(spec.name)]


_IN_USE: list[Parcel] = []


def use(parcel: Parcel) -> None:
    """Let this process import modules from a parcel, and from no other parcel."""
    if [parcel] != _IN_USE:
        for other in _IN_USE:
            other.put_away()
        _IN_USE[:] = [parcel]
        parcel.take_in()
