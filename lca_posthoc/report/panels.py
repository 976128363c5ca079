"""Choose the losses that the page shows in full, and compute each of their findings once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from .. import findings
from ..base.declarations import declared_findings
from ..errors import LCAError
from ..findings.common import has_part, left_out_of, takes_part
from ..findings.per_example import tells_examples
from ..results import LossResults, Run
from .content import clean, listed

MOST_PANELS = 6
MOST_GROUPS = 12
_NOTE = 400  # characters of what a finding leaves out
_POINT = 11  # bytes of a thinned point in the page: step and value in float32, base64


@dataclass(kw_only=True)
class Panel:
    """One loss of one run."""

    key: int
    run: Run
    run_label: str
    loss: str
    label: str
    several: bool = False
    _findings: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def results(self) -> LossResults:
        """Return the opened loss."""
        return self.run[self.loss]

    def allows(self, name: str) -> bool:
        """Tell whether the run has what a finding needs: level of `--keep`, optional part,
        segments, and results per example.
        """
        finding = declared_findings()[name]
        return (
            self.results.holds(finding.level)
            and has_part(self.results, finding.part)
            and (not finding.examples or tells_examples(self.results))
            and takes_part(self.results, name)
        )

    def find(self, name: str, *arguments: Any, **options: Any) -> tuple[Any, str]:
        """Return a finding of this loss, computed once, and what it leaves out; None and the reason
        if the run does not allow it.

        The page tells once what `--keep` leaves out, so this is not repeated for each finding.

        Args:
            name: of the finding.
            arguments: of its function, after the loss.
            options: of its function.
        """
        key = f"{name} {arguments} {sorted(options)}"
        if key not in self._findings:
            function: Callable[..., Any] = getattr(findings, name)
            try:
                finding = function(self.results, *arguments, **options)
                self._findings[key] = (finding, clean(left_out_of(finding), _NOTE))
            except LCAError as error:
                self._findings[key] = (None, clean(error, _NOTE))
        answer: tuple[Any, str] = self._findings[key]
        return answer

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """Return the figures of `lca summary --json`."""
        return findings.summary(self.results)

    @property
    def missing(self) -> str:
        """Return how many segments are missing, out of how many."""
        done = self.results.progress()
        return f"{done['segments'] - done['segments_done']:,} of {done['segments']:,} segments"

    @property
    def groups(self) -> list[Any] | None:
        """Return the labels of the groups; None for a loss without groups."""
        return self.results.record.groups

    @cached_property
    def shares(self) -> np.ndarray[Any, Any]:
        """Return the weight of each group in the mean over all, (groups,)."""
        weights = np.asarray(self.summary["group_weights"], dtype=float)
        return (
            weights / weights.sum()
            if weights.sum()
            else np.full(len(weights), 1 / max(1, len(weights)))
        )

    @cached_property
    def choices(self) -> list[tuple[str, str, int | None]]:
        """Return the choices of a group, as key, label and position; the mean over all groups comes
        first.
        """
        if self.groups is None:
            return [("", "", None)]
        change = np.abs(np.asarray(self.summary["loss_change"], dtype=float))
        shown = sorted(np.argsort(-np.nan_to_num(change), kind="stable")[:MOST_GROUPS].tolist())
        return [
            ("", "mean over groups", None),
            *((str(position), clean(self.groups[position], 60), position) for position in shown),
        ]

    def of_group(self, data: xr.DataArray, position: int | None) -> xr.DataArray:
        """Return the values of one group, or their weighted mean over the groups.

        Args:
            data: with an axis of groups, or without.
            position: of the group; None for the mean.
        """
        if "group" not in data.dims:
            return data
        if position is not None:
            return data.isel(group=position)
        order = [name for name in data.dims if name != "group"]
        values = np.tensordot(
            data.transpose(*order, "group").values.astype(float), self.shares, axes=(-1, 0)
        )
        return xr.DataArray(
            values, dims=order, coords={name: data[name] for name in order if name in data.coords}
        )

    @property
    def whole(self) -> dict[str, float]:
        """Return the headline figures, of the weighted mean over the groups if there are any.

        The share of parameters that help the mean loss does not follow from the shares for each
        group, so these are NaN; they are missing for a run that does not count them.
        """
        shares = [name for name in ("helping", "hurting", "zero") if name in self.summary]
        names = ("loss_start", "loss_end", "loss_change", "allocated", "residual", *shares)
        if self.groups is None:
            return {name: float(self.summary[name]) for name in names}
        return {
            name: math.nan
            if name in shares
            else float(np.asarray(self.summary[name], dtype=float) @ self.shares)
            for name in names
        }

    def share_of_group(self, data: xr.DataArray, position: int | None) -> xr.DataArray:
        """Return shares of parameters for one group; NaN for the mean over groups, for which they
        are unknown.

        Args:
            data: with an axis of groups, or without.
            position: of the group; None for the mean.
        """
        of = self.of_group(data, position)
        return of * np.nan if position is None and "group" in data.dims else of


@dataclass(frozen=True)
class Room:
    """The bytes of the page for the data of one panel."""

    bytes: float

    def points(self, series: int, part: float) -> int:
        """Return the most points for each of several series that share a part of the room.

        Args:
            series: how many.
            part: share of the room, between 0 and 1.
        """
        return int(min(2000, max(40, self.bytes * part / (_POINT * max(1, series)))))

    def pixels(self, part: float) -> int:
        """Return how many one-byte pixels fit into a part of the room."""
        return int(max(1000, self.bytes * part * 0.74))


def choose(
    runs: Sequence[Run], losses: Sequence[str], labelled: Sequence[str] | None = None
) -> tuple[list[Panel], list[str]]:
    """Return the losses to show in full, and notes about the others.

    Every run's first loss comes first, then those without groups.

    Args:
        runs: opened runs.
        losses: names of the only losses to show, in this order; empty for as many as fit.
        labelled: the label of each run; None without labels.
    """
    labels = run_labels(runs, labelled)
    waiting = []
    for position, run in enumerate(runs):
        names = [name for name in losses if name in run] if losses else _in_order(run)
        finished = [name for name in names if run[name].progress()["segments_done"]]
        waiting += [(place, position, name) for place, name in enumerate(finished)]
    shown = sorted(waiting)[:MOST_PANELS]
    panels = [
        Panel(
            key=key,
            run=runs[position],
            run_label=labels[position],
            loss=name,
            label=f"{labels[position]} · {clean(name, 60)}" if len(runs) > 1 else clean(name, 60),
            several=len(runs) > 1,
        )
        for key, (_, position, name) in enumerate(sorted(shown, key=lambda row: (row[1], row[0])))
    ]
    left_out = []
    for position, run in enumerate(runs):
        in_full = {panel.loss for panel in panels if panel.run is run}
        rest = [name for name in run if name not in in_full]
        if rest:
            which = f" of {labels[position]}" if len(runs) > 1 else ""
            left_out.append(
                f"Losses{which} that are not shown in full: {listed(rest, 12)}. Name the ones to "
                "show with --loss NAME."
            )
    return panels, left_out


def beside(
    runs: Sequence[Run], panels: Sequence[Panel], labels: Sequence[str]
) -> list[Panel | None]:
    """Return the first panel's loss in every run, shown in full or not; None if a run has no
    segment of it yet.

    Args:
        runs: opened runs.
        panels: the losses shown in full.
        labels: a name for each run.
    """
    loss, panels_beside = panels[0].loss, list[Panel | None]()
    for run, label in zip(runs, labels, strict=True):
        shown = next((panel for panel in panels if panel.run is run and panel.loss == loss), None)
        if shown is None and loss in run and run[loss].progress()["segments_done"]:
            shown = Panel(
                key=-1,
                run=run,
                run_label=label,
                loss=loss,
                label=f"{label} · {clean(loss, 60)}",
                several=True,
            )
        panels_beside.append(shown)
    return panels_beside


def run_labels(runs: Sequence[Run], labelled: Sequence[str] | None = None) -> list[str]:
    """Return a short name for each run: its directory, with as many parents as make it distinct.

    Labels come first, and alone if only one run has them.

    Args:
        runs: opened runs.
        labelled: the label of each run; None without labels.
    """
    if labelled is not None:
        names = run_labels(runs)
        return [
            clean(label if labelled.count(label) == 1 else f"{label} · {name}", 60)
            for label, name in zip(labelled, names, strict=True)
        ]
    names = []
    for own, run in enumerate(runs):
        parts = run.path.resolve().parts
        depth = 1
        others = [
            other.path.resolve().parts for position, other in enumerate(runs) if position != own
        ]
        while depth < len(parts) and any(parts[-depth:] == other[-depth:] for other in others):
            depth += 1
        names.append(clean("/".join(parts[-depth:]), 60))
    return names


def _in_order(run: Run) -> list[str]:
    """Return the losses of a run: those without groups first; among equals, losses over data before
    terms of parameters.
    """
    records = {name: run[name].record for name in run}
    return sorted(
        run, key=lambda name: (records[name].groups is not None, records[name].on is None)
    )
