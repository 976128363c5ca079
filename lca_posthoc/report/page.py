"""Write the page: findings, figures and provenance in one file that opens offline."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from bokeh.embed import json_item
from bokeh.resources import Resources
from jinja2 import Environment, Template
from markupsafe import Markup

from .. import __version__
from ..base import colours
from ..base.declarations import declared_findings
from ..base.text import did_you_mean
from ..errors import InputError, LCAError, amount
from ..findings.common import about_part, findings_beyond
from ..results import Run
from .content import Block, Section, cell, clean, listed
from .downsample import Json
from .microscope import BYTES, microscope
from .panels import MOST_GROUPS, Panel, Room, beside, choose, run_labels
from .sections import candidates, compare, curve, section_modules
from .sections.headline import headline

MOST_BYTES = 8_000_000
_DATA = 3_000_000  # bytes of the page for series and pictures, shared by the panels
_EACH = 900_000  # the most bytes for one panel
_COLOURS = {
    "light": {"diverging": colours.DIVERGING, "layers": colours.LAYERS},
    "dark": {"diverging": colours.DIVERGING_DARK, "layers": colours.LAYERS_DARK},
}
_PROVENANCE = 4000  # characters of a value

# with its content by panel, "*" for all; by several, such as "2 0", of the first of them
Shown: TypeAlias = tuple[Section, dict[str, Block]]


def write_report(
    runs: Sequence[Run] | Mapping[str, Sequence[Run]],
    path: str | Path,
    *,
    losses: Sequence[str] = (),
) -> Path:
    """Write the report of one or several runs as one file of at most `MOST_BYTES`.

    Args:
        runs: opened runs, finished or not; repeats, such as seeds, under a label.
        path: the file to write; replaces an older one.
        losses: names of those to show in full; by default all that fit. The microscope shows the
            first of a run made with `--keep parameters`.

    Returns:
        The path.

    Raises:
        InputError: if no run has a named loss, or the file cannot be written.
        LCAError: if no segment is finished yet, stored numbers are damaged, or the file would be
            too large.
    """
    labelled = None
    if isinstance(runs, Mapping):
        labelled = [label for label, several in runs.items() for _ in several]
        runs = [run for several in runs.values() for run in several]
    for name in losses:
        if not any(name in run for run in runs):
            known = dict.fromkeys(loss for run in runs for loss in run)
            raise InputError(
                f"no run has a loss {name!r}; there are {', '.join(map(repr, known))}."
                f"{did_you_mean(name, known)}"
            )
    panels, left_out = choose(runs, losses, labelled)
    if not panels:
        raise LCAError(
            f"{listed([str(run.path) for run in runs])} has no finished segment yet. Let `lca run` "
            "commit a span first."
        )
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        why = "it is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise InputError(f"{path} cannot be written: {why}. Name another file with -o.")
    for shrink in (1.0, 0.8, 0.6, 0.3, 0.1, 0.0):
        text = _page(runs, labelled, panels, left_out, shrink).encode("utf-8", "replace")
        if len(text) <= MOST_BYTES:
            break
    else:
        raise LCAError(
            f"the report would be larger than {amount(MOST_BYTES)}. Show fewer runs, or fewer "
            "losses with --loss NAME."
        )
    try:
        _replace(path, text)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}. Name another file with -o."
        ) from None
    return path


def _replace(path: Path, text: bytes) -> None:
    """Write the file completely or not at all."""
    handle, waiting = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name[:40]}-", suffix=".part"
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(waiting, 0o666 & ~umask)
        os.replace(waiting, path)
    except BaseException:
        Path(waiting).unlink(missing_ok=True)
        raise


def _page(
    runs: Sequence[Run],
    labelled: Sequence[str] | None,
    panels: Sequence[Panel],
    left_out: Sequence[str],
    shrink: float,
) -> str:
    """Return the page, with `shrink` times the most data."""
    labels = run_labels(runs, labelled)
    room = Room(min(_EACH, _DATA / len(panels)) * shrink)
    shown = _sections(runs, labelled, panels, room)
    watched = next((panel for panel in panels if panel.allows("microscope")), panels[0])
    frames, frame_notes = microscope(watched, int(BYTES * shrink))
    notes = [
        *_keep_notes(runs, labels),
        *left_out,
        *_group_notes(panels),
        *frame_notes,
        *_block_notes(shown, panels),
    ]
    scripts = [_bokeh(), *(_read(name) for name in ("figures.js", "microscope.js", "script.js"))]
    return _template().render(
        title=f"Loss change allocation: {listed(labels, 3)}",
        runs=[
            {"label": label, "path": clean(run.path, 300)}
            for label, run in zip(labels, runs, strict=True)
        ],
        panels=panels,
        several=_several(runs, panels),
        headlines={panel.key: headline(panel) for panel in panels},
        sections=shown,
        modes=_modes(panels),
        frames=None if frames is None else _about_frames(frames, watched),
        shares=any(panel.allows("helping") for panel in panels),
        frame_notes=frame_notes,
        notes=notes,
        losses=[
            _loss_row(run, label, name, panels)
            for run, label in zip(runs, labels, strict=True)
            for name in list(run)[:60]
        ],
        provenance=[
            (label, list(_provenance(run))) for run, label in zip(runs, labels, strict=True)
        ],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        style=Markup(_read("style.css")),  # our own, like the scripts
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(_hash(script) for script in scripts),
        data=Markup(_json(_data(shown, panels))),
        frames_data=Markup(_json(frames)),
    )


def _sections(
    runs: Sequence[Run], labelled: Sequence[str] | None, panels: Sequence[Panel], room: Room
) -> list[Shown]:
    """Return the sections with content, those of several runs first."""
    shown: list[Shown] = []
    if len(runs) > 1:
        panels_beside = beside(runs, panels, run_labels(runs, labelled))
        block = compare.block(panels[0], panels_beside, labelled, room)
        if block is not None:
            shown.append((compare.section(), {"*": block}))
    for name, module in section_modules().items():
        blocks = {
            _keys(panel, panels, name): module.block(panel, room)
            for panel in panels
            if panel.allows(name)
        }
        some = {key: block for key, block in blocks.items() if block is not None}
        if some:
            filled = module.section()
            if name == "curve" and not any(panel.summary["unconverged"] for panel in panels):
                filled = curve.without_faults(filled)
            if name == "candidates" and not any(
                panel.results.holds("statistics") for panel in panels
            ):
                filled = candidates.of_layers_alone(filled)
            shown.append((filled, some))
    return shown


def _keys(panel: Panel, panels: Sequence[Panel], name: str) -> str:
    """Return the panels that show a section of one: the panel itself, and for a section about
    examples in the first panel of a run that has results per example, those panels that have none.
    """
    of_run = [other for other in panels if other.run is panel.run]
    if not declared_findings()[name].examples or panel is not next(
        other for other in of_run if other.allows(name)
    ):
        return str(panel.key)
    others = [other for other in of_run if not other.allows(name)]
    return " ".join(str(one.key) for one in (panel, *others))


def _data(shown: Sequence[Shown], panels: Sequence[Panel]) -> Mapping[str, object]:
    """Return the data of the page's scripts: panels, figures and their sources."""
    return {
        "panels": [
            {"label": panel.label, "groups": _groups(panel), "steps": _steps(panel)}
            for panel in panels
        ],
        "figures": {
            name: json_item(filled)
            for section, _ in shown
            for name, filled in section.figures.items()
        },
        "views": _views(shown),
        "colours": _COLOURS,
    }


