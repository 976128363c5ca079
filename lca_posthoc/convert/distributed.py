"""Read a directory that torch.distributed.checkpoint wrote: join its tensors from the shards of all
ranks, and read its plain data.

The directory's `.metadata` is a pickle. It is unpickled with stand-ins for the few classes that it
may name; a stand-in only stores what it is given. Any other name is rejected, and no function is
called. Every item of the shards was written by torch.save, and is read like other such files.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..checkpoints.headers import MAX_TENSORS
from ..errors import InputError
from .standins import compare_checksums, unpickled

METADATA = ".metadata"
_LARGEST = 2**29  # bytes of the table of contents
_OF_ACCELERATE = re.compile(r"pytorch_model_fsdp_(\d+)")
_OPTIMIZER = re.compile(r"optim", re.IGNORECASE)
_KEPT = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.(Metadata|TensorStorageMetadata|TensorProperties"
    r"|ChunkStorageMetadata|BytesStorageMetadata|MetadataIndex|StorageMeta|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
    r"|pathlib\.(_local\.)?\w*Path|torch\.serialization\._get_layout|uuid\.UUID"
)
_PLAIN = {"collections.OrderedDict": OrderedDict, "torch.Size": tuple}


class _Kept:
    """Stand in for a class: store the arguments and the state that a pickle provides."""

    def __new__(cls, *arguments: object) -> _Kept:
        """Store the arguments for the class it stands for."""
        self = super().__new__(cls)
        self.state = arguments
        return self

    state: Any

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Contents(pickle.Unpickler):
    """Unpickle a table of contents with stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a class.

        Args:
            module: module that the pickle names.
            name: class that the pickle names.

        Raises:
            pickle.UnpicklingError: if a table of contents should not name it.
        """
        full = f"{module}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if _KEPT.fullmatch(full):
            return type(name, (_Kept,), {})
        raise pickle.UnpicklingError(full)


@dataclass(frozen=True)
class _Piece:
    """Locate an item, or a part of a tensor, in one file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class _Item:
    """Describe an entry of the checkpoint.

    Attributes:
        path: keys that lead to it.
        dtype: type of a tensor; None for plain data.
        shape: shape of a tensor.
        pieces: start of a piece within the tensor → its sizes and its place.
    """

    path: tuple[str | int, ...]
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    pieces: dict[tuple[int, ...], tuple[tuple[int, ...], _Piece]]


def is_distributed(folder: Path) -> bool:
    """Return whether a directory is one checkpoint of torch.distributed.checkpoint."""
    return (folder / METADATA).is_file()


def read_distributed(folder: Path, look: bool) -> tuple[dict[str, object], list[str]]:
    """Read the contents of a directory, nested as they were saved.

    Args:
        folder: directory of one checkpoint.
        look: whether tensors of more than one number need no values, and optimisers no tensors at
            all.

    Returns:
        The entries, and notes on what was skipped.

    Raises:
        InputError: if the checkpoint is damaged, or holds more than tensors and plain data.
    """
    saved, notes = _nested(folder, look)
    of_accelerate = _OF_ACCELERATE.fullmatch(folder.name)
    beside = folder.parent / f"optimizer_{of_accelerate[1]}" if of_accelerate else None
    if beside is not None and is_distributed(beside):
        more, more_notes = _nested(beside, look)
        saved |= more
        notes += more_notes
    return saved, notes


def files_of(folder: Path) -> list[Path]:
    """Return the files of a checkpoint, including those of accelerate's optimiser beside it."""
    of_accelerate = _OF_ACCELERATE.fullmatch(folder.name)
    folders = [
        folder,
        *([folder.parent / f"optimizer_{of_accelerate[1]}"] if of_accelerate else []),
    ]
    return [file for place in folders for file in sorted(place.glob("*")) if file.is_file()]


def _nested(folder: Path, look: bool) -> tuple[dict[str, object], list[str]]:
    root: dict[str, object] = {}
    notes: dict[str, None] = {}
    with _Files(folder) as files:
        for item in _items(folder):
            is_skipped = look and len(item.path) > 1 and bool(_OPTIMIZER.search(str(item.path[0])))
            if item.dtype is None and is_skipped:
                value: object = None
            elif look and prod(item.shape) != 1 and item.dtype is not None:
                value = torch.empty((), dtype=item.dtype).expand(item.shape)
            elif item.dtype is not None:
                value = _whole(item, item.dtype, files)
            else:
                ((_, piece),) = item.pieces.values()
                value, more = files.item(piece)
                notes |= dict.fromkeys(more)
            _put(root, item.path, value)
    return {key: _with_lists(value) for key, value in root.items()}, [*notes]


def _put(root: dict[str, object], path: Sequence[str | int], value: object) -> None:
    """Insert a value into nested dictionaries; lists are dictionaries with integer keys until
    `_with_lists`.

    Raises:
        InputError: if the path leads into another value.
    """
    level: Any = root
    for key in path[:-1]:
        level = level.setdefault(key, {})
        if not isinstance(level, dict):
            raise InputError(f"the entry {'.'.join(map(str, path))!r} lies inside another value")
    level[path[-1]] = value


