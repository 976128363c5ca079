"""Say how checkpoints follow each other: segments longer than one step, and checkpoints that hold
the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ..errors import few
from .headers import Header
from .paths import is_remote
from .steps import Choice

_CHUNK = 2**20
_MOST_COMPARED = 2**30


def every_of(header: Header) -> int:
    """Return the `every` of the recorder that wrote a file, as the file states it; 1 where it
    states none.
    """
    stated = header.metadata.get("every", "")
    return int(stated) if re.fullmatch("[1-9][0-9]{0,17}", stated) else 1


def bursts_of(header: Header) -> tuple[int, int] | None:
    """Return the `bursts` of the recorder that wrote a file, `(every, length)`, as the file states
    them; None where it states none.
    """
    stated = re.fullmatch(
        "([1-9][0-9]{0,17}):([1-9][0-9]{0,17})", header.metadata.get("bursts", "")
    )
    return None if stated is None else (int(stated[1]), int(stated[2]))


def between_bursts(
    steps: Sequence[int], bursts: Sequence[tuple[int, int] | None], choice: Choice
) -> frozenset[int]:
    """Return the positions among the used checkpoints after which a burst ends and another one comes
    next: no segment runs across the gap, of which training saw the steps and the files do not tell.

    Args:
        steps: of the used checkpoints, ascending.
        bursts: of each of them, see `bursts_of`.
        choice: which of all they are; with some left out between two, a long segment is meant.
    """
    return frozenset(
        place
        for place, ((before, after), (position, following)) in enumerate(
            zip(pairwise(steps), pairwise(choice.used), strict=True)
        )
        if following == position + 1
        and bursts[place] is not None
        and bursts[place] == bursts[place + 1]
        and _in_different_bursts(before, after, bursts[place])
    )


def _in_different_bursts(before: int, after: int, bursts: tuple[int, int] | None) -> bool:
    return bursts is not None and before // bursts[0] != after // bursts[0]


def long_segments(steps: Sequence[int], every: Sequence[int], choice: Choice) -> list[str]:
    """Return a note on segments longer than one step that the user did not choose.

    Args:
        steps: of all checkpoints, ascending.
        every: for each, the `every` it was recorded with; the user chose a gap of as many steps,
            where no shorter one than that is in the series, but single steps.
        choice: which of them are used, and where no segment follows, which the user chose too.
    """
    ends = [pair for index, pair in enumerate(pairwise(choice.used)) if index not in choice.breaks]
    segments = [(steps[start], steps[stop]) for start, stop in ends]
    long = _unintended(ends, steps, every)
    if not long:
        return []
    inside = sum(stop - start for start, stop in long)
    share = inside / sum(stop - start for start, stop in segments)
    longest = max(long, key=lambda segment: segment[1] - segment[0])
    which = _which(len(long), len(segments))
    return [
        f"{which} longer than one step, with {inside:,} steps or {_percent(share)} of training in "
        f"them, the longest {longest[0]}→{longest[1]}. There the straight line between checkpoints "
        "is not the path that training took, and what is allocated is the straight line's share: "
        "sums over tensors and units mean something; how often a parameter helps and turns (--keep "
        "statistics, parameters) does not. The residual says what quadrature misses"
    ]


def _unintended(
    ends: Sequence[tuple[int, int]], steps: Sequence[int], every: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the segments of more than one step with a gap in them that the user did not choose.

    Args:
        ends: of each segment, as positions in `steps`.
        steps: of all checkpoints, ascending.
        every: as for `long_segments`.
    """
    gaps = [after - before for before, after in pairwise(steps)]
    # in a series with shorter gaps, such as 1, 2, 4, … 512, 1000, 2000, `every` is not its grid
    shortest = min((gap for gap in gaps if gap > 1), default=1)
    intended = [gap == 1 or gap == every[index + 1] == shortest for index, gap in enumerate(gaps)]
    return [
        (steps[start], steps[stop])
        for start, stop in ends
        if not all(intended[start:stop]) and steps[stop] - steps[start] > 1
    ]


def _which(long: int, segments: int) -> str:
    """Return the beginning of a sentence about some of the segments, with its verb."""
    if segments == 1:
        return "the segment is"
    if long == segments:
        return f"all {long} segments are"
    return f"{long} of {segments} segments {'is' if long == 1 else 'are'}"


