"""Compute directions for `lca run --along` from the checkpoints of one training run.

They are the directions in which the weights moved most, or random ones to compare them with.

D has a row for each segment, Δθ_t = θ_{t+1} − θ_t, over all parameters of a *part*: the whole
model, or a single tensor. D = U Σ Vᵀ, and the leading columns of V are the directions. D never
exists in memory: a first pass over blocks of parameters sums the products D Dᵀ (segments ×
segments) in float64. Their eigenvectors are U and their eigenvalues Σ². A second pass over the
blocks computes V = Dᵀ U Σ⁻¹. No mean is subtracted, so the shares refer to Σ‖Δθ‖².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np

from ..base.available_memory import free_memory
from ..errors import InputError, ResourceError, amount
from .directions_file import MAX_DIRECTIONS, DirectionsAbout
from .directions_writer import DirectionsWriter, refuse_existing, refuse_too_large, writing
from .displacements import BlockSize, Displacements, Matrix, Piece, block_size, split, squares
from .moving_tensors import LeftOut, chosen_tensors, motion_of
from .paths import here
from .places import Where, arguments_of, places_of
from .trajectory import Trajectory, open_trajectory

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]
# computes some directions of a part on a block of its elements: (directions, elements)
Maker = Callable[[Sequence[Piece]], Matrix]

DIRECTIONS = 10
SHOWN = (1, 2, 5, 10)  # numbers of directions whose share of the motion is shown
# relative to the largest singular value; float64 products cannot tell smaller ones from 0
_SMALLEST = 1e-5
_UNDECIDED = 1e-6  # in singular values; a smaller net motion does not determine the sign
_LONGEST_NAME = 900  # characters of a tensor's name in a label


@dataclass(frozen=True, kw_only=True)
class Part:
    """Describe the directions of one part of the model.

    Attributes:
        name: name of the tensor; None for all tensors together.
        directions: indices of the part's directions in the file.
        tensors: names of the tensors that move.
        parameters: number of elements of these tensors.
        motion: Σ‖Δθ‖² of the part.
        singular_values: leading singular values of the displacements, descending; at least ten if
            there are that many. Empty for random directions.
    """

    name: str | None
    directions: range
    tensors: tuple[str, ...]
    parameters: int
    motion: float
    singular_values: tuple[float, ...] = ()

    def share(self, directions: int) -> float:
        """Return the share of Σ‖Δθ‖² that the first directions capture; for random directions, its
        expectation.
        """
        if not self.singular_values:
            return directions / self.parameters
        squares = [value**2 for value in self.singular_values[:directions]]
        return min(1.0, sum(squares) / self.motion)


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Describe a file of directions that was written.

    Attributes:
        path: path of the file.
        kind: "displacements", "matrices" or "random".
        seed: seed of random directions.
        parts: the parts of the model that have directions: one, or one per matrix.
        motion: Σ‖Δθ‖² of all parameters, including those outside every part.
        left_out: tensors that the directions leave out, with the reason.
        steps: the first and the last training step.
        segments: number of displacements.
        size: size of the file in bytes.
    """

    path: Path
    kind: str
    seed: int | None
    parts: tuple[Part, ...]
    motion: float
    left_out: tuple[LeftOut, ...]
    steps: tuple[int, int]
    segments: int
    size: int

    @property
    def directions(self) -> int:
        """Return the number of directions in the file."""
        return self.parts[-1].directions.stop

    @property
    def tensors(self) -> tuple[str, ...]:
        """Return the names of the tensors in the file."""
        return tuple(name for part in self.parts for name in part.tensors)


