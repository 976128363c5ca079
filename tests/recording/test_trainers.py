"""The trainers people use: as many iterates as optimiser steps, and a replay whose sums close;
several processes, one series.
"""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lca_posthoc
from lca_posthoc import Loss, Task, open_trajectory
from lca_posthoc.checkpoints.optimizer_steps import (
    OptimizerStep,
    moments_path,
    read_optimizer_step,
)
from lca_posthoc.errors import ResourceError

# trainers warn of what is not ours: a directory that is not empty, data that cannot be resumed
pytestmark = pytest.mark.filterwarnings("default::UserWarning")

HERE = Path(__file__).parents[2]
EXAMPLES, BATCH, ACCUMULATE, EPOCHS = 96, 4, 4, 2
OPTIMISER_STEPS = EXAMPLES // (BATCH * ACCUMULATE) * EPOCHS


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(EXAMPLES, 6, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


class Rows(Dataset[dict[str, Tensor]]):
    """The data as transformers' collator wants it."""

    def __init__(self) -> None:
        self.inputs, self.labels = data()

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[at], "labels": self.labels[at]}


class WithLoss(nn.Module):
    """A model that gives its loss, as transformers' are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.net(inputs)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


def with_transformers(
    directory: Path,
    until: int = OPTIMISER_STEPS,
    resume: bool = False,
    decays: bool = False,
    max_norm: float = 1.0,
    save_every: int = 4,
    **options: Any,
) -> nn.Module:
    from transformers import Trainer, TrainingArguments

    from lca_posthoc.recording.transformers import RecorderCallback

    arguments = TrainingArguments(
        output_dir=str(directory / "out"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATE,
        max_steps=until,
        learning_rate=0.05,
        lr_scheduler_type="linear" if decays else "constant",
        max_grad_norm=max_norm,
        save_steps=save_every,
        save_strategy="steps",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )
    model = WithLoss()
    callbacks = [RecorderCallback(directory / "checkpoints", **options)]
    Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks).train(
        resume_from_checkpoint=resume
    )
    return model


def with_lightning(
    directory: Path,
    until: int = OPTIMISER_STEPS,
    resume: bool = False,
    decays: bool = False,
    max_norm: float = 1.0,
    save_every: int = 4,
    **options: Any,
) -> nn.Module:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lca_posthoc.recording.lightning import RecorderCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, OPTIMISER_STEPS)
            return ([optimizer], [{"scheduler": rate, "interval": "step"}]) if decays else optimizer

    kept = ModelCheckpoint(
        directory / "out", every_n_train_steps=save_every, save_last=True, save_top_k=-1
    )
    trainer = lightning.Trainer(
        max_steps=until,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=max_norm or None,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RecorderCallback(directory / "checkpoints", **options), kept],
    )
    model = Module()
    loader = DataLoader(TensorDataset(*data()), batch_size=BATCH)
    trainer.fit(model, loader, ckpt_path=str(directory / "out" / "last.ckpt") if resume else None)
    return model


TRAINERS = {"transformers": with_transformers, "lightning": with_lightning}


@pytest.fixture(params=TRAINERS)
def trainer(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    return TRAINERS[request.param]


def iterates(directory: Path) -> dict[int, dict[str, Tensor]]:
    return {
        int(path.stem.removeprefix("step_")): load_file(path)
        for path in sorted(directory.glob("step_*.safetensors"))
    }


def records(directory: Path) -> dict[int, OptimizerStep]:
    """Return the records of all iterates but the first, which has none."""
    stated = {
        checkpoint.step: read_optimizer_step(checkpoint)
        for checkpoint in open_trajectory(directory).checkpoints
    }
    assert stated.pop(0) is None
    return {step: record for step, record in stated.items() if record is not None}


class Held(nn.Module):
    """The trained part under the name it has in both trainers' models."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.net(inputs)
        return scores


