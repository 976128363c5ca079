"""Power cuts of runs and of repairs, on a file system that loses what was not flushed."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from lca_posthoc import open_run, results
from lca_posthoc.errors import LCAError
from lca_posthoc.replay import prepare
from lca_posthoc.results import Damage, RunWriter
from tests.helpers import telling_lca
from tests.helpers.power_cut.mount import why_not
from tests.helpers.power_cut.powered import Powered, Session, powered

from . import NOT_DONE, by_level, clean_runs, drawn_levels, fault
from .processes import MEMORY, Driver, named, undamaged, whole
from .store import ARRAYS, DAMAGES

SEGMENTS, FEW = 40, 16  # of a run, and where there is little time
LEVELS = 19  # seed of the levels, for all rows: they share clean runs
INLINE = ("--cluster", "inline")
LOCAL = ("--cluster", "local", "--workers", 2)
REMOVE = """\
import shutil, sys
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""
WRITES_BACK = 700  # changes of a disk, of thousands in a run
UNFLUSHED = ("--durability", "none")


@functools.cache
def _laid(keep: str, segments: int) -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory(prefix="lca-clean-", dir=MEMORY)
    place = clean_runs.lay_out(Path(made.name), segments)
    with windows_of_several_spans():
        clean_runs.clean_run(place, place / "clean.lca", span=telling_lca.SPAN, keep=keep)
    return made


def windows_of_several_spans() -> contextlib.AbstractContextManager[object]:
    """Make runs of this process cut their totals as `telling_lca` does."""
    return mock.patch.object(prepare, "choose_window", telling_lca.choose_window)


@dataclass(frozen=True)
class Case:
    """A run on a disk that is interrupted, of checkpoints that lie elsewhere.

    Attributes:
        place: a directory for logs, and for what is said to be committed.
        source: the directory of the checkpoints, of their task and of the clean run.
        out: where the run is.
        keep: its level.
    """

    place: Path
    source: Path
    out: Path
    keep: str = "parameters"

    @property
    def clean(self) -> Path:
        return self.source / "clean.lca"

    @property
    def told(self) -> set[tuple[str, int]]:
        """The losses and spans that were said to be committed."""
        return telling_lca.told(self.place / "told")

    def forget(self) -> None:
        """Forget what was said to be committed."""
        (self.place / "told").unlink(missing_ok=True)

    def _lca(self, *arguments: object) -> Driver:
        script = [telling_lca.__file__, self.place / "told", *arguments]
        return Driver([*map(str, script)], self.place, {}, False)

    def run(self, *options: object, checkpoints: Path | None = None) -> Driver:
        """`lca run`, over every loss."""
        return self._lca(
            *("run", checkpoints or self.source / "checkpoints", "--loss", "all"),
            *("--task", self.source / "small_task.py", "--out", self.out),
            *("--keep", self.keep, "--tolerance", "inf", *options),
        )

    def repair(self, *options: object) -> Driver:
        """`lca repair`."""
        task = ("--task", self.source / "small_task.py")
        return self._lca("repair", self.out, *task, *INLINE, *options)

    def removal(self) -> Driver:
        """Remove the run."""
        script = self.place / "remove.py"
        script.write_text(REMOVE)
        return Driver([str(script), str(self.out)], self.place, {}, False)

    def nothing_lost(self) -> None:
        """Assert that what was said to be committed is, and that what is committed is whole."""
        if told := self.told:
            writer = RunWriter.open(self.out)
            lost = [(loss, span) for loss, span in told if span in writer.pending(loss)]
            assert lost == [], f"lost: {lost}"
        undamaged(self.out)

    def is_whole(self, session: Session) -> None:
        """Assert that the bytes are those of the clean run, once temporary files in it and beside it
        are swept whose removal was not flushed.
        """
        self.nothing_lost()
        succeed(session, self.repair())
        succeed(session, self.run(*INLINE))
        whole(self.out, self.clean)


