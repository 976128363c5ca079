"""The losses of docs/examples/losses.py, each against the oracle and a definition written by
hand.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lca_posthoc import Loss, Run, Task, run
from lca_posthoc.errors import InputError

from ..helpers.cli import says
from ..helpers.model_cases import Batch, Case, Values
from ..helpers.oracle import Oracle, simpson
from ..helpers.replayed_cases import arrays, worst_error

BOUND = 1e-5  # numerics 7, float32
FIXED: dict[str, Any] = {
    "cluster": "inline",
    "device": "cpu",
    "tolerance": math.inf,
    "batch_size": 7,
}


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where pickled tasks look for it
    spec.loader.exec_module(module)
    return module


losses = _imported(Path(__file__).parent.parent.parent / "docs" / "examples" / "losses.py")


# --- models ---------------------------------------------------------------------------------------


def three_outputs() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.compare = nn.Linear(6, 5), nn.Bilinear(5, 5, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.compare(torch.tanh(self.encode(left)), torch.tanh(self.encode(right)))[:, 0]


class LanguageModel(nn.Module):
    """Predicts the next token from the mean of those before it, with the outputs of a
    `transformers` model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(7, 5), nn.Dropout(0.2), nn.Linear(5, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        seen = attention_mask[..., None]
        mean = (self.embed(input_ids) * seen).cumsum(1) / seen.cumsum(1).clamp(min=1)
        return SimpleNamespace(logits=self.head(torch.tanh(self.drop(mean))))


# --- data: 23 examples, in batches of 7 -----------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(5)
INPUTS, OTHERS = torch.randn(2, 23, 6, generator=GENERATOR)
TARGETS = torch.randint(0, 3, (23,), generator=GENERATOR)
# all of the first batch
UNLABELLED = torch.where((torch.arange(23) < 8) | (torch.arange(23) % 5 == 0), 255, TARGETS)
LABELS = (torch.rand(23, 3, generator=GENERATOR) < 0.3).float()
NUMBERS = torch.randn(23, 3, generator=GENERATOR) * 2
SCORES = torch.rand(23, generator=GENERATOR)
TOKENS = (torch.arange(9) * torch.randint(1, 3, (23, 1), generator=GENERATOR)) % 6 + 1
LENGTHS = torch.randint(2, 10, (23, 1), generator=GENERATOR)
TEXT = {"input_ids": TOKENS, "attention_mask": (torch.arange(9) < LENGTHS).long()}
DOMAINS = [("web", "books", "code")[index % 5 % 3] for index in range(23)]


# --- each loss by its definition ------------------------------------------------------------------


def classes(
    model: nn.Module,
    batch: Batch,
    *,
    weight: Sequence[float] = (1, 1, 1),
    ignored: int = -100,
    smoothing: float = 0,
) -> tuple[Tensor, Tensor]:
    """−Σ_c q_c w_c log p_c / w_y, of weight w_y, where q is the target, smoothed; ignored targets
    weigh nothing.
    """
    outputs, targets, weights = model(batch[0]), batch[1], torch.tensor(weight, dtype=torch.float64)
    log_p = outputs - outputs.logsumexp(1, keepdim=True)
    known = targets != ignored
    q = torch.full((len(targets), 3), smoothing / 3, dtype=torch.float64)
    q[known, targets[known]] += 1 - smoothing
    own = (weights[None].expand_as(q).gather(1, (targets * known)[:, None]))[:, 0]
    return -(q * weights * log_p).sum(1) / own, own * known


def labels(model: nn.Module, batch: Batch) -> Tensor:
    p = 1 / (1 + torch.exp(-model(batch[0])))
    found = torch.tensor([1.0, 1.0, 4.0]).double() * batch[1] * torch.log(p)
    return -(found + (1 - batch[1]) * torch.log(1 - p))


def confident(model: nn.Module, batch: Batch) -> Tensor:
    p = torch.softmax(model(batch[0]), 1)[torch.arange(len(batch[1])), batch[1]]
    return -((1 - p) ** 2) * torch.log(p)


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]) ** 2


