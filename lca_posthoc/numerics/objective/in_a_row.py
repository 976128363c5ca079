"""Concatenate numbers of several tensors, so that one operation processes all of them: for small
models, launching an operation takes longer than executing it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from .readings import Numbers, Reading


class Units:
    """Concatenate the units of some tensors.

    Args:
        counts: number of units, by tensor.

    Attributes:
        places: range of each tensor's units.
        count: number of all units.
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
        """Return sums over the units of each tensor, (..., tensors) from (..., units), float64."""
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
        values: the rows, (rows, ...), floating.
        offsets: start of each sum, and the number of rows, (sums + 1,) int64.
    """
    # unsafe skips a check of the offsets, which would wait for the device
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True)


class InARow(Mapping[str, Tensor]):
    """Hold numbers of some tensors, accessible by name, in one tensor.

    Attributes:
        row: all numbers, along the last axis.
    """

    row: Tensor

    def like(self, row: Tensor) -> Self:
        """Return other numbers of the same tensors."""
        raise NotImplementedError

    def in_order_of(self, other: InARow) -> Tensor:
        """Return the row in another row's order of tensors, which differs if it was summed in
        another way.
        """
        if [*self] == [*other]:
            return self.row
        return torch.cat([self._numbers_of(name) for name in other], -1)

    def _numbers_of(self, name: str) -> Tensor:
        """Return the numbers of a tensor with the axis of the row."""
        raise NotImplementedError


class OfUnits(InARow):
    """Hold numbers of the units of some tensors, (..., units) for each.

    Args:
        row: numbers of all units, (..., units).
        units: assignment of units to tensors.
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
    """Hold numbers of some tensors, (...) for each.

    Args:
        row: numbers of all tensors, (..., tensors).
        names: names of the tensors.
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
        """Return the numbers on the host, copied at once."""
        row = Reading(self.row).numbers
        return {name: row[..., place][()] for name, place in self._positions.items()}
