"""Losses whose weights are 0 for whole stretches: only a split of which nothing weighs has no
loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Task
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import (
    Objective,
    ObjectiveSettings,
    batches,
    build_objective,
    check_loss,
    identify,
    sources,
)

DRAW = torch.Generator().manual_seed(0)
COUNT = 600
X, Y = torch.randn(COUNT, 6, generator=DRAW), torch.randint(3, (COUNT,), generator=DRAW)
CPU = torch.device("cpu")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def weighed(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none"), batch[2]


def zeros_but(value: float, *positions: int) -> Tensor:
    weights = torch.zeros(COUNT)
    weights[list(positions)] = value
    return weights


class Streamed:
    """Examples that are had in order only."""

    def __init__(self, columns: tuple[Tensor, ...]) -> None:
        self.columns = columns

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(zip(*self.columns, strict=True))


def objective_of(losses: dict[str, Loss], data: Any, **settings: Any) -> Objective:
    made = build_objective(
        lambda: Task(model=net, data={"train": data}, losses=losses),
        ["all"],
        ObjectiveSettings(
            **{
                "device": CPU,
                "precision": "float32",
                "norm_stats": "running",
                "batch_size": None,
                **settings,
            }
        ),
    )
    torch.manual_seed(0)
    made.settle_batch_sizes(dict(net().named_parameters()))
    return made


def true_loss(objective: Objective, weights: Tensor) -> float:
    with torch.no_grad():
        values = F.cross_entropy(objective.model(X), Y, reduction="none").double()
    return float((values * weights.double()).sum() / weights.double().sum())


WEIGHTS = {
    "the first": zeros_but(1.0, 0),
    "the last": zeros_but(1.0, COUNT - 1),
    "one in a second half": zeros_but(1.0, 200),
    "one in the middle": zeros_but(3.0, 400),
    "tiny": zeros_but(1e-30, 250, 599),
    "subnormal": zeros_but(1e-42, 599),
    "sorted": (torch.arange(COUNT) >= 580).float(),
    "unequal": zeros_but(1.0, 200) + zeros_but(0.25, 599),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "batches of 7": {"batch_size": 7},
    "batches of 1": {"batch_size": 1},
    "batch mode": {"norm_stats": "batch", "batch_size": 50},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", WEIGHTS)
def test_a_loss_that_weighs_anywhere_is_one(case: str, settings: str) -> None:
    weights = WEIGHTS[case]
    objective = objective_of({"train": Loss(call=weighed)}, (X, Y, weights), **SETTINGS[settings])
    assert check_loss(objective, "train") == []
    identity = identify(objective, "train")
    assert identity.gradient_norm > 0
    point = {name: each.detach().clone() for name, each in objective.model.named_parameters()}
    assert objective.evaluate(point, ["train"])["train"].loss == pytest.approx(
        true_loss(objective, weights), rel=1e-6
    )


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_stream_that_weighs_anywhere_is_one(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "room_on", lambda device: 0)
    monkeypatch.setattr(batches, "room_on", lambda device: 0)
    weights = WEIGHTS[case]
    objective = objective_of(
        {"train": Loss(call=weighed)}, Streamed((X, Y, weights)), batch_size=64
    )
    assert isinstance(objective.splits["train"]._source, sources.Stream)
    assert check_loss(objective, "train") == []
    point = {name: each.detach().clone() for name, each in objective.model.named_parameters()}
    assert objective.evaluate(point, ["train"])["train"].loss == pytest.approx(
        true_loss(objective, weights), rel=1e-6
    )


def test_one_target_that_is_not_ignored_is_enough() -> None:
    targets = torch.full_like(Y, 9)
    targets[333] = 1
    objective = objective_of(
        {"train": Loss(partial(F.cross_entropy, ignore_index=9))}, (X, targets)
    )
    assert check_loss(objective, "train") == []


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_split_of_which_nothing_weighs_is_refused(settings: str) -> None:
    objective = objective_of(
        {"train": Loss(call=weighed)}, (X, Y, zeros_but(1.0)), **SETTINGS[settings]
    )
    with pytest.raises(
        InputError, match="'train' on split 'train' sum to 0 over all its 600 examples"
    ):
        check_loss(objective, "train")


@pytest.mark.parametrize(
    ("subset", "fails"), [("500:600", False), ("0:500", True), ("599,3", False)]
)
def test_a_subset_weighs_by_itself(subset: str, fails: bool) -> None:
    objective = objective_of(
        {"train": Loss(call=weighed)}, (X, Y, zeros_but(1.0, 599)), subset={"": subset}
    )
    if fails:
        with pytest.raises(InputError, match="sum to 0 over all its 500 examples"):
            check_loss(objective, "train")
    else:
        assert check_loss(objective, "train") == []


@pytest.mark.parametrize(("positions", "empty"), [((10, 599), None), ((599,), "0")])
def test_every_group_must_weigh_and_one_example_is_enough(
    positions: tuple[int, ...], empty: str | None
) -> None:
    halves = (torch.arange(COUNT) >= 300).long()
    losses = {"groups": Loss(call=weighed, group_by=halves)}
    objective = objective_of(losses, (X, Y, zeros_but(1.0, *positions)))
    if empty is None:
        assert check_loss(objective, "groups") == []
    else:
        with pytest.raises(InputError, match=f"weights of group {empty} of loss 'groups'"):
            check_loss(objective, "groups")


@pytest.mark.parametrize(
    "weights", [zeros_but(-1.0, 0) + 1e-3, zeros_but(1.0, 500) - zeros_but(0.5, 501)]
)
def test_negative_weights_are_refused_where_they_are_met(weights: Tensor) -> None:
    objective = objective_of({"train": Loss(call=weighed)}, (X, Y, weights))
    with pytest.raises(InputError, match="return none below 0"):
        check_loss(objective, "train")


def _centred(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    outputs = model(batch[0])
    return F.cross_entropy(outputs - outputs.mean(0), batch[1], reduction="none"), batch[2]


def _constant(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    values = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return values + torch.rand_like(values), batch[2]


@pytest.mark.parametrize(
    ("values", "words"),
    [(_centred, "how split 'train' is cut into batches"), (_constant, "not deterministic")],
)
@pytest.mark.parametrize("case", ["the last", "one in a second half", "one in the middle"])
def test_what_is_wrong_with_a_loss_shows_where_it_weighs(
    case: str, values: Callable[..., Any], words: str
) -> None:
    objective = objective_of({"train": Loss(call=values)}, (X, Y, WEIGHTS[case]))
    with pytest.raises(InputError, match=words):
        check_loss(objective, "train")
