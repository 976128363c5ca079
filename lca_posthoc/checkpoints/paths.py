"""Places of checkpoints: a directory, or one behind a URL that fsspec reads (`s3://…`, `gs://…`,
`hf://…`, `https://…`).

A remote place is an object of universal_pathlib, which has the methods of a `Path`. Files that are
read whole are kept on this machine within a bound (`cache`), so that the next loss does not fetch
them again.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from ..errors import InputError, LCAError, ResourceError
from .cache import cache


def located(where: str | Path) -> Path:
    """Return the path of a directory or a URL of checkpoints, which fsspec reads: by its driver for
    this kind of URL, where that is installed, else by obstore, which writes results.

    Raises:
        InputError: where a URL holds a password or a query.
        ResourceError: where a URL's driver is not installed.
    """
    path = path_of(where)
    if not is_remote(path):
        return path
    try:
        _ = path.fs  # type: ignore[attr-defined]
    except ImportError as error:
        if not _read_by_obstore(path):
            raise ResourceError(f"{where}: {error}.") from None
    return path


def _read_by_obstore(path: Path) -> bool:
    """Let obstore read URLs of a path's kind in this process; return False where it cannot."""
    try:
        from obstore.fsspec import register
    except ImportError:
        return False
    try:
        register(path.protocol)  # type: ignore[attr-defined]
        _ = path.fs  # type: ignore[attr-defined]
    except Exception:  # of a kind it does not know
        return False
    return True


def path_of(where: str | Path) -> Path:
    """Return the path of a directory or a URL; nothing is asked of a driver.

    Raises:
        InputError: where a URL holds a password or a query.
        ResourceError: where a URL has no path, for want of a package or of a driver of its kind.
    """
    if not isinstance(where, str | Path):  # a path behind a URL
        return where
    if isinstance(where, Path) or "://" not in where:
        return Path(where)
    if where.startswith("file:///"):
        return Path(unquote(where.removeprefix("file://")))
    try:
        from upath import UPath
    except ImportError:
        raise ResourceError(
            f"{where} is remote, which needs universal_pathlib: pip install 'lca_posthoc[remote]'."
        ) from None
    protocol, _, rest = where.partition("://")
    host, _, port = rest.partition("/")[0].partition(":")
    if "@" in host + port or "?" in rest or (port and not port.isdigit()):
        raise InputError(
            "a URL is recorded with the result, so it holds no passwords and no "
            f"queries; this {protocol} one does. Give them to the driver: environment variables, "
            "or fsspec's configuration."
        )
    try:
        path = UPath(where)
    except ValueError:
        raise ResourceError(
            f"{where}: fsspec knows no {protocol!r}. Install its driver, such as s3fs, gcsfs or "
            "huggingface_hub."
        ) from None
    return path  # type: ignore[return-value]


def here(where: str | Path, what: str) -> Path:
    """Return a path that must lie on a file system.

    Raises:
        InputError: where it is a URL; `what` says why a URL will not do, and what to do.
    """
    if "://" in str(where):
        raise InputError(f"{where} is a URL, and {what}")
    return Path(where)


def is_path(value: object) -> bool:
    """Tell whether a value is a path, of a file system or behind a URL."""
    return isinstance(value, Path) or hasattr(value, "storage_options")


def is_remote(path: Path) -> bool:
    """Tell whether a path is behind a URL."""
    return not isinstance(path, Path)


def absolute(path: Path) -> str:
    """Return a path as results record it: from the root of the file system, or as a URL."""
    return str(path) if is_remote(path) else str(path.resolve())


def below(path: Path, root: Path) -> Path:
    """Return the path of something in a directory, relative to that directory."""
    if is_remote(path):
        if not str(path).startswith(str(root)):
            raise ValueError(f"{path} is not in {root}")
        return Path(str(path).removeprefix(str(root)).lstrip("/"))
    return path.relative_to(root)


def nearest(path: Path) -> Path:
    """Return an absolute path, or the nearest directory above it that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


@contextlib.contextmanager
def reached(path: Path) -> Iterator[None]:
    """Raise every error of a remote place as an `OSError`, for drivers have errors of their own
    kinds.
    """
    try:
        yield
    except (OSError, LCAError) as error:
        if isinstance(error, OSError) and error.strerror is None:
            raise OSError(error.errno or errno.EIO, _said(error)) from error
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise OSError(errno.EIO, _said(error)) from error


def _said(error: Exception) -> str:
    text = " ".join(str(error).partition("Debug source:")[0].split())  # which obstore adds
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def read(path: Path, key: int) -> bytes:
    """Return a whole file; take a remote one from the cache, where this URL and key are in it, and
    else add it there.

    Raises:
        OSError: where the file cannot be read.
    """
    if not is_remote(path):
        return path.read_bytes()

    def fetch() -> bytes:
        with reached(path):
            return path.read_bytes()

    kept = cache()
    return fetch() if kept is None else kept.take(str(path), key, fetch)
