"""Show the progress of a replay: notes, stages, and a bar on a terminal or in a notebook, elsewhere
a line a minute.

`streams` writes what a terminal or a pipe can show, `progressed` counts, `views` draws, and
`listener` turns events into calls of these.
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
