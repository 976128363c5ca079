"""Read the displacements of a trajectory, θ_{t+1} − θ_t, some parameters and some segments at a time.

Memory is that of one block, however many parameters the model has and however long the training is.
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
from .headers import TensorHeader, fingerprint, tensor_places
from .reading import DTYPES, read_place
from .trajectory import Checkpoint, Trajectory

Matrix = NDArray[np.float64]

_BLOCK_BYTES = 2**27  # of one block; two are held at a time
_OF_NUMPY = frozenset({"F16", "F32", "F64"})
_FEWEST_COLUMNS = 2**14  # shorter reads would wait for the disk more than they read


@dataclass(frozen=True)
class Piece:
    """Some consecutive elements of a tensor, counted along its flattened axis."""

    name: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Return how many elements they are."""
        return self.stop - self.start


@dataclass(frozen=True)
class BlockSize:
    """The most rows (segments) and columns (parameters) that are read at a time."""

    rows: int
    columns: int


def block_size(segments: int, directions: int) -> BlockSize:
    """Return the size of a block: all segments where that leaves columns enough, else fewer, so
    that blocks of rows are paired; as many directions take no more memory.

    >>> block_size(100, 10), block_size(10_000, 10)
    (BlockSize(rows=100, columns=167772), BlockSize(rows=1024, columns=16384))
    """
    columns = max(_FEWEST_COLUMNS, _BLOCK_BYTES // 8 // max(segments, directions))
    return BlockSize(min(segments, _BLOCK_BYTES // 8 // columns), columns)


@dataclass(frozen=True)
class _StoredFile:
    """One file of a checkpoint: where its tensors' bytes begin, and what tells that it is still
    the same file.
    """

    path: Path
    identity: tuple[int, int, int]
    places: dict[str, int]


class Displacements:
    """The rows θ_{t+1} − θ_t of a trajectory in float64, one for each segment.

    Args:
        trajectory: of checkpoints on a file system.
        size: of the blocks.

    Raises:
        InputError: where a file is not the one it was when the trajectory was opened.
    """

    def __init__(self, trajectory: Trajectory, size: BlockSize) -> None:
        self._trajectory = trajectory
        self._starts = trajectory.starts
        self.segments = len(self._starts)
        self.size = size
        layouts: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}
        self._files = [_stored_files(checkpoint, layouts) for checkpoint in trajectory.checkpoints]

    def elements(self, name: str) -> int:
        """Return how many numbers a tensor holds."""
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
        """Return the displacements of a block's elements on some segments: (segments, elements).

        Raises:
            InputError: where a number is not finite, or a file changed meanwhile.
        """
        moved = np.empty((segments.stop - segments.start, sum(piece.width for piece in block)))
        position, after = -1, np.empty(0)
        for row, start in enumerate(self._starts[segments]):
            before = after if start == position else self.values(block, start)
            position, after = start + 1, self.values(block, start + 1)
            np.subtract(after, before, out=moved[row])
        return moved

    def values(self, block: Sequence[Piece], index: int) -> NDArray[np.float64]:
        """Return the elements of a block in one checkpoint: (elements,), every number finite.

        Raises:
            InputError: where a number is not finite, or a file changed meanwhile.
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
        """Return the elements of some pieces that one file holds."""
        try:
            with stored.path.open("rb") as file:
                if _identity(file.fileno()) != stored.identity:
                    raise _changed(stored.path, step)
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
        # by numpy where it can: torch would share this little work out among threads, which wait
        # for each other where other programs compute too
        return numbers.numpy().astype(np.float64)


def _stored_files(
    checkpoint: Checkpoint, layouts: dict[tuple[tuple[str, int], ...], dict[str, int]]
) -> tuple[_StoredFile, ...]:
    """Return the files of a checkpoint; files with the same layout share one table of places."""
    files, crc = [], 0
    for path in checkpoint.files:
        try:
            with path.open("rb") as file:
                table = tensor_places(path, file)
                identity = _identity(file.fileno())
                own = fingerprint(partial(_read_at, file.fileno()), identity[0])
        except OSError as error:
            raise InputError(
                f"cannot read {path} (step {checkpoint.step}): {error.strerror}. Check the path "
                "and its permissions."
            ) from None
        crc = (crc * 31 + own) % 2**32
        places = {name: place.start for name, (_, place) in table.items()}
        files.append(_StoredFile(path, identity, layouts.setdefault((*places.items(),), places)))
    if crc != checkpoint.fingerprint:
        raise _changed(checkpoint.files[0], checkpoint.step)
    return tuple(files)


def _read_at(descriptor: int, offset: int, count: int) -> bytes:
    return os.pread(descriptor, count, offset)


def _identity(descriptor: int) -> tuple[int, int, int]:
    """Return the size of an open file, its time of change and its number."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _changed(path: Path, step: int) -> InputError:
    return InputError(
        f"{path} (step {step}) changed while it was read. Run again when nothing writes there."
    )


def split(block: Sequence[Piece], rows: Matrix) -> Iterator[tuple[str, Matrix]]:
    """Yield the tensors of a block with their columns of its rows."""
    column = 0
    for piece in block:
        yield piece.name, rows[:, column : column + piece.width]
        column += piece.width


def squares(numbers: Matrix) -> float:
    """Return the sum of the squares of some rows, without another array of their size."""
    return float(np.einsum("ij,ij->", numbers, numbers))