def write_basis(
    checkpoints: Where,
    out: str | Path,
    *,
    directions: int | None = None,
    per_matrix: bool = False,
    random: int | None = None,
    seed: int | None = None,
    steps: str | None = None,
    pattern: str | None = None,
    rename: Sequence[str] = (),
    say: Say = print,
    progress: Progress = lambda what, done, total: None,
    size: BlockSize | None = None,
) -> Basis:
    """Write the leading singular directions of the displacements over training, or random
    directions.

    Memory holds two matrices of segments × segments in float64 and a few blocks, however large the
    model is. Each checkpoint is read twice, and more often only beyond a thousand segments.

    Args:
        checkpoints: as for `open_trajectory`.
        out: path of the new file; an existing file is never overwritten.
        directions: number of directions of each part. By default ten for the whole model or one per
            matrix, or fewer if fewer exist.
        per_matrix: compute directions for each tensor of two or more axes separately, with zeros in
            all other tensors.
        random: number of random directions to write instead: Gaussian, made orthonormal, over the
            same tensors.
        seed: seed of random directions; 0 by default.
        steps: as for `open_trajectory`.
        pattern: as for `open_trajectory`.
        rename: as for `open_trajectory`.
        say: called with each note.
        progress: called as `progress(what, done, total)`.
        size: size of the blocks of displacements; chosen automatically by default.

    Raises:
        InputError: if arguments or checkpoints are wrong, nothing moves, or there are fewer
            directions than requested.
        ResourceError: if memory or disk space do not suffice.
    """
    _check_numbers(directions, random, seed)
    place = here(out, "directions are written to a file system. Name a file there with -o.")
    for argument in arguments_of(checkpoints):
        here(argument, "displacements are read from a file system. Copy them here first.")
    refuse_existing(place)
    for source in places_of(checkpoints):
        _refuse_inside(place, source.root)
    trajectory = open_trajectory(checkpoints, pattern=pattern, rename=rename, steps=steps)
    for note in [*trajectory.notes, *_half(trajectory)]:
        say(note)
    count = random or directions or (1 if per_matrix else DIRECTIONS)
    size = size or block_size(len(trajectory.starts), count)
    job = _Job(trajectory, Displacements(trajectory, size), per_matrix, progress)
    if random is None:
        return job.displacement_basis(place, count, exactly=directions is not None)
    return job.random_basis(place, random, seed or 0)


def _check_numbers(directions: int | None, random: int | None, seed: int | None) -> None:
    if directions is not None and random is not None:
        raise InputError(
            "--random says how many directions, and so does --directions: give one of them."
        )
    if seed is not None and random is None:
        raise InputError("--seed is for random directions: give --random too.")
    for name, number in (("--directions", directions), ("--random", random)):
        if number is not None and not 1 <= number <= MAX_DIRECTIONS:
            raise InputError(f"{name} {number} is not from 1 to {MAX_DIRECTIONS:,}.")
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed} is not from 0 to 2⁶³ − 1.")


def _refuse_inside(place: Path, root: Path) -> None:
    """Refuse to write among the checkpoints, where a later run would read the file as a checkpoint.

    Raises:
        InputError: if `place` lies below `root`.
    """
    parent = place.parent.resolve()
    if root.resolve() in (parent, *parent.parents):
        raise InputError(
            f"{place} would lie among the checkpoints and be read as one of them. Choose another "
            "place with -o."
        )


def _half(trajectory: Trajectory) -> list[str]:
    narrow = trajectory.half_precision
    return [
        f"{len(narrow)} of {len(trajectory.tensors)} tensors are stored in half precision, which "
        "rounds most of the motion away: the directions contain rounding errors too"
    ] * bool(narrow)


