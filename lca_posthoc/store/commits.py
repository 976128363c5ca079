"""Commit markers: what is written last, and says that a span, or a window of totals, is there and what its bytes are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import LCAError
from .files import read_json
from .layout import plan_arrays
from .manifest import Manifest

DATA = "data.zarr"
COMMITS = "commits"
PARTIAL = "partial"


class Commits:
    """The markers of one loss.

    Their names carry how many segments they speak for, so that one of a span that was shorter is never taken for the whole.
    `manifest` is that of the run up to the last checkpoint the loss covers.
    """

    def __init__(self, path: Path, manifest: Manifest, loss: str) -> None:
        self.path, self.manifest, self.loss = path, manifest.of(loss), loss
        self.key = manifest.losses[loss].key

    def marker(self, span: int) -> Path:
        """Where the marker of a span is."""
        return self.path / COMMITS / self.key / f"{span:06d}-{self.manifest.length(span)}.json"

    def window_marker(self, window: int) -> Path:
        """Where the marker of a window of totals is."""
        return self.path / COMMITS / self.key / f"window-{window:06d}-{self.manifest.length_of(window)}.json"

    def partial(self, span: int) -> Path:
        """Where the totals of a span wait for those of its window."""
        return self.path / PARTIAL / self.key / f"{span:06d}-{self.manifest.length(span)}.safetensors"

    def is_folded(self, window: int) -> bool:
        """Whether the totals of a window are committed."""
        return self.manifest.window == 1 or _is_there(self.window_marker(window))

    def keeps_partials(self, window: int) -> bool:
        """Whether spans of a window have, or still need, totals of their own."""
        return self.manifest.window > 1 and not (self.manifest.is_full(window) and self.is_folded(window))

    def is_committed(self, span: int) -> bool:
        """Whether a span has a marker, and its totals have not been lost before they were folded."""
        if not _is_there(self.marker(span)):
            return False
        return self.is_folded(span // self.manifest.window) or _is_there(self.partial(span))

    def pending(self) -> list[int]:
        """The spans that are not committed."""
        return [span for span in range(self.manifest.spans) if not self.is_committed(span)]

    def is_complete(self) -> bool:
        """Whether every span is committed and every window of totals folded."""
        return all(map(self.is_folded, range(self.manifest.windows))) and not self.pending()

    def planned_files(self, span: int) -> list[str]:
        """The chunk files of a span, by their paths below the run."""
        totals = self.manifest.window == 1
        return [file for part, file in self._files(span) if totals or part != "totals"]

    def planned_totals(self, window: int) -> list[str]:
        """The chunk files of a window of totals, by their paths below the run."""
        return [file for part, file in self._files(window) if part == "totals"]

    def _files(self, row: int) -> Iterator[tuple[str, str]]:
        for plan in plan_arrays(self.manifest, self.manifest.keep, self.manifest.losses[self.loss]):
            for file in plan.row_files(row):
                yield plan.part, f"{DATA}/{self.key}/{file}"

    def facts(self, span: int) -> dict[str, Any] | None:
        """What the marker of a span records; None where the span is not committed.

        Raises:
            LCAError: where the marker is damaged.
        """
        return self._read(span) if self.is_committed(span) else None

    def all_facts(self) -> list[dict[str, Any]]:
        """The facts of every span with a marker, in order.

        Raises:
            LCAError: where a marker is damaged.
        """
        return [self._read(span) for span in range(self.manifest.spans) if _is_there(self.marker(span))]

    def _read(self, span: int) -> dict[str, Any]:
        try:
            return self.load(span)
        except (ValueError, OSError) as error:
            raise LCAError(damaged(self.path, self.loss, self.about(span), str(error))) from None

    def about(self, span: int) -> str:
        """A span in words."""
        return "span {} (steps {} to {})".format(span, *self.manifest.ends(self.manifest.rows(span)))

    def about_window(self, window: int) -> str:
        """A window of totals in words."""
        return "window {} of the totals (steps {} to {})".format(
            window, *self.manifest.ends(self.manifest.rows_of(window))
        )

    def load(self, span: int) -> dict[str, Any]:
        """The marker of a span, which must be that of this span of this run; `load_window` likewise.

        Raises:
            ValueError: what is wrong with it, in a few words.
            OSError: where it cannot be read.
        """
        rows = self.manifest.rows(span)
        found = self._load(self.marker(span), {"loss": self.loss, "span": span, "steps": self.manifest.steps[rows]})
        ends = found.get("ends")
        if not isinstance(ends, list) or [type(each) for each in ends] != [float, float]:
            raise ValueError("its commit marker does not say the loss at both ends")
        return found

    def load_window(self, window: int) -> dict[str, Any]:
        """The marker of a window of totals."""
        return self._load(self.window_marker(window), {"loss": self.loss, "window": window})

    def _load(self, path: Path, expected: dict[str, Any]) -> dict[str, Any]:
        try:
            marker = read_json(path)
        except ValueError as error:
            raise ValueError(f"its commit marker is damaged: {error}") from None
        for name, value in {"run": self.manifest.id, **expected}.items():
            if marker.get(name) != value:
                raise ValueError(f"its commit marker is that of another {name}")
        files, partial = marker.get("files"), marker.get("partial")
        sealed = [*files.values()] if isinstance(files, dict) else [None]
        if not all(map(_is_seal, sealed if partial is None else [*sealed, partial])):
            raise ValueError("its commit marker does not say sizes and checksums")
        return marker


def _is_seal(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(each) is int and each >= 0 for each in value)


def _is_there(path: Path) -> bool:
    """Whether a file is there and not empty, as one is that a power failure took the content of."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def damaged(run: Path, loss: str, where: str, what: str) -> str:
    """The message for a stored number that is not what was committed."""
    return (
        f"loss {loss!r} in {run} is damaged: {where}: {what}. `lca verify {run}` lists all damage, `lca repair {run} --task FILE` "
        "computes it again."
    )
