"""A file holds the iterate of its step, whole and in order, whatever training does meanwhile."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lca_posthoc import Recorder, open_trajectory
from lca_posthoc.checkpoints.trajectory import normalise, read_checkpoint
from lca_posthoc.errors import InputError, LCAError, ResourceError
from lca_posthoc.numerics.objective import tensor_table
from lca_posthoc.recording import writer
from tests.helpers.numbered_training import become, network

from ..helpers.recorded_series import HERE, MODELS, Odd, Tied, names, saved, steps_in

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The thread writes nothing before it is set."""
    opened, write = threading.Event(), writer.Writer._write
    monkeypatch.setattr(writer.Writer, "_write", lambda *given: (opened.wait(), write(*given))[1])
    yield opened
    opened.set()


# --- what a file holds ----------------------------------------------------------------------------


def test_files_are_named_by_their_step_and_hold_it_in_their_metadata(
    tmp_path: Path, linear: nn.Module
) -> None:
    paths = saved(tmp_path / "new" / "ck", linear, 0, 7, 123_456_789)
    assert [path.name for path in paths] == [
        "step_00000000.safetensors",
        "step_00000007.safetensors",
        "step_123456789.safetensors",
    ]
    for path, step in zip(paths, ("0", "7", "123456789"), strict=True):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "step": step}


def test_parameters_and_persistent_buffers_are_saved_whole(
    tmp_path: Path, model: nn.Module
) -> None:
    (path,) = saved(tmp_path, model, 0)
    stored = load_file(path)
    unique = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    expected = {
        normalise(name): each for name, each in model.state_dict().items() if name in unique
    }
    assert set(stored) == set(expected)
    for name, tensor in stored.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        assert tensor.tolist() == expected[name].tolist()