class _Job:
    """Compute the directions for one call of `write_basis`, from the opened checkpoints."""

    def __init__(
        self,
        trajectory: Trajectory,
        displacements: Displacements,
        per_matrix: bool,
        progress: Progress,
    ) -> None:
        self._steps = trajectory.steps
        self._displacements, self._per_matrix = displacements, per_matrix
        self._progress = progress
        self._names, self._left_out = chosen_tensors(trajectory, displacements)
        self._shapes = {name: trajectory.tensors[name].shape for name in self._names}

    def displacement_basis(self, place: Path, count: int, *, exactly: bool) -> Basis:
        """Write the leading singular directions of the displacements.

        Args:
            place: path of the new file.
            count: number of directions of each part.
            exactly: whether to raise an error if a part has fewer.
        """
        _refuse_too_many_segments(self._displacements.segments)
        names_of = self._parts(count)
        parts, makers = list[Part](), list[Maker]()
        motion: dict[str, float] = {}
        for name, names in names_of:
            products, moved = self._products(names)
            motion |= moved
            if not any(moved.values()):
                continue
            values, vectors = _leading(products, max(count, *SHOWN))
            own = _independent(values, count, exactly, name)
            coefficients = _signed(vectors[:, :own]) / values[:own]
            parts.append(self._part(name, parts, own, moved, values))
            makers.append(partial(self._mixed, coefficients))
        others = [name for name in self._names if name not in motion]
        motion |= motion_of(self._displacements, self._shown("motion", others), others)
        kind = "matrices" if self._per_matrix else "displacements"
        return self._write(place, kind, None, parts, makers, motion)

    def random_basis(self, place: Path, count: int, seed: int) -> Basis:
        """Write random orthonormal directions over the tensors that move.

        Args:
            place: path of the new file.
            count: number of directions of each part.
            seed: seed of the random numbers.

        Raises:
            InputError: if a part has fewer parameters than directions requested.
        """
        names_of = self._parts(count)
        motion = motion_of(self._displacements, self._shown("motion", self._names), self._names)
        parts, makers = list[Part](), list[Maker]()
        for name, names in names_of:
            moved = {name: motion[name] for name in names}
            if not any(moved.values()):
                continue
            part = self._part(name, parts, count, moved, ())
            if count > part.parameters:
                raise InputError(
                    f"--random {count}: only {part.parameters} parameters move{_in(name)}, and "
                    "there are no more directions than that."
                )
            parts.append(part)
            makers.append(_Draws(seed, part.directions))
        return self._write(place, "random", seed, parts, makers, motion)

    def _parts(self, count: int) -> list[tuple[str | None, list[str]]]:
        """Return the parts of the model that get their own directions, each as a name and its
        tensors.

        Raises:
            InputError: if there would be too many directions.
        """
        if not self._per_matrix:
            return [(None, self._names)]
        matrices = [
            name
            for name, shape in self._shapes.items()
            if len(shape) >= 2 and self._displacements.elements(name)
        ]
        if len(matrices) * count > MAX_DIRECTIONS:
            raise InputError(
                f"{count} for each of {len(matrices)} matrices are {len(matrices) * count:,} "
                f"directions; at most {MAX_DIRECTIONS:,} are written. Ask for fewer, or leave "
                "tensors out with --rename '^NAME$='."
            )
        return [(name, [name]) for name in matrices]

    def _part(
        self,
        name: str | None,
        before: Sequence[Part],
        count: int,
        moved: dict[str, float],
        values: Iterable[float],
    ) -> Part:
        """Return the next part, whose directions follow those of the parts before it."""
        start = before[-1].directions.stop if before else 0
        tensors = tuple(name for name, motion in moved.items() if motion)
        return Part(
            name=name,
            directions=range(start, start + count),
            tensors=tensors,
            parameters=sum(map(self._displacements.elements, tensors)),
            motion=sum(moved.values()),
            singular_values=tuple(map(float, values)),
        )

    def _products(self, names: Sequence[str]) -> tuple[Matrix, dict[str, float]]:
        """Return the lower triangle of D Dᵀ for some tensors, and Σ‖Δθ‖² of each tensor."""
        source = self._displacements
        products = np.zeros((source.segments, source.segments))
        motion = dict.fromkeys(names, 0.0)
        for block in self._shown("products", names):
            for number, segments in enumerate(source.row_blocks()):
                rows = source.rows(block, segments)
                for name, part in split(block, rows):
                    motion[name] += squares(part)
                products[segments, segments] += rows @ rows.T
                for others in source.row_blocks()[:number]:
                    products[segments, others] += rows @ source.rows(block, others).T
        return products, motion

    def _mixed(self, coefficients: Matrix, block: Sequence[Piece]) -> Matrix:
        """Return coefficientsᵀ · D on a block; coefficients are (segments, directions)."""
        mixed = np.zeros((coefficients.shape[1], sum(piece.width for piece in block)))
        for segments in self._displacements.row_blocks():
            mixed += coefficients[segments].T @ self._displacements.rows(block, segments)
        return mixed

    def _write(
        self,
        place: Path,
        kind: str,
        seed: int | None,
        parts: Sequence[Part],
        makers: Sequence[Maker],
        motion: dict[str, float],
    ) -> Basis:
        """Write the directions of all parts with their makers.

        Raises:
            InputError: if nothing moves.
        """
        if not parts:
            raise InputError(self._nothing_moves(motion))
        tensors = [name for part in parts for name in part.tensors]
        count = parts[-1].directions.stop
        refuse_too_large(place, 4 * count * sum(map(self._displacements.elements, tensors)))
        shapes = {name: self._shapes[name] for name in tensors}
        with writing(place) as file:
            writer = DirectionsWriter(file, shapes, count, _about(kind, seed, parts))
            for part, make in zip(parts, makers, strict=True):
                for block in self._shown("directions", part.tensors):
                    writer.write(block, part.directions, make(block))
                blocks = partial(self._displacements.blocks, part.tensors)
                writer.orthonormalise(blocks, part.directions)
        return Basis(
            path=place,
            kind=kind,
            seed=seed,
            parts=tuple(parts),
            motion=sum(motion.values()),
            left_out=(*self._left_out, *self._no_part(tensors, motion)),
            steps=(self._steps[0], self._steps[-1]),
            segments=self._displacements.segments,
            size=place.stat().st_size,
        )

    def _nothing_moves(self, motion: dict[str, float]) -> str:
        """Return the error message for checkpoints without motion."""
        where = "no tensor of two axes or more" if any(motion.values()) else "no parameter"
        return (
            f"{where} moves from step {self._steps[0]} to step {self._steps[-1]}: the "
            f"{len(self._steps)} checkpoints hold the same numbers there, so there are no "
            "directions. Give checkpoints of other steps."
        )

    def _no_part(self, tensors: Sequence[str], motion: dict[str, float]) -> list[LeftOut]:
        """Return the floating tensors in which every direction is 0, with the reason."""
        still = tuple(name for name in self._names if not motion[name])
        narrow = tuple(name for name in self._names if name not in (*tensors, *still))
        reasons = ((still, "not moving"), (narrow, "of fewer than two axes"))
        return [LeftOut(names=names, reason=reason) for names, reason in reasons if names]

    def _shown(self, what: str, names: Sequence[str]) -> Iterable[tuple[Piece, ...]]:
        """Yield the blocks of some tensors and report progress."""
        total, done = sum(map(self._displacements.elements, names)), 0
        for block in self._displacements.blocks(names):
            self._progress(what, done, total)
            yield block
            done += sum(piece.width for piece in block)
        self._progress(what, total, total)


