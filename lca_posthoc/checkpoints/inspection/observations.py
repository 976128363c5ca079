"""Describe in words what the readings of a series show."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from ...base.text import count, safe
from ...errors import few
from . import geometry
from .geometry import Points
from .measure import Measured, Reading
from .missing import gaps_in_a_grid

GRADES = ("defect", "doubt", "note")

_RESTING = 0.1  # share of the typical motion per step; less means that training came to rest
_ROUNDED_AWAY = 0.9  # share of weights with unchanged bits, beyond which all may stay unchanged
_BELONGS = 0.5  # largest ratio of the best place's distance to the second best
_MANY_COPIES = 5  # single steps at rest; after as many, the jump behind a copied file stands out
_MOST_STRETCHES = 6


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Describe one thing that was observed.

    Attributes:
        kind: "not finite", "identical", "still", "descent", "two series", "elsewhere", "order",
            "jump", "oscillation", "half precision", "missing" or "too small".
        grade: "defect" if a file is wrong or belongs to another training run, "doubt" if it is
            worth a look, "note" if all is well but worth knowing.
        steps: steps of the checkpoints concerned.
        text: one sentence or more, without the final full stop.
    """

    kind: str
    grade: str
    steps: tuple[int, ...]
    text: str


def observe(measured: Measured, breaks: Collection[int] = ()) -> list[Observation]:
    """Return the observations, the worst first.

    Args:
        measured: the series.
        breaks: steps after which no segment starts, so that nothing is missing there.
    """
    seen = [*_not_finite(measured.readings)]
    usable = [reading for reading in measured.readings if not reading.not_finite]
    same, single = _same(usable)
    seen += same
    if measured.compared >= geometry.FEWEST_WEIGHTS:
        seen += _of_distances(Points(single))
        seen += _half_precision(measured, usable)
    else:
        seen.append(_too_small(measured.compared))
    seen += _missing([reading.step for reading in measured.readings], breaks)
    seen = [some for some in seen if some.kind != "jump" or not _is_across(some.steps, breaks)]
    return sorted(seen, key=lambda observation: GRADES.index(observation.grade))


def _is_across(steps: Sequence[int], breaks: Collection[int]) -> bool:
    """Return whether a break lies between the first and the last of some steps."""
    return any(steps[0] <= step < steps[-1] for step in breaks)


def _too_small(elements: int) -> Observation:
    return Observation(
        kind="too small",
        grade="note",
        steps=(),
        text=f"only {count(elements, 'weight')} move, too few to distinguish training runs by "
        f"distances; that needs {geometry.FEWEST_WEIGHTS:,}",
    )


