"""Print for all commands: consoles, tables that cut no number, short forms of numbers."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from ..base.text import duration as duration
from ..base.text import shorten
from ..replay.display import Stream, showable, wrapped
from ..replay.display import bar as bar
from ..replay.display import say as say
from ..replay.display import stderr as stderr
from ..replay.display import waiting as waiting

_GAP = 2  # columns of the terminal between two columns of a table
_SHORTEST = 20  # width to which a name is cut before columns wrap into blocks
_SHORTEST_HEAD = 16  # width to which the heading of numbers is cut
_FEWEST = 8  # width of a name where the terminal has no room for it and one number


def stdout() -> Console:
    """Return the console for results, which cuts no line."""
    return Console(
        file=Stream(sys.stdout, matters=True),  # type: ignore[arg-type]
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        force_jupyter=False,
    )


def print_words(text: str, console: Console) -> None:
    """Print sentences, wrapped on a terminal and unwrapped elsewhere.

    Args:
        text: to print; control characters are already escaped.
        console: to print on.
    """
    console.print(Text(wrapped(text, console)))


@contextlib.contextmanager
def prints_to_stderr() -> Iterator[None]:
    """Redirect what the user's own code prints to stderr, so that stdout holds results alone."""
    with contextlib.redirect_stdout(Stream(sys.stderr, matters=False)):
        yield


def print_json(document: object) -> None:
    """Print one JSON document on stdout, with null for numbers that are not finite."""
    print(
        json.dumps(_finite(document), indent=2), file=Stream(sys.stdout, matters=True), flush=True
    )


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def share(value: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * value:.1f} %"


def units_of_loss(value: float, scale: float, sign: str = "+", digits: int = 6) -> str:
    """Return a number in units of loss: fixed-point, or with a power of ten where losses are huge
    or tiny.

    Args:
        value: the number.
        scale: the largest magnitude among the numbers printed together.
        sign: "+" to give positive numbers a sign, else "".
        digits: after the decimal point.

    >>> units_of_loss(-0.5, 2.3), units_of_loss(2.5e9, 2.5e9, ""), units_of_loss(-1.23e-6, 2.3)
    ('-0.500000', '2.500000e+09', '-1.2e-06')
    """
    if value and not 1e-3 <= scale < 1e6:
        return f"{value:{sign}.{digits}e}"
    tiny = 0 < abs(value) < 10.0 ** (1 - digits)  # fixed-point would leave one digit or none
    return f"{value:{sign}.{1 if tiny else digits}{'e' if tiny else 'f'}}"


# --- tables ---------------------------------------------------------------------------------------


class Table:
    """A table of names, numbers and words; see `table`."""

    def __init__(self, columns: Sequence[str], names: int, words: int) -> None:
        self._columns, self._names, self._words = list(columns), names, len(columns) - words
        self._rows: list[list[str]] = []

    def add_row(self, *cells: str | Text) -> None:
        """Add a row with a cell for each column."""
        self._rows.append([cell.plain if isinstance(cell, Text) else cell for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = options.max_width if console.file.isatty() else None
        for number, (heading, *lines) in enumerate(self.blocks(width, console.encoding)):
            if number:
                yield Text("")
            yield Text(heading, style="bold")
            if lines:
                yield Text("\n".join(lines))

    def blocks(self, width: int | None, encoding: str = "utf-8") -> list[list[str]]:
        """Return the lines of each block of columns, headings first.

        Args:
            width: of the terminal in columns; None to cut nothing.
            encoding: of the terminal; characters it lacks are replaced.
        """
        dots = showable("…", encoding)
        heads = [showable(head, encoding) for head in self._columns]
        columns = [
            [showable(row[index], encoding) for row in self._rows] for index in range(len(heads))
        ]
        full = [max(map(cell_len, (heads[index], *column))) for index, column in enumerate(columns)]
        least = [self._least(index, heads[index], column) for index, column in enumerate(columns)]
        blocks = []
        for block in _stacked(full, least, width):
            texts = []
            for index, wide in zip(
                block,
                _shared([full[index] for index in block], [least[index] for index in block], width),
                strict=True,
            ):
                head = shorten(heads, wide, dots)[index]
                column = (
                    shorten(columns[index], wide, dots) if index < self._names else columns[index]
                )
                to_the_left = index < self._names or index >= self._words
                wide = max(map(cell_len, (head, *column)))
                texts.append([_padded(cell, wide, to_the_left) for cell in (head, *column)])
            blocks.append([(" " * _GAP).join(line).rstrip() for line in zip(*texts, strict=True)])
        return blocks

    def _least(self, index: int, head: str, column: list[str]) -> int:
        """Return the least width of a column: numbers and words are never cut, names and headings
        are.
        """
        cells = max(map(cell_len, column), default=0)
        if index < self._names:
            return min(max(cells, cell_len(head)), _SHORTEST)
        return max(cells, min(cell_len(head), _SHORTEST_HEAD))


def table(*columns: str, names: int = 1, words: int = 0) -> Table:
    """Return a plain table.

    In a pipe or a file nothing is cut. On a terminal too narrow for the table, names and headings
    of numbers are cut in the middle. Where numbers and words still do not fit, columns wrap into
    blocks below each other, each beginning with the first column.

    Args:
        columns: headings, those of names first, those of words last, those of numbers between.
        names: how many columns hold names.
        words: how many hold words.
    """
    return Table(columns, names, words)


def _stacked(full: list[int], least: list[int], width: int | None) -> list[list[int]]:
    """Return the columns of each block."""
    everything = list(range(len(full)))
    if width is None or sum(least) + _GAP * (len(least) - 1) <= width:
        return [everything]
    blocks, room = list[list[int]](), 0
    for index in everything[1:]:
        if not blocks or least[index] + _GAP > room:
            blocks.append([0])
            room = width - least[0]
        blocks[-1].append(index)
        room -= least[index] + _GAP
    return blocks or [everything]


def _shared(full: list[int], least: list[int], width: int | None) -> list[int]:
    """Return the widths of the columns of a block; the widest shrink first."""
    if width is None:
        return full
    room = width - _GAP * (len(full) - 1)
    cap = max(full)
    while cap > 1 and sum(_capped(full, least, cap)) > room:
        cap -= 1
    widths = _capped(full, least, cap)
    for index, wide in enumerate(full):
        widths[index] += max(0, min(wide - widths[index], room - sum(widths)))
    if sum(widths) > room:  # a terminal with no room for one number beside a name
        widths[0] = max(1, min(widths[0], max(_FEWEST, room - sum(widths[1:]))))
    return widths


def _capped(full: list[int], least: list[int], cap: int) -> list[int]:
    return [min(wide, max(narrow, cap)) for wide, narrow in zip(full, least, strict=True)]


def _padded(text: str, width: int, to_the_left: bool) -> str:
    blank = " " * (width - cell_len(text))
    return text + blank if to_the_left else blank + text
