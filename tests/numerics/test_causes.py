"""What each cause of the motion is allocated is what a training loop finds that computes every part
itself.

Errors are shares of Σ|A| of a tensor over segments and causes, or of 1e-5 of that of all tensors
where this is more.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import (
    SGD,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RMSprop,
)

import lca_posthoc
from lca_posthoc import Loss, Run, Task
from lca_posthoc.checkpoints.optimizer_steps import FIRST, METADATA_KEY, SECOND, moments_path
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.replay.worker import checks
from lca_posthoc.results import LossResults

from ..helpers.caused_training import (
    CAUSES,
    CLASSES,
    Branching,
    Network,
    Normalised,
    Recorded,
    Training,
    task,
    values_of,
)
from ..helpers.cli import record as record_plain
from ..helpers.cli import refused, run_lca, step_file, write_task

BOUND = 1e-4  # of float32 checkpoints

Optimizers = Callable[[nn.Module], Optimizer]


def by(kind: type[Optimizer], **settings: Any) -> Optimizers:
    """An optimiser of every parameter."""
    return lambda model: kind(model.parameters(), **settings)


def two_groups(model: nn.Module) -> Optimizer:
    """SGD whose groups differ in rate, momentum and decay."""
    first, *others = model.children()
    groups = [
        {"params": [*first.parameters()], "weight_decay": 0.1, "momentum": 0.8},
        {"params": [p for child in others for p in child.parameters()], "lr": 0.02},
    ]
    return SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.02)


def warm_up(step: int) -> float:
    """Rates that grow, from the first step on, and fall again."""
    return (0.25, 0.5, 1.0, 1.0, 0.7, 0.4)[step]


MOMENTUM = by(SGD, lr=0.05, momentum=0.9, weight_decay=0.02)
ADAMW = by(AdamW, lr=0.01, weight_decay=0.1)
TRAININGS: Mapping[str, Training] = {
    "SGD": Training(optimizer=by(SGD, lr=0.1)),
    "SGD, warm-up, two groups": Training(optimizer=two_groups, rates=warm_up),
    "SGD, dampening": Training(
        optimizer=by(SGD, lr=0.1, momentum=0.9, dampening=0.4, weight_decay=0.05)
    ),
    "SGD, maximised": Training(
        optimizer=by(SGD, lr=0.01, momentum=0.5, weight_decay=0.05, maximize=True)
    ),
    "SGD, clipped": Training(optimizer=MOMENTUM, clip=0.5),
    "SGD, accumulated": Training(optimizer=MOMENTUM, micro_batches=4),
    "AdamW": Training(optimizer=ADAMW, rates=warm_up, save="moments"),
    "AdamW, clipped": Training(optimizer=ADAMW, clip=0.5, save="moments"),
    "AdamW, resumed": Training(optimizer=ADAMW, steps=5, unrecorded=2, save="moments"),
    "AdamW, a frozen layer and one without gradients": Training(
        optimizer=ADAMW, model=Branching, skips_branch=True, save="moments"
    ),
    "AdamW, overflows": Training(optimizer=ADAMW, overflows=(1, 3), save="moments"),
    "AdamW, overflows, saved by hand": Training(
        optimizer=ADAMW, overflows=(1, 3), by_hand=True, save="moments"
    ),
    "Adam": Training(optimizer=by(Adam, lr=0.01, weight_decay=0.1), rates=warm_up, save="moments"),
    "Adam, maximised": Training(
        optimizer=by(Adam, lr=0.002, weight_decay=0.1, maximize=True), save="moments"
    ),
    "RMSprop": Training(optimizer=by(RMSprop, lr=0.005, weight_decay=0.1), save="moments"),
    "Adagrad": Training(
        optimizer=by(Adagrad, lr=0.05, lr_decay=0.3, weight_decay=0.1), save="moments"
    ),
    "running statistics": Training(optimizer=MOMENTUM, model=Normalised),
    "statistics of the batch": Training(
        optimizer=MOMENTUM, model=Normalised, batch_statistics=True
    ),
    "SGD and AdamW": Training(
        optimizer=lambda model: SGD(
            [*model.convolution.parameters(), *model.out.parameters()], lr=0.05, momentum=0.9
        ),
        second=lambda model: AdamW(
            [*model.norm.parameters(), *model.hidden.parameters()], lr=0.01, weight_decay=0.1
        ),
        by_hand=True,
        save="moments",
    ),
    "SGD and Adam": Training(
        optimizer=lambda model: SGD(model.hidden.parameters(), lr=0.05, weight_decay=0.1),
        second=lambda model: Adam(model.out.parameters(), lr=0.01, weight_decay=0.1),
        every=2,
        save="moments",
    ),
    # whose causes are not all known
    "AdamW without moments": Training(optimizer=ADAMW),
    "Nesterov": Training(
        optimizer=by(SGD, lr=0.05, momentum=0.9, weight_decay=0.02, nesterov=True)
    ),
    "SGD, resumed": Training(optimizer=MOMENTUM, steps=5, unrecorded=2),
    "SGD, from a rate of 0": Training(optimizer=MOMENTUM, rates=lambda step: min(step, 2) / 2),
    "SGD, one without gradients": Training(
        optimizer=MOMENTUM, model=Branching, skips_branch=True, steps=4
    ),
    "SGD, overflows, saved by hand": Training(optimizer=MOMENTUM, overflows=(3,), by_hand=True),
    "every second": Training(optimizer=MOMENTUM, every=2),
    "NAdam": Training(
        optimizer=by(NAdam, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
        save="moments",
    ),
    "Adamax": Training(optimizer=by(Adamax, lr=0.01, weight_decay=0.1), save="moments"),
    "AMSGrad": Training(
        optimizer=by(AdamW, lr=0.01, weight_decay=0.1, amsgrad=True), save="moments"
    ),
    "centred RMSprop": Training(optimizer=by(RMSprop, lr=0.005, centered=True), save="moments"),
}
EXACT = [*TRAININGS][: [*TRAININGS].index("AdamW without moments")]


class Lab:
    """Trainings and runs, each made once."""

    def __init__(self, root: Path) -> None:
        self.root, self._runs = root, 0
        self.training, self._replayed = (
            functools.cache(self.training),
            functools.cache(self._replayed),
        )

    def training(self, name: str) -> Recorded:
        return TRAININGS[name].record(self.root / name.replace(" ", "_"))

    def replay(self, name: str, *losses: str, **settings: Any) -> Run:
        """A run of a training, made at the first call with these settings."""
        return self._replayed(name, losses or ("train",), **settings)

    def _replayed(self, name: str, losses: tuple[str, ...], **settings: Any) -> Run:
        self._runs += 1
        return replay(
            self.training(name), self.root / f"{self._runs}.lca", losses=losses, **settings
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("causes"))


def replay(recorded: Recorded, out: Path, **settings: Any) -> Run:
    """A run with causes that is never refined."""
    chosen = {
        "task": task(recorded.training.model),
        "losses": ("train",),
        "causes": True,
        "keep": "tensors",
        "tolerance": math.inf,
        "cluster": "inline",
        "durability": "none",
        **settings,
    }
    return lca_posthoc.run(recorded.directory, out=out, **chosen)


Causes = Mapping[str, np.ndarray]


def causes_of(results: LossResults, group: int | None = None) -> Causes:
    """What causes are allocated of each tensor, (steps, causes); they add up to what the tensor is
    allocated.
    """
    data = results.causes.allocated
    assert (data.dtype, data.coords["cause"].values.tolist()) == (np.float64, [*CAUSES])
    sums, size = data.sum("cause"), np.abs(data).sum("cause")
    whole = results.tensors["allocated"]
    assert list(sums["tensor"].values) == list(whole["tensor"].values)
    assert (np.abs(sums.values - whole.values) <= 1e-12 * size.values).all()
    if group is not None:
        data = data.isel(group=group)
    return {name: data.sel(tensor=name).values for name in data["tensor"].values}


def apart(found: Causes, wanted: Causes) -> dict[str, np.ndarray]:
    """Σ|A − A*| over segments, of each tensor by causes, as a share of max(Σ|A*| of the tensor, 1e-5
    · Σ|A*| of all tensors) over segments and causes.
    """
    assert {name: values.shape for name, values in found.items()} == {
        name: values.shape for name, values in wanted.items()
    }
    sizes = {name: float(np.abs(values).sum()) for name, values in wanted.items()}
    floor = 1e-5 * sum(sizes.values())
    return {
        name: np.abs(found[name] - wanted[name]).sum(0) / max(sizes[name], floor) for name in wanted
    }


def assert_close(found: Causes, wanted: Causes, bound: float = BOUND) -> None:
    errors = apart(found, wanted)
    assert {name: error for name, error in errors.items() if error.max() > bound} == {}


def in_rest(wanted: Causes, *causes: str, steps: slice = slice(None), tensors: str = "") -> Causes:
    """The same with some causes in what is left, on some segments, of tensors that begin so."""
    moved = {name: values.copy() for name, values in wanted.items()}
    for name, values in moved.items():
        if name.startswith(tensors):
            for cause in causes:
                values[steps, -1] += values[steps, CAUSES.index(cause)]
                values[steps, CAUSES.index(cause)] = 0.0
    return moved


def share_of(wanted: Causes, cause: str) -> float:
    """How much of Σ|A| a cause is, over all tensors and segments."""
    values = np.stack([*wanted.values()])
    return float(np.abs(values[..., CAUSES.index(cause)]).sum() / np.abs(values).sum())


# --- against a training loop that computes every part itself --------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_causes_are_those_the_training_loop_computed(lab: Lab, name: str) -> None:
    recorded = lab.training(name)
    settings = {}
    if recorded.training.batch_statistics:
        settings = {"norm_stats": "batch", "batch_size": 48}
    assert_close(causes_of(lab.replay(name, **settings)["train"]), recorded.allocated())


@pytest.mark.parametrize("name", EXACT)
def test_every_cause_that_a_training_is_to_have_is_there(lab: Lab, name: str) -> None:
    """So that none of them agrees by being nothing."""
    wanted = lab.training(name).allocated()
    absent = {"SGD": {"momentum", "decay"}, "RMSprop": {"momentum"}, "Adagrad": {"momentum"}}
    for cause in ("signal", "noise", "momentum", "decay"):
        assert (share_of(wanted, cause) > 1e-4) == (cause not in absent.get(name, ())), cause
    tensors = {name: values for name, values in wanted.items() if "running" not in name}
    assert share_of(tensors, "rest") < 1e-5


@pytest.mark.parametrize("name", ["SGD, warm-up, two groups", "AdamW"])
@pytest.mark.parametrize("loss", ["validation", "classes", "examples", "train"])
def test_the_causes_of_any_loss_are_those_the_training_loop_computed(
    lab: Lab, name: str, loss: str
) -> None:
    results = lab.replay(name, "validation", "classes", "examples", signal="train")[
        "examples" if loss == "train" else loss
    ]
    for group in range(CLASSES) if loss == "classes" else (None,):
        assert_close(causes_of(results, group), lab.training(name).allocated(loss, group))


def test_a_loss_per_example_may_be_the_signal(lab: Lab) -> None:
    """And gives the same bits wherever spans end."""
    name = "SGD, warm-up, two groups"
    runs = [lab.replay(name, "examples", span=span) for span in (1, 8)]
    assert_close(causes_of(runs[0]["examples"]), lab.training(name).allocated())
    assert bits(runs[0]["examples"]) == bits(runs[1]["examples"])


@pytest.mark.parametrize("keep", ["tensors", "parameters"])
def test_groups_that_are_taken_in_blocks_have_their_causes(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    def block_of(request: Any, objective: Any, loss: str, keep: str) -> int | None:
        return 3 if loss == "classes" else None

    monkeypatch.setattr(checks, "block_of", block_of)
    name = "AdamW"
    results = lab.replay(name, "classes", "train", keep=keep, signal="train", batch_size=5)
    assert results.manifest.losses["classes"].block == 3
    for group in range(CLASSES):
        wanted = lab.training(name).allocated("classes", group)
        assert_close(causes_of(results["classes"], group), wanted)


@pytest.mark.parametrize("name", ["SGD, warm-up, two groups", "AdamW"])
def test_causes_go_by_the_names_in_the_files(lab: Lab, tmp_path: Path, name: str) -> None:
    """Where the model has others."""
    recorded = lab.training(name)
    inside = replace(recorded, training=replace(recorded.training, model=Inside))
    run = replay(inside, tmp_path / "run.lca", rename=("^=network.",))
    wanted = {f"network.{tensor}": part for tensor, part in recorded.allocated().items()}
    assert_close(causes_of(run["train"]), wanted)


class Inside(nn.Module):
    """The network inside another module, so that its tensors have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs)


