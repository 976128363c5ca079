"""Create a run, write the rows of a span, commit them.

Protocol: chunks, flush, marker under a temporary name, flush, rename. A span without a marker does
not exist; writing it again gives the same bytes. The driver creates all metadata; workers only
write whole chunk rows.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from ..base.text import no_loss
from ..checkpoints.paths import path_of
from ..errors import InputError, LCAError, ResourceError, SpanError
from ..numerics.schema import BINS, TOTAL_FIELDS, Totals, join_all
from . import disk
from .chunk_writer import SUFFIX as CHUNK_SUFFIX
from .chunk_writer import ChunkWriter
from .chunks import CheckedStore
from .commits import COMMITS, DATA, PARTIAL, Commits, Marker, Waiting
from .encoding import compressed
from .files import refuse_links, seal, write_all, write_json
from .layout import plan_arrays
from .lock import hold
from .manifest import Identity, LossRecord, Manifest
from .metadata import FILE as ZARR
from .metadata import group_file, metadata_files
from .packs import Seal
from .partials import bytes_of_partial, read_partial, write_partial
from .runfile import exists, manifest_bytes, read_manifest, refuse_other, write_manifest
from .shard_sums import remove_sums
from .underway import LOG, remove_reports

if TYPE_CHECKING:
    from ..numerics.statistics import SpanSums
    from .verify import Damage, Leftover

_BLOCK = 4096
_AT_MOST = {"counts": 0.9, "signs": 0.5, "histogram": 0.5}
_CHUNK_HEAD = 20  # bytes of a chunk beside its numbers: blosc's header and the checksum
_MARKER, _MARKED = 600, 80  # bytes of a commit marker, and of each file in it
_ENTRY = 50  # bytes of a file in a commit marker beside the loss's key and the path of its array


def required_bytes(manifest: Manifest, keep: str, losses: Mapping[str, LossRecord]) -> int:
    """Return the most bytes that losses take: numbers, commit markers, metadata and the record, in
    blocks of the file system.

    Counts and signs are assumed to compress to `_AT_MOST` of their bytes.

    Args:
        manifest: of the run as it would be created.
        keep: a level of `--keep`.
        losses: their names and records.
    """
    manifest = replace(manifest, losses={**manifest.losses, **losses})
    needed = _BLOCK * len(manifest.checkpoints) // 16 + _blocks(
        8 * _BLOCK + len(manifest_bytes(manifest))
    )
    for name, record in losses.items():
        plans = list(plan_arrays(manifest, keep, record))
        needed += sum(
            int(plan.bytes * _AT_MOST.get(plan.part, 1.0)) + _BLOCK * plan.files for plan in plans
        )
        needed += sum(_blocks(len(data)) for _, data in metadata_files(manifest, name, keep=keep))
        entries = sum(plan.files * (_ENTRY + len(record.key) + len(plan.path)) for plan in plans)
        needed += manifest.spans * _blocks(_MARKER + entries // max(1, manifest.spans))
        if any(plan.of_windows for plan in plans):
            needed += _waiting(manifest.covered_by(record))
    return needed


def _blocks(size: int) -> int:
    """Return the bytes that a file of `size` bytes occupies in a file system."""
    return -(-size // _BLOCK) * _BLOCK


def compressed_share(
    allocations: Sequence[np.ndarray[Any, Any]], segments: int
) -> dict[str, float]:
    """Return the compression ratio of each part of a loss, from samples of its tensors'
    allocations, each of which is stored separately.

    Counts and signs of totals are unknown before a run. They compress to almost nothing if
    parameters keep helping or hurting, and like random bits if they do not; the estimate is half of
    the latter.

    Args:
        allocations: float32, flat, of each tensor in proportion to its size.
        segments: of a window of totals.
    """
    shares = [_compressed_share(sample, segments) for sample in allocations]
    sizes = [len(sample) for sample in allocations]
    return {
        part: float(np.average([one[part] for one in shares], weights=sizes)) for part in shares[0]
    }


def _compressed_share(allocation: np.ndarray[Any, Any], segments: int) -> dict[str, float]:
    generator = np.random.default_rng(0)
    active = allocation != 0
    # as fine as float64 distinguishes the largest from its neighbours
    unit = float(np.abs(allocation).max(initial=0.0)) * 2.0**-52 or 1.0
    counts = [np.where(active, generator.binomial(segments, 0.5, len(active)), 0) for _ in range(5)]
    signs = [np.where(active, generator.choice([-1, 1], len(active)), 0) for _ in range(6)]
    histogram = np.zeros((1, BINS), "int64")
    histogram[0, : min(BINS, 80)] = generator.integers(
        0, max(2, len(allocation) // 80), min(BINS, 80)
    ) * bool(active.any())
    return {
        "allocation": _left(allocation),
        "units": _left(allocation),
        "totals": _left(np.rint(allocation.astype("float64") / unit).astype("int64")),
        "counts": _left(np.stack(counts).astype("int32")) / 2,
        "signs": _left(np.stack(signs).astype("int8")) / 2,
        "histogram": _left(histogram),
    }


def _left(values: np.ndarray[Any, Any]) -> float:
    """Return the ratio to which the store's codec compresses an array."""
    return min(1.0, len(compressed(values)) / max(1, values.nbytes))


