"""`lca summary`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import click
from rich.text import Text

from ..base.text import count, no_loss, quoted, safe
from ..numerics.precisions import PRECISIONS
from .completion import complete_loss
from .options import json_option
from .show import print_json, print_words, say, share, stdout, table, units_of_loss

if TYPE_CHECKING:
    from ..findings.summary import Figures, Part, Summary
    from ..results import LossResults, Run

TOP = 20  # modules in a table of modules
_BESIDE = 8  # modules beside the groups of a loss
_LOSSES = 6  # more losses than this are shown without modules by default
_BESIDE_EACH_OTHER = 3  # losses whose figures fit side by side into 80 columns
_Overall = Literal["loss_start", "loss_end", "loss_change", "allocated", "residual"]
_SHARES: tuple[Literal["helping", "hurting", "zero"], ...] = ("helping", "hurting", "zero")
_OVERALL: tuple[_Overall, ...] = get_args(_Overall)


@click.command()
@click.argument("run", type=click.Path())
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_loss,
    help="A loss of the run (repeatable).  [default: all]",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Show the N modules with the largest allocations.  [default: {TOP}; {_BESIDE} beside groups]",
)
@click.option("--all", "everything", is_flag=True, help="Show every tensor, in the model's order.")
@json_option
def command(
    run: str, losses: tuple[str, ...], top: int | None, everything: bool, as_json: bool
) -> None:
    """Show headline figures of RUN and what each module was allocated, the largest first.

    A module is a kernel with its bias. Buffers that moved, such as running statistics, have rows of
    their own. With more than six losses each is one row; --loss NAME, --top and --all show modules
    and tensors. --json always holds every module and every tensor.

    \b
    lca summary checkpoints.lca
    lca summary checkpoints.lca --loss train --top 50
    lca summary checkpoints.lca --all

    \f

    Args:
        run: the path or URL of a run.
        losses: names; all where there are none.
        top: how many modules to show; a default for None.
        everything: shows every tensor, not modules.
        as_json: prints a document in place of tables.

    Raises:
        InputError: for `top` together with `everything`, or a loss that the run lacks.
    """
    from ..errors import InputError
    from ..findings import summary
    from ..results import open_run

    if everything and top is not None:
        raise InputError(
            "--all shows every tensor and --top N the N strongest modules. Give one of the two."
        )
    opened = open_run(run)
    for name in losses:
        if name not in opened:
            raise InputError(no_loss(run, name, opened))
    summaries = {name: summary(opened[name]) for name in losses or opened}
    for name, figures in summaries.items():
        _say_what_is_missing(opened[name], figures)
    if as_json:
        print_json({"schema": 1, "losses": summaries})
    else:
        print_summary(summaries, opened.path, top=top, everything=everything)
        print_paths(opened, summaries)
        print_causes(opened, summaries)
        print_directions(opened, summaries)
        print_examples(opened, summaries)


def _say_what_is_missing(results: LossResults, figures: Summary) -> None:
    """Warn of the segments that figures do not include."""
    if not results.complete:
        say(
            f"loss {results.name!r} is not complete: figures include the "
            f"{_finished(figures['segments'])}"
        )
    if results.manifest.breaks:
        seen, steps = results.manifest.steps_seen
        say(
            f"loss {results.name!r}: {count(len(results.manifest.breaks), 'gap')} between "
            f"checkpoints skipped: figures include {seen:,} of {count(steps, 'training step')}"
        )
    if results.behind:
        say(
            f"loss {results.name!r} ends at step {figures['last_step']}, "
            f"{count(results.behind, 'segment')} before the run does: it was not chosen when "
            f"checkpoints were added. Pass --loss {results.name} to `lca run` to replay the rest"
        )


def print_summary(
    summaries: dict[str, Summary],
    run: Path,
    *,
    top: int | None = None,
    everything: bool = False,
) -> None:
    """Print headline figures side by side, then each loss's groups and modules.

    Args:
        summaries: the `summary` of each loss.
        run: where the results are, for the line that tells how to see more.
        top: how many modules are shown; None for as many as fit a screen.
        everything: whether to show every tensor, not modules.
    """
    from ..findings.summary import is_grouped, is_plain

    console = stdout()
    if not summaries:
        console.print("no losses")
    if len(summaries) > _LOSSES and top is None and not everything:
        _print_losses(summaries)
        way = f"`lca summary {quoted(run)} --loss NAME` shows what the modules did to a loss"
        print_words(f"\n{way}", console)
        return
    plain = {name: of_loss for name, of_loss in summaries.items() if is_plain(of_loss)}
    _print_plain(plain)
    unshown = set[int]()
    for position, (name, figures) in enumerate(summaries.items()):
        if plain or position:
            console.print()
        print_words(_caption(name, figures), console)
        if is_grouped(figures):
            unshown.add(_print_groups(figures, top or _BESIDE, everything))
        elif is_plain(figures):
            unshown.add(_print_parts(figures, top or TOP, everything))
    unshown -= {0}
    if not everything and (unshown or _have_more_tensors(summaries)):
        print_words(f"\n{_the_rest(unshown, run)}", console)


def print_paths(run: Run, summaries: Mapping[str, Summary]) -> None:
    """Print what sums mean for losses with segments of more than one training step.

    Args:
        run: holds the losses.
        summaries: the `summary` of each loss.
    """
    console = stdout()
    for name, figures in summaries.items():
        if not figures["long_segments"]:
            continue
        known = figures["path_band"] is not None
        about_band = (
            "± path is how much other paths through the same checkpoints would change them"
            if known
            else "--path-band on tells how much other paths would change them"
        )
        doubling = figures["doubling"]
        if doubling is not None:
            most = doubling if isinstance(doubling, float) else max(doubling)
            within = "" if isinstance(doubling, float) else " of a group at most"
            about_band += f", and leaving every second checkpoint out moves {share(most)} of Σ|module|{within}"
        about_shares = ""
        if run[name].holds("statistics"):
            some = figures["long_segments"] < figures["segments"]
            about_shares = (
                f"; shares that help are {'of the others alone' if some else 'not given'}"
            )
        line = (
            f"{safe(name)}: {figures['long_segments']:,} of "
            f"{count(figures['segments'], 'segment')} "
            f"{'is' if figures['long_segments'] == 1 else 'are'} longer than one training step: "
            f"sums are the straight line's share, {about_band}{about_shares}"
        )
        print_words(line, console)


def print_examples(run: Run, losses: Iterable[str]) -> None:
    """Print how to see the examples of the losses with `per=`.

    Args:
        run: holds the losses.
        losses: names.
    """
    console = stdout()
    for name in losses:
        record = run[name].record
        if record.per is not None:
            line = (
                f"{count(record.rows or 0, record.per)} of {name!r}: `lca plot "
                f"{quoted(run.path)} examples --loss {quoted(name)}`"
            )
            print_words(line, console)


def print_causes(run: Run, summaries: Mapping[str, Summary]) -> None:
    """Print the share of rest and the sums of the causes, for a run with causes.

    Args:
        run: holds the losses.
        summaries: the `summary` of each loss.
    """
    from ..findings.causes import LARGE, amount, percent

    console = stdout()
    for name, figures in summaries.items():
        if "causes" not in figures:
            return
        rest, allocated = figures["causes"]["rest_share"], figures["causes"]["allocated"]
        share = rest if isinstance(rest, float) else max(rest)
        large = ", too large to trust the others" if share > LARGE else ""
        within = "" if isinstance(rest, float) else " in the group with the most"
        sums = [
            f"{cause} {amount(total)}"
            for cause, total in allocated.items()
            if cause != "rest" and isinstance(total, float)
        ]
        line = (
            f"causes of {safe(name)!r}: rest is {percent(share)} of Σ|A|{within}{large}"
            f"{'; ' if sums else ''}{', '.join(sums)}: `lca plot {quoted(run.path)} causes --loss "
            f"{quoted(name)}`"
        )
        print_words(line, console)


def print_directions(run: Run, summaries: Mapping[str, Summary]) -> None:
    """Print which shares of the motion and of each loss the directions capture, for a run with
    directions.

    Args:
        run: holds the losses.
        summaries: the `summary` of each loss.
    """
    from ..findings.directions import balance_of

    console = stdout()
    for name, figures in summaries.items():
        if "directions" not in figures:
            return
        told = figures["directions"]
        parts = balance_of(
            told["directions"],
            told["captured"],
            told["captured_by_chance"],
            told["inside"],
            told["outside"],
        )
        line = (
            f"directions of {safe(name)!r}: {'; '.join(parts)}. `lca plot {quoted(run.path)} "
            f"directions --loss {quoted(name)}`"
        )
        print_words(line, console)


def _have_more_tensors(summaries: dict[str, Summary]) -> bool:
    """Tell whether any module holds more than one tensor."""
    return any(len(of_loss["tensors"]) > len(of_loss["modules"]) for of_loss in summaries.values())


def _the_rest(unshown: set[int], run: Path) -> str:
    """Return the line that tells how many modules are not shown, and how to see them."""
    more = " and ".join(f"{number:,}" for number in sorted(unshown))
    which = f"{more} more module{'' if unshown == {1} else 's'}: " if unshown else ""
    strongest = ", --top N the N strongest modules" if unshown else ""
    return f"{which}`lca summary {quoted(run)} --all` shows every tensor{strongest}"


def _print_losses(summaries: Mapping[str, Summary]) -> None:
    """Print a row for each loss; a loss with groups has the loss of the whole split."""
    helping = ["helping"] if any("helping" in of_loss for of_loss in summaries.values()) else []
    rows = table(
        "loss", "groups", "segments", "start → end", "change", "allocated", "residual", *helping
    )
    for name, figures in summaries.items():
        start, end, change, allocated, residual = (_overall(figures, key) for key in _OVERALL)
        rows.add_row(
            Text(safe(name)),
            "" if figures["groups"] is None else f"{len(figures['groups']):,}",
            f"{figures['segments']:,}",
            " → ".join(_numbers([start, end], "", 4)),
            *_numbers([change, allocated]),
            f"{residual:+.1e}",
            *([_one_share(figures)] if helping else []),
        )
    stdout().print(rows)


def _one_share(figures: Summary) -> str:
    """Return the share of parameters that helped a loss without groups; "" for any other loss."""
    helping = figures.get("helping")
    return share(helping) if isinstance(helping, float) else ""


def _print_plain(plain: dict[str, Figures[float]]) -> None:
    """Print the figures of losses without groups: side by side, or as rows where there are many."""
    if len(plain) > _BESIDE_EACH_OTHER:
        _print_losses(plain)
    elif plain:
        _print_headline(plain)


def _print_headline(plain: dict[str, Figures[float]]) -> None:
    headline = table("", *(safe(name) for name in plain))
    ends = [_numbers([of["loss_start"], of["loss_end"]], "") for of in plain.values()]
    sampled = any(figures["sampled_of"] is not None for figures in plain.values())
    of_drawn = " (of the drawn segments)" if sampled else ""
    headline.add_row(f"loss at the start{of_drawn}", *(start for start, _ in ends))
    headline.add_row(f"loss at the end{of_drawn}", *(end for _, end in ends))
    changes = [_numbers([of["loss_change"], of["allocated"]]) for of in plain.values()]
    gaps = any(figures["gaps"] for figures in plain.values())
    outside = ", without the gaps, estimated" if gaps else ", estimated"
    over = outside if sampled else ", over the segments replayed" if gaps else ""
    headline.add_row(f"loss change{over}", *(change for change, _ in changes))
    headline.add_row(
        f"allocated, Σ over parameters and segments{', estimated' if sampled else ''}",
        *(allocated for _, allocated in changes),
    )
    if any(figures["gaps_change"] is not None for figures in plain.values()):
        beside = [figures["gaps_change"] for figures in plain.values()]
        headline.add_row(
            "loss change in the gaps, not replayed",
            *("" if change is None else _numbers([change])[0] for change in beside),
        )
    if sampled:
        headline.add_row(
            "± standard error, from drawing segments",
            *(_error_cell(figures["segments_error"]) for figures in plain.values()),
        )
        true = [figures["identity_change"] for figures in plain.values()]
        headline.add_row(
            "change over all of training with its gaps, 256 examples"
            if gaps
            else "true change, first checkpoint to last, 256 examples",
            *("" if change is None else _numbers([change])[0] for change in true),
        )
    if any(figures["buffers"] for figures in plain.values()):
        parts = (_numbers([figures["buffers"] or 0.0])[0] for figures in plain.values())
        headline.add_row("of it to buffers (running statistics)", *parts)
    headline.add_row("residual", *(f"{figures['residual']:+.1e}" for figures in plain.values()))
    if any(figures["path_band"] is not None for figures in plain.values()):
        bands = (
            "" if figures["path_band"] is None else f"{figures['path_band']:.1e}"
            for figures in plain.values()
        )
        headline.add_row("moved between modules by other paths", *bands)
    for key in _SHARES:
        if all(key in figures for figures in plain.values()):
            headline.add_row(
                f"{key} (share of parameters × {_counted(plain.values())})",
                *(share(figures[key]) for figures in plain.values()),
            )
    if len({(figures["first_step"], figures["last_step"]) for figures in plain.values()}) > 1:
        headline.add_row(
            "training steps",
            *(f"{figures['first_step']}–{figures['last_step']}" for figures in plain.values()),
        )
    stdout().print(headline)


def _counted(every: Iterable[Figures[float]]) -> str:
    """Return which segments shares count: those of one training step."""
    counts = {
        (figures["segments"] - figures["long_segments"], figures["segments"]) for figures in every
    }
    if all(short == segments for short, segments in counts):
        return "segments"
    some = " or ".join(f"{short:,} of {segments:,}" for short, segments in sorted(counts))
    return f"segments of one step, {some}"


def _error_cell(error: float | None) -> str:
    """Return a standard error as a table cell; "" for None."""
    return "" if error is None else f"{error:.1e}"


def _print_parts(figures: Figures[float], top: int, everything: bool) -> int:
    """Print every tensor, or the modules with the largest allocations and one row for the others.

    Return how many modules share that row.
    """
    if everything:
        _print_rows("tensor", figures["tensors"], [], figures)
        return 0
    modules = sorted(figures["modules"], key=lambda module: -abs(module["allocated"]))
    _print_rows("module", modules[:top], modules[top:], figures)
    return len(modules[top:])


def _print_rows(
    what: str, shown: list[Part[float]], others: list[Part[float]], figures: Figures[float]
) -> None:
    """Print a row for each module or tensor, one for the others, and one for tensors not kept."""
    shown = [*shown, *([_together(others)] if others else [])]
    of_rows = [
        row["standard_error"] if row["segments_error"] is None else row["segments_error"]
        for row in shown
    ]
    sampled = any(error is not None for error in of_rows)
    kinds = what == "tensor"
    names = [what, *(["kind"] if kinds else [])]
    bent = any(row["path_band"] is not None for row in shown)
    errors = ["± standard error"] if sampled else []
    errors += ["± path"] if bent else []
    last, cells = _last_column(shown)
    rows = table(
        *names, "parameters", "allocated", *errors, "share of sum", *last, names=len(names)
    )
    allocated = _numbers([row["allocated"] for row in shown])
    for row, error, number, cell in zip(shown, of_rows, allocated, cells, strict=True):
        rows.add_row(
            Text(safe(row["name"])),
            *([row["kind"]] if kinds else []),
            f"{row['parameters']:,}",
            number,
            *([_error_cell(error)] if sampled else []),
            *(["" if row["path_band"] is None else f"{row['path_band']:.1e}"] if bent else []),
            _part(row["allocated"], figures["allocated"]),
            *([cell] if last else []),
        )
    if figures["remainder"] is not None:
        (number,) = _numbers([figures["remainder"]])
        part = _part(figures["remainder"], figures["allocated"])
        blanks, end = [""] * len(names), [""] * len(last)
        rows.add_row("(tensors not kept)", *blanks, number, *[""] * len(errors), part, *end)
    stdout().print(rows)


def _last_column(shown: list[Part[float]]) -> tuple[list[str], list[str]]:
    """Return the heading and cells of the last column: shares that helped, or whether a part moved.

    There is no heading where shares are not counted and every part moved.
    """
    if all("helping" in row for row in shown):
        shares = [share(row["helping"]) if row["moved"] else "did not move" for row in shown]
        return ["helping"], shares
    moved = all(row["moved"] for row in shown)
    return [] if moved else ["moved"], ["yes" if row["moved"] else "no" for row in shown]


def _together(others: list[Part[float]]) -> Part[float]:
    """Return the figures of several modules as one row."""
    parameters = sum(other["parameters"] for other in others)
    together: Part[float] = {
        "name": f"({len(others):,} more)",
        "parameters": parameters,
        "moved": any(other["moved"] for other in others),
        "allocated": math.fsum(other["allocated"] for other in others),
        "standard_error": None,
        "path_band": None,
        "segments_error": None,
    }
    if all("helping" in other for other in others):
        helping = math.fsum(other["helping"] * other["parameters"] for other in others)
        together["helping"] = helping / max(1, parameters)
    return together


def _print_groups(figures: Figures[list[float]], top: int, everything: bool) -> int:
    """Print a row for each group and one for all: their losses and the allocations of modules.

    Return how many modules are not shown.
    """
    columns, more = _columns(figures, top, everything)
    start, end, change, _, residual = (_overall(figures, name) for name in _OVERALL)
    counts, weights = figures["group_examples"] or [], figures["group_weights"] or []
    starts = _numbers([*figures["loss_start"], start], "", 4)
    ends = _numbers([*figures["loss_end"], end], "", 4)
    changes = _numbers([*figures["loss_change"], change])
    parts = [[*column, _weighted(column, weights)] for column in columns.values()]
    scale = _scale([part for column in parts for part in column])
    cells = [[units_of_loss(part, scale, digits=4) for part in column] for column in parts]
    labels = [*map(str, figures["groups"] or []), "(all)"]
    examples = [*counts, figures["examples"]]  # an example may have elements in several groups
    residuals = [*figures["residual"], residual]
    shares = [[*map(share, figures["helping"]), ""]] if "helping" in figures else []
    heading = ["helping"] if shares else []
    rows = table("group", "examples", "loss", "change", "residual", *heading, *map(safe, columns))
    for position, label in enumerate(labels):
        rows.add_row(
            Text(safe(label)),
            f"{examples[position]:,}",
            f"{starts[position]} → {ends[position]}",
            changes[position],
            f"{residuals[position]:+.1e}",
            *(column[position] for column in (*shares, *cells)),
        )
    stdout().print(rows)
    return more


def _columns(
    figures: Figures[list[float]], top: int, everything: bool
) -> tuple[dict[str, list[float]], int]:
    """Return the columns beside the groups, and how many modules they leave out.

    Columns are every tensor, or the modules with the largest allocations and the sum of the others.
    """
    if everything:
        return {tensor["name"]: tensor["allocated"] for tensor in figures["tensors"]}, 0
    sums = {module["name"]: module["allocated"] for module in figures["modules"]}
    strongest = {*sorted(sums, key=lambda name: -sum(map(abs, sums[name])))[:top]}
    shown = {name: column for name, column in sums.items() if name in strongest}
    others = [column for name, column in sums.items() if name not in strongest]
    if others:
        shown[f"({len(others):,} more)"] = [
            math.fsum(column) for column in zip(*others, strict=True)
        ]
    return shown, len(others)


def _numbers(values: Sequence[float], sign: str = "+", digits: int = 6) -> list[str]:
    """Format numbers that are printed together, in units of loss."""
    return [units_of_loss(value, _scale(values), sign, digits) for value in values]


def _scale(values: Sequence[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _finished(segments: int) -> str:
    return "one segment that is" if segments == 1 else f"{segments:,} segments that are"


def _overall(figures: Summary, name: _Overall) -> float:
    """Return a figure of a loss; for a loss with groups, that of the whole split."""
    figure, weights = figures[name], figures["group_weights"]
    if isinstance(figure, float) or weights is None:
        return cast("float", figure)
    return _weighted(figure, weights)


def _weighted(column: list[float], weights: list[float]) -> float:
    return math.fsum(
        value * weight for value, weight in zip(column, weights, strict=True)
    ) / math.fsum(weights)


def _part(part: float, whole: float) -> str:
    return share(part / whole + 0.0) if whole and abs(part / whole) >= 5e-4 else "0.0 %"


def _caption(name: str, figures: Summary) -> str:
    unconverged = (
        f"{count(figures['unconverged'], 'segment')} above the tolerance, "
        if figures["unconverged"]
        else ""
    )
    groups = f"{count(len(figures['groups']), 'group')}, " if figures["groups"] is not None else ""
    residual = figures["max_segment_residual"]
    worst = residual if isinstance(residual, float) else max(residual)
    mode = (
        f", {figures['norm_stats']} statistics in normalisation layers"
        if figures["norm_stats"]
        else ""
    )
    of = figures["sampled_of"]
    drawn = "" if of is None else f" of {of:,}, drawn at random"
    return (
        f"{safe(name)}: {groups}{count(figures['segments'], 'segment')}{drawn}, "
        f"{count(figures['parameters'], 'parameter')}, "
        f"{count(figures['evaluations'], 'gradient evaluation')}, {unconverged}largest |residual| "
        f"{worst:.1e}{_error(figures)}{mode}"
    )


def _error(figures: Summary) -> str:
    """Describe the measured error of a precision; "" where it was not measured."""
    reference = PRECISIONS[figures["precision"]].reference
    if figures["precision_error"] is None or reference is None:
        return ""
    examples, of_examples = figures["precision_examples"], ""
    if examples:
        of_examples = f", on {count(examples, 'example')} of {figures['examples']:,}"
    return (
        f", measured error of {figures['precision']} allocations against {reference.precision} "
        f"ones {figures['precision_error']:.1e} of their size (Σ|A − A*| / Σ|A*| on "
        f"{count(figures['precision_segments'], 'segment')}{of_examples})"
    )
