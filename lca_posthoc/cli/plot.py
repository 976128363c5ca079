"""`lca plot`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from ..base.declarations import Option, declared_findings
from ..base.text import did_you_mean, no_loss, quoted, safe_in_figure
from .compare import labelled, open_labelled
from .completion import complete_loss, complete_run_or_finding
from .options import Choice
from .show import say, stdout

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..results import LossResults

Callback = TypeVar("Callback", bound=Callable[..., object])
Value: TypeAlias = "str | int | tuple[str, ...]"
Options: TypeAlias = dict[str, Value]  # the options given on the command line
Inches: TypeAlias = tuple[float, float]
Drawn: TypeAlias = "tuple[str, xr.Dataset]"  # the label of a run, and its finding
Plot: TypeAlias = "Callable[..., Axes | Figure]"
PICTURES, FILMS = (".png", ".svg", ".pdf"), (".mp4", ".gif")

_HELP = """Draw a finding of RUN into FILE: {findings}.

\b
lca plot checkpoints.lca layers
lca plot checkpoints.lca layers --quantity cumulative --top 8 --size 7x4 --title "ResNet-18" \
--font serif
lca plot checkpoints.lca generalisation --loss train --loss validation -o overfitting.pdf
lca plot checkpoints.lca curve --loss per_class --group 3 --group 8
lca plot checkpoints.lca microscope -o film.mp4
lca plot adam=a.lca adam=b.lca sgd=c.lca compare

