"""Compare every stored byte of a run with its commits, reading one file at a time and writing
nothing.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..checkpoints.paths import path_of
from ..errors import LCAError
from . import disk
from .boundary_checks import disagreement
from .commits import COMMITS, DATA, PARTIAL, Commits, Marker
from .files import checksum
from .home import Kind
from .layout import ArrayPlan, plan_arrays
from .lock import is_unreleased
from .manifest import Manifest
from .metadata import FILE as ZARR
from .metadata import fits, group_file, metadata_files
from .packs import PACKS, Pack, is_packed
from .runfile import FILE, load
from .shard_sums import SHARDS, names_of_sums


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file that differs from what was committed.

    Attributes:
        path: of the file, below the run.
        what: describes the damage, in words.
        loss: to which it belongs; None for files of the whole run.
        array: "allocation", "steps/residual", …
        tensor: its name, if the file belongs to one.
        span: to which the file belongs, if to one.
        window: the window of totals to which it belongs, if to one.
        first_step: the training step at which the span or window starts.
        last_step: the training step at which it ends.
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

    @property
    def is_of_the_record(self) -> bool:
        """Tell whether it is `run.json`, which follows from nothing else and cannot be recomputed."""
        return self.path == FILE


@dataclass(frozen=True)
class Leftover:
    """A file that no marker lists, from a killed run or from somebody else; nothing reads it."""

    path: str


class Verification:
    """Iterates over damage and leftovers; `files` and `bytes` count what it has checked so far."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.files = self.bytes = 0

    def __iter__(self) -> Iterator[Damage | Leftover]:
        self.files = self.bytes = 0
        try:
            manifest = load(self.run)
        except ValueError as error:
            yield Damage(path=FILE, what=str(error))
            return
        self._count(self.run / FILE)
        if not manifest.packed:
            yield from self._known(manifest, None, {f"{DATA}/{ZARR}": group_file()})
        for loss, record in manifest.losses.items():
            place = f"{DATA}/{record.key}"
            known = {f"{place}/{path}": data for path, data in metadata_files(manifest, loss)}
            if not manifest.packed:
                yield from self._known(manifest, loss, known)
            yield from self._spans(Commits(self.run, manifest, loss))
        yield from self._leftovers(manifest)

    # --- metadata ---------------------------------------------------------------------------------

    def _known(
        self, manifest: Manifest, loss: str | None, files: dict[str, bytes]
    ) -> Iterator[Damage]:
        for path, expected in files.items():
            what = self._differs(path, expected)
            if what is None:
                continue
            if not self._is_current(manifest):  # the running driver changed it meanwhile
                continue
            array = None if loss is None else _array_of(path)
            yield Damage(path=path, what=what, loss=loss, array=array)

    def _differs(self, path: str, expected: bytes) -> str | None:
        what = self._not_plain(path)
        if what is None:
            try:
                data = disk.read(self.run / path)
            except OSError as error:
                return f"it cannot be read ({error.strerror})"
            self._add(len(data))
            below = path.split("/", 2)[-1]
            what = (
                None
                if fits(below, data, expected, is_unreleased(self.run))
                else f"it is not what follows from {FILE}"
            )
        return what

    def _is_current(self, manifest: Manifest) -> bool:
        try:
            return load(self.run) == manifest
        except ValueError:
            return True

    # --- spans and windows ------------------------------------------------------------------------

    def _spans(self, commits: Commits) -> Iterator[Damage]:
        manifest = commits.manifest
        plans = list(plan_arrays(manifest, manifest.keep, manifest.losses[commits.loss]))
        of_spans = [plan for plan in plans if not plan.of_windows or manifest.window == 1]
        of_windows = [plan for plan in plans if plan.of_windows and manifest.window > 1]
        for span in range(manifest.spans):
            if _lies(commits.marker(span)):
                yield from self._row(_Row(commits, span=span), of_spans)
        yield from self._seams(commits)
        for window in range(manifest.windows):
            row = _Row(commits, window=window)
            if of_windows and _lies(row.place):
                yield from self._row(row, of_windows)
            elif of_windows:
                yield from self._begun(row)

    def _seams(self, commits: Commits) -> Iterator[Damage]:
        """Yield both spans where two differ at the checkpoint they share, with the windows of their
        totals: either may be wrong.
        """
        manifest = commits.manifest
        for later in range(1, manifest.spans):
            try:
                what = disagreement(commits, later, {})
            except LCAError:  # a damaged marker is reported by itself
                continue
            for span in (later - 1, later) if what is not None else ():
                place = commits.marker(span).relative_to(self.run).as_posix()
                joined = manifest.window > 1 and commits.counted(span) > 0
                window = span // manifest.window if joined else None
                first, last = manifest.ends(manifest.rows(span))
                yield Damage(
                    path=place,
                    what=str(what),
                    loss=commits.loss,
                    span=span,
                    window=window,
                    first_step=first,
                    last_step=last,
                )

    def _row(self, row: _Row, plans: list[ArrayPlan]) -> Iterator[Damage]:
        """Check a span, or a window of totals: its marker, then each of its files."""
        place = row.place.relative_to(self.run).as_posix()
        try:
            marker = row.load()
        except FileNotFoundError:  # the running driver replaced it meanwhile
            if disk.is_link(row.place):
                yield row.damage(place, "it is a link")
            return
        except (ValueError, OSError) as error:
            yield row.damage(place, str(error))
            return
        self._count(row.place)
        planned = row.planned(plans, len(marker["files"]) + 1)
        if marker["files"].keys() != planned.keys():
            yield row.damage(place, "its commit marker does not list the files of this span")
            return
        pack = Pack(row.commits.pack(row.place), marker["files"].values())
        for file, plan in planned.items():
            what = self._unlike_chunk(pack, file, marker["files"][file])
            if what is not None and disk.exists(row.place):
                array = plan.path if plan.tensor is None else plan.part
                yield row.damage(file, what, array, plan.tensor)
        yield from self._waiting(row, marker)

    def _waiting(self, row: _Row, marker: Marker) -> Iterator[Damage]:
        """Check a span's totals that wait for their window, if there are any."""
        if row.span is None or not row.commits.keeps_partial(row.span):
            return
        file = row.commits.partial(row.span).relative_to(self.run).as_posix()
        what = self._unlike(file, marker["partial"])
        waits = disk.exists(row.place) and row.commits.keeps_partial(row.span)
        if what is not None and waits:
            yield row.damage(file, what, "totals")

    def _begun(self, row: _Row) -> Iterator[Damage]:
        """Check a window's totals that wait since checkpoints were added, if there are any."""
        begun = row.commits.begun(row.number)
        if begun is None:
            return
        file = begun.path.relative_to(self.run).as_posix()
        what = self._unlike(file, row.commits.seal_of(begun))
        if what is not None and not _lies(row.place):
            yield row.damage(file, what, "totals")

    def _unlike_chunk(self, pack: Pack, file: str, seal: list[int]) -> str | None:
        """Describe how a chunk differs from what was committed; None if it does not."""
        if not is_packed(seal):
            return self._unlike(file, seal)
        try:
            data = pack.read(seal)
        except FileNotFoundError:
            return "its pack is missing"
        except OSError as error:
            return f"its pack cannot be read ({error.strerror})"
        self._add(len(data))
        return self._differs_from_seal(*checksum([data]), seal)

    def _unlike(self, path: str, sealed: list[int] | None) -> str | None:
        """Describe how a file differs from its recorded size and CRC-32; None if it does not."""
        what = self._not_plain(path)
        if what is not None:
            return what
        try:
            size, crc = checksum(disk.blocks(self.run / path))
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        self._add(size)
        if sealed is None:
            return "its commit marker does not record its size and checksum"
        return self._differs_from_seal(size, crc, sealed)

    @staticmethod
    def _differs_from_seal(size: int, crc: int, sealed: list[int]) -> str | None:
        if size != sealed[0]:
            return f"it has {size} bytes, but {sealed[0]} were committed"
        return None if crc == sealed[1] else "its checksum differs from the committed one"

    def _not_plain(self, path: str) -> str | None:
        """Say why a path is no plain file: missing, unreadable or behind a link; None if it is one."""
        try:
            for parent in PurePosixPath(path).parents:
                if parent != PurePosixPath(".") and disk.is_link(self.run / parent):
                    return f"{parent} is a link"
            kind = self._kind(path)
        except (FileNotFoundError, NotADirectoryError):
            return "it is missing"
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        if kind == "link":
            return "it is a link"
        return None if kind == "file" else "it is not a file"

    def _kind(self, path: str) -> Kind:
        return disk.state(self.run / path, follow_links=False).kind

    # --- leftovers --------------------------------------------------------------------------------

    def _leftovers(self, manifest: Manifest) -> Iterator[Leftover]:
        """Yield files below `data.zarr` that belong to no array, chunks and waiting totals that no
        marker lists, and sums of shards of committed spans.
        """
        losses = {
            record.key: _Known(Commits(self.run, manifest, name))
            for name, record in manifest.losses.items()
        }
        for top in (DATA, PARTIAL):
            for place, directories, files in disk.walk(self.run / top):
                directories.sort()
                links = [name for name in directories if disk.is_link(place / name)]
                for name in sorted([*files, *links]):
                    path = (place / name).relative_to(self.run).as_posix()
                    if path == f"{DATA}/{ZARR}":
                        continue
                    known = losses.get(path.split("/")[1])
                    if known is None or not known.has(path):
                        yield Leftover(path)

        for name in names_of_sums(self.run):
            span = int(name.partition("-")[0])
            if all(known.has_whole(span) for known in losses.values()):
                yield Leftover(f"{SHARDS}/{name}")

    def _count(self, path: Path) -> None:
        self._add(disk.state(path).size)

    def _add(self, size: int) -> None:
        self.files += 1
        self.bytes += size


