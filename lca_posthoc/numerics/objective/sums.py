"""Sums of a loss, its weights and its gradient over many batches."""

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
    """A loss at one point, float64, and its gradient there, in the type of the model; no gradient
    after a forward pass alone.

    `totals` are the loss and the sum of the elements' weights, ([groups, ]2), on their device until
    they are wanted. A tensor's gradient has its own shape or (groups, *shape); sums of it along
    directions are float64 and have shape ([groups, ]directions, units). `unreached` names the
    tensors the loss did not reach; their gradient is zero. `examples`, where they are told apart, is
    the same with every example as a group and every tensor as one unit; the numbers of an example
    without weight are 0. `parts`, where they are asked for, are sums of a tensor's gradient along
    parts of the motion, float64, ([groups, ]parts); `beside` the same along further directions.
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
        """Return one whose totals are on the host already."""
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
        """Tell whether there are numbers of every group."""
        return len(self.totals.shape) > 1

    def along(self, direction: int, parts: int = 0, beside: int = 0) -> Evaluation:
        """Return the same with the sums along one of its directions, ([groups, ]units).

        Args:
            direction: its position.
            parts: the number of directions after it that are parts of it.
            beside: the number of those after these that are taken beside it.
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
        """Return the same with those of the examples along one of the directions."""
        if self.examples is None:
            return self
        return replace(self, examples=self.examples.along(direction))


@dataclass(frozen=True)
class PartialSums:
    """Sums of a loss over a part of its data, float64, on the CPU.

    Attributes:
        loss: Σ values.
        weight: Σ weights of the elements.
        gradient: sums of the gradient along directions, (directions, units) of each tensor that the
            loss reached there.
    """

    loss: float
    weight: float
    gradient: Mapping[str, Tensor]


def joined(
    parts: Sequence[PartialSums], shapes: Mapping[str, tuple[int, ...]], where: str
) -> Evaluation:
    """Return the mean over all elements of some parts of the data, which are added in their order.

    Args:
        parts: that together are the data.
        shapes: of the sums of each tensor, (directions, units); none for the loss alone.
        where: names the loss.

    Raises:
        InputError: where the weights sum to 0.
    """
    loss, weight = np.float64(0.0), np.float64(0.0)
    for part in parts:
        loss, weight = loss + part.loss, weight + part.weight
    if not weight > 0:
        raise _weightless(where, float(weight))
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
    """A sum over batches. The first one stays as it is, which is all there is of a single batch;
    sums are of a type of their own.

    Args:
        dtype: of sums.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._total: Tensor | None = None
        self._is_own = False

    def add(self, values: Tensor) -> None:
        """Add values, which must not change later."""
        if self._total is None:
            self._total = values
        else:
            self._total = self.own().add_(values)

    @property
    def total(self) -> Tensor:
        """Return the sum of what was added."""
        assert self._total is not None, "nothing was added"
        return self._total

    def own(self) -> Tensor:
        """Return the sum, which may be changed."""
        if not self._is_own:
            self._total, self._is_own = self.total.to(self._dtype, copy=True), True
        return self.total


class Sums:
    """Σ values, Σ weights and Σ gradients of one source of values over batches, float64: of each of
    some groups, over everything, or both.

    A loss without groups is added up group by group too, in the order of the batches, whether or
    not the sums of the groups are asked for.

    Args:
        gradients: runs backward passes, and says what is taken in of their gradients.
        device: where the sums are.
        groups: those that are kept apart; None for none.
        plain: whether the sums over everything are kept.
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
        self._part: dict[str, RunningSum] = {}  # of the group that is added to
        self._row: dict[str, Tensor] = {}  # the same, where groups are kept apart
        self._part_totals = self._whole_totals
        # of each group, the tensors nothing was added to yet: theirs is copied
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
        """Tell whether gradients are summed too."""
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
        assert not (self._plain and group in self._empty), (
            "what is added up group by group takes each group once"
        )
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
        """Close the group that is added to; nothing more is added."""
        self._close()
        self._group, self._part, self._row = None, {}, {}

    def _add(self, name: str, values: Tensor) -> None:
        """Add what gradients come to in a batch."""
        if self._groups is None:
            self._part.setdefault(name, RunningSum(self._gradients.dtype)).add(values)
        elif name in self._part_empty:
            self._row[name].copy_(values)
            self._part_empty.remove(name)
        else:
            self._row[name] += values

    def partial(self) -> PartialSums:
        """Return the sums over everything, where these alone are kept."""
        self._end()
        loss, weight = self._whole_totals.tolist()
        by_key = {name: running.total.cpu() for name, running in self._whole.items()}
        of_tensors = self._gradients.of_tensors(by_key)
        return PartialSums(loss, weight, {name: of_tensors[name] for name in self._reached})

    def evaluation(self, grouped: bool, where: str, order: Groups | None) -> Evaluation:
        """Return the mean over all elements, or over those of each group; the same one each time.

        Args:
            grouped: whether of each group.
            where: names the loss and its split.
            order: the groups.

        Where the weights of a group, or of everything, sum to 0, its totals raise an InputError when
        they are read.
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
        """Return the mean gradient of one tensor, whose sum is released."""
        shape, dtype = self._gradients.shapes[name], self._gradients.mean_dtype
        if grouped:
            total = self._rows.pop(name)
            total /= weights.reshape(weights.shape + (1,) * len(shape))
            return total.to(dtype)
        if name not in self._whole:
            return torch.zeros(shape, dtype=dtype, device=self._device)
        total = self._whole.pop(name).total
        # never in place: gradients of several tensors may lie in the same memory, and the sums of
        # groups go on being used
        mean = torch.empty(shape, dtype=dtype, device=self._device)
        values, means = total.reshape(-1), mean.view(-1)
        # piece by piece, for to take twice the memory takes longer than to divide
        for _, part in blocks(1, values.numel()):
            means[part] = values[part].double() / weights
        return mean


def refusing_weightless(
    where: str, labels: Sequence[object] | None, first: int = 0
) -> Callable[[Array], None]:
    """Return what refuses a loss, or its groups, whose weights sum to 0, once its totals are read.

    Args:
        where: names the loss and its split.
        labels: of all groups; None where there are none.
        first: position of the first group that there are totals of.
    """

    def refuse(totals: Array) -> None:
        weights = totals[..., 1].reshape(-1)
        if not (weights > 0).all():
            empty = int((weights > 0).argmin())
            place = where if labels is None else f"group {labels[first + empty]!r} of {where}"
            raise _weightless(place, float(weights[empty]))

    return refuse


def _weightless(place: str, total: float) -> InputError:
    return InputError(f"the weights of {place} sum to {total}. Give at least one element a weight.")
