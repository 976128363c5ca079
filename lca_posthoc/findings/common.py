"""Provide what findings share: descriptions of results, layers and roles of tensors, stored arrays
read in blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from ..base.declarations import declared_findings
from ..base.text import count
from ..checkpoints.trajectory import TensorSpec
from ..errors import InputError, LCAError
from ..numerics.sampling import SegmentSample, scale, standard_error
from ..numerics.schema import KEEP, TOTALS, holds
from ..results import LossResults

BLOCK = 2**22  # numbers held in memory at a time
ROLES = ("kernel", "bias", "normalisation", "buffer", "other")
_SETTINGS = {"causes": "signal", "along": "directions"}  # recorded where a run has the part
_FLAGS = {"causes": "--causes", "along": "--along FILE"}
_PARAMETER = re.compile(r"(?P<name>.+?)\[(?P<indices>\d+(?:\s*,\s*\d+)*)?\]", re.DOTALL)

Numbers = np.ndarray[Any, Any]
# of a dataset: dims, values, attributes
Variable = tuple[tuple[Hashable, ...], Any, dict[str, object]]


def about(
    results: LossResults,
    finding: str,
    left_out: Iterable[str] = (),
    beyond_keep: Iterable[str] = (),
) -> dict[str, str]:
    """Return the attributes of every finding: its name, the run, the loss, the split, and what is
    missing and why.

    `left_out` ends with what the run's `--keep` excludes, which `beyond_keep` holds as well. For a
    model with running statistics, `norm_stats` names the statistics that its normalisation layers
    used.

    Args:
        results: one loss of a run.
        finding: its name.
        left_out: sentences on what is missing.
        beyond_keep: sentences on what the run's `--keep` excludes.
    """
    beyond = " ".join(beyond_keep)
    return {
        "finding": finding,
        "run": str(results.path),
        "loss": results.name,
        "split": results.record.on or "",
        "left_out": " ".join([*left_out, *([beyond] if beyond else [])]),
        **({"beyond_keep": beyond} if beyond else {}),
        **({"norm_stats": results.norm_stats} if results.norm_stats else {}),
    }


def beyond_keep(results: LossResults, level: str, what: str) -> list[str]:
    """Return a sentence if a run keeps too little for `what`; else nothing.

    Args:
        results: one loss of a run.
        level: of `--keep` that is needed.
        what: needs it, in the plural.
    """
    if results.holds(level):
        return []
    return [f"{what} need --keep {level}; this run keeps {results.manifest.keep}."]


def left_out_of(finding: xr.Dataset) -> str:
    """Return what a finding lacks for other reasons than the run's `--keep`."""
    left_out = str(finding.attrs.get("left_out", ""))
    return left_out.removesuffix(str(finding.attrs.get("beyond_keep", ""))).strip()


def findings_beyond(keep: str) -> dict[str, list[str]]:
    """Return the findings that need more than a level of `--keep`, by the level they need.

    >>> findings_beyond("statistics")
    {'parameters': ['microscope']}
    """
    beyond: dict[str, list[str]] = {}
    for level in KEEP:
        for name, finding in declared_findings().items():
            if finding.level == level and not holds(keep, level):
                beyond.setdefault(level, []).append(name)
    return beyond


def described(
    data: xr.DataArray | tuple[tuple[Hashable, ...], Any], units: str, long_name: str
) -> Variable:
    """Return a variable (dims, values, attributes) with its unit and its meaning.

    Args:
        data: an array, or dims and values.
        units: of the values, such as "loss"; "" for none.
        long_name: the meaning, in words.
    """
    dims, values = (data.dims, data.values) if isinstance(data, xr.DataArray) else data
    return dims, values, {"units": units, "long_name": long_name}


def unfinished(results: LossResults) -> list[str]:
    """Describe the segments that are not finished, or that the loss does not include; nothing where
    there are none.
    """
    done = results.progress()
    behind = (
        [
            f"Loss {results.name} ends at step {done['last_step']:,}, "
            f"{count(done['behind'], 'segment')} before the run does. Run `lca run` with --loss "
            f"{results.name} to replay the rest."
        ]
        if done["behind"]
        else []
    )
    if done["complete"]:
        return behind
    return [
        *behind,
        f"{done['segments_done']:,} of {count(done['segments'], 'segment')} "
        f"{'is' if done['segments_done'] == 1 else 'are'} finished. Run `lca run` again to finish the rest.",
    ]


