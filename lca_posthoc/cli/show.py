"""What every command needs to print: consoles, names made harmless, numbers made short."""

from __future__ import annotations

import json
import re
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def safe(name: str) -> str:
    """A name from a file without characters that steer a terminal.

    >>> safe("a\\x1b[31mb")
    'a?[31mb'
    """
    return _CONTROL.sub("?", name)


def stdout() -> Console:
    """Results go here; in a file or a pipe nothing is cut to the width of a screen."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=240)


def stderr() -> Console:
    """Progress and warnings go here."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A warning or a note."""
    stderr().print(Text(f"note: {safe(text)}"))


def print_json(document: Any) -> None:
    """One JSON document on stdout; numbers that are not finite become null."""
    click.echo(json.dumps(_finite(document), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and value - value != 0 else value


def table(*columns: str, names: int = 1) -> Table:
    """A plain table; the first `names` columns are text, the others numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        made.add_column(Text(column), justify="left" if position < names else "right", no_wrap=True)
    return made


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
