"""Text streams that show what they can.

Nothing here can turn finished work into an error: signs that a terminal or a pipe cannot show are
replaced by others, and a stream that is gone is written to no more.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ...base.text import safe
from ...errors import ResourceError

_COMMAND = re.compile(r"`[^`\n]+`")
_GLUE = "\u2800"  # as wide as a blank, and no place to cut a line
_PLAIN = {
    "→": "->",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "µ": "u",
    "Σ": "sum",
    "Δ": "d",
    "θ": "theta",
    "×": "x",
    "±": "+-",
    "·": "|",
    "≤": "<=",
    "≥": ">=",
    "•": "*",
    "\N{NO-BREAK SPACE}": " ",
}


def showable(text: str, encoding: str) -> str:
    """Return a text in the signs an encoding has: ours in plain ones, those of names as escapes.

    >>> showable("2.3 → 0.1 in größe", "ascii")
    '2.3 -> 0.1 in gr\\\\xf6\\\\xdfe'
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        signs = (_PLAIN.get(sign, sign) if not _has(encoding, sign) else sign for sign in text)
        return "".join(signs).encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        return showable(text, "ascii")
    return text


def _has(encoding: str, sign: str) -> bool:
    try:
        sign.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


class Stream(io.TextIOBase):
    """A text stream that shows what it can: a sign its encoding lacks becomes another, and nothing
    is written once its reader is gone.

    Args:
        stream: where to write; None for nowhere, which is what Python sets where a descriptor is
            closed.
        matters: whether an error such as a full disk is raised: it is for results, not for
            progress.
    """

    def __init__(self, stream: TextIO | None, *, matters: bool) -> None:
        self._stream, self._matters = stream, matters

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the encoding of the stream beneath."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write a text, in other signs where it must be."""
        with self._lenient():
            if self._stream is not None:
                self._stream.write(showable(text, self.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream beneath."""
        with self._lenient():
            if self._stream is not None:
                self._stream.flush()

    def writable(self) -> bool:
        """Say that texts can be written."""
        return True

    def isatty(self) -> bool:
        """Say whether a terminal shows it."""
        with self._lenient():
            return self._stream is not None and bool(self._stream.isatty())
        return False

    def fileno(self) -> int:
        """Return the descriptor of the stream beneath."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return int(self._stream.fileno())

    @contextlib.contextmanager
    def _lenient(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            # what reads it is slow for the moment: progress may be lost, a result may not
            if self._matters:
                raise ResourceError(
                    "the result cannot be printed: what reads it does not wait. What was computed "
                    "is kept: `lca summary` prints it."
                ) from None
        except (OSError, ValueError) as error:
            gone = isinstance(error, ValueError) or error.errno in (
                errno.EPIPE,
                errno.EIO,
                errno.EBADF,
            )
            self._leave()
            if self._matters and not gone:
                raise ResourceError(
                    f"the result cannot be printed ({error}). What was computed is kept; `lca "
                    "summary` and `lca status` print it again."
                ) from None

    def _leave(self) -> None:
        """Write to nowhere from here on; also what Python still flushes at its end."""
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        self._stream = None


def open_standard_descriptors() -> None:
    """Open those of the first three descriptors that are closed, on nothing; else a file of results
    gets the number, and prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # takes the lowest number that is free, this one
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)  # workers print as well


def stderr() -> Console:
    """Return where progress and notes go."""
    return Console(
        file=Stream(sys.stderr, matters=False),  # type: ignore[arg-type]
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        force_jupyter=False,
    )


def spinner_of(console: Console) -> str:
    """Return the name of rich's spinner in signs the console can show."""
    return "dots" if console.encoding.startswith("utf") else "line"


def say(text: str) -> None:
    """Print a warning or a note: on a terminal in lines of its width, elsewhere in one line."""
    console = stderr()
    console.print(Text(wrapped(f"note: {safe(text)}", console)))


def wrapped(text: str, console: Console) -> str:
    """Return a text in lines as wide as the terminal, cut between words; unchanged where no
    terminal shows it.

    A command in backticks that fits a line is never cut, so that it can be copied.
    """
    if not console.file.isatty():
        return text
    shown = showable(text, console.encoding)
    whole = _COMMAND.sub(
        lambda command: (
            command[0].replace(" ", _GLUE) if cell_len(command[0]) <= console.width else command[0]
        ),
        shown,
    )
    lines = [
        line
        for part in whole.split("\n")
        for line in Text(part).wrap(console, console.width, tab_size=8)
    ]
    return "\n".join(line.plain.rstrip() for line in lines).replace(_GLUE, " ")
