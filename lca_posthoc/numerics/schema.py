"""Define the fields stored for every segment, the edges of the histogram, and the totals, and join
totals of two stretches.

Totals are whole numbers: sums in a fixed unit, counts and signs. They therefore do not depend on
how the trajectory was cut into spans and windows, or on the order of addition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import numpy as np

from ..errors import InputError, SpanError

# levels of `--keep`; each includes the previous ones
KEEP = ("tensors", "units", "statistics", "parameters")
KEEP_OF_A_SAMPLE = KEEP[:2]  # a random sample of the segments allows only sums
# values of `--path-band`
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
# results for a tensor on a segment: type, and lowest level that stores it
TENSOR_FIELDS = {
    "allocated": ("float64", "tensors"),
    "motion": ("float64", "tensors"),
    "helping": ("int64", "statistics"),
    "hurting": ("int64", "statistics"),
    "gradient": ("float64", "statistics"),
}
OF_MOTION = ("motion",)  # the same for every group
# numbers of every example and segment, float32, besides the contribution of each tensor
EXAMPLE_FIELDS = ("loss_start", "loss_end", "residual", "weight")
# named parts of the motion, in the order of storage
CAUSES = ("signal", "noise", "momentum", "decay", "rest")
# numbers of every tensor and segment from another path through the checkpoints, see `path`
PATH_FIELDS = ("shift", "doubled")
# torch's optimisers that divide by second moments and are supported
DIVIDE_BY_MOMENTS = ("Adam", "AdamW", "RMSprop", "Adagrad")
MAGNITUDES = 510  # two bins per octave over all finite float32
BINS = 2 * MAGNITUDES
# examples for measuring the error of a precision: a 64th of all, at most 256
_SHARE_SAMPLED, _MOST_SAMPLED = 64, 256

SIGNED = ("weight", "gradient", "allocation")
TURNS = tuple(f"{signal}_turns" for signal in SIGNED)
TOTALS = ("allocated", "helping", "hurting", *TURNS)
# arrays of totals over time: their fields for every parameter, and their type
TOTAL_FIELDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "totals": (("allocated",), "int64"),
    "counts": (("helping", "hurting", *TURNS), "int32"),
    "signs": (tuple(f"{signal}_{end}" for signal in SIGNED for end in ("first", "last")), "int8"),
}
BYTES_OF_TOTALS = sum(
    len(names) * np.dtype(dtype).itemsize for names, dtype in TOTAL_FIELDS.values()
)
_MOST_SMALL = np.iinfo("int8").max
# relative to the size of a loss: the spacing of float64
_FINEST = 2.0**-52
_MUCH_LARGER = 64
_LEAST = -970  # exponent of a loss below which float64 loses relative precision

Totals = dict[str, np.ndarray[Any, Any]]


def holds(keep: str, level: str) -> bool:
    """Return whether a level of `--keep` includes another one.

    >>> holds("statistics", "units"), holds("tensors", "units")
    (True, False)

    Args:
        keep: the level in use.
        level: the level to look for.
    """
    return KEEP.index(keep) >= KEEP.index(level)


def tensor_fields(keep: str) -> dict[str, str]:
    """Return the fields that a level of `--keep` stores for every tensor and segment, with their
    types.
    """
    return {name: dtype for name, (dtype, level) in TENSOR_FIELDS.items() if holds(keep, level)}


def sampled_examples(examples: int) -> int:
    """Return how many examples of a split, at most, are used to measure the error of a precision.

    The sample takes less than a hundredth of the time of a run of nine segments.

    >>> [sampled_examples(examples) for examples in (50, 640, 60_000)]
    [1, 10, 256]
    """
    return min(_MOST_SAMPLED, max(1, examples // _SHARE_SAMPLED))


def is_share(tolerance: float | str) -> bool:
    """Return whether a tolerance is a share of each loss, such as "0.1%", rather than in units of
    loss.
    """
    return isinstance(tolerance, str) and tolerance.endswith("%")


def in_units_of_loss(tolerance: float | str, scale: float | None) -> float:
    """Convert a tolerance to units of loss.

    >>> in_units_of_loss("0.1%", 2e10), in_units_of_loss(1e-3, None), in_units_of_loss("inf", None)
    (20000000.0, 0.001, inf)

    Args:
        tolerance: a positive number, "inf", or a share such as "0.1%".
        scale: |loss| at the first checkpoint, which shares multiply; only needed for shares.

    Raises:
        InputError: if `tolerance` is a share and `scale` is None.
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
    """Return the BINS + 1 fixed edges: ±(0, 2⁻¹²⁷, … , 2¹²⁷·1.5, ∞), two bins per octave; zeros are
    counted separately.
    """
    upper = (
        (np.arange(MAGNITUDES + 1, dtype=np.uint32) << np.uint32(22))
        .view(np.float32)
        .astype(np.float64)
    )
    return np.concatenate([-upper[:0:-1], upper])


