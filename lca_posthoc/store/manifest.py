"""`run.json`: what a run is made of. Fixed when the run is created; losses and checkpoints are only ever added."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import InputError, LCAError
from ..trajectory import Checkpoint, TensorSpec
from .files import write_whole

FORMAT = 1
Identity = list[dict[str, float] | None]
FILE = "run.json"


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
    evaluated one precision higher as well.
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
    results; `provenance` is recorded and never compared.
    """

    root: str
    tensors: list[StoredTensor]
    checkpoints: list[Checkpoint]
    span: int
    window: int
    settings: dict[str, Any]
    losses: dict[str, LossRecord]
    provenance: dict[str, Any] = field(default_factory=dict)

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

    def spans_of(self, window: int) -> range:
        """The spans of a window."""
        return range(window * self.window, min((window + 1) * self.window, self.spans))

    def is_full(self, window: int) -> bool:
        """Whether no checkpoint that may still come can add to a window."""
        return (window + 1) * self.window * self.span <= self.segments

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
        """The same run on other checkpoints; the identity of a loss at the last one is new, or unknown."""
        losses = {
            name: replace(record, identity=identities.get(name, [record.identity[0], None]))
            for name, record in self.losses.items()
        }
        return replace(self, checkpoints=checkpoints, losses=losses)


def write_manifest(manifest: Manifest, run: Path) -> None:
    """Write `run.json` whole."""
    document = {
        "format": FORMAT,
        "root": manifest.root,
        "tensors": [{**asdict(tensor.spec), "source": tensor.source, "key": tensor.key} for tensor in manifest.tensors],
        "checkpoints": [
            [each.step, [str(file) for file in each.files], each.size, each.fingerprint]
            for each in manifest.checkpoints
        ],
        "span": manifest.span,
        "window": manifest.window,
        "settings": manifest.settings,
        "losses": {name: asdict(record) for name, record in manifest.losses.items()},
        "provenance": manifest.provenance,
    }
    write_whole(run / FILE, json.dumps(document, indent=1, allow_nan=False).encode())


def read_manifest(run: Path) -> Manifest:
    """Read `run.json`.

    Raises:
        LCAError: where `run` is not a run directory, or one of another format.
    """
    try:
        document = json.loads((run / FILE).read_text())
        if document["format"] != FORMAT:
            raise LCAError(
                f"{run} has format {document['format']}, this release reads format {FORMAT}. Use the release that wrote it "
                f"(recorded: {document.get('provenance', {}).get('lca_posthoc', 'unknown')})."
            )
        return _parsed(document)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{run} is not a run directory: it has no {FILE}. Give the directory `lca run` wrote (CKPTS.lca)."
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise LCAError(
            f"{run / FILE} cannot be read: {type(error).__name__}: {error}. Restore it from a copy."
        ) from None


def _parsed(document: dict[str, Any]) -> Manifest:
    tensors = []
    for entry in document["tensors"]:
        spec = TensorSpec(
            entry["name"], entry["kind"], tuple(entry["shape"]), tuple(entry["aliases"]), entry["unit_axis"]
        )
        tensors.append(StoredTensor(spec, entry["source"], entry["key"]))
    return Manifest(
        document["root"],
        tensors,
        [
            Checkpoint(step, tuple(Path(file) for file in files), size, crc)
            for step, files, size, crc in document["checkpoints"]
        ],
        document["span"],
        document["window"],
        document["settings"],
        {name: LossRecord(**record) for name, record in document["losses"].items()},
        document["provenance"],
    )
