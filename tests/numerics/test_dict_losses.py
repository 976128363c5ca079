"""A loss that returns a dict is a loss for each entry, with the numbers each would have if it were
stated alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Task, open_run
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import ObjectiveSettings, build_objective

from ..helpers import cli
from ..helpers.cli import document, lca, refused, says
from ..helpers.model_cases import Batch, _vectors, one_hot_distance
from ..helpers.replayed_cases import Lab, assert_same_bits
from ..helpers.user_models import answers
from .test_groups import by_class, replay
from .test_several_losses import BACKWARD, BY_CLASS, COUNTED, FORWARD, WHOLE, Counting, replay_only

WEIGHTS = (0.5, 2.0)


def classes_of(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch[1], reduction="none")


def sizes_of(outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Several values an example, of which some weigh nothing."""
    return (outputs - batch[0][:, :4]).square(), (batch[0][:, :4] > -1.0).float()


def of_call(model: nn.Module, batch: Batch) -> dict[str, Any]:
    outputs = model(batch[0])
    return {"classes": classes_of(outputs, batch), "sizes": sizes_of(outputs, batch)}


def of_outputs(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> dict[str, Tensor]:
    """A function with a reduction of its own."""
    values = F.cross_entropy(outputs, targets, reduction="none")
    both = {"classes": values, "spread": outputs.var(1)}
    return both if reduction == "none" else {name: each.mean() for name, each in both.items()}


def with_a_total(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The total that was minimised is an entry as the others are."""
    outputs = model(batch[0])
    parts = {"classes": classes_of(outputs, batch), "spread": outputs.var(1)}
    return {"total": WEIGHTS[0] * parts["classes"] + WEIGHTS[1] * parts["spread"], **parts}


def in_train_mode(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """As detectors, which give losses in train mode alone."""
    assert not model.training
    model.train()
    try:
        model[2].eval()  # dropout
        model[5].eval()
        return with_a_total(model, batch)
    finally:
        model.eval()


STATED: dict[str, tuple[Loss, dict[str, Loss]]] = {
    "a call": (
        Loss(call=of_call),
        {
            "classes": Loss(F.cross_entropy),
            "sizes": Loss(call=lambda model, batch: sizes_of(model(batch[0]), batch)),
        },
    ),
    "a function": (
        Loss(of_outputs),
        {
            "classes": Loss(F.cross_entropy),
            "spread": Loss(call=lambda model, batch: model(batch[0]).var(1)),
        },
    ),
    "a call with groups": (
        Loss(call=of_call, group_by=by_class),
        {
            "classes": Loss(F.cross_entropy, group_by=by_class),
            "sizes": Loss(
                call=lambda model, batch: sizes_of(model(batch[0]), batch), group_by=by_class
            ),
        },
    ),
    "another split": (
        Loss(call=of_call, on="validation"),
        {"classes": Loss(F.cross_entropy, on="validation")},
    ),
    "train mode": (
        Loss(call=in_train_mode),
        {
            "classes": Loss(F.cross_entropy),
            "spread": Loss(call=lambda model, batch: model(batch[0]).var(1)),
        },
    ),
}


@pytest.mark.parametrize("how", STATED)
def test_every_entry_has_the_bits_of_a_loss_of_its_own(lab: Lab, how: str) -> None:
    stated, alone = STATED[how]
    together = replay(lab, "relu_mlp", {"it": stated})
    apart = replay(lab, "relu_mlp", alone)
    assert {f"it/{name}" for name in alone} <= set(together)
    for name in alone:
        assert_same_bits(together[f"it/{name}"], apart[name])
        steps = together[f"it/{name}"].steps
        change = steps.loss_end - steps.loss_start
        allocated = together[f"it/{name}"].tensors.allocated.sum("tensor")
        np.testing.assert_allclose(allocated + steps.residual, change, rtol=0, atol=1e-12)
        assert float(abs(change).max()) > 1e-3


def test_a_total_that_is_an_entry_is_the_sum_of_the_others_as_they_were_added(lab: Lab) -> None:
    found = replay(lab, "smooth_mlp", {"it": Loss(call=with_a_total)})
    assert list(found) == ["it/total", "it/classes", "it/spread"]
    parts = [found[f"it/{name}"].tensors.allocated for name in ("classes", "spread")]
    summed = sum(weight * each for weight, each in zip(WEIGHTS, parts, strict=True))
    np.testing.assert_allclose(found["it/total"].tensors.allocated, summed, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("losses", "forward"),
    [
        ({"it": Loss(call=of_call)}, WHOLE),
        ({"it": Loss(of_outputs)}, WHOLE),
        ({"it": Loss(call=of_call, group_by=by_class)}, BY_CLASS),
        ({"it": Loss(of_outputs), "whole": Loss(F.cross_entropy)}, WHOLE),
        ({"it": Loss(call=of_call), "whole": Loss(F.cross_entropy)}, 2 * WHOLE),
    ],
    ids=["a call", "a function", "groups", "a function and another", "a call and another"],
)
def test_the_entries_of_a_dict_share_its_forward_pass(
    losses: Mapping[str, Loss], forward: int
) -> None:
    task = Task(Counting, _vectors(), losses)
    settings = {"precision": "float32", "norm_stats": "running", "batch_size": 7}
    objective = build_objective(
        lambda: task, ["all"], ObjectiveSettings(device=torch.device("cpu"), **settings)
    ).divided()
    point = {name: each.detach().clone() for name, each in Counting().state_dict().items()}
    objective.settle_batch_sizes(point)
    objective.data.share_batches()
    COUNTED.clear()
    # entries apart from each other
    objective.evaluate(point, sorted(objective.losses, key=lambda name: name[::-1]))
    batches = BY_CLASS if objective.losses["it/classes"].group_by else WHOLE
    assert (COUNTED.count(FORWARD), COUNTED.count(BACKWARD)) == (
        forward,
        len(objective.losses) * batches,
    )


# --- by name --------------------------------------------------------------------------------------

TASK = (
    cli.TASK.replace(
        'losses={"train": Loss(F.cross_entropy, on="train"), "validation": Loss(F.cross_entropy, '
        'on="validation")},',
        'losses={"train": Loss(call=both), "grouped": Loss(call=both, group_by=lambda inputs, '
        "targets: targets), "
        '"validation": Loss(F.cross_entropy, on="validation")},',
    )
    + """

def both(model, batch):
    outputs = model(batch[0])
    return {"total": 0.5 * cross_entropy(model, batch) + outputs.var(1), "spread": outputs.var(1)}
"""
)
ENTRIES = ["train/total", "train/spread"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("named")
    cli.record(place / "checkpoints", cli.STEPS[:3])
    (place / "task.py").write_text(TASK)
    return place


def run_at(place: Path, *options: object, out: str = "run.lca") -> Any:
    return cli.run_lca(place / "checkpoints", place / "task.py", place / out, *options)


def test_entries_are_asked_for_together_or_by_name_and_found_again_under_their_names(
    place: Path,
) -> None:
    first = document(run_at(place, "--json"))
    assert list(first["losses"]) == ENTRIES  # the first loss of the task is all of its entries
    markers = sorted((place / "run.lca" / "commits").rglob("*.json"))
    again = document(run_at(place, "--loss", "train", "--json"))
    assert again == first
    assert sorted((place / "run.lca" / "commits").rglob("*.json")) == markers
    one = document(run_at(place, "--loss", "grouped/spread", "--json"))
    assert list(one["losses"]) == ["grouped/spread"]
    every = document(run_at(place, "--loss", "all", "--json"))
    assert list(every["losses"]) == [*ENTRIES, "grouped/spread", "grouped/total", "validation"]
    assert {name: every["losses"][name] for name in ENTRIES} == first["losses"]
    status = document(lca("status", place / "run.lca", "--json"))
    assert set(status["losses"]) == set(every["losses"])
    found = open_run(place / "run.lca")
    assert found["grouped/total"].allocation["out.bias"].dims[:2] == ("step", "group")
    shown = lca("summary", place / "run.lca", "--loss", "train/spread")
    assert shown.exit_code == 0
    assert "train/spread" in shown.output
    assert lca("verify", place / "run.lca").exit_code == 0
    assert lca("remove", place / "run.lca", "--loss", "train/total").exit_code == 0
    assert "train/total" not in open_run(place / "run.lca")
    assert list(document(run_at(place, "--loss", "train/total", "--json"))["losses"]) == [
        "train/total"
    ]


def test_a_plan_names_the_entries(place: Path) -> None:
    planned = document(
        lca("plan", place / "checkpoints", "--task", place / "task.py", "--json", "--loss", "train")
    )
    assert list(planned["losses"]) == ENTRIES


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("train/totl", ("loss 'train' returned no entry 'totl'", "'spread'", "'total'")),
        ("validation/x", ("no loss 'validation/x'", "a float32 tensor of shape [2]")),
        ("trian/total", ("no loss 'trian/total'", "'train'")),
    ],
)
def test_an_entry_that_is_not_returned_is_refused_by_name(
    place: Path, asked: str, words: tuple[str, ...]
) -> None:
    refused(run_at(place, "--loss", asked, out="no.lca"), *words)
    assert not (place / "no.lca").exists()


def test_recalibrated_statistics_can_be_those_of_a_dict_of_losses(lab: Lab) -> None:
    """The pass that recalibrates calls the model as the first loss does, which need not be one that
    is run.
    """
    first = Loss(call=lambda model, batch: {"classes": classes_of(model(batch[0]), batch)})
    found = [
        replay_only(
            lab,
            "conv_bn",
            {"it": loss, "other": Loss(one_hot_distance)},
            ["other"],
            norm_stats="recalibrated",
        )
        for loss in (first, Loss(F.cross_entropy))
    ]
    assert_same_bits(found[0]["other"], found[1]["other"])


# --- what is refused ------------------------------------------------------------------------------


def small_batches_lack(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    found = with_a_total(model, batch)
    return found if len(batch[0]) > 3 or len(batch[0]) == 2 else {"total": found["total"]}


def more_in_large_batches(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    found = with_a_total(model, batch)
    return {**found, "more": found["total"]} if len(batch[0]) > 3 else found


REFUSED: dict[str, tuple[dict[str, Loss], tuple[str, ...]]] = {
    "a key that goes": (
        {"it": Loss(call=small_batches_lack)},
        ("'it' returned", "'classes'", "one batch"),
    ),
    "a key that comes": (
        {"it": Loss(call=more_in_large_batches)},
        ("'it' returned", "'more'", "every batch"),
    ),
    "no key": ({"it": Loss(call=lambda model, batch: {})}, ("'it' returned an empty dict",)),
    "a number as key": (
        {"it": Loss(call=lambda model, batch: {0: model(batch[0])})},
        ("'it' returned a dict with the key 0",),
    ),
    "a scalar": (
        {"it": Loss(call=lambda model, batch: {"mean": model(batch[0]).mean()})},
        ("'it/mean'", "returned a scalar"),
    ),
    "a count": (
        {"it": Loss(call=lambda model, batch: {"right": model(batch[0]).argmax(1)})},
        ("'it/right'", "an int64 tensor of shape"),
    ),
    "a number": (
        {"it": Loss(call=lambda model, batch: {"x": model(batch[0]).var(1), "mean": 0.5})},
        ("'it/mean'", "returned a float", ".item()"),
    ),
    "a name that is taken": (
        {"it": Loss(call=with_a_total), "it/total": Loss(F.cross_entropy)},
        ("'it' returns an entry 'total'", "'it/total'"),
    ),
    "a dict in a dict": (
        {"it": Loss(call=lambda model, batch: {"x": {"y": model(batch[0])}})},
        ("'it/x'", "a dict with 'y'"),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_dicts_that_are_no_losses_are_refused(lab: Lab, what: str) -> None:
    losses, words = REFUSED[what]
    out = lab.root / f"refused {what}"
    with pytest.raises(InputError) as caught:
        replay(lab, "relu_mlp", losses, out=out)
    says(str(caught.value), *words)
    assert not out.exists()


def test_entries_that_are_others_at_another_checkpoint_are_refused(lab: Lab) -> None:
    last = lab.checkpoints("relu_mlp")[-1]["6.bias"]

    def call(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        found = with_a_total(model, batch)
        return {"total": found["total"]} if torch.equal(model[6].bias, last) else found

    with pytest.raises(InputError, match="'classes' for one batch"):
        replay(lab, "relu_mlp", {"it": Loss(call=call)})


def test_what_is_no_loss_can_be_left_out_by_naming_the_others(lab: Lab) -> None:
    def call(model: nn.Module, batch: Batch) -> dict[str, Any]:
        outputs = model(batch[0])
        return {
            "classes": classes_of(outputs, batch),
            "accuracy": (outputs.argmax(1) == batch[1]).float(),
        }

    with pytest.raises(InputError, match="'it/accuracy' on split 'train' has no gradient"):
        replay(lab, "relu_mlp", {"it": Loss(call=call)})
    found = replay_only(lab, "relu_mlp", {"it": Loss(call=call)}, ["it/classes"], span=8)
    assert_same_bits(
        found["it/classes"], replay(lab, "relu_mlp", {"it": Loss(F.cross_entropy)})["it"]
    )


class Counter(nn.Linear):
    """Counts its calls in a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__(12, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(inputs)


def test_what_a_model_is_in_another_process_is_compared_with_what_it_was_before_any_call() -> None:
    """What a loss returns is seen by calling it."""
    first, second = answers(
        Task(Counter, _vectors(), {"it": Loss(call=of_call, group_by=by_class)})
    )
    assert first["digests"] == second["digests"]
    assert list(first["losses"]) == list(second["losses"]) == ["it/classes", "it/sizes"]
