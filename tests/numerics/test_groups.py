"""Losses of groups: each group's is that of its examples alone, together they are the loss of the
split.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
import zarr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lca_posthoc import Loss, Run, Task, open_run, run
from lca_posthoc.errors import InputError
from lca_posthoc.replay.events import Note
from lca_posthoc.replay.worker import checks, memory_estimate
from lca_posthoc.results import LossResults

from ..helpers import oracle
from ..helpers.cli import contents, marker, says
from ..helpers.model_cases import CASES, Batch, Case, _vectors, classes
from ..helpers.oracle import Oracle, Truth
from ..helpers.replayed_cases import (
    Lab,
    arrays,
    assert_totals,
    case_of,
    first_loss,
    replayed_in_this_process,
    residuals,
    slow_totals,
    worst_error,
)

SEGMENTS = 5


def replay(lab: Lab, name: str, losses: Mapping[str, Loss], **settings: Any) -> Run:
    """Losses on the model, the data and the iterates of a case, in one span, never refined unless a
    tolerance is given.

    Settings are those of `run`, or a task's `build`, `data` and `fixed`.
    """
    case = case_of(name)
    task = Task(
        settings.pop("build", case.build),
        settings.pop("data", case.data()),
        losses,
        settings.pop("fixed", ()),
    )
    defaults = {"batch_size": case.batch_size, "out": lab.new_place()}
    chosen = lab.settings(**{**defaults, **settings})
    return run(settings.pop("checkpoints", lab.iterates(name)), task, **chosen)


def raised(lab: Lab, name: str, losses: Mapping[str, Loss], **settings: Any) -> str:
    """The message a replay is refused with, before anything is written."""
    out = lab.new_place("refused")
    with pytest.raises(InputError) as caught:
        replay(lab, name, losses, out=out, **settings)
    assert not out.exists()
    return str(caught.value)


# --- how examples are grouped ---------------------------------------------------------------------


def by_class(inputs: Tensor, targets: Tensor) -> Tensor:
    return targets


def by_start(tokens: Tensor, targets: Tensor) -> list[str]:
    return ["even" if first % 2 == 0 else "odd" for first in tokens[:, 0].tolist()]


def by_sign(inputs: Tensor, targets: Tensor) -> list[bool]:
    return (inputs[:, 0] > 0).tolist()


GROUPINGS: dict[str, Callable[..., Any]] = {
    "relu_mlp": by_class,
    "conv_bn": by_class,
    "transformer": by_start,
}
MODES = [
    ("relu_mlp", "running"),
    ("conv_bn", "running"),
    ("conv_bn", "batch"),
    ("transformer", "running"),
]


def grouped(loss: Loss, group_by: Any) -> dict[str, Loss]:
    return {"grouped": replace(loss, group_by=group_by)}


def loss_of(name: str) -> Loss:
    return case_of(name).losses[first_loss(name)]


@cache
def labels_of(name: str) -> list[Any]:
    given = GROUPINGS.get(name, by_class)(*case_of(name).data()["train"])
    return list(given.tolist() if isinstance(given, Tensor) else given)


def group_truth(
    lab: Lab, name: str, label: Any, mode: str = "running", intervals: int = 2
) -> Truth:
    """The oracle's for one group: over its examples alone, or in batch mode over the whole split's
    batches, the others masked.
    """
    case = case_of(name)
    data, values = case.data()["train"], case.values[first_loss(name)]
    mine = torch.tensor([each == label for each in labels_of(name)])
    if mode == "running":
        judge = Oracle(case.build, tuple(each[mine] for each in data), values)
    else:

        def masked(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            return values(model, batch[:2]), batch[2].double()

        judge = Oracle(
            case.build, (*data, mine), masked, norm_stats="batch", batch_size=case.batch_size
        )
    return judge.allocate(lab.checkpoints(name), *oracle.simpson(intervals))


# --- each group -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), MODES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_each_group_has_the_allocation_of_its_examples_alone(
    lab: Lab, name: str, mode: str, precision: str
) -> None:
    """In batch mode: of its examples, normalised with the statistics of the whole, unchanged
    batches.
    """
    results = replay(
        lab, name, grouped(loss_of(name), GROUPINGS[name]), norm_stats=mode, precision=precision
    )["grouped"]
    found, labels = arrays(results.allocation), results.allocation["group"].values.tolist()
    assert labels == sorted(set(labels_of(name)))
    for position, label in enumerate(labels):
        truth = group_truth(lab, name, label, mode)
        wanted = {tensor: each.numpy() for tensor, each in truth.stacked().items()}
        bound = {"float32": case_of(name).bound, "float64": 1e-6}[precision]
        assert (
            worst_error({tensor: each[:, position] for tensor, each in found.items()}, wanted)
            <= bound
        )
        steps = results.steps.isel(group=position)
        assert [*steps["loss_start"].values, steps["loss_end"].values[-1]] == pytest.approx(
            truth.losses, rel=1e-6
        )
        for at, mean in enumerate(truth.gradient):
            row = results.tensors.isel(step=at, group=position)
            sizes = [float(mean[tensor].abs().sum()) for tensor in row["tensor"].values]
            assert row["gradient"].values == pytest.approx(sizes, rel=1e-4, abs=1e-5 * sum(sizes))


def test_counts_and_the_histogram_are_those_of_each_groups_stored_numbers(lab: Lab) -> None:
    results = replay(lab, "conv_bn", grouped(loss_of("conv_bn"), by_class))["grouped"]
    kinds = dict(zip(results.tensors["tensor"].values, results.tensors["kind"].values, strict=True))
    stored = arrays(results.allocation)
    for position, tensor in enumerate(results.tensors["tensor"].values):
        row = results.tensors.isel(tensor=position)
        flat = stored[tensor].reshape(SEGMENTS, 4, -1)
        assert np.array_equal(row["helping"].values, (flat < 0).sum(2))
        assert np.array_equal(row["hurting"].values, (flat > 0).sum(2))
        assert row["motion"].dims == ("step",)
        units = results.units[tensor].values.astype(np.float64).sum(2)
        scale = np.abs(flat.astype(np.float64)).sum(2)
        assert (np.abs(units - row["allocated"].values) <= 1e-6 * scale + 1e-12).all()
    for at, group in itertools.product(range(SEGMENTS), range(4)):
        parts = [
            each[at, group].ravel()
            for tensor, each in stored.items()
            if kinds[tensor] == "parameter"
        ]
        values = np.concatenate(parts).astype(np.float64)
        edges = results.histogram["edge"].values
        assert np.array_equal(
            results.histogram["count"].values[at, group],
            np.histogram(values[values != 0], edges)[0],
        )
        assert results.histogram["zero"].values[at, group] == (values == 0).sum()


# --- all groups together --------------------------------------------------------------------------

CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0])
MEANS: dict[str, tuple[str, str, Loss, Callable[..., Any]]] = {
    "classes": ("relu_mlp", "running", Loss(F.cross_entropy), by_class),
    "class weights": (
        "relu_mlp",
        "running",
        Loss(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)),
        by_sign,
    ),
    "class weights by class": (
        "relu_mlp",
        "running",
        Loss(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)),
        by_class,
    ),
    "ignore_index": (
        "relu_mlp",
        "running",
        Loss(partial(F.cross_entropy, ignore_index=2)),
        by_sign,
    ),
    "weights of its own": (
        "transformer",
        "running",
        CASES["transformer"].losses["tokens"],
        by_start,
    ),
    "many elements an example": (
        "transformer",
        "running",
        CASES["transformer"].losses["all"],
        by_start,
    ),
    "running statistics": ("conv_bn", "running", Loss(F.cross_entropy), by_class),
    "batch statistics": ("conv_bn", "batch", Loss(F.cross_entropy), by_class),
    "batch statistics and class weights": (
        "conv_bn",
        "batch",
        Loss(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)),
        by_sign_of_image := lambda images, targets: (images.mean((1, 2, 3)) > 0.1).tolist(),
    ),
}


def mean_over_groups(column: xr.DataArray, weight: xr.DataArray) -> np.ndarray:
    return (
        (column.astype("float64") * (weight / weight.sum("group")))
        .sum("group")
        .transpose("step", ...)
        .values
    )


@pytest.mark.parametrize("case", MEANS)
def test_the_weighted_mean_over_groups_is_the_loss_of_the_split(lab: Lab, case: str) -> None:
    """Each is replayed alone, so that nothing but the mathematics makes them agree."""
    name, mode, loss, group_by = MEANS[case]
    parts = replay(lab, name, grouped(loss, group_by), norm_stats=mode)["grouped"]
    whole = replay(lab, name, {"whole": loss}, norm_stats=mode)["whole"]
    weight, wanted = parts.steps["weight"], arrays(whole.allocation)
    assert (weight.values > 0).all()
    assert weight.sum("group").values == pytest.approx(whole.steps["weight"].values, rel=1e-12)
    everything = np.sum([np.abs(each).sum() for each in wanted.values()], dtype=np.float64)

    def apart(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
        return sum(float(np.abs(found[tensor] - expected[tensor]).sum()) for tensor in expected)

    for part in ("allocation", "units"):
        opened, expected = getattr(parts, part), arrays(getattr(whole, part))
        found = {tensor: mean_over_groups(opened[tensor], weight) for tensor in expected}
        assert apart(found, expected) <= 1e-6 * everything, part
    sums = mean_over_groups(parts.tensors["allocated"], weight)
    assert np.abs(sums - whole.tensors["allocated"].values).sum() <= 1e-6 * everything
    for field in ("loss_start", "loss_end"):
        assert mean_over_groups(parts.steps[field], weight) == pytest.approx(
            whole.steps[field].values, rel=1e-6
        )
    assert np.array_equal(parts.tensors["motion"].values, whole.tensors["motion"].values)
    found, expected = (
        arrays(parts.totals.sel(total="allocated")),
        arrays(whole.totals.sel(total="allocated")),
    )
    assert apart(found, expected) <= 1e-6 * everything


@pytest.mark.parametrize(
    ("name", "mode"), [("relu_mlp", "running"), ("conv_bn", "running"), ("conv_bn", "batch")]
)
def test_totals_of_a_grouped_loss_are_those_of_slow_loops_over_its_weighted_mean(
    lab: Lab, name: str, mode: str
) -> None:
    losses, checkpoints = grouped(loss_of(name), by_class), lab.checkpoints(name)
    results = replay(lab, name, losses, norm_stats=mode, span=2)["grouped"]
    segments = replayed_in_this_process(
        lab, replace(case_of(name), losses=losses), checkpoints, norm_stats=mode
    )

    def mean(held: Tensor, weight: np.ndarray) -> np.ndarray:
        return np.tensordot(weight, held.cpu().numpy(), 1) / weight.sum()

    for tensor in results.totals.data_vars:
        exact = np.stack([mean(each.allocation[tensor], each.weight) for each in segments])
        series = {
            "weight": np.stack(
                [
                    (b[tensor].double() - a[tensor].double()).numpy()
                    for a, b in itertools.pairwise(checkpoints)
                ]
            ),
            "gradient": np.stack(
                [mean(each.mean_gradient[tensor], each.weight) for each in segments]
            ),
            "allocation": exact.astype(np.float32),
        }
        unit = results.record.unit
        assert_totals(results.totals[tensor].values, slow_totals(series, exact, unit))
        counts = results.totals[tensor].sel(total=["helping", "hurting", "allocation_turns"]).values
        assert np.array_equal(counts, np.round(counts))


# --- labels ---------------------------------------------------------------------------------------

TARGETS = _vectors()["train"][1]
NAMES = ["wolf", "ape", "Zebra", "émeu"]

LABELS: dict[str, tuple[Any, list[Any]]] = {
    "a function": (by_class, [0, 1, 2, 3]),
    "a tensor": (TARGETS, [0, 1, 2, 3]),
    "an array": (TARGETS.numpy(), [0, 1, 2, 3]),
    "integers below zero": ((TARGETS - 2).tolist(), [-2, -1, 0, 1]),
    "large integers": ((TARGETS * 10**12).tolist(), [0, 10**12, 2 * 10**12, 3 * 10**12]),
    "bools": ((TARGETS > 1).tolist(), [0, 1]),
    "a tensor of bools": (TARGETS > 1, [0, 1]),
    "strings": ([NAMES[each] for each in TARGETS], sorted(NAMES)),
    "a function that gives strings": (
        lambda inputs, targets: [NAMES[each] for each in targets],
        sorted(NAMES),
    ),
    "one label": (["all"] * 50, ["all"]),
    "a label for every example": (list(range(49, -1, -1)), list(range(50))),
}


@pytest.mark.parametrize("form", LABELS)
def test_labels_ascend_and_are_recorded_and_stored_with_their_counts(lab: Lab, form: str) -> None:
    group_by, labels = LABELS[form]
    replayed = replay(lab, "relu_mlp", grouped(Loss(F.cross_entropy), group_by), steps="0:2")
    given = group_by(*_vectors()["train"]) if callable(group_by) else group_by
    plain = [each.item() if isinstance(each, Tensor | np.generic) else each for each in given]
    counts = [plain.count(label) for label in labels]
    recorded = json.loads((replayed.path / "run.json").read_text())["losses"]["grouped"]
    assert (recorded["groups"], recorded["counts"]) == (labels, counts)
    results = open_run(replayed.path)["grouped"]
    for part in ("allocation", "units", "tensors", "steps", "histogram"):
        assert getattr(results, part)["group"].values.tolist() == labels, part
    assert results.steps["examples"].values.tolist() == counts
    assert results.steps["weight"].values.tolist() == [counts, counts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = xr.open_datatree(replayed.path / "data.zarr", engine="zarr", consolidated=False)
        for part in ("allocation", "units", "tensors", "steps", "histogram"):
            raw = tree[f"grouped/{part}"]
            assert raw["group"].values.tolist() == labels, part
            assert "group" in raw.coords
    bias = tree["grouped/allocation/0.bias"]
    assert np.array_equal(
        bias.sel(group=labels[-1]).values, results.allocation["0.bias"].values[:, -1]
    )


REFUSED_LABELS = {
    "floats": (
        [0.5] * 50,
        "group_by on split 'train'; labels of type float; one integer or string",
    ),
    "mixed": ([0, "a"] * 25, "group_by on split 'train'; labels of type int and str"),
    "none": ([None] * 50, "group_by on split 'train'; NoneType"),
    "too few": (list(range(49)), "group_by on split 'train'; 49 labels for 50 examples"),
    "a scalar": (
        lambda inputs, targets: targets.sum(),
        "group_by on split 'train'; not a list of labels",
    ),
    "a failing function": (
        lambda inputs, targets: 1 // 0,
        "group_by on split 'train' failed; ZeroDivisionError",
    ),
    "too many arguments": (lambda inputs: [0], "group_by on split 'train' failed; TypeError"),
}


@pytest.mark.parametrize("form", REFUSED_LABELS)
def test_labels_that_are_none_are_refused_before_anything_is_written(lab: Lab, form: str) -> None:
    group_by, words = REFUSED_LABELS[form]
    says(raised(lab, "relu_mlp", grouped(Loss(F.cross_entropy), group_by)), *words.split("; "))


def test_a_group_nothing_of_which_counts_is_refused_before_anything_is_written(lab: Lab) -> None:
    """The examples of an ignored class have no loss to allocate."""
    losses = grouped(Loss(nn.CrossEntropyLoss(ignore_index=2)), by_class)
    says(raised(lab, "relu_mlp", losses), "group 2", "'grouped'", "'train'")


def test_in_batch_mode_values_that_do_not_run_over_the_examples_are_refused(lab: Lab) -> None:
    def flat(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).flatten()

    words = ("values of shape [28]", "batch of 7 examples", "--norm-stats batch", "first axis")
    says(raised(lab, "conv_bn", grouped(Loss(call=flat), by_class), norm_stats="batch"), *words)
    results = replay(lab, "conv_bn", grouped(Loss(call=flat), by_class))["grouped"]
    assert results.steps["weight"].values[0].tolist() == [
        4 * each for each in results.record.counts
    ]


def brightest_first(rows: list[Batch]) -> Batch:
    rows = sorted(rows, key=lambda row: -float(row[0].sum()))
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def test_a_loader_that_reorders_its_batches_has_groups_by_a_list_where_a_batch_holds_one(
    lab: Lab,
) -> None:
    """With running statistics the numbers are those of the data as they are; with batch statistics
    examples are lost track of.
    """
    inputs, targets = case_of("conv_bn").data()["train"]
    loader = DataLoader(TensorDataset(inputs, targets), collate_fn=brightest_first)
    by_list, by_function = (
        grouped(Loss(F.cross_entropy), each) for each in (targets.tolist(), by_class)
    )
    words = ("'grouped'", "'train'", "order of the examples", "collate_fn", "enforce_sorted=False")
    says(raised(lab, "conv_bn", by_list, data={"train": loader}, norm_stats="batch"), *words)
    for mode in ("running", "batch"):
        words = ("group_by", "'train'", "another order", "collate_fn", "as a list")
        says(raised(lab, "conv_bn", by_function, data={"train": loader}, norm_stats=mode), *words)
    found = replay(lab, "conv_bn", by_list, data={"train": loader})["grouped"]
    for group in range(len(targets.unique())):
        part = inputs[targets == group], targets[targets == group]
        truth = Oracle(case_of("conv_bn").build, part, classes).allocate(
            lab.checkpoints("conv_bn"), *oracle.simpson(2)
        )
        wanted = {name: each.numpy() for name, each in truth.stacked().items()}
        assert worst_error(arrays(found.allocation.isel(group=group)), wanted) <= 1e-4


def test_other_groups_under_a_recorded_name_are_refused(lab: Lab) -> None:
    first = replay(lab, "relu_mlp", grouped(Loss(F.cross_entropy), TARGETS), steps="0:2")
    for group_by, field in (
        (TARGETS + 1, "groups"),
        (TARGETS.flip(0).clamp(max=2), "groups"),
        (None, "groups"),
    ):
        with pytest.raises(InputError, match=rf"'grouped' is not the one recorded.*its {field}"):
            replay(
                lab,
                "relu_mlp",
                grouped(Loss(F.cross_entropy), group_by),
                out=first.path,
                steps="0:2",
            )
    moved = torch.where(torch.arange(50) == int((TARGETS == 0).int().argmax()), 1, TARGETS)
    with pytest.raises(InputError, match=r"'grouped' is not the one recorded.*its counts"):
        replay(lab, "relu_mlp", grouped(Loss(F.cross_entropy), moved), out=first.path, steps="0:2")


# --- refinement -----------------------------------------------------------------------------------


@cache
def group_residuals(lab: Lab) -> np.ndarray:
    """|residual| of the kinked network by level (1 to 5), segment and class, from the oracle."""
    truths = [
        [group_truth(lab, "kinked", label, intervals=2**level) for label in range(4)]
        for level in range(1, 6)
    ]
    return np.abs([[residuals(truth) for truth in level] for level in truths]).transpose(0, 2, 1)


def level_wanted(worst: np.ndarray, tolerance: float) -> list[int]:
    """The first level at which every group's residual is small enough, for each segment."""
    will_do = (worst.max(2) <= tolerance).T
    return [1 + int(row.argmax()) if row.any() else 5 for row in will_do]


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 3e-5])
def test_groups_are_refined_together_until_the_residual_of_each_is_small_enough(
    lab: Lab, tolerance: float
) -> None:
    results = replay(
        lab,
        "kinked",
        grouped(Loss(F.cross_entropy), by_class),
        tolerance=tolerance,
        precision="float64",
    )["grouped"]
    steps, worst = results.steps, group_residuals(lab)
    assert steps["level"].values.tolist() == level_wanted(worst, tolerance)
    for at, level in enumerate(steps["level"].values):
        assert np.abs(steps["residual"].values[at]) == pytest.approx(
            worst[level - 1, at], abs=1e-12
        )
        assert bool(steps["converged"][at]) == bool((worst[level - 1, at] <= tolerance).all())
        assert int(steps["evaluations"][at]) == 2**level
    assert steps["level"].dims == steps["converged"].dims == steps["evaluations"].dims == ("step",)
    change = (steps["loss_end"] - steps["loss_start"]).values
    assert (
        np.abs(
            results.tensors["allocated"].sum("tensor").values + steps["residual"].values - change
        ).max()
        <= 1e-12
    )


