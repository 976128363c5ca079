"""The level of `--keep` a run takes where none is asked for, and the memory a replay lacks at a
level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import results
from ..base.text import count
from ..errors import amount
from ..numerics.schema import KEEP
from .requests import LevelMemory


@dataclass(frozen=True, kw_only=True)
class MemoryOfLevels:
    """The memory a worker has, and what it takes beside model and data at each level of `--keep`.

    Attributes:
        levels: what it takes, by level.
        free: bytes that are free for each worker.
        workers: how many share the memory of a host.
        losses: how many losses are replayed together.
    """

    levels: Mapping[str, LevelMemory]
    free: float
    workers: int
    losses: int

    def fits(self, keep: str) -> bool:
        """Tell whether a worker has the memory a level takes."""
        return self.levels[keep].needs <= self.free

    def short_of(self, keep: str, *, lower: Iterable[str]) -> str | None:
        """Say what memory a replay lacks, which would otherwise end in killed workers; None where
        there is enough.

        Args:
            keep: the level.
            lower: the levels that can be taken instead, the lowest first.
        """
        if self.fits(keep):
            return None
        ways = [
            *(["fewer --workers"] if self.workers > 1 else []),
            *(["fewer losses at a time (--loss)"] if self.losses > 1 else []),
            *(f"--keep {level}" for level in self._less(keep, list(lower))),
            "a machine with more memory",
        ]
        return (
            f"a replay of {count(self.losses, 'loss', 'losses')} with --keep {keep} takes about "
            f"{amount(self.levels[keep].needs)} beside model and data, and {amount(self.free)} are "
            f"free for each of {count(self.workers, 'worker')} here. Try {', '.join(ways)}."
        )

    def _less(self, keep: str, lower: list[str]) -> Iterator[str]:
        """Yield the level to take instead: the highest that fits, or the lowest if it takes
        less.
        """
        fitting = [level for level in lower if self.fits(level)]
        least = [level for level in lower[:1] if self.levels[level].needs < self.levels[keep].needs]
        yield from fitting[-1:] or least


def highest_that_fits(
    memory: MemoryOfLevels, stored: Callable[[str], int], path: Path, levels: Sequence[str] = KEEP
) -> tuple[str, list[str]]:
    """Return the highest level of `--keep` that fits the memory of a worker and half of the free
    space, and a note where it is not the highest of all; the lowest level where none fits.

    What a result takes is reckoned without compression but for totals and histograms: that is known
    from shapes alone and always the same, where an estimate after compression needs a trial on a
    worker, and allocations, of which large results consist, are compressed by less than a tenth
    unless parameters are dead.

    Args:
        memory: of a worker.
        stored: returns the bytes a result takes at most at a level.
        path: of the run.
        levels: that may be taken, the lowest first.
    """
    space = results.free_space(path)
    why = ""
    for keep in reversed(levels):
        if not memory.fits(keep):
            lacks = (
                f"{amount(memory.levels[keep].needs)} of memory beside model and data, and "
                f"{amount(memory.free)} are free for each worker"
            )
        elif space is not None and (most := stored(keep)) > space[1] / 2:
            lacks = (
                f"{amount(most)} on disk, and {space[0]} has {amount(space[1])} free, of which half "
                "counts"
            )
        else:
            break
        if keep != levels[0]:
            why = f"{keep} would take up to {lacks}"
    return keep, [f"--keep auto takes {keep}: {why}"] if why else []
