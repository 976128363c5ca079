"""Several seeded draws of random examples: the mean over them, the same in every process, batch and
order.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lca_posthoc import Draws, Loss, Run, Task, run
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import Split

from ..helpers.cli import says
from ..helpers.model_cases import CASES, _vectors
from ..helpers.replayed_cases import Lab, assert_same_bits
from ..helpers.user_models import answers
from .test_groups import by_class

Example = tuple[Tensor, Tensor]
INPUTS, TARGETS = _vectors()["train"]
DRAWS = 3
CPU = torch.device("cpu")


def noisy(example: Example) -> Example:
    """Noise from torch, a factor from numpy, a flip from Python: whatever augmentation draws
    from.
    """
    inputs, target = example
    inputs = inputs + 0.3 * torch.randn(inputs.shape)
    inputs *= float(np.random.uniform(0.5, 1.5))
    return (inputs.flip(0) if random.random() < 0.3 else inputs), target


class Augmenting(Dataset[Example]):
    """A data set that augments its examples itself, as those of torchvision do with a
    `transform`.
    """

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, index: int) -> Example:
        return noisy((INPUTS[index].clone(), TARGETS[index]))


def mixed(example: Example) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixup: the other example and the share are drawn as well."""
    other, share = int(torch.randint(len(INPUTS), ())), float(np.random.beta(0.4, 0.4))
    inputs = share * example[0] + (1 - share) * INPUTS[other]
    return inputs, example[1], TARGETS[other], torch.tensor(share)


def mixup(model: Any, batch: Any) -> Tensor:
    outputs, share = model(batch[0]), batch[3]
    one, other = (F.cross_entropy(outputs, targets, reduction="none") for targets in batch[1:3])
    return share * one + (1 - share) * other


def fixed(data: Draws, draw: int) -> tuple[Tensor, ...]:
    """One draw of every example, as tensors."""
    return tuple(default_collate([data[index][draw] for index in range(len(data))]))


KINDS: dict[str, tuple[Callable[[], Draws], Loss]] = {
    "a transform": (lambda: Draws((INPUTS, TARGETS), noisy, draws=DRAWS), Loss(F.cross_entropy)),
    "a data set's own": (lambda: Draws(Augmenting(), draws=DRAWS, seed=7), Loss(F.cross_entropy)),
    "a loader": (
        lambda: Draws(DataLoader(Augmenting(), batch_size=5), draws=DRAWS),
        Loss(F.cross_entropy),
    ),
    "mixup": (lambda: Draws((INPUTS, TARGETS), mixed, draws=DRAWS), Loss(call=mixup)),
    "groups": (
        lambda: Draws((INPUTS, TARGETS), noisy, draws=DRAWS),
        Loss(F.cross_entropy, group_by=by_class),
    ),
    "labels": (
        lambda: Draws((INPUTS, TARGETS), noisy, draws=DRAWS),
        Loss(F.cross_entropy, group_by=TARGETS),
    ),
}


