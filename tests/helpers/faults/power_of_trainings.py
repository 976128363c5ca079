"""Power cuts of trainings that record, and of replays that follow them and remove what they are done
with; on a file system that loses what was not flushed.
"""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lca_posthoc.checkpoints.recorded import files_of
from tests.helpers import followed_training, telling_lca
from tests.helpers.power_cut.mount import why_not
from tests.helpers.power_cut.powered import Powered, Session, powered

from . import NOT_DONE, clean_runs, fault
from .power_of_runs import INLINE, Case, succeed, windows_of_several_spans
from .processes import MEMORY, Driver, named

STEPS, FEW = 40, 16  # of a training, and where there is little time
MOST_TRIES = 100  # of a replay that lacks iterates
REMOVE = "import os, sys\nfor path in sys.argv[1:]:\n    os.unlink(path)\n"
FOLLOWS = ("--causes", "--signal", "train", "--follow", "--consume", *INLINE)


@dataclass(frozen=True)
class Training:
    """A training that records on a disk which is interrupted, and keeps its own state elsewhere.

    Attributes:
        place: of its state, and of logs.
        directory: of the iterates.
        steps: in all.
        bound: on what waits for a replay, or "none".
    """

    place: Path
    directory: Path
    steps: int
    bound: str = "none"

    @property
    def _state(self) -> Path:
        return self.place / f"{self.directory.name}.pt"

    @property
    def flushed(self) -> int:
        """The last step whose iterate was said to be on the disk; −1 where none was."""
        return int(torch.load(self._state)["step"]) if self._state.exists() else -1

    def forget(self) -> None:
        """Begin anew, from no state."""
        self._state.unlink()

    def start(self) -> Driver:
        """Train on, from the last state."""
        script = [followed_training.__file__, self.place, self.steps, self.bound, self.directory]
        return Driver([*map(str, script)], self.place, {}, False)

    def obey(self, session: Session, said: str) -> None:
        """Remove the iterate that a recorder's refusal names and those after it, as it says."""
        last = said.splitlines()[-1]
        assert "InputError: " in last, said
        assert re.search("[Rr]emove (it and )?the files after it", last), said
        first = int(re.findall(r"step_(\d+)\.safetensors", last)[0])
        assert first > self.flushed, last
        paths = [
            path
            for step in range(first, self.steps + 1)
            for path in files_of(self.directory, step)
            if path.exists()
        ]
        script = self.place / "remove.py"
        script.write_text(REMOVE)
        succeed(session, Driver([str(script), *map(str, paths)], self.place, {}, False))

    def left(self, reference: dict[str, bytes]) -> Counter[str]:
        """Assert that every file that was flushed is there, as an undisturbed training has it;
        count what is left of those after it.
        """
        left = Counter[str]()
        for step in range(self.steps + 1):
            for path in files_of(self.directory, step):
                name = str(path.relative_to(self.directory))
                if name not in reference:  # the first iterate has no moments
                    continue
                is_right = path.exists() and path.read_bytes() == reference[name]
                if step <= self.flushed:
                    state = "damaged" if path.exists() else "lost"
                    assert is_right, f"{name} was flushed, and is {state}"
                elif path.exists():
                    damage = "other" if _is_readable(path) else "unreadable"
                    left["whole" if is_right else damage] += 1
        return left

    def is_whole(self, reference: dict[str, bytes]) -> None:
        """Assert that all is there, as an undisturbed training has it."""
        recorded = _iterates(self.directory)
        lost = [name for name in reference if recorded.get(name) != reference[name]]
        assert lost == [], f"lost or damaged: {lost}"
        assert recorded.keys() == reference.keys()


def _is_readable(path: Path) -> bool:
    try:
        load_file(path)
    except SafetensorError:
        return False
    return True


