"""A finding as tables: one for each set of axes its variables have, a row for every place along them."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ..errors import needed
from ..store.keys import encode_all

RECORD = b"lca_posthoc"


def tables(data: xr.Dataset) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """The tables of a result, by their axes.

    Yields:
        The axes, and the table: a column for each axis (its labels, or numbers from 0), for what else labels them, and for each
        variable, all as they are.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, variable in data.data_vars.items():
        dims = tuple(str(dim) for dim in variable.dims)
        known = next((each for each in groups if set(each) == set(dims)), dims)
        groups.setdefault(known, []).append(str(name))
    for dims, names in groups.items():
        sizes = {dim: data.sizes[dim] for dim in dims}
        columns = {dim: data[dim].variable if dim in data.variables else _numbers(dim, sizes[dim]) for dim in dims}
        labels = [
            str(name) for name, each in data.coords.items() if each.dims and set(map(str, each.dims)) <= set(dims)
        ]
        columns |= {name: data[name].variable for name in (*labels, *names)}
        yield dims, pd.DataFrame({name: _column(each, sizes) for name, each in columns.items()})


def _numbers(dim: str, size: int) -> xr.Variable:
    return xr.Variable((dim,), np.arange(size))


def _column(variable: xr.Variable, sizes: dict[str, int]) -> np.ndarray[Any, Any]:
    """The values, once for every row."""
    order = sorted(variable.dims, key=list(sizes).index)  # type: ignore[arg-type]
    shape = [size if dim in order else 1 for dim, size in sizes.items()]
    values = np.broadcast_to(variable.transpose(*order).values.reshape(shape), tuple(sizes.values())).reshape(-1)
    return np.array([whole(str(text)) for text in values], dtype=object) if values.dtype.kind in "OU" else values


def whole(text: str) -> str:
    """A text that can be written as UTF-8: half a character, which Python allows, becomes its number."""
    return text.encode("utf-8", "backslashreplace").decode()


def file_names(finding: str, found: list[tuple[str, ...]], suffix: str) -> list[str]:
    """Names of the files: that of the finding, with the axes where it has several tables."""
    if len(found) < 2:
        return [f"{finding}{suffix}" for _ in found]
    keys = encode_all("_".join((finding, *dims)) for dims in found)
    return [f"{key}{suffix}" for key in keys.values()]


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """UTF-8, lines that end in a newline, texts in quotes; numbers without, with every digit they need, `nan` and `inf` as such.

    Names are written as they are, also those that begin with = or @: a table is data, and quotes say that it is text.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(zip(*(_plain(table[name].to_numpy()) for name in table.columns), strict=True))


def _plain(values: np.ndarray[Any, Any]) -> Iterable[Any]:
    """Numbers that are written with as few digits as tell them from their neighbours of the same type."""
    return values if values.dtype == np.float32 else values.tolist()


def write_parquet(table: pd.DataFrame, path: Path, attributes: dict[str, Any]) -> None:
    """Types as they are; what the finding says of itself and of its columns is JSON in the file's metadata.

    Raises:
        ResourceError: where pyarrow is not installed.
    """
    pyarrow = needed("pyarrow", "Parquet")
    made = pyarrow.Table.from_pandas(table, preserve_index=False)
    kept = {**(made.schema.metadata or {}), RECORD: json.dumps(attributes).encode()}
    importlib.import_module("pyarrow.parquet").write_table(made.replace_schema_metadata(kept), path)


def described(data: xr.Dataset, names: Sequence[str]) -> dict[str, Any]:
    """What a finding says of itself and of the columns of a table, as plain as JSON."""
    known = {name: data[name].variable for name in names if name in data.variables}
    columns = {name: {"type": _type(each.dtype), **each.attrs} for name, each in known.items()}
    found: dict[str, Any] = json.loads(json.dumps({**data.attrs, "columns": columns}, default=_as_list))
    return found


def _type(dtype: np.dtype[Any]) -> str:
    return "text" if dtype.kind in "OU" else dtype.name


def _as_list(value: object) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
