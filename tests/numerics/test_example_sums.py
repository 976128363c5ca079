"""Sums of groups from batches that hold examples of any of them are those from batches of one group
each, whatever the model; where examples cannot be told apart, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Run, Task, run
from lca_posthoc.errors import InputError, LCAWarning
from lca_posthoc.numerics.objective import (
    Evaluation,
    Objective,
    ObjectiveSettings,
    build_objective,
    recalled,
    recorded,
)
from lca_posthoc.numerics.objective.directions import Along, Motion

from ..helpers.cli import contents, marker
from ..helpers.model_cases import CASES
from ..helpers.replayed_cases import Lab, assert_same_bits, assert_sums_agree

NAMES = [name for name, case in CASES.items() if next(iter(case.losses.values())).split]


def some_groups(name: str) -> list[int]:
    """Groups of one and of two examples."""
    split = next(iter(CASES[name].losses.values())).split
    count = len(CASES[name].data()[str(split)][0])
    return [2 * position // 3 for position in range(count)]


def motion_of(objective: Objective) -> Motion:
    generator = torch.Generator().manual_seed(2)
    start = {name: tensor.detach().clone() for name, tensor in objective.point.items()}
    end = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator).to(tensor)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in start.items()
    }
    return Motion(start, end)


def objective_of(task: Task, precision: str = "float64", **settings: Any) -> Objective:
    objective = build_objective(
        lambda: task,
        ["all"],
        ObjectiveSettings(
            device=torch.device("cpu"),
            **{"precision": precision, "norm_stats": "running", "batch_size": 7, **settings},
        ),
    )
    objective.settle_batch_sizes(objective.point)
    objective.data.share_batches()
    return objective


def evaluated(objective: Objective, motion: Motion, **options: Any) -> dict[str, Evaluation]:
    axes = dict.fromkeys(objective.tensors.differentiable)
    again = Motion(motion.end, motion.start)
    return objective.evaluate(
        motion.start, list(objective.losses), along=Along(axes, [motion, again]), **options
    )


def same(one: Evaluation, other: Evaluation, bound: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(one.loss), torch.as_tensor(other.loss), rtol=bound, atol=0
    )
    torch.testing.assert_close(torch.as_tensor(one.weight), torch.as_tensor(other.weight))
    assert one.unreached == other.unreached
    assert one.gradient.keys() == other.gradient.keys()
    size = sum(float(values.abs().sum()) for values in other.gradient.values())
    for name, values in other.gradient.items():
        assert one.gradient[name].shape == values.shape
        assert float((one.gradient[name] - values).abs().sum()) <= bound * size


def grouped_task(name: str) -> Task:
    case = CASES[name]
    loss = next(iter(case.losses.values()))
    return Task(
        case.build,
        case.data(),
        {"plain": loss, "grouped": replace(loss, group_by=some_groups(name))},
    )


def tell_examples(objective: Objective) -> set[str]:
    """Let groups take batches in the order of the data where that is possible; return the losses
    for which it is.
    """
    for name in objective.losses:
        found = objective.find_examples(name)
        if not found.untold:
            objective.example_axes[name] = recalled(recorded(found.axes))
    return set(objective.example_axes)


@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("name", NAMES)
def test_groups_have_the_sums_of_batches_of_their_own(
    name: str, precision: str, bound: float
) -> None:
    objective = objective_of(grouped_task(name), precision)
    motion = motion_of(objective)
    wanted = evaluated(objective, motion)
    assert tell_examples(objective) == {"plain", "grouped"}
    found = evaluated(objective, motion)
    for loss, evaluation in wanted.items():
        same(found[loss], evaluation, bound)
    values = objective.evaluate(motion.start, list(objective.losses), gradient=False)
    for loss, evaluation in values.items():  # without sums, every group has batches of its own
        assert found[loss].loss == pytest.approx(evaluation.loss, rel=bound, abs=0)


def class_weights(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(outputs, targets, reduction="none"), 1.0 + targets


def test_weights_some_groups_and_units() -> None:
    case = CASES["relu_mlp"]
    task = Task(
        case.build,
        case.data(),
        {"weighted": Loss(class_weights, on="train", group_by=some_groups("relu_mlp"))},
    )
    objective = objective_of(task)
    motion = motion_of(objective)
    some = evaluated(objective, motion, only=range(1, 3))
    axes = dict.fromkeys(objective.tensors.differentiable, 0)
    units = objective.evaluate(motion.start, ["weighted"], along=Along(axes, [motion]))
    assert tell_examples(objective) == {"weighted"}
    same(evaluated(objective, motion, only=range(1, 3))["weighted"], some["weighted"], 1e-12)
    again = objective.evaluate(motion.start, ["weighted"], along=Along(axes, [motion]))
    for name, values in units["weighted"].gradient.items():
        assert torch.equal(again["weighted"].gradient[name], values)


def around_the_mlp(module: Callable[[Callable[[], nn.Module]], nn.Module]) -> Task:
    """A task with groups whose model is a module around the MLP."""
    case = CASES["relu_mlp"]
    loss = replace(case.losses["train"], group_by=some_groups("relu_mlp"))
    return Task(lambda: module(case.build), case.data(), {"grouped": loss})


class Centred(nn.Module):
    """Subtracts the mean over the batch: examples are mixed."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner = build()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out - out.mean(0)