def test_a_grouped_loss_is_refined_where_its_mean_would_not_be(lab: Lab) -> None:
    """Residuals of groups cancel in the mean; otherwise the test above would show little."""
    plain = replay(lab, "kinked", {"whole": Loss(F.cross_entropy)}, precision="float64")[
        "whole"
    ].steps["residual"]
    worst = group_residuals(lab)[0]
    between = [(abs(float(plain[at])) + worst[at].max()) / 2 for at in range(SEGMENTS)]
    at = int(np.argmax([worst[at].max() / abs(float(plain[at])) for at in range(SEGMENTS)]))
    losses = {"whole": Loss(F.cross_entropy), **grouped(Loss(F.cross_entropy), by_class)}
    replayed = replay(lab, "kinked", losses, tolerance=between[at], precision="float64")
    assert int(replayed["whole"].steps["level"][at]) == 1
    assert int(replayed["grouped"].steps["level"][at]) > 1


# --- blocks ---------------------------------------------------------------------------------------


def in_blocks_of(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Blocks of one group are what almost no memory gives; larger ones are asked for."""
    if block == 1:
        monkeypatch.setattr(memory_estimate, "ROOM", 1e-15)
    else:
        monkeypatch.setattr(
            checks,
            "block_of",
            lambda spec, objective, name, keep: (
                block if objective.order(name) is not None else None
            ),
        )


def assert_same_numbers(found: LossResults, wanted: LossResults) -> None:
    """The bits of everything but the totals, which are sums over blocks."""
    for part in ("allocation", "steps", "tensors", "units", "histogram"):
        one, other = arrays(getattr(found, part)), arrays(getattr(wanted, part))
        assert one.keys() == other.keys()
        differ = [f"{part}/{name}" for name in one if one[name].tobytes() != other[name].tobytes()]
        assert set(differ) <= {"steps/precision_error"}  # a ratio of sums over blocks
    for tensor, column in arrays(wanted.totals).items():
        exact = np.abs(column[0]).max() if column.size else 0.0
        assert found.totals[tensor].values == pytest.approx(column, rel=1e-12, abs=1e-12 * exact)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [("kinked", "running", math.inf), ("kinked", "running", 1e-4), ("conv_bn", "batch", math.inf)],
)
def test_groups_taken_in_blocks_give_the_same_numbers(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str, mode: str, tolerance: float, block: int
) -> None:
    losses = {"whole": Loss(F.cross_entropy), **grouped(Loss(F.cross_entropy), by_class)}
    settings = {"norm_stats": mode, "tolerance": tolerance, "span": 2}
    wanted = replay(lab, name, losses, **settings)
    assert wanted.manifest.losses["grouped"].block is None
    in_blocks_of(monkeypatch, block)
    found = replay(lab, name, losses, **settings)
    assert found.manifest.losses["grouped"].block == block
    assert found.manifest.losses["whole"].along is None
    assert_same_numbers(found["grouped"], wanted["grouped"])


def test_groups_alone_would_be_refined_to_other_levels(lab: Lab) -> None:
    """Otherwise the test above would show little."""
    worst = group_residuals(lab)
    alone = [level_wanted(worst[:, :, group : group + 1], 1e-4) for group in range(4)]
    assert len({tuple(levels) for levels in alone}) > 1
    assert any(len(set(levels)) > 1 for levels in zip(*alone, strict=True))


def test_a_segment_is_converged_only_if_it_is_in_every_block(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last block is fine at the finest level and one before it is not."""
    finest = group_residuals(lab)[-1]
    tolerance = float(np.median(finest))
    fine = finest <= tolerance
    assert (fine[:, -1] & ~fine.all(1)).any()
    in_blocks_of(monkeypatch, 1)
    results = replay(
        lab,
        "kinked",
        grouped(Loss(F.cross_entropy), by_class),
        tolerance=tolerance,
        precision="float64",
    )
    steps = results["grouped"].steps
    small = (np.abs(steps["residual"].values) <= tolerance).all(1)
    assert steps["converged"].values.tolist() == small.tolist()


@pytest.mark.parametrize("block", [1, 2])
def test_chunks_never_cross_a_border_between_blocks(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    in_blocks_of(monkeypatch, block)
    replayed = replay(lab, "relu_mlp", grouped(Loss(F.cross_entropy), list(range(5)) * 10))
    group = zarr.open_group(replayed.path / "data.zarr" / "grouped", mode="r")
    arrays_of = [
        array
        for part in ("allocation", "units")
        for _, array in group[part].arrays()
        if "group" in (array.metadata.dimension_names or ()) and array.ndim > 1
    ]
    assert len(arrays_of) == 12
    for array in arrays_of:
        axis = array.metadata.dimension_names.index("group")
        assert block % array.chunks[axis] == 0


def test_a_run_made_in_blocks_goes_on_in_them_wherever_it_is_resumed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = grouped(Loss(F.cross_entropy), by_class)
    with monkeypatch.context() as patched:
        in_blocks_of(patched, 2)
        replayed = replay(lab, "kinked", losses, span=2, tolerance=1e-4)
    before = contents(replayed.path / "data.zarr")
    marker(replayed.path, "grouped", 1).unlink()
    again = replay(lab, "kinked", losses, span=None, tolerance=1e-4, out=replayed.path)
    assert again["grouped"].complete
    assert again.manifest.losses["grouped"].block == 2
    assert contents(replayed.path / "data.zarr") == before


class Domains(nn.Module):
    """Each of two domains, told apart by an input, has a normalisation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norms, self.last = (
            nn.Linear(12, 6),
            nn.ModuleList([nn.BatchNorm1d(6) for _ in range(2)]),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden, domain = self.first(x), (x[:, 0] > 0).long()
        out = torch.zeros_like(hidden)
        for each in domain.unique():
            out = out.index_put(
                (torch.where(domain == each)[0],), self.norms[each](hidden[domain == each])
            )
        return self.last(torch.tanh(out))


def test_a_buffer_some_block_depends_on_is_not_said_to_be_unused(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(Domains, _vectors, {"train": Loss(F.cross_entropy)}, {"train": classes})
    in_blocks_of(monkeypatch, 1)
    heard: list[Any] = []
    settings = {
        "checkpoints": case.record(tmp_path / "iterates", 3),
        "build": Domains,
        "progress": heard.append,
    }
    results = replay_at(tmp_path, case, grouped(Loss(F.cross_entropy), by_sign), **settings)[
        "grouped"
    ]
    assert results.allocation["norms.0.running_mean"].values.any()
    assert [
        event.text for event in heard if isinstance(event, Note) and "tensors moved" in event.text
    ] == []


def replay_at(
    place: Path, case: Case, losses: Mapping[str, Loss], checkpoints: Path, **settings: Any
) -> Run:
    """Losses on iterates that are not those of a case."""
    task = Task(
        settings.pop("build", case.build),
        settings.pop("data", case.data()),
        losses,
        settings.pop("fixed", ()),
    )
    defaults = {
        "tolerance": math.inf,
        "cluster": "inline",
        "device": "cpu",
        "losses": ("all",),
        "span": 8,
    }
    return run(
        checkpoints,
        task,
        **{**defaults, "out": place / "run", "batch_size": case.batch_size, **settings},
    )
