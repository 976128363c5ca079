"""Compute directional derivatives of the loss of every example of a batch: all at once if taps can
separate them, or one example at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...errors import InputError
from .directions import Along, Motion, SumsAlong
from .example_axis import Axes
from .passes import GroupValues
from .taps import ExampleShares, Taps


class Derivatives(Protocol):
    """Compute the derivatives of the examples of a batch along directions."""

    def of(self, part: GroupValues, examples: int) -> Mapping[str, Tensor]:
        """Return the derivatives for each tensor the values depend on, by use, see `ExampleShares`.

        Args:
            part: values of the batch.
            examples: number of examples.

        Returns:
            Derivatives, (directions, examples, uses) float64.
        """


class TappedDerivatives:
    """Compute derivatives for batches of any size, with one backward pass each.

    Args:
        taps: separate the examples, while they are the context of the pass.
        tensors: leaves of autograd, by name.
        axes: location of the examples, see `tap_check.check`.
    """

    def __init__(self, taps: Taps, tensors: Mapping[str, Tensor], axes: Axes) -> None:
        self._taps, self._tensors, self._axes = taps, tensors, axes

    def of(self, part: GroupValues, examples: int) -> Mapping[str, Tensor]:
        """Return the derivatives of a batch; see `Derivatives.of`.

        Args:
            part: values of the batch.
            examples: number of examples.

        Raises:
            InputError: if the share of an example in a tensor cannot be determined.
        """
        shares = ExampleShares(self._tensors, self._taps.directions, examples, self._axes)
        self._taps.backward(part.values.double().sum(), shares)
        for name, why in shares.untold.items():
            raise InputError(
                f"the contribution of single examples to tensor {name!r} cannot be determined on "
                f"a batch, though it could on a sample: {why}. Run again into another directory with "
                '--keep units for a loss with groups; for Loss(per="example"), with --batch-size 1.'
            )
        with torch._C.DisableTorchFunction():  # taps shall only observe the loss
            return shares.reached


class SingleDerivatives:
    """Compute derivatives for batches of one example each, for any model.

    Args:
        tensors: leaves of autograd, by name.
        motions: the directions.
    """

    def __init__(self, tensors: Mapping[str, Tensor], motions: Sequence[Motion]) -> None:
        self._gradients = SumsAlong(tensors, Along(dict.fromkeys(tensors), motions))

    def of(self, part: GroupValues, examples: int) -> Mapping[str, Tensor]:
        """Return the derivatives of an example; see `Derivatives.of`.

        Args:
            part: values of the batch.
            examples: 1.
        """
        assert examples == 1, "batches of one example"
        sums = self._gradients.sums(part.values.double().sum())
        return {name: of_tensor[..., None] for name, of_tensor in sums.items()}


def totals_by_example(part: GroupValues, examples: int) -> Tensor:
    """Return Σ values and Σ weights of each example of a batch, (examples, 2) float64.

    Args:
        part: values of the batch.
        examples: number of examples.
    """
    values = part.values.detach()
    weights = torch.ones_like(values) if part.weights is None else part.weights
    sums = [numbers.double().reshape(examples, -1).sum(1) for numbers in (values, weights)]
    return torch.stack(sums, 1)
