"""Write findings of a run to files: everything under a temporary name, renamed once it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import xarray as xr

from ..errors import InputError, optional_package
from ..findings.common import left_out_of
from ..results import Run
from .choose import Say, choose
from .netcdf import needed_for_netcdf, write_netcdf
from .tables import column_descriptions, file_names, tables, write_csv, write_parquet

FORMATS = ("netcdf", "csv", "parquet", "tensorboard")
SUFFIXES = {".nc": "netcdf", ".csv": "csv", ".parquet": "parquet"}
ABOUT = "about.json"


def export(
    run: Run,
    target: str | Path,
    *,
    format: str | None = None,
    losses: Sequence[str] = (),
    findings: Sequence[str] = (),
    say: Say = print,
) -> list[Path]:
    """Write findings for other programs.

    Args:
        run: an open run.
        target: a directory, created with TARGET/LOSS/FINDING.nc and so on; or, for one table of one
            finding of one loss, a file that ends in .nc, .csv or .parquet.
        format: "netcdf", "csv", "parquet" or "tensorboard"; None for that of the file's ending, or
            netcdf.
        losses: names; empty for all.
        findings: names; empty for all that the run allows except `microscope`.
        say: called with a sentence on what is skipped, and why.

    Returns:
        The files that were written.

    Raises:
        InputError: for an unknown name, a requested finding that the run does not allow, or an
            existing target.
        ResourceError: if a package for the format is not installed.
        LCAError: if stored numbers are damaged.
    """

    def write(building: Path, chosen: str) -> None:
        if chosen == "tensorboard":
            from .events import write_events

            write_events(run, building, list(losses), list(findings), say)
        else:
            _write_findings(run, building, chosen, losses, findings, say)

    hint = "a file takes one --loss and one --finding that is a single table, such as curve."
    return _place(Path(target), format, write, hint)


def export_comparison(
    found: xr.Dataset, target: str | Path, *, format: str | None = None
) -> list[Path]:
    """Write the result of `findings.compare` for other programs.

    Args:
        found: the result of `findings.compare`.
        target: a directory, created with compare.nc or the tables in it; or a file that ends in
            .nc.
        format: "netcdf", "csv" or "parquet"; None for that of the file's ending, or netcdf.

    Returns:
        The files that were written.

    Raises:
        InputError: for another finding, or an existing target.
        ResourceError: if a package for the format is not installed.
    """
    if found.attrs.get("finding") != "compare":
        raise InputError(
            f"this is a result of {found.attrs.get('finding')!r}; `export` writes the findings of "
            "one run."
        )

    def write(building: Path, chosen: str) -> None:
        if chosen == "tensorboard":
            raise InputError(
                "a comparison is written as netcdf, csv or parquet; TensorBoard shows one run."
            )
        about: dict[str, object] = {}
        _write_finding(found, "compare", building, chosen, about, "")
        _write_about(about, building)

    return _place(Path(target), format, write, "a comparison is one file as .nc alone.")


def _place(
    place: Path, format: str | None, write: Callable[[Path, str], None], hint: str
) -> list[Path]:
    """Let `write` fill an empty directory, move the result to its place once it is complete, and
    return its files.

    Raises:
        InputError: if several files should become one, or the place is taken.
    """
    is_file = place.suffix in SUFFIXES and not place.is_dir()
    chosen = format or SUFFIXES.get(place.suffix if is_file else "", "netcdf")
    _check(place, chosen, is_file)
    building = place.with_name(f"{place.name}.partial-{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        write(building, chosen)
        files = sorted(path.relative_to(building) for path in building.rglob("*") if path.is_file())
        if not is_file:
            building.rename(place)
            return [place / path for path in files]
        data_files = [path for path in files if path.name != ABOUT]
        if len(data_files) != 1:
            raise InputError(
                f"{place} is one file, and there are {len(data_files)} to write "
                f"({', '.join(path.name for path in data_files[:4])}, …). Name a directory with "
                f"-o; {hint}"
            )
        (building / data_files[0]).rename(place)
        return [place]
    except (NotADirectoryError, FileExistsError):
        raise InputError(
            f"{place} cannot be created: something else is in its place. Choose another with -o."
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check(place: Path, chosen: str, is_file: bool) -> None:
    if chosen not in FORMATS:
        raise InputError(f"format {chosen!r} is not one of {', '.join(FORMATS)}.")
    if is_file and SUFFIXES[place.suffix] != chosen:
        raise InputError(
            f"{place} does not end like a file of the format {chosen}. Name a directory with -o."
        )
    if os.path.lexists(place) and not (
        place.is_dir() and not place.is_symlink() and not any(place.iterdir())
    ):
        raise InputError(
            f"{place} already exists, and nothing is overwritten. Choose another place with -o."
        )
    if chosen == "netcdf":
        needed_for_netcdf()
    if chosen == "parquet":
        optional_package("pyarrow", "Parquet")
    if chosen == "tensorboard":
        optional_package("tensorboard", "TensorBoard")


def _write_findings(
    run: Run, building: Path, chosen: str, losses: Sequence[str], findings: Sequence[str], say: Say
) -> None:
    about: dict[str, object] = {}
    said = set[str]()  # findings whose `--keep` note was printed; it is the same for every loss
    for loss, finding, call in choose(run, losses, findings, say):
        try:
            data: xr.Dataset = call()
        except InputError as error:
            if findings:
                raise
            say(f"{finding} of loss {loss!r} is skipped: {error}")
            continue
        beyond = str(data.attrs.get("beyond_keep", ""))
        if beyond and finding not in said:
            say(f"{finding}: {beyond}")
            said.add(finding)
        if left_out := left_out_of(data):
            say(f"{finding} of loss {loss!r}: {left_out}")
        place = building / run.manifest.losses[loss].key
        place.mkdir(exist_ok=True)
        _write_finding(data, finding, place, chosen, about, f"{place.name}/")
    _write_about(about, building)


def _write_finding(
    data: xr.Dataset, finding: str, place: Path, chosen: str, about: dict[str, object], prefix: str
) -> None:
    """Write one finding into the directory `place`, and the descriptions of its tables into
    `about`.
    """
    if chosen == "netcdf":
        write_netcdf(data, place / f"{finding}.nc")
        return
    listed = list(tables(data))
    names = file_names(finding, [dims for dims, _ in listed], f".{chosen}")
    for name, (dims, table) in zip(names, listed, strict=True):
        description = {**column_descriptions(data, [*map(str, table.columns)]), "axes": list(dims)}
        about[f"{prefix}{name}"] = description
        if chosen == "csv":
            write_csv(table, place / name)
        else:
            write_parquet(table, place / name, description)


def _write_about(about: dict[str, object], building: Path) -> None:
    if about:
        (building / ABOUT).write_text(json.dumps({"schema": 1, "files": about}, indent=1))
