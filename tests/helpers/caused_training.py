"""A small training that works out by itself what moved the weights at every step.

Nothing of the package tells it: at each step it takes the optimiser's own state before the step and
the gradient the optimiser is given, computes the gradient of the whole training loss in float64,
and writes each cause's displacement down as the documentation of `torch.optim` has the step.
Iterates and records are the recorder's.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Task

from .oracle import RULES, Oracle, simpson

CAUSES = ("signal", "noise", "momentum", "decay", "rest")
CLASSES = 4
Batch = tuple[Tensor, Tensor]


class Network(nn.Module):
    """A convolution, a layer norm and two linear layers, smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3)
        self.norm = nn.LayerNorm(48)
        self.hidden = nn.Linear(48, 6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (examples, classes)."""
        features = F.gelu(self.convolution(inputs)).flatten(1)
        return self.out(torch.tanh(self.hidden(self.norm(features))))


class Branching(nn.Module):
    """A network with a layer for inputs whose first number is positive alone, so that some batches
    give it no gradient; another layer is frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(36, 8)
        self.branch = nn.Linear(8, 8)
        self.out = nn.Linear(8, CLASSES)
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (examples, classes)."""
        features = torch.tanh(self.frozen(inputs.flatten(1)))
        goes = inputs[:, 0, 0, 0] > 0
        if goes.any():
            features = features + goes[:, None] * torch.tanh(self.branch(features))
        return self.out(features)


class Normalised(nn.Module):
    """A network with running statistics, which move by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(36, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (examples, classes)."""
        return self.out(torch.tanh(self.norm(self.hidden(inputs.flatten(1)))))


@functools.cache
def splits() -> dict[str, Batch]:
    """The training and the validation data."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(64, 1, 6, 6, generator=generator)
    targets = torch.randint(0, CLASSES, (64,), generator=generator)
    inputs = inputs + targets[:, None, None, None] * torch.linspace(-0.5, 0.5, 6)
    return {"train": (inputs[:48], targets[:48]), "validation": (inputs[48:], targets[48:])}


def labels(inputs: Tensor, targets: Tensor) -> Tensor:
    """The class of each example."""
    return targets


def task(model: Callable[[], nn.Module] = Network) -> Task:
    """The task the training's iterates are replayed with."""
    return Task(
        model,
        dict(splits()),
        {
            "train": Loss(F.cross_entropy),
            "validation": Loss(F.cross_entropy, on="validation"),
            "classes": Loss(F.cross_entropy, group_by=labels),
            "examples": Loss(F.cross_entropy, per="example"),
            "weights": Loss(l2=1e-2),
        },
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a training.

    Args:
        optimizer: makes it for a model.
        second: makes another one that takes its steps with the first; None for none.
        model: makes the model.
        batch_statistics: whether the full gradient, and every loss, is one of the statistics of the
            whole data; else of running statistics.
        rates: multiplies the first learning rate, by steps from 0 on.
        clip: the norm to which gradients are clipped through the recorder; None for none.
        unnoted_clip: the same, of which the recorder is not told.
        micro_batches: whose gradients are added up before a step.
        between: changes the model before each step, once the iterate before is saved.
        steps: of the optimiser, those that are not made included.
        unrecorded: of these, before recording begins.
        overflows: those whose gradient is infinite, so that a gradient scaler skips them.
        by_hand: whether the loop saves each iterate, those after skipped steps too; else the
            recorder is attached.
        save: as the recorder has it.
        every: which iterates are saved.
        skips_branch: whether every third step has only examples that a `Branching` network's branch
            is not for.
    """

    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    second: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    batch_statistics: bool = False
    model: Callable[[], nn.Module] = Network
    rates: Callable[[int], float] = lambda step: 1.0
    clip: float | None = None
    unnoted_clip: float | None = None
    micro_batches: int = 1
    between: Callable[[nn.Module], None] | None = None
    steps: int = 6
    unrecorded: int = 0
    overflows: tuple[int, ...] = ()
    by_hand: bool = False
    save: Literal["scalars", "moments"] = "scalars"
    every: int = 1
    skips_branch: bool = False

    def record(self, directory: Path) -> Recorded:
        """Train and record."""
        return _Loop(self, directory).train()


@dataclass(frozen=True)
class Recorded:
    """A training that was recorded.

    Args:
        training: its settings.
        directory: where its iterates are.
        displacements: of every step, by cause and tensor, float64; without *rest*.
    """

    training: Training
    directory: Path
    displacements: list[dict[str, dict[str, Tensor]]] = field(default_factory=list)

    @functools.cached_property
    def iterates(self) -> list[dict[str, Tensor]]:
        """Every iterate as it was saved."""
        return [load_file(path) for path in sorted(self.directory.glob("*.safetensors"))]

    def motion(self, segment: int) -> dict[str, dict[str, Tensor]]:
        """Return the displacement of every cause on a segment, *rest* too."""
        start, end = self.iterates[segment], self.iterates[segment + 1]
        causes = {cause: dict(self.displacements[segment].get(cause, {})) for cause in CAUSES}
        for name in start:
            if start[name].is_floating_point():
                rest = end[name].double() - start[name].double()
                for cause in CAUSES[:-1]:
                    rest = rest - causes[cause].setdefault(name, torch.zeros_like(rest))
                causes["rest"][name] = rest
        return causes

    def allocated(
        self, loss: str = "train", group: int | None = None, rule: str | int = "simpson"
    ) -> dict[str, np.ndarray]:
        """Return Σ_q w_q ⟨∇L(θ_q), u⟩ of each tensor, (steps, causes), in float64.

        Args:
            loss: over which data.
            group: the class that counts; None for all.
            rule: by name, or the number of intervals of Simpson's.
        """
        nodes, weights = RULES[rule] if isinstance(rule, str) else simpson(rule)
        gradients = self._judge(loss, group).allocate(self.iterates, nodes, weights).gradient
        motions = [self.motion(segment) for segment in range(len(gradients))]
        return {
            name: np.array(
                [
                    [float((motion[cause][name] * gradient[name]).sum()) for cause in CAUSES]
                    for motion, gradient in zip(motions, gradients, strict=True)
                ]
            )
            for name in gradients[0]
        }

    def _judge(self, loss: str, group: int | None) -> Oracle:
        inputs, targets = splits()["validation" if loss == "validation" else "train"]
        chosen = slice(None) if group is None else targets == group
        norm_stats = "batch" if self.training.batch_statistics else "running"
        return Oracle(
            self.training.model,
            (inputs[chosen], targets[chosen]),
            values_of,
            norm_stats=norm_stats,
        )


def values_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The loss of every example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class _Loop:
    """The training loop."""

    def __init__(self, training: Training, directory: Path) -> None:
        torch.manual_seed(11)
        self.training, self.recorded = training, Recorded(training, directory)
        self.model = training.model().train()
        kinds = [training.optimizer, *([training.second] if training.second else [])]
        self.optimizers = [kind(self.model) for kind in kinds]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=bool(training.overflows))
        self.order = torch.Generator().manual_seed(5)
        self.groups = [group for kind in self.optimizers for group in kind.param_groups]
        self.first_rates = [group["lr"] for group in self.groups]

    def train(self) -> Recorded:
        """Make every step."""
        training = self.training
        with Recorder(self.recorded.directory, self.model, every=training.every) as recorder:
            for step in range(training.steps):
                if step == training.unrecorded:
                    follow = recorder.follow if training.by_hand else recorder.attach
                    follow(*self.optimizers, save=training.save, step=step)
                if training.by_hand:
                    recorder.save(step)
                self._step(step, recorder)
            if training.by_hand:
                recorder.save(training.steps)
        return self.recorded

    def _step(self, step: int, recorder: Recorder) -> None:
        training, model = self.training, self.model
        for group, rate in zip(self.groups, self.first_rates, strict=True):
            group["lr"] = rate * training.rates(step)
        full = self._full_gradient()
        if training.between is not None:
            training.between(model)
        model.zero_grad()
        for _ in range(training.micro_batches):
            inputs, targets = self._batch(step)
            loss = F.cross_entropy(model(inputs), targets) / training.micro_batches
            self.scaler.scale(loss).backward()
        if step in training.overflows:
            next(model.parameters()).grad.fill_(math.inf)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        factor = 1.0
        if training.clip is not None:
            norm = recorder.clip_grad_norm_(model.parameters(), training.clip)
            factor = min(1.0, training.clip / (float(norm) + 1e-6))
        if training.unnoted_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), training.unnoted_clip)
        if step not in training.overflows:
            self._note(step, self._causes(full, factor))
        elif training.by_hand:
            self._note(step, {})
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def _note(self, step: int, causes: dict[str, dict[str, Tensor]]) -> None:
        if step >= self.training.unrecorded:
            self.recorded.displacements.append(causes)

    def _batch(self, step: int) -> Batch:
        inputs, targets = splits()["train"]
        chosen = torch.randperm(len(inputs), generator=self.order)
        if self.training.skips_branch and step % 3 == 1:
            chosen = chosen[inputs[chosen, 0, 0, 0] <= 0]
        chosen = chosen[:12]
        return inputs[chosen], targets[chosen]

    def _full_gradient(self) -> dict[str, Tensor]:
        """Return the gradient of the mean over the whole training data, in float64, of each
        parameter.
        """
        exact = copy.deepcopy(self.model).double().train(self.training.batch_statistics)
        inputs, targets = splits()["train"]
        parameters = {
            name: parameter
            for name, parameter in exact.named_parameters()
            if parameter.requires_grad
        }
        loss = F.cross_entropy(exact(inputs.double()), targets)
        gradients = torch.autograd.grad(loss, [*parameters.values()])
        return dict(zip(parameters, gradients, strict=True))

    def _causes(self, full: Mapping[str, Tensor], clip: float) -> dict[str, dict[str, Tensor]]:
        causes: dict[str, dict[str, Tensor]] = {cause: {} for cause in CAUSES[:-1]}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        name = names[id(parameter)]
                        parts = displacements(optimizer, group, parameter, clip * full[name])
                        for cause, part in parts.items():
                            causes[cause][name] = part
        return causes


# --- what a step does, from the documentation of torch.optim --------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A parameter before a step, in float64.

    Args:
        group: settings of the optimiser.
        state: what the optimiser remembers of it.
        weights: themselves.
        given: the gradient that the optimiser is given, with its sign turned to maximise.
        full: that of the whole training loss, clipped and turned alike.
    """

    group: Mapping[str, Any]
    state: Mapping[str, Tensor]
    weights: Tensor
    given: Tensor
    full: Tensor

    def remembered(self, name: str) -> Tensor:
        """Return an entry of the state; 0 before the first step."""
        return self.state[name].double() if self.state else torch.zeros_like(self.weights)

    @property
    def is_decoupled(self) -> bool:
        """Tell whether the decay is apart from the gradient."""
        return self.group.get("decoupled_weight_decay", False)

    @property
    def coupled(self) -> Tensor:
        """Return what the decay adds to the gradient."""
        return (0.0 if self.is_decoupled else self.group["weight_decay"]) * self.weights

    @property
    def apart(self) -> Tensor:
        """Return what the decay does apart from the gradient."""
        decay = self.group["weight_decay"] if self.is_decoupled else 0.0
        return -self.group["lr"] * decay * self.weights

    def parts(
        self, scale: Tensor | float, momentum: Tensor, of_full: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """Return the causes of a step by scale times gradient, and by momentum; `of_full` is the
        scale that the full gradient would have had, where that is another one.
        """
        signal = -(scale if of_full is None else of_full) * self.full
        return {
            "signal": signal,
            "noise": -scale * self.given - signal,
            "momentum": momentum,
            "decay": -scale * self.coupled + self.apart,
        }


@torch.no_grad()
def displacements(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, full: Tensor
) -> dict[str, Tensor]:
    """Return what each cause does to a parameter in the step that comes, by the state the optimiser
    has before it.

    Args:
        optimizer: of torch.
        group: of the parameter.
        parameter: with the gradient the optimiser is given.
        full: the gradient of the whole training loss, clipped as the one that is given.
    """
    sign = -1.0 if group.get("maximize") else 1.0
    assert parameter.grad is not None
    tensor = _Tensor(
        group,
        optimizer.state.get(parameter, {}),
        parameter.double(),
        sign * parameter.grad.double(),
        sign * full,
    )
    return RULES_OF_OPTIMIZERS.get(type(optimizer), _decay_alone)(tensor)


def _of_sgd(tensor: _Tensor) -> dict[str, Tensor]:
    """b ← μb + (1 − τ)(g + λθ), but b ← g + λθ at first; θ ← θ − ηb, with Nesterov's momentum
    θ ← θ − η(g + λθ + μb).
    """
    group = tensor.group
    rate, momentum = group["lr"], group["momentum"]
    if not tensor.state or tensor.state.get("momentum_buffer") is None:
        kept, memory = 1.0, torch.zeros_like(tensor.weights)
    else:
        kept, memory = 1 - group["dampening"], momentum * tensor.remembered("momentum_buffer")
    if group["nesterov"]:
        kept, memory = 1 + momentum * kept, momentum * memory
    return tensor.parts(rate * kept, -rate * memory)


def _of_adam(tensor: _Tensor) -> dict[str, Tensor]:
    """m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², θ ← θ − η m̂ / (√v̂ + ε); AdamW: θ ← θ − ηλθ
    first, Adam: g ← g + λθ first.
    """
    group = tensor.group
    if group["amsgrad"]:
        return _decay_alone(tensor)
    beta1, beta2 = group["betas"]
    count = 1 + (int(tensor.state["step"]) if tensor.state else 0)

    def scale_of(gradient: Tensor) -> Tensor:
        square = (1 - beta2) * (gradient + tensor.coupled) ** 2
        square = square + beta2 * tensor.remembered("exp_avg_sq")
        divided = (square / (1 - beta2**count)).sqrt() + group["eps"]
        return group["lr"] / (1 - beta1**count) / divided

    scale, of_full = scale_of(tensor.given), scale_of(tensor.full)
    memory = -scale * beta1 * tensor.remembered("exp_avg")
    return tensor.parts(scale * (1 - beta1), memory, of_full * (1 - beta1))


def _of_rmsprop(tensor: _Tensor) -> dict[str, Tensor]:
    """v ← αv + (1 − α)(g + λθ)², θ ← θ − η (g + λθ) / (√v + ε)."""
    group = tensor.group
    if group["centered"] or group["momentum"]:
        return {}

    def scale_of(gradient: Tensor) -> Tensor:
        square = (1 - group["alpha"]) * (gradient + tensor.coupled) ** 2
        square = square + group["alpha"] * tensor.remembered("square_avg")
        return group["lr"] / (square.sqrt() + group["eps"])

    scale = scale_of(tensor.given)
    return tensor.parts(scale, torch.zeros_like(scale), scale_of(tensor.full))


def _of_adagrad(tensor: _Tensor) -> dict[str, Tensor]:
    """s ← s + (g + λθ)², θ ← θ − η / (1 + (t − 1)δ) · (g + λθ) / (√s + ε)."""
    group = tensor.group
    rate = group["lr"] / (1 + float(tensor.state["step"]) * group["lr_decay"])

    def scale_of(gradient: Tensor) -> Tensor:
        square = tensor.remembered("sum") + (gradient + tensor.coupled) ** 2
        return rate / (square.sqrt() + group["eps"])

    scale = scale_of(tensor.given)
    return tensor.parts(scale, torch.zeros_like(scale), scale_of(tensor.full))


def _decay_alone(tensor: _Tensor) -> dict[str, Tensor]:
    """Return what can be told of any optimiser."""
    return {"decay": tensor.apart}


RULES_OF_OPTIMIZERS: Mapping[
    type[torch.optim.Optimizer], Callable[[_Tensor], dict[str, Tensor]]
] = {
    torch.optim.SGD: _of_sgd,
    torch.optim.Adam: _of_adam,
    torch.optim.AdamW: _of_adam,
    torch.optim.RMSprop: _of_rmsprop,
    torch.optim.Adagrad: _of_adagrad,
}
