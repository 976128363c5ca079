"""Multiply the gradient of an output by its derivative along a direction, and sum the products by
example.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .example_axis import ExampleAxis, sums_along


class Products(Protocol):
    """Hold products, one for each entry of an output."""

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the output."""

    def sums(self, axis: ExampleAxis, examples: int) -> Tensor:
        """Return the sum over the entries of each example, (examples,) float64.

        Args:
            axis: location of the examples.
            examples: number of examples.
        """

    def whole(self) -> Tensor:
        """Return the sum over all entries and over their absolute values, (2,) float64."""


class EntryProducts:
    """Compute products entry by entry.

    Args:
        above: gradient of the output.
        tangent: its derivative, which broadcasts to that shape.
        is_own: whether the products may overwrite the derivative.
    """

    def __init__(self, above: Tensor, tangent: Tensor, is_own: bool) -> None:
        is_own = is_own and tangent.shape == above.shape and tangent.dtype == above.dtype
        self._products = tangent.mul_(above) if is_own else above * tangent
        self.shape = above.shape

    def sums(self, axis: ExampleAxis, examples: int) -> Tensor:
        """Return the sum over the entries of each example, (examples,) float64.

        Args:
            axis: location of the examples.
            examples: number of examples.
        """
        return axis.fold(sums_along(self._products, axis.axis), examples)

    def whole(self) -> Tensor:
        """Return the sum over all entries and over their absolute values, (2,) float64."""
        flat = self._products.reshape(1, -1)
        return torch.cat([sums_along(flat, 0), sums_along(flat.abs(), 0)])


class Channels:
    """Compute what all directions of an operand with one number per channel share.

    Args:
        above: gradient of the output.
        factor: factor with which the operand enters the output; None for 1. The call overwrites it.
        axes_behind: number of axes after that of the channels.
    """

    def __init__(self, above: Tensor, factor: Tensor | None, axes_behind: int) -> None:
        self.shape = above.shape
        self.axis = above.dim() - 1 - axes_behind
        self.axes_behind = axes_behind
        if factor is None:
            self.products = above
        else:
            is_alike = factor.dtype == above.dtype
            self.products = factor.mul_(above) if is_alike else factor * above
        # the sum over the axes after the channels, if any, which is small
        self.by_channel = self.products
        if axes_behind:
            self.by_channel = self.products.flatten(self.axis + 1).sum(-1).double()


class ChannelProducts:
    """Compute products of one direction of an operand with one number per channel.

    Args:
        channels: what all directions share.
        direction: the direction, (channels,).
    """

    def __init__(self, channels: Channels, direction: Tensor) -> None:
        self._channels, self._direction = channels, direction
        self.shape = channels.shape

    def sums(self, axis: ExampleAxis, examples: int) -> Tensor:
        """Return the sum over the entries of each example, (examples,) float64.

        Args:
            axis: location of the examples.
            examples: number of examples.
        """
        if axis.axis >= self._channels.axis:
            return self._by_entry().sums(axis, examples)
        by_channel = self._channels.by_channel
        along = by_channel @ self._direction.to(by_channel.dtype)
        return axis.fold(sums_along(along, axis.axis), examples)

    def whole(self) -> Tensor:
        """Return the sum over all entries and over their absolute values, (2,) float64."""
        return self._by_entry().whole()

    def _by_entry(self) -> EntryProducts:
        behind = (1,) * self._channels.axes_behind
        direction = self._direction.reshape(*self._direction.shape, *behind)
        return EntryProducts(self._channels.products, direction, False)
