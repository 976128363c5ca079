"""Compare two losses over two splits, such as training and validation: which layers and parameters
lowered one and raised the other.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping

import numpy as np
import xarray as xr

from ..base.declarations import BY, TOP, Finding
from ..errors import InputError
from ..results import LossResults
from .common import (
    Variable,
    about,
    beyond_keep,
    described,
    each_total,
    largest,
    parameter_name,
    place_of,
    refuse_part,
    unfinished,
)
from .layers import layers

FINDING = Finding(
    question="Which layers lowered one loss, such as that of training, and raised another, such as that of "
    "validation",
    needs="two losses of a run over two splits; parameters `--keep statistics`",
    place=80,
    losses=2,
    runs="beside",
    options=(BY, TOP),
)

_SPLIT_WORDS = re.compile(
    r"train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval(uation)?|held.?out", re.IGNORECASE
)


def generalisation(
    first: LossResults, second: LossResults, *, by: str | int = "module", most: int = 10
) -> xr.Dataset:
    """Return the allocations to two losses over two splits, by layer and by parameter.

    Variables have the names of the two losses, here `train` and `validation`. A loss whose name is
    taken in the result, such as "layer", is called "loss layer" there; `attrs["first"]` and
    `attrs["second"]` hold both names.

    Args:
        first: a loss of a run over one split, at any level of `--keep`; parameters need `--keep
            statistics` and every segment.
        second: a loss of the same run over another split.
        by: as of `layers`.
        most: how many parameters to name, those that helped the first and hurt the second most, by
            the smaller of the two effects.

    Returns:
        `train`, `validation` (layer) and `cumulative_train`, `cumulative_validation` (step, layer),
        in units of loss; `parameters` (quadrant, tensor), a count of single parameters by their
        effects over training, `allocated_train` and `allocated_validation` (quadrant, tensor), their
        sums; `worst_train`, `worst_validation` (worst) with coordinate `worst_name`.

    Raises:
        LCAError: if no segment is finished yet, or stored numbers are damaged.
        InputError: if the two are not of one run, have groups, are not over two splits, or do not
            have the same segments.
    """
    _check_pair(first, second)
    refuse_part(first, "sums of two losses side by side")
    both = [layers(results, by=by) for results in (first, second)]
    left_out = list(
        dict.fromkeys([*unfinished(first), *unfinished(second), *_parts(first, second)])
    )
    is_even = first.behind == second.behind
    if not is_even:
        both = _common(*both)
        last = int(both[0]["step_end"].values[-1]) if both[0].sizes["step"] else 0
        left_out.append(f"One loss ends before the other: both are shown up to step {last:,}.")
    _check_segments(*both)
    called = _called(first.name, second.name)
    variables = _of_layers(called, both)
    coords: dict[str, object] = {str(name): column for name, column in both[0].coords.items()}
    beyond = beyond_keep(first, "statistics", "Counts of parameters by their effects on both")
    if first.complete and second.complete and is_even and not beyond:
        parameters, places = _quadrants(first, second, called, most)
        variables |= parameters
        coords |= places
    elif not beyond:
        left_out.append("Counts of single parameters need every segment of both.")
    attrs = {
        **about(first, "generalisation", left_out, beyond),
        "loss": f"{first.name}, {second.name}",
    }
    attrs |= {
        "split": f"{first.record.on}, {second.record.on}",
        "first": called[0],
        "second": called[1],
    }
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def _check_pair(first: LossResults, second: LossResults) -> None:
    """Reject losses that are not of one run, over two splits and without groups.

    Raises:
        InputError: with the reason and what to do.
    """
    if first.path != second.path:
        raise InputError(
            f"{first.path} and {second.path} are two runs. Take two losses of one run."
        )
    for results in (first, second):
        if results.record.groups is not None:
            raise InputError(
                f"loss {results.name!r} has groups; take losses of whole splits, or compare groups "
                "in `layers`."
            )
        if results.record.on is None:
            raise InputError(
                f"loss {results.name!r} is a term of the parameters, over no split; generalisation "
                "takes two losses over two splits."
            )
    if first.record.on == second.record.on:
        raise InputError(
            f"losses {first.name!r} and {second.name!r} are both over split {first.record.on!r}, "
            "and generalisation compares two splits. Add a Loss(…, on=another split) to the task "
            "and `lca run` it, or draw `layers` of each loss."
        )


def _check_segments(one: xr.Dataset, other: xr.Dataset) -> None:
    """Reject layers of two losses that are of different segments, or of none.

    Raises:
        InputError: with what to do.
    """
    if not np.array_equal(one["step"].values, other["step"].values) or not one.sizes["step"]:
        raise InputError(
            "the two losses do not have the same segments yet. Run `lca run` again to finish both."
        )


def _of_layers(called: tuple[str, str], both: list[xr.Dataset]) -> dict[str, Variable]:
    """Return the allocations of layers to each loss, over training and cumulative."""
    variables: dict[str, Variable] = {}
    for name, of_loss in zip(called, both, strict=True):
        variables[name] = described(
            of_loss["allocated"].sum("step"), "loss", f"Σ allocation over training, {name}"
        )
        variables[f"cumulative_{name}"] = described(
            of_loss["cumulative"], "loss", f"Σ allocation so far, {name}"
        )
    return variables


def _common(one: xr.Dataset, other: xr.Dataset) -> list[xr.Dataset]:
    """Return both up to the last checkpoint that both cover."""
    last = min(layers_of_loss["step_end"].values[-1] for layers_of_loss in (one, other))
    return [
        layers_of_loss.isel(step=layers_of_loss["step_end"].values <= last)
        for layers_of_loss in (one, other)
    ]


def two_splits(losses: Mapping[str, LossResults]) -> tuple[str, str] | None:
    """Return the two losses to compare by default: without groups, over two splits.

    The first is over the split whose name begins with "train", if there is one. The second is
    chosen from the others in this order: names that differ from the first by the split alone
    (`dice_train`, `dice_val`), losses over a split for validation, losses declared the same way,
    and losses named earlier.

    Returns:
        Their names; None if no two losses without groups are over two splits.
    """
    able = {
        name: results.record
        for name, results in losses.items()
        if results.record.groups is None and results.record.on is not None
    }
    pairs = [(one, two) for one in able for two in able if able[one].on != able[two].on]
    if not pairs:
        return None
    order = list(able)

    def rank(pair: tuple[str, str]) -> tuple[bool | int, ...]:
        one, two = (able[name] for name in pair)
        trained, other = str(one.on), str(two.on)
        return (
            not trained.lower().startswith("train"),
            other.lower().startswith("train"),
            _stem(pair[0], trained) != _stem(pair[1], other),
            not other.lower().startswith("val"),
            one.kind != two.kind,
            order.index(pair[0]),
            order.index(pair[1]),
        )

    return min(pairs, key=rank)


def no_two_splits(losses: Mapping[str, LossResults]) -> str:
    """Say why `two_splits` finds no two losses, and what to do."""
    over: dict[str, list[str]] = {}
    for name, results in losses.items():
        if results.record.groups is None and results.record.on is not None:
            over.setdefault(results.record.on, []).append(repr(name))
    listed = "; ".join(
        f"over {split!r} {'is' if len(names) == 1 else 'are'} {', '.join(names)}"
        for split, names in over.items()
    )
    return (
        f"it takes two losses without groups over two splits, and {listed or 'there is none'}. Add "
        "a Loss(…, on=another split) to the task and `lca run` it."
    )


def _stem(name: str, split: str) -> str:
    """Return the part of a loss's name that does not name its split.

    >>> [_stem(name, "validation") for name in ("dice_val", "dice", "validation")]
    ['dice', 'dice', '']
    """
    return re.sub(r"[\W_]+", "", _SPLIT_WORDS.sub("", name.replace(split, "")))


def _called(first: str, second: str) -> tuple[str, str]:
    """Return the names of the two losses in the result: their own, unless taken there."""
    others = {
        "step",
        "step_end",
        "layer",
        "elements",
        "role",
        "quadrant",
        "tensor",
        "parameters",
        "worst",
        "worst_name",
    }

    def variables(name: str) -> set[str]:
        return {name, *(f"{prefix}_{name}" for prefix in ("cumulative", "allocated", "worst"))}

    while variables(first) & (others | variables(second)):
        first = f"loss {first}"
    while variables(second) & (others | variables(first)):
        second = f"loss {second}"
    return first, second


def _parts(first: LossResults, second: LossResults) -> list[str]:
    """Name the losses that are measured on a part of their split's examples."""
    return [
        f"{results.name} is measured on {results.record.examples:,} of {results.record.total:,} "
        "examples."
        for results in (first, second)
        if results.record.examples < results.record.total
    ]


