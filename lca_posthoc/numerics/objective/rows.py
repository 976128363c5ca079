"""Arrange tensors in rows: a large one alone, small ones concatenated, so that one operation
processes all their parameters.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .in_a_row import segment_sums

_SMALL = 2**13  # largest number of elements of a tensor that is concatenated with others
_TOGETHER = 2**17  # elements of a row of small tensors, which fit in the cache

Shapes = Mapping[str, torch.Size]


def is_small(shape: torch.Size) -> bool:
    """Return whether a tensor is concatenated with others."""
    return shape.numel() <= _SMALL


def together(shapes: Shapes, kinds: Mapping[str, object]) -> list[dict[str, torch.Size]]:
    """Group the small tensors that are concatenated.

    Args:
        shapes: name → shape of each tensor.
        kinds: name → kind; tensors in a group have the same kind.

    Returns:
        The shapes of each group, by name.
    """
    groups: list[dict[str, torch.Size]] = []
    last: dict[object, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        if is_small(shape):
            group = last.get(kinds[name])
            numbers = sum(other.numel() for other in (group or {}).values())
            if group is None or numbers + shape.numel() > _TOGETHER:
                group = last[kinds[name]] = {}
                groups.append(group)
            group[name] = shape
    return groups


class Row:
    """Arrange one tensor of any size, or several small ones, as a sequence of numbers.

    Args:
        shapes: name → shape of each tensor.
        device: device of the tensors.

    Attributes:
        names: names of the tensors.
        shapes: their shapes by name.
        places: range of each tensor's numbers.
        numbers: length of the row.
    """

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self.names, self.shapes = tuple(shapes), shapes
        ends = list(itertools.accumulate((shape.numel() for shape in shapes.values()), initial=0))
        self.places = {
            name: slice(*place)
            for name, place in zip(shapes, itertools.pairwise(ends), strict=True)
        }
        self.numbers = ends[-1]
        self._ends, self._device = ends, device

    @functools.cached_property
    def _sums(self) -> SegmentSums:
        return SegmentSums(self._ends, self._device)

    def of(self, tensors: Mapping[str, Tensor], rows: int = 1) -> Tensor:
        """Return the numbers of tensors, (rows, numbers).

        Args:
            tensors: tensors by name.
            rows: number of leading rows in each tensor.
        """
        if isinstance(tensors, InRows):
            known = tensors.row(self.names)
            if known is not None:
                return known.reshape(rows, self.numbers)
        parts = [tensors[name].reshape(rows, shape.numel()) for name, shape in self.shapes.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def of_some(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers of tensors, (1, numbers), with 0 for missing tensors."""
        like = next(tensors[name] for name in self.names if name in tensors)
        return self.of(
            {
                name: tensors[name] if name in tensors else like.new_zeros(shape)
                for name, shape in self.shapes.items()
            }
        )

    def sums(self, values: Tensor) -> Tensor:
        """Return the sums over each tensor, (rows, tensors); for a single tensor, over the given
        part of its numbers.
        """
        return values.sum(1, keepdim=True) if len(self.names) == 1 else self._sums.of(values)

    def tensor(self, name: str, numbers: Tensor) -> Tensor:
        """Return a tensor, (..., *its shape), from the numbers of a row.

        Args:
            name: name of the tensor.
            numbers: numbers of the row, (..., numbers).
        """
        return numbers[..., self.places[name]].reshape((*numbers.shape[:-1], *self.shapes[name]))


class SegmentSums:
    """Sum consecutive numbers of each row.

    Args:
        ends: start of each sum, and the length of a row.
        device: device of the numbers.
    """

    def __init__(self, ends: list[int], device: torch.device) -> None:
        self._numbers, self._count = ends[-1], len(ends) - 1
        self._ends = torch.tensor(ends, device="cpu").to(device)
        self._offsets: dict[int, Tensor] = {}

    def of(self, values: Tensor) -> Tensor:
        """Return the sums, (rows, sums) float64 from (rows, numbers)."""
        rows = len(values)
        if rows not in self._offsets:
            starts = self._numbers * torch.arange(rows, device=self._ends.device)[:, None]
            ends = (self._ends[1:] + starts).reshape(-1)
            self._offsets[rows] = torch.cat([self._ends[:1], ends])
        sums = segment_sums(values.double().reshape(-1), self._offsets[rows])
        return sums.reshape(rows, self._count)


class Rows:
    """Decide which tensors share a row.

    Args:
        shapes: name → shape of each tensor.
        device: device of the tensors.

    Attributes:
        every: all rows.
        of: the row of each tensor.
    """

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        small = together(shapes, dict.fromkeys(shapes))
        first = {next(iter(group)): group for group in small}
        bundled = {name for group in small for name in group}
        self.every = [
            Row(first.get(name, {name: shape}), device)
            for name, shape in shapes.items()
            if name in first or name not in bundled
        ]
        by_name = {name: row for row in self.every for name in row.names}
        self.of = {name: by_name[name] for name in shapes}


class InRows(Mapping[str, Tensor]):
    """Hold numbers of some tensors, accessible by name, arranged in rows.

    Args:
        rows: the rows.
        numbers: numbers of each row, (..., numbers), by the name of its first tensor.
    """

    def __init__(self, rows: Rows, numbers: Mapping[str, Tensor]) -> None:
        self.rows, self.numbers = rows, numbers

    def __getitem__(self, name: str) -> Tensor:
        row = self.rows.of[name]
        return row.tensor(name, self.numbers[row.names[0]])

    def __contains__(self, name: object) -> bool:
        return name in self.rows.of

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows.of)

    def __len__(self) -> int:
        return len(self.rows.of)

    def row(self, names: tuple[str, ...]) -> Tensor | None:
        """Return the numbers of some tensors if they form a row, else None."""
        row = self.rows.of.get(names[0])
        return None if row is None or row.names != names else self.numbers[names[0]]

    def added_to(self, sums: Mapping[str, Tensor]) -> InRows:
        """Add these numbers to sums of each row in place, and return the result."""
        return InRows(self.rows, {name: sums[name].add_(of) for name, of in self.numbers.items()})


def rows_of(tensors: Mapping[str, Tensor]) -> Rows:
    """Return the rows of tensors; equal shapes return the same object."""
    shapes = tuple((name, tensor.shape) for name, tensor in tensors.items())
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    return rows_of_shapes(shapes, device)


@functools.lru_cache(maxsize=16)
def rows_of_shapes(shapes: tuple[tuple[str, torch.Size], ...], device: torch.device) -> Rows:
    """Return the rows of tensors of some shapes; equal arguments return the same object.

    Args:
        shapes: name and shape of each tensor.
        device: device of the tensors.
    """
    return Rows(dict(shapes), device)