def has_part(results: LossResults, part: str) -> bool:
    """Tell whether a run has an optional part of the results.

    Args:
        results: one loss of a run.
        part: "causes" or "along"; "" for none, which every run has.
    """
    settings: Mapping[str, object] = results.manifest.settings
    return not part or settings.get(_SETTINGS[part]) is not None


def without_part(results: LossResults, part: str) -> str:
    """Say that a run lacks an optional part of the results, and how to get it.

    Args:
        results: one loss of a run.
        part: "causes" or "along".
    """
    flag = _FLAGS[part]
    return (
        f"{results.path} was made without {flag}. Run again with it into another directory: {flag} "
        "--out OTHER.lca."
    )


def part_of(results: LossResults, part: str) -> xr.Dataset:
    """Return an optional part of the results.

    Args:
        results: one loss of a run.
        part: "causes" or "along".

    Raises:
        InputError: if the run was made without it.
    """
    if not has_part(results, part):
        raise InputError(without_part(results, part))
    data: xr.Dataset = getattr(results, part)
    return data


def cumulated(data: xr.DataArray) -> xr.DataArray:
    """Return the cumulative sums over the steps, with the same order of axes."""
    return data.cumsum("step").transpose(*data.dims)


def takes_part(results: LossResults, finding: str) -> bool:
    """Tell whether the segments of a run allow a finding: all segments allow any, a random part
    only some.

    Args:
        results: one loss of a run.
        finding: its name.
    """
    return results.manifest.sampled is None or declared_findings()[finding].sampled


def about_part(sampled: str) -> str:
    """Name the findings that a random part of the segments (`--segments`) does not allow."""
    findings = [name for name, finding in declared_findings().items() if not finding.sampled]
    return (
        f"the run is of a random part of the segments (--segments {sampled}), so findings that need "
        f"all of them are missing: {', '.join(findings)}."
    )


def refuse_part(results: LossResults, what: str) -> None:
    """Reject a run of a random part of the segments.

    Args:
        results: one loss of a run.
        what: needs all of them, in the plural.

    Raises:
        InputError: with the way out.
    """
    if results.manifest.sampled is not None:
        raise InputError(f"{what} {results.of_a_part()}")


def over_training(results: LossResults, column: xr.DataArray) -> xr.DataArray:
    """Return Σ over the segments; for a random part of them, the estimate of that over all.

    Args:
        results: one loss of a run.
        column: by step.
    """
    return _of_all(results, column.sum("step"), column.sizes["step"])


def so_far(results: LossResults, column: xr.DataArray) -> xr.DataArray:
    """Return the cumulative sums over the steps, estimated as in `over_training`, with the same
    order of axes.

    Args:
        results: one loss of a run.
        column: by step.
    """
    return _of_all(results, cumulated(column), column.sizes["step"])


def _of_all(results: LossResults, sums: xr.DataArray, segments: int) -> xr.DataArray:
    return sums if results.manifest.sampled is None else sums * scale_of(results, segments)


def scale_of(results: LossResults, segments: int) -> float:
    """Return the factor that scales sums over some segments to all of them; 1 for a run of all
    segments.

    Args:
        results: one loss of a run.
        segments: how many the sums include.
    """
    manifest = results.manifest
    return 1.0 if manifest.sampled is None else scale(manifest.all_segments, segments)


def segments_error(results: LossResults, column: xr.DataArray) -> xr.DataArray | None:
    """Return the standard error of `over_training`; None for a run of all segments, or a single
    one.

    Args:
        results: one loss of a run.
        column: by step.
    """
    manifest = results.manifest
    if manifest.sampled is None or column.sizes["step"] < 2:
        return None
    rows = column.transpose("step", ...)
    error = standard_error(rows.values, manifest.all_segments)
    return xr.DataArray(error, dims=rows.dims[1:])


def estimated(results: LossResults) -> list[str]:
    """Say that sums over training are estimates, for a random part of the segments."""
    manifest = results.manifest
    if manifest.sampled is None:
        return []
    sample, every = SegmentSample.parse(manifest.sampled), manifest.all_segments
    return [
        f"Sums over training are estimates from a random {100 * float(sample.fraction):.3g} % of the "
        f"segments ({sample.size(every):,} of {every:,}, seed {sample.seed})."
    ]


