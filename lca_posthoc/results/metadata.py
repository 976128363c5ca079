"""Derive the files of a loss that are no results from `run.json`, byte by byte: Zarr's metadata and
the coordinates.

They are written for readers without this package, which itself compares the files on disk with them
and never trusts those files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import google_crc32c
import numpy as np

from ..numerics.schema import CAUSES, TOTAL_FIELDS, histogram_edges
from .layout import ArrayPlan, plan_arrays
from .manifest import Manifest

FILE = "zarr.json"
_CHECKSUM: dict[str, object] = {"name": "crc32c"}


def group_file(attributes: dict[str, object] | None = None) -> bytes:
    """Return the `zarr.json` of a group."""
    return _json({"attributes": attributes or {}, "zarr_format": 3, "node_type": "group"})


def metadata_files(
    manifest: Manifest, loss: str, parts: Iterable[str] | None = None, keep: str | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield the path below the loss's group, and the bytes, of each file of its metadata and
    coordinates.

    Args:
        manifest: of the run.
        loss: its name.
        parts: only these ("steps", "allocation", …); by default all, and the loss's own group.
        keep: another level of `--keep` than the run's.
    """
    record, manifest = manifest.losses[loss], manifest.of(loss)
    plans = list(plan_arrays(manifest, keep or manifest.keep, record))
    if parts is None:
        yield FILE, group_file({"loss": loss})
    for part in dict.fromkeys(plan.part for plan in plans):
        if parts is None or part in parts:
            yield f"{part}/{FILE}", group_file(_attributes(manifest, part))
            for name, values in _coordinates(manifest, record.groups, part).items():
                yield from _coordinate(
                    f"{part}/{name}", "step" if name == "step_end" else name, values
                )
    for plan in plans:
        if parts is None or plan.part in parts:
            yield f"{plan.path}/{FILE}", _planned(plan)


def fits(path: str, data: bytes, expected: bytes, growing: bool) -> bool:
    """Tell whether a file has the expected bytes.

    Args:
        path: of the file.
        data: its bytes.
        expected: the bytes it should have.
        growing: whether the run may be growing, so that the file may have more segments but
            otherwise equal contents.
    """
    if data == expected or not growing:
        return data == expected
    if not path.endswith(FILE):
        return (
            path.split("/")[1] in ("step", "step_end")
            and data.startswith(expected[:-4])
            and _is_checked(data)
        )
    try:
        document, stored = json.loads(expected), json.loads(data)
        if stored["shape"][0] <= document["shape"][0]:
            return False
        document["shape"][0] = stored["shape"][0]
        if path.split("/")[1] in ("step", "step_end"):
            document["chunk_grid"] = _grid(stored["shape"])
        return bool(document == stored)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _is_checked(data: bytes) -> bool:
    return (
        len(data) % 8 == 4
        and int(google_crc32c.value(data[:-4])).to_bytes(4, "little") == data[-4:]
    )


def _json(document: dict[str, object]) -> bytes:
    return json.dumps(document, indent=2, allow_nan=False).encode()


def _attributes(manifest: Manifest, part: str) -> dict[str, object]:
    if part in ("tensors", "examples", "causes", "path"):
        specs = [tensor.spec for tensor in manifest.allocated]
        return {"tensor": [spec.name for spec in specs], "kind": [spec.kind for spec in specs]}
    return {"field": list(TOTAL_FIELDS[part][0])} if part in TOTAL_FIELDS else {}


def _coordinates(
    manifest: Manifest, groups: list[int] | list[str] | None, part: str
) -> dict[str, list[Any]]:
    """Return the labels along the axes: the training steps at the segments' starts and ends, the
    groups, the edges of the bins.
    """
    if part in TOTAL_FIELDS:
        return {}
    coordinates: dict[str, list[Any]] = {"step": manifest.steps}
    if part == "steps":
        coordinates["step_end"] = manifest.step_ends
    if groups is not None and part != "examples":
        coordinates["group"] = groups
    directions = manifest.settings.get("directions")
    if part == "along" and directions is not None and directions["labels"]:
        coordinates["direction"] = directions["labels"]
    if part == "causes":
        coordinates["cause"] = list(CAUSES)
    if part == "histogram":
        coordinates["edge"] = histogram_edges().tolist()
    return coordinates


def _coordinate(path: str, dimension: str, values: list[Any]) -> Iterator[tuple[str, bytes]]:
    """Yield an array along one axis in one chunk: its metadata and its bytes, which end in their
    CRC-32C.
    """
    codecs: list[dict[str, object]]
    if isinstance(values[0], str):
        encoded = [value.encode() for value in values]
        data = len(values).to_bytes(4, "little")
        data += b"".join(len(value).to_bytes(4, "little") + value for value in encoded)
        dtype, fill, codecs = "string", "", [{"name": "vlen-utf8", "configuration": {}}, _CHECKSUM]
    else:
        dtype, fill = ("int64", 0) if isinstance(values[0], int) else ("float64", 0.0)  # type: ignore[assignment]
        data = np.array(values, dtype).astype(f"<{dtype[0]}8").tobytes()
        codecs = [_little(8), _CHECKSUM]
    shape = [len(values)]
    yield f"{path}/{FILE}", _json(_array(shape, dtype, shape, fill, codecs, {}, [dimension]))
    yield f"{path}/c/0", data + int(google_crc32c.value(data)).to_bytes(4, "little")


def _planned(plan: ArrayPlan) -> bytes:
    size = np.dtype(plan.dtype).itemsize
    blosc = {"typesize": size, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
    codecs: list[dict[str, object]] = [
        _little(size),
        {"name": "blosc", "configuration": blosc},
        _CHECKSUM,
    ]
    fill = "NaN" if plan.fill != plan.fill else plan.fill
    shape, chunks = list(plan.shape), list(plan.chunks)
    return _json(_array(shape, plan.dtype, chunks, fill, codecs, plan.attributes, list(plan.dims)))


def _little(size: int) -> dict[str, object]:
    return (
        {"name": "bytes", "configuration": {"endian": "little"}} if size > 1 else {"name": "bytes"}
    )


def _grid(chunks: list[int]) -> dict[str, object]:
    return {"name": "regular", "configuration": {"chunk_shape": chunks}}


def _array(
    shape: list[int],
    dtype: str,
    chunks: list[int],
    fill: float | str,
    codecs: list[dict[str, object]],
    attributes: Mapping[str, object],
    dims: list[str],
) -> dict[str, object]:
    return {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": _grid(chunks),
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": attributes,
        "dimension_names": dims,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
