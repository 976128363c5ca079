"""Models as they are met: each is allocated as the oracle says, or refused with its culprit
named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lca_posthoc import Loss, Recorder, Run, Task, run
from lca_posthoc.cluster import broadcast
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.objective import Objective
from lca_posthoc.progress import Note
from lca_posthoc.requests import DescribeRequest, RunSettings, TaskSetup, to_plain
from lca_posthoc.settings import DEFAULTS
from lca_posthoc.task import pack
from lca_posthoc.worker import describe, state

from .helpers.cli import says
from .helpers.model_cases import Batch, Values, classes
from .helpers.oracle import Oracle, simpson
from .test_numerics import arrays, worst_error

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


# --- models
# ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", MET)
def test_a_model_is_allocated_as_the_oracle_says(tmp_path: Path, name: str) -> None:
    met = MET[name]
    iterates = met.record(tmp_path / "iterates")
    replayed = replay(met, iterates, tmp_path / "run")
    assert_the_oracle_agrees(met, replayed, iterates)
    assert all(
        each.any()
        for key, each in arrays(replayed["train"].allocation).items()
        if moved(iterates, key)
    )


def moved(iterates: Path, name: str) -> bool:
    first, *_, last = (load_file(path)[name] for path in sorted(iterates.iterdir()))
    # a bias before a normalisation has no effect
    return not torch.equal(first, last) and name != "0.bias"


def test_frozen_parameters_get_nothing_and_the_others_do(tmp_path: Path) -> None:
    met = MET["frozen parameters, groups of learning rates"]
    found = arrays(
        replay(met, met.record(tmp_path / "iterates"), tmp_path / "run")["train"].allocation
    )
    assert [name for name, each in found.items() if not each.any()] == ["0.weight", "2.bias"]


def test_buffers_have_a_variable_where_they_float_and_are_stored(tmp_path: Path) -> None:
    met = MET["buffers"]
    found = arrays(
        replay(met, met.record(tmp_path / "iterates"), tmp_path / "run")["train"].allocation
    )
    assert found.keys() == {"linear.weight", "linear.bias", "centre", "slope"}
    assert found["centre"].any()
    assert not found["slope"].any()


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_complex_buffers_are_complex_in_every_precision(tmp_path: Path, precision: str) -> None:
    met = MET["complex buffers"]
    iterates = met.record(tmp_path / "iterates")
    replayed = replay(met, iterates, tmp_path / "run", precision=precision)
    truth = Oracle(met.build, met.columns, met.values).allocate(points(iterates, met), *simpson(2))
    rel = 1e-6 if precision == "float64" else 2e-2
    assert replayed["train"].steps["loss_start"].values == pytest.approx(truth.losses[:-1], rel=rel)


def test_a_complex_loss_module_keeps_its_imaginary_part() -> None:
    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turn", torch.polar(torch.ones(2), torch.ones(2)))

    on = Loss(Turn()).on_device(torch.device("cpu"), torch.float64)
    assert torch.equal(on.fn.turn, Turn().turn.to(torch.complex128))


def test_complex_parameters_are_refused_with_the_way_to_keep_them(tmp_path: Path) -> None:
    met = Met(Filter)
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(
        str(caught.value), "parameter 'filter' is complex", "shape [7, 2]", "torch.view_as_complex"
    )
    assert not (tmp_path / "run").exists()


def test_a_model_whose_eval_returns_nothing_is_put_into_eval_mode(tmp_path: Path) -> None:
    met = Met(ReturnsNothing)
    iterates = tmp_path / "iterates"
    model = nn.ModuleDict({"linear": nn.Linear(12, 4)})
    with Recorder(iterates, model) as recorder:
        for step in range(3):
            recorder.save(step)
            with torch.no_grad():
                model["linear"].weight.mul_(0.9)
    replayed = replay(met, iterates, tmp_path / "run")
    losses = []
    for path in sorted(iterates.glob("*.safetensors"))[:-1]:
        held = {name: each.double() for name, each in load_file(path).items()}
        logits = INPUTS.double() @ held["linear.weight"].T + held["linear.bias"]
        losses.append(float(F.cross_entropy(logits, TARGETS)))
    assert replayed["train"].steps["loss_start"].values == pytest.approx(losses, rel=1e-6)


def test_parameters_that_move_without_the_loss_depending_on_them_are_named(tmp_path: Path) -> None:
    met, heard = Met(Auxiliary), list[Any]()
    iterates = met.record(tmp_path / "iterates")
    replayed = replay(met, iterates, tmp_path / "run", progress=heard.append)
    assert_the_oracle_agrees(met, replayed, iterates)
    assert not arrays(replayed["train"].allocation)["second.weight"].any()
    assert [event.text for event in heard if isinstance(event, Note)] == [
        "tensors moved without loss 'train' depending on them (allocated 0): second.bias, "
        "second.weight"
    ]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Merging, ("at the last checkpoint", "Build it")),
        (CachedInPart, ("at the last checkpoint", "Build it")),
        (Cached, ("no gradient",)),
    ],
)
def test_modules_that_derive_weights_when_set_to_eval_are_refused(
    tmp_path: Path, build: Callable[[], nn.Module], words: tuple[str, ...]
) -> None:
    met = Met(build)
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(str(caught.value), "loss 'train'", "merges or caches weights in eval mode", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (weighted_by_the_model, "weights that depend on the model"),
        (weighted_by_the_detached_model, "it depends on the model"),
    ],
)
def test_weights_that_depend_on_the_model_are_refused_detached_or_not(
    tmp_path: Path, call: Any, words: str
) -> None:
    """Detached they are other constants at every point, and the loss is not the function whose
    gradient is taken.
    """
    met = Met(partial(nn.Linear, 12, 4), loss=Loss(call=call))
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(str(caught.value), "loss 'train'", words)
    assert not (tmp_path / "run").exists()


def summed(outputs: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.kl_div(outputs, targets, reduction=reduction)


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize(
    ("fn", "given"),
    [
        (nn.KLDivLoss(reduction="batchmean"), "batchmean"),
        (partial(F.kl_div, reduction="sum"), "sum"),
        (summed, "sum"),
        (nn.KLDivLoss(reduction="none"), None),
        (nn.KLDivLoss(), None),
        (F.kl_div, None),
    ],
    ids=[
        "batchmean, a module",
        "sum, a partial",
        "sum, by default",
        "none",
        "mean, a module",
        "mean",
    ],
)
def test_a_reduction_that_is_not_used_is_said_to_be_replaced(
    tmp_path: Path, fn: Any, given: str | None
) -> None:
    shares = OTHERS[:, :4].softmax(1)
    met, heard = Met(log_shares, (INPUTS, shares), Loss(fn), divergence), list[Any]()
    iterates = met.record(tmp_path / "iterates")
    replayed = replay(met, iterates, tmp_path / "run", progress=heard.append)
    assert_the_oracle_agrees(met, replayed, iterates)
    notes = [event.text for event in heard if isinstance(event, Note)]
    assert len(notes) == (given is not None)
    if given:
        says(
            notes[0],
            f"loss 'train' was given reduction={given!r}",
            "here it is the mean over its elements",
        )


def log_shares() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 4), nn.LogSoftmax(1))


def divergence(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over the four classes, as reduction="mean" has it."""
    inputs, shares = batch
    return (shares * (shares.log() - model(inputs))).mean(1)


