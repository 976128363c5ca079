"""Which layer made which characters of Shakespeare easier to guess: after a newline, inside a
speaker's name, the second of a doubled letter.

```sh
LCA_DATA=DIR python docs/examples/shakespeare_tokens.py OUT [ITERATES]
```

DIR holds `tinyshakespeare.txt` of karpathy/char-rnn. Trains a causal transformer of two blocks
character by character, allocates the loss of each kind of characters in one pass over the data, and
that of every single character of a few sequences; draws `OUT/kinds.png`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lca_posthoc as lca
from lca_posthoc import Loss, Recorder, Task

ITERATES = 100
LENGTH, WIDTH, HEADS, BATCH = 64, 64, 4, 32
SEQUENCES, TOLD = 64, 4  # whose characters are grouped, and told apart one by one
KINDS = ("newline", "name", "double", "other")


class Block(nn.Module):
    """Attention to what came before, then a perceptron; both added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.joined = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attention(self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.joined(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next of 65 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(65, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 65)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def text() -> str:
    if "LCA_DATA" not in os.environ:
        raise RuntimeError("set LCA_DATA to the directory that holds tinyshakespeare.txt")
    return (Path(os.environ["LCA_DATA"]) / "tinyshakespeare.txt").read_text()


def sequences(count: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """The first characters in sequences of 64, (count, 64), the character after each, and the kind
    of that, (count, 64).
    """
    whole = text()
    code = {character: number for number, character in enumerate(sorted(set(whole)))}
    read = whole[: count * LENGTH + 1]
    ids = torch.tensor([code[character] for character in read])
    kinds = np.array([kind_of(read, place) for place in range(1, len(read))])
    shape = count, LENGTH
    return ids[:-1].reshape(shape), ids[1:].reshape(shape), kinds.reshape(shape)


def kind_of(read: str, place: int) -> str:
    """The kind of a character: a speaker's name is a line in capitals that ends in a colon."""
    start = read.rfind("\n", 0, place) + 1
    end = read.find("\n", place)
    line = read[start : len(read) if end < 0 else end]
    if read[place - 1] == "\n":
        return KINDS[0]
    if line.endswith(":"):
        return KINDS[1]
    return KINDS[2] if read[place] == read[place - 1] and read[place].isalpha() else KINDS[3]


def next_character(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of every character, (N, 64)."""
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none")


def task() -> Task:
    """One pass for all kinds of characters, and every character of a few sequences."""
    inputs, targets, kinds = sequences(SEQUENCES)
    return Task(
        model=Transformer,
        data={"text": (inputs, targets), "few": (inputs[:TOLD], targets[:TOLD])},
        losses={
            "kinds": Loss(call=next_character, on="text", group_by=kinds),
            "characters": Loss(call=next_character, on="few", per="element"),
        },
    )


def train(directory: Path, iterates: int) -> None:
    """AdamW, learning rate 1e-3, batches of 32 sequences of the first 2,000."""
    torch.manual_seed(0)
    inputs, targets, _ = sequences(2_000)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Recorder(directory, model) as recorder:
        recorder.save(0)
        for step in range(1, iterates + 1):
            rows = torch.randperm(len(inputs))[:BATCH]
            optimizer.zero_grad()
            loss = next_character(model, (inputs[rows], targets[rows])).mean()
            loss.backward()
            optimizer.step()
            recorder.save(step)
            if step % 50 == 0:
                print(f"step {step}: loss of the batch {loss.item():.3f}", flush=True)


def main(out: Path, iterates: int = ITERATES) -> None:
    """Train, replay, and show which layer learned which kind of characters."""
    train(out / "checkpoints", iterates)
    run = lca.run(
        out / "checkpoints",
        task(),
        losses=["all"],
        out=out / "run.lca",
        cluster="inline",
        keep="tensors",
        rule="trapezoid",
        tolerance=float("inf"),
    )
    found = lca.findings.layers(run["kinds"], by=2)
    totals = found["total"].transpose("group", "layer")
    layers = [str(layer) for layer in found["layer"].values]
    print(f"{'':16}", *(f"{layer:>12}" for layer in layers))
    for kind, row in zip(totals["group"].values, totals.values, strict=True):
        print(f"{kind!s:16}", *(f"{value:+12.3f}" for value in row))
    lca.plots.layers(found).figure.savefig(out / "kinds.png", dpi=150, bbox_inches="tight")

    # single characters close on their own loss
    told = run["characters"].examples
    assert told.sizes["element"] == TOLD * LENGTH
    change = told["loss_end"] - told["loss_start"]
    assert float(abs(told["allocated"].sum("tensor") + told["residual"] - change).max()) < 1e-4
    total = told["allocated"].sum(("step", "tensor"))
    best = told.isel(element=int(np.argmin(total.values)))
    _, targets, kinds = sequences(TOLD)
    place = int(best["example"]), int(best["index"])
    print(
        f"the character that was learned most is {sorted(set(text()))[targets[place]]!r}, "
        f"{kinds[place]}, no. {place[1]} of sequence {place[0]}: {float(total.min()):+.2f}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
