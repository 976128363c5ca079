"""Every iterate is saved whole, once, readable by others, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lca_posthoc import Recorder, open_trajectory
from lca_posthoc import recorder as module
from lca_posthoc.errors import InputError
from lca_posthoc.objective import tensor_table
from lca_posthoc.trajectory import read_checkpoint


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.emb.weight


class Odd(nn.Module):
    """Tensors that are transposed, strided, views of one storage, scalar, empty, frozen, whole numbers, not persistent."""

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
        self.channels_last = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.register_buffer("count", torch.tensor([1, 2, 3]))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(9), persistent=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
    "tied": Tied,
    "odd": Odd,
    "half": lambda: nn.Linear(3, 2).half(),
    "wrapped": lambda: nn.DataParallel(nn.Linear(3, 2)),
}


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


def test_files_are_named_by_their_step_and_hold_it_in_their_metadata(tmp_path: Path, linear: nn.Module) -> None:
    with Recorder(tmp_path / "new" / "ck", linear) as recorder:
        paths = [recorder.save(step) for step in (0, 7, 123_456_789)]
    assert [path.name for path in paths] == [
        "step_00000000.safetensors",
        "step_00000007.safetensors",
        "step_123456789.safetensors",
    ]
    for path, step in zip(paths, ("0", "7", "123456789"), strict=True):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "step": step}


def test_parameters_and_persistent_buffers_are_saved_whole(tmp_path: Path, model: nn.Module) -> None:
    stored = load_file(Recorder(tmp_path, model).save(0))
    expected = model.state_dict()
    unique = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(stored) == set(unique) & set(expected)
    for name, tensor in stored.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_a_buffer_that_is_not_persistent_is_not_saved(tmp_path: Path) -> None:
    assert "scratch" not in load_file(Recorder(tmp_path, Odd()).save(0))


def test_a_tied_tensor_is_saved_once_under_its_first_name(tmp_path: Path) -> None:
    assert set(load_file(Recorder(tmp_path, Tied()).save(0))) == {"emb.weight"}


def test_saving_leaves_the_model_and_its_gradients_alone(tmp_path: Path, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {
        name: (id(each), each.data_ptr(), each.stride(), each.requires_grad) for name, each in model.named_parameters()
    }
    Recorder(tmp_path, model).save(0)
    assert {
        name: (id(each), each.data_ptr(), each.stride(), each.requires_grad) for name, each in model.named_parameters()
    } == before
    assert all(torch.equal(each.grad, torch.ones_like(each)) for each in model.parameters() if each.grad is not None)


def test_what_was_saved_is_read_back_under_the_models_own_names(tmp_path: Path, model: nn.Module) -> None:
    saved = []
    with Recorder(tmp_path, model) as recorder:
        for step in range(3):
            recorder.save(step)
            saved.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            move(model)
    trajectory = open_trajectory(tmp_path)
    table = tensor_table(model, "running")
    names = trajectory.match(table)
    assert trajectory.steps == [0, 1, 2]
    for checkpoint, expected in zip(trajectory.checkpoints, saved, strict=True):
        read = read_checkpoint(checkpoint, names)
        assert list(read) == [spec.name for spec in table]
        for name, tensor in read.items():
            assert torch.equal(tensor, expected[name])
            assert tensor.dtype == expected[name].dtype


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_gets_the_mode_the_umask_asks_for(
    tmp_path: Path, linear: nn.Module, umask: Callable[[int], None], mask: int, mode: int
) -> None:
    umask(mask)
    assert Recorder(tmp_path, linear).save(0).stat().st_mode & 0o777 == mode


def test_nothing_temporary_is_left(tmp_path: Path, linear: nn.Module) -> None:
    for step in range(3):
        Recorder(tmp_path, linear).save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_0000000{step}.safetensors" for step in range(3)]


def _fails_half_way(tensors: Any, path: Path, metadata: Any) -> None:
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def _interrupted_half_way(tensors: Any, path: Path, metadata: Any) -> None:
    Path(path).write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("fault", "error"), [(_fails_half_way, OSError), (_interrupted_half_way, KeyboardInterrupt)])
def test_a_save_that_fails_raises_leaves_nothing_and_can_be_repeated(
    tmp_path: Path,
    linear: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., None],
    error: type[BaseException],
) -> None:
    recorder = Recorder(tmp_path, linear)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", fault)
        with pytest.raises(error):
            recorder.save(0)
    assert list(tmp_path.iterdir()) == []
    assert recorder.save(0).exists()


def test_an_iterate_that_is_there_is_never_overwritten(tmp_path: Path, linear: nn.Module) -> None:
    recorder = Recorder(tmp_path, linear)
    path = recorder.save(3)
    before = path.read_bytes()
    move(linear)
    with pytest.raises(
        InputError, match=r"step_00000003\.safetensors exists\. Record into an empty directory, or continue"
    ):
        recorder.save(3)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_negative_step_is_refused(tmp_path: Path, linear: nn.Module) -> None:
    with pytest.raises(InputError, match="step must be 0 or more, got -1"):
        Recorder(tmp_path / "ck", linear).save(-1)
    assert not (tmp_path / "ck").exists()


def test_an_error_inside_the_context_is_not_swallowed(tmp_path: Path, linear: nn.Module) -> None:
    with pytest.raises(ZeroDivisionError), Recorder(tmp_path, linear):
        _ = 1 / 0
