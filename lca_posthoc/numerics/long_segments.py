"""Identify segments of more than one training step, and lines of twice their length."""

from __future__ import annotations

from collections.abc import Sequence

# training steps of the previous segment, of the segment, and of the next; None for a missing
# segment
Around = tuple[int | None, int, int | None]


def is_long(length: int) -> bool:
    """Return whether training may have left the straight line of a segment of that many training
    steps.
    """
    return length > 1


def pairs(lengths: Sequence[int | None]) -> list[int]:
    """Return the segments that are the first half of a line of twice their length, by the positions
    of the checkpoints where they start.

    >>> pairs([4, 4, 4, 1, 8, 8, None, 8, 8])
    [0, 4]

    Args:
        lengths: training steps from each checkpoint to the next; None if no segment follows.
    """
    return [
        index
        for index, length in enumerate(lengths)
        if length is not None and half_of(index, lengths_around(index, lengths)) == 0
    ]


def lengths_around(index: int, lengths: Sequence[int | None]) -> Around:
    """Return the training steps of a segment and of its neighbours.

    >>> lengths_around(0, [4, 2]), lengths_around(1, [4, 2])
    ((None, 4, 2), (4, 2, None))

    Args:
        index: position of the checkpoint where it starts.
        lengths: training steps from each checkpoint to the next; None if no segment follows.
    """
    before, length, after = (
        lengths[place] if 0 <= place < len(lengths) else None
        for place in (index - 1, index, index + 1)
    )
    assert length is not None, "a segment has both ends"
    return before, length, after


def half_of(index: int, around: Around) -> int | None:
    """Return which half of a line of twice its length a segment is: 0, 1, or None if neither.

    >>> [half_of(index, (4, 4, None)) for index in (2, 3)], half_of(2, (None, 4, 1))
    ([None, 1], None)

    Args:
        index: position of the checkpoint where it starts.
        around: training steps around it.
    """
    half = index % 2
    other = around[0] if half else around[2]
    return half if other is not None and is_long(other) and is_long(around[1]) else None
