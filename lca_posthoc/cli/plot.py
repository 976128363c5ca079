"""`lca plot`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..text import safe_in_figure
from .compare import labelled, open_labelled
from .show import say, stdout

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr
    from matplotlib.figure import Figure

    from ..store import LossResults

PICTURES, FILMS = (".png", ".svg", ".pdf"), (".mp4", ".gif")
FINDINGS = {  # what each takes
    "candidates": ("by",),
    "compare": ("by", "top"),
    "curve": ("groups",),
    "distribution": ("groups",),
    "generalisation": ("by", "top"),
    "helping": ("groups",),
    "layers": ("groups", "by", "by_role", "quantity", "top"),
    "microscope": ("groups", "tensors", "step", "fps"),
    "oscillation": ("groups", "parameters", "checkpoints", "top"),
    "peaks": ("by", "signal"),
    "units": ("groups", "layer"),
}
_PANELS = ("curve", "generalisation", "layers", "units")  # several runs beside each other


@click.command()
@click.argument("runs", nargs=-1, metavar="[LABEL=]RUN…")
@click.argument("finding", metavar="FINDING")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A .png, .svg or .pdf; of the microscope also .mp4 or .gif.  [default: FINDING.png]",
)
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="NAME",
    help="A loss of the run; of generalisation two, over two splits.  [default: the first, or the "
    "first over either split]",
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="LABEL",
    help="Of a loss with groups (curve, layers: repeatable).",
)
@click.option(
    "--by",
    metavar="WHAT",
    help="Layers: module, tensor, or how many parts of a module's name.  [default: module]",
)
@click.option(
    "--by-role", is_flag=True, help="Kernels, biases and normalisation as layers of their own."
)
@click.option(
    "--quantity",
    type=click.Choice(("cumulative", "total", "mean")),
    help="What to draw of each layer.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of many layers or tensors the N largest stand out or are drawn; the others are grey or "
    "counted.  [default: 10 lines, 40 rows]",
)
@click.option("--layer", metavar="NAME", help="The units of this layer alone.")
@click.option(
    "--parameter",
    "parameters",
    multiple=True,
    metavar="NAME[I, J]",
    help="A parameter to trace (repeatable).",
)
@click.option(
    "--checkpoints",
    type=click.Path(),
    metavar="DIR",
    help="Where checkpoints to trace weights in are now.",
)
@click.option(
    "--signal",
    type=click.Choice(("allocation", "motion", "gradient")),
    help="Whose peaks: of the allocation, or of a control.",
)
@click.option(
    "--tensor",
    "tensors",
    multiple=True,
    metavar="NAME",
    help="Only this tensor's pixels (repeatable).",
)
@click.option(
    "--step",
    type=int,
    help="The moment of training to picture.  [default: the last on which something is seen]",
)
@click.option("--fps", type=int, help="Frames of a film per second.  [default: 10]")
@click.option(
    "--size",
    metavar="WxH",
    help="Of the figure, in inches, such as 7x4; letters keep theirs.  [default: as the finding "
    "needs]",
)
@click.option("--title", metavar="TEXT", help="A line above the figure.")
@click.option(
    "--font", metavar="NAME", help="The family of the letters, such as serif or 'Times New Roman'."
)
def command(
    runs: tuple[str, ...],
    finding: str,
    out: Path | None,
    losses: tuple[str, ...],
    size: str | None,
    title: str | None,
    font: str | None,
    **flags: Any,
) -> None:
    """Draw a finding of RUN into FILE: candidates, compare, curve, distribution, generalisation,
    helping, layers, microscope, oscillation, peaks or units.

    \b
    lca plot checkpoints.lca layers
    lca plot checkpoints.lca layers --quantity cumulative --top 8 --size 7x4 --title "ResNet-18"
    --font serif lca plot checkpoints.lca generalisation --loss train --loss validation -o
    overfitting.pdf lca plot checkpoints.lca curve --loss per_class --group 3 --group 8 lca plot
    checkpoints.lca microscope -o film.mp4 lca plot adam=a.lca adam=b.lca sgd=c.lca compare

    Several runs go side by side in curve, layers, units and generalisation; compare takes repeats
    under one LABEL=RUN.
    """
    from ..errors import InputError

    known = ", ".join(FINDINGS)
    if not runs and finding in FINDINGS:
        raise InputError(f"which run? Write lca plot RUN {finding}.")
    if not runs:
        raise InputError(
            f"which finding of {finding}? There are {known}. Write lca plot {finding} FINDING."
        )
    if finding not in FINDINGS:
        raise InputError(
            f"there is no finding {finding!r}; there are {known}. Write lca plot RUN FINDING."
        )
    options = {name: value for name, value in flags.items() if value not in (None, (), False)}
    for name in options:
        if name not in FINDINGS[finding]:
            takers = ", ".join(
                name_of_finding for name_of_finding, takes in FINDINGS.items() if name in takes
            )
            flag = {"groups": "group", "parameters": "parameter", "tensors": "tensor"}.get(
                name, name
            )
            raise InputError(f"--{flag} does not go with {finding}; it is for {takers}.")
    path = _path(out or Path(f"{finding}.png"), finding)
    named = labelled(runs)
    count = sum(map(len, named.values()))
    film = path.suffix.lower() in FILMS
    if ("step" in options and film) or ("fps" in options and not film):
        raise InputError("--step is for a picture of one moment, --fps for a film (.mp4 or .gif).")
    if count > 1 and finding not in (*_PANELS, "compare"):
        raise InputError(
            f"{finding} is drawn of one run, got {count}. Several go with "
            f"{', '.join(_PANELS)}, compare."
        )
    if "by" in options:
        options["by"] = int(options["by"]) if options["by"].isdecimal() else options["by"]
    with _look(finding, size, title, font) as look:
        _draw(finding, named, losses, options, path, look)
    stdout().print(f"wrote {path}", markup=False)


@contextmanager
def _look(
    finding: str, size: str | None, title: str | None, font: str | None
) -> Iterator[tuple[tuple[float, float] | None, str | None]]:
    """Yield a figure's size in inches and its title; letters that are drawn inside the block are of
    the family `font`.
    """
    import re

    from ..errors import InputError

    inches = None
    if size is not None:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)[x×](\d+(?:\.\d+)?)", size)
        inches = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
        if not all(1 <= length <= 100 for length in inches):
            raise InputError(
                f"--size is WIDTHxHEIGHT in inches, each from 1 to 100, such as 7x4, got {size!r}."
            )
    if finding == "microscope" and (size is not None or title is not None):
        raise InputError(
            "--size and --title do not go with microscope, whose layout follows from its pictures."
        )
    import matplotlib as mpl

    if font is None:
        yield inches, title
        return
    from matplotlib.font_manager import FontProperties, findfont

    try:
        findfont(FontProperties(family=font), fallback_to_default=False)
    except ValueError:
        raise InputError(
            f"--font {font!r} is not installed. Name another, such as serif, sans-serif or "
            f"monospace."
        ) from None
    with mpl.rc_context({"font.family": font}):
        yield inches, title


def _path(path: Path, finding: str) -> Path:
    from ..errors import InputError

    known = (*PICTURES, *(FILMS if finding == "microscope" else ()))
    if path.suffix.lower() not in known:
        raise InputError(f"{finding} is drawn as {', '.join(known)}, got {path.name!r}.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"there is no directory {path.parent} for {path.name}. Make it first.")
    return path


def _results(path: str, losses: tuple[str, ...], finding: str) -> list[LossResults]:
    """Return the losses of a run that a finding needs: two for generalisation, else one."""
    from ..errors import InputError
    from ..findings.generalisation import no_two_splits, two_splits
    from ..store import open_run

    run = open_run(path)
    number = 2 if finding == "generalisation" else 1
    pair = two_splits(run) if number == 2 and not losses else None
    if number == 2 and not losses and pair is None:
        raise InputError(f"generalisation of {path} cannot be drawn: {no_two_splits(run)}")
    names = losses or pair or tuple(run)[:1]
    for name in names:
        if name not in run:
            raise InputError(f"{path} has no loss {name!r}; it has {', '.join(map(repr, run))}.")
    if len(names) != number:
        how = (
            "two losses over two splits: --loss NAME --loss NAME"
            if number == 2
            else "one loss: --loss NAME"
        )
        raise InputError(f"{finding} takes {how}; {path} has {', '.join(map(repr, run))}.")
    return [run[name] for name in names]


def _draw(
    finding: str,
    named: dict[str, list[str]],
    losses: tuple[str, ...],
    options: dict[str, Any],
    path: Path,
    look: tuple[tuple[float, float] | None, str | None],
) -> None:
    import matplotlib as mpl

    mpl.use("agg")  # no window, whatever the machine has
    from .. import plots

    to_plot: dict[str, Any] = {
        name: options.pop(name) for name in ("quantity", "step", "fps", "top") if name in options
    }
    if "layer" in options:
        to_plot["layer"] = options["layer"]
    pairs = _find(finding, named, losses, options)
    with _writing(path):
        if path.suffix.lower() in FILMS:
            plots.film(pairs[0][1], path, **to_plot)
        else:
            _save(getattr(plots, finding), pairs, to_plot, path, *look)
    # a refusal says it itself
    for left_out in dict.fromkeys(result.attrs["left_out"] for _, result in pairs):
        if left_out:
            say(left_out)


def _find(
    finding: str, named: dict[str, list[str]], losses: tuple[str, ...], options: dict[str, Any]
) -> list[tuple[str, xr.Dataset]]:
    """Compute the finding of each run, under its label; compare has one for all runs."""
    from .. import findings
    from ..errors import InputError

    find: Callable[..., Any] = getattr(findings, finding)
    if finding == "compare":
        if len(losses) > 1:
            raise InputError(f"compare takes one loss, got {len(losses)}.")
        return [("", find(open_labelled(named, losses[0] if losses else None), **options))]
    groups = options.pop("groups", ())
    pairs = []
    for label, paths in named.items():
        for path in paths:
            results = _results(path, losses, finding)
            picked = [_group(results[0], label_of_group) for label_of_group in groups]
            if finding == "microscope" and len(picked) > 1:
                raise InputError(f"the microscope shows one group, got {len(picked)}.")
            if finding == "microscope" and picked:
                options["group"] = picked[0]
            one = find(*results, **options)
            if picked and "group" in one.dims:  # a finding may have nothing of single groups
                one = one.sel(group=picked[0] if len(picked) == 1 else picked)
            pairs.append((label if len(paths) == 1 else f"{label} {Path(path).name}", one))
    return pairs


def _group(results: LossResults, label: str) -> Any:
    """Return the group that a word names; labels are numbers or words."""
    from ..errors import InputError

    groups = results.record.groups or []
    for group in groups:
        if str(group) == label:
            return group
    has = f"it has {', '.join(map(str, groups[:20]))}" if groups else "it has no groups"
    raise InputError(f"loss {results.name!r} has no group {label!r}; {has}.")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    from ..errors import ResourceError

    try:
        yield
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}.") from None


def _save(
    plot: Callable[..., Any],
    pairs: list[tuple[str, xr.Dataset]],
    options: dict[str, Any],
    path: Path,
    size: tuple[float, float] | None,
    title: str | None,
) -> None:
    import inspect

    import matplotlib.pyplot as plt

    if "step" in options:
        options["at"] = _frame(pairs[0][1], options.pop("step"))
    if len(pairs) == 1:
        place: dict[str, Any] = {}
        if size is not None:
            sheet = plt.figure(figsize=size, layout="constrained")
            place = (
                {"figure": sheet}
                if "figure" in inspect.signature(plot).parameters
                else {"ax": sheet.subplots()}
            )
        drawn = plot(pairs[0][1], **options, **place)
        figure = drawn if hasattr(drawn, "savefig") else drawn.figure
    else:
        figure = _panels(plot, pairs, options, size)
    if title is not None:
        figure.suptitle(safe_in_figure(title), fontsize=10)
    plain: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(
        path.suffix.lower(), {}
    )
    figure.savefig(path, dpi=200, metadata=plain)
    plt.close(figure)


def _frame(film: xr.Dataset, step: int) -> int:
    """Return the frame that shows the segments around a training step."""
    from ..errors import InputError

    start, end = film["step"].values, film["step_end"].values
    for frame in range(len(start)):
        if start[frame] <= step < end[frame] or step == end[frame] == end[-1]:
            return frame
    raise InputError(
        f"no segment is there at step {step}; there are steps {start[0]} to {end[-1]}."
    )


def _panels(
    plot: Callable[..., Any],
    pairs: list[tuple[str, xr.Dataset]],
    options: dict[str, Any],
    size: tuple[float, float] | None,
) -> Figure:
    """Draw runs beside each other, each under its label, all on the same axes and scale of
    colours.
    """
    import matplotlib.pyplot as plt

    from ..plots.style import share_colours

    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    names = max(result.sizes.get("layer", 0) for _, result in pairs)
    tall = (
        2.9
        if names <= 10 or options.get("quantity") == "cumulative"
        else 0.9 + 0.2 * min(names, 60)
    )
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=size or (4.3 * columns, tall * rows),
        layout="constrained",
        squeeze=False,
    )
    used = list(axes.flat[: len(pairs)])
    for ax in axes.flat[len(pairs) :]:
        ax.remove()
    corners = _extent(plot, pairs, options)
    for ax, (label, result) in zip(used, pairs, strict=True):
        ax.update_datalim(corners)
        plot(result, ax=ax, **options)
        ax.set_title(
            f"{safe_in_figure(label)}: {ax.get_title(loc='left')}".removesuffix(": "),
            loc="left",
            fontsize=8,
        )
    share_colours(used)
    return figure


def _extent(
    plot: Callable[..., Any], pairs: list[tuple[str, xr.Dataset]], options: dict[str, Any]
) -> np.ndarray[Any, Any]:
    """Return the corners of the box around everything drawn of all runs, in coordinates of the
    data.
    """
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    boxes = []
    for _, result in pairs:
        ax = Figure(layout="constrained").subplots()
        plot(result, ax=ax, **options)
        boxes.append(ax.dataLim.frozen())
    return Bbox.union(boxes).get_points()
