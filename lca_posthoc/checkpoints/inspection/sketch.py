"""Keep a few thousand numbers of every checkpoint, from which distances and correlations of any two
are told.

A sketch is a random projection: element i of a tensor, with a random sign, is added to number
i mod K. The squared distance of two sketches is that of the weights on average, with a standard
deviation of at most √(2/K) of it as long as no column of a matrix falls together with another, for
which K is prime: 2 % at K = 4,093, and half of that for distances.
"""

from __future__ import annotations

import google_crc32c
import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

_WIDTHS = (4093, 2039, 1021, 509, 251)
_MOST_BYTES = 2**29  # of all sketches
_ROWS = 256  # of a piece, as wide as the sketch


def width_for(checkpoints: int) -> int:
    """Return how many numbers a sketch has: the more checkpoints, the fewer.

    >>> width_for(154), width_for(100_000)
    (4093, 509)
    """
    fitting = [width for width in _WIDTHS if 8 * width * checkpoints <= _MOST_BYTES]
    return fitting[0] if fitting else _WIDTHS[-1]


class Projection:
    """One random projection, the same for all checkpoints.

    Args:
        width: K, of the sketches.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._of_ones: dict[str, Numbers] = {}

    @property
    def piece(self) -> int:
        """Return how many elements of a tensor are taken at a time."""
        return _ROWS * self.width

    def start(self, name: str) -> TensorSketch:
        """Return the empty sketch of a tensor."""
        return TensorSketch(name, self.width, self._of_ones)


class TensorSketch:
    """Sum up the sketch of one tensor, whose pieces come in order; see `Projection`."""

    def __init__(self, name: str, width: int, of_ones: dict[str, Numbers]) -> None:
        self._name, self._width, self._of_ones = name, width, of_ones
        self._signs = np.random.default_rng(int(google_crc32c.value(name.encode())))
        self._sums, self._ones = np.zeros(width), np.zeros(width)
        self._total, self._squares, self._elements = 0.0, 0.0, 0

    def add(self, numbers: Numbers) -> None:
        """Add the next piece, all but the last as long as `Projection.piece`."""
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
        """Return the sketch of the tensor less its mean, and the sum of its squares.

        The mean is taken off because tensors of two seeds have it in common where all their
        elements begin alike.
        """
        if self._name not in self._of_ones:
            self._of_ones[self._name] = self._ones
        mean = self._total / self._elements if self._elements else 0.0
        squares = max(0.0, self._squares - self._elements * mean**2)
        return self._sums - mean * self._of_ones[self._name], squares
