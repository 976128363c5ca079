"""Remove iterates once they are replayed, so that a long training needs no large disk.

An iterate is removed only after everything computed from it is committed and on disk: the segments
on both its sides, for every loss of the run, and those whose causes need the motion before them.
The last one stays, and so do those of a last span that may still grow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.text import count
from ..checkpoints.paths import is_remote
from ..checkpoints.places import Where, places_of
from ..checkpoints.recorded import (
    RELEASE,
    Release,
    files_of,
    name_of,
    read_release,
    steps_there,
    write_release,
)
from ..checkpoints.trajectory import (
    NOTHING_CONSUMED,
    Checkpoint,
    Consumed,
    Trajectory,
    read_checkpoint,
)
from ..errors import InputError, SpanError, few
from ..numerics.settings import Settings
from ..results import Commits, Manifest, RunWriter
from .worker import looks_back, stretch_of

if TYPE_CHECKING:
    from torch import Tensor


def reads_before(has_causes: bool) -> int:
    """Return how many checkpoints before a span its replay reads; causes need the motion before a
    segment, for momentum.
    """
    return 1 if has_causes else 0


def only_directory(checkpoints: Where, option: str) -> Path:
    """Return the directory that a recorder writes.

    Args:
        checkpoints: as for `run`.
        option: that needs the directory, for the message.

    Raises:
        InputError: if the checkpoints lie in several places, or in one with `{step}` in it.
    """
    places = places_of(checkpoints)
    if len(places) > 1 or places[0].rest:
        raise InputError(
            f"{option} takes the one directory that a recorder writes, not {few([*map(str, places)])}. "
            "Give that directory, or leave the option out."
        )
    return places[0].root


def refuse_options(
    checkpoints: Where, settings: Settings, *, durable: bool, keep_every: int | None
) -> None:
    """Reject options with which iterates cannot be removed safely.

    Args:
        checkpoints: where they lie.
        settings: those asked for, or recorded.
        durable: whether results are flushed to disk before they count.
        keep_every: as for `Consumer`.

    Raises:
        InputError: with the reason.
    """
    root = only_directory(checkpoints, "--consume")
    if is_remote(root):
        raise InputError(
            f"{root} is remote, and --consume removes files of local file systems alone. "
            "Leave it out."
        )
    if not durable:
        raise InputError(
            "--consume removes iterates once their results are on disk, but --durability none "
            "does not wait for that. Leave one of them out."
        )
    refuse_a_part(settings, "--consume")
    if keep_every is not None and keep_every < 1:
        raise InputError(
            f"--keep-every {keep_every}: keep every iterate (1), every second (2), and so on."
        )


def refuse_a_part(settings: Settings, option: str) -> None:
    """Reject options that select a part of the checkpoints or of the segments.

    Args:
        settings: those asked for, or recorded.
        option: `--follow` or `--consume`, for the message.

    Raises:
        InputError: naming both options.
    """
    parts = {"steps": settings["steps"], "pattern": settings["pattern"]}
    for part, chosen in parts.items():
        if chosen is not None:
            raise InputError(
                f"--{part} selects a part of the checkpoints, but {option} needs all that a "
                "recorder writes. Leave one of them out; record fewer with Recorder(every=, "
                "bursts=, steps=, until=)."
            )
    if settings["segments"] is not None:
        raise InputError(
            "--segments draws a random part of the segments from all of training, which must be "
            f"complete, but with {option} iterates come and go. Leave one of "
            "them out; Recorder(bursts=(every, length)) records a part of training."
        )
    if settings["path_band"] == "on":
        raise InputError(
            f"--path-band on needs the checkpoints on both sides of a segment, but with {option} "
            "iterates come and go. Leave one of them out."
        )


def refuse_other_files(trajectory: Trajectory) -> None:
    """Reject checkpoints that no recorder wrote: other files may lie with them.

    Raises:
        InputError: naming the first such file.
    """
    for checkpoint in trajectory.checkpoints:
        if checkpoint.files != (trajectory.root / name_of(checkpoint.step),):
            raise InputError(
                f"{checkpoint.files[0]} (step {checkpoint.step}) has no name that a recorder gives, "
                "and --consume removes only such files. Leave it out."
            )


def consumed_of(manifest: Manifest, root: Path) -> Consumed:
    """Return the checkpoints whose files the run itself may have removed, with whole paths; none
    where the run removes nothing.

    Args:
        manifest: of the run.
        root: the directory of the checkpoints.
    """
    release = None if is_remote(root) else read_release(root)
    if release is None or release.run != manifest.id:
        return NOTHING_CONSUMED
    return Consumed(
        tuple(
            checkpoint.under(root)
            for checkpoint in manifest.checkpoints
            if checkpoint.step < release.before
        ),
        frozenset(manifest.checkpoints[place].step for place in manifest.breaks),
    )


def refuse_gone(
    manifest: Manifest, spans: Mapping[str, Iterable[int]], gone: Collection[int]
) -> None:
    """Reject spans whose iterates were removed.

    Args:
        manifest: of the run.
        spans: those to be replayed, by loss.
        gone: the steps of the removed iterates.

    Raises:
        InputError: naming loss and steps, and what to do.
    """
    for loss, numbers in spans.items():
        of_loss = manifest.of(loss)
        for span in numbers:
            rows = of_loss.rows(span)
            steps = [of_loss.checkpoints[position].step for position in sorted(of_loss.reads(rows))]
            missing = [str(step) for step in steps if step in gone]
            if missing:
                first, last = of_loss.ends(rows)
                raise InputError(
                    f"loss {loss!r} cannot be replayed on steps {first} to {last}: `lca run "
                    f"--consume` removed the iterates of steps {few(missing)} once the losses of "
                    "that time were committed. Restore these files from a copy, or record the "
                    "training again."
                )


class Consumer:
    """Removes the iterates that a run no longer needs, in order.

    Args:
        root: the directory of the checkpoints.
        writer: of the run.
        keep_every: iterates at multiples of this step stay forever; None for none.

    Raises:
        InputError: if another run removes iterates of this directory, or this run began with
            another `keep_every`.
    """

    def __init__(self, root: Path, writer: RunWriter, keep_every: int | None) -> None:
        self._root, self._writer = root, writer
        release = read_release(root)
        self._release = release or Release(
            before=0,
            keep_every=keep_every,
            run=writer.manifest.id,
            place=str(writer.path),
            moved=(),
        )
        if self._release.run != writer.manifest.id:
            raise InputError(
                f"another run, {self._release.place}, removes iterates of {root} (--consume): resume "
                "that one, or leave --consume out."
            )
        if self._release.keep_every != keep_every:
            kept = self._release.keep_every
            raise InputError(
                "this run began to remove iterates "
                + ("without --keep-every" if kept is None else f"with --keep-every {kept}")
                + ". Resume it the same way."
            )
        self._trained = {
            tensor.spec.name: tensor.source
            for tensor in writer.manifest.tensors
            if tensor.spec.kind == "parameter"
        }
        self._span = 0  # the first span that is not finished
        self._removed = 0
        for unfinished in root.glob(f"{RELEASE}.*.tmp"):  # of a killed driver
            unfinished.unlink(missing_ok=True)
        for step in steps_there(root):  # whose removal a kill interrupted
            if step < self._release.before and not self._release.keeps(step):
                self._remove(step)

    @property
    def gone(self) -> frozenset[int]:
        """Return the steps of the removed iterates."""
        release = self._release
        return frozenset(
            checkpoint.step
            for checkpoint in self._writer.manifest.checkpoints
            if checkpoint.step < release.before and not release.keeps(checkpoint.step)
        )

    def told(self) -> list[str]:
        """Return a note on how many iterates were removed and kept; none where nothing was removed."""
        kept = len(steps_there(self._root))
        return [
            f"removed {count(self._removed, 'iterate')} of {self._root}, whose results are complete, "
            f"and kept {kept:,}"
        ] * bool(self._removed)

    def release(self, *, at_rest: bool) -> None:
        """Remove the iterates that nothing needs any more, after recording this on disk.

        Args:
            at_rest: whether no span is underway. Until then the iterates of a stretch in which
                nothing has moved stay, because spans underway look back at them.
        """
        manifest = self._writer.manifest
        checkpoints, starts = manifest.checkpoints, manifest.starts
        before = sum(checkpoint.step < self._release.before for checkpoint in checkpoints)
        leaving = range(before, self._first_needed())
        # such a run has its segments in the order of training
        rows = range(bisect_left(starts, leaving.start), bisect_left(starts, leaving.stop))
        moved = self._stretches_that_moved(rows)
        if not at_rest:
            still = (starts[row] for row in rows if _is_still(row, moved))
            leaving = range(before, next(still, leaving.stop))
        if not leaving:
            return
        stays = checkpoints[leaving.stop].step
        self._release = replace(self._release, before=stays, moved=moved)
        write_release(self._root, self._release)
        for index in leaving:
            if not self._release.keeps(checkpoints[index].step):
                self._remove(checkpoints[index].step)

    def _first_needed(self) -> int:
        """Return the position of the first checkpoint that something not yet committed needs or may
        need.
        """
        manifest = self._writer.manifest
        of_losses = [self._writer.commits(loss) for loss in manifest.losses]
        while all(_is_done(commits, self._span) for commits in of_losses):
            self._span += 1
        row = self._span * manifest.span
        last = len(manifest.checkpoints) - 1  # the next segment starts there, if no gap follows
        first = manifest.starts[row] if row < manifest.segments else last
        return first - reads_before(manifest.settings["signal"] is not None)

    def _stretches_that_moved(self, rows: range) -> tuple[int, ...]:
        """Return the stretches in which a parameter moved before the checkpoints that stay.

        They decide which segment is measured.

        Args:
            rows: of the segments whose starting checkpoints are removed.
        """
        moved = {*self._release.moved}
        for row in rows:
            stretch = stretch_of(row)
            if stretch and stretch.start not in moved and self._moves(row):
                moved.add(stretch.start)
        return tuple(sorted(moved))

    def _moves(self, row: int) -> bool:
        """Tell whether a parameter moves on a segment; an unreadable segment counts as moved."""
        before, after = (
            checkpoint.under(self._root) for checkpoint in self._writer.manifest.ends_of(row)
        )
        try:
            return any(
                bool((_tensor(before, source) != _tensor(after, source)).any())
                for source in self._trained.values()
            )
        except SpanError:
            return True

    def _remove(self, step: int) -> None:
        for path in files_of(self._root, step):
            path.unlink(missing_ok=True)
        self._removed += 1


def _is_done(commits: Commits, span: int) -> bool:
    """Tell whether a span is committed for a loss, and no checkpoint will make it longer."""
    covered = commits.manifest
    return (
        span < covered.spans and covered.length(span) == covered.span and commits.is_committed(span)
    )


def _is_still(row: int, moved: Collection[int]) -> bool:
    """Tell whether a segment belongs to a stretch in which nothing has moved so far."""
    stretch = stretch_of(row)
    return bool(stretch) and stretch.start not in moved


def _tensor(checkpoint: Checkpoint, source: str) -> Tensor:
    return read_checkpoint(checkpoint, {source: source})[source]


def refuse_others(manifest: Manifest, asked: Collection[str], out: Path) -> None:
    """Reject removing iterates of a running training while a recorded loss is not asked for.

    That loss could never be replayed further.

    Args:
        manifest: of the run.
        asked: names of losses.
        out: the path of the run, for the message.

    Raises:
        InputError: naming the loss.
    """
    for name in manifest.losses:
        if name not in asked:
            raise InputError(
                f"loss {name!r} of this run is not asked for, but --consume would remove the "
                f"iterates that it needs. Ask for it too (--loss {name}), or drop it with `lca "
                f"remove {out} --loss {name}`."
            )


def looked_back_at(root: Path, manifest: Manifest, row: int) -> list[int] | None:
    """Return the segments that a span must look at to tell whether anything moved in its stretch
    before it.

    None means that something is known to have moved, or that nothing comes before the span.
    Segments of removed iterates are omitted, because it is recorded what moved there.

    Args:
        root: the directory of the checkpoints.
        manifest: of the run.
        row: the first segment of the span.
    """
    rows = looks_back(row)
    if not rows:
        return None
    release = None if is_remote(root) else read_release(root)
    if release is None or release.run != manifest.id:
        return list(rows)
    if rows.start in release.moved:
        return None
    return [row for row in rows if manifest.ends_of(row)[0].step >= release.before]
