"""Inspect a series: are these the checkpoints of one training?

`measure` reads, `geometry` compares, `observations` says what follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..trajectory import open_trajectory
from .measure import Progress, measure
from .observations import GRADES as GRADES
from .observations import Observation as Observation
from .observations import observe


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A series as it was inspected.

    Attributes:
        steps: of its checkpoints, ascending.
        weights: how many elements its floating tensors have, running statistics left out.
        dtypes: of these tensors.
        size: of all files, in bytes.
        norms: ‖θ‖ of each checkpoint.
        distances: ‖θ − θ of the checkpoint before‖, for each segment.
        same_bits: the share of weights that keep their bits, for each segment.
        observations: the worst first.
    """

    steps: tuple[int, ...]
    weights: int
    dtypes: tuple[str, ...]
    size: int
    norms: tuple[float, ...]
    distances: tuple[float, ...]
    same_bits: tuple[float, ...]
    observations: tuple[Observation, ...]

    @property
    def worst(self) -> str | None:
        """Return the worst grade of the observations; None where there are none."""
        return self.observations[0].grade if self.observations else None


def inspect(
    checkpoints: str | Path,
    *,
    steps: str | None = None,
    pattern: str | None = None,
    rename: Sequence[str] = (),
    say: Callable[[str], None] = print,
    progress: Progress = lambda what, done, total: None,
) -> Inspection:
    """Read every checkpoint of a series, and see whether they are those of one training.

    Memory is that of two checkpoints and of 32 kB or less for each further one.

    Args:
        checkpoints: a directory of them, or a URL of one.
        steps: as for `open_trajectory`.
        pattern: likewise.
        rename: likewise.
        say: called with each note on how the series was read.
        progress: called as `progress(what, done, total)`.

    Raises:
        InputError: where there are no checkpoints, or their tensors differ in shape or type.
        SpanError: where a file changes meanwhile, or cannot be read.
    """
    trajectory = open_trajectory(
        checkpoints, steps=steps, pattern=pattern, rename=rename, compare=False
    )
    for note in trajectory.notes:
        say(note)
    measured = measure(trajectory, progress)
    first, *others = measured.readings
    return Inspection(
        steps=tuple(trajectory.steps),
        weights=measured.elements,
        dtypes=tuple(sorted({trajectory.tensors[name].dtype for name in measured.weights})),
        size=sum(checkpoint.size for checkpoint in trajectory.checkpoints),
        norms=tuple(reading.norm for reading in (first, *others)),
        distances=tuple(reading.distance or 0.0 for reading in others),
        same_bits=tuple(reading.same_bits or 0.0 for reading in others),
        observations=tuple(
            observe(measured, {trajectory.steps[start] for start in trajectory.breaks})
        ),
    )
