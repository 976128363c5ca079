"""Losses beside each other: they share what they can, and none shows in the numbers of another.
Terms of the parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Run, Task, open_run, run
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import ObjectiveSettings, build_objective
from lca_posthoc.replay.events import Note, SpanDone

from ..helpers import oracle
from ..helpers.cli import contents, marker, says
from ..helpers.model_cases import CASES, Batch, _vectors, classes, one_hot_distance
from ..helpers.oracle import Oracle
from ..helpers.replayed_cases import Lab, arrays, assert_same_bits, case_of, worst_error
from .test_groups import by_class, by_sign, raised, replay


def replay_only(
    lab: Lab, name: str, losses: Mapping[str, Loss], wanted: Sequence[str], **settings: Any
) -> Run:
    """Some losses of a task that has more."""
    case = case_of(name)
    chosen = {
        "tolerance": math.inf,
        "cluster": "inline",
        "device": lab.device,
        "precision": lab.precision,
        "batch_size": case.batch_size,
        **settings,
    }
    chosen.setdefault("out", lab.new_place("some"))
    task = Task(chosen.pop("build", case.build), case.data(), losses)
    return run(lab.iterates(name), task, losses=wanted, **chosen)


# --- one forward pass -----------------------------------------------------------------------------

FORWARD, BACKWARD = "forward", "backward"
COUNTED: list[str] = []


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, outputs: Tensor) -> Tensor:
        COUNTED.append(FORWARD)
        return outputs.view_as(outputs)

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Tensor:
        COUNTED.append(BACKWARD)
        return upstream


class Counting(nn.Module):
    """Notes every forward and every backward pass; takes its inputs by keyword and gives a dict
    where asked to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        outputs = _Counted.apply(self.net(inputs))
        return (
            outputs if labels is None else {"logits": outputs, "hidden_states": (inputs, outputs)}
        )


def first_logit(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0])[:, 0]


def second_logit(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0])[:, 1]


def from_dict(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(**batch)["logits"], batch["labels"], reduction="none")


def hidden_from_dict(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch)["hidden_states"][1].square().mean(1)


