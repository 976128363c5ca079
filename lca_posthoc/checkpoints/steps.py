"""Parse `--steps`: which checkpoints are used, and between which neighbours no segment runs.

The text is an ascending list of single steps `S` and ranges `A:B` or `A:B:K`. A segment joins each
single step to its neighbours in the list, as in a sparse series. No segment joins two ranges: what
lies between them is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..errors import InputError, few

_ITEM = re.compile(r"(?P<first>[0-9]{0,18})(?::(?P<last>[0-9]{0,18})(?::(?P<every>[0-9]{1,18}))?)?")


@dataclass(frozen=True)
class Choice:
    """Select checkpoints.

    Attributes:
        used: positions of the used checkpoints among all, ascending.
        breaks: positions among the used checkpoints after which no segment follows.
        notes: notes for the user.
        named: positions among the used checkpoints of those listed as single steps, which segments
            join to their neighbours.
    """

    used: tuple[int, ...]
    breaks: frozenset[int]
    notes: tuple[str, ...] = ()
    named: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class _Item:
    """Hold one part of the list: a single step, or every K-th checkpoint of a range that includes
    both ends.

    `last` is None if the range is open.
    """

    text: str
    is_single: bool
    first: int
    last: int | None
    every: int

    def holds(self, step: int) -> bool:
        """Return whether a step is in the range."""
        return self.first <= step and (self.last is None or step <= self.last)


@dataclass(frozen=True)
class StepChoice:
    """Hold the parsed list of `--steps`, before the checkpoints are known."""

    text: str
    items: tuple[_Item, ...]

    @property
    def singles(self) -> tuple[int, ...] | None:
        """Return the steps if the list has single steps only; None if it has a range, whose steps
        only the checkpoints determine.
        """
        if all(item.is_single for item in self.items):
            return tuple(item.first for item in self.items)
        return None

    def choose(self, steps: Sequence[int]) -> Choice:
        """Apply the list to the checkpoints.

        Args:
            steps: steps of all checkpoints, ascending.

        Raises:
            InputError: if a single step has no checkpoint.
        """
        parts = [
            [position for position, step in enumerate(steps) if item.holds(step)][:: item.every]
            for item in self.items
        ]
        self._refuse_absent(
            [item for item, part in zip(self.items, parts, strict=True) if not part], steps
        )
        return Choice(
            tuple(position for part in parts for position in part),
            self._breaks([len(part) for part in parts]),
            tuple(
                f"no checkpoint lies in {item.text} of --steps {self.text}"
                for item, part in zip(self.items, parts, strict=True)
                if not part and len(self.items) > 1
            ),
            self._named([len(part) for part in parts]),
        )

    def _named(self, counts: Sequence[int]) -> frozenset[int]:
        """Return the positions of single steps among the used checkpoints; `counts` as for
        `_breaks`.
        """
        firsts = accumulate(counts, initial=0)
        return frozenset(
            first for item, first in zip(self.items, firsts, strict=False) if item.is_single
        )

    def _refuse_absent(self, empty: Sequence[_Item], steps: Sequence[int]) -> None:
        """Raise an error for single steps without a checkpoint.

        Raises:
            InputError: if there are any.
        """
        absent = [item.text for item in empty if item.is_single]
        if absent:
            raise InputError(
                f"--steps {self.text} names {'step' if len(absent) == 1 else 'steps'} "
                f"{few(absent)} without a checkpoint. There are {few_of(steps)}."
            )

    def _breaks(self, counts: Sequence[int]) -> frozenset[int]:
        """Return the positions among the used checkpoints after which no segment follows.

        Args:
            counts: number of checkpoints in each item.
        """
        breaks, before = set(), 0
        filled = [
            (item, count) for item, count in zip(self.items, counts, strict=True) if count > 0
        ]
        for (item, count), (following, _) in pairwise(filled):
            before += count
            if not (item.is_single or following.is_single):
                breaks.add(before - 1)
        return frozenset(breaks)


def few_of(steps: Sequence[int]) -> str:
    """List the first steps in words, and the last.

    >>> few_of([0, 1, 2, 4, 8]), few_of([])
    ('steps 0, 1, 2 and 2 more, the last 8', 'none at all')
    """
    if not steps:
        return "none at all"
    last = f", the last {steps[-1]}" if len(steps) > 3 else ""
    return f"step{'s' if len(steps) > 1 else ''} {few([*map(str, steps)])}{last}"


def parse_steps(text: str) -> StepChoice:
    """Parse the argument of `--steps`.

    >>> parse_steps("0,1,2,4").singles, parse_steps("0:3,100:103").singles
    ((0, 1, 2, 4), None)
    >>> parse_steps("0:1,5:6,9").choose(range(10))
    Choice(used=(0, 1, 5, 6, 9), breaks=frozenset({1}), notes=(), named=frozenset({4}))

    Raises:
        InputError: if the text is not such a list, or does not ascend.
    """
    items = tuple(_item(part, text) for part in text.split(","))
    for item, following in pairwise(items):
        if item.last is None or item.last >= following.first:
            raise InputError(
                f"--steps {text}: {following.text} does not come after {item.text}. Write single "
                "steps and ranges in ascending order, none of them twice."
            )
    return StepChoice(text, items)


def _item(part: str, text: str) -> _Item:
    """Parse one part of the list.

    Raises:
        InputError: if it is neither a step nor a range.
    """
    match = _ITEM.fullmatch(part)
    if match is None or match["every"] == "0" or not part:
        raise InputError(
            f"--steps {text!r} is not A:B or A:B:K, nor a list of such ranges and of single steps. "
            "For example 0:500, 100:, ::10 for every tenth checkpoint, 0,1,2,4,8, or 0:3,100:103."
        )
    is_single = ":" not in part
    first = int(match["first"] or 0)
    last = first if is_single else int(match["last"]) if match["last"] else None
    if last is not None and last < first:
        raise InputError(f"--steps {text}: the range {part} ends before it begins.")
    return _Item(
        text=part,
        is_single=is_single,
        first=first,
        last=last,
        every=int(match["every"] or 1),
    )
