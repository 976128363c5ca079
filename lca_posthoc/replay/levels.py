"""Choose the level of `--keep` where none is asked for, and name missing memory."""

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
    """The memory a worker has, and what each level of `--keep` needs beside model and data.

    Attributes:
        levels: the memory that each level needs.
        free: bytes that are free for each worker.
        workers: how many share the memory of a host.
        losses: how many losses are replayed together.
    """

    levels: Mapping[str, LevelMemory]
    free: float
    workers: int
    losses: int

    def fits(self, keep: str) -> bool:
        """Tell whether a worker has the memory that a level needs."""
        return self.levels[keep].needs <= self.free

    def short_of(self, keep: str, *, lower: Iterable[str]) -> str | None:
        """Describe the memory that a replay lacks, before the system kills workers for it; None
        where there is enough.

        Args:
            keep: the level.
            lower: the levels that may replace it, the lowest first.
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
        """Yield the level to use instead: the highest that fits, or the lowest if it needs less."""
        fitting = [level for level in lower if self.fits(level)]
        least = [level for level in lower[:1] if self.levels[level].needs < self.levels[keep].needs]
        yield from fitting[-1:] or least


def highest_that_fits(
    memory: MemoryOfLevels, stored: Callable[[str], int], path: Path, levels: Sequence[str] = KEEP
) -> tuple[str, list[str]]:
    """Return the highest level of `--keep` that fits a worker's memory and half of the free space,
    with a note where it is not the highest of all.

    Where no level fits, return the lowest. The sizes of results are bounds without compression,
    except for totals and histograms: bounds follow from shapes alone and never vary, while an
    estimate after compression needs a trial on a worker. Allocations, the bulk of large results,
    compress by less than a tenth unless parameters are dead.

    Args:
        memory: of a worker.
        stored: returns the most bytes a result takes at a level.
        path: of the run.
        levels: the choice, the lowest first.
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
