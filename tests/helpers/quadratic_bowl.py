"""A quadratic bowl whose every allocation is known in closed form, replayed into a run.

L_g(θ) = ½ Σᵢ kᵢ (θᵢ − cᵢ − g/4)² for group g, so that A[t, g, i] = ½ kᵢ ((θ'ᵢ − m)² − (θᵢ − m)²)
exactly. All numbers are multiples of 1/16 or so: float32 rounds none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lca_posthoc import Loss, Run, Task, run

SEGMENTS = 24
SHAPES = {
    "first.weight": (3, 4),
    "first.bias": (3,),
    "first.shift": (3,),
    "norm.weight": (3,),
    "body.conv.weight": (2, 3, 2, 2),
    "body.conv.bias": (2,),
}
BUFFER = "first.shift"
KINDS = ("frozen", "helping", "hurting", "oscillating", "random")
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
COUNTS = (3, 1)  # examples of group 0 and 1
_GENERATOR = np.random.default_rng(5)
CURVATURE = _GENERATOR.integers(1, 5, SIZE) / 4.0
CENTRE = np.where(np.arange(SIZE) % len(KINDS) < 4, 0.0, _GENERATOR.integers(-8, 8, SIZE) / 8.0)


def kind(at: int) -> str:
    """What the element at a flat position does; the first unit of `body.conv` is frozen
    altogether.
    """
    begin, weights = offset("body.conv.weight"), 12
    if begin <= at < begin + weights or at == offset("body.conv.bias"):
        return "frozen"
    return KINDS[at % len(KINDS)]


def offset(name: str) -> int:
    """Where a tensor begins among all elements."""
    names = list(SHAPES)
    return sum(int(np.prod(SHAPES[each])) for each in names[: names.index(name)])


def path() -> np.ndarray:
    """θ, (SEGMENTS + 1, SIZE)."""
    found = np.zeros((SEGMENTS + 1, SIZE))
    random = np.cumsum(_rng().integers(-2, 3, found.shape), axis=0) / 16
    for at in range(SIZE):
        t = np.arange(SEGMENTS + 1)
        found[:, at] = {
            "frozen": np.full(len(t), 0.5),
            "helping": 4 - t / 16,
            "hurting": -1 - t / 16,
            "oscillating": np.where(t % 2, -0.25, 1.0),
            "random": random[:, at],
        }[kind(at)]
    return found


def _rng() -> np.random.Generator:
    return np.random.default_rng(7)


def middle(group: int) -> np.ndarray:
    """Where the loss of a group is least, (SIZE,)."""
    return CENTRE + group / 4


def allocations() -> np.ndarray:
    """A by (segment, group, element)."""
    theta = path()
    rows = [
        CURVATURE / 2 * ((theta[1:] - middle(g)) ** 2 - (theta[:-1] - middle(g)) ** 2)
        for g in (0, 1)
    ]
    return np.stack(rows, axis=1)


def whole() -> np.ndarray:
    """A of the loss over all examples, (segment, element)."""
    return np.average(allocations(), axis=1, weights=COUNTS)


def losses() -> np.ndarray:
    """The loss at every checkpoint, (SEGMENTS + 1, group)."""
    return np.stack([(CURVATURE / 2 * (path() - middle(g)) ** 2).sum(1) for g in (0, 1)], axis=1)


def gradients() -> np.ndarray:
    """The mean gradient of the loss over all examples along each segment, (segment, element)."""
    theta = path()
    mean = np.average([middle(0), middle(1)], axis=0, weights=COUNTS)
    return CURVATURE * ((theta[1:] + theta[:-1]) / 2 - mean)


def part(name: str, values: np.ndarray) -> np.ndarray:
    """The elements of a tensor, in its own shape."""
    begin, shape = offset(name), SHAPES[name]
    return values[..., begin : begin + int(np.prod(shape))].reshape(*values.shape[:-1], *shape)


def members(layer: str, *, buffers: bool = True) -> Iterator[tuple[str, int]]:
    """Names and flat positions of the elements of a module."""
    for name, shape in SHAPES.items():
        if name.rpartition(".")[0] == layer and (buffers or name != BUFFER):
            for at in range(offset(name), offset(name) + int(np.prod(shape))):
                yield name, at


class Net(torch.nn.Module):
    """Only names and shapes matter."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            module: torch.nn.Module = self
            *parents, last = name.split(".")
            for parent in parents:
                if parent not in dict(module.named_children()):
                    module.add_module(parent, torch.nn.Module())
                module = module.get_submodule(parent)
            if name == BUFFER:
                module.register_buffer(last, torch.zeros(shape))
            else:
                module.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))

    def elements(self) -> torch.Tensor:
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return torch.cat([held[name].reshape(-1) for name in SHAPES])


def values(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    centre = torch.tensor(CENTRE, dtype=torch.float32) + batch[1][:, None] / 4
    return (
        torch.tensor(CURVATURE, dtype=torch.float32) / 2 * (model.elements() - centre) ** 2
    ).sum(1)


def task() -> Task:
    labels = torch.tensor([0] * COUNTS[0] + [1] * COUNTS[1])
    data = (torch.zeros(len(labels), 1), labels)
    return Task(
        model=Net,
        data={"train": data, "validation": tuple(each[-COUNTS[1] :] for each in data)},
        losses={
            "train": Loss(call=values, on="train"),
            "validation": Loss(call=values, on="validation"),
            "groups": Loss(call=values, on="train", group_by=lambda inputs, targets: targets),
        },
    )


@dataclass(frozen=True)
class Bowl:
    checkpoints: Path
    run: Run


def record(directory: Path, segments: int = SEGMENTS) -> Path:
    directory.mkdir(exist_ok=True)
    for step, theta in enumerate(path()[: segments + 1]):
        tensors = {
            name: torch.tensor(part(name, theta), dtype=torch.float32).contiguous()
            for name in SHAPES
        }
        save_file(tensors, directory / f"step_{step}.safetensors")
    return directory


def replay(directory: Path, keep: str = "parameters") -> Bowl:
    checkpoints = record(directory / "ck")
    opened = run(
        checkpoints,
        task(),
        losses=["all"],
        cluster="inline",
        keep=keep,
        out=directory / f"{keep}.lca",
    )
    return Bowl(checkpoints, opened)
