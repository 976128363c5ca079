"""Present one segment to the rules: evaluations of losses at its nodes, with gradients of every
parameter, or with sums of them along the motion and its parts.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .objective import (
    Along,
    Between,
    Distances,
    Evaluation,
    Motion,
    Numbers,
    OfTensors,
    OfUnits,
    Units,
    distances,
    row_sums_along,
    rows_of,
    sums_along,
    units_of,
)
from .parts import Point, Split
from .path import PathShift, SegmentPath

Axes = Mapping[str, int | None]


class Evaluates(Protocol):
    """Evaluate losses at a point; this is all the mathematics needs from an objective."""

    def evaluate(
        self,
        point: Point,
        losses: list[str],
        *,
        gradient: bool = True,
        along: Along | None = None,
        examples: Sequence[Motion] | None = None,
    ) -> dict[str, Evaluation]:
        """Evaluate losses at `point`.

        Args:
            point: every tensor of the model.
            losses: names of the losses.
            gradient: whether to compute the gradient.
            along: directions along which to sum the gradient, instead of returning it.
            examples: directions along which to differentiate the loss of each example, for losses
                that keep examples apart; None to skip this.
        """

    def holding(
        self, point: MutableMapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Keep a point only in the model: inside the context, the point's tensors are the model's
        own, if these hold the same numbers.
        """


class Nodes(Protocol):
    """Present one segment to the rules by evaluations at its nodes, whatever their origin."""

    @property
    def points(self) -> Motion:
        """Return both ends; ends that are 1 apart if gradients are sums along the motion."""

    def distance(self, names: Iterable[str]) -> Distances:
        """Return Σ|θ′ − θ| of some tensors."""

    def at(self, x: float, losses: list[str], *, gradient: bool = True) -> dict[str, Evaluation]:
        """Return losses at θ + x(θ′ − θ).

        Args:
            x: position in [0, 1).
            losses: names of the losses.
            gradient: whether to compute the gradient.
        """

    def know_signal(self) -> None:
        """Ensure that the gradient at θ that defines parts of the motion is known, if any part
        needs it.
        """

    def at_end(
        self, losses: list[str], *, here: bool, following: bool
    ) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
        """Return losses at θ′, for this segment and for the next; see `Segment.at_end`.

        Args:
            losses: names of the losses.
            here: as for `Segment.at_end`.
            following: as for `Segment.at_end`.
        """

    @property
    def has_paths(self) -> bool:
        """Return whether other paths are requested."""

    @property
    def bends(self) -> bool:
        """Return whether another path through its ends is requested and known."""

    def middle(self, evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Numbers]]:
        """Return sums along the motion at the middle; see `Segment.middle`."""

    def shifts(
        self,
        first: Mapping[str, Evaluation],
        last: Mapping[str, Evaluation],
        middle: Mapping[str, Mapping[str, Numbers]],
    ) -> dict[str, PathShift]:
        """Return how much another path changes the allocation; see `Segment.shifts`.

        Args:
            first: as for `Segment.shifts`.
            last: as for `Segment.shifts`.
            middle: as for `Segment.shifts`.
        """


@dataclass(frozen=True)
class Way:
    """Describe a motion along which gradients are needed.

    Attributes:
        motion: the motion.
        split: its parts, if any.
        path: another path between its ends, if any.
        beside: further directions at one of its ends.
    """

    motion: Motion
    split: Split | None = None
    path: SegmentPath | None = None
    beside: Sequence[Motion] = ()

    @property
    def parts(self) -> Sequence[Motion]:
        """Return the directions of the parts."""
        return () if self.split is None else self.split.directions

    @property
    def directions(self) -> Sequence[Motion]:
        """Return the motion, its parts, and the directions in `beside`."""
        return [self.motion, *self.parts, *self.beside]

    def at_start(self) -> Way:
        """Return the directions needed at its start."""
        return self if self.path is None else replace(self, beside=self.path.at_start)

    def at_end(self) -> Way:
        """Return the directions needed at its end."""
        return self if self.path is None else replace(self, beside=self.path.at_end)


