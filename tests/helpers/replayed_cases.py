"""Iterates, runs and oracles of the cases, each made once, and how results are held against each
other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lca_posthoc import Run, run
from lca_posthoc.numerics.allocation import Method, allocate_span
from lca_posthoc.numerics.objective import Objective, ObjectiveSettings, build_objective
from lca_posthoc.numerics.quadrature import RULES
from lca_posthoc.numerics.schema import SIGNED, TOTALS
from lca_posthoc.numerics.segment_allocation import SegmentAllocation
from lca_posthoc.results import LossResults

from . import oracle
from .model_cases import CASES, Case
from .oracle import Oracle, Truth

KINKED = replace(CASES["relu_mlp"], learning_rate=0.5)
Point = Mapping[str, Tensor]


class Lab:
    """Iterates, runs and oracles of the cases, each made once.

    Runs are computed on `device` in `precision` unless a test says otherwise; the oracle judges
    them on the CPU in float64.
    """

    def __init__(self, root: Path, device: str = "cpu", precision: str = "float32") -> None:
        self.root, self._numbers = root, itertools.count()
        self.device, self.precision = device, precision
        self.iterates, self._replay, self.truth = (
            cache(self.iterates),
            cache(self._replay),
            cache(self.truth),
        )

    def iterates(self, name: str) -> Path:
        return case_of(name).record(self.root / name, steps=5)

    def checkpoints(self, name: str) -> list[dict[str, Tensor]]:
        return [load_file(path) for path in sorted(self.iterates(name).glob("*.safetensors"))]

    def settings(self, **settings: Any) -> dict[str, Any]:
        """Settings of a run of every loss in one span in this process, never refined, with those
        that are given in their place.
        """
        return {
            "tolerance": math.inf,
            "cluster": "inline",
            "device": self.device,
            "precision": self.precision,
            "losses": ("all",),
            "span": 8,
            **settings,
        }

    def new_place(self, kind: str = "run") -> Path:
        """A path below the lab's directory at which nothing is yet."""
        return self.root / f"{kind}{next(self._numbers)}"

    def replay(self, name: str, **settings: Any) -> Run:
        """A run of a case, made at the first call with these settings."""
        return self._replay(name, **{"precision": self.precision, **settings})

    def _replay(self, name: str, **settings: Any) -> Run:
        chosen = self.settings(**{"batch_size": case_of(name).batch_size, **settings})
        return run(self.iterates(name), case_of(name).task(), out=self.new_place(), **chosen)

    def results(self, name: str, loss: str | None = None, **settings: Any) -> LossResults:
        return self.replay(name, **settings)[loss or first_loss(name)]

    def truth(
        self, name: str, loss: str | None = None, rule: str | int = "simpson", mode: str = "running"
    ) -> Truth:
        """The oracle's, for a rule by name or for a number of intervals (1: the trapezoid)."""
        case, loss = case_of(name), loss or first_loss(name)
        nodes, weights = (
            oracle.RULES["trapezoid"]
            if rule == 1
            else oracle.RULES.get(rule) or oracle.simpson(rule)
        )
        size = case.batch_size if mode == "batch" else None
        judge = Oracle(
            case.build,
            case.data()[case.losses[loss].on],
            case.values[loss],
            norm_stats=mode,
            batch_size=size,
        )
        return judge.allocate(self.checkpoints(name), nodes, weights)


def case_of(name: str) -> Case:
    return KINKED if name == "kinked" else CASES[name]


def first_loss(name: str) -> str:
    return next(iter(case_of(name).losses))


def arrays(dataset: Any) -> dict[str, np.ndarray]:
    return {str(name): each.values for name, each in dataset.data_vars.items()}


