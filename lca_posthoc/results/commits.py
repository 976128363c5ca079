"""Read and write commit markers, which come last: each states that a span, or a window of totals,
exists, and the seals of its files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from ..base.text import quoted
from ..errors import LCAError
from . import disk
from .files import read_json
from .layout import ArrayPlan, plan_arrays
from .manifest import Manifest
from .packs import PACKS, Seal

DATA = "data.zarr"
COMMITS = "commits"
PARTIAL = "partial"


class Marker(TypedDict, total=False):
    """A commit marker in JSON; that of a window of totals has `window` in place of the fields of a
    span.

    Attributes:
        run: the id of the run.
        loss: its name.
        span: its number on the grid.
        steps: the training steps its segments start from.
        window: the number of the window of totals.
        files: the seal of each chunk, by its path below the run, see `packs`.
        partial: size and CRC-32 of totals that wait for their window; None if the span has none.
        ends: the loss at the first and the last checkpoint, groups averaged.
        evaluations: of the loss or its gradient.
        forward_passes: of the model.
        seconds: of the worker.
        batch_size: of the evaluations.
        worst_residual: of the allocation.
        unconverged: segments of the allocation.
        silent: tensors that moved without a gradient of the loss.
        hidden: those of them that the loss depends on nevertheless, through detach() or no_grad().
        host: of the worker.
        pid: its process.
    """

    run: str
    loss: str
    span: int
    steps: list[int]
    window: int
    files: dict[str, Seal]
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


@dataclass(frozen=True)
class Waiting:
    """Totals of a stretch of segments that wait for their window.

    Attributes:
        path: of the file.
        segments: of the stretch.
        span: to which they belong; None for those that wait since checkpoints were added.
    """

    path: Path
    segments: int
    span: int | None


class Commits:
    """The markers of one loss.

    Their names include the number of segments, so that the marker of a formerly shorter span is
    never taken for one of the whole. `manifest` is that of the run up to the last checkpoint that
    the loss covers.
    """

    def __init__(self, path: Path, manifest: Manifest, loss: str) -> None:
        self.path, self.manifest, self.loss = path, manifest.of(loss), loss
        self.key = manifest.losses[loss].key
        self._begun = manifest.losses[loss].begun

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

    def pack(self, marker: Path) -> Path:
        """Return the path of the file of small chunks that a marker lists."""
        return self.path / DATA / self.key / PACKS / marker.stem

    def partial(self, span: int, since: int | None = None) -> Path:
        """Return the path of the file in which the totals of a span wait for those of its window.

        Args:
            span: its number on the grid.
            since: the first segment of the span that it counts; by default that of `counted`.
        """
        since = self.counted(span) if since is None else since
        return self.partials / f"{span:06d}-{since}-{self.manifest.length(span)}"

    @property
    def partials(self) -> Path:
        """Return the directory in which totals wait."""
        return self.path / PARTIAL / self.key

    def begun(self, window: int) -> Waiting | None:
        """Return the totals of a window up to where checkpoints were added, which wait; None if it
        has none.
        """
        if self._begun is None or self.manifest.window_of(self._begun[0] - 1) != window:
            return None
        path = self.partials / self.begun_name(self._begun[0])
        segments = self._begun[0] - self.manifest.rows_of(window).start
        return Waiting(path, segments, None) if _is_there(path) else None

    @staticmethod
    def begun_name(segments: int) -> str:
        """Return the name of the file with the waiting totals of the last window, folded when the
        run had so many segments.
        """
        return f"begun-{segments}"

    def _since(self, span: int, begun: Waiting | None) -> int:
        """Return how many of a span's first segments are in the begun totals of its window."""
        if begun is None:
            return 0
        window = span // self.manifest.window
        first = self.manifest.window * window
        before = self.manifest.span * (span - first)
        return min(max(0, begun.segments - before), self.manifest.length(span))

    def counted(self, span: int) -> int:
        """Return how many of a span's first segments are in totals that do not need it: folded
        ones, and those that wait since checkpoints were added.
        """
        window = span // self.manifest.window
        if self.manifest.window > 1 and self.is_folded(window):
            return self.manifest.length(span)
        return self._since(span, self.begun(window))

    def is_folded(self, window: int) -> bool:
        """Tell whether the totals of a window are committed."""
        return self.manifest.window == 1 or _is_there(self.window_marker(window))

    def counts(self, segment: int) -> bool:
        """Tell whether a segment is in the totals that wait since checkpoints were added."""
        window = self.manifest.window_of(segment)
        begun = self.begun(window)
        return begun is not None and segment < self.manifest.rows_of(window).start + begun.segments

    def waiting(self, window: int) -> Iterator[Waiting]:
        """Yield the totals to merge for a window, in order.

        If another worker has just folded it, all of its files are missing, and all are named.
        """
        begun = self.begun(window)
        if begun is not None:
            yield begun
        for span in self.manifest.spans_of(window):
            since, length = self._since(span, begun), self.manifest.length(span)
            if since < length:
                yield Waiting(self.partial(span, since), length - since, span)

    def seal_of(self, waiting: Waiting) -> list[int] | None:
        """Return the recorded size and CRC-32 of waiting totals.

        Raises:
            ValueError: as `load` does.
            OSError: as `load` does.
        """
        if waiting.span is not None:
            return self.load(waiting.span)["partial"]
        return None if self._begun is None else self._begun[1:]

    def waits(self, name: str) -> bool:
        """Tell whether a file in the directory of waiting totals is still needed."""
        if self._begun is not None and name == self.begun_name(self._begun[0]):
            return not self.is_folded(self.manifest.window_of(self._begun[0] - 1))
        number = name.partition("-")[0]
        if not number.isdecimal() or int(number) >= self.manifest.spans:
            return False
        return self.keeps_partial(int(number)) and self.partial(int(number)).name == name

    def keeps_partial(self, span: int) -> bool:
        """Tell whether a span has, or still needs, waiting totals of its own."""
        return self.manifest.window > 1 and self.counted(span) < self.manifest.length(span)

    def is_committed(self, span: int) -> bool:
        """Tell whether a span has a marker, and its totals still wait or are folded.

        It looks for waiting totals first, because another worker removes them once they are folded.
        """
        return _is_there(self.marker(span)) and self._has_totals(span)

    def _has_totals(self, span: int) -> bool:
        """Tell whether the totals of a span with a marker wait, or are folded."""
        if self.manifest.window == 1:
            return True
        return _is_there(self.partial(span)) or not self.keeps_partial(span)

    def pending(self) -> list[int]:
        """Return the spans that are not committed."""
        spans = range(self.manifest.spans)
        sizes = disk.sizes([*map(self.marker, spans)])
        return [
            span
            for span, size in zip(spans, sizes, strict=True)
            if not size or not self._has_totals(span)
        ]

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
        """Return the marker of a span; None if the span is not committed.

        Raises:
            LCAError: if the marker is damaged.
        """
        marker = self._read(span)
        return None if marker is None or not self._has_totals(span) else marker

    def all_facts(self) -> list[Marker]:
        """Return the markers of all spans that have one, in order.

        Raises:
            LCAError: if a marker is damaged.
        """
        markers = map(self._read, range(self.manifest.spans))
        return [marker for marker in markers if marker is not None]

    def _read(self, span: int) -> Marker | None:
        """Return the marker of a span; None if it is missing, or empty after a power failure.

        Raises:
            LCAError: if it is damaged.
        """
        try:
            return self.load(span)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            if not _is_there(self.marker(span)):
                return None
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
        """Read the marker of a span and check that it belongs to this span of this run, as
        `load_window` does.

        Raises:
            ValueError: describing the damage in a few words.
            OSError: if it cannot be read.
        """
        rows = self.manifest.rows(span)
        marker = self._load(
            self.marker(span), {"loss": self.loss, "span": span, "steps": self.manifest.steps[rows]}
        )
        ends = marker.get("ends")
        if not isinstance(ends, list) or [type(end) for end in ends] != [float, float]:
            raise ValueError("its commit marker lacks the loss at both ends")
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
        whole = partial is None or _is_seal(partial, 2)
        if not whole or not all(_is_seal(one, 2) or _is_seal(one, 3) for one in sealed):
            raise ValueError("its commit marker lacks sizes and checksums")
        return cast("Marker", marker)


def _is_seal(value: object, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(type(number) is int and number >= 0 for number in value)
    )


def _is_there(path: Path) -> bool:
    """Tell whether a file exists and is not empty; a power failure can empty one."""
    return bool(disk.sizes([path])[0])


def damaged(run: Path, loss: str, where: str, what: str) -> str:
    """Return the message for a stored number that differs from the committed one.

    Args:
        run: its directory.
        loss: its name.
        where: names the place of the number.
        what: describes the damage.
    """
    return (
        f"loss {loss!r} in {run} is damaged: {where}: {what}. `lca verify {quoted(run)}` lists all "
        f"damage, `lca repair {quoted(run)} --task FILE` recomputes it."
    )