def test_a_trainer_records_every_optimiser_step_and_its_run_adds_up(
    tmp_path: Path, trainer: Callable[..., nn.Module]
) -> None:
    model = trainer(tmp_path)
    found = iterates(tmp_path / "checkpoints")
    assert list(found) == list(range(OPTIMISER_STEPS + 1))
    assert all(torch.equal(found[0][name], each) for name, each in Held().state_dict().items())
    assert all(
        torch.equal(found[OPTIMISER_STEPS][name], each) for name, each in model.state_dict().items()
    )
    assert all(
        not torch.equal(found[at]["net.0.weight"], found[at + 1]["net.0.weight"])
        for at in range(OPTIMISER_STEPS)
    )
    task = Task(Held, {"train": data()}, {"train": Loss(F.cross_entropy, on="train")})
    run = lca_posthoc.run(
        tmp_path / "checkpoints", task, out=tmp_path / "run.lca", cluster="inline", device="cpu"
    )
    steps = run["train"].steps
    assert float(abs(steps.residual).max()) <= 1e-3
    assert float(steps.loss_end[-1]) < float(steps.loss_start[0])
    change = float(steps.loss_end[-1] - steps.loss_start[0])
    assert float(run["train"].tensors.allocated.sum() + steps.residual.sum()) == pytest.approx(
        change, abs=1e-6
    )


def test_a_training_that_is_resumed_goes_on_with_its_series(
    tmp_path: Path, trainer: Callable[..., nn.Module]
) -> None:
    """Stopped after its checkpoint of step 4, and in another directory not at all: the same
    series.
    """
    trainer(tmp_path / "whole")
    trainer(tmp_path / "cut", until=4)
    trainer(tmp_path / "cut", resume=True)
    whole, cut = (iterates(tmp_path / each / "checkpoints") for each in ("whole", "cut"))
    assert list(whole) == list(cut)
    assert all(torch.equal(cut[4][name], each) for name, each in whole[4].items())


def test_lightning_saves_its_model_after_training(tmp_path: Path) -> None:
    model = with_lightning(tmp_path)
    model.trainer.save_checkpoint(tmp_path / "final.ckpt")  # type: ignore[operator, union-attr]
    assert (tmp_path / "final.ckpt").exists()


class Stop(Exception):
    """What ends a training early."""