def estimated_bytes(
    manifest: Manifest,
    keep: str,
    losses: Mapping[str, LossRecord],
    shares: Mapping[str, Mapping[str, float]],
    block: int = 1,
) -> int:
    """Return the estimated bytes of losses after compression, as the sum of the sizes of files.

    Args:
        manifest: of the run as it would be created.
        keep: a level of `--keep`.
        losses: their names and records.
        shares: compression ratios of each part of a loss, see `compressed_share`; 1 for missing
            parts.
        block: bytes to whose multiples a file system rounds the size of each file.
    """
    needed = float(1024 + 120 * len(manifest.checkpoints) + 300 * len(manifest.tensors))
    for name, record in losses.items():
        plans = list(plan_arrays(manifest, keep, record))
        needed += sum(len(data) for path, data in metadata_files(manifest, name, keep=keep))
        for plan in plans:
            size = plan.bytes * shares[name].get(plan.part, 1.0) / max(1, plan.files) + _CHUNK_HEAD
            needed += plan.files * (size if block == 1 else block * math.ceil(size / block))
        needed += manifest.spans * _MARKER + sum(plan.files for plan in plans) * _MARKED
    return round(needed)


def _waiting(manifest: Manifest) -> int:
    """Return the bytes of the totals that wait for the last span of a window, which are removed
    once it is folded.
    """
    if manifest.window == 1:
        return 0
    elements = sum(tensor.spec.elements for tensor in manifest.allocated)
    return len(manifest.spans_of(0)) * _blocks(bytes_of_partial(elements, manifest.span))


def create(path: Path, manifest: Manifest, durable: bool = True) -> RunWriter:
    """Create a run directory.

    It is built beside its place and renamed, so that a killed creation leaves nothing in the way.
    In an object store it is built in place, under its lock, with `run.json` last.

    Args:
        path: of the run.
        manifest: of the run.
        durable: whether to flush files to disk before anything relies on them.

    Raises:
        InputError: if `path` is something else.
        ResourceError: if another driver created it meanwhile.
    """
    if exists(path):
        raise ResourceError(_created_meanwhile(path))
    _make_room(path, durable)
    if disk.is_object_store(path):
        _create_in_place(path, manifest, durable)
        return RunWriter(path, manifest, durable)
    building = path.with_name(f"{_creations_of(path)}{os.getpid()}")
    try:
        _build(building, manifest, durable)
        try:
            disk.publish(building, path, durable)
        except FileExistsError:
            raise ResourceError(_created_meanwhile(path)) from None
    except BaseException:
        disk.remove_tree(building)
        raise
    return RunWriter(path, manifest, durable)