def quadrants(first: str, second: str) -> list[str]:
    """Return names for the five effects that a parameter can have on two losses.

    >>> quadrants("train", "validation")[1]
    'helped train, hurt validation'

    Args:
        first: name of a loss.
        second: name of another loss.
    """
    mixed = [f"helped {first}, hurt {second}", f"hurt {first}, helped {second}"]
    return ["both helped", *mixed, "both hurt", "zero on either"]


def _quadrants(
    first: LossResults, second: LossResults, called: tuple[str, str], most: int
) -> tuple[dict[str, Variable], dict[str, object]]:
    names = quadrants(first.name, second.name)
    tensors = [
        tensor.spec.name for tensor in first.manifest.allocated if tensor.spec.kind == "parameter"
    ]
    count = np.zeros((len(names), len(tensors)), "int64")
    sums = np.zeros((2, len(names), len(tensors)))
    worst: list[tuple[float, str, float, float]] = []
    fields = ("allocated",)
    both = zip(each_total(first, fields), each_total(second, fields), strict=True)
    for (spec, part, (one,)), (_, _, (two,)) in both:
        column = tensors.index(spec.name)
        which = np.select(
            [(one == 0) | (two == 0), (one < 0) & (two < 0), one < 0, two < 0], [4, 0, 1, 2], 3
        )
        count[:, column] += np.bincount(which.ravel(), minlength=len(names))
        for row, values in enumerate((one, two)):
            sums[row, :, column] += np.bincount(which.ravel(), values.ravel(), len(names))
        harm = np.where(which == 1, np.minimum(-one, two), 0.0).ravel()
        for position in largest(harm, most):
            if harm[position] > 0:
                name = parameter_name(spec.name, place_of(part, position))
                worst.append(
                    (
                        float(harm[position]),
                        name,
                        float(one.ravel()[position]),
                        float(two.ravel()[position]),
                    )
                )
        worst = heapq.nlargest(most, worst)
    dims = ("quadrant", "tensor")
    variables = {
        "parameters": described(
            (dims, count), "parameters", "parameters by their effects on both losses"
        )
    }
    for row, name in enumerate(called):
        hurt = np.array([entry[2 + row] for entry in worst])
        variables[f"allocated_{name}"] = described(
            (dims, sums[row]), "loss", f"Σ allocation of these parameters, {name}"
        )
        variables[f"worst_{name}"] = described((("worst",), hurt), "loss", f"Σ allocation, {name}")
    coords: dict[str, object] = {
        "quadrant": np.array(names, dtype=object),
        "tensor": np.array(tensors, dtype=object),
        "worst_name": ("worst", np.array([entry[1] for entry in worst], dtype=object)),
    }
    return variables, coords
