"""A training that is resumed or killed goes on with the series; no iterate is overwritten."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lca_posthoc import Recorder
from lca_posthoc.checkpoints.optimizer_steps import moments_path
from lca_posthoc.errors import InputError, ResourceError
from lca_posthoc.recording import writer
from tests.helpers.numbered_training import become, network

from ..helpers.recorded_series import HERE, names, saved, steps_in

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The thread writes nothing before it is set."""
    opened, write = threading.Event(), writer.Writer._write
    monkeypatch.setattr(writer.Writer, "_write", lambda *given: (opened.wait(), write(*given))[1])
    yield opened
    opened.set()


def test_training_that_is_resumed_goes_on_with_the_series(tmp_path: Path) -> None:
    model = network()
    # from the end, and from a checkpoint before it, to the same weights
    for first, last in ((0, 5), (5, 9), (3, 12)):
        with Recorder(tmp_path, model) as recorder:
            for step in range(first, last):
                become(model, step)
                recorder.save(step)
        if first == 0:
            before = {path: path.stat() for path in names(tmp_path)}
    assert steps_in(tmp_path) == list(range(12))
    assert all(
        (path.stat().st_ino, path.stat().st_mtime_ns) == (then.st_ino, then.st_mtime_ns)
        for path, then in before.items()
    )


@pytest.mark.parametrize(
    ("step", "value", "message"),
    [
        (
            2,
            7,
            r"step_00000002.safetensors holds other weights than those to save, and .* extends "
            r"to step 4",
        ),
        (4, 7, r"step_00000004.safetensors holds other weights"),
        (
            1,
            1,
            r"extends to step 4 and has no step_00000001.safetensors. A series is one training run "
            r"with its own steps",
        ),
    ],
)
def test_an_iterate_that_is_there_is_never_overwritten(
    tmp_path: Path, step: int, value: int, message: str
) -> None:
    """Other weights of a step that is there, or a step before the last one that is not."""
    model = network()
    with Recorder(tmp_path, model) as recorder:
        for each in (0, 2, 4):
            become(model, each)
            recorder.save(each)
    before = {path: path.read_bytes() for path in names(tmp_path)}
    become(model, value)
    with pytest.raises(InputError, match=message):
        saved(tmp_path, model, step)
    assert {path: path.read_bytes() for path in names(tmp_path)} == before


def test_a_file_that_was_damaged_is_said_to_be(tmp_path: Path) -> None:
    model = network()
    for path in saved(tmp_path, model, 0, 1)[1:]:
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        InputError,
        match=r"step_00000001.safetensors is damaged .* Remove it and "
        r"the files after it",
    ):
        saved(tmp_path, model, 1)


def test_a_file_that_was_taken_away_stops_nothing(tmp_path: Path, gate: threading.Event) -> None:
    model = network()
    gate.set()
    with Recorder(tmp_path, model) as recorder:
        recorder.save(0)
        recorder.flush()
        recorder._series._writer._unflushed.append(str(tmp_path / "taken"))  # type: ignore[union-attr]
        recorder.save(1)
    assert steps_in(tmp_path) == [0, 1]


def test_a_warning_that_is_an_error_loses_nothing_that_is_saved_afterwards(tmp_path: Path) -> None:
    model = network()
    saved(tmp_path, model, 0)
    recorder = Recorder(tmp_path, model)
    with pytest.raises(UserWarning, match="ends at step 0"):
        recorder.save(5)
    recorder.save(6)
    del recorder
    assert steps_in(tmp_path) == [0, 6]


def test_a_gap_between_the_series_and_its_continuation_is_said(tmp_path: Path) -> None:
    model = network()
    saved(tmp_path, model, 0, 1)
    with pytest.warns(
        UserWarning,
        match="ends at step 1 and continues at step 5: the 3 iterates between are missing",
    ):
        saved(tmp_path, model, 5)
    with pytest.warns(UserWarning, match="at step 12: the 3 iterates between"):
        saved(tmp_path, model, 12, every=2, on_full="stop")
    saved(tmp_path, model, 13)


def test_two_recorders_of_one_directory_are_one_too_many(tmp_path: Path, linear: nn.Module) -> None:
    with Recorder(tmp_path, linear) as recorder:
        recorder.save(0)
        with pytest.raises(ResourceError, match="another recorder writes into"):
            Recorder(tmp_path, linear).save(1)
    saved(tmp_path, linear, 1)


@pytest.mark.moment
@pytest.mark.parametrize("moments", [False, True], ids=["iterates", "moments"])
def test_a_training_that_is_killed_leaves_whole_files_without_a_hole(
    tmp_path: Path, moments: bool
) -> None:
    """kill -9 at random moments, again and again in one directory; the full number:
    `tests/benchmarks/recorder.py --kills`.
    """
    assert kill_again_and_again(tmp_path, 12, moments) >= 12


def kill_again_and_again(directory: Path, kills: int, moments: bool = False) -> int:
    """Kill trainings that go on with one series; returns how many iterates there are in the end."""
    chance, found = random.Random(7), 0
    options = ["moments"] if moments else []
    trainings = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.numbered_training", directory, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE,
    )
    assert trainings.stdin is not None
    assert trainings.stdout is not None
    with trainings:
        for _ in range(kills):
            print(found, file=trainings.stdin, flush=True)
            training = int(trainings.stdout.readline())
            wanted = found + chance.randint(1, 40)
            while not (directory / f"step_{wanted:08d}.safetensors").exists():
                time.sleep(chance.random() / 1000)
            os.kill(training, signal.SIGKILL)
            assert trainings.stdout.readline() == "ended\n"
            assert len([*directory.rglob(".*.tmp")]) <= 1
            steps = [
                int(path.stem.removeprefix("step_"))
                for path in sorted(directory.glob("step_*.safetensors"))
            ]
            assert steps == list(range(len(steps)))
            for step in range(found, len(steps)):
                tensors = load_file(directory / f"step_{step:08d}.safetensors")
                assert all((each == step).all() for each in tensors.values())
                if moments:
                    beside = load_file(moments_path(directory, step))
                    assert len(beside) == 2 * 5
                    assert all((each == step).all() for each in beside.values())
            found = len(steps)
    return found
