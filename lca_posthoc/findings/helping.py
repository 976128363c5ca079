"""Count parameters that help: per segment, per tensor, and per parameter over time, compared with
chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy  # loads its submodules on first use
import xarray as xr

from ..base.declarations import GROUPS, Finding
from ..results import LossResults
from .bands import held_back, long_segments, refuse_straight_lines
from .common import (
    Numbers,
    Variable,
    about,
    described,
    each_total,
    parameter_name,
    place_of,
    tables,
    unfinished,
)

FINDING = Finding(
    question="How many parameters help, by segment; who helps more often than chance",
    needs="`--keep statistics`",
    place=30,
    level="statistics",
    single_steps="some",
    options=(GROUPS,),
)

_BINS = 100
_FEWEST = 5  # merged bins, however short the run


def helping(results: LossResults, *, most: int = 10) -> xr.Dataset:
    """Return the shares of parameters that help, and the parameters that help most and least often.

    The null hypothesis: on every segment where it has an effect, a parameter helps with the same
    probability, independently of the others and of the past; `probability` is the share observed
    over all. Heroes (most often) and villains (least often) have the smallest binomial tails; their
    p-values are multiplied by the number of parameters (Bonferroni). Parameters that never have an
    effect are excluded here, and buffers everywhere. On segments of more than one training step
    shares are NaN; if there are any, the results over time are missing.

    Args:
        results: one loss of a run made with `--keep statistics` or more; results over time need
            every segment.
        most: the number of heroes, and of villains.

    Returns:
        `helping`, `hurting`, `zero` (step[, group]), `tensor_helping` and `tensor_hurting` (step[,
        group], tensor), shares of parameters; `tensor_moved` (step, tensor), 1 where any parameter
        of the tensor moved, else 0; `parameters` and `expected` (share): how many help on that
        share of their segments, and how many would by chance, with coordinates `share_low` and
        `share_high`; `probability`; by hero, named by `hero_name`, `hero_share`, `hero_segments`
        (on which it had an effect), `hero_allocated` (loss) and `hero_p`, and the same by villain.
        If no parameter has an effect anywhere, `probability` is NaN and there is no hero and no
        villain. Over time, the groups of a loss are taken together.

    Raises:
        LCAError: if the run keeps only sums, every segment is longer than one training step, none
            is finished yet, or stored numbers are damaged.
    """
    table = tables(results, FINDING.level, "shares of parameters that help")
    refuse_straight_lines(table, FINDING.single_steps, "shares of parameters that help")
    single = ~long_segments(table)
    counted = table.isel(tensor=table["kind"].values == "parameter")
    elements = counted["elements"]
    dims = tuple(name for name in counted["helping"].dims if name != "tensor")
    total = max(1, int(elements.sum()))
    counts = {name: counted[name].sum("tensor").values for name in ("helping", "hurting")}
    variables = {
        "helping": described(
            (dims, counts["helping"] / total), "share", "share of parameters that help"
        ),
        "hurting": described(
            (dims, counts["hurting"] / total), "share", "share of parameters that hurt"
        ),
        "zero": described(
            (dims, (total - counts["helping"] - counts["hurting"]) / total),
            "share",
            "share of parameters at exactly 0",
        ),
        "tensor_helping": described(
            counted["helping"] / np.maximum(1, elements),
            "share",
            "share of the tensor's parameters that help",
        ),
        "tensor_hurting": described(
            counted["hurting"] / np.maximum(1, elements),
            "share",
            "share of the tensor's parameters that hurt",
        ),
        "tensor_moved": described(
            (counted["motion"] > 0).astype("int8"), "", "whether the tensor moved"
        ),
    }
    for name in ("helping", "hurting", "zero", "tensor_helping", "tensor_hurting"):
        of_dims, values, attributes = variables[name]
        shown = single.reshape(-1, *[1] * (np.ndim(values) - 1))
        variables[name] = of_dims, np.where(shown, values, np.nan), attributes
    labels = {
        str(name): column
        for name, column in counted.coords.items()
        if name not in ("kind", "replicate")
    }
    coords: dict[str, object] = dict(labels)
    left_out = [*unfinished(results), *held_back(table, "shares of parameters that help")]
    if single.all() and results.complete:
        over_time, names = _over_time(results, most)
        variables |= over_time
        coords |= names
        if np.isnan(over_time["probability"][1]):
            left_out.append(
                "No parameter has an effect anywhere, so there is no probability of helping and no hero "
                "or villain."
            )
    elif single.all():
        left_out.append("Results of single parameters over time need every segment.")
    return xr.Dataset(variables, coords=coords, attrs=about(results, "helping", left_out))


def _over_time(results: LossResults, most: int) -> tuple[dict[str, Variable], dict[str, object]]:
    """Return the histogram of the share of its segments on which each parameter helps, the null,
    heroes and villains.
    """
    segments = results.manifest.segments
    # parameters by the number of segments on which they have an effect
    having = np.zeros(segments + 1, "int64")
    counts = np.zeros(_BINS, "int64")
    helped = 0
    often, seldom = _Extremes(most, -1), _Extremes(most, 1)
    for spec, part, values in each_total(results, ("allocated", "helping", "hurting")):
        allocated, helping, hurting = (
            values[0].ravel(),
            *(field.ravel().astype("int64") for field in values[1:]),
        )
        effects = helping + hurting
        moved = np.flatnonzero(effects)
        having += np.bincount(effects, minlength=segments + 1)
        counts += np.bincount(_bin(helping[moved], effects[moved]), minlength=_BINS)
        helped += int(helping.sum())
        for extremes in (often, seldom):
            extremes.add(spec.name, part, moved, effects[moved], helping[moved], allocated[moved])
    having[0] = 0
    total, active = int(having @ np.arange(segments + 1)), int(having.sum())
    probability = helped / total if total else float("nan")
    expected = np.zeros(_BINS)
    for effects in np.flatnonzero(having):
        helping = np.arange(effects + 1)
        chance = scipy.stats.binom.pmf(helping, effects, probability)
        expected += having[effects] * np.bincount(_bin(helping, effects), chance, _BINS)
    variables = {
        "parameters": described(
            (("share",), counts),
            "parameters",
            "parameters that help on that share of their segments",
        ),
        "expected": described((("share",), expected), "parameters", "the same by chance alone"),
        "probability": described(
            ((), probability), "share", "share of the parameters' segments on which they help"
        ),
    }
    edges = np.linspace(0, 1, _BINS + 1)
    coords: dict[str, object] = {
        "share": described(
            (("share",), (edges[1:] + edges[:-1]) / 2), "share", "share of its segments it helps on"
        ),
        "share_low": ("share", edges[:-1]),
        "share_high": ("share", edges[1:]),
    }
    for dim, extremes in (("hero", often), ("villain", seldom)):
        table, names = extremes.table(dim, probability, active)
        variables |= table
        coords |= names
    return variables, coords


def joined_shares(result: xr.Dataset) -> tuple[Numbers, Numbers, Numbers]:
    """Return edges, parameters and expectation of `helping`, in bins of about four possible shares
    each.

    Narrower bins would hold one or two possible shares by turns, and look like a comb.
    """
    bins = result.sizes["share"]
    most = max(_FEWEST, result.sizes["step"] // 4)
    join = next(
        size
        for size in range(1, bins + 1)
        if bins % size == 0 and (bins // size <= most or size == bins)
    )
    edges = np.append(result["share_low"].values[::join], result["share_high"].values[-1:])
    parameters, expected = (
        result[name].values.reshape(-1, join).sum(axis=1) for name in ("parameters", "expected")
    )
    return edges, parameters, expected


def _bin(helping: Numbers, effects: Numbers | np.integer[Any]) -> Numbers:
    """Return the exact bin of the share helping / effects."""
    bins: Numbers = np.minimum(_BINS - 1, helping * _BINS // effects)
    return bins


class _Extremes:
    """The parameters that help most (sign −1) or least (sign 1) often, ranked by their binomial
    tails.

    The probability is known only at the end. Among parameters with an effect on equally many
    segments the order does not depend on it, so the `most` extreme ones are kept for each number of
    segments.
    """

    def __init__(self, most: int, sign: int) -> None:
        self._most, self._sign = most, sign
        self._kept: dict[str, Numbers] = {
            "effects": np.zeros(0, "int64"),
            "helping": np.zeros(0, "int64"),
            "allocated": np.zeros(0),
            "name": np.zeros(0, object),
        }

    def add(
        self,
        tensor: str,
        part: tuple[slice, ...],
        positions: Numbers,
        effects: Numbers,
        helping: Numbers,
        allocated: Numbers,
    ) -> None:
        """Add the parameters of one block of a tensor."""
        first = self._first(effects, helping)
        names = [parameter_name(tensor, place_of(part, position)) for position in positions[first]]
        new = {
            "effects": effects[first],
            "helping": helping[first],
            "allocated": allocated[first],
            "name": np.array(names, dtype=object),
        }
        joined = {name: np.concatenate([self._kept[name], values]) for name, values in new.items()}
        first = self._first(joined["effects"], joined["helping"])
        self._kept = {name: values[first] for name, values in joined.items()}

    def _first(self, effects: Numbers, helping: Numbers) -> Numbers:
        """Return the positions of the most extreme of equally many effects; ties go to the first."""
        order = np.lexsort((self._sign * helping, effects))
        ordered = effects[order]
        rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        return np.sort(order[rank < self._most])

    def table(
        self, dim: str, probability: float, parameters: int
    ) -> tuple[dict[str, Variable], dict[str, object]]:
        """Return the most extreme of all: the smallest tails; ties go to the larger effect on the
        loss.
        """
        effects, helping, allocated = (
            self._kept[name] for name in ("effects", "helping", "allocated")
        )
        tail = (
            scipy.stats.binom.sf(helping - 1, effects, probability)
            if self._sign < 0
            else scipy.stats.binom.cdf(helping, effects, probability)
        )
        order = np.lexsort((self._sign * allocated, tail))[: self._most]
        share = helping[order] / effects[order]
        variables = {
            f"{dim}_share": described(
                ((dim,), share), "share", "share of its segments on which it helps"
            ),
            f"{dim}_segments": described(
                ((dim,), effects[order]), "segments", "segments on which it has an effect"
            ),
            f"{dim}_allocated": described(
                ((dim,), allocated[order]), "loss", "Σ allocation over training"
            ),
            f"{dim}_p": described(
                ((dim,), np.minimum(1, tail[order] * parameters)), "", "binomial tail × parameters"
            ),
        }
        return variables, {f"{dim}_name": (dim, self._kept["name"][order])}
