"""Sections of the page, one file per finding: `section()` returns its title and figures,
`block(panel, room)` its content for one loss.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol, cast

from ...base.declarations import declared_findings
from ..content import Block, Section
from ..panels import Panel, Room


class SectionModule(Protocol):
    """A file of this folder."""

    def section(self) -> Section:
        """Return the section with its figures, still without data."""

    def block(self, panel: Panel, room: Room) -> Block | None:
        """Return what the section shows of one loss; None where it has nothing to show.

        Args:
            panel: of the loss.
            room: the bytes for its data.
        """


def section_modules() -> dict[str, SectionModule]:
    """Return the sections of single runs by the name of their finding, in the order of the page.

    The finding that compares several runs has a section too, which takes them together: `compare`.
    """
    files = {module.name for module in pkgutil.iter_modules(__path__)}
    return {
        name: cast(SectionModule, importlib.import_module(f".{name}", __name__))
        for name, finding in declared_findings().items()
        if name in files and finding.runs != "compared"
    }
