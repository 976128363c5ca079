"""One segment as the rules see it: evaluations of losses at its nodes, with gradients of every
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
    """Evaluates losses at a point: all the mathematics needs of an objective."""

    def evaluate(
        self,
        point: Point,
        losses: list[str],
        *,
        gradient: bool = True,
        along: Along | None = None,
        examples: Sequence[Motion] | None = None,
    ) -> dict[str, Evaluation]:
        """Return each loss at `point`, with its gradient, or sums of it along directions, unless
        only the value is asked for; with those of its examples along other directions, where it
        tells them apart and they are asked for.
        """

    def holding(
        self, point: MutableMapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Hold a point in the model instead of beside it: inside the context, the point's tensors
        are the model's own where these hold the same numbers.
        """


class Nodes(Protocol):
    """One segment as the rules see it: evaluations at its nodes, however they are come by."""

    @property
    def points(self) -> Motion:
        """Return both ends; ends that are 1 apart where gradients are sums along the motion."""

    def distance(self, names: Iterable[str]) -> Distances:
        """Return Σ|θ′ − θ| of some tensors."""

    def at(self, x: float, losses: list[str], *, gradient: bool = True) -> dict[str, Evaluation]:
        """Return losses at θ + x(θ′ − θ), x < 1."""

    def know_signal(self) -> None:
        """See to it that the gradient at θ is known that parts of the motion are made of, if any
        are.
        """

    def at_end(
        self, losses: list[str], *, here: bool, following: bool
    ) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
        """Return losses at θ′, for this segment and for the one that follows, see `Segment`."""

    @property
    def has_paths(self) -> bool:
        """Tell whether other paths are asked for."""

    @property
    def bends(self) -> bool:
        """Tell whether another path through its ends is asked for and known."""

    def middle(self, evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Numbers]]:
        """Return sums along the motion in the middle, see `Segment`."""

    def shifts(
        self,
        first: Mapping[str, Evaluation],
        last: Mapping[str, Evaluation],
        middle: Mapping[str, Mapping[str, Numbers]],
    ) -> dict[str, PathShift]:
        """Return by how much another path changes the allocation, see `Segment`."""


@dataclass(frozen=True)
class Way:
    """A motion along which gradients are wanted, and its parts and another path; None where none
    are. `beside` are further directions, at one of its ends alone.
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
        """Return the motion, its parts, and what is beside them."""
        return [self.motion, *self.parts, *self.beside]

    def at_start(self) -> Way:
        """Return the same as it is wanted at its start."""
        return self if self.path is None else replace(self, beside=self.path.at_start)

    def at_end(self) -> Way:
        """Return the same as it is wanted at its end."""
        return self if self.path is None else replace(self, beside=self.path.at_end)


@dataclass(kw_only=True)
class Segment:
    """One segment as the rules see it: evaluations at its nodes, and the motion by which their
    gradients are multiplied.

    Args:
        own: its motion.
        objective: evaluates losses.
        following: returns the motion after it; None where there is none. It is not asked for before
            the gradients inside the segment are done, for which it is not needed.
        per_example: losses that tell their examples apart.
    """

    own: Way
    objective: Evaluates
    following: Callable[[], Way | None]
    per_example: frozenset[str]

    @property
    def points(self) -> Motion:
        """Both ends; ends that are 1 apart where gradients are sums along the motion."""
        return self.own.motion

    def distance(self, names: Iterable[str]) -> Distances:
        """Return Σ|θ′ − θ| of some tensors."""
        return distances(self.own.motion, names)

    def at(self, x: float, losses: list[str], *, gradient: bool = True) -> dict[str, Evaluation]:
        """Evaluate losses at θ + x(θ′ − θ), x < 1."""
        start, end = self.own.motion.start, self.own.motion.end
        point = start if x == 0 else Between(start, end, x)
        begins = self.own.split if x == 0 else None
        own = self.own.at_start() if x == 0 else self.own
        return self._evaluate(point, losses, [own] if gradient else [], begins)[0]

    def know_signal(self) -> None:
        """Evaluate the gradient at θ that parts of the motion are made of, where it is not known
        yet.
        """
        self._signal(self.own.motion.start, self.own.split)

    def at_end(
        self, losses: list[str], *, here: bool, following: bool
    ) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
        """Evaluate losses at θ′, for this segment and for the one that follows.

        Args:
            losses: names.
            here: whether this segment wants the gradient there.
            following: whether the one that follows wants it, if one does.
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
        """Tell whether other paths are asked for."""
        return self.own.path is not None

    @property
    def bends(self) -> bool:
        """Tell whether another path through its ends is asked for and known."""
        return self.own.path is not None and self.own.path.is_known

    def middle(self, evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Numbers]]:
        """Return, of losses in the middle of the segment, the sums of the gradient along the
        motion, of each tensor.
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
        """Return by how much another path changes the allocation of losses; of none where no other
        one is known.

        Args:
            first: the losses at θ.
            last: those at θ′.
            middle: of each, see `middle`.
        """
        if self.own.path is None or not self.own.path.is_known:
            return {}
        return self.own.path.shifts(self.objective, (first, last), middle)

    def _along_motion(self, evaluation: Evaluation) -> OfTensors:
        """Return the sums of a gradient along the motion, ([groups]) of each tensor."""
        raise NotImplementedError

    def _looks_ahead(self, here: bool) -> bool:
        """Tell whether the motion after this one is needed at θ′."""
        raise NotImplementedError

    def _held_once(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the point after θ′ is in memory as well."""
        return contextlib.nullcontext()

    def _evaluate(
        self, point: Point, losses: list[str], ways: list[Way], begins: Split | None
    ) -> list[dict[str, Evaluation]]:
        """Return losses at a point, for each of some motions.

        Args:
            point: where.
            losses: names.
            ways: the motions; none for losses alone.
            begins: the parts of the motion that begins there.
        """
        raise NotImplementedError

    def _signal(self, point: Point, split: Split | None) -> Evaluation | None:
        """Return the signal at a point where a motion begins; None where it is known already, or no
        part is made of it.
        """
        if split is None or split.awaits is None:
            return None
        evaluation = self.objective.evaluate(point, [split.awaits])[split.awaits]
        split.gradient = evaluation.gradient
        return evaluation


