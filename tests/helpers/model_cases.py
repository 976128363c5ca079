"""Small models as data: how to build and train each, its splits, its losses, and what it may differ
from the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lca_posthoc import Loss, Recorder, Task

Batch = tuple[Tensor, ...]
Values = Callable[[nn.Module, Batch], Any]
RUNNING, BOTH = ("running",), ("running", "batch")


@dataclass(frozen=True)
class Case:
    """A task, the same losses as plain `values(model, batch)` for the oracle, and how iterates are
    made.

    `bound` is numerics 7's for float32; `batch_size` cuts every split into unequal batches.
    """

    build: Callable[[], nn.Module]
    data: Callable[[], dict[str, Batch]]
    losses: Mapping[str, Loss]
    values: Mapping[str, Values]
    bound: float = 1e-5
    norm_stats: tuple[str, ...] = RUNNING
    batch_size: int = 7
    learning_rate: float = 0.1

    def task(self) -> Task:
        return Task(model=self.build, data=self.data(), losses=self.losses)

    def record(self, directory: Path, steps: int = 6) -> Path:
        """Train for `steps` by SGD with momentum and save every iterate; running statistics move,
        dropout is on.
        """
        torch.manual_seed(4)
        model, name = self.build().train(), next(iter(self.losses))
        data = self.data()[self.losses[name].on]
        moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(moving, lr=self.learning_rate, momentum=0.9)
        with Recorder(directory, model) as recorder:
            recorder.save(0)
            for step in range(1, steps + 1):
                chosen = torch.randperm(len(data[0]))[:16]
                found = self.values[name](model, tuple(each[chosen] for each in data))
                values, weights = (
                    found if isinstance(found, tuple) else (found, torch.ones_like(found))
                )
                optimizer.zero_grad()
                ((values * weights).sum() / weights.sum()).backward()
                optimizer.step()
                recorder.save(step)
        return directory


# --- models ---------------------------------------------------------------------------------------


def relu_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, 4),
    )


def smooth_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 4)
    )


def fast_path() -> nn.Module:
    """Attention that torch computes by another kernel where no gradient is asked for."""
    block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (3, 4)), nn.Linear(4, 8), block, nn.Flatten(), nn.Linear(24, 4)
    )


def frozen_mlp() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
    model[0].weight.requires_grad_(False)
    return model


def conv_bn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6, affine=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


class Recomputed(nn.Module):
    """Batch norm inside a part whose forward pass is run again during the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Tanh())
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.part, x, use_reentrant=False))


class Autoencoder(nn.Module):
    """A transposed convolution and an instance norm that tracks statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 3, 3, stride=2)
        self.norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
        self.up = nn.ConvTranspose2d(3, 2, 3, stride=2)
        self.mix = nn.Conv2d(2, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.up(torch.tanh(self.norm(self.down(x)))))


class OddShapes(nn.Module):
    """A scalar parameter, one without elements, one the loss never reaches, and a buffer that moves
    unused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.idle = nn.Parameter(torch.ones(5))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return self.last(torch.tanh(self.scale * self.first(x))) + self.empty.sum()


class Conv1D(nn.Module):
    """A linear layer whose weight is stored inputs first, as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Upsample(nn.ConvTranspose2d):
    """A user's own kind of transposed convolution."""


