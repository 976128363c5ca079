"""Decide from distances alone which checkpoints follow which.

Detect a different start, two series, a checkpoint in the wrong place, two that are swapped, and
jumps. Positions count the checkpoints under inspection. The thresholds allow for everything a
healthy training run may show: steps that grow in a warm-up and shrink to 0, gaps of any length,
noise that puts any two checkpoints equally far apart, and oscillation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

import numpy as np

from .measure import Reading

UNRELATED = 0.1  # largest correlation of mean-free weights that counts as unrelated
FEWEST_WEIGHTS = 1000  # needed to tell a correlation of 0.1 from chance
LONGER = 4  # times every other gap: across such a gap training may have forgotten its start
NEARER = (
    3.0  # a checkpoint follows an earlier one that is this many times nearer than its neighbour
)
APART = 0.1  # least distance between two series, as a share of the diameter
FEWEST = 6  # checkpoints needed to judge series, order and jumps
FEWEST_OF_A_SERIES = 3
SHORTER = 0.15  # share by which swapping two checkpoints must shorten the path past them
CLEAN = 0.02  # share by which swapping neighbours may still shorten it afterwards, anywhere
JUMP = 10.0  # times the length that the segments on both sides suggest
_BACK = 4  # how many earlier checkpoints are candidates for the predecessor
_AROUND = 3  # segments on each side that a segment is compared with
_CANDIDATES = 24  # positions tried in pairs for a swap
_MOST_EXCHANGES = 8


class Points:
    """Treat some checkpoints of a series, in order, as points in weight space.

    Args:
        readings: the checkpoints; every number is finite.
        steps: steps of the points; by default the steps of the readings.
    """

    def __init__(self, readings: Sequence[Reading], steps: Sequence[int] | None = None) -> None:
        self.readings = list(readings)
        self.steps = [reading.step for reading in readings] if steps is None else list(steps)

    def __len__(self) -> int:
        return len(self.readings)

    def at_positions(self, positions: Sequence[int]) -> Points:
        """Return some of the points, in the given order."""
        return Points(
            [self.readings[position] for position in positions],
            [self.steps[position] for position in positions],
        )

    def with_exchanged(self, pairs: Sequence[tuple[int, int]]) -> Points:
        """Return the points with some pairs of positions swapped; the steps stay in place."""
        order = list(range(len(self)))
        for pair in pairs:
            _exchange(order, *pair)
        return Points([self.readings[position] for position in order], self.steps)

    def distance(self, one: int, other: int) -> float:
        """Return the distance between two points, estimated from their sketches.

        Args:
            one: position of the first point.
            other: position of the second point.
        """
        difference = self.readings[one].sketch - self.readings[other].sketch
        return float(np.sqrt(difference @ difference))

    def correlation(self, one: int, other: int) -> float | None:
        """Return the correlation of the weights at two points, or None if one has no spread, such
        as weights that start at 0.

        Args:
            one: position of the first point.
            other: position of the second point.
        """
        first, second = self.readings[one], self.readings[other]
        if not first.spread or not second.spread:
            return None
        return float(first.sketch @ second.sketch) / (first.spread * second.spread)

    def diameter(self) -> float:
        """Return the largest distance from the first point."""
        return max(self.distance(0, position) for position in range(len(self)))


def related(points: Points) -> list[list[int]]:
    """Group positions into sets of related checkpoints.

    A checkpoint joins every set whose last member so far correlates with it.
    """
    sets: list[list[int]] = []
    for position in range(len(points)):
        near = [some for some in sets if _is_related(points, some[-1], position)]
        for some in near:
            sets.remove(some)
        sets.append(sorted([*(other for some in near for other in some), position]))
    return sorted(sets)


def _is_related(points: Points, one: int, other: int) -> bool:
    correlation = points.correlation(one, other)
    return correlation is None or correlation >= UNRELATED


def across_a_long_gap(steps: Sequence[int], sets: Sequence[Sequence[int]]) -> bool:
    """Return whether the sets follow each other, with gaps between them much longer than all other
    gaps.

    Across such a gap training may have forgotten its start.

    Args:
        steps: steps of all checkpoints, ascending.
        sets: sets of positions, as from `related`.
    """
    joined = [position for some in sets for position in some]
    if joined != list(range(len(steps))):
        return False
    borders = {some[0] for some in sets[1:]}
    gaps = [after - before for before, after in pairwise(steps)]
    between = [gap for position, gap in enumerate(gaps, 1) if position in borders]
    inside = [gap for position, gap in enumerate(gaps, 1) if position not in borders]
    return not inside or min(between) > LONGER * max(inside)


def chains(points: Points) -> list[list[int]]:
    """Split the positions into chains; a healthy series forms one.

    If a checkpoint is much nearer to an earlier checkpoint than to its predecessor, it continues
    from the earlier one, and those in between form another chain.
    """
    follows = [0] + [_followed(points, position) for position in range(1, len(points))]
    nearest: dict[int, int] = {}
    for position in range(1, len(points)):
        behind = follows[position]
        rival = nearest.setdefault(behind, position)
        if points.distance(behind, position) < points.distance(behind, rival):
            nearest[behind] = position
    chain_of = list(range(len(points)))
    for position in range(1, len(points)):
        if nearest[follows[position]] == position:
            chain_of[position] = chain_of[follows[position]]
    heads = sorted({*chain_of})
    return [[p for p, head in enumerate(chain_of) if head == chain] for chain in heads]


def _followed(points: Points, position: int) -> int:
    """Return the predecessor of a position: the position before it, unless another one is much
    nearer.
    """
    before = range(max(0, position - _BACK), position)
    nearest = min(before, key=lambda other: points.distance(other, position))
    far = points.distance(position - 1, position)
    return nearest if NEARER * points.distance(nearest, position) < far else position - 1


def are_clean(apart: Sequence[Sequence[int]], main: Sequence[int]) -> bool:
    """Return whether the chains beside the main one look like defects: a few single checkpoints, or
    one other series near the beginning.

    Oscillation makes many chains.

    Args:
        apart: the other chains.
        main: the main chain.
    """
    large = [chain for chain in apart if len(chain) >= FEWEST_OF_A_SERIES]
    small = len(apart) - len(large)
    checkpoints = len(main) + sum(map(len, apart))
    early = all(chain[0] <= checkpoints // 4 for chain in large)
    return len(large) <= 1 and early and small <= max(2, checkpoints // 20)


def are_apart(points: Points, chain: Sequence[int], others: Sequence[int]) -> bool:
    """Return whether a chain is as far from another as only different weights are, and not one side
    of an oscillation.

    Args:
        points: all points.
        chain: positions of the chain.
        others: positions of the other chain.
    """
    nearest = [min(points.distance(one, other) for other in others) for one in chain]
    return median(nearest) > APART * points.diameter()


def exchanges(points: Points) -> list[tuple[int, int]]:
    """Return pairs of positions whose checkpoints are swapped.

    Return none unless swapping them back makes the path through the series short everywhere.
    """
    order = list(range(len(points)))
    pairs: list[tuple[int, int]] = []
    while len(pairs) < _MOST_EXCHANGES:
        gains = {pair: _gain(points, order, *pair) for pair in _tried(points, order)}
        best = max(gains, key=lambda pair: gains[pair], default=None)
        if best is None or gains[best] < SHORTER:
            break
        pairs.append(best)
        _exchange(order, *best)
    clean = all(
        _gain(points, order, position, position + 1) <= CLEAN for position in range(len(points) - 1)
    )
    return sorted(pairs) if clean and not _meet(pairs) else []


def _meet(pairs: Sequence[tuple[int, int]]) -> bool:
    """Return whether some position is in several pairs."""
    return len({position for pair in pairs for position in pair}) < 2 * len(pairs)


def _tried(points: Points, order: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of positions to try: close neighbours, and pairs of long detours."""
    last = len(order) - 1
    detours = {position: _detour(points, order, position) for position in range(1, last)}
    bent = sorted(detours, key=lambda position: -detours[position])[:_CANDIDATES]
    near = {(one, one + apart) for one in range(last) for apart in (1, 2) if one + apart <= last}
    yield from sorted(near | {(one, other) for one in bent for other in bent if one < other})


