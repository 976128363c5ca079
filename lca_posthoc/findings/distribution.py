"""Describe the distribution of single allocations: shares, a histogram, a heavy-tailed fit,
inequality.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # loads its submodules on first use
import xarray as xr

from ..base.declarations import GROUPS, Finding
from ..numerics.schema import histogram_edges
from ..results import LossResults
from .bands import refuse_straight_lines
from .common import (
    BLOCK,
    Numbers,
    Variable,
    about,
    beyond_keep,
    blocks,
    described,
    tables,
    unfinished,
)

FINDING = Finding(
    question="How are single allocations distributed; how unequal; a heavy-tailed fit",
    needs="`--keep statistics`; the fit `--keep parameters`",
    place=40,
    level="statistics",
    single_steps="every",
    options=(GROUPS,),
)

_TOP = 0.01


def distribution(results: LossResults, *, sample: int = 100_000, seed: int = 0) -> xr.Dataset:
    """Return the distribution of the allocation over parameters × segments, without
    buffers.

    The histogram has two bins an octave, so figures computed from it have errors; `…_low` and
    `…_high` bound it for the share of Σ|A| that the top 1 % of the elements carry, and for the Gini
    coefficient of |A| (Gini 1912; zeros are counted).

    Args:
        results: one loss of a run. The histogram needs `--keep statistics`; the sample,
            and the double Weibull distribution fitted to it (scipy's `dweibull`, location 0,
            maximum likelihood, exact zeros excluded), need `--keep parameters`.
        sample: how many elements to draw with replacement, uniformly over parameters × segments (×
            groups).
        seed: of numpy's default generator.

    Returns:
        `count` (bin[, group]) with coordinates `lower` and `upper`; by group `zero` (a count),
        `helping`, `hurting` (shares), `mean`, `mean_absolute`, `standard_deviation` (of the bins'
        middles; the mean is exact), `top_share`, `gini` with bounds; `sample` (draw),
        `weibull_shape`, `weibull_scale`, `kurtosis` (Fisher's, of the sample). If every
        allocation is 0, there is no bin, and undefined figures are NaN; `left_out` says so.

    Raises:
        LCAError: if the run keeps only sums, a segment is longer than one training step, none
            is finished yet, or stored numbers are damaged.
    """
    table = tables(results, FINDING.level, "sizes of single allocations")
    refuse_straight_lines(table, FINDING.single_steps, "sizes of single allocations")
    left_out = unfinished(results)
    count, zero = _counts(results)
    edges = histogram_edges()
    edges[0], edges[-1] = -float(np.finfo("float32").max), float(np.finfo("float32").max)
    occupied = np.flatnonzero(count.reshape(-1, count.shape[-1]).any(0))
    first, last = (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, 0)
    if first == last:
        left_out.append(
            "Every allocation is exactly 0: there are no bins, and no shares of a zero sum."
        )
    group = ("group",) if count.ndim == 2 else ()
    lower, upper = edges[first:last], edges[first + 1 : last + 1]
    rows = np.atleast_2d(count)[:, first:last]
    variables = {
        "count": described(
            (("bin", *group), count[..., first:last].T),
            "parameters × segments",
            "elements in the bin",
        )
    }
    variables["zero"] = described(
        (group, zero), "parameters × segments", "elements that are exactly 0"
    )
    parameters = (
        table["allocated"]
        .isel(tensor=table["kind"].values == "parameter")
        .sum(("step", "tensor"))
        .values
    )
    figures = [
        _figures(row, int(none), lower, upper, float(total))
        for row, none, total in zip(
            rows, np.atleast_1d(zero), np.atleast_1d(parameters), strict=True
        )
    ]
    for name, (units, meaning) in _FIGURES.items():
        values = np.array([figure[name] for figure in figures])
        variables[name] = described((group, values if group else values[0]), units, meaning)
    coords = {"lower": ("bin", lower), "upper": ("bin", upper)}
    coords |= {
        name: column for name, column in table.coords.items() if name in ("group", "examples")
    }
    if results.holds("parameters"):
        variables |= (fitted := _fitted(_sample(results, sample, seed)))
        if first < last and math.isnan(fitted["weibull_shape"][1]):
            left_out.append("The heavy-tailed fit needs allocations of at least two sizes.")
    beyond = beyond_keep(results, "parameters", "A sample and its heavy-tailed fit")
    return xr.Dataset(
        variables,
        coords=coords,
        attrs={**about(results, "distribution", left_out, beyond), "seed": seed},
    )


_FIGURES = {
    "helping": ("share", "share of parameters × segments that helped"),
    "hurting": ("share", "share of parameters × segments that hurt"),
    "mean": ("loss", "mean allocation of a parameter on a segment"),
    "mean_absolute": ("loss", "mean of |A|, from the bins"),
    "standard_deviation": ("loss", "standard deviation of A, from the bins"),
    "top_share": ("share", "share of Σ|A| of the top 1 % of the elements"),
    "top_share_low": ("share", "lower bound, from the edges of the bins"),
    "top_share_high": ("share", "upper bound, from the edges of the bins"),
    "gini": ("", "Gini coefficient of |A|, zeros counted"),
    "gini_low": ("", "lower bound, from the edges of the bins"),
    "gini_high": ("", "upper bound, from the edges of the bins"),
}


def _counts(results: LossResults) -> tuple[Numbers, Numbers]:
    """Return the counts ([groups,] bins) and the zeros ([groups]) over all segments."""
    stored = results.histogram
    bins, zeros = stored["count"], stored["zero"]
    rows = max(1, BLOCK // max(1, math.prod(bins.shape[1:])))
    length = results.manifest.span
    rows = max(length, rows - rows % length)
    count = sum(bins[start : start + rows].values.sum(0) for start in range(0, bins.shape[0], rows))
    return np.asarray(count), np.asarray(zeros.sum("step").values)


def _figures(
    count: Numbers, zero: int, lower: Numbers, upper: Numbers, total: float
) -> dict[str, float]:
    """Return the figures of one row of bins; NaN only where they are undefined for lack of
    elements.
    """
    elements = int(count.sum()) + zero
    low, high = np.minimum(abs(lower), abs(upper)), np.maximum(abs(lower), abs(upper))
    order = np.argsort(low, kind="stable")
    count_up, low, high = count[order], low[order], high[order]
    middle = (low + high) / 2
    centre = (lower + upper) / 2
    mean = total / max(1, elements)
    figures = {
        "helping": float(count[upper <= 0].sum()) / max(1, elements),
        "hurting": float(count[lower >= 0].sum()) / max(1, elements),
        "mean": mean,
        "mean_absolute": float(count_up @ middle) / max(1, elements),
        "standard_deviation": math.sqrt(float((count * centre**2).sum() + 0.0) / max(1, elements)),
    }
    figures["top_share"] = _top(count_up, middle, middle, elements)
    figures["top_share_low"], figures["top_share_high"] = (
        _top(count_up, low, high, elements),
        _top(count_up, high, low, elements),
    )
    figures["gini"] = _gini(count_up, zero, middle, middle)
    figures["gini_low"], figures["gini_high"] = (
        _gini(count_up, zero, high, low),
        _gini(count_up, zero, low, high),
    )
    return figures


def _top(count: Numbers, of_top: Numbers, of_rest: Numbers, elements: int) -> float:
    """Return the share of the sum of the largest 1 %, where elements of a bin count `of_top` within
    it and `of_rest` below; bins rise.
    """
    size = max(1, round(_TOP * elements))
    above = np.cumsum(count[::-1])[::-1] - count
    in_top = np.clip(size - above, 0, count)
    top, rest = float(in_top @ of_top), float((count - in_top) @ of_rest)
    return top / (top + rest) if top + rest > 0 else math.nan


def _gini(count: Numbers, zero: int, small: Numbers, large: Numbers) -> float:
    """Return the extreme of the Gini coefficient over values within their bins; rising bins, zeros
    first.

    G = Σ w_i x_i / Σ x_i with w_i = (2i − n − 1) / n for the ranks i = 1 … n. Its extreme has
    `large` where w_i > G and `small` elsewhere: the root of F(G) = Σ_i (w_i − G) x_i, which falls
    in G.
    """
    n = int(count.sum()) + zero
    if n == zero:
        return math.nan
    ends = zero + np.cumsum(count)
    starts = ends - count

    def weights(first: Numbers, last: Numbers) -> Numbers:
        """Return Σ w_i over the ranks first + 1 … last."""
        return (last * (last + 1.0) - first * (first + 1.0) - (last - first) * (n + 1.0)) / n

    def excess(gini: float) -> float:
        # up to this rank, w ≤ G
        border = np.clip(np.floor((gini * n + n + 1) / 2), starts, ends)
        below = weights(starts, border) - gini * (border - starts)
        above = weights(border, ends) - gini * (ends - border)
        return float(below @ small + above @ large)

    return float(scipy.optimize.brentq(excess, -1.0, 1.0, xtol=1e-12))


def _sample(results: LossResults, size: int, seed: int) -> Numbers:
    """Draw elements of the allocation, uniformly with replacement over parameters × segments (×
    groups).
    """
    data = results.allocation
    names = [
        tensor.spec.name for tensor in results.manifest.allocated if tensor.spec.kind == "parameter"
    ]
    generator = np.random.default_rng(seed)
    sizes = [data[name].size for name in names]
    drawn = np.sort(generator.integers(0, max(1, sum(sizes)), size if sum(sizes) else 0))
    parts, before = [], 0
    for name, extent in zip(names, sizes, strict=True):
        positions = (
            drawn[np.searchsorted(drawn, before) : np.searchsorted(drawn, before + extent)] - before
        )
        parts.append(_picked(data[name], positions, results.manifest.span))
        before += extent
    return generator.permutation(np.concatenate(parts)) if parts else np.zeros(0)


def _picked(data: xr.DataArray, positions: Numbers, span: int) -> Numbers:
    """Return the elements at sorted flat positions; read every row of chunks whole and once, in
    blocks.
    """
    places = np.unravel_index(positions, data.shape)
    values = np.empty(len(positions), "float32")
    for start in range(0, data.shape[0], span):
        in_span = np.flatnonzero((places[0] >= start) & (places[0] < start + span))
        for part in blocks(data.shape[1:], min(span, data.shape[0])):
            inside = (
                np.all(
                    [
                        (places[axis + 1][in_span] >= cut.start)
                        & (places[axis + 1][in_span] < cut.stop)
                        for axis, cut in enumerate(part)
                    ],
                    axis=0,
                )
                if part
                else np.ones(len(in_span), bool)
            )
            chosen = in_span[inside]
            if len(chosen):
                block = data[(slice(start, start + span), *part)].values
                values[chosen] = block[
                    tuple(
                        places[axis][chosen] - low
                        for axis, low in enumerate([start, *(cut.start for cut in part)])
                    )
                ]
    return values


def _fitted(drawn: Numbers) -> dict[str, Variable]:
    moved = drawn[drawn != 0].astype("float64")
    if len(moved) < 2 or np.ptp(abs(moved)) == 0:
        shape = scale = math.nan
    else:
        # fitted in units of the median, because the optimiser stops at absolute steps
        unit = float(np.median(abs(moved)))
        shape, _, scale = scipy.stats.dweibull.fit(moved / unit, floc=0)
        scale *= unit
    kurtosis = (
        float(scipy.stats.kurtosis(drawn.astype("float64")))
        if len(drawn) and np.ptp(drawn) > 0
        else math.nan
    )
    return {
        "sample": described((("draw",), drawn), "loss", "elements drawn at random"),
        "weibull_shape": described(
            ((), float(shape)), "", "shape of the double Weibull distribution"
        ),
        "weibull_scale": described(
            ((), float(scale)), "loss", "scale of the double Weibull distribution"
        ),
        "kurtosis": described(((), kurtosis), "", "excess kurtosis of the sample"),
    }
