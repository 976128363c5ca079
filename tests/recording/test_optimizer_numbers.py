"""What a recorder takes down of an optimiser's steps: the numbers of that very step, from which the
gradient it was made with follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lca_posthoc import Recorder, open_trajectory
from lca_posthoc.checkpoints.optimizer_steps import (
    GroupStep,
    OptimizerStep,
    moments_path,
    read_optimizer_step,
)
from lca_posthoc.errors import InputError, ResourceError
from lca_posthoc.recording import writer
from tests.helpers.recorded_series import interrupt_now

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def gradients(model: nn.Module, seed: int, times: int = 1) -> dict[str, Tensor]:
    """Make gradients of noise anew; return copies of them."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(times):
        model(torch.randn(16, 5, generator=generator)).square().sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def two_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    parameters = dict(model.named_parameters())
    return [
        {"params": [parameters["0.weight"], parameters["2.weight"]], **options},
        {"params": [parameters["0.bias"], parameters["2.bias"]], "lr": 3e-3, "weight_decay": 0.0},
    ]


def warm_up(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))


def records(directory: Path) -> dict[int, OptimizerStep | None]:
    return {
        checkpoint.step: read_optimizer_step(checkpoint)
        for checkpoint in open_trajectory(directory).checkpoints
    }


def record(directory: Path, step: int) -> OptimizerStep:
    """Return the record of one iterate, which has one."""
    stated = records(directory)[step]
    assert stated is not None
    return stated


def norms(step: OptimizerStep | None) -> dict[str, float]:
    assert step is not None
    return {
        name: norm
        for group in step.groups
        for name, norm in zip(group.tensors, group.gradient_norms, strict=True)
    }


def norms_of(gradient: dict[str, Tensor], factor: float = 1.0) -> Any:
    return pytest.approx({name: factor * float(g.norm()) for name, g in gradient.items()}, rel=1e-5)


def group_of(step: OptimizerStep, name: str) -> GroupStep:
    (group,) = (group for group in step.groups if name in group.tensors)
    return group


# --- the law: iterates and numbers give the gradient back -----------------------------------------


def sgd_gradient(
    directory: Path, step: int, name: str, group: GroupStep, before: GroupStep | None
) -> Tensor:
    """Compute the gradient of a step with torch's SGD from iterates and scalars alone."""
    points = [load_file(directory / f"step_{s:08d}.safetensors") for s in range(step + 1)]
    motion = points[step][name].double() - points[step - 1][name].double()
    memory = torch.zeros_like(motion)
    if before is not None and group.has_memory:
        earlier = points[step - 1][name].double() - points[step - 2][name].double()
        memory = group.momentum * group.lr / before.lr * earlier
    decay = -group.lr * group.weight_decay * points[step - 1][name].double()
    return -(motion - memory - decay) / group.lr


def adamw_gradient(
    directory: Path, step: int, name: str, group: GroupStep, before: GroupStep | None
) -> Tensor:
    """Compute the gradient of a step with torch's AdamW from iterates, scalars and moments."""
    start, end = (
        load_file(directory / f"step_{s:08d}.safetensors")[name].double() for s in (step - 1, step)
    )
    first = torch.zeros_like(start)
    if before is not None:
        first = load_file(moments_path(directory, step - 1))[f"exp_avg/{name}"].double()
    second = load_file(moments_path(directory, step))[f"exp_avg_sq/{name}"].double()
    assert group.betas is not None
    assert group.eps is not None
    assert group.decoupled
    beta1, beta2 = group.betas
    rate = group.lr / (1 - beta1**group.steps)
    scale = 1 / ((second / (1 - beta2**group.steps)).sqrt() + group.eps)
    memory = -rate * beta1 * scale * first
    decay = -group.lr * group.weight_decay * start
    return -(end - start - memory - decay) / (rate * (1 - beta1) * scale)


SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.05}
KINDS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {**SGD, "foreach": False}),
    "SGD foreach": (torch.optim.SGD, {**SGD, "foreach": True}),
    "SGD fused": (torch.optim.SGD, {**SGD, "fused": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "foreach": False}),
    "AdamW foreach": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_iterates_and_numbers_give_the_gradient_of_every_step(
    tmp_path: Path, model: nn.Module, kind: str
) -> None:
    make, options = KINDS[kind]
    optimizer = make(two_groups(model), **options)
    scheduler = warm_up(optimizer)
    truth, rates = [], []
    with Recorder(tmp_path, model).attach(optimizer, save="moments"):
        for step in range(12):
            truth.append(gradients(model, step))
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
    before: OptimizerStep | None = None
    recovered = sgd_gradient if kind.startswith("SGD") else adamw_gradient
    errors, sizes = 0.0, 0.0
    for step, stated in records(tmp_path).items():
        if step == 0:
            assert stated is None
            continue
        assert stated is not None
        assert (stated.since, stated.optimizer_steps, stated.clip) == (step - 1, 1, None)
        assert [group.lr for group in stated.groups] == rates[step - 1]
        assert norms(stated) == norms_of(truth[step - 1])
        for group in stated.groups:
            assert group.optimizer == kind.split()[0]
            assert (group.steps, group.has_memory) == (step, step > 1)
            for name in group.tensors:
                earlier = None if before is None else group_of(before, name)
                gradient = recovered(tmp_path, step, name, group, earlier)
                wanted = truth[step - 1][name].double()
                errors += float((gradient - wanted).square().sum())
                sizes += float(wanted.square().sum())
        before = stated
    assert math.sqrt(errors / sizes) <= 1e-5
    assert (tmp_path / "moments").exists() == (not kind.startswith("SGD"))


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_in_double_precision_the_gradient_is_exact(
    tmp_path: Path, model: nn.Module, kind: str
) -> None:
    make, options = KINDS[kind]
    model.double()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = make(two_groups(model), **options)
        scheduler = warm_up(optimizer)
        truth = []
        with Recorder(tmp_path, model).attach(optimizer, save="moments"):
            for step in range(12):
                truth.append(gradients(model, step))
                optimizer.step()
                scheduler.step()
    finally:
        torch.set_default_dtype(torch.float32)
    stated = records(tmp_path)
    recovered = sgd_gradient if kind == "SGD" else adamw_gradient
    for step in range(2, 13):
        this, before = stated[step], stated[step - 1]
        assert this is not None
        assert before is not None
        errors, sizes = 0.0, 0.0
        for group in this.groups:
            for name in group.tensors:
                gradient = recovered(tmp_path, step, name, group, group_of(before, name))
                errors += float((gradient - truth[step - 1][name]).square().sum())
                sizes += float(truth[step - 1][name].square().sum())
        assert math.sqrt(errors / sizes) <= 1e-10


# --- the numbers are those of the step ------------------------------------------------------------


