"""Compute how far tensors move between two points."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .directions import Motion, blocks
from .readings import Reading
from .rows import is_small, rows_of


class Distances(Mapping[str, float]):
    """Hold Σ|end − start| of some tensors in float64.

    Args:
        parts: pairs of tensor names and partial sums, (tensors, pieces), that add up to the
            distance of each tensor.

    Attributes:
        readings: the numbers, which are copied to the host when first needed.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[str], Reading]]) -> None:
        self._names = [names for names, _ in parts]
        self.readings = [reading for _, reading in parts]

    @classmethod
    def known(cls, distances: Mapping[str, float]) -> Distances:
        """Create an instance from known distances."""
        numbers = np.array(list(distances.values()))[:, None]
        return cls([(tuple(distances), Reading.known(numbers))])

    @functools.cached_property
    def _known(self) -> dict[str, float]:
        return {
            name: math.fsum(pieces)
            for names, reading in zip(self._names, self.readings, strict=True)
            for name, pieces in zip(names, reading.numbers.tolist(), strict=True)
        }

    def __getitem__(self, name: str) -> float:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


@torch.no_grad()
def distances(motion: Motion, names: Iterable[str]) -> Distances:
    """Compute Σ|end − start| of some tensors in float64.

    Args:
        motion: start and end.
        names: names of the tensors.
    """
    parts: list[tuple[Sequence[str], Reading]] = []
    starts, ends = dict[str, Tensor](), dict[str, Tensor]()  # small tensors
    for name in names:
        start, end = motion.start[name], motion.end[name]
        if is_small(start.shape):
            starts[name], ends[name] = start, end
            continue
        start, end = start.reshape(1, -1), end.reshape(1, -1)
        pieces = [
            end[rows, columns].to(torch.float64, copy=True).sub_(start[rows, columns]).abs_().sum()
            for rows, columns in blocks(*start.shape)
        ]
        parts.append(((name,), Reading(torch.stack(pieces)[None])))
    for row in rows_of(starts).every:
        before, after = (row.of(point).to(torch.float64, copy=True) for point in (starts, ends))
        parts.append((row.names, Reading(row.sums(after.sub_(before).abs_()).T)))
    return Distances(parts)
