"""What a span keeps of its allocations: sums, counts, a histogram, units, per-parameter totals. No disk, no plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .allocation import Point, SegmentAllocation
from .records import BINS, MAGNITUDES, SIGNED, STEP_FIELDS, TENSOR_FIELDS, TreeSum
from .trajectory import TensorSpec

Arrays = dict[str, np.ndarray[Any, Any]]


def histogram(values: Tensor) -> Tensor:
    """Counts of finite float32 values per bin, from the top bits of their patterns; exact zeros are left out."""
    top = (values.reshape(-1).view(torch.int32) >> 22) & 0x3FF
    counts = torch.bincount(top, minlength=1024)
    positive, negative = counts[:MAGNITUDES], counts[512 : 512 + MAGNITUDES]
    positive[0] -= (values.view(torch.int32) == 0).sum()
    negative[0] -= (values.view(torch.int32) == -(2**31)).sum()
    return torch.cat([negative.flip(0), positive])


def unit_sums(values: Tensor, axis: int | None) -> Tensor:
    """Sums over everything but the unit axis; a scalar is one unit."""
    if axis is None:
        return values.reshape(1)
    return values.sum(dim=[dim for dim in range(values.dim()) if dim != axis]) if values.dim() > 1 else values


class _Running:
    """Per-parameter totals of one tensor, segment by segment."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._sum = TreeSum()
        self._counts = {name: torch.zeros(shape, dtype=torch.int32, device=device) for name in ("helping", "hurting")}
        self._turns = {name: torch.zeros(shape, dtype=torch.int32, device=device) for name in SIGNED}
        self._first = {name: torch.zeros(shape, dtype=torch.int8, device=device) for name in SIGNED}
        self._last = {name: torch.zeros(shape, dtype=torch.int8, device=device) for name in SIGNED}

    def add(self, motion: Tensor, gradient: Tensor, exact: Tensor, stored: Tensor) -> None:
        self._sum.add(exact)
        self._counts["helping"] += stored < 0
        self._counts["hurting"] += stored > 0
        for name, values in zip(SIGNED, (motion, gradient, stored), strict=True):
            sign = values.sign().to(torch.int8)
            self._turns[name] += self._last[name] * sign < 0
            self._first[name] += sign * (self._first[name] == 0)
            self._last[name] = torch.where(sign == 0, self._last[name], sign)

    def arrays(self) -> Arrays:
        found = {"allocated": self._sum.value(), **self._counts}
        for name in SIGNED:
            found |= {
                f"{name}_turns": self._turns[name],
                f"{name}_first": self._first[name],
                f"{name}_last": self._last[name],
            }
        return {name: each.cpu().numpy() for name, each in found.items()}


class Tally:
    """Gathers the segments of one span for one loss, as the arrays a run stores.

    Args:
        table: the allocated tensors.
        length: segments in the span.
        keep: "parameters", "units" or "tensors".
        device: where allocations are.
    """

    def __init__(self, table: Sequence[TensorSpec], length: int, keep: str, device: torch.device) -> None:
        self._table = table
        self._at = 0
        self.steps: Arrays = {name: np.zeros(length, dtype) for name, dtype in STEP_FIELDS.items()}
        self.tensors: Arrays = {name: np.zeros((length, len(table)), dtype) for name, dtype in TENSOR_FIELDS.items()}
        self.histogram: Arrays = {"count": np.zeros((length, BINS), "int64"), "zero": np.zeros(length, "int64")}
        self.allocation: Arrays = {}
        self.units: Arrays = {}
        self.silent: set[str] = set()
        for spec in table:
            if keep == "parameters":
                self.allocation[spec.name] = np.zeros((length, *spec.shape), "float32")
            if keep in ("parameters", "units"):
                units = 1 if spec.unit_axis is None else spec.shape[spec.unit_axis]
                self.units[spec.name] = np.zeros((length, units), "float32")
        self._running = {spec.name: _Running(spec.shape, device) for spec in table}

    def add(self, start: Point, end: Point, segment: SegmentAllocation) -> None:
        """Take in the next segment."""
        for name, column in self.steps.items():
            column[self._at] = getattr(segment, name)
        for position, spec in enumerate(self._table):
            motion = end[spec.name].double() - start[spec.name].double()
            self._add_tensor(position, spec, motion, segment)
        self._at += 1

    def _add_tensor(self, position: int, spec: TensorSpec, motion: Tensor, segment: SegmentAllocation) -> None:
        exact, gradient = segment.allocation[spec.name], segment.mean_gradient[spec.name]
        stored = exact.float()
        row = {
            "allocated": exact.sum(),
            "helping": (stored < 0).sum(),
            "hurting": (stored > 0).sum(),
            "motion": motion.abs().sum(),
            "gradient": gradient.abs().sum(),
        }
        for name, value in row.items():
            self.tensors[name][self._at, position] = value.item()
        if spec.kind == "parameter":
            self.histogram["count"][self._at] += histogram(stored).cpu().numpy()
            self.histogram["zero"][self._at] += int((stored == 0).sum())
        if spec.name in self.allocation:
            self.allocation[spec.name][self._at] = stored.cpu().numpy()
        if spec.name in self.units:
            self.units[spec.name][self._at] = unit_sums(exact, spec.unit_axis).float().cpu().numpy()
        if spec.name in segment.untouched and spec.kind == "buffer" and row["motion"] > 0:
            self.silent.add(spec.name)
        self._running[spec.name].add(motion, gradient, exact, stored)

    def totals(self) -> dict[str, Arrays]:
        """Per-parameter totals over the span, by tensor."""
        return {name: each.arrays() for name, each in self._running.items()}
