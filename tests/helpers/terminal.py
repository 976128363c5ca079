"""A command in a process of its own: on a terminal of some width, into pipes, with encodings that
lack signs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

PACKAGE = str(Path(__file__).parents[2])
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that has this package, and no width but that of its terminal."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR")
    }
    return {**kept, "PYTHONPATH": PACKAGE, "TERM": "xterm", **more}


def on_terminal(arguments: list[object], columns: int = 80, **more: str) -> tuple[int, str]:
    """Exit code, and what a terminal was sent, of a command whose three streams are that
    terminal.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [str(argument) for argument in arguments]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**more)
    )
    os.close(theirs)
    sent = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the other side any more
        while block := os.read(ours, 65536):
            sent += block
    os.close(ours)
    return process.wait(timeout=240), sent.decode(errors="replace").replace("\r\n", "\n")


def piped(arguments: list[object], **more: str) -> subprocess.CompletedProcess[bytes]:
    """A command whose output goes into pipes."""
    command = [str(argument) for argument in arguments]
    return subprocess.run(
        command, capture_output=True, env=environment(**more), timeout=240, check=False
    )