@contextlib.contextmanager
def case(keep: str, count: int, disk: Powered) -> Iterator[Case]:
    """A run at a level, yet to be computed on an empty disk; of few segments for few cuts."""
    disk.empty()
    source = Path(_laid(keep, SEGMENTS if count >= 20 else FEW).name)
    with tempfile.TemporaryDirectory(prefix="lca-told-", dir=MEMORY) as place:
        yield Case(Path(place), source, disk.place / "new" / "run.lca", keep)


def succeed(session: Session, driver: Driver) -> None:
    """Wait for the end of a process that is to succeed."""
    assert session.finished(session.start(driver)) == 0, driver.said


# --- flushed --------------------------------------------------------------------------------------


@fault("R19a", "power cuts of a run, and of one that goes on", ci=2, full=50)
def runs_cut(count: int, _: Path) -> str:
    if reason := why_not():
        return NOT_DONE + reason
    with powered(19) as disk:
        return cut_runs(disk, count)


def cut_runs(disk: Powered, count: int) -> str:
    """Cut the power of runs so often; nothing that was said to be committed is lost."""
    trials, levels, most, committed = list[str](), drawn_levels(LEVELS), dict[str, int](), 0
    while disk.total < count:
        trials.append(keep := next(levels))
        cluster = LOCAL if len(trials) % 5 == 4 else INLINE
        with case(keep, count, disk) as run:
            if keep not in most:
                most[keep] = _changes(disk, run, run.run, *INLINE)

            def work(session: Session, run: Case = run, cluster: object = cluster) -> None:
                run.nothing_lost()
                succeed(session, run.run(*cluster))

            while disk.total < count and disk.is_interrupted(most[keep], work):
                pass
            with disk.mounted() as session:
                work(session)
            disk.cut()
            committed += len(run.told)
            with disk.mounted() as session:
                run.is_whole(session)
    return (
        f"{disk.told} of {len(trials)} runs ({by_level(trials)}), {committed} spans said to be "
        "committed and none lost, bytes equal"
    )


def _changes(disk: Powered, run: Case, start: Callable[..., Driver], *options: object) -> int:
    """Return how often something that nothing disturbs changes the disk; which stays as it is."""
    changes = disk.changes(lambda session: succeed(session, start(*options)))
    run.forget()
    return changes


@fault("R19b", "power cuts of a repair", ci=1, full=20)
def repairs_cut(count: int, _: Path) -> str:
    """Some chunks of a finished run are damaged; what was whole stays so."""
    if reason := why_not():
        return NOT_DONE + reason
    trials, levels, most, repaired = list[str](), drawn_levels(LEVELS), dict[str, int](), 0
    with powered(20) as disk:
        while disk.total < count:
            trials.append(keep := next(levels))
            with case(keep, count, disk) as run:
                damaged = _damage_some(disk, run)
                if keep not in most:
                    most[keep] = _changes(disk, run, run.repair)

                def work(session: Session, run: Case = run, damaged: set[str] = damaged) -> None:
                    _nothing_else_damaged(run, damaged)
                    succeed(session, run.repair())

                while disk.total < count and disk.is_interrupted(most[keep], work):
                    pass
                with disk.mounted() as session:
                    work(session)
                    _nothing_else_damaged(run, set())
                    repaired += len(run.told)
                    succeed(session, run.run(*INLINE))
                disk.cut()
                with disk.mounted() as session:
                    run.is_whole(session)
    return (
        f"{disk.told} of {len(trials)} repairs ({by_level(trials)}), {repaired} spans said to be "
        "computed again and none lost, bytes equal"
    )


def _damage_some(disk: Powered, run: Case) -> set[str]:
    """Lay the clean run out with some damaged chunks; the paths that `lca verify` names."""
    with disk.mounted():
        shutil.copytree(run.clean, run.out)
        ways = disk.chance.sample([*DAMAGES], 3)
        for how, array in zip(ways, ARRAYS[run.keep], strict=False):
            rows = sorted((run.out / "data.zarr" / "train" / array / "c").iterdir())
            row = disk.chance.choice(rows)
            DAMAGES[how](disk.chance.choice([*filter(Path.is_file, sorted(row.rglob("*")))]))
        damaged = {damage.path for damage in _damages(run)}
    assert damaged
    disk.disk.end()
    return damaged


def _damages(run: Case) -> list[Damage]:
    return [found for found in results.verify(run.out) if isinstance(found, Damage)]