def stretches(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Join ascending positions into runs of consecutive ones, as (first, last).

    >>> stretches([1, 2, 3, 7])
    [(1, 3), (7, 7)]
    """
    joined: list[tuple[int, int]] = []
    for position in positions:
        if joined and joined[-1][1] == position - 1:
            joined[-1] = (joined[-1][0], position)
        else:
            joined.append((position, position))
    return joined


def _listed(steps: Sequence[int], positions: Sequence[int]) -> str:
    """Return the steps of some positions of a series, such as "steps 1, 5 to 9"."""
    words = [
        f"{steps[first]}" + f" to {steps[last]}" * (last > first)
        for first, last in stretches(positions)
    ]
    one = len(positions) == 1
    return f"step{'' if one else 's'} {few(words, _MOST_STRETCHES)}"


# --- numbers that are not finite ------------------------------------------------------------------


def _not_finite(readings: Sequence[Reading]) -> Iterator[Observation]:
    """Report the checkpoints with NaN or Inf; consecutive ones share an observation."""
    bad = [position for position, reading in enumerate(readings) if reading.not_finite]
    for first, last in stretches(bad):
        reading = readings[first]
        worst = sorted(reading.not_finite.items(), key=lambda item: -item[1])
        tensors = few([f"{number:,} in {safe(repr(name))}" for name, number in worst])
        until = f", and likewise up to step {readings[last].step}" if last > first else ""
        yield Observation(
            kind="not finite",
            grade="defect",
            steps=tuple(readings[position].step for position in range(first, last + 1)),
            text=f"step {reading.step} holds NaN or Inf: {tensors}{until}. Segments that touch "
            "such a checkpoint cannot be allocated",
        )


# --- the same weights several times ---------------------------------------------------------------


def _same(readings: Sequence[Reading]) -> tuple[list[Observation], list[Reading]]:
    """Compare checkpoints with identical weights.

    Return the observations, and one checkpoint for each distinct state of the weights, at the place
    where it belongs.
    """
    groups: dict[str, list[int]] = {}
    for position, reading in enumerate(readings):
        groups.setdefault(reading.weights_digest, []).append(position)
    if len(groups) == 1 and len(readings) > 1:
        return [_nothing_moves(readings)], [readings[0]]
    seen, dropped, still = list[Observation](), set[int](), list[list[int]]()
    for positions in groups.values():
        parts = stretches(positions)
        if len(parts) > 1:
            place = _place(readings, parts)
            seen.append(_identical(readings, positions, place))
            dropped |= {*positions} - ({place[0]} if place else set())
        elif len(positions) > 1:
            still.append(positions)
            dropped |= {*positions[1:]}
    rest = [position for position in range(len(readings)) if position not in dropped]
    neighbours = [*_still(readings, rest, still)]
    # distances do not show which of the names is right
    wrong = {step for some in neighbours if some.grade == "defect" for step in some.steps}
    single = [readings[position] for position in rest if readings[position].step not in wrong]
    return [*seen, *neighbours], single


def _nothing_moves(readings: Sequence[Reading]) -> Observation:
    return Observation(
        kind="identical",
        grade="defect",
        steps=tuple(reading.step for reading in readings),
        text=f"all {len(readings)} checkpoints hold the same weights: nothing moves in this series",
    )


def _place(readings: Sequence[Reading], parts: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the run of positions where repeated weights belong: the one much nearer to its
    neighbours than any other; None if no run is.
    """
    fits = sorted((_misfit(readings, first, last), (first, last)) for first, last in parts)
    return fits[0][1] if fits[0][0] < _BELONGS * fits[1][0] else None


def _misfit(readings: Sequence[Reading], first: int, last: int) -> float:
    """Return the larger of the distances between a run and the checkpoints next to it."""
    points = Points(readings)
    sides = [(first - 1, first)] * (first > 0) + [(last, last + 1)] * (last + 1 < len(points))
    return max(points.distance(*side) for side in sides)


def _identical(
    readings: Sequence[Reading], positions: Sequence[int], place: tuple[int, int] | None
) -> Observation:
    steps = [reading.step for reading in readings]
    belong = (
        f" By their distances to the others they belong at {_listed(steps, place[:1])}; the "
        "other files have a wrong name"
        if place
        else " Some of these files have a wrong name"
    )
    return Observation(
        kind="identical",
        grade="defect",
        steps=tuple(readings[position].step for position in positions),
        text=f"{len(positions)} of {len(readings)} checkpoints hold the same weights, with others "
        f"between them: {_listed(steps, positions)}.{belong}",
    )


# --- neighbours with the same weights -------------------------------------------------------------


def _still(
    readings: Sequence[Reading], rest: Sequence[int], still: Sequence[Sequence[int]]
) -> Iterator[Observation]:
    """Decide for neighbours with identical weights whether training stood still or a file is wrong.

    Args:
        readings: readings of the series.
        rest: positions of one checkpoint for each state of the weights, in order.
        still: groups of neighbouring positions; the first position of each group is in `rest`.
    """
    motion = _Motion(readings, rest)
    resting: dict[str, list[int]] = {}
    for positions in still:
        reason = motion.reason_to_rest(positions[0], positions[-1])
        if reason is None:
            yield _wrong_neighbours(readings, positions)
        else:
            resting.setdefault(reason, []).extend(positions)
    for reason, positions in resting.items():
        yield Observation(
            kind="still",
            grade="note",
            steps=tuple(readings[position].step for position in positions),
            text=f"neighbouring checkpoints hold the same weights, {_stretches(readings, positions)}: "
            f"{reason}. These segments allocate nothing",
        )


def _stretches(readings: Sequence[Reading], positions: Sequence[int]) -> str:
    """Return the steps of ascending positions, naming each run of identical weights by its ends."""
    ends: list[tuple[int, int]] = []
    for position in positions:
        if ends and readings[ends[-1][0]].weights_digest == readings[position].weights_digest:
            ends[-1] = (ends[-1][0], position)
        else:
            ends.append((position, position))
    words = [f"{readings[first].step} to {readings[last].step}" for first, last in ends]
    return f"steps {few(words, _MOST_STRETCHES)}"


def _wrong_neighbours(readings: Sequence[Reading], positions: Sequence[int]) -> Observation:
    steps = tuple(readings[position].step for position in positions)
    which = "both are" if len(steps) == 2 else f"all {len(steps)} are"
    return Observation(
        kind="identical",
        grade="defect",
        steps=steps,
        text=f"steps {steps[0]} to {steps[-1]} hold the same weights, while the checkpoints around "
        f"them move: {which} copies of one checkpoint, and at most one has the right name",
    )


class _Motion:
    """Measure the motion of a series around its still stretches.

    Args:
        readings: readings of the series.
        rest: positions of one checkpoint for each state of the weights, in order.
    """

    def __init__(self, readings: Sequence[Reading], rest: Sequence[int]) -> None:
        self._readings, self._rest = readings, list(rest)
        points = Points([readings[position] for position in rest])
        self._lengths, self._factors = geometry.lengths_and_factors(points)
        self._typical = median(
            [self._speed(segment) for segment in range(len(self._lengths))] or [0]
        )

    def _speed(self, segment: int) -> float:
        """Return the motion of a segment per step."""
        before = self._readings[self._rest[segment + 1] - 1]
        return self._lengths[segment] / (self._readings[self._rest[segment + 1]].step - before.step)

    def reason_to_rest(self, first: int, last: int) -> str | None:
        """Return why training may have stood still between two positions, or None if nothing
        explains it.

        Args:
            first: first position with these weights.
            last: last position with these weights.
        """
        inside = self._readings[first : last + 1]
        place = self._rest.index(first)
        beside = [place - 1] * (place > 0) + [place] * (place < len(self._lengths))
        if len({reading.digest for reading in inside}) > 1:
            return "other tensors move, so training went on (a learning rate of 0, or frozen)"
        if all(after.step - before.step == 1 for before, after in pairwise(inside)):
            return self._reason_in_single_steps(first, last, beside)
        at_an_end = first == 0 or last == len(self._readings) - 1
        slow = [self._speed(segment) <= _RESTING * self._typical for segment in beside]
        if at_an_end and all(slow):
            return "the checkpoints next to them hardly move either (a learning rate near 0)"
        shares = [self._readings[self._rest[segment + 1]].same_bits or 0.0 for segment in beside]
        if all(share >= _ROUNDED_AWAY for share in shares):
            return "nearly all weights next to them keep their bits too (frozen, or rounded away)"
        return None

    def _reason_in_single_steps(self, first: int, last: int, beside: Sequence[int]) -> str | None:
        if first == 0:
            return "a learning rate of 0, as at the start of a warm-up"
        copies = last - first >= _MANY_COPIES
        if copies and any(self._factors[segment] > geometry.NEARER for segment in beside):
            return None
        return "a learning rate of 0, skipped steps, or one state saved again"


# --- distances ------------------------------------------------------------------------------------


def _of_distances(points: Points) -> list[Observation]:
    """Return what the distances show about one checkpoint for each state of the weights."""
    if len(points) < 2:
        return []
    sets = geometry.related(points)
    seen = list[Observation]()
    if len(sets) > 1 and not geometry.across_a_long_gap(points.steps, sets):
        seen += _unrelated(points, sets)
    for some in sets:
        own = points.at_positions(some)
        if len(own) >= geometry.FEWEST:
            seen += _of_one_descent(own)
    return seen


def _unrelated(points: Points, sets: Sequence[Sequence[int]]) -> Iterator[Observation]:
    """Report sets of checkpoints that correlate with no other set."""
    most = max(sets, key=len)
    large = [some for some in sets if len(some) >= geometry.FEWEST_OF_A_SERIES]
    readings = points.readings
    if len(large) > 1:
        listed = "; ".join(
            f"{count(len(some), 'checkpoint')} of {_listed(points.steps, some)}" for some in large
        )
        yield Observation(
            kind="two series",
            grade="defect",
            steps=tuple(readings[some[0]].step for some in large),
            text=f"{len(large)} series lie in one place: {listed}. Their weights are not "
            "correlated, as with different seeds or models. Select one with --pattern, or "
            "move one away",
        )
    for some in sets:
        if some is most or some in large:
            continue
        yield _no_descent(points, some, most)


def _no_descent(points: Points, some: Sequence[int], most: Sequence[int]) -> Observation:
    """Report a few checkpoints that do not belong to the same training run as the majority."""
    first = points.steps[0]
    steps = tuple(points.steps[position] for position in some)
    listed = _listed(points.steps, some)
    if some[0] == 0:
        text = (
            f"the checkpoints from step {points.steps[most[0]]} on do not descend from {listed}: "
            "their weights are not correlated with it. It comes from another seed or model"
        )
    else:
        text = (
            f"{listed} {'does' if len(some) == 1 else 'do'} not descend from step {first}: the "
            "weights are not correlated with those of the other checkpoints. They come from another "
            "seed or model"
        )
    return Observation(kind="descent", grade="defect", steps=steps, text=text)


def _of_one_descent(points: Points) -> Iterator[Observation]:
    """Yield what the distances show about checkpoints with correlated weights."""
    pairs = geometry.exchanges(points)
    yield from (_exchanged(points, *pair) for pair in pairs)
    points = points.with_exchanged(pairs)
    chains = geometry.chains(points)
    main = max(chains, key=len)
    apart = [
        chain for chain in chains if chain is not main and geometry.are_apart(points, chain, main)
    ]
    if not geometry.are_clean(apart, main):
        yield _oscillation(points, apart)
        return
    for chain in apart:
        if len(chain) >= geometry.FEWEST_OF_A_SERIES:
            yield _second_series(points, chain, main)
            return
        yield from (_elsewhere(points, position) for position in chain)
    if len(main) >= geometry.FEWEST:
        yield from _jumps(points.at_positions(main))


def _oscillation(points: Points, apart: Sequence[Sequence[int]]) -> Observation:
    positions = sorted(position for chain in apart for position in chain)
    return Observation(
        kind="oscillation",
        grade="note",
        steps=tuple(points.steps[position] for position in positions),
        text=f"many checkpoints are nearer to earlier ones than to their neighbours, such as "
        f"{_listed(points.steps, positions)}: training oscillates, or several series with one "
        "start lie in one place",
    )


def _second_series(points: Points, chain: Sequence[int], main: Sequence[int]) -> Observation:
    return Observation(
        kind="two series",
        grade="doubt",
        steps=tuple(points.steps[position] for position in chain),
        text="two series with one start seem to lie in one place, unless training oscillates "
        f"between two states: {_listed(points.steps, chain)} are far from "
        f"{_listed(points.steps, main)} and near each other. Select one with --pattern, or "
        "move one away",
    )


def _exchanged(points: Points, one: int, other: int) -> Observation:
    steps = (points.steps[one], points.steps[other])
    return Observation(
        kind="order",
        grade="defect",
        steps=steps,
        text=f"steps {steps[0]} and {steps[1]} are exchanged: by its distances to the checkpoints "
        "around, each lies where the other belongs",
    )


def _elsewhere(points: Points, position: int) -> Observation:
    others = [other for other in range(len(points)) if abs(other - position) > 1]
    nearest = min(others, key=lambda other: points.distance(position, other))
    beside = min(
        points.distance(position, other)
        for other in (position - 1, position + 1)
        if 0 <= other < len(points)
    )
    nearer = points.distance(position, nearest) < beside
    return Observation(
        kind="elsewhere",
        grade="defect",
        steps=(points.steps[position],),
        text=f"step {points.steps[position]} does not lie between the checkpoints before and after "
        "it, which are much nearer to each other than to it"
        + (f"; the nearest to it is step {points.steps[nearest]}" if nearer else "")
        + ". It is another checkpoint under a wrong name, or comes from another training run",
    )


def _jumps(points: Points) -> Iterator[Observation]:
    for start, times in geometry.jumps(points):
        steps = (points.steps[start], points.steps[start + 1])
        yield Observation(
            kind="jump",
            grade="doubt",
            steps=steps,
            text=f"from step {steps[0]} to {steps[1]} the weights jump: {times:.3g} times as far "
            "as the segments around suggest. Steps may be missing or misnumbered there, training "
            "may have resumed from another checkpoint, or the loss may have blown up",
        )


# --- precision and gaps ---------------------------------------------------------------------------


def _half_precision(measured: Measured, usable: Sequence[Reading]) -> Iterator[Observation]:
    """Report how many weights half precision froze, whether stored in it or converted to float32
    later.
    """
    widened = {reading.widened_from for reading in usable}
    if measured.half_precision:
        what = (
            f"{len(measured.half_precision)} of {count(len(measured.weights), 'tensor')} of "
            "weights are stored in half precision"
        )
    elif len(widened) == 1 and None not in widened:
        (dtype,) = widened
        what = f"the float32 weights were converted from {dtype}: every number is one of that type"
    else:
        return
    shares = [
        reading.same_bits for reading in measured.readings if reading.distance and reading.same_bits
    ]
    frozen = median(shares) if shares else 0.0
    yield Observation(
        kind="half precision",
        grade="doubt",
        steps=(),
        text=f"{what}. From one checkpoint to the next, {frozen:.0%} of the weights keep their bits "
        "while others move (median): rounding removed their motion, so they are allocated nothing",
    )


def _missing(steps: Sequence[int], breaks: Collection[int]) -> Iterator[Observation]:
    """Report steps that are missing from an otherwise regular grid."""
    gaps = [gap for gap in gaps_in_a_grid(steps) if gap[0] not in breaks]
    if not gaps:
        return
    lost = [(first + apart, last - apart, apart) for first, last, apart in gaps]
    number = sum((last - first) // apart + 1 for first, last, apart in lost)
    words = [f"{first}" + f" to {last}" * (last > first) for first, last, _ in lost]
    yield Observation(
        kind="missing",
        grade="doubt",
        steps=tuple(first for first, _, _ in lost),
        text=f"{count(number, 'checkpoint')} of an otherwise regular series "
        f"{'is' if number == 1 else 'are'} missing: step{'s' * (number > 1)} "
        f"{few(words, _MOST_STRETCHES)}. Segments across the gaps are longer",
    )
