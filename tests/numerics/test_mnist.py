"""Classes and precisions on MNIST-FC of the paper, all 55,000 examples, against the float64
oracle.
"""

from __future__ import annotations

import runpy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lca_posthoc import Loss, Run, Task, run
from lca_posthoc.replay.worker import spans
from tests.helpers.oracle import Oracle, simpson
from tests.helpers.replayed_cases import arrays, worst_error
from tests.test_examples import EXAMPLES, needs

pytestmark = needs("mnist.safetensors")
STEPS = 9


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The example's model and training split, and its first iterates."""
    example = runpy.run_path(str(EXAMPLES / "mnist_fc.py"))
    root = tmp_path_factory.mktemp("mnist")
    example["train"](str(root / "ck"), STEPS)
    checkpoints = [
        load_file(root / "ck" / f"step_{step:08d}.safetensors") for step in range(STEPS + 1)
    ]
    return SimpleNamespace(
        root=root, net=example["Net"], data=example["task"]().data["train"], checkpoints=checkpoints
    )


def values(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def replay(mnist: Any, out: str, losses: dict[str, Loss], **settings: Any) -> Run:
    task = Task(mnist.net, {"train": mnist.data}, losses)
    place = mnist.root / out
    return run(
        mnist.root / "ck",
        task,
        losses=["all"],
        out=place,
        cluster="inline",
        device="cpu",
        **settings,
    )


def test_ten_classes_in_one_pass_are_those_of_the_oracle_and_their_weighted_mean_is_the_plain_loss(
    mnist: Any,
) -> None:
    losses = {
        "train": Loss(F.cross_entropy, on="train"),
        "classes": Loss(F.cross_entropy, on="train", group_by=lambda images, labels: labels),
    }
    opened = replay(mnist, "classes.lca", losses, steps="0:2", tolerance=float("inf"))
    classes, plain = arrays(opened["classes"].allocation), arrays(opened["train"].allocation)
    images, labels = mnist.data
    for label in range(10):
        mine = labels == label
        truth = Oracle(mnist.net, (images[mine], labels[mine]), values).allocate(
            mnist.checkpoints[:3], *simpson(2)
        )
        wanted = {name: each.numpy() for name, each in truth.stacked().items()}
        assert worst_error({name: each[:, label] for name, each in classes.items()}, wanted) <= 1e-5
    weights = opened["classes"].steps["weight"].values
    assert weights.tolist() == [torch.bincount(labels).tolist()] * 2
    for name, each in plain.items():
        mean = np.einsum(
            "sg,sg...->s...", weights, each_class := classes[name].astype(np.float64)
        ) / len(labels)
        assert each_class.shape == (2, 10, *each.shape[1:])
        assert np.abs(mean - each).sum() <= 1e-6 * np.abs(each).sum()


def test_the_error_bfloat16_reports_is_the_one_against_float64(
    mnist: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "SAMPLED", {0, 8})
    opened = replay(
        mnist,
        "bfloat16.lca",
        {"train": Loss(F.cross_entropy, on="train")},
        precision="bfloat16",
        precision_check="full",
    )
    reported = opened["train"].steps["precision_error"].values
    assert np.flatnonzero(~np.isnan(reported)).tolist() == [0, 8]
    for at in (0, 8):
        truth = Oracle(mnist.net, mnist.data, values).allocate(
            mnist.checkpoints[at : at + 2], *simpson(2)
        )
        wanted = {name: each[0].numpy() for name, each in truth.stacked().items()}
        found = {
            name: each[at].astype(np.float64)
            for name, each in arrays(opened["train"].allocation).items()
        }
        apart = sum(np.abs(found[name] - wanted[name]).sum() for name in wanted)
        scale = sum(np.abs(each).sum() for each in wanted.values())
        print(f"segment {at}: reported {reported[at]:.3e}, against float64 {apart / scale:.3e}")
        assert 1 / 1.5 <= reported[at] / (apart / scale) <= 1.5
