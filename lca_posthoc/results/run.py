"""Open a run as labelled arrays that show only committed spans and check every byte on reading.

xarray, which takes 80 MB with its imports, is imported where something is read: a worker that only
writes does not need it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from ..base.text import count, no_loss
from ..checkpoints.paths import path_of
from ..errors import InputError
from ..numerics.schema import (
    KEEP,
    KEEP_OF_A_SAMPLE,
    TOTAL_FIELDS,
    TOTALS,
    holds,
    sampled_examples,
)
from .chunks import CheckedStore
from .commits import Commits, Marker
from .html import results_html, run_html
from .lock import is_held
from .manifest import LossRecord, Manifest
from .runfile import read_manifest
from .underway import underway

if TYPE_CHECKING:
    import xarray as xr

_SHOWN = 20  # losses in a repr
_OF_ALL = [level for level in KEEP if level not in KEEP_OF_A_SAMPLE]
# the level of `--keep` from which a part of the results is kept
_LEVELS = {"units": "units", "histogram": "statistics", "totals": "statistics"}
_LEVELS |= {"allocation": "parameters"}


class Progress(TypedDict):
    """The progress of a loss: spans, segments, steps, seconds of workers.

    `first_step` and `last_step` are those of the whole loss, `steps_done` the first and the last
    step of every committed stretch. `segments_underway` is the progress that workers report on
    their current spans; it may be fractional. `behind` counts segments of the run that the loss
    does not cover, because checkpoints were added for other losses. `missing` lists the spans that
    are not committed.
    """

    spans_done: int
    spans: int
    segments_done: int
    segments: int
    segments_underway: float
    first_step: int
    last_step: int
    steps_done: list[list[int]]
    seconds: float
    complete: bool
    behind: int
    missing: list[int]
    running: bool


class LossResults:
    """The results of one loss of a run, as lazy xarray datasets over the committed segments.

    `manifest` is that of the run up to the last checkpoint that the loss covers; `behind` counts
    the segments added since for other losses only. Reading raises `LCAError` if a byte is missing
    or differs from the committed one.
    """

    def __init__(self, path: Path, manifest: Manifest, name: str) -> None:
        self.name = name
        self.path, self.manifest = path, manifest.of(name)
        self.behind = manifest.segments - self.manifest.segments
        self._commits = Commits(path, manifest, name)

    def __repr__(self) -> str:
        return f"<LossResults {self.name!r} of {str(self.path)!r}: {self._state()}>"

    def _repr_html_(self) -> str:
        return results_html(self)

    def _state(self) -> str:
        """Describe in a few words how much is committed, from the markers alone; a repr never
        raises.
        """
        try:
            if self._commits.is_complete():
                return "complete"
            waiting = sum(self.manifest.length(span) for span in self._commits.pending())
        except Exception as error:
            return f"cannot be read: {type(error).__name__}"
        return f"{self.manifest.segments - waiting:,} of {count(self.manifest.segments, 'segment')}"

    @property
    def record(self) -> LossRecord:
        """Return the record of the loss, with its split, examples, groups, batch size and more."""
        return self.manifest.losses[self.name]

    @property
    def positions(self) -> np.ndarray[Any, Any] | None:
        """Return the positions in the split of the examples of `--subset`, int64, (examples,), in
        their order of use; None for all.

        A stream can only be read in its own order, which is these positions ascending.

        Raises:
            LCAError: if the recorded subset is no subset of the split.
        """
        # imported here, because a random subset needs torch and opening a run does not
        from ..numerics.objective.batches import positions_of_subset
        from ..tasks.task import parse_subsets

        subsets, on = parse_subsets(self.manifest.settings["subset"]), self.record.on
        positions = (
            None
            if on is None
            else positions_of_subset(subsets.get(on, subsets.get("")), self.record.total)
        )
        return None if positions is None else positions.numpy()

    @property
    def precision(self) -> str:
        """Return the precision of the gradients."""
        return self.manifest.settings["precision"]

    @property
    def precision_examples(self) -> int:
        """Return the most examples on which the error of the precision is measured; 0 for a term of
        the parameters.
        """
        settings, record = self.manifest.settings, self.record
        if record.on is None:
            return 0
        if settings["precision_check"] == "full":
            return record.examples
        if settings.get("norm_stats") == "batch":
            return min(record.batch_size, record.examples)
        return sampled_examples(record.examples)

    @property
    def norm_stats(self) -> str | None:
        """Return the statistics that normalisation layers use, "running", "batch" or
        "recalibrated"; None without such layers.
        """
        return self.manifest.norm_stats

    @cached_property
    def _rows(self) -> list[int]:
        """Return the committed rows, in the order of training."""
        waiting = set(self._commits.pending())
        return [row for row in self.manifest.in_order if row // self.manifest.span not in waiting]

    @property
    def complete(self) -> bool:
        """Tell whether every segment that the loss covers is committed."""
        return self._commits.is_complete()

    def progress(self) -> Progress:
        """Return the progress of this loss, from the commit markers."""
        manifest, markers = self.manifest, self.markers
        waiting = set(self._commits.pending())
        return {
            "spans_done": len({row // manifest.span for row in self._rows}),
            "spans": manifest.spans,
            "segments_done": len(self._rows),
            "segments": manifest.segments,
            "segments_underway": self._underway(waiting),
            "first_step": manifest.checkpoints[0].step,
            "last_step": manifest.checkpoints[-1].step,
            "steps_done": self._stretches(),
            "seconds": round(sum(marker["seconds"] for marker in markers), 3),
            "complete": self.complete,
            "behind": self.behind,
            "missing": sorted(waiting),
            "running": is_held(self.path),
        }

    def _underway(self, waiting: Collection[int]) -> float:
        """Return the finished segments that workers report for spans not committed yet."""
        return sum(
            report.of_losses / len(report.losses)
            for report in underway(self.path)
            if self.name in report.losses and report.span in waiting
        )

    def _stretches(self) -> list[list[int]]:
        """Return the first and the last step of every stretch of committed segments."""
        stretches = list[list[int]]()
        for row in self._rows:
            start, end = (checkpoint.step for checkpoint in self.manifest.ends_of(row))
            if stretches and stretches[-1][1] == start:
                stretches[-1][1] = end
            else:
                stretches.append([start, end])
        return stretches

    def holds(self, level: str) -> bool:
        """Tell whether the run keeps at least what a level of `--keep` keeps."""
        return holds(self.manifest.keep, level)

    def require(self, level: str, what: str) -> None:
        """Reject a request for which the run does not keep enough.

        Args:
            level: of `--keep` that is needed.
            what: is asked for, such as "shares of parameters that help".

        Raises:
            InputError: if the run keeps less; it names the level, and what to do.
        """
        if not self.holds(level) and self.manifest.sampled is not None and level in _OF_ALL:
            raise InputError(f"{what} {self.of_a_part()}")
        if not self.holds(level):
            raise InputError(
                f"{self.path} was made with --keep {self.manifest.keep}, but {what} need --keep "
                f"{level}. Run again into another directory: --keep {level} --out OTHER.lca."
            )

    def of_a_part(self) -> str:
        """Return the end of a sentence about results that a random part of the segments does not
        allow.
        """
        return (
            f"need every segment of the training, but {self.path} has a random part of them "
            f"(--segments {self.manifest.sampled}). Run again into another directory, without "
            "--segments: --out OTHER.lca."
        )

    def _open(self, part: str) -> xr.Dataset:
        import xarray as xr

        self.require(_LEVELS.get(part, "tensors"), part)
        store = CheckedStore(self.path, self.manifest, self.name, (part,))
        data: xr.Dataset = xr.open_zarr(store, group=part, consolidated=False, chunks=None)
        # other parts hold names of tensors, one of which may have this name
        if part in ("steps", "tensors", "histogram", "examples", "causes", "along", "path"):
            data = data.assign_coords(step_end=("step", self.manifest.step_ends))
        if self.record.groups is not None and part != "examples":
            data = data.assign_coords(group=("group", np.array(self.record.groups)))
            if part in ("steps", "tensors", "histogram", "causes", "along", "path"):
                data = data.assign_coords(examples=("group", np.array(self.record.counts)))
        all_rows = list(range(self.manifest.segments))
        return data if self._rows == all_rows else data.isel(step=self._rows)

    def _named(self, part: str) -> xr.Dataset:
        names = {tensor.key: tensor.spec.name for tensor in self.manifest.allocated}
        return self._open(part).rename_vars(names)[list(names.values())]

    @property
    def allocation(self) -> xr.Dataset:
        """Return the allocation, a variable per tensor under its PyTorch name, dims `(step[,
        group], "NAME:0", …)`, float32, in units of loss.
        """
        return self._named("allocation")

    @property
    def units(self) -> xr.Dataset:
        """Return sums per neuron or channel, one variable per tensor, dims `(step[, group],
        "NAME:unit")`, float32, in units of loss.
        """
        return self._named("units")

    @property
    def steps(self) -> xr.Dataset:
        """Return the segments, with `loss_start`, `loss_end`, `residual`, `evaluations`, `level`,
        `converged`, `error_bound` and `precision_error`.

        `weight` is Σ of the elements' weights (of each group); `remainder` is the allocation of the
        tensors that are not stored.
        """
        data = self._open("steps").load()
        data["converged"] = data["converged"] == 1
        return data

    @property
    def tensors(self) -> xr.Dataset:
        """Return the segments by group and tensor, with `allocated` and `motion` Σ|Δθ|; from
        `--keep statistics` on also the counts `helping` and `hurting`, and `gradient` Σ|mean
        gradient|.

        `replicates` is the allocation of each random part of a random subset, for `standard_error`.
        """
        specs = [tensor.spec for tensor in self.manifest.allocated]
        return (
            self._open("tensors")
            .load()
            .assign_coords(
                tensor=("tensor", np.array([spec.name for spec in specs], dtype=object)),
                kind=("tensor", np.array([spec.kind for spec in specs], dtype=object)),
                elements=("tensor", [spec.elements for spec in specs]),
            )
        )

    @property
    def examples(self) -> xr.Dataset:
        """Return the loss of every example, lazy, float32, for a loss with `per="example"`; for
        `per="element"` of every element, along an axis `element`.

        `allocated` (step, example, tensor) is the contribution of each tensor to the change of the
        example's loss on a segment, in units of loss; `loss_start`, `loss_end` and `residual`
        (step, example) close it: Σ allocated + residual = loss_end − loss_start. `weight` is the
        sum of the weights of the example's elements; if it is 0, so are the other numbers. The
        coordinate `example` is the position in the split, `group` the label of its group if the
        loss has groups, `text` its description by `Task.show`; `index` is the position of an
        element in its example.

        If an embedding and another operation share a tensor, as tied input and output do, `uses`
        (step, example, use) are its shares in `allocated` by operation, with the coordinates
        `used_tensor` and `operation`.

        Raises:
            InputError: if the loss has results neither per example nor per element.
        """
        if self.record.per is None:
            told = [name for name, record in self.manifest.losses.items() if record.per is not None]
            way_out = (
                f"Loss {told[0]!r} has: --loss {told[0]}."
                if told
                else 'Declare a loss with Loss(…, per="example") in the task, under another name, and '
                "run again."
            )
            raise InputError(
                f"loss {self.name!r} in {self.path} has no numbers of single examples. {way_out}"
            )
        data, positions = self._open("examples"), self.positions
        specs = [tensor.spec for tensor in self.manifest.allocated]
        per, numbers = self.record.per, np.arange(self.record.examples)
        numbers = numbers if positions is None else positions
        elements = (self.record.rows or 0) // self.record.examples  # of one example
        data = data.assign_coords(
            example=(per, np.repeat(numbers, elements)),
            tensor=("tensor", np.array([spec.name for spec in specs], dtype=object)),
            kind=("tensor", np.array([spec.kind for spec in specs], dtype=object)),
        )
        if "uses" in data:
            data = data.assign_coords(
                used_tensor=("use", np.array(data["uses"].attrs["tensor"], dtype=object)),
                operation=("use", np.array(data["uses"].attrs["operation"], dtype=object)),
            )
        if per == "element":
            index = np.tile(np.arange(elements), self.record.examples)
            data = data.assign_coords(index=(per, index))
        if self.record.texts is not None:
            texts = np.repeat(np.array(self.record.texts, dtype=object), elements)
            data = data.assign_coords(text=(per, texts))
        if self.record.groups is None:
            return data
        labels, codes = np.array(self.record.groups), data["group"]
        # the first committed row shows the groups; without one, they are unknown
        positions_of_labels = codes.isel(step=0).to_numpy() if self._rows else None
        data = data.drop_vars("group")
        if positions_of_labels is None:
            return data
        return data.assign_coords(group=("example", labels[positions_of_labels]))

    @property
    def causes(self) -> xr.Dataset:
        """Return `allocated` (step[, group], cause, tensor), the allocation by what moved the
        weights, float64, in units of loss, for a run with `--causes`.

        Causes are `signal`, `noise`, `momentum`, `decay` and `rest`, see
        `lca_posthoc.numerics.causes`; summed over them, `allocated` equals that of `tensors`.

        Raises:
            InputError: if the run was made without them.
        """
        if self.manifest.settings["signal"] is None:
            raise InputError(
                f"{self.path} was made without --causes. Run again with it into another directory: "
                "--causes --out OTHER.lca."
            )
        specs = [tensor.spec for tensor in self.manifest.allocated]
        return (
            self._open("causes")
            .load()
            .assign_coords(
                tensor=("tensor", np.array([spec.name for spec in specs], dtype=object)),
                kind=("tensor", np.array([spec.kind for spec in specs], dtype=object)),
            )
        )

    @property
    def other_path(self) -> xr.Dataset:
        """Return the change by another path through the same checkpoints, for a run with
        `--path-band`: `shift` (step[, group], tensor), float64, in units of loss.

        `doubled` is the segment's share of the line from one checkpoint to the next but one; both
        halves together add up to that line's allocation. Both are 0 on segments of one training
        step, and where there is no neighbour; see `lca_posthoc.numerics.path`.

        Raises:
            InputError: if the run was made without it.
        """
        if self.manifest.settings["path_band"] != "on":
            raise InputError(
                f"{self.path} was made without --path-band. Run again with it into another "
                "directory: --path-band on --out OTHER.lca."
            )
        specs = [tensor.spec for tensor in self.manifest.allocated]
        return (
            self._open("path")
            .load()
            .assign_coords(
                tensor=("tensor", np.array([spec.name for spec in specs], dtype=object)),
                kind=("tensor", np.array([spec.kind for spec in specs], dtype=object)),
            )
        )

    @property
    def along(self) -> xr.Dataset:
        """Return `allocated` (step[, group], direction), the loss change along directions, float64,
        in units of loss, for a run with `--along`.

        `remainder` (step[, group]) is the allocation of the rest of the motion: that of all tensors
        minus the directions. `motion` (step, direction) is how far the weights moved along each,
        `distance` (step) how far in total, and `captured` (step) the directions' share of its
        square; NaN where nothing moved.

        Raises:
            InputError: if the run was made without them.
        """
        if "directions" not in self.manifest.settings:
            raise InputError(
                f"{self.path} was made without --along. Run again with it into another directory: "
                "--along FILE --out OTHER.lca."
            )
        data = self._open("along").load()
        steps = self.steps
        whole = self.tensors["allocated"].sum("tensor")
        if "remainder" in steps:  # of tensors that are not stored
            whole = whole + steps["remainder"]
        squares = data["distance"] ** 2
        return data.assign(
            remainder=whole - data["allocated"].sum("direction"),
            captured=(data["motion"] ** 2).sum("direction") / squares.where(squares > 0),
        )

    @property
    def histogram(self) -> xr.Dataset:
        """Return the counts of single parameters' allocations between fixed edges (`edge`) on each
        segment, with exact zeros separate.
        """
        return self._open("histogram")

    @property
    def totals(self) -> xr.Dataset:
        """Return the totals per parameter, lazy, over all segments, dims `(total, "NAME:0", …)`:
        allocations, counts, turns.

        For a loss with groups they are of its weighted mean over the groups: the loss of the whole
        split.

        Raises:
            InputError: if the run is not complete, or keeps no totals.
        """
        import xarray as xr

        from .totals import joined_totals

        self.require("statistics", "totals over time")
        if not self.complete:
            raise InputError(
                f"loss {self.name!r} in {self.path} is not complete, so it has no totals yet. Run "
                "`lca run` again to finish it."
            )
        store = CheckedStore(self.path, self.manifest, self.name, tuple(TOTAL_FIELDS))
        windows = [self.manifest.rows_of(window) for window in range(self.manifest.windows)]
        borders = [self.manifest.follows(rows.start) for rows in windows[1:]]
        variables = {}
        for tensor in self.manifest.allocated:
            inner = tuple(f"{tensor.spec.name}:{axis}" for axis in range(len(tensor.spec.shape)))
            variables[tensor.spec.name] = joined_totals(
                store, tensor.key, self.record.unit, inner, borders
            )
        return xr.Dataset(variables, coords={"total": list(TOTALS)})

    @property
    def markers(self) -> list[Marker]:
        """Return the commit markers of the spans, with evaluations, forward passes, seconds,
        worker.

        Raises:
            LCAError: if a marker is damaged.
        """
        return self._commits.all_facts()


class Run(Mapping[str, LossResults]):
    """A run directory: its losses by name."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    def __getitem__(self, loss: str) -> LossResults:
        if loss not in self.manifest.losses:
            raise KeyError(no_loss(self.path, loss, self.manifest.losses))
        return LossResults(self.path, self.manifest, loss)

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.losses)

    def __len__(self) -> int:
        return len(self.manifest.losses)

    def __repr__(self) -> str:
        names = list(self)
        shown = ", ".join(
            f"{name if name.isprintable() else repr(name)} ({self[name]._state()})"
            for name in names[:_SHOWN]
        )
        more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        return f"<Run {str(self.path)!r}: {f'losses {shown}{more}' if names else 'no losses'}>"

    def _repr_html_(self) -> str:
        return run_html(self)


def open_run(path: str | Path) -> Run:
    """Open a run directory that `lca run` wrote, finished or not.

    Raises:
        LCAError: if `path` is not a run directory.
    """
    run = path_of(path)
    return Run(run, read_manifest(run))