def unit_of_totals(losses: Iterable[float]) -> float:
    """Return the unit in which a loss's allocations are summed over time: a power of two.

    Every allocation of a parameter is rounded to a multiple of the unit, so that sums are whole
    numbers and do not depend on the order of addition. The unit relates to the loss at the first
    checkpoint as the spacing of float64 relates to a number: rounding changes an allocation by at
    most half a unit, 2⁻⁵³ to 2⁻⁵² (about 1e-16) of that loss. Sums can reach at least 2¹¹ times
    that loss; those beyond 2⁶³ units raise an error, see `TOO_LARGE`.

    The loss at the last checkpoint matters only if it is so much larger that sums might exceed the
    limit. A run whose checkpoints arrived over time therefore has the same unit as one that had all
    of them from the start. A run records the unit of a loss when the loss is added, and keeps it.

    >>> [unit_of_totals(losses) / 2.0**-52 for losses in ([2.3, 0.1], [2.3, 99.0], [2.3, 999.0])]
    [4.0, 4.0, 1024.0]

    Args:
        losses: losses at the first and the last checkpoint; those that are not finite are ignored.
    """
    size = 0.0
    for loss in map(abs, losses):
        if math.isfinite(loss) and loss > _MUCH_LARGER * size:
            size = loss
    if size == 0.0:
        return _FINEST
    return math.ldexp(_FINEST, max(math.frexp(size)[1], _LEAST))


def types_of_totals(segments: int) -> dict[str, str]:
    """Return the types of a parameter's totals over some segments, by field; counts use the
    smallest sufficient type.

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
    """Join the totals of two stretches of segments.

    A turn is a change of sign between two non-zero values with only zeros between them. Turns
    across the border count if the second stretch directly follows the first.

    Args:
        before: totals of the first stretch, by field.
        after: totals of the second stretch, by field.
        follows: whether the second directly follows the first.

    Raises:
        SpanError: if a sum is too large.
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
    """Add whole numbers.

    Raises:
        SpanError: if a sum overflows, which gives it a sign that neither number has.
    """
    with np.errstate(over="ignore"):
        total: np.ndarray[Any, Any] = np.add(before, after)
    if (((before ^ total) & (after ^ total)) < 0).any():
        raise SpanError(TOO_LARGE)
    return total


TOO_LARGE = (
    "the sum of a parameter's allocations exceeds what totals over time can hold, at least 32 "
    "times the loss at the first and at the last checkpoint. Leave out the steps where it is so "
    "large with --steps, or make another run without totals, with --keep units."
)


def join_all(stretches: Iterable[Totals], borders: Iterable[bool]) -> Totals:
    """Join the totals of consecutive stretches of segments.

    Args:
        stretches: totals of one or more stretches.
        borders: for each stretch but the first, whether it directly follows the previous one.
    """
    rest = iter(stretches)
    joined = next(rest)
    for stretch, follows in zip(rest, borders, strict=True):
        joined = join(joined, stretch, follows=follows)
    return joined


class SiteRecord(TypedDict):
    """Record the axis of the examples in what one operation of a model computes from its
    parameters; see `objective.example_axis.ExampleAxis`.
    """

    operation: str
    tensors: list[str]  # parameters of the operation
    axis: int | None  # None if there is no axis of examples
    is_inner: bool


class DirectionsRecord(TypedDict):
    """Record a file of directions in a run; see `checkpoints.directions_file`."""

    file: str  # absolute
    digest: int  # the CRC-32C of its bytes
    directions: int  # how many
    labels: list[str]  # one for each, or none


class RecalibrationRecord(TypedDict):
    """Record the settings of a recalibration in a run; `objective.recalibration.Recalibration`
    explains those without a comment.
    """

    loss: str
    split: str  # the name of that loss's split
    examples: int  # of the split
    batch_size: int
    kept: list[str]


def uses_of(calls: Iterable[tuple[str, Iterable[str]]]) -> dict[str, tuple[str, ...]]:
    """Return how a model uses each tensor that serves both an embedding and another operation, such
    as tied input and output embeddings.

    >>> uses_of([("embedding", ["wte"]), ("linear", ["up"]), ("linear", ["bias", "wte"])])
    {'wte': ('embedding', 'linear')}

    Args:
        calls: operations that use tensors, each with the names of these tensors.

    Returns:
        The operations of each of these tensors, in the order of their first calls.
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
