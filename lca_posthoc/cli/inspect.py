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
from .show import Table, bar, print_json, print_words, say, share, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoints.inspection import Inspection

_MOST_ROWS = 12
_MOST_RANGES = 8


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
    """Check whether CHECKPOINTS belong to one training, before computing anything from them.

    \b
    lca inspect checkpoints
    lca inspect checkpoints --steps :1000 --json

    It reads every checkpoint once and needs neither model nor data. It names files with the same
    weights, checkpoints of another seed or training, swapped steps, jumps, NaN and Inf, half
    precision with the share of weights it froze, and missing steps.

    A defect means that a file is wrong or not of this training. A doubt is worth a look. A note is
    as it should be. The exit code is always 0; scripts read the worst grade from --json.

    \f

    Args:
        checkpoints: a directory, or a path with {step} in it.
        as_json: prints a document in place of words.
        steps: the training steps to read, as for `lca run`.
        pattern: a regular expression with `(?P<step>…)` for names.
        rename: rules "OLD=NEW" for names of tensors.
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
        "gaps": [list(gap) for gap in inspection.gaps],
        "distances": list(inspection.distances),
        "same_bits": list(inspection.same_bits),
    }


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print the observations, the worst first, the distances, and a verdict.

    Args:
        inspection: of a series of checkpoints.
        console: to print on.
    """
    dtypes = ", ".join(inspection.dtypes)
    print_words(
        f"{count(len(inspection.steps), 'checkpoint')}, steps {inspection.steps[0]} to "
        f"{inspection.steps[-1]}; {count(inspection.weights, 'weight')} ({dtypes}), "
        f"{amount(inspection.size)} in all",
        console,
    )
    console.print()
    for observation in inspection.observations:
        print_words(f"{observation.grade}: {safe(observation.text)}.", console)
    if inspection.observations:
        console.print()
    if about_gaps := _gaps(inspection):
        print_words(about_gaps, console)
        console.print()
    console.print(_distances(inspection))
    console.print()
    print_words(_verdict(inspection), console)


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


def _gaps(inspection: Inspection) -> str:
    """Say which gaps a replay skips, or how it could skip them; "" where there are none."""
    if inspection.gaps:
        before, after = max(inspection.gaps, key=lambda gap: gap[1] - gap[0])
        number = len(inspection.gaps)
        return (
            f"{count(number, 'gap')} between checkpoints{', the longest' if number > 1 else ','} "
            f"{before}→{after}, {'is' if number == 1 else 'are'} skipped below, as `lca run` skips "
            "them."
        )
    if inspection.bursts:
        ranges = [f"{first}:{last}" for first, last in inspection.bursts if first < last]
        steps = ",".join(ranges if len(ranges) <= _MOST_RANGES else [*ranges[:_MOST_RANGES], "…"])
        return (
            f"The checkpoints are {len(inspection.bursts)} bursts, which no recorder declares: `lca "
            f"run` joins them by {count(len(inspection.bursts) - 1, 'long segment')}, counted below. --steps {steps} "
            "skips the gaps."
        )
    return ""


def _distances(inspection: Inspection) -> Table:
    """Return a table of the distances between consecutive checkpoints, by ranges of segments where
    there are many.
    """
    before_gaps = {before for before, _ in inspection.gaps}
    starts = [place for place, step in enumerate(inspection.steps[:-1]) if step not in before_gaps]
    segments = len(starts)
    rows = table(
        *("steps", "segments", "‖Δθ‖, smallest", "median", "largest", "of ‖θ‖", "same bits"),
        names=1,
    )
    borders = [segments * row // _MOST_ROWS for row in range(_MOST_ROWS + 1)]
    for start, stop in pairwise(borders):
        if start == stop:
            continue
        places = starts[start:stop]
        lengths = _finite([inspection.distances[place] for place in places])
        norms = _finite(inspection.norms[places[0] : places[-1] + 2])
        rows.add_row(
            f"{inspection.steps[places[0]]} to {inspection.steps[places[-1] + 1]}",
            f"{stop - start:,}",
            *(f"{value(lengths):.3g}" for value in (min, median, max)),
            f"{100 * median(lengths) / max(norms):.3g} %" if any(norms) else "",
            share(median(inspection.same_bits[place] for place in places)),
        )
    return rows


def _finite(values: Sequence[float]) -> list[float]:
    """Return the finite values; [0] where there are none."""
    return [value for value in values if math.isfinite(value)] or [0.0]