def test_a_file_is_the_one_safetensors_would_write(tmp_path: Path, model: nn.Module) -> None:
    (path,) = saved(tmp_path / "ours", model, 3)
    tensors = {name: each.contiguous() for name, each in load_file(path).items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt", "step": "3"})
    assert path.stat().st_size == (tmp_path / "theirs").stat().st_size
    with safe_open(path, "pt") as ours, safe_open(tmp_path / "theirs", "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
        for name in tensors:
            assert ours.get_slice(name).get_dtype() == theirs.get_slice(name).get_dtype()
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()


def test_a_buffer_that_is_not_persistent_is_not_saved(tmp_path: Path) -> None:
    assert "scratch" not in load_file(saved(tmp_path, Odd(), 0)[0])


def test_a_tied_tensor_is_saved_once_under_its_first_name(tmp_path: Path) -> None:
    assert set(load_file(saved(tmp_path, Tied(), 0)[0])) == {"emb.weight"}


def test_saving_leaves_the_model_and_its_gradients_alone(tmp_path: Path, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {
        name: (id(each), each.data_ptr(), each.stride(), each.requires_grad, each._version)
        for name, each in model.named_parameters()
    }
    saved(tmp_path, model, 0)
    assert {
        name: (id(each), each.data_ptr(), each.stride(), each.requires_grad, each._version)
        for name, each in model.named_parameters()
    } == before
    assert all(
        torch.equal(each.grad, torch.ones_like(each))
        for each in model.parameters()
        if each.grad is not None
    )


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("types", "no tensors", "weight norm")]
)
def test_what_was_saved_is_read_back_under_the_models_own_names(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    expected = []
    with Recorder(tmp_path, model) as recorder:
        for step in range(3):
            recorder.save(step)
            expected.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            move(model)
    trajectory = open_trajectory(tmp_path)
    table = tensor_table(model, "running")
    sources = trajectory.match(table)
    assert trajectory.steps == [0, 1, 2]
    for checkpoint, then in zip(trajectory.checkpoints, expected, strict=True):
        read = read_checkpoint(checkpoint, sources)
        assert list(read) == [spec.name for spec in table]
        for key, tensor in read.items():
            assert torch.equal(tensor, then[key])
            assert tensor.dtype == then[key].dtype


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


@pytest.mark.parametrize(
    ("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)]
)
def test_a_file_gets_the_mode_the_umask_asks_for(
    tmp_path: Path, linear: nn.Module, umask: Callable[[int], None], mask: int, mode: int
) -> None:
    umask(mask)
    assert saved(tmp_path / "ck", linear, 0)[0].stat().st_mode & 0o777 == mode


# --- while training goes on -----------------------------------------------------------------------


def test_an_iterate_is_the_model_at_its_step_however_late_it_is_written(
    tmp_path: Path, gate: threading.Event
) -> None:
    model = network()
    with Recorder(tmp_path, model) as recorder:
        for step in range(writer.FEWEST):
            become(model, step)
            recorder.save(step)
        become(model, 99)
        assert names(tmp_path) == []
        gate.set()
    for step, path in enumerate(names(tmp_path)):
        assert {float(each.double().min()) for each in load_file(path).values()} == {step}
        assert {float(each.double().max()) for each in load_file(path).values()} == {step}


def test_a_disk_slower_than_training_slows_it_down_and_nothing_is_left_out(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[writer.Staging] = []
    build = writer.Staging

    def counted(layout: Any) -> writer.Staging:
        made.append(build(layout))
        if len(made) == writer.FEWEST:
            gate.set()
        return made[-1]

    monkeypatch.setattr(writer, "Staging", counted)
    monkeypatch.setattr(writer, "_MEMORY", 0)
    model = network()
    with Recorder(tmp_path, model) as recorder:
        for step in range(50):
            become(model, step)
            recorder.save(step)
    assert steps_in(tmp_path) == list(range(50))
    assert all(
        float(each.double().max()) == step
        for step, path in enumerate(names(tmp_path))
        for each in load_file(path).values()
    )
    assert len(made) == writer.FEWEST


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of what is flushed."""
    paths, sync = list[str](), os.fsync
    monkeypatch.setattr(
        writer.os,
        "fsync",
        lambda number: (paths.append(os.readlink(f"/proc/self/fd/{number}")), sync(number))[1],
    )
    return paths


def test_flush_has_every_file_and_its_name_on_the_disk(
    tmp_path: Path, linear: nn.Module, flushed: list[str]
) -> None:
    directory = tmp_path / "new" / "checkpoints"
    with Recorder(directory, linear) as recorder:
        for step in range(3):
            recorder.save(step)
        recorder.flush()
        assert steps_in(directory) == [0, 1, 2]
        named = {str(place) for place in (tmp_path, tmp_path / "new", directory)}
        assert {*map(str, names(directory)), *named} <= set(flushed)


def test_flush_has_what_a_killed_recorder_left_on_the_disk_too(
    tmp_path: Path, linear: nn.Module, flushed: list[str]
) -> None:
    with Recorder(tmp_path, linear) as recorder:
        recorder.save(0)
    flushed.clear()
    with Recorder(tmp_path, linear) as recorder:
        recorder.save(0)
        recorder.flush()
        assert {*map(str, names(tmp_path)), str(tmp_path)} <= set(flushed)


def test_flush_and_close_may_come_again(tmp_path: Path, linear: nn.Module) -> None:
    recorder = Recorder(tmp_path, linear)
    recorder.save(0)
    for action in (recorder.flush, recorder.close, recorder.flush, recorder.close):
        action()
    assert steps_in(tmp_path) == [0]


def test_a_recorder_collected_on_its_own_thread_writes_what_is_left(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimiser with a scheduler is a cycle, so the collector may end the recorder anywhere, on
    the thread that writes too.
    """
    recorder = Recorder(tmp_path, network())
    for step in range(20):
        recorder.save(step)
    series, put = recorder._series, writer._put
    assert series is not None
    assert series._writer is not None
    monkeypatch.setattr(writer, "_put", lambda *given: (put(*given), series.finish())[0])
    gate.set()
    series._writer._thread.join(60)
    assert not series._writer._thread.is_alive()
    assert steps_in(tmp_path) == list(range(20))


def test_a_process_that_ends_without_closing_has_written_everything(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom lca_posthoc import Recorder\nmodel = torch.nn.Linear(300, "
        "300)\nrecorder = Recorder(sys.argv[1], model)\n"
        "for step in range(40):\n    recorder.save(step)\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, cwd=HERE, timeout=120)
    assert steps_in(tmp_path) == list(range(40))


def test_a_recorder_that_is_forgotten_has_written_everything(
    tmp_path: Path, linear: nn.Module
) -> None:
    recorder = Recorder(tmp_path, linear)
    for step in range(10):
        recorder.save(step)
    del recorder
    assert steps_in(tmp_path) == list(range(10))


def test_a_forked_process_neither_writes_nor_hangs(tmp_path: Path, linear: nn.Module) -> None:
    recorder = Recorder(tmp_path, linear)
    recorder.save(0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            recorder.save(1)
        except LCAError:
            with contextlib.suppress(LCAError):
                recorder.flush()
            recorder.close()
            code = 7
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with pytest.raises(ResourceError, match="another recorder writes into"):
        Recorder(tmp_path, linear).save(1)
    recorder.save(1)
    recorder.close()
    assert steps_in(tmp_path) == [0, 1]


def test_a_forked_process_that_lives_on_does_not_hold_the_directory(
    tmp_path: Path, linear: nn.Module
) -> None:
    reading, writing = os.pipe()
    with Recorder(tmp_path, linear) as recorder:
        recorder.save(0)
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until the parent closes it
            os._exit(0)
        os.close(reading)
    saved(tmp_path, linear, 1)
    os.close(writing)
    os.waitpid(child, 0)
    assert steps_in(tmp_path) == [0, 1]


# --- which steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"every": 4}, [0, 4, 8]),
        ({"until": 3}, [0, 1, 2, 3]),
        ({"steps": [0, 1, 2, 4, 8]}, [0, 1, 2, 4, 8]),
        ({"steps": range(0, 9, 2), "every": 3, "until": 5}, [0]),
        ({"steps": []}, []),
    ],
)
def test_the_steps_that_were_asked_for_are_recorded(
    tmp_path: Path, linear: nn.Module, options: dict[str, Any], expected: list[int]
) -> None:
    place = tmp_path / "ck"
    with Recorder(place, linear, **options) as recorder:
        for step in range(10):
            recorder.save(step)
    assert (steps_in(place) if place.exists() else []) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"every=0: record every step \(1\)"),
        ({"every": 2.5}, r"every=2.5: record every step \(1\)"),
        ({"steps": 5}, "steps=5: name optimiser steps"),
        ({"steps": [0, -1]}, r"steps=\[0, -1\]: name optimiser steps"),
        ({"until": -1}, "until=-1: name an optimiser step"),
        ({"on_full": "wait"}, "on_full='wait': choose 'stop' or 'pause'"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    tmp_path: Path, linear: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Recorder(tmp_path, linear, **options)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [(None, -1, "from 0, the initial"), (3, 3, "after step 3"), (3, 2, "after step 3")],
)
def test_steps_are_counted_upwards(
    tmp_path: Path, linear: nn.Module, first: int | None, second: int, message: str
) -> None:
    recorder = Recorder(tmp_path / "ck", linear)
    if first is not None:
        recorder.save(first)
    with pytest.raises(
        InputError,
        match=f"step {second} cannot be saved: optimiser steps are counted upwards, {message}",
    ):
        recorder.save(second)
    recorder.close()
    with pytest.raises(InputError, match="this recorder is closed"):
        recorder.save(9)


@pytest.mark.parametrize("step", [6.0, "5", True, None])
def test_a_step_is_a_whole_number(tmp_path: Path, linear: nn.Module, step: Any) -> None:
    with pytest.raises(InputError, match="cannot be saved: optimiser steps are counted upwards"):
        Recorder(tmp_path / "ck", linear).save(step)
    assert names(tmp_path) == []


def test_places_that_cannot_be_recorded_into_are_refused(tmp_path: Path, linear: nn.Module) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be created as a directory: File exists"):
        Recorder(tmp_path / "file", linear).save(0)
    with pytest.raises(InputError, match="s3://bucket/ck is a URL"):
        Recorder("s3://bucket/ck", linear)
    with pytest.raises(InputError, match=r"the model is a dict, not an nn\.Module"):
        Recorder(tmp_path, dict(linear.state_dict()))  # type: ignore[arg-type]


def test_space_that_cannot_suffice_is_said_at_once(tmp_path: Path, linear: nn.Module) -> None:
    with pytest.raises(
        ResourceError,
        match=r"1,000,000,000,000 iterates of 32 B take 32 TB, and "
        r".* has .* free",
    ):
        Recorder(tmp_path / "ck", linear, until=10**12 - 1)
    with pytest.warns(UserWarning, match="take 32 TB"):
        Recorder(tmp_path / "ck", linear, until=10**12 - 1, on_full="pause")
    Recorder(tmp_path / "ck", linear, until=10**12 - 1, every=10**9)
    assert names(tmp_path) == []


def test_half_precision_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning,
        match=r"weight has fewer than 32 bits per number, like 2 of 2 "
        r"tensors|bias has fewer",
    ):
        saved(tmp_path, nn.Linear(3, 2).bfloat16(), 0)
