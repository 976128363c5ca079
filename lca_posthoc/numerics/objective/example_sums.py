"""Sum a loss's directional derivatives over groups of examples, from batches in the order of the
data.

Batches of a single group each cost a pass over the model's weights for every group, however few
examples it has. If taps separate the examples, a batch may mix groups: the shares of its examples
are added by group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .directions import EVERY, Gradients, SumsAlong
from .every_example import sum_of_rows
from .example_derivatives import Derivatives, totals_by_example
from .passes import GroupValues
from .sums import RunningSum, Sums


class SumsByExample(Sums):
    """Accumulate Σ values, Σ weights and Σ directional derivatives over batches whose examples
    belong to several groups.

    Args:
        derivatives: computes the derivatives of a batch; None if only the loss is needed.
        gradients: their sums along directions, with each tensor as one unit; nothing if only the
            loss is needed.
        groups: range of groups to accumulate.
        plain: whether to accumulate the sums over everything.
        device: device of the sums.
    """

    def __init__(
        self,
        derivatives: Derivatives | None,
        gradients: Gradients,
        groups: range,
        plain: bool,
        device: torch.device,
    ) -> None:
        super().__init__(gradients, device, groups, plain)
        self._derivatives, self._range = derivatives, groups

    def take(self, part: GroupValues) -> None:
        """Add the values of a batch and its derivatives to each example's group.

        Raises:
            InputError: if the share of an example in a tensor cannot be determined.
        """
        assert part.codes is not None, "the batch does not say to which groups its examples belong"
        examples = len(part.codes)
        members = _Members(part.codes.to(self._device), self._range)
        if not len(members.rows):
            return
        self._row_totals[members.rows] += members.sums(totals_by_example(part, examples))
        if self._derivatives is None:
            return
        shares = self._derivatives.of(part, examples)
        if shares:
            assert isinstance(self._gradients, SumsAlong), "derivatives are along directions"
            by_tensor = {name: share.sum(-1).T for name, share in shares.items()}
            none = torch.zeros_like(next(iter(by_tensor.values())))
            names = self._gradients.units.places
            every = torch.stack([by_tensor.get(name, none) for name in names], -1)
            self._rows[EVERY][members.rows] += members.sums(every)
            self._reached.update(shares)

    def _close(self) -> None:
        """Sum over the groups, in order, if the sums over everything are needed."""
        if self._plain and not self._means:
            for name, rows in self._rows.items():
                self._whole[name] = RunningSum(rows.dtype)
                self._whole[name].add(sum_of_rows(rows))
            self._whole_totals = sum_of_rows(self._row_totals)


class _Members:
    """Sort the examples of a batch by group.

    Args:
        codes: index of its group for each example, (examples,) int64.
        groups: range of groups to accumulate.

    Attributes:
        rows: positions of the groups present among those accumulated.
    """

    def __init__(self, codes: Tensor, groups: range) -> None:
        inside = torch.nonzero((codes >= groups.start) & (codes < groups.stop)).reshape(-1)
        self._order = inside[torch.argsort(codes[inside], stable=True)]
        present, self._counts = torch.unique_consecutive(codes[self._order], return_counts=True)
        self.rows = present - groups.start

    def sums(self, values: Tensor) -> Tensor:
        """Return sums by group, (groups present, ...) from (examples, ...), each in the order of
        the data.
        """
        return torch.segment_reduce(values[self._order], "sum", lengths=self._counts, axis=0)