def bounded_squares(model: nn.Module, batch: Batch) -> Tensor:
    far = (model(batch[0]) - batch[1]).abs()
    return torch.where(far <= 0.5, far**2 / 2, 0.5 * (far - 0.25))


def pair_squares(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0], batch[1]) - batch[2]) ** 2


def tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    ids, mask = batch
    logits = model(ids, mask).logits
    chosen = torch.stack(
        [logits[:, at, :].gather(1, ids[:, at + 1, None])[:, 0] for at in range(ids.shape[1] - 1)],
        1,
    )
    return logits.logsumexp(2)[:, :-1] - chosen, mask[:, 1:].to(logits.dtype)


def chosen_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Those that a third part of the batch chooses, where it has one."""
    values, weights = tokens(model, batch[:2])
    return values, weights if len(batch) == 2 else weights * batch[2]


def squared_parameters(model: nn.Module, batch: Batch) -> Tensor:
    return 1e-4 / 2 * sum((each**2).sum() for each in model.parameters()).reshape(1)


def absolute_kernels(model: nn.Module, batch: Batch) -> Tensor:
    return 1e-3 * sum(
        each.abs().sum() for name, each in model.named_parameters() if "weight" in name
    ).reshape(1)


def everything(model: nn.Module, batch: Batch) -> Tensor:
    mean = classes(model, batch)[0].mean().reshape(1)
    return mean + squared_parameters(model, batch) + absolute_kernels(model, batch)


def own_mean(
    function: Callable[..., Tensor], **settings: Any
) -> Callable[[nn.Module, Batch], Tensor]:
    return lambda model, batch: function(
        model(*batch[:-1]), batch[-1], reduction="mean", **settings
    )


def token_mean(model: nn.Module, batch: Batch) -> Tensor:
    ids, mask = batch
    wanted = ids.masked_fill(mask == 0, -100)[:, 1:]
    return F.cross_entropy(
        model(ids, mask).logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="mean"
    )


# --- the examples ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Losses by name, the same ones as `values(model, batch)` for the oracle, and torch's own mean
    over a whole split.

    `groups` has a label for each example where the losses are grouped, `elements` whether an element
    is of a group, for each of the groups of elements; iterates are those of training by the first
    loss.
    """

    losses: Mapping[str, Loss]
    values: Mapping[str, Values]
    data: Batch | Mapping[str, Tensor]
    mean: Callable[[nn.Module, Batch], Tensor] | None = None
    build: Callable[[], nn.Module] = three_outputs
    groups: Sequence[int] | Sequence[str] | None = None
    elements: Sequence[Tensor] | None = None

    @property
    def is_grouped(self) -> bool:
        return self.groups is not None or self.elements is not None

    @property
    def columns(self) -> Batch:
        return tuple(self.data.values()) if isinstance(self.data, Mapping) else self.data

    def parts(self) -> list[Batch]:
        """The examples of each group, of ascending label; all of them where there are no groups, and
        with what tells its elements apart where these are grouped.
        """
        if self.elements is not None:
            return [(*self.columns, mine) for mine in self.elements]
        given = list(self.groups) if self.groups is not None else [0] * len(self.columns[0])
        chosen = [
            [row for row, label in enumerate(given) if label == wanted]
            for wanted in sorted(set(given))
        ]
        return [tuple(each[rows] for each in self.columns) for rows in chosen]


def one(loss: Loss, values: Values, *rest: Any, **more: Any) -> Example:
    return Example({"train": loss}, {"train": values}, *rest, **more)