def test_a_training_that_fails_lets_go_of_its_directory(
    tmp_path: Path, trainer: Callable[..., nn.Module]
) -> None:
    calls = []

    def fails(*given: Any, **more: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 3 * ACCUMULATE:
            raise Stop
        return cross_entropy(*given, **more)

    cross_entropy = F.cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", fails)
        with pytest.raises(Stop):
            trainer(tmp_path)
    gc.collect()
    assert list(iterates(tmp_path / "checkpoints")) == [0, 1, 2, 3]
    trainer(tmp_path)
    assert list(iterates(tmp_path / "checkpoints")) == list(range(OPTIMISER_STEPS + 1))


def test_a_trainer_takes_the_recorders_options(
    tmp_path: Path, trainer: Callable[..., nn.Module]
) -> None:
    trainer(tmp_path, every=5)
    assert list(iterates(tmp_path / "checkpoints")) == [0, 5, 10]


def test_a_trainer_records_what_its_optimiser_did(
    tmp_path: Path, trainer: Callable[..., nn.Module]
) -> None:
    model = trainer(tmp_path, decays=True, save="moments", max_norm=0.0)
    stated = records(tmp_path / "checkpoints")
    assert list(stated) == list(range(1, OPTIMISER_STEPS + 1))
    for step, record in stated.items():
        assert (record.since, record.optimizer_steps, record.clip) == (step - 1, 1, 1.0)
        assert {name for group in record.groups for name in group.tensors} == {
            name for name, _ in model.named_parameters()
        }
        for group in record.groups:
            assert group.optimizer == "AdamW"
            assert group.lr == pytest.approx(0.05 * (1 - (step - 1) / OPTIMISER_STEPS))
            assert (group.steps, group.has_memory) == (step, step > 1)
            beside = load_file(moments_path(tmp_path / "checkpoints", step))
            assert group.betas is not None
            if step == 1:  # whose moments are of the first gradient alone
                norms = [float(beside[f"exp_avg/{name}"].norm()) for name in group.tensors]
                expected = [norm / (1 - group.betas[0]) for norm in norms]
                assert group.gradient_norms == pytest.approx(expected, rel=1e-5)


def test_a_trainers_clipping_is_noted_as_far_as_it_tells(
    tmp_path: Path, trainer: Callable[..., nn.Module]
) -> None:
    trainer(tmp_path / "far", max_norm=1e6)
    far = records(tmp_path / "far" / "checkpoints")
    assert {record.clip for record in far.values()} == {1.0}
    trainer(tmp_path / "near", max_norm=0.01)
    near = records(tmp_path / "near" / "checkpoints")
    (before,), (after,) = (
        [sum(norm**2 for group in first.groups for norm in group.gradient_norms) ** 0.5]
        for first in (far[1], near[1])
    )
    assert after == pytest.approx(0.01, rel=1e-3)
    if trainer is with_lightning:
        assert near[1].clip == pytest.approx(0.01 / before, rel=1e-3)
    else:
        assert {record.clip for record in near.values()} == {None}


def test_a_trainer_that_will_not_find_space_does_not_begin(
    tmp_path: Path, trainer: Callable[..., nn.Module]
) -> None:
    with pytest.raises(ResourceError, match=r"1,000,000,000,001 iterates of .* has .* free"):
        trainer(tmp_path, until=10**12)
    assert not (tmp_path / "checkpoints").exists()


# --- several processes ----------------------------------------------------------------------------

PROCESS = """\
import sys
import torch
import torch.nn.functional as F
from lca_posthoc import Recorder
from tests.recording.test_trainers import data, net

rank, place, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
model, (inputs, targets) = net(), data()
if how != "alone":
    torch.distributed.init_process_group("gloo", f"file://{place}/meeting", rank=rank, world_size=2)
    if how == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh)
        wrapped = model
else:
    wrapped = model
optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.05)
with Recorder(f"{place}/checkpoints", wrapped).attach(optimizer, save="moments"):
    for step in range(5):
        optimizer.zero_grad()
        F.cross_entropy(wrapped(inputs), targets).backward()  # the same batch on both: the mean of two equal gradients is exact
        optimizer.step()
if how != "alone":
    torch.distributed.destroy_process_group()
"""


def together(place: Path, how: str, processes: int) -> dict[int, dict[str, Tensor]]:
    place.mkdir()
    started = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), place, how], cwd=HERE)
        for rank in range(processes)
    ]
    assert [each.wait(120) for each in started] == [0] * processes
    return {
        step: {name.removeprefix("module."): each for name, each in tensors.items()}
        for step, tensors in iterates(place / "checkpoints").items()
    }


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_record_one_series_equal_to_that_of_one(tmp_path: Path, how: str) -> None:
    alone, both = together(tmp_path / "alone", "alone", 1), together(tmp_path / how, how, 2)
    assert list(both) == list(alone) == list(range(6))
    own, shared = (records(tmp_path / name / "checkpoints") for name in ("alone", how))
    for step, record in own.items():
        (group,), (other,) = record.groups, shared[step].groups
        assert other.gradient_norms == pytest.approx(group.gradient_norms, rel=1e-5)
        plain = dataclasses.replace(group, tensors=(), gradient_norms=())
        assert dataclasses.replace(other, tensors=(), gradient_norms=()) == plain
        moments, others = (
            load_file(moments_path(tmp_path / name / "checkpoints", step))
            for name in ("alone", how)
        )
        others = {name.replace("module.", ""): moment for name, moment in others.items()}
        assert others.keys() == moments.keys()
        assert all(torch.equal(others[name], moment) for name, moment in moments.items())
    for step, tensors in alone.items():
        assert both[step].keys() == tensors.keys()
        assert all(torch.equal(both[step][name], each) for name, each in tensors.items())
