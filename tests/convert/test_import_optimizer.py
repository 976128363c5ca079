"""Optimisers' states beside imported weights: what they tell is what a recorder wrote down, and
what they do not tell is left out.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import lca_posthoc
from lca_posthoc import Recorder, Run
from lca_posthoc.checkpoints.optimizer_steps import (
    GroupStep,
    OptimizerStep,
    moments_path,
    read_optimizer_step,
)
from lca_posthoc.checkpoints.trajectory import open_trajectory
from lca_posthoc.errors import InputError, ResourceError

from ..helpers.caused_training import Network, splits, task
from ..helpers.cli import contents, lca, says, step_file
from ..helpers.saved_checkpoints import save, told
from ..recording.test_trainers import OPTIMISER_STEPS, with_lightning, with_transformers
from .test_convert import Hostile, imported_with

STEPS = 5
State = dict[str, Any]


# --- layouts ----------------------------------------------------------------------------------------


def of_trainer(place: Path, step: int, state: Mapping[str, Tensor], **beside: State) -> Path:
    """A trainer's folder, as transformers writes it today."""
    path = place / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file(dict(state), path / "model.safetensors", {"format": "pt"})
    return _beside(path, step, beside)


def of_older_trainer(place: Path, step: int, state: Mapping[str, Tensor], **beside: State) -> Path:
    path = place / f"checkpoint-{step}"
    save(path / "pytorch_model.bin", dict(state))
    return _beside(path, step, beside)


def _beside(path: Path, step: int, beside: Mapping[str, State]) -> Path:
    for name in ("optimizer", "scheduler"):
        save(path / f"{name}.pt", beside[name])
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return path


def of_lightning(place: Path, step: int, state: Mapping[str, Tensor], **beside: State) -> Path:
    inside = {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": dict(state),
        "loops": {},
        "callbacks": {},
        "optimizer_states": [beside["optimizer"]],
        "lr_schedulers": [beside["scheduler"]],
    }
    return save(place / f"epoch=0-step={step}.ckpt", inside)


LAYOUTS = {"trainer": of_trainer, "older trainer": of_older_trainer, "lightning": of_lightning}


# --- trainings --------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Layers that are all alike, of which the eleventh comes before the third by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(36, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (examples, classes)."""
        features = self.first(inputs.flatten(1))
        for layer in self.layers:
            features = features + torch.tanh(layer(features))
        return self.out(self.norm(features))


def as_trainers_group(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Two groups, as the trainer of transformers makes them."""
    decayed = [
        p for name, p in model.named_parameters() if "bias" not in name and "norm" not in name
    ]
    others = [p for name, p in model.named_parameters() if "bias" in name or "norm" in name]
    return [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 4)


Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training whose every iterate is recorded, and saved as a trainer does.

    Args:
        optimizer: makes it for a model.
        model: makes the model.
        rate: multiplies the learning rate, by steps.
        saves_first: whether a checkpoint is saved before the scheduler makes its step.
        skipped: the names of parameters that get no gradient in step 3.
        steps: of the optimiser.
    """

    optimizer: Optimizers
    model: Callable[[], nn.Module] = Network
    rate: Callable[[int], float] = warm_up
    saves_first: bool = False
    skipped: tuple[str, ...] = ()
    steps: int = STEPS

    def run(self, place: Path, layout: Callable[..., Path]) -> nn.Module:
        """Record into `recorded`, and save into `saved`."""
        torch.manual_seed(5)
        model = self.model()
        optimizer = self.optimizer(model)
        scheduler = LambdaLR(optimizer, self.rate)

        def saved(step: int) -> None:
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            beside = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            layout(place / "saved", step, state, **beside)

        saved(0)
        inputs, targets = splits()["train"]
        with Recorder(place / "recorded", model).attach(optimizer, save="moments"):
            for step in range(self.steps):
                rows = slice(12 * (step % 4), 12 * (step % 4) + 12)
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
                for name, parameter in model.named_parameters():
                    if step == 2 and name in self.skipped:
                        parameter.grad = None
                optimizer.step()
                if self.saves_first:
                    saved(step + 1)
                scheduler.step()
                if not self.saves_first:
                    saved(step + 1)
        return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(as_trainers_group(model, 0.1), lr=0.02)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.1, betas=(0.8, 0.99))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def dampened(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, dampening=0.2, maximize=True)


