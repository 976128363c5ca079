"""Draw random samples of the segments of a training run, `--segments FRACTION@SEED`, and estimate
standard errors of totals.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ..errors import InputError

Numbers = np.ndarray[Any, Any]
_FEWEST = 2  # segments needed for a standard error
_WRITTEN = re.compile(r"(?P<fraction>\d*\.?\d+|\d+\.)@(?P<seed>\d{1,18})")


@dataclass(frozen=True)
class SegmentSample:
    """Describe a random sample of the segments: its fraction, over 0 and up to 1, and its seed."""

    fraction: Fraction
    seed: int

    @classmethod
    def parse(cls, text: str) -> SegmentSample:
        """Parse `FRACTION@SEED`.

        >>> SegmentSample.parse("0.10@7")
        SegmentSample(fraction=Fraction(1, 10), seed=7)

        Raises:
            InputError: if the form is different, or the fraction is not over 0 and up to 1.
        """
        match = _WRITTEN.fullmatch(text.strip())
        fraction = Fraction(match["fraction"]) if match else Fraction(0)
        if match is None or not 0 < fraction <= 1:
            raise InputError(
                f"--segments {text!r} is not FRACTION@SEED, a fraction over 0 and up to 1 and a "
                "whole number. For example 0.1@7, a random tenth of the segments."
            )
        return cls(fraction, int(match["seed"]))

    def __str__(self) -> str:
        return f"{repr(float(self.fraction)).removesuffix('.0')}@{self.seed}"

    def size(self, segments: int) -> int:
        """Return the number of segments in the sample, rounded down.

        Raises:
            InputError: if there are too few for a standard error.
        """
        size = int(self.fraction * segments)
        if size < _FEWEST:
            raise InputError(
                f"--segments {self} selects {size} of {segments} segments, and a standard error "
                f"needs {_FEWEST}. Give a larger fraction, or replay all of them."
            )
        return size

    def drawn(self, segments: int) -> list[int]:
        """Return the positions of the sampled segments in the order they are drawn.

        The sample of a larger fraction with the same seed begins with them.
        """
        return list(map(int, drawing_order(segments, self.seed)[: self.size(segments)]))


def scale(segments: int, sampled: int) -> float:
    """Return the factor from sums over the sampled segments to estimates for all.

    Args:
        segments: number of all segments.
        sampled: number of sampled segments.
    """
    return segments / sampled


def standard_error(values: Numbers, segments: int) -> Numbers:
    """Estimate the standard error of Σ over all segments from a sample.

    The variance in the neighbourhood of a sampled segment is estimated by half of the squared
    differences from the sampled segments before and after it, on average; the first and the last
    have one neighbour. A slow change over training therefore contributes little: a training run
    whose loss falls steeply at first is not treated as uniform. If every segment is sampled, the
    error is 0.

    Args:
        values: values of the sampled segments in the order of training, two or more, (sampled, …).
        segments: number of segments they were drawn from.

    Returns:
        The error, (…), in the unit of the values.
    """
    sampled = len(values)
    halves = np.diff(values, axis=0) ** 2 / 2
    variance = halves.sum(0) + (halves[0] + halves[-1]) / 2
    error: Numbers = scale(segments, sampled) * np.sqrt(variance * (1 - sampled / segments))
    return error


def drawing_order(segments: int, seed: int) -> Numbers:
    """Return the positions from 0 to segments − 1 in a random order whose every prefix is
    stratified.

    The positions are halved recursively. Each half is ordered by itself, and the orders are merged
    so that, of the first n positions, a half of size a contributes n·a/segments, rounded down or up
    at random. Hence for every n, each position is among the first n with the same probability,
    n/segments, and each of 2ᵏ parts of equal length has one of the first 2ᵏ.

    Args:
        segments: number of segments.
        seed: seed of the random numbers.

    Returns:
        The positions, (segments,), int64.
    """
    # its random() gives the same numbers in every release of Python
    draw = random.Random(seed).random
    return _order(0, segments, draw)


def _order(first: int, segments: int, draw: Callable[[], float]) -> Numbers:
    """Return the order of some neighbouring positions; `draw` returns numbers from 0 to 1."""
    if segments == 1:
        return np.array([first])
    left = segments // 2
    rounding = int(draw() * segments)
    # number of left positions among the first n, for n from 0 to all
    counts = (np.arange(segments + 1) * left + rounding) // segments
    is_left = np.diff(counts) == 1
    order = np.empty(segments, dtype=np.int64)
    order[is_left] = _order(first, left, draw)
    order[~is_left] = _order(first + left, segments - left, draw)
    return order