def _percent(share: float) -> str:
    """Return a share in per cent, never as 100 where it is less."""
    return "100%" if share == 1 else f"{min(share, 0.999):.1%}" if share >= 0.99 else f"{share:.0%}"


class SameTensors:
    """Collect checkpoints that hold the same tensors, whatever else their files state.

    Samples of the tensors' bytes tell the candidates. Local files of neighbours are then compared
    whole, up to 1 GiB in all.
    """

    def __init__(self) -> None:
        self._before: tuple[int, Sequence[Path], Sequence[Header]] | None = None
        self._stretches: list[tuple[int, int]] = []
        self._positions: dict[tuple[object, ...], list[int]] = {}
        self._steps: list[int] = []
        self._count = 0
        self._sampled = False
        self._left = _MOST_COMPARED

    def add(self, step: int, files: Sequence[Path], headers: Sequence[Header]) -> None:
        """Compare the next checkpoint with those before."""
        before, self._before = self._before, (step, files, headers)
        samples = tuple((header.size, *header.data_samples) for header in headers)
        self._positions.setdefault(samples, []).append(len(self._steps))
        self._steps.append(step)
        if before is None or not self._same(before[1], before[2], files, headers):
            return
        self._count += 1
        joins = self._stretches and self._stretches[-1][1] == before[0]
        self._stretches.append((self._stretches.pop()[0] if joins else before[0], step))

    def _same(
        self,
        files: Sequence[Path],
        headers: Sequence[Header],
        others: Sequence[Path],
        other_headers: Sequence[Header],
    ) -> bool:
        if len(headers) != len(other_headers) or not all(
            map(_samples_agree, headers, other_headers)
        ):
            return False
        size = sum(header.size for header in headers)
        if size > self._left or any(map(is_remote, (*files, *others))):
            self._sampled = True
            return True
        self._left -= size
        try:
            return all(map(_same_data, files, headers, others, other_headers))
        except OSError:  # reading it for the run will say so
            return False

    def notes(self) -> list[str]:
        """Return notes on them, if there are any."""
        return [*self._of_wrong_files(), *self._of_still_segments()]

    def _of_wrong_files(self) -> list[str]:
        """Return a note on checkpoints with the same samples and others between them."""
        apart = [
            positions
            for positions in self._positions.values()
            if positions[-1] - positions[0] >= len(positions)
        ]
        if not apart:
            return []
        most = max(apart, key=len)
        steps = few([str(self._steps[position]) for position in most], 6)
        others = f", and {len(apart) - 1} more such sets" if len(apart) > 1 else ""
        return [
            f"{len(most)} of {len(self._steps)} checkpoints hold the same tensors, with others "
            f"between them, as far as samples of their bytes tell: steps {steps}{others}. Files "
            "lie under wrong names, and segments there are not those of training: `lca inspect` "
            "says which"
        ]

    def _of_still_segments(self) -> list[str]:
        if not self._count:
            return []
        shown = few([f"steps {start} to {stop}" for start, stop in self._stretches])
        how = " as far as samples of their bytes tell," if self._sampled else ""
        which = "this segment" if self._count == 1 else f"these {self._count:,} segments"
        single = self._count == sum(stop - start for start, stop in self._stretches)
        or_wrong = "" if single else ", or another step's file, which `lca inspect` tells apart"
        return [
            f"neighbouring checkpoints hold the same tensors,{how} {shown}: in {which} nothing "
            "moves and everything allocated is 0 (a learning rate of 0, a step that was skipped, "
            f"or one state saved twice{or_wrong})"
        ]


def _samples_agree(one: Header, other: Header) -> bool:
    """Compare the samples of the tensors' bytes: the last one always, the others where they lie at
    the same places.
    """
    if one.data_size != other.data_size or one.data_samples[-1] != other.data_samples[-1]:
        return False
    if list(one.tensors) != list(other.tensors):  # bytes in another order
        return False
    return one.size != other.size or one.data_samples == other.data_samples


def _same_data(one: Path, header: Header, other: Path, other_header: Header) -> bool:
    """Compare the tensors' bytes of two files."""
    with one.open("rb") as first, other.open("rb") as second:
        first.seek(header.size - header.data_size)
        second.seek(other_header.size - other_header.data_size)
        while part := first.read(_CHUNK):
            if part != second.read(_CHUNK):
                return False
    return True
