"""Create a run, write the rows of a span, commit them.

Protocol: chunks, flush, marker under a temporary name, flush, rename. A span without a marker does not exist; writing it
again gives the same bytes. The driver creates all metadata; workers write whole chunk rows only.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numcodecs.blosc
import numpy as np
import zarr
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from zarr.codecs import BloscCodec, Crc32cCodec

from ..errors import InputError
from ..records import FIELDS, Totals, histogram_edges, join_all
from ..trajectory import Checkpoint
from .files import seal_all, write_whole
from .layout import ArrayPlan, plan_arrays
from .lock import hold
from .manifest import FILE, Identity, LossRecord, Manifest, read_manifest, write_manifest

if TYPE_CHECKING:
    from ..tally import Tally

DATA = "data.zarr"
COMMITS = "commits"
PARTIAL = "partial"
_BLOCK = 4096


def required_bytes(manifest: Manifest, keep: str, losses: Iterable[LossRecord]) -> int:
    """Bytes losses take before compression: numbers, one block of the file system for each file, and the record."""
    needed = _BLOCK * (8 + len(manifest.checkpoints) // 16)
    for loss in losses:
        plans = list(plan_arrays(manifest, keep, loss))
        files = sum(plan.files + 1 for plan in plans) + manifest.spans
        needed += sum(plan.bytes for plan in plans) + _BLOCK * files
    return needed


def create(path: Path, manifest: Manifest) -> RunWriter:
    """Create a run directory: built beside its place and renamed, so that a killed creation leaves nothing in the way.

    Raises:
        InputError: where `path` exists.
    """
    if path.exists():
        raise InputError(
            f"{path} exists and is not a run directory (it has no {FILE}). Choose another place with --out."
        )
    if path.is_symlink():
        raise InputError(
            f"{path} is a link to something that is not there. Remove it or choose another place with --out."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path.parent} is not a directory. Choose another place with --out.") from None
    _sweep_creations(path)
    building = path.with_name(f"{path.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        building.mkdir()
        for name in (DATA, COMMITS, PARTIAL):
            (building / name).mkdir()
        zarr.create_group(building / DATA, zarr_format=3)
        writer = RunWriter(building, manifest)
        for name in manifest.losses:
            writer.create_loss(name)
        write_manifest(manifest, building)
        building.rename(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return RunWriter(path, manifest)


def remove_loss(path: str | Path, loss: str) -> None:
    """Drop a loss and everything stored for it; what is stored for the others is not touched.

    Raises:
        InputError: where `path` is no run or holds no such loss.
        ResourceError: where a driver works on the run.
    """
    run = Path(path)
    known = read_manifest(run).losses
    if loss not in known:
        raise InputError(f"{run} has no loss {loss!r}; it has {', '.join(map(repr, known)) or 'none'}.")
    with hold(run):
        RunWriter.open(run).remove_loss(loss)


def _sweep_creations(path: Path) -> None:
    """Remove what killed creations on this host left."""
    prefix = f"{path.name}.partial-{socket.gethostname()}-"
    for left in path.parent.glob(f"{path.name}.partial-*"):
        pid = left.name.removeprefix(prefix)
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)


class RunWriter:
    """Writes into one run directory; any number of workers may, each its own spans."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path) -> RunWriter:
        """Open an existing run for writing."""
        return cls(path, read_manifest(path))

    @property
    def keep(self) -> str:
        """What the run keeps: "parameters", "units" or "tensors"."""
        return str(self.manifest.settings["keep"])

    # --- metadata: the driver alone ---------------------------------------------------------------------------------

    def create_loss(self, name: str) -> None:
        """Create the arrays of one loss; leftovers of a killed creation are removed first."""
        key, groups = self.manifest.losses[name].key, self.manifest.losses[name].groups
        self._clear(key)
        (self.path / COMMITS / key).mkdir()
        (self.path / PARTIAL / key).mkdir()
        group = zarr.open_group(self.path / DATA, mode="r+", zarr_format=3, use_consolidated=False).create_group(
            key, attributes={"loss": name}
        )
        for part in dict.fromkeys(plan.path.partition("/")[0] for plan in self._plans(name)):
            made = group.create_group(part, attributes=self._attributes(part))
            if groups is not None and part != "totals":
                labels = np.array(groups, np.dtypes.StringDType() if isinstance(groups[0], str) else "int64")
                made.create_array("group", data=labels, dimension_names=("group",))
        for plan in self._plans(name):
            _create(group, plan)
        edges = histogram_edges()
        group["histogram"].create_array("edge", data=edges, dimension_names=("edge",))  # type: ignore[union-attr]
        self._label(group)

    def _clear(self, key: str) -> None:
        for part in (DATA, COMMITS, PARTIAL):
            shutil.rmtree(self.path / part / key, ignore_errors=True)

    def _plans(self, loss: str) -> Iterator[ArrayPlan]:
        return plan_arrays(self.manifest, self.keep, self.manifest.losses[loss])

    def _attributes(self, part: str) -> dict[str, Any]:
        if part == "tensors":
            specs = [tensor.spec for tensor in self.manifest.allocated]
            return {"tensor": [spec.name for spec in specs], "kind": [spec.kind for spec in specs]}
        return {"field": list(FIELDS)} if part == "totals" else {}

    def _label(self, group: zarr.Group) -> None:
        """Write the training steps beside every array that runs over segments."""
        ends = [checkpoint.step for checkpoint in self.manifest.checkpoints[1:]]
        for part, node in group.groups():
            if part != "totals":
                node.create_array(
                    "step", data=np.array(self.manifest.steps, "int64"), dimension_names=("step",), overwrite=True
                )
            if part == "steps":
                node.create_array("step_end", data=np.array(ends, "int64"), dimension_names=("step",), overwrite=True)

    def add_losses(self, losses: dict[str, LossRecord]) -> None:
        """Take up more losses; what is committed of the others is not touched."""
        self.manifest = self.manifest.with_losses(losses)
        for name in losses:
            self.create_loss(name)
        write_manifest(self.manifest, self.path)

    def note(self, provenance: dict[str, Any]) -> None:
        """Record where the run comes from now: the task file as it is, with the losses it has."""
        self.manifest = self.manifest.with_provenance(provenance)
        write_manifest(self.manifest, self.path)

    def remove_loss(self, name: str) -> None:
        """Drop a loss: from the record first, so that one killed meanwhile leaves no loss without numbers."""
        key = self.manifest.losses[name].key
        self.manifest = self.manifest.without(name)
        write_manifest(self.manifest, self.path)
        self._clear(key)

    def take_up(self, checkpoints: list[Checkpoint], identities: Mapping[str, Identity]) -> None:
        """Take up checkpoints at the end, or in place of ones no number relies on.

        A last span that was short and has grown is no longer whole and will be replayed again.

        Args:
            checkpoints: all of them.
            identities: of the losses that were probed on them; what the others are at the last one is forgotten.
        """
        before, after = self.manifest, self.manifest.with_checkpoints(checkpoints, identities)
        grown = after.segments > before.segments
        for key in (record.key for record in before.losses.values() if grown):
            if before.segments % before.span:
                self._marker(key, before.spans - 1).unlink(missing_ok=True)
            if not before.is_full(before.windows - 1):
                self._window_marker(key, before.windows - 1).unlink(missing_ok=True)
        self.manifest = after
        root = zarr.open_group(self.path / DATA, mode="r+", zarr_format=3, use_consolidated=False)
        for name, record in after.losses.items():
            group = root[record.key]
            assert isinstance(group, zarr.Group)
            for plan in self._plans(name):
                group[plan.path].resize(plan.shape)  # type: ignore[union-attr]
            self._label(group)
        write_manifest(after, self.path)

    def sweep(self) -> None:
        """Remove temporary files a killed writer left; only while holding the lock."""
        for left in [*self.path.rglob("*.partial"), *self.path.rglob(".*.tmp")]:
            left.unlink(missing_ok=True)

    def relies_on(self, checkpoint: int) -> bool:
        """Whether a committed span of any loss was computed from a checkpoint, given by its position."""
        spans = {at // self.manifest.span for at in (checkpoint - 1, checkpoint) if 0 <= at < self.manifest.segments}
        return any(
            self._marker(record.key, span).exists() for record in self.manifest.losses.values() for span in spans
        )

    # --- what is there -----------------------------------------------------------------------------------------------

    def pending(self, loss: str) -> list[int]:
        """The spans of a loss without a marker, or whose totals were lost before they were folded."""
        return [
            span for span in range(self.manifest.spans) if not self._is_committed(self.manifest.losses[loss].key, span)
        ]

    def _is_committed(self, key: str, span: int) -> bool:
        if not self._marker(key, span).exists():
            return False
        window = span // self.manifest.window
        return (
            self.manifest.window == 1 or self._window_marker(key, window).exists() or self._partial(key, span).exists()
        )

    def is_complete(self, loss: str) -> bool:
        """Whether every span is committed and every window of totals folded."""
        key = self.manifest.losses[loss].key
        folded = self.manifest.window == 1 or all(
            self._window_marker(key, window).exists() for window in range(self.manifest.windows)
        )
        return folded and not self.pending(loss)

    def _marker(self, key: str, span: int) -> Path:
        return self.path / COMMITS / key / f"{span:06d}.json"

    def _window_marker(self, key: str, window: int) -> Path:
        return self.path / COMMITS / key / f"window-{window:06d}.json"

    def _partial(self, key: str, span: int) -> Path:
        return self.path / PARTIAL / key / f"{span:06d}.safetensors"

    # --- spans: workers ----------------------------------------------------------------------------------------------

    def write_block(self, loss: str, span: int, tally: Tally) -> None:
        """Write the large arrays of the tally's block of groups; `write_span` commits them."""
        record = self.manifest.losses[loss]
        arrays = {
            f"{part}/{self._key(name)}": values
            for part, held in (("allocation", tally.allocation), ("units", tally.units))
            for name, values in held.items()
        }
        rows: tuple[slice, ...] = (self.manifest.rows(span),)
        if record.groups is not None:
            rows = (*rows, slice(tally.block.start, tally.block.stop))
        self._write(record.key, arrays, rows)

    def write_span(
        self, loss: str, span: int, tally: Tally, facts: dict[str, Any], replicates: np.ndarray[Any, Any] | None = None
    ) -> None:
        """Write what is left of what one span has to say about one loss, and commit it.

        Args:
            loss: its name.
            span: its number on the grid.
            tally: the arrays.
            facts: JSON-like, recorded in the marker (evaluations, seconds, …).
            replicates: allocated, by segment, replicate and tensor, where the loss has them.
        """
        key = self.manifest.losses[loss].key
        rows = self.manifest.rows(span)
        parts = {"steps": tally.steps, "tensors": tally.tensors, "histogram": tally.histogram}
        arrays = {f"{part}/{name}": values for part, held in parts.items() for name, values in held.items()}
        if replicates is not None:
            arrays["tensors/replicates"] = replicates
        planned = [plan.path for plan in self._plans(loss) if not plan.path.startswith("totals/")]
        self._write(key, {path: values for path, values in arrays.items() if path in planned}, (rows,))
        files = [file for path in planned for file in _row_files(self.path / DATA / key / path, span)]
        totals = tally.totals()
        if self.manifest.window == 1:
            files += self._write_totals(key, span, totals)
        else:
            flat = {
                f"{field}/{self._key(name)}": values for name, held in totals.items() for field, values in held.items()
            }
            write_whole(self._partial(key, span), save_arrays(flat))
        marker = {
            **facts,
            "loss": loss,
            "span": span,
            "steps": self.manifest.steps[rows],
            "files": seal_all(files, self.path),
        }
        write_whole(self._marker(key, span), json.dumps(marker, allow_nan=False).encode())
        self.fold(loss, span // self.manifest.window)

    def _key(self, name: str) -> str:
        return next(tensor.key for tensor in self.manifest.allocated if tensor.spec.name == name)

    def _write(self, key: str, arrays: dict[str, Any], rows: tuple[slice, ...]) -> None:
        """Write whole chunks of some arrays."""
        numcodecs.blosc.use_threads = False
        with zarr.config.set({"array.write_empty_chunks": True}):
            group = zarr.open_group(self.path / DATA / key, mode="r+", zarr_format=3, use_consolidated=False)
            for path, values in arrays.items():
                if values.size:
                    group[path][rows] = values  # type: ignore[index]

    def _write_totals(self, key: str, window: int, totals: dict[str, Totals]) -> list[Path]:
        arrays = {
            f"totals/{self._key(name)}": np.stack([np.asarray(held[field], "float64") for field in FIELDS])[None]
            for name, held in totals.items()
        }
        self._write(key, arrays, (slice(window, window + 1),))
        return [file for path in arrays for file in _row_files(self.path / DATA / key / path, window)]

    def fold(self, loss: str, window: int) -> None:
        """Join the totals of a window's spans once all are committed; harmless to repeat, also at the same time."""
        key = self.manifest.losses[loss].key
        spans = self.manifest.spans_of(window)
        if self.manifest.window == 1 or self._window_marker(key, window).exists():
            return
        if not all(self._is_committed(key, span) for span in spans):
            return
        try:
            stretches = [load_arrays(self._partial(key, span).read_bytes()) for span in spans]
        except FileNotFoundError:  # another worker folded this window meanwhile
            return
        totals = {
            tensor.spec.name: join_all(
                [{field: each[f"{field}/{tensor.key}"] for field in FIELDS} for each in stretches]
            )
            for tensor in self.manifest.allocated
        }
        marker = {"loss": loss, "window": window, "files": seal_all(self._write_totals(key, window, totals), self.path)}
        write_whole(self._window_marker(key, window), json.dumps(marker).encode())
        if self.manifest.is_full(window):
            for span in spans:
                self._partial(key, span).unlink(missing_ok=True)

    def fold_all(self, loss: str) -> None:
        """Fold every window that is ready and was not folded, because a worker died in between."""
        for window in range(self.manifest.windows):
            self.fold(loss, window)


def _create(group: zarr.Group, plan: ArrayPlan) -> None:
    group.create_array(
        plan.path,
        shape=plan.shape,
        chunks=plan.chunks,
        dtype=plan.dtype,
        fill_value=plan.fill,
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
        dimension_names=plan.dims,
        attributes=plan.attributes,
    )


def _row_files(array: Path, row: int) -> list[Path]:
    """The files of one chunk row."""
    place = array / "c" / str(row)
    return (
        [place]
        if place.is_file()
        else sorted(path for path in place.rglob("*") if path.is_file() and not path.name.endswith(".partial"))
    )
