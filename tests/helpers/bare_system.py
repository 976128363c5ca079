"""A Linux that lacks what Windows lacks, for a process of its own: modules, functions of `os`, signals,
and starting processes by forking.

`python -m tests.helpers.bare_system SCRIPT [ARGUMENT …]` runs a script so; every `import` of the
script and of what it uses sees the system without them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty")
FUNCTIONS = (
    *("chown", "copy_file_range", "fork", "forkpty", "fchmod", "geteuid", "getpgid", "getuid"),
    *("killpg", "mkfifo", "posix_fadvise", "pread", "preadv", "pwrite"),
    *("sched_getaffinity", "sendfile", "setsid", "sync", "umount"),
)
FLAGS = ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK")
SIGNALS = ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGWINCH")


def strip() -> None:
    """Take away what Windows lacks, from this process."""
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in (*FUNCTIONS, *FLAGS):
        if hasattr(os, name):
            delattr(os, name)
    for name in SIGNALS:
        delattr(signal, name)
    read, opened = Path.read_text, os.open

    def without_proc(path: Path, *arguments: Any, **options: Any) -> str:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, os.strerror(2), str(path))
        return read(path, *arguments, **options)

    def without_directories(path: Any, *arguments: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, os.strerror(13), os.fspath(path))
        return opened(path, *arguments, **options)

    Path.read_text = without_proc  # type: ignore[method-assign,assignment]
    os.open = without_directories
    multiprocessing.set_start_method("spawn")


if __name__ == "__main__":
    # what the interpreter, torch and others take from Linux at their own import is theirs
    import matplotlib  # noqa: F401
    import psutil  # noqa: F401
    import torch  # noqa: F401
    import xarray  # noqa: F401
    import zarr  # noqa: F401

    strip()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
