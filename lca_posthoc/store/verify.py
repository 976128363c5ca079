"""Compare every stored byte of a run with what was committed; reads one file at a time, and writes nothing."""

from __future__ import annotations

import itertools
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import LCAError
from .commits import DATA, PARTIAL, Commits
from .layout import ArrayPlan, plan_arrays
from .lock import is_unreleased
from .manifest import Manifest
from .metadata import FILE as ZARR
from .metadata import fits, group_file, metadata_files
from .runfile import FILE, load
from .seams import disagreement

_BLOCK = 2**22


@dataclass(frozen=True)
class Damage:
    """One file that is not what was committed.

    Where it belongs to a span or a window of totals, that is given with its first and last training step; where to a tensor,
    the tensor's own name. `array` is "allocation", "steps/residual", …, `path` is below the run.
    """

    path: str
    what: str
    loss: str | None = None
    array: str | None = None
    tensor: str | None = None
    span: int | None = None
    window: int | None = None
    first_step: int | None = None
    last_step: int | None = None


@dataclass(frozen=True)
class Leftover:
    """A file no marker speaks for: of a run that was killed, or somebody else's. Nothing reads it."""

    path: str


class Verification:
    """Gives what is found while it is found; `files` and `bytes` count what has been checked so far."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.files = self.bytes = 0

    def __iter__(self) -> Iterator[Damage | Leftover]:
        self.files = self.bytes = 0
        try:
            manifest = load(self.run)
        except ValueError as error:
            yield Damage(FILE, str(error))
            return
        self._count(self.run / FILE)
        yield from self._known(manifest, None, {f"{DATA}/{ZARR}": group_file()})
        for loss, record in manifest.losses.items():
            place = f"{DATA}/{record.key}"
            known = {f"{place}/{path}": data for path, data in metadata_files(manifest, loss)}
            yield from self._known(manifest, loss, known)
            yield from self._spans(Commits(self.run, manifest, loss))
        yield from self._leftovers(manifest)

    # --- metadata ----------------------------------------------------------------------------------------------------

    def _known(self, manifest: Manifest, loss: str | None, files: dict[str, bytes]) -> Iterator[Damage]:
        for path, expected in files.items():
            what = self._differs(path, expected)
            if what is None:
                continue
            if not self._is_current(manifest):  # it was changed meanwhile by the run that goes on
                continue
            yield Damage(path, what, loss, _array_of(path) if loss is not None else None)

    def _differs(self, path: str, expected: bytes) -> str | None:
        what = self._not_plain(path)
        if what is None:
            try:
                found = (self.run / path).read_bytes()
            except OSError as error:
                return f"it cannot be read ({error.strerror})"
            self._add(len(found))
            below = path.split("/", 2)[-1]
            what = (
                None if fits(below, found, expected, is_unreleased(self.run)) else f"it is not what follows from {FILE}"
            )
        return what

    def _is_current(self, manifest: Manifest) -> bool:
        try:
            return load(self.run) == manifest
        except ValueError:
            return True

    # --- spans and windows -------------------------------------------------------------------------------------------

    def _spans(self, commits: Commits) -> Iterator[Damage]:
        manifest = commits.manifest
        plans = list(plan_arrays(manifest, manifest.keep, manifest.losses[commits.loss]))
        of_spans = [plan for plan in plans if plan.part != "totals" or manifest.window == 1]
        of_windows = [plan for plan in plans if plan.part == "totals" and manifest.window > 1]
        for span in range(manifest.spans):
            if os.path.lexists(commits.marker(span)):
                yield from self._row(commits, span, None, of_spans)
        yield from self._seams(commits)
        for window in range(manifest.windows):
            if of_windows and os.path.lexists(commits.window_marker(window)):
                yield from self._row(commits, None, window, of_windows)

    def _seams(self, commits: Commits) -> Iterator[Damage]:
        """Spans that differ at the checkpoint they share, each with the window its totals are in: either may be the wrong one."""
        manifest = commits.manifest
        for later in range(1, manifest.spans):
            try:
                what = disagreement(commits, later, {})
            except LCAError:  # of a damaged marker, which is found by itself
                continue
            for span in (later - 1, later) if what is not None else ():
                place = commits.marker(span).relative_to(self.run).as_posix()
                folded = manifest.window > 1 and commits.is_folded(span // manifest.window)
                window = span // manifest.window if folded else None
                yield Damage(
                    place, str(what), commits.loss, None, None, span, window, *manifest.ends(manifest.rows(span))
                )

    def _row(self, commits: Commits, span: int | None, window: int | None, plans: list[ArrayPlan]) -> Iterator[Damage]:
        """A span, or a window of totals: its marker, then each of its files."""
        manifest = commits.manifest
        if span is not None:
            row, rows, path = span, manifest.rows(span), commits.marker(span)
        else:
            assert window is not None
            row, rows, path = window, manifest.rows_of(window), commits.window_marker(window)
        first, last = manifest.ends(rows)

        def damage(file: str, what: str, array: str | None = None, tensor: str | None = None) -> Damage:
            return Damage(file, what, commits.loss, array, tensor, span, window, first, last)

        place = path.relative_to(self.run).as_posix()
        try:
            marker = commits.load(span) if span is not None else commits.load_window(row)
        except FileNotFoundError:  # replaced meanwhile by the run that goes on
            if path.is_symlink():
                yield damage(place, "it is a link")
            return
        except (ValueError, OSError) as error:
            yield damage(place, str(error))
            return
        self._count(path)
        listed = marker["files"].keys()
        files = ((f"{DATA}/{commits.key}/{file}", plan) for plan in plans for file in plan.row_files(row))
        planned = dict(itertools.islice(files, len(listed) + 1))
        if listed != planned.keys():
            yield damage(place, "its commit marker does not list the files of this span")
            return
        for file, plan in planned.items():
            what = self._unlike(file, marker["files"][file])
            if what is not None and path.exists():
                array = plan.path if "name" not in plan.attributes else plan.part
                yield damage(file, what, array, plan.attributes.get("name"))
        if span is not None and commits.keeps_partials(span // manifest.window):
            file = commits.partial(span).relative_to(self.run).as_posix()
            what = self._unlike(file, marker["partial"])
            if what is not None and path.exists() and commits.keeps_partials(span // manifest.window):
                yield damage(file, what, "totals")

    def _unlike(self, path: str, sealed: list[int] | None) -> str | None:
        """What is wrong with a file that should have a size and a CRC-32; None where nothing is."""
        what = self._not_plain(path)
        if what is not None:
            return what
        size, crc = 0, 0
        try:
            with (self.run / path).open("rb") as file:
                while block := file.read(_BLOCK):
                    size += len(block)
                    crc = zlib.crc32(block, crc)
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        self._add(size)
        if sealed is None:
            return "its commit marker does not say its size and checksum"
        if size != sealed[0]:
            return f"it has {size} bytes, {sealed[0]} were committed"
        return None if crc == sealed[1] else "its checksum is not the committed one"

    def _not_plain(self, path: str) -> str | None:
        """What is wrong where it is no file, or stands behind a link; None where nothing is."""
        try:
            for parent in PurePosixPath(path).parents:
                if stat.S_ISLNK((self.run / parent).lstat().st_mode) and parent != PurePosixPath("."):
                    return f"{parent} is a link"
            mode = (self.run / path).lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "it is missing"
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        if stat.S_ISLNK(mode):
            return "it is a link"
        return None if stat.S_ISREG(mode) else "it is not a file"

    # --- leftovers ---------------------------------------------------------------------------------------------------

    def _leftovers(self, manifest: Manifest) -> Iterator[Leftover]:
        """Files below `data.zarr` that no array has, and chunks and waiting totals no marker speaks for."""
        losses = {record.key: _Known(Commits(self.run, manifest, name)) for name, record in manifest.losses.items()}
        for top in (DATA, PARTIAL):
            for place, directories, files in os.walk(self.run / top):
                directories.sort()
                links = [name for name in directories if Path(place, name).is_symlink()]
                for name in sorted([*files, *links]):
                    path = Path(place, name).relative_to(self.run).as_posix()
                    if path == f"{DATA}/{ZARR}":
                        continue
                    known = losses.get(path.split("/")[1])
                    if known is None or not known.has(path):
                        yield Leftover(path)

    def _count(self, path: Path) -> None:
        self._add(path.stat().st_size)

    def _add(self, size: int) -> None:
        self.files += 1
        self.bytes += size


class _Known:
    """Which files one loss has, without a list of them all."""

    def __init__(self, commits: Commits) -> None:
        manifest = self._manifest = commits.manifest
        self._commits = commits
        self._metadata = {path for path, _ in metadata_files(manifest, commits.loss)}
        plans = plan_arrays(manifest, manifest.keep, manifest.losses[commits.loss])
        self._plans = {plan.path: plan for plan in plans}

    def has(self, path: str) -> bool:
        top, _, below = path.split("/", 2) if path.count("/") > 1 else (path, "", "")
        if top == PARTIAL:
            span = below.partition("-")[0]
            if not span.isdecimal() or int(span) >= self._manifest.spans:
                return False
            same = self._commits.partial(int(span)).name == below
            return same and self._commits.marker(int(span)).exists() and self._keeps(int(span))
        if below in self._metadata:
            return True
        array, _, place = below.rpartition("/c/")
        row, *inner = place.split("/")
        plan = self._plans.get(array)
        return plan is not None and row.isdecimal() and plan.has(inner) and self._is_committed(plan, row)

    def _keeps(self, span: int) -> bool:
        return self._commits.keeps_partials(span // self._manifest.window)

    def _is_committed(self, plan: ArrayPlan, written: str) -> bool:
        of_windows, row = plan.part == "totals" and self._manifest.window > 1, int(written)
        if str(row) != written or row >= (self._manifest.windows if of_windows else self._manifest.spans):
            return False
        return os.path.lexists(self._commits.window_marker(row) if of_windows else self._commits.marker(row))


def _array_of(path: str) -> str:
    """The array or group a file of metadata belongs to, below its loss."""
    parts: list[Any] = path.split("/")[2:]
    while parts and parts[-1] in (ZARR, "c", "0"):
        parts.pop()
    return "/".join(parts)


def verify(run: str | Path) -> Verification:
    """Check every stored byte of a run, also while it goes on, wherever it was copied to.

    Args:
        run: the run directory.

    Returns:
        To be iterated over: each `Damage` and `Leftover` as it is found, run.json first, then loss by loss. Where run.json
        itself is damaged, that is all that is found.

    Raises:
        LCAError: when iterated over, where `run` is not a run directory, or one of another format.
    """
    return Verification(Path(run))
