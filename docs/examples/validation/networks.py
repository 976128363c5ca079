"""The networks of the validation: how each is built, trained, recorded and replayed.

All four are those of the other examples, at a size of which a training takes seconds to a minute
on one core.
"""

from __future__ import annotations

import copy
import importlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import lca_posthoc as lca

Batch = dict[str, Tensor]  # its entry "kind" says of what class, or by whom, each example is
Weights = dict[str, Tensor]
CHARACTERS = 32
OTHER = 10_000  # added to a seed where another order of batches is asked for

sys.path.append(str(Path(__file__).parent.parent))  # the other examples


@dataclass(frozen=True)
class Size:
    """How many steps a network is trained for, on how many examples, how many at a time; and on how
    many of these, the first ones, its loss is measured.
    """

    steps: int
    examples: int
    batch: int
    measured: int


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network: its examples, its loss and its optimiser.

    `values(model, batch)` gives the loss of every element of a batch and the weights of these
    elements. `replay` holds the settings of `lca_posthoc.run` that are its own. A network whose
    normalisations take the statistics of their batch is measured in one batch.
    """

    build: Callable[[], nn.Module]
    examples: Callable[[], Batch]
    values: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    size: Size
    batch_statistics: bool = False
    replay: Mapping[str, Any] = field(default_factory=dict)

    def training_examples(self) -> Batch:
        return {
            name: values[: self.size.examples].clone() for name, values in self.examples().items()
        }

    def measured_examples(self) -> Batch:
        return {
            name: values[: self.size.measured].clone() for name, values in self.examples().items()
        }


def example(name: str) -> ModuleType:
    """Import another of the examples."""
    return importlib.import_module(name)


@cache
def digits() -> Batch:
    images, labels = example("mnist_fc").data()
    return {"images": images, "kind": labels}


@cache
def pictures() -> Batch:
    images, labels = example("cifar10_resnet20").data()
    return {"images": images, "kind": labels}


@cache
def speeches() -> Batch:
    """The first characters of speeches, one of each speaker after the other; their kind is who
    speaks.
    """
    columns, speakers = example("tiny_shakespeare").data()
    names = sorted(set(speakers))
    kinds = torch.tensor([names.index(speaker) for speaker in speakers])
    order = torch.arange(len(kinds)).reshape(len(names), -1).T.flatten()
    return {
        **{name: values[order, :CHARACTERS] for name, values in columns.items()},
        "kind": kinds[order],
    }


def of_images(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of every image, and weights of one."""
    values = F.cross_entropy(model(batch["images"]), batch["kind"], reduction="none")
    return values, torch.ones_like(values)


