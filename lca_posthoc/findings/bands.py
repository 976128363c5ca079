"""Estimate the errors of sums over training from the path between checkpoints and from drawing
examples, and withhold results on segments of more than one training step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from ..base.declarations import declared_findings
from ..base.text import count
from ..errors import InputError
from ..numerics.long_segments import is_long, pairs
from ..results import LossResults
from .common import Numbers, scale_of

Members = Sequence[Sequence[int]]  # for each sum, the positions of the tensors it adds


def long_segments(table: xr.Dataset) -> Numbers:
    """Return which segments are longer than one training step, (step,)."""
    return np.array([is_long(int(length)) for length in _lengths(table)], dtype=bool)


def _lengths(table: xr.Dataset) -> Numbers:
    lengths: Numbers = table["step_end"].values - table["step"].values
    return lengths


def straight_lines(table: xr.Dataset) -> str:
    """Describe the segments longer than one training step, and what that means; "" for none.

    The sentence may continue with what is withheld.
    """
    long = long_segments(table)
    if not long.any():
        return ""
    some = f"{int(long.sum()):,} of {count(len(long), 'segment')}"
    which = "All segments are" if long.all() else f"{some} {'is' if long.sum() == 1 else 'are'}"
    return f"{which} longer than one training step, where allocations are the straight line's share"


def held_back(table: xr.Dataset, what: str) -> list[str]:
    """Say that something is withheld on segments of more than one training step; nothing where
    there are none.

    Args:
        table: with the coordinates of the segments.
        what: is withheld, in the plural.
    """
    about = straight_lines(table)
    if not about:
        return []
    return [f"{about}: {what} would describe that line, not training, and are withheld."]


def _lacks(table: xr.Dataset, single_steps: str) -> bool:
    """Tell whether some or all segments must have one training step, and do not."""
    long = long_segments(table)
    return bool(long.any()) if single_steps == "every" else bool(single_steps and long.all())


def refuse_straight_lines(table: xr.Dataset, single_steps: str, what: str) -> None:
    """Reject a finding that is meaningless on segments of more than one training step.

    Args:
        table: with the coordinates of the segments.
        single_steps: which of them must have one step, see `Finding`.
        what: is withheld, in the plural.

    Raises:
        InputError: with the reason, and where to find net sums.
    """
    if _lacks(table, single_steps):
        raise InputError(
            f"{held_back(table, what)[0]} Net sums of layers and units are available: `lca plot RUN "
            "layers`."
        )


def needs_single_steps(results: LossResults, name: str) -> str | None:
    """Say why a finding is withheld on segments of more than one training step; None where it is
    not.

    Args:
        results: one loss of a run.
        name: of the finding.
    """
    table = results.steps
    if not _lacks(table, declared_findings()[name].single_steps):
        return None
    return f"{straight_lines(table)}, and it needs single parameters in single training steps."


def path_bands(results: LossResults, members: Members) -> Numbers | None:
    """Return how much other paths would change sums over training, ([group, ]sums), in units of
    loss; None where the run did not measure it.

    Two other paths are compared with the straight line. One is a curve through the same
    checkpoints, which gives each long segment a shift. The other is the line to the next checkpoint
    but one, whose shift is its sum minus those of both halves. The band is |Σ shifts| of both paths
    together, which holds what is systematic, plus twice the larger √Σ shifts², which covers shifts
    of random signs. For a random part of the segments, both are scaled to all of them.

    Args:
        results: one loss of a run.
        members: of each sum.
    """
    shifts = other_paths(results, members)
    return None if shifts is None else bands_of_shifts(results, shifts)


def bands_of_shifts(results: LossResults, shifts: tuple[Numbers, Numbers]) -> Numbers:
    """Return the bands of sums from the shifts of two other paths, see `other_paths`.

    Args:
        results: one loss of a run.
        shifts: of the curve and of the doubled lines.
    """
    larger = scale_of(results, len(shifts[0]))
    systematic = larger * sum(np.abs(of_path.sum(0)) for of_path in shifts)
    random = np.max([np.sqrt((of_path**2).sum(0)) for of_path in shifts], axis=0)
    band: Numbers = systematic + 2 * np.sqrt(larger) * random
    return band


def other_paths(results: LossResults, members: Members) -> tuple[Numbers, Numbers] | None:
    """Return the shifts of two other paths, (segments, [group, ]sums) and (pairs, [group, ]sums);
    None where the run did not measure them, or no segment is long.

    Args:
        results: one loss of a run.
        members: of each sum.
    """
    if results.manifest.settings["path_band"] != "on":
        return None
    table = results.tensors
    if not long_segments(table).any():
        return None
    stored = results.other_path
    allocated, shift, doubled = (
        _summed(column, members)
        for column in (table["allocated"], stored["shift"], stored["doubled"])
    )
    apart = doubled - allocated
    halves = _halves(results, table)
    return shift, apart[halves[:, 0]] + apart[halves[:, 1]]


def _halves(results: LossResults, table: xr.Dataset) -> Numbers:
    """Return the rows of both halves of every doubled line, where both are finished, (lines, 2)."""
    manifest = results.manifest
    row_of = {int(step): row for row, step in enumerate(table["step"].values)}
    starts = [checkpoint.step for checkpoint in manifest.checkpoints]
    halves = [
        (row_of[starts[first]], row_of[starts[first + 1]])
        for first in pairs(manifest.lengths)
        if starts[first] in row_of and starts[first + 1] in row_of
    ]
    return np.array(halves, dtype=int).reshape(-1, 2)


def _summed(column: xr.DataArray, members: Members) -> Numbers:
    values = column.transpose("step", ..., "tensor").values
    return np.stack([values[..., list(some)].sum(-1) for some in members], axis=-1)


def example_errors(results: LossResults, members: Members) -> Numbers | None:
    """Return the standard errors of sums over training from drawing examples, (sums,), in units of
    loss; None for a loss over all of its examples, or without replicates.

    Args:
        results: one loss of a run.
        members: of each sum.
    """
    table, record = results.tensors, results.record
    if "replicates" not in table or table.sizes["replicate"] < 2:
        return None
    sums = table["replicates"].sum("step").transpose("replicate", "tensor").values
    sums = np.stack([sums[:, list(some)].sum(-1) for some in members], axis=-1)
    sampled = record.examples / max(1, record.total)
    larger = scale_of(results, table.sizes["step"])
    errors: Numbers = larger * np.sqrt(sums.var(0, ddof=1) / len(sums) * (1 - sampled))
    return errors
