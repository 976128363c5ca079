"""Represent a point between two others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Between(Mapping[str, Tensor]):
    """Represent the point θ + x(θ′ − θ), with each tensor computed on access.

    Tensors that are not floating (counters) are copied from an end, never interpolated.

    Args:
        start: θ.
        end: θ′.
        x: position between them.
    """

    def __init__(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], x: float) -> None:
        self.start, self.end, self.x = start, end, x

    def __getitem__(self, name: str) -> Tensor:
        start, end = self.start[name], self.end[name]
        if start.is_floating_point():
            return torch.lerp(start, end, self.x)
        return start if self.x < 1 else end

    def __iter__(self) -> Iterator[str]:
        return iter(self.start)

    def __len__(self) -> int:
        return len(self.start)
