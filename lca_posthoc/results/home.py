"""Define types for the homes of runs: the state of a path, and the lock file of drivers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, Self

Kind = Literal["file", "directory", "link", "other"]


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a path at one moment.

    Attributes:
        kind: a file, a directory, a link (where links are not followed), or something else.
        size: in bytes.
        changed: time of the last change or heartbeat, in seconds since 1970.
        version: changes whenever the file is replaced or written to.
    """

    kind: Kind
    size: int
    changed: float
    version: tuple[int | str, ...]


class LockFile(Protocol):
    """The file that keeps drivers apart, open for the length of a context."""

    @property
    def is_of_kernel(self) -> bool:
        """Tell whether a kernel lock keeps the processes of this host apart.

        If not, only the bytes of the file do: no two drivers can write the first.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the kernel lock without waiting; return False where there is none.

        Raises:
            BlockingIOError: if another process has it.
        """

    def read(self, most: int) -> bytes:
        """Return the current first bytes of the file, at most `most`."""

    def write(self, data: bytes, *, durable: bool = False) -> None:
        """Replace the bytes of the file.

        Args:
            data: its new bytes.
            durable: whether to flush them to disk before returning.

        Raises:
            BlockingIOError: if they are no longer those that `read` returned.
        """

    def beat(self) -> None:
        """Send a heartbeat, which resets `age`.

        Raises:
            BlockingIOError: if the bytes are no longer those that `read` returned.
        """

    def age(self) -> float:
        """Return the seconds since the bytes changed or the last heartbeat."""
