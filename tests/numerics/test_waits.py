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

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lca_posthoc import Loss, Task
from lca_posthoc.errors import SpanError
from lca_posthoc.numerics import statistics
from lca_posthoc.numerics.allocation import Method, allocate_span
from lca_posthoc.numerics.objective import (
    Along,
    Motion,
    Objective,
    ObjectiveSettings,
    build_objective,
    recalled,
    recorded,
)
from lca_posthoc.numerics.path import Course, OtherPaths, SegmentPath
from lca_posthoc.numerics.quadrature import COMPOSITE
from lca_posthoc.numerics.schema import KEEP
from lca_posthoc.numerics.segment_allocation import Gathers
from lca_posthoc.numerics.statistics import SpanStatistics, SpanSums, unit_axes

WIDTH, EXAMPLES, SEGMENTS, STEPS = 12, 40, 4, 8  # training steps of a segment
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


def objective_of(
    depth: int, per: str | None = None
) -> tuple[Objective, list[tuple[int, dict[str, Tensor]]]]:
    """Return the objective of a model of so many hidden layers, and points of a random walk; with
    `per`, of a loss that tells its examples apart.
    """
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(depth)
    inputs = torch.randn(EXAMPLES, WIDTH, generator=draw)
    labels = torch.randint(0, 3, (EXAMPLES,), generator=draw)
    task = Task(
        model=lambda: Layers(depth),
        data={"train": (inputs, labels)},
        losses={"train": Loss(F.cross_entropy, on="train", per=per)},
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
    if per is not None:
        objective.place(points[0][1])
        objective.example_axes["train"] = recalled(recorded(objective.find_examples("train").axes))
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


def replayed(
    keep: str, depth: int, per: str | None = None, *, paths: bool = False
) -> tuple[Iterator[object], SpanSums, Objective]:
    """Return an iterator whose next item is the next segment replayed, of several steps each; with
    `paths`, another path is told.
    """
    objective, points = objective_of(depth, per)
    axes = unit_axes(objective.allocated, objective.allocated, keep)
    examples = None if per is None else np.zeros(EXAMPLES, "int32")
    of_span = objective.allocated, SEGMENTS, keep, objective.device, None, examples, {}
    sums = (
        SpanSums(*of_span, path=paths)
        if axes is not None
        else SpanStatistics(*of_span, path=paths, unit=2.0**-50)
    )
    method = Method(
        rule=COMPOSITE.rules[1], per_example=frozenset() if per is None else frozenset(["train"])
    )

    def gathering(row: int) -> dict[str, Gathers]:
        return {"train": sums.gathering(row)} if isinstance(sums, SpanStatistics) else {}

    def path(row: int) -> SegmentPath:
        around = (STEPS if row else None, STEPS, STEPS if row + 1 < SEGMENTS else None)
        course = Course(lambda index: points[index][1], lambda index: STEPS * index)
        return SegmentPath(OtherPaths(row, around, lambda index: True), course)

    def segments() -> Iterator[None]:
        allocated = allocate_span(
            iter(points),
            objective,
            ["train"],
            method,
            axes=axes,
            gathering=gathering,
            paths=path if paths else None,
        )
        for row, done in enumerate(allocated):
            sums.add(row, done["train"])
            yield

    return segments(), sums, objective


def third_segment(
    monkeypatch: pytest.MonkeyPatch, keep: str, depth: int, per: str | None = None, **told: bool
) -> tuple[Counter[str], Operators, Objective]:
    """Return what asks for numbers on a segment once both kinds of ends are known, and the operators
    begun on it.
    """
    segments, sums, objective = replayed(keep, depth, per, **told)
    next(segments)
    next(segments)
    with asked(monkeypatch) as calls, Operators() as operators:
        next(segments)
    assert abs(sums.steps["residual"][:3]).max() < 1e-3
    return calls, operators, objective


@pytest.mark.parametrize(
    ("keep", "looks"),
    [*((keep, False) for keep in KEEP), ("statistics", True), ("parameters", True)],
)
def test_a_segment_waits_and_begins_operators_however_many_tensors_there_are(
    keep: str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device other than a CPU, and where looking at numbers costs nothing."""
    monkeypatch.setattr(statistics, "is_looked_at", lambda device: looks)
    beside, waits = {}, {}
    for depth in TENSORS:
        calls, operators, objective = third_segment(monkeypatch, keep, depth)
        if not looks:
            assert calls.total() <= 3, calls
            assert operators.waited == {}
        point = {name: tensor.detach().clone() for name, tensor in objective.point.items()}
        beside[depth] = operators.begun.total() - 2 * own_operators(objective, point)
        waits[depth] = calls.total()
    assert len(set(beside.values())) == 1, beside
    assert len(set(waits.values())) == 1, waits


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize(
    ("per", "paths", "most"), [(None, True, 7), ("example", False, 3), ("example", True, 8)]
)
def test_paths_and_examples_wait_a_fixed_number_of_times_more(
    keep: str, per: str | None, paths: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "is_looked_at", lambda device: False)
    waits = {}
    for depth in TENSORS:
        calls, operators, _ = third_segment(monkeypatch, keep, depth, per, paths=paths)
        assert operators.waited == {}
        waits[depth] = calls.total()
    assert len(set(waits.values())) == 1, waits
    assert max(waits.values()) <= most, waits


@pytest.mark.parametrize("keep", ["statistics", "parameters"])
def test_totals_have_the_same_bits_where_looking_waits(
    keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {}
    for looks in (True, False):
        monkeypatch.setattr(statistics, "is_looked_at", lambda device, looks=looks: looks)
        segments, sums, _ = replayed(keep, 25)
        assert len(list(segments)) == SEGMENTS
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
