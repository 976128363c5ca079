"""The loss change of every example and what each tensor contributed to it, against Simpson's rule
over one example at a time in float64.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lca_posthoc import Loss, Recorder, Task, run
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.numerics.objective import (
    Split,
    texts_of,
)
from lca_posthoc.numerics.objective.reader import Reader
from lca_posthoc.results import LossResults

from ..helpers.oracle import _with_plain_norms
from ..helpers.tapped_models import CASES, TIME, TOKENS, Case, Data, contrastive, of_classes

COUNT, SEGMENTS = 9, 3
# second derivatives, and an example whose loss hardly depends on any parameter
BOUNDS = {"gradient penalty": 10, "queries": 10}
NODES = ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6))
pytestmark = pytest.mark.filterwarnings("default::lca_posthoc.errors.LCAWarning")


def data_of(case: Case) -> Data:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(COUNT, *case.shape, generator=generator),
        torch.randint(TOKENS, (COUNT, TIME), generator=generator),
    )


def built(case: Case) -> nn.Module:
    torch.manual_seed(3)
    return case.build()


def recorded(case: Case, place: Path) -> list[dict[str, Tensor]]:
    """Record iterates that move every tensor of a model; return them."""
    model = built(case).eval()
    points = []
    with Recorder(place, model) as recorder:
        for step in range(SEGMENTS + 1):
            points.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            recorder.save(step)
            with torch.no_grad():
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                    if tensor.is_floating_point() and not name.endswith(("mask", "_u", "_v")):
                        tensor += 0.02 * torch.rand_like(tensor)
    return points


def task_of(case: Case, **stated: object) -> Task:
    def values(model: nn.Module, batch: Data) -> Tensor:
        return case.values(model, batch)

    data = TensorDataset(*data_of(case))
    return Task(
        lambda: built(case),
        {"train": data},
        {
            "train": Loss(call=values),
            "probe": Loss(call=values, **{"per": "example", **stated}),  # type: ignore[arg-type]
        },
    )


@dataclass(frozen=True)
class Single:
    """An example on a segment: what every tensor contributes to its loss change, and the sum of the
    sizes of what single parameters do.
    """

    sums: dict[str, float]
    size: float


def one_at_a_time(case: Case, points: list[dict[str, Tensor]]) -> list[list[Single]]:
    """Return the examples by segment."""
    model = _with_plain_norms(copy.deepcopy(built(case).double().eval()), False)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    moving = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    inputs, tokens = data_of(case)
    found = []
    for start, end in itertools.pairwise(points):
        ends = [{name: point[name].double() for name in moving} for point in (start, end)]
        of_segment = []
        for example in range(COUNT):
            products = {name: torch.zeros_like(tensor) for name, tensor in moving.items()}
            for node, weight in NODES:
                for name, tensor in moving.items():
                    tensor.data = torch.lerp(ends[0][name], ends[1][name], node)
                    tensor.requires_grad_().grad = None
                one = inputs[example : example + 1].double(), tokens[example : example + 1]
                case.values(model, one).mean().backward()
                for name, tensor in moving.items():
                    if tensor.grad is not None:
                        step = ends[1][name] - ends[0][name]
                        products[name] += weight * step * tensor.grad
            sums = {name: float(product.sum()) for name, product in products.items()}
            size = sum(float(product.detach().abs().sum()) for product in products.values())
            of_segment.append(Single(sums, size))
        found.append(of_segment)
    return found


def replay(case: Case, place: Path, out: str, **options: object) -> LossResults:
    task = options.pop("task", None) or task_of(case)
    settings = {"keep": "tensors", "tolerance": "inf", "batch_size": 4, **options}
    return run(
        place / "ck",
        task,
        losses=["all"],
        cluster="inline",
        out=place / out,
        **settings,  # type: ignore[arg-type]
    )["probe"]


def assert_closed(results: LossResults) -> None:
    """Every example's sum over tensors and residual is its loss change, and the weighted mean over
    examples is the tensor's sum.
    """
    examples, sums = results.examples.load(), results.tensors["allocated"].to_numpy()
    change = (examples["loss_end"] - examples["loss_start"]).to_numpy()
    total = (examples["allocated"].sum("tensor") + examples["residual"]).to_numpy()
    scale = np.abs(examples["allocated"].to_numpy()).sum(-1) + examples["loss_start"].to_numpy()
    assert (np.abs(change - total) <= 1e-6 * scale).all()
    weight = examples["weight"].to_numpy().astype("float64")[..., None]
    allocated = examples["allocated"].to_numpy().astype("float64")
    mean = (weight * allocated).sum(1) / weight.sum(1)
    size = (weight * np.abs(allocated)).sum(1) / weight.sum(1)
    assert (np.abs(mean - sums) <= 1e-6 * size.sum(-1, keepdims=True)).all()


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("float64", 2e-7)])
@pytest.mark.parametrize("name", CASES)
def test_examples_are_those_of_passes_over_one(
    name: str, precision: str, bound: float, tmp_path: Path
) -> None:
    """Stored are float32 numbers, of sums in float64 as well."""
    case = CASES[name]
    points = recorded(case, tmp_path / "ck")
    probe = replay(case, tmp_path, "run", precision=precision)
    truth = one_at_a_time(case, points)
    examples = probe.examples.load()
    assert (probe.record.sites is None) == bool(case.untold)
    largest = max(single.size for of_segment in truth for single in of_segment)
    bound *= BOUNDS.get(name, 1)
    for step, of_segment in enumerate(truth):
        for example, single in enumerate(of_segment):
            told = examples["allocated"].isel(step=step, example=example)
            apart = sum(
                abs(float(told.sel(tensor=tensor)) - single.sums[tensor])
                for tensor in told["tensor"].to_numpy()
            )
            size = max(single.size, 0.01 * largest)
            assert apart <= bound * size, (step, example, apart / size)
    assert_closed(probe)


def of_pixels(model: nn.Module, batch: Data) -> Tensor:
    return (model(batch[0]) - batch[0].mean(1, keepdim=True)).square()


ELEMENTS = {
    "transformer": CASES["transformer"],
    "gpt-2's layers": CASES["gpt-2's layers"],
    "attention": CASES["attention"],
    "lstm": CASES["lstm"],
    "pixels": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1)
        ),
        of_pixels,
        shape=(2, 3, 3),
    ),
}


def only(case: Case, index: int) -> Callable[[nn.Module, Data], Tensor]:
    """One element of the loss of every example."""
    return lambda model, batch: case.values(model, batch).flatten(1)[:, index]


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_are_those_of_backward_passes_from_one(name: str, tmp_path: Path) -> None:
    case = ELEMENTS[name]
    points = recorded(case, tmp_path / "ck")
    task = task_of(case, per="element")
    probe = replay(case, tmp_path, "run", task=task)
    elements = probe.examples.load()
    count = elements.sizes["element"] // COUNT
    assert elements["example"].to_numpy().tolist() == [
        example for example in range(COUNT) for _ in range(count)
    ]
    assert elements["index"].to_numpy().tolist() == list(range(count)) * COUNT
    apart = np.zeros((SEGMENTS, COUNT * count))
    sizes = np.zeros_like(apart)
    for index in range(count):
        one = replace(case, values=only(case, index))
        for step, of_segment in enumerate(one_at_a_time(one, points)):
            for example, single in enumerate(of_segment):
                position = example * count + index
                told = elements["allocated"].isel(step=step, element=position)
                sizes[step, position] = single.size
                apart[step, position] = sum(
                    abs(float(told.sel(tensor=tensor)) - wanted)
                    for tensor, wanted in single.sums.items()
                )
    ratio = apart / np.maximum(sizes, 0.01 * sizes.max())
    assert ratio.max() <= 1e-5
    assert_closed(probe)


@pytest.mark.parametrize("keep", ["units", "statistics", "parameters"])
@pytest.mark.parametrize("name", ["conv net", "transformer", "lstm"])
def test_every_level_has_the_examples_of_tensors(name: str, keep: str, tmp_path: Path) -> None:
    case = CASES[name]
    recorded(case, tmp_path / "ck")
    wanted = replay(case, tmp_path, "run").examples.load()
    found = replay(case, tmp_path, "other", keep=keep)
    for field in wanted:
        assert (wanted[field] == found.examples[field]).all(), field
    assert_closed(found)


@pytest.mark.parametrize("rule", ["left", "midpoint", "gauss-2", "trapezoid"])
def test_every_rule_closes(rule: str, tmp_path: Path) -> None:
    recorded(CASES["mlp"], tmp_path / "ck")
    for keep in ("tensors", "parameters"):
        assert_closed(replay(CASES["mlp"], tmp_path, keep, keep=keep, rule=rule))


def test_refinement_is_that_of_the_plain_loss(tmp_path: Path) -> None:
    recorded(CASES["mlp"], tmp_path / "ck")
    probe = replay(CASES["mlp"], tmp_path, "run", tolerance=1e-7, rule="trapezoid")
    assert probe.steps["level"].max() > 1
    assert_closed(probe)
    fine = np.abs(probe.examples["residual"]).mean()
    coarse = replay(CASES["mlp"], tmp_path, "coarse", rule="trapezoid")
    assert fine < 0.1 * np.abs(coarse.examples["residual"]).mean()


def test_groups_are_means_of_their_examples(tmp_path: Path) -> None:
    recorded(CASES["mlp"], tmp_path / "ck")
    labels = ["odd" if example % 3 else "even" for example in range(COUNT)]
    task = task_of(CASES["mlp"], group_by=labels)
    for keep in ("tensors", "units", "parameters"):
        probe = replay(CASES["mlp"], tmp_path, keep, task=task, keep=keep)
        examples = probe.examples.load()
        assert list(examples["group"].to_numpy()) == labels
        mean = examples["allocated"].groupby("group").mean("example")
        sums = probe.tensors["allocated"]
        size = np.abs(examples["allocated"]).sum(("example", "tensor")).max()
        assert (np.abs(mean.transpose(*sums.dims) - sums) <= 1e-6 * size).all()


def weighted(model: nn.Module, batch: Data) -> tuple[Tensor, Tensor]:
    values = of_classes(model, batch)
    return values, (batch[1][:, 0] % 4).double()


def test_an_example_without_weight_has_zeros(tmp_path: Path) -> None:
    case = CASES["mlp"]
    recorded(case, tmp_path / "ck")
    data = data_of(case)
    losses = {"probe": Loss(call=weighted, per="example")}
    task = Task(lambda: built(case), {"train": TensorDataset(*data)}, losses)
    probe = replay(case, tmp_path, "run", task=task)
    examples = probe.examples.load()
    wanted = (data[1][:, 0] % 4).numpy()
    assert (examples["weight"].to_numpy() == wanted).all()
    assert 0 < (wanted == 0).sum() < COUNT
    weightless = examples.isel(example=np.flatnonzero(wanted == 0))
    for field in ("allocated", "loss_start", "loss_end", "residual"):
        assert (weightless[field] == 0).all()
        assert (examples[field].isel(example=np.flatnonzero(wanted)) != 0).any("step").all()
    assert_closed(probe)


def test_a_subset_keeps_its_positions(tmp_path: Path) -> None:
    recorded(CASES["mlp"], tmp_path / "ck")
    probe = replay(CASES["mlp"], tmp_path, "some", subset=["0.5@3"])
    whole = replay(CASES["mlp"], tmp_path, "all").examples.load()
    examples = probe.examples.load()
    assert 1 < examples.sizes["example"] < COUNT
    same = whole.sel(example=examples["example"])
    assert np.allclose(same["allocated"], examples["allocated"], rtol=1e-4, atol=1e-7)
    assert_closed(probe)


@pytest.mark.parametrize("name", ["transformer", "conv net", "lstm"])
def test_the_same_bits_however_a_run_is_cut(name: str, tmp_path: Path) -> None:
    recorded(CASES[name], tmp_path / "ck")
    whole = replay(CASES[name], tmp_path, "whole").examples.load()
    last = max((tmp_path / "ck").glob("*.safetensors"))
    last.rename(tmp_path / last.name)
    assert replay(CASES[name], tmp_path, "cut").examples.sizes["step"] == SEGMENTS - 1
    (tmp_path / last.name).rename(last)
    grown = replay(CASES[name], tmp_path, "cut").examples.load()
    for field in whole:
        assert whole[field].to_numpy().tobytes() == grown[field].to_numpy().tobytes(), field


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        (Loss(call=contrastive, per="example"), {}, "one batch"),
        (Loss(call=of_classes, per="example"), {"norm_stats": "batch"}, "--norm-stats batch"),
    ],
)
def test_losses_that_mix_examples_are_refused(
    loss: Loss, options: dict[str, object], words: str, tmp_path: Path
) -> None:
    case = CASES["mlp"]
    recorded(case, tmp_path / "ck")
    task = Task(lambda: built(case), {"train": TensorDataset(*data_of(case))}, {"probe": loss})
    with pytest.raises(InputError, match=words):
        replay(case, tmp_path, "run", task=task, **options)


class Mean(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_the_module_that_mixes_is_named(tmp_path: Path) -> None:
    case = Case(lambda: nn.Sequential(nn.Linear(5, 6), Mean(), nn.Linear(6, 3)))
    recorded(case, tmp_path / "ck")
    task = Task(
        lambda: built(case),
        {"train": TensorDataset(*data_of(case))},
        {"probe": Loss(call=of_classes, per="example")},
    )
    with pytest.raises(InputError, match="Module '1'"):
        replay(case, tmp_path, "run", task=task)


def test_a_loss_without_examples_says_so(tmp_path: Path) -> None:
    recorded(CASES["mlp"], tmp_path / "ck")
    task = task_of(CASES["mlp"])
    plain = run(tmp_path / "ck", task, cluster="inline", out=tmp_path / "run")["train"]
    with pytest.raises(LCAError, match='per="example"'):
        _ = plain.examples


@pytest.mark.parametrize(
    "stated",
    [
        {"term": lambda model: 0, "per": "example"},
        {"fn": of_classes, "per": "token"},
        {"fn": of_classes, "per": "element", "group_by": [0, 1]},
    ],
)
def test_what_per_cannot_be(stated: dict[str, object]) -> None:
    with pytest.raises(InputError, match="per"):
        Loss(**stated)  # type: ignore[arg-type]


def beginnings(inputs: Tensor, tokens: Tensor) -> list[str]:
    return [f"<b>{row.tolist()}" for row in tokens]


def test_texts_of_examples_are_recorded(tmp_path: Path) -> None:
    recorded(CASES["mlp"], tmp_path / "ck")
    task = replace(task_of(CASES["mlp"]), show={"train": beginnings})
    probe = replay(CASES["mlp"], tmp_path, "run", task=task, subset=["0.5@3"])
    texts = beginnings(*data_of(CASES["mlp"]))
    examples = probe.examples
    wanted = [texts[position] for position in examples["example"].to_numpy()]
    assert examples["text"].to_numpy().tolist() == wanted


@pytest.mark.parametrize("show", [lambda *batch: "one", lambda *batch: ["too", "few"]])
def test_texts_are_one_for_each_example(show: Callable[..., object], tmp_path: Path) -> None:
    recorded(CASES["mlp"], tmp_path / "ck")
    task = replace(task_of(CASES["mlp"]), show={"train": show})
    with pytest.raises(InputError, match="one str for every example"):
        replay(CASES["mlp"], tmp_path, "run", task=task)


def test_texts_of_many_examples_are_cut_or_left_out() -> None:
    counts = {100: 80, 10_000: 25, 100_000: None}
    for count, length in counts.items():
        data = torch.zeros(count, 1)
        split = Split("train", (data, data), torch.device("cpu"), torch.float32, reader=Reader())
        texts = texts_of(split, 4096, lambda *batch: ["x" * 200] * len(batch[0]))
        assert (None if texts is None else {*map(len, texts)}) == (length and {length})