def test_a_model_that_ties_what_was_trained_apart_is_refused_where_the_first_checkpoint_cannot_tell(
    tmp_path: Path,
) -> None:
    met = Met(Tied, trained=Untied)
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(
        str(caught.value),
        "'one.weight' and 'other.weight' differ",
        "(step 3)",
        "Build the model that was trained",
    )


def test_ties_are_not_looked_for_at_a_last_checkpoint_that_diverged(tmp_path: Path) -> None:
    met = MET["tied weights"]
    iterates = met.record(tmp_path / "iterates")
    for step, path in enumerate(sorted(iterates.glob("*.safetensors"))):
        held = load_file(path)
        held["one.weight"] = held["one.weight"] / (0 if step == 3 else 1)
        save_file({**held, "other.weight": held["one.weight"].clone()}, path)
    with pytest.raises(
        LCAError,
        match=r"1 span failed; the others are complete.* holds 144 NaN or "
        r"Inf",
    ):
        replay(met, iterates, tmp_path / "run", span=1)
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("norm", UNTRACKED)
def test_batch_norm_that_tracks_nothing_is_refused_where_statistics_are_the_stored_ones(
    tmp_path: Path, norm: str
) -> None:
    met = Met(normed(UNTRACKED[norm]), (IMAGES, TARGETS))
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(
        str(caught.value),
        "batch-norm layer",
        "track_running_stats=False",
        "--norm-stats batch --batch-size N",
    )
    assert not (tmp_path / "run").exists()


