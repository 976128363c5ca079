"""The next checkpoint is read while a segment is computed: it changes no number and no error, takes
no more memory than it may, and its thread ends with the span.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import lca_posthoc
from lca_posthoc.checkpoints import reading
from lca_posthoc.checkpoints.trajectory import Checkpoint, open_trajectory
from lca_posthoc.errors import LCAWarning, SpanError
from lca_posthoc.numerics import allocation
from lca_posthoc.numerics.objective import Objective, to_device
from lca_posthoc.numerics.schema import KEEP
from lca_posthoc.replay.requests import StoredPoints
from lca_posthoc.replay.worker import read_ahead
from lca_posthoc.replay.worker.read_ahead import PointsAhead
from tests.helpers.cli import STEPS, contents, iterates, says, step_file

from ..helpers.late_device import install
from ..helpers.wrong_input import Place, spans_of

LONG = 60.0  # seconds after which a thread is taken to wait for ever, on a busy machine too
Read = Callable[[Checkpoint, dict[str, str]], dict[str, Tensor]]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lca-read-ahead")]


@pytest.fixture(autouse=True)
def _no_reader_stays() -> Iterator[None]:
    yield
    assert readers() == []


def replay(place: Place, **options: Any) -> None:
    """Replay all segments as one span, in this process, without path bands."""
    lca_posthoc.run(
        place.checkpoints,
        place.task,
        out=place.out,
        cluster="inline",
        span=8,
        path_band="off",
        **options,
    )


@pytest.fixture
def points(place: Place) -> StoredPoints:
    checkpoints = open_trajectory(str(place.checkpoints)).checkpoints
    return StoredPoints(
        root=str(place.checkpoints),
        names={name: name for name in iterates()[0]},
        checkpoints=dict(enumerate(checkpoints)),
    )


def an_objective(recalibration: object = None, device: str = "cpu") -> Objective:
    return cast(
        "Objective",
        SimpleNamespace(
            device=torch.device(device),
            dtype=torch.float32,
            recalibration=recalibration,
            parameter_bytes=1000,
        ),
    )


@pytest.mark.parametrize("rows", [slice(0, 6), slice(5, 6), slice(2, 4)])
@pytest.mark.parametrize("ahead", [True, False])
def test_every_checkpoint_comes_in_turn_whether_it_was_read_ahead_or_not(
    points: StoredPoints, rows: slice, ahead: bool
) -> None:
    with PointsAhead(points, rows, an_objective()) as walk:
        for index in range(rows.start, rows.stop + 1):
            if ahead:
                walk.begin_next()
                walk.begin_next()  # it has begun
            step, point = next(walk)
            assert step == STEPS[index]
            assert point.keys() == iterates()[index].keys()
            assert all(torch.equal(point[name], iterates()[index][name]) for name in point)
        walk.begin_next()
        assert list(walk) == []


def test_checkpoints_are_on_their_way_to_a_gpu_before_they_are_asked_for(
    points: StoredPoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = install(monkeypatch)
    to_device.cache_clear()
    with PointsAhead(points, slice(0, 3), an_objective(device="cuda")) as walk:
        for index in range(4):
            walk.begin_next()
            _, point = next(walk)
            assert all(torch.equal(point[name], iterates()[index][name]) for name in point)
    to_device.cache_clear()
    assert len(late.streams) == len(late.pinned) == 4 * len(iterates()[0])


def test_the_model_is_evaluated_by_the_thread_that_asks(points: StoredPoints) -> None:
    threads = list[threading.Thread]()

    class Recalibration:
        def at(self, point: dict[str, Tensor]) -> dict[str, Tensor]:
            threads.append(threading.current_thread())
            return point

    with PointsAhead(points, slice(0, 2), an_objective(Recalibration())) as walk:
        walk.begin_next()
        list(walk)
    assert threads == [threading.current_thread()] * 3


def _read_as(monkeypatch: pytest.MonkeyPatch, read: Callable[..., dict[str, Tensor]]) -> Read:
    original = read_ahead.read_checkpoint
    monkeypatch.setattr(read_ahead, "read_checkpoint", read)
    return cast("Read", original)


@pytest.mark.parametrize("keep", KEEP)
def test_a_segment_is_computed_while_the_checkpoint_after_it_is_read(
    place: Place, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    """Each segment waits until that read has begun; if it waited for the segment, neither would
    end.
    """
    changed, begun, segments = threading.Condition(), list[int](), iter(range(len(STEPS)))

    def read(checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, Tensor]:
        with changed:
            begun.append(checkpoint.step)
            changed.notify()
        return original(checkpoint, names)

    def allocate(*arguments: Any, **options: Any) -> Any:
        wanted = min(next(segments) + 3, len(STEPS))
        with changed:
            assert changed.wait_for(lambda: len(begun) >= wanted, LONG)
        return computed(*arguments, **options)

    original, computed = _read_as(monkeypatch, read), allocation.allocate
    monkeypatch.setattr(allocation, "allocate", allocate)
    replay(place, keep=keep)
    assert tuple(begun) == STEPS


@pytest.mark.parametrize(
    ("keep", "options"),
    [
        *((keep, {}) for keep in KEEP),
        ("units", {"rule": "gauss-3"}),
        ("units", {"tolerance": 1e-7}),
        ("parameters", {"rule": "midpoint"}),
        ("parameters", {"tolerance": 1e-7}),
    ],
    ids=str,
)
def test_three_checkpoints_are_in_memory_at_most(
    place: Place, monkeypatch: pytest.MonkeyPatch, keep: str, options: dict[str, Any]
) -> None:
    tensors_of, alive = dict[int, list[weakref.ref[Tensor]]](), list[list[int]]()

    def begins(points: StoredPoints, index: int) -> Checkpoint:
        alive.append(
            [
                step
                for step, tensors in tensors_of.items()
                if any(tensor() is not None for tensor in tensors)
            ]
        )
        return located(points, index)

    def read(checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, Tensor]:
        stored = original(checkpoint, names)
        tensors_of[checkpoint.step] = [weakref.ref(tensor) for tensor in stored.values()]
        return stored

    original, located = _read_as(monkeypatch, read), read_ahead.checkpoint_at
    monkeypatch.setattr(read_ahead, "checkpoint_at", begins)
    replay(place, keep=keep, **options)
    # those before it, when each begins to be read
    assert alive == [list(STEPS[max(0, index - 2) : index]) for index in range(len(STEPS))]


AHEAD = 50  # a step in the middle of a span


def _cut_once_it_is_open(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    original = reading.tensor_places

    def places(path: Path, *arguments: Any) -> Any:
        found = original(path, *arguments)
        if path == step_file(place.checkpoints, AHEAD) and readers():
            os.truncate(path, path.stat().st_size - 8)
        return found

    monkeypatch.setattr(reading, "tensor_places", places)


def _remove_before_it_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, Tensor]:
        if checkpoint.step == AHEAD:
            step_file(place.checkpoints, AHEAD).unlink()
        return original(checkpoint, names)

    original = _read_as(monkeypatch, read)


@pytest.mark.parametrize(
    ("spoil", "words", "keep"),
    [
        (_cut_once_it_is_open, "it ends 8 bytes early", "tensors"),
        (_remove_before_it_is_read, "No such file", "parameters"),
    ],
)
def test_what_goes_wrong_while_it_is_read_ahead_fails_its_span_and_restored_it_completes(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Place, pytest.MonkeyPatch], None],
    words: str,
    keep: str,
) -> None:
    path = step_file(place.checkpoints, AHEAD)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        spoil(place, patch)
        with pytest.warns(LCAWarning), pytest.raises(SpanError) as failure:
            replay(place, keep=keep)
    says(str(failure.value), "1 span failed", "Steps 0 to 60", str(path), "(step 50)", words)
    assert spans_of(place) == (0, 1, False)
    path.write_bytes(before)
    replay(place, keep=keep)
    assert spans_of(place) == (1, 1, True)


def test_an_interrupt_while_a_checkpoint_is_read_ends_its_thread(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, leaving = threading.Event(), threading.Event()

    def read(checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, Tensor]:
        if checkpoint.step == STEPS[2]:
            begun.set()
            assert leaving.wait(LONG)
        return original(checkpoint, names)

    def allocate(*arguments: Any, **options: Any) -> Any:
        assert begun.wait(LONG)
        raise KeyboardInterrupt

    def leave(walk: PointsAhead, *error: object) -> None:
        assert len(readers()) == 1
        leaving.set()
        left(walk, *error)

    original, left = _read_as(monkeypatch, read), PointsAhead.__exit__
    with monkeypatch.context() as patch:
        patch.setattr(PointsAhead, "__exit__", leave)
        patch.setattr(allocation, "allocate", allocate)
        with pytest.raises(KeyboardInterrupt):
            replay(place)
    assert readers() == []
    replay(place)
    interrupted = contents(place.out / "data.zarr")
    place.out = place.out.with_name("whole.lca")
    replay(place)
    assert contents(place.out / "data.zarr") == interrupted
