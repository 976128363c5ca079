"""Losses that cannot be what was meant, and what is said of those that are not quite what they
seem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Task
from lca_posthoc import run as replay
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import Objective, ObjectiveSettings, build_objective, check_loss
from lca_posthoc.replay.events import Note

from ..helpers.cli import says

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 6, generator=DRAW), torch.randint(3, (40,), generator=DRAW)
CPU = torch.device("cpu")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def objective_of(
    loss: Loss, model: Callable[[], nn.Module] = net, data: Any = (X, Y), **settings: Any
) -> Objective:
    made = build_objective(
        lambda: Task(model=model, data={"train": data}, losses={"the loss": loss}),
        None,
        ObjectiveSettings(
            device=CPU, precision="float32", norm_stats="running", batch_size=None, **settings
        ),
    )
    torch.manual_seed(0)
    start = model()
    made.settle_batch_sizes({**dict(start.named_parameters()), **dict(start.named_buffers())})
    return made


# --- what is handed over instead of a loss, a model or data ---------------------------------------


class Metric:
    """Gathers a figure over batches, as metrics do."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) ** 2

    def update(self, outputs: Tensor, targets: Tensor) -> None: ...

    def compute(self) -> Tensor: ...

    def reset(self) -> None: ...


class Own(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) ** 2


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * outputs


class Widths:
    """A class that is no module, such as one of settings."""


async def later(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs


def one_by_one(outputs: Tensor, targets: Tensor) -> Any:
    yield outputs


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()


NOT_LOSSES = {
    "a class of torch's": (
        lambda: Loss(nn.CrossEntropyLoss),
        "Loss(CrossEntropyLoss) is a class",
        "CrossEntropyLoss()",
    ),
    "an own class": (lambda: Loss(Own), "is a class", "Loss(Own())"),
    "a class as call": (lambda: Loss(call=Own), "is a class", "Loss(call=Own())"),
    "a class as term": (lambda: Loss(term=Own), "is a class", "Loss(term=Own())"),
    "a class of a metric": (lambda: Loss(Metric), "is a class", "Metric()"),
    "a class of an optimiser": (lambda: Loss(torch.optim.SGD), "is a class", "SGD"),
    "an optimiser": (
        lambda: Loss(torch.optim.SGD(net().parameters())),
        "something to call",
        "got SGD",
    ),
    "an autograd function": (lambda: Loss(Doubled), "autograd function", "Doubled.apply"),
    "a name": (lambda: Loss("cross_entropy"), "got str", "F.cross_entropy"),
    "a result": (
        lambda: Loss(F.cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())),
        "a tensor of shape []",
    ),
    "a metric": (lambda: Loss(Metric()), "a metric, Metric", "over batches"),
    "an async function": (lambda: Loss(later), "async function", "coroutine"),
    "a partial of one": (lambda: Loss(functools.partial(later)), "async function"),
    "a generator": (lambda: Loss(call=one_by_one), "generator function", "yield"),
    "one argument": (
        lambda: Loss(lambda outputs: outputs),
        "fn(outputs, targets)",
        "takes (outputs)",
    ),
    "a call of three": (
        lambda: Loss(call=lambda model, x, y: x),
        "fn(model, batch)",
        "takes (model, x, y)",
    ),
    "a term of two": (
        lambda: Loss(term=lambda model, batch: 0),
        "fn(model)",
        "takes (model, batch)",
    ),
    "outputs and targets as call": (
        lambda: Loss(call=F.cross_entropy),
        "outputs and targets",
        "Loss(cross_entropy)",
    ),
    "a loss module as call": (lambda: Loss(call=nn.MSELoss()), "outputs and targets"),
    "a partial of it": (
        lambda: Loss(call=functools.partial(F.mse_loss, reduction="sum")),
        "outputs and targets",
    ),
    "a class as labels": (
        lambda: Loss(F.cross_entropy, group_by=Widths),
        "group_by=Widths",
        "is a class",
    ),
    "a generator of labels": (
        lambda: Loss(F.cross_entropy, group_by=one_by_one),
        "generator function",
    ),
    "data as the split": (lambda: Loss(F.mse_loss, on=(X, Y)), "name of a split", "tuple"),
}


@pytest.mark.parametrize("case", NOT_LOSSES)
def test_what_is_no_loss_is_named_as_what_it_is(case: str) -> None:
    make, *words = NOT_LOSSES[case]
    with pytest.raises(InputError) as caught:
        make()
    assert [word for word in words if word not in str(caught.value)] == []