def test_settings_are_taken_down_of_every_kind(tmp_path: Path, model: nn.Module) -> None:
    parameters = [[parameter] for parameter in model.parameters()]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(
            parameters[0], lr=0.1, momentum=0.5, weight_decay=0.25, nesterov=True, maximize=True
        ),
        torch.optim.RMSprop(
            parameters[1], lr=0.125, alpha=0.75, eps=0.5, momentum=0.25, centered=True
        ),
        torch.optim.Adagrad(parameters[2], lr=0.25, lr_decay=0.125, eps=0.5),
        torch.optim.Adam(
            parameters[3],
            lr=torch.tensor(0.5),
            betas=(0.5, 0.75),
            eps=0.25,
            amsgrad=True,
            weight_decay=0.125,
            decoupled_weight_decay=True,
            foreach=False,
        ),
    ]
    with Recorder(tmp_path, model).attach(*optimizers, save="moments"):
        gradients(model, 0)
        for optimizer in optimizers:
            optimizer.step()
    plain = GroupStep(
        optimizer="",
        tensors=(),
        gradient_norms=(),
        lr=0.0,
        weight_decay=0.0,
        decoupled=False,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        betas=None,
        eps=None,
        amsgrad=False,
        centered=False,
        alpha=None,
        lr_decay=None,
        steps=1,
        has_memory=False,
    )
    expected: list[dict[str, Any]] = [
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.25, "nesterov": True, "maximize": True},
        {"lr": 0.125, "alpha": 0.75, "eps": 0.5, "momentum": 0.25, "centered": True},
        {"lr": 0.25, "lr_decay": 0.125, "eps": 0.5},
        {"lr": 0.5, "betas": (0.5, 0.75), "eps": 0.25, "amsgrad": True}
        | {"weight_decay": 0.125, "decoupled": True},
    ]
    kinds = ["SGD", "RMSprop", "Adagrad", "Adam"]
    for step, (name, kind, settings) in enumerate(
        zip([name for name, _ in model.named_parameters()], kinds, expected, strict=True), 1
    ):
        stated = record(tmp_path, step)
        assert (stated.since, stated.optimizer_steps) == (step - 1, 1)
        (group,) = stated.groups  # of the one that made this step alone
        assert group.tensors == (name,)
        assert dataclasses.replace(group, tensors=(), gradient_norms=()) == dataclasses.replace(
            plain, optimizer=kind, **settings
        )
    last = load_file(moments_path(tmp_path, 4))
    assert sorted(last) == ["exp_avg/2.bias"] + [
        f"exp_avg_sq/{name}" for name in ("0.bias", "2.bias", "2.weight")
    ]


