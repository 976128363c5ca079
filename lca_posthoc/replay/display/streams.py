"""Write text that any terminal or pipe can show.

No failure to print turns finished work into an error: characters that the output cannot show are
replaced, and a stream without a reader is no longer written to.
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
_GLUE = "\u2800"  # as wide as a blank, but never a place to break a line
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
    """Replace the characters of a text that an encoding lacks: ours by plain ones, others by
    escapes.

    >>> showable("2.3 → 0.1 in größe", "ascii")
    '2.3 -> 0.1 in gr\\\\xf6\\\\xdfe'

    Args:
        text: to show.
        encoding: of the terminal or pipe.
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
    """A text stream that replaces characters it cannot show and ignores a reader that is gone.

    Args:
        stream: where to write; None, as Python sets it for a closed descriptor, writes nowhere.
        matters: whether to raise errors such as a full disk: True for results, False for progress.
    """

    def __init__(self, stream: TextIO | None, *, matters: bool) -> None:
        self._stream, self._matters = stream, matters

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the encoding of the stream beneath."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write a text, with replacements where needed."""
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
        """Return True: the stream takes texts."""
        return True

    def isatty(self) -> bool:
        """Tell whether the stream is a terminal."""
        with self._lenient():
            return self._stream is not None and bool(self._stream.isatty())
        return False

    def fileno(self) -> int:
        """Return the descriptor of the stream beneath.

        Raises:
            UnsupportedOperation: if there is no stream.
        """
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return int(self._stream.fileno())

    @contextlib.contextmanager
    def _lenient(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            # the reader is slow for the moment: progress may be lost, a result may not
            if self._matters:
                raise ResourceError(
                    "the result cannot be printed: the reader does not wait. The results are "
                    "stored: `lca summary` prints them."
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
                    f"the result cannot be printed ({error}). The results are stored; `lca "
                    "summary` and `lca status` print them again."
                ) from None

    def _leave(self) -> None:
        """Write to nowhere from now on, including what Python flushes at its exit."""
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        self._stream = None


def open_standard_descriptors() -> None:
    """Open each closed standard descriptor on /dev/null.

    Otherwise a file of results would get its number, and prints would go into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # takes the lowest free number, which is this one
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)  # workers print as well


def stderr() -> Console:
    """Return the console for progress and notes."""
    return Console(
        file=Stream(sys.stderr, matters=False),  # type: ignore[arg-type]
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        force_jupyter=False,
    )


def spinner_of(console: Console) -> str:
    """Return the name of a spinner of rich that the console's encoding has."""
    return "dots" if console.encoding.startswith("utf") else "line"


def say(text: str) -> None:
    """Print a warning or a note, wrapped on a terminal and on one line elsewhere."""
    console = stderr()
    console.print(Text(wrapped(f"note: {safe(text)}", console)))


def wrapped(text: str, console: Console) -> str:
    """Wrap a text between words to the width of a terminal; leave it unchanged elsewhere.

    A command in backticks that fits a line is not broken, so that it can be copied.

    Args:
        text: to print.
        console: to print on.
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
