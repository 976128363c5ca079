"""Write a file of directions a block at a time: it has its name once it is whole."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..errors import InputError, ResourceError, amount
from .directions_file import METADATA_KEY, DirectionsAbout, mixed, orthonormal_factors
from .displacements import Matrix, Piece
from .paths import nearest

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ITEM = np.dtype("<f4").itemsize


class DirectionsWriter:
    """A file of directions in float32 that is being written; what is not written is 0.

    Args:
        file: open for reading and writing, empty.
        shapes: of the tensors.
        directions: k.
        about: the file's metadata.
    """

    def __init__(
        self,
        file: BinaryIO,
        shapes: Mapping[str, tuple[int, ...]],
        directions: int,
        about: DirectionsAbout,
    ) -> None:
        self._file = file
        self._elements = {name: math.prod(shape) for name, shape in shapes.items()}
        header, self._starts, size = _layout(shapes, directions, about)
        file.write(header)
        file.flush()
        file.truncate(size)

    def write(self, block: Sequence[Piece], directions: range, values: Matrix) -> None:
        """Write the elements of a block in some directions: (directions, elements)."""
        column = 0
        for piece in block:
            part = values[:, column : column + piece.width].astype("<f4")
            for row, direction in enumerate(directions):
                self._file.seek(self._place(piece, direction))
                self._file.write(part[row].tobytes())
            column += piece.width

    def read(self, block: Sequence[Piece], directions: range) -> Matrix:
        """Return what was written: (directions, elements)."""
        self._file.flush()
        rows = [
            np.concatenate(
                [
                    np.frombuffer(
                        os.pread(
                            self._file.fileno(), piece.width * _ITEM, self._place(piece, direction)
                        ),
                        "<f4",
                    )
                    for piece in block
                ]
            )
            for direction in directions
        ]
        return np.stack(rows).astype(np.float64)

    def orthonormalise(
        self, blocks: Callable[[], Iterable[Sequence[Piece]]], directions: range
    ) -> None:
        """Make some directions orthonormal in place.

        Args:
            blocks: returns, each time it is called, the blocks outside of which they are 0.
            directions: their numbers.

        Raises:
            InputError: where one is a combination of those before it.
        """

        def parts() -> Iterator[torch.Tensor]:
            for block in blocks():
                yield torch.from_numpy(self.read(block, directions))

        factors = orthonormal_factors(parts, directions)
        for block in blocks():
            rows = torch.from_numpy(self.read(block, directions))
            self.write(block, directions, mixed(factors, rows).numpy())

    def _place(self, piece: Piece, direction: int) -> int:
        elements = self._elements[piece.name]
        return self._starts[piece.name] + (direction * elements + piece.start) * _ITEM


def _layout(
    shapes: Mapping[str, tuple[int, ...]], directions: int, about: DirectionsAbout
) -> tuple[bytes, dict[str, int], int]:
    """Return the beginning of the file, where each tensor's bytes begin, and the file's size."""
    entries: dict[str, object] = {"__metadata__": {METADATA_KEY: _metadata(about)}}
    begins, position = {}, 0
    for name, shape in shapes.items():
        begins[name] = position
        position += directions * math.prod(shape) * _ITEM
        ends = [begins[name], position]
        entries[name] = {"dtype": "F32", "shape": [directions, *shape], "data_offsets": ends}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight, as the format asks
    start = 8 + len(text)
    return (
        len(text).to_bytes(8, "little") + text,
        {name: start + begin for name, begin in begins.items()},
        start + position,
    )


def _metadata(about: DirectionsAbout) -> str:
    entries = {"kind": about.kind, "seed": about.seed}
    lists = {"labels": about.labels, "singular_values": about.singular_values}
    return json.dumps(
        {name: value for name, value in entries.items() if value is not None}
        | {name: list(values) for name, values in lists.items() if values}
    )


@contextmanager
def writing(place: Path) -> Iterator[BinaryIO]:
    """Open a new file under a temporary name; it gets its own when the context ends well, and is
    removed when it does not.

    Raises:
        InputError: where something has the name already, or the file cannot be made.
        ResourceError: where the disk is full.
    """
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        # of a process that was killed and had the same number, as those in containers do
        temporary.unlink(missing_ok=True)
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        refuse_existing(place)
        temporary.replace(place)
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(f"{place} cannot be written: no space left.") from error
        raise InputError(
            f"{place} cannot be written: {error.strerror or error}. Choose another place with -o."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(place: Path) -> None:
    """Refuse a place where something is already."""
    if os.path.lexists(place):
        raise InputError(
            f"{place} is there already, and nothing is written over. Choose another place with -o."
        )


def refuse_too_large(place: Path, size: int) -> None:
    """Refuse to write a file of so many bytes where they are not free."""
    free = shutil.disk_usage(nearest(place.absolute().parent)).free
    if size > free:
        raise ResourceError(
            f"{place} takes {amount(size)}, and {amount(free)} are free there. Free some, ask for "
            "fewer directions, or choose another place with -o."
        )
