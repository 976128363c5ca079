"""Inspect a series: do its checkpoints come from one training run?

`measure` reads, `geometry` compares, `observations` draws conclusions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..trajectory import open_trajectory
from .measure import Progress, measure
from .missing import unstated_bursts
from .observations import GRADES as GRADES
from .observations import Observation as Observation
from .observations import observe


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Hold the result of inspecting a series.

    Attributes:
        steps: steps of the checkpoints, ascending.
        weights: number of elements of the floating tensors, without running statistics.
        dtypes: types of these tensors.
        size: size of all files in bytes.
        norms: ‖θ‖ of each checkpoint.
        gaps: steps before and after each gap that a replay skips.
        bursts: first and last step of each burst, if the steps look like bursts but no recorder
            stated them; a replay joins such bursts.
        distances: ‖θ − θ of the previous checkpoint‖, for each checkpoint but the first.
        same_bits: share of weights with the same bits as in the previous checkpoint, for each
            checkpoint but the first.
        observations: observations, the worst first.
    """

    steps: tuple[int, ...]
    weights: int
    dtypes: tuple[str, ...]
    size: int
    norms: tuple[float, ...]
    gaps: tuple[tuple[int, int], ...]
    bursts: tuple[tuple[int, int], ...]
    distances: tuple[float, ...]
    same_bits: tuple[float, ...]
    observations: tuple[Observation, ...]

    @property
    def worst(self) -> str | None:
        """Return the worst grade of the observations, or None if there are none."""
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
    """Read every checkpoint of a series and check whether they come from one training run.

    Memory holds two checkpoints and at most 32 kB for each further one.

    Args:
        checkpoints: a directory of checkpoints, or its URL.
        steps: as for `open_trajectory`.
        pattern: as for `open_trajectory`.
        rename: as for `open_trajectory`.
        say: called with each note on how the series was read.
        progress: called as `progress(what, done, total)`.

    Raises:
        InputError: if there are no checkpoints, or their tensors differ in shape or type.
        SpanError: if a file changes meanwhile or cannot be read.
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
        gaps=tuple(
            (trajectory.steps[start], trajectory.steps[start + 1])
            for start in sorted(trajectory.breaks)
        ),
        bursts=() if trajectory.breaks else tuple(unstated_bursts(trajectory.steps)),
        distances=tuple(reading.distance or 0.0 for reading in others),
        same_bits=tuple(reading.same_bits or 0.0 for reading in others),
        observations=tuple(
            observe(measured, {trajectory.steps[start] for start in trajectory.breaks})
        ),
    )
