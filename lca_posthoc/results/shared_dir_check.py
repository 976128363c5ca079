"""Check by a small file that another process sees the same directory."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..errors import ResourceError
from . import disk
from .underway import LOG

_TEMPORARY = ".tmp"  # end of the temporary name of such a file


@contextlib.contextmanager
def shared_directory_token(run: Path) -> Iterator[tuple[Path, str]]:
    """Yield a file in the run directory, or beside its future place, and its text; remove the file
    afterwards.

    Files of killed drivers of this host are removed first.
    """
    run = run.resolve()  # a worker may have another working directory
    inside = disk.is_object_store(run) or disk.kind(run / LOG, follow_links=True) == "directory"
    place = run / LOG if inside else run.parent
    disk.ensure_directory(place)
    begin = f".{run.name}.token-{socket.gethostname()}-"
    for name in disk.names(place):
        pid = name.removeprefix(begin).removesuffix(_TEMPORARY)
        if name.startswith(begin) and pid.isdigit() and not psutil.pid_exists(int(pid)):
            disk.remove(place / name)
    file, text = place / f"{begin}{os.getpid()}", uuid.uuid4().hex
    disk.write_whole(file, text.encode(), durable=False, temporary=f"{file.name}{_TEMPORARY}")
    try:
        yield file, text
    finally:
        disk.remove(file)


def check_shared_directory(token: Path, text: str) -> None:
    """Check that this process sees the file another one wrote, and can write beside it.

    Args:
        token: the file.
        text: its contents.

    Raises:
        ResourceError: naming the problem with its directory and what to do.
    """
    try:
        same = disk.read(token) == text.encode()
    except OSError as error:
        raise ResourceError(
            f"cannot read {token.parent} ({error.strerror}): mount the file system of the run "
            "there, under the same path"
        ) from None
    if not same:
        raise ResourceError(
            f"has another {token.parent} than this driver: mount the file system of the run there"
        )
    trial = token.with_name(f".{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        disk.write_whole(trial, b"", durable=False)
    except OSError as error:
        raise ResourceError(
            f"cannot write to {token.parent} ({error.strerror}): give its user the right to"
        ) from None
    disk.remove(trial)