def _iterates(directory: Path) -> dict[str, bytes]:
    """The files of iterates and of their moments, by their paths."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("step_*.safetensors")
    }


@functools.cache
def _recorded(steps: int) -> tempfile.TemporaryDirectory[str]:
    """What a training records that nothing disturbs."""
    made = tempfile.TemporaryDirectory(prefix="lca-recorded-", dir=MEMORY)
    followed_training.train(Path(made.name), steps)
    return made


@fault("R19c", "power cuts of a training that records", ci=2, full=20)
def recorders_cut(count: int, _: Path) -> str:
    if reason := why_not():
        return NOT_DONE + reason
    with powered(21) as disk:
        return cut_recorders(disk, count)


def cut_recorders(disk: Powered, count: int) -> str:
    """Cut the power of trainings so often; no iterate that was said to be on the disk is lost."""
    left, refusals, trainings, most = Counter[str](), [], 0, 0
    steps = STEPS if count >= 20 else FEW
    reference = _iterates(Path(_recorded(steps).name) / "checkpoints")
    while disk.total < count:
        disk.empty()
        trainings += 1
        with tempfile.TemporaryDirectory(prefix="lca-told-", dir=MEMORY) as place:
            training = Training(Path(place), disk.place / "deep" / "checkpoints", steps)

            def work(session: Session, training: Training = training) -> None:
                while session.finished(driver := session.start(training.start())) != 0:
                    refusals.append(driver.said)
                    training.obey(session, driver.said)

            if not most:
                most = disk.changes(work)
                training.forget()
            while disk.total < count and disk.is_interrupted(most, work):
                with disk.mounted():
                    left += training.left(reference)
            with disk.mounted() as session:
                work(session)
            disk.cut()
            with disk.mounted():
                training.is_whole(reference)
    return (
        f"{disk.told} of {trainings} trainings: every file that was flushed is there; of those "
        f"after it {left['whole']} are, {left['unreadable']} cannot be read, {left['other']} hold "
        f"other bytes; {len(refusals)} refusals named them, and the same bytes without them"
    )


# --- replays that follow --------------------------------------------------------------------------


@functools.cache
def _replayed(steps: int) -> tempfile.TemporaryDirectory[str]:
    """A plain run over a series that was recorded without a replay beside it."""
    made = tempfile.TemporaryDirectory(prefix="lca-replayed-", dir=MEMORY)
    place = Path(made.name)
    shutil.copytree(Path(_recorded(steps).name) / "checkpoints", place / "checkpoints")
    clean_runs.write_small_task(place)
    with windows_of_several_spans():
        clean_runs.clean_run(
            place, place / "clean.lca", span=telling_lca.SPAN, causes=True, signal="train"
        )
    return made


@fault(
    "R19d", "power cuts of a replay that follows and removes, and of its training", ci=1, full=20
)
def followers_cut(count: int, _: Path) -> str:
    """Both stop at once; what was computed from iterates that are gone is never lost."""
    if reason := why_not():
        return NOT_DONE + reason
    steps = STEPS if count >= 20 else FEW
    refusals, trainings, most = Counter[str](), 0, 0
    with powered(22) as disk:
        while disk.total < count:
            disk.empty()
            trainings += 1
            with tempfile.TemporaryDirectory(prefix="lca-told-", dir=MEMORY) as place:
                checkpoints = disk.place / "checkpoints"
                training = Training(Path(place), checkpoints, steps, "8")
                run = Case(Path(place), Path(_replayed(steps).name), disk.place / "run.lca")
                work = functools.partial(_train_and_follow, training, run, refusals)
                if not most:
                    most = disk.changes(work)
                    training.forget()
                    run.forget()
                while disk.total < count and disk.is_interrupted(most, work):
                    pass
                with disk.mounted() as session:
                    work(session)
                disk.cut()
                with disk.mounted() as session:
                    succeed(session, run.run(*FOLLOWS, checkpoints=checkpoints))
                    run.nothing_lost()
                    clean_runs.same_bytes(run.out, run.clean)
                    left = sorted(path.name for path in checkpoints.glob("step_*"))
                    last = [f"step_{step:08d}.safetensors" for step in (steps - 1, steps)]
                    assert left == last, left
    return (
        f"{disk.told} of {trainings} trainings with their replays; {refusals['training']} times the "
        f"recorder named what was to be removed, {refusals['replay']} times the replay what it "
        "lacked until it was recorded again; the bytes of a plain run"
    )


def _train_and_follow(
    training: Training, run: Case, refusals: Counter[str], session: Session
) -> None:
    """Train and replay to the end of both, and do what their refusals say."""
    run.nothing_lost()
    tries = 0
    start = functools.partial(run.run, *FOLLOWS, checkpoints=training.directory)
    trained, replay = session.start(training.start()), session.start(start())
    while trained.returncode != 0 or replay.returncode != 0:
        if trained.returncode:
            refusals["training"] += 1
            training.obey(session, trained.said)
            trained = session.start(training.start())
        if replay.returncode:
            refusals["replay"] += 1
            assert replay.returncode == 2, replay.said
            named(replay.said, training.directory)  # until the training has recorded it again
            assert (tries := tries + 1) < MOST_TRIES, replay.said
            replay = session.start(start())
        session.wait()
