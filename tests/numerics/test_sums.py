"""Sums along the motion, of which runs at `--keep tensors` and `units` consist, are those of the
gradients of every parameter (numerics 10).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lca_posthoc import Loss, Run, Task, run
from lca_posthoc.numerics.objective import directions
from lca_posthoc.replay.worker import checks

from ..helpers.model_cases import CASES
from ..helpers.replayed_cases import (
    Lab,
    assert_sums_agree,
    case_of,
    over_units,
)
from ..helpers.user_models import MET
from ..helpers.user_models import replay as replay_met

# --- every case -----------------------------------------------------------------------------------

MODES = [(name, mode) for name, case in CASES.items() for mode in case.norm_stats]
RULES = ("trapezoid", "left", "gauss-2")
# a case, and settings with which it is replayed at two levels
REPLAYS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}, {mode}": (name, {"norm_stats": mode}) for name, mode in MODES},
    **{f"conv_bn, {rule}": ("conv_bn", {"rule": rule}) for rule in RULES},
    "recalibrated": ("conv_bn", {"norm_stats": "recalibrated"}),
    "refined to a residual": ("kinked", {"tolerance": 3e-4}),
    "three losses refined": ("smooth_mlp", {"precision": "float64", "tolerance": 3e-12}),
    "refined to the end": ("relu_mlp", {"tolerance": 1e-15}),
    "a random subset": ("smooth_mlp", {"subset": ("train=0.5@7",)}),
    "a random subset in batches of one": ("relu_mlp", {"subset": ("0.5@7",), "batch_size": 1}),
}
# those of whole tensors alone are taken here too; elsewhere they are the sums over their units
WHOLE_TENSORS = (
    "conv_bn, batch",
    "odd_shapes, running",
    "transformer, running",
    "refined to a residual",
    "a random subset",
)
LEVELS = [
    *((replay, "units") for replay in REPLAYS),
    *((replay, "tensors") for replay in WHOLE_TENSORS),
]


@pytest.mark.parametrize(("replay", "keep"), LEVELS)
def test_numerics_10_sums_are_those_of_every_parameter(lab: Lab, replay: str, keep: str) -> None:
    name, settings = REPLAYS[replay]
    whole, sums = lab.replay(name, **settings), lab.replay(name, keep=keep, **settings)
    assert whole.manifest.keep == "parameters"
    assert list(sums) == list(whole)
    for loss in whole:
        assert_sums_agree(sums[loss], whole[loss])
        assert_replicates_agree(sums[loss].tensors, whole[loss].tensors)


def assert_replicates_agree(sums: Any, whole: Any) -> None:
    """The parts of a random subset, from which its standard errors come."""
    assert ("replicates" in sums) == ("replicates" in whole)
    if "replicates" in whole:
        found, wanted = sums["replicates"].values, whole["replicates"].values
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).sum(-1).max()


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_numerics_10_sums_are_those_of_the_oracle(lab: Lab, name: str, mode: str) -> None:
    """Within the bound of numerics 7 of each tensor's Σ|A*|."""
    replayed = lab.replay(name, norm_stats=mode, keep="units")
    axes = {tensor.spec.name: tensor.spec.unit_axis for tensor in replayed.manifest.tensors}
    for loss in case_of(name).losses:
        results, truth = replayed[loss], lab.truth(name, loss, mode=mode)
        wanted = {tensor: each.numpy() for tensor, each in truth.stacked().items()}
        sizes = {tensor: float(np.abs(each).sum()) for tensor, each in wanted.items()}
        floor = 1e-5 * sum(sizes.values())
        for position, tensor in enumerate(results.tensors["tensor"].values):
            exact, most = wanted[tensor], case_of(name).bound * max(sizes[tensor], floor)
            found = results.tensors["allocated"].values[:, position]
            assert np.abs(found - exact.reshape(5, -1).sum(1)).sum() <= most
            of_units = over_units(exact, exact.ndim - 1, axes[tensor])
            assert np.abs(results.units[tensor].values - of_units).sum() <= most