TRAININGS = {
    "AdamW": Training(optimizer=adamw),
    "AdamW, saved before its scheduler": Training(optimizer=adamw, saves_first=True),
    "AdamW, some without gradient": Training(optimizer=adamw, skipped=("norm.weight",)),
    "AdamW with names": Training(
        optimizer=lambda model: torch.optim.AdamW(model.named_parameters(), lr=0.02)
    ),
    "Adam": Training(optimizer=adam),
    "SGD": Training(optimizer=momentum),
    "SGD, some without gradient": Training(optimizer=momentum, skipped=("norm.weight",)),
    "SGD, dampened": Training(optimizer=dampened, saves_first=True),
    "layers alike": Training(optimizer=adamw, model=Deep),
    "SGD, layers alike": Training(optimizer=momentum, model=Deep),
}


# --- what they tell ---------------------------------------------------------------------------------


def steps_of(directory: Path) -> dict[int, OptimizerStep | None]:
    return {
        checkpoint.step: read_optimizer_step(checkpoint)
        for checkpoint in open_trajectory(directory).checkpoints
    }


def by_tensor(step: OptimizerStep | None) -> dict[str, tuple[GroupStep, float]]:
    """Return what a record says of each tensor, and the norm of its gradient."""
    return {
        name: (replace(group, tensors=(), gradient_norms=()), norm)
        for group in (step.groups if step is not None else ())
        for name, norm in zip(group.tensors, group.gradient_norms, strict=True)
    }


def assert_told(imported: Path, recorded: Path, but: tuple[str, ...] = ()) -> None:
    """An import tells what a recorder wrote down, of every step it has."""
    own, others = steps_of(imported), steps_of(recorded)
    first = min(own)
    for step in own:
        record, other = own[step], others[step]
        if step == first:
            assert record is None
            continue
        assert record is not None
        assert other is not None
        assert (record.since, record.optimizer_steps) == (step - 1, 1)
        told_of, wanted = by_tensor(record), by_tensor(other)
        assert told_of.keys() == wanted.keys() - set(but)
        for name, (group, norm) in told_of.items():
            if group.optimizer == "SGD":  # whose states count no steps
                group = replace(group, steps=wanted[name][0].steps)
            assert group == wanted[name][0]
            if group.optimizer == "SGD":
                assert norm == pytest.approx(wanted[name][1], rel=1e-4)
            else:
                assert math.isnan(norm)
        if moments_path(recorded, step).exists():
            moments, expected = (load_file(moments_path(p, step)) for p in (imported, recorded))
            assert moments.keys() == {
                name for name in expected if name.partition("/")[2] not in but
            }
            assert all(torch.equal(moments[name], expected[name]) for name in moments)
        else:
            assert not moments_path(imported, step).exists()


def replayed(directory: Path, out: Path, model: Callable[[], nn.Module]) -> Run:
    return lca_posthoc.run(
        directory,
        task(model),
        out=out,
        losses=("train",),
        causes=True,
        cluster="inline",
        device="cpu",
        keep="tensors",
        progress=False,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TRAININGS)