def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(cell=cell, clean=clean)
    return environment.from_string(_read("template.html"))


def _about_frames(frames: Mapping[str, Any], panel: Panel) -> dict[str, object]:
    """Return the texts about the microscope's frames."""
    return {
        "panel": panel.label,
        "key": str(panel.key),
        "layers": list(dict.fromkeys(tensor["layer"] for tensor in frames["tensors"])),
        **{name: frames[name] for name in ("frames", "segments", "rounding", "pooled")},
    }


def _modes(panels: Sequence[Panel]) -> dict[str, str]:
    """Return the statistics that normalisation layers used, by panel and under "*" for all; nothing
    for models without such layers.
    """
    modes = {str(panel.key): panel.results.norm_stats for panel in panels}
    every = " and ".join(dict.fromkeys(mode for mode in modes.values() if mode))
    return {key: mode for key, mode in {**modes, "*": every}.items() if mode}


def _several(runs: Sequence[Run], panels: Sequence[Panel]) -> str:
    """Return the sentence that tells which of many runs are shown in full; "" if all are."""
    full = len({id(panel.run) for panel in panels})
    return (
        f"The first {full:,} of {len(runs):,} runs are shown in full and can be picked above; Run "
        "against run has all of them."
        if full < len(runs)
        else ""
    )


