"""Find the gaps of a series that is regular around them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_AROUND = 2  # segments on each side that must be of one length


def gaps_in_a_grid(steps: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the gaps in which checkpoints are missing: steps before and after, and how far
    checkpoints lie apart around them.

    A gap is one where the two segments on both sides have one length, of which it is a multiple.
    Gaps that come back at equal distances are those between bursts.

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
    if _are_between_bursts(steps, [place + 1 for place in gaps]):
        return []
    return [(steps[place], steps[place + 1], lengths[place - 1]) for place in gaps]


def _are_between_bursts(steps: Sequence[int], starts: Sequence[int]) -> bool:
    """Tell whether stretches of checkpoints, all but the first of which begin at these positions,
    are bursts: as long as each other, equally far apart, and shorter than the gaps between them.
    """
    borders = [0, *starts, len(steps)]
    counts = [stop - start for start, stop in pairwise(borders)]
    apart = [steps[after] - steps[before] for before, after in pairwise(borders[:-1])]
    if not starts or len({*counts[:-1]}) != 1 or len({*apart}) != 1:
        return False
    inside = steps[starts[0] - 1] - steps[0]
    return counts[-1] <= counts[0] and apart[0] > 2 * inside
