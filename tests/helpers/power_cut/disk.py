"""A disk with a memory before it, as POSIX allows one: writes and names wait in memory until they
are flushed, and a power cut leaves any part of what waits.

Flushing a file makes its bytes durable, and not its name; flushing a directory makes the names in
it durable, and not the bytes of its files. Nothing else does, but for an orderly end. Changes of one
name become durable in their order, and a rename with both its names or not at all.
"""

from __future__ import annotations

import errno
import random
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

SECTOR = 512  # bytes that a device writes whole or not at all
ROOT = 1  # the number of the topmost directory

# what a cut leaves of what waits
DROPPED = "dropped"  # nothing
PARTIAL = "partial"  # names up to a moment, and of every file its writes up to one
TORN = "torn"  # names up to a moment, and of every file some sectors
REORDERED = "reordered"  # some names, in any order but that of one name, and some sectors or none
LOSSES = (DROPPED, PARTIAL, TORN, REORDERED)

Slot = tuple[int, str]  # a directory's number, and a name in it


@dataclass
class Write:
    """Bytes that were written into a file."""

    start: int
    data: bytes


@dataclass
class Resize:
    """A file became shorter, or longer with zeros at its end."""

    size: int


@dataclass
class Node:
    """A file or a directory, whatever its names are.

    Attributes:
        mode: kind and permissions, as `stat` has them.
        changed: when it last changed, in nanoseconds since 1970.
        durable: the bytes of a file that are on the disk.
        data: those its readers see.
        waiting: what makes the one of the other.
    """

    mode: int
    changed: int
    durable: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    waiting: list[Write | Resize] = field(default_factory=list)

    @property
    def is_directory(self) -> bool:
        """Tell whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    def flush(self) -> None:
        """Make the bytes of a file durable."""
        self.durable = bytes(self.data)
        self.waiting.clear()


@dataclass
class NameChange:
    """Names that came to stand for another node, or for none, at once."""

    slots: dict[Slot, int | None]


class Disk:
    """A tree of files and directories, and what of it is on the disk.

    Args:
        lies: whether flushing makes nothing durable, as if nothing had been flushed.
        writes_back: changes from one time to the next that all that waits is made durable, as a
            kernel does every few seconds; None for never.
    """

    def __init__(self, *, lies: bool = False, writes_back: int | None = None) -> None:
        self._lies, self._writes_back, self._changes = lies, writes_back, 0
        self.nodes = {ROOT: Node(stat.S_IFDIR | 0o755, time.time_ns())}
        self.names: dict[Slot, int] = {}
        self._durable_names: dict[Slot, int] = {}
        self._waiting_names: list[NameChange] = []
        self._next = ROOT + 1

    def empty(self) -> Disk:
        """Return one of the same habits with nothing on it."""
        return Disk(lies=self._lies, writes_back=self._writes_back)

    # --- look -------------------------------------------------------------------------------------

    def find(self, path: str) -> int:
        """Return the number of what is at an absolute path.

        Raises:
            FileNotFoundError: where nothing is.
        """
        number = ROOT
        for name in PurePosixPath(path).parts[1:]:
            try:
                number = self.names[number, name]
            except KeyError:
                raise FileNotFoundError(errno.ENOENT, "no such file", path) from None
        return number

    def slot(self, path: str) -> Slot:
        """Return the directory and the name of an absolute path."""
        place = PurePosixPath(path)
        return self.find(str(place.parent)), place.name

    def listing(self, directory: int) -> list[tuple[str, int]]:
        """Return the names in a directory, with the numbers of what they stand for."""
        return [
            (name, number) for (place, name), number in self.names.items() if place == directory
        ]

    # --- change -----------------------------------------------------------------------------------

    def create(self, path: str, mode: int) -> int:
        """Create a file or a directory, by the kind that `mode` has; return its number."""
        slot, number = self.slot(path), self._next
        self._next += 1
        self.nodes[number] = Node(mode, time.time_ns())
        self._rename({slot: number})
        return number

    def remove(self, path: str) -> None:
        """Remove a name."""
        self._rename({self.slot(path): None})

    def rename(self, old: str, new: str) -> None:
        """Give a node another name, in place of whatever has it."""
        before, after = self.slot(old), self.slot(new)
        if before != after:
            self._rename({before: None, after: self.names[before]})

    def write(self, number: int, start: int, data: bytes) -> None:
        """Write bytes into a file."""
        self._change(number, Write(start, data))

    def resize(self, number: int, size: int) -> None:
        """Make a file shorter or longer."""
        self._change(number, Resize(size))

    def _change(self, number: int, change: Write | Resize) -> None:
        node = self.nodes[number]
        _apply(node.data, change)
        node.waiting.append(change)
        node.changed = time.time_ns()
        self._write_back()

    def _rename(self, slots: dict[Slot, int | None]) -> None:
        change = NameChange(slots)
        _apply_names(self.names, [change])
        self._waiting_names.append(change)
        for directory, _ in slots:
            self.nodes[directory].changed = time.time_ns()
        self._write_back()

    def _write_back(self) -> None:
        self._changes += 1
        if self._writes_back is not None and self._changes % self._writes_back == 0:
            self.end()

    # --- flush ------------------------------------------------------------------------------------

    def flush(self, number: int) -> None:
        """Make the bytes of a file durable, or the names in a directory."""
        if self._lies:
            return
        if self.nodes[number].is_directory:
            self._flush_names(number)
        else:
            self.nodes[number].flush()

    def _flush_names(self, directory: int) -> None:
        """Make the names in a directory durable, and what had to come before them."""
        flushed, needed = list[NameChange](), set[Slot]()
        for change in reversed(self._waiting_names):
            if any(place == directory for place, _ in change.slots) or needed & change.slots.keys():
                flushed.append(change)
                needed |= change.slots.keys()
        _apply_names(self._durable_names, reversed(flushed))
        self._waiting_names = [
            change for change in self._waiting_names if not any(change is one for one in flushed)
        ]

    def end(self) -> None:
        """Make everything durable, as an orderly end does."""
        self._durable_names = dict(self.names)
        self._waiting_names.clear()
        for node in self.nodes.values():
            node.flush()

    # --- cut --------------------------------------------------------------------------------------

    def after_cut(self, loss: str, chance: random.Random) -> Disk:
        """Return what the disk holds after a power cut.

        Args:
            loss: one of `LOSSES`.
            chance: by which it is drawn what is left of what waits.
        """
        survivor = self.empty()
        survivor._next = self._next
        names = dict(self._durable_names)
        _apply_names(names, self._surviving_names(loss, chance))
        for number, node in sorted(self.nodes.items()):
            data = bytearray(node.durable)
            for change in _surviving_changes(node.waiting, loss, chance):
                _apply(data, change)
            survivor.nodes[number] = Node(node.mode, node.changed, bytes(data), data)
        survivor.names = dict(_reachable(names))
        survivor._durable_names = dict(survivor.names)
        numbers = {ROOT, *survivor.names.values()}
        survivor.nodes = {number: survivor.nodes[number] for number in numbers}
        return survivor

    def _surviving_names(self, loss: str, chance: random.Random) -> list[NameChange]:
        waiting = self._waiting_names
        if loss == DROPPED:
            return []
        if loss != REORDERED:
            return waiting[: chance.randint(0, len(waiting))]
        survive, lost = list[NameChange](), set[Slot]()
        share = chance.choice((0.5, 0.9, 1.0))
        for change in waiting:
            # what comes after a lost change of the same name is lost as well
            if not lost & change.slots.keys() and chance.random() < share:
                survive.append(change)
            else:
                lost |= change.slots.keys()
        return survive


def _apply(data: bytearray, change: Write | Resize) -> None:
    size = change.size if isinstance(change, Resize) else change.start
    if len(data) < size:
        data.extend(bytes(size - len(data)))
    if isinstance(change, Resize):
        del data[change.size :]
    else:
        data[change.start : change.start + len(change.data)] = change.data


def _apply_names(names: dict[Slot, int], changes: Iterable[NameChange]) -> None:
    for change in changes:
        for slot, number in change.slots.items():
            if number is None:
                names.pop(slot, None)
            else:
                names[slot] = number


def _surviving_changes(
    waiting: list[Write | Resize], loss: str, chance: random.Random
) -> Iterator[Write | Resize]:
    """Yield what a cut leaves of the changes of a file."""
    if loss == DROPPED or not waiting:
        return
    if loss == PARTIAL:
        yield from waiting[: chance.randint(0, len(waiting))]
        return
    share = chance.choice((0.0, 0.5, 1.0)) if loss == REORDERED else 0.5
    for change in waiting:
        if isinstance(change, Resize):
            if chance.random() < share:
                yield change
            continue
        for sector in _sectors(change):
            if chance.random() < share:
                yield sector


def _sectors(write: Write) -> Iterator[Write]:
    """Yield a write in parts that each lie within one sector."""
    place, end = write.start, write.start + len(write.data)
    while place < end:
        following = min(end, (place // SECTOR + 1) * SECTOR)
        yield Write(place, write.data[place - write.start : following - write.start])
        place = following


def _reachable(names: dict[Slot, int]) -> Iterator[tuple[Slot, int]]:
    """Yield the names that are below the topmost directory."""
    within: dict[int, list[tuple[Slot, int]]] = {}
    for slot, number in names.items():
        within.setdefault(slot[0], []).append((slot, number))
    directories = [ROOT]
    while directories:
        for slot, number in within.get(directories.pop(), []):
            yield slot, number
            directories.append(number)
