"""`lca compare`."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import click
from rich.text import Text

from ..base.text import count, no_loss, safe
from .completion import complete_loss, complete_path
from .options import Choice, json_option
from .show import Table, print_json, print_words, say, share, stdout, table, units_of_loss

if TYPE_CHECKING:
    import xarray as xr

    from ..results import LossResults

_NONE = "–"
_LAYER = (
    "mean",
    "path_band",
    "low",
    "high",
    "p",
    "p_holm",
    "difference",
    "p_difference",
    "p_difference_holm",
)
_LABEL = (
    "runs",
    "helping",
    "helping_low",
    "helping_high",
    "loss_end",
    "loss_end_low",
    "loss_end_high",
    "loss_change",
    "p_loss_end",
)


@click.command()
@click.argument(
    "runs", nargs=-1, required=True, metavar="[LABEL=]RUN…", shell_complete=complete_path
)
@click.option(
    "--loss",
    metavar="NAME",
    shell_complete=complete_loss,
    help="The loss, in every run.  [default: the first of the first run]",
)
@click.option(
    "--by",
    default="module",
    show_default=True,
    help="Layers: module, tensor, or how many parts of a module's name.",
)
@click.option(
    "--confidence", type=float, default=0.95, show_default=True, help="Level of the intervals."
)
@click.option(
    "--paired/--unpaired",
    default=None,
    help="Pair the k-th runs of all labels, for example by seed.  [default: pair runs that begin "
    "from the same checkpoint]",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    metavar="PLACE",
    help="Write the comparison to a file or directory instead of printing it.",
)
@click.option(
    "--format",
    "format_",
    type=Choice(("netcdf", "csv", "parquet")),
    help="Format of the files.  [default: as PLACE ends (.nc, .csv, .parquet), else netcdf]",
)
@json_option
def command(
    runs: tuple[str, ...],
    loss: str | None,
    by: str,
    confidence: float,
    paired: bool | None,
    out: str | None,
    format_: str | None,
    as_json: bool,
) -> None:
    """Compare runs: what each layer was allocated, with intervals and p-values over repeats.

    Runs under one LABEL are repeats, such as seeds; RUN may then be a pattern. A run without a
    label is a label of its own. Every label is compared with the first, by paired tests where runs
    begin from the same checkpoint. Several runs of one training count once.

    \b
    lca compare free.lca frozen.lca
    lca compare 'free=free-*.lca' 'frozen=frozen-*.lca' --loss train --by 1
    lca compare free.lca frozen.lca -o comparison.nc

    \f

    Args:
        runs: paths of runs, each with "LABEL=" before it or without.
        loss: its name; the first of the first run for None.
        by: "module", "tensor", or the number of parts of a module's name.
        confidence: of the intervals, between 0 and 1.
        paired: whether tests are paired; decided by the first checkpoints for None.
        out: the file or directory to write; None to print.
        format_: of the files; None to tell from `out`.
        as_json: prints a document in place of a table.

    Raises:
        InputError: for options that exclude each other.
    """
    from ..errors import InputError
    from ..findings import compare

    if format_ is not None and out is None:
        raise InputError("--format is for files: name where to write them with -o.")
    if out is not None and as_json:
        raise InputError("--json prints, -o writes: take one of them.")

    opened = open_labelled(labelled(runs), loss)
    comparison = compare(
        opened, by=int(by) if by.isdecimal() else by, confidence=confidence, paired=paired
    )
    if comparison.attrs["left_out"]:
        say(comparison.attrs["left_out"])
    if out is not None:
        from ..export import export_comparison

        written = export_comparison(comparison, out, format=format_)
        if comparison.attrs["notes"]:
            say(comparison.attrs["notes"])
        stdout().print(f"wrote {count(len(written), 'file')} to {out}", markup=False)
    elif as_json:
        print_json(document(comparison))
    else:
        print_comparison(comparison)


def labelled(runs: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the paths under each label, in order.

    An argument that exists is a path, even with "=" or "*" in it.

    Raises:
        InputError: for a label given twice, or without a run.
    """
    from glob import glob
    from pathlib import Path

    from ..errors import InputError

    paths_of: dict[str, list[str]] = {}
    for run in runs:
        label, equals, path = run.partition("=")
        if not equals or Path(run).exists():
            name = _readable(Path(run).resolve().name.removesuffix(".lca"))
            label, path = (name, run) if name not in paths_of else (_readable(run), run)
            if label in paths_of:
                raise InputError(f"there already are runs labelled {label!r}. Write LABEL={run}.")
        elif not label or not path:
            raise InputError(f"LABEL=RUN needs a label and a run, got {run!r}.")
        paths_of.setdefault(_readable(label), []).extend(
            [path] if Path(path).exists() else sorted(glob(path)) or [path]
        )
    return paths_of


