"""A causal transformer of any size, built at random and trained for a few steps: as a task of
`lca run`, whose shape comes from the environment.

LCA_SHAPE is WIDTH,LAYERS,VOCABULARY,SEQUENCES; a sequence has 128 tokens. They are characters of
Tiny Shakespeare where LCA_DATA says where that is, and else random ones.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Task
from lca_posthoc.base.available_memory import peak_memory

LENGTH = 128

Figures = dict[str, float]


@dataclass(frozen=True)
class Shape:
    """The size of a model, and how many sequences its loss is over."""

    width: int
    layers: int
    vocabulary: int
    sequences: int

    @classmethod
    def of_environment(cls) -> Shape:
        return cls(*map(int, os.environ["LCA_SHAPE"].split(",")))

    def __str__(self) -> str:
        return f"{self.width},{self.layers},{self.vocabulary},{self.sequences}"


class Block(nn.Module):
    """Attention to what came before, then a perceptron of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = width // 64

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attention(self.norm1(x)).unflatten(-1, (3, self.heads, 64))
        attended = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.joined(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A decoder like GPT-2, whose last layer is its embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(LENGTH, shape.width)
        self.layers = nn.Sequential(*(Block(shape.width) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return self.norm(self.layers(x)) @ self.tokens.weight.T


def data(shape: Shape) -> tuple[Tensor, Tensor]:
    """Sequences of tokens, (sequences, 128), and the token after each of theirs."""
    wanted = shape.sequences * LENGTH + 1
    if "LCA_DATA" in os.environ:
        text = (Path(os.environ["LCA_DATA"]) / "tinyshakespeare.txt").read_bytes()[:wanted]
        ids = torch.tensor(list(text)) % shape.vocabulary
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, shape.vocabulary, (wanted,), generator=generator)
    return ids[:-1].view(-1, LENGTH), ids[1:].view(-1, LENGTH)


def next_token(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One value per token."""
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none").view_as(
        targets
    )


def smoothed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same with a tenth of each target spread over all tokens."""
    ids, targets = batch
    return F.cross_entropy(
        model(ids).flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=0.1
    ).view_as(targets)


def task() -> Task:
    shape = Shape.of_environment()
    return Task(
        lambda: Transformer(shape),
        {"train": data(shape)},
        {
            "train": Loss(call=next_token, on="train"),
            "smoothed": Loss(call=smoothed, on="train"),
            "sequences": Loss(call=next_token, on="train", per="example"),
        },
    )


def train(directory: Path, steps: int) -> None:
    """Record some steps of SGD, each on one sequence."""
    train_with(directory, steps, lambda parameters: torch.optim.SGD(parameters, lr=0.05))


def train_with(
    directory: Path,
    steps: int,
    optimizer_of: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
    save: Literal["scalars", "moments"] = "scalars",
) -> None:
    """Record some steps of an optimiser, each on one sequence."""
    torch.manual_seed(0)
    shape = Shape.of_environment()
    model, (inputs, targets) = Transformer(shape), data(shape)
    optimizer = optimizer_of(model.parameters())
    with Recorder(directory, model) as recorder:
        recorder.attach(optimizer, save=save)
        for step in range(1, steps + 1):
            row = slice(step % shape.sequences, step % shape.sequences + 1)
            optimizer.zero_grad()
            next_token(model, (inputs[row], targets[row])).mean().backward()
            optimizer.step()


def parameters() -> int:
    with torch.device("meta"):
        model = Transformer(Shape.of_environment())
    return sum(parameter.numel() for parameter in model.parameters())


def replay(
    checkpoints: Path,
    segments: int,
    keep: str,
    losses: list[str] | None = None,
    **options: Any,
) -> Figures:
    """Replay some segments of the first loss, or of those that are named, inline, and say what it
    took; where losses are named, one sequence at a time. `options` are further ones of `run`.
    """
    import lca_posthoc
    from lca_posthoc.replay.events import Planned, SpanDone

    began, ended = [(0.0, 0.0)], [(0.0, 0.0)]

    def listen(event: object) -> None:
        if isinstance(event, Planned):
            began[0] = time.perf_counter(), time.process_time()
        if isinstance(event, SpanDone):
            ended[0] = time.perf_counter(), time.process_time()

    with tempfile.TemporaryDirectory(dir=checkpoints.parent) as folder:
        run = lca_posthoc.run(
            checkpoints,
            Path(__file__),
            out=Path(folder) / "run.lca",
            keep=keep,
            losses=losses,
            batch_size=None if losses is None else 1,
            tolerance="inf",
            cluster="inline",
            steps=f"0:{segments}",
            progress=listen,
            **options,
        )
        highest, first = peak_memory(), next(iter(run.values()))
        files = (file for file in Path(folder).rglob("*") if file.is_file())
        return {
            "seconds": (ended[0][0] - began[0][0]) / segments,
            "processor": (ended[0][1] - began[0][1]) / segments,
            "residual": float(abs(first.steps["residual"]).max()),
            "peak": highest,
            "parameters": run.manifest.parameters,
            "disk": sum(file.stat().st_size for file in files),
            "activations": first.record.batch_size * saved_bytes(),
        }


def saved_bytes() -> float:
    """What autograd saves of one sequence."""
    from lca_posthoc.numerics.objective import ObjectiveSettings, build_objective

    settings = ObjectiveSettings(
        device=torch.device("cpu"), precision="float32", norm_stats="running", batch_size=None
    )
    return build_objective(task, None, settings).saved_bytes("train")


if __name__ == "__main__":
    role, place, segments = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if role == "record":
        train(place, segments)
    else:
        print(json.dumps(replay(place, segments, role, sys.argv[4:] or None)))
