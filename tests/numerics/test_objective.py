"""Loss and gradient over a split: what the probe refuses, what normalisation layers do, how batches
are fed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.utils.data import Dataset

from lca_posthoc import Loss, Task, run
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import (
    Along,
    Evaluation,
    Motion,
    Objective,
    ObjectiveSettings,
    automatic_batch_size,
    build_objective,
    check_loss,
    sources,
)
from lca_posthoc.numerics.objective.normalisation import normalising

from ..helpers.model_cases import CASES, Case

INPUTS, TARGETS = CASES["smooth_mlp"].data()["train"]
Point = dict[str, Tensor]


def task_of(
    model: Callable[[], nn.Module], loss: Loss | None = None, data: Any = (INPUTS, TARGETS)
) -> Task:
    return Task(
        model=model, data={"train": data}, losses={"the_loss": loss or Loss(F.cross_entropy)}
    )


def linear() -> nn.Module:
    return nn.Linear(12, 4)


def state(model: nn.Module) -> Point:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def objective_of(task: Task, point: Mapping[str, Tensor], **settings: Any) -> Objective:
    """An objective with all losses of a task, at `point`."""
    chosen = {"precision": "float32", "norm_stats": "running", "batch_size": 7, **settings}
    objective = build_objective(
        lambda: task, ["all"], ObjectiveSettings(device=torch.device("cpu"), **chosen)
    )
    objective.settle_batch_sizes(point)
    return objective


def evaluated(
    case: Case, point: Mapping[str, Tensor], data: Any = None, **settings: Any
) -> dict[str, Evaluation]:
    task = Task(case.build, data or case.data(), case.losses)
    return objective_of(task, point, **settings).evaluate(point, list(case.losses))


def assert_same_bits(found: Mapping[str, Evaluation], wanted: Mapping[str, Evaluation]) -> None:
    for name, evaluation in wanted.items():
        assert found[name].loss == evaluation.loss
        assert found[name].gradient.keys() == evaluation.gradient.keys()
        assert all(
            torch.equal(found[name].gradient[each], evaluation.gradient[each])
            for each in evaluation.gradient
        )


def trajectory(directory: Path, model: nn.Module) -> Path:
    """Two checkpoints: a model's own tensors, and those a little further on."""
    directory.mkdir()
    for step in range(2):
        moved = {
            name: each + 0.01 * step if each.is_floating_point() else each
            for name, each in state(model).items()
        }
        save_file(moved, directory / f"step_{step}.safetensors")
    return directory


# --- the probes -----------------------------------------------------------------------------------


class Applied(nn.Module):
    """A linear model with something done to its inputs."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(12, 4), change

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.change(x))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return INPUTS[index] + 0.1 * torch.randn(12), TARGETS[index]


def applied(change: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Applied(change)


def untracked() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4, track_running_stats=False))


def contrastive(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Every example against the others of its batch."""
    outputs = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")


def own_mean(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]).reshape(1)


def opaque(
    outputs: Tensor, targets: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """A function whose name says nothing about how it weighs elements."""
    return F.cross_entropy(outputs, targets, weight=weight, reduction=reduction)


def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none") + torch.rand(len(targets))


def rounded(x: Tensor) -> Tensor:
    """What a large constant leaves of x depends on the precision it has."""
    return x + 1e7 - 1e7


def scaled(x: Tensor) -> Tensor:
    """By the unbiased variance of the batch, which is 0 / 0 for one example."""
    return x / ((x - x.mean(0)) ** 2).sum(0) * (len(x) - 1)


IGNORED = torch.where(torch.arange(50) % 5 == 0, -100, TARGETS)
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0])

