"""Locate checkpoints: a directory, or a URL that fsspec reads (`s3://…`, `gs://…`, `hf://…`,
`https://…`).

A remote path is a universal_pathlib object, which has the methods of a `Path`. Files read whole
stay in a local cache of limited size (`cache`), so that the next loss need not fetch them again.
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
    """Return the path of a directory or URL of checkpoints, and check that a driver for it is
    installed.

    Prefer fsspec's driver for this kind of URL; else use obstore, which writes results.

    Raises:
        InputError: if a URL holds a password or a query.
        ResourceError: if no driver for the URL is installed.
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
    """Register obstore for URLs of this kind in this process; return False if it cannot read them."""
    try:
        from obstore.fsspec import register
    except ImportError:
        return False
    try:
        register(path.protocol)  # type: ignore[attr-defined]
        _ = path.fs  # type: ignore[attr-defined]
    except Exception:  # obstore does not know this kind of URL
        return False
    return True


def path_of(where: str | Path) -> Path:
    """Return the path of a directory or URL without contacting a driver.

    Raises:
        InputError: if a URL holds a password or a query.
        ResourceError: if universal_pathlib or fsspec's driver for the URL is missing.
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
            f"{where} is remote; reading it needs universal_pathlib: pip install 'lca_posthoc[remote]'."
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

    Args:
        where: the path, or a URL to reject.
        what: end of the error message: why a URL does not work and what to do.

    Raises:
        InputError: if it is a URL.
    """
    if "://" in str(where):
        raise InputError(f"{where} is a URL, and {what}")
    return Path(where)


def is_path(value: object) -> bool:
    """Return whether a value is a path, local or remote."""
    return isinstance(value, Path) or hasattr(value, "storage_options")


def is_remote(path: Path) -> bool:
    """Return whether a path is a URL."""
    return not isinstance(path, Path)


def absolute(path: Path) -> str:
    """Return a path as results record it: absolute, or as a URL."""
    return str(path) if is_remote(path) else str(path.resolve())


def below(path: Path, root: Path) -> Path:
    """Return the path of something in a directory, relative to that directory.

    Args:
        path: path below `root`.
        root: the directory.

    Raises:
        ValueError: if `path` is not below `root`.
    """
    if is_remote(path):
        if not str(path).startswith(str(root)):
            raise ValueError(f"{path} is not in {root}")
        return Path(str(path).removeprefix(str(root)).lstrip("/"))
    return path.relative_to(root)


def nearest(path: Path) -> Path:
    """Return an absolute path, or its nearest parent that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


@contextlib.contextmanager
def reached(path: Path) -> Iterator[None]:
    """Convert every error of a remote path into an `OSError`, because each driver has its own
    exceptions.

    Raises:
        OSError: if the body raises it, or any exception while `path` is remote.
        LCAError: if the body raises it.
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
    """Read a whole file; for a remote one, use the cache, and add the file on a miss.

    Args:
        path: path of the file.
        key: fingerprint of the file when it was last inspected.

    Raises:
        OSError: if the file cannot be read.
    """
    if not is_remote(path):
        return path.read_bytes()

    def fetch() -> bytes:
        with reached(path):
            return path.read_bytes()

    kept = cache()
    return fetch() if kept is None else kept.take(str(path), key, fetch)