@dataclass(frozen=True)
class _Row:
    """A span or a window of totals; the other one is None."""

    commits: Commits
    span: int | None = None
    window: int | None = None

    @property
    def number(self) -> int:
        """Return its row of chunks in its arrays."""
        number = self.window if self.span is None else self.span
        assert number is not None
        return number

    @property
    def place(self) -> Path:
        """Return the path of its marker."""
        marker = self.commits.window_marker if self.span is None else self.commits.marker
        return marker(self.number)

    def load(self) -> Marker:
        """Read its marker; raise as `Commits.load` does."""
        return (self.commits.load_window if self.span is None else self.commits.load)(self.number)

    def planned(self, plans: list[ArrayPlan], most: int) -> dict[str, ArrayPlan]:
        """Return its chunk files, by their paths below the run, with the array of each; at most
        `most`.
        """
        files = (
            (f"{DATA}/{self.commits.key}/{file}", plan)
            for plan in plans
            for file in plan.row_files(self.number)
        )
        return dict(itertools.islice(files, most))

    def damage(
        self, path: str, what: str, array: str | None = None, tensor: str | None = None
    ) -> Damage:
        """Return the damage of one of its files."""
        manifest = self.commits.manifest
        rows = manifest.rows_of if self.span is None else manifest.rows
        first, last = manifest.ends(rows(self.number))
        return Damage(
            path=path,
            what=what,
            loss=self.commits.loss,
            array=array,
            tensor=tensor,
            span=self.span,
            window=self.window,
            first_step=first,
            last_step=last,
        )