WEIGHT, LABELLED, PARTLY = (0.5, 1.0, 4.0), (INPUTS, TARGETS), (INPUTS, UNLABELLED)
WIDE = torch.tensor(WEIGHT).double()
FREQUENT = [1, 2, 3]
IS_FREQUENT = (TEXT["input_ids"][:, 1:, None] == torch.tensor(FREQUENT)).any(2)
EXAMPLES = {
    "ignoring_unlabelled": one(
        losses.ignoring_unlabelled(),
        partial(classes, ignored=255),
        PARTLY,
        own_mean(F.cross_entropy, ignore_index=255),
    ),
    "weighing_classes": one(
        losses.weighing_classes(),
        partial(classes, weight=WEIGHT),
        LABELLED,
        own_mean(F.cross_entropy, weight=WIDE),
    ),
    "smoothing_labels": one(
        losses.smoothing_labels(),
        partial(classes, smoothing=0.1),
        LABELLED,
        own_mean(F.cross_entropy, label_smoothing=0.1),
    ),
    "all_three": one(
        losses.all_three(),
        partial(classes, weight=WEIGHT, ignored=255, smoothing=0.1),
        PARTLY,
        own_mean(F.cross_entropy, weight=WIDE, ignore_index=255, label_smoothing=0.1),
    ),
    "several_labels": one(
        losses.several_labels(),
        labels,
        (INPUTS, LABELS),
        own_mean(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor([1.0, 1.0, 4.0])),
    ),
    "focal": one(losses.focal(), confident, LABELLED),
    "squared_error": one(losses.squared_error(), squares, (INPUTS, NUMBERS), own_mean(F.mse_loss)),
    "huber": one(
        losses.huber(), bounded_squares, (INPUTS, NUMBERS), own_mean(F.huber_loss, delta=0.5)
    ),
    "pairs": one(
        losses.pairs(),
        pair_squares,
        (INPUTS, OTHERS, SCORES),
        own_mean(F.mse_loss),
        build=TwoInputs,
    ),
    "language_model": one(losses.language_model(), tokens, TEXT, token_mean, build=LanguageModel),
    "regularised": Example(
        losses.regularised(),
        {"data": classes, "l2": squared_parameters, "l1": absolute_kernels},
        LABELLED,
    ),
    "by_class": one(
        losses.by_class(), classes, LABELLED, own_mean(F.cross_entropy), groups=TARGETS.tolist()
    ),
    "by_token": one(
        losses.by_token(FREQUENT),
        chosen_tokens,
        TEXT,
        token_mean,
        build=LanguageModel,
        elements=[~IS_FREQUENT, IS_FREQUENT],
    ),
    "by_domain": one(
        losses.by_domain(DOMAINS), tokens, TEXT, token_mean, build=LanguageModel, groups=DOMAINS
    ),
}


class Replayed:
    """One example, trained, recorded and replayed."""

    def __init__(self, root: Path, example: Example) -> None:
        self.example = example
        case = Case(
            example.build, lambda: {"train": example.columns}, example.losses, example.values
        )
        iterates = case.record(root / "iterates", steps=5)
        self.checkpoints = [load_file(path) for path in sorted(iterates.glob("*.safetensors"))]
        task = Task(example.build, {"train": example.data}, example.losses)
        settings = {
            "cluster": "inline",
            "device": "cpu",
            "batch_size": 7,
            "tolerance": math.inf,
            "losses": ["all"],
        }
        self.run: Run = run(iterates, task, out=root / "run", **settings)

    def allocation(self, loss: str, group: int) -> dict[str, np.ndarray]:
        found = self.run[loss].allocation
        return arrays(found.isel(group=group) if self.example.is_grouped else found)

    def truth(self, values: Values, part: Batch) -> tuple[dict[str, np.ndarray], list[float]]:
        truth = Oracle(self.example.build, part, values).allocate(self.checkpoints, *simpson(2))
        return {name: each.numpy() for name, each in truth.stacked().items()}, truth.losses


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Replayed]:
    made: dict[str, Replayed] = {}

    def replay(name: str) -> Replayed:
        if name not in made:
            made[name] = Replayed(tmp_path_factory.mktemp(name), EXAMPLES[name])
        return made[name]

    return replay