def test_a_term_of_the_parameters_has_causes_too(lab: Lab) -> None:
    recorded = lab.training("AdamW")
    results = lab.replay("AdamW", "train", "weights")["weights"]
    gradients = [
        {name: 1e-2 * (start[name].double() + end[name].double()) / 2 for name in start}
        for start, end in zip(recorded.iterates, recorded.iterates[1:], strict=False)
    ]
    wanted = {
        name: np.array(
            [
                [float((recorded.motion(t)[cause][name] * g[name]).sum()) for cause in CAUSES]
                for t, g in enumerate(gradients)
            ]
        )
        for name in gradients[0]
    }
    assert_close(causes_of(results), wanted)


@pytest.mark.parametrize("name", ["SGD, warm-up, two groups", "AdamW"])
@pytest.mark.parametrize("rule", ["trapezoid", "left", "gauss-2"])
@pytest.mark.parametrize("keep", ["tensors", "parameters"])
def test_every_rule_has_causes(lab: Lab, name: str, rule: str, keep: str) -> None:
    found = causes_of(lab.replay(name, rule=rule, keep=keep)["train"])
    assert_close(found, lab.training(name).allocated(rule=rule))


@pytest.mark.parametrize("keep", ["tensors", "parameters"])
@pytest.mark.parametrize(
    ("precision", "tolerance", "reached"), [("float32", 1e-5, {0, 1}), ("float64", 5e-9, {1, 2})]
)
def test_causes_are_refined_with_the_segment(
    lab: Lab, keep: str, precision: str, tolerance: float, reached: set[int]
) -> None:
    """To different levels: each has the nodes of its own."""
    name = "SGD, warm-up, two groups"
    settings = {"precision": precision, "tolerance": tolerance, "rule": "trapezoid"}
    results = lab.replay(name, keep=keep, **settings)["train"]
    levels, found = results.steps["level"].values, causes_of(results)
    assert set(levels.tolist()) == reached
    for level in set(levels.tolist()):
        segments = levels == level
        rule = 2**level if level else "trapezoid"
        wanted = lab.training(name).allocated(rule=rule)
        assert_close(
            {tensor: values[segments] for tensor, values in found.items()},
            {tensor: values[segments] for tensor, values in wanted.items()},
        )