class _Draws:
    """Draw the Gaussian numbers of some directions.

    The numbers of a tensor and a direction depend only on the seed, not on how blocks are cut.

    Args:
        seed: seed of all directions.
        directions: indices of the directions.
    """

    def __init__(self, seed: int, directions: range) -> None:
        self._seed, self._directions = seed, directions
        self._generators: list[np.random.Generator] = []

    def __call__(self, block: Sequence[Piece]) -> Matrix:
        """Return the numbers of the next block, (directions, elements); blocks must come in order."""
        return np.concatenate([self._next(piece) for piece in block], axis=1)

    def _next(self, piece: Piece) -> Matrix:
        if not piece.start:
            name = int(google_crc32c.value(piece.name.encode()))
            self._generators = [
                np.random.default_rng([self._seed, name, direction])
                for direction in self._directions
            ]
        return np.stack([generator.standard_normal(piece.width) for generator in self._generators])


def _refuse_too_many_segments(segments: int) -> None:
    """Raise an error if memory cannot hold the products of the segments.

    Raises:
        ResourceError: if it cannot.
    """
    needed, free = 2 * 8 * segments**2, free_memory()
    if needed > free:
        raise ResourceError(
            f"the products of {segments:,} displacements take {amount(needed)}, and "
            f"{amount(free)} of memory are free. Take fewer checkpoints with --steps ::K."
        )


def _leading(products: Matrix, count: int) -> tuple[Matrix, Matrix]:
    """Return the leading singular values of D, descending, and its left singular vectors.

    Args:
        products: D Dᵀ, (segments, segments); only the lower triangle is read. The call destroys it.
        count: maximum number of singular values.

    Returns:
        The values, (count,), and the vectors, (segments, count).

    Raises:
        InputError: if a square exceeds the range of float64.
    """
    import scipy.linalg  # here, because whoever reads directions need not load it

    if not math.isfinite(float(np.trace(products))):
        raise InputError("the squares of the displacements are too large for float64.")
    segments = len(products)
    first = max(0, segments - count)
    # LAPACK stores by columns, so the transpose avoids a copy: its upper triangle is our lower one
    squared, vectors = scipy.linalg.eigh(
        products.T,
        lower=False,
        overwrite_a=True,
        check_finite=False,
        subset_by_index=(first, segments - 1),
    )
    return np.sqrt(np.maximum(squared[::-1], 0)), vectors[:, ::-1]


def _independent(values: Matrix, count: int, exactly: bool, name: str | None) -> int:
    """Return the number of independent directions, at most `count`.

    Raises:
        InputError: if there are fewer than `count` and `exactly` is set.
    """
    independent = int((values > _SMALLEST * values[0]).sum())
    if exactly and independent < count:
        raise InputError(
            f"--directions {count}: the displacements{_in(name)} have {independent} independent "
            f"directions; their other singular values are below {_SMALLEST:g} of the first. Ask "
            "for no more than that."
        )
    return min(count, independent)


def _signed(vectors: Matrix) -> Matrix:
    """Choose the signs of left singular vectors so that training as a whole moves forward along the
    directions.

    If its net motion is 0, the largest displacement decides.
    """
    net = vectors.sum(axis=0)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)[0]
    signs = np.sign(np.where(np.abs(net) > _UNDECIDED, net, largest))
    signed: Matrix = vectors * signs
    return signed


def _in(name: str | None) -> str:
    return "" if name is None else f" of tensor {name!r}"


def _about(kind: str, seed: int | None, parts: Sequence[Part]) -> DirectionsAbout:
    """Return the metadata for the file."""
    labels, values = list[str](), list[float]()
    for part in parts:
        word = kind if part.name is None else part.name[:_LONGEST_NAME]
        labels += [f"{word} {number}" for number in range(len(part.directions))]
        values += part.singular_values[: len(part.directions)]
    return DirectionsAbout(
        kind=kind, seed=seed, labels=tuple(labels), singular_values=tuple(values)
    )