def path_of(results: Any) -> np.ndarray:
    """The loss at every checkpoint, (steps + 1[, groups])."""
    return np.concatenate(
        [results.steps["loss_start"].values, results.steps["loss_end"].values[-1:]]
    )


def test_every_loss_of_the_examples_is_tested() -> None:
    public = {
        name
        for name, each in inspect.getmembers(losses, inspect.isfunction)
        if each.__module__ == losses.__name__
    }
    assert {
        name
        for name in public
        if "Loss" in str(inspect.signature(getattr(losses, name)).return_annotation)
    } == {*EXAMPLES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_allocated_as_its_definition_says(
    replayed: Callable[[str], Replayed], name: str
) -> None:
    found = replayed(name)
    for loss, values in found.example.values.items():
        for group, part in enumerate(found.example.parts()):
            wanted, at_checkpoints = found.truth(values, part)
            assert worst_error(found.allocation(loss, group), wanted) <= BOUND
            of_group = path_of(found.run[loss])[
                (slice(None), *([group] if found.example.is_grouped else []))
            ]
            assert of_group == pytest.approx(at_checkpoints, rel=1e-6)


@pytest.mark.parametrize("name", [name for name, each in EXAMPLES.items() if each.mean is not None])
def test_the_loss_of_an_example_is_torchs_own_mean_over_the_whole_split(
    replayed: Callable[[str], Replayed], name: str
) -> None:
    found = replayed(name)
    example, model = found.example, found.example.build().double().eval()
    whole = tuple(each.double() if each.is_floating_point() else each for each in example.columns)
    weights = found.run["train"].steps["weight"].values[0]
    for checkpoint, at_checkpoint in zip(
        found.checkpoints, path_of(found.run["train"]), strict=True
    ):
        model.load_state_dict(checkpoint)
        assert example.mean is not None
        with torch.no_grad():
            wanted = float(example.mean(model, whole))
        assert np.average(at_checkpoint, weights=weights) == pytest.approx(wanted, rel=1e-6)


def test_data_and_regularisers_seen_apart_are_together_what_was_minimised(
    replayed: Callable[[str], Replayed],
) -> None:
    found = replayed("regularised")
    wanted, at_checkpoints = found.truth(everything, found.example.columns)
    apart = [found.allocation(loss, 0) for loss in found.example.losses]
    together = {name: sum(each[name].astype(np.float64) for each in apart) for name in wanted}
    assert worst_error(together, wanted) <= BOUND
    total = sum(path_of(found.run[loss]) for loss in found.example.losses)
    assert total == pytest.approx(at_checkpoints, rel=1e-6)


def test_the_l2_term_gives_each_parameter_half_of_l2_times_the_change_of_its_square(
    replayed: Callable[[str], Replayed],
) -> None:
    found = replayed("regularised")
    allocation = found.allocation("l2", 0)
    for segment, (before, after) in enumerate(itertools.pairwise(found.checkpoints)):
        for name in before:
            exact = 1e-4 / 2 * (after[name].double() ** 2 - before[name].double() ** 2)
            assert allocation[name][segment] == pytest.approx(exact.numpy(), rel=1e-4, abs=1e-11)


# --- losses that write into what they are given ---------------------------------------------------

Record = dict[str, Any]
RECORDS: Record = {"x": INPUTS, "y": TARGETS, "seen": (INPUTS > 9) / 1.0}


def of_record(model: nn.Module, batch: Record) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def ablated_in_place(model: nn.Module, batch: Record) -> Tensor:
    batch["x"][:, :3] = 0
    return of_record(model, batch)


def ablated_copy(model: nn.Module, batch: Record) -> Tensor:
    return ablated_in_place(model, {**batch, "x": batch["x"].clone()})


def zeros_zeroed(model: nn.Module, batch: Record) -> Tensor:
    """Changes nothing in these examples, and may in others."""
    batch["seen"].zero_()
    return of_record(model, batch)


def sign_changed(model: nn.Module, batch: Record) -> Tensor:
    """Zeros that compare equal."""
    batch["seen"] = -batch["seen"]
    return of_record(model, batch)


def inputs_replaced(model: nn.Module, batch: Record) -> Tensor:
    batch["x"] = torch.tanh(batch["x"])
    return of_record(model, batch)


def targets_taken_out(model: nn.Module, batch: Record) -> Tensor:
    targets = batch.pop("y")
    return F.cross_entropy(model(batch["x"]), targets, reduction="none")


def filled_where_missing(model: nn.Module, batch: Record) -> Tensor:
    batch["x"].nan_to_num_(0.0)
    return of_record(model, batch)


WRITING: dict[str, tuple[Loss, Any, str]] = {
    "values": (Loss(call=ablated_in_place), RECORDS, "batch['x'] changed"),
    "values that are what they were": (Loss(call=zeros_zeroed), RECORDS, "batch['seen'] changed"),
    "the sign of zero": (Loss(call=sign_changed), RECORDS, "batch['seen'] changed"),
    "another tensor": (Loss(call=inputs_replaced), RECORDS, "batch['x'] changed"),
    "keys": (Loss(call=targets_taken_out), RECORDS, "(batch changed"),
    "missing values": (
        Loss(call=filled_where_missing),
        {**RECORDS, "x": torch.where(INPUTS > 2, math.nan, INPUTS)},
        "batch['x'] changed",
    ),
    "the model's first layer": (Loss(F.cross_entropy), LABELLED, "batch[0] changed"),
}


def rectified_inputs() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3))