def tables(
    results: LossResults,
    level: str = "tensors",
    what: str = "findings of this kind",
    *,
    sampled: bool = False,
) -> xr.Dataset:
    """Return the table of tensors over the finished segments.

    Args:
        results: one loss of a run.
        level: of `--keep` that is needed.
        what: needs it, in the plural.
        sampled: whether a random part of the segments is enough.

    Raises:
        LCAError: if no segment is finished yet.
        InputError: if the run keeps less, or `results` is no loss of a run.
    """
    if not isinstance(results, LossResults):
        raise InputError(
            f'a finding takes one loss of a run, such as open_run(RUN)["train"], got '
            f"{type(results).__name__}."
        )
    results.require(level, what)
    if not sampled:
        refuse_part(results, what)
    table = results.tensors
    if not table.sizes["step"]:
        raise LCAError(
            f"loss {results.name!r} has no finished segment yet. Let `lca run` commit a span first."
        )
    return table


def layer_of(name: str, by: str | int = "module") -> str:
    """Return the layer a tensor belongs to.

    Args:
        name: of the tensor, such as "encoder.0.attention.weight".
        by: "tensor" for every tensor by itself, "module" for the module that holds it, or the
            number of parts of the module's name that name the layer; 0 is the whole network, "".

    Raises:
        InputError: for any other `by`.

    >>> [layer_of("encoder.0.attention.weight", by) for by in ("tensor", "module", 1)]
    ['encoder.0.attention.weight', 'encoder.0.attention', 'encoder']
    """
    if by == "tensor":
        return name
    module = name.rpartition(".")[0] or name
    if by == "module":
        return module
    if not isinstance(by, int) or isinstance(by, bool) or by < 0:
        raise InputError(
            f'by is "tensor", "module" or how many parts of a module\'s name to keep, got {by!r}.'
        )
    return ".".join(module.split(".")[:by])


def moving_buffers(table: xr.Dataset) -> set[str]:
    """Return the names of the buffers that moved, such as running statistics, in a table of
    tensors.

    They do not belong to the layer that holds them, because that layer stands for its parameters. A
    buffer that did not move has allocation 0.
    """
    motion = table["motion"].sum([name for name in table["motion"].dims if name != "tensor"]).values
    moving = (table["kind"].values == "buffer") & (motion > 0)
    return {str(name) for name in table["tensor"].values[moving]}


def label_of(name: str, by: str | int, buffers: Collection[str]) -> str:
    """Return the layer a tensor belongs to; some buffers form a layer of their own.

    >>> [label_of(f"bn1.{name}", "module", {"bn1.running_mean"}) for name in ("weight", "running_mean")]
    ['bn1', 'bn1 buffer']

    Args:
        name: of the tensor.
        by: as of `layer_of`.
        buffers: names of the buffers that form layers.
    """
    layer = layer_of(name, by)
    return f"{layer} buffer".strip() if name in buffers and by != "tensor" else layer


def grouping(names: Iterable[str], by: str | int = "module") -> dict[str, list[int]]:
    """Return the positions of the tensors of every layer, in the model's order.

    Args:
        names: of the tensors.
        by: as of `layer_of`.
    """
    layers: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        layers.setdefault(layer_of(name, by), []).append(position)
    return layers


def roles(results: LossResults) -> dict[str, str]:
    """Return the role of each tensor in its module, deduced from its kind, its axes and its
    neighbours.

    A buffer is a "buffer"; two axes or more make a "kernel"; a vector beside a kernel in the same
    module is a "bias"; vectors of a module without a kernel are "normalisation"; scalars are
    "other".
    """
    specs = [tensor.spec for tensor in results.manifest.allocated]
    everything = [tensor.spec for tensor in results.manifest.tensors]
    with_kernel = {
        layer_of(spec.name)
        for spec in everything
        if spec.kind == "parameter" and len(spec.shape) > 1
    }
    by_name = {}
    for spec in specs:
        if spec.kind == "buffer":
            role = "buffer"
        elif len(spec.shape) > 1:
            role = "kernel"
        elif not spec.shape:
            role = "other"
        else:
            role = "bias" if layer_of(spec.name) in with_kernel else "normalisation"
        by_name[spec.name] = role
    return by_name


