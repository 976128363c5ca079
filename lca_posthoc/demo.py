"""Run the demo: train a small network on real digits, record every iterate, replay it, write the
report.

The data are 1,797 images of 8 × 8 pixels, included in the package (source: `data/README.md`).
`task` is also a task for the command line: `lca run DIR/checkpoints --task lca_posthoc.demo:task`.
"""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .errors import InputError
from .recording import Recorder
from .replay.events import Listener, Note
from .replay.run import run
from .report import write_report
from .results import Run
from .tasks.task import Loss, Task

STEPS = 300
REPORT = "report.html"
_TRAIN = 1500
_BATCH = 50

Data = tuple[torch.Tensor, torch.Tensor]


class Net(torch.nn.Sequential):
    """64-50-20-10 with ReLU: 4,480 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("fc1", torch.nn.Linear(64, 50))
        self.add_module("relu1", torch.nn.ReLU())
        self.add_module("fc2", torch.nn.Linear(50, 20))
        self.add_module("relu2", torch.nn.ReLU())
        self.add_module("fc3", torch.nn.Linear(20, 10))


def digits() -> tuple[Data, Data]:
    """Return train (1,500) and validation (297) images, (N, 64) float32 in [0, 1], and labels, (N,)
    int64.
    """
    packed = resources.files("lca_posthoc").joinpath("data/digits.csv.gz").read_bytes()
    table = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",")
    images = torch.from_numpy(table[:, :64] / 16).float()
    labels = torch.from_numpy(table[:, 64]).long()
    return (images[:_TRAIN], labels[:_TRAIN]), (images[_TRAIN:], labels[_TRAIN:])


def task() -> Task:
    """Return the task: cross-entropy over the training and the validation images."""
    train, validation = digits()
    return Task(
        model=Net,
        data={"train": train, "validation": validation},
        losses={
            "train": Loss(F.cross_entropy, on="train"),
            "validation": Loss(F.cross_entropy, on="validation"),
        },
    )


def train(checkpoints: Path) -> None:
    """Train `Net` with SGD (0.05, momentum 0.9, batches of 50) for 300 steps and record every
    iterate, the first included.
    """
    (inputs, targets), _ = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Recorder(checkpoints, model) as recorder:
        recorder.attach(optimizer)
        for _ in range(STEPS):
            batch = torch.randint(len(inputs), (_BATCH,), generator=order)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def demo(directory: Path, progress: Listener | None = None) -> Run:
    """Train, record and replay both losses under `directory`, and write `report.html` there.

    Args:
        directory: where everything is written; it must be empty or missing.
        progress: receives every event of the run.

    Raises:
        InputError: if `directory` exists and is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(
            f"{directory} exists and is not empty. Name another directory: lca demo DIR."
        )
    if progress:
        progress(
            Note(
                f"training a 64-50-20-10 network on {_TRAIN:,} digits, recording {STEPS + 1} "
                "iterates"
            )
        )
    train(directory / "checkpoints")
    opened = run(
        directory / "checkpoints",
        "lca_posthoc.demo:task",
        losses=["all"],
        causes=True,
        progress=progress,
    )
    write_report([opened], directory / REPORT)
    return opened
