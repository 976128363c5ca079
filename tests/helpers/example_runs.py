"""A small classifier whose examples are told apart; and by brute force: one example, one node and
one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Run, Task, run
from lca_posthoc.demo import digits
from lca_posthoc.results import LossResults

EXAMPLES, STEPS, CLASSES = 24, 16, 10
NODES = ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6))  # Simpson's rule


class Stack(nn.Module):
    """An embedding, two blocks with names as transformers have them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(64, 12)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Linear(12, 12), "gate": nn.Linear(12, 12, bias=False)})
            for _ in range(2)
        )
        self.head = nn.Linear(12, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block["mlp"](hidden)) * torch.sigmoid(
                block["gate"](hidden)
            )
        output: Tensor = self.head(hidden)
        return output


@dataclass(frozen=True)
class Told:
    """A run, and the dataset of its examples."""

    run: Run
    checkpoints: Path
    examples: xr.Dataset


def data() -> tuple[Tensor, Tensor]:
    """The first digits; one of them has another's label, so that it must be hurt."""
    (inputs, labels), _ = digits()
    labels = labels[:EXAMPLES].clone()
    labels[7] = (labels[7] + 1) % CLASSES
    return inputs[:EXAMPLES], labels


def label(inputs: Tensor, targets: Tensor) -> Tensor:
    return targets


def train(directory: Path) -> Path:
    """A few steps on a few examples each, at a rate that is too high: some are forgotten again."""
    inputs, labels = data()
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(1)
    with Recorder(directory, model) as recorder:
        for step in range(STEPS + 1):
            recorder.save(5 * step)
            batch = torch.randperm(EXAMPLES, generator=generator)[:6]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return directory


def brute_force(checkpoints: Path, tensors: list[str]) -> xr.Dataset:
    """The dataset of `per="example"`: for each segment, example and node one backward pass."""
    from safetensors.torch import load_file

    inputs, labels = data()
    files = sorted(checkpoints.glob("*.safetensors"))
    iterates = [load_file(file) for file in files]
    assert len(iterates) == STEPS + 1
    model = Stack()
    allocated = np.zeros((STEPS, EXAMPLES, len(tensors)), "float32")
    loss = np.zeros((STEPS + 1, EXAMPLES), "float32")
    for step, state in enumerate(iterates):
        model.load_state_dict(state)
        with torch.no_grad():
            loss[step] = F.cross_entropy(model(inputs), labels, reduction="none").numpy()
    for step in range(STEPS):
        start, end = iterates[step], iterates[step + 1]
        for place, weight in NODES:
            model.load_state_dict(
                {name: torch.lerp(start[name], end[name], place) for name in start}
            )
            for example in range(EXAMPLES):
                model.zero_grad()
                F.cross_entropy(
                    model(inputs[example : example + 1]), labels[example : example + 1]
                ).backward()
                for column, name in enumerate(tensors):
                    gradient = model.get_parameter(name).grad
                    assert gradient is not None
                    motion = end[name] - start[name]
                    allocated[step, example, column] += weight * float((gradient * motion).sum())
    change = loss[1:] - loss[:-1]
    dims = ("step", "example")
    return xr.Dataset(
        {
            "allocated": ((*dims, "tensor"), allocated),
            "loss_start": (dims, loss[:-1]),
            "loss_end": (dims, loss[1:]),
            "residual": (dims, change - allocated.sum(-1)),
            "weight": (dims, np.ones((STEPS, EXAMPLES), "float32")),
        },
        coords={
            "step": 5 * np.arange(STEPS),
            "example": np.arange(EXAMPLES),
            "tensor": np.array(tensors, dtype=object),
            "group": ("example", labels.numpy()),
        },
    )


def tell(directory: Path, keep: str = "units") -> Told:
    """Train, replay, and tell the examples apart."""
    checkpoints = train(directory / "ck")
    losses = {
        "train": Loss(F.cross_entropy, per="example"),
        "plain": Loss(F.cross_entropy),
        "classes": Loss(F.cross_entropy, group_by=label),
    }
    task = Task(Stack, {"train": data()}, losses)
    opened = run(
        checkpoints,
        task,
        losses=["all"],
        cluster="inline",
        keep=keep,
        tolerance="inf",
        out=directory / "told.lca",
    )
    group = ("example", data()[1].numpy())
    return Told(opened, checkpoints, opened["train"].examples.load().assign_coords(group=group))


class OtherExamples(LossResults):
    """A loss whose examples are those of another dataset."""

    def __init__(self, results: LossResults, examples: xr.Dataset) -> None:
        super().__init__(results.path, results.manifest, results.name)
        self._examples = examples

    @property
    def examples(self) -> xr.Dataset:
        return self._examples


def by_element(examples: xr.Dataset, parts: int) -> xr.Dataset:
    """The examples as if so many elements had made each of them, in shares that differ."""
    share = np.arange(1, parts + 1) / np.arange(1, parts + 1).sum()
    count = examples.sizes["example"]
    spread = examples.isel(example=np.repeat(np.arange(count), parts))
    factor = xr.DataArray(np.tile(share, count) * parts, dims="example")
    for name in ("allocated", "loss_start", "loss_end", "residual"):
        spread[name] = (spread[name] * factor).transpose(*spread[name].dims)
    numbers = spread["example"].values
    spread = spread.rename(example="element").drop_vars("element")
    return spread.assign_coords(
        example=("element", numbers), index=("element", np.tile(np.arange(parts), count))
    )


def patched(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    """Give the loss `train` of every run the dataset."""
    refuse: Callable[[LossResults], xr.Dataset] = LossResults.examples.fget  # type: ignore[attr-defined]

    def examples(results: LossResults) -> xr.Dataset:
        return told.examples if results.name == "train" else refuse(results)

    monkeypatch.setattr(LossResults, "examples", property(examples))


def each_example(examples: xr.Dataset) -> Iterator[tuple[int, np.ndarray]]:
    """The losses of each example at the start and at the end of every segment."""
    for number in range(examples.sizes["example"]):
        one = examples.isel(example=number)
        yield number, np.append(one["loss_start"].values[:1], one["loss_end"].values).astype(float)