Several runs are drawn side by side by {beside}. {compared} takes repeats under one LABEL=RUN.
"""


def findings_drawn(runs: str | None = None) -> list[str]:
    """Return the names of the findings that can be drawn, in alphabetical order.

    Args:
        runs: "one", "beside" or "compared", to return only the findings that take so many; None for
            all.
    """
    return sorted(
        name for name, finding in declared_findings().items() if runs in (None, finding.runs)
    )


def _listed(names: Sequence[str], last: str) -> str:
    """Join names into one phrase.

    >>> _listed(["a", "b", "c"], "or")
    'a, b or c'
    """
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _help() -> str:
    """Return the text of `lca plot --help`, with the names of the findings."""
    beside = [name for name, finding in declared_findings().items() if finding.runs == "beside"]
    return _HELP.format(
        findings=_listed(findings_drawn(), "or"),
        beside=_listed(beside, "and"),
        compared=_listed(findings_drawn("compared"), "and"),
    )


def _declared_options() -> dict[str, Option]:
    """Return every option that a finding declares, by parameter name."""
    return {
        option.name: option
        for finding in declared_findings().values()
        for option in finding.options
    }


def _takes_declared_options(function: Callback) -> Callback:
    """Add the options that the findings declare to a command."""
    for option in reversed(_declared_options().values()):
        function = click.option(
            option.flag,
            option.name,
            type=_type_of(option),
            is_flag=option.kind is bool,
            multiple=option.repeatable,
            metavar=option.metavar,
            help=option.help,
        )(function)
    return function


def _type_of(option: Option) -> click.ParamType[Any] | type:
    """Return click's type for an option's values."""
    if isinstance(option.kind, tuple):
        return Choice(option.kind)
    if option.kind == "count":
        return click.IntRange(min=1)
    return click.Path() if option.kind == "path" else option.kind


@click.command(help=_help())
@click.argument("runs", nargs=-1, metavar="[LABEL=]RUN…", shell_complete=complete_run_or_finding)
@click.argument("finding", metavar="FINDING")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A .png, .svg or .pdf file; for the microscope also .mp4 or .gif.  [default: FINDING.png]",
)
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_loss,
    help="A loss of the run; for generalisation two, over two splits.  [default: the first, or "
    "the first over either split]",
)
@_takes_declared_options
@click.option(
    "--size",
    metavar="WxH",
    help="Width and height of the figure in inches, such as 7x4; letters keep their size.  "
    "[default: as the finding needs]",
)
@click.option("--title", metavar="TEXT", help="A title above the figure.")
@click.option("--font", metavar="NAME", help="Font family, such as serif or 'Times New Roman'.")
def command(
    runs: tuple[str, ...],
    finding: str,
    out: Path | None,
    losses: tuple[str, ...],
    size: str | None,
    title: str | None,
    font: str | None,
    **flags: Value | None,
) -> None:
    """Draw a finding of runs into a file.

    Args:
        runs: paths of runs, each with "LABEL=" before it or without.
        finding: its name.
        out: the file; FINDING.png for None.
        losses: names; the finding's default where there are none.
        size: "WIDTHxHEIGHT" in inches.
        title: above the figure.
        font: the family of its letters.
        flags: options that findings declare, None where not given.
    """
    _check_finding(runs, finding)
    options = {
        name: value
        for name, value in flags.items()
        if value is not None and value not in ((), False)
    }
    _check_options(finding, options)
    path = _path(out or Path(f"{finding}.png"), finding)
    named = labelled(runs)
    _check_moment(path, options)
    _check_runs(finding, sum(map(len, named.values())))
    by = options.get("by")
    if isinstance(by, str) and by.isdecimal():
        options["by"] = int(by)
    with _look(finding, size, title, font) as look:
        _draw(finding, named, losses, options, path, look)
    stdout().print(f"wrote {path}", markup=False)


def _check_finding(runs: tuple[str, ...], finding: str) -> None:
    """Reject an unknown finding, or a finding without a run.

    Raises:
        InputError: with the command to write.
    """
    from ..errors import InputError

    known, near = ", ".join(findings_drawn()), did_you_mean(finding, findings_drawn())
    is_run = not near or Path(finding).exists()
    if not runs and finding in declared_findings():
        raise InputError(f"which run? Write lca plot RUN {finding}.")
    if not runs and is_run:
        raise InputError(
            f"which finding of {finding}? There are {known}. Write lca plot {quoted(finding)} "
            "FINDING."
        )
    if finding not in declared_findings():
        raise InputError(
            f"there is no finding {finding!r}; there are {known}.{near} Write lca plot RUN FINDING."
        )


def _check_options(finding: str, options: Options) -> None:
    """Reject an option that the finding does not declare.

    Raises:
        InputError: naming the findings that take it.
    """
    from ..errors import InputError

    for name in options:
        takers = [
            taker
            for taker in findings_drawn()
            if name in {option.name for option in declared_findings()[taker].options}
        ]
        if finding not in takers:
            flag = _declared_options()[name].flag
            raise InputError(f"{flag} does not go with {finding}; it is for {', '.join(takers)}.")


def _check_moment(path: Path, options: Options) -> None:
    """Reject `--step` for a film and `--fps` for a picture.

    Raises:
        InputError: for either.
    """
    from ..errors import InputError

    film = path.suffix.lower() in FILMS
    if ("step" in options and film) or ("fps" in options and not film):
        raise InputError("--step is for a picture of one moment, --fps for a film (.mp4 or .gif).")


def _check_runs(finding: str, count: int) -> None:
    """Reject several runs for a finding that draws one.

    Raises:
        InputError: naming the findings that take several.
    """
    from ..errors import InputError

    if count > 1 and declared_findings()[finding].runs == "one":
        several = (*findings_drawn("beside"), *findings_drawn("compared"))
        raise InputError(
            f"{finding} is drawn of one run, got {count}. Several go with {', '.join(several)}."
        )


@contextmanager
def _look(
    finding: str, size: str | None, title: str | None, font: str | None
) -> Iterator[tuple[Inches | None, str | None]]:
    """Yield a figure's size in inches and its title, and use the font inside the block.

    Raises:
        InputError: for a font that is not installed, or a size or title of the microscope.
    """
    from ..errors import InputError

    inches = None if size is None else _inches(size)
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
            "monospace."
        ) from None
    with mpl.rc_context({"font.family": font}):
        yield inches, title


def _inches(size: str) -> Inches:
    """Return the width and height that `--size` gives.

    Raises:
        InputError: for any other text than two numbers from 1 to 100.
    """
    import re

    from ..errors import InputError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)[x×](\d+(?:\.\d+)?)", size)
    inches = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not all(1 <= length <= 100 for length in inches):
        raise InputError(
            f"--size is WIDTHxHEIGHT in inches, each from 1 to 100, such as 7x4, got {size!r}."
        )
    return inches


def _path(path: Path, finding: str) -> Path:
    from ..errors import InputError

    known = (*PICTURES, *(FILMS if finding == "microscope" else ()))
    if path.suffix.lower() not in known:
        raise InputError(f"{finding} is drawn as {', '.join(known)}, got {path.name!r}.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"there is no directory {path.parent} for {path.name}. Make it first.")
    return path


def _results(path: str, losses: tuple[str, ...], finding: str) -> list[LossResults]:
    """Return the losses of a run that a finding draws: one, or two over two splits.

    Raises:
        InputError: if the run lacks them, or there are too many.
    """
    from ..errors import InputError
    from ..findings.generalisation import no_two_splits, two_splits
    from ..results import open_run

    run, number = open_run(path), declared_findings()[finding].losses
    pair = two_splits(run) if number == 2 and not losses else None
    if number == 2 and not losses and pair is None:
        raise InputError(f"{finding} of {path} cannot be drawn: {no_two_splits(run)}")
    told = [name for name in run if run[name].record.per is not None]
    first = told if declared_findings()[finding].examples and told else list(run)
    names = losses or pair or tuple(first[:1])
    for name in names:
        if name not in run:
            raise InputError(no_loss(path, name, run))
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
    options: Options,
    path: Path,
    look: tuple[Inches | None, str | None],
) -> None:
    import matplotlib as mpl

    mpl.use("agg")  # no window, even where the machine has a display
    from .. import findings, plots

    plot: Plot = getattr(plots, finding)
    film = path.suffix.lower() in FILMS
    to_find = _taken(getattr(findings, finding), options)
    to_file: Callable[..., Path] = plots.film
    to_plot = _taken(to_file if film else plot, options)
    groups, step = options.get("groups", ()), options.get("step")
    assert isinstance(groups, tuple)
    pairs = _find(finding, named, losses, groups, to_find)
    if isinstance(step, int):
        to_plot["at"] = _frame(pairs[0][1], step)
    with _writing(path):
        if film:
            to_file(pairs[0][1], path, **to_plot)
        else:
            _save(plot, pairs, to_plot, path, *look)
    # an `InputError` carries its own message
    for left_out in dict.fromkeys(result.attrs["left_out"] for _, result in pairs):
        if left_out:
            say(left_out)


def _taken(function: Callable[..., object], options: Options) -> Options:
    """Return the options that a function has a parameter for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}


