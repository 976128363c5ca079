"""What must always hold of the numbers (docs/numerics.md), by the number of the law; the oracle is
the judge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lca_posthoc import Loss, Task, open_run, run
from lca_posthoc.checkpoints.trajectory import TensorSpec
from lca_posthoc.errors import SpanError
from lca_posthoc.numerics.allocation import Method, allocate
from lca_posthoc.numerics.objective import (
    Between,
    Evaluation,
    Motion,
    ObjectiveSettings,
    blocks,
    build_objective,
)
from lca_posthoc.numerics.quadrature import COMPOSITE, RULES, Family, Rule
from lca_posthoc.numerics.schema import KEEP, TOTALS, histogram_edges
from lca_posthoc.numerics.segment_allocation import SegmentAllocation
from lca_posthoc.numerics.statistics import SpanStatistics, UnitSums, histogram
from lca_posthoc.replay.events import Note
from lca_posthoc.results import LossResults

from ..helpers import oracle
from ..helpers.model_cases import CASES
from ..helpers.oracle import Oracle, Truth
from ..helpers.replayed_cases import (
    Lab,
    Point,
    arrays,
    assert_same_bits,
    assert_totals,
    case_of,
    first_loss,
    in_precision,
    objective_of,
    replayed_in_this_process,
    residuals,
    slow_totals,
    stored_and_wanted,
    worst_error,
)

MODES = [(name, mode) for name, case in CASES.items() for mode in case.norm_stats]
LOSSES = [(name, loss, mode) for name, mode in MODES for loss in CASES[name].losses]
FIXED = ("left", "midpoint", "gauss-2", "gauss-3")
SYMMETRIC = ("simpson", "trapezoid", "midpoint", "gauss-2", "gauss-3")


# --- 1: rules -------------------------------------------------------------------------------------


class Powers:
    """L(θ) = Σ θᵏ⁺¹ / (k + 1), whose gradient is a polynomial of degree k along any segment."""

    def __init__(self, power: int) -> None:
        self.power = power

    def evaluate(
        self, point: Point, losses: list[str], *, gradient: bool = True
    ) -> dict[str, Evaluation]:
        theta = point["theta"]
        value = float((theta ** (self.power + 1)).sum() / (self.power + 1))
        return {
            name: Evaluation.known(
                np.float64(value),
                np.float64(1.0),
                {"theta": theta**self.power} if gradient else {},
            )
            for name in losses
        }


EVERY_RULE = {rule.name: rule for rule in (*RULES.values(), *COMPOSITE.rules[:2])}


@pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=EVERY_RULE)
@pytest.mark.parametrize("power", range(7))
def test_numerics_1_an_allocation_is_exact_for_gradients_up_to_the_degree_of_its_rule(
    rule: Rule, power: int
) -> None:
    start, end = torch.tensor([1.0, -2.0, 0.3]).double(), torch.tensor([2.0, 1.0, 0.3]).double()
    done, _ = allocate({"theta": start}, {"theta": end}, Powers(power), ["it"], Method(rule))
    exact = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
    near = torch.allclose(done["it"].allocation["theta"], exact, rtol=0, atol=1e-13)
    assert near == (power <= rule.degree)
    assert (abs(done["it"].residual) <= 1e-13) == (power <= rule.degree)


def clenshaw_curtis(level: int) -> Rule:
    """Return the rule on the extrema of a Chebyshev polynomial of degree 2 ** level: nested, with
    other weights at every node.
    """
    intervals = 2**level
    angles = np.arange(intervals + 1) * np.pi / intervals
    moments = [2 / (1 - k**2) if k % 2 == 0 else 0.0 for k in range(intervals + 1)]
    weights = np.linalg.solve(np.cos(np.outer(np.arange(intervals + 1), angles)), moments) / 2
    weights = (weights + weights[::-1]) / 2
    nodes = np.sin(angles / 2) ** 2
    return Rule(
        f"clenshaw-curtis-{intervals}",
        tuple(nodes.round(15).tolist()),
        tuple(weights.round(15).tolist()),
        intervals,
    )


@pytest.mark.parametrize("power", range(7))
def test_numerics_1_another_family_of_rules_is_a_table(power: int) -> None:
    """Refined far enough, every level of it gives what the rule gives on its own."""
    family = Family(tuple(clenshaw_curtis(level) for level in range(4)))
    start, end = torch.tensor([1.0, -2.0, 0.3]).double(), torch.tensor([2.0, 1.0, 0.3]).double()
    for level, rule in enumerate(family.rules):
        done, _ = allocate(
            {"theta": start},
            {"theta": end},
            Powers(power),
            ["it"],
            Method(family.rules[0], family=family),
            at_least=level,
        )
        alone, _ = allocate(
            {"theta": start}, {"theta": end}, Powers(power), ["it"], Method(rule, family=Family(()))
        )
        assert (done["it"].level, done["it"].evaluations) == (level, len(rule.nodes) - 1)
        assert torch.allclose(
            done["it"].allocation["theta"], alone["it"].allocation["theta"], rtol=0, atol=1e-12
        )


# --- 2: the sum closes ----------------------------------------------------------------------------


def assert_sum_closes(results: LossResults, truth: Truth) -> None:
    steps, allocated = results.steps, results.tensors["allocated"].values
    assert allocated.dtype == np.float64
    change = (steps["loss_end"] - steps["loss_start"]).values
    assert np.abs(allocated.sum(1) + steps["residual"].values - change).max() <= 1e-12
    assert np.array_equal(steps["loss_end"].values[:-1], steps["loss_start"].values[1:])
    losses = [*steps["loss_start"].values, steps["loss_end"].values[-1]]
    assert losses == pytest.approx(truth.losses, rel=1e-6)


@pytest.mark.parametrize(("name", "loss", "mode"), LOSSES)
def test_numerics_2_allocation_and_residual_give_the_loss_change(
    lab: Lab, name: str, loss: str, mode: str
) -> None:
    results = lab.results(name, loss, norm_stats=mode)
    assert_sum_closes(results, lab.truth(name, loss, mode=mode))
    kinds = results.tensors["kind"].values
    assert ("buffer" in kinds) == (
        mode == "running" and name in {"conv_bn", "recomputed", "autoencoder", "odd_shapes"}
    )


@pytest.mark.parametrize("rule", [*FIXED, "trapezoid"])
@pytest.mark.parametrize("span", [1, 2])
def test_numerics_2_the_sum_closes_for_every_rule_and_at_the_borders_of_spans(
    lab: Lab, rule: str, span: int
) -> None:
    results = lab.results("conv_bn", rule=rule, span=span)
    assert_sum_closes(results, lab.truth("conv_bn"))


def test_numerics_2_the_residual_is_stored_also_where_the_tolerance_was_not_reached(
    lab: Lab,
) -> None:
    results = lab.results("kinked", tolerance=1e-12)
    assert not results.steps["converged"].values.any()
    assert (np.abs(results.steps["residual"].values) > 1e-12).all()
    assert_sum_closes(results, lab.truth("kinked"))


def test_numerics_2_without_running_statistics_the_sum_would_not_close(lab: Lab) -> None:
    tensors = lab.results("conv_bn").tensors
    shares = tensors["allocated"].groupby(tensors["kind"]).sum()
    assert (
        abs(shares.sel(kind="buffer")).sum()
        > 10 * abs(lab.results("conv_bn").steps["residual"]).sum()
    )


# --- 3: reversal, and what does not move ----------------------------------------------------------


@pytest.mark.parametrize("rule", SYMMETRIC)
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("name", ["smooth_mlp", "conv_bn", "transformer"])
def test_numerics_3_reversing_a_segment_negates_its_allocation(
    lab: Lab, name: str, precision: str, bound: float, rule: str
) -> None:
    _, start, end, *_ = lab.checkpoints(name)
    objective = objective_of(case_of(name), start, lab.device, precision=precision)
    start, end = (in_precision(each, objective.dtype, lab.device) for each in (start, end))
    loss = first_loss(name)
    forth, back = (
        allocate(*ends, objective, [loss], Method(RULES[rule]))[0][loss]
        for ends in ((start, end), (end, start))
    )
    negated = {tensor: -each.cpu().numpy() for tensor, each in back.allocation.items()}
    assert (
        worst_error(
            negated, {tensor: each.cpu().numpy() for tensor, each in forth.allocation.items()}
        )
        <= bound
    )
    assert forth.loss_start == back.loss_end
    assert forth.loss_end == back.loss_start
    assert forth.residual == pytest.approx(-back.residual, abs=1e-2 * bound)


@pytest.mark.parametrize("rule", RULES)
def test_numerics_3_an_unmoved_parameter_gets_exactly_zero(lab: Lab, rule: str) -> None:
    start, end = (
        in_precision(each, torch.float64, lab.device) for each in lab.checkpoints("relu_mlp")[1:3]
    )
    end["3.weight"] = start["3.weight"]
    end["6.bias"] = torch.cat([start["6.bias"][:2], end["6.bias"][2:]])
    objective = objective_of(CASES["relu_mlp"], start, lab.device)
    done, _ = allocate(start, end, objective, ["train"], Method(RULES[rule]))
    allocation = done["train"].allocation
    assert done["train"].mean_gradient["3.weight"].abs().max() > 0
    assert not allocation["3.weight"].any()
    assert (allocation["6.bias"] == 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("rule", RULES)
def test_numerics_3_a_segment_that_goes_nowhere_gets_nothing(lab: Lab, rule: str) -> None:
    point = in_precision(lab.checkpoints("conv_bn")[2], torch.float64, lab.device)
    objective = objective_of(CASES["conv_bn"], point, lab.device)
    done, _ = allocate(
        point, dict(point), objective, ["train"], Method(RULES[rule], tolerance=1e-9)
    )
    assert done["train"].residual == 0
    assert done["train"].converged
    assert not any(each.any() for each in done["train"].allocation.values())


# --- 4: every element once ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_numerics_4_every_element_counts_once_whatever_the_batch_size(lab: Lab, name: str) -> None:
    case, checkpoints = case_of(name), lab.checkpoints(name)
    examples = len(case.data()["train"][0])
    automatic = replayed_in_this_process(lab, case, checkpoints, batch_size=None)
    everything = sum(
        float(each.abs().sum()) for segment in automatic for each in segment.allocation.values()
    )
    for batch_size in (1, 7, examples, examples + 3):
        segments = replayed_in_this_process(lab, case, checkpoints, batch_size=batch_size)
        pairs = list(zip(segments, automatic, strict=True))
        assert (
            sum(l1(one.allocation, other.allocation) for one, other in pairs) <= 1e-6 * everything
        )
        for one, other in pairs:
            assert (one.loss_start, one.loss_end) == pytest.approx(
                (other.loss_start, other.loss_end), rel=1e-6
            )


def test_numerics_4_examples_have_equal_weight_in_an_unequal_last_batch(lab: Lab) -> None:
    """The allocation of a split is that of its examples one by one, averaged."""
    case = CASES["smooth_mlp"]
    start, end = (
        in_precision(each, torch.float64, lab.device) for each in lab.checkpoints("smooth_mlp")[:2]
    )
    inputs, targets = case.data()["train"]

    def allocation(rows: slice) -> dict[str, Tensor]:
        part = replace(
            case,
            data=lambda: {"train": (inputs[rows], targets[rows]), "validation": (inputs, targets)},
        )
        done, _ = allocate(
            start, end, objective_of(part, start, lab.device), ["train"], Method(RULES["simpson"])
        )
        return done["train"].allocation

    whole, single = allocation(slice(0, 9)), [allocation(slice(row, row + 1)) for row in range(9)]
    for tensor, each in whole.items():
        assert torch.allclose(each, sum(one[tensor] for one in single) / 9, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_numerics_4_buffers_that_float_are_allocated_in_running_mode_only(
    lab: Lab, name: str, mode: str
) -> None:
    model, replayed = case_of(name).build(), lab.replay(name, norm_stats=mode)
    results = replayed[first_loss(name)]
    moving = {
        key for key, each in model.named_buffers() if each.is_floating_point() and mode == "running"
    }
    kinds = dict(zip(results.tensors["tensor"].values, results.tensors["kind"].values, strict=True))
    assert {key for key, kind in kinds.items() if kind == "buffer"} == moving
    assert {key for key, kind in kinds.items() if kind == "parameter"} == {
        key for key, _ in model.named_parameters()
    }
    assert (
        set(results.allocation.data_vars)
        == set(results.units.data_vars)
        == set(results.totals.data_vars)
        == set(kinds)
    )
    assert replayed.manifest.settings["norm_stats"] == mode
    assert open_run(replayed.path).manifest.settings["batch_size"] == case_of(name).batch_size


def test_numerics_4_the_partition_is_part_of_the_loss_in_batch_mode(lab: Lab) -> None:
    seven, thirty = (
        lab.results("conv_bn", norm_stats="batch", batch_size=size) for size in (7, 30)
    )
    assert abs(seven.steps["loss_start"][0] - thirty.steps["loss_start"][0]) > 1e-3


def test_numerics_4_a_buffer_that_moves_unused_gets_nothing_and_is_said(
    lab: Lab, tmp_path: Path
) -> None:
    heard: list[Any] = []
    settings = {
        "out": tmp_path / "run",
        "cluster": "inline",
        "device": lab.device,
        "progress": heard.append,
    }
    replayed = run(lab.iterates("odd_shapes"), CASES["odd_shapes"].task(), **settings)
    assert not replayed["train"].allocation["steps"].values.any()
    assert [note for note in heard if isinstance(note, Note) and "steps" in note.text]


# --- 5: refinement --------------------------------------------------------------------------------


def summed(values: Tensor, axis: int | None, keep: str) -> Tensor:
    """Σ over what a level of `--keep` tells apart in a tensor of one segment."""
    if keep == "tensors" or (keep == "units" and axis is None):
        return values.sum()
    if keep == "units":
        return values.movedim(axis, 0).reshape(values.shape[axis], -1).sum(1)
    return values


def l1(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return sum(float((one[name] - other[name]).abs().sum()) for name in one)


@pytest.mark.parametrize("rule", ["simpson", "trapezoid"])
@pytest.mark.parametrize("tolerance", [1e-12, 1e-5, 3e-5, 1e-4, 1e-3, math.inf])
def test_numerics_5_a_segment_is_refined_until_its_residual_is_small_enough(
    lab: Lab, rule: str, tolerance: float
) -> None:
    """Levels, allocation, residual, error estimate and cost of each segment are those of the first
    level that will do.
    """
    results = lab.results("kinked", rule=rule, tolerance=tolerance, precision="float64")
    steps, found = results.steps, arrays(results.allocation)
    levels = [lab.truth("kinked", rule=2**level) for level in range(6)]
    floor = {"trapezoid": 0, "simpson": 1}[rule]
    for at in range(steps.sizes["step"]):
        will_do = [
            level for level in range(floor, 6) if abs(residuals(levels[level])[at]) <= tolerance
        ]
        level = will_do[0] if will_do else 5
        row = steps.isel(step=at)
        assert int(row["level"]) == level
        assert bool(row["converged"]) == bool(will_do)
        assert int(row["evaluations"]) == 2**level
        assert float(row["residual"]) == pytest.approx(residuals(levels[level])[at], abs=1e-12)
        wanted = {name: each.numpy() for name, each in levels[level].allocation[at].items()}
        assert worst_error({name: each[at] for name, each in found.items()}, wanted) <= 1e-6
        if level > 0:
            before = levels[level - 1].allocation[at]
            assert float(row["error_bound"]) == pytest.approx(
                l1(levels[level].allocation[at], before), rel=1e-8
            )


def test_numerics_5_a_tolerance_out_of_reach_ends_at_32_intervals_unconverged(lab: Lab) -> None:
    results = lab.results("kinked", tolerance=1e-12)
    assert set(results.steps["level"].values) == {5}
    assert not results.steps["converged"].values.any()
    assert worst_error(*stored_and_wanted(results, lab.truth("kinked", rule=32))) <= 1e-5
    assert sum(marker["evaluations"] for marker in results.markers) == 5 * 32 + len(results.markers)


def test_numerics_5_levels_differ_between_segments_and_losses(lab: Lab) -> None:
    """Otherwise the tests above would show little."""
    levels = lab.results("kinked", rule="trapezoid", tolerance=1e-4).steps["level"].values
    assert len(set(levels)) > 1


def test_numerics_5_losses_of_one_run_are_refined_each_for_itself(lab: Lab) -> None:
    losses = list(CASES["smooth_mlp"].losses)
    residual = {
        loss: np.abs(lab.results("smooth_mlp", loss, rule="trapezoid").steps["residual"].values)
        for loss in losses
    }
    tolerance = float(np.median(np.concatenate(list(residual.values()))))
    for loss in losses:
        results = lab.results("smooth_mlp", loss, rule="trapezoid", tolerance=tolerance)
        level = results.steps["level"].values
        assert np.array_equal(level > 0, residual[loss] > tolerance)
        for intervals in set(2**level):
            found, wanted = stored_and_wanted(
                results, lab.truth("smooth_mlp", loss, rule=int(intervals))
            )
            rows = 2**level == intervals
            chosen = [
                {name: each[rows] for name, each in table.items()} for table in (found, wanted)
            ]
            assert worst_error(*chosen) <= 1e-5


def test_numerics_5_the_allocation_tolerance_refines_as_well(lab: Lab) -> None:
    settings = {"precision": "float64", "rule": "simpson"}
    plain = lab.results("kinked", **settings).steps["error_bound"].values
    tolerance = float(np.median(plain))
    results = lab.results("kinked", allocation_tolerance=tolerance, **settings)
    assert np.array_equal(results.steps["level"].values > 1, plain > tolerance)
    assert (
        results.steps["error_bound"].values[results.steps["converged"].values] <= tolerance
    ).all()
    assert results.steps["converged"].values.any()


@pytest.mark.parametrize("keep", KEEP)
def test_numerics_5_the_trapezoid_is_calibrated_on_a_few_segments_and_says_so(
    lab: Lab, keep: str
) -> None:
    """error_bound = c · Σ|(g₁ − g₀)·Δθ|, with c the largest share that Simpson changes on the
    first, middle and last; of parameters, or of the sums of a level that holds none.
    """
    replayed = lab.replay("kinked", rule="trapezoid", precision="float64", keep=keep)
    left, trapezoid, simpson = (
        [
            {name: summed(each, 0, keep) for name, each in segment.items()}
            for segment in lab.truth("kinked", rule=rule).allocation
        ]
        for rule in ("left", "trapezoid", "simpson")
    )
    curvature = [2 * l1(t, a) for t, a in zip(trapezoid, left, strict=True)]
    change = [l1(s, t) for s, t in zip(simpson, trapezoid, strict=True)]
    share = max(change[at] / curvature[at] for at in (0, 2, 4))
    assert replayed.manifest.losses["train"].calibration == pytest.approx(share, rel=1e-8)
    assert replayed["train"].steps["error_bound"].values == pytest.approx(
        [share * each for each in curvature], rel=1e-8
    )
    assert lab.replay("kinked").manifest.losses["train"].calibration is None


@pytest.mark.parametrize("rule", FIXED)
def test_numerics_5_fixed_rules_are_never_refined_and_estimate_no_error(
    lab: Lab, rule: str
) -> None:
    steps = lab.results("kinked", rule=rule, tolerance=1e-12).steps
    assert set(steps["level"].values) == {-1}
    assert set(steps["evaluations"].values) == {len(oracle.RULES[rule][0])}
    assert np.isnan(steps["error_bound"].values).all()


COSTS = {
    # rule: gradient evaluations and forward passes of a span of n segments
    "simpson": lambda n: (2 * n + 1, 0),
    "trapezoid": lambda n: (n + 1, 0),
    "left": lambda n: (n, 1),
    "midpoint": lambda n: (n, n + 1),
    "gauss-2": lambda n: (2 * n, n + 1),
    "gauss-3": lambda n: (3 * n, n + 1),
}


@pytest.mark.parametrize("rule", COSTS)
@pytest.mark.parametrize("span", [1, 2, 8])
def test_numerics_5_neighbours_share_the_evaluation_between_them(
    lab: Lab, rule: str, span: int
) -> None:
    results = lab.results(
        "smooth_mlp", "validation", rule=rule, span=span, keep="tensors", losses=("validation",)
    )
    per_segment = len(oracle.RULES[rule][0]) - (rule in {"simpson", "trapezoid"})
    assert set(results.steps["evaluations"].values) == {per_segment}
    lengths = [len(marker["steps"]) for marker in results.markers]
    assert sum(lengths) == 5
    costs = [(marker["evaluations"], marker["forward_passes"]) for marker in results.markers]
    assert costs == [COSTS[rule](length) for length in lengths]


# --- 6: bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule", "keep"),
    [
        ("conv_bn", "simpson", "parameters"),
        ("conv_bn", "left", "parameters"),
        ("fast_path", "left", "parameters"),
        ("fast_path", "midpoint", "parameters"),
        ("conv_bn", "simpson", "statistics"),
        ("conv_bn", "simpson", "units"),
        ("conv_bn", "midpoint", "units"),
        ("conv_bn", "left", "tensors"),
    ],
)
def test_numerics_6_bits_do_not_depend_on_the_length_of_spans(
    lab: Lab, name: str, rule: str, keep: str
) -> None:
    wanted = lab.results(name, rule=rule, keep=keep)
    for span in (1, 2):
        assert_same_bits(lab.results(name, rule=rule, keep=keep, span=span), wanted)


@pytest.mark.parametrize(
    ("name", "mode"), [("conv_bn", "running"), ("conv_bn", "batch"), ("transformer", "running")]
)
def test_numerics_6_replaying_again_gives_the_same_bits(lab: Lab, name: str, mode: str) -> None:
    first, again = (lab.replay(name, norm_stats=mode, keep=keep) for keep in ("parameters", None))
    for loss in case_of(name).losses:
        assert_same_bits(first[loss], again[loss])


def test_numerics_6_workers_give_the_bits_of_this_process_and_agree_with_the_oracle(
    lab: Lab,
) -> None:
    settings = {"norm_stats": "batch", "span": 1}
    local = lab.replay("conv_bn", cluster="local", workers=2, **settings)
    assert_same_bits(local["train"], lab.results("conv_bn", **settings))
    assert (
        worst_error(*stored_and_wanted(local["train"], lab.truth("conv_bn", mode="batch"))) <= 1e-4
    )


THREADS: list[int] = []


def noting_threads(model: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    THREADS.append(torch.get_num_threads())
    return model(batch[0])[:, 0]


def test_numerics_6_a_replay_runs_on_one_thread_each_time_and_gives_the_others_back(
    lab: Lab, tmp_path: Path
) -> None:
    case, before = CASES["smooth_mlp"], torch.get_num_threads()
    task = Task(case.build, case.data(), {"train": Loss(call=noting_threads)})
    torch.set_num_threads(2)
    try:
        for attempt in ("first", "again"):
            THREADS.clear()
            run(
                lab.iterates("smooth_mlp"),
                task,
                out=tmp_path / attempt,
                cluster="inline",
                device=lab.device,
            )
            assert (attempt, set(THREADS), torch.get_num_threads()) == (attempt, {1}, 2)
    finally:
        torch.set_num_threads(before)


def test_numerics_6_a_loss_has_the_bits_it_has_alone(lab: Lab) -> None:
    together = lab.replay("smooth_mlp")
    for loss in CASES["smooth_mlp"].losses:
        assert_same_bits(together[loss], lab.replay("smooth_mlp", losses=(loss,))[loss])


# --- 7: the oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "loss", "mode"), LOSSES)
def test_numerics_7_float32_is_within_its_bound_of_the_oracle(
    lab: Lab, name: str, loss: str, mode: str
) -> None:
    results = lab.results(name, loss, norm_stats=mode, precision="float32")
    assert set(results.steps["level"].values) == {1}
    found, wanted = stored_and_wanted(results, lab.truth(name, loss, mode=mode))
    assert worst_error(found, wanted) <= CASES[name].bound


@pytest.mark.parametrize(("name", "loss", "mode"), LOSSES)
def test_numerics_7_float64_is_within_1e6_of_the_oracle(
    lab: Lab, name: str, loss: str, mode: str
) -> None:
    """The stored array is float32; sums over tensors are stored as float64 and agree to far more
    digits.
    """
    results, truth = (
        lab.results(name, loss, norm_stats=mode, precision="float64"),
        lab.truth(name, loss, mode=mode),
    )
    found, wanted = stored_and_wanted(results, truth)
    assert worst_error(found, wanted) <= 1e-6
    sums = np.stack(
        [wanted[tensor].reshape(5, -1).sum(1) for tensor in results.tensors["tensor"].values], 1
    )
    assert np.abs(results.tensors["allocated"].values - sums).max() <= 1e-13 * sum(
        np.abs(each).sum() for each in wanted.values()
    )
    assert results.steps["residual"].values == pytest.approx(residuals(truth), abs=1e-13)


@pytest.mark.parametrize("rule", [*FIXED, "trapezoid"])
@pytest.mark.parametrize(
    ("name", "mode"), [("relu_mlp", "running"), ("conv_bn", "running"), ("conv_bn", "batch")]
)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_numerics_7_every_rule_agrees_with_the_oracle_at_its_own_nodes(
    lab: Lab, name: str, mode: str, rule: str, precision: str
) -> None:
    results = lab.results(name, norm_stats=mode, rule=rule, precision=precision)
    bound = {"float32": CASES[name].bound, "float64": 1e-6}[precision]
    assert worst_error(*stored_and_wanted(results, lab.truth(name, rule=rule, mode=mode))) <= bound


@pytest.mark.parametrize("batch_size", [1, 3001])
def test_numerics_7_sums_over_examples_accumulate_in_float64(batch_size: int, device: str) -> None:
    """2²⁴ and many ones: a float32 accumulator would lose every one of them. What autograd sums in
    a batch is its own; the mean is rounded once, to the type of the model.
    """
    values = torch.ones(3001)
    values[0] = 2.0**24
    loss = Loss(call=lambda model, batch: model.weight.sum() * batch[0])
    task = Task(lambda: torch.nn.Linear(1, 1, bias=False), {"train": (values,)}, {"train": loss})
    settings = {"precision": "float32", "norm_stats": "running", "batch_size": batch_size}
    objective = build_objective(
        lambda: task, None, ObjectiveSettings(device=torch.device(device), **settings)
    )
    point = {"weight": torch.ones(1, 1, device=device)}
    objective.settle_batch_sizes(point)
    found = objective.evaluate(point, ["train"])["train"]
    assert found.loss == (2.0**24 + 3000) / 3001
    assert batch_size > 1 or found.gradient["weight"].item() == np.float32(found.loss)


def segment(gradient: dict[str, Tensor], motion: dict[str, Tensor]) -> SegmentAllocation:
    start = {name: torch.zeros_like(values) for name, values in motion.items()}
    return SegmentAllocation(
        points=Motion(start, motion),
        nodes=[(1.0, gradient)],
        sums={
            name: (motion[name] * values).sum().cpu().numpy() for name, values in gradient.items()
        },
        distance={name: values.abs().sum().item() for name, values in motion.items()},
        loss_start=np.float64(0.0),
        loss_end=np.float64(0.0),
        weight=np.float64(1.0),
        residual=np.float64(0.0),
        evaluations=2,
        level=1,
        converged=True,
        error_bound=np.float64(0.0),
        unreached=frozenset(),
    )


def test_numerics_7_sums_over_parameters_accumulate_in_float64(device: str) -> None:
    spec = TensorSpec("w", "parameter", (2, 3), unit_axis=0)
    exact = torch.tensor([[1.0, 1e-9, -1.0], [1e-9, 3.0, -3.0]]).double()
    exact[:, 1] += 1e-12
    statistics = SpanStatistics([spec], 1, "statistics", torch.device(device), unit=1.0)
    there = exact.to(device)
    statistics.add(0, segment({"w": there}, {"w": torch.ones_like(there)}))
    sums = [math.fsum(row) for row in exact.tolist()]
    assert statistics.units["w"][0] == pytest.approx(sums, rel=1e-6)
    assert float(statistics.tensors["allocated"][0, 0]) == pytest.approx(math.fsum(sums), rel=1e-6)


def test_numerics_7_motion_is_taken_in_float64() -> None:
    """θ′ − θ of two float32 numbers of unlike size is no float32 number."""
    start, end = torch.tensor([1.0]), torch.tensor([1e-9])
    done, _ = allocate({"theta": start}, {"theta": end}, Powers(0), ["it"], Method(RULES["left"]))
    assert done["it"].allocation["theta"].item() == float(end) - 1.0


def test_numerics_7_checkpoints_stored_as_float64_keep_their_motion_in_a_float32_replay(
    lab: Lab, tmp_path: Path
) -> None:
    """Steps far below what float32 resolves of the weights."""

    def nudged(step: int, held: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        first = lab.checkpoints("smooth_mlp")[0]
        move = {
            name: torch.randn(each.shape, generator=generator, dtype=torch.float64)
            for name, each in held.items()
        }
        return {name: each.double() + 1e-7 * move[name] for name, each in first.items()}

    wide, case = altered(lab.iterates("smooth_mlp"), tmp_path / "wide", nudged), CASES["smooth_mlp"]
    settings = {"cluster": "inline", "device": lab.device, "precision": "float32"}
    replayed = run(wide, case.task(), out=tmp_path / "run", **settings)
    checkpoints = [load_file(path) for path in sorted(wide.glob("*.safetensors"))]
    truth = Oracle(case.build, case.data()["train"], case.values["train"]).allocate(
        checkpoints, *oracle.RULES["simpson"]
    )
    assert worst_error(*stored_and_wanted(replayed["train"], truth)) <= 1e-5


# --- 8: tied, frozen, state, units ----------------------------------------------------------------


def test_numerics_8_tied_tensors_count_once_under_their_first_name(lab: Lab) -> None:
    results = lab.results("transformer")
    assert "embed.weight" in results.allocation
    assert "head.weight" not in results.allocation
    assert results.allocation["embed.weight"].attrs["aliases"] == ["head.weight"]
    assert list(results.tensors["tensor"].values).count("embed.weight") == 1
    shared = sum(parameter.numel() for parameter in CASES["transformer"].build().parameters())
    assert int(results.tensors["elements"].sum()) == shared


def test_numerics_8_frozen_parameters_get_zero(lab: Lab) -> None:
    results = lab.results("frozen_mlp")
    assert not results.allocation["0.weight"].values.any()
    assert not results.units["0.weight"].values.any()
    rows = results.tensors.sel(tensor=results.tensors["tensor"] == "0.weight")
    assert [
        int(np.abs(rows[column].values).sum())
        for column in ("allocated", "helping", "hurting", "motion")
    ] == [0] * 4
    totals = results.totals["0.weight"].sel(
        total=["allocated", "helping", "hurting", "weight_turns", "allocation_turns"]
    )
    assert not totals.values.any()
    assert results.allocation["0.bias"].values.any()


def test_numerics_8_counters_are_loaded_and_have_no_variable(lab: Lab) -> None:
    replayed = lab.replay("conv_bn")
    kinds = {tensor.spec.name: tensor.spec.kind for tensor in replayed.manifest.tensors}
    assert kinds["1.num_batches_tracked"] == "state"
    assert "1.num_batches_tracked" not in replayed["train"].allocation


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_numerics_8_counters_are_never_interpolated(dtype: torch.dtype) -> None:
    start, end = (
        {"count": torch.tensor([0, 1]).to(dtype)},
        {"count": torch.tensor([1, 1]).to(dtype)},
    )
    for x in (0.25, 0.5, 0.75):
        held = Between(start, end, x)["count"]
        assert held.dtype == dtype
        assert torch.equal(held, start["count"])


def test_numerics_8_odd_shapes_have_variables_of_their_own_shape(lab: Lab) -> None:
    results = lab.results("odd_shapes")
    shapes = {name: results.allocation[name].shape for name in ("scale", "empty", "idle")}
    assert shapes == {"scale": (5,), "empty": (5, 0, 3), "idle": (5, 5)}
    assert {name: results.units[name].shape for name in shapes} == {
        "scale": (5, 1),
        "empty": (5, 0),
        "idle": (5, 5),
    }
    assert {name: results.totals[name].shape[1:] for name in shapes} == {
        "scale": (),
        "empty": (0, 3),
        "idle": (5,),
    }
    assert results.allocation["scale"].values.all()
    assert not results.allocation["idle"].values.any()


UNIT_AXES = {
    "autoencoder": {
        "up.weight": 1,
        "up.bias": 0,
        "down.weight": 0,
        "mix.weight": 0,
        "norm.running_var": 0,
    },
    "odd_shapes": {"scale": None, "first.weight": 0, "first.bias": 0, "empty": 0},
    "transformer": {"embed.weight": 0, "blocks.0.qkv.weight": 0},
    "transposed": {"first.weight": 1, "second.weight": 1, "third.weight": 1, "third.bias": 0},
}


@pytest.mark.parametrize("name", UNIT_AXES)
def test_numerics_8_a_unit_runs_along_the_output_axis(lab: Lab, name: str) -> None:
    replayed = lab.replay(name)
    axes = {tensor.spec.name: tensor.spec.unit_axis for tensor in replayed.manifest.tensors}
    assert {tensor: axes[tensor] for tensor in UNIT_AXES[name]} == UNIT_AXES[name]
    results = replayed[first_loss(name)]
    for tensor, stored in arrays(results.allocation).items():
        kept = axes[tensor]
        others = tuple(axis + 1 for axis in range(stored.ndim - 1) if axis != kept)
        sums = stored.astype(np.float64).sum(axis=others).reshape(5, -1)
        scale = np.abs(stored.astype(np.float64)).sum(axis=others).reshape(5, -1)
        assert (np.abs(results.units[tensor].values - sums) <= 2e-7 * scale).all()


@pytest.mark.parametrize("axis", [0, 1, 2, None])
@pytest.mark.parametrize(
    "shape", [(2, 3, 4), (5, 700, 90), (3, 2, 2**17 + 1), (2**17 + 1, 1, 2), (2, 2**17 + 1, 3)]
)
def test_numerics_8_units_are_sums_over_all_axes_but_one(
    shape: tuple[int, ...], axis: int | None, device: str
) -> None:
    """Of every group, also where a unit, or all of them, are more than a piece."""
    values = torch.arange(math.prod(shape)).double().reshape(shape)
    rows = torch.stack([values, 2 * values]).reshape(2, -1).to(device)
    units = UnitSums(2, shape, axis, torch.device(device))
    covered = 0
    for row, column in blocks(*rows.shape, units.cuts):
        units.add(row, column, rows[row, column])
        covered += rows[row, column].numel()
    assert covered == rows.numel()
    wanted = values.sum([each for each in range(3) if each != axis]).reshape(-1)
    assert torch.equal(units.total.cpu(), torch.stack([wanted, 2 * wanted]))


# --- 9: half precision, NaN and Inf ---------------------------------------------------------------


def altered(
    source: Path, target: Path, change: Callable[[int, dict[str, Tensor]], dict[str, Tensor]]
) -> Path:
    target.mkdir()
    for step, path in enumerate(sorted(source.glob("*.safetensors"))):
        save_file(change(step, load_file(path)), target / path.name)
    return target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numerics_9_half_precision_is_measured_and_said(
    lab: Lab, tmp_path: Path, dtype: torch.dtype
) -> None:
    narrow = altered(
        lab.iterates("smooth_mlp"),
        tmp_path / "narrow",
        lambda step, held: {name: each.to(dtype) for name, each in held.items()},
    )
    heard: list[Any] = []
    settings = {
        "out": tmp_path / "run",
        "cluster": "inline",
        "device": lab.device,
        "progress": heard.append,
    }
    replayed = run(narrow, CASES["smooth_mlp"].task(), **settings)
    files = [load_file(path) for path in sorted(narrow.glob("*.safetensors"))]
    pairs = [(files[at][name], files[at + 1][name]) for at in (0, 2, 4) for name in files[0]]
    share = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    (note,) = [event.text for event in heard if isinstance(event, Note)]
    assert "half precision" in note
    assert f"{share:.1%}" in note
    zero = replayed["train"].histogram["zero"].values
    assert (zero > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numerics_9_a_number_that_is_not_finite_is_named_and_never_confused_with_not_computed(
    lab: Lab, tmp_path: Path, value: float
) -> None:
    def spoil(step: int, held: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 3:
            held["2.weight"][1, 2] = value
        return held

    spoiled = altered(lab.iterates("smooth_mlp"), tmp_path / "spoiled", spoil)
    settings = {
        "out": tmp_path / "run",
        "cluster": "inline",
        "device": lab.device,
        "precision": lab.precision,
        "span": 1,
        "tolerance": math.inf,
    }
    with pytest.raises(SpanError, match=r"'2\.weight'.*step 3"):
        run(spoiled, CASES["smooth_mlp"].task(), **settings)
    results = open_run(tmp_path / "run")["train"]
    assert not results.complete
    assert results.steps["step"].values.tolist() == [0, 1, 4]
    clean = arrays(lab.results("smooth_mlp", batch_size=None, span=1).allocation)
    for name, stored in arrays(results.allocation).items():
        assert np.array_equal(stored, clean[name][[0, 1, 4]])


def root_of_weight(model: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return torch.sqrt(model(batch[0]))[:, 0]


@pytest.mark.parametrize("rule", ["simpson", "trapezoid", "left"])
@pytest.mark.parametrize(
    "weights", [(4, 1, 0, 1, 2), (4, 3, -1, 1, 2)], ids=["infinite gradient", "loss is NaN"]
)
def test_numerics_9_a_loss_that_is_not_finite_at_one_step_fails_the_segments_beside_it(
    tmp_path: Path, rule: str, weights: tuple[int, ...], device: str
) -> None:
    task = Task(
        lambda: torch.nn.Linear(1, 1, bias=False),
        {"train": (torch.ones(5, 1),)},
        {"train": Loss(call=root_of_weight)},
    )
    (tmp_path / "iterates").mkdir()
    for step, weight in enumerate(weights):
        save_file(
            {"weight": torch.full((1, 1), float(weight))},
            tmp_path / "iterates" / f"step_{step}.safetensors",
        )
    settings = {
        "out": tmp_path / "run",
        "cluster": "inline",
        "device": device,
        "span": 1,
        "rule": rule,
    }
    with pytest.raises(SpanError, match=r"'train'.*between steps [12] and [23]"):
        run(tmp_path / "iterates", task, **settings)
    wanted = [0, 3] if rule != "left" or min(weights) < 0 else [0, 1, 3]
    assert open_run(tmp_path / "run")["train"].steps["step"].values.tolist() == wanted


# --- what is counted ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_helping_and_hurting_are_counts_of_stored_signs(lab: Lab, name: str, mode: str) -> None:
    results = lab.results(name, norm_stats=mode)
    checkpoints, stored = lab.checkpoints(name), arrays(results.allocation)
    for position, tensor in enumerate(results.tensors["tensor"].values):
        row = results.tensors.isel(tensor=position)
        each = stored[tensor].reshape(5, -1)
        assert row["helping"].values.tolist() == (each < 0).sum(1).tolist()
        assert row["hurting"].values.tolist() == (each > 0).sum(1).tolist()
        assert int(row["elements"]) == each.shape[1]
        motion = [
            float((b[tensor].double() - a[tensor].double()).abs().sum())
            for a, b in itertools.pairwise(checkpoints)
        ]
        assert row["motion"].values == pytest.approx(motion, rel=1e-12)
        for at, mean in enumerate(lab.truth(name, mode=mode).gradient):
            floor = 1e-5 * sum(float(other.abs().sum()) for other in mean.values())
            assert float(row["gradient"][at]) == pytest.approx(
                float(mean[tensor].abs().sum()), rel=1e-4, abs=floor
            )


@pytest.mark.parametrize("name", ["frozen_mlp", "conv_bn", "odd_shapes"])
def test_the_histogram_counts_stored_parameters_between_its_edges_zeros_apart(
    lab: Lab, name: str
) -> None:
    results = lab.results(name)
    edges, counts = results.histogram["edge"].values, results.histogram["count"].values
    assert (np.diff(edges) > 0).all()
    kinds = dict(zip(results.tensors["tensor"].values, results.tensors["kind"].values, strict=True))
    for at in range(5):
        kept = [
            each[at].ravel()
            for tensor, each in arrays(results.allocation).items()
            if kinds[tensor] == "parameter"
        ]
        values = np.concatenate(kept).astype(np.float64)
        assert np.array_equal(counts[at], np.histogram(values[values != 0], edges)[0])
        assert results.histogram["zero"].values[at] == (values == 0).sum()
        assert counts[at].sum() + results.histogram["zero"].values[at] == values.size


def test_the_histogram_places_every_finite_magnitude() -> None:
    """Bins are closed towards zero: [e, e′) above it, (−e′, −e] below; subnormal and extreme
    numbers are placed too.
    """
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 0x7F800000, 4000, dtype=np.uint32)
    powers = (np.arange(510, dtype=np.uint32) << np.uint32(22))[1:]
    magnitudes = (
        np.concatenate([bits, powers, [np.uint32(1), np.uint32(0x7F7FFFFF)]])
        .astype(np.uint32)
        .view(np.float32)
    )
    values = np.concatenate(
        [magnitudes, -magnitudes, np.zeros(5, np.float32), -np.zeros(3, np.float32)]
    )
    edges = histogram_edges()
    upper = edges[len(edges) // 2 :]
    assert upper[0] == 0
    assert upper[-1] == math.inf
    wanted = np.histogram(magnitudes[magnitudes > 0].astype(np.float64), upper)[0]
    rows = torch.from_numpy(np.stack([values, np.zeros_like(values)]))
    assert histogram(rows).tolist() == [[*wanted[::-1], *wanted], [0] * 2 * len(wanted)]


# --- totals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [1, 2, 8])
@pytest.mark.parametrize("name", ["frozen_mlp", "conv_bn", "odd_shapes"])
def test_totals_are_those_of_slow_loops_over_what_is_stored(lab: Lab, name: str, span: int) -> None:
    results, checkpoints = lab.results(name, span=span), lab.checkpoints(name)
    segments = replayed_in_this_process(lab, case_of(name), checkpoints)
    for tensor, stored in arrays(results.allocation).items():
        series = {
            "weight": np.stack(
                [
                    (b[tensor].double() - a[tensor].double()).numpy()
                    for a, b in itertools.pairwise(checkpoints)
                ]
            ),
            "gradient": np.stack(
                [segment.mean_gradient[tensor].cpu().numpy() for segment in segments]
            ),
            "allocation": stored,
        }
        exact = np.stack([segment.allocation[tensor].cpu().numpy() for segment in segments])
        assert np.array_equal(exact.astype(np.float32), stored)
        assert results.totals[tensor].coords["total"].values.tolist() == list(TOTALS)
        unit = results.record.unit
        assert_totals(results.totals[tensor].values, slow_totals(series, exact, unit))


def test_turns_pass_over_zeros_within_spans_and_across_their_borders(
    tmp_path: Path, device: str
) -> None:
    """70 segments in 70 spans of one window, with motion and gradient of every sign and
    often none.
    """
    generator = torch.Generator().manual_seed(6)
    signs = torch.randint(-1, 2, (70, 40), generator=generator)
    path = torch.cat([torch.zeros(1, 40), signs.cumsum(0)]).float()
    (tmp_path / "iterates").mkdir()
    for step, row in enumerate(path):
        save_file({"weight": row[None].clone()}, tmp_path / "iterates" / f"step_{step}.safetensors")
    data = {"train": (torch.eye(40),)}
    task = Task(
        lambda: torch.nn.Linear(40, 1, bias=False), data, {"train": Loss(call=steps_of_weight)}
    )
    replayed = run(
        tmp_path / "iterates",
        task,
        out=tmp_path / "run",
        cluster="inline",
        device=device,
        span=1,
        rule="left",
    )
    assert replayed.manifest.windows == 1
    gradient = np.sign(np.round(np.cos(path.numpy()[:-1]), 1))[:, None]
    series = {
        "weight": signs.numpy()[:, None],
        "gradient": gradient,
        "allocation": gradient * signs.numpy()[:, None],
    }
    results = replayed["train"]
    wanted = slow_totals(series, series["allocation"] / 40, results.record.unit)
    found = results.totals["weight"].values
    assert_totals(found, wanted, 1e-6)
    assert wanted["gradient_turns"].max() > 3


class _Steps(torch.autograd.Function):
    """A loss of 0 with the gradient cos θ, rounded so that some are 0."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        context.save_for_backward(values)
        return values * 0

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Tensor:
        (values,) = context.saved_tensors
        return upstream * torch.round(torch.cos(values), decimals=1).sign()


def steps_of_weight(model: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return _Steps.apply(model(batch[0]))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3)])
def test_a_tally_counts_every_sign_and_turn_of_a_span(shape: tuple[int, ...], device: str) -> None:
    length, spec = 9, TensorSpec("w", "parameter", shape, unit_axis=0 if shape else None)
    generator = torch.Generator().manual_seed(7)
    motion, gradient = torch.randint(-1, 2, (2, length, *shape), generator=generator).double()
    statistics = SpanStatistics([spec], length, "parameters", torch.device(device), unit=0.5)
    for at, (step, gone) in enumerate(zip(motion, gradient, strict=True)):
        step, gone = step.to(device), gone.to(device)
        statistics.add(at, segment({"w": gone}, {"w": step}))
    exact = (motion * gradient).numpy()
    assert np.array_equal(statistics.allocation["w"], exact)
    series = {"weight": motion.numpy(), "gradient": gradient.numpy(), "allocation": exact}
    totals = statistics.totals()["w"]
    found = {name: totals[name] * (0.5 if name == "allocated" else 1.0) for name in TOTALS}
    assert_totals(np.stack([*found.values()]), slow_totals(series, exact, 0.5))
