"""Show a run in a notebook: a small table without scripts, every text escaped, from markers and the
table of steps alone.

Long names are cut in the middle and stay distinct; numbers and messages of errors are shown whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ..base.text import count, safe_in_page, shorten

if TYPE_CHECKING:
    import xarray as xr

    from .manifest import LossRecord
    from .run import LossResults, Run

_HEAD = ("loss", "split", "groups", "segments", "done", "loss start → end", "residual")
_MOST_LOSSES = 50  # losses listed
# groups of a loss that are listed; several losses share this many
_GROUPS = 20
_NAME = 48  # characters of a name
_MESSAGE = 2000  # characters of an error's message, after its names are shortened


@dataclass(frozen=True)
class _Row:
    """A row: a loss, or a group of the loss above it (`inside`); the last cell of a short row spans
    the missing columns.
    """

    name: str
    cells: Sequence[str]
    inside: bool = False


def run_html(run: Run) -> str:
    """Return a run as HTML: its path, its parameters, a row for each loss and some of its groups."""
    manifest = run.manifest
    facts = (
        f"{count(manifest.parameters, 'parameter')} in {count(len(manifest.allocated), 'tensor')}, "
        f"{count(manifest.segments, 'segment')} (steps "
        f"{manifest.checkpoints[0].step}–{manifest.checkpoints[-1].step}), --keep {manifest.keep}"
    )
    names = list(run)
    grouped = sum(run[name].record.groups is not None for name in names[:_MOST_LOSSES])
    groups = _GROUPS // grouped if grouped else 0
    rows = [row for name in names[:_MOST_LOSSES] for row in _rows(run[name], groups)]
    unlisted = (
        f"and {count(len(names) - _MOST_LOSSES, 'more loss', 'more losses')}"
        if len(names) > _MOST_LOSSES
        else ""
    )
    return _page("Run", str(run.path), facts, rows, unlisted)


def results_html(results: LossResults) -> str:
    """Return one loss of a run, and its groups, as HTML."""
    manifest = results.manifest
    tensors = count(len(manifest.allocated), "tensor")
    mode = f", {results.norm_stats} statistics" if results.norm_stats else ""
    facts = (
        f"{count(manifest.parameters, 'parameter')} in {tensors}, {results.precision}{mode}, "
        f"--keep {manifest.keep}"
    )
    return _page("LossResults", str(results.path), facts, list(_rows(results, _GROUPS)), "")


def _rows(results: LossResults, groups: int) -> Iterator[_Row]:
    """Yield the row of a loss and those of its first groups; if its numbers cannot be read, the row
    tells why.
    """
    record, segments = results.record, results.manifest.segments
    known = [record.on or "", "" if record.groups is None else f"{len(record.groups):,}"]
    try:
        steps = results._open("steps")[["loss_start", "loss_end", "residual", "weight"]].load()
        done = steps.sizes["step"]
        state = "complete" if results.complete else f"{math.floor(1000 * done / segments) / 10:g} %"
        known += [f"{done:,} of {segments:,}", state]
        ends = _ends(_over_groups(steps)) if done else ["", ""]
    except Exception as error:  # display must not stop a notebook, so the row shows the error
        name = shorten([results.name], _NAME)[0]
        yield _Row(
            results.name, [*known, f"{type(error).__name__}: {error}".replace(results.name, name)]
        )
        return
    yield _Row(results.name, [*known, *ends])
    if done and groups:
        yield from _group_rows(record, steps, groups)


def _over_groups(steps: xr.Dataset) -> xr.Dataset:
    """Return the table of steps of the weighted mean over the groups, if there are any."""
    if "group" not in steps.dims:
        return steps
    return (steps * steps["weight"]).sum("group") / steps["weight"].sum("group")


def _group_rows(record: LossRecord, steps: xr.Dataset, groups: int) -> Iterator[_Row]:
    """Yield the rows of a loss's first groups, if it has any."""
    labels = list(map(str, record.groups or ()))
    examples = record.counts or []
    for position, label in enumerate(labels[:groups]):
        of_group = [
            "",
            count(examples[position], "example"),
            "",
            "",
            *_ends(steps.isel(group=position)),
        ]
        yield _Row(label, of_group, inside=True)
    if len(labels) > groups:
        yield _Row(f"and {count(len(labels) - groups, 'more group')}", [""], inside=True)


def _ends(steps: xr.Dataset) -> list[str]:
    start, end = float(steps["loss_start"][0]), float(steps["loss_end"][-1])
    return [f"{start:.6g} → {end:.6g}", f"{math.fsum(np.asarray(steps['residual'].values)):+.1e}"]


def _page(what: str, path: str, facts: str, rows: Sequence[_Row], unlisted: str) -> str:
    head = "".join(f'<th style="text-align:left">{heading}</th>' for heading in _HEAD)
    names = shorten([safe_in_page(row.name) for row in rows], _NAME)
    splits = shorten([safe_in_page(row.cells[0]) for row in rows], _NAME)
    body = "".join(
        f"<tr>{_cells(name, [split, *row.cells[1:]], row.inside)}</tr>"
        for name, split, row in zip(names, splits, rows, strict=True)
    )
    more = f"<div>{escape(unlisted)}</div>" if unlisted else ""
    return (
        f"<div><div><b>{what}</b> "
        f"<code>{_text(path)}</code></div><div>{_text(facts)}</div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}</div>"
    )


def _cells(name: str, others: Sequence[str], inside: bool) -> str:
    wide = len(_HEAD) - len(others)
    span = f' colspan="{wide}"' if wide > 1 else ""
    indent = ";padding-left:2em" if inside else ""
    whole = ";white-space:nowrap"
    texts = "".join(
        f'<td style="text-align:left{"" if span and position == len(others) - 1 else whole}"'
        f"{span if position == len(others) - 1 else ''}>{_text(cell)}</td>"
        for position, cell in enumerate(others)
    )
    return f'<td style="text-align:left{whole}{indent}">{escape(name)}</td>{texts}'


def _text(text: str) -> str:
    """Return a text as safe HTML: without control characters, of bounded length."""
    return escape(shorten([safe_in_page(text)], _MESSAGE)[0])
