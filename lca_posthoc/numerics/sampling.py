"""Random parts of the segments of a training, `--segments FRACTION@SEED`: which segments they are,
and the standard errors of totals that are estimated from them.
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
_FEWEST = 2  # segments, from which on a standard error can be told
_WRITTEN = re.compile(r"(?P<fraction>\d*\.?\d+|\d+\.)@(?P<seed>\d{1,18})")


@dataclass(frozen=True)
class SegmentSample:
    """A random part of the segments: its fraction of all, over 0 and up to 1, and the seed it is
    drawn from.
    """

    fraction: Fraction
    seed: int

    @classmethod
    def parse(cls, text: str) -> SegmentSample:
        """Read `FRACTION@SEED`.

        Raises:
            InputError: where it is written otherwise, or the fraction is not over 0 and up to 1.

        >>> SegmentSample.parse("0.10@7")
        SegmentSample(fraction=Fraction(1, 10), seed=7)
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
        """Return the number of segments it has of so many, rounded down.

        Raises:
            InputError: where they are too few for a standard error.
        """
        size = int(self.fraction * segments)
        if size < _FEWEST:
            raise InputError(
                f"--segments {self} of {segments} segments are {size}, and a standard error needs "
                f"{_FEWEST}. Give a larger fraction, or replay all of them."
            )
        return size

    def drawn(self, segments: int) -> list[int]:
        """Return the positions of the segments it has of so many, in the order they are drawn in.

        A larger fraction of the same seed begins with them.
        """
        return list(map(int, drawing_order(segments, self.seed)[: self.size(segments)]))


def scale(segments: int, sampled: int) -> float:
    """Return what sums over the sampled segments are multiplied by, to estimate those over all."""
    return segments / sampled


def standard_error(values: Numbers, segments: int) -> Numbers:
    """Return the standard error of Σ over all segments, as it is estimated from a sample.

    The variance of what lies in a sampled segment's neighbourhood is estimated by half of the
    squared differences from the segments sampled before and after it, on average; the first and
    the last have one neighbour. So a slow change over training counts little, and the sample of a
    training whose loss falls steeply at first is not taken for one at random from all of it. With
    every segment sampled the error is 0.

    Args:
        values: of the sampled segments in the order of training, two or more, (sampled, …).
        segments: of which they were drawn.

    Returns:
        (…), in the unit of the values.
    """
    sampled = len(values)
    halves = np.diff(values, axis=0) ** 2 / 2
    variance = halves.sum(0) + (halves[0] + halves[-1]) / 2
    error: Numbers = scale(segments, sampled) * np.sqrt(variance * (1 - sampled / segments))
    return error


def drawing_order(segments: int, seed: int) -> Numbers:
    """Return all positions from 0 to segments − 1 in a random order, of which every beginning is
    stratified over them.

    The positions are halved again and again. Each half is ordered by itself, and the orders are
    merged so that of the first n a half of a of them gets n·a/segments, rounded down or up at
    random: so for every n each position is among the first n with the same probability,
    n/segments, and of 2ᵏ parts of equal length each has one of the first 2ᵏ.

    Args:
        segments: how many there are.
        seed: of the random numbers.

    Returns:
        (segments,), int64.
    """
    # whose random() gives the same numbers in every release
    draw = random.Random(seed).random
    return _order(0, segments, draw)


def _order(first: int, segments: int, draw: Callable[[], float]) -> Numbers:
    """Return the order of some neighbouring positions; `draw` gives numbers from 0 to 1."""
    if segments == 1:
        return np.array([first])
    left = segments // 2
    rounding = int(draw() * segments)
    # how many of the first n are left ones, for n from 0 to all
    counts = (np.arange(segments + 1) * left + rounding) // segments
    is_left = np.diff(counts) == 1
    order = np.empty(segments, dtype=np.int64)
    order[is_left] = _order(first, left, draw)
    order[~is_left] = _order(first + left, segments - left, draw)
    return order
