"""The sums of shards of one span: written below a run by workers, read back by the driver and by
the worker that commits the span.

Sums count only for the run, the losses, the data and the checkpoints they were computed from; the
others are left out, and computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..numerics.nodes import Node, ends_of
from ..numerics.objective import PartialSums
from ..numerics.shards import ShardedSpan
from ..numerics.statistics import unit_axes
from ..results import Manifest, names_of_sums, read_sums, write_sums
from ..tasks.task import digest
from .method import method_of
from .requests import TaskSetup
from .shards import shards_of

if TYPE_CHECKING:
    from ..numerics.segments import Axes


@dataclass(frozen=True, kw_only=True)
class ShardSums:
    """The sums of a loss over one shard at a node, computed in batches of `batch_size`; 0 of a term
    of the parameters.
    """

    loss: str
    node: Node
    shard: int
    batch_size: int
    sums: PartialSums


@dataclass
class KnownSpan:
    """The sums of a span that are known.

    Attributes:
        sums: of shards, and the segments allocated from them.
        seconds: of workers, that these took.
        batch_sizes: of each loss, the smallest batch in which sums were computed.
    """

    sums: ShardedSpan
    seconds: float = 0.0
    batch_sizes: dict[str, int] = field(default_factory=dict)


class SumsFiles:
    """The files of the sums of one span.

    Args:
        run: directory of the run.
        manifest: of the run.
        span: its number.
        losses: those that are computed in shards.
        setup: of the task.

    Attributes:
        starts: the segments of the span, by the positions of the checkpoints they start from.
        axes: of the units over which gradients are summed, by tensor.
    """

    def __init__(
        self, run: Path, manifest: Manifest, span: int, losses: Sequence[str], setup: TaskSetup
    ) -> None:
        self._run, self._manifest, self._span, self._losses = run, manifest, span, losses
        self._setup = setup
        covered = manifest.of(losses[0])
        self.starts = covered.starts[covered.rows(span)]
        self.axes = _axes_of(manifest)
        shapes = {tensor.spec.name: tensor.spec.shape for tensor in manifest.tensors}
        self._units = {
            name: 1 if axis is None else shapes[name][axis] for name, axis in self.axes.items()
        }

    def read(self) -> KnownSpan:
        """Return what is known of the span."""
        manifest = self._manifest
        checkpoints = {end for start in self.starts for end in ends_of(start)}
        records = {loss: manifest.losses[loss] for loss in self._losses}
        known = KnownSpan(
            ShardedSpan(
                starts=self.starts,
                steps={index: manifest.checkpoints[index].step for index in checkpoints},
                shards={loss: shards_of(manifest, loss) for loss in self._losses},
                units=self._units,
                method=method_of(self._setup.settings, records),
            )
        )
        for name in names_of_sums(self._run, self._span):
            self.take(known, name)
        return known

    def take(self, known: KnownSpan, name: str) -> bool:
        """Take in the file of a request; tell whether it is there, whole, and of this run, these
        losses and these checkpoints.
        """
        stored = read_sums(self._run, name)
        if stored is None or not self._is_of_this_span(stored[0]):
            return False
        about, numbers = stored
        values = iter(numbers.tolist())

        def next_numbers(count: int) -> list[float]:
            return [next(values) for _ in range(count)]

        for start in about["distances"]:
            of_tensors = next_numbers(len(self._units))
            known.sums.take_distance(start, dict(zip(self._units, of_tensors, strict=True)))
        for entry in about["entries"]:
            node = Node(entry["checkpoint"], entry["x"], tuple(entry["along"]))
            loss, weight = next_numbers(2)
            gradient = {
                tensor: torch.tensor(
                    next_numbers(len(node.along) * units), dtype=torch.float64
                ).reshape(len(node.along), units)
                for tensor, units in self._units.items()
                if node.along and tensor not in entry["unreached"]
            }
            sums, name = PartialSums(loss, weight, gradient), entry["loss"]
            known.sums.take(name, node, entry["shard"], sums)
            size = entry["batch_size"]
            known.batch_sizes[name] = min(known.batch_sizes.get(name, size), size)
        known.seconds += about["seconds"]
        return True

    def write(
        self,
        name: str,
        entries: Sequence[ShardSums],
        distances: Mapping[int, Mapping[str, float]],
        *,
        seconds: float,
        durable: bool,
    ) -> None:
        """Write the sums of a request, and Σ|θ′ − θ| of each tensor on some segments.

        Args:
            name: of the file.
            entries: the sums.
            distances: by segment and tensor.
            seconds: that they took.
            durable: whether they are on the disk when this returns.
        """
        positions = {index for entry in entries for index in entry.node.checkpoints}
        positions |= {end for start in distances for end in ends_of(start)}
        about = {
            "origins": {entry.loss: self._origin(entry.loss) for entry in entries},
            "checkpoints": {str(index): self._checkpoint(index) for index in sorted(positions)},
            "seconds": round(seconds, 3),
            "distances": list(distances),
            "entries": [self._described(entry) for entry in entries],
        }
        parts = [
            np.array([of_segment[tensor] for tensor in self._units])
            for of_segment in distances.values()
        ]
        for entry in entries:
            parts.append(np.array([entry.sums.loss, entry.sums.weight]))
            parts += [
                entry.sums.gradient[tensor].numpy().reshape(-1)
                for tensor in self._units
                if tensor in entry.sums.gradient
            ]
        write_sums(self._run, name, about, np.concatenate(parts), durable)

    def _described(self, entry: ShardSums) -> dict[str, object]:
        unreached = self._units.keys() - entry.sums.gradient.keys() if entry.node.along else ()
        return {
            "loss": entry.loss,
            "checkpoint": entry.node.checkpoint,
            "x": entry.node.x,
            "along": list(entry.node.along),
            "shard": entry.shard,
            "batch_size": entry.batch_size,
            "unreached": sorted(unreached),
        }

    # --- what sums are of

    def _is_of_this_span(self, about: Mapping[str, Any]) -> bool:
        origins, checkpoints = about["origins"], about["checkpoints"]
        return all(
            loss in self._losses and origin == self._origin(loss)
            for loss, origin in origins.items()
        ) and all(
            int(index) < len(self._manifest.checkpoints) and facts == self._checkpoint(int(index))
            for index, facts in checkpoints.items()
        )

    def _checkpoint(self, index: int) -> list[int]:
        checkpoint = self._manifest.checkpoints[index]
        return [checkpoint.step, checkpoint.size, checkpoint.fingerprint]

    def _origin(self, loss: str) -> str:
        """Return a digest of everything that sums of a loss follow from, beside checkpoints."""
        record = replace(self._manifest.losses[loss], identity=[], covers=None)
        facts = [
            self._manifest.id,
            loss,
            asdict(record),
            shards_of(self._manifest, loss),
            digest(self._setup.task),
            self._setup.digests,
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _axes_of(manifest: Manifest) -> Axes:
    """Return the axes over whose units gradients are summed, of every tensor of the allocation."""
    axes = unit_axes(
        [tensor.spec for tensor in manifest.tensors if tensor.spec.kind != "state"],
        [tensor.spec for tensor in manifest.allocated],
        manifest.keep,
    )
    assert axes is not None, "only what is kept of tensors or units is computed in shards"
    return axes
