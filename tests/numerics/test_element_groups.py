"""Losses of groups of elements (tokens, pixels): each group's is that of a loss of its own, in which
all other elements weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lca_posthoc import Loss, Run, Task, run
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import Draws, ElementOrder
from lca_posthoc.numerics.objective import batches as batches_of
from lca_posthoc.numerics.objective.batches import Split
from lca_posthoc.replay.worker import memory_estimate

from ..helpers.cli import contents, marker, says
from ..helpers.model_cases import Batch, every_token, next_tokens
from ..helpers.replayed_cases import Lab, arrays, case_of
from .test_groups import raised, replay

# --- labels of elements, and the loss of one label -------------------------------------------------

Labels = Callable[..., Tensor]


def parity(tokens: Tensor, targets: Tensor) -> Tensor:
    """Three kinds of target tokens; of the last there are none in many sequences."""
    return torch.where(targets == 10, 7, targets % 2)


def brightness(images: Tensor, targets: Tensor) -> Tensor:
    return (targets > 0).long() - (targets < -1).long()


def every_token_flat(model: nn.Module, batch: Batch) -> Tensor:
    """The values in one row, as is usual where logits are flattened."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none")


def weighted_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    values = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none")
    return values, torch.arange(1, 1 + values.shape[1]).expand(values.shape) / 4


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]) ** 2


CASES_OF: dict[str, tuple[str, Loss, Labels, str]] = {
    "tokens": ("transformer", Loss(every_token), parity, "running"),
    "tokens in a row": ("transformer", Loss(call=every_token_flat), parity, "running"),
    "tokens with weights": ("transformer", Loss(call=weighted_tokens), parity, "running"),
    "pixels": ("autoencoder", Loss(F.mse_loss), brightness, "running"),
    "pixels, batch statistics": ("autoencoder", Loss(call=squares), brightness, "batch"),
}


BATCHES = ("pixels, batch statistics",)
LOWER = ("statistics", "units", "tensors")


def of_label(loss: Loss, labels: Labels, label: int) -> Loss:
    """The same loss, in which the elements of one label alone weigh something."""

    def call(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if loss.call is None:
            answer: Any = loss.per_element()(model(batch[0]), batch[1])
        else:
            answer = loss.call(model, batch)
        values, weights = answer if isinstance(answer, tuple) else (answer, None)
        weights = torch.ones_like(values) if weights is None else weights
        mine = (labels(*batch) == label).reshape(values.shape)
        return values, weights * mine

    return Loss(call=call, on=loss.on)


def present_in(name: str, labels: Labels) -> list[int]:
    return sorted(set(labels(*case_of(name).data()["train"]).reshape(-1).tolist()))


def close(found: Any, wanted: Any, size: float) -> None:
    difference = np.asarray(found, dtype=np.float64) - np.asarray(wanted, dtype=np.float64)
    assert np.abs(difference).sum() <= 1e-6 * size


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "keep"),
    [(case, "parameters") for case in CASES_OF]
    + [(case, keep) for case in ("tokens with weights", *BATCHES) for keep in LOWER],
)
def test_a_group_is_a_loss_in_which_all_other_elements_weigh_nothing(
    lab: Lab, case: str, keep: str
) -> None:
    name, loss, labels, mode = CASES_OF[case]
    present = present_in(name, labels)
    losses = {
        "grouped": replace(loss, group_by=labels),
        "whole": loss,
        **{f"only{label}": of_label(loss, labels, label) for label in present},
    }
    results = replay(
        lab,
        name,
        losses,
        norm_stats=mode,
        keep=keep,
        precision="float64",
        batch_size=5,
        steps="0:2",
    )
    grouped, whole = results["grouped"], results["whole"]
    assert grouped.tensors["group"].values.tolist() == present
    size = float(np.abs(whole.tensors["allocated"].values).sum())
    for position, label in enumerate(present):
        own = results[f"only{label}"]
        of_group = grouped.tensors["allocated"].isel(group=position).values
        close(of_group, own.tensors["allocated"].values, size)
        for field in ("loss_start", "loss_end", "weight"):
            mine = grouped.steps[field].isel(group=position).values
            assert mine == pytest.approx(own.steps[field].values, rel=1e-12), field
        if keep in ("parameters", "statistics", "units"):
            for tensor, units in arrays(own.units).items():
                close(grouped.units[tensor].isel(group=position).values, units, size)
        if keep == "parameters":
            for tensor, allocation in arrays(own.allocation).items():
                close(grouped.allocation[tensor].isel(group=position).values, allocation, size)
    weight = grouped.steps["weight"]
    assert weight.sum("group").values == pytest.approx(whole.steps["weight"].values, rel=1e-12)
    share = weight / weight.sum("group")
    together = (grouped.tensors["allocated"] * share).sum("group").values
    close(together, whole.tensors["allocated"].values, size)
    for field in ("loss_start", "loss_end"):
        mean = (grouped.steps[field] * share).sum("group").values
        assert mean == pytest.approx(whole.steps[field].values, rel=1e-12)
    if keep in ("parameters", "statistics"):
        for tensor, totals in arrays(whole.totals.sel(total="allocated")).items():
            close(grouped.totals[tensor].sel(total="allocated").values, totals, size)