LOSSES = {"train": Loss(F.cross_entropy)}
NOT_TASKS = {
    "an instance": ({"model": net()}, "factory", "model=Net"),
    "a class that is no module": ({"model": Widths}, "not an nn.Module"),
    "a class that takes arguments": ({"model": Wide}, "takes (width)", "lambda: Wide(…)"),
    "an async factory": ({"model": later}, "async function"),
    "a class of data": (
        {"data": {"train": torch.utils.data.TensorDataset}},
        "'train' is the class",
        "TensorDataset(…)",
    ),
    "a loader class": ({"data": {"train": torch.utils.data.DataLoader}}, "is the class DataLoader"),
    "a function of data": ({"data": {"train": net}}, "is the function net", "net(…)"),
}


@pytest.mark.parametrize("case", NOT_TASKS)
def test_what_is_no_model_or_data_is_named_as_what_it_is(case: str) -> None:
    given, *words = NOT_TASKS[case]
    with pytest.raises(InputError) as caught:
        Task(**{"model": net, "data": {"train": (X, Y)}, "losses": LOSSES, **given})
    message = str(caught.value).replace("Task.data['train']", "'train'")
    assert [word for word in words if word not in message] == []


class Values:
    """A class that is used as a function: calling it gives what `__new__` computes."""

    def __new__(cls, outputs: Tensor, targets: Tensor) -> Any:
        return F.cross_entropy(outputs, targets, reduction="none")


