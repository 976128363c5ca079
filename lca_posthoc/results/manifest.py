"""Define the manifest of a run, which `run.json` holds: fixed at its creation, except that losses
and checkpoints may be added.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from ..checkpoints.trajectory import Checkpoint, TensorSpec, is_statistic
from ..numerics.schema import SiteRecord, uses_of
from ..numerics.settings import Settings

Identity = list[dict[str, float] | None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model, its name inside the checkpoint files, and its key in the store."""

    spec: TensorSpec
    source: str
    key: str


@dataclass(frozen=True, kw_only=True)
class LossRecord:
    """The settings that identify a loss, and its values at the first and last checkpoint.

    Attributes:
        key: its name in the store.
        on: its split; None for a term of the parameters.
        kind: of the loss, as the task declares it.
        examples: of the split that are in the subset.
        total: examples of the split.
        groups: their labels; None for a loss without groups.
        counts: examples of each group; None without groups.
        block: how many groups are evaluated together; None without groups.
        along: the grouped loss whose order of examples its batches follow; None for none.
        replicates: random parts into which the batches are divided instead, for standard errors; 0
            for none.
        batch_size: of every evaluation.
        calibration: turns Σ|(g₁ − g₀)·Δθ| into an estimate of the trapezoid's error; None for other
            rules.
        measured: whether a few segments are evaluated one precision higher as well.
        identity: its values at the first and at the last checkpoint; None where not finite.
        unit: of single parameters' sums over time, in units of loss, see `schema.unit_of_totals`.
        scale: |loss| at the first checkpoint over the whole split, rounded to six digits, of which
            tolerances are shares; None if no tolerance is a share.
        begun: how many segments the run had when checkpoints were last added, and size and CRC-32
            of the file with the waiting totals of its last window; None if no such totals are
            needed.
        covers: the number of segments it covers if the run has more; None if it covers all.
        sites: where the examples are in the model's computations, if examples of a batch are
            separated; None if a batch has one group, or one example of a loss with per-example
            results.
        per: "example" or "element" for a loss with results per example or element; else None.
        rows: the number of these examples or elements; else None.
        texts: descriptions of the examples; None if there are none.
    """

    key: str
    on: str | None
    kind: str
    examples: int
    total: int
    groups: list[int] | list[str] | None
    counts: list[int] | None
    block: int | None
    along: str | None
    replicates: int
    batch_size: int
    calibration: float | None
    measured: bool
    identity: Identity
    unit: float
    scale: float | None = None
    begun: list[int] | None = None
    covers: int | None = None
    sites: list[SiteRecord] | None = None
    per: str | None = None
    rows: int | None = None
    texts: list[str] | None = None

    @property
    def blocks(self) -> list[range]:
        """Return the blocks of groups that are evaluated together; a loss without groups is one
        block of one.
        """
        if self.groups is None or self.block is None:
            return [range(len(self.groups or [None]))]
        return [
            range(start, min(start + self.block, len(self.groups)))
            for start in range(0, len(self.groups), self.block)
        ]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a run except its numbers.

    Attributes:
        root: the directory of the checkpoints.
        tensors: of the model.
        checkpoints: of the trajectory, in ascending order of steps.
        starts: the position in `checkpoints` where the segment of each row of the results starts;
            it ends at the next checkpoint. Ascending, except for a random sample, whose rows are in
            the order of drawing.
        breaks: positions in `checkpoints` that no segment follows: the gap up to the next one is
            skipped.
        span: segments in a span.
        window: spans in a window of the totals.
        settings: those that decide results.
        losses: by name.
        provenance: recorded and never compared.
        packed: whether small chunks of a span lie in one file, and Zarr's metadata is omitted, as
            in an object store.
        id: unique to the run.
    """

    root: str
    tensors: list[StoredTensor]
    checkpoints: list[Checkpoint]
    starts: list[int]
    breaks: list[int]
    span: int
    window: int
    settings: Settings
    losses: dict[str, LossRecord]
    provenance: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def keep(self) -> str:
        """Return the level of `--keep`: one of `KEEP`."""
        keep = self.settings["keep"]
        assert keep is not None, "a run is laid out once its level is chosen"
        return keep

    @property
    def sampled(self) -> str | None:
        """Return the random part of the segments, as `--segments` gives it; None for all."""
        return self.settings.get("segments")

    @property
    def norm_stats(self) -> str | None:
        """Return the statistics that normalisation layers use: "running", "batch" or
        "recalibrated"; None if the choice changes nothing.
        """
        mode = self.settings.get("norm_stats", "running")
        return (
            mode
            if mode == "batch" or any(is_statistic(tensor.spec.name) for tensor in self.tensors)
            else None
        )

    @property
    def steps(self) -> list[int]:
        """Return the training step each segment starts from, row by row."""
        return [self.checkpoints[start].step for start in self.starts]

    @property
    def step_ends(self) -> list[int]:
        """Return the training step each segment ends at, row by row."""
        return [self.checkpoints[start + 1].step for start in self.starts]

    @property
    def lengths(self) -> list[int | None]:
        """Return the training steps from each checkpoint to the next; None where no segment follows
        it.
        """
        steps = [checkpoint.step for checkpoint in self.checkpoints]
        return [
            None if place in self.breaks else after - before
            for place, (before, after) in enumerate(itertools.pairwise(steps))
        ]

    @property
    def segments(self) -> int:
        """Return the number of segments of the run."""
        return len(self.starts)

    @property
    def all_segments(self) -> int:
        """Return the number of segments between the checkpoints, of which a sample has some."""
        return len(self.checkpoints) - 1 - len(self.breaks)

    @property
    def steps_seen(self) -> tuple[int, int]:
        """Return the number of training steps in segments between the checkpoints, and from the
        first checkpoint to the last.
        """
        steps = [checkpoint.step for checkpoint in self.checkpoints]
        all_steps = steps[-1] - steps[0]
        return all_steps - sum(steps[place + 1] - steps[place] for place in self.breaks), all_steps

    @property
    def in_order(self) -> list[int]:
        """Return the rows in the order of training."""
        return sorted(range(self.segments), key=self.starts.__getitem__)

    @property
    def spans(self) -> int:
        """Return the number of spans the segments are cut into; the last may be shorter."""
        return -(-self.segments // self.span)

    @property
    def windows(self) -> int:
        """Return the number of windows of spans that the totals have."""
        return -(-self.spans // self.window)

    @property
    def allocated(self) -> list[StoredTensor]:
        """Return the tensors whose allocation is stored."""
        patterns = self.settings["tensors"]
        return [
            tensor
            for tensor in self.tensors
            if tensor.spec.kind != "state"
            and (
                not patterns or any(fnmatchcase(tensor.spec.name, pattern) for pattern in patterns)
            )
        ]

    @property
    def parameters(self) -> int:
        """Return the number of single parameters, without buffers."""
        return sum(
            tensor.spec.elements for tensor in self.tensors if tensor.spec.kind == "parameter"
        )

    def rows(self, span: int) -> slice:
        """Return the segments of a span."""
        return slice(span * self.span, span * self.span + self.length(span))

    def length(self, span: int) -> int:
        """Return the number of segments of a span."""
        return min(self.span, self.segments - span * self.span)

    def length_of(self, window: int) -> int:
        """Return the number of segments of a window."""
        rows = self.rows_of(window)
        return int(rows.stop - rows.start)

    def ends(self, rows: slice) -> tuple[int, int]:
        """Return the first and the last training step of some segments."""
        starts = self.starts[rows]
        return self.checkpoints[min(starts)].step, self.checkpoints[max(starts) + 1].step

    def ends_of(self, row: int) -> tuple[Checkpoint, Checkpoint]:
        """Return the checkpoints at both ends of a segment."""
        start = self.starts[row]
        return self.checkpoints[start], self.checkpoints[start + 1]

    def reads(self, rows: slice) -> set[int]:
        """Return the positions of the checkpoints that the replay of some segments reads.

        These are their ends, with causes those before them (for momentum), with path bands those on
        both sides.
        """
        bends = self.settings["path_band"] == "on"
        before = 1 if bends or self.settings["signal"] is not None else 0
        after = 1 if bends else 0
        positions = {
            position
            for start in self.starts[rows]
            for position in range(start - before, start + 2 + after)
        }
        return positions.intersection(range(len(self.checkpoints)))

    def follows(self, row: int) -> bool:
        """Tell whether the segment of a row starts where that of the row before ends."""
        return row > 0 and self.starts[row - 1] + 1 == self.starts[row]

    def stretches(self, span: int) -> list[list[int]]:
        """Return the rows of a span in the order of training, cut where a segment does not start
        where the one before ends.
        """
        rows = self.rows(span)
        return neighbours(range(rows.start, rows.stop), self.starts)

    def spans_of(self, window: int) -> range:
        """Return the spans of a window."""
        return range(window * self.window, min((window + 1) * self.window, self.spans))

    def rows_of(self, window: int) -> slice:
        """Return the segments of a window."""
        spans = self.spans_of(window)
        return slice(self.rows(spans.start).start, self.rows(spans.stop - 1).stop)

    def window_of(self, segment: int) -> int:
        """Return the window a segment is in."""
        return segment // (self.span * self.window)

    def covered_by(self, record: LossRecord) -> Manifest:
        """Return the run up to the last checkpoint that one loss covers, which determines
        everything stored for that loss.
        """
        if record.covers is None or record.covers >= self.segments:
            return self
        starts = self.starts[: record.covers]
        if self.sampled is not None:  # from all of training
            return replace(self, starts=starts)
        last = starts[-1] + 1
        breaks = [start for start in self.breaks if start < last]
        return replace(self, checkpoints=self.checkpoints[: last + 1], starts=starts, breaks=breaks)

    def uses(self, record: LossRecord) -> dict[str, tuple[str, ...]]:
        """Return the operations in which a loss with per-example results uses each tensor with
        separated uses, see `uses_of`.
        """
        if record.per is None:
            return {}
        told = uses_of((site["operation"], site["tensors"]) for site in record.sites or ())
        names = [tensor.spec.name for tensor in self.allocated]
        return {name: told[name] for name in names if name in told}

    def of(self, loss: str) -> Manifest:
        """Return `covered_by` of a loss, by its name."""
        return self.covered_by(self.losses[loss])

    def meant_by(self, name: str) -> list[str]:
        """Return the losses that a name of the task stands for: that loss, or one for each entry of
        the dict it returned.
        """
        return (
            [name]
            if name in self.losses
            else [loss for loss in self.losses if loss.startswith(f"{name}/")]
        )

    def with_losses(self, losses: dict[str, LossRecord]) -> Manifest:
        """Return the run with more losses."""
        return replace(self, losses={**self.losses, **losses})

    def with_provenance(self, provenance: Mapping[str, object]) -> Manifest:
        """Return the run with updated provenance."""
        return replace(self, provenance={**self.provenance, **provenance})

    def without(self, loss: str) -> Manifest:
        """Return the run without one loss."""
        return replace(
            self, losses={name: record for name, record in self.losses.items() if name != loss}
        )

    def grown_to(self, larger: Manifest, identities: Mapping[str, Identity]) -> Manifest:
        """Return the run with the checkpoints and the segments of another one.

        Losses with a new identity cover all of them. The others cover the same segments as before,
        and their value at the last of these checkpoints stays recorded while it is the same
        checkpoint.

        Args:
            larger: has the checkpoints and segments.
            identities: new ones, by loss.
        """
        losses = {}
        for name, record in self.losses.items():
            if name in identities:
                losses[name] = replace(record, identity=identities[name], covers=None)
                continue
            covered = self.of(name)
            last = len(covered.checkpoints) - 1
            same = larger.checkpoints[last] == covered.checkpoints[last]
            losses[name] = replace(
                record,
                identity=record.identity if same else [record.identity[0], None],
                covers=covered.segments if covered.segments < larger.segments else None,
            )
        settings: Settings = {**self.settings, "segments": larger.settings["segments"]}
        return replace(
            self,
            checkpoints=larger.checkpoints,
            starts=larger.starts,
            breaks=larger.breaks,
            settings=settings,
            losses=losses,
        )


def starts_between(checkpoints: int, breaks: Iterable[int]) -> list[int]:
    """Return the positions of all checkpoints that segments start from; see `Manifest`.

    >>> starts_between(5, [1])
    [0, 2, 3]

    Args:
        checkpoints: how many there are.
        breaks: positions that no segment follows.
    """
    left_out = {*breaks}
    return [start for start in range(checkpoints - 1) if start not in left_out]


def neighbours(rows: Iterable[int], starts: Sequence[int]) -> list[list[int]]:
    """Return rows in the order of training, cut where a segment does not start where the one
    before ends.

    Args:
        rows: of segments.
        starts: where each row's segment starts, see `Manifest`.

    >>> neighbours(range(5), [3, 0, 1, 7, 4])
    [[1, 2], [0, 4], [3]]
    """
    stretches = list[list[int]]()
    for row in sorted(rows, key=starts.__getitem__):
        if stretches and starts[stretches[-1][-1]] + 1 == starts[row]:
            stretches[-1].append(row)
        else:
            stretches.append([row])
    return stretches
