"""Write a finding as a NetCDF 4 file and read it back, with every number, name, type and attribute.

NetCDF does not allow every name, text or attribute. Where one does not fit, the file has the
nearest that does, and its attribute `lca_posthoc`, JSON, records the original.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import xarray as xr

from ..base.text import is_storable
from ..errors import InputError, optional_package
from ..results.keys import encode_all

RECORD = "lca_posthoc"
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LONGEST = 120
_ENGINE: Literal["h5netcdf"] = "h5netcdf"


class _Record(TypedDict):
    """The originals of what NetCDF does not allow: names, attributes and types by variable, and
    escaped texts.
    """

    names: dict[str, str]
    attributes: dict[str, dict[str, object]]
    types: dict[str, str]
    escaped: list[str]
    coordinates: list[str]


def needed_for_netcdf() -> None:
    """Import the packages that NetCDF needs.

    Raises:
        ResourceError: if one is not installed.
    """
    for package in ("h5netcdf", "h5py"):
        optional_package(package, "NetCDF")


def write_netcdf(data: xr.Dataset, path: Path) -> None:
    """Write a finding as a NetCDF file.

    Args:
        data: a finding.
        path: of the file.
    """
    names = _names(data)
    record: _Record = {
        "names": {key: name for name, key in names.items() if name != key},
        "attributes": {"": _odd(data.attrs)},
        "types": {},
        "escaped": [],
        "coordinates": [names[str(name)] for name in data.coords],
    }
    variables: dict[str, xr.Variable] = {}
    for name, variable in data.variables.items():
        key, stored = names[str(name)], _stored(variable)
        record["types"][key] = _type(variable.dtype)
        record["attributes"][key] = _odd(variable.attrs)
        attributes = _fitting(variable.attrs)
        if key != name:
            attributes["real_name"] = str(name) if is_storable(str(name)) else _escape(str(name))
        dims = [names[str(dim)] for dim in variable.dims]
        if stored.dtype.kind == "U" and not all(is_storable(text) for text in stored.ravel()):
            record["escaped"].append(key)
            stored = np.array([_escape(text) for text in stored.ravel()]).reshape(stored.shape)
        variables[key] = xr.Variable(dims, stored, attributes)
    coords = {key: variables.pop(key) for key in record["coordinates"] if key in variables}
    attributes = {**_fitting(data.attrs), RECORD: json.dumps(record)}
    written = xr.Dataset(variables, coords, attributes)
    encoding = {key: {"_FillValue": None} for key in written.variables}
    written.to_netcdf(path, engine=_ENGINE, encoding=encoding)


def read_netcdf(path: str | Path) -> xr.Dataset:
    """Read a finding that `lca export` wrote, with its own names, types and attributes.

    Raises:
        InputError: for a file that `lca export` did not write.
        ResourceError: if h5netcdf is not installed.
    """
    needed_for_netcdf()
    with xr.open_dataset(path, engine=_ENGINE, decode_times=False, mask_and_scale=False) as opened:
        read = opened.load()
    try:
        record: _Record = json.loads(read.attrs.pop(RECORD))
        names = record["names"]
        variables = {
            str(key): _restored(variable, str(key), record)
            for key, variable in read.variables.items()
        }
        restored = {
            names.get(key, key): _renamed(variable, names) for key, variable in variables.items()
        }
        coords = {names.get(key, key) for key in record["coordinates"]}
        attributes = _restored_attributes(read.attrs, record, "")
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path} is not a file that `lca export` wrote: its record is missing or damaged."
        ) from None
    return xr.Dataset(
        {name: variable for name, variable in restored.items() if name not in coords},
        {name: variable for name, variable in restored.items() if name in coords},
        attributes,
    )


def _names(data: xr.Dataset) -> dict[str, str]:
    """Return the name in the file of each variable and axis: its own where every NetCDF allows it."""
    keys = {str(name): str(name) for name in (*data.variables, *data.dims)}
    odd = list(filter(_is_odd, keys))
    in_use = set(keys) - set(odd)
    for name, key in encode_all(odd, in_use).items():
        candidate = key if _PLAIN.fullmatch(key[:1]) else f"_{key}"
        while candidate in in_use:
            candidate = f"_{candidate}"
        in_use.add(candidate)
        keys[name] = candidate
    return keys


def _is_odd(name: str) -> bool:
    """Tell whether some NetCDF does not allow a name."""
    return not _PLAIN.fullmatch(name) or len(name) > _LONGEST


def _stored(variable: xr.Variable) -> np.ndarray[Any, Any]:
    """Return the values, with texts in numpy's own type."""
    values = np.asarray(variable.values)
    if not _is_text(values.dtype):
        return values
    return np.array([str(value) for value in values.ravel()], dtype=str).reshape(values.shape)


def _is_text(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "OU"


def _restored(variable: xr.Variable, key: str, record: _Record) -> xr.Variable:
    values, attributes = np.asarray(variable.values), dict(variable.attrs)
    if _is_text(values.dtype):
        texts = [str(text) for text in values.ravel()]
        texts = [json.loads(f'"{text}"') for text in texts] if key in record["escaped"] else texts
        values = np.array(texts, dtype=object).reshape(values.shape)
    values = values.astype(_dtype(record["types"][key]))
    return xr.Variable(variable.dims, values, _restored_attributes(attributes, record, key))


def _renamed(variable: xr.Variable, names: Mapping[str, str]) -> xr.Variable:
    return xr.Variable(
        [names.get(str(dim), dim) for dim in variable.dims], variable.values, variable.attrs
    )


def _type(dtype: np.dtype[Any]) -> str:
    return "text" if _is_text(dtype) else dtype.name


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(object if name == "text" else name)


def _escape(text: str) -> str:
    return json.dumps(text)[1:-1]


def _is_fitting(name: object, value: object) -> bool:
    """Tell whether every NetCDF stores an attribute unchanged."""
    if _is_odd(str(name)):
        return False
    if isinstance(value, str):
        return bool(value) and is_storable(value)
    return type(value) is float


def _fitting(attributes: Mapping[Hashable, object]) -> dict[str, object]:
    """Return attributes that other programs can read; those that do not fit become text, and `_odd`
    returns their values.
    """
    fitting = {}
    for name, value in attributes.items():
        if _is_fitting(name, value) or (
            type(value) is int and abs(value) < 2**31 and not _is_odd(str(name))
        ):
            fitting[str(name)] = value
        elif value != "" and not _is_odd(str(name)):
            fitting[str(name)] = json.dumps(value, default=_as_list)
    return fitting


def _odd(attributes: Mapping[Hashable, object]) -> dict[str, object]:
    """Return the attributes that do not fit, as plain JSON."""
    return {
        str(name): json.loads(json.dumps(value, default=_as_list))
        for name, value in attributes.items()
        if not _is_fitting(name, value)
    }


def _restored_attributes(
    attributes: Mapping[str, object], record: _Record, key: str
) -> dict[str, object]:
    recorded = record["attributes"][key]
    restored = {
        name: float(value) if isinstance(value, np.floating) else value
        for name, value in attributes.items()
        if name not in recorded and not (name == "real_name" and key in record["names"])
    }
    return {**restored, **recorded}


def _as_list(value: object) -> object:
    """Convert arrays and numpy's numbers to JSON, anything else to text."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return str(value)
