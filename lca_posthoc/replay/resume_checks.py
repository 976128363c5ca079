"""Check before resuming that checkpoints, model, losses and data match the run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from .. import results
from ..checkpoints.optimizer_steps import about_other_moments
from ..checkpoints.trajectory import Checkpoint
from ..cluster import Cluster
from ..errors import InputError
from ..results import LossRecord, RunWriter, StoredTensor
from .prepare import ask
from .requests import LossesRequest, RunRequest
from .worker import losses_at


def same_checkpoints(writer: RunWriter, checkpoints: list[Checkpoint], root: str) -> None:
    """Reject checkpoints that do not begin with the recorded ones, moments included; more may
    follow.

    A file that no committed number relies on yet may differ.

    Args:
        writer: of the run.
        checkpoints: of the trajectory.
        root: their directory, for the message.

    Raises:
        InputError: naming the first difference.
    """
    steps = [checkpoint.step for checkpoint in checkpoints]
    for index, checkpoint in enumerate(writer.manifest.checkpoints):
        if index >= len(checkpoints) or steps[index] != checkpoint.step:
            what = (
                f"step {steps[index]} is new before step {checkpoint.step}"
                if checkpoint.step in steps
                else f"step {checkpoint.step} is missing"
            )
        elif not _same_files(checkpoints[index], checkpoint) and writer.relies_on(index):
            what = f"the content of step {checkpoint.step} differs"
        else:
            now = checkpoints[index].moments
            if now != checkpoint.moments and writer.relies_on_moments(index):
                path = f"{root.rstrip('/')}/{checkpoint.moments_file}"
                raise InputError(
                    about_other_moments(path, checkpoint.step, checkpoint.moments, now)
                )
            continue
        raise InputError(
            f"{root} holds other checkpoints than {writer.path} was made from: {what}. Restore "
            "them, or write another run with --out."
        )


def _same_files(one: Checkpoint, other: Checkpoint) -> bool:
    """Tell whether two checkpoints are equal except for their moments."""
    return replace(one, moments=None) == replace(other, moments=None)


def same_tensors(writer: RunWriter, tensors: list[StoredTensor]) -> None:
    """Reject a model whose tensors differ from the recorded ones.

    Args:
        writer: of the run.
        tensors: of the task's model.

    Raises:
        InputError: naming a tensor.
    """
    before, now = (
        {tensor.spec.name: tensor for tensor in table}
        for table in (writer.manifest.tensors, tensors)
    )
    if tensors != writer.manifest.tensors:
        name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        raise InputError(
            f"the task's model differs from the model of {writer.path}: tensor {name!r} "
            "differs. Build the model that was trained, or write another run with --out."
        )


def same_loss(name: str, recorded: LossRecord, probed: LossRecord, same_end: bool) -> None:
    """Reject a loss that differs from the recorded one of its name: in a setting, or in value or
    gradient norm on a fixed sample.

    Args:
        name: of the loss.
        recorded: by the run.
        probed: by the task now.
        same_end: whether both probes end at the same checkpoint.

    Raises:
        InputError: naming the difference.
    """
    from ..numerics.objective import Identity

    for setting in ("on", "kind", "per", "examples", "groups", "counts"):
        if getattr(recorded, setting) != getattr(probed, setting):
            raise InputError(
                _other_loss(name, setting, getattr(recorded, setting), getattr(probed, setting))
            )
    for place in (0, 1) if same_end else (0,):
        before, now = recorded.identity[place], probed.identity[place]
        if before and now and not Identity(**before).matches(Identity(**now)):
            where = "first" if place == 0 else "last"
            shown = [
                f"{known['loss']:.6g} and {known['gradient_norm']:.6g} on a sample"
                for known in (before, now)
            ]
            raise InputError(
                _other_loss(name, f"value and gradient norm at the {where} checkpoint", *shown)
            )


def same_values(
    cluster: Cluster,
    writer: RunWriter,
    common: RunRequest[Any],
    again: Mapping[str, Collection[int]],
) -> None:
    """Reject a loss whose value over all of its data has changed, at a checkpoint where a committed
    span recorded it.

    Args:
        cluster: one of its workers evaluates the losses.
        writer: of the run.
        common: the fields that requests of spans share.
        again: committed spans that will be recomputed, by loss.

    Raises:
        InputError: naming the loss and both values.
    """
    known = {
        name: results.meeting(writer.commits(name), again.get(name, ()))
        for name in common.setup.losses
    }
    meetings: dict[int, list[str]] = {}
    for name, meeting in known.items():
        if meeting is not None:
            meetings.setdefault(meeting[0], []).append(name)
    if not meetings:
        return
    checkpoints = writer.manifest.checkpoints
    request = LossesRequest(
        setup=common.setup,
        points=replace(
            common.points, checkpoints={index: checkpoints[index] for index in meetings}
        ),
        run=common.run,
        batch_sizes=common.batch_sizes,
        meetings=meetings,
    )
    for name, now in ask(cluster, losses_at, request).losses.items():
        index, before = known[name] or (0, now)
        if results.differ(writer.commits(name), before, now):
            field = f"value over its whole data at step {checkpoints[index].step}"
            raise InputError(_other_loss(name, field, f"{before:.8g}", f"{now:.8g}"))


def _shortly(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _other_loss(name: str, field: str, before: object, now: object) -> str:
    return (
        f"loss {name!r} is not the one recorded under that name: its {field} was "
        f"{_shortly(before)}, now {_shortly(now)}. Give the new loss another name, drop the old "
        f"one with `lca remove RUN --loss {name}`, or write another run with --out."
    )
