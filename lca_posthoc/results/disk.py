"""The files of a run, and the small files beside one: a few verbs, each with what it promises.

A run lies in a directory of a POSIX file system (`local_files`) or in an object store
(`object_store`); the path tells which. The other modules name the files of a run and know what they
hold; they open, look up, rename and remove them by these verbs alone.

Where `durable` is false, nothing is flushed in a file system: a power failure may take what was
written last, and the checksums show it. What an object store has accepted is durable.
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
    """A module with the verbs below, for paths of its kind."""

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

    There a file is written whole or not at all, nothing is renamed, and directories are no more
    than what names of files have in common.
    """
    return is_remote(path)


def can_lock(path: Path) -> bool:
    """Tell whether drivers of a run at a path can be kept apart at all."""
    return _home(path).can_lock()


def check_promises(run: Path) -> None:
    """Try in the place of a run what an object store must keep to; asks nothing of a file system.

    Raises:
        ResourceError: where it does not keep to it; the text names what.
        OSError: where the store cannot be reached, or refuses to write.
    """
    _home(run).check_promises(run)


# --- look -----------------------------------------------------------------------------------------


def state(path: Path, *, follow_links: bool = True) -> State:
    """Return the state of a path.

    Raises:
        FileNotFoundError, NotADirectoryError: where nothing is there.
        OSError: where this cannot be told.
    """
    return _home(path).state(path, follow_links=follow_links)


def kind(path: Path, *, follow_links: bool = False) -> Kind | None:
    """Return the kind of what a path stands for; None where nothing is there.

    Raises:
        OSError: where this cannot be told.
    """
    try:
        return state(path, follow_links=follow_links).kind
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:  # of links in a circle, which lead nowhere
            raise
        return None


def is_link(path: Path) -> bool:
    """Tell whether a path is a link, of which an object store has none.

    Raises:
        OSError: where this cannot be told.
    """
    return not is_object_store(path) and kind(path) == "link"


def exists(path: Path) -> bool:
    """Tell whether something is at a path; a link counts as what it leads to."""
    return kind(path, follow_links=True) is not None


def sizes(paths: Sequence[Path]) -> list[int | None]:
    """Return the bytes of each of some files of one home; None for one that is not there."""
    return _home(paths[0]).sizes(paths) if paths else []


def names(directory: Path) -> list[str]:
    """Return the names in a directory, sorted; none where it is missing or cannot be listed, for
    no result relies on a listing.
    """
    return _home(directory).names(directory)


def free_space(path: Path) -> tuple[Path, int] | None:
    """Return the nearest directory above a path that exists, and the bytes that are free there;
    None in an object store, which tells of no bound.
    """
    return _home(path).free_space(path)


def walk(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield every directory below one, and itself, each with the names of its directories (links
    to directories among them, which are not entered) and of its files.

    The caller may remove names of directories, which are then not entered.
    """
    return _home(directory).walk(directory)


# --- read -----------------------------------------------------------------------------------------


def read(path: Path, most: int = -1) -> bytes:
    """Return the bytes of a file, or its first `most`.

    Raises:
        OSError: where it cannot be read.
    """
    return _home(path).read(path, most)


def read_part(path: Path, start: int, size: int) -> bytes:
    """Return so many bytes of a file from a place on, fewer where it ends before.

    Raises:
        OSError: where it cannot be read.
    """
    return _home(path).read_part(path, start, size)


def blocks(path: Path, *, flush: bool = False) -> Iterator[bytes]:
    """Yield the bytes of a file, a block at a time; `flush` makes them durable first.

    Raises:
        OSError: where it cannot be read.
    """
    return _home(path).blocks(path, flush=flush)


def lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file that was written by `append`, the last one first, reading no more
    of it than is asked for.

    Raises:
        OSError: where it cannot be read.
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
        durable: whether they are on disk when this returns.
        suffix: of the temporary name, by which `sweep` knows what a killed writer left.
        temporary: that name, where another process must be able to tell whose file it is.
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
    """Write or replace a file as `write_whole` does, a block of bytes at a time."""
    _home(path).write_blocks(path, data, durable, suffix=suffix, temporary=temporary)


def append(path: Path, text: str) -> None:
    """Append text to a file, which is created where it is missing; for logs, of which a crash may
    leave half a line.
    """
    _home(path).append(path, text)


def beat(path: Path) -> None:
    """Give a sign of life: the file's `changed` becomes now.

    Raises:
        OSError: where it is not there.
    """
    _home(path).beat(path)


def create_directory(path: Path) -> None:
    """Create a directory that must not be there.

    Raises:
        FileExistsError: where something is.
    """
    _home(path).create_directory(path)


def ensure_directory(path: Path, *, durable: bool = False) -> None:
    """Create a directory and those above it, as far as they are missing; where durable, their names
    are on disk when this returns.

    Raises:
        FileExistsError, NotADirectoryError: where something else is in its place.
    """
    _home(path).ensure_directory(path, durable=durable)


def publish(building: Path, path: Path, durable: bool) -> None:
    """Give a directory that was built beside it its name, at once and whole; not in an object
    store.

    Raises:
        FileExistsError: where a directory that is not empty has the name.
    """
    local_files.publish(building, path, durable)


def flush_names(directory: Path) -> None:
    """Make the names in a directory durable."""
    _home(directory).flush_names(directory)


# --- remove ---------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Remove a file, or a link and not what it leads to; one that is gone already is no error."""
    _home(path).remove(path)


def remove_empty(directory: Path) -> None:
    """Remove a directory that is empty; one that is not, or is not there, stays as it is."""
    _home(directory).remove_empty(directory)


def remove_tree(directory: Path, *, strict: bool = False) -> None:
    """Remove a directory with everything in it; what cannot be removed stays, and is an `OSError`
    where `strict`.
    """
    _home(directory).remove_tree(directory, strict=strict)


# --- lock -----------------------------------------------------------------------------------------


def open_lock(path: Path, *, create: bool = False) -> LockFile:
    """Open the file by which drivers keep apart; it is closed, and unlocked, at the end of its
    context.

    Args:
        path: of the file; nothing is opened through a link.
        create: whether to create it where it is missing, and to open it for writing.

    Raises:
        FileNotFoundError: where it is missing.
        OSError: with `ELOOP` where it is a link.
    """
    return _home(path).open_lock(path, create=create)