def test_accumulated_gradients_are_one(tmp_path: Path, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Recorder(tmp_path, model).attach(optimizer):
        truth = gradients(model, 0, times=4)
        optimizer.step()
    assert norms(record(tmp_path, 1)) == norms_of(truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_many_numbers_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    """That of torch is 1e-3 off here."""
    model = nn.Linear(5000, 5000, bias=False, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    model.weight.grad = torch.randn(5000, 5000, generator=generator, dtype=dtype)
    exact = float(torch.linalg.vector_norm(model.weight.grad, dtype=torch.float64))
    with Recorder(tmp_path, model) as recorder:
        recorder.attach(optimizer)
        optimizer.step()
    assert norms(record(tmp_path, 1)) == {"weight": pytest.approx(exact, rel=1e-5)}


def test_what_has_no_gradient_is_in_no_group_and_late_ones_are_apart(
    tmp_path: Path, model: nn.Module
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first = model.get_submodule("0")
    with Recorder(tmp_path, model).attach(optimizer, save="moments"):
        first.requires_grad_(False)
        for step in range(2):
            gradients(model, step)
            optimizer.step()
        first.requires_grad_(True)
        gradients(model, 2)
        optimizer.step()
    assert norms(record(tmp_path, 2)).keys() == {"2.weight", "2.bias"}
    late = record(tmp_path, 3)
    assert {group.tensors: (group.steps, group.has_memory) for group in late.groups} == {
        ("0.weight", "0.bias"): (1, False),
        ("2.weight", "2.bias"): (3, True),
    }
    assert [len(load_file(moments_path(tmp_path, step))) for step in (1, 2, 3)] == [4, 4, 8]


@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_of_a_closure_are_seen_before_the_step_changes_them(
    tmp_path: Path, model: nn.Module, foreach: bool
) -> None:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, foreach=foreach
    )
    truth = []

    def closure() -> float:
        truth.append(gradients(model, len(truth)))
        return 1.5

    with Recorder(tmp_path, model).attach(optimizer):
        assert optimizer.step(closure) == 1.5
        assert optimizer.step(closure=closure) == 1.5
        truth.append(gradients(model, 2))
        optimizer.step()
    for step in (1, 2, 3):
        assert norms(record(tmp_path, step)) == norms_of(truth[step - 1])


def test_steps_between_iterates_are_counted(tmp_path: Path, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Recorder(tmp_path, model, every=2).attach(optimizer):
        for step in range(4):
            truth = gradients(model, step)
            optimizer.step()
    stated = records(tmp_path)
    assert stated.keys() == {0, 2, 4}
    last = record(tmp_path, 4)
    assert (last.since, last.optimizer_steps) == (2, 2)
    assert norms(last) == norms_of(truth)


def test_a_step_whose_iterate_was_lost_is_counted(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Recorder(tmp_path, model).attach(optimizer):
        gradients(model, 0)
        with monkeypatch.context() as patch:
            patch.setattr(writer.Writer, "buffer", interrupt_now)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        optimizer.step()
    stated = record(tmp_path, 2)
    assert (stated.since, stated.optimizer_steps) == (0, 2)


def test_a_step_that_fails_is_not_counted(tmp_path: Path, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def fails() -> float:
        raise ValueError

    with Recorder(tmp_path, model).attach(optimizer):
        with contextlib.suppress(ValueError):
            optimizer.step(fails)
        gradients(model, 0)
        optimizer.step()
    assert record(tmp_path, 1).optimizer_steps == 1


def test_a_recorder_that_is_not_attached_records_what_it_is_told_to_follow(
    tmp_path: Path, model: nn.Module
) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    with Recorder(tmp_path, model) as recorder:
        recorder.save(0)
        gradients(model, 0)
        optimizer.step()
        recorder.save(1)
        optimizer.step()  # which nobody sees
        recorder.follow(optimizer, step=2, save="moments")
        optimizer.step()
        recorder.save(3)
        optimizer.step()
        recorder.save(4)
    stated = records(tmp_path)
    assert [stated[step] for step in (0, 1, 3)] == [None] * 3
    last = record(tmp_path, 4)
    assert (last.since, last.optimizer_steps, last.groups[0].steps) == (3, 1, 4)
    assert moments_path(tmp_path, 3).exists()


# --- gradient scalers -----------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_recorded_unscaled_and_skipped_steps_have_no_record(
    tmp_path: Path, model: nn.Module, fused: bool
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Recorder(tmp_path, model).attach(optimizer):
        for factor in (1.0, math.inf, 1.0):
            truth = gradients(model, 3)
            for parameter in model.parameters():
                parameter.grad.mul_(scaler.get_scale() * factor)  # type: ignore[union-attr]
            scaler.scale(torch.zeros(()))  # which makes the scaler's own state
            scaler.step(optimizer)
            scaler.update()
    stated = {step: entry for step, entry in records(tmp_path).items() if entry is not None}
    # the fused one skips on the device, where no wait may ask for it: an iterate without a record
    assert list(stated) == ([1, 3] if fused else [1, 2])
    last = stated[max(stated)]
    assert norms(last) == norms_of(truth)
    assert last.optimizer_steps == 1
    assert last.groups[0].steps == 2


# --- clipping -------------------------------------------------------------------------------------


def test_clipping_through_the_recorder_is_torchs_and_noted(
    tmp_path: Path, model: nn.Module
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Recorder(tmp_path, model).attach(optimizer) as recorder:
        truth = gradients(model, 0)
        norm = recorder.clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        optimizer.step()
        gradients(model, 1)
        recorder.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        optimizer.step()  # without
        recorder.note_clipping(0.25)
        optimizer.step()
    whole = math.sqrt(sum(float(g.square().sum()) for g in truth.values()))
    assert float(norm) == pytest.approx(whole)
    first = record(tmp_path, 1)
    assert first.clip == pytest.approx(0.5 / whole, rel=1e-5)
    assert norms(first) == norms_of(truth, 0.5 / whole)
    assert [record(tmp_path, step).clip for step in (2, 3, 4)] == [1.0, None, 0.25]


def test_clipping_of_parts_is_not_taken_for_one_factor(tmp_path: Path, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    parts = [list(model.get_submodule(name).parameters()) for name in "02"]
    with Recorder(tmp_path, model).attach(optimizer) as recorder:
        gradients(model, 0)
        recorder.clip_grad_norm_(parts[0], 0.5)
        optimizer.step()
        for part in parts:
            recorder.clip_grad_norm_(part, 0.5)
        optimizer.step()
    assert [record(tmp_path, step).clip for step in (1, 2)] == [None, None]


def test_each_of_several_optimisers_has_its_own_clipping(tmp_path: Path, model: nn.Module) -> None:
    parts = [list(model.get_submodule(name).parameters()) for name in "02"]
    first, second = (torch.optim.SGD(part, lr=0.01) for part in parts)
    with Recorder(tmp_path, model).attach(first, second) as recorder:
        gradients(model, 0)
        recorder.clip_grad_norm_(model.parameters(), 1e9)
        first.step()
        second.step()
        recorder.clip_grad_norm_(parts[0], 1e-9)
        second.step()
        first.step()
    clips = [record(tmp_path, step).clip for step in (1, 2, 3, 4)]
    assert clips[:3] == [1.0, 1.0, None]
    assert clips[3] is not None
    assert clips[3] < 1e-6


def test_the_clipping_of_a_skipped_step_is_forgotten(tmp_path: Path, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Recorder(tmp_path, model).attach(optimizer) as recorder:
        for max_norm in (0.5, 1e9):  # the first is never stepped with
            gradients(model, 0)
            recorder.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    assert record(tmp_path, 1).clip == 1.0


# --- wrappers -------------------------------------------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """Moves the weights once more, as the wrapper of that name does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)


class Thin:
    """Passes everything on, and is no optimiser of torch's."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self) -> None:
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad()


class Twice(torch.optim.SGD):
    """Calls the `step` of its base: torch runs its hooks for both."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    ("wrap", "count", "optimizer"),
    [
        (Lookahead, 2, f"{__name__}.Lookahead"),
        (Thin, 1, "SGD"),
        (lambda inner: Twice(inner.param_groups, lr=0.01), 1, f"{__name__}.Twice"),
    ],
    ids=["moves once more", "passes on", "calls its base"],
)
def test_steps_within_steps_are_counted(
    tmp_path: Path,
    model: nn.Module,
    wrap: Callable[[torch.optim.Optimizer], Any],
    count: int,
    optimizer: str,
) -> None:
    outer = wrap(torch.optim.SGD(model.parameters(), lr=0.01))
    with Recorder(tmp_path, model).attach(outer):
        for step in range(3):
            gradients(model, step)
            outer.step()
    for step in (1, 2, 3):
        stated = record(tmp_path, step)
        assert (stated.since, stated.optimizer_steps) == (step - 1, count)
        assert {group.optimizer for group in stated.groups} == {optimizer}
        assert {group.steps for group in stated.groups} <= {step, 2 * step}


def test_partners_of_other_tensors_are_one_step_together(tmp_path: Path, model: nn.Module) -> None:
    first, second = (
        torch.optim.SGD(model.get_submodule(name).parameters(), lr=0.01) for name in "02"
    )
    with Recorder(tmp_path, model).attach(second):
        gradients(model, 0)
        first.step()  # not attached
        second.step()
    stated = record(tmp_path, 1)
    assert stated.optimizer_steps == 1
    assert norms(stated).keys() == {name for name, _ in model.named_parameters()}


# --- moments --------------------------------------------------------------------------------------


def test_moments_are_those_of_the_iterate_beside_them(tmp_path: Path, model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    names = {parameter: name for name, parameter in model.named_parameters()}
    truth = {}
    with Recorder(tmp_path, model).attach(optimizer, save="moments"):
        for step in (1, 2, 3):
            gradients(model, step)
            optimizer.step()
            truth[step] = {
                f"{kind}/{names[parameter]}": state[kind].clone()
                for parameter, state in optimizer.state.items()
                for kind in ("exp_avg", "exp_avg_sq")
            }
    trajectory = open_trajectory(tmp_path, moments=True)
    assert trajectory.steps == [0, 1, 2, 3]
    assert trajectory.tensors.keys() == set(names.values())
    first, *others = trajectory.checkpoints
    assert first.moments is None
    for checkpoint in others:
        assert checkpoint.moments is not None
        moments = load_file(checkpoint.moments_file)
        assert moments.keys() == truth[checkpoint.step].keys()
        assert all(torch.equal(moments[key], truth[checkpoint.step][key]) for key in moments)


def test_a_training_that_is_resumed_has_the_moments_it_begins_with(
    tmp_path: Path, model: nn.Module
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with Recorder(tmp_path, model).attach(optimizer):
        gradients(model, 0)
        optimizer.step()
    with Recorder(tmp_path, model).attach(optimizer, step=1, save="moments"):
        gradients(model, 1)
        optimizer.step()
    assert [path.name for path in sorted((tmp_path / "moments").iterdir())] == [
        "step_00000001.safetensors",
        "step_00000002.safetensors",
    ]
    before = moments_path(tmp_path, 1).stat().st_mtime_ns
    with Recorder(tmp_path, model).attach(optimizer, step=2, save="moments"):
        pass
    assert moments_path(tmp_path, 1).stat().st_mtime_ns == before
    stated = record(tmp_path, 2)
    assert (stated.since, stated.groups[0].steps, stated.groups[0].has_memory) == (1, 2, True)


@pytest.mark.parametrize("how", ["empty", "half", "zeros at the end"])
def test_moments_that_a_power_cut_spoiled_are_written_again(
    tmp_path: Path, model: nn.Module, how: str
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with Recorder(tmp_path, model).attach(optimizer, save="moments"):
        gradients(model, 1)
        optimizer.step()
    path = moments_path(tmp_path, 1)
    whole = path.read_bytes()
    size = {"empty": 0, "half": len(whole) // 2, "zeros at the end": len(whole) - 8}[how]
    os.truncate(path, size)
    if how == "zeros at the end":
        os.truncate(path, len(whole))
    assert path.read_bytes() != whole
    with Recorder(tmp_path, model).attach(optimizer, step=1, save="moments"):
        pass
    assert path.read_bytes() == whole


def test_space_for_moments_is_asked_for_before_there_are_any(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    free = type("Usage", (), {"free": 11 * size * 2})()
    monkeypatch.setattr("lca_posthoc.recording.recorder.shutil.disk_usage", lambda _: free)
    optimizer = torch.optim.AdamW(model.parameters())
    with Recorder(tmp_path / "scalars", model, until=10).attach(optimizer):
        pass
    with pytest.raises(ResourceError, match="11 iterates of"):
        Recorder(tmp_path / "moments", model, until=10).attach(optimizer, save="moments")
    assert not (tmp_path / "moments").exists()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with Recorder(tmp_path / "sgd", model, until=10).attach(sgd, save="moments"):
        pass


def test_a_refused_attachment_can_be_made_again(tmp_path: Path, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = Recorder(tmp_path, model)
    with pytest.raises(InputError, match="choose 'scalars' or 'moments'"):
        recorder.attach(optimizer, save="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="step -1"):
        recorder.attach(optimizer, step=-1)
    with recorder.attach(optimizer):
        gradients(model, 0)
        optimizer.step()
    assert record(tmp_path, 1).optimizer_steps == 1


@pytest.fixture
def few_buffers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Leave room for three sets only; the bytes of every buffer that is made."""
    monkeypatch.setattr(writer, "_MEMORY", 0)
    sizes: list[int] = []
    make = writer.Staging
    monkeypatch.setattr(
        writer, "Staging", lambda layout: sizes.append(layout.bytes) or make(layout)
    )
    return sizes


def test_sets_in_flight_are_bounded(
    tmp_path: Path, model: nn.Module, few_buffers: list[int]
) -> None:
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    with Recorder(tmp_path, model).attach(optimizer, save="moments"):
        for step in range(30):
            gradients(model, step)
            optimizer.step()
    assert few_buffers.count(size) <= writer.FEWEST
    assert few_buffers.count(2 * size) <= writer.FEWEST
    assert sum(few_buffers) <= writer.FEWEST * 3 * size


def test_moments_that_cannot_be_written_leave_their_iterate_out(
    tmp_path: Path, model: nn.Module
) -> None:
    (tmp_path / "moments").write_text("in the way")
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = Recorder(tmp_path, model).attach(optimizer, save="moments")
    gradients(model, 0)
    optimizer.step()
    with pytest.raises(ResourceError, match=r"cannot write .*step_00000001"):
        recorder.close()
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == ["step_00000000.safetensors"]