def _readable(text: str) -> str:
    """Return an argument decoded as UTF-8 where the locale's encoding could not decode it."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def open_labelled(paths: dict[str, list[str]], loss: str | None) -> dict[str, list[LossResults]]:
    """Open the loss of every run, by label.

    Args:
        paths: of the runs, by label.
        loss: its name; the first loss of the first run for None.

    Raises:
        InputError: if a run lacks the loss.
    """
    from ..errors import InputError
    from ..results import open_run

    opened: dict[str, list[LossResults]] = {}
    for label, several in paths.items():
        for path in several:
            run = open_run(path)
            loss = loss if loss is not None else next(iter(run), None)
            if loss is None or loss not in run:
                refusal = f"{path} has no losses." if loss is None else no_loss(path, loss, run)
                raise InputError(f"{refusal} Name one that all the runs have with --loss.")
            opened.setdefault(label, []).append(run[loss])
    return opened


def document(comparison: xr.Dataset) -> dict[str, object]:
    """Return what `lca compare --json` prints."""
    labels = {}
    for label in comparison["label"].values:
        of = comparison.sel(label=label)
        runs = int(of["runs"])
        layers = {
            layer: {name: float(of[name][position]) for name in _LAYER}
            | {"totals": of["total"].values[position, :runs].tolist()}
            for position, layer in enumerate(comparison["layer"].values)
        }
        head = {name: float(of[name]) for name in _LABEL[1:] if name in of}
        kind = {"runs": runs, "trainings": int(of["trainings"]), "paired": bool(of["paired"])}
        labels[label] = {
            "paths": of["path"].values[:runs].tolist(),
            **kind,
            **head,
            "layers": layers,
        }
    about = {
        name: comparison.attrs[name] for name in ("loss", "by", "confidence", "left_out", "notes")
    }
    return {"schema": 1, **about, "labels": labels}


def print_comparison(comparison: xr.Dataset) -> None:
    """Print the headline figures of each label, then a table of layers with Holm's p-values."""
    labels = [safe(label) for label in comparison["label"].values]
    repeats = bool((comparison["runs"] > 1).any())
    console = stdout()
    console.print(_headline(comparison, labels, repeats))
    for line in comparison.attrs["notes"].split("\n"):
        if line:
            print_words(safe(line), console)
    console.print()
    console.print(_layers(comparison, labels, repeats))
    if repeats:
        print_words(
            f"\n[low, high]: {100 * comparison.attrs['confidence']:g} % t interval of the mean. p "
            f"of a layer: t-test against 0; of its difference to {labels[0]}: "
            f"{_tests(comparison)}; both corrected by Holm over layers and labels.",
            console,
        )


def _by_label(comparison: xr.Dataset) -> list[xr.Dataset]:
    """Split a comparison into one data set for each label."""
    return [comparison.isel(label=position) for position in range(comparison.sizes["label"])]


def _headline(comparison: xr.Dataset, labels: list[str], repeats: bool) -> Table:
    """Return the figures of each label side by side."""
    by_label = _by_label(comparison)
    rows = table("", *labels)
    rows.add_row("runs", *(str(int(of["runs"])) for of in by_label))
    if bool((comparison["trainings"] != comparison["runs"]).any()):
        rows.add_row("different trainings", *(str(int(of["trainings"])) for of in by_label))
    scale = _scale(comparison["loss_end"])
    rows.add_row("loss at the end", *(_interval(of, "loss_end", scale, "", 6) for of in by_label))
    scale = _scale(comparison["loss_change"])
    rows.add_row("loss change", *(_in_units(of["loss_change"], scale, digits=6) for of in by_label))
    if "helping" in comparison:
        rows.add_row("helping", *(share(float(of["helping"])) for of in by_label))
    if repeats:
        rows.add_row(
            f"p, loss at the end against {labels[0]}",
            *(_number(of["p_loss_end"], "{:.2g}") for of in by_label),
        )
    return rows


def _layers(comparison: xr.Dataset, labels: list[str], repeats: bool) -> Table:
    """Return a table with a row for each layer, the labels side by side."""
    columns = []
    bent = not bool(comparison["path_band"].isnull().all())
    for position, label in enumerate(labels):
        columns += [
            label,
            *(["± path"] if bent else []),
            *(["p"] if repeats else []),
            *(["difference"] if position else []),
            *(["p"] if position and repeats else []),
        ]
    rows = table("layer", *columns)
    scale, by_label = _scale(comparison["mean"]), _by_label(comparison)
    for position, layer in enumerate(comparison["layer"].values):
        cells = list[Text | str]()
        for which, of in enumerate(by_label):
            one = of.isel(layer=position)
            cells.append(_interval(one, "mean", scale, ends=("low", "high")))
            if bent:
                cells.append(_number(one["path_band"], "{:.1e}"))
            cells += [_number(one["p_holm"], "{:.2g}")] if repeats else []
            cells += [_in_units(one["difference"], scale)] if which else []
            cells += [_number(one["p_difference_holm"], "{:.2g}")] if which and repeats else []
        rows.add_row(Text(safe(layer)), *cells)
    return rows


def _tests(comparison: xr.Dataset) -> str:
    """Return the name of the test of differences to the first label."""
    paired = [safe(label) for label in comparison["label"].values[comparison["paired"].values]]
    if not paired:
        return "Welch's"
    return (
        "paired t-test"
        if len(paired) == comparison.sizes["label"] - 1
        else f"paired t-test for {', '.join(paired)}, else Welch's"
    )


def _interval(
    of: xr.Dataset,
    name: str,
    scale: float,
    sign: str = "+",
    digits: int = 4,
    ends: tuple[str, str] | None = None,
) -> Text:
    value, low, high = (
        _in_units(of[part], scale, sign, digits)
        for part in (name, *(ends or (f"{name}_low", f"{name}_high")))
    )
    return Text(value + ("" if _NONE in (low, high) else f" [{low}, {high}]"))


def _scale(values: xr.DataArray) -> float:
    """Return the largest finite magnitude."""
    return max(
        (abs(value) for value in values.values.ravel().tolist() if math.isfinite(value)),
        default=0.0,
    )


def _in_units(value: xr.DataArray, scale: float, sign: str = "+", digits: int = 4) -> str:
    return units_of_loss(float(value), scale, sign, digits) if bool(value == value) else _NONE


def _number(value: xr.DataArray, form: str) -> str:
    return form.format(float(value)) if bool(value == value) else _NONE