def _views(shown: Sequence[Shown]) -> Json:
    """Return the data of each figure's sources, by figure, panel and "GROUP|CHOICE"; panels that
    show the section of another one refer to it.
    """
    views: dict[str, dict[str, Json]] = {}
    for _, blocks in shown:
        for keys, block in blocks.items():
            own, *others = keys.split()
            for name, of in block.views.items():
                views.setdefault(name, {}).update({own: of, **dict.fromkeys(others, own)})
    return views


def _groups(panel: Panel) -> list[list[str]]:
    return [[key, label] for key, label, _ in panel.choices] if panel.groups is not None else []


def _steps(panel: Panel) -> list[int]:
    steps = panel.results.steps
    return [int(steps["step"].values[0]), int(steps["step_end"].values[-1])]


def _keep_notes(runs: Sequence[Run], labels: Sequence[str]) -> Iterator[str]:
    """Yield sentences on the parts of the page that higher levels of `--keep` would add."""
    titles = {name: module.section().title for name, module in section_modules().items()}
    for keep in dict.fromkeys(run.manifest.keep for run in runs):
        more = [
            f"--keep {level} ({', '.join(titles.get(name, name.capitalize()) for name in names)})"
            for level, names in findings_beyond(keep).items()
        ]
        sampled = [run for run in runs if run.manifest.keep == keep and run.manifest.sampled]
        if sampled:
            yield f"Of {listed([clean(run.path.name, 60) for run in sampled])}: {about_part(sampled[0].manifest.sampled or '')}"
        elif more:
            of = [
                label for run, label in zip(runs, labels, strict=True) if run.manifest.keep == keep
            ]
            subject = listed(of) if len(runs) > 1 else "This run"
            verb = "was" if len(of) == 1 else "were"
            yield f"{subject} {verb} made with --keep {keep}; more is available with {', '.join(more)}."


def _group_notes(panels: Sequence[Panel]) -> list[str]:
    return [
        f"{panel.label}: {MOST_GROUPS} of {len(panel.groups)} groups can be picked, those with the "
        "largest changes of the loss."
        for panel in panels
        if panel.groups is not None and len(panel.groups) > MOST_GROUPS
    ]


def _block_notes(shown: Sequence[Shown], panels: Sequence[Panel]) -> Iterator[str]:
    """Yield what each section leaves out, once for all panels to which it applies."""
    for section, blocks in shown:
        keys_of_note: dict[str, list[str]] = {}
        for key, block in blocks.items():
            for note in block.notes:
                keys_of_note.setdefault(note, []).append(key)
        for note, keys in keys_of_note.items():
            of = (
                ""
                if len(keys) == len(blocks)
                else f" ({listed([panels[int(key.split()[0])].label for key in keys])})"
            )
            yield f"{section.title}{of}: {note}"


def _loss_row(run: Run, label: str, name: str, panels: Sequence[Panel]) -> Mapping[str, Json]:
    """Return a row of the table of losses; only losses shown in full have figures, because the
    others would have to be read.
    """
    panel = next((panel for panel in panels if panel.run is run and panel.loss == name), None)
    record, done = run[name].record, run[name].progress()
    return {
        "run": label,
        "name": clean(name, 60),
        "key": None if panel is None else panel.key,
        "on": clean(record.on or "–", 40),
        "groups": len(record.groups or ()),
        "examples": record.examples,
        "done": f"{done['segments_done']:,} of {done['segments']:,}",
        "whole": None if panel is None else panel.whole,
    }


def _provenance(run: Run) -> Iterator[tuple[str, str]]:
    manifest = run.manifest
    first, last = manifest.checkpoints[0].step, manifest.checkpoints[-1].step
    yield "run", clean(run.path, 300)
    yield (
        "checkpoints",
        f"{clean(manifest.root, 300)}: {len(manifest.checkpoints):,}, from step {first:,} to step "
        f"{last:,}",
    )
    yield "id", manifest.id
    for table in (manifest.settings, manifest.provenance):
        for name, value in list(table.items())[:60]:
            text = (
                value
                if isinstance(value, str)
                else json.dumps(value, ensure_ascii=False, default=str)
            )
            text = "–" if value in (None, [], {}, "") else text
            yield clean(name, 60), clean(text, _PROVENANCE if name != "task_sha256" else 64)


def _bokeh() -> str:
    return "\n".join(
        Resources(mode="inline", components=["bokeh"], minified=True, log_level="error").js_raw
    )


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(value: object) -> str:
    """Return JSON that cannot close the element around it."""
    text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: object) -> object:
    """Replace numbers that JSON lacks by null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
