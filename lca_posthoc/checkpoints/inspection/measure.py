"""Read a series once, with two checkpoints in memory at a time, and summarise each checkpoint.

The summary holds digests, the numbers that are not finite, the distance to the previous checkpoint,
the share of unchanged bits, and a sketch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..headers import FLOATING, HALF
from ..trajectory import Checkpoint, Trajectory, is_finite, is_statistic, read_stored
from .sketch import Numbers, Projection, width_for

Progress = Callable[[str, int, int], None]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# bits of a float32 that are 0 if the number was converted from bfloat16 or float16
_WIDENED = {"BF16": 0xFFFF, "F16": 0x1FFF}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Summarise one checkpoint.

    Attributes:
        step: training step.
        digest: digest of the bytes of all tensors.
        weights_digest: digest of the floating tensors other than running statistics.
        not_finite: number of NaN or Inf in each tensor that has any.
        norm: ‖θ‖ over all weights.
        distance: ‖θ − θ of the previous checkpoint‖; None for the first.
        same_bits: share of weights with the same bits as in the previous checkpoint.
        sketch: sketch of the matrices that move, each minus its mean: (K,).
        spread: norm of these matrices, each minus its mean.
        widened_from: "BF16" or "F16" if every float32 weight is a number of that type.
    """

    step: int
    digest: str
    weights_digest: str
    not_finite: dict[str, int]
    norm: float
    distance: float | None
    same_bits: float | None
    sketch: Numbers
    spread: float
    widened_from: str | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Summarise a series.

    Attributes:
        readings: summaries of the checkpoints, in order of step.
        weights: names of the floating tensors other than running statistics.
        compared: number of elements that the sketches cover.
        half_precision: those of `weights` that are stored in fewer than 32 bits per number.
        elements: number of elements of all `weights`.
    """

    readings: tuple[Reading, ...]
    weights: tuple[str, ...]
    compared: int
    half_precision: tuple[str, ...]
    elements: int


def measure(trajectory: Trajectory, progress: Progress) -> Measured:
    """Read every checkpoint once, and the first and last twice.

    Args:
        trajectory: the series.
        progress: called as `progress(what, done, total)`.

    Raises:
        SpanError: if a file changed meanwhile or cannot be read.
    """
    weights = [
        name
        for name, header in sorted(trajectory.tensors.items())
        if header.dtype in FLOATING and not is_statistic(name)
    ]
    compared = _compared(trajectory, weights)
    reader = _Reader(trajectory, weights, compared)
    readings = []
    for number, checkpoint in enumerate(trajectory.checkpoints):
        progress("reading", number, len(trajectory.checkpoints))
        readings.append(reader.read(checkpoint))
    progress("reading", len(readings), len(readings))
    elements = {name: _elements(trajectory.tensors[name].shape) for name in weights}
    return Measured(
        readings=tuple(readings),
        weights=tuple(weights),
        compared=sum(elements[name] for name in compared),
        half_precision=tuple(name for name in weights if trajectory.tensors[name].dtype in HALF),
        elements=sum(elements.values()),
    )


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _compared(trajectory: Trajectory, weights: list[str]) -> list[str]:
    """Return the weights that sketches cover: tensors that differ between the first and the last
    checkpoint, and matrices among them if there are any.

    Other tensors, such as masks, positions, biases and normalisation scales, start alike for every
    seed.
    """
    names = {name: trajectory.sources[name] for name in weights}
    ends = [
        {name: _digest(tensor) for name, tensor in read_stored(checkpoint, names).items()}
        for checkpoint in (trajectory.checkpoints[0], trajectory.checkpoints[-1])
    ]
    moving = [name for name in weights if ends[0][name] != ends[1][name]] or weights
    return [name for name in moving if len(trajectory.tensors[name].shape) >= 2] or moving


def _bytes(tensor: Tensor) -> Tensor:
    """View a tensor as its bytes, (bytes,)."""
    return tensor.reshape(-1).view(torch.uint8)


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(_bytes(tensor).numpy().data).digest()


class _Reader:
    """Read checkpoints in order, keeping the weights of the previous one.

    Args:
        trajectory: the series.
        weights: names of its weights.
        compared: the weights that sketches cover.
    """

    def __init__(self, trajectory: Trajectory, weights: list[str], compared: list[str]) -> None:
        self._sources = dict(sorted(trajectory.sources.items()))
        self._weights, self._compared = weights, frozenset(compared)
        self._projection = Projection(width_for(len(trajectory.checkpoints)))
        self._before: Mapping[str, Tensor] = {}

    def read(self, checkpoint: Checkpoint) -> Reading:
        """Read the next checkpoint and return its summary."""
        tensors = read_stored(checkpoint, self._sources)
        digests = {name: _digest(tensor) for name, tensor in tensors.items()}
        sums = _Sums(sketch=np.zeros(self._projection.width))
        for name in self._weights:
            self._add(name, tensors[name], sums)
        before, self._before = self._before, {name: tensors[name] for name in self._weights}
        return Reading(
            step=checkpoint.step,
            digest=_joined(digests[name] for name in tensors),
            weights_digest=_joined(digests[name] for name in self._weights),
            not_finite=_not_finite(tensors),
            norm=sums.squares**0.5,
            distance=sums.moved**0.5 if before else None,
            same_bits=sums.same / max(1, sums.elements) if before else None,
            sketch=sums.sketch,
            spread=sums.spread**0.5,
            widened_from=next(iter(sums.widened), None) if sums.of_float32 else None,
        )

    def _add(self, name: str, tensor: Tensor, sums: _Sums) -> None:
        """Add a tensor to the sums of its checkpoint, piece by piece."""
        flat = tensor.reshape(-1)
        before = self._before[name].reshape(-1) if self._before else None
        sketch = self._projection.start(name) if name in self._compared else None
        sums.elements += len(flat)
        for start in range(0, len(flat), self._projection.piece):
            piece = slice(start, start + self._projection.piece)
            numbers = flat[piece].double().numpy()
            sums.squares += _squared(numbers)
            if before is not None:
                sums.same += int((_bits(flat[piece]) == _bits(before[piece])).sum())
                with np.errstate(invalid="ignore", over="ignore"):
                    sums.moved += _squared(numbers - before[piece].double().numpy())
            if sketch is not None:
                with np.errstate(invalid="ignore", over="ignore"):
                    sketch.add(numbers)
            if tensor.dtype == torch.float32:
                sums.narrow_down(flat[piece])
        if sketch is not None:
            with np.errstate(invalid="ignore", over="ignore"):
                numbers, spread = sketch.centred()
            sums.sketch += numbers
            sums.spread += spread


@dataclass
class _Sums:
    """Accumulate sums over the weights of one checkpoint; see `Reading`."""

    sketch: Numbers
    squares: float = 0.0
    spread: float = 0.0
    moved: float = 0.0
    same: int = 0
    elements: int = 0
    of_float32: bool = False
    widened: list[str] = field(default_factory=lambda: list(_WIDENED))

    def narrow_down(self, numbers: Tensor) -> None:
        """Remove from `widened` the types that cannot hold some float32 numbers, (elements,)."""
        self.of_float32 = True
        if self.widened:
            bits = numbers.view(torch.int32)
            self.widened = [
                dtype for dtype in self.widened if not bool((bits & _WIDENED[dtype]).any())
            ]


def _bits(numbers: Tensor) -> Tensor:
    """View numbers as integers of the same width, so that −0 differs from 0 and NaN equals itself."""
    return numbers.view(_INTEGERS[numbers.element_size()])


def _squared(numbers: Numbers) -> float:
    """Return the sum of squares of some numbers, (elements,)."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(numbers @ numbers)


def _joined(digests: Iterable[bytes]) -> str:
    """Combine several digests into one."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _not_finite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of NaN or Inf in each floating tensor that has any."""
    return {
        name: int((~torch.isfinite(tensor.double())).sum())
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not is_finite(tensor)
    }
