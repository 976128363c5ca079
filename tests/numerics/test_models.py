"""Models as they are met: each is allocated as the oracle says, or refused with its culprit named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lca_posthoc import Loss, Recorder
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.replay.events import Note

from ..helpers.cli import says
from ..helpers.model_cases import Batch
from ..helpers.oracle import Oracle, simpson
from ..helpers.replayed_cases import arrays
from ..helpers.user_models import (
    IMAGES,
    INPUTS,
    MET,
    OTHERS,
    TARGETS,
    UNTRACKED,
    Auxiliary,
    Cached,
    CachedInPart,
    Filter,
    Merging,
    Met,
    ReturnsNothing,
    Tied,
    Untied,
    assert_the_oracle_agrees,
    eager_backend,
    normed,
    points,
    replay,
    seeded,
    weighted_by_the_detached_model,
    weighted_by_the_model,
)

# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MET)
def test_a_model_is_allocated_as_the_oracle_says(tmp_path: Path, name: str) -> None:
    met = MET[name]
    iterates = met.record(tmp_path / "iterates")
    replayed = replay(met, iterates, tmp_path / "run")
    assert_the_oracle_agrees(met, replayed, iterates)
    assert all(
        each.any()
        for key, each in arrays(replayed["train"].allocation).items()
        if moved(iterates, key)
    )


def moved(iterates: Path, name: str) -> bool:
    first, *_, last = (load_file(path)[name] for path in sorted(iterates.glob("*.safetensors")))
    # a bias before a normalisation has no effect
    return not torch.equal(first, last) and name != "0.bias"


def test_frozen_parameters_get_nothing_and_the_others_do(tmp_path: Path) -> None:
    met = MET["frozen parameters, groups of learning rates"]
    found = arrays(
        replay(met, met.record(tmp_path / "iterates"), tmp_path / "run")["train"].allocation
    )
    assert [name for name, each in found.items() if not each.any()] == ["0.weight", "2.bias"]


def test_buffers_have_a_variable_where_they_float_and_are_stored(tmp_path: Path) -> None:
    met = MET["buffers"]
    found = arrays(
        replay(met, met.record(tmp_path / "iterates"), tmp_path / "run")["train"].allocation
    )
    assert found.keys() == {"linear.weight", "linear.bias", "centre", "slope"}
    assert found["centre"].any()
    assert not found["slope"].any()


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_complex_buffers_are_complex_in_every_precision(tmp_path: Path, precision: str) -> None:
    met = MET["complex buffers"]
    iterates = met.record(tmp_path / "iterates")
    replayed = replay(met, iterates, tmp_path / "run", precision=precision)
    truth = Oracle(met.build, met.columns, met.values).allocate(points(iterates, met), *simpson(2))
    rel = 1e-6 if precision == "float64" else 2e-2
    assert replayed["train"].steps["loss_start"].values == pytest.approx(truth.losses[:-1], rel=rel)


def test_a_complex_loss_module_keeps_its_imaginary_part() -> None:
    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turn", torch.polar(torch.ones(2), torch.ones(2)))

    on = Loss(Turn()).on_device(torch.device("cpu"), torch.float64)
    assert torch.equal(on.fn.turn, Turn().turn.to(torch.complex128))


def test_complex_parameters_are_refused_with_the_way_to_keep_them(tmp_path: Path) -> None:
    met = Met(Filter)
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(
        str(caught.value), "parameter 'filter' is complex", "shape [7, 2]", "torch.view_as_complex"
    )
    assert not (tmp_path / "run").exists()


def test_a_model_whose_eval_returns_nothing_is_put_into_eval_mode(tmp_path: Path) -> None:
    met = Met(ReturnsNothing)
    iterates = tmp_path / "iterates"
    model = nn.ModuleDict({"linear": nn.Linear(12, 4)})
    with Recorder(iterates, model) as recorder:
        for step in range(3):
            recorder.save(step)
            with torch.no_grad():
                model["linear"].weight.mul_(0.9)
    replayed = replay(met, iterates, tmp_path / "run")
    losses = []
    for path in sorted(iterates.glob("*.safetensors"))[:-1]:
        held = {name: each.double() for name, each in load_file(path).items()}
        logits = INPUTS.double() @ held["linear.weight"].T + held["linear.bias"]
        losses.append(float(F.cross_entropy(logits, TARGETS)))
    assert replayed["train"].steps["loss_start"].values == pytest.approx(losses, rel=1e-6)


def test_parameters_that_move_without_the_loss_depending_on_them_are_named(tmp_path: Path) -> None:
    met, heard = Met(Auxiliary), list[Any]()
    iterates = met.record(tmp_path / "iterates")
    replayed = replay(met, iterates, tmp_path / "run", progress=heard.append)
    assert_the_oracle_agrees(met, replayed, iterates)
    assert not arrays(replayed["train"].allocation)["second.weight"].any()
    assert [event.text for event in heard if isinstance(event, Note)] == [
        "tensors moved without loss 'train' depending on them (allocated 0): second.bias, "
        "second.weight"
    ]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Merging, ("at the last checkpoint", "Build it")),
        (CachedInPart, ("at the last checkpoint", "Build it")),
        (Cached, ("no gradient",)),
    ],
)
def test_modules_that_derive_weights_when_set_to_eval_are_refused(
    tmp_path: Path, build: Callable[[], nn.Module], words: tuple[str, ...]
) -> None:
    met = Met(build)
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(str(caught.value), "loss 'train'", "merges or caches weights in eval mode", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (weighted_by_the_model, "weights that depend on the model"),
        (weighted_by_the_detached_model, "it depends on the model"),
    ],
)
def test_weights_that_depend_on_the_model_are_refused_detached_or_not(
    tmp_path: Path, call: Any, words: str
) -> None:
    """Detached they are other constants at every point, and the loss is not the function whose
    gradient is taken.
    """
    met = Met(partial(nn.Linear, 12, 4), loss=Loss(call=call))
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(str(caught.value), "loss 'train'", words)
    assert not (tmp_path / "run").exists()


def summed(outputs: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.kl_div(outputs, targets, reduction=reduction)


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize(
    ("fn", "given"),
    [
        (nn.KLDivLoss(reduction="batchmean"), "batchmean"),
        (partial(F.kl_div, reduction="sum"), "sum"),
        (summed, "sum"),
        (nn.KLDivLoss(reduction="none"), None),
        (nn.KLDivLoss(), None),
        (F.kl_div, None),
    ],
    ids=[
        "batchmean, a module",
        "sum, a partial",
        "sum, by default",
        "none",
        "mean, a module",
        "mean",
    ],
)
def test_a_reduction_that_is_not_used_is_said_to_be_replaced(
    tmp_path: Path, fn: Any, given: str | None
) -> None:
    shares = OTHERS[:, :4].softmax(1)
    met, heard = Met(log_shares, (INPUTS, shares), Loss(fn), divergence), list[Any]()
    iterates = met.record(tmp_path / "iterates")
    replayed = replay(met, iterates, tmp_path / "run", progress=heard.append)
    assert_the_oracle_agrees(met, replayed, iterates)
    notes = [event.text for event in heard if isinstance(event, Note)]
    assert len(notes) == (given is not None)
    if given:
        says(
            notes[0],
            f"loss 'train' has reduction={given!r}",
            "here it is the mean over its elements",
        )


def log_shares() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 4), nn.LogSoftmax(1))


def divergence(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over the four classes, as reduction="mean" has it."""
    inputs, shares = batch
    return (shares * (shares.log() - model(inputs))).mean(1)


