"""A run as a notebook shows it: a small table without scripts, every text escaped, from markers and the table of steps alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import LossResults, Run

_HEAD = ("loss", "split", "groups", "segments", "done", "loss start → end", "residual")
_MOST = 50  # losses that are listed
_LONGEST = 400  # characters of a cell
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def run_html(run: Run) -> str:
    """The run: where it is, its parameters, a row for each loss."""
    manifest = run.manifest
    facts = (
        f"{manifest.parameters:,} parameters in {len(manifest.allocated):,} tensors, {manifest.segments:,} segments "
        f"(steps {manifest.checkpoints[0].step}–{manifest.checkpoints[-1].step}), --keep {manifest.keep}"
    )
    names = list(run)
    left = f"and {len(names) - _MOST:,} more losses" if len(names) > _MOST else ""
    return _page("Run", str(run.path), facts, (_row(run[name]) for name in names[:_MOST]), left)


def results_html(results: LossResults) -> str:
    """One loss of a run."""
    manifest = results.manifest
    kept = len(manifest.allocated)
    mode = f", {results.norm_stats} statistics" if results.norm_stats else ""
    facts = f"{manifest.parameters:,} parameters in {kept:,} tensors, {results.precision}{mode}, --keep {manifest.keep}"
    return _page("LossResults", str(results.path), facts, [_row(results)], "")


def _row(results: LossResults) -> list[str]:
    """What is known of a loss; where its numbers cannot be read, why not."""
    record, segments = results.record, results.manifest.segments
    known = [results.name, record.on or "", "" if record.groups is None else f"{len(record.groups):,}"]
    try:
        steps = results._open("steps")[["loss_start", "loss_end", "residual", "weight"]].load()
        done = steps.sizes["step"]
        state = "complete" if results.complete else f"{math.floor(1000 * done / segments) / 10:g} %"
        known += [f"{done:,} of {segments:,}", state]
        if not done:
            return [*known, "", ""]
        if "group" in steps.dims:
            steps = (steps * steps["weight"]).sum("group") / steps["weight"].sum("group")
        start, end = float(steps["loss_start"][0]), float(steps["loss_end"][-1])
        return [*known, f"{start:.6g} → {end:.6g}", f"{math.fsum(steps['residual'].values):+.1e}"]
    except Exception as error:  # shown: what only displays must not stop a notebook
        return [*known, f"{type(error).__name__}: {error}"]


def _page(what: str, path: str, facts: str, rows: Iterable[list[str]], left: str) -> str:
    head = "".join(f'<th style="text-align:left">{each}</th>' for each in _HEAD)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    more = f"<div>{escape(left)}</div>" if left else ""
    return (
        f"<div><div><b>{what}</b> <code>{_text(path)}</code></div><div>{_text(facts)}</div>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}</div>"
    )


def _cells(row: list[str]) -> str:
    """The cells of a row; the last of a short one is as wide as what is missing."""
    wide = len(_HEAD) - len(row) + 1
    span = f' colspan="{wide}"' if wide > 1 else ""
    return "".join(
        f'<td style="text-align:left"{span if at == len(row) - 1 else ""}>{_text(cell)}</td>'
        for at, cell in enumerate(row)
    )


def _text(text: str) -> str:
    """A text as HTML that shows it and nothing else: of bounded length, without characters that steer the line."""
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return escape(_CONTROL.sub("\ufffd", short))