# --- what is not known ends in rest ---------------------------------------------------------------

UNKNOWN = ("signal", "noise", "momentum")
# what ends in rest beside what is there by itself: causes, of which segments, of which tensors
ENDS_IN_REST: Mapping[str, tuple[tuple[str, ...], slice, str]] = {
    "AdamW without moments": (UNKNOWN, slice(None), ""),
    "Nesterov": (UNKNOWN, slice(None), ""),
    "SGD, resumed": (("noise", "momentum"), slice(0, 1), ""),
    "SGD, from a rate of 0": (("noise", "momentum"), slice(1, 2), ""),
    "SGD, one without gradients": (("noise", "momentum"), slice(2, 3), "branch"),
    "SGD, overflows, saved by hand": (("noise", "momentum"), slice(4, 5), ""),
    # of which the training loop knows no more
    **{name: ((), slice(None), "") for name in ("NAdam", "Adamax", "AMSGrad", "centred RMSprop")},
}


@pytest.mark.parametrize("name", ENDS_IN_REST)
def test_causes_that_nothing_tells_end_in_rest(lab: Lab, name: str) -> None:
    causes, steps, tensors = ENDS_IN_REST[name]
    wanted = in_rest(lab.training(name).allocated(), *causes, steps=steps, tensors=tensors)
    assert share_of(wanted, "rest") > 5e-4
    assert_close(causes_of(lab.replay(name)["train"]), wanted)


