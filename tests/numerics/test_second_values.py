"""What the probe must tell apart: rounding from a loss that depends on its batches, weights from
other second values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lca_posthoc
from lca_posthoc import Loss, Recorder, Task, demo
from lca_posthoc.errors import InputError

INPUTS = torch.rand(160, 1, 24, 24, generator=torch.Generator().manual_seed(0))
MASKS = (INPUTS[:, 0] > 0.3).long() + (INPUTS[:, 0] > 0.7).long()
MASKS[:, :6] = 255
LABELS = torch.arange(160) % 3


def segments() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)),
    )


def classifies() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(576, 3))


def recorded(place: Path, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Path:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with Recorder(place, model) as recorder:
        recorder.attach(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    return place


def replay(
    checkpoints: Path, factory: Callable[[], nn.Module], targets: Tensor, loss: Loss, out: Path
) -> Any:
    task = Task(factory, {"train": (INPUTS, targets)}, {"train": loss})
    return lca_posthoc.run(
        checkpoints, task, out=out, cluster="inline", progress=lambda event: None
    )["train"]


def compares(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(batch[0]).flatten(1)
    return ((outputs - outputs.mean(0)) ** 2).mean(1)


def cancelling(model: nn.Module, batch: Any) -> Tensor:
    """Give values that nearly cancel in their mean."""
    outputs = model(batch[0])
    return outputs.sum(1) - outputs.sum(1).detach() + (batch[1] - 1).float()


SUMS: dict[str, tuple[Callable[[], nn.Module], Tensor, Loss]] = {
    "segmentation with ignored pixels": (
        segments,
        MASKS,
        Loss(nn.CrossEntropyLoss(ignore_index=255)),
    ),
    "every pixel a value": (segments, MASKS.clamp(max=2), Loss(F.cross_entropy)),
    "values that nearly cancel": (classifies, LABELS, Loss(call=cancelling)),
}


@pytest.mark.parametrize("case", SUMS)
def test_sums_of_many_elements_may_round(tmp_path: Path, case: str) -> None:
    factory, targets, loss = SUMS[case]
    torch.manual_seed(1)
    model = factory()
    train = recorded(
        tmp_path / "ck",
        model,
        lambda model: F.cross_entropy(model(INPUTS[:32]), targets[:32], ignore_index=255),
    )
    steps = replay(train, factory, targets, loss, tmp_path / "run").steps
    assert steps.sizes["step"] == 2


def test_a_gradient_that_nearly_cancels_may_round(tmp_path: Path) -> None:
    """Thresholded digits: the parts of a batch were 1.7e-4 of the gradient apart in float32."""
    images = F.interpolate(demo.digits()[0][0].view(-1, 1, 8, 8), scale_factor=4)
    masks = (images[:, 0] > 0.3).long() + (images[:, 0] > 0.7).long()
    masks[:, :8] = 255
    loss = nn.CrossEntropyLoss(ignore_index=255)
    torch.manual_seed(0)
    model = segments()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with Recorder(tmp_path / "ck", model) as recorder:
        recorder.attach(optimizer)
        for _ in range(3):
            chosen = torch.randint(1500, (32,))
            optimizer.zero_grad()
            loss(model(images[chosen]), masks[chosen]).backward()
            optimizer.step()
    task = Task(segments, {"train": (images, masks)}, {"train": Loss(loss)})
    options: dict[str, Any] = {
        "cluster": "inline",
        "subset": ["0:200"],
        "progress": lambda event: None,
    }
    run = lca_posthoc.run(tmp_path / "ck", task, out=tmp_path / "run", **options)
    assert run["train"].steps.sizes["step"] == 3


@pytest.mark.parametrize("norm", [nn.Identity, nn.Flatten])
def test_losses_that_compare_examples_are_refused_as_before(
    tmp_path: Path, norm: type[nn.Module]
) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(classifies(), norm())

    torch.manual_seed(1)
    train = recorded(
        tmp_path / "ck", factory(), lambda model: F.cross_entropy(model(INPUTS), LABELS)
    )
    with pytest.raises(InputError, match="depends on how split 'train' is cut into batches"):
        replay(train, factory, LABELS, Loss(call=compares), tmp_path / "run")


def right(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    outputs = model(batch[0])
    return F.cross_entropy(outputs, batch[1], reduction="none"), (
        outputs.argmax(1) == batch[1]
    ).float()


def confidence(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    outputs = model(batch[0])
    return F.cross_entropy(outputs, batch[1], reduction="none"), outputs.softmax(1).max(
        1
    ).values.detach()


def a_second_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    outputs = model(batch[0])
    values = F.cross_entropy(outputs, batch[1], reduction="none")
    return values, F.multi_margin_loss(outputs, batch[1], reduction="none").detach()


def constant(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none"), (batch[1] != 1).float()


@pytest.mark.parametrize("call", [right, confidence, a_second_loss])
def test_a_second_value_that_depends_on_the_model_is_no_weight(tmp_path: Path, call: Any) -> None:
    torch.manual_seed(1)
    train = recorded(
        tmp_path / "ck", classifies(), lambda model: F.cross_entropy(model(INPUTS), LABELS)
    )
    with pytest.raises(InputError, match=r"'train' returned two values.*depends on the model"):
        replay(train, classifies, LABELS, Loss(call=call), tmp_path / "run")


def test_weights_that_are_constants_are_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    train = recorded(
        tmp_path / "ck", classifies(), lambda model: F.cross_entropy(model(INPUTS), LABELS)
    )
    steps = replay(train, classifies, LABELS, Loss(call=constant), tmp_path / "run").steps
    assert steps["weight"].values.tolist() == [float((LABELS != 1).sum())] * 2
