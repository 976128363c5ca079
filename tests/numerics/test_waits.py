"""How often the host waits for the device on a segment, and how many operators are begun beside the
model's own: neither grows with the number of tensors. Counted on a CPU, where every wait is a call
that asks for numbers of a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lca_posthoc import Loss, Task
from lca_posthoc.errors import SpanError
from lca_posthoc.numerics import statistics
from lca_posthoc.numerics.allocation import Gathers, Method, allocate_span
from lca_posthoc.numerics.objective import (
    Along,
    Motion,
    Objective,
    ObjectiveSettings,
    build_objective,
)
from lca_posthoc.numerics.quadrature import COMPOSITE
from lca_posthoc.numerics.statistics import SpanStatistics, SpanSums, unit_axes

WIDTH, EXAMPLES, SEGMENTS = 12, 40, 4
TENSORS = {2: 6, 25: 53, 68: 139}  # of so many hidden layers
ASKS = (
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "cpu",
    "item",
    "nonzero",
    "tolist",
)
DATA_DEPENDENT = ("nonzero", "unique", "masked_select", "_local_scalar_dense", "bincount")
VIEWS = (
    "view",
    "detach",
    "t",
    "select",
    "slice",
    "split",
    "expand",
    "unsqueeze",
    "alias",
    "unbind",
)


class Layers(nn.Module):
    """Residual layers of one width, so that the loss stays finite however many there are."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.last = nn.Linear(WIDTH, 3)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(()))] if depth > 2 else [])

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.hidden:
            inputs = inputs + torch.tanh(layer(inputs)) / len(self.hidden)
        result: Tensor = self.last(inputs)
        for scale in self.scales:
            result = result * scale
        return result


class Operators(TorchDispatchMode):
    """Counts operators that compute something, and those whose result's shape is data."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: Counter[str] = Counter()
        self.waited: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.begun[name] += 1
        if name in DATA_DEPENDENT:
            self.waited[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the calls that ask for the numbers of a tensor; one inside another counts once."""
    calls, inside = Counter[str](), [False]

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, *args: object, **kwargs: object) -> Any:
            if inside[0]:
                return method(self, *args, **kwargs)
            inside[0] = True
            try:
                calls[name] += 1
                return method(self, *args, **kwargs)
            finally:
                inside[0] = False

        return call

    with monkeypatch.context() as patch:
        for name in ASKS:
            patch.setattr(Tensor, name, counting(name, getattr(Tensor, name)))
        yield calls


