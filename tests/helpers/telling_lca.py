"""`lca` in short spans, whose windows of totals hold several; it tells what it says to be committed.
Run as a script: `telling_lca.py FILE ARGUMENT…`, where each line of FILE is a span and a loss of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lca_posthoc.cli import main
from lca_posthoc.numerics.schema import holds
from lca_posthoc.replay import prepare
from lca_posthoc.replay.events import Event, Log, SpanDone

SPAN = 2  # segments
WINDOW = 3  # spans


def choose_window(segments: int, span: int, keep: str, room: int) -> int:
    """Return the spans per window of totals; 1 where no totals are kept."""
    return WINDOW if holds(keep, "statistics") else 1


def told(file: Path) -> set[tuple[str, int]]:
    """Return the loss and the span of everything that was said to be committed."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {(loss, int(span)) for span, loss in map(str.split, lines)}


def _tell(file: Path) -> None:
    """Write down what is said to be committed, after it is said."""
    say = Log.__call__

    def say_and_tell(log: Log, event: Event) -> None:
        say(log, event)
        if isinstance(event, SpanDone):
            with file.open("a") as lines:
                lines.writelines(f"{event.span} {loss}\n" for loss in event.losses)

    Log.__call__ = say_and_tell  # type: ignore[method-assign]


if __name__ == "__main__":
    prepare.choose_span = lambda *_: SPAN
    prepare.choose_window = choose_window
    _tell(Path(sys.argv.pop(1)))
    main()
