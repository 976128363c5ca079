"""Commit markers, which are written last: each says that a span, or a window of totals, is there
and what its bytes are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict, cast

from ..errors import LCAError
from . import disk
from .files import read_json
from .layout import ArrayPlan, plan_arrays
from .manifest import Manifest

DATA = "data.zarr"
COMMITS = "commits"
PARTIAL = "partial"


class Marker(TypedDict, total=False):
    """A commit marker, as JSON holds it; that of a window of totals says `window` in place of the
    facts of a span.

    Attributes:
        run: the id of the run.
        loss: its name.
        span: its number on the grid; `steps` are the training steps its segments start from.
        window: the number of the window of totals.
        files: size and CRC-32 of each chunk file, by its path below the run.
        partial: size and CRC-32 of totals that wait for their window; None where the span has none.
        ends: the loss at the first and the last checkpoint, groups averaged.
        evaluations: of the loss or its gradient; `forward_passes` of the model, `seconds` of the
            worker.
        batch_size: of the evaluations; `worst_residual` and `unconverged` segments of the
            allocation.
        silent: tensors that moved without a gradient of the loss.
        hidden: those of them the loss depends on nevertheless, through detach() or no_grad().
        host: on which the worker was; `pid` is its process.
    """

    run: str
    loss: str
    span: int
    steps: list[int]
    window: int
    files: dict[str, list[int]]
    partial: list[int] | None
    ends: list[float]
    evaluations: int
    forward_passes: int
    seconds: float
    batch_size: int
    worst_residual: float
    unconverged: int
    silent: list[str]
    hidden: list[str]
    host: str
    pid: int


class Commits:
    """The markers of one loss.

    Their names carry how many segments they speak for, so that the marker of a span that was
    shorter is never taken for one of the whole. `manifest` is that of the run up to the last
    checkpoint the loss covers.
    """

    def __init__(self, path: Path, manifest: Manifest, loss: str) -> None:
        self.path, self.manifest, self.loss = path, manifest.of(loss), loss
        self.key = manifest.losses[loss].key

    def marker(self, span: int) -> Path:
        """Return the path of the marker of a span."""
        return self.path / COMMITS / self.key / f"{span:06d}-{self.manifest.length(span)}.json"

    def window_marker(self, window: int) -> Path:
        """Return the path of the marker of a window of totals."""
        return (
            self.path
            / COMMITS
            / self.key
            / f"window-{window:06d}-{self.manifest.length_of(window)}.json"
        )

    def partial(self, span: int) -> Path:
        """Return the path of the file in which the totals of a span wait for those of its
        window.
        """
        return (
            self.path / PARTIAL / self.key / f"{span:06d}-{self.manifest.length(span)}.safetensors"
        )

    def is_folded(self, window: int) -> bool:
        """Tell whether the totals of a window are committed."""
        return self.manifest.window == 1 or _is_there(self.window_marker(window))

    def keeps_partials(self, window: int) -> bool:
        """Tell whether spans of a window have, or still need, totals of their own."""
        return self.manifest.window > 1 and not (
            self.manifest.is_full(window) and self.is_folded(window)
        )

    def is_committed(self, span: int) -> bool:
        """Tell whether a span has a marker, and its totals are folded or still wait."""
        if not _is_there(self.marker(span)):
            return False
        return self.is_folded(span // self.manifest.window) or _is_there(self.partial(span))

    def pending(self) -> list[int]:
        """Return the spans that are not committed."""
        return [span for span in range(self.manifest.spans) if not self.is_committed(span)]

    def is_complete(self) -> bool:
        """Tell whether every span is committed and every window of totals folded."""
        return all(map(self.is_folded, range(self.manifest.windows))) and not self.pending()

    def planned_files(self, span: int) -> list[str]:
        """Return the chunk files of a span, by their paths below the run."""
        totals = self.manifest.window == 1
        return [file for plan, file in self._files(span) if totals or not plan.of_windows]

    def planned_totals(self, window: int) -> list[str]:
        """Return the chunk files of a window of totals, by their paths below the run."""
        return [file for plan, file in self._files(window) if plan.of_windows]

    def _files(self, row: int) -> Iterator[tuple[ArrayPlan, str]]:
        for plan in plan_arrays(self.manifest, self.manifest.keep, self.manifest.losses[self.loss]):
            for file in plan.row_files(row):
                yield plan, f"{DATA}/{self.key}/{file}"

    def span_summary(self, span: int) -> Marker | None:
        """Return the marker of a span; None where the span is not committed.

        Raises:
            LCAError: where the marker is damaged.
        """
        return self._read(span) if self.is_committed(span) else None

    def all_facts(self) -> list[Marker]:
        """Return the markers of all spans that have one, in order.

        Raises:
            LCAError: where a marker is damaged.
        """
        return [
            self._read(span) for span in range(self.manifest.spans) if _is_there(self.marker(span))
        ]

    def _read(self, span: int) -> Marker:
        try:
            return self.load(span)
        except (ValueError, OSError) as error:
            raise LCAError(damaged(self.path, self.loss, self.about(span), str(error))) from None

    def about(self, span: int) -> str:
        """Describe a span in words."""
        return "span {} (steps {} to {})".format(
            span, *self.manifest.ends(self.manifest.rows(span))
        )

    def about_window(self, window: int) -> str:
        """Describe a window of totals in words."""
        return "window {} of the totals (steps {} to {})".format(
            window, *self.manifest.ends(self.manifest.rows_of(window))
        )

    def load(self, span: int) -> Marker:
        """Read the marker of a span and check that it belongs to this span of this run;
        `load_window` does likewise.

        Raises:
            ValueError: says in a few words what is wrong with it.
            OSError: where it cannot be read.
        """
        rows = self.manifest.rows(span)
        marker = self._load(
            self.marker(span), {"loss": self.loss, "span": span, "steps": self.manifest.steps[rows]}
        )
        ends = marker.get("ends")
        if not isinstance(ends, list) or [type(end) for end in ends] != [float, float]:
            raise ValueError("its commit marker does not say the loss at both ends")
        return marker

    def load_window(self, window: int) -> Marker:
        """Read and check the marker of a window of totals."""
        return self._load(self.window_marker(window), {"loss": self.loss, "window": window})

    def _load(self, path: Path, expected: Mapping[str, object]) -> Marker:
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
        return cast("Marker", marker)


def _is_seal(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int and number >= 0 for number in value)
    )


def _is_there(path: Path) -> bool:
    """Tell whether a file is there and not empty; a power failure can take the content of one."""
    try:
        return disk.state(path).size > 0
    except FileNotFoundError:
        return False


def damaged(run: Path, loss: str, where: str, what: str) -> str:
    """Return the message for a stored number that is not what was committed."""
    return (
        f"loss {loss!r} in {run} is damaged: {where}: {what}. `lca verify {run}` lists all damage, "
        f"`lca repair {run} --task FILE` computes it again."
    )
