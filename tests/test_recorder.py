"""Every iterate is saved whole, once, as it was at its step, readable by others; what cannot be is
an error, never a hole.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import linecache
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import optimizer as optimizer_module

from lca_posthoc import Recorder, open_trajectory
from lca_posthoc.errors import InputError, LCAError, ResourceError
from lca_posthoc.objective import tensor_table
from lca_posthoc.recorder import optimizer_guard, writer
from lca_posthoc.recorder.staging import CODES
from lca_posthoc.trajectory import normalise, read_checkpoint
from tests.helpers.numbered_training import become, network

HERE = Path(__file__).parents[1]


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.emb.weight


class Odd(nn.Module):
    """Tensors that are transposed, strided, views of one storage, scalar, empty, frozen, whole
    numbers, not persistent.
    """

    def __init__(self) -> None:
        super().__init__()
        flat = torch.arange(24.0)
        self.transposed = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
        self.strided = nn.Parameter(flat[::2])
        self.first = nn.Parameter(flat[:6].view(2, 3))
        self.second = nn.Parameter(flat[6:12])
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.channels_last = nn.Parameter(
            torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        )
        self.register_buffer("count", torch.tensor([1, 2, 3]))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.zeros(9), persistent=False)


class Types(nn.Module):
    """A buffer of every type a file can hold, of an odd number of elements."""

    def __init__(self) -> None:
        super().__init__()
        for dtype in CODES:
            self.register_buffer(f"of_{CODES[dtype]}", torch.tensor([0, 1, 1]).to(dtype))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
    "tied": Tied,
    "odd": Odd,
    "types": Types,
    "wrapped": lambda: nn.DataParallel(nn.Linear(3, 2)),
    "compiled": lambda: torch.compile(nn.Linear(3, 2)),  # type: ignore[dict-item, return-value]
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "no tensors": nn.ReLU,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A warning is part of what is promised: where one is due it is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*fewer than 32 bits", category=UserWarning)
        yield


def saved(directory: Path, model: nn.Module, *steps: int, **options: Any) -> list[Path]:
    """Save the model as it is at each step."""
    with Recorder(directory, model, **options) as recorder:
        for step in steps:
            recorder.save(step)
    return names(directory)


def names(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def steps_in(directory: Path) -> list[int]:
    return [int(path.stem.removeprefix("step_")) for path in names(directory)]


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 1


# --- what a file holds
# ---------------------------------------------------------------------------------------------------


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


# --- while training goes on
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The thread writes nothing before it is set."""
    opened, write = threading.Event(), writer.Writer._write
    monkeypatch.setattr(writer.Writer, "_write", lambda *given: (opened.wait(), write(*given))[1])
    yield opened
    opened.set()


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


def test_flush_has_every_file_and_its_name_on_the_disk(
    tmp_path: Path, linear: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(
        writer.os,
        "fsync",
        lambda number: (flushed.append(os.readlink(f"/proc/self/fd/{number}")), sync(number))[1],
    )
    with Recorder(tmp_path, linear) as recorder:
        for step in range(3):
            recorder.save(step)
        recorder.flush()
        assert steps_in(tmp_path) == [0, 1, 2]
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


# --- which steps
# ---------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ResourceError, match="cannot be made a directory: File exists"):
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
        match=r"weight has fewer than 32 bits a number, as 2 of 2 "
        r"tensors|bias has fewer",
    ):
        saved(tmp_path, nn.Linear(3, 2).bfloat16(), 0)


# --- by itself, after every step of an optimiser
# -----------------------------------------------------------------------------------


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, accumulate: int = 1
) -> list[list[float]]:
    """Train on noise; the first row of the model's first parameter after each optimiser step."""
    first, found = next(model.parameters()), []
    for _ in range(steps):
        for _ in range(accumulate):
            model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(first[0].tolist())
    return found


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_attached_recorder_saves_the_start_and_every_optimiser_step(
    tmp_path: Path, linear: nn.Module, kind: Callable[..., torch.optim.Optimizer], accumulate: int
) -> None:
    optimizer = kind(linear.parameters(), lr=0.01)
    with Recorder(tmp_path, linear).attach(optimizer):
        start = linear.weight[0].tolist()  # type: ignore[operator, index, union-attr]
        expected = [start, *trained(linear, optimizer, 5, accumulate)]
    assert [load_file(path)["weight"][0].tolist() for path in names(tmp_path)] == expected
    trained(linear, optimizer, 1)  # detached
    assert steps_in(tmp_path) == list(range(6))