def _create_in_place(path: Path, manifest: Manifest, durable: bool) -> None:
    with hold(path, durable=durable) as held:
        if exists(path):
            raise ResourceError(_created_meanwhile(path))
        for part in (DATA, COMMITS, PARTIAL):  # of a killed creation
            disk.remove_tree(path / part)
        writer = _lay_out(path, manifest, durable)
        if held.lost.is_set():
            raise ResourceError(_created_meanwhile(path))
        write_manifest(writer.manifest, path, durable)


def _make_room(path: Path, durable: bool) -> None:
    """Reject other contents in the place of a run, and create its parent directory.

    Raises:
        InputError: if a run cannot be created there.
    """
    refuse_other(path)
    if disk.is_link(path):
        raise InputError(
            f"{path} is a dangling link. Remove it or choose another place with --out."
        )
    try:
        disk.ensure_directory(path.parent, durable=durable)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"{path.parent} is not a directory. Choose another place with --out."
        ) from None
    _sweep_creations(path)


def _build(place: Path, manifest: Manifest, durable: bool) -> None:
    """Write everything that a run has before its first span, with `run.json` last."""
    disk.create_directory(place)
    for name in (DATA, COMMITS, PARTIAL, LOG):
        disk.create_directory(place / name)
    _lay_out(place, manifest, durable)
    write_manifest(manifest, place, durable)


def _lay_out(place: Path, manifest: Manifest, durable: bool) -> RunWriter:
    """Write the metadata of a run and of its losses."""
    writer = RunWriter(place, manifest, durable)
    writer.restore_metadata()
    for name in manifest.losses:
        writer.create_loss(name)
    return writer


def _created_meanwhile(path: Path) -> str:
    return (
        f"{path} was created by another driver meanwhile. Wait for it to end, or stop it; two "
        "drivers never share a run."
    )


def remove_loss(path: str | Path, loss: str) -> None:
    """Remove a loss and everything stored for it; other losses do not change.

    Args:
        path: of the run.
        loss: its name.

    Raises:
        InputError: if `path` is no run or lacks the loss.
        ResourceError: if a driver works on the run.
    """
    run = path_of(path)
    known = read_manifest(run).losses
    if loss not in known:
        raise InputError(no_loss(run, loss, known))
    with hold(run):
        RunWriter.open(run).remove_loss(loss)


def _sweep_creations(path: Path) -> None:
    """Remove the directories that killed creations on this host left."""
    if disk.is_object_store(path):
        return
    prefix = _creations_of(path)
    for name in disk.names(path.parent):
        pid = name.removeprefix(prefix)
        if name.startswith(prefix) and pid.isdigit() and not psutil.pid_exists(int(pid)):
            disk.remove_tree(path.parent / name)


def _creations_of(path: Path) -> str:
    """Return the prefix of the temporary names of a run's creation on this host; the process
    follows.
    """
    return f"{path.name}.partial-{socket.gethostname()}-"


