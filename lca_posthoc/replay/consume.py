"""Remove iterates that a replay has done with, so that a long training needs no large disk.

An iterate goes once everything that is computed from it is committed and on the disk, and never
before: the segments on both its sides, for every loss of the run, and those whose causes need the
motion before them. The last one stays, and so do those of a last span that may still grow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Return how many checkpoints before a span its replay reads: the motion before a segment is
    its momentum.
    """
    return 1 if has_causes else 0


def only_directory(checkpoints: Where, option: str) -> Path:
    """Return the directory that a recorder writes.

    Raises:
        InputError: where the checkpoints are at several places, or at one with `{step}` in it.
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
    """Refuse to remove what cannot be removed safely.

    Args:
        checkpoints: where they lie.
        settings: those asked for, or recorded.
        durable: whether results are on the disk before they count.
        keep_every: as for `Consumer`.

    Raises:
        InputError: with the reason.
    """
    root = only_directory(checkpoints, "--consume")
    if is_remote(root):
        raise InputError(
            f"{root} is remote, and --consume removes files of this machine's file systems alone. "
            "Leave it out."
        )
    if not durable:
        raise InputError(
            "--consume removes iterates once what is computed from them is on the disk, which "
            "--durability none does not wait for. Leave one of them out."
        )
    refuse_a_part(settings, "--consume")
    if keep_every is not None and keep_every < 1:
        raise InputError(
            f"--keep-every {keep_every}: keep every iterate (1), every second (2), and so on."
        )


def refuse_a_part(settings: Settings, option: str) -> None:
    """Refuse an option for a part of the checkpoints, or of the segments.

    Raises:
        InputError: naming both options.
    """
    parts = {"steps": settings["steps"], "pattern": settings["pattern"]}
    for part, chosen in parts.items():
        if chosen is not None:
            raise InputError(
                f"--{part} is for a part of the checkpoints, and {option} is for all that a "
                "recorder writes. Leave one of them out; record fewer with Recorder(every=, "
                "bursts=, steps=, until=)."
            )
    if settings["segments"] is not None:
        raise InputError(
            "--segments draws a random part of the segments from all of training, which has to be "
            f"there when it is drawn, and {option} is for iterates that come and go. Leave one of "
            "them out; Recorder(bursts=(every, length)) records a part of training."
        )
    if settings["path_band"] == "on":
        raise InputError(
            f"--path-band on looks at the checkpoints on both sides of a segment, and {option} is "
            "for iterates that come and go. Leave one of them out."
        )


def refuse_other_files(trajectory: Trajectory) -> None:
    """Refuse checkpoints that no recorder wrote: what else lies with them is not known.

    Raises:
        InputError: naming the first such file.
    """
    for checkpoint in trajectory.checkpoints:
        if checkpoint.files != (trajectory.root / name_of(checkpoint.step),):
            raise InputError(
                f"{checkpoint.files[0]} (step {checkpoint.step}) is no file as a recorder names "
                "them, and --consume removes those alone. Leave it out."
            )


def consumed_of(manifest: Manifest, root: Path) -> Consumed:
    """Return the checkpoints of a run whose files the run itself may have removed, with the whole
    paths of these; none where it removes nothing.
    """
    release = None if is_remote(root) else read_release(root)
    if release is None or release.run != manifest.id:
        return NOTHING_CONSUMED
    return Consumed(
        tuple(
            replace(checkpoint, files=tuple(root / file for file in checkpoint.files))
            for checkpoint in manifest.checkpoints
            if checkpoint.step < release.before
        ),
        frozenset(manifest.checkpoints[place].step for place in manifest.breaks),
    )


def refuse_gone(
    manifest: Manifest, spans: Mapping[str, Iterable[int]], gone: Collection[int]
) -> None:
    """Refuse to replay spans whose iterates were removed.

    Args:
        manifest: of the run.
        spans: those to be replayed, by loss.
        gone: the steps of the iterates that were removed.

    Raises:
        InputError: naming loss, steps and what can be done.
    """
    before = reads_before(manifest.settings["signal"] is not None)
    for loss, numbers in spans.items():
        of_loss = manifest.of(loss)
        for span in numbers:
            rows = of_loss.rows(span)
            needed = {
                position
                for start in of_loss.starts[rows]
                for position in range(max(0, start - before), start + 2)
            }
            steps = [of_loss.checkpoints[position].step for position in sorted(needed)]
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
    """Removes the iterates that a run has done with, in order.

    Args:
        root: the directory of the checkpoints.
        writer: of the run.
        keep_every: steps that are multiples of it stay for good; None for none.

    Raises:
        InputError: where another run removes iterates of this directory, or this run kept others.
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
                f"another run, {self._release.place}, removes iterates of {root} (--consume): go "
                "on with that one, or leave --consume out."
            )
        if self._release.keep_every != keep_every:
            kept = self._release.keep_every
            raise InputError(
                "this run began to remove iterates "
                + ("without --keep-every" if kept is None else f"with --keep-every {kept}")
                + ". Go on as it began."
            )
        self._trained = {
            tensor.spec.name: tensor.source
            for tensor in writer.manifest.tensors
            if tensor.spec.kind == "parameter"
        }
        self._span = 0  # the first span that is not done
        for unfinished in root.glob(f"{RELEASE}.*.tmp"):  # of a driver that was killed
            unfinished.unlink(missing_ok=True)
        for step in steps_there(root):  # whose removal a kill cut short
            if step < self._release.before and not self._release.keeps(step):
                self._remove(step)

    @property
    def gone(self) -> frozenset[int]:
        """Return the steps of the iterates that were removed."""
        release = self._release
        return frozenset(
            checkpoint.step
            for checkpoint in self._writer.manifest.checkpoints
            if checkpoint.step < release.before and not release.keeps(checkpoint.step)
        )

    def release(self, *, at_rest: bool) -> None:
        """Remove the iterates that nothing needs any more; what is said of them is on the disk
        before.

        Args:
            at_rest: whether no span is underway. Until then the iterates of a stretch in which
                nothing moved yet stay: spans that are underway look back at them.
        """
        manifest = self._writer.manifest
        checkpoints, starts = manifest.checkpoints, manifest.starts
        before = sum(checkpoint.step < self._release.before for checkpoint in checkpoints)
        leaving = range(before, self._first_needed())
        # a run whose iterates are removed has its segments in the order of training
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
        """Return the position of the first checkpoint that something not yet committed needs, or
        may need.
        """
        manifest = self._writer.manifest
        of_losses = [self._writer.commits(loss) for loss in manifest.losses]
        while all(_is_done(commits, self._span) for commits in of_losses):
            self._span += 1
        row = self._span * manifest.span
        last = len(manifest.checkpoints) - 1  # from which the next segment starts, if no gap comes
        first = manifest.starts[row] if row < manifest.segments else last
        return first - reads_before(manifest.settings["signal"] is not None)

    def _stretches_that_moved(self, rows: range) -> tuple[int, ...]:
        """Return the stretches in which a parameter moved before the checkpoints that stay: which
        segment is measured depends on it.

        Args:
            rows: of the segments that start from checkpoints that go.
        """
        moved = {*self._release.moved}
        for row in rows:
            stretch = stretch_of(row)
            if stretch and stretch.start not in moved and self._moves(row):
                moved.add(stretch.start)
        return tuple(sorted(moved))

    def _moves(self, row: int) -> bool:
        """Tell whether a parameter moves on a segment; where that cannot be read, it counts as
        moved.
        """
        before, after = (
            replace(checkpoint, files=tuple(self._root / file for file in checkpoint.files))
            for checkpoint in self._writer.manifest.ends_of(row)
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


def _is_done(commits: Commits, span: int) -> bool:
    """Tell whether a span is committed for a loss, and no checkpoint makes it longer."""
    covered = commits.manifest
    return (
        span < covered.spans and covered.length(span) == covered.span and commits.is_committed(span)
    )


def _is_still(row: int, moved: Collection[int]) -> bool:
    """Tell whether a segment is of a stretch in which nothing moved so far."""
    stretch = stretch_of(row)
    return bool(stretch) and stretch.start not in moved


def _tensor(checkpoint: Checkpoint, source: str) -> Tensor:
    return read_checkpoint(checkpoint, {source: source})[source]


def refuse_others(manifest: Manifest, asked: Collection[str], out: Path) -> None:
    """Refuse to remove iterates of a training that goes on while a recorded loss is not asked for:
    it would be left behind, and could never be taken further.

    Raises:
        InputError: naming the loss.
    """
    for name in manifest.losses:
        if name not in asked:
            raise InputError(
                f"loss {name!r} of this run is not asked for, and --consume would remove the "
                f"iterates that it needs. Ask for it too (--loss {name}), or drop it with `lca "
                f"remove {out} --loss {name}`."
            )


def looked_back_at(root: Path, manifest: Manifest, row: int) -> list[int] | None:
    """Return the segments that tell, for a span from `row` on, where none of them moves, that
    nothing moved in its stretch before it; None where something did, or nothing comes before it.
    Of those whose iterates were removed it is known.
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
