"""`lca info`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
from rich.text import Text

from ..base.text import safe, without_places
from .show import stdout

if TYPE_CHECKING:
    from pathlib import Path

    from ..results import Manifest

_LINES = 20  # lines of the log
_WIDTH = 22  # width of the column of names
_CREATED_WITH = ("lca_posthoc", "python", "torch", "numpy", "zarr", "platform")


@click.command()
@click.argument("run", type=click.Path(), required=False)
@click.option("--paths", is_flag=True, help="Show directories and addresses in full.")
def command(run: str | None, paths: bool) -> None:
    """Print what a bug report needs: versions, devices, threads; for RUN also its settings, its
    file system and the end of its log.

    \b
    lca info checkpoints.lca

    Paths are cut to their last part and addresses to their scheme. Environment variables are not
    shown, except those that limit threads; nor are results or the task file. Read the output before
    you publish it: it shows names of losses and texts of errors.

    \f

    Args:
        run: the path or URL of a run; None for the machine alone.
        paths: whether to show paths and addresses in full.
    """
    from ..base.environment import additions, dependencies, devices, package, system
    from ..checkpoints.paths import path_of

    shown = _as_it_is if paths else without_places
    of_run = None if run is None else _describe(path_of(run))
    also = ", ".join(" ".join(item) for item in additions().items())
    _print({**package(), **system(), **dependencies(), **devices(), "also": also or "none"}, shown)
    if of_run is not None:
        _print_run(of_run, shown)


def _as_it_is(text: str) -> str:
    return text


@dataclass(frozen=True)
class _Described:
    """The facts about a run, and the last lines of its log."""

    rows: dict[str, str]
    events: list[str]


def _describe(run: Path) -> _Described:
    """Return the facts about a run, or why it cannot be read.

    Raises:
        InputError: if there is no run.
    """
    from ..errors import InputError, LCAError
    from ..results import last_events, read_manifest

    try:
        rows = dict(_rows_of(read_manifest(run)))
    except InputError:
        raise
    except LCAError as error:
        rows = {"run": str(error)}
    return _Described(rows | _home_of(run), last_events(run, _LINES))


def _print(rows: dict[str, str], shown: Callable[[str], str]) -> None:
    console = stdout()
    for name, value in rows.items():
        console.print(Text(safe(f"{name:{_WIDTH}} {shown(value)}")))


def _print_run(run: _Described, shown: Callable[[str], str]) -> None:
    console = stdout()
    console.print()
    _print(run.rows, shown)
    console.print(f"\nthe last {_LINES} lines of the log:")
    for line in run.events:
        console.print(Text(safe(_event(line, shown))))


def _rows_of(manifest: Manifest) -> Iterator[tuple[str, str]]:
    from ..results.runfile import FORMAT

    made_with = [f"{name} {manifest.provenance.get(name, '–')}" for name in _CREATED_WITH]
    yield "run", f"format {FORMAT}, id {manifest.id}"
    yield "created with", ", ".join(made_with)
    yield "checkpoints", f"{len(manifest.checkpoints):,}, {manifest.segments:,} segments"
    yield "losses", ", ".join(manifest.losses)
    yield "task", f"sha256 {manifest.provenance['task_sha256']}"
    for name, value in manifest.settings.items():
        if value not in (None, []):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"  {name}", text


def _home_of(run: Path) -> dict[str, str]:
    """Return the file system of a run, and whether it has kernel locks."""
    from ..base.environment import file_system
    from ..results import has_kernel_lock, is_object_store

    if is_object_store(run):
        return {"file system": "an object store"}
    locks = "kernel locks" if has_kernel_lock(run) else "no kernel locks"
    return {"file system": f"{file_system(run)}, {locks}"}


def _event(line: str, shown: Callable[[str], str]) -> str:
    """Return a line of the log as it is printed."""
    try:
        event = json.loads(line)
    except ValueError:  # a crash left half a line
        return shown(line)
    return json.dumps(_mapped(event, shown), ensure_ascii=False)


def _mapped(value: object, shown: Callable[[str], str]) -> object:
    """Return a JSON document with every string mapped."""
    if isinstance(value, dict):
        return {name: _mapped(entry, shown) for name, entry in value.items()}
    if isinstance(value, list):
        return [_mapped(entry, shown) for entry in value]
    return shown(value) if isinstance(value, str) else value
