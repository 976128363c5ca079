"""Segments of more than one training step, and the lines of twice their length."""

from __future__ import annotations

from collections.abc import Sequence

# training steps of the segment before one, of the segment, and of the one after it; None where there
# is no such segment
Around = tuple[int | None, int, int | None]


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
    return [
        index
        for index, length in enumerate(lengths)
        if length is not None and half_of(index, lengths_around(index, lengths)) == 0
    ]


def lengths_around(index: int, lengths: Sequence[int | None]) -> Around:
    """Return the training steps of a segment and of its neighbours.

    Args:
        index: position of the checkpoint it starts from.
        lengths: training steps from each checkpoint to the next; None where no segment follows it.

    >>> lengths_around(0, [4, 2]), lengths_around(1, [4, 2])
    ((None, 4, 2), (4, 2, None))
    """
    before, length, after = (
        lengths[place] if 0 <= place < len(lengths) else None
        for place in (index - 1, index, index + 1)
    )
    assert length is not None, "a segment has both ends"
    return before, length, after


def half_of(index: int, around: Around) -> int | None:
    """Return which half of a line of twice its length a segment is: 0, 1, or None for none.

    Args:
        index: position of the checkpoint it starts from.
        around: training steps around it.

    >>> [half_of(index, (4, 4, None)) for index in (2, 3)], half_of(2, (None, 4, 1))
    ([None, 1], None)
    """
    half = index % 2
    other = around[0] if half else around[2]
    return half if other is not None and is_long(other) and is_long(around[1]) else None
