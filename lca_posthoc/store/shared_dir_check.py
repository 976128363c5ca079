"""A small file by which another process can tell that it sees the same directory."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def token(run: Path) -> Iterator[tuple[Path, str]]:
    """Yield a file in the run directory, or beside the place it will have, and its text; the file
    is removed afterwards.

    Files that killed drivers of this host left are removed first.
    """
    run = run.resolve()  # a worker may be elsewhere in the file system
    place = run / "log" if (run / "log").is_dir() else run.parent
    place.mkdir(parents=True, exist_ok=True)
    begin = f".{run.name}.token-{socket.gethostname()}-"
    for leftover in place.glob(f"{begin}*"):
        pid = leftover.name.removeprefix(begin)
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            leftover.unlink(missing_ok=True)
    file, text = place / f"{begin}{os.getpid()}", uuid.uuid4().hex
    file.write_text(text)
    try:
        yield file, text
    finally:
        file.unlink(missing_ok=True)