def of_characters(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of every character but the first, and 0 as the weight of padding."""
    text = {name: values for name, values in batch.items() if name != "kind"}
    values, weights = example("tiny_shakespeare").next_character(model, text)
    return values, weights.to(values.dtype)


def of_kind(
    model: nn.Module,
    batch: Batch,
    values: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
    kind: int,
) -> tuple[Tensor, Tensor]:
    """Return the values of a loss, and 0 as the weight of every example of another kind."""
    losses, weights = values(model, batch)
    chosen = (batch["kind"] == kind).reshape(-1, *[1] * (weights.ndim - 1))
    return losses, weights * chosen


def perceptron() -> nn.Module:
    return example("mnist_fc").Net()


def lenet() -> nn.Module:
    return example("mnist_lenet").Net()


def resnet8() -> nn.Module:
    return example("cifar10_resnet20").Net((8, 16, 32), 1)


def transformer() -> nn.Module:
    return example("tiny_shakespeare").build()


SGD = partial(torch.optim.SGD, momentum=0.9)
NETWORKS = {
    "mnist_fc": Network(
        build=perceptron,
        examples=digits,
        values=of_images,
        optimizer=partial(SGD, lr=0.05),
        size=Size(steps=60, examples=2000, batch=100, measured=1000),
    ),
    "lenet": Network(
        build=lenet,
        examples=digits,
        values=of_images,
        optimizer=partial(SGD, lr=0.02),
        size=Size(steps=24, examples=1000, batch=50, measured=100),
    ),
    "resnet8": Network(
        build=resnet8,
        examples=pictures,
        values=of_images,
        optimizer=partial(SGD, lr=0.05),
        size=Size(steps=30, examples=1000, batch=50, measured=150),
        batch_statistics=True,
        replay={"norm_stats": "batch", "tolerance": 0.01},
    ),
    "transformer": Network(
        build=transformer,
        examples=speeches,
        values=of_characters,
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        size=Size(steps=40, examples=128, batch=16, measured=32),
    ),
}


# --- training -------------------------------------------------------------------------------------


class Training:
    """A training that can be stopped, copied and gone on with under other conditions.

    Its seed decides the initial weights, the order of the batches, and what dropout leaves out at
    every step, whatever was done at the steps before.
    """

    def __init__(self, network: Network, seed: int) -> None:
        torch.manual_seed(seed)
        self.network, self.seed, self.step = network, seed, 0
        self.model = network.build().train()
        self.optimizer = network.optimizer(self.model.parameters())
        self.examples, size = network.training_examples(), network.size
        self.batches = list(example("mnist_fc").batches(size.examples, size.batch, size.steps))

    def copy(self) -> Training:
        """Return the training as it stands, to be gone on with apart from this one."""
        branch = copy.copy(self)
        branch.model, branch.optimizer = copy.deepcopy((self.model, self.optimizer))
        return branch

    def with_other_batches(self) -> Training:
        """Return a copy that goes on with other batches, and leaves out other elements."""
        other = self.copy()
        other.seed += OTHER
        other.batches = Training(self.network, other.seed).batches
        return other

    def weights(self) -> Weights:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def run(
        self,
        until: int,
        factors: Mapping[str, Tensor] | None = None,
        skipped: Collection[int] = (),
    ) -> Training:
        """Train up to a step.

        Args:
            until: the number of steps made in all at the end.
            factors: of some parameters, what their motion is multiplied with at every step: 0
                freezes, 2 doubles the learning rate.
            skipped: steps that are left out, with their batches.
        """
        for step in range(self.step, until):
            if step not in skipped:
                self._advance(step, factors or {})
        self.step = until
        return self

    def batch_loss(self, step: int) -> Tensor:
        """Return the loss that a step of this training goes down."""
        rows = self.batches[step]
        torch.manual_seed(1_000_003 * (self.seed + 1) + step)  # what dropout leaves out
        batch = {name: values[rows] for name, values in self.examples.items()}
        values, weights = self.network.values(self.model, batch)
        return (values * weights).sum() / weights.sum()

    def _advance(self, step: int, factors: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        before = {name: parameters[name].detach().clone() for name in factors}
        self.optimizer.zero_grad()
        self.batch_loss(step).backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, factor in factors.items():
                parameters[name].copy_(torch.lerp(before[name], parameters[name], factor))


def recorded(place: Path, network: Network, seed: int) -> Path:
    """Train a network and record every iterate below `place`, unless that is done."""
    checkpoints, unfinished = place / f"seed{seed}", place / f"seed{seed}.partial"
    if not checkpoints.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        training = Training(network, seed)
        with lca.Recorder(unfinished, training.model) as recorder:
            recorder.attach(training.optimizer)
            training.run(network.size.steps)
        unfinished.rename(checkpoints)
    return checkpoints


def iterates(checkpoints: Path) -> list[Weights]:
    """Return the tensors of all iterates."""
    return [
        {name: value for file in checkpoint.files for name, value in load_file(file).items()}
        for checkpoint in lca.open_trajectory(checkpoints).checkpoints
    ]


def replayed(
    checkpoints: Path, network: Network, name: str, kind: int | None = None, **settings: Any
) -> lca.Run:
    """Replay a training, or open its replay where that is done; the loss is called "train".

    Args:
        checkpoints: what was recorded.
        network: what was trained.
        name: what the replay is called.
        kind: the loss is over the examples of this kind alone; over all without.
        settings: of `lca_posthoc.run`.
    """
    values = network.values
    if kind is not None:
        values = partial(of_kind, values=network.values, kind=kind)
    task = lca.Task(
        network.build,
        {"train": network.measured_examples()},
        {"train": lca.Loss(call=values, on="train")},
    )
    whole_batch = {"batch_size": network.size.measured} if network.batch_statistics else {}
    return lca.run(
        checkpoints,
        task,
        out=checkpoints.with_name(f"{checkpoints.name}-{name}.lca"),
        cluster="inline",
        device="cpu",
        durability="none",  # a power cut costs one short run
        progress=lambda event: None,
        **{**network.replay, **whole_batch, **settings},
    )
