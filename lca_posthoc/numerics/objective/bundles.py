"""Small tensors in a row, of which sums are taken over the units of all of them at once."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from .in_a_row import Units
from .rows import Row, SegmentSums, Shapes, together


class Bundle(Row):
    """Some small tensors in a row, and their units.

    Args:
        shapes: of the tensors.
        axes: of the units of each; None where it is one unit.
        device: where they are.

    Attributes:
        units: how many there are.
    """

    def __init__(
        self, shapes: Shapes, axes: Mapping[str, int | None], device: torch.device
    ) -> None:
        super().__init__(shapes, device)
        ends, order = [0], list[Tensor]()
        for name, shape in shapes.items():
            axis, numbers = axes[name], shape.numel()
            units = 1 if axis is None else shape[axis]
            of_unit = numbers // max(1, units)
            ends += [ends[-1] + of_unit * (unit + 1) for unit in range(units)]
            first = self.places[name].start
            positions = torch.arange(first, first + numbers, device="cpu").reshape(shape)
            order.append((positions if axis is None else positions.movedim(axis, 0)).reshape(-1))
        by_unit = torch.cat(order)
        is_in_order = bool((by_unit == torch.arange(self.numbers, device="cpu")).all())
        self._by_unit = None if is_in_order else by_unit.to(device)
        self._unit_sums = SegmentSums(ends, device)
        self.units = len(ends) - 1

    def unit_sums(self, values: Tensor) -> Tensor:
        """Return the sums over each unit, (rows, units) float64 of (rows, numbers)."""
        return self._unit_sums.of(values if self._by_unit is None else values[:, self._by_unit])


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
        small = together(shapes, dtypes)
        self.bundled = {name: None for of_bundle in small for name in of_bundle}.keys()
        alone = {name: shape for name, shape in shapes.items() if name not in self.bundled}
        self.units = Units(
            {
                name: 1 if (axis := axes[name]) is None else shape[axis]
                for of_bundle in (*small, alone)
                for name, shape in of_bundle.items()
            }
        )
        self.bundles = [Bundle(of_bundle, axes, device) for of_bundle in small]

    def place(self, bundle: Bundle) -> slice:
        """Return where the units of a bundle are in the row of all."""
        first = self.units.places[bundle.names[0]].start
        return slice(first, first + bundle.units)


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