def test_an_import_tells_of_each_step_as_a_recorder_does(
    tmp_path: Path, name: str, layout: str
) -> None:
    TRAININGS[name].run(tmp_path, LAYOUTS[layout])
    heard = told(tmp_path / "saved", tmp_path / "imported")
    assert_told(tmp_path / "imported", tmp_path / "recorded")
    says(heard[0], f"read {STEPS} steps of", name.split(" ")[0].rstrip(",").replace("layers", "A"))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_causes_of_an_import_are_those_of_a_recording(tmp_path: Path, name: str) -> None:
    training = TRAININGS[name]
    training.run(tmp_path, of_trainer)
    told(tmp_path / "saved", tmp_path / "imported")
    runs = [
        replayed(tmp_path / kind, tmp_path / f"{kind}.lca", training.model)["train"].causes
        for kind in ("imported", "recorded")
    ]
    own, other = (run.allocated for run in runs)
    assert own.dims == other.dims
    scale = float(abs(other).sum())
    assert float(abs(own - other).max()) <= 1e-6 * scale
    shares = abs(other).sum([dim for dim in other.dims if dim != "cause"]) / scale
    assert all(float(shares.sel(cause=cause)) > 1e-3 for cause in ("signal", "noise", "momentum"))
    assert float(shares.sel(cause="rest")) < 1e-3


def test_names_are_told_although_files_do_not_keep_the_order(tmp_path: Path) -> None:
    """The test of all layouts can fail: by name, the order of the layers is another one."""
    model = TRAININGS["layers alike"].run(tmp_path, of_trainer)
    stored = list(load_file(tmp_path / "saved" / "checkpoint-1" / "model.safetensors"))
    parameters = [name for name, _ in model.named_parameters()]
    assert [name for name in stored if name in parameters] != parameters
    assert stored.index("layers.10.weight") < stored.index("layers.2.weight")


# --- what they do not tell --------------------------------------------------------------------------


def changed(place: Path, step: int, change: Callable[[State], object]) -> None:
    """Change the state of the optimiser in a trainer's folder."""
    path = place / "saved" / f"checkpoint-{step}" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def every(change: Callable[[State], object]) -> Callable[[Path], None]:
    def change_all(place: Path) -> None:
        for step in range(STEPS + 1):
            changed(place, step, change)

    return change_all


def averaged(place: Path) -> None:
    """The weights that are saved are averages of those that were trained."""
    average: dict[str, Tensor] = {}
    for step in range(STEPS + 1):
        path = place / "saved" / f"checkpoint-{step}" / "model.safetensors"
        own = load_file(path)
        average = {name: (average.get(name, own[name]) + own[name]) / 2 for name in own}
        save_file(average, path)


def with_hostile_states(place: Path) -> None:
    for step in range(STEPS + 1):
        path = place / "saved" / f"checkpoint-{step}" / "optimizer.pt"
        torch.save(Hostile(place / "ran"), path)


def of_each(change: Callable[[State], object]) -> Callable[[State], object]:
    return lambda state: [change(entry) for entry in state["state"].values()]


def of_each_group(**settings: object) -> Callable[[State], object]:
    return lambda state: [group.update(settings) for group in state["param_groups"]]


def huge(entry: State) -> None:
    """Numbers that are one and look like a million millions."""
    entry["exp_avg"] = torch.zeros(1).expand(10**6, 4).T.contiguous()[:1].expand(10**6, -1, 10**6)
    entry["exp_avg_sq"] = entry["exp_avg"]