def test_a_model_that_ties_what_was_trained_apart_is_refused_where_the_first_checkpoint_cannot_tell(
    tmp_path: Path,
) -> None:
    met = Met(Tied, trained=Untied)
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(
        str(caught.value),
        "'one.weight' and 'other.weight' differ",
        "(step 3)",
        "Build the model that was trained",
    )


def test_ties_are_not_looked_for_at_a_last_checkpoint_that_diverged(tmp_path: Path) -> None:
    met = MET["tied weights"]
    iterates = met.record(tmp_path / "iterates")
    for step, path in enumerate(sorted(iterates.glob("*.safetensors"))):
        held = load_file(path)
        held["one.weight"] = held["one.weight"] / (0 if step == 3 else 1)
        save_file({**held, "other.weight": held["one.weight"].clone()}, path)
    with pytest.raises(
        LCAError,
        match=r"1 span failed; the others are complete.* holds 144 NaN or "
        r"Inf",
    ):
        replay(met, iterates, tmp_path / "run", span=1)
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("norm", UNTRACKED)
def test_batch_norm_that_tracks_nothing_is_refused_where_statistics_are_the_stored_ones(
    tmp_path: Path, norm: str
) -> None:
    met = Met(normed(UNTRACKED[norm]), (IMAGES, TARGETS))
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(
        str(caught.value),
        "batch-norm layer",
        "track_running_stats=False",
        "--norm-stats batch --batch-size N",
    )
    assert not (tmp_path / "run").exists()


# --- networks beside the model --------------------------------------------------------------------


def teacher() -> nn.Module:
    """In eval mode, of statistics that are no batch's."""
    with seeded(7):
        made = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(64, 4),
        ).eval()
        for norm in (made[1], made[3]):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.2, 3)
    return made


def taught(teacher: nn.Module, dtype: torch.dtype, model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        wanted = teacher(batch[0].to(dtype)).softmax(1)
    return F.cross_entropy(model(batch[0]), wanted.to(batch[0]), reduction="none")


class Recomputed(nn.Module):
    """The normalised part runs once more during the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = normed(partial(nn.BatchNorm2d, 4))(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(checkpoint(self.part, x, use_reentrant=False)))


def normed_and_compiled() -> nn.Module:
    model = normed(partial(nn.BatchNorm2d, 4))()
    model[1].compile(backend=eager_backend)
    return model


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": normed(partial(nn.BatchNorm2d, 4)),
    "BatchNorm2d that tracks nothing": normed(
        partial(nn.BatchNorm2d, 4, track_running_stats=False)
    ),
    "InstanceNorm2d": normed(partial(nn.InstanceNorm2d, 4, affine=True, track_running_stats=True)),
    "recomputed": Recomputed,
    "compiled in place": normed_and_compiled,
}


@pytest.mark.parametrize("student", STUDENTS)
def test_batch_statistics_are_the_models_and_not_those_of_its_teacher(
    tmp_path: Path, student: str
) -> None:
    single, double = (
        partial(taught, teacher(), torch.float32),
        partial(taught, teacher().double(), torch.float64),
    )
    plain = STUDENTS["BatchNorm2d"] if student == "compiled in place" else None
    met = Met(
        STUDENTS[student],
        (IMAGES, TARGETS),
        Loss(call=single),
        double,
        norm_stats="batch",
        trained=plain,
    )
    iterates = replace(met, values=single).record(tmp_path / "iterates")
    assert_the_oracle_agrees(met, replay(met, iterates, tmp_path / "run"), iterates)