def test_a_recorder_that_only_the_optimiser_knows_records(
    tmp_path: Path, linear: nn.Module
) -> None:
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.01)
    Recorder(tmp_path, linear).attach(optimizer, step=40)
    trained(linear, optimizer, 3)
    del optimizer
    assert steps_in(tmp_path) == [40, 41, 42, 43]


def test_steps_of_several_optimisers_are_counted_together(
    tmp_path: Path, linear: nn.Module
) -> None:
    both = [torch.optim.SGD([each], lr=0.01) for each in linear.parameters()]
    with Recorder(tmp_path, linear).attach(*both):
        for _ in range(3):
            linear(torch.randn(4, 3)).sum().backward()
            for optimizer in both:
                optimizer.step()
    assert steps_in(tmp_path) == list(range(7))


def stepped(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[str]:
    """Steps of optimisers in turn; what is warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for optimizer in optimizers:
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
    return [str(each.message) for each in said]


def test_an_optimiser_that_takes_the_place_of_an_attached_one_is_noticed_once(
    tmp_path: Path, linear: nn.Module
) -> None:
    before, after = (torch.optim.SGD(linear.parameters(), lr=0.01) for _ in range(2))
    with Recorder(tmp_path, linear).attach(before):
        (said,) = stepped(linear, before, after, after, after)
        assert "not recorded" in said
        assert "attach(optimizer, step=…)" in said
    assert steps_in(tmp_path) == [0, 1]
    assert stepped(linear, after, after, after) == []  # closed


def test_nothing_is_said_of_a_partner_or_of_another_models_optimiser(
    tmp_path: Path, linear: nn.Module
) -> None:
    first, second = (torch.optim.SGD([each], lr=0.01) for each in linear.parameters())
    critic = nn.Linear(3, 1)
    other = torch.optim.SGD(critic.parameters(), lr=0.01)
    with Recorder(tmp_path, linear).attach(second):
        assert stepped(linear, *[first, other, other, other, second] * 3) == []
    assert steps_in(tmp_path) == [0, 1, 2, 3]


class Several(torch.optim.Optimizer):
    """Made of one optimiser for each parameter, as torchtitan's container and Muon with its
    auxiliary Adam are.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(parameters, {})
        self.inner = [torch.optim.SGD([each], lr=0.01) for each in parameters]

    def step(self, closure: Any = None) -> None:
        for each in self.inner:
            each.step()


class Equal(torch.optim.SGD):
    """Equal to all of its kind, and without a hash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    __hash__ = None  # type: ignore[assignment]


def test_steps_inside_an_attached_optimisers_own_are_its_own(
    tmp_path: Path, linear: nn.Module
) -> None:
    whole = Several(list(linear.parameters()))
    with Recorder(tmp_path, linear).attach(whole):
        assert stepped(linear, *[whole] * 4) == []
        assert len(stepped(linear, *whole.inner)) == 1  # by themselves they are not
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4]


def test_an_optimiser_is_looked_at_once_and_again_when_it_has_more_groups(
    tmp_path: Path, linear: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[torch.optim.Optimizer] = []
    trains = optimizer_guard.trains
    monkeypatch.setattr(
        optimizer_guard, "trains", lambda each, model: looked.append(each) or trains(each, model)
    )
    mine = torch.optim.SGD(linear.parameters(), lr=0.01)
    other = torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.01)
    with Recorder(tmp_path, linear).attach(mine):
        assert stepped(linear, other, other, mine, other) == []
        assert looked == [other]
        other.add_param_group({"params": list(linear.parameters())})
        assert len(stepped(linear, other, other, other)) == 1
        assert looked == [other, other]


def test_optimisers_are_told_apart_by_identity(tmp_path: Path, linear: nn.Module) -> None:
    before, after = (Equal(linear.parameters(), lr=0.01) for _ in range(2))
    with Recorder(tmp_path, linear).attach(before):
        assert len(stepped(linear, before, after, after)) == 1
    assert steps_in(tmp_path) == [0, 1]


def test_copies_of_an_attached_optimiser_are_strangers(tmp_path: Path, linear: nn.Module) -> None:
    mine = torch.optim.Adam(linear.parameters())
    with Recorder(tmp_path, linear).attach(mine):
        model, copied = copy.deepcopy((linear, mine))
        assert stepped(model, copied, copied, pickle.loads(pickle.dumps(mine)), mine) == []
    assert steps_in(tmp_path) == [0, 1]


def test_a_partner_that_steps_more_often_is_mentioned_once(
    tmp_path: Path, linear: nn.Module
) -> None:
    generator, critic = (torch.optim.SGD([each], lr=0.01) for each in linear.parameters())
    with Recorder(tmp_path, linear).attach(generator):
        assert len(stepped(linear, *[*[critic] * 5, generator] * 3)) == 1
    assert steps_in(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize("way", ["by itself", "scheduled", "scaled"])
def test_the_line_that_makes_the_step_is_shown(tmp_path: Path, linear: nn.Module, way: str) -> None:
    before, after = (torch.optim.SGD(linear.parameters(), lr=0.01) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu")
    with Recorder(tmp_path, linear).attach(before):
        if way == "scheduled":
            torch.optim.lr_scheduler.ConstantLR(after)
        scaler.scale(linear(torch.randn(4, 3)).sum()).backward()
        after.step()
        with pytest.warns(UserWarning, match="not attached") as said:
            scaler.step(after) if way == "scaled" else after.step()  # the second
    assert said[0].filename == __file__
    assert "# the second" in linecache.getline(__file__, said[0].lineno)


def test_nothing_is_left_of_a_recorder_that_is_gone(tmp_path: Path, linear: nn.Module) -> None:
    hooks = optimizer_module._global_optimizer_post_hooks
    before = len(hooks)
    mine = torch.optim.SGD(linear.parameters(), lr=0.01)
    recording = Recorder(tmp_path / "ck", linear).attach(mine)
    gone = weakref.ref(recording)
    assert len(hooks) == before + 1
    del recording, mine
    gc.collect()
    assert gone() is None
    assert len(hooks) == before
    mine = torch.optim.SGD(linear.parameters(), lr=0.01)
    Recorder(tmp_path / "other", linear).attach(mine).close()
    assert len(hooks) == before
    assert [*mine._optimizer_step_pre_hooks, *mine._optimizer_step_post_hooks] == []


def test_a_step_that_a_gradient_scaler_skips_does_not_count(
    tmp_path: Path, linear: nn.Module
) -> None:
    optimizer, scaler = torch.optim.SGD(linear.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
    with Recorder(tmp_path, linear).attach(optimizer):
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(linear(torch.randn(4, 3)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert steps_in(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("given", [(), ("optimiser",), ([],)])
def test_what_is_no_optimiser_is_refused(tmp_path: Path, linear: nn.Module, given: Any) -> None:
    with pytest.raises(
        InputError,
        match=r"attach was given (nothing|str|list); it takes the "
        r"optimisers",
    ):
        Recorder(tmp_path / "ck", linear).attach(*given)
    assert names(tmp_path) == []


def test_an_interrupt_leaves_the_next_iterate_its_own_number(
    tmp_path: Path, linear: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.01)
    with Recorder(tmp_path, linear).attach(optimizer):
        trained(linear, optimizer, 1)
        with monkeypatch.context() as patch:
            patch.setattr(writer.Writer, "buffer", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                trained(linear, optimizer, 1)
        third = trained(linear, optimizer, 1)
    assert steps_in(tmp_path) == [0, 1, 3]
    assert load_file(names(tmp_path)[-1])["weight"][0].tolist() == third[0]


def test_an_optimiser_of_another_model_is_refused(tmp_path: Path, linear: nn.Module) -> None:
    other = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.01)
    with pytest.raises(InputError, match="the optimiser has none of the model's parameters"):
        Recorder(tmp_path / "ck", linear).attach(other)
    assert names(tmp_path) == []
    mine = torch.optim.SGD(linear.parameters(), lr=0.01)
    with (
        Recorder(tmp_path, linear).attach(mine) as recorder,
        pytest.raises(InputError, match="attached already"),
    ):
        recorder.attach(mine)


# --- what cannot be saved
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.LazyLinear(3), "has no values in memory"),
        (lambda: nn.Linear(3, 2, device="meta"), "has no values in memory"),
        (
            lambda: nn.Linear(3, 2, dtype=torch.complex128),
            "is torch.complex128, which safetensors cannot hold",
        ),
    ],
)
def test_tensors_that_a_file_cannot_hold_are_refused(
    tmp_path: Path, build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Recorder(tmp_path / "ck", build()).save(0)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["__metadata__", "half\ud800pair"])
def test_names_that_a_file_cannot_hold_are_refused(tmp_path: Path, name: str) -> None:
    model = nn.ReLU()
    model.register_parameter(name, nn.Parameter(torch.ones(2)))
    with pytest.raises(InputError, match="has a name that safetensors cannot hold"):
        Recorder(tmp_path / "ck", model).save(0)
    assert names(tmp_path) == []


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's older one, which leaves a process a nameless part of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.ones(3))


def _zero3() -> nn.Module:
    model = nn.Linear(3, 2)
    model.weight.ds_id = 0  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("build", [FullyShardedDataParallel, _zero3])
def test_weights_of_which_a_process_has_a_part_are_refused(
    tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    with pytest.raises(
        InputError,
        match=r"the model is sharded by (FullyShardedDataParallel|DeepSpeed's ZeRO-3), "
        r"of which a process",
    ):
        Recorder(tmp_path / "ck", build()).save(0)
    assert names(tmp_path) == []


def test_a_buffer_that_is_made_on_the_way_and_is_not_persistent_disturbs_nothing(
    tmp_path: Path, linear: nn.Module
) -> None:
    with Recorder(tmp_path, linear) as recorder:
        recorder.save(0)
        linear.register_buffer("cache", torch.ones(5), persistent=False)
        recorder.save(1)
    assert [set(load_file(path)) for path in names(tmp_path)] == [{"weight", "bias"}] * 2


def test_a_default_device_of_the_process_is_not_the_recorders(
    tmp_path: Path, linear: nn.Module
) -> None:
    with torch.device("meta"):
        (path,) = saved(tmp_path, linear, 0)
    assert torch.equal(load_file(path)["weight"], linear.weight)  # type: ignore[arg-type]


def test_failing_to_copy_neither_holds_the_directory_nor_the_memory(
    tmp_path: Path, linear: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(writer, "_MEMORY", 0)
    with Recorder(tmp_path, linear) as recorder:
        with monkeypatch.context() as patch:
            patch.setattr("lca_posthoc.recorder.recorder.Stager", fails)
            with pytest.raises(MemoryError):
                recorder.save(0)
        recorder.save(0)
        with monkeypatch.context() as patch:
            patch.setattr("lca_posthoc.recorder.recorder.Stager.stage", fails)
            for _ in range(2 * writer.FEWEST):
                with pytest.raises(MemoryError):
                    recorder.save(1)
        recorder.save(1)
    assert steps_in(tmp_path) == [0, 1]


def _grow(model: nn.Module) -> None:
    model.extra = nn.Parameter(torch.ones(1))


def _shrink(model: nn.Module) -> None:
    model.bias = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.double(),
            r"'(weight|bias)' of the model was torch.float32 .* and is "
            r"torch.float64",
        ),
        (_shrink, "'bias' of the model was .* and is absent"),
        (_grow, "'extra' of the model was absent .* and is torch.float32"),
    ],
)
def test_a_series_holds_one_set_of_tensors(
    tmp_path: Path, linear: nn.Module, change: Callable[[nn.Module], Any], message: str
) -> None:
    with Recorder(tmp_path, linear) as recorder:
        recorder.save(0)
        change(linear)
        with pytest.raises(InputError, match=message):
            recorder.save(1)
    assert steps_in(tmp_path) == [0]


class _Failing:
    """Fails while the file of some steps is half written, as often as told."""

    def __init__(self, code: int, steps: range, times: int = 10**9) -> None:
        self.code, self.steps, self.times, self.put = code, steps, times, writer._put

    def __call__(self, path: str, header: bytes, body: memoryview) -> None:
        if self.times and any(f"{step:08d}" in path for step in self.steps):
            self.times -= 1
            self.put(path, header)
            raise OSError(self.code, os.strerror(self.code))
        self.put(path, header, body)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[_Failing], None]:
    return lambda fault: monkeypatch.setattr(writer, "_put", fault)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_what_cannot_be_written_stops_training_and_leaves_no_hole(
    tmp_path: Path, failing: Callable[[_Failing], None], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MEMORY", 0)
    failing(_Failing(code, range(3, 4), 1))
    done: list[int] = []
    recorder = Recorder(tmp_path, network())
    said = (
        f"cannot write .*step_00000003.*{os.strerror(code)}; the last iterate recorded is that of "
        f"step 2"
    )
    with pytest.raises(ResourceError, match=said):
        _save_on(recorder, done)
    assert len(done) <= 3 + writer.FEWEST + 1
    with pytest.raises(ResourceError, match="step_00000003"):
        recorder.close()
    assert steps_in(tmp_path) == [0, 1, 2]


def _save_on(recorder: Recorder, done: list[int], until: int = 1000) -> None:
    for step in range(until):
        recorder.save(step)
        done.append(step)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _save_and(action: Callable[[], Any], recorder: Recorder) -> None:
    with recorder:
        recorder.save(0)
        action()


def test_an_error_is_raised_at_the_latest_when_closing(
    tmp_path: Path, failing: Callable[[_Failing], None]
) -> None:
    failing(_Failing(errno.ENOSPC, range(1)))
    with (
        pytest.raises(ResourceError, match="nothing was recorded"),
        Recorder(tmp_path, network()) as recorder,
    ):
        recorder.save(0)
    assert names(tmp_path) == []


def test_an_error_of_training_stands_before_that_of_the_recorder(
    tmp_path: Path, failing: Callable[[_Failing], None]
) -> None:
    failing(_Failing(errno.ENOSPC, range(1)))
    with pytest.raises(ZeroDivisionError) as found:
        _save_and(lambda: 1 / 0, Recorder(tmp_path, network()))
    assert "the recorder, too: cannot write" in found.value.__notes__[0]


def test_an_error_inside_the_context_is_not_swallowed_and_what_was_saved_stays(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _save_and(_interrupt, Recorder(tmp_path, network()))
    assert steps_in(tmp_path) == [0]


def test_a_full_disk_pauses_recording_where_that_was_chosen(
    tmp_path: Path, failing: Callable[[_Failing], None]
) -> None:
    failing(_Failing(errno.ENOSPC, range(2, 4)))
    recorder = Recorder(tmp_path, network(), on_full="pause")
    with pytest.warns(
        UserWarning, match="no space for .*step_00000002.*recording pauses until there is"
    ) as warned:
        _save_and(lambda: [recorder.save(step) for step in range(1, 6)], recorder)
    assert len(warned) == 1
    assert recorder.left_out == [2, 3]
    assert steps_in(tmp_path) == [0, 1, 4, 5]


def test_a_file_larger_than_the_process_may_write_stops_training_with_whole_files_alone(
    tmp_path: Path,
) -> None:
    """A real limit: the kernel cuts the file short."""
    script = (
        "import resource, sys, torch\nfrom lca_posthoc import Recorder\nfrom lca_posthoc.errors "
        "import ResourceError\n"
        "recorder = Recorder(sys.argv[1], torch.nn.Linear(300, "
        "300))\nrecorder.save(0)\nrecorder.flush()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "try:\n    for step in range(1, 100):\n        recorder.save(step)\nexcept ResourceError "
        "as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        capture_output=True,
        text=True,
        cwd=HERE,
        timeout=120,
        check=False,
    )
    assert "cannot write" in done.stdout
    assert "File too large; the last iterate recorded is that of step 0" in done.stdout
    assert steps_in(tmp_path) == [0]


# --- going on
# ------------------------------------------------------------------------------------------------------------------------


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
            r"step_00000002.safetensors holds other weights than those to be saved, and .* goes "
            r"on to step 4",
        ),
        (4, 7, r"step_00000004.safetensors holds other weights"),
        (
            1,
            1,
            r"goes on to step 4 and has no step_00000001.safetensors. A series is one training run "
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
        UserWarning, match="ends at step 1 and is gone on with at step 5: the 3 between are missing"
    ):
        saved(tmp_path, model, 5)
    with pytest.warns(UserWarning, match="at step 12: the 3 between"):
        saved(tmp_path, model, 12, every=2, on_full="stop")
    saved(tmp_path, model, 13)


def test_two_recorders_of_one_directory_are_one_too_many(tmp_path: Path, linear: nn.Module) -> None:
    with Recorder(tmp_path, linear) as recorder:
        recorder.save(0)
        with pytest.raises(ResourceError, match="another recorder writes into"):
            Recorder(tmp_path, linear).save(1)
    saved(tmp_path, linear, 1)


@pytest.mark.parametrize("kills", [12])
def test_a_training_that_is_killed_leaves_whole_files_without_a_hole(
    tmp_path: Path, kills: int
) -> None:
    """kill -9 at random moments, again and again in one directory; the full number:
    `tests/benchmarks/recorder.py --kills`.
    """
    assert kill_again_and_again(tmp_path, kills) >= kills


def kill_again_and_again(directory: Path, kills: int) -> int:
    """Kill trainings that go on with one series; returns how many iterates there are in the end."""
    chance, found = random.Random(7), 0
    trainings = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.numbered_training", directory],
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
            left = [path for path in names(directory) if path.name.startswith(".")]
            steps = [
                int(path.stem.removeprefix("step_"))
                for path in names(directory)
                if path not in left
            ]
            assert len(left) <= 1
            assert steps == list(range(len(steps)))
            for step in range(found, len(steps)):
                tensors = load_file(directory / f"step_{step:08d}.safetensors")
                assert all((each == step).all() for each in tensors.values())
            found = len(steps)
    return found
