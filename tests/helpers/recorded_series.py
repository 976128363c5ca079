"""Models of every kind to record, and what a directory of their iterates holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lca_posthoc import Recorder
from lca_posthoc.recording.staging import CODES

HERE = Path(__file__).parents[2]


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


def saved(directory: Path, model: nn.Module, *steps: int, **options: Any) -> list[Path]:
    """Save the model as it is at each step."""
    with Recorder(directory, model, **options) as recorder:
        for step in steps:
            recorder.save(step)
    return names(directory)


def names(directory: Path) -> list[Path]:
    """Return what is in a directory of iterates, but for the small files of a recorder and a replay."""
    return sorted(path for path in directory.iterdir() if not path.name.startswith("."))


def steps_in(directory: Path) -> list[int]:
    return [int(path.stem.removeprefix("step_")) for path in names(directory)]


def interrupt_now(*_: Any) -> None:
    raise KeyboardInterrupt
