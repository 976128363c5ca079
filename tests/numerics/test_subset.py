"""A part of the examples: which, recorded how, and how sure of the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import lca_posthoc
from lca_posthoc import Loss, Recorder, Task
from lca_posthoc.errors import InputError
from lca_posthoc.findings import summary
from lca_posthoc.numerics.objective.batches import positions_of_subset
from lca_posthoc.replay.events import Note
from lca_posthoc.results import read_manifest
from tests.helpers.replayed_cases import arrays

EXAMPLES = 200
GENERATOR = torch.Generator().manual_seed(3)
INPUTS, NOISE = (
    torch.randn(EXAMPLES, 6, generator=GENERATOR),
    torch.randn(EXAMPLES, generator=GENERATOR),
)
TARGETS = (INPUTS @ torch.linspace(-1, 1, 6) + 0.5 * NOISE)[:, None]


@pytest.fixture(scope="module")
def iterates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear model and four steps of gradient descent."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path_factory.mktemp("subset") / "ck", model) as recorder:
        for step in range(5):
            recorder.save(step)
            optimizer.zero_grad()
            F.mse_loss(model(INPUTS), TARGETS).backward()
            optimizer.step()
    return recorder.directory


def task(inputs: Tensor = INPUTS, targets: Tensor = TARGETS, **more: Loss) -> Task:
    data = {"train": (inputs, targets), "validation": (inputs[:50] + 1, targets[:50])}
    return Task(lambda: nn.Linear(6, 1), data, {"train": Loss(F.mse_loss, on="train"), **more})


@pytest.fixture
def replay(iterates: Path, tmp_path: Path) -> Callable[..., Any]:
    def replayed(given: Task, out: str = "run", **settings: Any) -> lca_posthoc.Run:
        fixed = {"cluster": "inline", "device": "cpu", "losses": ["all"], "tolerance": float("inf")}
        return lca_posthoc.run(iterates, given, out=tmp_path / out, **{**fixed, **settings})

    return replayed


@pytest.mark.parametrize("norm_stats", ["running", "batch"])
@pytest.mark.parametrize("subset", ["20:90", ":7", "150:", "3,5,190", "0.25@7"])
def test_a_subset_is_the_loss_of_exactly_these_examples(
    replay: Callable[..., Any], subset: str, norm_stats: str
) -> None:
    positions = positions_of_subset(subset, EXAMPLES)
    assert positions is not None
    settings = {"batch_size": 16, "norm_stats": norm_stats}
    part = replay(task(), subset=[subset], **settings)["train"]
    alone = replay(task(INPUTS[positions], TARGETS[positions]), "alone", **settings)["train"]
    assert part.record.examples == len(positions)
    assert part.record.total == EXAMPLES
    for name, each in arrays(alone.allocation).items():
        assert arrays(part.allocation)[name] == pytest.approx(each, rel=1e-5, abs=1e-8)
    assert part.steps["loss_start"].values == pytest.approx(
        alone.steps["loss_start"].values, rel=1e-6
    )


def test_a_subset_of_one_split_leaves_the_others_whole(replay: Callable[..., Any]) -> None:
    both = task(validation=Loss(F.mse_loss, on="validation"))
    run = replay(both, subset=["train=0:10"])
    whole = replay(both, "whole")
    assert [run[name].record.examples for name in run] == [10, 50]
    for name, each in arrays(whole["validation"].allocation).items():
        assert np.array_equal(arrays(run["validation"].allocation)[name], each)


def test_a_subset_is_recorded_and_never_changed(replay: Callable[..., Any]) -> None:
    run = replay(task(), subset=["0.1@7"])
    assert read_manifest(run.path).settings["subset"] == ["0.1@7"]
    assert replay(task())["train"].record.examples == 20  # gone on with, as it was made
    with pytest.raises(InputError, match=r"made with --subset 0.1@7, not --subset 0.1@8"):
        replay(task(), subset=["0.1@8"])


REFUSED = {
    "a split nobody has": (
        ["test=0:10"],
        "--subset is for split 'test', which no chosen loss is on",
    ),
    "twice": (["0:10", "0:20"], "--subset is given twice for all splits"),
    "twice for a split": (
        ["train=0:10", "train=0:20"],
        "--subset is given twice for split 'train'",
    ),
    "beyond the end": (["0:201"], "--subset '0:201'"),
    "not a fraction": (["1.5@3"], "--subset '1.5@3'"),
    "no seed": (["0.1"], "--subset '0.1'"),
    "a single number": (
        ["train=96"],
        "Write train=96:97 for the example at position 96, train=:96 for the first 96",
    ),
    "a single number for all splits": (
        ["0"],
        "--subset '0' could mean one example or a number of them",
    ),
    "a single number beyond the end": (["500"], ":500 for the first 500"),
    "a list of one": (["96,"], "--subset '96,' is not in a known form"),
}


@pytest.mark.parametrize(("subset", "words"), REFUSED.values(), ids=REFUSED)
def test_a_subset_that_is_none_is_refused(
    replay: Callable[..., Any], tmp_path: Path, subset: list[str], words: str
) -> None:
    with pytest.raises(InputError) as refusal:
        replay(task(), subset=subset)
    assert words in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["", "train="])
@pytest.mark.parametrize("subset", ["20:90", ":7", "3:4", "3,190", "5,3,190", "0.25@7", "0.25@8"])
def test_the_examples_of_a_subset_can_be_read_back(
    replay: Callable[..., Any], subset: str, prefix: str
) -> None:
    both = task(
        l2=Loss(l2=0.1), **({"validation": Loss(F.mse_loss, on="validation")} if prefix else {})
    )
    run = replay(
        both, subset=[prefix + subset, *(["validation=0:9"] if prefix else [])], losses=["all"]
    )
    positions = lca_posthoc.open_run(run.path)["train"].positions
    assert positions.dtype == np.int64
    assert len(positions) == run["train"].record.examples
    assert run["l2"].positions is None
    with torch.no_grad():
        model = nn.Linear(6, 1)
        model.load_state_dict(load_file(next(Path(run.manifest.root).glob("*00000000*"))))
        mean = float(F.mse_loss(model(INPUTS[positions]), TARGETS[positions]))
    assert float(run["train"].steps["loss_start"][0]) == pytest.approx(mean, rel=1e-6)


def test_a_loss_over_all_examples_has_no_positions(replay: Callable[..., Any]) -> None:
    assert replay(task())["train"].positions is None


# --- standard errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subset", "parts"), [("0.25@7", 10), ("0.02@7", 4), ("0:50", 0), ("1,2,3", 0)]
)
def test_only_random_examples_come_in_parts_whose_mean_is_the_allocation(
    replay: Callable[..., Any], subset: str, parts: int
) -> None:
    results = replay(task(), subset=[subset])["train"]
    assert results.record.replicates == parts
    assert ("replicates" in results.tensors) == bool(parts)
    assert all(
        (each["standard_error"] is not None) == bool(parts) for each in summary(results)["tensors"]
    )
    if parts:
        found = results.tensors
        assert found["replicates"].sizes["replicate"] == parts
        mean = found["replicates"].mean("replicate").values
        assert mean == pytest.approx(found["allocated"].values, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("keep", ["tensors", "parameters"])
@pytest.mark.parametrize("batch_size", [10, 30])  # a random part in each batch, or three to four
def test_in_batch_mode_the_parts_of_a_subset_change_no_sum(
    replay: Callable[..., Any], tmp_path: Path, batch_size: int, keep: str
) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1))

    torch.manual_seed(0)
    net = model()
    with Recorder(tmp_path / "ck", net) as recorder:
        for step in range(3):
            recorder.save(step)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape))
    data = {"train": (INPUTS, TARGETS)}
    given = Task(model, data, {"train": Loss(F.mse_loss, on="train")})
    settings = {"norm_stats": "batch", "batch_size": batch_size, "keep": keep, "cluster": "inline"}
    notes: list[str] = []
    parts = lca_posthoc.run(
        recorder.directory,
        given,
        out=tmp_path / "parts",
        subset=["0.5@7"],
        progress=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
        **settings,
    )["train"]
    costly = [note for note in notes if "backward passes for each batch" in note]
    assert len(costly) == (batch_size == 30)
    assert all(
        "With 20 batches or more, --subset 600 examples at --batch-size 30" in note
        for note in costly
    )
    positions = ",".join(map(str, parts.positions))
    whole = lca_posthoc.run(
        recorder.directory, given, out=tmp_path / "whole", subset=[positions], **settings
    )["train"]
    assert (parts.record.replicates, whole.record.replicates) == (10, 0)
    allocated = parts.tensors["allocated"].values
    assert allocated == pytest.approx(whole.tensors["allocated"].values, rel=1e-5, abs=1e-7)
    mean = parts.tensors["replicates"].mean("replicate").values
    assert mean == pytest.approx(allocated, rel=1e-5, abs=1e-7)


def test_parts_that_cannot_be_told_apart_in_a_batch_give_no_standard_errors_and_say_so(
    replay: Callable[..., Any],
) -> None:
    def flat(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        errors = (model(batch[0]) - batch[1]) ** 2
        return torch.cat([errors, errors], 1).flatten()

    given = task(flat=Loss(call=flat, on="train"))
    notes: list[str] = []
    settings = {"subset": ["0.25@7"], "norm_stats": "batch", "batch_size": 20}
    run = replay(
        given,
        losses=["flat"],
        progress=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
        **settings,
    )
    assert run["flat"].record.replicates == 0
    assert any("the parts of the subset can be told apart" in note for note in notes)


def test_losses_with_groups_and_terms_have_no_standard_errors(replay: Callable[..., Any]) -> None:
    losses = {
        "signs": Loss(F.mse_loss, on="train", group_by=lambda inputs, targets: inputs[:, 0] > 0),
        "l2": Loss(l2=0.1),
    }
    run = replay(task(**losses), subset=["0.25@7"])
    assert [run[name].record.replicates for name in run] == [10, 0, 0]
    assert summary(run["signs"])["groups"] == [0, 1]
    alone = replay(task(), "alone", subset=["0.25@7"])["train"]
    assert np.array_equal(
        run["train"].allocation["weight"].values, alone.allocation["weight"].values
    )


def test_standard_errors_are_those_of_drawing_again(replay: Callable[..., Any]) -> None:
    """Over forty draws, the reported standard error of each tensor's sum is the spread of the sums
    about the whole's.
    """
    whole = {
        each["name"]: each["allocated"]
        for each in summary(replay(task(), "whole")["train"])["tensors"]
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in whole}
    for seed in range(40):
        results = replay(
            task(), f"draw{seed}", subset=[f"0.25@{seed}"], keep="tensors", precision="float64"
        )["train"]
        for each in summary(results)["tensors"]:
            found[each["name"]].append((each["allocated"], each["standard_error"]))
    for name, draws in found.items():
        sums, errors = np.array(draws).T
        spread = np.sqrt(np.mean((sums - whole[name]) ** 2))
        assert 1 / 1.5 < np.sqrt(np.mean(errors**2)) / spread < 1.5
        assert abs(sums.mean() - whole[name]) < 4 * spread / np.sqrt(len(sums))


def test_parts_that_weigh_nothing_give_no_standard_errors_and_say_so(
    replay: Callable[..., Any],
) -> None:
    def rarely(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return (model(batch[0]) - batch[1]).square(), (batch[0][:, :1] > 2).double()

    heard: list[Any] = []
    data = task(rare=Loss(call=rarely, on="train"))
    run = replay(data, subset=["0.3@1"], losses=["rare"], progress=heard.append)
    assert run["rare"].record.replicates == 0
    assert [
        event.text
        for event in heard
        if hasattr(event, "text") and "no standard errors" in event.text
    ]
    assert summary(run["rare"])["tensors"][0]["standard_error"] is None