def test_of_iterates_that_are_steps_apart_all_is_rest(lab: Lab) -> None:
    recorded = lab.training("every second")
    wanted = replace(recorded, displacements=[{}] * 3).allocated()
    assert_close(causes_of(lab.replay("every second")["train"]), wanted)
    assert share_of(wanted, "rest") == pytest.approx(1, rel=1e-12)


def copied(recorded: Recorded, directory: Path) -> Recorded:
    """A training whose files may be damaged."""
    shutil.copytree(recorded.directory, directory)
    return replace(recorded, directory=directory)


def with_record(path: Path, record: str | None) -> None:
    """Give a checkpoint another record, or none."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    del metadata[METADATA_KEY]
    if record is not None:
        metadata[METADATA_KEY] = record
    save_file(load_file(path), path, metadata)


@pytest.mark.parametrize(
    ("name", "after"), [("SGD, dampening", ("noise", "momentum")), ("AdamW", ())]
)
def test_a_step_without_a_record_is_rest(
    lab: Lab, tmp_path: Path, name: str, after: tuple[str, ...]
) -> None:
    """And so is, on the next segment, what takes the one before to be told."""
    recorded = copied(lab.training(name), tmp_path / "checkpoints")
    with_record(step_file(recorded.directory, 3), None)
    wanted = in_rest(recorded.allocated(), *UNKNOWN, "decay", steps=slice(2, 3))
    wanted = in_rest(wanted, *after, steps=slice(3, 4))
    assert_close(causes_of(replay(recorded, tmp_path / "run.lca")["train"]), wanted)


@pytest.mark.parametrize(
    ("name", "step", "lacking"),
    [
        ("AdamW", 3, {2: UNKNOWN, 3: UNKNOWN}),
        ("Adam", 3, {2: (*UNKNOWN, "decay"), 3: UNKNOWN}),
        ("RMSprop", 3, {2: (*UNKNOWN, "decay"), 3: (*UNKNOWN, "decay")}),
    ],
)
def test_what_takes_moments_that_are_missing_is_rest(
    lab: Lab, tmp_path: Path, name: str, step: int, lacking: Mapping[int, tuple[str, ...]]
) -> None:
    recorded = copied(lab.training(name), tmp_path / "checkpoints")
    moments_path(recorded.directory, step).unlink()
    wanted = recorded.allocated()
    for segment, causes in lacking.items():
        wanted = in_rest(wanted, *causes, steps=slice(segment, segment + 1))
    assert_close(causes_of(replay(recorded, tmp_path / "run.lca")["train"]), wanted)


class Averaging:
    """Moves the weights towards an average of those before."""

    def __init__(self) -> None:
        self._averages: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        parameters = [*model.parameters()]
        if not self._averages:
            self._averages = [parameter.clone() for parameter in parameters]
        for average, parameter in zip(self._averages, parameters, strict=True):
            average.lerp_(parameter, 0.5)
            parameter.lerp_(average, 0.8)


def test_what_averaging_did_to_the_weights_is_rest_where_moments_tell_the_gradient(
    tmp_path: Path,
) -> None:
    recorded = Training(
        optimizer=by(AdamW, lr=0.01, weight_decay=0.0), between=Averaging(), save="moments"
    ).record(tmp_path / "checkpoints")
    wanted = recorded.allocated()
    assert share_of(wanted, "rest") > 0.1
    assert_close(causes_of(replay(recorded, tmp_path / "run.lca")["train"]), wanted)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_is_no_gradient_of_the_recorded_norm_is_rest(tmp_path: Path, momentum: float) -> None:
    """Noise and averaging cannot be told apart then, nor can the memory of a motion that was not a
    step's alone.
    """
    recorded = Training(optimizer=by(SGD, lr=0.05, momentum=momentum), between=Averaging()).record(
        tmp_path / "checkpoints"
    )
    wanted = recorded.allocated()
    averaged = in_rest(wanted, "noise", "momentum", steps=slice(1, None))
    assert share_of(wanted, "rest") > 0.1
    assert_close(causes_of(replay(recorded, tmp_path / "run.lca")["train"]), averaged)


def test_a_gradient_that_is_lost_in_the_rounding_of_the_weights_is_rest(tmp_path: Path) -> None:
    """But not of weights that are near 0, whose rounding is small."""
    recorded = Training(optimizer=by(SGD, lr=1e-6)).record(tmp_path / "checkpoints")
    wanted = recorded.allocated()
    wanted = {
        **in_rest(wanted, "noise"),
        "norm.bias": wanted["norm.bias"],
    }
    assert share_of(wanted, "rest") > 0.1
    assert_close(causes_of(replay(recorded, tmp_path / "run.lca")["train"]), wanted)


def test_of_checkpoints_in_half_precision_noise_and_momentum_are_rest(
    lab: Lab, tmp_path: Path
) -> None:
    """Weights are rounded by more than a step moves them, and the motion of biases that begin at 0
    alone is known.
    """
    recorded = copied(lab.training("SGD, clipped"), tmp_path / "checkpoints")
    for path in recorded.directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(halves, path, metadata)
    found = causes_of(replay(recorded, tmp_path / "run.lca")["train"])
    kept = {tensor: values for tensor, values in found.items() if tensor != "norm.bias"}
    assert (share_of(kept, "noise"), share_of(kept, "momentum")) == (0, 0)
    assert min(share_of(kept, "signal"), share_of(kept, "rest")) > 0.1


def test_clipping_that_nobody_noted_is_noise(tmp_path: Path) -> None:
    """A gradient that is not the full one is what the optimiser was given."""
    recorded = Training(optimizer=MOMENTUM, unnoted_clip=0.5).record(tmp_path / "checkpoints")
    assert_close(causes_of(replay(recorded, tmp_path / "run.lca")["train"]), recorded.allocated())


# --- levels and bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD, warm-up, two groups", "AdamW"])
@pytest.mark.parametrize("keep", ["units", "statistics", "parameters"])
def test_every_level_has_the_same_causes(lab: Lab, name: str, keep: str) -> None:
    sums, others = (lab.replay(name, "train", "classes", keep=level) for level in ("tensors", keep))
    assert_close(causes_of(others["train"]), causes_of(sums["train"]), 1e-6)
    for group in range(CLASSES):
        found, wanted = (causes_of(other["classes"], group) for other in (others, sums))
        assert_close(found, wanted, 1e-6)


def bits(results: LossResults) -> bytes:
    return results.causes.allocated.values.tobytes()


CUT = [
    ("SGD, warm-up, two groups", "tensors"),
    ("SGD, warm-up, two groups", "parameters"),
    ("AdamW", "tensors"),
    ("AdamW", "parameters"),
]


@pytest.mark.parametrize(("name", "keep"), CUT)
def test_causes_do_not_depend_on_spans(lab: Lab, name: str, keep: str) -> None:
    runs = [lab.replay(name, "train", "classes", keep=keep, span=span) for span in (1, 2, 8)]
    for loss in ("train", "classes"):
        assert len({bits(run[loss]) for run in runs}) == 1, loss
        assert len({run[loss].tensors["allocated"].values.tobytes() for run in runs}) == 1, loss


@pytest.mark.parametrize(("name", "keep"), CUT)
def test_causes_do_not_depend_on_the_losses_beside(
    lab: Lab, tmp_path: Path, name: str, keep: str
) -> None:
    """Nor on whether a loss was added later."""
    together = lab.replay(name, "train", "validation", keep=keep)
    out, recorded = tmp_path / "run.lca", lab.training(name)
    alone = replay(recorded, out, keep=keep)
    assert bits(alone["train"]) == bits(together["train"])
    added = replay(recorded, out, keep=keep, losses=("validation",))
    assert bits(added["validation"]) == bits(together["validation"])
    assert added.manifest.settings["signal"] == "train"
    by_itself = lab.replay(name, "validation", keep=keep, signal="train")
    assert bits(by_itself["validation"]) == bits(together["validation"])


@pytest.mark.parametrize("name", ["SGD, warm-up, two groups", "AdamW"])
def test_a_run_that_grows_has_the_causes_of_one_that_did_not(
    lab: Lab, tmp_path: Path, name: str
) -> None:
    whole = lab.training(name)
    part = replace(whole, directory=tmp_path / "checkpoints")
    part.directory.mkdir()

    def grow(last: int) -> None:
        for step in range(last + 1):
            for path in (step_file(whole.directory, step), moments_path(whole.directory, step)):
                copy = part.directory / path.relative_to(whole.directory)
                copy.parent.mkdir(exist_ok=True)
                if path.exists() and not copy.exists():
                    shutil.copy(path, copy)

    grow(3)
    first = causes_of(replay(part, tmp_path / "run.lca")["train"])
    assert {len(values) for values in first.values()} == {3}
    grow(6)
    grown = replay(part, tmp_path / "run.lca")
    assert bits(grown["train"]) == bits(lab.replay(name)["train"])


@pytest.mark.parametrize("keep", ["tensors", "parameters"])
def test_asking_for_causes_changes_nothing_else(lab: Lab, tmp_path: Path, keep: str) -> None:
    """Of sums, whose rounding may be another, only within that."""
    name = "SGD, warm-up, two groups"
    plain = replay(lab.training(name), tmp_path / "run.lca", causes=False, keep=keep)["train"]
    split = lab.replay(name, keep=keep)["train"]
    for field in ("loss_start", "loss_end"):
        assert split.steps[field].values.tobytes() == plain.steps[field].values.tobytes()
    found, wanted = (results.tensors["allocated"].values for results in (split, plain))
    rounding = 0.0 if keep == "parameters" else 1e-6
    assert np.abs(found - wanted).max() <= rounding * np.abs(wanted).sum()


def test_tensors_that_are_not_stored_have_no_causes(lab: Lab) -> None:
    name = "SGD, warm-up, two groups"
    whole = causes_of(lab.replay(name)["train"])
    some = causes_of(lab.replay(name, tensors=("hidden.*",))["train"])
    assert some.keys() == {"hidden.weight", "hidden.bias"}
    assert_close(some, {tensor: whole[tensor] for tensor in some}, 1e-6)


# --- refusals -------------------------------------------------------------------------------------


def refuses(recorded: Recorded, out: Path, *words: str, **settings: Any) -> None:
    with pytest.raises(InputError) as refusal:
        replay(recorded, out, **settings)
    assert [word for word in words if word not in str(refusal.value)] == [], refusal.value
    assert not out.exists()


@pytest.mark.parametrize(
    ("signal", "words"),
    [
        ("classes", ("'classes' has groups", "--signal")),
        ("weights", ("'weights' is no mean over data", "--signal")),
        ("training", ("'training'", "train")),
    ],
)
def test_what_cannot_be_a_signal_is_refused(
    lab: Lab, tmp_path: Path, signal: str, words: tuple[str, ...]
) -> None:
    refuses(lab.training("SGD"), tmp_path / "run.lca", *words, signal=signal)
    if signal != "training":  # the first of the losses is the signal
        refuses(lab.training("SGD"), tmp_path / "run.lca", *words, losses=(signal, "train"))


def test_a_loss_that_is_several_is_no_signal(lab: Lab, tmp_path: Path) -> None:
    def both(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        values = values_of(model, batch)
        return {"whole": values, "half": values / 2}

    recorded = lab.training("SGD")
    several = Task(Network, task().data, {"both": Loss(call=both)})
    with pytest.raises(InputError, match=r"'both' returns a dict.*--signal.*'both/whole'"):
        replay(recorded, tmp_path / "run.lca", task=several, losses=("both",), signal="both")
    run = replay(recorded, tmp_path / "run.lca", task=several, losses=("both",))
    assert run.manifest.settings["signal"] == "both/whole"
    assert_close(causes_of(run["both/whole"]), recorded.allocated())


def test_checkpoints_without_any_record_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "task.py")
    checkpoints, out = record_plain(tmp_path / "checkpoints"), tmp_path / "run.lca"
    words = ("steps 10, 40, 60", "recorder.attach(optimizer)", "leave --causes out")
    refused(run_lca(checkpoints, tmp_path / "task.py", out, "--causes"), *words)
    assert not out.exists()


def test_a_run_made_without_causes_is_not_gone_on_with(lab: Lab, tmp_path: Path) -> None:
    recorded, out = lab.training("SGD"), tmp_path / "run.lca"
    run = replay(recorded, out, causes=False)
    with pytest.raises(InputError, match=r"made without --causes.*--out"):
        replay(recorded, out)
    with pytest.raises(InputError, match=r"--signal"):
        replay(recorded, out, causes=False, signal="train")
    with pytest.raises(InputError, match=r"made without --causes"):
        _ = run["train"].causes


def test_another_signal_than_that_of_the_run_is_refused(lab: Lab) -> None:
    run = lab.replay("SGD", "train")
    with pytest.raises(InputError, match=r"Leave --signal out to resume it"):
        replay(lab.training("SGD"), run.path, signal="validation")


@pytest.mark.parametrize("step", [1, 2])
def test_a_damaged_record_is_an_error_that_names_the_file(
    lab: Lab, tmp_path: Path, step: int
) -> None:
    """Whether it is one of those looked at before the run begins or not."""
    recorded = copied(lab.training("SGD"), tmp_path / "checkpoints")
    with_record(step_file(recorded.directory, step), '{"since": -1}')
    with pytest.raises(LCAError) as failure:
        replay(recorded, tmp_path / "run.lca")
    said = str(failure.value)
    assert f"step_{step:08d}.safetensors" in said
    assert "the record of the optimiser's step is damaged" in said


def test_damaged_moments_are_an_error_that_names_the_file(lab: Lab, tmp_path: Path) -> None:
    recorded = copied(lab.training("AdamW"), tmp_path / "checkpoints")
    path = moments_path(recorded.directory, 3)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LCAError) as failure:
        replay(recorded, tmp_path / "run.lca")
    assert str(path) in str(failure.value)


def test_moments_of_another_model_are_an_error_that_names_file_and_tensor(
    lab: Lab, tmp_path: Path
) -> None:
    recorded = copied(lab.training("AdamW"), tmp_path / "checkpoints")
    path = moments_path(recorded.directory, 3)
    moments = load_file(path)
    name = next(name for name, values in moments.items() if values.dim() == 2)
    save_file({**moments, name: moments[name].T.contiguous()[:1]}, path)
    with pytest.raises(LCAError) as failure:
        replay(recorded, tmp_path / "run.lca")
    assert str(path) in str(failure.value)
    tensor = name.removeprefix(FIRST).removeprefix(SECOND)
    assert repr(tensor) in str(failure.value)
    assert "another model" in str(failure.value)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_weight_without_a_gradient_in_its_batch_does_not_blow_up_the_signal(
    tmp_path: Path, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    """Its second moment is 0 after the step, and the full gradient divided by that is no step which
    the optimiser makes.
    """
    inputs, targets = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), [0, 1] * 8
    inputs[:8, 0] = 0  # what the first batch does not see
    data = inputs, torch.tensor(targets)
    model = linear()
    trained = optimizer(model.parameters(), lr=0.01)
    with lca_posthoc.Recorder(tmp_path / "checkpoints", model) as recorder:
        recorder.attach(trained, save="moments")
        for rows in (slice(0, 8), slice(8, 16)):
            trained.zero_grad()
            nn.functional.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
            trained.step()
    loss = lca_posthoc.Loss(nn.functional.cross_entropy, on="train")
    run = lca_posthoc.run(
        tmp_path / "checkpoints",
        lca_posthoc.Task(linear, {"train": data}, {"train": loss}),
        causes=True,
        cluster="inline",
        out=tmp_path / "run.lca",
    )
    allocated = run["train"].causes.allocated
    assert float(abs(allocated.sel(cause="signal")).max()) < 0.1
    assert float(abs(allocated.sel(cause="rest")).max()) < 1e-6


def test_a_step_without_a_record_does_not_make_bits_depend_on_spans(
    lab: Lab, tmp_path: Path
) -> None:
    """Its segment has no parts, and the ones beside it have: sums of a loss per example too."""
    recorded = copied(lab.training("SGD"), tmp_path / "checkpoints")
    with_record(step_file(recorded.directory, 3), None)
    sums = [
        replay(recorded, tmp_path / f"{span}.lca", losses=("examples",), span=span)["examples"]
        for span in (1, 8)
    ]
    for part in ("tensors", "causes"):
        one, other = (getattr(results, part)["allocated"].to_numpy() for results in sums)
        assert one.tobytes() == other.tobytes(), part
