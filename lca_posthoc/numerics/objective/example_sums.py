"""Sums of a loss and its directional derivatives over groups of examples, from batches in the order
of the data.

A batch of one group each costs a pass over the model's weights for every group, however few
examples it has. Where taps tell every example's share, a batch may hold examples of any groups:
its shares are added up by group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import InputError
from .directions import Gradients
from .example_axis import Axes
from .passes import GroupValues
from .sums import RunningSum, Sums
from .taps import ExampleShares, Taps


class SumsByExample(Sums):
    """Σ values, Σ weights and Σ directional derivatives over batches whose examples belong to
    several groups.

    Args:
        taps: tell the derivatives of every example, while they are the context of the pass; None
            where the loss alone is wanted.
        tensors: leaves of autograd's, by name.
        gradients: their sums along directions, each tensor one unit; nothing without taps.
        axes: where the examples are, see `tap_check.check`.
        groups: those that are taken in.
        plain: whether the sums over everything are kept.
        device: where the sums are.
    """

    def __init__(
        self,
        taps: Taps | None,
        tensors: Mapping[str, Tensor],
        gradients: Gradients,
        axes: Axes,
        groups: range,
        plain: bool,
        device: torch.device,
    ) -> None:
        super().__init__(gradients, device, groups, plain)
        self._taps, self._tensors, self._axes, self._range = taps, tensors, axes, groups

    def take(self, part: GroupValues) -> None:
        """Add the values of a batch, and its derivatives, to those of each example's group.

        Raises:
            InputError: where the share of an example in a tensor cannot be told.
        """
        assert part.codes is not None, "the batch does not say to which groups its examples belong"
        examples, values = len(part.codes), part.values
        weights = torch.ones_like(values) if part.weights is None else part.weights
        members = _Members(part.codes.to(self._device), self._range)
        if not len(members.rows):
            return
        totals = [_by_example(each, examples) for each in (values.detach(), weights)]
        self._row_totals[members.rows] += members.sums(torch.stack(totals, 1))
        if self._taps is None:
            return
        shares = ExampleShares(self._tensors, self._taps.directions, examples, self._axes)
        self._taps.backward(values.double().sum(), shares)
        for name, why in shares.untold.items():
            raise InputError(
                f"what single examples contribute to tensor {name!r} cannot be told on a batch, "
                f"though it could on a sample: {why}. Run again into another directory with --keep "
                "units, which takes batches of one group each."
            )
        for name, share in shares.reached.items():
            self._rows[name][members.rows, :, 0] += members.sums(share.T)
        self._reached.update(shares.reached)

    def _close(self) -> None:
        """Add the groups up, in their order, where the sums over everything are kept."""
        if self._plain and not self._means:
            for name, rows in self._rows.items():
                self._whole[name] = RunningSum(rows.dtype)
                self._whole[name].add(_one_by_one(rows))
            self._whole_totals = _one_by_one(self._row_totals)


class _Members:
    """The examples of a batch by group.

    Args:
        codes: the position of its group for each example, (examples,) int64.
        groups: those that are taken in.

    Attributes:
        rows: of the groups that are present, their positions among those taken in.
    """

    def __init__(self, codes: Tensor, groups: range) -> None:
        inside = torch.nonzero((codes >= groups.start) & (codes < groups.stop)).reshape(-1)
        self._order = inside[torch.argsort(codes[inside], stable=True)]
        present, self._counts = torch.unique_consecutive(codes[self._order], return_counts=True)
        self.rows = present - groups.start

    def sums(self, values: Tensor) -> Tensor:
        """Return sums by group of what each example has, (groups present, ...) of (examples, ...),
        each in the order of the data.
        """
        return torch.segment_reduce(values[self._order], "sum", lengths=self._counts, axis=0)


def _one_by_one(rows: Tensor) -> Tensor:
    """Return the sum of rows, added one after the other: torch's own order depends on how many
    numbers a row has, and with it the last bit.
    """
    count = torch.tensor([len(rows)], device=rows.device)
    return torch.segment_reduce(rows, "sum", lengths=count, axis=0)[0]


def _by_example(values: Tensor, examples: int) -> Tensor:
    """Return sums over all that belongs to an example, (examples,) float64."""
    return values.double().reshape(examples, -1).sum(1)
