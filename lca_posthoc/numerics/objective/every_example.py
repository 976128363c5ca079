"""The loss of every example of a split, and its derivatives along directions; what a loss over all
of them comes to follows from these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import InputError
from .batches import Order
from .example_derivatives import Derivatives, totals_by_example
from .passes import GroupValues
from .sums import Evaluation


class EveryExample:
    """Σ values, Σ weights and Σ directional derivatives of every example of a split.

    Args:
        derivatives: takes those of a batch; None where the loss alone is wanted.
        names: of the tensors.
        directions: their number.
        examples: of the split.
        device: where the sums are.
    """

    def __init__(
        self,
        derivatives: Derivatives | None,
        names: Sequence[str],
        directions: int,
        examples: int,
        device: torch.device,
    ) -> None:
        self._derivatives = derivatives
        self._totals = torch.zeros((examples, 2), dtype=torch.float64, device=device)
        shape = (examples, directions)
        self._shares: Mapping[str, Tensor] = {
            name: torch.zeros(shape, dtype=torch.float64, device=device)
            for name in (names if derivatives is not None else ())
        }
        self._reached: set[str] = set()

    @property
    def needs_graph(self) -> bool:
        """Tell whether derivatives are taken too."""
        return self._derivatives is not None

    def take(self, part: GroupValues) -> None:
        """Take in a batch of examples that are neighbours in the order of the data."""
        assert part.codes is not None, "the batch does not say which examples it holds"
        examples = len(part.codes)
        rows = slice(int(part.codes[0]), int(part.codes[0]) + examples)
        self._totals[rows] = totals_by_example(part, examples)
        if self._derivatives is None:
            return
        for name, share in self._derivatives.of(part, examples).items():
            self._shares[name][rows] = share.T
            self._reached.add(name)

    def evaluation(self, order: Order | None, where: str) -> Evaluation:
        """Return the weighted mean over all examples, or over those of each group, with what it is
        the mean of.

        Args:
            order: the groups; None for one of all.
            where: names the loss and its split.

        Raises:
            InputError: where the weights of a group, or of everything, sum to 0.
        """
        if order is None:
            totals = sum_of_rows(self._totals)
            shares = {name: sum_of_rows(rows) for name, rows in self._shares.items()}
        else:
            members, sizes = torch.cat(list(order.members)), torch.tensor(order.counts)
            totals = _sums_of_groups(self._totals, members, sizes)
            shares = {
                name: _sums_of_groups(rows, members, sizes) for name, rows in self._shares.items()
            }
        weights = totals[..., 1]
        if not bool((weights > 0).all()):
            empty = int((weights.reshape(-1) > 0).int().argmin())
            place = where if order is None else f"group {order.labels[empty]!r} of {where}"
            raise InputError(
                f"the weights of {place} sum to {float(weights.reshape(-1)[empty])}. Give at least "
                "one element a weight."
            )
        return self._mean(totals, shares, self._mean(self._totals, self._shares, None))

    def _mean(
        self, totals: Tensor, shares: Mapping[str, Tensor], examples: Evaluation | None
    ) -> Evaluation:
        """Return sums divided by their weights; 0 where there is none."""
        sums, weights = totals.unbind(-1)
        weightless, divisors = weights == 0, weights[..., None]
        return Evaluation(
            (sums / weights).masked_fill_(weightless, 0.0).cpu().numpy()[()],
            {
                name: (values / divisors).masked_fill_(weightless[..., None], 0.0)[..., None]
                for name, values in shares.items()
            },
            weights.cpu().numpy()[()],
            frozenset(self._shares.keys() - self._reached),
            examples,
        )


def sum_of_rows(rows: Tensor) -> Tensor:
    """Return the sum of rows, added one after the other: torch's own order depends on how many
    numbers a row has, and with it the last bit.
    """
    count = torch.tensor([len(rows)], device=rows.device)
    return torch.segment_reduce(rows, "sum", lengths=count, axis=0)[0]


def _sums_of_groups(rows: Tensor, members: Tensor, sizes: Tensor) -> Tensor:
    """Return sums over the rows of each group, one after the other.

    Args:
        rows: (rows, ...).
        members: of the groups in turn, positions of rows.
        sizes: rows of each group.
    """
    chosen = rows[members.to(rows.device)]
    return torch.segment_reduce(chosen, "sum", lengths=sizes.to(rows.device), axis=0)