class RunWriter:
    """A writer into one run directory; any number of workers may write at once, each its own spans.

    `durable` tells whether to flush files to disk before anything relies on them; checksums are
    computed either way.
    """

    def __init__(self, path: Path, manifest: Manifest, durable: bool = True) -> None:
        self.path, self.manifest, self.durable = path, manifest, durable

    @classmethod
    def open(cls, path: Path, durable: bool = True) -> RunWriter:
        """Open an existing run for writing.

        Args:
            path: of the run.
            durable: whether to flush files to disk before anything relies on them.
        """
        return cls(path, read_manifest(path), durable)

    @property
    def keep(self) -> str:
        """Return the level of `--keep`: one of `KEEP`."""
        return self.manifest.keep

    def commits(self, loss: str) -> Commits:
        """Return the commit markers of a loss."""
        return Commits(self.path, self.manifest, loss)

    # --- metadata: the driver alone ---------------------------------------------------------------

    def create_loss(self, name: str) -> None:
        """Create the directories and metadata of one loss, after removing leftovers of a killed
        creation.
        """
        key = self.manifest.losses[name].key
        self._clear(key)
        for part in (DATA, COMMITS, PARTIAL):
            disk.create_directory(self.path / part / key)
            if self.durable:
                disk.flush_names(self.path / part)
        self._restore(name)

    def _clear(self, key: str) -> None:
        for part in (DATA, COMMITS, PARTIAL):
            disk.remove_tree(self.path / part / key)

    def restore_metadata(self) -> list[str]:
        """Rewrite Zarr's metadata and the coordinates wherever they differ from what `run.json`
        implies; chunks do not change. A packed run has none.

        Returns:
            The files that were written, below the run.
        """
        if self.manifest.packed:
            return []
        written = self._put({f"{DATA}/{ZARR}": group_file()})
        for loss, record in self.manifest.losses.items():
            if any(disk.exists(self.path / part / record.key) for part in (DATA, COMMITS)):
                written += self._restore(loss)
        return written

    def _restore(self, loss: str) -> list[str]:
        if self.manifest.packed:
            return []
        place = f"{DATA}/{self.manifest.losses[loss].key}"
        return self._put(
            {f"{place}/{path}": data for path, data in metadata_files(self.manifest, loss)}
        )

    def _put(self, files: dict[str, bytes]) -> list[str]:
        """Write the files whose content on disk differs; return their paths."""
        written = []
        for path, data in files.items():
            file = self.path / path
            if disk.kind(file) == "file":
                with contextlib.suppress(OSError):  # unreadable files are written again
                    if disk.read(file) == data:
                        continue
            refuse_links(self.path, file.parent)
            disk.ensure_directory(file.parent)
            if disk.kind(file) == "directory":
                disk.remove_tree(file, strict=True)
            written.append(path)
        write_all({path: files[path] for path in written}, self.path, self.durable)
        return written

    def add_losses(self, losses: dict[str, LossRecord]) -> None:
        """Add losses; committed results of the others do not change."""
        self.manifest = self.manifest.with_losses(losses)
        for name in losses:
            self.create_loss(name)
        write_manifest(self.manifest, self.path, self.durable)

    def note(self, provenance: Mapping[str, object]) -> None:
        """Record the current provenance: the task file and its losses."""
        self.manifest = self.manifest.with_provenance(provenance)
        write_manifest(self.manifest, self.path, self.durable)

    def remove_loss(self, name: str) -> None:
        """Remove a loss, first from the record, so that a kill in between leaves no loss without
        numbers.
        """
        key = self.manifest.losses[name].key
        self.manifest = self.manifest.without(name)
        write_manifest(self.manifest, self.path, self.durable)
        self._clear(key)
        remove_sums(self.path)

    def take_up(self, larger: Manifest, identities: Mapping[str, Identity]) -> None:
        """Add checkpoints at the end, or in place of ones that no number relies on, and their
        segments, or those of a larger random part, for some losses.

        If the last span of such a loss was short and has grown, it is incomplete and will be
        replayed again; with path bands, any last span is. If the last window of totals has grown,
        its sums wait for the new spans, and are not computed again. The other losses cover the same
        segments as before: none of their files changes.

        Args:
            larger: has all of them; the segments of this run come first in it.
            identities: of the losses for which they are added, as probed on them.
        """
        before = self.manifest
        self.manifest = before.grown_to(larger, identities)
        growing = [loss for loss in before.losses if loss in identities]
        self.manifest = self.manifest.with_losses(
            {loss: self._begin_totals(Commits(self.path, before, loss)) for loss in growing}
        )
        for loss in growing:
            self._restore(loss)
            self._remove_unbent(before, loss)
        write_manifest(self.manifest, self.path, self.durable)
        for loss in growing:
            self._remove_outgrown(before, loss)

    def _begin_totals(self, then: Commits) -> LossRecord:
        """Let the totals of a folded last window that has grown wait for its new spans; return the
        record of the loss.

        Raises:
            LCAError: if these totals are damaged.
        """
        record, manifest = self.manifest.losses[then.loss], then.manifest
        window = manifest.windows - 1
        folded = manifest.window > 1 and then.is_folded(window)
        if not folded or self.manifest.of(then.loss).length_of(window) == manifest.length_of(
            window
        ):
            return record
        from .totals import StoredTotals  # imports xarray, which takes 80 MB

        store = CheckedStore(self.path, manifest, then.loss, tuple(TOTAL_FIELDS))
        totals = (
            StoredTotals(store, tensor.key).read(window, (slice(None),) * len(tensor.spec.shape))
            for tensor in manifest.allocated
        )
        path = then.partials / then.begun_name(manifest.segments)
        refuse_links(self.path, path.parent)
        sealed = write_partial(path, totals, manifest.length_of(window), self.durable)
        return replace(record, begun=[manifest.segments, *sealed])

    def _remove_outgrown(self, before: Manifest, loss: str) -> None:
        """Remove the markers, and the waiting totals, of a last span and a last window that have
        grown.
        """
        then, now = Commits(self.path, before, loss), self.commits(loss)
        span, window = then.manifest.spans - 1, then.manifest.windows - 1
        for old, new in (
            (then.marker(span), now.marker(span)),
            (then.partial(span), now.partial(span)),
            (then.window_marker(window), now.window_marker(window)),
        ):
            if old != new:
                disk.remove(old)

    def _remove_unbent(self, before: Manifest, loss: str) -> None:
        """Remove the marker of the span whose last segment ended in the last checkpoint and now has
        a neighbour, which changes its path band.

        A span without a marker is replayed from the old record as well.
        """
        then = Commits(self.path, before, loss).manifest
        last = len(then.checkpoints) - 1
        grown = len(self.commits(loss).manifest.checkpoints) > last + 1
        if grown and before.settings["path_band"] == "on" and last - 1 in then.starts:
            span = then.starts.index(last - 1) // then.span
            disk.remove(Commits(self.path, before, loss).marker(span))

    def sweep(self) -> None:
        """Remove what a killed writer left, temporary files and totals that nothing needs, and
        flush the names of markers.

        Call it only while holding the lock.
        """
        if not disk.is_object_store(self.path):  # object stores have no temporary names
            for place, _, names in disk.walk(self.path):
                for name in filter(_is_temporary, names):
                    disk.remove(place / name)
        remove_reports(self.path)
        for commits in map(self.commits, self.manifest.losses):
            self._remove_partials(commits)
            if self.durable:
                with contextlib.suppress(FileNotFoundError):
                    disk.flush_names(self.path / COMMITS / commits.key)

    def remove_leftovers(self, leftovers: Iterable[Leftover]) -> None:
        """Remove files that `verify` named as leftovers. Call it only while holding the lock."""
        for leftover in leftovers:
            disk.remove(self.path / leftover.path)

    def _remove_partials(self, commits: Commits) -> None:
        """Remove the totals that no window of a loss needs any more, except those being written."""
        for name in disk.names(commits.partials):
            if not _is_temporary(name) and not commits.waits(name):
                disk.remove(commits.partials / name)

    def discard(self, damages: Iterable[Damage]) -> dict[str, list[int]]:
        """Make damaged spans pending again, and all spans of a damaged window of totals.

        Call it only while holding the lock. Their markers and the window's waiting totals are
        removed; their chunks stay until they are overwritten.

        Args:
            damages: found by `verify`; `restore_metadata` repairs metadata.

        Returns:
            The spans that are pending now, by loss.
        """
        damages = list(damages)
        gone = self.spans_of(damages)
        for damage in damages:
            if damage.loss is not None and damage.window is not None:
                self._discard_window(self.commits(damage.loss), damage.window)
        for loss, spans in gone.items():
            commits = self.commits(loss)
            for span in spans:
                disk.remove(commits.marker(span))
            if self.durable:
                disk.flush_names(self.path / COMMITS / commits.key)
        return gone

    def _discard_window(self, commits: Commits, window: int) -> None:
        begun = commits.begun(window)
        disk.remove(commits.window_marker(window))
        if begun is not None:
            disk.remove(begun.path)

    def spans_of(self, damages: Iterable[Damage]) -> dict[str, list[int]]:
        """Return the damaged spans, by loss: all spans of a damaged window of totals are."""
        spans_of_loss: dict[str, set[int]] = {}
        for damage in damages:
            if damage.loss is not None and damage.span is not None:
                spans_of_loss.setdefault(damage.loss, set()).add(damage.span)
            if damage.loss is not None and damage.window is not None:
                spans_of_loss.setdefault(damage.loss, set()).update(
                    self.manifest.of(damage.loss).spans_of(damage.window)
                )
        return {loss: sorted(spans) for loss, spans in spans_of_loss.items()}

    def relies_on(self, checkpoint: int) -> bool:
        """Tell whether a committed span of any loss, or its waiting totals, were computed from a
        checkpoint.
        """
        # causes need the motion before a segment, for its momentum
        first, last = 0 if self.manifest.settings["signal"] is None else -1, 1
        if self.manifest.settings["path_band"] == "on":  # path bands depend on neighbours
            first, last = -1, 2
        return self._any_computed(range(checkpoint - last, checkpoint - first + 1))

    def relies_on_moments(self, checkpoint: int) -> bool:
        """Tell whether anything was computed from the moments beside a checkpoint, which the
        segments on both its sides read.
        """
        return self._any_computed(range(checkpoint - 1, checkpoint + 1))

    def _any_computed(self, starts: range) -> bool:
        """Tell whether segments that start from some checkpoints are committed for any loss, or
        wait in totals.
        """
        rows = [row for row, start in enumerate(self.manifest.starts) if start in starts]
        return any(
            disk.exists(commits.marker(row // self.manifest.span)) or commits.counts(row)
            for commits in map(self.commits, self.manifest.losses)
            for row in rows
            if row < commits.manifest.segments
        )

    # --- existing spans ----------------------------------------------------------------------------

    def pending(self, loss: str) -> list[int]:
        """Return the spans of a loss that have no marker, or lost their totals before these were
        folded.
        """
        return self.commits(loss).pending()

    def is_complete(self, loss: str) -> bool:
        """Tell whether every span is committed and every window of totals folded."""
        return self.commits(loss).is_complete()

    def span_summary(self, loss: str, span: int) -> Marker | None:
        """Return the marker of a span; None if the span is not committed.

        Args:
            loss: its name.
            span: its number.

        Raises:
            LCAError: if the marker is damaged.
        """
        return self.commits(loss).span_summary(span)

    # --- spans: workers ---------------------------------------------------------------------------

    def chunks(self) -> ChunkWriter:
        """Return a context that writes the chunks of spans."""
        return ChunkWriter(self.path, self.durable, packed=self.manifest.packed)

    def write_block(self, loss: str, span: int, statistics: SpanSums, chunks: ChunkWriter) -> None:
        """Hand over the large arrays of a block of groups; `write_span` commits them.

        Args:
            loss: its name.
            span: its number.
            statistics: of the block.
            chunks: writes the arrays.

        Raises:
            SpanError: if the run is no longer the one this writer was opened for.
        """
        self._still_recorded(loss, span)
        parts = {"allocation": statistics.allocation, "units": statistics.units}
        arrays = (
            (f"{part}/{self._key(name)}", values)
            for part, by_name in parts.items()
            for name, values in by_name.items()
        )
        rows: tuple[slice, ...] = (self.manifest.of(loss).rows(span),)
        if self.manifest.losses[loss].groups is not None:
            rows = (*rows, slice(statistics.block.start, statistics.block.stop))
        self._write(loss, parts, arrays, rows, chunks)

    def write_span(
        self,
        loss: str,
        span: int,
        statistics: SpanSums,
        summary: Mapping[str, object],
        chunks: ChunkWriter,
        replicates: np.ndarray[Any, Any] | None = None,
    ) -> None:
        """Write the remaining arrays of one span of one loss, and commit the span once all of it is
        written.

        Args:
            loss: its name.
            span: its number.
            statistics: the arrays.
            summary: JSON-like, recorded in the marker (evaluations, seconds, …).
            chunks: the writer that took the span's blocks.
            replicates: the allocated sums by segment, replicate and tensor, if the loss has
                replicates.

        Raises:
            SpanError: if the run is no longer the one this writer was opened for.
        """
        self._still_recorded(loss, span)
        self._write_small(loss, span, statistics, chunks, replicates)
        commits = self.commits(loss)
        marker: dict[str, object] = {
            **summary,
            "run": self.manifest.id,
            "loss": loss,
            "span": span,
            "steps": self.manifest.steps[commits.manifest.rows(span)],
            "partial": self._write_span_totals(commits, span, statistics, chunks),
            "files": chunks.sealed(commits.planned_files(span), commits.pack(commits.marker(span))),
        }
        self._still_recorded(loss, span)
        self._commit(commits.marker(span), marker)
        self.fold(loss, span // self.manifest.window)

    def _write_small(
        self,
        loss: str,
        span: int,
        statistics: SpanSums,
        chunks: ChunkWriter,
        replicates: np.ndarray[Any, Any] | None,
    ) -> None:
        """Write the arrays of a span that have no axis of single parameters or units."""
        parts = {
            "steps": statistics.steps,
            "tensors": statistics.tensors,
            "histogram": statistics.histogram,
            "examples": statistics.examples,
            "causes": statistics.causes,
            "along": statistics.along,
            "path": statistics.path,
        }
        arrays = {
            f"{part}/{name}": values
            for part, by_name in parts.items()
            for name, values in by_name.items()
        }
        if replicates is not None:
            arrays["tensors/replicates"] = replicates
        planned = {
            plan.path for plan in plan_arrays(self.manifest, self.keep, self.manifest.losses[loss])
        }
        self._write(
            loss,
            parts,
            ((path, values) for path, values in arrays.items() if path in planned),
            (self.manifest.of(loss).rows(span),),
            chunks,
        )

    def _write_span_totals(
        self, commits: Commits, span: int, statistics: SpanSums, chunks: ChunkWriter
    ) -> list[int] | None:
        """Write the totals of a span if it is its whole window, else let them wait for the other
        spans; return size and CRC-32 of waiting totals.
        """
        totals = statistics.totals()
        if not totals:
            return None
        if self.manifest.window == 1:
            self._write_totals(commits.loss, span, totals.items(), chunks)
            return None
        refuse_links(self.path, commits.partials)
        return write_partial(
            commits.partial(span, statistics.since),
            (totals[tensor.spec.name] for tensor in self.manifest.allocated),
            commits.manifest.length(span) - statistics.since,
            self.durable,
        )

    def _still_recorded(self, loss: str, span: int) -> None:
        """Reject a late worker, after the run was recreated, has grown, or has lost the loss.

        Raises:
            SpanError: if the span no longer belongs to the run.
        """
        try:
            now = read_manifest(self.path)
        except LCAError as error:
            raise SpanError(f"span {span} is not committed: {error}") from None
        if now.id != self.manifest.id or _of_span(now, loss, span) != _of_span(
            self.manifest, loss, span
        ):
            raise SpanError(
                f"span {span} of loss {loss!r} is not committed: {self.path} has changed since its "
                "worker began. Run again."
            )

    def _commit(self, path: Path, marker: Mapping[str, object]) -> None:
        refuse_links(self.path, path.parent)
        write_json(path, marker, self.durable)

    def _key(self, name: str) -> str:
        return next(tensor.key for tensor in self.manifest.allocated if tensor.spec.name == name)

    def _write(
        self,
        loss: str,
        parts: Iterable[str],
        arrays: Iterable[tuple[str, Any]],
        rows: tuple[slice, ...],
        chunks: ChunkWriter,
    ) -> None:
        """Hand over whole chunks of some arrays of these parts, one array at a time in the order of
        the iterable.
        """
        record = self.manifest.losses[loss]
        plans = {
            plan.path: plan
            for plan in plan_arrays(self.manifest, self.keep, record)
            if plan.part in parts
        }
        corner = [along.start for along in rows]
        for path, values in arrays:
            if values.size:
                chunks.write(f"{DATA}/{record.key}", plans[path], values, corner)

    def _write_totals(
        self, loss: str, window: int, totals: Iterable[tuple[str, Totals]], chunks: ChunkWriter
    ) -> None:
        """Hand over the totals of a window, tensor by tensor."""
        arrays = (
            (
                f"{part}/{self._key(name)}",
                np.stack([np.asarray(by_field[field], dtype) for field in fields])[None],
            )
            for name, by_field in totals
            for part, (fields, dtype) in TOTAL_FIELDS.items()
        )
        self._write(loss, TOTAL_FIELDS, arrays, (slice(window, window + 1),), chunks)

    def fold(self, loss: str, window: int) -> list[int]:
        """Merge the totals of a window's spans once all are committed; repeated or simultaneous
        calls are harmless.

        Args:
            loss: its name.
            window: its number.

        Returns:
            Spans whose waiting totals are damaged: they are pending again.
        """
        commits = self.commits(loss)
        spans = commits.manifest.spans_of(window)
        if commits.is_folded(window) or not all(map(commits.is_committed, reversed(spans))):
            return []
        try:
            waiting = list(commits.waiting(window))
            damaged = {
                span
                for stretch in waiting
                if not self._waits_whole(commits, stretch)
                for span in (spans if stretch.span is None else [stretch.span])
            }
            if not damaged:
                sealed = self._write_joined(commits, window, waiting)
        except FileNotFoundError:  # another worker folded this window meanwhile
            return []
        if damaged:
            for span in damaged:
                disk.remove(commits.marker(span))
            if damaged == {*spans}:
                self._discard_window(commits, window)
            return sorted(damaged)
        marker = {"run": self.manifest.id, "loss": loss, "window": window, "files": sealed}
        self._commit(commits.window_marker(window), marker)
        self._remove_partials(commits)
        return []

    def _write_joined(
        self, commits: Commits, window: int, waiting: list[Waiting]
    ) -> dict[str, Seal]:
        """Write the totals of a window that waited in stretches; return the seal of each chunk."""
        with self.chunks() as chunks:
            self._write_totals(commits.loss, window, self._joined(window, waiting), chunks)
            return chunks.sealed(
                commits.planned_totals(window), commits.pack(commits.window_marker(window))
            )

    def _joined(self, window: int, waiting: list[Waiting]) -> Iterator[tuple[str, Totals]]:
        """Yield each tensor's totals over the stretches of a window, which wait in files."""
        tensors = self.manifest.allocated
        stretches = [read_partial(stretch.path, tensors, stretch.segments) for stretch in waiting]
        before = itertools.accumulate(stretch.segments for stretch in waiting[:-1])
        first = self.manifest.rows_of(window).start
        borders = [self.manifest.follows(first + segments) for segments in before]
        for tensor in tensors:
            yield tensor.spec.name, join_all(map(next, stretches), borders)

    def _waits_whole(self, commits: Commits, stretch: Waiting) -> bool:
        """Tell whether totals that wait for their window are unchanged since they were committed.

        Raises:
            FileNotFoundError: if they, or the span's marker, are missing.
        """
        sealed = seal(stretch.path, False)
        try:
            return sealed == commits.seal_of(stretch)
        except ValueError:
            return False

    def fold_all(self, loss: str) -> list[int]:
        """Fold every window that is ready and was not folded because a worker died.

        Returns:
            Spans whose waiting totals are damaged: they are pending again.
        """
        return [
            span
            for window in range(self.manifest.of(loss).windows)
            for span in self.fold(loss, window)
        ]


def _is_temporary(name: str) -> bool:
    """Tell whether a file was still being written by a writer that may have been killed."""
    return name.endswith(f".{CHUNK_SUFFIX}") or (name.startswith(".") and name.endswith(".tmp"))


def _of_span(manifest: Manifest, loss: str, span: int) -> object:
    """Return everything that the numbers of a span follow from; None if there is no such span or
    loss.
    """
    if loss not in manifest.losses or span >= manifest.of(loss).spans:
        return None
    rows = manifest.of(loss).rows(span)
    record = replace(manifest.losses[loss], identity=[], covers=None)
    return record, [manifest.ends_of(row) for row in range(rows.start, rows.stop)]
