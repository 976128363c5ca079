"""Concatenate small tensors, to sum over the units of all of them at once."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from .in_a_row import Units
from .rows import Row, SegmentSums, Shapes, together


class Bundle(Row):
    """Concatenate small tensors, and sum over their units.

    Args:
        shapes: name → shape of each tensor.
        axes: name → axis of its units; None if it is one unit.
        device: device of the tensors.

    Attributes:
        units: number of units.
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
        """Return the sums over each unit: (rows, units) float64 from (rows, numbers)."""
        return self._unit_sums.of(values if self._by_unit is None else values[:, self._by_unit])


class Plan:
    """Decide which tensors are summed together, and where the sums of each are stored.

    Args:
        shapes: name → shape of each tensor.
        axes: name → axis of its units; None if it is one unit.
        dtypes: name → type; tensors of a bundle have the same type.
        device: device of the tensors.

    Attributes:
        bundles: bundles of small tensors.
        bundled: names of these tensors.
        units: units of all tensors.
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
        """Return the range of a bundle's units among all units."""
        first = self.units.places[bundle.names[0]].start
        return slice(first, first + bundle.units)


def plan_of(tensors: Mapping[str, Tensor], axes: Mapping[str, int | None]) -> Plan:
    """Return the plan for summing tensors; equal arguments return the same object.

    Args:
        tensors: the tensors by name.
        axes: name → axis of its units; None if it is one unit.
    """
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
