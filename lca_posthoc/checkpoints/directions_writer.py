"""Write a file of directions block by block; it gets its final name when it is complete."""

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
    """Write directions in float32; elements that are never written are 0.

    Args:
        file: empty file, open for reading and writing.
        shapes: name → shape of each tensor.
        directions: k, the number of directions.
        about: metadata of the file.
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
        """Write the elements of a block in some directions.

        Args:
            block: pieces of tensors, in the order of the columns of `values`.
            directions: indices of the directions.
            values: the elements, (directions, elements).
        """
        column = 0
        for piece in block:
            part = values[:, column : column + piece.width].astype("<f4")
            for row, direction in enumerate(directions):
                self._file.seek(self._place(piece, direction))
                self._file.write(part[row].tobytes())
            column += piece.width

    def read(self, block: Sequence[Piece], directions: range) -> Matrix:
        """Read back what was written.

        Args:
            block: pieces of tensors.
            directions: indices of the directions.

        Returns:
            The elements, (directions, elements).
        """
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
            blocks: returns, on each call, the blocks that cover all their nonzero elements.
            directions: indices of the directions.

        Raises:
            InputError: if a direction is 0 or a combination of those before it.
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
    """Return the bytes of the header, the offset of each tensor's data, and the size of the file."""
    entries: dict[str, object] = {"__metadata__": {METADATA_KEY: _metadata(about)}}
    begins, position = {}, 0
    for name, shape in shapes.items():
        begins[name] = position
        position += directions * math.prod(shape) * _ITEM
        ends = [begins[name], position]
        entries[name] = {"dtype": "F32", "shape": [directions, *shape], "data_offsets": ends}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensors to multiples of eight bytes
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
    """Open a new file under a temporary name; rename it when the context succeeds, else remove it.

    Raises:
        InputError: if a file of that name already exists, or the file cannot be created.
        ResourceError: if the disk is full.
    """
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        # left by a killed process with the same id; containers reuse ids
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
    """Raise an error if something already exists at a path.

    Raises:
        InputError: if it does.
    """
    if os.path.lexists(place):
        raise InputError(
            f"{place} already exists, and nothing is overwritten. Choose another place with -o."
        )


def refuse_too_large(place: Path, size: int) -> None:
    """Raise an error if the file system lacks the space for a file.

    Args:
        place: path of the file.
        size: size of the file in bytes.

    Raises:
        ResourceError: if fewer bytes are free.
    """
    free = shutil.disk_usage(nearest(place.absolute().parent)).free
    if size > free:
        raise ResourceError(
            f"{place} takes {amount(size)}, and {amount(free)} are free there. Free some, ask for "
            "fewer directions, or choose another place with -o."
        )
