"""A point between two others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Between(Mapping[str, Tensor]):
    """The point θ + x(θ′ − θ), each tensor computed when it is asked for; tensors that are not
    floating (counters) are loaded, never interpolated.

    Args:
        start: θ.
        end: θ′.
        x: where between them.
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
