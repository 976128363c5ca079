"""Make series small enough for a page: thinned with their extremes kept, and packed."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

MOST_POINTS = 2000
_EXACT = 2**24  # whole numbers up to here are exact in float32

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | float | None"
Packed: TypeAlias = Mapping[str, Json]  # columns or one of them, in the format of the page's script


def kept(values: np.ndarray[Any, Any], most: int = MOST_POINTS) -> np.ndarray[Any, Any]:
    """Choose points of a series: the first, the last, and the lowest and highest of each of about
    `most / 2` stretches.

    Args:
        values: (points,), of any float type; NaN is kept only where a stretch has nothing else.
        most: how many points to keep at most, at least 4.

    Returns:
        Ascending indices, all of them where there are at most `most`.

    >>> kept(np.array([0.0, 9.0, 1.0, 2.0, 1.0, -7.0, 1.0, 3.0]), 6).tolist()
    [0, 1, 5, 7]
    """
    points = len(values)
    if points <= most:
        return np.arange(points)
    stretches = max(1, (most - 2) // 2)
    edges = np.linspace(0, points, stretches + 1).astype(int)[:-1]
    low, high = (np.where(np.isnan(values), empty, values) for empty in (np.inf, -np.inf))
    # the first point of each stretch with the stretch's extreme value
    lengths = np.diff(np.append(edges, points))
    indices = [np.array([0, points - 1])]
    for side, reduce in ((low, np.minimum), (high, np.maximum)):
        extreme = np.repeat(reduce.reduceat(side, edges), lengths)
        extremes = np.flatnonzero(side == extreme)
        of = np.searchsorted(edges, extremes, side="right") - 1
        indices.append(extremes[np.unique(of, return_index=True)[1]])
    return np.unique(np.concatenate(indices))


def gaps(step: ArrayLike, step_end: ArrayLike) -> np.ndarray[Any, Any]:
    """Return the segments that are followed by a gap.

    >>> gaps([0, 1, 5], [1, 2, 6]).tolist()
    [1]

    Args:
        step: where segments start, (step,).
        step_end: where they end, (step,).
    """
    return np.flatnonzero(np.asarray(step)[1:] != np.asarray(step_end)[:-1])


def over_segments(
    step: ArrayLike, values: ArrayLike, step_end: ArrayLike
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return one point per segment, (step,) and (..., step), and a NaN at gaps.

    Args:
        step: where segments start, (step,).
        values: of the segments, (..., step).
        step_end: where they end, (step,).
    """
    breaks = gaps(step, step_end) + 1
    x, y = np.asarray(step, dtype=np.float64), np.asarray(values, dtype=np.float64)
    return np.insert(x, breaks, np.nan), np.insert(y, breaks, np.nan, axis=-1)


def over_steps(
    step: ArrayLike, step_end: ArrayLike, first: ArrayLike, last: ArrayLike
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the ends of all segments, after the start of the first; at gaps, NaN and the next
    start.

    Args:
        step: (step,) where segments start.
        step_end: (step,) where they end.
        first: (..., step), the values at their starts.
        last: (..., step), the values at their ends.

    >>> x, y = over_steps([0, 1, 5], [1, 2, 6], [9.0, 8.0, 3.0], [8.0, 7.0, 2.0])
    >>> x.tolist(), y.tolist()
    ([0.0, 1.0, 2.0, nan, 5.0, 6.0], [9.0, 8.0, 7.0, nan, 3.0, 2.0])
    """
    begin, end, first, last = (
        np.asarray(array, dtype=np.float64) for array in (step, step_end, first, last)
    )
    after = gaps(begin, end) + 1
    places = np.repeat(after + 1, 2)
    x = np.insert(
        np.concatenate([begin[:1], end]),
        places,
        np.ravel([(np.nan, begin[position]) for position in after]),
    )
    new = np.stack([np.full_like(first[..., after], np.nan), first[..., after]], axis=-1)
    y = np.insert(
        np.concatenate([first[..., :1], last], axis=-1),
        places,
        new.reshape(*first.shape[:-1], -1),
        axis=-1,
    )
    return x, y


def thinned(x: ArrayLike, y: ArrayLike, most: int) -> Packed:
    """Return a thinned line as the columns x and y.

    Args:
        x: (points,); NaN are breaks, which stay.
        y: (points,).
        most: the most points to keep.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    indices = _with_breaks(kept(y, most), x)
    return {"x": numbers(x[indices]), "y": numbers(y[indices])}


def _with_breaks(indices: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the indices of points, and of one break between any two points with breaks between
    them.
    """
    breaks = np.flatnonzero(np.isnan(x))
    first = np.unique(np.searchsorted(indices, breaks), return_index=True)[1]
    return np.unique(np.concatenate([indices, breaks[first]]))


def numbers(values: ArrayLike) -> Packed:
    """Return values as float32 in base64, in the page's format; as float64 if whole numbers are too
    large.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    finite = array[np.isfinite(array)]
    wide = (
        bool(len(finite))
        and bool((np.abs(finite) > _EXACT).any())
        and bool((finite == np.round(finite)).all())
    )
    if wide:
        return {"d": _base64(array.astype("<f8"))}
    return {"f": _base64(array.astype("<f4"))}


def lines(x: ArrayLike, ys: ArrayLike, most: int = MOST_POINTS) -> tuple[Packed, Packed]:
    """Return several series over the same `x` as the two columns of a multi-line glyph.

    Args:
        x: (points,); NaN are breaks, which stay.
        ys: (series, points).
        most: points of each series to keep at most.

    Returns:
        xs and ys; `x` is written once where nothing is left out.
    """
    x, ys = np.asarray(x, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    lengths: Sequence[int]
    if len(x) <= most:
        return {"same": len(ys), "v": numbers(x)}, {"n": [len(x)] * len(ys), "v": numbers(ys)}
    indices_of_each = [_with_breaks(kept(series, most), x) for series in ys]
    lengths = [len(indices) for indices in indices_of_each]
    picked = [series[indices] for series, indices in zip(ys, indices_of_each, strict=True)]
    return (
        {
            "n": lengths,
            "v": numbers(np.concatenate([x[indices] for indices in indices_of_each] or [x[:0]])),
        },
        {"n": lengths, "v": numbers(np.concatenate(picked or [x[:0]]))},
    )


def picture(values: ArrayLike) -> Packed:
    """Return a matrix in 255 levels, v = sign(q) (q / 127)² peak: zero is exact, and small values
    are finer than large ones.

    Args:
        values: (rows, columns).

    Returns:
        Levels, `peak` (the largest magnitude) and `scale` (the 99.5 % quantile of nonzero
        magnitudes, where colours saturate).
    """
    matrix = np.nan_to_num(np.asarray(values, dtype=np.float64))
    size = np.abs(matrix)
    peak = float(size.max(initial=0.0))
    scale = float(np.quantile(size[size > 0], 0.995)) if peak else 1.0
    levels = np.sign(matrix) * np.round(np.sqrt(size / (peak or 1.0)) * 127)
    return {
        "b": _base64(levels.astype("i1")),
        "shape": list(matrix.shape),
        "peak": peak,
        "scale": scale,
    }


def raw(values: np.ndarray[Any, Any]) -> str:
    """Return the bytes of an array, in base64."""
    return _base64(values)


def _base64(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