VECTORS = _vectors()
DICTS = {"train": dict(zip(("inputs", "labels"), VECTORS["train"], strict=True))}
WHOLE = -(-50 // 7)
BY_CLASS = sum(-(-count // 7) for count in VECTORS["train"][1].bincount().tolist())
BY_SIGN = sum(
    -(-count // 7) for count in (VECTORS["train"][0][:, 0] > 0).long().bincount().tolist()
)
SHARED: dict[str, tuple[Any, dict[str, Loss], int, int]] = {
    # data, losses, forward and backward passes of one evaluation
    "a function with and without groups": (
        VECTORS,
        {"whole": Loss(F.cross_entropy), "grouped": Loss(F.cross_entropy, group_by=by_class)},
        BY_CLASS,
        BY_CLASS,
    ),
    "two functions": (
        VECTORS,
        {"whole": Loss(F.cross_entropy), "distance": Loss(one_hot_distance)},
        WHOLE,
        2 * WHOLE,
    ),
    "two functions, one with groups": (
        VECTORS,
        {"grouped": Loss(F.cross_entropy, group_by=by_class), "distance": Loss(one_hot_distance)},
        BY_CLASS,
        2 * BY_CLASS,
    ),
    "two calls": (
        VECTORS,
        {"one": Loss(call=first_logit), "two": Loss(call=second_logit)},
        2 * WHOLE,
        2 * WHOLE,
    ),
    "a call and a function": (
        VECTORS,
        {"one": Loss(call=first_logit), "two": Loss(F.cross_entropy)},
        2 * WHOLE,
        2 * WHOLE,
    ),
    "two calls of a dict": (
        DICTS,
        {"one": Loss(call=from_dict), "two": Loss(call=hidden_from_dict)},
        2 * WHOLE,
        2 * WHOLE,
    ),
    "the same groups twice": (
        VECTORS,
        {
            "one": Loss(F.cross_entropy, group_by=by_class),
            "two": Loss(F.cross_entropy, group_by=VECTORS["train"][1]),
        },
        BY_CLASS,
        BY_CLASS,
    ),
    "other groups": (
        VECTORS,
        {
            "one": Loss(F.cross_entropy, group_by=by_class),
            "two": Loss(F.cross_entropy, group_by=by_sign),
        },
        BY_CLASS + BY_SIGN,
        BY_CLASS + BY_SIGN,
    ),
    "two splits": (
        VECTORS,
        {"whole": Loss(F.cross_entropy), "validation": Loss(F.cross_entropy, on="validation")},
        WHOLE + 3,
        WHOLE + 3,
    ),
    "a term": (VECTORS, {"whole": Loss(F.cross_entropy), "l2": Loss(l2=0.1)}, WHOLE, WHOLE),
}


@pytest.mark.parametrize("case", SHARED)
def test_losses_on_the_same_batches_share_forward_passes_and_with_the_same_values_backward_passes(
    case: str,
) -> None:
    data, losses, forward, backward = SHARED[case]
    task = Task(Counting, data, losses)
    settings = {"precision": "float32", "norm_stats": "running", "batch_size": 7}
    objective = build_objective(
        lambda: task, ["all"], ObjectiveSettings(device=torch.device("cpu"), **settings)
    )
    point = {name: each.detach().clone() for name, each in Counting().state_dict().items()}
    objective.settle_batch_sizes(point)
    objective.data.share_batches()
    COUNTED.clear()
    objective.evaluate(point, list(losses))
    assert (COUNTED.count(FORWARD), COUNTED.count(BACKWARD)) == (forward, backward)
    COUNTED.clear()
    objective.evaluate(point, list(losses), gradient=False)
    assert (COUNTED.count(FORWARD), COUNTED.count(BACKWARD)) == (forward, 0)


@pytest.mark.parametrize(
    ("batch_size", "forward", "backward"), [(6, 10, 10), (60, 2, 11)], ids=["one part", "ten parts"]
)
def test_in_batch_mode_a_loss_and_its_random_parts_share_batches_that_hardly_mix_parts(
    batch_size: int, forward: int, backward: int
) -> None:
    data = {"train": (torch.randn(120, 12), torch.randint(0, 2, (120,)))}
    task = Task(Counting, data, {"loss": Loss(F.cross_entropy, on="train")})
    objective = build_objective(
        lambda: task,
        ["all"],
        ObjectiveSettings(
            device=torch.device("cpu"),
            precision="float32",
            norm_stats="batch",
            batch_size=batch_size,
            subset={"train": "0.5@7"},
        ),
    )
    point = {name: each.detach().clone() for name, each in Counting().state_dict().items()}
    objective.settle_batch_sizes(point)
    objective.data.share_batches()
    hidden = objective.replicates_of("loss")
    assert hidden is not None
    COUNTED.clear()
    objective.evaluate(point, ["loss", hidden])
    assert (COUNTED.count(FORWARD), COUNTED.count(BACKWARD)) == (forward, backward)


# --- none shows in another ------------------------------------------------------------------------


def doubled_in_place(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.mul_(2.0), targets, reduction="none")


def shifted_in_place(model: nn.Module, batch: Batch) -> Tensor:
    outputs = model(batch[0])
    outputs[:, 0] += 1.0
    return F.cross_entropy(outputs, batch[1], reduction="none")


def called_twice(model: nn.Module, batch: Batch) -> Tensor:
    """The second call is on other inputs."""
    return (model(batch[0]) - model(0.5 * batch[0])).square().sum(1)


def activity(model: nn.Module, batch: Batch) -> Tensor:
    """What a hidden layer does, seen by a hook for the time of the call."""
    seen: list[Tensor] = []
    hook = next(model.children()).register_forward_hook(
        lambda module, inputs, outputs: seen.append(outputs)
    )
    try:
        model(batch[0])
    finally:
        hook.remove()
    return seen[0].abs().mean(1)


def without_its_first_bias(model: nn.Module, batch: Batch) -> Tensor:
    """The model changed for the time of the call, as when an adapter is switched off."""
    first = next(model.children())
    bias, first.bias = first.bias, None
    try:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    finally:
        first.bias = bias


BESIDE: dict[str, Loss] = {
    "distance": Loss(one_hot_distance),
    "in place": Loss(doubled_in_place),
    "in place by a call": Loss(call=shifted_in_place),
    "two calls": Loss(call=called_twice),
    "other weights": Loss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))),
    "another split": Loss(F.cross_entropy, on="validation"),
    "a term": Loss(l2=0.01),
    "a hook": Loss(call=activity),
    "another model for a while": Loss(call=without_its_first_bias),
}


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("other", BESIDE)
def test_a_loss_has_the_bits_it_has_alone(lab: Lab, other: str, first: bool) -> None:
    losses = {"whole": Loss(F.cross_entropy), "it": BESIDE[other]}
    order = ["it", "whole"] if first else ["whole", "it"]
    together = replay(lab, "relu_mlp", {name: losses[name] for name in order}, steps="0:2")
    for name, loss in losses.items():
        assert_same_bits(together[name], replay(lab, "relu_mlp", {name: loss}, steps="0:2")[name])


def test_all_of_them_together_have_the_bits_they_have_alone(lab: Lab) -> None:
    losses = {
        name: loss
        for name, loss in BESIDE.items()
        if name not in ("a hook", "another model for a while")
    }
    together = replay(lab, "relu_mlp", losses, steps="0:2")
    for name, loss in losses.items():
        assert_same_bits(together[name], replay(lab, "relu_mlp", {name: loss}, steps="0:2")[name])


@pytest.mark.parametrize(
    ("name", "mode"), [("recomputed", "running"), ("recomputed", "batch"), ("conv_bn", "batch")]
)
def test_losses_of_a_model_that_is_recomputed_or_normalised_have_the_bits_they_have_alone(
    lab: Lab, name: str, mode: str
) -> None:
    """Under activation checkpointing the forward pass runs again in every backward pass."""
    losses = {name: BESIDE[name] for name in ("distance", "in place", "other weights")}
    together = replay(lab, name, losses, norm_stats=mode)
    for each, loss in losses.items():
        assert_same_bits(together[each], replay(lab, name, {each: loss}, norm_stats=mode)[each])


# --- what is pending, what is added ---------------------------------------------------------------

THREE: dict[str, Loss] = {
    "whole": Loss(F.cross_entropy),
    "grouped": Loss(F.cross_entropy, group_by=by_class),
    "distance": Loss(one_hot_distance),
}
PENDING = [("whole",), ("grouped",), ("distance",), ("whole", "distance"), ("whole", "grouped")]


@pytest.fixture(scope="module")
def three(lab: Lab) -> Callable[[str, str], Run]:
    """Three losses, one with groups, whose order the others go along in."""
    made: dict[tuple[str, str], Run] = {}

    def run(name: str, mode: str) -> Run:
        if (name, mode) not in made:
            made[name, mode] = replay(lab, name, THREE, span=2, norm_stats=mode, tolerance=1e-4)
        return made[name, mode]

    return run


@pytest.mark.parametrize("pending", PENDING, ids=" and ".join)
@pytest.mark.parametrize(("name", "mode"), [("kinked", "running"), ("conv_bn", "batch")])
@pytest.mark.parametrize("asked", ["all", "only those"])
def test_a_span_of_some_losses_done_again_has_the_same_bytes(
    lab: Lab,
    three: Callable[[str, str], Run],
    name: str,
    mode: str,
    pending: tuple[str, ...],
    asked: str,
) -> None:
    first = three(name, mode)
    along = "grouped" if mode == "running" else None
    assert [record.along for record in first.manifest.losses.values()] == [along, None, along]
    before, events = contents(first.path / "data.zarr"), list[Any]()
    for loss in pending:
        marker(first.path, loss, 1).unlink()
    settings = {"norm_stats": mode, "tolerance": 1e-4, "out": first.path, "progress": events.append}
    replay_only(lab, name, THREE, ["all"] if asked == "all" else pending, **settings)
    done = [event for event in events if isinstance(event, SpanDone)]
    assert [(event.span, set(event.losses)) for event in done] == [(1, set(pending))]
    assert contents(first.path / "data.zarr") == before


class Heard:
    """A loss function that notes when it is called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        HEARD.append(self.name)
        return F.cross_entropy(outputs, targets, reduction="none")


HEARD: list[str] = []
ADDED = {
    "on the same batches": Loss(one_hot_distance),
    "with groups": Loss(one_hot_distance, group_by=by_class),
    "a term": Loss(l2=0.1),
}


@pytest.mark.parametrize("added", ADDED)
def test_a_loss_added_to_a_finished_run_disturbs_nothing_and_costs_what_it_costs(
    lab: Lab, added: str
) -> None:
    losses = {"old": Loss(Heard("old")), "old groups": Loss(Heard("old"), group_by=by_sign)}
    first = replay(lab, "relu_mlp", losses, span=2)
    before = contents(first.path)
    keys = [record.key for record in first.manifest.losses.values()]
    HEARD.clear()
    events: list[Any] = []
    settings = {"out": first.path, "progress": events.append}
    again = replay_only(lab, "relu_mlp", {**losses, "new": ADDED[added]}, ["new"], **settings)
    assert HEARD == []
    done = [event for event in events if isinstance(event, SpanDone)]
    assert {tuple(event.losses) for event in done} == {("new",)}
    alone = replay(lab, "relu_mlp", {"new": ADDED[added]}, span=2)
    costs = [[marker["evaluations"] for marker in each["new"].markers] for each in (again, alone)]
    assert costs[0] == costs[1]
    assert_same_bits(again["new"], alone["new"])
    after = contents(first.path)
    ours = [f"{part}/{key}" for part in ("data.zarr", "commits") for key in keys]
    kept = {
        name: data
        for name, data in before.items()
        if any(name.startswith(f"{place}/") for place in ours)
    }
    assert len(kept) > 50
    assert {name: after[name] for name in kept} == kept
    assert {name.split("/")[1] for name in after if name not in before} == {"new"}


def test_a_loss_on_a_split_the_recorded_subset_does_not_name_can_be_added(lab: Lab) -> None:
    """The subset of a run is the run's; it does not have to be about every loss that is added or
    taken up again.
    """
    losses = {"train": Loss(F.cross_entropy), "validation": Loss(F.cross_entropy, on="validation")}
    first = replay_only(lab, "smooth_mlp", losses, ["validation"], subset=["validation=0:5"])
    again = replay_only(lab, "smooth_mlp", losses, ["train"], out=first.path)
    assert [again[name].record.examples for name in ("validation", "train")] == [5, 50]


def test_losses_of_one_run_are_listed_and_recorded_in_their_order(lab: Lab) -> None:
    run = replay(lab, "relu_mlp", THREE, steps="0:1")
    recorded = json.loads((run.path / "run.json").read_text())["losses"]
    assert list(recorded) == list(THREE) == list(open_run(run.path))
    kinds = replay(
        lab,
        "relu_mlp",
        {"a": Loss(l2=1.0), "b": Loss(term=curved), "c": Loss(call=classes)},
        steps="0:1",
    )
    assert [(record.kind, record.on) for record in kinds.manifest.losses.values()] == [
        ("l2", None),
        ("term", None),
        ("call", "train"),
    ]


# --- terms of the parameters ----------------------------------------------------------------------

DECAY = 0.3


def curved(model: nn.Module) -> Tensor:
    return sum(torch.log1p(each.square()).sum() for each in model.parameters())  # type: ignore[return-value]


def interacting(model: nn.Module) -> Tensor:
    """A product of two tensors' norms: no sum over parameters."""
    first, *_, last = model.parameters()
    return first.norm() * last.square().sum().add(1.0).log()


@pytest.mark.parametrize("name", ["relu_mlp", "frozen_mlp", "conv_bn", "transformer", "odd_shapes"])
def test_the_l2_term_is_allocated_exactly(lab: Lab, name: str) -> None:
    """Simpson's rule is exact for quadratics: ½λ(θ′² − θ²), also of tied tensors once; buffers have
    no part in it.
    """
    results = replay(lab, name, {"l2": Loss(l2=DECAY)}, precision="float64")["l2"]
    checkpoints, found = lab.checkpoints(name), arrays(results.allocation)
    parameters = dict(case_of(name).build().named_parameters())
    for position, tensor in enumerate(results.tensors["tensor"].values):
        squares = np.stack([each[tensor].double().numpy() ** 2 for each in checkpoints])
        wanted = 0.5 * DECAY * np.diff(squares, axis=0) * (tensor in parameters)
        assert found[tensor] == pytest.approx(wanted, rel=1e-6, abs=1e-12), tensor
        sums = results.tensors["allocated"].values[:, position]
        assert sums == pytest.approx(
            wanted.reshape(len(wanted), -1).sum(1), rel=1e-12, abs=1e-13
        ), tensor
    values = [
        0.5 * DECAY * sum(float(each[tensor].double().square().sum()) for tensor in parameters)
        for each in checkpoints
    ]
    steps = results.steps
    assert [*steps["loss_start"].values, steps["loss_end"].values[-1]] == pytest.approx(
        values, rel=1e-12
    )
    assert np.abs(steps["residual"].values).max() <= 1e-12 * max(values)
    assert set(steps["weight"].values) == {1.0}


@pytest.mark.parametrize("term", [curved, interacting])
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("float64", 1e-6)])
def test_a_term_agrees_with_the_oracle(
    lab: Lab, term: Callable[..., Tensor], precision: str, bound: float
) -> None:
    case = CASES["smooth_mlp"]
    judge = Oracle(
        case.build, VECTORS["train"], lambda model, batch: term(model).expand(len(batch[0]))
    )
    truth = judge.allocate(lab.checkpoints("smooth_mlp"), *oracle.RULES["simpson"])
    results = replay(lab, "smooth_mlp", {"term": Loss(term=term)}, precision=precision)["term"]
    wanted = {name: each.numpy() for name, each in truth.stacked().items()}
    assert worst_error(arrays(results.allocation), wanted) <= bound
    losses = [*results.steps["loss_start"].values, results.steps["loss_end"].values[-1]]
    assert losses == pytest.approx(truth.losses, rel=1e-6)
    change = (results.steps["loss_end"] - results.steps["loss_start"]).values
    gap = (
        results.tensors["allocated"].sum("tensor").values
        + results.steps["residual"].values
        - change
    )
    assert np.abs(gap).max() <= 1e-12


