"""Small tensors that are taken together: one operation multiplies and sums, or interpolates, all of
them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .in_a_row import Units, segment_sums

if TYPE_CHECKING:
    from .directions import Motion

_SMALL = 2**13  # numbers of a tensor that is taken together with others
_TOGETHER = 2**17  # numbers of a bundle, which stay in the cache


class Bundle:
    """Some small tensors whose gradients are multiplied and summed together.

    Args:
        shapes: of the tensors.
        axes: of the units of each; None where it is one unit.
        place: of their units in the row of all.
        device: where they are.

    Attributes:
        names: of the tensors.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        axes: Mapping[str, int | None],
        place: slice,
        device: torch.device,
    ) -> None:
        self.names, self.place, self._shapes = tuple(shapes), place, shapes
        sizes, order, first = [0], list[Tensor](), 0
        for name, shape in shapes.items():
            axis, numbers = axes[name], shape.numel()
            units = 1 if axis is None else shape[axis]
            sizes += [numbers // max(1, units)] * units
            positions = torch.arange(first, first + numbers, device="cpu").reshape(shape)
            order.append((positions if axis is None else positions.movedim(axis, 0)).reshape(-1))
            first += numbers
        self._numbers, self._count = first, len(sizes) - 1
        by_unit = torch.cat(order)
        is_in_order = bool((by_unit == torch.arange(first, device="cpu")).all())
        self._by_unit = None if is_in_order else by_unit.to(device)
        self._ends = torch.tensor(sizes, device="cpu").cumsum(0).to(device)
        self._offsets: dict[int, Tensor] = {}

    def sums_along(self, gradients: Mapping[str, Tensor], motions: Sequence[Motion]) -> Tensor:
        """Return Σ gradient · motion over each unit, (motions, units) float64; 0 of tensors without
        a gradient. Differences and products are of the gradients' type.
        """
        like = next(gradients[name] for name in self.names if name in gradients)
        row = self._row(
            {
                name: gradients[name] if name in gradients else like.new_zeros(shape)
                for name, shape in self._shapes.items()
            }
        )
        products = [row * motion.differences(self).to(row.dtype) for motion in motions]
        return self.sums(torch.cat(products), len(motions))

    def sums(self, rows: Tensor, count: int) -> Tensor:
        """Return sums over each unit of some rows that follow each other, (rows, units) float64."""
        if count not in self._offsets:
            starts = self._numbers * torch.arange(count, device=self._ends.device)[:, None]
            ends = (self._ends[1:] + starts).reshape(-1)
            self._offsets[count] = torch.cat([self._ends[:1], ends])
        sums = segment_sums(rows.double(), self._offsets[count])
        return sums.reshape(count, self._count)

    @torch.no_grad()
    def between(self, motion: Motion, x: float) -> dict[str, Tensor]:
        """Return start + x(end − start) of each tensor."""
        assert self._by_unit is None, "tensors are one unit each, whose numbers stay in order"
        row = torch.lerp(*self.rows(motion), x)
        parts = torch.split(row, [shape.numel() for shape in self._shapes.values()])
        return {
            name: part.view(shape)
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }

    @torch.no_grad()
    def rows(self, motion: Motion) -> tuple[Tensor, Tensor]:
        """Return both ends of a motion, the numbers of one unit after those of another."""
        return self._row(motion.start), self._row(motion.end)

    def _row(self, tensors: Mapping[str, Tensor]) -> Tensor:
        row = torch.cat([tensors[name].reshape(-1) for name in self.names])
        return row if self._by_unit is None else row[self._by_unit]


class Plan:
    """A choice of tensors that are summed together, and of where the sums of each are.

    Args:
        shapes: of the tensors.
        axes: of the units of each; None where it is one unit.
        dtypes: of each, one of which the tensors of a bundle have.
        device: where they are.

    Attributes:
        bundles: of small ones.
        bundled: names of these.
        units: of all.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        axes: Mapping[str, int | None],
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> None:
        small: list[dict[str, torch.Size]] = []
        last: dict[torch.dtype, dict[str, torch.Size]] = {}  # bundle of a type
        for name, shape in shapes.items():
            if is_small(shape):
                bundle = last.get(dtypes[name])
                numbers = sum(other.numel() for other in (bundle or {}).values())
                if bundle is None or numbers + shape.numel() > _TOGETHER:
                    bundle = last[dtypes[name]] = {}
                    small.append(bundle)
                bundle[name] = shape
        self.bundled = {name: None for of_bundle in small for name in of_bundle}.keys()
        alone = {name: shape for name, shape in shapes.items() if name not in self.bundled}
        self.units = Units(
            {
                name: 1 if (axis := axes[name]) is None else shape[axis]
                for of_bundle in (*small, alone)
                for name, shape in of_bundle.items()
            }
        )
        places = self.units.places
        self.bundles = [
            Bundle(
                of_bundle,
                axes,
                slice(
                    min(places[name].start for name in of_bundle),
                    max(places[name].stop for name in of_bundle),
                ),
                device,
            )
            for of_bundle in small
        ]


def is_small(shape: torch.Size) -> bool:
    """Tell whether a tensor is taken together with others."""
    return shape.numel() <= _SMALL


def plan_of(tensors: Mapping[str, Tensor], axes: Mapping[str, int | None]) -> Plan:
    """Return how tensors are summed, the same plan each time."""
    described = tuple(
        (name, tensor.shape, axes[name], tensor.dtype) for name, tensor in tensors.items()
    )
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    return _planned(described, device)


@functools.lru_cache(maxsize=16)
def _planned(
    described: tuple[tuple[str, torch.Size, int | None, torch.dtype], ...], device: torch.device
) -> Plan:
    return Plan(
        {name: shape for name, shape, _, _ in described},
        {name: axis for name, _, axis, _ in described},
        {name: dtype for name, _, _, dtype in described},
        device,
    )
