"""Reduce every checkpoint to a few thousand numbers that estimate distances and correlations.

A sketch is a random projection: element i of a tensor, with a random sign, is added to number i mod
K. The squared distance of two sketches estimates that of the weights without bias. Its relative
standard deviation is at most √(2/K) as long as no two columns of a matrix coincide, which is why K
is prime: 2 % at K = 4,093, and half of that for distances.
"""

from __future__ import annotations

import google_crc32c
import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

_WIDTHS = (4093, 2039, 1021, 509, 251)
_MOST_BYTES = 2**29  # of all sketches together
_ROWS = 256  # of a piece, each as wide as the sketch


def width_for(checkpoints: int) -> int:
    """Choose the number of elements of a sketch: fewer for more checkpoints.

    >>> width_for(154), width_for(100_000)
    (4093, 509)
    """
    fitting = [width for width in _WIDTHS if 8 * width * checkpoints <= _MOST_BYTES]
    return fitting[0] if fitting else _WIDTHS[-1]


class Projection:
    """Define one random projection for all checkpoints.

    Args:
        width: K, the number of elements of a sketch.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._of_ones: dict[str, Numbers] = {}

    @property
    def piece(self) -> int:
        """Return the number of elements of a tensor to process at a time."""
        return _ROWS * self.width

    def start(self, name: str) -> TensorSketch:
        """Return the empty sketch of a tensor."""
        return TensorSketch(name, self.width, self._of_ones)


class TensorSketch:
    """Accumulate the sketch of one tensor from its pieces, in order; see `Projection`."""

    def __init__(self, name: str, width: int, of_ones: dict[str, Numbers]) -> None:
        self._name, self._width, self._of_ones = name, width, of_ones
        self._signs = np.random.default_rng(int(google_crc32c.value(name.encode())))
        self._sums, self._ones = np.zeros(width), np.zeros(width)
        self._total, self._squares, self._elements = 0.0, 0.0, 0

    def add(self, numbers: Numbers) -> None:
        """Add the next piece; every piece but the last has `Projection.piece` elements."""
        bits = np.frombuffer(self._signs.bytes(-(-len(numbers) // 8)), np.uint8)
        signs = np.unpackbits(bits, count=len(numbers)) * np.float64(2) - 1
        if self._name not in self._of_ones:
            self._ones += self._folded(signs)
        self._total += float(numbers.sum())
        self._squares += float(numbers @ numbers)
        self._elements += len(numbers)
        self._sums += self._folded(signs * numbers)

    def _folded(self, numbers: Numbers) -> Numbers:
        padded = np.pad(numbers, (0, -len(numbers) % self._width))
        folded: Numbers = padded.reshape(-1, self._width).sum(axis=0)
        return folded

    def centred(self) -> tuple[Numbers, float]:
        """Return the sketch of the tensor minus its mean, and the sum of squares of the tensor
        minus its mean.

        Subtract the mean because two seeds share it if all elements of a tensor start alike.
        """
        if self._name not in self._of_ones:
            self._of_ones[self._name] = self._ones
        mean = self._total / self._elements if self._elements else 0.0
        squares = max(0.0, self._squares - self._elements * mean**2)
        return self._sums - mean * self._of_ones[self._name], squares