def regularised(model: nn.Module, batch: Batch) -> Tensor:
    penalty = 0.5 * DECAY * torch.stack([each.square().sum() for each in model.parameters()]).sum()
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") + penalty


@pytest.mark.parametrize("rule", ["simpson", "trapezoid", "left", "midpoint", "gauss-3"])
def test_a_loss_and_a_term_are_together_the_loss_that_holds_both(lab: Lab, rule: str) -> None:
    losses = {"data": Loss(F.cross_entropy), "l2": Loss(l2=DECAY), "both": Loss(call=regularised)}
    run = replay(lab, "conv_bn", losses, precision="float64", rule=rule)
    data, l2, both = (arrays(run[name].allocation) for name in losses)
    everything = sum(float(np.abs(each, dtype=np.float64).sum()) for each in both.values())
    assert (
        sum(float(np.abs(data[name] + l2[name] - both[name]).sum()) for name in both)
        <= 1e-6 * everything
    )
    for field in ("loss_start", "loss_end", "residual"):
        parts = run["data"].steps[field].values + run["l2"].steps[field].values
        assert parts == pytest.approx(run["both"].steps[field].values, rel=1e-12, abs=1e-13)


def test_a_term_needs_no_pass_over_data(lab: Lab) -> None:
    def never() -> nn.Module:
        model = case_of("relu_mlp").build()
        model.register_forward_pre_hook(lambda module, inputs: pytest.fail("the model was called"))
        return model

    losses = {"data": Loss(F.cross_entropy), "l2": Loss(l2=DECAY)}
    replayed = replay_only(lab, "relu_mlp", losses, ["l2"], build=never)
    record = replayed["l2"].record
    assert (record.on, record.examples, record.groups) == (None, 0, None)
    assert replayed["l2"].complete


