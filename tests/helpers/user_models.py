"""Models as users write them, as data; and their replay, held against the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Run, Task, run
from lca_posthoc.cluster import broadcast
from lca_posthoc.numerics.settings import DEFAULTS
from lca_posthoc.replay.requests import DescribeRequest, RunSettings, TaskSetup, to_plain
from lca_posthoc.replay.worker import describe, state
from lca_posthoc.tasks.task import pack_task

from .model_cases import Batch, Values, classes
from .oracle import Oracle, simpson
from .replayed_cases import arrays, worst_error

BOUND, BATCH = 1e-5, 7  # numerics 7, float32
GENERATOR = torch.Generator().manual_seed(8)
INPUTS, TEACHER = torch.randn(23, 12, generator=GENERATOR), torch.randn(12, 4, generator=GENERATOR)
OTHERS = torch.randn(23, 12, generator=GENERATOR)
TARGETS = (INPUTS @ TEACHER).argmax(1)
IMAGES = torch.randn(23, 2, 6, 6, generator=GENERATOR)
VECTORS = (INPUTS, TARGETS)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [each for each in model.parameters() if each.requires_grad], "lr": 0.1}]


@dataclass(frozen=True)
class Met:
    """A model with its data and its loss, the same loss for the oracle, and how its parameters are
    optimised.

    `trained` is what was trained where that is not what `build` gives.
    """

    build: Callable[[], nn.Module]
    data: Batch | Mapping[str, Tensor] = VECTORS
    loss: Loss = Loss(F.cross_entropy)  # noqa: RUF009 - frozen
    values: Values = classes
    groups: Sequence[int] | None = None
    norm_stats: str = "running"
    optimised: Callable[[nn.Module], list[dict[str, Any]]] = one_group
    trained: Callable[[], nn.Module] | None = None

    @property
    def columns(self) -> Batch:
        return tuple(self.data.values()) if isinstance(self.data, Mapping) else self.data

    def task(self, **more: Any) -> Task:
        return Task(self.build, {"train": self.data}, {"train": self.loss}, **more)

    def record(
        self, directory: Path, part: Callable[[nn.Module], nn.Module] = lambda model: model
    ) -> Path:
        """Train for three steps by SGD with momentum and save every iterate, of a part of the model
        where one is given.
        """
        with seeded(4):
            model = (self.trained or self.build)().train()
            optimizer = torch.optim.SGD(self.optimised(model), momentum=0.9)
            recorder = Recorder(directory, part(model))
            recorder.save(0)
            for step in range(1, 4):
                chosen = torch.randperm(23)[:16]
                optimizer.zero_grad()
                self.values(model, tuple(each[chosen] for each in self.columns)).mean().backward()
                optimizer.step()
                recorder.save(step)
        return directory


def replay(
    met: Met, iterates: Path, out: Path, *, task: Task | None = None, **settings: Any
) -> Run:
    fixed = {
        "cluster": "inline",
        "device": "cpu",
        "tolerance": math.inf,
        "norm_stats": met.norm_stats,
    }
    return run(iterates, task or met.task(), out=out, **{"batch_size": BATCH, **fixed, **settings})


def points(iterates: Path, met: Met) -> list[dict[str, Tensor]]:
    """Every tensor at every checkpoint: what files do not hold is as the model was built."""
    model = (met.trained or met.build)()
    built = {
        name: each.detach() for name, each in [*model.named_parameters(), *model.named_buffers()]
    }
    return [{**built, **load_file(path)} for path in sorted(iterates.glob("*.safetensors"))]


def assert_the_oracle_agrees(met: Met, replayed: Run, iterates: Path) -> None:
    """Allocations within numerics 7's bound and losses, of every group; what has no variable cannot
    have moved the loss.
    """
    results = replayed["train"]
    given = list(met.groups) if met.groups is not None else [0] * 23
    for group, label in enumerate(sorted(set(given))):
        mine = [row for row, each in enumerate(given) if each == label]
        size = BATCH if met.norm_stats == "batch" else None
        judge = Oracle(
            met.trained or met.build,
            tuple(each[mine] for each in met.columns),
            met.values,
            norm_stats=met.norm_stats,
            batch_size=size,
        )
        truth = judge.allocate(points(iterates, met), *simpson(2))
        wanted = {name: each.numpy() for name, each in truth.stacked().items()}
        at = (slice(None), *([group] if met.groups is not None else []))
        found = {name: each[at] for name, each in arrays(results.allocation).items()}
        assert {name: each.shape for name, each in found.items()} == {
            name: wanted[name].shape for name in found
        }
        assert not any(wanted[name].any() for name in wanted.keys() - found.keys())
        assert worst_error(found, {name: wanted[name] for name in found}) <= BOUND
        path = [
            *results.steps["loss_start"].values[at],
            results.steps["loss_end"].values[-1:][at][0],
        ]
        assert path == pytest.approx(truth.losses, rel=1e-6)


def frozen() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)
    )
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def at_different_rates(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [model[0].bias], "lr": 0.5},
        {"params": [model[2].weight], "lr": 1e-3},
        {"params": list(model[4].parameters()), "lr": 0.1, "weight_decay": 0.1},
    ]


class Tied(nn.Module):
    """One matrix in two layers, and once more as its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.other(torch.tanh(self.one(x)))) @ self.one.weight)


