"""Losses that take derivatives themselves, by every way torch has, and what they leave behind:
nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from lca_posthoc import Loss, Recorder, Task
from lca_posthoc import run as replay
from lca_posthoc.numerics.objective import (
    Objective,
    ObjectiveSettings,
    build_objective,
    check_loss,
    linear,
)
from lca_posthoc.numerics.objective import values as values_module
from lca_posthoc.numerics.objective.normalisation import normalising

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 24)[:, None].repeat(1, 2) * torch.tensor([1.0, -0.5])
Y = torch.sin(3 * X[:, :1])
LABELS = (X[:, 0] > 0).long()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


# --- ways to take a derivative: each gives one value for each example -----------------------------


def in_place(model: nn.Module, batch: Any) -> Tensor:
    """Asks for a gradient of the batch itself, as physics-informed code does."""
    x = batch[0].requires_grad_(True)
    (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
    return (ddu[:, 0] + batch[1][:, 0]) ** 2


def force_field(model: nn.Module, batch: Any) -> Tensor:
    positions = batch[0].clone().requires_grad_()
    energy = model(positions)
    forces = -torch.autograd.grad(energy.sum(), positions, create_graph=True)[0]
    return ((forces - batch[1]) ** 2).sum(1) + energy[:, 0] ** 2


def input_penalty(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].detach().requires_grad_()
    out = model(x)
    (du,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    return (out - batch[1])[:, 0] ** 2 + (du.norm(dim=1) - 1) ** 2


def of_one(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, parameters, (x[None],))[0, 0]


def by_func_grad(model: nn.Module, batch: Any) -> Tensor:
    parameters = dict(model.named_parameters())
    du = vmap(grad(lambda x: of_one(model, parameters, x)))(batch[0])
    return (du**2).sum(1)


def by_jacrev(model: nn.Module, batch: Any) -> Tensor:
    return (vmap(jacrev(lambda x: model(x[None])[0]))(batch[0])[:, 0] ** 2).sum(1)


def by_hessian(model: nn.Module, batch: Any) -> Tensor:
    return (
        vmap(hessian(lambda x: model(x[None])[0, 0]))(batch[0]).diagonal(dim1=1, dim2=2).sum(1) ** 2
    )


def by_jvp(model: nn.Module, batch: Any) -> Tensor:
    return jvp(model, (batch[0],), (torch.ones_like(batch[0]),))[1][:, 0] ** 2


def by_functional_jacobian(model: nn.Module, batch: Any) -> Tensor:
    whole = torch.autograd.functional.jacobian(
        lambda x: model(x).sum(0), batch[0], create_graph=True
    )
    return (whole[0] ** 2).sum(1)


def by_functional_hvp(model: nn.Module, batch: Any) -> Tensor:
    _, product = torch.autograd.functional.hvp(
        lambda x: model(x).square().sum(), batch[0], torch.ones_like(batch[0]), create_graph=True
    )
    return product.sum(1) ** 2


def parameter_penalty(model: nn.Module, batch: Any) -> Tensor:
    """Each example's own gradient by the parameters, squared."""
    values = ((model(batch[0]) - batch[1]) ** 2)[:, 0]
    norms = []
    for value in values:
        gradients = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        norms.append(torch.stack([each.square().sum() for each in gradients]).sum())
    return values + 0.1 * torch.stack(norms)


def by_backward(model: nn.Module, batch: Any) -> Tensor:
    """The same by backward(), which leaves gradients on the parameters."""
    values = ((model(batch[0]) - batch[1]) ** 2)[:, 0]
    norms = []
    for value in values:
        for parameter in model.parameters():
            parameter.grad = None
        value.backward(create_graph=True, retain_graph=True)
        norms.append(torch.stack([each.grad.square().sum() for each in model.parameters()]).sum())
    return values + 0.1 * torch.stack(norms)


WAYS: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    way.__name__: way
    for way in (
        in_place,
        force_field,
        input_penalty,
        by_func_grad,
        by_jacrev,
        by_hessian,
        by_jvp,
        by_functional_jacobian,
        by_functional_hvp,
        parameter_penalty,
        by_backward,
    )
}
PLAIN = {"by_backward": parameter_penalty}  # for the oracle


