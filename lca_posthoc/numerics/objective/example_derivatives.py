"""Directional derivatives of the loss of every example of a batch: of all at once where taps can
tell them apart, or of one example at a time.
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
    """Takes the derivatives of the examples of a batch along directions."""

    def of(self, part: GroupValues, examples: int) -> Mapping[str, Tensor]:
        """Return them for each tensor the values depend on, by use, see `ExampleShares`,
        (directions, examples, uses) float64.
        """


class TappedDerivatives:
    """Derivatives of batches of any examples, in one backward pass over each.

    Args:
        taps: tell them, while they are the context of the pass.
        tensors: leaves of autograd's, by name.
        axes: where the examples are, see `tap_check.check`.
    """

    def __init__(self, taps: Taps, tensors: Mapping[str, Tensor], axes: Axes) -> None:
        self._taps, self._tensors, self._axes = taps, tensors, axes

    def of(self, part: GroupValues, examples: int) -> Mapping[str, Tensor]:
        """Return the derivatives of a batch.

        Raises:
            InputError: where the share of an example in a tensor cannot be told.
        """
        shares = ExampleShares(self._tensors, self._taps.directions, examples, self._axes)
        self._taps.backward(part.values.double().sum(), shares)
        for name, why in shares.untold.items():
            raise InputError(
                f"what single examples contribute to tensor {name!r} cannot be told on a batch, "
                f"though it could on a sample: {why}. Run again into another directory with --keep "
                'units for a loss with groups; for Loss(per="example"), with --batch-size 1.'
            )
        with torch._C.DisableTorchFunction():  # taps watch what the loss does, not this
            return shares.reached


class SingleDerivatives:
    """Derivatives of batches of one example each, of any model.

    Args:
        tensors: leaves of autograd's, by name.
        motions: the directions.
    """

    def __init__(self, tensors: Mapping[str, Tensor], motions: Sequence[Motion]) -> None:
        self._gradients = SumsAlong(tensors, Along(dict.fromkeys(tensors), motions))

    def of(self, part: GroupValues, examples: int) -> Mapping[str, Tensor]:
        """Return the derivatives of an example."""
        assert examples == 1, "batches of one example"
        sums = self._gradients.sums(part.values.double().sum())
        return {name: of_tensor[..., None] for name, of_tensor in sums.items()}


def totals_by_example(part: GroupValues, examples: int) -> Tensor:
    """Return Σ values and Σ weights of each example of a batch, (examples, 2) float64."""
    values = part.values.detach()
    weights = torch.ones_like(values) if part.weights is None else part.weights
    sums = [numbers.double().reshape(examples, -1).sum(1) for numbers in (values, weights)]
    return torch.stack(sums, 1)