def replayed(lab: Lab, data: Any, loss: Loss, **settings: Any) -> Run:
    task = Task(CASES["smooth_mlp"].build, {"train": data}, {"it": loss})
    out = lab.new_place()
    defaults = {
        "cluster": "inline",
        "device": lab.device,
        "precision": "float64",
        "tolerance": "inf",
        "span": 8,
    }
    return run(lab.iterates("smooth_mlp"), task, out=out, **{**defaults, "steps": ":3", **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_draws_is_the_mean_of_runs_on_each_draw(lab: Lab, kind: str) -> None:
    make, loss = KINDS[kind]
    together = replayed(lab, make(), loss, batch_size=7)["it"]
    apart = [replayed(lab, fixed(make(), draw), loss)["it"] for draw in range(DRAWS)]
    for name, found in together.allocation.data_vars.items():
        wanted = sum(each.allocation[name].values.astype("float64") for each in apart) / DRAWS
        np.testing.assert_allclose(found.values, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
        assert not np.allclose(wanted, apart[0].allocation[name].values, rtol=0.01)
    for field in ("loss_start", "loss_end"):
        np.testing.assert_allclose(
            together.steps[field], sum(each.steps[field] for each in apart) / DRAWS, rtol=1e-12
        )
    change = together.steps.loss_end - together.steps.loss_start
    allocated = together.tensors.allocated.sum("tensor")
    np.testing.assert_allclose(
        (allocated + together.steps.residual).transpose(*change.dims), change, atol=1e-12
    )


@pytest.mark.parametrize("subset", ["10:20", "0.4@3"])
def test_a_subset_has_every_draw_of_the_examples_it_takes(lab: Lab, subset: str) -> None:
    data = Draws((INPUTS, TARGETS), noisy, draws=DRAWS)
    part = replayed(lab, data, Loss(F.cross_entropy), subset=[subset])["it"]
    positions = part.positions
    assert positions is not None
    rows = [draw for index in positions.tolist() for draw in data[index]]
    whole = replayed(lab, tuple(default_collate(rows)), Loss(F.cross_entropy))["it"]
    assert len(rows) == DRAWS * len(positions)
    for name, found in part.allocation.data_vars.items():
        np.testing.assert_allclose(found, whole.allocation[name], rtol=1e-5, atol=1e-9)


def rows_of(split: Split, batch_size: int) -> list[Tensor]:
    return [batch[0] for _, batch in split.batches(batch_size)]


def test_a_draw_depends_on_its_example_its_number_and_the_seed_alone() -> None:
    data = Draws((INPUTS, TARGETS), noisy, draws=DRAWS)
    wanted = torch.cat(
        [torch.stack([draw[0] for draw in data[index]]) for index in range(len(data))]
    )
    assert len(wanted.unique(dim=0)) == len(wanted) == DRAWS * len(INPUTS)
    for batch_size in (1, 7, 50):
        assert torch.equal(
            torch.cat(rows_of(Split("train", data, CPU, torch.float32), batch_size)), wanted
        )
    backwards = [data[index][2][0] for index in reversed(range(len(data)))]
    assert torch.equal(torch.stack(backwards[::-1]), wanted[2::DRAWS])
    again, more = (Draws((INPUTS, TARGETS), noisy, draws=DRAWS + n) for n in (0, 1))
    assert torch.equal(again[4][0][0], more[4][0][0])
    assert not torch.equal(Draws((INPUTS, TARGETS), noisy, seed=1)[4][0][0], again[4][0][0])


def test_what_else_is_drawn_is_not_disturbed() -> None:
    data = Draws((INPUTS, TARGETS), noisy)

    def drawn(between: Callable[[], object]) -> list[float]:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        between()
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    assert drawn(lambda: data[5]) == drawn(lambda: None)
    assert torch.equal(INPUTS, _vectors()["train"][0])  # `noisy` writes into its inputs


def test_batches_that_are_read_while_a_loss_draws_numbers_disturb_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A split too large to stay in memory is read again at every pass; a loss may seed torch for
    noise of its own.
    """

    def noise(model: Any, batch: Any) -> Tensor:
        torch.manual_seed(5)
        return F.cross_entropy(model(batch[0] + 0.1 * torch.randn(12)), batch[1], reduction="none")

    data = Draws((INPUTS, TARGETS), noisy, draws=2)
    resident = replayed(lab, data, Loss(call=noise), batch_size=4)["it"]
    monkeypatch.setattr("lca_posthoc.numerics.objective.batches.room_on", lambda device: 0.0)
    assert_same_bits(resident, replayed(lab, data, Loss(call=noise), batch_size=4)["it"])


def test_the_digest_covers_what_a_transform_returns() -> None:
    digests = {
        name: Split("train", data, CPU, torch.float32).digest
        for name, data in {
            "one": Draws((INPUTS, TARGETS), noisy),
            "again": Draws((INPUTS, TARGETS), noisy),
            "another seed": Draws((INPUTS, TARGETS), noisy, seed=1),
            "another number": Draws((INPUTS, TARGETS), noisy, draws=3),
            "another transform": Draws(
                (INPUTS, TARGETS), lambda example: (noisy(example)[0] + 1, example[1])
            ),
        }.items()
    }
    assert digests["one"] == digests["again"]
    assert len(set(digests.values())) == 4


def test_other_processes_draw_the_same() -> None:
    first, second = answers(
        Task(CASES["smooth_mlp"].build, {"train": KINDS["mixup"][0]()}, {"it": Loss(call=mixup)})
    )
    assert first["digests"] == second["digests"]


OWN = np.random.default_rng(0)


class Backwards:
    """Labels that depend on the draw."""

    def __call__(self, example: Example) -> Example:
        return example[0], torch.randint(4, ())


REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "no draw": (lambda: Draws((INPUTS, TARGETS), draws=0), ("Draws(draws=…)", "at least 1", "0")),
    "half a draw": (lambda: Draws((INPUTS, TARGETS), draws=1.5), ("Draws(draws=…)", "1.5")),
    "a negative seed": (lambda: Draws((INPUTS, TARGETS), seed=-1), ("Draws(seed=…)", "-1")),
    "a number as transform": (lambda: Draws((INPUTS, TARGETS), 4), ("transform(example)", "int")),
    "a stream": (lambda: Draws(iter([1, 2])), ("by position", "list_iterator", "__getitem__")),
    "unequal tensors": (lambda: Draws((INPUTS, TARGETS[:3])), ("different lengths", "[3, 50]")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_draws_can_be_had_of_is_refused(what: str) -> None:
    make, words = REFUSED[what]
    with pytest.raises(InputError) as caught:
        make()
    says(str(caught.value), *words)


@pytest.mark.parametrize(
    ("transform", "loss", "words"),
    [
        (
            lambda example: (example[0] + float(OWN.normal()), example[1]),
            Loss(F.cross_entropy),
            ("not deterministic", "augmentation"),
        ),
        (
            Backwards(),
            Loss(F.cross_entropy, group_by=by_class),
            ("for two draws of one example", "'train'"),
        ),
        (
            lambda example: example[0] / "a",
            Loss(F.cross_entropy),
            ("cannot be made into a batch", "TypeError"),
        ),
    ],
    ids=["a generator of its own", "labels that change", "one that fails"],
)
def test_transforms_that_cannot_be_used_are_refused(
    lab: Lab, transform: Any, loss: Loss, words: Any
) -> None:
    with pytest.raises(InputError) as caught:
        replayed(lab, Draws((INPUTS, TARGETS), transform, draws=2), loss)
    says(str(caught.value), *words)


def test_dicts_of_tensors_are_drawn_from_as_well(tmp_path: Path) -> None:
    data = Draws(
        {"x": INPUTS, "y": TARGETS},
        lambda example: {**example, "x": example["x"] + torch.rand(())},
        draws=2,
    )
    batch = Split("train", data, CPU, torch.float32).sample(0, 3)
    assert sorted(batch) == ["x", "y"]
    assert batch["x"].shape == (6, 12)
    assert batch["y"].tolist() == TARGETS[:3].repeat_interleave(2).tolist()
