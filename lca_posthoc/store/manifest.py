"""What a run is made of, as `run.json` says it. Fixed when the run is created; losses and checkpoints are only ever added."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from ..trajectory import Checkpoint, TensorSpec, is_statistic

Identity = list[dict[str, float] | None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model, its name inside the checkpoint files, and its key in the store."""

    spec: TensorSpec
    source: str
    key: str


@dataclass(frozen=True)
class LossRecord:
    """What identifies a loss: its settings, and its identity at the first and last checkpoint (null where not finite).

    `key` is its name in the store; `on` is null for a term of the parameters; `examples` of the `total` of the split are in the
    subset. `groups` are labels and `counts` their examples (null without groups), taken `block` at a time. `along` names the
    grouped loss in the order of whose groups the batches of this one are taken, `replicates` counts the random parts they are
    taken in instead, for standard errors. `batch_size` is used for every evaluation of it; `calibration` turns
    Σ|(g₁ − g₀)·Δθ| into an estimate of the trapezoid's error (null for other rules); `measured` says whether a few segments are
    evaluated one precision higher as well; `scale` is |loss| at the first checkpoint over the whole split, rounded to six digits,
    of which tolerances are shares (null where none is). `covers` is how many
    segments the loss is over where checkpoints were added since that nobody asked of it yet, null where it is over all of them.
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
    scale: float | None = None
    covers: int | None = None

    @property
    def blocks(self) -> list[range]:
        """The groups in the blocks they are taken in; a loss without groups is one."""
        if self.groups is None or self.block is None:
            return [range(len(self.groups or [None]))]
        return [range(at, min(at + self.block, len(self.groups))) for at in range(0, len(self.groups), self.block)]


@dataclass(frozen=True)
class Manifest:
    """Everything about a run but its numbers.

    `span` and `window` count segments per span and spans per window of the totals. `settings` are the ones that decide
    results; `provenance` is recorded and never compared. `id` is made with the run and tells it from every other one.
    """

    root: str
    tensors: list[StoredTensor]
    checkpoints: list[Checkpoint]
    span: int
    window: int
    settings: dict[str, Any]
    losses: dict[str, LossRecord]
    provenance: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def keep(self) -> str:
        """What the run keeps: "parameters", "units" or "tensors"."""
        return str(self.settings["keep"])

    @property
    def norm_stats(self) -> str | None:
        """Whose statistics normalisation layers have: "running", "batch" or "recalibrated"; None where the choice changes nothing."""
        mode = str(self.settings.get("norm_stats", "running"))
        return mode if mode == "batch" or any(is_statistic(tensor.spec.name) for tensor in self.tensors) else None

    @property
    def steps(self) -> list[int]:
        """The training step each segment starts from."""
        return [checkpoint.step for checkpoint in self.checkpoints[:-1]]

    @property
    def segments(self) -> int:
        """How many segments the trajectory has."""
        return len(self.checkpoints) - 1

    @property
    def spans(self) -> int:
        """How many spans they are cut into; the last may be shorter."""
        return -(-self.segments // self.span)

    @property
    def windows(self) -> int:
        """How many windows of spans the totals have."""
        return -(-self.spans // self.window)

    @property
    def allocated(self) -> list[StoredTensor]:
        """The tensors with an allocation that is kept."""
        patterns = self.settings["tensors"]
        return [
            tensor
            for tensor in self.tensors
            if tensor.spec.kind != "state"
            and (not patterns or any(fnmatchcase(tensor.spec.name, pattern) for pattern in patterns))
        ]

    @property
    def parameters(self) -> int:
        """How many parameters there are; buffers are not counted."""
        return sum(tensor.spec.elements for tensor in self.tensors if tensor.spec.kind == "parameter")

    def rows(self, span: int) -> slice:
        """The segments of a span."""
        return slice(span * self.span, span * self.span + self.length(span))

    def length(self, span: int) -> int:
        """How many segments a span has."""
        return min(self.span, self.segments - span * self.span)

    def length_of(self, window: int) -> int:
        """How many segments a window has."""
        rows = self.rows_of(window)
        return int(rows.stop - rows.start)

    def ends(self, rows: slice) -> tuple[int, int]:
        """The training steps of the checkpoints at both ends of some segments."""
        return self.checkpoints[rows.start].step, self.checkpoints[rows.stop].step

    def spans_of(self, window: int) -> range:
        """The spans of a window."""
        return range(window * self.window, min((window + 1) * self.window, self.spans))

    def rows_of(self, window: int) -> slice:
        """The segments of a window."""
        spans = self.spans_of(window)
        return slice(self.rows(spans.start).start, self.rows(spans.stop - 1).stop)

    def is_full(self, window: int) -> bool:
        """Whether no checkpoint that may still come can add to a window."""
        return (window + 1) * self.window * self.span <= self.segments

    def covered_by(self, record: LossRecord) -> Manifest:
        """Return the same run up to the last checkpoint one loss covers, from which everything stored for that loss follows."""
        if record.covers is None or record.covers >= self.segments:
            return self
        return replace(self, checkpoints=self.checkpoints[: record.covers + 1])

    def of(self, loss: str) -> Manifest:
        """Return `covered_by` of a loss, by its name."""
        return self.covered_by(self.losses[loss])

    def meant_by(self, name: str) -> list[str]:
        """Return the losses a name of the task stands for: that loss, or one for each entry of the dict it returned."""
        return [name] if name in self.losses else [loss for loss in self.losses if loss.startswith(f"{name}/")]

    def with_losses(self, losses: dict[str, LossRecord]) -> Manifest:
        """The same run with more losses."""
        return replace(self, losses={**self.losses, **losses})

    def with_provenance(self, provenance: dict[str, Any]) -> Manifest:
        """The same run with some of its provenance brought up to date."""
        return replace(self, provenance={**self.provenance, **provenance})

    def without(self, loss: str) -> Manifest:
        """The same run with one loss fewer."""
        return replace(self, losses={name: record for name, record in self.losses.items() if name != loss})

    def with_checkpoints(self, checkpoints: list[Checkpoint], identities: Mapping[str, Identity]) -> Manifest:
        """Return the same run on other checkpoints.

        Losses with a new identity cover all of them. The others cover what they covered, and are known at their last checkpoint as
        long as it is the same.
        """
        losses = {}
        for name, record in self.losses.items():
            if name in identities:
                losses[name] = replace(record, identity=identities[name], covers=None)
                continue
            covers = self.of(name).segments
            same = checkpoints[covers] == self.checkpoints[covers]
            losses[name] = replace(
                record,
                identity=record.identity if same else [record.identity[0], None],
                covers=covers if covers < len(checkpoints) - 1 else None,
            )
        return replace(self, checkpoints=checkpoints, losses=losses)