UNTOLD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "averages": ("AdamW", averaged, "do not explain the motion"),
    "hostile": ("AdamW", with_hostile_states, "could run any code"),
    "amsgrad": ("AdamW", every(of_each_group(amsgrad=True)), "no formula for AMSGrad"),
    "Nesterov": ("SGD", every(of_each_group(nesterov=True)), "no formula for Nesterov"),
    "other betas": (
        "AdamW",
        every(of_each_group(betas=(0.5, 0.999))),
        "do not explain the motion",
    ),
    "odd betas": ("AdamW", every(of_each_group(betas=(0.9, 1.5))), "betas are not a pair"),
    "a rate that is none": ("AdamW", every(of_each_group(lr=10**400)), "lr is not a number"),
    "a rate that is nan": ("AdamW", every(of_each_group(lr=math.nan)), "lr is not a number"),
    "no groups": ("AdamW", every(lambda state: state.pop("param_groups")), "no groups"),
    "words for numbers": (
        "AdamW",
        every(of_each_group(params=["a", "b"])),
        "do not number their parameters",
    ),
    "twice": (
        "AdamW",
        every(lambda state: state["param_groups"][1].update(params=[0, 1])),
        "in two groups",
    ),
    "no steps": (
        "AdamW",
        every(of_each(lambda entry: entry.update(step=torch.tensor(0.5)))),
        "count of steps is invalid",
    ),
    "other slots": (
        "AdamW",
        every(of_each(lambda entry: entry.pop("step"))),
        "an optimiser other than Adam",
    ),
    "sparse": (
        "AdamW",
        every(of_each(lambda entry: entry.update(exp_avg=entry["exp_avg"].to_sparse()))),
        "not plain tensors",
    ),
    "huge": ("AdamW", every(of_each(huge)), "not those of the weights"),
    "no memory": ("SGD", every(lambda state: state["state"].clear()), "store no gradients"),
}


@pytest.mark.parametrize("case", UNTOLD)
def test_what_a_state_does_not_tell_is_left_out_and_said(tmp_path: Path, case: str) -> None:
    name, spoil, words = UNTOLD[case]
    TRAININGS[name].run(tmp_path, of_trainer)
    spoil(tmp_path)
    note = told(tmp_path / "saved", tmp_path / "imported")[0]
    says(note, "left out the optimiser's states", words)
    assert set(steps_of(tmp_path / "imported").values()) == {None}
    assert not (tmp_path / "imported" / "moments").exists()
    assert not (tmp_path / "ran").exists()
    for step in range(STEPS + 1):
        own = load_file(step_file(tmp_path / "imported", step))
        other = load_file(tmp_path / "saved" / f"checkpoint-{step}" / "model.safetensors")
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.RMSprop,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.SGD,
    ],
)
def test_other_optimisers_are_said(tmp_path: Path, optimizer: Any) -> None:
    Training(optimizer=lambda model: optimizer(model.parameters(), lr=0.01)).run(
        tmp_path, of_lightning
    )
    says(
        told(tmp_path / "saved", tmp_path / "imported")[0],
        "left out the optimiser's states",
        "store no gradients" if optimizer is torch.optim.SGD else "an optimiser other than",
    )
    assert set(steps_of(tmp_path / "imported").values()) == {None}


def test_too_many_tensors_of_one_shape_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve weights of one shape are 144 comparisons; names that torch wrote need fewer."""
    named = Training(
        optimizer=lambda model: torch.optim.AdamW(model.named_parameters(), lr=0.02), model=Deep
    )
    for name, training in {"alike": TRAININGS["layers alike"], "named": named}.items():
        training.run(tmp_path / name, of_trainer)
    monkeypatch.setattr("lca_posthoc.convert.optimizers._MOST_COMPARED", 100)
    says(
        told(tmp_path / "alike" / "saved", tmp_path / "alike" / "imported")[0],
        "left out the optimiser's states: too many tensors have one shape",
    )
    told(tmp_path / "named" / "saved", tmp_path / "named" / "imported")
    assert_told(tmp_path / "named" / "imported", tmp_path / "named" / "recorded")


def test_states_of_two_optimisers_are_said(tmp_path: Path) -> None:
    def with_two(place: Path, step: int, state: Mapping[str, Tensor], **beside: State) -> Path:
        path = of_lightning(place, step, state, **beside)
        saved = torch.load(path, weights_only=False)
        saved["optimizer_states"] *= 2
        return save(path, saved)

    TRAININGS["AdamW"].run(tmp_path, with_two)
    says(told(tmp_path / "saved", tmp_path / "imported")[0], "states of several optimisers")


def test_a_step_that_states_do_not_explain_has_no_record(tmp_path: Path) -> None:
    """A learning rate that is neither of those beside it, and one state that is lost."""
    training = replace(TRAININGS["AdamW"], steps=8)
    training.run(tmp_path, of_trainer)
    for step in (1, 2):
        changed(tmp_path, step, of_each_group(lr=0.5))
    (tmp_path / "saved" / "checkpoint-6" / "optimizer.pt").unlink()
    heard = " ".join(told(tmp_path / "saved", tmp_path / "imported"))
    says(heard, "read 4 steps of AdamW", "do not explain the motion on 2 segments of 6")
    stated = steps_of(tmp_path / "imported")
    assert [step for step, record in stated.items() if record] == [1, 4, 5, 8]


def test_tensors_that_move_alike_are_left_out(tmp_path: Path) -> None:
    class Twins(nn.Module):
        """Two tensors that always have the same numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(36, 4, bias=False)
            self.one = nn.Parameter(torch.zeros(4))
            self.two = nn.Parameter(torch.zeros(4))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.out(inputs.flatten(1)) + self.one + self.two

    training = Training(
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.02), model=Twins
    )
    training.run(tmp_path, of_trainer)
    heard = " ".join(told(tmp_path / "saved", tmp_path / "imported"))
    says(heard, "does not determine which tensors 2 of 3 states of the optimiser belong to")
    assert_told(tmp_path / "imported", tmp_path / "recorded", but=("one", "two"))