def _find(
    finding: str,
    named: dict[str, list[str]],
    losses: tuple[str, ...],
    groups: Sequence[str],
    options: Options,
) -> list[Drawn]:
    """Compute the finding of each run, by label; compared runs share one.

    Raises:
        InputError: for several losses of compared runs.
    """
    from .. import findings
    from ..errors import InputError

    if declared_findings()[finding].runs == "compared":
        if len(losses) > 1:
            raise InputError(f"{finding} takes one loss, got {len(losses)}.")
        compared = open_labelled(named, losses[0] if losses else None)
        return [("", getattr(findings, finding)(compared, **options))]
    return [
        (
            label if len(paths) == 1 else f"{label} {Path(path).name}",
            _of_groups(finding, _results(path, losses, finding), groups, options),
        )
        for label, paths in named.items()
        for path in paths
    ]


def _of_groups(
    finding: str, results: list[LossResults], labels: Sequence[str], options: Options
) -> xr.Dataset:
    """Compute the finding of one run, for the groups that are named.

    Raises:
        InputError: for several groups where the finding shows one.
    """
    from .. import findings
    from ..errors import InputError

    find: Callable[..., xr.Dataset] = getattr(findings, finding)
    picked = [_group(results[0], label) for label in labels]
    by_itself = "group" in inspect.signature(find).parameters
    if by_itself and len(picked) > 1:
        raise InputError(f"the {finding} shows one group, got {len(picked)}.")
    if by_itself and picked:
        return find(*results, **options, group=picked[0])
    of_run = find(*results, **options)
    if picked and "group" in of_run.dims:  # a finding may have no figures of single groups
        return of_run.sel(group=picked[0] if len(picked) == 1 else picked)
    return of_run


