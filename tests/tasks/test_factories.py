"""A task's model is built once in a process; in another precision it is copied, where a copy is the
same model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Task
from lca_posthoc.numerics.objective import Objective, ObjectiveSettings, build_objective
from lca_posthoc.numerics.objective.copies import copy_in

from ..helpers.cli import document, lca, record, write_task

CPU = torch.device("cpu")
X, Y = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 4

COUNTED = """        super().__init__()
        import os
        with open({path!r}, "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        self.hidden"""


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(
    "cluster", [("--cluster", "local", "--workers", 2), ("--cluster", "inline")]
)
def test_a_factory_is_called_once_in_a_process(
    tmp_path: Path, cluster: tuple[object, ...], precision: str
) -> None:
    calls = tmp_path / "calls"
    counted = COUNTED.format(path=str(calls))
    task = write_task(
        tmp_path / "task.py", "        super().__init__()\n        self.hidden", counted
    )
    out = tmp_path / "run.lca"
    options = (*cluster, "--precision", precision, "--loss", "all", "--tolerance", "inf")
    result = lca("run", record(tmp_path / "iterates"), "--task", task, "--out", out, *options)
    assert result.exit_code == 0, result.output
    pids = calls.read_text().split()
    assert len(set(pids)) == len(pids) <= 2
    assert set(document(lca("summary", out, "--json"))["losses"]) == {"train", "validation"}


# --- what a copy must carry over ------------------------------------------------------------------


class Scales:
    """An object of its own that holds tensors."""

    def __init__(self) -> None:
        self.inside = {"scale": torch.full((4,), 1.5)}


class Kept(nn.Module):
    """Tensors in every place a module may keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.table, self.pair = torch.rand(4), [torch.rand(4), (torch.rand(4),)]
        self.scales, self.dtype = Scales(), torch.get_default_dtype()
        self.counts = torch.arange(4)
        self.register_buffer("mask", torch.zeros(4), persistent=False)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = (
            self.linear(x.to(self.dtype)) * self.table
            + self.pair[0]
            + self.pair[1][0]
            + self.mask
            + self.counts
        )
        self.last = out * self.scales.inside["scale"]
        return self.last


class Attending(nn.Module):
    """A mask with infinite entries in a plain attribute: in float32 beside float64 it gives wrong
    numbers in silence.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(4, 12), nn.Linear(12, 4)
        self.mask = torch.triu(torch.full((3, 3), float("-inf")), 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inside(x.reshape(len(x), 3, 4)).chunk(3, -1)
        found = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask.expand(len(x), 3, 3)
        )
        return self.out(found.reshape(len(x), 12))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(12, 12), nn.Linear(12, 12)
        self.again.weight = self.first.weight
        self.names = [self.first.weight]
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))) + self.names[0].sum())


COPIED: dict[str, Callable[[], nn.Module]] = {"kept": Kept, "attention": Attending, "tied": Tied}


def objective_of(
    build: Callable[[], nn.Module], **settings: Any
) -> tuple[Objective, list[nn.Module]]:
    built: list[nn.Module] = []

    def factory() -> nn.Module:
        torch.manual_seed(0)
        built.append(build())
        return built[-1]

    task = Task(factory, {"train": (X, Y)}, {"train": Loss(F.cross_entropy)})
    made = build_objective(
        lambda: task,
        None,
        ObjectiveSettings(
            **{
                "device": CPU,
                "precision": "float32",
                "norm_stats": "running",
                "batch_size": 30,
                **settings,
            }
        ),
    )
    made.settle_batch_sizes(point_of(made, 0))
    return made, built


def point_of(objective: Objective, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=draw) for spec in objective.table}


def true_loss(
    build: Callable[[], nn.Module], objective: Objective, point: dict[str, Tensor]
) -> float:
    """By a model built in float64 with the tensors of the float32 one."""
    torch.manual_seed(0)
    model = build()
    model.load_state_dict(point, strict=False)
    model = model.double()
    for value in ("table", "mask"):
        if isinstance(getattr(model, value, None), Tensor):
            setattr(model, value, getattr(model, value).double())
    if isinstance(model, Kept):
        model.dtype = torch.float64
    return float(F.cross_entropy(model(X.double()), Y).detach())