def test_a_term_says_nothing_of_buffers_it_has_no_business_with(lab: Lab) -> None:
    """The note is for statistics the losses of a network turn out not to depend on."""
    heard: list[Any] = []
    replay(
        lab,
        "conv_bn",
        {"train": Loss(F.cross_entropy), "l2": Loss(l2=DECAY)},
        progress=heard.append,
    )
    assert [
        event.text for event in heard if isinstance(event, Note) and "tensors moved" in event.text
    ] == []


def test_a_term_alone_of_a_lazily_built_model_is_that_of_the_built_one(lab: Lab) -> None:
    def lazy() -> nn.Module:
        built = case_of("relu_mlp").build()
        built[0], built[3], built[6] = (nn.LazyLinear(width) for width in (16, 8, 4))
        return built

    losses = {"l2": Loss(l2=DECAY), "train": Loss(F.cross_entropy)}
    found = replay_only(lab, "relu_mlp", losses, ["l2"], build=lazy)
    assert_same_bits(found["l2"], replay_only(lab, "relu_mlp", losses, ["l2"])["l2"])


TERMS_REFUSED = {
    "a vector": (
        lambda model: model[0].bias,
        "the term of loss 'it' returned a tensor of shape [16]; one floating-point number",
    ),
    "a number": (
        lambda model: 1.0,
        "the term of loss 'it' returned float; one floating-point number",
    ),
    "an integer": (
        lambda model: torch.tensor(1),
        "the term of loss 'it' returned a tensor of shape []",
    ),
    "nothing": (lambda model: None, "the term of loss 'it' returned NoneType"),
    "a failing function": (
        lambda model: model.nothing,
        "failed in a term of the parameters; AttributeError",
    ),
    "another shape": (
        lambda model: model(torch.ones(1, 5)).sum(),
        "failed in a term of the parameters; RuntimeError",
    ),
    "noise": (lambda model: torch.rand(()) + model[0].bias.sum(), "'it' is not deterministic"),
    "not finite": (
        lambda model: torch.log(-model[0].bias.square().sum()),
        "'it' is nan at the first checkpoint",
    ),
}