def true_loss(
    model: nn.Module, way: str, point: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The mean over all examples and its gradient, float64, by a model of its own."""
    made = model.double()
    made.load_state_dict({name: tensor.double() for name, tensor in point.items()})
    made.zero_grad()
    value = PLAIN.get(way, WAYS[way])(made, (X.double(), Y.double())).mean()
    value.backward()
    return float(value.detach()), {
        name: torch.zeros_like(each) if each.grad is None else each.grad.clone()
        for name, each in made.named_parameters()
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_loss_of_derivatives_is_allocated_as_any(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with Recorder(tmp_path / "iterates", model) as recorder:
        recorder.attach(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            WAYS[way](model, (X.clone(), Y.clone())).mean().backward()
            optimizer.step()
    task = Task(model=net, data={"train": (X, Y)}, losses={"train": Loss(call=WAYS[way])})
    settings = {"cluster": "inline", "tolerance": float("inf"), "batch_size": 10}
    run = replay(tmp_path / "iterates", task, out=tmp_path / "run", **settings)
    middle = replay(
        tmp_path / "iterates", task, out=tmp_path / "middle", rule="midpoint", **settings
    )
    points = [load_file(path) for path in sorted((tmp_path / "iterates").glob("*.safetensors"))]
    truth = net()
    for at, (start, end) in enumerate(itertools.pairwise(points)):
        nodes = [
            true_loss(truth, way, {n: t.lerp(end[n], x) for n, t in start.items()})
            for x in (0, 0.5, 1)
        ]
        steps = run["train"].steps
        assert float(steps.loss_start[at]) == pytest.approx(nodes[0][0], rel=1e-5)
        assert float(middle["train"].steps.loss_end[at]) == pytest.approx(nodes[2][0], rel=1e-5)
        wanted = {
            n: (end[n] - t).double()
            * sum(w * node[1][n] for w, node in zip((1 / 6, 4 / 6, 1 / 6), nodes, strict=True))
            for n, t in start.items()
        }
        whole = sum(float(each.abs().sum()) for each in wanted.values())
        for n, each in wanted.items():
            ours = torch.tensor(run["train"].allocation[n].values[at]).double()
            assert float((ours - each).abs().sum()) <= 1e-4 * max(
                float(each.abs().sum()), 1e-5 * whole
            ), n
        assert float(steps.precision_error[0]) < 1e-4


def objective_of(
    values: Callable[..., Any], *, call: bool = True, precision: str = "float32"
) -> Objective:
    made = build_objective(
        lambda: Task(
            model=net,
            data={"train": (X, Y)},
            losses={
                "first": Loss(call=values) if call else Loss(values),
                "second": Loss(F.mse_loss),
            },
        ),
        ["all"],
        ObjectiveSettings(device=CPU, precision=precision, norm_stats="running", batch_size=10),
    )
    made.settle_batch_sizes(dict(made.model.named_parameters()))
    return made


def point_of(objective: Objective) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in objective.model.named_parameters()}


@pytest.mark.parametrize("way", ["in_place", "by_backward"])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_what_a_loss_asks_of_its_batch_and_of_the_model_is_not_there_later(way: str) -> None:
    objective = objective_of(WAYS[way])
    point = point_of(objective)
    alone = objective_of(WAYS[way]).evaluate(point, ["second"])["second"]
    assert [check_loss(objective, name) for name in ("first", "second")] == [[], []]
    first = objective.evaluate(point, ["first", "second"])
    again = objective.evaluate(point, ["first", "second"])
    for name in first:
        assert first[name].loss == again[name].loss
        assert all(map(torch.equal, first[name].gradient.values(), again[name].gradient.values()))
    assert first["second"].loss == alone.loss
    assert all(map(torch.equal, first["second"].gradient.values(), alone.gradient.values()))
    forward = objective.evaluate(point, ["first"], gradient=False)["first"]
    assert forward.loss == first["first"].loss
    assert forward.gradient == {}
    for _, batch in objective.splits["train"].batches(10):
        assert [(each.requires_grad, each.grad) for each in batch] == [(False, None)] * 2
    assert [each.grad for each in objective.model.parameters()] == [None] * 6


def test_what_a_loss_makes_of_who_has_a_gradient_ends_with_it() -> None:
    def freezing(model: nn.Module, batch: Any) -> Tensor:
        model[0].requires_grad_(False)
        return (model(batch[0]) - batch[1])[:, 0] ** 2

    objective = objective_of(freezing)
    found = objective.evaluate(point_of(objective), ["first", "second"])
    assert found["first"].unreached == {"0.weight", "0.bias"}
    assert found["second"].unreached == frozenset()


def test_the_bytes_of_a_loss_that_allows_no_saved_tensor_hooks_are_counted_otherwise() -> None:
    objective = objective_of(by_func_grad)
    counted = [objective.saved_bytes("first") for _ in range(2)]
    assert counted[0] == counted[1] >= objective.saved_bytes("second")


def test_values_of_a_data_set_made_in_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        made = X * 1.0, Y * 1.0
    objective = build_objective(
        lambda: Task(model=net, data={"train": made}, losses={"train": Loss(F.mse_loss)}),
        None,
        ObjectiveSettings(device=CPU, precision="float32", norm_stats="running", batch_size=None),
    )
    objective.settle_batch_sizes(dict(objective.model.named_parameters()))
    assert check_loss(objective, "train") == []


# --- patched functions ----------------------------------------------------------------------------


def plain_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - mean[:, None]) / (var[:, None] + 1e-5) ** 0.5 * weight[:, None] + bias[:, None]


@pytest.mark.parametrize("kind", ["batch_norm", "instance_norm"])
def test_second_derivatives_through_running_statistics_are_those_of_the_formula(kind: str) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, 5, generator=draw, dtype=torch.float64)
    given = [x, *(torch.rand(3, generator=draw, dtype=torch.float64) + 0.5 for _ in range(4))]
    found = []
    with normalising("running"):
        norm = getattr(F, kind)
        for function in (lambda *all_: norm(*all_[:3], *all_[3:], False), plain_norm):
            inputs = [each.clone().requires_grad_() for each in given]
            value = torch.tanh(function(*inputs)).square().sum()
            first = torch.autograd.grad(value, inputs, create_graph=True)
            second = torch.autograd.grad(
                sum((each * (each.detach() + 1)).sum() for each in first), inputs
            )
            found.append([*first, *second])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("norm_stats", ["running", "batch"])
def test_a_penalty_on_gradients_through_normalisation_is_that_of_the_formula(
    norm_stats: str,
) -> None:
    objective = build_objective(
        lambda: Task(
            model=Normalised, data={"train": (X, Y)}, losses={"train": Loss(call=input_penalty)}
        ),
        None,
        ObjectiveSettings(device=CPU, precision="float64", norm_stats=norm_stats, batch_size=24),
    )
    torch.manual_seed(0)
    point = {
        name: torch.rand_like(each) + 0.2
        for name, each in objective.model.state_dict().items()
        if each.dim()
    }
    point["norm.num_batches_tracked"] = torch.tensor(3)
    objective.settle_batch_sizes(point)
    found = objective.evaluate(point, ["train"])["train"]
    leaves = {
        name: each.clone().requires_grad_(each.is_floating_point()) for name, each in point.items()
    }

    def formula(x: Tensor) -> Tensor:
        hidden = F.linear(x, leaves["first.weight"], leaves["first.bias"])
        mean, var = leaves["norm.running_mean"], leaves["norm.running_var"]
        if norm_stats == "batch":
            mean, var = hidden.mean(0), hidden.var(0, unbiased=False)
        hidden = (hidden - mean) / (var + 1e-5) ** 0.5 * leaves["norm.weight"] + leaves["norm.bias"]
        return F.linear(torch.tanh(hidden), leaves["last.weight"], leaves["last.bias"])

    value = input_penalty(formula, (X.double(), Y.double())).mean()
    value.backward()
    assert found.loss == pytest.approx(float(value.detach()), rel=1e-12)
    for name, gradient in found.gradient.items():
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("way", ["in_place", "by_func_grad", "by_jvp", "by_hessian"])
def test_the_faster_product_stands_in_no_derivatives_way(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = objective_of(WAYS[way])
    point = point_of(plain)
    wanted = plain.evaluate(point, ["first"])["first"]
    monkeypatch.setattr(linear, "_LEAST", 1)
    monkeypatch.setattr(linear, "preferred", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    monkeypatch.setattr(values_module, "multiplying", linear.multiplying)
    found = objective_of(WAYS[way]).evaluate(point, ["first"])["first"]
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    for name, gradient in wanted.gradient.items():
        torch.testing.assert_close(found.gradient[name], gradient, rtol=1e-4, atol=1e-5)
