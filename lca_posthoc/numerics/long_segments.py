"""Segments of more than one training step, and the lines of twice their length."""

from __future__ import annotations

from collections.abc import Sequence


def is_long(length: int) -> bool:
    """Tell whether the straight line of a segment of so many training steps need not be the path that
    training took.
    """
    return length > 1


def pairs(lengths: Sequence[int | None]) -> list[int]:
    """Return the segments that are the first half of a line of twice their length, by the positions
    of the checkpoints they start from.

    Args:
        lengths: training steps from each checkpoint to the next; None where no segment follows it.

    >>> pairs([4, 4, 4, 1, 8, 8, None, 8, 8])
    [0, 4]
    """
    around = zip([None, *lengths[:-1]], lengths, [*lengths[1:], None], strict=True)
    return [
        index
        for index, (before, length, after) in enumerate(around)
        if length is not None and half_of(index, (before, length, after)) == 0
    ]


def half_of(index: int, lengths: tuple[int | None, int, int | None]) -> int | None:
    """Return which half of a line of twice its length a segment is: 0, 1, or None for none.

    Args:
        index: position of the checkpoint it starts from.
        lengths: training steps of the segment before, of the segment, and of the one after it; None
            where there is no such segment.

    >>> [half_of(index, (4, 4, None)) for index in (2, 3)], half_of(2, (None, 4, 1))
    ([None, 1], None)
    """
    half = index % 2
    other = lengths[0] if half else lengths[2]
    return half if other is not None and is_long(other) and is_long(lengths[1]) else None