class _Known:
    """The files of one loss, recognised without listing them all."""

    def __init__(self, commits: Commits) -> None:
        manifest = self._manifest = commits.manifest
        self._commits = commits
        self._metadata = (
            set()
            if manifest.packed
            else {path for path, _ in metadata_files(manifest, commits.loss)}
        )
        plans = plan_arrays(manifest, manifest.keep, manifest.losses[commits.loss])
        self._plans = {plan.path: plan for plan in plans}

    def has_whole(self, span: int) -> bool:
        """Tell whether a span is committed, or is beyond the segments that the loss covers."""
        return span >= self._manifest.spans or self._commits.is_committed(span)

    def has(self, path: str) -> bool:
        top, _, below = path.split("/", 2) if path.count("/") > 1 else (path, "", "")
        if top == PARTIAL:
            span = below.partition("-")[0]
            committed = not span.isdecimal() or disk.exists(self._commits.marker(int(span)))
            return committed and self._commits.waits(below)
        if below in self._metadata:
            return True
        if below.startswith(f"{PACKS}/"):
            return self._is_of_a_marker(below.removeprefix(f"{PACKS}/"))
        array, _, place = below.rpartition("/c/")
        row, *inner = place.split("/")
        plan = self._plans.get(array)
        return (
            plan is not None
            and row.isdecimal()
            and plan.has(inner)
            and self._is_committed(plan, row)
        )

    def _is_of_a_marker(self, name: str) -> bool:
        """Tell whether a pack of this name belongs to a marker of this run."""
        return _lies(self._commits.path / COMMITS / self._commits.key / f"{name}.json")

    def _is_committed(self, plan: ArrayPlan, written: str) -> bool:
        of_windows, row = plan.of_windows and self._manifest.window > 1, int(written)
        if str(row) != written or row >= (
            self._manifest.windows if of_windows else self._manifest.spans
        ):
            return False
        return _lies(self._commits.window_marker(row) if of_windows else self._commits.marker(row))


def _lies(path: Path) -> bool:
    """Tell whether something exists at a path, even a dangling link."""
    with contextlib.suppress(OSError):
        return disk.kind(path) is not None
    return False


def _array_of(path: str) -> str:
    """Return the array or group that a metadata file belongs to, below its loss."""
    parts = path.split("/")[2:]
    while parts and parts[-1] in (ZARR, "c", "0"):
        parts.pop()
    return "/".join(parts)


def verify(run: str | Path) -> Verification:
    """Check every stored byte of a run, which may still be running, or be a copy.

    Args:
        run: the run directory.

    Returns:
        An iterable of every `Damage` and `Leftover`, run.json first, then loss by loss. If run.json
        itself is damaged, this is the only one.

    Raises:
        LCAError: during iteration, if `run` is not a run directory, or has another format.
    """
    return Verification(path_of(run))
