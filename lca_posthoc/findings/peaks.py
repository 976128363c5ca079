"""Find peak moments, segments at which a layer lowers a group's loss most, and test whether layers
share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy  # loads its submodules on first use
import xarray as xr

from ..base.declarations import BY, Finding, Option
from ..base.text import count
from ..errors import InputError
from ..numerics.schema import TENSOR_FIELDS
from ..results import LossResults
from .common import about, described, grouping, tables, unfinished

FINDING = Finding(
    question="Do layers learn at the same moments, more than chance",
    needs="any run, best a loss by class; the control `gradient` `--keep statistics`",
    place=70,
    options=(
        BY,
        Option(
            name="signal",
            flag="--signal",
            kind=("allocation", "motion", "gradient"),
            help="The signal to find peaks of: the allocation, or a control.",
        ),
    ),
)

SIGNALS = {"allocation": "allocated", "motion": "motion", "gradient": "gradient"}
_AT_ONCE = 2**18  # candidates held in memory at a time

_NAMED = 6  # layers in a sentence
_POWERLESS = 0.5  # with fewer alignments expected by chance, observing none is no evidence
Numbers = np.ndarray[Any, Any]


def peaks(
    results: LossResults,
    *,
    signal: str = "allocation",
    by: str | int = "module",
    top: int = 20,
    draws: int = 10_000,
    seed: int = 0,
    stretch: int = 50,
) -> xr.Dataset:
    """Return the peak moments of every layer and group, the number that all layers share, and the
    number to expect by chance.

    A *peak moment* (Lan et al. 2019) is a local minimum in t of the allocation of (layer, group);
    of these, the `top` lowest below zero are kept. For the controls "motion" (Σ|Δθ|) and
    "gradient" (Σ|mean gradient|), maxima replace minima. A plateau counts once, at its
    first segment. A segment without a finished and finite segment on either side is no peak. A
    segment is *aligned* in a group if every layer has a peak in it. Buffers belong to no layer
    here. A layer without a single peak, such as a frozen one, does not count among all layers;
    `left_out` names it.

    Three one-sided tests of the number of alignments in all groups together:

    * `p_shift`: the peaks of each layer are rotated by a random offset among the segments that can
      be peaks, the same offset for all groups of a layer. It keeps what the groups share and how
      peaks are spaced (minima are never adjacent), and assumes that peaks are as likely late in
      training as early. If they are not, the test finds unrelated layers aligned that all learn most
      early on.
    * `p_local`: the same within stretches of about `stretch` segments, an offset each. It keeps how
      many peaks each part of training has, so it asks whether peaks fall together *within* such a
      part.
    * `p_independent`: within a group, each layer's peaks are a uniformly random subset of the
      segments that can be peaks; groups are independent. This is exact under its assumptions, but
      groups are not independent and minima are not a uniform subset: trust the rotations
      instead.

    For both rotations p = (1 + draws with at least as many alignments) / (draws + 1), so it is
    never below 1 / (draws + 1).

    Args:
        results: one loss of a run. Without groups it has one group, "all"; so has "motion", which
            is the same for all groups.
        signal: "allocation", "motion" or, for a run made with `--keep statistics` or more,
            "gradient".
        by: layers by "module", "tensor", or that many parts of the module's name. Many layers hardly
            ever all align.
        top: peaks kept per layer and group.
        draws: rotations per test.
        seed: of the rotations.
        stretch: about how many segments count as the same part of training, for `p_local`.

    Returns:
        `peak` (step, group, layer); `aligned` (step, group); `observed`, `expected` (group) and
        `observed_total`, `expected_total`: alignments, and their expectation for independent
        layers; `shift`, `local` (draw): totals of the rotations; `p_shift`, `p_local`,
        `p_independent`; `p_shift_group` (group), not corrected for the number of groups; coord
        `counted` (layer): whether the layer counts.

    Raises:
        InputError: for an unknown signal, numbers below one, fewer than two layers, or if no
            segment has a neighbour on both sides.
        LCAError: if the run does not keep the signal, or stored numbers are damaged.
    """
    _check(signal, top=top, draws=draws, stretch=stretch)
    values, layers, groups = _values(results, signal, by)
    steps = results.steps
    step, end = steps["step"].values, steps["step_end"].values
    can = possible(values, end[:-1] == step[1:])
    if not can.any():
        raise InputError(
            f"loss {results.name!r} has {count(len(values), 'finished segment')}, none with one "
            "before and one after it, so nothing can be a peak. Let `lca run` finish, or record "
            "more steps."
        )
    peak = moments(values if signal == "allocation" else -values, can, top)
    counted, left_out = _counted(peak, layers)
    alignment = align(peak[can][:, :, counted], draws=draws, seed=seed, stretch=stretch)
    variables = {
        "peak": (("step", "group", "layer"), peak, "", f"peak moment of the {signal}"),
        "aligned": (
            ("step", "group"),
            peak[:, :, counted].all(axis=-1),
            "",
            "all layers have a peak moment",
        ),
        **_counts(alignment),
    }
    return xr.Dataset(
        {
            name: described((dims, value), units, text)
            for name, (dims, value, units, text) in variables.items()
        },
        coords={
            "step": step,
            "step_end": ("step", end),
            "group": groups,
            "layer": np.array(layers, dtype=object),
            "counted": ("layer", counted),
        },
        attrs=about(results, "peaks", [*unfinished(results), *left_out])
        | {
            "signal": signal,
            "by": str(by),
            "top": top,
            "draws": draws,
            "seed": seed,
            "stretches": alignment.stretches,
        },
    )


def powerless(result: xr.Dataset) -> float | None:
    """Return the number of alignments expected by chance, if it is too small for zero observed ones
    to be evidence; else None.
    """
    drawn = [float(result[name].mean()) for name in ("shift", "local") if name in result]
    usual = max([float(result["expected_total"]), *drawn])
    return usual if float(result["observed_total"]) == 0 and usual < _POWERLESS else None


def _counts(alignment: Alignment) -> dict[str, tuple[tuple[str, ...], Any, str, str]]:
    """Return dims, values, units and meaning of each count and p-value."""
    near = f"rotated within {alignment.stretches} stretches"
    observed, expected = alignment.observed, alignment.expected
    return {
        "observed": (("group",), observed, "segments", "alignments"),
        "expected": (("group",), expected, "segments", "alignments expected of independent layers"),
        "observed_total": ((), observed.sum(), "segments", "alignments in all groups"),
        "expected_total": (
            (),
            expected.sum(),
            "segments",
            "alignments in all groups expected of independent layers",
        ),
        "shift": (
            ("draw",),
            alignment.shift,
            "segments",
            "alignments in all groups, layers rotated",
        ),
        "local": (
            ("draw",),
            alignment.local,
            "segments",
            f"alignments in all groups, layers {near}",
        ),
        "p_shift": ((), alignment.p_shift, "probability", "of as many alignments, layers rotated"),
        "p_local": ((), alignment.p_local, "probability", f"of as many alignments, layers {near}"),
        "p_independent": (
            (),
            alignment.p_independent,
            "probability",
            "of as many alignments, peaks drawn independently",
        ),
        "p_shift_group": (
            ("group",),
            alignment.p_shift_group,
            "probability",
            "of as many alignments in one group, layers rotated",
        ),
    }


def _check(signal: str, **numbers: int) -> None:
    if signal not in SIGNALS:
        raise InputError(f"signal is one of {', '.join(SIGNALS)}, got {signal!r}.")
    for name, number in numbers.items():
        if not isinstance(number, (int, np.integer)) or isinstance(number, bool) or number < 1:
            raise InputError(f"{name} is a whole number of at least 1, got {number!r}.")


def _values(results: LossResults, signal: str, by: str | int) -> tuple[Numbers, list[str], Numbers]:
    """Return the signal (step, group, layer), the layers' names and the groups' labels.

    Raises:
        InputError: for fewer than two layers.
    """
    level = TENSOR_FIELDS[SIGNALS[signal]][1]
    tensors = tables(results, level, f"peaks of the {signal}")
    tensors = tensors.isel(tensor=tensors["kind"].values == "parameter")
    layers = grouping(map(str, tensors["tensor"].values), by)
    if len(layers) < 2:
        raise InputError(
            f"peaks compares layers, but by={by!r} makes {len(layers)} of the parameters "
            f"of {results.name!r}. Divide the model "
            'further, for example by="tensor".'
        )
    column = tensors[SIGNALS[signal]]
    if "group" in column.dims:
        groups = column["group"].values
    else:
        column, groups = column.expand_dims("group"), np.array(["all"], dtype=object)
    values = column.transpose("step", "group", "tensor").values
    return (
        np.stack([values[..., members].sum(axis=-1) for members in layers.values()], axis=-1),
        list(layers),
        groups,
    )


def _counted(peak: Numbers, layers: list[str]) -> tuple[Numbers, list[str]]:
    """Tell which layers have a peak and so count, (layer,) bool, and name the others."""
    counted = np.asarray(peak.any(axis=(0, 1)))
    without = [] if counted.all() else np.array(layers)[~counted].tolist()
    more = f" and {len(without) - _NAMED:,} more" if len(without) > _NAMED else ""
    notes = [f"Without a peak: {', '.join(without[:_NAMED])}{more}."] if without else []
    if counted.sum() < 2:
        return np.ones_like(counted), [
            *notes,
            "Fewer than two layers have peaks, so none can be aligned.",
        ]
    return counted, notes


def possible(values: Numbers, joined: Numbers) -> Numbers:
    """Tell which segments can be peaks: those with finite numbers whose direct neighbours exist and
    are finite too.

    Args:
        values: (step, group, layer).
        joined: (step − 1,) bool, whether a segment ends where the next one in the array starts.

    Returns:
        (step,) bool.
    """
    finite = np.asarray(np.isfinite(values).all(axis=(1, 2)))
    pairs = joined & finite[1:] & finite[:-1]
    can = np.zeros(len(values), dtype=bool)
    can[1:-1] = pairs[1:] & pairs[:-1]
    return can


def minima(values: Numbers, can: Numbers) -> Numbers:
    """Tell where local minima are along the first axis: at the first of equal numbers between
    larger ones.

    Args:
        values: (step, …).
        can: (step,) bool, the segments that can be part of such a run; not the first or the last.

    Returns:
        Bools of the shape of `values`.

    >>> minima(np.array([3, 1, 1, 2, 2, 1, 4, 0]), np.array([False] + 6 * [True] + [False])).nonzero()[0].tolist()
    [1, 5]
    """
    is_minimum = np.zeros(values.shape, dtype=bool)
    if len(values) < 3:
        return is_minimum
    later, earlier = values[1:], values[:-1]
    column = (-1, *(1 for _ in values.shape[1:]))
    goes_on = (later == earlier) & can[:-1].reshape(column)
    rises = (later > earlier) & can[:-1].reshape(column)
    ends = np.where(goes_on, len(later) - 1, np.arange(len(later)).reshape(column))
    # the run of equal numbers that each segment belongs to
    end = np.minimum.accumulate(ends[::-1], axis=0)[::-1]
    is_minimum[1:-1] = (later < earlier)[:-1] & np.take_along_axis(rises, end, axis=0)[1:]
    is_minimum &= can.reshape(column)
    return is_minimum


def moments(values: Numbers, can: Numbers, top: int) -> Numbers:
    """Tell where the `top` lowest local minima below zero of each group and layer are; ties go
    to the earlier.

    Args:
        values: (step, group, layer).
        can: (step,) bool, the segments that can be peaks.
        top: the number of them at most.

    Returns:
        (step, group, layer) bool.
    """
    candidates = minima(values, can) & (values < 0)
    order = np.argsort(np.where(candidates, values, np.inf), axis=0, kind="stable")[:top]
    lowest = np.zeros_like(candidates)
    np.put_along_axis(lowest, order, True, axis=0)
    return lowest & candidates


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The number of segments at which all layers peak: observed, expected, and under each null
    hypothesis.
    """

    observed: Numbers
    expected: Numbers
    shift: Numbers
    local: Numbers
    p_shift: float
    p_local: float
    p_independent: float
    p_shift_group: Numbers
    stretches: int