def stored_and_wanted(
    results: LossResults, truth: Truth
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    found, wanted = (
        arrays(results.allocation),
        {name: each.numpy() for name, each in truth.stacked().items()},
    )
    assert {name: each.shape for name, each in found.items()} == {
        name: each.shape for name, each in wanted.items()
    }
    assert all(each.dtype == np.float32 for each in found.values())
    return found, wanted


def worst_error(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """Largest over tensors of Σ|A − A*| / max(Σ|A*| of the tensor, 1e-5 · Σ|A*| of all tensors)."""
    sizes = {name: float(np.abs(each).sum()) for name, each in wanted.items()}
    floor = 1e-5 * sum(sizes.values())
    return max(
        float(np.abs(found[name] - wanted[name]).sum()) / max(sizes[name], floor) for name in wanted
    )


def objective_of(case: Case, point: Point, device: str = "cpu", **settings: Any) -> Objective:
    chosen = {
        "precision": "float64",
        "norm_stats": "running",
        "batch_size": case.batch_size,
        **settings,
    }
    objective = build_objective(
        case.task, None, ObjectiveSettings(device=torch.device(device), **chosen)
    )
    objective.settle_batch_sizes(in_precision(point, objective.dtype, device))
    return objective


def in_precision(point: Point, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    return {
        name: each.to(device, dtype) if each.is_floating_point() else each.to(device)
        for name, each in point.items()
    }


def residuals(truth: Truth) -> list[float]:
    changes = [after - before for before, after in itertools.pairwise(truth.losses)]
    sums = [sum(float(each.sum()) for each in segment.values()) for segment in truth.allocation]
    return [change - allocated for change, allocated in zip(changes, sums, strict=True)]


def over_units(values: np.ndarray, dims: int, axis: int | None) -> np.ndarray:
    """Σ over the last `dims` axes, which are those of a tensor, but for that of its units; without
    one the tensor is one unit.
    """
    lead = values.ndim - dims
    if axis is None:
        return values.reshape(*values.shape[:lead], -1).sum(-1, keepdims=True)
    return values.sum(tuple(lead + other for other in range(dims) if other != axis))


def assert_sums_agree(sums: LossResults, whole: LossResults, rounding: float = 1e-6) -> None:
    """Numerics 10: what a run of sums holds is what one that keeps parameters comes to, within
    `rounding` of max(Σ|A| of the tensor, 1e-5 · Σ|A| of all tensors). Losses are the same but where
    batches are others, of several groups.
    """
    for name in ("step", "weight", "evaluations", "level", "converged"):
        assert np.array_equal(sums.steps[name].values, whole.steps[name].values), name
    apart = 0.0 if sums.record.sites is None else rounding
    for name in ("loss_start", "loss_end"):
        assert sums.steps[name].values == pytest.approx(whole.steps[name].values, rel=apart, abs=0)
    found, wanted = (each.tensors["allocated"].values for each in (sums, whole))
    leading = found.shape[:-1]  # segments, and groups where there are any
    kept = {name: each.astype(np.float64) for name, each in arrays(whole.allocation).items()}
    sizes = {name: np.abs(each).reshape(*leading, -1).sum(-1) for name, each in kept.items()}
    everything = np.sum([*sizes.values()], axis=0)
    axes = {tensor.spec.name: tensor.spec.unit_axis for tensor in whole.manifest.allocated}
    units = arrays(sums.units) if sums.holds("units") else {}
    for position, name in enumerate(whole.tensors["tensor"].values):
        most = rounding * np.maximum(sizes[name], 1e-5 * everything)
        assert (np.abs(found[..., position] - wanted[..., position]) <= most).all(), name
        if name in units:
            of_units = over_units(kept[name], kept[name].ndim - len(leading), axes[name])
            assert (np.abs(units[name] - of_units) <= most[..., None]).all(), name
    motions, residuals = (
        [each.tensors["motion"].values for each in (sums, whole)],
        [each.steps["residual"].values for each in (sums, whole)],
    )
    assert motions[0] == pytest.approx(motions[1], rel=rounding)
    losses = np.abs(whole.steps["loss_start"].values) + np.abs(whole.steps["loss_end"].values)
    assert (np.abs(residuals[0] - residuals[1]) <= rounding * everything + apart * losses).all()


# what there is of results, and the level of `--keep` from which on
PARTS: dict[str, tuple[str, Callable[[LossResults], Any]]] = {
    "steps": ("tensors", lambda results: results.steps),
    "tensors": ("tensors", lambda results: results.tensors),
    "allocation": ("parameters", lambda results: results.allocation),
    "units": ("units", lambda results: results.units),
    "histogram": ("statistics", lambda results: results.histogram),
    "totals": ("statistics", lambda results: results.totals),
}


def assert_same_bits(found: LossResults, wanted: LossResults) -> None:
    assert found.manifest.keep == wanted.manifest.keep
    for part, (level, opened) in PARTS.items():
        if not found.holds(level):
            continue
        one, other = arrays(opened(found)), arrays(opened(wanted))
        assert one.keys() == other.keys()
        assert [
            f"{part}/{name}" for name in one if one[name].tobytes() != other[name].tobytes()
        ] == []


def turns(values: Iterable[float]) -> int:
    """Changes of sign between non-zero values, however many zeros lie between them."""
    signs = [math.copysign(1, each) for each in values if each != 0]
    return sum(before != after for before, after in itertools.pairwise(signs))


def slow_totals(
    series: Mapping[str, np.ndarray], exact: np.ndarray, unit: float
) -> dict[str, np.ndarray]:
    """Each total of each parameter from its own series, one parameter at a time; segments are the
    first axis. Allocations are rounded to multiples of `unit`.
    """
    shape = exact.shape[1:]
    found = {name: np.zeros(shape) for name in TOTALS}
    for index in np.ndindex(*shape):
        at = (slice(None), *index)
        found["allocated"][index] = unit * math.fsum(np.rint(exact[at] / unit))
        found["helping"][index] = sum(value < 0 for value in series["allocation"][at])
        found["hurting"][index] = sum(value > 0 for value in series["allocation"][at])
        for name in SIGNED:
            found[f"{name}_turns"][index] = turns(series[name][at])
    return found


def assert_totals(
    found: np.ndarray, wanted: Mapping[str, np.ndarray], digits: float = 1e-12
) -> None:
    for position, name in enumerate(TOTALS):
        if name == "allocated":
            assert found[position] == pytest.approx(wanted[name], rel=digits, abs=1e-15)
        else:
            assert np.array_equal(found[position], wanted[name]), name


def replayed_in_this_process(
    lab: Lab, case: Case, checkpoints: list[dict[str, Tensor]], **settings: Any
) -> list[SegmentAllocation]:
    """The first loss by Simpson's rule in the precision of the lab, as a span gives it."""
    chosen = {"precision": lab.precision, **settings}
    objective = objective_of(case, checkpoints[0], lab.device, **chosen)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (loss,) = objective.losses
        segments = allocate_span(
            enumerate(checkpoints), objective, [loss], Method(RULES["simpson"])
        )
        return [done[loss] for done in segments]
    finally:
        torch.set_num_threads(threads)