@pytest.mark.parametrize("name", WRITING)
def test_a_loss_that_writes_into_its_batch_is_refused(tmp_path: Path, name: str) -> None:
    loss, data, place = WRITING[name]
    build = rectified_inputs if "model" in name else three_outputs
    iterates = Case(build, lambda: {"train": LABELLED}, {"train": loss}, {"train": classes}).record(
        tmp_path / "it", steps=1
    )
    data = (
        {key: each.clone() for key, each in data.items()}
        if isinstance(data, dict)
        else (data[0].clone(), data[1])
    )
    losses = {"plain": Loss(call=of_record) if isinstance(data, dict) else loss, "writing": loss}
    with pytest.raises(InputError) as caught:
        run(
            iterates,
            Task(build, {"train": data}, losses),
            losses=["writing"],
            out=tmp_path / "run",
            **FIXED,
        )
    says(str(caught.value), "loss 'writing' writes into its batch", place, ".clone()")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_writes_into_a_copy_leaves_the_one_beside_it_alone(tmp_path: Path) -> None:
    def ablated(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return classes(model, (batch[0] * (torch.arange(6) > 2), batch[1]))

    values: dict[str, Values] = {"ablated": ablated, "plain": classes}
    losses = {"ablated": Loss(call=ablated_copy), "plain": Loss(call=of_record)}
    iterates = Case(three_outputs, lambda: {"train": LABELLED}, losses, values).record(
        tmp_path / "it", steps=3
    )
    found = run(
        iterates,
        Task(three_outputs, {"train": RECORDS}, losses),
        losses=["all"],
        out=tmp_path / "run",
        **FIXED,
    )
    checkpoints = [load_file(path) for path in sorted(iterates.glob("*.safetensors"))]
    for name, each in values.items():
        truth = Oracle(three_outputs, LABELLED, each).allocate(checkpoints, *simpson(2))
        wanted = {tensor: rows.numpy() for tensor, rows in truth.stacked().items()}
        assert worst_error(arrays(found[name].allocation), wanted) <= BOUND
        assert path_of(found[name]) == pytest.approx(truth.losses, rel=1e-6)