def objective_of(depth: int) -> tuple[Objective, list[tuple[int, dict[str, Tensor]]]]:
    """Return the objective of a model of so many hidden layers, and points of a random walk."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(depth)
    inputs = torch.randn(EXAMPLES, WIDTH, generator=draw)
    labels = torch.randint(0, 3, (EXAMPLES,), generator=draw)
    task = Task(
        model=lambda: Layers(depth),
        data={"train": (inputs, labels)},
        losses={"train": Loss(F.cross_entropy, on="train")},
    )
    settings = ObjectiveSettings(
        device=torch.device("cpu"), precision="float32", norm_stats="running", batch_size=None
    )
    objective = build_objective(lambda: task, None, settings)
    point = {name: tensor.detach().clone() for name, tensor in objective.point.items()}
    points = []
    for step in range(SEGMENTS + 1):
        points.append((step, point))
        point = {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=draw)
            for name, tensor in point.items()
        }
    objective.settle_batch_sizes(points[0][1])
    return objective, points


def own_operators(objective: Objective, point: dict[str, Tensor]) -> int:
    """Return how many operators a forward and a backward pass of the model take."""
    objective.place(point)
    with objective.mode(), Operators() as operators:
        ((_, batch),) = objective.splits["train"].batches(EXAMPLES)
        objective.values("train", batch)[0].double().sum().backward()
    for tensor in objective.tensors.differentiable.values():
        tensor.grad = None
    return operators.begun.total()


@pytest.mark.parametrize("depth", TENSORS)
@pytest.mark.parametrize("gradient", [True, False])
def test_inside_an_evaluation_nothing_waits(
    depth: int, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, points = objective_of(depth)
    assert len(objective.table) == TENSORS[depth]
    motions = [Motion(before, after) for (_, before), (_, after) in pairwise(points[:3])]
    axes = dict.fromkeys(objective.tensors.differentiable)
    along = Along(axes, motions) if gradient else None
    objective.evaluate(points[0][1], ["train"], gradient=gradient, along=along)
    with asked(monkeypatch) as calls, Operators() as operators:
        evaluation = objective.evaluate(points[1][1], ["train"], gradient=gradient, along=along)
        if gradient:
            objective.evaluate(points[1][1], ["train"])
    assert calls == {}
    assert operators.waited == {}
    assert float(evaluation["train"].loss) > 0


def replayed(keep: str, depth: int) -> tuple[Iterator[object], SpanSums, Objective]:
    """Return an iterator whose next item is the next segment replayed."""
    objective, points = objective_of(depth)
    axes = unit_axes(objective.allocated, objective.allocated, keep)
    of_span = objective.allocated, SEGMENTS, keep, objective.device
    sums = SpanSums(*of_span) if axes is not None else SpanStatistics(*of_span, unit=2.0**-50)

    def gathering(row: int) -> dict[str, Gathers]:
        return {"train": sums.gathering(row)} if isinstance(sums, SpanStatistics) else {}

    def segments() -> Iterator[None]:
        method = Method(rule=COMPOSITE.rules[1])
        allocated = allocate_span(
            iter(points), objective, ["train"], method, axes=axes, gathering=gathering
        )
        for row, done in enumerate(allocated):
            sums.add(row, done["train"])
            yield

    return segments(), sums, objective


@pytest.mark.parametrize("keep", ["tensors", "units"])
def test_a_segment_waits_and_begins_operators_however_many_tensors_there_are(
    keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {}
    for depth in TENSORS:
        segments, sums, objective = replayed(keep, depth)
        next(segments)
        next(segments)  # both kinds of ends are known now
        with asked(monkeypatch) as calls, Operators() as operators:
            next(segments)
        assert calls.total() <= 3, calls
        assert operators.waited == {}
        point = {name: tensor.detach().clone() for name, tensor in objective.point.items()}
        beside[depth] = operators.begun.total() - 2 * own_operators(objective, point)
        assert abs(sums.steps["residual"][:3]).max() < 1e-3
    few, many = beside[min(TENSORS)], beside[max(TENSORS)]
    assert many == few, beside


@pytest.mark.parametrize("keep", ["statistics", "parameters"])
def test_what_is_kept_of_parameters_waits_no_more_where_looking_waits(
    keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device other than a CPU, whose totals are the same bits."""
    every = {}
    for looks in (True, False):
        monkeypatch.setattr(statistics, "is_looked_at", lambda device, looks=looks: looks)
        segments, sums, _ = replayed(keep, 25)
        next(segments)
        next(segments)
        with asked(monkeypatch) as calls, Operators() as operators:
            next(segments)
        if not looks:
            assert calls.total() <= 3, calls
            assert operators.waited == {}
        next(segments)
        every[looks] = sums.totals(), sums.histogram, sums.units
    (looked, *others), (not_looked, *same) = every[True], every[False]
    assert looked.keys() == not_looked.keys()
    for name, fields in looked.items():
        assert all((fields[field] == not_looked[name][field]).all() for field in fields), name
    for one, other in zip(others, same, strict=True):
        assert all((one[name] == other[name]).all() for name in one)


def test_totals_too_large_for_their_unit_are_refused_where_looking_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "is_looked_at", lambda device: False)
    objective, points = objective_of(2)
    sums = SpanStatistics(
        objective.allocated, SEGMENTS, "statistics", objective.device, unit=2.0**-90
    )
    allocated = allocate_span(iter(points), objective, ["train"], Method(rule=COMPOSITE.rules[1]))
    with pytest.raises(SpanError, match=r"hidden\.0\.weight"):
        sums.add(0, next(allocated)["train"])