class Buffers(nn.Module):
    """A counter, and buffers that are read: one that moves, two that do not, two that no checkpoint
    holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.register_buffer("centre", torch.zeros(12))
        self.register_buffer("slope", torch.linspace(0.5, 1.5, 12))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("order", torch.arange(11, -1, -1).roll(3))
        self.register_buffer("places", torch.sin(torch.arange(12) / 3), persistent=False)
        self.register_buffer("chosen", torch.arange(11, -1, -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre.mul_(0.8).add_(0.2 * x.mean(0))
            self.seen += 1
        placed = ((x - self.centre) * self.slope)[:, self.order] + self.places
        return self.linear(torch.tanh(placed)[:, self.chosen] * torch.linspace(0.1, 2, 12))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(9), nn.Tanh(), nn.LazyLinear(4))


def not_lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, *, left: Tensor, right: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {
            "score": scale * (torch.tanh(self.left(left)) * torch.tanh(self.right(right))).sum(1)
        }


def keyword_values(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return (
        model(left=batch["left"], right=batch["right"], scale=2.0)["score"] - batch["score"]
    ) ** 2


def tuple_values(model: nn.Module, batch: Batch) -> Tensor:
    return keyword_values(model, dict(zip(("left", "right", "score"), batch, strict=True)))


def normed(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A layer of four channels between convolutions, so that what it does is not undone by what
    follows.
    """
    return lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3),
        norm(),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 4),
    )


NORMS: dict[str, Callable[[], nn.Module]] = {
    "SyncBatchNorm": partial(nn.SyncBatchNorm, 4),
    "InstanceNorm2d, tracking": partial(
        nn.InstanceNorm2d, 4, affine=True, track_running_stats=True
    ),
    "InstanceNorm2d": partial(nn.InstanceNorm2d, 4),
    "InstanceNorm2d, affine": partial(nn.InstanceNorm2d, 4, affine=True),
    "GroupNorm": partial(nn.GroupNorm, 2, 4),
    "LayerNorm": partial(nn.LayerNorm, [4, 4, 4]),
    "BatchNorm2d, affine=False": partial(nn.BatchNorm2d, 4, affine=False),
}
UNTRACKED: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": partial(nn.BatchNorm2d, 4, track_running_stats=False),
    "BatchNorm2d, affine=False": partial(
        nn.BatchNorm2d, 4, affine=False, track_running_stats=False
    ),
    "SyncBatchNorm": partial(nn.SyncBatchNorm, 4, track_running_stats=False),
}


class DropPath(nn.Module):
    """A residual branch that is left out of some examples while the model is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        kept = (torch.rand(len(x), 1) < 0.6) / 0.6 if self.training else 1.0
        return x + torch.tanh(self.branch(x)) * kept


def stochastic_depth() -> nn.Module:
    return nn.Sequential(DropPath(), DropPath(), nn.Linear(12, 4))


class Turned(nn.Module):
    """Pairs of features turned in the plane by complex tables, as rotary embeddings are; one of
    them is in the checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(12, 12), nn.Linear(12, 4)
        angles = torch.linspace(0.3, 2.5, 6)
        self.register_buffer("table", torch.polar(torch.ones(6), angles), persistent=False)
        self.register_buffer("stored", torch.polar(torch.linspace(0.5, 1.5, 6), angles.flip(0)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.one(x).reshape(-1, 6, 2)) * self.table * self.stored
        return self.other(torch.tanh(torch.view_as_real(pairs).flatten(1)))


class ReturnsNothing(nn.Module):
    """Its own train() and eval() return None, as many do that forget."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(12, 4), nn.Dropout(0.5)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def eval(self) -> None:  # type: ignore[override]
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(x))


class Filter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter, self.linear = (
            nn.Parameter(torch.randn(7, dtype=torch.complex64)),
            nn.Linear(12, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * self.filter)))


class Merging(nn.Module):
    """A low-rank adapter that eval() adds to the weight once, as loralib's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12) * 0.3, requires_grad=False)
        self.down, self.up = nn.Parameter(torch.randn(2, 12)), nn.Parameter(torch.zeros(4, 2))
        self.bias, self.merged = nn.Parameter(torch.zeros(4)), False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        found = F.linear(x, self.weight, self.bias)
        return found if self.merged else found + x @ self.down.T @ self.up.T


class Cached(nn.Module):
    """Its weight is computed once in eval mode, as in layers that constrain theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.kept = nn.Parameter(torch.randn(4, 12)), None

    def train(self, mode: bool = True) -> Cached:
        self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x @ torch.tanh(self.raw).T
        if self.kept is None:
            self.kept = torch.tanh(self.raw).detach()
        return x @ self.kept.T


class CachedInPart(Cached):
    """The same with a bias that is looked up anew."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class Auxiliary(nn.Module):
    """A second head that only training looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.second = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.second(x) if self.training else self.head(x)


def sparse(is_sparse: bool = True) -> nn.Module:
    """Rows that are looked up several times in a batch, whose gradients add up."""
    return nn.Sequential(
        nn.Embedding(5, 6, sparse=is_sparse), nn.Flatten(), nn.Tanh(), nn.Linear(18, 4)
    )


class Untied(nn.Module):
    """What `Tied` is taken for: the two layers start equal and are trained apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        with torch.no_grad():
            self.other.weight.copy_(self.one.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.other(torch.tanh(self.one(x)))) @ self.one.weight)


