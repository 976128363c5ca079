"""Accumulate a loss, its weights and its gradient over many batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .batches import Groups
from .directions import Gradients, blocks
from .in_a_row import OfTensors, OfUnits, Units
from .passes import GroupValues
from .readings import Array, Numbers, Reading


@dataclass(frozen=True)
class Evaluation:
    """Hold a loss at one point, in float64, and its gradient there, in the type of the model.

    Attributes:
        totals: the loss and the sum of the elements' weights, ([groups, ]2), on their device until
            needed.
        gradient: by tensor, its gradient, of its shape or (groups, *shape); or sums of it along
            directions, ([groups, ]directions, units) float64. Empty after a forward pass only.
        unreached: tensors that the loss does not depend on; their gradient is zero.
        examples: if examples are kept apart, the same with every example as a group and every
            tensor as one unit; the numbers of an example without weight are 0.
        parts: if requested, sums of each tensor's gradient along parts of the motion, ([groups,
            ]parts) float64.
        beside: such sums along further directions.
    """

    totals: Reading
    gradient: Mapping[str, Tensor]
    unreached: frozenset[str] = frozenset()
    examples: Evaluation | None = None
    parts: OfTensors | None = None
    beside: OfTensors | None = None

    @classmethod
    def known(
        cls,
        loss: Numbers,
        weight: Numbers,
        gradient: Mapping[str, Tensor],
        unreached: frozenset[str] = frozenset(),
    ) -> Evaluation:
        """Create an evaluation whose totals are already on the host.

        Args:
            loss: the loss, () or (groups,).
            weight: sum of the elements' weights, of the same shape.
            gradient: see the attribute.
            unreached: see the attribute.
        """
        return cls(Reading.known(np.stack([loss, weight], -1)), gradient, unreached)

    @property
    def loss(self) -> Numbers:
        """Return the loss, float64 of shape () or (groups,)."""
        numbers: Numbers = self.totals.numbers[..., 0][()]
        return numbers

    @property
    def weight(self) -> Numbers:
        """Return the sum of the elements' weights, of the same shape."""
        numbers: Numbers = self.totals.numbers[..., 1][()]
        return numbers

    @property
    def is_grouped(self) -> bool:
        """Return whether there are numbers for each group."""
        return len(self.totals.shape) > 1

    def along(self, direction: int, parts: int = 0, beside: int = 0) -> Evaluation:
        """Return the evaluation with the sums along one of its directions, ([groups, ]units).

        Args:
            direction: index of the direction.
            parts: number of the following directions that are its parts.
            beside: number of the directions after these that go to `beside`.
        """
        first, of_units = direction + 1, self._of_units
        return replace(
            self,
            gradient=of_units.like(of_units.row.select(-2, direction)),
            parts=self._totals(first, parts) if parts else self.parts,
            beside=self._totals(first + parts, beside) if beside else self.beside,
        )

    @property
    def _of_units(self) -> OfUnits:
        assert isinstance(self.gradient, OfUnits), "sums along directions are of units"
        return self.gradient

    def _totals(self, first: int, count: int) -> OfTensors:
        """Return the sums along some directions over all units, ([groups, ]directions)."""
        of_units = self._of_units
        return of_units.like(of_units.row.narrow(-2, first, count)).totals()

    def examples_along(self, direction: int) -> Evaluation:
        """Return the evaluation with the examples' sums along one of the directions."""
        if self.examples is None:
            return self
        return replace(self, examples=self.examples.along(direction))


@dataclass(frozen=True)
class PartialSums:
    """Hold sums of a loss over a part of its data, in float64 on the CPU.

    Attributes:
        loss: Σ values.
        weight: Σ weights of the elements.
        gradient: sums of the gradient along directions, (directions, units), for each tensor that
            the loss depends on there.
    """

    loss: float
    weight: float
    gradient: Mapping[str, Tensor]