def counted(lab: Lab, losses: dict[str, Loss], **settings: Any) -> tuple[Run, list[int], list[int]]:
    """A replay, the examples of every forward pass, and the rows of every backward pass through
    the model's outputs.
    """
    forward: list[int] = []
    backward: list[int] = []

    def build() -> nn.Module:
        model = case_of("transformer").build()

        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            forward.append(len(output))
            if output.requires_grad:
                output.register_hook(lambda gradient: backward.append(len(gradient)))

        model.register_forward_hook(note)
        return model

    return replay(lab, "transformer", losses, build=build, **settings), forward, backward


def test_one_pass_over_the_data_serves_all_groups(lab: Lab) -> None:
    """A pass more costs 19 examples; a group more only backward passes."""
    settings = {"keep": "tensors", "rule": "left", "precision": "float64"}
    passes = {}
    for count in (2, 4):
        labels = lambda tokens, targets, count=count: targets % count  # noqa: E731
        loss = Loss(every_token, group_by=labels)
        few = counted(lab, {"grouped": loss}, steps="0:1", **settings)
        many = counted(lab, {"grouped": loss}, steps="0:3", **settings)
        passes[count] = [
            (sum(more) - sum(less)) for more, less in zip(many[1:], few[1:], strict=True)
        ]
    assert passes[2][0] == passes[4][0]
    assert passes[4][1] == 2 * passes[2][1]


