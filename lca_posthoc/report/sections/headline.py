"""Show the top of the page: the measurement, and its main figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...findings.causes import LARGE
from ..content import clean, count, listed, percent, plain, signed
from ..panels import Panel


@dataclass(frozen=True)
class Card:
    """A figure with its name, its meaning, and a mark if it needs attention."""

    title: str
    value: str
    detail: str
    warning: bool = False
    bar: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Headline:
    """The main figures of one loss."""

    measured: str
    unfinished: str
    cards: list[Card]


def headline(panel: Panel) -> Headline:
    """Return the measurement and its main figures: loss change, residual, share that helped,
    unexplained share of the causes, layers that hurt, and segments that did not converge.
    """
    figures, whole, record = panel.summary, panel.whole, panel.results.record
    change, residual = whole["loss_change"], whole["residual"]
    groups = (
        f" The figures are for the mean over {count(len(panel.groups), 'group')}."
        if panel.groups is not None
        else ""
    )
    segments, total, buffers = figures["segments"], _layers(panel), _buffers(panel)
    done = panel.results.progress()
    over = (
        "" if done["complete"] else f" over {segments:,} of {done['segments']:,} finished segments"
    )
    cards = [
        Card(
            "Loss",
            f"{plain(whole['loss_start'])} → {plain(whole['loss_end'])}",
            f"change {signed(change)}{over}",
        ),
        Card(
            "Allocated",
            signed(whole["allocated"]),
            f"residual {signed(residual)}"
            + (f", {percent(abs(residual / change))} of the change" if change else "")
            + (f"; to buffers (running statistics) {signed(buffers)}" if buffers else ""),
            warning=bool(change) and abs(residual / change) > 0.05,
        ),
        *([_helping(panel)] if "helping" in figures else []),
        *([_straight(panel)] if figures["long_segments"] else []),
        *([_rest(panel)] if panel.allows("causes") else []),
        _best(total, change),
        _hurting(total),
        _unconverged(panel),
    ]
    return Headline(_measured(panel, record.on) + groups, _unfinished(panel), cards)


def _hurting(total: list[tuple[str, float]]) -> Card:
    """Return how many layers raised the loss, and which raised it most."""
    hurt, layers = [name for name, value in reversed(total) if value > 0], len(total)
    nothing = "no layer's sum is above zero" if layers else "no layers"
    return Card(
        "Layers that hurt",
        f"{len(hurt):,} of {layers:,}" if hurt else f"none of {layers:,}",
        listed(hurt, 4) if hurt else nothing,
        warning=bool(hurt),
    )


def _unconverged(panel: Panel) -> Card:
    """Return how many segments did not converge, and the largest residual of any."""
    worst = float(np.max(np.abs(panel.summary["max_segment_residual"])))
    unconverged, segments = panel.summary["unconverged"], panel.summary["segments"]
    tolerance = panel.run.manifest.settings.get("tolerance")
    within = "" if panel.groups is None else " in one group"
    return Card(
        "Not converged",
        f"{unconverged:,} of {segments:,} segments"
        if unconverged
        else f"none of {segments:,} segments",
        f"largest |residual| of a segment{within} {plain(worst)}, tolerance {clean(tolerance, 20)}",
        warning=bool(unconverged),
    )


def _unfinished(panel: Panel) -> str:
    """Tell which segments the figures include, if not all of training."""
    return " ".join([*_of_a_part(panel), *_missing(panel)])


def _of_a_part(panel: Panel) -> Iterator[str]:
    manifest = panel.results.manifest
    if manifest.breaks:
        seen, steps = manifest.steps_seen
        yield (
            f"{count(len(manifest.breaks), 'gap')} between checkpoints skipped: all sums and "
            f"shares here include {seen:,} of {count(steps, 'training step')}."
        )
    if manifest.sampled is not None:
        error = panel.summary["segments_error"]
        told = "" if not isinstance(error, float) else f" ± {plain(error)} (standard error)"
        yield (
            f"Sums over training are estimates{told} from {manifest.segments:,} of "
            f"{manifest.all_segments:,} segments, drawn at random all over training (--segments "
            f"{clean(manifest.sampled, 40)}); results that need every segment are missing."
        )


def _missing(panel: Panel) -> Iterator[str]:
    if panel.results.complete:
        return
    yield (
        f"This run is not finished: {panel.missing} are missing. All sums and shares here "
        "exclude them, and lines have gaps there. Finish the run with lca "
        "run, then write this page again."
    )


def _helping(panel: Panel) -> Card:
    whole = panel.whole
    if panel.groups is not None:
        shares = np.asarray(panel.summary["helping"], dtype=float)
        low, high = percent(float(shares.min())), percent(float(shares.max()))
        return Card(
            "Helping",
            "–",
            f"pick a group for its layers' shares; over the groups {low} to {high} of parameters × "
            "segments helped one",
        )
    return Card(
        "Helping",
        percent(whole["helping"]),
        f"of parameters × segments; {percent(whole['hurting'])} hurt, {percent(whole['zero'])} had "
        "no effect",
        bar=(whole["helping"], whole["zero"], whole["hurting"]),
    )


def _straight(panel: Panel) -> Card:
    """Return how many segments are longer than one training step, and the change by other paths."""
    figures = panel.summary
    band = figures["path_band"]
    detail = "--path-band on measures the change by other paths"
    if band is not None:
        size = float(np.max(np.abs(band)))
        within = "" if panel.groups is None else " in the group with the most"
        detail = f"other paths would move {plain(size)}{within} between modules, Σ ± path"
    if figures["doubling"] is not None:
        detail += (
            f"; leaving every second checkpoint out moves {percent(float(np.max(figures['doubling'])))} "
            "of Σ|module|"
        )
    return Card(
        "Straight lines",
        f"{figures['long_segments']:,} of {count(figures['segments'], 'segment')}",
        f"are longer than one training step: sums are the straight line's share; {detail}",
        warning=True,
    )


def _rest(panel: Panel) -> Card:
    """Return the share of the allocation that no cause explains."""
    finding, left_out = panel.find("causes")
    if finding is None:
        return Card("Rest of the causes", "–", left_out)
    share = float(finding["rest_overall"].max())
    within = "" if panel.groups is None else " in the group with the most"
    return Card(
        "Rest of the causes",
        percent(share),
        f"of Σ|A| over parameters{within} are explained by no cause",
        warning=share > LARGE,
    )


def _best(total: list[tuple[str, float]], change: float) -> Card:
    if not total or total[0][1] >= 0:
        return Card("Layer that helped most", "none", "no layer's sum is below zero", warning=True)
    name, value = total[0]
    part = f", {percent(value / change)} of the change" if change < 0 else ""
    return Card("Layer that helped most", name, f"Σ allocation {signed(value)}{part}")


def _measured(panel: Panel, split: str | None) -> str:
    figures, manifest, record = panel.summary, panel.run.manifest, panel.results.record
    over = f"over split {clean(split, 60)}" if split is not None else "of the parameters alone"
    examples = ""
    if split is not None:
        some = f" of {record.total:,}" if record.examples < record.total else ""
        examples = f" ({record.examples:,}{some} examples)"
    steps = panel.results.steps
    first, last = int(steps["step"].values[0]), int(steps["step_end"].values[-1])
    part = (
        ""
        if panel.results.complete
        else f", {figures['segments']:,} of {panel.results.manifest.segments:,} segments so far"
    )
    rule = clean(manifest.settings.get("rule", "?"), 40)
    precision = clean(manifest.settings["precision"], 40)
    mode = (
        f", {panel.results.norm_stats} statistics in normalisation layers"
        if panel.results.norm_stats
        else ""
    )
    return (
        f"Loss {clean(panel.loss, 60)} {over}{examples}, allocated to {figures['parameters']:,} "
        f"parameters along {count(figures['segments'], 'segment')} from step {first:,} to step "
        f"{last:,}{part}; rule {rule}, {precision}{mode}."
    )


def _buffers(panel: Panel) -> float:
    """Return the allocation to buffers, for the mean over the groups if there are any."""
    sums = panel.summary["buffers"]
    if sums is None:
        return 0.0
    return float(sums if panel.groups is None else np.asarray(sums, dtype=float) @ panel.shares)


def _layers(panel: Panel) -> list[tuple[str, float]]:
    """Return the layers and their sums, the most negative first, without buffers."""
    finding, _ = panel.find("layers")
    if finding is None:
        return []
    finding = finding.isel(layer=finding["role"].values != "buffer")
    total = panel.of_group(finding["total"], None).values
    return [
        (clean(finding["layer"].values[position], 60), float(total[position]))
        for position in np.argsort(total, kind="stable")
    ]