# --- networks beside the model
# --------------------------------------------------------------------------------------------


def teacher() -> nn.Module:
    """In eval mode, of statistics that are no batch's."""
    with seeded(7):
        made = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(64, 4),
        ).eval()
        for norm in (made[1], made[3]):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.2, 3)
    return made


def taught(teacher: nn.Module, dtype: torch.dtype, model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        wanted = teacher(batch[0].to(dtype)).softmax(1)
    return F.cross_entropy(model(batch[0]), wanted.to(batch[0]), reduction="none")


class Recomputed(nn.Module):
    """The normalised part runs once more during the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = normed(partial(nn.BatchNorm2d, 4))(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(checkpoint(self.part, x, use_reentrant=False)))


def normed_and_compiled() -> nn.Module:
    model = normed(partial(nn.BatchNorm2d, 4))()
    model[1].compile(backend=eager_backend)
    return model


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": normed(partial(nn.BatchNorm2d, 4)),
    "BatchNorm2d that tracks nothing": normed(
        partial(nn.BatchNorm2d, 4, track_running_stats=False)
    ),
    "InstanceNorm2d": normed(partial(nn.InstanceNorm2d, 4, affine=True, track_running_stats=True)),
    "recomputed": Recomputed,
    "compiled in place": normed_and_compiled,
}


@pytest.mark.parametrize("student", STUDENTS)
def test_batch_statistics_are_the_models_and_not_those_of_its_teacher(
    tmp_path: Path, student: str
) -> None:
    single, double = (
        partial(taught, teacher(), torch.float32),
        partial(taught, teacher().double(), torch.float64),
    )
    plain = STUDENTS["BatchNorm2d"] if student == "compiled in place" else None
    met = Met(
        STUDENTS[student],
        (IMAGES, TARGETS),
        Loss(call=single),
        double,
        norm_stats="batch",
        trained=plain,
    )
    iterates = replace(met, values=single).record(tmp_path / "iterates")
    assert_the_oracle_agrees(met, replay(met, iterates, tmp_path / "run"), iterates)


# --- what wraps a model
# --------------------------------------------------------------------------------------------------


def failing_backend(graph: Any, inputs: Any) -> Any:
    raise AssertionError("compiled")


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 4)
    )


def eager_backend(graph: Any, inputs: Any) -> Any:
    return graph.forward


def compiled() -> nn.Module:
    return torch.compile(with_batch_norm(), backend=failing_backend)


def parallel() -> nn.Module:
    return nn.DataParallel(with_batch_norm())


def compiled_in_place() -> nn.Module:
    model = with_batch_norm()
    model.compile(backend=eager_backend)
    return model


def compiled_in_parts() -> nn.Module:
    model = with_batch_norm()
    model[1] = torch.compile(model[1], backend=eager_backend)
    return model


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Iterates of a model that is wrapped in nothing, and their replay."""
    root, met = tmp_path_factory.mktemp("normal"), Met(with_batch_norm)
    iterates = met.record(root / "iterates")
    replayed = replay(met, iterates, root / "run")
    assert_the_oracle_agrees(met, replayed, iterates)
    return iterates, replayed


def same_bits(one: Run, other: Run) -> bool:
    found, wanted = (arrays(each["train"].allocation) for each in (one, other))
    return [each.tobytes() for each in found.values()] == [
        each.tobytes() for each in wanted.values()
    ]


@pytest.mark.parametrize("build", [compiled, parallel])
def test_a_wrapped_model_gives_the_numbers_of_the_plain_one_and_compiles_nothing(
    normal: tuple[Path, Run], tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    assert same_bits(replay(Met(build), normal[0], tmp_path / "run"), normal[1])


@pytest.mark.parametrize("build", [compiled_in_place, compiled_in_parts])
def test_code_compiled_inside_a_model_sees_the_normalisation_that_is_held(
    normal: tuple[Path, Run], tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    assert same_bits(replay(Met(build), normal[0], tmp_path / "run"), normal[1])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_a_wrapper_left_in_checkpoints_are_understood(
    normal: tuple[Path, Run], tmp_path: Path, prefix: str
) -> None:
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    for path in normal[0].iterdir():
        save_file(
            {prefix + name: each for name, each in load_file(path).items()}, wrapped / path.name
        )
    found = replay(Met(with_batch_norm), wrapped, tmp_path / "run")
    assert set(found["train"].allocation) == {"0.weight", "0.bias", "4.weight", "4.bias"} | {
        f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    }
    assert same_bits(found, normal[1])


# --- tensors checkpoints do not hold
# -------------------------------------------------------------------------------------


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


def adapter_of(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"adapter": model.adapter, "head": model.head})


@pytest.mark.parametrize(
    ("base", "fixed"),
    [("from a file", ["base.0.*", "bas?.1.*"]), ("seeded", ["base.*"])],
    ids=["from a file", "seeded"],
)
def test_a_fixed_base_is_a_constant_and_has_no_variable(
    tmp_path: Path, base: str, fixed: list[str]
) -> None:
    met = ADAPTED[base]
    iterates = met.record(tmp_path / "iterates", adapter_of)
    replayed = replay(met, iterates, tmp_path / "run", task=met.task(fixed=fixed))
    assert_the_oracle_agrees(met, replayed, iterates)
    held = {"adapter.0.weight", "adapter.1.weight", "head.weight", "head.bias"}
    assert set(arrays(replayed["train"].allocation)) == held
    assert {tensor.spec.name for tensor in replayed.manifest.tensors} == held


@pytest.mark.parametrize("base", ["from a file", "seeded"])
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_a_fixed_base_is_the_same_one_in_every_precision(
    tmp_path: Path, base: str, precision: str
) -> None:
    """torch draws other numbers from the same seed where the default dtype is float64."""
    met, heard = ADAPTED[base], list[Any]()
    iterates = met.record(tmp_path / "iterates", adapter_of)
    settings = {"precision": precision, "progress": heard.append}
    replayed = replay(met, iterates, tmp_path / "run", task=met.task(fixed=["base.*"]), **settings)
    assert [event.text for event in heard if isinstance(event, Note)] == []
    assert np.isfinite(replayed["train"].steps["precision_error"].values[0]) == (
        precision != "float64"
    )
    if precision != "bfloat16":
        assert_the_oracle_agrees(met, replayed, iterates)


def test_a_base_checkpoints_do_not_hold_is_missing_unless_it_is_fixed(tmp_path: Path) -> None:
    met = ADAPTED["from a file"]
    iterates = met.record(tmp_path / "iterates", adapter_of)
    trainable = Met(lambda: from_file().requires_grad_(True))
    with pytest.raises(InputError, match=r"'base\.0\.weight'.* is missing in .*step_00000000"):
        replay(trainable, iterates, tmp_path / "run")
    with pytest.raises(InputError, match=r"'base\.0\.weight'.* is missing in"):
        replay(trainable, iterates, tmp_path / "run", task=trainable.task(fixed=["base.1.*"]))
    # it is frozen, its statistics are not
    with pytest.raises(InputError, match=r"'base\.1\.running_mean'.* is missing in"):
        replay(met, iterates, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    replayed = replay(met, iterates, tmp_path / "run", task=met.task(fixed=["base.1.*"]))
    assert_the_oracle_agrees(met, replayed, iterates)


def test_a_pattern_of_fixed_that_matches_nothing_is_refused_with_what_there_is(
    tmp_path: Path,
) -> None:
    met = ADAPTED["from a file"]
    iterates = met.record(tmp_path / "iterates", adapter_of)
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run", task=met.task(fixed=["base.*", "backbone.*"]))
    says(str(caught.value), "Task.fixed names 'backbone.*'", "'base.0.weight'")


def test_a_fixed_tensor_the_checkpoints_do_hold_is_the_constant_it_is_there(tmp_path: Path) -> None:
    met = ADAPTED["from a file"]
    iterates = met.record(tmp_path / "iterates")
    replayed = replay(met, iterates, tmp_path / "run", task=met.task(fixed=["base.*"]))
    assert_the_oracle_agrees(met, replayed, iterates)
    assert not any(name.startswith("base.") for name in arrays(replayed["train"].allocation))


@pytest.mark.parametrize("step", [0, 3])
def test_a_fixed_tensor_that_is_another_one_in_the_checkpoints_is_refused(
    tmp_path: Path, step: int
) -> None:
    met = ADAPTED["from a file"]
    iterates = met.record(tmp_path / "iterates")
    path = iterates / f"step_{step:08}.safetensors"
    held = load_file(path)
    save_file({**held, "base.0.bias": held["base.0.bias"] + 1e-3}, path)
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run", task=met.task(fixed=["base.*"]))
    says(
        str(caught.value),
        "Task.fixed names 'base.0.bias'",
        f"(step {step})",
        "Leave it out of fixed",
    )
    assert not (tmp_path / "run").exists()


class Masked(nn.Module):
    """Attention over four places, none of which sees a later one; its mask is in the checkpoints,
    or a constant.
    """

    def __init__(self, stored: bool = True) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(3, 3), nn.Linear(12, 4)
        mask = torch.full((4, 4), -math.inf).triu(1)
        if stored:
            self.register_buffer("mask", mask)
        else:
            self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        places = x.reshape(-1, 4, 3)
        seen = (self.query(places) @ places.transpose(1, 2) + self.mask).softmax(-1)
        return self.out((seen @ places).flatten(1))


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_stored_mask_with_infinite_entries_is_taken_where_it_is_fixed(
    tmp_path: Path, precision: str
) -> None:
    met = Met(Masked)
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(
        InputError,
        match=r"'mask' holds 6 NaN or Inf .*named in "
        r"Task\(fixed=\['mask'\]\)",
    ):
        replay(met, iterates, tmp_path / "run")
    replayed = replay(
        met, iterates, tmp_path / "run", task=met.task(fixed=["mask"]), precision=precision
    )
    assert arrays(replayed["train"].allocation).keys() == {
        "query.weight",
        "query.bias",
        "out.weight",
        "out.bias",
    }
    for path in iterates.glob("*.safetensors"):
        save_file({name: each for name, each in load_file(path).items() if name != "mask"}, path)
    assert_the_oracle_agrees(Met(partial(Masked, False)), replayed, iterates)


# --- what differs between processes
# ----------------------------------------------------------------------------------------


class Features(nn.Module):
    """Random features in a buffer that no checkpoint holds."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        generator = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
        if seed is None:
            generator.seed()
        features = torch.randn(12, 9, generator=generator, dtype=torch.float32)
        self.register_buffer("features", features, persistent=False)
        self.linear = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cos(x @ self.features))


def answers(task: Task | Path, held: list[str] | None = None) -> list[dict[str, Any]]:
    """Return what two processes say of a task: the one that probes it, and one that gets the
    digests of the first.
    """
    settings = RunSettings.of({**DEFAULTS, "device": "cpu", "batch_size": BATCH})
    entry, data = pack(task)
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


SAME = {
    "a base from a file": ADAPTED["from a file"].task(fixed=["base.*"]),
    "a seeded base": ADAPTED["seeded"].task(fixed=["base.*"]),
    "seeded features": Met(partial(Features, 1)).task(),
}
OTHER = {
    "a base at random": (ADAPTED["at random"].task(fixed=["base.*"]), "Task.fixed"),
    "features at random": (Met(partial(Features, None)).task(), "features"),
}


def test_a_frozen_base_no_checkpoint_holds_that_is_another_one_in_every_process_is_refused() -> (
    None
):
    held = ["adapter.0.weight", "adapter.1.weight", "head.weight", "head.bias"]
    first, second = answers(ADAPTED["at random"].task(), held=held)
    assert first["frozen"] == ["base.0.weight", "base.0.bias", "base.1.weight", "base.1.bias"]
    says(
        second["error"]["message"],
        "frozen ones",
        "is not the same in this worker process",
        "at random",
    )
    assert [each.get("error") for each in answers(ADAPTED["seeded"].task(), held=held)] == [
        None,
        None,
    ]


@pytest.mark.parametrize("name", SAME)
def test_a_model_that_is_the_same_in_two_processes_is_taken(name: str) -> None:
    assert [answer.get("error") for answer in answers(SAME[name])] == [None, None]


@pytest.mark.parametrize("name", OTHER)
def test_a_model_that_is_another_one_in_every_process_is_refused(name: str) -> None:
    task, what = OTHER[name]
    first, second = answers(task)
    assert "error" not in first
    assert "error" in second
    says(second["error"]["message"], what, "is not the same in this worker process", "at random")


SPLIT = """\
import torch
import torch.nn.functional as F
from lca_posthoc import Loss, Task

generator = torch.Generator().manual_seed(1)
inputs, targets = torch.randn(200, 12, generator=generator), torch.randint(0, 4, (200,), generator=generator)


def task():
    whole = torch.utils.data.TensorDataset(inputs, targets)
    _, held_out = torch.utils.data.random_split(whole, [160, 40]SEED)
    return Task(lambda: torch.nn.Linear(12, 4), {"held_out": held_out}, {"loss": Loss(F.cross_entropy, on="held_out")})
"""


AUGMENTED = """\
import torch
import torch.nn.functional as F
from lca_posthoc import Loss, Task


def task():
    inputs = torch.cat([torch.ones(300, 12), torch.randn(300, 12)])
    data = {"all": (inputs, torch.arange(600) % 4)}
    return Task(lambda: torch.nn.Linear(12, 4), data, {"loss": Loss(F.cross_entropy, on="all")})
"""


@pytest.fixture(scope="module")
def linear_iterates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("linear")
    generator = torch.Generator().manual_seed(2)
    for step in range(9):
        tensors = {
            "weight": torch.randn(4, 12, generator=generator),
            "bias": torch.randn(4, generator=generator),
        }
        save_file(tensors, root / f"step_{step}.safetensors")
    return root


def split_file(directory: Path, seed: str) -> Path:
    file = directory / "task.py"
    file.write_text(SPLIT.replace("SEED", seed))
    return file


def test_a_split_that_is_drawn_with_a_seed_is_the_same_in_every_process(tmp_path: Path) -> None:
    file = split_file(tmp_path, ", torch.Generator().manual_seed(0)")
    assert [answer.get("error") for answer in answers(file)] == [None, None]


def test_a_split_that_is_drawn_anew_in_every_process_is_refused_by_name(
    linear_iterates: Path, tmp_path: Path
) -> None:
    settings = {
        "out": tmp_path / "run",
        "cluster": "local",
        "workers": 2,
        "device": "cpu",
        "span": 1,
    }
    with pytest.raises(LCAError) as caught:
        run(linear_iterates, split_file(tmp_path, ""), tolerance=math.inf, **settings)
    says(
        str(caught.value),
        "split 'held_out' is not the same in this worker process",
        "random_split without a seed",
    )


def test_data_that_is_drawn_anew_behind_examples_that_are_not_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text(AUGMENTED)
    first, second = answers(file)
    assert "error" not in first
    says(second["error"]["message"], "split 'all' is not the same in this worker process")


def test_a_digest_is_had_of_examples_that_do_not_stack(tmp_path: Path) -> None:
    """Two resolutions, one after the other: batches of 100 stack, examples from all over do not."""
    images = [
        (torch.full((3, 8 + 8 * (at >= 300), 8 + 8 * (at >= 300)), at / 600.0), at % 4)
        for at in range(600)
    ]
    model = partial(nn.Sequential, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    task = Task(model, {"all": images}, {"loss": Loss(F.cross_entropy, on="all")})
    assert [answer.get("error") for answer in answers(task)] == [None, None]


# --- what is random in every pass
# ------------------------------------------------------------------------------------------


class AlwaysDropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class MonteCarlo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.Tanh())
        self.body.add_module("uncertain", AlwaysDropped())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class OwnNoise(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize(
    ("build", "culprit"),
    [
        (MonteCarlo, "'body.uncertain' (AlwaysDropped)"),
        (lambda: nn.Sequential(nn.Linear(12, 8), OwnNoise(8, 4)), "'1' (OwnNoise)"),
        (partial(OwnNoise, 12, 4), "the model's own forward"),
    ],
    ids=["dropout", "noise", "noise in the model itself"],
)
def test_randomness_that_survives_eval_is_refused_and_its_module_named(
    tmp_path: Path, build: Callable[[], nn.Module], culprit: str
) -> None:
    met = Met(build)
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(
        str(caught.value),
        "not deterministic",
        f"the first module to differ is {culprit}.",
        "training=True",
    )
    assert not (tmp_path / "run").exists()


# --- what a forward pass writes
# ---------------------------------------------------------------------------------------------


class Clamped(nn.Module):
    """No weight is negative at the first iterate, some are at later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.project()

    def project(self) -> None:
        with torch.no_grad():
            self.linear.weight.clamp_(min=0)

    def forward(self, x: Tensor) -> Tensor:
        self.project()
        return self.linear(x)


class ClampedBehindAutograd(Clamped):
    def project(self) -> None:
        self.linear.weight.data.clamp_(min=0)


class BoundedRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(4, 4, max_norm=9.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x.argmax(1) % 4)


class LargestSeen(nn.Module):
    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.register_buffer("largest", torch.full((), 0.1), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.largest.copy_(torch.maximum(self.largest, x.abs().max()))
        return self.linear(x / self.largest)


class SetByTheFirstBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.shift = nn.Linear(12, 4), nn.Parameter(torch.zeros(12))
        self.register_buffer("done", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.done == 0:
            self.shift.data = -x.mean(0)
            self.done.fill_(1)
        return self.linear(x + self.shift)


def untouched() -> nn.Module:
    model = SetByTheFirstBatch()
    model.forward = lambda x: model.linear(x + model.shift)
    return model


WRITERS: dict[str, tuple[Met, str]] = {
    "clamped weights": (Met(Clamped), "'linear.weight'"),
    "clamped weights behind autograd": (Met(ClampedBehindAutograd), "'linear.weight'"),
    "rows of a bounded norm": (Met(BoundedRows), "'rows.weight'"),
    "a running maximum": (Met(partial(LargestSeen, True)), "'largest'"),
    "a running maximum no checkpoint holds": (Met(partial(LargestSeen, False)), "'largest'"),
    "the first batch": (Met(SetByTheFirstBatch, trained=untouched), "'shift'"),
}


@pytest.mark.parametrize("batch_size", [BATCH, None])
@pytest.mark.parametrize("name", WRITERS)
def test_a_forward_pass_that_changes_the_model_is_refused(
    tmp_path: Path, name: str, batch_size: int | None
) -> None:
    met, tensor = WRITERS[name]
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run", batch_size=batch_size)
    says(
        str(caught.value),
        f"loss 'train' changes tensor {tensor} of the model",
        "in eval mode too",
        "max_norm",
    )
    assert not (tmp_path / "run").exists()


class CountsAndCaches(nn.Module):
    """Counts its passes in eval mode too, and makes anew what it keeps for the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("places", torch.zeros(12), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.register_buffer("places", torch.sin(torch.arange(12) / 3).to(x), persistent=False)
        return self.linear(torch.tanh(x) + self.places)


def test_a_forward_pass_may_count_and_replace_what_it_makes_anew(tmp_path: Path) -> None:
    met = Met(CountsAndCaches)
    iterates = met.record(tmp_path / "iterates")
    assert_the_oracle_agrees(met, replay(met, iterates, tmp_path / "run"), iterates)


def test_a_factory_that_gives_one_module_twice_is_told_so(tmp_path: Path) -> None:
    model = nn.Linear(12, 4)
    task = Task(
        lambda: model,
        {"train": (torch.zeros(3, 12), torch.zeros(3, dtype=torch.int64))},
        {"it": Loss(F.cross_entropy)},
    )
    settings = {
        "device": torch.device("cpu"),
        "precision": "float32",
        "norm_stats": "running",
        "batch_size": None,
    }
    objective = Objective(lambda: task, None, **settings)
    assert next(objective.higher.model.parameters()).dtype == torch.float64  # a copy
    with pytest.raises(InputError, match="Build a new one at every call"):
        Objective(lambda: task, None, **settings)
    assert next(model.parameters()).dtype == torch.float32
