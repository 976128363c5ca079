"""Tensors whose numbers lie in a row: a large one alone, small ones together, so that one operation
computes what is kept of every parameter of all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .in_a_row import segment_sums

_SMALL = 2**13  # numbers of a tensor that is taken together with others
_TOGETHER = 2**17  # numbers of a row of small ones, which stay in the cache

Shapes = Mapping[str, torch.Size]


def is_small(shape: torch.Size) -> bool:
    """Tell whether a tensor is taken together with others."""
    return shape.numel() <= _SMALL


def together(shapes: Shapes, kinds: Mapping[str, object]) -> list[dict[str, torch.Size]]:
    """Return the shapes of small tensors, of those that are taken together.

    Args:
        shapes: of all tensors.
        kinds: of each, one of which those that are together have.
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
    """One tensor of any size, or several small ones, the numbers of one after those of another.

    Args:
        shapes: of the tensors.
        device: where they are.

    Attributes:
        names: of the tensors.
        shapes: of each.
        places: of the numbers of each.
        numbers: how many there are.
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
        """Return the numbers of tensors, (rows, numbers), of which each has so many rows."""
        if isinstance(tensors, InRows):
            known = tensors.row(self.names)
            if known is not None:
                return known.reshape(rows, self.numbers)
        parts = [tensors[name].reshape(rows, shape.numel()) for name, shape in self.shapes.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def of_some(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers of tensors, (1, numbers), of which some are there; 0 of the others."""
        like = next(tensors[name] for name in self.names if name in tensors)
        return self.of(
            {
                name: tensors[name] if name in tensors else like.new_zeros(shape)
                for name, shape in self.shapes.items()
            }
        )

    def sums(self, values: Tensor) -> Tensor:
        """Return the sums over each tensor, (rows, tensors); of one alone, over the part of its
        numbers that is given.
        """
        return values.sum(1, keepdim=True) if len(self.names) == 1 else self._sums.of(values)

    def tensor(self, name: str, numbers: Tensor) -> Tensor:
        """Return a tensor, (..., *its shape), from numbers in a row, (..., numbers)."""
        return numbers[..., self.places[name]].reshape((*numbers.shape[:-1], *self.shapes[name]))


class SegmentSums:
    """Sums over consecutive numbers of each row.

    Args:
        ends: where each sum begins, and how many numbers a row has.
        device: where they are.
    """

    def __init__(self, ends: list[int], device: torch.device) -> None:
        self._numbers, self._count = ends[-1], len(ends) - 1
        self._ends = torch.tensor(ends, device="cpu").to(device)
        self._offsets: dict[int, Tensor] = {}

    def of(self, values: Tensor) -> Tensor:
        """Return them, (rows, sums) float64 of (rows, numbers)."""
        rows = len(values)
        if rows not in self._offsets:
            starts = self._numbers * torch.arange(rows, device=self._ends.device)[:, None]
            ends = (self._ends[1:] + starts).reshape(-1)
            self._offsets[rows] = torch.cat([self._ends[:1], ends])
        sums = segment_sums(values.double().reshape(-1), self._offsets[rows])
        return sums.reshape(rows, self._count)


class Rows:
    """A choice of tensors whose numbers lie in a row together.

    Args:
        shapes: of all tensors.
        device: where they are.

    Attributes:
        every: of the rows.
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
    """Numbers of some tensors, of each by its name, as they lie in rows.

    Args:
        rows: says which lie together.
        numbers: of each row, by the name of its first tensor, (..., numbers).
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
        """Return the numbers of some tensors where they are a row; None where they are not."""
        row = self.rows.of.get(names[0])
        return None if row is None or row.names != names else self.numbers[names[0]]

    def added_to(self, sums: Mapping[str, Tensor]) -> InRows:
        """Return these numbers added to sums of each row, which are changed."""
        return InRows(self.rows, {name: sums[name].add_(of) for name, of in self.numbers.items()})


def rows_of(tensors: Mapping[str, Tensor]) -> Rows:
    """Return how tensors lie in rows, the same each time."""
    shapes = tuple((name, tensor.shape) for name, tensor in tensors.items())
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    return rows_of_shapes(shapes, device)


@functools.lru_cache(maxsize=16)
def rows_of_shapes(shapes: tuple[tuple[str, torch.Size], ...], device: torch.device) -> Rows:
    """Return how tensors of some shapes lie in rows, the same each time."""
    return Rows(dict(shapes), device)
