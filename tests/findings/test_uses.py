"""A tensor that input and output share, told apart by use: against a model in which they are two
tensors, one example at a time in float64.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Run, Task, findings, run

EXAMPLES, TIME, WORDS, WIDTH, STEPS = 10, 5, 7, 6, 3
NODES = ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6))  # Simpson's rule


class Tied(nn.Module):
    """Two blocks between an embedding and a head with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(self.between(self.embed(ids)))
        return output

    def between(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden)).cumsum(1)
        return hidden


class Untied(Tied):
    """The same with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(WORDS, (EXAMPLES, TIME + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def next_word(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The last word of every second example weighs nothing."""
    ids, targets = batch
    values = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none")
    weights = torch.ones(targets.shape)
    weights[:, -1] = (ids[:, 0] % 2).float()
    return values.view_as(targets), weights


def parity(ids: Tensor, targets: Tensor) -> Tensor:
    return ids[:, 1] % 2


def replayed(model: type[Tied], directory: Path, keep: str) -> Run:
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    with Recorder(directory / "ck", trained) as recorder:
        for step in range(STEPS + 1):
            recorder.save(step)
            optimizer.zero_grad()
            values, weights = next_word(trained, data())
            (values * weights).sum().div(weights.sum()).backward()
            optimizer.step()
    losses = {
        "probe": Loss(call=next_word, per="example"),
        "grouped": Loss(call=next_word, per="example", group_by=parity),
        "plain": Loss(call=next_word),
    }
    return run(
        directory / "ck",
        Task(model, {"train": data()}, losses),
        losses=["all"],
        cluster="inline",
        keep=keep,
        tolerance="inf",
        out=directory / "it.lca",
    )


@pytest.fixture(scope="module", params=["tensors", "parameters"])
def tied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return replayed(Tied, tmp_path_factory.mktemp("tied"), request.param)


def brute_force(checkpoints: Path) -> np.ndarray:
    """(step, example, use), where the looked up and the projecting tensor are two."""
    iterates = [load_file(file) for file in sorted(checkpoints.glob("*.safetensors"))]
    assert len(iterates) == STEPS + 1
    ids, targets = data()
    shares = np.zeros((STEPS, EXAMPLES, 2))
    for step, (start, end) in enumerate(itertools.pairwise(iterates)):
        motion = (end["embed.weight"] - start["embed.weight"]).double()
        for place, weight in NODES:
            point = {name: torch.lerp(start[name], end[name], place) for name in start}
            for example in range(EXAMPLES):
                model = Untied()
                model.load_state_dict({"head.weight": point["embed.weight"], **point}, strict=True)
                one = ids[example : example + 1], targets[example : example + 1]
                values, weights = next_word(model.double(), one)
                ((values * weights).sum() / weights.sum()).backward()
                for use, layer in enumerate((model.embed, model.head)):
                    shares[step, example, use] += weight * float((motion * layer.weight.grad).sum())
    return shares


def test_the_share_of_each_use_is_that_of_a_tensor_of_its_own(tied: Run) -> None:
    examples = tied["probe"].examples
    assert examples["used_tensor"].values.tolist() == ["embed.weight"] * 2
    assert examples["operation"].values.tolist() == ["embedding", "linear"]
    truth = brute_force(Path(tied.manifest.root))
    size = np.abs(examples["allocated"].values).sum(2, keepdims=True)
    assert (
        np.abs(examples["uses"].values - truth) <= 1e-5 * np.maximum(size, size.max() / 100)
    ).all()
    assert np.abs(truth).sum((0, 1)).min() > 0.01  # both of them did something


@pytest.mark.parametrize("loss", ["probe", "grouped"])
def test_uses_add_up_to_their_tensor(tied: Run, loss: str) -> None:
    results = tied[loss]
    whole = results.examples["allocated"].sel(tensor="embed.weight").values
    by_use = results.examples["uses"].values
    assert np.abs(by_use.sum(-1) - whole).max() <= 1e-6 * np.abs(by_use).max()
    finding = findings.blocks(results)
    rows = ["embed (embedding)", "embed (linear)"]
    assert finding["outside_layer"].values.tolist() == rows
    sums = results.tensors["allocated"].sel(tensor="embed.weight").sum("step").values
    assert np.allclose(finding["outside"].values.sum(0), sums, rtol=1e-5, atol=1e-7)


def test_a_use_is_the_weighted_mean_over_the_examples_of_a_group(tied: Run) -> None:
    examples = tied["grouped"].examples
    outside = findings.blocks(tied["grouped"])["outside"]
    for group in (0, 1):
        own = examples.isel(example=np.flatnonzero(examples["group"].values == group))
        weights = own["weight"].values[0]
        mean = np.average(own["uses"].values.sum(0), axis=0, weights=weights)
        assert np.allclose(outside.sel(group=group).values, mean, rtol=1e-5, atol=1e-7)


def test_without_examples_or_a_tie_a_tensor_is_one(tied: Run, tmp_path: Path) -> None:
    assert findings.blocks(tied["plain"])["outside_layer"].values.tolist() == ["embed"]
    other = replayed(Untied, tmp_path, "tensors")["probe"]
    assert "uses" not in other.examples
    assert findings.blocks(other)["outside_layer"].values.tolist() == ["embed", "head"]
