"""Define the operations on a run's files, and on small files beside it, and what each guarantees.

A run lies in a directory of a POSIX file system (`local_files`) or in an object store
(`object_store`); the path tells which. The other modules know the names and contents of the files
of a run; they open, list, rename and remove them only by these operations.

If `durable` is false, nothing is flushed in a file system: a power failure may lose the latest
writes, which the checksums detect. What an object store has accepted is durable.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

from ..checkpoints.paths import is_remote
from ..errors import ResourceError
from . import local_files
from .home import Kind, LockFile, State


class _Home(Protocol):
    """A module with the operations below, for paths of its kind."""

    def is_object_store(self) -> bool: ...

    def can_lock(self) -> bool: ...

    def check_promises(self, run: Path) -> None: ...

    def state(self, path: Path, *, follow_links: bool = True) -> State: ...

    def sizes(self, paths: Sequence[Path]) -> list[int | None]: ...

    def names(self, directory: Path) -> list[str]: ...

    def free_space(self, path: Path) -> tuple[Path, int] | None: ...

    def walk(self, directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]: ...

    def read(self, path: Path, most: int = -1) -> bytes: ...

    def read_part(self, path: Path, start: int, size: int) -> bytes: ...

    def blocks(self, path: Path, *, flush: bool = False) -> Iterator[bytes]: ...

    def lines_from_the_end(self, path: Path) -> Iterator[bytes]: ...

    def write_blocks(
        self,
        path: Path,
        data: Iterable[bytes | memoryview],
        durable: bool,
        *,
        suffix: str = "tmp",
        temporary: str | None = None,
    ) -> None: ...

    def append(self, path: Path, text: str) -> None: ...

    def beat(self, path: Path) -> None: ...

    def create_directory(self, path: Path) -> None: ...

    def ensure_directory(self, path: Path, *, durable: bool = False) -> None: ...

    def publish(self, building: Path, path: Path, durable: bool) -> None: ...

    def flush_names(self, directory: Path) -> None: ...

    def remove(self, path: Path) -> None: ...

    def remove_empty(self, directory: Path) -> None: ...

    def remove_tree(self, directory: Path, *, strict: bool = False) -> None: ...

    def open_lock(self, path: Path, *, create: bool = False) -> LockFile: ...


def _home(path: Path) -> _Home:
    if is_remote(path):
        try:
            from . import object_store
        except ImportError:
            raise ResourceError(
                f"results at {path} need obstore: pip install 'lca_posthoc[remote]'."
            ) from None

        return cast("_Home", object_store)
    return cast("_Home", local_files)


def is_object_store(path: Path) -> bool:
    """Tell whether a path is in an object store.

    There a file is written whole or not at all, nothing is renamed, and directories are only common
    prefixes of names.
    """
    return is_remote(path)


def can_lock(path: Path) -> bool:
    """Tell whether drivers of a run at a path can be kept apart at all."""
    return _home(path).can_lock()


def check_promises(run: Path) -> None:
    """Test in the place of a run what results need from an object store; do nothing in a file
    system.

    Raises:
        ResourceError: if the store breaks a guarantee; the text names it.
        OSError: if the store cannot be reached, or rejects writing.
    """
    _home(run).check_promises(run)


# --- look -----------------------------------------------------------------------------------------


def state(path: Path, *, follow_links: bool = True) -> State:
    """Return the state of a path.

    Args:
        path: to look at.
        follow_links: whether to return the state of a link's target.

    Raises:
        FileNotFoundError: if nothing exists there.
        NotADirectoryError: if nothing exists there, because a parent is a file.
        OSError: if the state cannot be read.
    """
    return _home(path).state(path, follow_links=follow_links)


def kind(path: Path, *, follow_links: bool = False) -> Kind | None:
    """Return the kind of a path; None if nothing exists there.

    Args:
        path: to look at.
        follow_links: whether to return the kind of a link's target.

    Raises:
        OSError: if the kind cannot be read.
    """
    try:
        return state(path, follow_links=follow_links).kind
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:  # links in a circle, which lead nowhere
            raise
        return None


def is_link(path: Path) -> bool:
    """Tell whether a path is a link; object stores have none.

    Raises:
        OSError: if this cannot be read.
    """
    return not is_object_store(path) and kind(path) == "link"


def exists(path: Path) -> bool:
    """Tell whether something exists at a path; a link counts as its target."""
    return kind(path, follow_links=True) is not None


def sizes(paths: Sequence[Path]) -> list[int | None]:
    """Return the bytes of each of several files of one home; None for missing ones."""
    return _home(paths[0]).sizes(paths) if paths else []


def names(directory: Path) -> list[str]:
    """Return the names in a directory, sorted; none if it is missing or unreadable, because no
    result relies on a listing.
    """
    return _home(directory).names(directory)


def free_space(path: Path) -> tuple[Path, int] | None:
    """Return the nearest existing directory above a path, and its free bytes; None in an object
    store, which reports no limit.
    """
    return _home(path).free_space(path)


def walk(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield every directory below one, and itself, with the names of its directories and of its
    files.

    Links to directories are among the former, and are not entered. The caller may remove names of
    directories, which are then not entered.
    """
    return _home(directory).walk(directory)


