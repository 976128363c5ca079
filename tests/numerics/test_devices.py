"""Every tensor that our code makes names its device: one that does not lies on torch's default device,
and is copied, or refused, when it meets tensors of another.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

import lca_posthoc
from lca_posthoc.checkpoints.basis import write_basis
from lca_posthoc.numerics import statistics
from lca_posthoc.numerics.schema import KEEP

from ..helpers.small_perceptron import replay, train

PACKAGE = Path(lca_posthoc.__file__).parent
FOLDERS = PACKAGE / "numerics", PACKAGE / "replay" / "worker"
MAKERS = {
    name
    for maker in _device_constructors()
    if getattr(torch, name := maker.__name__, None) is maker
}
TAKES_A_TENSOR = ("tensor", "as_tensor", "asarray")  # and leaves it where it is


@contextmanager
def made_without_a_device(
    folders: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> Iterator[set[str]]:
    """Gather the lines of some folders that make a tensor without naming its device, in whatever
    thread.
    """
    lines = set[str]()

    def watched(maker: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(maker)
        def make(*args: Any, **kwargs: Any) -> Any:
            stays = maker.__name__ in TAKES_A_TENSOR and isinstance(args[0], torch.Tensor)
            if kwargs.get("device") is None and not stays:
                caller = sys._getframe(1)
                path = Path(caller.f_code.co_filename)
                if any(path.is_relative_to(folder) for folder in folders):
                    lines.add(f"{path.name}:{caller.f_lineno}: torch.{maker.__name__}")
            return maker(*args, **kwargs)

        return make

    with monkeypatch.context() as patch:
        for name in MAKERS:
            patch.setattr(torch, name, watched(getattr(torch, name)))
        yield lines


def calls_without_a_device(source: str) -> list[str]:
    """Return the calls in some code that make a tensor without naming its device."""
    return [
        f"{call.lineno}: torch.{call.func.attr}"
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr in MAKERS) == ("torch", True)
        and not any(keyword.arg == "device" for keyword in call.keywords)
    ]


@pytest.fixture(scope="module")
def iterates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("iterates"), 4)


@pytest.mark.parametrize(
    ("keep", "looks"), [*((keep, True) for keep in KEEP), ("parameters", False)]
)
def test_whole_replays_name_the_device_of_every_tensor(
    keep: str, looks: bool, iterates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With groups, examples, causes, directions, other paths, and the path of a device on which
    looking at numbers waits.
    """
    basis = write_basis(iterates, tmp_path / "basis", directions=2, say=lambda text: None)
    monkeypatch.setattr(statistics, "is_looked_at", lambda device: looks)
    asked = {"losses": ["all"], "causes": True, "along": basis.path, "path_band": "on"}
    with made_without_a_device(FOLDERS, monkeypatch) as lines:
        run = replay(
            iterates, tmp_path / "run", keep=keep, tolerance=1e-6, subset=["0:36"], **asked
        )
    assert run["examples"].examples.sizes["example"] == 36
    assert lines == set()


@pytest.mark.parametrize(
    "settings",
    [
        {"losses": ["classes"], "norm_stats": "batch", "batch_size": 8},
        {"losses": ["train"], "norm_stats": "recalibrated", "subset": ["0.5@3"]},
        {"losses": ["train"], "keep": "units", "shards": 3, "subset": ["3,1,7,2,9"]},
    ],
    ids=["batch", "recalibrated", "shards"],
)
def test_other_ways_to_replay_do_so_too(
    settings: dict[str, Any], iterates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made_without_a_device(FOLDERS, monkeypatch) as lines:
        replay(iterates, tmp_path / "run", **settings)
    assert lines == set()


@pytest.mark.parametrize(
    "path", [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))], ids=str
)
def test_lines_that_no_replay_reaches_do_so_too(path: Path) -> None:
    assert calls_without_a_device(path.read_text()) == []


def test_a_tensor_without_a_device_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail."""
    code = (
        "import torch\n"
        "def make():\n"
        "    torch.zeros(3)\n"
        "    torch.as_tensor([1.0])\n"
        "    torch.randn(2, device=None)\n"
        "    torch.arange(3, device='cpu')\n"
        "    one = torch.full((), 1.0, device='cpu')\n"
        "    torch.zeros_like(one), one.new_zeros(3), torch.as_tensor(one)\n"
    )
    path = tmp_path / "code.py"
    path.write_text(code)
    names: dict[str, Any] = {}
    exec(compile(code, str(path), "exec"), names)
    with made_without_a_device((tmp_path,), monkeypatch) as lines:
        names["make"]()
        torch.zeros(3)  # of a file elsewhere
    noticed = {"3: torch.zeros", "4: torch.as_tensor", "5: torch.randn"}
    assert lines == {f"code.py:{line}" for line in noticed}
    assert calls_without_a_device(code) == [
        "3: torch.zeros",
        "4: torch.as_tensor",
        "8: torch.as_tensor",
    ]
    assert {"zeros", "empty", "tensor", "arange", "full", "as_tensor", "randn"} <= MAKERS
