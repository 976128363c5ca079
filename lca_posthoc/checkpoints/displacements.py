"""Read the displacements of a trajectory, θ_{t+1} − θ_t, for some parameters and some segments at a
time.

Memory holds one block, however large the model is and however long the training was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .headers import TensorHeader, fingerprint, joined, tensor_places
from .reading import DTYPES, read_place
from .trajectory import Checkpoint, Trajectory

Matrix = NDArray[np.float64]

_BLOCK_BYTES = 2**27  # of one block; memory holds two at a time
_OF_NUMPY = frozenset({"F16", "F32", "F64"})
_FEWEST_COLUMNS = 2**14  # shorter reads would spend most of their time on disk latency


@dataclass(frozen=True)
class Piece:
    """Name a range of consecutive elements of a flattened tensor."""

    name: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Return the number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class BlockSize:
    """Limit the number of rows (segments) and columns (parameters) read at a time."""

    rows: int
    columns: int


def block_size(segments: int, directions: int) -> BlockSize:
    """Choose the size of a block: all segments if enough columns fit, else fewer segments.

    With fewer, the caller has to pair blocks of rows.

    >>> block_size(100, 10), block_size(10_000, 10)
    (BlockSize(rows=100, columns=167772), BlockSize(rows=1024, columns=16384))

    Args:
        segments: number of segments of the trajectory.
        directions: number of directions computed on each block; they must fit as well.
    """
    columns = max(_FEWEST_COLUMNS, _BLOCK_BYTES // 8 // max(segments, directions))
    return BlockSize(min(segments, _BLOCK_BYTES // 8 // columns), columns)


@dataclass(frozen=True)
class _StoredFile:
    """Hold the data offsets of a checkpoint file, and an identity that reveals whether the file
    changed.
    """

    path: Path
    identity: tuple[int, int, int]
    places: dict[str, int]


class Displacements:
    """Compute the rows θ_{t+1} − θ_t of a trajectory in float64, one for each segment.

    Args:
        trajectory: a trajectory of checkpoints on a file system.
        size: size of the blocks.

    Raises:
        InputError: if a file changed since the trajectory was opened.
    """

    def __init__(self, trajectory: Trajectory, size: BlockSize) -> None:
        self._trajectory = trajectory
        self._starts = trajectory.starts
        self.segments = len(self._starts)
        self.size = size
        layouts: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}
        self._files = [_stored_files(checkpoint, layouts) for checkpoint in trajectory.checkpoints]

    def elements(self, name: str) -> int:
        """Return the number of elements of a tensor."""
        return int(np.prod(self._trajectory.tensors[name].shape, dtype=np.int64))

    def row_blocks(self) -> list[slice]:
        """Return the segments, in order, as slices of at most `size.rows`."""
        return [
            slice(start, min(start + self.size.rows, self.segments))
            for start in range(0, self.segments, self.size.rows)
        ]

    def blocks(self, names: Sequence[str]) -> Iterator[tuple[Piece, ...]]:
        """Yield the elements of some tensors, in order, in blocks of at most `size.columns`; small
        tensors share a block.
        """
        pieces: list[Piece] = []
        room = self.size.columns
        for name in names:
            start, elements = 0, self.elements(name)
            while start < elements:
                stop = min(elements, start + room)
                pieces.append(Piece(name, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    yield tuple(pieces)
                    pieces, room = [], self.size.columns
        if pieces:
            yield tuple(pieces)

    def rows(self, block: Sequence[Piece], segments: slice) -> Matrix:
        """Compute the displacements of a block's elements on some segments.

        Args:
            block: pieces of tensors.
            segments: slice of segment indices.

        Returns:
            One row for each segment, (segments, elements).

        Raises:
            InputError: if a number is not finite, or a file changed meanwhile.
        """
        moved = np.empty((segments.stop - segments.start, sum(piece.width for piece in block)))
        position, after = -1, np.empty(0)
        for row, start in enumerate(self._starts[segments]):
            before = after if start == position else self.values(block, start)
            position, after = start + 1, self.values(block, start + 1)
            np.subtract(after, before, out=moved[row])
        return moved

    def values(self, block: Sequence[Piece], index: int) -> NDArray[np.float64]:
        """Read the elements of a block in one checkpoint.

        Args:
            block: pieces of tensors.
            index: position of the checkpoint in the trajectory.

        Returns:
            Finite numbers, (elements,).

        Raises:
            InputError: if a number is not finite, or a file changed meanwhile.
        """
        checkpoint = self._trajectory.checkpoints[index]
        parts: dict[Piece, NDArray[np.float64]] = {}
        for stored in self._files[index]:
            pieces = [piece for piece in block if self._source(piece) in stored.places]
            if pieces:
                parts |= self._read(stored, pieces, checkpoint.step)
        values = np.concatenate([parts[piece] for piece in block])
        if not np.isfinite(values).all():
            bad = next(piece.name for piece in block if not np.isfinite(parts[piece]).all())
            raise InputError(
                f"tensor {bad!r} holds NaN or Inf in {checkpoint.files[0]} (step "
                f"{checkpoint.step}). Leave the checkpoint out with --steps, or the tensor with "
                "--rename."
            )
        return values

    def _source(self, piece: Piece) -> str:
        return self._trajectory.sources[piece.name]

    def _read(
        self, stored: _StoredFile, pieces: Sequence[Piece], step: int
    ) -> dict[Piece, NDArray[np.float64]]:
        """Read the pieces that one file holds.

        Raises:
            InputError: if the file changed or cannot be read.
        """
        try:
            with stored.path.open("rb") as file:
                if _identity(file.fileno()) != stored.identity:
                    raise InputError(_changed(stored.path, step))
                return {piece: self._numbers(file, stored, piece) for piece in pieces}
        except OSError as error:
            raise InputError(
                f"cannot read {stored.path} (step {step}): {error.strerror or error}. Restore the "
                "file and run again."
            ) from None

    def _numbers(self, file: BinaryIO, stored: _StoredFile, piece: Piece) -> NDArray[np.float64]:
        dtype = self._trajectory.tensors[piece.name].dtype
        size = DTYPES[dtype].itemsize
        start = stored.places[self._source(piece)]
        place = range(start + piece.start * size, start + piece.stop * size)
        numbers = read_place(file, TensorHeader(dtype, (piece.width,)), place)
        if dtype not in _OF_NUMPY:
            numbers = numbers.double()
        # Let numpy convert if it can: torch would split this little work among threads, which wait
        # for each other on a busy machine.
        return numbers.numpy().astype(np.float64)


def _stored_files(
    checkpoint: Checkpoint, layouts: dict[tuple[tuple[str, int], ...], dict[str, int]]
) -> tuple[_StoredFile, ...]:
    """Return the files of a checkpoint; files with the same layout share one table of offsets.

    Raises:
        InputError: if a file changed or cannot be read.
    """
    files, fingerprints = [], []
    for path in checkpoint.files:
        try:
            with path.open("rb") as file:
                table = tensor_places(path, file)
                identity = _identity(file.fileno())
                fingerprints.append(fingerprint(partial(_read_at, file.fileno()), identity[0]))
        except OSError as error:
            raise InputError(
                f"cannot read {path} (step {checkpoint.step}): {error.strerror}. Check the path "
                "and its permissions."
            ) from None
        places = {name: place.start for name, (_, place) in table.items()}
        files.append(_StoredFile(path, identity, layouts.setdefault((*places.items(),), places)))
    if joined(fingerprints) != checkpoint.fingerprint:
        raise InputError(_changed(checkpoint.files[0], checkpoint.step))
    return tuple(files)


def _read_at(descriptor: int, offset: int, count: int) -> bytes:
    return os.pread(descriptor, count, offset)


def _identity(descriptor: int) -> tuple[int, int, int]:
    """Return the size, modification time and inode number of an open file."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _changed(path: Path, step: int) -> str:
    return f"{path} (step {step}) changed while it was read. Run again when nothing writes there."


def split(block: Sequence[Piece], rows: Matrix) -> Iterator[tuple[str, Matrix]]:
    """Yield the name of each tensor in a block with its columns.

    Args:
        block: pieces of tensors.
        rows: numbers of the whole block, (rows, elements).
    """
    column = 0
    for piece in block:
        yield piece.name, rows[:, column : column + piece.width]
        column += piece.width


def squares(numbers: Matrix) -> float:
    """Return the sum of squares without another array of the same size."""
    return float(np.einsum("ij,ij->", numbers, numbers))
