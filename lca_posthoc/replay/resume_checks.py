"""Checks before a run is resumed: its checkpoints, model, losses and data are those it was made
with.
"""

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
    """Refuse checkpoints that do not begin with the recorded ones, moments included, but for those
    no number relies on yet; more may follow.
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
    """Tell whether two checkpoints are the same but for their moments."""
    return replace(one, moments=None) == replace(other, moments=None)


def same_tensors(writer: RunWriter, tensors: list[StoredTensor]) -> None:
    """Refuse a model with other tensors than those that are recorded."""
    before, now = (
        {tensor.spec.name: tensor for tensor in table}
        for table in (writer.manifest.tensors, tensors)
    )
    if tensors != writer.manifest.tensors:
        name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        raise InputError(
            f"the task's model has other tensors than {writer.path} was made with: {name!r} "
            "differs. Build the model that was trained, or write another run with --out."
        )


def same_loss(name: str, recorded: LossRecord, probed: LossRecord, same_end: bool) -> None:
    """Refuse another loss under a recorded name: other settings, or another value or gradient norm
    on a fixed sample.
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
    """Refuse losses whose values over all of their data are others than before, at a checkpoint
    where those are known.

    Args:
        cluster: one worker of which evaluates them.
        writer: of the run.
        common: what requests of spans have in common.
        again: committed spans that will be computed again, by loss.
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
