"""`--tensors`: the numbers of the tensors that are kept are those of the whole, what the others did
is one remainder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
import zarr
from torch import Tensor

from lca_posthoc import Loss, Run, Task, run
from lca_posthoc.errors import InputError
from lca_posthoc.findings import summary
from lca_posthoc.results import LossResults

from ..helpers.cli import document, last_line, lca, record, refused, run_lca, says, write_task
from ..helpers.model_cases import CASES
from ..helpers.replayed_cases import arrays

TOLERANCE = 3e-4
FROM_ALL = (
    "loss_start",
    "loss_end",
    "residual",
    "weight",
    "evaluations",
    "level",
    "converged",
    "error_bound",
)


def by_class(inputs: Tensor, targets: Tensor) -> Tensor:
    return targets


LOSSES = {
    "whole": Loss(F.cross_entropy),
    "grouped": Loss(F.cross_entropy, group_by=by_class),
}
PATTERNS: dict[str, list[tuple[str, ...]]] = {
    "relu_mlp": [("3.weight", "*.bias"), ("*",)],
    "conv_bn": [("1.running_?*", "8.bias")],
}
PARTS = [(name, patterns) for name, every in PATTERNS.items() for patterns in every]
PARTS_AND_LOSSES = [(*part, loss) for part in PARTS for loss in LOSSES]
Replay = Callable[..., Run]


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """Both losses on a case's model, refined where that is needed; without patterns, all tensors
    are kept.
    """
    root = tmp_path_factory.mktemp("parts")
    cases = {name: replace(CASES[name], learning_rate=0.5) for name in PATTERNS}
    iterates = {name: case.record(root / name, steps=5) for name, case in cases.items()}

    @cache
    def replayed(name: str, patterns: tuple[str, ...] = (), **settings: Any) -> Run:
        task = Task(cases[name].build, cases[name].data(), LOSSES)
        out = root / f"{name}{len(list(root.iterdir()))}"
        fixed = {
            "cluster": "inline",
            "device": "cpu",
            "losses": ["all"],
            "tolerance": TOLERANCE,
            "span": 2,
        }
        return run(
            iterates[name], task, out=out, batch_size=7, tensors=patterns, **{**fixed, **settings}
        )

    return replayed


def kept_of(results: LossResults, patterns: tuple[str, ...]) -> list[str]:
    names = results.tensors["tensor"].values.tolist()
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


@pytest.mark.parametrize(("name", "patterns", "loss"), PARTS_AND_LOSSES)
def test_what_is_kept_has_the_bits_of_the_run_that_keeps_all(
    replay: Replay, name: str, patterns: tuple[str, ...], loss: str
) -> None:
    part, whole = replay(name, patterns)[loss], replay(name)[loss]
    kept = kept_of(whole, patterns)
    assert kept
    for what in ("allocation", "units", "totals"):
        found, wanted = arrays(getattr(part, what)), arrays(getattr(whole, what))
        assert list(found) == kept
        assert [each for each in kept if found[each].tobytes() != wanted[each].tobytes()] == []
    assert part.tensors["tensor"].values.tolist() == kept
    chosen = whole.tensors.isel(tensor=np.isin(whole.tensors["tensor"].values.astype(str), kept))
    for column in part.tensors.data_vars:
        assert np.array_equal(part.tensors[column].values, chosen[column].values), column


@pytest.mark.parametrize(("name", "patterns", "loss"), PARTS_AND_LOSSES)
def test_refinement_and_the_losses_are_those_of_the_run_that_keeps_all(
    replay: Replay, name: str, patterns: tuple[str, ...], loss: str
) -> None:
    part, whole = replay(name, patterns)[loss].steps, replay(name)[loss].steps
    assert set(part.data_vars) == {*whole.data_vars, "remainder"}
    for column in (*FROM_ALL, "precision_error"):
        assert part[column].values.tobytes() == whole[column].values.tobytes(), column
    assert part["remainder"].dims == part["residual"].dims


def test_some_segments_of_these_runs_are_refined_and_others_are_not(replay: Replay) -> None:
    """Otherwise the test above would show little."""
    levels = {
        int(level)
        for name in PATTERNS
        for loss in LOSSES
        for level in replay(name)[loss].steps["level"].values
    }
    assert len(levels) > 1


@pytest.mark.parametrize(("name", "patterns", "loss"), PARTS_AND_LOSSES)
def test_the_remainder_is_what_the_others_did_and_closes_the_sum(
    replay: Replay, name: str, patterns: tuple[str, ...], loss: str
) -> None:
    part, whole = replay(name, patterns)[loss], replay(name)[loss]
    steps, left_out = (
        part.steps,
        ~np.isin(whole.tensors["tensor"].values.astype(str), kept_of(whole, patterns)),
    )
    theirs = whole.tensors["allocated"].isel(tensor=left_out).sum("tensor").values
    assert steps["remainder"].values.dtype == np.float64
    assert np.abs(steps["remainder"].values - theirs).max() <= 1e-12
    change = (steps["loss_end"] - steps["loss_start"]).values
    mine = part.tensors["allocated"].sum("tensor").values
    assert (
        np.abs(mine + steps["remainder"].values + steps["residual"].values - change).max() <= 1e-12
    )
    assert steps["remainder"].values.any() == left_out.any()


@pytest.mark.parametrize("keep", ["parameters", "statistics", "units", "tensors"])
@pytest.mark.parametrize(("name", "patterns"), [("relu_mlp", PATTERNS["relu_mlp"][0]), PARTS[-1]])
def test_the_store_holds_no_other_tensor(
    replay: Replay, name: str, patterns: tuple[str, ...], keep: str
) -> None:
    replayed = replay(name, patterns, keep=keep)
    stored = zarr.open_group(replayed.path / "data.zarr", mode="r")
    kept = kept_of(replay(name)["whole"], patterns)
    parts = {
        "parameters": {"allocation", "units", "totals", "counts", "signs"},
        "statistics": {"units", "totals", "counts", "signs"},
        "units": {"units"},
        "tensors": set(),
    }
    for loss in LOSSES:
        arrays_of = {part: dict(group.arrays()) for part, group in stored[loss].groups()}
        found = {
            part: {array.attrs["name"] for array in held.values() if "name" in array.attrs}
            for part, held in arrays_of.items()
        }
        assert {part: names for part, names in found.items() if names} == {
            part: set(kept) for part in parts[keep]
        }
        assert {array.shape[-1] for array in arrays_of["tensors"].values() if array.ndim > 1} == {
            len(kept)
        }


@pytest.mark.parametrize("keep", ["units", "tensors"])
def test_the_remainder_of_sums_is_that_of_parameters(replay: Replay, keep: str) -> None:
    patterns = PATTERNS["conv_bn"][-1]
    for loss in LOSSES:
        one, other = replay("conv_bn", patterns, keep=keep)[loss], replay("conv_bn", patterns)[loss]
        scale = np.abs(arrays(replay("conv_bn")[loss].tensors)["allocated"]).sum(-1)
        apart = np.abs(one.steps["remainder"].values - other.steps["remainder"].values)
        assert (apart <= 1e-6 * np.maximum(scale, 1e-9)).all()


def test_statistics_do_not_depend_on_whether_allocations_are_kept(replay: Replay) -> None:
    patterns = PATTERNS["conv_bn"][-1]
    for loss in LOSSES:
        one = replay("conv_bn", patterns, keep="statistics")[loss]
        other = replay("conv_bn", patterns)[loss]
        for part in ("steps", "tensors"):
            found, wanted = arrays(getattr(one, part)), arrays(getattr(other, part))
            assert [
                column for column in wanted if found[column].tobytes() != wanted[column].tobytes()
            ] == []


@pytest.mark.parametrize(("name", "patterns", "loss"), PARTS_AND_LOSSES)
def test_a_summary_counts_what_the_others_did_as_allocated(
    replay: Replay, name: str, patterns: tuple[str, ...], loss: str
) -> None:
    part, whole = summary(replay(name, patterns)[loss]), summary(replay(name)[loss])
    assert whole["remainder"] is None
    assert part["allocated"] == pytest.approx(whole["allocated"], abs=1e-12)
    assert part["residual"] == pytest.approx(whole["residual"], abs=1e-12)
    assert part["loss_change"] == whole["loss_change"]
    mine = np.sum([tensor["allocated"] for tensor in part["tensors"]], axis=0)
    assert mine + np.asarray(part["remainder"]) == pytest.approx(
        np.asarray(part["allocated"]), abs=1e-12
    )
    theirs = {tensor["name"]: tensor for tensor in whole["tensors"]}
    assert part["tensors"] == [theirs[tensor["name"]] for tensor in part["tensors"]]


def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is(tmp_path: Path) -> None:
    case = CASES["relu_mlp"]
    iterates = case.record(tmp_path / "iterates", steps=2)
    settings = {
        "out": tmp_path / "run",
        "cluster": "inline",
        "device": "cpu",
        "tolerance": math.inf,
    }
    with pytest.raises(InputError) as caught:
        run(iterates, case.task(), tensors=["0.*", "fc1.*"], **settings)
    says(str(caught.value), "--tensors 'fc1.*'", "'0.weight'")
    assert not (tmp_path / "run").exists()


def test_a_counter_is_no_tensor_that_could_be_kept(tmp_path: Path) -> None:
    case = CASES["conv_bn"]
    iterates = case.record(tmp_path / "iterates", steps=2)
    settings = {
        "out": tmp_path / "run",
        "cluster": "inline",
        "device": "cpu",
        "tolerance": math.inf,
    }
    with pytest.raises(InputError, match="matches no tensor"):
        run(iterates, case.task(), tensors=["*.num_batches_tracked"], **settings)


def test_the_command_line_keeps_a_part_shows_the_others_and_never_changes_it(
    tmp_path: Path,
) -> None:
    checkpoints, task, out = (
        record(tmp_path / "ck"),
        write_task(tmp_path / "task.py"),
        tmp_path / "run",
    )
    assert (
        run_lca(checkpoints, task, out, "--tensors", "out.*", "--tensors", "hidden.bias").exit_code
        == 0
    )
    found = document(lca("summary", out, "--json"))["losses"]["train"]
    assert [tensor["name"] for tensor in found["tensors"]] == [
        "hidden.bias",
        "out.weight",
        "out.bias",
    ]
    shown = lca("summary", out).stdout
    says(shown, "(tensors not kept)", f"{found['remainder']:+.6f}", f"{found['allocated']:+.6f}")
    refused(run_lca(checkpoints, task, out, "--tensors", "out.*"), "--tensors hidden.bias")
    again = run_lca(checkpoints, task, out)
    assert again.exit_code == 0, last_line(again)
