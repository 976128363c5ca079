"""Store the sums of a span's shards below a run: workers write them, the driver and the committing
worker read them.

Sums count only for the run, losses, data and checkpoints they were computed from. Any others are
ignored, and recomputed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
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
from .requests import TaskSetup, from_plain, to_plain
from .shards import shards_of

if TYPE_CHECKING:
    from ..numerics.segments import Axes


@dataclass(frozen=True, kw_only=True)
class ShardSums:
    """The sums of a loss over one shard at a node, computed in batches of `batch_size`; 0 for a
    term of the parameters.
    """

    loss: str
    node: Node
    shard: int
    batch_size: int
    sums: PartialSums


@dataclass
class KnownSpan:
    """The sums of a span that exist so far.

    Attributes:
        sums: of shards, and the segments allocated from them.
        seconds: of workers, spent on these sums.
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
        self._lengths = covered.lengths if manifest.settings["path_band"] == "on" else None
        self.axes = _axes_of(manifest)
        shapes = {tensor.spec.name: tensor.spec.shape for tensor in manifest.tensors}
        self._units = {
            name: 1 if axis is None else shapes[name][axis] for name, axis in self.axes.items()
        }

    def read(self) -> KnownSpan:
        """Return the sums that the span's files hold."""
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
                lengths=self._lengths,
            )
        )
        for name in names_of_sums(self._run, self._span):
            self.take(known, name)
        return known

    def take(self, known: KnownSpan, name: str) -> bool:
        """Read the file of a request; tell whether it exists, is whole, and is of this run, these
        losses and these checkpoints.

        Args:
            known: takes the sums.
            name: of the file.
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
        for index in about["not_finite"]:
            known.sums.take_not_finite(index)
        for entry in about["entries"]:
            node = from_plain(Node, entry["node"])
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
        not_finite: Collection[int],
        *,
        seconds: float,
        durable: bool,
    ) -> None:
        """Write the sums of a request, Σ|θ′ − θ| of each tensor on some segments, and which
        checkpoints beside the span are not finite.

        Args:
            name: of the file.
            entries: the sums.
            distances: by segment and tensor.
            not_finite: checkpoints beside the span with NaN or Inf.
            seconds: spent on computing them.
            durable: whether to flush the file to disk before returning.
        """
        positions = {index for entry in entries for index in entry.node.checkpoints}
        positions |= {end for start in distances for end in ends_of(start)}
        positions |= {*not_finite}
        about = {
            "origins": {entry.loss: self._origin(entry.loss) for entry in entries},
            "checkpoints": {str(index): self._checkpoint(index) for index in sorted(positions)},
            "seconds": round(seconds, 3),
            "distances": list(distances),
            "not_finite": sorted(not_finite),
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
        numbers = np.concatenate(parts) if parts else np.zeros(0)
        write_sums(self._run, name, about, numbers, durable)

    def _described(self, entry: ShardSums) -> dict[str, object]:
        unreached = self._units.keys() - entry.sums.gradient.keys() if entry.node.along else ()
        return {
            "loss": entry.loss,
            "node": to_plain(entry.node),
            "shard": entry.shard,
            "batch_size": entry.batch_size,
            "unreached": sorted(unreached),
        }

    # --- the origin of sums

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
        """Return a digest of everything but the checkpoints that the sums of a loss follow from."""
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
    """Return the unit axes over which gradients are summed, for every tensor of the allocation."""
    axes = unit_axes(
        [tensor.spec for tensor in manifest.tensors if tensor.spec.kind != "state"],
        [tensor.spec for tensor in manifest.allocated],
        manifest.keep,
    )
    assert axes is not None, "only what is kept of tensors or units is computed in shards"
    return axes