@pytest.mark.parametrize("replay", ["refined to a residual", "three losses refined"])
def test_numerics_10_some_segments_that_are_compared_are_refined_and_others_are_not(
    lab: Lab, replay: str
) -> None:
    name, settings = REPLAYS[replay]
    replayed = lab.replay(name, keep="units", **settings)
    assert len({int(level) for loss in replayed for level in replayed[loss].steps["level"]}) > 1


# --- groups ---------------------------------------------------------------------------------------


def by_class(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return targets


GROUPED: Mapping[str, Loss] = {
    "grouped": Loss(F.cross_entropy, group_by=by_class),
    "whole": Loss(F.cross_entropy),
    "weights": Loss(l2=1e-2),
}


def replay_groups(lab: Lab, name: str, keep: str, **settings: Any) -> Run:
    case = case_of(name)
    task = Task(case.build, {"train": case.data()["train"]}, GROUPED)
    chosen = lab.settings(batch_size=case.batch_size, keep=keep, out=lab.new_place(), **settings)
    return run(lab.iterates(name), task, **chosen)


@pytest.mark.parametrize(
    ("name", "options", "block", "keep"),
    [
        ("kinked", {"tolerance": 3e-4}, None, "units"),
        ("kinked", {"tolerance": 3e-4}, 2, "tensors"),
        ("conv_bn", {"norm_stats": "running"}, 3, "units"),
        ("conv_bn", {"norm_stats": "batch"}, None, "units"),
    ],
)
def test_numerics_10_sums_of_groups_are_those_of_every_parameter(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    block: int | None,
    keep: str,
) -> None:
    """Also those of losses that share their passes, and of groups that are taken in blocks."""

    def block_of(request: Any, objective: Any, loss: str, keep: str) -> int | None:
        return block if loss == "grouped" else None

    monkeypatch.setattr(checks, "block_of", block_of)
    sums, whole = (replay_groups(lab, name, level, **options) for level in (keep, "parameters"))
    assert sums.manifest.losses["grouped"].block == block
    for loss in GROUPED:
        assert_sums_agree(sums[loss], whole[loss])


# --- gradients of other kinds ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["sparse gradients, a loss with groups", "tied weights", "tied weights, a loss with groups"],
)
def test_numerics_10_sums_of_sparse_and_shared_gradients_are_those_of_every_parameter(
    tmp_path: Path, name: str
) -> None:
    iterates = MET[name].record(tmp_path / "iterates")
    sums, whole = (
        replay_met(MET[name], iterates, tmp_path / keep, keep=keep)["train"]
        for keep in ("units", "parameters")
    )
    assert_sums_agree(sums, whole)


# --- the sums themselves --------------------------------------------------------------------------


@st.composite
def gradients(draw: st.DrawFn) -> tuple[list[np.ndarray], int | None]:
    """A gradient with one to three pairs of ends of its shape, and the axis of its units."""
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7))
    axis = draw(st.sampled_from([None, *range(len(shape))]))
    numbers = npst.arrays(np.float32, shape, elements=st.floats(-4, 4, width=16))
    return [draw(numbers) for _ in range(1 + 2 * draw(st.integers(1, 3)))], axis


@settings(max_examples=200, deadline=None)
@given(drawn=gradients(), block=st.sampled_from([1, 3, 16, 2**17]), turned=st.booleans())
def test_unit_sums_are_those_of_numpy_however_they_are_cut(
    drawn: tuple[list[np.ndarray], int | None], block: int, turned: bool
) -> None:
    (gradient, *points), axis = drawn
    ends = list(zip(points[::2], points[1::2], strict=True))
    tensors = [torch.from_numpy(each) for each in (gradient, *points)]
    if turned:  # other strides, the same numbers
        tensors = [torch.from_numpy(np.asfortranarray(each)) for each in (gradient, *points)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directions, "_BLOCK", block)
        found = directions.unit_sums(
            tensors[0], list(zip(tensors[1::2], tensors[2::2], strict=True)), axis
        )
    products = np.stack([gradient * (end - start) for start, end in ends]).astype(np.float64)
    assert found.dtype == torch.float64
    assert found.shape == (len(ends), 1 if axis is None else gradient.shape[axis])
    assert found.numpy() == pytest.approx(
        over_units(products, gradient.ndim, axis), rel=1e-12, abs=1e-9
    )