class Transposed(nn.Module):
    """Layers whose output axis is axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose1d(1, 3, 2)
        self.second = Upsample(3, 2, (1, 2))
        self.third = Conv1D(28, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(
            torch.tanh(self.second(torch.tanh(self.first(x[:, None]))[:, :, None])).flatten(1)
        )


class Block(nn.Module):
    """Attention (explicit mask made under the default dtype, or the kernel's own) and a
    perceptron.
    """

    def __init__(self, width: int, explicit_mask: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width)
        )
        self.explicit_mask = explicit_mask

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mask = torch.full((length, length), float("-inf")).triu(1) if self.explicit_mask else None
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Two causal blocks of two heads; the output weight is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList([Block(8, explicit_mask=True), Block(8, explicit_mask=False)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# --- data -----------------------------------------------------------------------------------------


def _vectors() -> dict[str, Batch]:
    """50 and 17 examples of four classes that a linear teacher tells apart."""
    generator = torch.Generator().manual_seed(1)
    inputs, teacher = (
        torch.randn(67, 12, generator=generator),
        torch.randn(12, 4, generator=generator),
    )
    targets = (inputs @ teacher).argmax(1)
    return {"train": (inputs[:50], targets[:50]), "validation": (inputs[50:], targets[50:])}


def _images() -> dict[str, Batch]:
    """30 images of four classes: which quarter is bright. 7 at a time they leave a last batch of
    2.
    """
    generator = torch.Generator().manual_seed(2)
    inputs, targets = (
        torch.randn(30, 1, 9, 9, generator=generator),
        torch.randint(0, 4, (30,), generator=generator),
    )
    for image, target in zip(inputs, targets.tolist(), strict=True):
        image[0, 5 * (target // 2) :, 5 * (target % 2) :] += 1.0
    return {"train": (inputs, targets)}


def _echo() -> dict[str, Batch]:
    inputs = _images()["train"][0][:20]
    return {"train": (inputs, inputs[:, :, :8, :8])}


def _tokens() -> dict[str, Batch]:
    """19 sequences in which tokens mostly count upwards; token 0 is padding."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(1, 11, (19, 1), generator=generator)
    text = 1 + (starts + torch.arange(7)) % 10
    text[torch.rand(19, 7, generator=generator) < 0.15] = 0
    return {"train": (text[:, :-1], text[:, 1:])}


# --- losses, each written twice: for the package and for the oracle -------------------------------


def classes(model: nn.Module, batch: Batch) -> Tensor:
    log_p = torch.log_softmax(model(batch[0]), 1)
    return -log_p[torch.arange(len(batch[1])), batch[1]]


def one_hot_distance(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - F.one_hot(targets, 4)) ** 2).mean(1)


def distances(model: nn.Module, batch: Batch) -> Tensor:
    wanted = torch.eye(4, dtype=torch.float64)[batch[1]]
    return ((model(batch[0]) - wanted) ** 2).sum(1) / 4


def pixels(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]) ** 2


def next_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of every token that is not padding."""
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="none"), (
        batch[1] != 0
    ).flatten()


def every_token(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction=reduction)


def token_values(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(model(batch[0]), 2).gather(2, batch[1][..., None])[..., 0]
    return -log_p, (batch[1] != 0).to(log_p.dtype)


def all_token_values(model: nn.Module, batch: Batch) -> Tensor:
    return -torch.log_softmax(model(batch[0]), 2).gather(2, batch[1][..., None])[..., 0]


_CLASSES = {"train": Loss(F.cross_entropy, on="train")}
_CLASS_VALUES = {"train": classes}

CASES = {
    "relu_mlp": Case(relu_mlp, _vectors, _CLASSES, _CLASS_VALUES),
    "smooth_mlp": Case(
        smooth_mlp,
        _vectors,
        {
            "train": Loss(nn.CrossEntropyLoss(), on="train"),
            "validation": Loss(F.cross_entropy, on="validation"),
            "distance": Loss(one_hot_distance, on="validation"),
        },
        {"train": classes, "validation": classes, "distance": distances},
    ),
    "frozen_mlp": Case(frozen_mlp, _vectors, _CLASSES, _CLASS_VALUES),
    "conv_bn": Case(conv_bn, _images, _CLASSES, _CLASS_VALUES, bound=1e-4, norm_stats=BOTH),
    "recomputed": Case(
        Recomputed, _vectors, _CLASSES, _CLASS_VALUES, norm_stats=BOTH, batch_size=24
    ),
    "autoencoder": Case(
        Autoencoder,
        _echo,
        {"train": Loss(F.mse_loss, on="train")},
        {"train": pixels},
        norm_stats=BOTH,
    ),
    "transposed": Case(Transposed, _vectors, _CLASSES, _CLASS_VALUES),
    "fast_path": Case(fast_path, _vectors, _CLASSES, _CLASS_VALUES),
    "odd_shapes": Case(OddShapes, _vectors, _CLASSES, _CLASS_VALUES),
    "transformer": Case(
        Transformer,
        _tokens,
        {"tokens": Loss(call=next_tokens, on="train"), "all": Loss(every_token, on="train")},
        {"tokens": token_values, "all": all_token_values},
        learning_rate=0.05,
    ),
}
