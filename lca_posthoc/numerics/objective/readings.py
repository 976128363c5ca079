"""Numbers that stay on their device until they are wanted, and are then copied to the host together:
each copy waits for everything the device was asked to do before.
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
    """Refuse nothing."""


class Reading:
    """Numbers that are on a device until they are first wanted.

    Args:
        values: float64, of any shape.
        refuse: called with them once they are on the host; it raises an error for some.
    """

    def __init__(self, values: Tensor, refuse: Callable[[Array], None] = _accept) -> None:
        assert values.dtype == torch.float64, "numbers are read as float64"
        self._values: Tensor | None = values.detach()
        self._refuse = refuse
        self._numbers = np.empty(0)
        self.shape = tuple(values.shape)

    @classmethod
    def known(cls, numbers: Array) -> Reading:
        """Return numbers that are on the host already."""
        reading = cls(torch.from_numpy(np.array(numbers, dtype="float64")))
        read([reading])
        return reading

    @property
    def numbers(self) -> Array:
        """Return them, of the shape they had; waits for the device the first time, unless `read`
        has done so.
        """
        if self._values is not None:
            read([self])
        return self._numbers

    @property
    def waiting(self) -> Tensor | None:
        """Return those that are not read yet, on their device; None once they are."""
        return self._values

    def take(self, numbers: Array) -> None:
        """Take them in as they were copied, in a row."""
        self._numbers, self._values = numbers.reshape(self.shape), None

    def check(self) -> None:
        """Refuse what is to be refused of them."""
        self._refuse(self._numbers)


def read(readings: Iterable[Reading]) -> None:
    """Copy all that is not read yet to the host, at once for each device."""
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
