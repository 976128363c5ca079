"""Numbers of several tensors that lie in one row, so that one operation takes all of them: for small
models a device takes longer to begin an operation than to do it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from .readings import Numbers, Reading


class Units:
    """The units of some tensors in a row, those of one tensor after those of the one before.

    Args:
        counts: of units, by tensor.

    Attributes:
        places: where those of each tensor are in the row.
        count: of all.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        ends = list(itertools.accumulate(counts.values()))
        self.places = {
            name: slice(end - units, end)
            for (name, units), end in zip(counts.items(), ends, strict=True)
        }
        self.count = ends[-1] if ends else 0
        self._are_tensors = all(units == 1 for units in counts.values())
        self._offsets: dict[torch.device, Tensor] = {}

    def totals(self, values: Tensor) -> Tensor:
        """Return sums over the units of each tensor, (..., tensors) of (..., units), float64."""
        if self._are_tensors:
            return values
        offsets = self._offsets.get(values.device)
        if offsets is None:
            ends = [0, *(place.stop for place in self.places.values())]
            offsets = self._offsets[values.device] = torch.tensor(ends, device=values.device)
        columns = values.movedim(-1, 0).reshape(self.count, -1)
        sums = segment_sums(columns, offsets)
        return sums.T.reshape(*values.shape[:-1], len(self.places))


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Return sums of consecutive rows, added one after the other.

    Args:
        values: (rows, ...), floating.
        offsets: where each sum begins, and the number of rows, (sums + 1,) int64.
    """
    # without a look at the offsets, which waits for the device
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True)


class InARow(Mapping[str, Tensor]):
    """Numbers of some tensors, of each by its name, in one tensor.

    Attributes:
        row: all of them, in the last axis.
    """

    row: Tensor

    def like(self, row: Tensor) -> Self:
        """Return other numbers of the same tensors."""
        raise NotImplementedError

    def in_order_of(self, other: InARow) -> Tensor:
        """Return the row with the tensors in the order in which another row has them: what was summed
        in other ways may lie in another one.
        """
        if [*self] == [*other]:
            return self.row
        return torch.cat([self._numbers_of(name) for name in other], -1)

    def _numbers_of(self, name: str) -> Tensor:
        """Return the numbers of a tensor with the axis in which they lie in the row."""
        raise NotImplementedError


class OfUnits(InARow):
    """Numbers of the units of some tensors, (..., units) of each.

    Args:
        row: (..., units of all).
        units: which of them are whose.
    """

    def __init__(self, row: Tensor, units: Units) -> None:
        self.row, self.units = row, units

    def __getitem__(self, name: str) -> Tensor:
        return self.row[..., self.units.places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.units.places)

    def __len__(self) -> int:
        return len(self.units.places)

    def like(self, row: Tensor) -> OfUnits:
        """Return other numbers of the same units."""
        return OfUnits(row, self.units)

    def _numbers_of(self, name: str) -> Tensor:
        return self[name]

    def totals(self) -> OfTensors:
        """Return sums over the units of each tensor."""
        return OfTensors(self.units.totals(self.row), tuple(self.units.places))


class OfTensors(InARow):
    """Numbers of some tensors, (...) of each.

    Args:
        row: (..., tensors).
        names: of the tensors.
    """

    def __init__(self, row: Tensor, names: tuple[str, ...]) -> None:
        self.row, self._positions = row, {name: place for place, name in enumerate(names)}

    def __getitem__(self, name: str) -> Tensor:
        return self.row[..., self._positions[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def like(self, row: Tensor) -> OfTensors:
        """Return other numbers of the same tensors."""
        return OfTensors(row, tuple(self._positions))

    def _numbers_of(self, name: str) -> Tensor:
        return self[name].unsqueeze(-1)

    def numbers(self) -> dict[str, Numbers]:
        """Return them on the host, copied at once."""
        row = Reading(self.row).numbers
        return {name: row[..., place][()] for name, place in self._positions.items()}
