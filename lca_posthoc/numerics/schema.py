"""The fields stored of every segment, the edges of the histogram, the totals, and how those of two
stretches join.

Totals are whole numbers: sums of a fixed unit, counts and signs. So the same come out however the
trajectory was cut into spans and windows, and in whatever order they are added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import numpy as np

from ..errors import InputError, SpanError

# the levels of `--keep`, each of which holds what those before it hold
KEEP = ("tensors", "units", "statistics", "parameters")
KEEP_OF_A_SAMPLE = KEEP[:2]  # of a random part of the segments: sums alone
# of `--path-band`
PATH_BAND = ("on", "off")
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
# numbers of every example and segment, float32, beside what each tensor contributes to its loss
EXAMPLE_FIELDS = ("loss_start", "loss_end", "residual", "weight")
# parts of the motion with a name, in the order in which they are stored
CAUSES = ("signal", "noise", "momentum", "decay", "rest")
# numbers of every tensor and segment that another path through the checkpoints gives, see `path`
PATH_FIELDS = ("shift", "doubled")
# torch's optimisers that divide by second moments, of which there are formulas
DIVIDE_BY_MOMENTS = ("Adam", "AdamW", "RMSprop", "Adagrad")
MAGNITUDES = 510  # two bins an octave over all finite float32
BINS = 2 * MAGNITUDES
# examples on which the error of a precision is measured: a 64th of all, at most 256
_SHARE_SAMPLED, _MOST_SAMPLED = 64, 256

SIGNED = ("weight", "gradient", "allocation")
TURNS = tuple(f"{signal}_turns" for signal in SIGNED)
TOTALS = ("allocated", "helping", "hurting", *TURNS)
# the arrays in which totals over time are stored: what they hold of every parameter, and as what
TOTAL_FIELDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "totals": (("allocated",), "int64"),
    "counts": (("helping", "hurting", *TURNS), "int32"),
    "signs": (tuple(f"{signal}_{end}" for signal in SIGNED for end in ("first", "last")), "int8"),
}
BYTES_OF_TOTALS = sum(
    len(names) * np.dtype(dtype).itemsize for names, dtype in TOTAL_FIELDS.values()
)
_MOST_SMALL = np.iinfo("int8").max
# of a loss's size: as finely as float64 tells numbers of that size apart
_FINEST = 2.0**-52
_MUCH_LARGER = 64
_LEAST = -970  # exponent of a loss, below which float64 is coarser than elsewhere

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


def unit_of_totals(losses: Iterable[float]) -> float:
    """Return the unit in which a loss's allocations are added up over time: a power of two.

    Every allocation of a parameter is rounded to a multiple of it, so that sums are whole numbers
    and do not depend on the order in which they are added. It is to the loss at the first
    checkpoint what the spacing of float64 is to a number: an allocation is rounded by at most half
    a unit, 2⁻⁵³ to 2⁻⁵² (about 1e-16) of that loss, as if it were added to it. Sums reach to 2¹¹
    times that loss at least; those that go beyond 2⁶³ units are refused, see `TOO_LARGE`.

    The loss at the last checkpoint counts only where it is so much larger that sums might go
    beyond. So a run whose checkpoints came bit by bit has the unit of one that had all of them from
    the beginning. A run records the unit of a loss when it is added, and keeps it.

    Args:
        losses: at the first and the last checkpoint; those that are not finite do not count.

    >>> [unit_of_totals(losses) / 2.0**-52 for losses in ([2.3, 0.1], [2.3, 99.0], [2.3, 999.0])]
    [4.0, 4.0, 1024.0]
    """
    size = 0.0
    for loss in map(abs, losses):
        if math.isfinite(loss) and loss > _MUCH_LARGER * size:
            size = loss
    if size == 0.0:
        return _FINEST
    return math.ldexp(_FINEST, max(math.frexp(size)[1], _LEAST))


def types_of_totals(segments: int) -> dict[str, str]:
    """Return the types of a parameter's totals over so many segments, by field: counts are as small
    as they can be.

    >>> [types_of_totals(segments)["helping"] for segments in (127, 128)]
    ['int8', 'int32']
    """
    small = "int8" if segments <= _MOST_SMALL else "int32"
    return {
        name: small if part == "counts" else dtype
        for part, (names, dtype) in TOTAL_FIELDS.items()
        for name in names
    }


def join(before: Totals, after: Totals, *, follows: bool = True) -> Totals:
    """Return the totals of two stretches of segments; turns across the border count where the second
    follows right after the first.

    A turn is a change of sign between two non-zero values with only zeros between them.

    Raises:
        SpanError: where a sum is too large.
    """
    joined = {"allocated": _added(before["allocated"], after["allocated"])}
    for name in TOTAL_FIELDS["counts"][0]:
        joined[name] = before[name].astype("int32") + after[name]
    for signal in SIGNED:
        turns, first, last = f"{signal}_turns", f"{signal}_first", f"{signal}_last"
        if not follows:
            joined[first], joined[last] = before[first], after[last]
            continue
        joined[turns] += before[last] * after[first] < 0
        joined[first] = before[first] + (before[first] == 0) * after[first]
        joined[last] = after[last] + (after[last] == 0) * before[last]
    return joined


def _added(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Add whole numbers; refuse a sum that is too large, whose sign is that of neither."""
    with np.errstate(over="ignore"):
        total: np.ndarray[Any, Any] = np.add(before, after)
    if (((before ^ total) & (after ^ total)) < 0).any():
        raise SpanError(TOO_LARGE)
    return total


