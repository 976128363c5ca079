"""A forward pass may count, and may not change what the loss depends on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Task
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import ObjectiveSettings, build_objective

from ..helpers.cli import says
from ..helpers.user_models import BATCH, Met, assert_the_oracle_agrees, replay


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
        "even in eval mode",
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
    objective = build_objective(lambda: task, None, ObjectiveSettings(**settings))
    assert next(objective.reference.model.parameters()).dtype == torch.float64  # a copy
    with pytest.raises(InputError, match="Build a new one at every call"):
        build_objective(lambda: task, None, ObjectiveSettings(**settings))
    assert next(model.parameters()).dtype == torch.float32
