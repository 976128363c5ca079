"""Convert a finding to tables: one for each set of axes its variables have, with a row for every
place along them.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ..errors import optional_package
from ..results.keys import encode_all

RECORD = b"lca_posthoc"


def tables(data: xr.Dataset) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """Yield the tables of a finding, by their axes.

    Yields:
        The axes, and the table: a column for each axis (its labels, or numbers from 0), for each
        other label along the axes, and for each variable, with unchanged values.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, variable in data.data_vars.items():
        dims = tuple(str(dim) for dim in variable.dims)
        known = next((axes for axes in groups if set(axes) == set(dims)), dims)
        groups.setdefault(known, []).append(str(name))
    for dims, names in groups.items():
        sizes = {dim: data.sizes[dim] for dim in dims}
        columns = {
            dim: data[dim].variable if dim in data.variables else _numbers(dim, sizes[dim])
            for dim in dims
        }
        labels = [
            str(name)
            for name, column in data.coords.items()
            if column.dims and set(map(str, column.dims)) <= set(dims)
        ]
        columns |= {name: data[name].variable for name in (*labels, *names)}
        yield dims, pd.DataFrame({name: _column(column, sizes) for name, column in columns.items()})


def _numbers(dim: str, size: int) -> xr.Variable:
    return xr.Variable((dim,), np.arange(size))


def _column(variable: xr.Variable, sizes: dict[str, int]) -> np.ndarray[Any, Any]:
    """Return the values, one for every row."""
    order = sorted(variable.dims, key=list(sizes).index)  # type: ignore[arg-type]
    shape = [size if dim in order else 1 for dim, size in sizes.items()]
    values = np.broadcast_to(
        variable.transpose(*order).values.reshape(shape), tuple(sizes.values())
    ).reshape(-1)
    return (
        np.array([whole(str(text)) for text in values], dtype=object)
        if values.dtype.kind in "OU"
        else values
    )


def whole(text: str) -> str:
    """Return a text that UTF-8 can encode: lone surrogates, which Python allows, become their
    numbers.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def file_names(finding: str, axes: list[tuple[str, ...]], suffix: str) -> list[str]:
    """Return the names of the files: the finding's, with the axes if it has several tables.

    Args:
        finding: its name.
        axes: of each table.
        suffix: of the files, such as ".csv".
    """
    if len(axes) < 2:
        return [f"{finding}{suffix}" for _ in axes]
    keys = encode_all("_".join((finding, *dims)) for dims in axes)
    return [f"{key}{suffix}" for key in keys.values()]


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table as UTF-8: lines end in a newline, texts are quoted, numbers have all digits
    they need, `nan` and `inf` stay.

    Names are written unchanged, even if they begin with = or @: a table is data, and quotes mark
    text.

    Args:
        table: to write.
        path: of the file.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(
            zip(*(_plain(table[name].to_numpy()) for name in table.columns), strict=True)
        )


def _plain(values: np.ndarray[Any, Any]) -> Iterable[Any]:
    """Return numbers that `csv` writes with the fewest digits that distinguish them within their
    type.
    """
    return values if values.dtype == np.float32 else values.tolist()


def write_parquet(table: pd.DataFrame, path: Path, attributes: Mapping[str, object]) -> None:
    """Write a table as Parquet, with its types.

    Args:
        table: to write.
        path: of the file.
        attributes: of the finding and its columns, stored as JSON in the file's metadata.

    Raises:
        ResourceError: if pyarrow is not installed.
    """
    pyarrow = optional_package("pyarrow", "Parquet")
    converted = pyarrow.Table.from_pandas(table, preserve_index=False)
    metadata = {**(converted.schema.metadata or {}), RECORD: json.dumps(attributes).encode()}
    importlib.import_module("pyarrow.parquet").write_table(
        converted.replace_schema_metadata(metadata), path
    )


def column_descriptions(data: xr.Dataset, names: Sequence[str]) -> dict[str, object]:
    """Return the attributes of a finding and of a table's columns, as plain JSON.

    Args:
        data: a finding.
        names: of the columns.
    """
    known = {name: data[name].variable for name in names if name in data.variables}
    columns = {
        name: {"type": _type(column.dtype), **column.attrs} for name, column in known.items()
    }
    document: dict[str, object] = json.loads(
        json.dumps({**data.attrs, "columns": columns}, default=_as_list)
    )
    return document


def _type(dtype: np.dtype[Any]) -> str:
    return "text" if dtype.kind in "OU" else dtype.name


def _as_list(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