@pytest.mark.parametrize("case", TERMS_REFUSED)
def test_a_term_that_is_none_is_refused_before_anything_is_written(lab: Lab, case: str) -> None:
    term, words = TERMS_REFUSED[case]
    says(raised(lab, "relu_mlp", {"it": Loss(term=term)}), *words.split("; "))


STATED_WRONGLY: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "Loss takes one of"),
    "two things": ({"fn": F.cross_entropy, "l2": 0.1}, "Loss takes one of"),
    "a function and a call": ({"fn": F.cross_entropy, "call": classes}, "Loss takes one of"),
    "a term and l2": ({"term": curved, "l2": 0.1}, "Loss takes one of"),
    "nothing to call": ({"fn": "cross_entropy"}, "Loss needs something to call, got str"),
    "a term that is no function": ({"term": 3.0}, "Loss needs something to call, got float"),
    "l2 of zero": ({"l2": 0.0}, "Loss(l2=…) must be a positive number, got 0.0"),
    "l2 below zero": ({"l2": -1}, "Loss(l2=…) must be a positive number, got -1"),
    "l2 without end": ({"l2": math.inf}, "Loss(l2=…) must be a positive number, got inf"),
    "l2 that is no number": ({"l2": math.nan}, "Loss(l2=…) must be a positive number, got nan"),
    "l2 that is true": ({"l2": True}, "Loss(l2=…) must be a positive number, got True"),
    "l2 in words": ({"l2": "small"}, "Loss(l2=…) must be a positive number, got 'small'"),
    "groups of a term": ({"term": curved, "group_by": by_class}, "no examples to group"),
    "groups of l2": ({"l2": 0.1, "group_by": by_class}, "no examples to group"),
}


@pytest.mark.parametrize("case", STATED_WRONGLY)
def test_a_loss_stated_wrongly_is_refused_where_it_is_stated(case: str) -> None:
    given, words = STATED_WRONGLY[case]
    with pytest.raises(InputError) as caught:
        Loss(**given)
    assert words in str(caught.value)
