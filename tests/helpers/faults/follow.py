"""A training and the replay that follows it, either of which is killed; and a disk that is full."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from lca_posthoc import results
from tests.helpers import followed_training

from . import clean_runs, fault
from .processes import MEMORY, Driver, drive, undamaged

PER_TRAINING = 10  # kills
STEPS, FEW = 40, 16  # of a training, and where there is little time
PARTS = ("--causes", "--signal", "train")
FOLLOWS = (*PARTS, "--follow", "--consume", "--cluster", "inline")


def _train(place: Path, steps: int, at_most: object) -> Driver:
    arguments = [followed_training.__file__, str(place), str(steps), str(at_most)]
    return Driver(arguments, place, {}, False)


def _clean(place: Path, steps: int) -> Path:
    """A plain run over the whole series, recorded without a replay beside it."""
    clean_runs.write_small_task(place)
    followed_training.train(place, steps, directory="checkpoints")
    out = clean_runs.clean_run(place, place / "clean.lca", causes=True, signal="train")
    shutil.rmtree(place / "checkpoints")
    (place / "checkpoints.pt").unlink()
    return out


@fault("R22", "kill -9 of a replay that follows, and of its training", ci=2, full=40)
def follower_and_recorder_killed(count: int, _: Path) -> str:
    """Each as often as the other, at random moments; the bound in iterates, then in bytes."""
    steps = STEPS if count >= 20 else FEW
    chance, kills, rounds = random.Random(19), {"replay": 0, "training": 0}, 0
    with tempfile.TemporaryDirectory(prefix="lca-follow-", dir=MEMORY) as directory:
        clean = _clean(Path(directory), steps)
        while sum(kills.values()) < count:
            place, bound = Path(directory) / f"round-{rounds}", ("8", "60kB")[rounds % 2]
            place.mkdir()
            clean_runs.write_small_task(place)
            out, rounds = place / "run.lca", rounds + 1
            training, replay = _train(place, steps, bound), drive(place, out, *FOLLOWS)
            before = sum(kills.values())
            while sum(kills.values()) < min(count, before + PER_TRAINING):
                victim = min(kills, key=lambda name: kills[name])
                if replay.wait(chance.uniform(0.0, 1.5)):
                    break
                if victim == "training" and training.returncode is None:
                    training.kill()
                    training = _train(place, steps, bound)
                elif victim == "replay":
                    replay.kill()
                    undamaged(out)
                    replay = drive(place, out, *FOLLOWS)
                else:
                    continue
                kills[victim] += 1
            assert training.finished() == 0, training.said
            assert replay.finished() == 0, replay.said
            assert not (place / "above").exists(), (place / "above").read_text()
            clean_runs.same_bytes(out, clean)
            assert list(results.verify(out)) == []
            left = sorted(path.name for path in (place / "checkpoints").glob("step_*"))
            assert left == [f"step_{step:08d}.safetensors" for step in (steps - 1, steps)], left
            shutil.rmtree(place)
    return (
        f"{kills['replay']} of the replay, {kills['training']} of the training, in {rounds} "
        "trainings: the bytes of a plain run, and never above the bound"
    )
