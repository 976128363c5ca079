"""Collect the loss of every example or element of a split, its derivatives along directions, and
the resulting mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...errors import InputError
from .batches import Order
from .example_derivatives import Derivatives, totals_by_example
from .in_a_row import OfUnits, Units
from .passes import GroupValues
from .readings import Array, Reading
from .sums import Evaluation, refusing_weightless


class EveryExample:
    """Collect Σ values, Σ weights and Σ directional derivatives of every example of a split, or of
    every element of the loss, in order.

    Args:
        uses: number of uses that are kept apart, by tensor, see `uses_of`; empty if only the loss
            is needed.
        directions: number of directions.
        rows: number of examples, or elements, of the split.
        device: device of the sums.
        derivatives: computes the derivatives of the examples of a batch.
    """

    def __init__(
        self,
        uses: Mapping[str, int],
        directions: int,
        rows: int,
        device: torch.device,
        derivatives: Derivatives | None = None,
    ) -> None:
        self._derivatives, self._next = derivatives, 0
        self._totals = torch.zeros((rows, 2), dtype=torch.float64, device=device)
        units = Units(uses)
        self._shares = OfUnits(
            torch.zeros((rows, directions, units.count), dtype=torch.float64, device=device), units
        )
        self._reached: set[str] = set()

    @property
    def needs_graph(self) -> bool:
        """Return whether derivatives are computed too."""
        return self._derivatives is not None

    def take(self, part: GroupValues) -> None:
        """Add the next batch of examples."""
        assert part.codes is not None, "the batch does not say which examples it holds"
        examples = len(part.codes)
        shares = {} if self._derivatives is None else self._derivatives.of(part, examples)
        with torch._C.DisableTorchFunction():  # taps shall only observe the loss
            self.put(totals_by_example(part, examples), shares)

    def put(self, totals: Tensor, shares: Mapping[str, Tensor]) -> None:
        """Add the next rows.

        Args:
            totals: Σ values and Σ weights of each row, (rows, 2) float64.
            shares: by tensor that the values depend on, derivatives, (directions, rows, uses)
                float64.

        Raises:
            InputError: if there are more rows than expected.
        """
        rows = slice(self._next, self._next + len(totals))
        self._next = rows.stop
        if rows.stop > len(self._totals):
            raise InputError(
                f"the loss has more than {len(self._totals):,} elements, the number of elements of "
                "the first example times the number of examples. Pad all examples to one shape."
            )
        self._totals[rows] = totals
        for name, share in shares.items():
            self._shares[name][rows] = share.transpose(0, 1)
            self._reached.add(name)

    def evaluation(self, order: Order | None, where: str) -> Evaluation:
        """Return the weighted mean over all examples, or over each group, with the examples
        themselves.

        Args:
            order: the groups; None for a single group.
            where: name of the loss and its split, for messages.

        Raises:
            InputError: if rows are missing or, when the totals are read, if the weights of a group,
                or all weights, sum to 0.
        """
        if self._next != len(self._totals):
            raise InputError(
                f"{where} has {self._next:,} elements, not {len(self._totals):,}, the number of "
                "elements of the first example times the number of examples. Pad all examples to "
                "one shape."
            )
        rows = self._totals, self._shares.row
        if order is None:
            totals, shares = map(sum_of_rows, rows)
        else:
            members = torch.cat(list(order.members))
            sizes = torch.tensor(order.counts, device="cpu")
            totals, shares = (_sums_of_groups(values, members, sizes) for values in rows)
        units = Units(dict.fromkeys(self._shares, 1))
        of_tensors = OfUnits(self._shares.units.totals(shares), units)
        refuse = refusing_weightless(where, None if order is None else order.labels)
        every = self._mean(self._totals, self._shares, None)
        return self._mean(totals, of_tensors, every, refuse)

    def _mean(
        self,
        totals: Tensor,
        shares: OfUnits,
        examples: Evaluation | None,
        refuse: Callable[[Array], None] = lambda totals: None,
    ) -> Evaluation:
        """Return sums divided by their weights; 0 if there is no weight."""
        sums, weights = totals.unbind(-1)
        weightless, divisors = weights == 0, weights[..., None, None]
        mean = (sums / weights).masked_fill_(weightless, 0.0)
        return Evaluation(
            Reading(torch.stack([mean, weights], -1), refuse),
            shares.like((shares.row / divisors).masked_fill_(weightless[..., None, None], 0.0)),
            frozenset(self._shares.keys() - self._reached),
            examples,
        )


def sum_of_rows(rows: Tensor) -> Tensor:
    """Return the sum of rows, added one after the other.

    The order of torch's own sum depends on the length of a row, and with it the last bit.
    """
    count = torch.tensor([len(rows)], device=rows.device)
    return torch.segment_reduce(rows, "sum", lengths=count, axis=0)[0]


def _sums_of_groups(rows: Tensor, members: Tensor, sizes: Tensor) -> Tensor:
    """Return sums over the rows of each group, added one after the other.

    Args:
        rows: the rows, (rows, ...).
        members: positions of rows, for the groups in turn.
        sizes: number of rows of each group.
    """
    chosen = rows[members.to(rows.device)]
    return torch.segment_reduce(chosen, "sum", lengths=sizes.to(rows.device), axis=0)