def _group(results: LossResults, label: str) -> str | int:
    """Return the group with a label; labels are numbers or strings.

    Raises:
        InputError: if the loss has no such group.
    """
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
    plot: Plot,
    pairs: list[Drawn],
    options: Options,
    path: Path,
    size: Inches | None,
    title: str | None,
) -> None:
    import matplotlib.pyplot as plt

    drawn = (
        _alone(plot, pairs[0][1], options, size)
        if len(pairs) == 1
        else _panels(plot, pairs, options, size)
    )
    if title is not None:
        drawn.suptitle(safe_in_figure(title), fontsize=10)
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    drawn.savefig(path, dpi=200, metadata=undated.get(path.suffix.lower(), {}))
    plt.close(drawn)


def _alone(plot: Plot, result: xr.Dataset, options: Options, size: Inches | None) -> Figure:
    """Draw one run into a new figure, of the size it needs or of `size`."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    place: dict[str, Figure | Axes] = {}
    if size is not None:
        sheet = plt.figure(figsize=size, layout="constrained")
        whole = "figure" in inspect.signature(plot).parameters
        place = {"figure": sheet} if whole else {"ax": sheet.subplots()}
    drawn = plot(result, **options, **place)
    if isinstance(drawn, Figure):
        return drawn
    figure = drawn.get_figure(root=True)
    assert figure is not None
    return figure


def _frame(film: xr.Dataset, step: int) -> int:
    """Return the index of the frame that shows the segments around a training step.

    Raises:
        InputError: if no segment covers the step.
    """
    from ..errors import InputError

    start, end = film["step"].values, film["step_end"].values
    for frame in range(len(start)):
        if start[frame] <= step < end[frame] or step == end[frame] == end[-1]:
            return frame
    raise InputError(
        f"no segment is there at step {step}; there are steps {start[0]} to {end[-1]}."
    )


def _panels(plot: Plot, pairs: list[Drawn], options: Options, size: Inches | None) -> Figure:
    """Draw runs side by side, each under its label, on shared axes and one colour scale."""
    from ..plots.style import share_colours

    figure, used = _grid(pairs, options, size)
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


def _grid(pairs: list[Drawn], options: Options, size: Inches | None) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each run, in rows of three, as tall as their layers need."""
    import matplotlib.pyplot as plt

    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    names = max(result.sizes.get("layer", 0) for _, result in pairs)
    few = names <= 10 or options.get("quantity") == "cumulative"
    tall = 2.9 if few else 0.9 + 0.2 * min(names, 60)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=size or (4.3 * columns, tall * rows),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat[len(pairs) :]:
        ax.remove()
    return figure, list(axes.flat[: len(pairs)])


def _extent(plot: Plot, pairs: list[Drawn], options: Options) -> np.ndarray[Any, Any]:
    """Return the corners of the box around everything drawn, in data coordinates."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    boxes = []
    for _, result in pairs:
        ax = Figure(layout="constrained").subplots()
        plot(result, ax=ax, **options)
        boxes.append(ax.dataLim.frozen())
    return Bbox.union(boxes).get_points()
