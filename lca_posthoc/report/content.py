"""Define the parts of the page: sections, their content for one loss, tables, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from bokeh.plotting import figure

from ..base.text import count as count
from ..base.text import safe_in_page
from .downsample import Json

_LONGEST = 160  # characters of a name
MOST_ROWS = 60

Cell: TypeAlias = str | float | None
# maps the name of a source to columns; names that begin with "@" set up the figure
View: TypeAlias = Mapping[str, Json]


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and the kind of its cells: "name", "text", "right" (text),
    "count", "share", "plain", "number" or "bar".
    """

    title: str
    kind: str = "number"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under headings.

    `live` names the values that replace the rows when a group is picked, `pick` gives each row a
    box and tells which boxes are ticked at first, `shared` gives the bars of all columns one scale.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    open: bool = False
    live: str = ""
    pick: Sequence[bool] = ()
    shared: bool = False

    @property
    def extents(self) -> list[float]:
        """Return the largest magnitude of each column, or of all columns with `shared` bars."""
        extents = [
            max((_size(row[position]) for row in self.rows), default=0.0) or 1.0
            for position, column in enumerate(self.columns)
        ]
        bars = [
            extent
            for extent, column in zip(extents, self.columns, strict=True)
            if column.kind == "bar"
        ]
        return [max(bars)] * len(extents) if self.shared and bars else extents


@dataclass(frozen=True, kw_only=True)
class Block:
    """The content of a section for one loss of one run.

    `captions` has the sentence under each figure, which gives its numbers to readers who cannot see
    it; `views` the data of each figure for "GROUP|CHOICE", either part possibly empty; `choices`
    the options of this section alone.
    """

    captions: Mapping[str, str] = field(default_factory=dict)
    views: Mapping[str, Mapping[str, View]] = field(default_factory=dict)
    choice: str = ""
    choices: Sequence[str] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A finding on the page: its title, two sentences on how to read it, and its figures by name."""

    name: str
    title: str
    reading: str
    figures: Mapping[str, figure] = field(default_factory=dict)
    legends: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    headings: Mapping[str, str] = field(default_factory=dict)


def clean(name: object, longest: int = _LONGEST) -> str:
    """Return a name that is safe to show: without control characters and of bounded length.

    >>> clean("a\\x1bb")
    'a�b'

    Args:
        name: of a loss, layer, file or group.
        longest: the most characters.
    """
    text = safe_in_page(str(name))
    return text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-(longest // 2) :]}"


def signed(value: float) -> str:
    """Return a number with its sign.

    >>> signed(-0.00012345), signed(2.5), signed(0)
    ('−1.234e-4', '+2.500', '0')
    """
    if value == 0:
        return "0"
    return ("+" if value > 0 else "") + plain(value)


def plain(value: float) -> str:
    """Return a number with four significant digits.

    >>> plain(0.098765), plain(123456.0), plain(float("nan"))
    ('0.09877', '1.235e5', '–')
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        decimals = max(0, 3 - math.floor(math.log10(abs(value))))
        text = f"{value:.{decimals}f}"
    else:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−", 1) if value < 0 else text


def percent(value: float) -> str:
    """Return a share as a percentage.

    >>> percent(0.1234), percent(0.0001), percent(1.4e-7)
    ('12.3 %', '0.01 %', '1.4e-5 %')
    """
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e-3 or value == 0:
        return f"{100 * value:.1f} %".replace("-", "−")
    mantissa, _, exponent = f"{100 * value:.1e}".partition("e")
    return f"{100 * value:.2g} %" if abs(value) >= 1e-6 else f"{mantissa}e{int(exponent)} %"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Join names into one phrase.

    >>> listed(["a"]), listed(["a", "b", "c"]), listed(["a", "b", "c"], 1)
    ('a', 'a, b and c', 'a and 2 more')

    Args:
        names: to join.
        most: names to show; the phrase counts the others.
    """
    shown = [clean(name, 60) for name in names[:most]]
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most:,} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def cell(value: Cell, kind: str) -> str:
    """Return a cell of a table as text.

    Args:
        value: of the cell.
        kind: of its column, see `Column`.
    """
    if value is None:
        return "–"
    if isinstance(value, str):
        return clean(value)
    return {"count": count, "share": percent, "plain": plain}.get(kind, signed)(value)


def _size(value: Cell) -> float:
    """Return the magnitude of a finite number, 0 for any other cell."""
    return abs(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