# --- read -----------------------------------------------------------------------------------------


def read(path: Path, most: int = -1) -> bytes:
    """Return the bytes of a file, or its first `most`.

    Args:
        path: of the file.
        most: bytes to read; -1 for all.

    Raises:
        OSError: if it cannot be read.
    """
    return _home(path).read(path, most)


def read_part(path: Path, start: int, size: int) -> bytes:
    """Return a part of a file, shorter where the file ends before.

    Args:
        path: of the file.
        start: offset of the first byte.
        size: bytes to read.

    Raises:
        OSError: if it cannot be read.
    """
    return _home(path).read_part(path, start, size)


def blocks(path: Path, *, flush: bool = False) -> Iterator[bytes]:
    """Yield the bytes of a file, a block at a time.

    Args:
        path: of the file.
        flush: whether to make them durable first.

    Raises:
        OSError: if it cannot be read.
    """
    return _home(path).blocks(path, flush=flush)


def lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file that `append` wrote, the last one first, reading only as much as
    needed.

    Raises:
        OSError: if it cannot be read.
    """
    return _home(path).lines_from_the_end(path)


# --- write ----------------------------------------------------------------------------------------


def write_whole(
    path: Path, data: bytes, durable: bool, *, suffix: str = "tmp", temporary: str | None = None
) -> None:
    """Write or replace a file: readers see all of the old bytes or all of the new ones.

    Args:
        path: of the file.
        data: its bytes.
        durable: whether to flush them to disk before returning.
        suffix: of the temporary name, by which `sweep` recognises what a killed writer left.
        temporary: that name, if another process must recognise the file's owner.
    """
    write_blocks(path, [data], durable, suffix=suffix, temporary=temporary)


def write_blocks(
    path: Path,
    data: Iterable[bytes | memoryview],
    durable: bool,
    *,
    suffix: str = "tmp",
    temporary: str | None = None,
) -> None:
    """Write or replace a file as `write_whole` does, a block of bytes at a time.

    Args:
        path: of the file.
        data: its bytes, in blocks.
        durable: whether to flush them to disk before returning.
        suffix: see `write_whole`.
        temporary: see `write_whole`.
    """
    _home(path).write_blocks(path, data, durable, suffix=suffix, temporary=temporary)


def append(path: Path, text: str) -> None:
    """Append text to a file, which is created if missing; for logs, in which a crash may leave half
    a line.

    Args:
        path: of the file.
        text: whole lines.
    """
    _home(path).append(path, text)


def beat(path: Path) -> None:
    """Send a heartbeat: set the file's `changed` to now.

    Raises:
        OSError: if there is no file.
    """
    _home(path).beat(path)


def create_directory(path: Path) -> None:
    """Create a directory that must not exist.

    Raises:
        FileExistsError: if something exists there.
    """
    _home(path).create_directory(path)


def ensure_directory(path: Path, *, durable: bool = False) -> None:
    """Create a directory and its parents, where missing.

    Args:
        path: of the directory.
        durable: whether to flush their names to disk before returning.

    Raises:
        FileExistsError: if something else is in its place.
        NotADirectoryError: if a parent is a file.
    """
    _home(path).ensure_directory(path, durable=durable)


def publish(building: Path, path: Path, durable: bool) -> None:
    """Rename a directory that was built beside its place, atomically; not in an object store.

    Args:
        building: the directory.
        path: its new name.
        durable: whether to flush the name to disk before returning.

    Raises:
        FileExistsError: if a nonempty directory has the name.
    """
    local_files.publish(building, path, durable)


def flush_names(directory: Path) -> None:
    """Make the names in a directory durable."""
    _home(directory).flush_names(directory)


# --- remove ---------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Remove a file, or a link but not its target; ignore a missing one."""
    _home(path).remove(path)


def remove_empty(directory: Path) -> None:
    """Remove an empty directory; ignore one that is not empty or missing."""
    _home(directory).remove_empty(directory)


def remove_tree(directory: Path, *, strict: bool = False) -> None:
    """Remove a directory with everything in it.

    Args:
        directory: to remove.
        strict: whether to raise an `OSError` for what cannot be removed, in place of leaving it.
    """
    _home(directory).remove_tree(directory, strict=strict)


# --- lock -----------------------------------------------------------------------------------------


def open_lock(path: Path, *, create: bool = False) -> LockFile:
    """Open the file that keeps drivers apart; the end of its context closes and unlocks it.

    Args:
        path: of the file; links are not followed.
        create: whether to create it if missing, and to open it for writing.

    Raises:
        FileNotFoundError: if it is missing.
        OSError: with `ELOOP` if it is a link.
    """
    return _home(path).open_lock(path, create=create)
