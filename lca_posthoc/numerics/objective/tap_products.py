"""Products of the gradient of an output and its derivative along a direction, and their sums."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .example_axis import ExampleAxis, sums_along


class Products(Protocol):
    """Products, one for each entry of an output."""

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the output."""

    def sums(self, axis: ExampleAxis, examples: int) -> Tensor:
        """Return the sum over the entries of each example, (examples,) float64."""

    def whole(self) -> Tensor:
        """Return the sum over all entries and that over their sizes, (2,) float64."""


class EntryProducts:
    """Products that are computed entry by entry.

    Args:
        above: the gradient of the output.
        tangent: its derivative, of a shape that broadcasts to that.
        is_own: whether the products may take the place of the derivative.
    """

    def __init__(self, above: Tensor, tangent: Tensor, is_own: bool) -> None:
        is_own = is_own and tangent.shape == above.shape and tangent.dtype == above.dtype
        self._products = tangent.mul_(above) if is_own else above * tangent
        self.shape = above.shape

    def sums(self, axis: ExampleAxis, examples: int) -> Tensor:
        """Return the sum over the entries of each example, (examples,) float64."""
        return axis.fold(sums_along(self._products, axis.axis), examples)

    def whole(self) -> Tensor:
        """Return the sum over all entries and that over their sizes, (2,) float64."""
        flat = self._products.reshape(1, -1)
        return torch.cat([sums_along(flat, 0), sums_along(flat.abs(), 0)])


class Channels:
    """Products of an operand that has one number for each channel: what all its directions share.

    Args:
        above: the gradient of the output.
        factor: by which the operand enters the output; None for 1. It is written to.
        axes_behind: the number of axes behind that of the channels.
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
        # summed over the axes behind, where there are any: then small
        self.by_channel = self.products
        if axes_behind:
            self.by_channel = self.products.flatten(self.axis + 1).sum(-1).double()


class ChannelProducts:
    """Products of one direction of an operand that has one number for each channel.

    Args:
        channels: what all directions share.
        direction: (channels,).
    """

    def __init__(self, channels: Channels, direction: Tensor) -> None:
        self._channels, self._direction = channels, direction
        self.shape = channels.shape

    def sums(self, axis: ExampleAxis, examples: int) -> Tensor:
        """Return the sum over the entries of each example, (examples,) float64."""
        if axis.axis >= self._channels.axis:
            return self._by_entry().sums(axis, examples)
        by_channel = self._channels.by_channel
        along = by_channel @ self._direction.to(by_channel.dtype)
        return axis.fold(sums_along(along, axis.axis), examples)

    def whole(self) -> Tensor:
        """Return the sum over all entries and that over their sizes, (2,) float64."""
        return self._by_entry().whole()

    def _by_entry(self) -> EntryProducts:
        behind = (1,) * self._channels.axes_behind
        direction = self._direction.reshape(*self._direction.shape, *behind)
        return EntryProducts(self._channels.products, direction, False)
