"""Find gaps in a series that is otherwise regular."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_AROUND = 2  # segments on each side that must have equal lengths
_FEWEST_GAPS = 2  # needed to see that gaps recur


def gaps_in_a_grid(steps: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the gaps where checkpoints are missing, as (step before, step after, grid spacing).

    A gap counts if the two segments on either side all have one length and the gap is a multiple of
    it. Gaps that recur at equal distances separate bursts and do not count.

    >>> gaps_in_a_grid([0, 10, 20, 30, 50, 60, 70])
    [(30, 50, 10)]
    >>> gaps_in_a_grid([0, 1, 2, 10, 11, 12, 20, 21, 22])
    []
    """
    lengths = [after - before for before, after in pairwise(steps)]
    gaps = []
    for place, length in enumerate(lengths):
        around = [*lengths[max(0, place - _AROUND) : place], *lengths[place + 1 :][:_AROUND]]
        regular = len(around) == 2 * _AROUND and len({*around}) == 1
        if regular and length > around[0] and length % around[0] == 0:
            gaps.append(place)
    if _are_between_bursts(steps, [place + 1 for place in gaps]) or unstated_bursts(steps):
        return []
    return [(steps[place], steps[place + 1], lengths[place - 1]) for place in gaps]


def unstated_bursts(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last step of each burst if a series looks like bursts; an empty list
    otherwise.

    >>> unstated_bursts([0, 1, 2, 10, 11, 12, 20, 21])
    [(0, 2), (10, 12), (20, 21)]
    >>> unstated_bursts([0, 1, 2, 3, 10, 11])
    []
    """
    lengths = [after - before for before, after in pairwise(steps)]
    shortest = min(lengths, default=0)
    starts = [place + 1 for place, length in enumerate(lengths) if length != shortest]
    borders = [0, *starts, len(steps)]
    if len(starts) < _FEWEST_GAPS or not _are_between_bursts(steps, starts):
        return []
    return [(steps[start], steps[stop - 1]) for start, stop in pairwise(borders)]


def _are_between_bursts(steps: Sequence[int], starts: Sequence[int]) -> bool:
    """Return whether runs of checkpoints are bursts: equally long, equally spaced, and shorter than
    the gaps between them.

    `starts` are the positions at which all runs but the first begin.
    """
    borders = [0, *starts, len(steps)]
    counts = [stop - start for start, stop in pairwise(borders)]
    apart = [steps[after] - steps[before] for before, after in pairwise(borders[:-1])]
    if not starts or len({*counts[:-1]}) != 1 or len({*apart}) != 1:
        return False
    inside = steps[starts[0] - 1] - steps[0]
    return counts[-1] <= counts[0] and apart[0] > 2 * inside