def test_groups_taken_in_blocks_give_the_same_bits(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = {"grouped": Loss(every_token, group_by=parity)}
    together = replay(lab, "transformer", loss)["grouped"]
    monkeypatch.setattr(memory_estimate, "ROOM", 1e-15)
    apart = replay(lab, "transformer", loss)["grouped"]
    assert apart.record.block == 1
    for tensor, allocation in arrays(together.allocation).items():
        assert np.array_equal(apart.allocation[tensor].values, allocation)


def test_a_subset_has_the_groups_of_its_examples(lab: Lab) -> None:
    losses = {"grouped": Loss(every_token, group_by=parity)}
    found = replay(lab, "transformer", losses, subset=("2,5,3,11",))["grouped"]
    inputs, targets = case_of("transformer").data()["train"]
    chosen = torch.tensor([2, 5, 3, 11])
    data = {"train": (inputs[chosen], targets[chosen])}
    wanted = replay(lab, "transformer", losses, data=data)["grouped"]
    assert found.record.groups == wanted.record.groups
    assert found.record.counts == wanted.record.counts
    assert np.array_equal(found.tensors["allocated"].values, wanted.tensors["allocated"].values)


def test_examples_that_hold_a_label_are_counted(lab: Lab) -> None:
    results = replay(lab, "transformer", {"grouped": Loss(every_token, group_by=parity)})["grouped"]
    labels = parity(*case_of("transformer").data()["train"])
    for position, label in enumerate(results.record.groups):
        mine = labels == label
        assert results.steps["examples"].values[position] == int(mine.any(1).sum())
        assert (results.steps["weight"].isel(group=position).values == int(mine.sum())).all()


# --- labels ---------------------------------------------------------------------------------------

INPUTS = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
PIXELS = (INPUTS > 0).long() * 3 - 1
WORDS = np.array(["low", "high"])[(INPUTS > 0).int().numpy()]
FORMS: dict[str, tuple[Any, list[Any]]] = {
    "a tensor": (PIXELS, [-1, 2]),
    "an array": (PIXELS.numpy(), [-1, 2]),
    "bools": (INPUTS > 0, [0, 1]),
    "bytes": ((INPUTS > 0).to(torch.uint8) * 200, [0, 200]),
    "large integers": (PIXELS * 10**12, [-(10**12), 2 * 10**12]),
    "strings": (WORDS, ["high", "low"]),
    "a function": (lambda inputs, targets: (inputs > 0).long() * 3 - 1, [-1, 2]),
    "a function that gives an array": (lambda inputs, targets: (inputs > 0).numpy(), [0, 1]),
}


def split_of(data: Any, subset: str | None = None) -> Split:
    return Split("train", data, torch.device("cpu"), torch.float32, subset)


@pytest.mark.parametrize("subset", [None, "2:7", "8,0,3", "0.5@1"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_labels_has_the_same_codes(
    form: str, subset: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_of, "_GROUPED_AT_ONCE", 2)
    group_by, labels = FORMS[form]
    order = split_of((INPUTS, INPUTS[:, 0]), subset).order(group_by)
    assert isinstance(order, ElementOrder)
    chosen = batches_of.positions_of_subset(subset, 9)
    wanted = (INPUTS > 0).int() if labels != ["high", "low"] else (INPUTS <= 0).int()
    wanted = wanted if chosen is None else wanted[chosen]
    assert order.labels == labels
    assert {type(label) for label in order.labels} <= {int, str}
    assert order.codes.dtype == torch.int16
    assert torch.equal(order.codes.int(), wanted[:, None])


def test_many_labels_take_four_bytes_and_few_two() -> None:
    for count, dtype in ((2**15, torch.int16), (2**15 + 1, torch.int32)):
        data = torch.arange(count).reshape(1, -1)
        order = split_of((data,)).order(data)
        assert isinstance(order, ElementOrder)
        assert order.codes.dtype == dtype
        assert torch.equal(order.codes.flatten().long(), torch.arange(count))


def test_the_groups_of_a_batch_are_counted() -> None:
    """Which is how many backward passes it takes."""
    labels = torch.tensor([[0, 0], [0, 1], [2, 2], [3, 0], [4, 4]])
    order = split_of((labels,)).order(labels)
    assert isinstance(order, ElementOrder)
    assert [order.groups_per_batch(size) for size in (2, 5)] == [(2 + 3 + 1) / 3, 5]


def test_every_draw_of_an_example_has_labels_of_its_own() -> None:
    def shifted(example: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return example[0] + torch.randn(example[0].shape), example[1]

    split = split_of(Draws((INPUTS, INPUTS), shifted, draws=3, seed=0))
    order = split.order(lambda inputs, targets: inputs > 0)
    assert isinstance(order, ElementOrder)
    for (_, batch), codes in zip(split.batches(4), order.batches(4), strict=True):
        assert torch.equal(batch[0] > 0, codes.bool())
    assert not torch.equal(order.codes[:, 0], order.codes[:, 1])


def widest_first(rows: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    rows = sorted(rows, key=lambda row: -float(row[0].sum()))
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


REFUSED_ORDERS: dict[str, tuple[Any, Any, str]] = {
    "a function of batches that are reordered": (
        DataLoader(TensorDataset(INPUTS, INPUTS), collate_fn=widest_first),
        lambda inputs, targets: inputs > 0,
        "another order than the examples.*collate_fn",
    ),
    "elements beside each other": (
        (INPUTS, INPUTS),
        lambda inputs, targets: inputs > inputs.mean(),
        "depends on other examples of the batch",
    ),
    "at random": (
        (INPUTS, INPUTS),
        lambda inputs, targets: torch.randint(2, inputs.shape),
        "other labels for the same examples",
    ),
    "now examples, now elements": (
        (INPUTS, INPUTS),
        lambda inputs, targets: inputs > 0 if len(inputs) != 3 else inputs[:, 0] > 0,
        "examples for some batches",
    ),
    "of several shapes": (
        (INPUTS, INPUTS),
        lambda inputs, targets: inputs[:, : 4 if len(inputs) != 3 else 2] > 0,
        "pad them in the data set",
    ),
    "of several types": (
        (INPUTS, INPUTS),
        lambda inputs, targets: (
            inputs > 0 if len(inputs) != 3 else (inputs > 0).numpy().astype(str)
        ),
        "labels of type int and str",
    ),
}


@pytest.mark.parametrize("case", REFUSED_ORDERS)
def test_labels_of_elements_that_are_none_are_refused(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_of, "_GROUPED_AT_ONCE", 6)
    data, group_by, words = REFUSED_ORDERS[case]
    with pytest.raises(InputError, match=words):
        split_of(data).order(group_by)


def sequence_first(model: nn.Module, batch: Batch) -> Tensor:
    """Values whose examples are neighbours in a row."""
    return every_token_flat(model, batch).reshape(batch[1].shape).T.flatten()


REFUSED_LOSSES: dict[str, tuple[Loss, Any, tuple[str, ...]]] = {
    "labels of another shape": (
        Loss(every_token),
        lambda tokens, targets: targets[:, 1:],
        ("'grouped'", "'train'", "labels of shape [7, 5]", "values of shape [7, 6]"),
    ),
    "values in another order": (
        Loss(call=sequence_first),
        parity,
        ("'grouped'", "order of the examples"),
    ),
    "a label that is masked everywhere": (
        Loss(call=next_tokens),
        lambda tokens, targets: targets.clamp(max=3),
        ("group 0", "'grouped'", "'train'", "sum to 0"),
    ),
}


@pytest.mark.parametrize("case", REFUSED_LOSSES)
@pytest.mark.parametrize("keep", ["parameters", "tensors"])
def test_labels_that_are_not_those_of_the_loss_are_refused_before_anything_is_written(
    lab: Lab, case: str, keep: str
) -> None:
    loss, group_by, words = REFUSED_LOSSES[case]
    says(
        raised(lab, "transformer", {"grouped": replace(loss, group_by=group_by)}, keep=keep), *words
    )


def test_other_groups_under_a_recorded_name_are_refused(lab: Lab) -> None:
    first = replay(lab, "transformer", {"grouped": Loss(every_token, group_by=parity)}, steps="0:2")
    for group_by in (lambda tokens, targets: parity(tokens, targets) + 1, None):
        task = Task(
            case_of("transformer").build,
            case_of("transformer").data(),
            {"grouped": Loss(every_token, group_by=group_by)},
        )
        with pytest.raises(InputError, match=r"'grouped' is not the one recorded.*its groups"):
            run(lab.iterates("transformer"), task, out=first.path, **lab.settings())


def test_an_interrupted_run_goes_on_to_the_same_bytes(lab: Lab) -> None:
    losses = {"grouped": Loss(every_token, group_by=parity)}
    replayed = replay(lab, "transformer", losses, span=2)
    before = contents(replayed.path / "data.zarr")
    marker(replayed.path, "grouped", 1).unlink()
    again = replay(lab, "transformer", losses, span=None, out=replayed.path)
    assert again["grouped"].complete
    assert contents(replayed.path / "data.zarr") == before