def test_where_examples_are_mixed_batches_have_one_group_each() -> None:
    objective = objective_of(around_the_mlp(Centred))
    motion = motion_of(objective)
    wanted = evaluated(objective, motion)
    assert tell_examples(objective) == set()
    found = evaluated(objective, motion)
    for name, values in wanted["grouped"].gradient.items():
        assert torch.equal(found["grouped"].gradient[name], values)


class Late(nn.Module):
    """Has another operation where a batch has seven examples."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner = build()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.scale if len(x) == 7 else x
        out: Tensor = self.inner(scaled)
        return out


def test_a_model_that_runs_otherwise_than_on_the_sample_is_refused() -> None:
    objective = objective_of(around_the_mlp(Late))
    motion = motion_of(objective)
    assert tell_examples(objective) == {"grouped"}
    with pytest.raises(InputError, match="cannot be determined on a batch"):
        evaluated(objective, motion)


def backwards(outputs: Tensor, targets: Tensor) -> Tensor:
    """Two elements an example, those of all examples one after the other."""
    values = F.cross_entropy(outputs, targets, reduction="none")
    return torch.cat([values, 2 * values])


def test_elements_that_do_not_run_over_the_examples_first_are_found_out() -> None:
    case = CASES["relu_mlp"]
    loss = Loss(call=lambda model, batch: backwards(model(batch[0]), batch[1]), on="train")
    task = Task(case.build, case.data(), {"l": replace(loss, group_by=some_groups("relu_mlp"))})
    objective = objective_of(task)
    assert objective.find_examples("l").untold == {
        "": "the values of the loss have no axis of examples"
    }


# --- runs -----------------------------------------------------------------------------------------


def replay(lab: Lab, task: Task, name: str, **settings: Any) -> Run:
    place = {"out": lab.new_place(), **settings}
    chosen = lab.settings(batch_size=CASES[name].batch_size, **place)
    return run(lab.iterates(name), task, **chosen)


@pytest.mark.parametrize("name", ["conv_bn", "transformer"])
def test_numerics_10_groups_whose_examples_are_told_apart(lab: Lab, name: str) -> None:
    """They are those of every parameter, and the same to the bit for any span length; at other
    levels nothing is told apart. In float64, as a group of few examples is rounded in float32 by
    more than the sums may differ where its batches are others.
    """
    task = grouped_task(name)
    whole = replay(lab, task, name, keep="parameters", precision="float64")
    one, several = (
        replay(lab, task, name, keep="tensors", precision="float64", span=span) for span in (1, 4)
    )
    for loss in ("plain", "grouped"):
        assert whole[loss].record.sites is None
        assert one[loss].record.sites
        assert_sums_agree(one[loss], whole[loss])
        assert_same_bits(one[loss], several[loss])
        marker(several.path, loss, 0).unlink()
    before = contents(several.path / "data.zarr")
    again = replay(
        lab, task, name, keep="tensors", precision="float64", span=None, out=several.path
    )
    assert again.manifest.losses == one.manifest.losses
    assert contents(again.path / "data.zarr") == before


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *above: Any) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return above[0] * scale, (above[0] * x).sum()


class Own(nn.Module):
    """Scales its input by a parameter in a function of its own."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner = build()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(_Scaled.apply(x, self.scale))  # type: ignore[no-untyped-call]
        return out


def test_few_groups_have_batches_of_their_own(lab: Lab) -> None:
    case = CASES["relu_mlp"]
    count = len(case.data()["train"][0])
    loss = replace(case.losses["train"], group_by=[position % 2 for position in range(count)])
    task = Task(case.build, case.data(), {"train": loss})
    assert replay(lab, task, "relu_mlp", keep="tensors")["train"].record.sites is None


def test_a_run_says_why_examples_are_not_told_apart(lab: Lab) -> None:
    case, task = CASES["relu_mlp"], around_the_mlp(Own)
    iterates, model = lab.new_place(), Own(case.build)
    with Recorder(iterates, model) as recorder:
        for step in range(2):
            recorder.save(step)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter *= 1.01
    settings = lab.settings(batch_size=case.batch_size, keep="tensors", out=lab.new_place())
    with pytest.warns(
        LCAWarning, match=r"'grouped': each batch holds examples of one .* \(scale: "
    ):
        found = run(iterates, task, **settings)
    assert found["grouped"].record.sites is None
