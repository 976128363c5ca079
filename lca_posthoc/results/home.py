"""Types that the homes of runs share: the state of a path, and the file by which drivers keep
apart.
"""

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
        changed: when its bytes last changed or its heartbeat was last given, in seconds since 1970.
        version: another one as soon as the file was replaced or written to.
    """

    kind: Kind
    size: int
    changed: float
    version: tuple[int | str, ...]


class LockFile(Protocol):
    """A file by which drivers keep apart, open for the length of a context."""

    @property
    def is_of_kernel(self) -> bool:
        """True where the kernel's lock keeps apart the processes of this host; False where only
        the bytes of the file do, of which no two drivers can write the first.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the kernel's lock without waiting; return False where there is none.

        Raises:
            BlockingIOError: where another process has it.
        """

    def read(self, most: int) -> bytes:
        """Return the first bytes of the file, as they are now, at most so many."""

    def write(self, data: bytes, *, durable: bool = False) -> None:
        """Replace the bytes of the file; where durable, they are on disk when this returns.

        Raises:
            BlockingIOError: where they are no longer those that `read` returned.
        """

    def beat(self) -> None:
        """Give a sign of life: `age` begins again.

        Raises:
            BlockingIOError: where the bytes are no longer those that `read` returned.
        """

    def age(self) -> float:
        """Return the seconds since the bytes changed or the last heartbeat."""
