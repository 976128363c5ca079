"""Keep numbers on their device until they are needed, then copy them to the host together: each
copy waits for all work queued on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Numbers = np.float64 | np.ndarray  # float64 of shape () or (groups,)
Array = np.ndarray[Any, Any]


def _accept(numbers: Array) -> None:
    """Accept all numbers."""


class Reading:
    """Hold numbers that stay on a device until they are first needed.

    Args:
        values: numbers of any shape, float64.
        refuse: called with the numbers on the host; raises an error for invalid ones.
    """

    def __init__(self, values: Tensor, refuse: Callable[[Array], None] = _accept) -> None:
        assert values.dtype == torch.float64, "numbers are read as float64"
        self._values: Tensor | None = values.detach()
        self._refuse = refuse
        self._numbers = np.empty(0)
        self.shape = tuple(values.shape)

    @classmethod
    def known(cls, numbers: Array) -> Reading:
        """Create an instance from numbers on the host."""
        reading = cls(torch.from_numpy(np.array(numbers, dtype="float64")))
        read([reading])
        return reading

    @property
    def numbers(self) -> Array:
        """Return the numbers in their shape; wait for the device the first time, unless `read` did."""
        if self._values is not None:
            read([self])
        return self._numbers

    @property
    def waiting(self) -> Tensor | None:
        """Return the numbers on their device, or None once they are read."""
        return self._values

    def take(self, numbers: Array) -> None:
        """Store the copied numbers, given as a flat array."""
        self._numbers, self._values = numbers.reshape(self.shape), None

    def check(self) -> None:
        """Raise an error if the numbers are invalid."""
        self._refuse(self._numbers)


def read(readings: Iterable[Reading]) -> None:
    """Copy all numbers that are not read yet to the host, in one copy per device."""
    waiting: dict[torch.device, dict[int, Reading]] = {}
    for reading in readings:
        if reading.waiting is not None:
            waiting.setdefault(reading.waiting.device, {})[id(reading)] = reading
    for of_device in waiting.values():
        rows = [
            reading.waiting.reshape(-1)
            for reading in of_device.values()
            if reading.waiting is not None
        ]
        copied = (torch.cat(rows) if len(rows) > 1 else rows[0]).cpu().numpy()
        first = 0
        for reading in of_device.values():
            size = math.prod(reading.shape)
            reading.take(copied[first : first + size])
            first += size
    for of_device in waiting.values():
        for reading in of_device.values():
            reading.check()