def parameter_name(tensor: str, indices: Iterable[int]) -> str:
    """Return the name of a single parameter.

    >>> parameter_name("fc1.weight", (3, 17))
    'fc1.weight[3, 17]'

    Args:
        tensor: its name.
        indices: of the parameter along each axis.
    """
    return f"{tensor}[{', '.join(str(int(index)) for index in indices)}]"


def place_of(part: tuple[slice, ...], position: int) -> tuple[int, ...]:
    """Return the indices within a tensor of an element of one of its `blocks`.

    >>> place_of((slice(2, 4), slice(0, 3)), 4)
    (3, 1)

    Args:
        part: the block.
        position: of the element in the flattened block.
    """
    indices = np.unravel_index(position, [cut.stop - cut.start for cut in part]) if part else ()
    return tuple(int(index) + cut.start for index, cut in zip(indices, part, strict=True))


def parse_parameter(name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
    """Return the tensor and the indices that a name from `parameter_name` denotes.

    Args:
        name: of a parameter, such as "fc1.weight[3, 17]".
        shapes: of the tensors, by name.

    Raises:
        InputError: if there is no such tensor or parameter.
    """
    match = _PARAMETER.fullmatch(name)
    tensor = match["name"] if match else name
    if tensor not in shapes:
        known = ", ".join(list(shapes)[:6])
        raise InputError(
            f"there is no tensor {tensor!r} with a kept allocation; there are {known}. Write "
            "NAME[I, J]."
        )
    indices = (
        tuple(int(text) for text in (match["indices"] or "").split(",") if text.strip())
        if match
        else ()
    )
    shape = shapes[tensor]
    if len(indices) != len(shape) or any(
        index >= extent for index, extent in zip(indices, shape, strict=True)
    ):
        raise InputError(
            f"{name!r} is not a parameter of {tensor}, whose shape is {list(shape)}. Write NAME[I, "
            "J]."
        )
    return tensor, indices


def stretches(steps: int, frames: int) -> Numbers:
    """Return the borders of at most `frames` stretches of consecutive segments, equally long except
    the last.

    Args:
        steps: the number of segments.
        frames: the most stretches.

    Returns:
        (frames + 1,), rising, from 0 to `steps`.

    Raises:
        InputError: for fewer than one frame.
    """
    if frames < 1:
        raise InputError(f"at least one frame is needed, got {frames}.")
    length = -(-steps // frames)
    return np.append(np.arange(0, steps, length), steps)


def blocks(shape: tuple[int, ...], rows: int = 1, most: int = BLOCK) -> Iterator[tuple[slice, ...]]:
    """Yield slices that cut an array into parts of at most `most` numbers.

    Axes are cut from the left, as the stored chunks are. A scalar is one part, ().

    Args:
        shape: of the array.
        rows: how many such arrays are read at once.
        most: numbers of a part, over all rows.
    """
    if not shape:
        yield ()
        return
    inner = rows * math.prod(shape[1:])
    if inner > most and len(shape) > 1:
        for row in range(shape[0]):
            for rest in blocks(shape[1:], rows, most):
                yield slice(row, row + 1), *rest
        return
    length = max(1, most // max(1, inner))
    for start in range(0, shape[0], length):
        yield (
            slice(start, min(start + length, shape[0])),
            *(slice(0, extent) for extent in shape[1:]),
        )


def largest(values: Numbers, most: int) -> list[int]:
    """Return the positions of the `most` largest values, or of all, in no particular order.

    Args:
        values: a flat array.
        most: how many.
    """
    if most < 1:
        return []
    return [
        int(position) for position in np.argpartition(-values, min(most, values.size) - 1)[:most]
    ]


def each_total(
    results: LossResults, fields: tuple[str, ...], *, buffers: bool = False
) -> Iterator[tuple[TensorSpec, tuple[slice, ...], Numbers]]:
    """Yield the totals per parameter in blocks: the tensor, its part, and (fields, *part) float64.

    Args:
        results: one loss of a run.
        fields: names of the totals.
        buffers: whether to include buffers.

    Raises:
        LCAError: if the run is not complete, or stored numbers are damaged.
    """
    totals = results.totals
    rows = [list(totals["total"].values).index(name) for name in fields]
    for tensor in results.manifest.allocated:
        if tensor.spec.kind == "parameter" or buffers:
            for part in blocks(tensor.spec.shape, 2 * len(TOTALS)):
                yield tensor.spec, part, totals[tensor.spec.name][(slice(None), *part)].values[rows]