@pytest.mark.parametrize("case", COPIED)
def test_a_copy_in_another_precision_is_the_model(case: str) -> None:
    objective, built = objective_of(COPIED[case])
    reference = objective.reference
    assert len(built) == 1
    for seed in (0, 1):  # what was placed in one must not show in the other
        point = point_of(objective, seed)
        wide = {name: tensor.double() for name, tensor in point.items()}
        found = reference.evaluate(wide, ["train"])["train"]
        other = objective.evaluate(point_of(objective, seed + 5), ["train"])["train"]
        assert found.loss == pytest.approx(true_loss(COPIED[case], objective, point), rel=1e-12)
        assert other.loss != found.loss
        assert all(each.dtype == torch.float64 for each in found.gradient.values())
    assert {each.dtype for each in objective.model.parameters()} == {torch.float32}


def test_a_copy_reaches_every_tensor_and_attribute() -> None:
    model = Kept()
    model(X)
    copied = copy_in(model, CPU, torch.float64)
    assert copied is not None
    wide = [
        copied.table,
        *copied.pair[:1],
        *copied.pair[1],
        copied.scales.inside["scale"],
        copied.mask,
        copied.last,
    ]
    assert [each.dtype for each in wide] == [torch.float64] * 6
    assert (copied.dtype, copied.counts.dtype) == (torch.float64, torch.int64)
    assert model.table.dtype == torch.float32


class Viewing(nn.Module):
    """An attribute that is a view into a parameter: copied, it would stay what the parameter
    was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.first = self.linear.weight.detach()[:1]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.first.sum()


class Hooked(nn.Module):
    """A hook whose closure holds the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.linear.register_forward_hook(
            lambda module, inputs, outputs: outputs * self.linear.bias.sum()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Uncopied(nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, 4)
        self.lock = threading.Lock()


@pytest.mark.parametrize("build", [Viewing, Hooked, Uncopied])
def test_what_a_copy_would_not_carry_over_is_built_anew(build: Callable[[], nn.Module]) -> None:
    assert copy_in(build(), CPU, torch.float64) is None
    objective, built = objective_of(build)
    assert {each.dtype for each in objective.reference.model.parameters()} == {torch.float64}
    assert len(built) == 2


class Wide(nn.Module):
    """Computes another function in a copy, whose class it can tell by an attribute deepcopy leaves
    out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.built = nn.Linear(12, 4), True

    def __deepcopy__(self, memo: Any) -> Wide:
        copied = Wide()
        copied.built = False
        return copied

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1.0 if self.built else 2.0)


def test_a_copy_that_disagrees_is_built_anew() -> None:
    objective, built = objective_of(Wide)
    assert objective.reference.model.built
    assert len(built) == 2


class Drawn(nn.Module):
    """A frozen part that is drawn with a seed, which gives other numbers in float64."""

    def __init__(self, values: Tensor | None = None) -> None:
        super().__init__()
        self.base, self.linear = nn.Linear(12, 12).requires_grad_(False), nn.Linear(12, 4)
        if values is not None:
            self.base.weight.data, self.base.bias.data = values.clone(), values[0].clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.base(x))


VALUES = torch.rand(12, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("build", "calls"), [(Drawn, 2), (lambda: Drawn(VALUES), 1)])
def test_float64_takes_frozen_parts_as_they_were_trained_with(
    build: Callable[[], nn.Module], calls: int
) -> None:
    objective, built = objective_of(
        build, precision="float64", stored=frozenset({"linear.weight", "linear.bias"})
    )
    torch.manual_seed(0)
    trained = build()
    assert torch.equal(objective.model.base.weight, trained.base.weight.double())
    assert len(built) == calls