def joined(
    parts: Sequence[PartialSums], shapes: Mapping[str, tuple[int, ...]], where: str
) -> Evaluation:
    """Return the mean over all elements of some parts of the data, added in order.

    Args:
        parts: parts that together are the data.
        shapes: shape of the sums of each tensor, (directions, units); empty for the loss only.
        where: name of the loss, for messages.

    Raises:
        InputError: if the weights sum to 0.
    """
    loss, weight = np.float64(0.0), np.float64(0.0)
    for part in parts:
        loss, weight = loss + part.loss, weight + part.weight
    if not weight > 0:
        raise InputError(_weightless(where, float(weight)))
    if not shapes:
        return Evaluation.known(loss / weight, weight, {})
    units = Units({name: shape[-1] for name, shape in shapes.items()})
    directions = next(iter(shapes.values()))[0]
    zeros = torch.zeros((directions, units.count), dtype=torch.float64, device="cpu")
    sums = OfUnits(zeros, units)
    for part in parts:
        for name, of_tensor in part.gradient.items():
            sums[name].add_(of_tensor)
    reached = {name for part in parts for name in part.gradient}
    means = sums.like(sums.row / weight)
    return Evaluation.known(loss / weight, weight, means, frozenset(shapes.keys() - reached))


class RunningSum:
    """Accumulate a sum over batches.

    The first summand is kept as it is, which suffices for a single batch; sums have a separate
    type.

    Args:
        dtype: type of sums.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._total: Tensor | None = None
        self._is_own = False

    def add(self, values: Tensor) -> None:
        """Add values; the caller must not modify them later."""
        if self._total is None:
            self._total = values
        else:
            self._total = self.own().add_(values)

    @property
    def total(self) -> Tensor:
        """Return the sum so far."""
        assert self._total is not None, "nothing was added"
        return self._total

    def own(self) -> Tensor:
        """Return the sum as a tensor that may be modified."""
        if not self._is_own:
            self._total, self._is_own = self.total.to(self._dtype, copy=True), True
        return self.total


class Sums:
    """Accumulate Σ values, Σ weights and Σ gradients of one source of values over batches, in
    float64: for each of some groups, over everything, or both.

    A loss without groups is also summed group by group, in the order of the batches, whether or not
    the sums of the groups are requested.

    Args:
        gradients: runs backward passes, and decides what is accumulated of their gradients.
        device: device of the sums.
        groups: range of groups that are kept apart; None for none.
        plain: whether to keep the sums over everything.
    """

    def __init__(
        self,
        gradients: Gradients,
        device: torch.device,
        groups: range | None,
        plain: bool,
    ) -> None:
        self._gradients, self._groups, self._plain = gradients, groups, plain
        self._device = device
        self._rows: dict[str, Tensor] = {}
        if groups is not None:
            self._rows, self._row_totals = self._zeros((len(groups),))
        self._whole: dict[str, RunningSum] = {}
        self._whole_totals = torch.zeros(2, dtype=torch.float64, device=device)
        self._group: int | None = None
        self._part: dict[str, RunningSum] = {}  # sums of the current group
        self._row: dict[str, Tensor] = {}  # the same, if groups are kept apart
        self._part_totals = self._whole_totals
        # for each group, the tensors without a sum yet, whose first summand is copied
        self._empty: dict[int, set[str]] = {}
        self._part_empty: set[str] = set()
        self._reached: set[str] = set()
        self._means: dict[bool, Evaluation] = {}

    def _zeros(self, groups: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
        zeros = {
            name: torch.zeros((*groups, *shape), dtype=self._gradients.dtype, device=self._device)
            for name, shape in self._gradients.shapes.items()
        }
        return zeros, torch.zeros((*groups, 2), dtype=torch.float64, device=self._device)

    @property
    def needs_graph(self) -> bool:
        """Return whether gradients are summed too."""
        return bool(self._gradients.shapes)

    def take(self, part: GroupValues) -> None:
        """Add Σ values, Σ weights and Σ gradients of one group in a batch."""
        self._begin(part.group)
        total = part.values.double().sum()
        if self.needs_graph and total.requires_grad:
            self._reached.update(self._gradients.backward(total, part.more_to_come, self._add))
        self._part_totals[0] += total.detach()
        self._part_totals[1] += part.values.numel() if part.weights is None else part.weights.sum()

    def _begin(self, group: int) -> None:
        """Add to the sums of this group from now on."""
        if group == self._group:
            return
        assert not (self._plain and group in self._empty), "sums over groups need each group once"
        self._close()
        self._group = group
        self._part_empty = self._empty.setdefault(group, set(self._gradients.shapes))
        if self._groups is None:
            self._part, self._part_totals = {}, torch.zeros_like(self._whole_totals)
        else:
            row = group - self._groups.start
            self._row = {name: tensor[row] for name, tensor in self._rows.items()}
            self._part_totals = self._row_totals[row]

    def _close(self) -> None:
        if self._group is None or not self._plain:
            return
        for name, row in self._row.items():
            self._whole.setdefault(name, RunningSum(self._gradients.dtype)).add(row)
        for name, part in self._part.items():
            if name in self._whole:
                self._whole[name].add(part.total)
            else:
                self._whole[name] = part
        self._whole_totals = self._whole_totals + self._part_totals

    def _end(self) -> None:
        """Close the current group; nothing more may be added."""
        self._close()
        self._group, self._part, self._row = None, {}, {}

    def _add(self, name: str, values: Tensor) -> None:
        """Add the result of a batch's gradients."""
        if self._groups is None:
            self._part.setdefault(name, RunningSum(self._gradients.dtype)).add(values)
        elif name in self._part_empty:
            self._row[name].copy_(values)
            self._part_empty.remove(name)
        else:
            self._row[name] += values

    def partial(self) -> PartialSums:
        """Return the sums over everything, if only these are kept."""
        self._end()
        loss, weight = self._whole_totals.tolist()
        by_key = {name: running.total.cpu() for name, running in self._whole.items()}
        of_tensors = self._gradients.of_tensors(by_key)
        return PartialSums(loss, weight, {name: of_tensors[name] for name in self._reached})

    def evaluation(self, grouped: bool, where: str, order: Groups | None) -> Evaluation:
        """Return the mean over all elements, or over those of each group; repeated calls return the
        same object.

        If the weights of a group, or all weights, sum to 0, reading the totals raises an
        InputError.

        Args:
            grouped: whether to return the mean of each group.
            where: name of the loss and its split, for messages.
            order: the groups.
        """
        if grouped not in self._means:
            self._end()
            totals, weights = (self._row_totals if grouped else self._whole_totals).unbind(-1)
            by_key = {name: self._mean(name, grouped, weights) for name in self._gradients.shapes}
            labels = order.labels if grouped and order is not None else None
            first = self._groups.start if self._groups else 0
            refuse = refusing_weightless(where, labels, first)
            self._means[grouped] = Evaluation(
                Reading(torch.stack([totals / weights, weights], -1), refuse),
                self._gradients.of_tensors(by_key),
                frozenset(set(self._gradients.names) - self._reached),
            )
        return self._means[grouped]

    def _mean(self, name: str, grouped: bool, weights: Tensor) -> Tensor:
        """Return the mean gradient of one tensor, and release its sum."""
        shape, dtype = self._gradients.shapes[name], self._gradients.mean_dtype
        if grouped:
            total = self._rows.pop(name)
            total /= weights.reshape(weights.shape + (1,) * len(shape))
            return total.to(dtype)
        if name not in self._whole:
            return torch.zeros(shape, dtype=dtype, device=self._device)
        total = self._whole.pop(name).total
        # never in place: gradients of several tensors may share memory, and the sums of groups are
        # still needed
        mean = torch.empty(shape, dtype=dtype, device=self._device)
        values, means = total.reshape(-1), mean.view(-1)
        # piece by piece, because allocating twice the memory takes longer than dividing
        for _, part in blocks(1, values.numel()):
            means[part] = values[part].double() / weights
        return mean


def refusing_weightless(
    where: str, labels: Sequence[object] | None, first: int = 0
) -> Callable[[Array], None]:
    """Return a function that raises an error for totals of a loss, or of its groups, whose weights
    sum to 0.

    Args:
        where: name of the loss and its split, for messages.
        labels: labels of all groups; None without groups.
        first: index of the first group in the totals.
    """

    def refuse(totals: Array) -> None:
        weights = totals[..., 1].reshape(-1)
        if not (weights > 0).all():
            empty = int((weights > 0).argmin())
            place = where if labels is None else f"group {labels[first + empty]!r} of {where}"
            raise InputError(_weightless(place, float(weights[empty])))

    return refuse


def _weightless(place: str, total: float) -> str:
    return f"the weights of {place} sum to {total}. Give at least one element a weight."