def weighted_by_the_model(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    values = classes(model, batch)
    return values, torch.exp(-values)


def weighted_by_the_detached_model(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    values, weights = weighted_by_the_model(model, batch)
    return values, weights.detach()


MET = {
    "frozen parameters, groups of learning rates": Met(frozen, optimised=at_different_rates),
    "tied weights": Met(Tied),
    "tied weights, a loss with groups": Met(
        Tied, loss=Loss(F.cross_entropy, group_by=TARGETS), groups=TARGETS.tolist()
    ),
    "buffers": Met(Buffers),
    "lazy layers": Met(lazy, trained=not_lazy),
    "inputs by keyword": Met(
        ByKeyword,
        {"left": INPUTS, "right": OTHERS, "score": INPUTS[:, 0]},
        Loss(call=keyword_values),
        tuple_values,
    ),
    "stochastic depth": Met(stochastic_depth),
    "complex buffers": Met(Turned),
    "sparse gradients": Met(
        sparse,
        (INPUTS[:, :3].gt(0) * torch.tensor([1, 2, 1]), TARGETS),
        trained=partial(sparse, False),
    ),
    "sparse gradients, a loss with groups": Met(
        sparse,
        (INPUTS[:, :3].gt(0) * torch.tensor([1, 2, 1]), TARGETS),
        Loss(F.cross_entropy, group_by=TARGETS),
        groups=TARGETS.tolist(),
        trained=partial(sparse, False),
    ),
    **{name: Met(normed(norm), (IMAGES, TARGETS)) for name, norm in NORMS.items()},
    **{
        f"{name}, batch statistics": Met(normed(norm), (IMAGES, TARGETS), norm_stats="batch")
        for name, norm in NORMS.items()
        if "Batch" in name
    },
    **{
        f"{name}, no statistics, batch statistics": Met(
            normed(norm), (IMAGES, TARGETS), norm_stats="batch"
        )
        for name, norm in UNTRACKED.items()
    },
}


def eager_backend(graph: Any, inputs: Any) -> Any:
    return graph.forward


class Adapted(nn.Module):
    """A base that stays as it was built, and an adapter of low rank beside it."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        if seed is None:
            self.base = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10))
        else:
            with seeded(seed):
                self.base = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10))
        self.base.requires_grad_(False).eval()
        self.adapter = nn.Sequential(nn.Linear(12, 2, bias=False), nn.Linear(2, 10, bias=False))
        self.head = nn.Linear(10, 4)

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + self.adapter(x)))


def from_file() -> nn.Module:
    """The base has the same float32 numbers whatever the default dtype, as one that is loaded from
    a file.
    """
    model, generator = Adapted(0), torch.Generator().manual_seed(3)
    for each in model.base.parameters():
        with torch.no_grad():
            each.copy_(0.3 * torch.randn(each.shape, generator=generator, dtype=torch.float32))
    return model


ADAPTED = {
    "from a file": Met(from_file),
    "seeded": Met(partial(Adapted, 0)),
    "at random": Met(partial(Adapted, None)),
}


def answers(task: Task | Path, held: list[str] | None = None) -> list[dict[str, Any]]:
    """Return what two processes say of a task: the one that probes it, and one that gets the
    digests of the first.
    """
    settings = RunSettings.of(
        {**DEFAULTS, "device": "cpu", "path_band": "off", "batch_size": BATCH}
    )
    entry, data = pack_task(task)
    broadcast.take_in("parcel", data)
    setup = TaskSetup(
        task=entry, parcel="parcel", settings=settings, losses=[], stored=held, digests={}
    )
    state._STATES.clear()
    first = describe(to_plain(DescribeRequest(setup=setup)))
    state._STATES.clear()
    second = describe(to_plain(DescribeRequest(setup=replace(setup, digests=first["digests"]))))
    state._STATES.clear()
    return [first, second]
