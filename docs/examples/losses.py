"""Losses people train with, each stated as a `Loss`: copy the one you need into your task file.

A loss is the weighted mean over every element of a whole split. Functions and modules of torch know
their own weights; a function of your own gives values, one per element and never their mean, and
weights where elements do not count alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss

# one for each class; moved to the model's device and precision for you
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 4.0])

# --- classification: (inputs, targets), model(inputs) gives logits --------------------------------


def ignoring_unlabelled() -> Loss:
    """Targets of 255 do not count; the default, -100, needs no saying: Loss(F.cross_entropy)."""
    return Loss(partial(F.cross_entropy, ignore_index=255), on="train")


def weighing_classes() -> Loss:
    """Rare classes count for more: a mean weighted by class, as torch's own."""
    return Loss(partial(F.cross_entropy, weight=CLASS_WEIGHTS), on="train")


def smoothing_labels() -> Loss:
    return Loss(partial(F.cross_entropy, label_smoothing=0.1), on="train")


def all_three() -> Loss:
    """A module instead of a function; whatever its `reduction`, it is evaluated element by
    element.
    """
    return Loss(
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=255, label_smoothing=0.1), on="train"
    )


def several_labels() -> Loss:
    """Targets (N, 3) of 0 and 1, each label an element; the third is rare, so finding it counts
    fourfold.
    """
    return Loss(
        partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor([1.0, 1.0, 4.0])),
        on="train",
    )


class Focal(nn.Module):
    """A module of your own: (logits, targets) → one value per example, (N,)."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]
        return -((1 - log_p.exp()) ** self.gamma) * log_p


def focal() -> Loss:
    return Loss(Focal(gamma=2.0), on="train")


# --- regression -----------------------------------------------------------------------------------


def squared_error() -> Loss:
    return Loss(F.mse_loss, on="train")


def huber() -> Loss:
    """Squared near the target, absolute far from it, and so not thrown by outliers."""
    return Loss(nn.HuberLoss(delta=0.5), on="train")


# --- your own function: call(model, batch) -> values, or (values, weights) ------------------------


def of_pairs(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Batches (left, right, score), a model with two inputs: values (N,)."""
    left, right, score = batch
    return (model(left, right) - score) ** 2


def pairs() -> Loss:
    return Loss(call=of_pairs, on="train")


def next_token(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Batches {"input_ids", "attention_mask"}, both (N, T): values and weights (N, T - 1); padding
    weighs nothing.
    """
    logits = model(**batch).logits[:, :-1]
    values = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return values, batch["attention_mask"][:, 1:]


def language_model() -> Loss:
    """The mean over tokens, not over sequences: long texts count for more."""
    return Loss(call=next_token, on="train")


# --- regularisers: terms of the parameters alone, seen apart from the data ------------------------


def absolute_weights(model: nn.Module) -> Tensor:
    """1e-3 · Σ|w| over the weights, biases left out: one number."""
    return (
        1e-3
        * torch.stack([each.abs().sum() for each in model.parameters() if each.dim() > 1]).sum()
    )


def regularised() -> dict[str, Loss]:
    """What was minimised is the sum of the three, and so is its allocation; `l2` is what
    `weight_decay=1e-4` adds to SGD.
    """
    return {
        "data": Loss(F.cross_entropy, on="train"),
        "l2": Loss(l2=1e-4),
        "l1": Loss(term=absolute_weights),
    }


# --- groups: the loss of each part of the data, in one pass over it -------------------------------


def by_class() -> Loss:
    """A function of the batch as it is unpacked, giving a label for each example."""
    return Loss(F.cross_entropy, on="train", group_by=lambda inputs, targets: targets)


def by_token(frequent: Sequence[int]) -> Loss:
    """A label for each element of the loss: whether the next token is a frequent one, (N, T - 1)."""

    def kinds(batch: Mapping[str, Tensor]) -> Tensor:
        return torch.isin(batch["input_ids"][:, 1:], torch.tensor(frequent))

    return Loss(call=next_token, on="train", group_by=kinds)


def by_domain(domains: Sequence[str]) -> Loss:
    """A label for each example of the split: ["web", "books", "web", …]."""
    return Loss(call=next_token, on="train", group_by=domains)