def test_tensors_that_moved_less_than_a_rounding_leave_the_names_of_others(tmp_path: Path) -> None:
    class Norms(nn.Module):
        """Weights of 1, which cannot move by 1e-8, and biases of 0, which can, of one shape."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(36, 6)
            self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
            self.out = nn.Linear(6, 4)
            nn.init.zeros_(self.first.bias)

        def forward(self, inputs: Tensor) -> Tensor:
            """Return (examples, classes)."""
            features = self.first(inputs.flatten(1))
            for norm in self.norms:
                features = features + torch.tanh(norm(features))
            return self.out(features)

    training = Training(
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-8), model=Norms
    )
    training.run(tmp_path, of_trainer)
    heard = " ".join(told(tmp_path / "saved", tmp_path / "imported"))
    says(heard, "does not determine which tensors 3 of 10 states of the optimiser belong to")
    weights = ("norms.0.weight", "norms.1.weight", "norms.2.weight")
    assert_told(tmp_path / "imported", tmp_path / "recorded", but=weights)


def test_checkpoints_that_are_steps_apart_have_no_record(tmp_path: Path) -> None:
    def seldom(place: Path, step: int, state: Mapping[str, Tensor], **beside: State) -> None:
        if step % 2 == 0:
            of_older_trainer(place, step, state, **beside)

    TRAININGS["AdamW"].run(tmp_path, seldom)  # type: ignore[arg-type]
    heard = told(tmp_path / "saved", tmp_path / "imported")
    assert not any("optimiser" in note for note in heard)
    assert set(steps_of(tmp_path / "imported").values()) == {None}


def test_a_trainers_safetensors_that_are_steps_apart_need_no_import(tmp_path: Path) -> None:
    def seldom(place: Path, step: int, state: Mapping[str, Tensor], **beside: State) -> None:
        if step % 2 == 0:
            of_trainer(place, step, state, **beside)

    TRAININGS["AdamW"].run(tmp_path, seldom)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="need no import"):
        told(tmp_path / "saved", tmp_path / "imported")


# --- files ------------------------------------------------------------------------------------------


def test_an_import_goes_on_with_moments_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """Killed while it writes, and once more when there are new checkpoints."""
    TRAININGS["AdamW"].run(tmp_path, of_trainer)
    source, place = tmp_path / "saved", tmp_path / "imported"
    later = tmp_path / "later"
    (source / f"checkpoint-{STEPS}").rename(later)
    fault = "if count == 4: path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    assert imported_with(fault, source, place).returncode == -signal.SIGKILL
    whole = {step_file(place, step).name for step in range(STEPS)}
    assert {path.name for path in place.glob("step_*")} < whole
    for path in place.glob("step_*"):
        assert (
            moments_path(place, int(path.stem.removeprefix("step_"))).exists()
            or "0000" in path.name
        )
    told(source, place)
    later.rename(source / f"checkpoint-{STEPS}")
    says(lca("import", source, place).stdout, "wrote 1 of 6 checkpoints", "5 were there")
    told(source, tmp_path / "clean")
    assert contents(place) == contents(tmp_path / "clean")
    assert_told(place, tmp_path / "recorded")


def test_moments_that_were_lost_are_written_again(tmp_path: Path) -> None:
    TRAININGS["AdamW"].run(tmp_path, of_trainer)
    told(tmp_path / "saved", tmp_path / "imported")
    before = contents(tmp_path / "imported")
    moments_path(tmp_path / "imported", 2).unlink()
    told(tmp_path / "saved", tmp_path / "imported")
    assert contents(tmp_path / "imported") == before


def test_other_states_than_those_imported_are_refused(tmp_path: Path) -> None:
    TRAININGS["AdamW"].run(tmp_path, of_trainer)
    told(tmp_path / "saved", tmp_path / "imported")
    changed(tmp_path, 3, of_each(lambda entry: entry["exp_avg_sq"].mul_(1 + 1e-6)))
    with pytest.raises(InputError, match="was not imported from"):
        told(tmp_path / "saved", tmp_path / "imported")


def test_a_foreign_file_among_the_moments_is_refused(tmp_path: Path) -> None:
    TRAININGS["AdamW"].run(tmp_path, of_trainer)
    (tmp_path / "imported" / "moments").mkdir(parents=True)
    (tmp_path / "imported" / "moments" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"not empty: it holds 'notes\.txt'"):
        told(tmp_path / "saved", tmp_path / "imported")


def test_a_flipped_bit_of_a_state_is_found(tmp_path: Path) -> None:
    TRAININGS["AdamW"].run(tmp_path, of_trainer)
    path = tmp_path / "saved" / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path, weights_only=True)["state"][0]["exp_avg"]
    data = bytearray(path.read_bytes())
    data[data.index(state.numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"optimizer\.pt is damaged"):
        told(tmp_path / "saved", tmp_path / "imported")


def test_space_for_moments_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TRAININGS["AdamW"].run(tmp_path, of_trainer)
    told(tmp_path / "saved", tmp_path / "imported")
    files = (tmp_path / "imported").rglob("step_*")
    whole = sum(path.stat().st_size for path in files)
    weights = sum(path.stat().st_size for path in (tmp_path / "imported").glob("step_*"))
    monkeypatch.setattr(
        "lca_posthoc.convert.write.shutil.disk_usage",
        lambda place: type("Usage", (), {"free": (whole + weights) // 2}),
    )
    with pytest.raises(ResourceError, match="of the optimiser take"):
        told(tmp_path / "saved", tmp_path / "again")


# --- real trainers ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default::UserWarning")
def test_what_transformers_saves_at_every_step_tells_of_its_optimiser(tmp_path: Path) -> None:
    with_transformers(tmp_path, decays=True, save="moments", save_every=1)
    heard = told(tmp_path / "out", tmp_path / "imported")
    says(
        " ".join(heard), f"read {OPTIMISER_STEPS - 1} steps of AdamW", "first checkpoint is step 1"
    )
    assert_told(tmp_path / "imported", tmp_path / "checkpoints")


@pytest.mark.filterwarnings("default::UserWarning")
def test_what_lightning_saves_at_every_step_tells_of_its_optimiser(tmp_path: Path) -> None:
    with_lightning(tmp_path, decays=True, save="moments", save_every=1)
    heard = told(tmp_path / "out", tmp_path / "imported")
    says(" ".join(heard), f"read {OPTIMISER_STEPS - 1} steps of AdamW", "left out last.ckpt")
    assert_told(tmp_path / "imported", tmp_path / "checkpoints")