@dataclass(kw_only=True)
class _Parameters(Segment):
    """A segment on which every parameter has a gradient of its own."""

    def _looks_ahead(self, here: bool) -> bool:
        # where gradients alone are wanted, the next checkpoint need not be read yet
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
    """Return an evaluation with sums of its gradient along the parts of a motion, and along what is
    beside them.
    """
    if way.parts:
        evaluation = replace(evaluation, parts=_summed(evaluation, way.parts))
    if way.beside:
        evaluation = replace(evaluation, beside=_summed(evaluation, way.beside))
    return evaluation


def _summed(evaluation: Evaluation, directions: Sequence[Motion]) -> OfTensors:
    """Return the sums of a gradient along directions, ([groups, ]directions) of each tensor."""
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
    """A segment on which gradients are summed along the motion, over units, and never held.

    Args:
        axes: of the units, by tensor; None where a tensor is one unit.
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
        """Hold the end in the model alone, while the point after it is in memory as well; one that
        is read where it is needed takes none.
        """
        end = self.own.motion.end
        if isinstance(end, MutableMapping):
            return self.objective.holding(end)
        return contextlib.nullcontext()

    def _evaluate(
        self, point: Point, losses: list[str], ways: list[Way], begins: Split | None
    ) -> list[dict[str, Evaluation]]:
        # first, for losses are summed along it as well
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
        """Return the loss whose sums at checkpoints are those of its whole gradient, which is there
        where a motion begins; at all of them, so that bits do not depend on where spans end.
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
        along motions; no directions: losses alone.
        """
        if self.own.split is None and self.own.path is None:
            directions = motions  # the very ones, whose sums then come with those of the examples
        along = Along(self.axes, directions) if directions else None
        gradient = along is not None
        if not self.per_example:
            return self.objective.evaluate(point, losses, gradient=gradient, along=along)
        return self.objective.evaluate(
            point, losses, gradient=gradient, along=along, examples=motions
        )

    def _summed(self, signal: Evaluation, directions: list[Motion]) -> Evaluation:
        """Return an evaluation with the sums of its gradient along directions in its place."""
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
    """Return a segment on which parameters have gradients of their own, or units sums of them."""
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
        like: tensors of the device they are on.
        units: of each of them.
    """
    row, device = Units(units), next(iter(like.values())).device
    start, end = (
        OfUnits(torch.full((row.count,), value, dtype=torch.float64, device=device), row)
        for value in (0.0, 1.0)
    )
    return Motion(start, end)