TOO_LARGE = (
    "what a parameter is allocated adds up to more than totals over time can hold, at least 32 "
    "times the loss at the first and at the last checkpoint. Leave the steps out on which it is so "
    "large, with --steps, or keep no totals in another run, with --keep units."
)


def join_all(stretches: Iterable[Totals], borders: Iterable[bool]) -> Totals:
    """Return the totals of stretches of segments, joined one after the other.

    Args:
        stretches: one or more.
        borders: for each but the first, whether it follows right after the one before.
    """
    rest = iter(stretches)
    joined = next(rest)
    for stretch, follows in zip(rest, borders, strict=True):
        joined = join(joined, stretch, follows=follows)
    return joined


class SiteRecord(TypedDict):
    """The place of the examples in what one operation of a model with its parameters computes, see
    `objective.example_axis.ExampleAxis`.
    """

    operation: str
    tensors: list[str]  # which meet data there
    axis: int | None  # None where no axis is that of the examples
    is_inner: bool


class DirectionsRecord(TypedDict):
    """A file of directions as a run records it, see `checkpoints.directions_file`."""

    file: str  # absolute
    digest: int  # the CRC-32C of its bytes
    directions: int  # how many
    labels: list[str]  # one for each, or none


class RecalibrationRecord(TypedDict):
    """The settings of a recalibration as a run records them, see
    `objective.recalibration.Recalibration` for those without a comment.
    """

    loss: str
    split: str  # the name of that loss's split
    examples: int  # of the split
    batch_size: int
    kept: list[str]


def uses_of(calls: Iterable[tuple[str, Iterable[str]]]) -> dict[str, tuple[str, ...]]:
    """Return how a model uses each tensor that an embedding looks up and another operation takes
    too, as where input and output are tied.

    Args:
        calls: operations in which tensors meet data, with their names.

    Returns:
        The operations of each of these tensors, in the order of their first calls.

    >>> uses_of([("embedding", ["wte"]), ("linear", ["up"]), ("linear", ["bias", "wte"])])
    {'wte': ('embedding', 'linear')}
    """
    operations: dict[str, dict[str, None]] = {}
    for operation, tensors in calls:
        for name in tensors:
            operations.setdefault(name, {})[operation] = None
    return {
        name: tuple(of_tensor)
        for name, of_tensor in operations.items()
        if len(of_tensor) > 1 and not of_tensor.keys().isdisjoint(("embedding", "embedding_bag"))
    }