class Called:
    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    def method(self, outputs: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self(outputs, targets)


def with_batch(function: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(outputs: Tensor, targets: Tensor) -> Tensor:
        return function((outputs, targets))

    return wrapped


@with_batch
def of_a_pair(pair: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(*pair, reduction="none")


@pytest.mark.parametrize(
    "given",
    [
        F.cross_entropy,
        functools.partial(F.cross_entropy, label_smoothing=0.0),
        nn.CrossEntropyLoss(),
        Values,
        Called(),
        Called().method,
        functools.partial(Called().method, scale=1.0),
        of_a_pair,
        lambda *both: F.cross_entropy(*both, reduction="none"),
    ],
)
def test_every_callable_of_outputs_and_targets_is_a_loss(given: Any) -> None:
    objective = objective_of(Loss(given))
    point = {name: tensor.detach().clone() for name, tensor in objective.model.named_parameters()}
    found = objective.evaluate(point, ["the loss"])["the loss"].loss
    with torch.no_grad():
        assert found == pytest.approx(float(F.cross_entropy(objective.model(X), Y)), rel=1e-6)


def test_a_call_of_outputs_and_targets_says_what_it_would_be_as(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"called as fn\(model, batch\); for a function of outputs and "
        r"targets",
    ):
        check_loss(
            objective_of(Loss(call=lambda outputs, targets: (outputs - targets) ** 2)), "the loss"
        )


# --- losses no gradient reaches -------------------------------------------------------------------


def _values(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _item_by_item(model: nn.Module, batch: Any) -> Tensor:
    return torch.tensor([value.item() for value in _values(model, batch)])


def _by_numpy(model: nn.Module, batch: Any) -> Tensor:
    return torch.from_numpy(_values(model, batch).detach().numpy() * 2)


def _pretended(model: nn.Module, batch: Any) -> Tensor:
    return _values(model, batch).detach().requires_grad_()


class Inferring(nn.Module):
    """A model whose own forward is in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


WITHOUT_GRADIENT = {
    "no_grad": torch.no_grad()(_values),
    "inference_mode": torch.inference_mode()(_values),
    "accuracy": lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float(),
    "rounded": lambda model, batch: model(batch[0]).long().sum(1).double(),
    "item": _item_by_item,
    "numpy": _by_numpy,
    "data": lambda model, batch: _values(model, batch).data,
    "a leaf of its own": _pretended,
    "weights": lambda model, batch: (_values(model, batch).detach(), batch[1] > 0),
    "not of the model": lambda model, batch: batch[0].sum(1),
}


@pytest.mark.parametrize("case", WITHOUT_GRADIENT)
def test_a_loss_without_a_gradient_is_refused(case: str) -> None:
    objective = objective_of(Loss(call=WITHOUT_GRADIENT[case]))
    with pytest.raises(
        InputError,
        match=r"loss 'the loss' on split 'train' has no "
        r"gradient.*no_grad\(\)",
    ):
        check_loss(objective, "the loss")


@pytest.mark.parametrize(
    ("loss", "model"),
    [
        (Loss(F.cross_entropy), Inferring),
        (Loss(term=lambda model: model[0].weight.detach().square().sum()), net),
    ],
)
def test_models_and_terms_without_a_gradient_are_refused(
    loss: Loss, model: Callable[[], nn.Module]
) -> None:
    with pytest.raises(InputError, match=r"loss 'the loss'.* has no gradient"):
        check_loss(objective_of(loss, model), "the loss")


def test_a_loss_of_frozen_tensors_alone_is_refused() -> None:
    objective = objective_of(
        Loss(F.cross_entropy), lambda: net().requires_grad_(False), stored=frozenset()
    )
    with pytest.raises(InputError, match="frozen or fixed"):
        check_loss(objective, "the loss")


def _sometimes(model: nn.Module, batch: Any) -> Tensor:
    """Values of examples of one class; a batch without any never calls the model, as a detector
    without boxes does not.
    """
    chosen = batch[1] == 2
    return _values(model, batch) * chosen if bool(chosen.any()) else torch.zeros(len(batch[1]))


def _dead(model: nn.Module, batch: Any) -> Tensor:
    return F.relu(model(batch[0]).sum(1) - 1e3)


@pytest.mark.parametrize(("values", "size"), [(_sometimes, 600), (_dead, 40)])
def test_a_gradient_that_is_zero_or_elsewhere_is_no_reason_to_refuse(
    values: Any, size: int
) -> None:
    x, y = (
        torch.randn(size, 6, generator=torch.Generator().manual_seed(1)),
        torch.zeros(size).long(),
    )
    y[-1] = 2
    assert check_loss(objective_of(Loss(call=values), data=(x, y)), "the loss") == []


# --- losses with parameters of their own ----------------------------------------------------------


class Centres(nn.Module):
    def __init__(self, *, trained: bool = True) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.eye(3), requires_grad=trained)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs @ self.centres * self.scale, targets, reduction="none")


CENTRES, FROZEN = Centres(), Centres(trained=False)
BARE = nn.Parameter(torch.ones(3))


def _with(inner: nn.Module) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: inner(model(batch[0]), batch[1])


def _teacher(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        wanted = CENTRES(batch[0][:, :3], batch[1])
    return (_values(model, batch) - wanted) ** 2


OWN_PARAMETERS = {
    "a module": (Loss(Centres()), "'centres'"),
    "a method": (Loss(Centres().forward), "'centres'"),
    "a closure": (Loss(call=_with(Centres())), "'centres'"),
    "a global": (Loss(call=lambda model, batch: CENTRES(model(batch[0]), batch[1])), "'centres'"),
    "a partial": (Loss(call=functools.partial(lambda model, batch, inner: inner(model(batch[0]), batch[1]), inner=CENTRES)), "'centres'"),
    "no module": (Loss(call=lambda model, batch: _values(model, batch) * BARE.sum()), "one of shape [3]"),
    "frozen": (Loss(Centres(trained=False)), None),
    "frozen in a closure": (Loss(call=_with(FROZEN)), None),
    "a teacher": (Loss(call=_teacher), None),
    "class weights": (Loss(nn.CrossEntropyLoss(weight=torch.ones(3))), None),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN_PARAMETERS)
def test_parameters_of_a_loss_are_named(case: str) -> None:
    loss, named = OWN_PARAMETERS[case]
    notes = check_loss(objective_of(loss), "the loss")
    if named is None:
        assert notes == []
    else:
        (note,) = notes
        assert f"loss 'the loss' has parameters of its own, {named}, which no checkpoint" in note


# --- autocast inside ------------------------------------------------------------------------------


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        with torch.amp.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).float()


def _within(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return _values(model, batch)


def _switched(model: nn.Module, batch: Any) -> Tensor:
    torch.set_autocast_enabled("cpu", True)
    try:
        return _values(model, batch)
    finally:
        torch.set_autocast_enabled("cpu", False)


def _disabled(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        return _values(model, batch)


AUTOCAST = {
    "a context": (Loss(call=_within), net, True),
    "a decorator": (Loss(call=torch.autocast("cpu", dtype=torch.bfloat16)(_values)), net, True),
    "half": (Loss(call=torch.amp.autocast("cpu", dtype=torch.float16)(_values)), net, True),
    "the model's forward": (Loss(F.cross_entropy), Casting, True),
    "a switch": (Loss(call=_switched), net, True),
    "not enabled": (Loss(call=_disabled), net, False),
}


@pytest.mark.parametrize("case", AUTOCAST)
def test_autocast_inside_a_loss_is_said(case: str) -> None:
    loss, model, casts = AUTOCAST[case]
    notes = check_loss(objective_of(loss, model), "the loss")
    assert len(notes) == casts
    assert all("loss 'the loss'" in note and "enables autocast to" in note for note in notes)
    assert not torch.is_autocast_enabled("cpu")


def record(
    directory: Path, model: nn.Module, loss: Callable[[nn.Module], Tensor], after: Any = None
) -> Path:
    optimizer = torch.optim.SGD(
        [each for each in model.parameters() if each.requires_grad], lr=0.3, momentum=0.9
    )
    with Recorder(directory, model) as recorder:
        recorder.attach(optimizer)
        for step in range(4):
            optimizer.zero_grad()
            loss(model.train()).backward()
            optimizer.step()
            if after is not None:
                after(step)
    return directory


def replayed(directory: Path, out: Path, task: Task, **settings: Any) -> tuple[Any, list[str]]:
    heard: list[Any] = []
    made = replay(directory, task, out=out, cluster="inline", progress=heard.append, **settings)
    return made, [event.text for event in heard if isinstance(event, Note)]


def test_the_measured_error_of_a_loss_under_autocast_is_that_of_autocast(tmp_path: Path) -> None:
    torch.manual_seed(0)
    directory = record(tmp_path / "iterates", net(), lambda model: F.cross_entropy(model(X), Y))
    losses = {"cast": Loss(call=_within), "plain": Loss(call=_values)}
    task = Task(model=net, data={"train": (X, Y)}, losses=losses)
    made, notes = replayed(
        directory, tmp_path / "run", task, losses=["all"], rule="left", precision_check="full"
    )
    assert [note for note in notes if "autocast to bfloat16" in note and "'cast'" in note] == notes
    measured = float(made["cast"].steps.precision_error.values[0])
    cast, plain = (
        torch.cat(
            [
                torch.tensor(made[name].allocation[key].values[0]).double().flatten()
                for key in made["plain"].allocation
            ]
        )
        for name in ("cast", "plain")
    )
    assert measured == pytest.approx(
        float((cast - plain).abs().sum() / plain.abs().sum()), rel=1e-3
    )
    assert measured > 1e-3


# --- tensors that move without a gradient ---------------------------------------------------------


class Agent(nn.Module):
    """A network, a copy of it that a loss reads under no_grad, and a part no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.target, self.idle = net(), net(), nn.Linear(2, 2)


def _temporal(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        wanted = model.target(batch[0]).max(1).values
    return (model.q(batch[0]).gather(1, batch[1][:, None])[:, 0] - wanted) ** 2


def test_tensors_without_a_gradient_are_told_apart_by_whether_the_loss_depends_on_them(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    agent = Agent()

    def synchronise(step: int) -> None:
        agent.target.load_state_dict(agent.q.state_dict())
        with torch.no_grad():
            agent.idle.weight.add_(1.0)

    directory = record(
        tmp_path / "iterates", agent, lambda model: _temporal(model, (X, Y)).mean(), synchronise
    )
    task = Task(model=Agent, data={"train": (X, Y)}, losses={"td": Loss(call=_temporal)})
    made, notes = replayed(directory, tmp_path / "run", task, tolerance=float("inf"))
    unused, hidden = notes
    assert unused == "tensors moved without loss 'td' depending on them (allocated 0): idle.weight"
    assert (
        "loss 'td' depends on some tensors that moved through detach() or no_grad() alone" in hidden
    )
    assert (
        "target.0.bias, target.0.weight, target.2.bias, target.2.weight. Their share is in the "
        "residual" in hidden
    )
    assert not made["td"].allocation["target.0.weight"].values.any()


# --- running statistics nobody updated ------------------------------------------------------------


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def _frozen_statistics(model: nn.Module) -> Tensor:
    model[1].eval()
    return F.cross_entropy(model(X), Y)


STATISTICS = {
    "stored, never updated": (_frozen_statistics, (), "running", True),
    "updated": (lambda model: F.cross_entropy(model(X), Y), (), "running", False),
    "fixed": (
        lambda model: F.cross_entropy(model(X), Y),
        ("*.running_*", "*.num_batches_tracked"),
        "running",
        True,
    ),
    "not used": (_frozen_statistics, (), "batch", False),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_running_statistics_of_a_new_model_are_said(case: str, tmp_path: Path) -> None:
    loss, fixed, norm_stats, said = STATISTICS[case]
    torch.manual_seed(0)
    model = normalised()
    with Recorder(tmp_path / "iterates", model) as recorder:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for step in range(4):
            if fixed:  # what is recorded agrees with what the task fixes
                model[1].reset_running_stats()
            recorder.save(step)
            optimizer.zero_grad()
            loss(model.train()).backward()
            optimizer.step()
    task = Task(
        model=normalised,
        data={"train": (X, Y)},
        losses={"train": Loss(F.cross_entropy)},
        fixed=fixed,
    )
    batch_size = 20 if norm_stats == "batch" else None
    settings = {"norm_stats": norm_stats, "batch_size": batch_size, "tolerance": float("inf")}
    notes = replayed(tmp_path / "iterates", tmp_path / "run", task, **settings)[1]
    # which compares the two modes
    notes = [note for note in notes if "--norm-stats recalibrated" not in note]
    assert [note for note in notes if "running statistics are still 0 and 1" in note] == notes
    assert len(notes) == said
    assert all(
        "'1.running_mean', '1.running_var'" in note and "--norm-stats batch" in note
        for note in notes
    )


# --- what a function was given, where it fails ----------------------------------------------------


def keras_order(y_true: Tensor, y_pred: Tensor) -> Tensor:
    return F.cross_entropy(y_pred, y_true, reduction="none")


class Keyed(nn.Module):
    """Gives a dict, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(inputs)}


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(4, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embed(tokens).mean(1))


OUTPUTS, CODES = (
    "outputs, what the model returned, is a float32 tensor of shape [2, 3]",
    "an int64 tensor of shape [2]",
)
FAILING: dict[str, tuple[Loss, Callable[[], nn.Module], Any, tuple[str, ...]]] = {
    "the other order": (
        Loss(keras_order),
        net,
        (X, Y),
        (
            "keras_order(outputs, targets)",
            OUTPUTS,
            f"targets, the second part of a batch, is {CODES}",
            "Loss(lambda outputs, targets: keras_order(targets, outputs))",
        ),
    ),
    "targets first in the data": (
        Loss(F.cross_entropy),
        net,
        (Y, X),
        ("model(inputs)", f"inputs, the first part of a batch, is {CODES}"),
    ),
    "float classes": (
        Loss(F.cross_entropy),
        net,
        (X, Y.float()),
        (
            "cross_entropy(outputs, targets)",
            OUTPUTS,
            "targets, the second part of a batch, is a float32 tensor of shape [2]",
        ),
    ),
    "columns of classes": (
        Loss(F.nll_loss),
        net,
        (X, Y[:, None]),
        ("nll_loss(outputs, targets)", OUTPUTS, "is an int64 tensor of shape [2, 1]"),
    ),
    "integer targets of a regression": (
        Loss(nn.BCEWithLogitsLoss()),
        net,
        (X, torch.ones(40, 4)),
        ("BCEWithLogitsLoss(outputs, targets)", OUTPUTS, "is a float32 tensor of shape [2, 4]"),
    ),
    "outputs in a dict": (
        Loss(F.cross_entropy),
        Keyed,
        (X, Y),
        ("a dict with 'logits'", CODES, "TypeError: "),
    ),
    "float tokens": (
        Loss(F.cross_entropy),
        Tokens,
        (X, Y),
        ("model(inputs)", "a float32 tensor of shape [2, 6]"),
    ),
    "a partial": (
        Loss(functools.partial(keras_order)),
        net,
        (X, Y),
        ("fn(outputs, targets)", "fn(targets, outputs)"),
    ),
}


@pytest.mark.parametrize("what", FAILING)
def test_a_function_that_fails_says_what_it_was_given(what: str) -> None:
    loss, model, data, words = FAILING[what]
    with pytest.raises(InputError) as caught:
        objective_of(loss, model, data)
    says(str(caught.value), "failed on split 'train': ", *words)
    assert str(caught.value.__cause__) in str(caught.value)  # torch's own words


PLAIN: dict[str, tuple[Loss, tuple[str, ...]]] = {
    "item": (
        Loss(call=lambda model, batch: model(batch[0]).mean().item()),
        ("returned a float", "without .item()"),
    ),
    "float": (
        Loss(lambda outputs, targets: float(outputs.detach().mean())),
        ("returned a float", "one value per element"),
    ),
    "numpy": (
        Loss(call=lambda model, batch: model(batch[0]).mean().detach().numpy()[()]),
        ("returned a float32", "the tensor itself"),
    ),
    "a count": (
        Loss(lambda outputs, targets: int((outputs.argmax(1) == targets).sum())),
        ("returned an int", ".item()"),
    ),
    "classes": (
        Loss(call=lambda model, batch: model(batch[0]).argmax(1)),
        ("returned an int64 tensor of shape [2]",),
    ),
    "nothing": (Loss(lambda outputs, targets: None), ("returned None",)),
}


@pytest.mark.parametrize("what", PLAIN)
def test_what_is_returned_instead_of_a_tensor_is_named(what: str) -> None:
    loss, words = PLAIN[what]
    with pytest.raises(InputError) as caught:
        objective_of(loss)
    says(str(caught.value), "the loss", *words, "not a tensor of floating-point values")
