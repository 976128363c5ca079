"""Describe how checkpoints follow each other: segments longer than one step, and checkpoints with
identical tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ..base.text import count
from ..errors import few
from .headers import Header
from .paths import is_remote
from .steps import Choice

_CHUNK = 2**20
_MOST_COMPARED = 2**30


def every_of(header: Header) -> int:
    """Return the recorder's `every` from a file's header, or 1 if the file does not state it."""
    stated = header.metadata.get("every", "")
    return int(stated) if re.fullmatch("[1-9][0-9]{0,17}", stated) else 1


def bursts_of(header: Header) -> tuple[int, int] | None:
    """Return the recorder's `bursts`, `(every, length)`, from a file's header, or None."""
    stated = re.fullmatch(
        "([1-9][0-9]{0,17}):([1-9][0-9]{0,17})", header.metadata.get("bursts", "")
    )
    return None if stated is None else (int(stated[1]), int(stated[2]))


def between_bursts(
    steps: Sequence[int], bursts: Sequence[tuple[int, int] | None], choice: Choice
) -> frozenset[int]:
    """Return the positions among the used checkpoints that end a burst before another one.

    No segment runs across such a gap: training took steps there that the files do not show.

    Args:
        steps: steps of the used checkpoints, ascending.
        bursts: bursts of each used checkpoint, see `bursts_of`.
        choice: which checkpoints are used. Single steps are joined to their neighbours. If no two
            used checkpoints share a burst, all are joined: the user then wants long segments.
    """
    every = range(len(steps) - 1)
    between = frozenset(
        place
        for place in every
        if bursts[place] is not None
        and bursts[place] == bursts[place + 1]
        and _in_different_bursts(steps[place], steps[place + 1], bursts[place])
    )
    thinned = any(after > before + 1 for before, after in pairwise(choice.used))
    if thinned and between.issuperset(every):
        return frozenset()
    return frozenset(place for place in between if not {place, place + 1} & choice.named)


def _in_different_bursts(before: int, after: int, bursts: tuple[int, int] | None) -> bool:
    return bursts is not None and before // bursts[0] != after // bursts[0]


def long_segments(steps: Sequence[int], every: Sequence[int], choice: Choice) -> list[str]:
    """Return a note on segments longer than one step that the user did not choose.

    Args:
        steps: steps of all checkpoints, ascending.
        every: the `every` that each checkpoint was recorded with. The user chose gaps of that many
            steps, provided that every shorter gap in the series is a single step.
        choice: which checkpoints are used, and after which no segment follows; the user chose both.
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
        "is not the path that training took, and the allocation is that of the straight line. Sums "
        "over tensors and units are meaningful within their path band (± path in `lca summary`, "
        "from --path-band: how much other paths through the checkpoints would change them); how "
        "often a parameter helps and turns (--keep statistics, parameters) is not. The residual "
        "shows what quadrature misses"
    ]


def _unintended(
    ends: Sequence[tuple[int, int]], steps: Sequence[int], every: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the segments of more than one step that contain a gap the user did not choose.

    Args:
        ends: both ends of each segment, as positions in `steps`.
        steps: steps of all checkpoints, ascending.
        every: as for `long_segments`.
    """
    gaps = [after - before for before, after in pairwise(steps)]
    # if the series has shorter gaps, as in 1, 2, 4, … 512, 1000, 2000, `every` is not its grid
    shortest = min((gap for gap in gaps if gap > 1), default=1)
    intended = [gap == 1 or gap == every[index + 1] == shortest for index, gap in enumerate(gaps)]
    return [
        (steps[start], steps[stop])
        for start, stop in ends
        if not all(intended[start:stop]) and steps[stop] - steps[start] > 1
    ]


def _which(long: int, segments: int) -> str:
    """Return the start of a sentence about some of the segments, with its verb."""
    if segments == 1:
        return "the segment is"
    if long == segments:
        return f"all {long} segments are"
    return f"{long} of {segments} segments {'is' if long == 1 else 'are'}"


def _percent(share: float) -> str:
    """Format a share in per cent; never round it up to 100."""
    return "100%" if share == 1 else f"{min(share, 0.999):.1%}" if share >= 0.99 else f"{share:.0%}"


class SameTensors:
    """Collect checkpoints with identical tensors, whatever else their files contain.

    Samples of the tensor data select candidates. Neighbouring local files are then compared in
    full, up to 1 GiB in all.
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
        """Compare the next checkpoint with the earlier ones.

        Args:
            step: training step.
            files: files of the checkpoint.
            headers: their headers.
        """
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
        except OSError:  # the run will report it when it reads the file
            return False

    def notes(self) -> list[str]:
        """Return notes on identical checkpoints; an empty list if there are none."""
        return [*self._of_wrong_files(), *self._of_still_segments()]

    def _of_wrong_files(self) -> list[str]:
        """Return a note on checkpoints that share their samples although others lie between them."""
        apart = [
            positions
            for positions in self._positions.values()
            if positions[-1] - positions[0] >= len(positions)
        ]
        if not apart:
            return []
        most = max(apart, key=len)
        steps = few([str(self._steps[position]) for position in most], 6)
        others = (
            f", and likewise {count(len(apart) - 1, 'other set')} of steps"
            if len(apart) > 1
            else ""
        )
        return [
            f"{len(most)} of {len(self._steps)} checkpoints hold the same tensors, with others "
            f"between them, judging by samples of their bytes: steps {steps}{others}. Some files "
            "have wrong names, so some segments are not those of training: `lca inspect` says which"
        ]

    def _of_still_segments(self) -> list[str]:
        if not self._count:
            return []
        shown = few([f"steps {start} to {stop}" for start, stop in self._stretches])
        how = " judging by samples of their bytes," if self._sampled else ""
        which = "this segment" if self._count == 1 else f"these {self._count:,} segments"
        single = self._count == sum(stop - start for start, stop in self._stretches)
        or_wrong = "" if single else ", or another step's file, which `lca inspect` tells apart"
        return [
            f"neighbouring checkpoints hold the same tensors,{how} {shown}: in {which} nothing "
            "moves and every allocation is 0 (a learning rate of 0, a skipped step, or one state "
            f"saved twice{or_wrong})"
        ]


def _samples_agree(one: Header, other: Header) -> bool:
    """Compare the samples of two files: always the last one, and the others if they lie at the same
    offsets.
    """
    if one.data_size != other.data_size or one.data_samples[-1] != other.data_samples[-1]:
        return False
    if list(one.tensors) != list(other.tensors):  # the data is in another order
        return False
    return one.size != other.size or one.data_samples == other.data_samples


def _same_data(one: Path, header: Header, other: Path, other_header: Header) -> bool:
    """Compare the tensor data of two files."""
    with one.open("rb") as first, other.open("rb") as second:
        first.seek(header.size - header.data_size)
        second.seek(other_header.size - other_header.data_size)
        while part := first.read(_CHUNK):
            if part != second.read(_CHUNK):
                return False
    return True
