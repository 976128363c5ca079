"""The progress of a replay as a person sees it: notes, stages, a bar on a terminal or in a
notebook, elsewhere a line a minute.

`streams` writes what a terminal or a pipe can show, `progressed` counts, `views` are the ways to
show how far a replay is, and `listener` turns events into them.
"""

from .listener import Display, WarningDisplay, listening
from .progressed import Progressed
from .streams import (
    Stream,
    open_standard_descriptors,
    say,
    showable,
    stderr,
    wrapped,
)
from .views import Lines, bar, waiting

__all__ = [
    "Display",
    "Lines",
    "Progressed",
    "Stream",
    "WarningDisplay",
    "bar",
    "listening",
    "open_standard_descriptors",
    "say",
    "showable",
    "stderr",
    "waiting",
    "wrapped",
]