@dataclass(kw_only=True)
class Segment:
    """Present one segment to the rules: evaluations at its nodes, and the motion that multiplies
    their gradients.

    Args:
        own: its motion.
        objective: evaluates losses.
        following: returns the motion of the next segment, or None. It is not called before the
            gradients inside the segment are computed, because they do not need it.
        per_example: losses that keep their examples apart.
    """

    own: Way
    objective: Evaluates
    following: Callable[[], Way | None]
    per_example: frozenset[str]

    @property
    def points(self) -> Motion:
        """Return both ends; ends that are 1 apart if gradients are sums along the motion."""
        return self.own.motion

    def distance(self, names: Iterable[str]) -> Distances:
        """Return Σ|θ′ − θ| of some tensors."""
        return distances(self.own.motion, names)

    def at(self, x: float, losses: list[str], *, gradient: bool = True) -> dict[str, Evaluation]:
        """Evaluate losses at θ + x(θ′ − θ).

        Args:
            x: position in [0, 1).
            losses: names of the losses.
            gradient: whether to compute the gradient.
        """
        start, end = self.own.motion.start, self.own.motion.end
        point = start if x == 0 else Between(start, end, x)
        begins = self.own.split if x == 0 else None
        own = self.own.at_start() if x == 0 else self.own
        return self._evaluate(point, losses, [own] if gradient else [], begins)[0]

    def know_signal(self) -> None:
        """Evaluate the gradient at θ that defines parts of the motion, if it is not known yet."""
        self._signal(self.own.motion.start, self.own.split)

    def at_end(
        self, losses: list[str], *, here: bool, following: bool
    ) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
        """Evaluate losses at θ′, for this segment and for the next.

        Args:
            losses: names of the losses.
            here: whether this segment needs the gradient there.
            following: whether the next segment, if any, needs it.

        Returns:
            The evaluations for this segment and for the next.
        """
        looks_ahead = following and self._looks_ahead(here)
        with self._held_once() if looks_ahead else contextlib.nullcontext():
            coming = self.following() if looks_ahead else None
            ways = [self.own.at_end()] if here else []
            ways += [] if coming is None else [coming.at_start()]
            begins = None if coming is None else coming.split
            last = self._evaluate(self.own.motion.end, losses, ways, begins)
        return last[0], last[-1]

    @property
    def has_paths(self) -> bool:
        """Return whether other paths are requested."""
        return self.own.path is not None

    @property
    def bends(self) -> bool:
        """Return whether another path through its ends is requested and known."""
        return self.own.path is not None and self.own.path.is_known

    def middle(self, evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Numbers]]:
        """Return, for losses at the middle of the segment, the sums of the gradient along the
        motion for each tensor.
        """
        return {
            name: self._along_motion(evaluation).numbers()
            for name, evaluation in evaluations.items()
        }

    def shifts(
        self,
        first: Mapping[str, Evaluation],
        last: Mapping[str, Evaluation],
        middle: Mapping[str, Mapping[str, Numbers]],
    ) -> dict[str, PathShift]:
        """Return how much another path changes the allocation of each loss; empty if no other path
        is known.

        Args:
            first: the losses at θ.
            last: the losses at θ′.
            middle: for each loss, the result of `middle`.
        """
        if self.own.path is None or not self.own.path.is_known:
            return {}
        return self.own.path.shifts(self.objective, (first, last), middle)

    def _along_motion(self, evaluation: Evaluation) -> OfTensors:
        """Return the sums of a gradient along the motion, ([groups]) for each tensor."""
        raise NotImplementedError

    def _looks_ahead(self, here: bool) -> bool:
        """Return whether the next motion is needed at θ′."""
        raise NotImplementedError

    def _held_once(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the point after θ′ is also in memory."""
        return contextlib.nullcontext()

    def _evaluate(
        self, point: Point, losses: list[str], ways: list[Way], begins: Split | None
    ) -> list[dict[str, Evaluation]]:
        """Return losses at a point for each of some motions.

        Args:
            point: the point.
            losses: names of the losses.
            ways: the motions; empty for losses only.
            begins: parts of the motion that starts at the point.
        """
        raise NotImplementedError

    def _signal(self, point: Point, split: Split | None) -> Evaluation | None:
        """Return the signal at a point where a motion starts; None if it is already known, or no
        part needs it.
        """
        if split is None or split.awaits is None:
            return None
        evaluation = self.objective.evaluate(point, [split.awaits])[split.awaits]
        split.gradient = evaluation.gradient
        return evaluation


@dataclass(kw_only=True)
class _Parameters(Segment):
    """Present a segment on which every parameter has its own gradient."""

    def _looks_ahead(self, here: bool) -> bool:
        # if only gradients are needed, the next checkpoint need not be read yet
        alone = not self.per_example and self.own.split is None and self.own.path is None
        return not (alone and here)

    def _along_motion(self, evaluation: Evaluation) -> OfTensors:
        sums = _summed(evaluation, [self.own.motion])
        return sums.like(sums.row[..., 0, :])

    def _evaluate(
        self, point: Point, losses: list[str], ways: list[Way], begins: Split | None
    ) -> list[dict[str, Evaluation]]:
        gradient = bool(ways)
        if self.per_example:
            motions = [way.motion for way in ways]
            evaluations = self.objective.evaluate(
                point, losses, gradient=gradient, examples=motions
            )
        else:
            evaluations = self.objective.evaluate(point, losses, gradient=gradient)
        if begins is not None and gradient and begins.awaits in evaluations:
            begins.gradient = evaluations[begins.awaits].gradient
        self._signal(point, begins)
        if not ways:
            return [evaluations]
        return [
            {
                name: _with_parts(evaluation.examples_along(position), way)
                for name, evaluation in evaluations.items()
            }
            for position, way in enumerate(ways)
        ]


@torch.no_grad()
def _with_parts(evaluation: Evaluation, way: Way) -> Evaluation:
    """Add the sums of an evaluation's gradient along the parts of a motion and the directions in
    `beside`.
    """
    if way.parts:
        evaluation = replace(evaluation, parts=_summed(evaluation, way.parts))
    if way.beside:
        evaluation = replace(evaluation, beside=_summed(evaluation, way.beside))
    return evaluation


def _summed(evaluation: Evaluation, directions: Sequence[Motion]) -> OfTensors:
    """Return the sums of a gradient along directions, ([groups, ]directions) for each tensor."""
    gradient, start = evaluation.gradient, directions[0].start
    names, summed = list[str](), list[Tensor]()
    for row in rows_of({name: start[name] for name in gradient}).every:
        groups = evaluation.totals.shape[0] if evaluation.is_grouped else 1
        of_groups = row.of(gradient, groups)[:, None]
        summed.append(torch.stack([row_sums_along(row, group, directions) for group in of_groups]))
        names += row.names
    sums = torch.cat(summed, -1)
    return OfTensors(sums if evaluation.is_grouped else sums[0], tuple(names))


@dataclass(kw_only=True)
class _Units(Segment):
    """Present a segment on which gradients are summed along the motion, over units, and never
    stored.

    Args:
        axes: axis of the units of each tensor; None if a tensor is one unit.
    """

    axes: Axes

    @functools.cached_property
    def points(self) -> Motion:
        start = self.own.motion.start
        units = {name: units_of(start[name], axis) for name, axis in self.axes.items()}
        return unit_motion(start, units)

    def _looks_ahead(self, here: bool) -> bool:
        return True

    def _along_motion(self, evaluation: Evaluation) -> OfTensors:
        assert isinstance(evaluation.gradient, OfUnits), "gradients are summed over units"
        return evaluation.gradient.totals()

    def _held_once(self) -> contextlib.AbstractContextManager[None]:
        """Keep the end only in the model while the next point is also in memory; an end that is
        read on demand takes no memory.
        """
        end = self.own.motion.end
        if isinstance(end, MutableMapping):
            return self.objective.holding(end)
        return contextlib.nullcontext()

    def _evaluate(
        self, point: Point, losses: list[str], ways: list[Way], begins: Split | None
    ) -> list[dict[str, Evaluation]]:
        # first, because losses are also summed along it
        signal = self._signal(point, begins)
        if not ways:
            return [self._along(point, losses, [], [])]
        directions = [direction for way in ways for direction in way.directions]
        known: dict[str, Evaluation] = {}
        name = self._summed_whole(losses)
        if name is not None and (begins is not None or point is self.own.motion.end):
            if signal is None:
                signal = self.objective.evaluate(point, [name])[name]
            known[name] = self._summed(signal, directions)
        others = [loss for loss in losses if loss not in known]
        if others:
            motions = [way.motion for way in ways]
            known |= self._along(point, others, directions, motions)
        first = [0, *itertools.accumulate(len(way.directions) for way in ways)]
        return [
            {
                loss: known[loss]
                .along(first[position], len(way.parts), len(way.beside))
                .examples_along(position)
                for loss in losses
            }
            for position, way in enumerate(ways)
        ]

    def _summed_whole(self, losses: list[str]) -> str | None:
        """Return the loss whose sums at checkpoints come from its whole gradient, which exists
        where a motion starts.

        It does so at every checkpoint, so that the bits do not depend on where spans end.
        """
        split = self.own.split
        name = None if split is None else split.parts.signal
        return name if name in losses and name not in self.per_example else None

    def _along(
        self,
        point: Point,
        losses: list[str],
        directions: list[Motion],
        motions: list[Motion],
    ) -> dict[str, Evaluation]:
        """Return losses with sums along directions, and with the derivatives of their examples
        along motions; without directions, only losses.
        """
        if self.own.split is None and self.own.path is None:
            directions = motions  # the same object, so that one pass computes both
        along = Along(self.axes, directions) if directions else None
        gradient = along is not None
        if not self.per_example:
            return self.objective.evaluate(point, losses, gradient=gradient, along=along)
        return self.objective.evaluate(
            point, losses, gradient=gradient, along=along, examples=motions
        )

    def _summed(self, signal: Evaluation, directions: list[Motion]) -> Evaluation:
        """Replace the gradient of an evaluation by its sums along directions."""
        sums = {
            name: sums_along(name, gradient, directions, self.axes[name])
            for name, gradient in signal.gradient.items()
        }
        units = Units({name: of_tensor.shape[-1] for name, of_tensor in sums.items()})
        return replace(signal, gradient=OfUnits(torch.cat([*sums.values()], -1), units))


def segment_of(
    own: Way,
    objective: Evaluates,
    axes: Axes | None,
    following: Callable[[], Way | None],
    per_example: frozenset[str] = frozenset(),
) -> Segment:
    """Return a segment with a gradient for every parameter, or with sums over units.

    Args:
        own: motion of the segment.
        objective: evaluates losses.
        axes: by tensor, the axis of its units, or None if it is one unit; None for a gradient of
            every parameter.
        following: as for `Segment`.
        per_example: as for `Segment`.
    """
    if axes is None:
        return _Parameters(
            own=own, objective=objective, following=following, per_example=per_example
        )
    return _Units(
        own=own, objective=objective, following=following, per_example=per_example, axes=axes
    )


def unit_motion(like: Mapping[str, Tensor], units: Mapping[str, int]) -> Motion:
    """Return ends that are 1 apart, by which sums along a motion are multiplied.

    Args:
        like: tensors on the same device.
        units: number of units of each tensor.
    """
    row, device = Units(units), next(iter(like.values())).device
    start, end = (
        OfUnits(torch.full((row.count,), value, dtype=torch.float64, device=device), row)
        for value in (0.0, 1.0)
    )
    return Motion(start, end)
