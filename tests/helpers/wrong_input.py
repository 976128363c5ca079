"""A directory of checkpoints, a task file and a run, to be spoilt; and how a refusal leaves them.

Whatever is wrong is said in one line, with its exit code, and leaves nothing behind: tests go
through the command line, and every refusal is compared with what lay on disk before, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lca_posthoc.replay import pending_spans

from .cli import (
    contents,
    document,
    lca,
    refused,
    run_lca,
    write_task,
)

MIDDLE = 30


class Place:
    """A recorded directory, a task file, and a run directory that is not there yet."""

    def __init__(self, root: Path) -> None:
        self.data = root / "data"
        self.checkpoints, self.out, self.task = (
            self.data / "ck",
            self.data / "run.lca",
            root / "task.py",
        )
        self.data.mkdir()
        write_task(self.task)

    def run(self, *options: object) -> Any:
        """Run without path bands, for which a segment needs checkpoints beyond its own two."""
        return run_lca(self.checkpoints, self.task, self.out, "--path-band", "off", *options)

    def refuses(self, *words: str, options: tuple[object, ...] = (), code: int = 2) -> str:
        """The command is refused with all of `words`, and everything on disk is as it was."""
        before = contents(self.data)
        line = refused(self.run(*options), *words, code=code)
        assert contents(self.data) == before
        return line


def spans_of(place: Place) -> tuple[int, int, bool]:
    found = document(lca("status", place.out, "--json"))["losses"]["train"]
    return found["spans_done"], found["spans"], found["complete"]


def before_span(monkeypatch: pytest.MonkeyPatch, call: int, act: Callable[[], object]) -> None:
    """Do something just before the replay of a span starts, counted from 0."""
    original, calls = pending_spans.replay_span, iter(range(10**6))

    def hooked(spec: dict[str, Any]) -> dict[str, Any]:
        if next(calls) == call:
            act()
        return original(spec)

    monkeypatch.setattr(pending_spans, "replay_span", hooked)


TRAIN_LOSS = '"train": Loss(F.cross_entropy, on="train")'
TRAIN_DATA = "train = (inputs[:30], targets[:30])"
RETURN = "    return Task("


def completes_as(place: Place, clean_run: Path) -> None:
    """Run again, the run is complete, equal to one that never lacked space, and holds nothing
    temporary.
    """
    result = place.run()
    assert result.exit_code == 0, result.stderr
    assert contents(place.out / "data.zarr") == contents(clean_run / "run.lca" / "data.zarr")
    left = [
        path
        for path in place.out.parent.rglob("*")
        if ".partial" in path.name or path.name.endswith(".tmp")
    ]
    assert left == []
