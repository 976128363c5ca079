"""Interrupt what works on a disk, again and again: its power is cut, or who works is killed."""

from __future__ import annotations

import contextlib
import copy
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.faults.processes import Driver

from .disk import LOSSES, Disk
from .mount import HANGS, Mounted

KILLED = 0.2  # share of interruptions without a cut


class Interrupted(Exception):
    """The power was cut, or who worked was killed."""


class Session:
    """Processes that work on a mounted disk, for the length of the context; at the moment of an
    interruption all are killed.
    """

    def __init__(self, mounted: Mounted) -> None:
        self._mounted = mounted
        self._drivers: list[Driver] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()  # those that a failed assertion left

    def start(self, driver: Driver) -> Driver:
        """Take a process in that was just started."""
        self._drivers.append(driver)
        return driver

    def finished(self, driver: Driver) -> int:
        """Wait for the end of a process that was taken in; return its exit code."""
        while driver.returncode is None:
            self.wait()
        return driver.finished()

    def wait(self) -> None:
        """Wait for the end of one of the processes.

        Raises:
            Interrupted: where they were killed instead.
        """
        if self._mounted.is_cut(*(driver.sentinel for driver in self._running())):
            self._kill()
            raise Interrupted

    def _running(self) -> list[Driver]:
        return [driver for driver in self._drivers if driver.returncode is None]

    def _kill(self) -> None:
        running = self._running()
        killed = [process for driver in running for process in driver.session()]
        for process in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._mounted.let_fail()
        for driver in running:
            driver.kill()
        assert psutil.wait_procs(killed, HANGS)[1] == []


@dataclass
class Powered:
    """A disk that is interrupted at moments, and with losses, drawn from a seed.

    Attributes:
        place: where it is mounted.
        chance: by which all is drawn.
        disk: what is on it.
        cuts: how many there were while something worked, of each kind of loss.
        cuts_at_rest: those after something had ended.
        kills: without a cut, so that what waits to be flushed waits on.
    """

    place: Path
    chance: random.Random
    disk: Disk
    cuts: Counter[str] = field(default_factory=Counter)
    cuts_at_rest: int = 0
    kills: int = 0

    @property
    def total(self) -> int:
        """The cuts while something worked."""
        return self.cuts.total()

    @property
    def told(self) -> str:
        """How many interruptions there were, and which."""
        kinds = ", ".join(f"{self.cuts[loss]} {loss}" for loss in LOSSES if self.cuts[loss])
        return (
            f"{self.total} cuts ({kinds}), {self.cuts_at_rest} at rest and {self.kills} kills alone"
        )

    def empty(self) -> None:
        """Begin with an empty disk."""
        self.disk = self.disk.empty()

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Session]:
        """Mount it, without an interruption."""
        with Mounted(self.place, self.disk) as mounted, Session(mounted) as session:
            yield session
        self.disk = mounted.disk

    def is_interrupted(self, most: int, work: Callable[[Session], object]) -> bool:
        """Mount it and let something work, until the end or an interruption.

        Args:
            most: changes of the disk before the latest moment of an interruption.
            work: changes the disk by the processes of its session alone.
        """
        is_interrupted = False
        mounted = Mounted(self.place, self.disk, self.chance.randint(1, most))
        with mounted, Session(mounted) as session:
            try:
                work(session)
            except Interrupted:
                is_interrupted = True
        self.disk = mounted.disk
        if is_interrupted and self.chance.random() < KILLED:
            self.kills += 1
        elif is_interrupted:
            self.cuts[self._lose()] += 1
        return is_interrupted

    def cut(self) -> None:
        """Cut the power while nothing works."""
        self._lose()
        self.cuts_at_rest += 1

    def _lose(self) -> str:
        loss = self.chance.choice(LOSSES)
        self.disk = self.disk.after_cut(loss, self.chance)
        return loss

    def changes(self, work: Callable[[Session], object]) -> int:
        """Let something work on a copy of it, undisturbed; return how often that changes it."""
        with (
            Mounted(self.place, copy.deepcopy(self.disk)) as mounted,
            Session(mounted) as session,
        ):
            work(session)
        return mounted.changes


@contextlib.contextmanager
def powered(seed: int, *, lies: bool = False, writes_back: int | None = None) -> Iterator[Powered]:
    """An empty disk, of habits as `Disk` has them."""
    with tempfile.TemporaryDirectory(prefix="lca-power-") as place:
        disk = Disk(lies=lies, writes_back=writes_back)
        yield Powered(Path(place), random.Random(seed), disk)