def _with_lists(value: object) -> object:
    """Replace nested dictionaries with keys 0, 1, 2, … by lists."""
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(entry) for key, entry in value.items()}
    if inner and set(inner) == {*range(len(inner))}:
        return [inner[number] for number in range(len(inner))]
    return inner


class _Files:
    """Open the shards of a directory, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def item(self, piece: _Piece) -> tuple[object, list[str]]:
        """Read what torch.save wrote at a place, after comparing checksums.

        Raises:
            InputError: if the file is missing or damaged.
        """
        path = self._folder / piece.file
        if Path(piece.file).name != piece.file or not path.is_file():
            raise InputError(
                f"{self._folder / METADATA} names {piece.file[:80]!r}, which is not there. Copy "
                "the checkpoint again, or move it away."
            )
        if piece.file not in self._open:
            self._open[piece.file] = path.open("rb")
        file = self._open[piece.file]
        file.seek(piece.offset)
        data = BytesIO(file.read(piece.length))
        if len(data.getbuffer()) != piece.length:
            raise InputError(f"{path} ends early. Copy it again, or move its checkpoint away.")
        compare_checksums(path, data)
        data.seek(0)
        return unpickled(path, data)


def _whole(item: _Item, dtype: torch.dtype, files: _Files) -> torch.Tensor:
    """Join a tensor from its parts.

    Raises:
        InputError: if they do not cover it.
    """
    name = ".".join(map(str, item.path))
    if len(item.pieces) == 1:
        ((_, piece),) = item.pieces.values()
        return _part(name, item.shape, dtype, piece, files)
    whole, covered = torch.empty(item.shape, dtype=dtype), 0
    for start, (sizes, piece) in item.pieces.items():
        place = tuple(slice(begin, begin + size) for begin, size in zip(start, sizes, strict=True))
        whole[place] = _part(name, sizes, dtype, piece, files)
        covered += prod(sizes)
    if covered != whole.numel():
        raise InputError(f"the parts of {name!r} do not cover it: the checkpoint is incomplete")
    return whole


def _part(
    name: str, sizes: tuple[int, ...], dtype: torch.dtype, piece: _Piece, files: _Files
) -> torch.Tensor:
    value, _ = files.item(piece)
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != sizes or value.dtype != dtype:
        raise InputError(f"a part of {name!r} differs from what the table of contents states")
    return value


# --- the table of contents --------------------------------------------------------------------------


def _items(folder: Path) -> Iterator[_Item]:
    """Yield the entries in a directory's table of contents.

    Raises:
        InputError: if it is damaged, or not such a table.
    """
    file = folder / METADATA
    if file.stat().st_size > _LARGEST:
        raise InputError(f"{file} is too large for a table of contents.")
    try:
        with file.open("rb") as opened:
            table = _Contents(opened).load()
        yield from _listed(table.state)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} names {str(error)[:120]}, which is not part of torch.distributed.checkpoint's "
            "table of contents, and is not read: that could run any code."
        ) from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{file} is not a table of contents of torch.distributed.checkpoint "
            f"({type(error).__name__}). Copy the checkpoint again, or move it away."
        ) from None


def _listed(table: Mapping[str, Any]) -> Iterator[_Item]:
    entries, paths = table["state_dict_metadata"], table["planner_data"] or {}
    if len(entries) > 10 * MAX_TENSORS:
        raise InputError(
            f"a table of contents lists {len(entries):,} entries, more than any series."
        )
    pieces: dict[tuple[str, tuple[int, ...] | None], _Piece] = {}
    for index, stored in table["storage_data"].items():
        where = index.state.get("offset")
        pieces[index.state["fqn"], None if where is None else tuple(where)] = _piece(stored.state)
    for name, entry in entries.items():
        path = paths.get(name, (name,))
        if not all(isinstance(key, str | int) for key in path):
            raise ValueError("a path of other keys than names and numbers")
        if type(entry).__name__ == "BytesStorageMetadata":
            yield _Item(path=path, dtype=None, shape=(), pieces={(): ((), pieces[name, None])})
            continue
        state = entry.state
        chunks = [
            (tuple(part.state["offsets"]), tuple(part.state["sizes"])) for part in state["chunks"]
        ]
        yield _Item(
            path=path,
            dtype=_dtype_of(state["properties"].state),
            shape=tuple(state["size"]),
            pieces={start: (sizes, pieces[name, start]) for start, sizes in chunks},
        )


def _dtype_of(properties: Any) -> torch.dtype:
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor without a type of numbers")
    return dtype


def _piece(stored: Mapping[str, Any]) -> _Piece:
    if stored.get("transform_descriptors"):
        raise InputError(
            "items of the checkpoint are compressed by an extension of "
            "torch.distributed.checkpoint, which is not supported. Save it without."
        )
    return _Piece(str(stored["relative_path"]), int(stored["offset"]), int(stored["length"]))