def align(peak: Numbers, *, draws: int, seed: int, stretch: int) -> Alignment:
    """Count the segments at which all layers peak, and compare with the three null hypotheses of `peaks`.

    Args:
        peak: (step, group, layer) bool, over the segments that can be peaks.
        draws: rotations per test.
        seed: of the rotations.
        stretch: about how many segments a stretch of the local rotation has.

    Returns:
        The counts, by group and in all groups, and the p-values.
    """
    segments, groups, _ = peak.shape
    observed = peak.all(axis=-1).sum(axis=0)
    sizes = peak.sum(axis=0)
    whole, local = np.random.default_rng(seed).spawn(2)
    shifted = rotated(peak, np.array([0, segments]), draws, whole)
    parts = max(1, segments // stretch)
    nearby = rotated(peak, np.arange(parts + 1) * segments // parts, draws, local).sum(axis=1)
    total = int(observed.sum())
    chances = np.ones(1)
    for group in range(groups):
        chances = np.convolve(chances, intersection(segments, sizes[group]))
    return Alignment(
        observed=observed,
        expected=segments * (sizes / segments).prod(axis=-1),
        shift=shifted.sum(axis=1),
        local=nearby,
        p_shift=float(_tail(shifted.sum(axis=1), total)),
        p_local=float(_tail(nearby, total)),
        p_independent=float(chances[total:].sum() / chances.sum()),
        p_shift_group=_tail(shifted, observed),
        stretches=parts,
    )


def _tail(drawn: Numbers, observed: Numbers | int) -> Numbers:
    """Return (1 + #{drawn ≥ observed}) / (draws + 1); the observation counts as one draw (Phipson &
    Smyth 2010).
    """
    tail: Numbers = (1 + np.sum(drawn >= observed, axis=0)) / (len(drawn) + 1)
    return tail


def rotated(peak: Numbers, borders: Numbers, draws: int, generator: np.random.Generator) -> Numbers:
    """Count the segments at which all layers peak after rotating each layer within each stretch by
    an offset of its own.

    Starting from the peaks of one layer, those without a peak of the next layer are dropped, so
    that few remain to compare with the other layers.

    Args:
        peak: (step, group, layer) bool.
        borders: (stretches + 1,) from 0 to the number of segments, rising.
        draws: the number of rotations.
        generator: of the offsets.

    Returns:
        (draws, group) counts.
    """
    _, groups, layers = peak.shape
    starts, lengths = borders[:-1], np.diff(borders)
    stretch_of = np.repeat(np.arange(len(lengths)), lengths)
    order = np.argsort(peak.sum(axis=(0, 1)), kind="stable")
    table = np.ascontiguousarray(peak.transpose(2, 1, 0))
    first_group, first_place = np.nonzero(table[order[0]])
    size = max(1, _AT_ONCE // max(1, len(first_place), layers * len(lengths)))
    counts = np.zeros((draws, groups), dtype=np.int64)
    for start in range(0, draws, size):
        some = min(size, draws - start)
        offsets = (generator.random((some, layers, len(lengths))) * lengths).astype(np.int64)
        draw, group = np.repeat(np.arange(some), len(first_place)), np.tile(first_group, some)
        place = np.tile(first_place, some)
        within = stretch_of[place]
        place = (
            starts[within]
            + (place - starts[within] + offsets[draw, order[0], within]) % lengths[within]
        )
        for layer in order[1:]:
            origin = (
                starts[within]
                + (place - starts[within] - offsets[draw, layer, within]) % lengths[within]
            )
            hit = table[layer, group, origin]
            draw, group, place, within = draw[hit], group[hit], place[hit], within[hit]
        counts[start : start + some] = np.bincount(
            draw * groups + group, minlength=some * groups
        ).reshape(some, groups)
    return counts


def intersection(segments: int, sizes: Numbers) -> Numbers:
    """Return the distribution of the number of segments that lie in all of some independent,
    uniformly random subsets.

    P(|S₁ ∩ … ∩ S_l| = j) = Σᵢ P(|S₁ ∩ … ∩ S_{l−1}| = i) · Hypergeometric(j; segments, i, |S_l|).

    Args:
        segments: their number.
        sizes: (layer,) of the subsets.

    Returns:
        (smallest size + 1,) probabilities.
    """
    smallest, *others = sorted(int(size) for size in sizes)
    chances = np.zeros(smallest + 1)
    chances[smallest] = 1.0
    for size in others:
        chances = chances @ _hypergeometric(segments, smallest, size)
    return chances


@lru_cache(maxsize=8)
def _hypergeometric(segments: int, most: int, size: int) -> Numbers:
    """Return the probabilities (i, j) that j of i given segments are among `size` segments drawn at
    random from all.
    """
    subset, common = np.meshgrid(np.arange(most + 1), np.arange(most + 1), indexing="ij")
    return np.asarray(scipy.stats.hypergeom.pmf(common, segments, subset, size))