def _detour(points: Points, order: Sequence[int], position: int) -> float:
    """Return the length of the path through a position relative to the direct path past it."""
    before, here, after = order[position - 1 : position + 2]
    around = points.distance(before, after)
    past = points.distance(before, here) + points.distance(here, after)
    return past / around if around else 0.0


def _exchange(order: list[int], one: int, other: int) -> None:
    order[one], order[other] = order[other], order[one]


def _gain(points: Points, order: Sequence[int], one: int, other: int) -> float:
    """Return the share by which swapping two positions shortens the path past them."""
    swapped = list(order)
    _exchange(swapped, one, other)
    borders = {border for end in (one, other) for border in (end - 1, end)}
    lengths = [
        sum(
            points.distance(way[border], way[border + 1])
            for border in borders
            if 0 <= border < len(order) - 1
        )
        for way in (order, swapped)
    ]
    return 1 - lengths[1] / lengths[0] if lengths[0] else 0.0


def jumps(points: Points) -> list[tuple[int, float]]:
    """Return the position before each jump, and how many times longer its segment is than its
    neighbours suggest.

    Inside the series, the segments on both sides must suggest it. Near the end there are neighbours
    on one side only, and the segment must also be longer than the diameter of everything before it.
    At the beginning training may move freely.
    """
    smallest = APART * points.diameter()
    last = len(points) - 1
    jumped = []
    for start, (length, factor) in enumerate(zip(*lengths_and_factors(points), strict=True)):
        if start < _AROUND or length <= smallest or factor <= JUMP:
            continue
        inside = start < last - _AROUND
        if inside or length > points.at_positions(range(start + 1)).diameter():
            jumped.append((start, factor))
    return jumped


def lengths_and_factors(points: Points) -> tuple[list[float], list[float]]:
    """Return the length of each segment, and how many times longer it is than its neighbours
    suggest; 0 if it has too few neighbours.
    """
    lengths = [points.distance(start, start + 1) for start in range(len(points) - 1)]
    gaps = [after - before for before, after in pairwise(points.steps)]
    return lengths, [_times(lengths, gaps, start) for start in range(len(lengths))]


def _times(lengths: Sequence[float], gaps: Sequence[int], start: int) -> float:
    """Return the ratio of a segment's length to the longer of the lengths that either side
    suggests.
    """
    sides = (
        range(max(0, start - _AROUND), start),
        range(start + 1, min(len(lengths), start + 1 + _AROUND)),
    )
    expected = max(
        (
            median(_expected(lengths[other], gaps[other], gaps[start]) for other in side)
            for side in sides
            if len(side) == _AROUND
        ),
        default=0.0,
    )
    return lengths[start] / expected if expected else 0.0


def _expected(length: float, gap: int, other_gap: int) -> float:
    """Return the longest plausible length of a segment of `other_gap` steps, given one of `gap`
    steps.

    Assume straight motion over more steps and a random walk over fewer.
    """
    ratio = other_gap / gap
    return length * (ratio if ratio > 1 else ratio**0.5)