def _nothing_else_damaged(run: Case, damaged: set[str]) -> None:
    """Assert that only these files are damaged, and that what was repaired is whole."""
    writer, damages = RunWriter.open(run.out), _damages(run)
    assert {damage.path for damage in damages} <= damaged, damages
    again = writer.spans_of(damages)
    lost = [
        (loss, span)
        for loss, span in run.told
        if span in [*again.get(loss, []), *writer.pending(loss)]
    ]
    assert lost == [], f"lost: {lost}"


# --- not flushed ----------------------------------------------------------------------------------


@fault("R19e", "power cuts of a run with `--durability none`", ci=1, full=50)
def unflushed_runs_cut(count: int, _: Path) -> str:
    if reason := why_not():
        return NOT_DONE + reason
    with powered(23, writes_back=WRITES_BACK) as disk:
        return _cut_unflushed(disk, count, lambda run: None)


@fault("R19f", "power cuts of a repair with `--durability none`", ci=1, full=20)
def unflushed_repairs_cut(count: int, _: Path) -> str:
    if reason := why_not():
        return NOT_DONE + reason
    with powered(24, writes_back=WRITES_BACK) as disk:
        return _cut_unflushed(disk, count, functools.partial(_damage_some, disk))


def _cut_unflushed(disk: Powered, count: int, prepare_run: Callable[[Case], object]) -> str:
    """Cut the power so often of runs that flush nothing: what is lost is absent or named, and what
    can be read is right.
    """
    trials, levels, most, left = list[str](), drawn_levels(LEVELS), dict[str, int](), Counter[str]()
    while disk.total < count:
        trials.append(keep := next(levels))
        with case(keep, count, disk) as run:
            prepare_run(run)
            work = functools.partial(_go_on_unflushed, run)
            if keep not in most:
                most[keep] = disk.changes(work)
            while disk.total < count and disk.is_interrupted(most[keep], work):
                with disk.mounted():
                    left += _nothing_wrong(run)
            with disk.mounted() as session:
                work(session)
            disk.cut()
            with disk.mounted() as session:
                work(session)
                whole(run.out, run.clean)
    return (
        f"{disk.told} of {len(trials)} runs ({by_level(trials)}); afterwards {left['whole']} spans "
        f"whole, {left['absent']} absent, {left['damaged']} named as damaged, and "
        f"{left['no record']} times no record of the run; repaired or begun anew, bytes equal"
    )


def _go_on_unflushed(run: Case, session: Session) -> None:
    """Repair and run to the end, without flushing; begin anew where the record is lost."""
    repairing = session.start(run.repair(*UNFLUSHED))
    if session.finished(repairing) != 0:
        named(repairing.said, run.out)
        succeed(session, run.removal())
    succeed(session, run.run(*INLINE, *UNFLUSHED))


def _nothing_wrong(run: Case) -> Counter[str]:
    """Assert that what is committed is right, or that verifying and reading it say that it is
    damaged; count the spans that are whole, damaged and absent.
    """
    try:
        writer = RunWriter.open(run.out)
    except LCAError as error:
        named(str(error), run.out)
        return Counter({"no record": 1})
    left, damaged = Counter[str](), writer.spans_of(_damages(run))
    for loss in writer.manifest.losses:
        pending = writer.pending(loss)
        for span in range(writer.manifest.of(loss).spans):
            if span in pending:
                left["absent"] += 1
                continue
            _reads_right(run, loss, writer.manifest.of(loss).rows(span))
            if span in damaged.get(loss, []):
                left["damaged"] += 1
                continue
            left["whole"] += 1
            for file in writer.commits(loss).load(span)["files"]:
                assert (run.out / file).read_bytes() == (run.clean / file).read_bytes(), file
    return left


def _reads_right(run: Case, loss: str, rows: slice) -> None:
    """Assert that sums of tensors are those of the clean run, or an error."""
    right = open_run(run.clean)[loss].tensors["allocated"].isel(step=rows).values
    with contextlib.suppress(LCAError):
        read = open_run(run.out)[loss].tensors["allocated"].isel(step=rows).values
        assert np.array_equal(read, right)
