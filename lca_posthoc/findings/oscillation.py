"""Count changes of sign of weights, gradients and allocations, and trace single parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from ..base.declarations import GROUPS, TOP, Finding, Option
from ..checkpoints.paths import located
from ..checkpoints.trajectory import read_checkpoint
from ..errors import InputError
from ..numerics.schema import SIGNED
from ..results import LossResults
from .bands import held_back, refuse_straight_lines, straight_lines
from .common import (
    Numbers,
    Variable,
    about,
    beyond_keep,
    described,
    each_total,
    largest,
    parameter_name,
    parse_parameter,
    place_of,
    tables,
    unfinished,
)

FINDING = Finding(
    question="How often do weights, gradients, allocations turn; traces of single parameters",
    needs="`--keep statistics`; traces `--keep parameters`",
    place=50,
    level="statistics",
    single_steps="every",
    options=(
        GROUPS,
        Option(
            name="parameters",
            flag="--parameter",
            metavar="NAME[I, J]",
            repeatable=True,
            help="A parameter to trace (repeatable).",
        ),
        Option(
            name="checkpoints",
            flag="--checkpoints",
            kind="path",
            metavar="DIR",
            help="Where the checkpoints for traces of weights are now.",
        ),
        TOP,
    ),
)


def oscillation(
    results: LossResults,
    *,
    parameters: Sequence[str] = (),
    most: int = 3,
    checkpoints: str | Path | None = None,
) -> xr.Dataset:
    """Count turns of weights, sign changes of gradients and allocations, and trace chosen
    parameters.

    A turn is a change of sign between two nonzero values with only zeros between them; the gradient
    is its mean along each segment. The interval is the number of segments divided by the turns,
    which is the mean time between two of them. Means exclude parameters that never moved, and are
    NaN if none did.

    Args:
        results: one loss of a run. Turns need every segment and `--keep statistics`; traces `--keep
            parameters`.
        parameters: to trace, as "fc1.weight[3, 17]"; by default the `most` that helped and the
            `most` that hurt most.
        most: the number of each.
        checkpoints: the directory the run was computed from, for weights and gradients; by default
            the recorded one, or one of its name beside the run.

    Returns:
        `turns` (mean per parameter) and `interval` (segments), dims (tensor, signal) with signal
        weight, gradient, allocation; `overall_turns`, `overall_interval` (signal); `allocation`
        (trace, step[, group]) in units of loss, `weight` (trace, step; at the start of the
        segment), `gradient` (trace, step[, group]; loss per weight, NaN where the weight did not
        move), with coordinates `parameter` and `why` of trace.

    Raises:
        LCAError: if the run keeps only sums, a segment is longer than one training step and no
            parameter is named, no segment is finished yet, or stored numbers are damaged.
        InputError: for an unknown parameter.
        SpanError: if a checkpoint is not the one the run was made from.
    """
    table = tables(results, FINDING.level, "turns of parameters")
    left_out = unfinished(results)
    variables: dict[str, Variable] = {}
    coords: dict[str, object] = {}
    extremes: list[tuple[str, tuple[int, ...], str]] = []
    if straight_lines(table):
        if not (parameters and results.holds("parameters")):
            refuse_straight_lines(table, FINDING.single_steps, "turns")
        left_out += held_back(table, "turns")
    elif results.complete:
        variables, coords, extremes = _turns(results, most)
        if np.isnan(variables["overall_turns"][1]).all():
            left_out.append(
                "No parameter has an effect anywhere, so there are no turns and no intervals "
                "between them."
            )
    else:
        left_out.append("Turns need every segment.")
    chosen = [(*_parsed(results, name), "named") for name in parameters] or extremes
    if chosen and results.holds("parameters"):
        traces, places = _traces(results, chosen, table)
        coords |= places
        variables |= traces
        root = _root(results) if checkpoints is None else located(checkpoints)
        if root is not None:
            variables |= _weights(results, root, chosen, traces["allocation"])
        else:
            left_out.append(
                "Weights and gradients of traces need the checkpoints, which are neither at "
                f"{results.manifest.root} nor beside the run. Name their place with checkpoints= or `lca "
                "plot --checkpoints`."
            )
    beyond = beyond_keep(results, "parameters", "Traces of parameters")
    return xr.Dataset(
        variables, coords=coords, attrs=about(results, "oscillation", left_out, beyond)
    )


def _root(results: LossResults) -> Path | None:
    """Return the directory of the checkpoints: the recorded one, or one of its name beside a moved
    run; else None.
    """
    # never fetch from a recorded address; the caller must name it
    if "://" in results.manifest.root:
        return None
    recorded = Path(results.manifest.root)
    return next(
        (
            directory
            for directory in (recorded, results.path.resolve().parent / recorded.name)
            if directory.is_dir()
        ),
        None,
    )


def _parsed(results: LossResults, name: str) -> tuple[str, tuple[int, ...]]:
    return parse_parameter(
        name, {tensor.spec.name: tensor.spec.shape for tensor in results.manifest.allocated}
    )


def _turns(
    results: LossResults, most: int
) -> tuple[dict[str, Variable], dict[str, object], list[tuple[str, tuple[int, ...], str]]]:
    """Return means per tensor and overall, coordinates, and the parameters with the lowest and
    highest Σ allocation.
    """
    fields = ("allocated", "helping", "hurting", *(f"{signal}_turns" for signal in SIGNED))
    sums: dict[str, Numbers] = {}
    moved: dict[str, int] = {}
    elements: dict[str, int] = {}
    ends: list[tuple[float, str, tuple[int, ...]]] = []
    for spec, part, values in each_total(results, fields):
        flat = values.reshape(len(fields), -1)
        active = (flat[1] + flat[2]) > 0
        sums[spec.name] = sums.get(spec.name, np.zeros(len(SIGNED))) + flat[3:, active].sum(1)
        moved[spec.name] = moved.get(spec.name, 0) + int(active.sum())
        elements[spec.name] = spec.elements
        for position in {*largest(flat[0], most), *largest(-flat[0], most)}:
            ends.append((flat[0][position], spec.name, place_of(part, position)))
        ends = _both_ends(ends, most)
    segments = results.manifest.segments
    names = list(sums)
    turns = np.array(
        [
            sums[name] / moved[name] if moved[name] else np.full(len(SIGNED), np.nan)
            for name in names
        ]
    )
    overall = sum(sums.values(), np.zeros(len(SIGNED))) / max(1, sum(moved.values()))
    overall = overall if sum(moved.values()) else np.full(len(SIGNED), np.nan)
    variables = {
        "turns": described(
            (("tensor", "signal"), turns.reshape(-1, len(SIGNED))), "", "mean turns per parameter"
        ),
        "overall_turns": described((("signal",), overall), "", "mean turns per parameter, of all"),
        "interval": described(
            (("tensor", "signal"), _interval(segments, turns.reshape(-1, len(SIGNED)))),
            "segments",
            "segments per turn",
        ),
        "overall_interval": described(
            (("signal",), _interval(segments, overall)), "segments", "segments per turn, of all"
        ),
    }
    coords: dict[str, object] = {
        "tensor": np.array(names, dtype=object),
        "signal": list(SIGNED),
        "elements": ("tensor", [elements[name] for name in names]),
    }
    extremes = [(name, place, "helped most") for value, name, place in ends[:most] if value < 0]
    extremes += [
        (name, place, "hurt most") for value, name, place in ends[::-1][:most] if value > 0
    ]
    return variables, coords, extremes


def _both_ends(
    ends: list[tuple[float, str, tuple[int, ...]]], most: int
) -> list[tuple[float, str, tuple[int, ...]]]:
    ordered = sorted(ends)
    return ordered if len(ordered) <= 2 * most else ordered[:most] + ordered[len(ordered) - most :]


def _interval(segments: int, turns: Numbers) -> Numbers:
    """Return segments per turn, infinite where nothing turns."""
    with np.errstate(divide="ignore"):
        interval: Numbers = np.float64(segments) / turns
    return interval


def _traces(
    results: LossResults, chosen: list[tuple[str, tuple[int, ...], str]], table: xr.Dataset
) -> tuple[dict[str, Variable], dict[str, object]]:
    data = results.allocation
    rows = [data[name][(..., *place)] if place else data[name] for name, place, _ in chosen]
    values = np.stack([row.values for row in rows])
    variables = {
        "allocation": described(
            (("trace", *rows[0].dims), values), "loss", "allocation of the segment"
        )
    }
    places = {
        "parameter": (
            "trace",
            np.array([parameter_name(name, place) for name, place, _ in chosen], dtype=object),
        ),
        "why": ("trace", np.array([why for *_, why in chosen], dtype=object)),
    }
    labels = {
        str(name): column
        for name, column in table.coords.items()
        if name in ("step", "step_end", "group", "examples")
    }
    return variables, {**labels, **places}


def _weights(
    results: LossResults,
    root: Path,
    chosen: list[tuple[str, tuple[int, ...], str]],
    traces: Variable,
) -> dict[str, Variable]:
    """Return the weights at the start of every finished segment, and mean gradients: allocation
    divided by motion.

    Raises:
        InputError: if a checkpoint cannot be read.
    """
    manifest = results.manifest
    sources = {tensor.spec.name: tensor.source for tensor in manifest.tensors}
    names = {name: sources[name] for name, *_ in chosen}
    dims, allocation, _ = traces
    steps = results.steps
    needed = {int(step) for coordinate in ("step", "step_end") for step in steps[coordinate].values}
    weights: dict[int, list[float]] = {}
    for checkpoint in manifest.checkpoints:
        if checkpoint.step in needed:
            try:
                tensors = read_checkpoint(checkpoint.under(root), names)
            except OSError as error:
                raise InputError(
                    f"cannot read the checkpoint of step {checkpoint.step} in {root}: {error}."
                ) from None
            weights[checkpoint.step] = [float(tensors[name][place]) for name, place, _ in chosen]
    start = np.array([weights[int(step)] for step in steps["step"].values]).T
    end = np.array([weights[int(step)] for step in steps["step_end"].values]).T
    motion = (end - start).reshape(*start.shape, *(1 for _ in dims[2:]))
    with np.errstate(divide="ignore", invalid="ignore"):
        gradient = np.where(motion == 0, np.nan, allocation / motion)
    return {
        "weight": described((("trace", "step"), start), "", "weight at the start of the segment"),
        "gradient": described(
            (dims, gradient), "loss per weight", "mean gradient along the segment"
        ),
    }