REFUSED = {
    "dropout in eval mode": (
        task_of(applied(lambda x: F.dropout(x, 0.5, training=True))),
        {},
        "'the_loss' is not deterministic; dropout called with training=True",
    ),
    "noise in the loss": (task_of(linear, Loss(noisy)), {}, "'the_loss' is not deterministic; "
                                                            "sampling"),
    "augmentation": (task_of(linear, data=Augmented()), {}, "'the_loss' is not deterministic; "
                                                            "random augmentation"),
    "untracked batch norm": (
        task_of(untracked),
        {},
        "batch-norm layer; track_running_stats=False; --norm-stats batch --batch-size",
    ),
    "batch statistics by hand": (
        task_of(applied(lambda x: x - x.mean(0))),
        {},
        "'the_loss' depends on how split 'train' is cut into batches; batch statistics",
    ),
    "contrastive": (
        task_of(linear, Loss(call=contrastive)),
        {},
        "'the_loss' depends on how split 'train' is cut into batches; compares examples with each "
        "other",
    ),
    "a mean inside": (
        task_of(linear, Loss(call=own_mean)),
        {},
        "'the_loss' depends on how split 'train' is cut into batches; a mean taken inside "
        "Loss(call=fn)",
    ),
    "ignore_index": (
        task_of(linear, Loss(opaque), (INPUTS, IGNORED)),
        {},
        "mean of loss 'the_loss'; reduction='mean'; ignore_index; (values, weights)",
    ),
    "ignore_index everywhere in the sample": (
        task_of(linear, Loss(opaque), (INPUTS, torch.where(torch.arange(50) < 10, -100, TARGETS))),
        {"batch_size": 7},
        "mean of loss 'the_loss'; reduction='mean'; ignore_index; (values, weights)",
    ),
    "batch statistics by hand that one example does not have": (
        task_of(applied(scaled), data=(INPUTS[:3], TARGETS[:3])),
        {},
        "'the_loss' depends on how split 'train' is cut into batches; batch statistics",
    ),
    "class weights": (
        task_of(linear, Loss(functools.partial(opaque, weight=CLASS_WEIGHTS))),
        {},
        "mean of loss 'the_loss'; reduction='mean'; class weights; (values, weights)",
    ),
    "a scalar": (
        task_of(linear, Loss(lambda outputs, targets: F.cross_entropy(outputs, targets))),
        {},
        "'train' returned a scalar; one value per element",
    ),
    "a scalar from call": (
        task_of(linear, Loss(call=lambda model, batch: own_mean(model, batch)[0])),
        {},
        "'train' returned a scalar; one value per element",
    ),
    "not a tensor": (task_of(linear, Loss(lambda outputs, targets: [1.0])), {}, "'train' returned "
                                                                                "a list"),
    "integers": (task_of(linear, Loss(lambda outputs, targets: targets)), {}, "'train' returned; "
                                                                              "floating-point"),
    "weights of another shape": (
        task_of(linear, Loss(call=lambda model, batch: (model(batch[0])[:, 0], torch.ones(3)))),
        {},
        "'train' returned values of shape; and weights [3]",
    ),
    "weights of nothing": (
        task_of(linear, Loss(call=lambda model, batch: (model(batch[0])[:, 0], torch.zeros(len(batch[0]))))),
        {},
        "weights; 'train'; sum to 0",
    ),
    "an empty split": (task_of(linear, data=(INPUTS[:0], TARGETS[:0])), {}, "split 'train' is "
                                                                            "empty"),
    "unequal lengths": (task_of(linear, data=(INPUTS, TARGETS[:49])), {}, "split 'train'; "
                                                                          "different lengths: [49, "
                                                                          "50]"),
    "no length": (task_of(linear, data=iter([1])), {}, "split 'train' is a list_iterator; "
                                                       "map-style Dataset"),
    "three tensors for a function": (task_of(linear, data=(INPUTS, INPUTS, TARGETS)), {}, "tuple of 3; Loss(call=fn)"),
    "a failing model": (task_of(linear, data=(INPUTS[:, :5], TARGETS)), {}, "split 'train'; "
                                                                            "RuntimeError"),
    "not finite": (
        task_of(linear, Loss(lambda outputs, targets: torch.log(-outputs.abs()).sum(1))),
        {},
        "'the_loss' is nan at the first checkpoint; logarithm",
    ),
    "batch mode without a batch size": (task_of(untracked), {"norm_stats": "batch"}, "--norm-stats "
                                                                                     "batch; --batch-size"),
    "other in float32": (
        task_of(applied(rounded)),
        {"precision": "float64"},
        "'the_loss'; in float64 but; in float32; constants; --precision float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("task", "settings", "words"), REFUSED.values(), ids=REFUSED)
def test_a_task_that_breaks_an_assumption_is_refused_before_anything_is_written_and_its_culprit_named(
    tmp_path: Path, task: Task, settings: dict[str, Any], words: str
) -> None:
    torch.manual_seed(0)
    checkpoints = trajectory(tmp_path / "iterates", task.model())
    with pytest.raises(InputError) as refusal:
        run(checkpoints, task, cluster="inline", device="cpu", **settings)
    assert [word for word in words.split("; ") if word not in str(refusal.value)] == []
    assert list(tmp_path.iterdir()) == [checkpoints]


class Records(Dataset[dict[str, Any]]):
    """Examples as dictionaries with a nested pair, as a tokeniser may collate them."""

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": INPUTS[index], "rest": (int(TARGETS[index]), 1.0 + index % 3)}


def weighed_record(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    targets, weights = batch["rest"]
    return F.cross_entropy(model(batch["inputs"]), targets, reduction="none"), weights


def weighed_by_class(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none"), CLASS_WEIGHTS[batch[1]]


def known_targets(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none"), batch[1] != -100


ACCEPTED = {
    "class weights as weights": (
        task_of(linear, Loss(call=weighed_by_class)),
        lambda outputs: F.cross_entropy(outputs, TARGETS, weight=CLASS_WEIGHTS.double()),
    ),
    "ignored targets as weights": (
        task_of(linear, Loss(call=known_targets), (INPUTS, IGNORED)),
        lambda outputs: F.cross_entropy(outputs, IGNORED),
    ),
    "label smoothing": (
        task_of(linear, Loss(nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1))),
        lambda outputs: F.cross_entropy(outputs, TARGETS, label_smoothing=0.1),
    ),
    "a module with a tensor": (
        task_of(
            linear,
            Loss(nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS)),
            (INPUTS, torch.eye(4)[TARGETS]),
        ),
        lambda outputs: F.binary_cross_entropy_with_logits(
            outputs, torch.eye(4).double()[TARGETS], pos_weight=CLASS_WEIGHTS.double()
        ),
    ),
    "dictionaries": (
        task_of(linear, Loss(call=weighed_record), Records()),
        lambda outputs: (
            (F.cross_entropy(outputs, TARGETS, reduction="none") * (1 + torch.arange(50) % 3)).sum()
            / (1 + torch.arange(50) % 3).sum()
        ),
    ),
    "one example": (
        task_of(linear, data=(INPUTS[:1], TARGETS[:1])),
        lambda outputs: F.cross_entropy(outputs[:1], TARGETS[:1]),
    ),
    "its value everywhere zero": (
        task_of(linear, Loss(lambda outputs, targets: 0 * outputs)),
        lambda outputs: 0.0,
    ),
}


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("task", "wanted"), ACCEPTED.values(), ids=ACCEPTED)
def test_a_loss_is_the_weighted_mean_over_all_elements_and_passes_the_probe(
    task: Task, wanted: Callable[[Tensor], Any], precision: str
) -> None:
    torch.manual_seed(0)
    model = linear()
    objective = objective_of(task, state(model), precision=precision)
    assert check_loss(objective, "the_loss") == []
    with torch.no_grad():
        truth = float(wanted(model.double()(INPUTS.double())))
    assert objective.evaluate(state(model), ["the_loss"])["the_loss"].loss == pytest.approx(
        truth, rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize("batch_size", [7, None])
def test_a_loss_at_its_minimum_passes_the_probe(batch_size: int | None) -> None:
    """Its gradient there is nothing but rounding, which differs from one way of cutting batches to
    another.
    """
    inputs = torch.cat([INPUTS, torch.ones(50, 1)], 1)
    targets = TARGETS[:, None].float()
    best = torch.linalg.lstsq(inputs.double(), targets.double()).solution.float().T
    task = task_of(lambda: nn.Linear(13, 1, bias=False), Loss(F.mse_loss), (inputs, targets))
    assert check_loss(objective_of(task, {"weight": best}, batch_size=batch_size), "the_loss") == []


# --- normalisation layers -------------------------------------------------------------------------

NORMS = {
    "batch_norm 1d": (F.batch_norm, (5, 3), True),
    "batch_norm 1d of sequences": (F.batch_norm, (5, 3, 4), True),
    "batch_norm 2d": (F.batch_norm, (5, 3, 4, 2), True),
    "batch_norm 3d": (F.batch_norm, (2, 3, 4, 2, 2), True),
    "batch_norm without weights": (F.batch_norm, (5, 3, 4, 2), False),
    "instance_norm": (F.instance_norm, (5, 3, 4, 2), True),
    "instance_norm without weights": (F.instance_norm, (5, 3, 4), False),
}
every_norm = pytest.mark.parametrize(("native", "shape", "affine"), NORMS.values(), ids=NORMS)


def norm_arguments(
    shape: tuple[int, ...], affine: bool, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """Inputs, then running mean and variance, weight and bias."""
    generator = torch.Generator().manual_seed(5)
    x, mean, weight, bias = (
        torch.randn(extent, generator=generator, dtype=torch.float64).to(dtype)
        for extent in (shape, 3, 3, 3)
    )
    var = torch.tensor([0.02, 0.5, 30.0], dtype=torch.float64).to(dtype)
    return x, [mean, var, weight if affine else None, bias if affine else None]


def evaluation_mode(native: Callable[..., Tensor]) -> dict[str, bool]:
    return {"training" if native.__name__ == "batch_norm" else "use_input_stats": False}


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_with_a_gradient_leave_values_and_other_gradients_bit_identical(
    native: Callable[..., Tensor], shape: tuple[int, ...], affine: bool, dtype: torch.dtype
) -> None:
    def outcome(statistics_move: bool) -> list[Tensor | None]:
        x, arguments = norm_arguments(shape, affine, dtype)
        x.requires_grad_()
        for position, each in enumerate(arguments):
            if each is not None:
                each.requires_grad_(position > 1 or statistics_move)
        with normalising("running"):
            function = getattr(F, native.__name__) if statistics_move else native
            y = function(x, *arguments, **evaluation_mode(native))
            (y**3).sum().backward()
        return [y.detach(), x.grad, *(each.grad for each in arguments[2:] if each is not None)]

    for patched, plain in zip(outcome(True), outcome(False), strict=True):
        assert torch.equal(patched, plain)


@every_norm
def test_the_gradient_of_running_statistics_is_that_of_finite_differences(
    native: Callable[..., Tensor], shape: tuple[int, ...], affine: bool
) -> None:
    x, (mean, var, weight, bias) = norm_arguments(shape, affine, torch.float64)

    def energy(function: Callable[..., Tensor], mean: Tensor, var: Tensor) -> Tensor:
        return torch.sin(function(x, mean, var, weight, bias, **evaluation_mode(native))).mean()

    statistics = [mean.requires_grad_(), var.requires_grad_()]
    with normalising("running"):
        energy(getattr(F, native.__name__), mean, var).backward()
    for position, channel in itertools.product(range(2), range(3)):
        step = 1e-5 * var[channel].item()
        sides = []
        for sign in (1, -1):
            moved = [each.detach().clone() for each in statistics]
            moved[position][channel] += sign * step
            sides.append(float(energy(native, *moved)))
        difference = (sides[0] - sides[1]) / (2 * step)
        assert float(statistics[position].grad[channel]) == pytest.approx(
            difference, rel=1e-6, abs=1e-8
        )


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_the_functions_are_restored_also_after_an_error(mode: str) -> None:
    before = F.batch_norm, F.instance_norm
    inside = []

    def fail() -> None:
        with normalising(mode):
            inside.extend([F.batch_norm, F.instance_norm])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not set(inside) & set(before)
    assert (F.batch_norm, F.instance_norm) == before


def test_a_failing_model_leaves_the_functions_and_the_default_dtype_as_they_were() -> None:
    before = F.batch_norm, F.instance_norm, torch.get_default_dtype()
    task = task_of(linear, data=(INPUTS[:, :5], TARGETS))
    with pytest.raises(InputError):
        check_loss(objective_of(task, state(linear()), precision="float64"), "the_loss")
    assert (F.batch_norm, F.instance_norm, torch.get_default_dtype()) == before


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("float64", torch.float64)]
)
def test_task_model_and_loss_are_built_and_called_under_the_default_dtype_of_the_precision(
    precision: str, dtype: torch.dtype
) -> None:
    """A constant made anywhere has all the digits asked for."""
    made: list[Tensor] = []

    def constant() -> Tensor:
        made.append(torch.tensor(0.1))
        return made[-1]

    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 4)
            self.register_buffer("shift", constant(), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + self.shift) * constant()

    def build() -> Task:
        constant()
        return task_of(Constants, Loss(lambda outputs, targets: (outputs - constant()).sum(1)))

    settings = {"precision": precision, "norm_stats": "running", "batch_size": 50}
    objective = build_objective(
        build, None, ObjectiveSettings(device=torch.device("cpu"), **settings)
    )
    point = {name: each.to(dtype) for name, each in state(linear()).items()}
    point = {f"linear.{name}": each for name, each in point.items()}
    objective.settle_batch_sizes(point)
    objective.evaluate(point, ["the_loss"])
    assert len(made) == 4
    assert {each.dtype for each in made} == {dtype}
    assert objective.model.shift.item() == torch.tensor(0.1, dtype=dtype).item()


def by_keyword(x: Tensor) -> Tensor:
    return F.instance_norm(x[:, None], use_input_stats=True)[:, 0]


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_instance_norm_may_be_called_by_keyword(mode: str) -> None:
    torch.manual_seed(0)
    model = Applied(by_keyword)
    found = objective_of(task_of(applied(by_keyword)), state(model), norm_stats=mode).evaluate(
        state(model), ["the_loss"]
    )
    truth = F.cross_entropy(model(INPUTS), TARGETS).item()
    assert found["the_loss"].loss == pytest.approx(truth, rel=1e-6)


class Aliased(nn.Module):
    """Batch norm through a name that was bound before the replay could hold it to a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return batch_norm(
            self.linear(x), norm.running_mean, norm.running_var, norm.weight, norm.bias
        )


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_a_batch_norm_that_cannot_be_held_to_the_mode_is_refused(mode: str) -> None:
    with pytest.raises(InputError):
        check_loss(objective_of(task_of(Aliased), state(Aliased()), norm_stats=mode), "the_loss")


@pytest.mark.parametrize("name", ["conv_bn", "recomputed", "autoencoder"])
@pytest.mark.parametrize("mode", ["running", "batch"])
def test_evaluation_leaves_every_tensor_of_the_model_and_its_mode_as_they_were(
    name: str, mode: str
) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    point = {
        key: each + 1 if key.endswith("var") else each for key, each in state(case.build()).items()
    }
    objective = objective_of(case.task(), point, norm_stats=mode, batch_size=case.batch_size)
    objective.evaluate(point, list(case.losses))
    objective.evaluate(point, list(case.losses), gradient=False)
    after = objective.model.state_dict()
    assert after.keys() == point.keys()
    assert all(torch.equal(after[key], each) for key, each in point.items())
    assert not any(module.training for module in objective.model.modules())
    assert all(
        each.grad is None for each in [*objective.model.parameters(), *objective.model.buffers()]
    )


# --- batches --------------------------------------------------------------------------------------


class AsDataset(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(each[index] for each in self.tensors)


class Noting(AsDataset):
    """Notes what is read."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_map_style_dataset_gives_the_bits_of_tensors(name: str, precision: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    point = state(case.build())
    datasets = {split: AsDataset(tensors) for split, tensors in case.data().items()}
    settings = {"precision": precision, "batch_size": case.batch_size}
    assert_same_bits(
        evaluated(case, point, datasets, **settings), evaluated(case, point, **settings)
    )


@pytest.mark.parametrize("name", CASES)
def test_streamed_batches_give_the_bits_of_resident_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    point, names = state(case.build()), list(case.losses)
    objective = objective_of(case.task(), point, batch_size=case.batch_size)
    first, resident = objective.evaluate(point, names), objective.evaluate(point, names)
    assert_same_bits(first, resident)
    monkeypatch.setattr(sources, "_RESIDENT_SHARE", 0)
    data = {split: Noting(tensors) for split, tensors in case.data().items()}
    streaming = objective_of(Task(case.build, data, case.losses), point, batch_size=case.batch_size)
    for _ in range(2):
        for each in data.values():
            each.read.clear()
        assert_same_bits(streaming.evaluate(point, names), resident)
        used = [loss.on for loss in case.losses.values()]
        assert all(
            each.read == list(range(len(each))) * (split in used) for split, each in data.items()
        )


@pytest.mark.parametrize("name", CASES)
def test_the_automatic_batch_size_is_a_power_of_two_or_the_whole_split_and_always_the_same(
    name: str,
) -> None:
    case = CASES[name]
    point = state(case.build())
    first, second = (
        objective_of(case.task(), point, batch_size=None).batch_sizes for _ in range(2)
    )
    assert first == second
    for split, size in first.items():
        examples = len(case.data()[split][0])
        assert size == examples or (size < examples and size & (size - 1) == 0)


MIB = 2**20
# bytes that autograd saves of an example, parameters in float32, device, examples of a batch
BATCHES = {
    "many small examples": (3786, 84_060, "cpu", 2048),
    "64 MiB": (MIB, 0, "cpu", 64),
    "a power of two": (MIB + 1, 0, "cpu", 32),
    "at least one": (2**30, 0, "cpu", 1),
    "parameters of 32 MiB change nothing": (MIB, 8 * MIB, "cpu", 64),
    "larger ones do": (MIB, 16 * MIB, "cpu", 128),
    "a transformer of 3 million parameters": (8.3 * MIB, 3_225_665, "cpu", 4),
    "of 11 million": (36.9 * MIB, 10_795_841, "cpu", 2),
    "of 25 million": (32.6 * MIB, 25_352_257, "cpu", 4),
    "of 57 million": (48.8 * MIB, 56_902_721, "cpu", 8),
    "never more than so many": (100.0, 10**9, "cpu", 2048),
    "2 GiB on a GPU": (MIB, 0, "cuda", 2048),
    "a large model on a GPU": (2**30, 10**9, "cuda", 4),
}


@pytest.mark.parametrize(("saved", "parameters", "device", "size"), BATCHES.values(), ids=BATCHES)
def test_a_batch_saves_so_much_or_twice_what_the_parameters_take(
    saved: float, parameters: int, device: str, size: int
) -> None:
    chosen = automatic_batch_size(saved, 4 * parameters, torch.device(device))
    assert chosen == size
    floor = {"cpu": 64 * MIB, "cuda": 2**31}[device]
    # counted twice, it is at most what points take where sums alone are kept
    assert chosen == 1 or 2 * chosen * saved <= max(2 * floor, 16 * parameters)


def test_every_parameter_of_the_model_counts_once_whether_it_is_trained_or_not() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
            self.last.weight = self.first.weight
            self.first.bias.requires_grad_(False)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(self.first(inputs))

    data = torch.randn(4, 6), torch.randint(6, (4,))
    task = Task(Tied, {"train": data}, {"train": Loss(F.cross_entropy)})
    objective = objective_of(task, state(Tied()), batch_size=None)
    assert objective.parameter_bytes == 4 * (36 + 6 + 6)


# --- what the first examples do not show ----------------------------------------------------------


def unlabelled(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(outputs, targets, ignore_index=255, reduction=reduction)


def weighted(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(outputs, targets, torch.tensor([1.0, 2.0, 5.0]), reduction=reduction)


def labelled_mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A mean over what is labelled, taken inside."""
    inputs, targets = batch
    mask = (targets != 255).double()
    each = F.cross_entropy(model(inputs), targets.clamp(max=2), reduction="none")
    return each * mask / mask.mean()


LATE = {
    "unlabelled behind labelled": (Loss(unlabelled), "its own reduction='mean' gives"),
    "classes one after the other": (Loss(weighted), "its own reduction='mean' gives"),
    "a mean inside the call": (
        Loss(call=labelled_mean),
        "depends on how split 'train' is cut into batches",
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_a_loss_is_checked_on_examples_from_all_over_the_split(case: str) -> None:
    loss, words = LATE[case]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(900, 6, generator=generator)
    targets = torch.arange(900) // 300
    if case != "classes one after the other":
        targets[300:450] = 255
    task = Task(functools.partial(nn.Linear, 6, 3), {"train": (inputs, targets)}, {"train": loss})
    objective = objective_of(task, state(nn.Linear(6, 3)), batch_size=None)
    with pytest.raises(InputError) as caught:
        check_loss(objective, "train")
    assert words in str(caught.value)


# --- a point that is in memory once ---------------------------------------------------------------


def large_linear(*, bias: bool = True) -> nn.Module:
    """A layer whose weight is no small tensor; its bias is one."""
    return nn.Linear(12, 1000, bias=bias)


def test_a_large_point_that_the_model_holds_takes_no_memory_of_its_own_and_is_whole_again_afterwards() -> (
    None
):
    objective = objective_of(task_of(large_linear), state(large_linear()))
    given = state(large_linear())
    wide = given["bias"].double() + 1e-12  # which the model cannot hold
    point = {"weight": given["weight"].clone(), "bias": wide}
    with objective.holding(point):
        assert point["weight"].data_ptr() == objective.point["weight"].data_ptr()
        assert not point["weight"].requires_grad
        held = objective.evaluate(point, ["the_loss"])
        assert torch.equal(point["weight"], given["weight"])
        assert point["bias"] is wide
    objective.place(dict.fromkeys(point, torch.zeros(())))
    assert torch.equal(point["weight"], given["weight"])
    assert torch.equal(point["bias"], wide)
    assert_same_bits(held, objective.evaluate(point, ["the_loss"]))


def test_a_model_may_have_large_tensors_alone() -> None:
    without_bias = functools.partial(large_linear, bias=False)
    given = state(without_bias())
    objective = objective_of(task_of(without_bias), given)
    axes = dict.fromkeys(given)
    along = Along(axes, [Motion(given, {name: 2 * tensor for name, tensor in given.items()})])
    whole = objective.evaluate(given, ["the_loss"])["the_loss"].gradient["weight"].double()
    sums = objective.evaluate(given, ["the_loss"], along=along)["the_loss"].gradient["weight"]
    expected = (whole * given["weight"]).sum()
    assert abs(float(sums) - float(expected)) <= 1e-5 * float((whole * given["weight"]).abs().sum())


class SharedGradients(nn.Module):
    """Two parameters whose gradients autograd hands over in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.full((3,), 0.1)) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ torch.stack([self.one, self.other]).sum(0)


def test_gradients_that_share_memory_are_each_divided_once() -> None:
    inputs, targets = torch.ones(5, 3), torch.zeros(5)
    task = Task(SharedGradients, {"train": (inputs, targets)}, {"train": Loss(F.mse_loss)})
    settings = ObjectiveSettings(
        device=torch.device("cpu"), precision="float32", norm_stats="running", batch_size=None
    )
    objective = build_objective(lambda: task, None, settings)
    objective.settle_batch_sizes(objective.point)
    gradient = objective.evaluate(objective.point, ["train"])["train"].gradient
    for values in gradient.values():
        torch.testing.assert_close(values, torch.full((3,), 2 * 0.6))
