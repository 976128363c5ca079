"""Sums and what is kept of every parameter come from one pass over a tensor where the rule is known
to be final, and from two where it may be refined: the same bits.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lca_posthoc.checkpoints.trajectory import TensorSpec
from lca_posthoc.errors import SpanError
from lca_posthoc.numerics.allocation import Method, allocate_span
from lca_posthoc.numerics.objective import Along, Evaluation
from lca_posthoc.numerics.parts import Point
from lca_posthoc.numerics.quadrature import RULES
from lca_posthoc.numerics.statistics import SpanStatistics

# one that is cut where units end and not where 2¹⁷ numbers do, one whose units lie apart, a small
# one, and one that is not stored
SHAPES = {"w": (700, 333), "t": (5, 300, 101), "b": (7,), "rest": (150_001,)}
AXES = {"w": 0, "t": 1, "b": 0}
TABLE = [TensorSpec(name, "parameter", SHAPES[name], unit_axis=axis) for name, axis in AXES.items()]
SEGMENTS = 3
CPU = torch.device("cpu")


class Cubic:
    """Σ a·θ³ of each of some groups, with coefficients of both signs; `factor` multiplies the
    gradient.
    """

    def __init__(self, groups: int | None, factor: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self._groups, self._factor = groups, factor
        self._coefficients = {
            name: torch.randn((groups or 1, *shape), generator=generator)
            for name, shape in SHAPES.items()
        }

    def evaluate(
        self, point: Point, losses: list[str], *, gradient: bool = True, along: Along | None = None
    ) -> dict[str, Evaluation]:
        rows = {name: self._coefficients[name] * point[name] ** 2 for name in SHAPES}
        loss = sum((rows[name] * point[name]).double().flatten(1).sum(1).numpy() for name in SHAPES)
        slopes = {name: 3 * self._factor * row for name, row in rows.items()}
        if self._groups is None:
            loss, slopes = loss[0], {name: row[0] for name, row in slopes.items()}
        return {"cubic": Evaluation.known(loss, np.ones_like(loss)[()], slopes)}


def trajectory() -> list[tuple[int, dict[str, Tensor]]]:
    """Weights that move at random, a seventh of them not at all."""
    generator = torch.Generator().manual_seed(0)
    point = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    points = [(0, point)]
    for step in range(1, SEGMENTS + 1):
        moves = {
            name: 1e-2
            * torch.randn(shape, generator=generator)
            * (torch.randint(0, 7, shape, generator=generator) > 0)
            for name, shape in SHAPES.items()
        }
        point = {name: values + moves[name] for name, values in point.items()}
        points.append((step, point))
    return points


def gathered(
    rule: str, tolerance: float, groups: int | None, factor: float = 1.0
) -> tuple[SpanStatistics, list[bool]]:
    """The statistics of a span, and of each segment whether one pass was enough."""
    statistics = SpanStatistics(TABLE, SEGMENTS, "parameters", CPU, groups, unit=2.0**-40)
    segments = allocate_span(
        trajectory(),
        Cubic(groups, factor),
        ["cubic"],
        Method(RULES[rule], tolerance),
        gathering=lambda row: {"cubic": statistics.gathering(row)},
    )
    in_one_pass = []
    for row, done in enumerate(segments):
        statistics.add(row, done["cubic"])
        in_one_pass.append(done["cubic"].gathered)
    return statistics, in_one_pass


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("rule", ["simpson", "trapezoid"])
def test_one_pass_gathers_the_bits_of_two(rule: str, groups: int | None) -> None:
    one, in_one_pass = gathered(rule, math.inf, groups)
    two, in_two_passes = gathered(rule, 1e9, groups)
    assert all(in_one_pass)
    assert not any(in_two_passes)
    for part in ("steps", "tensors", "histogram", "units", "allocation"):
        ours, theirs = getattr(one, part), getattr(two, part)
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            assert values.tobytes() == theirs[name].tobytes(), (part, name)
    ours, theirs = one.totals(), two.totals()
    for tensor, totals in ours.items():
        for name, values in totals.items():
            assert values.tobytes() == theirs[tensor][name].tobytes(), (tensor, name)
    assert one.units["w"].any()
    assert one.tensors["hurting"].all()


def test_one_pass_serves_a_rule_that_is_never_refined() -> None:
    statistics, in_one_pass = gathered("gauss-2", 1e-9, None)
    assert all(in_one_pass)
    stored = {spec.name: statistics.allocation[spec.name].astype("float64") for spec in TABLE}
    for position, (name, values) in enumerate(stored.items()):
        sums = values.reshape(SEGMENTS, -1).sum(1)
        size = np.abs(values).reshape(SEGMENTS, -1).sum(1)
        assert (np.abs(statistics.tensors["allocated"][:, position] - sums) <= 1e-6 * size).all()
        over_time = statistics.totals()[name]["allocated"] * 2.0**-40
        assert np.abs(over_time - values.sum(0)).max() <= 1e-6 * np.abs(values).max()


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("tolerance", [math.inf, 1e9])
def test_a_gradient_that_is_not_finite_is_named_in_one_pass_as_in_two(
    tolerance: float, groups: int | None
) -> None:
    with pytest.raises(SpanError, match="the gradient of loss 'cubic' for tensor 'w' holds NaN or"):
        gathered("simpson", tolerance, groups, factor=math.inf)
