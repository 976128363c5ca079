"""The fields stored of every segment, the edges of the histogram, the totals, and how those of two
stretches join.

Joining is written with operators alone, so that it serves torch tensors on a worker and numpy
arrays on a reader. Sums are joined along one fixed binary tree over the segments of the whole
trajectory (every node covers an aligned power of two), so that the same bits come out however the
trajectory was cut into spans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, Self, TypedDict, TypeVar

import numpy as np

from ..errors import InputError

# the levels of `--keep`, each of which holds what those before it hold
KEEP = ("tensors", "units", "statistics", "parameters")
STEP_FIELDS = {
    "loss_start": "float64",
    "loss_end": "float64",
    "weight": "float64",
    "residual": "float64",
    "remainder": "float64",
    "evaluations": "int32",
    "level": "int8",
    "converged": "int8",
    "error_bound": "float64",
    "precision_error": "float64",
}
PER_GROUP = ("loss_start", "loss_end", "weight", "residual", "remainder", "error_bound")
MAY_BE_NAN = ("error_bound", "precision_error")
# what a tensor's parameters come to on a segment, and the level from which on it is kept
TENSOR_FIELDS = {
    "allocated": ("float64", "tensors"),
    "motion": ("float64", "tensors"),
    "helping": ("int64", "statistics"),
    "hurting": ("int64", "statistics"),
    "gradient": ("float64", "statistics"),
}
OF_MOTION = ("motion",)  # the same for every group
MAGNITUDES = 510  # two bins an octave over all finite float32
BINS = 2 * MAGNITUDES
# examples on which the error of a precision is measured: a 64th of all, at most 256
_SHARE_SAMPLED, _MOST_SAMPLED = 64, 256

SIGNED = ("weight", "gradient", "allocation")
TOTALS = ("allocated", "helping", "hurting", *(f"{signal}_turns" for signal in SIGNED))
SIGNS = tuple(f"{signal}_{end}" for signal in SIGNED for end in ("first", "last"))
FIELDS = (*TOTALS, *SIGNS)

Totals = dict[str, np.ndarray[Any, Any]]


def holds(keep: str, level: str) -> bool:
    """Tell whether a level of `--keep` holds what another one does.

    >>> holds("statistics", "units"), holds("tensors", "units")
    (True, False)
    """
    return KEEP.index(keep) >= KEEP.index(level)


def tensor_fields(keep: str) -> dict[str, str]:
    """Return the types of the numbers a level of `--keep` holds of every tensor and segment, by
    name.
    """
    return {name: dtype for name, (dtype, level) in TENSOR_FIELDS.items() if holds(keep, level)}


def sampled_examples(examples: int) -> int:
    """Return on how many examples of a split, at most, the error of a precision is measured: few
    enough that it takes less than a hundredth of a run of nine segments.

    >>> [sampled_examples(examples) for examples in (50, 640, 60_000)]
    [1, 10, 256]
    """
    return min(_MOST_SAMPLED, max(1, examples // _SHARE_SAMPLED))


def is_share(tolerance: float | str) -> bool:
    """Tell whether a tolerance is a share of each loss, such as "0.1%", and not in units of
    loss.
    """
    return isinstance(tolerance, str) and tolerance.endswith("%")


def in_units_of_loss(tolerance: float | str, scale: float | None) -> float:
    """Return a tolerance in units of loss.

    Args:
        tolerance: a positive number, "inf", or a share such as "0.1%".
        scale: |loss| at the first checkpoint, of which a share is taken; needed for shares alone.

    >>> in_units_of_loss("0.1%", 2e10), in_units_of_loss(1e-3, None), in_units_of_loss("inf", None)
    (20000000.0, 0.001, inf)
    """
    if not is_share(tolerance):
        return float(tolerance)
    if scale is None:
        raise InputError(
            f"a tolerance of {tolerance} needs the loss at the first checkpoint, which the run "
            "does not record."
        )
    return float(str(tolerance)[:-1]) / 100 * scale


def histogram_edges() -> np.ndarray[Any, Any]:
    """Return the BINS + 1 fixed edges: ±(0, 2⁻¹²⁷, … , 2¹²⁷·1.5, ∞), two bins an octave; zeros are
    counted apart.
    """
    upper = (
        (np.arange(MAGNITUDES + 1, dtype=np.uint32) << np.uint32(22))
        .view(np.float32)
        .astype(np.float64)
    )
    return np.concatenate([-upper[:0:-1], upper])


def join(before: Totals, after: Totals) -> Totals:
    """Return the totals of two stretches of segments, one right after the other; turns across the
    border count.

    A turn is a change of sign between two non-zero values with only zeros between them.
    """
    joined = {name: before[name] + after[name] for name in ("allocated", "helping", "hurting")}
    for signal in SIGNED:
        turns, first, last = f"{signal}_turns", f"{signal}_first", f"{signal}_last"
        joined[turns] = before[turns] + after[turns] + (before[last] * after[first] < 0)
        joined[first] = before[first] + (before[first] == 0) * after[first]
        joined[last] = after[last] + (after[last] == 0) * before[last]
    return joined


def half(length: int) -> int:
    """Return the place at which the tree cuts a stretch that starts on an aligned border: the
    largest power of two below its length.

    >>> [half(length) for length in (2, 3, 4, 5, 8)]
    [1, 2, 2, 4, 4]
    """
    return 1 << (length - 1).bit_length() - 1


def join_all(read: Callable[[int], Totals], stretches: range) -> Totals:
    """Return the totals of neighbouring stretches of equal power-of-two length (the last may be
    shorter), joined along the tree.

    Args:
        read: returns the totals of one stretch; at most log₂ of them + 2 are in memory at a time.
        stretches: their numbers, in order.
    """
    if len(stretches) == 1:
        return read(stretches[0])
    cut = half(len(stretches))
    return join(join_all(read, stretches[:cut]), join_all(read, stretches[cut:]))


class _Addable(Protocol):
    def __add__(self, other: Self, /) -> Self: ...


_Value = TypeVar("_Value", bound=_Addable)


class TreeSum(Generic[_Value]):
    """A running sum along the same tree; it holds at most log₂ n + 1 partial sums."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, _Value]] = []

    def add(self, value: _Value) -> None:
        """Add the value of the next segment."""
        level = 0
        while self._parts and self._parts[-1][0] == level:
            value = self._parts.pop()[1] + value
            level += 1
        self._parts.append((level, value))

    def value(self) -> _Value:
        """Return the sum so far."""
        parts = [part for _, part in self._parts]
        total = parts.pop()
        while parts:
            total = parts.pop() + total
        return total


class RecalibrationRecord(TypedDict):
    """The settings of a recalibration as a run records them, see
    `objective.recalibration.Recalibration` for those without a comment.
    """

    loss: str
    split: str  # the name of that loss's split
    examples: int  # of the split
    batch_size: int
    kept: list[str]
