"""`lca inspect`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import click

from ..base.text import count, safe
from ..errors import amount
from .options import json_option, trajectory_options
from .show import Table, bar, print_json, say, share, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoints.inspection import Inspection

_MOST_ROWS = 12


@click.command()
@trajectory_options
@json_option
def command(
    checkpoints: str,
    as_json: bool,
    steps: str | None,
    pattern: str | None,
    rename: tuple[str, ...],
) -> None:
    """Say whether CHECKPOINTS are those of one training, before anything is computed from them.

    \b
    lca inspect checkpoints
    lca inspect checkpoints --steps :1000 --json

    Every checkpoint is read once; no model and no data are needed. Named are files that hold the
    same weights, wherever they lie, checkpoints of another seed or training, exchanged steps,
    jumps, NaN and Inf, half precision with the share of weights it froze, and missing steps.

    A defect: a file is wrong, or not of this training. A doubt is worth a look. A note is as it
    should be. The exit code is 0 whatever is seen; --json tells scripts the worst grade.
    """
    from ..checkpoints.inspection import inspect

    with bar() as progress:
        inspection = inspect(
            checkpoints, steps=steps, pattern=pattern, rename=rename, say=say, progress=progress
        )
    if as_json:
        print_json(document(inspection))
    else:
        print_inspection(inspection, stdout())


def document(inspection: Inspection) -> dict[str, object]:
    """Return what `--json` prints."""
    return {
        "schema": 1,
        "worst": inspection.worst,
        "observations": [
            {**asdict(observation), "steps": list(observation.steps)}
            for observation in inspection.observations
        ],
        "steps": list(inspection.steps),
        "weights": inspection.weights,
        "dtypes": list(inspection.dtypes),
        "bytes": inspection.size,
        "norms": list(inspection.norms),
        "distances": list(inspection.distances),
        "same_bits": list(inspection.same_bits),
    }


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print what was seen, the worst first, the distances, and a verdict."""
    dtypes = ", ".join(inspection.dtypes)
    console.print(
        f"{count(len(inspection.steps), 'checkpoint')}, steps {inspection.steps[0]} to "
        f"{inspection.steps[-1]}; {count(inspection.weights, 'weight')} ({dtypes}), "
        f"{amount(inspection.size)} in all"
    )
    console.print()
    for observation in inspection.observations:
        console.print(f"{observation.grade}: {safe(observation.text)}.")
    if inspection.observations:
        console.print()
    console.print(_distances(inspection))
    console.print()
    console.print(_verdict(inspection))


def _verdict(inspection: Inspection) -> str:
    """Return the last line, on the whole series."""
    grades = [observation.grade for observation in inspection.observations]
    defects, doubts = grades.count("defect"), grades.count("doubt")
    if defects:
        return (
            f"not one training as it stands: {count(defects, 'defect')}, {count(doubts, 'doubt')}"
        )
    if doubts:
        return f"one training, as far as distances tell, with {count(doubts, 'doubt')}"
    return "one training, as far as distances tell"


def _distances(inspection: Inspection) -> Table:
    """Return the distances of neighbours, by stretches of segments where there are many."""
    segments = len(inspection.distances)
    rows = table(
        *("steps", "segments", "‖Δθ‖, smallest", "median", "largest", "of ‖θ‖", "same bits"),
        names=1,
    )
    borders = [segments * row // _MOST_ROWS for row in range(_MOST_ROWS + 1)]
    for start, stop in pairwise(borders):
        if start == stop:
            continue
        lengths = _finite(inspection.distances[start:stop])
        norms = _finite(inspection.norms[start : stop + 1])
        rows.add_row(
            f"{inspection.steps[start]} to {inspection.steps[stop]}",
            f"{stop - start:,}",
            *(f"{value(lengths):.3g}" for value in (min, median, max)),
            f"{100 * median(lengths) / max(norms):.3g} %" if any(norms) else "",
            share(median(inspection.same_bits[start:stop])),
        )
    return rows


def _finite(values: Sequence[float]) -> list[float]:
    """Return those values that are finite; 0 where none is."""
    return [value for value in values if math.isfinite(value)] or [0.0]
