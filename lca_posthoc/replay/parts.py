"""Settle which parts of the motion a run computes: its causes, and directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.optimizer_steps import OptimizerStep, read_optimizer_step
from ..checkpoints.trajectory import Checkpoint, Trajectory
from ..errors import InputError
from ..numerics.schema import DIVIDE_BY_MOMENTS, DirectionsRecord
from ..numerics.settings import Settings

if TYPE_CHECKING:
    from .requests import Description


@dataclass(frozen=True, kw_only=True)
class PartsAsked:
    """The parts of the motion that the caller asks for.

    Attributes:
        causes: whether to split each allocation by what moved the weights.
        along: a file of directions; None for none.
    """

    causes: bool = False
    along: str | Path | None = None

    def refuse_new(self, recorded: Settings) -> None:
        """Reject parts that an existing run lacks.

        Raises:
            InputError: naming the option.
        """
        for option, asked, there in (
            ("--causes", self.causes, recorded["signal"] is not None),
            ("--along", self.along is not None, "directions" in recorded),
        ):
            if asked and not there:
                raise InputError(
                    f"this run was made without {option}. Leave it out to resume the run, or "
                    "write another one with --out."
                )
        directions = recorded.get("directions")
        if self.along is not None and directions is not None:
            from ..checkpoints.directions_file import digest_of  # loads torch

            _same_directions(self.along, digest_of(Path(self.along).expanduser()), directions)

    def tells_causes(self, settings: Settings) -> bool:
        """Tell whether the caller asks for causes, or the run's settings record them."""
        return self.causes or settings["signal"] is not None

    def signal(self, settings: Settings, described: Description) -> str | None:
        """Return the loss whose gradient is the signal; None without causes.

        Args:
            settings: of the run.
            described: the task; its first loss is the default.
        """
        if self.causes and settings["signal"] is None:
            return next(iter(described.losses))
        return settings["signal"]

    def settled(self, settings: Settings, described: Description, signal: str | None) -> Settings:
        """Return settings with the signal, and with the record of the directions' file if there is
        one.

        Args:
            settings: of the run, asked for or recorded.
            described: the task.
            signal: the loss whose gradient is the signal; None without causes.

        Raises:
            InputError: if the file is not of this model, or differs from the recorded one.
        """
        recorded = settings.get("directions")
        path = self.along if self.along is not None or recorded is None else recorded["file"]
        if path is None:
            return {**settings, "signal": signal}
        record = _record_of(path, described)
        if recorded is not None:
            _same_directions(path, record["digest"], recorded)
        return {**settings, "signal": signal, "directions": record}


def _same_directions(path: str | Path, digest: int, recorded: DirectionsRecord) -> None:
    """Reject a file whose directions differ from the recorded ones.

    Raises:
        InputError: naming both files.
    """
    if digest != recorded["digest"]:
        raise InputError(
            f"{path} holds other directions than this run was made with ({recorded['file']}). "
            "Name that file with --along, or write another run with --out."
        )


def _record_of(path: str | Path, described: Description) -> DirectionsRecord:
    from ..checkpoints.directions_file import open_for_model

    file = open_for_model(path, described.tensors)
    return DirectionsRecord(
        file=str(Path(path).expanduser().absolute()),
        digest=file.digest,
        directions=file.directions,
        labels=list(file.about.labels),
    )


def about_signal(signal: str | None, described: Description, trajectory: Trajectory) -> list[str]:
    """Return notes on the recorded optimiser steps.

    Args:
        signal: the loss whose gradient is the signal; None without causes.
        described: the task.
        trajectory: holds the records of the optimiser's steps.

    Raises:
        InputError: if the loss cannot be the signal, or no checkpoint has a record.
    """
    if signal is None:
        return []
    loss = described.losses.get(signal)
    if loss is None:
        raise InputError(
            f"loss {signal!r} returns a dict of several losses. Name one of them with "
            f"--signal: {', '.join(map(repr, described.losses))}."
        )
    if loss.on is None or loss.groups is not None:
        what = "is no mean over data" if loss.on is None else "has groups"
        raise InputError(
            f"loss {signal!r} {what}, but the signal is the gradient of the training loss over all "
            "of its data. Name that loss with --signal."
        )
    checkpoints = [
        checkpoint
        for checkpoint in trajectory.checkpoints[1:]
        if checkpoint.step not in trajectory.gone
    ]
    places = {0, len(checkpoints) // 2, len(checkpoints) - 1}
    looked_at = [checkpoints[place] for place in sorted(places)]
    records = {checkpoint: read_optimizer_step(checkpoint) for checkpoint in looked_at}
    without = [checkpoint.step for checkpoint, record in records.items() if record is None]
    if len(without) == len(looked_at):
        raise InputError(
            "--causes needs records of the optimiser's steps, and the checkpoints have none "
            f"(checked steps {', '.join(map(str, without))}). "
            "Record a training with recorder.attach(optimizer), or with recorder.follow(optimizer) "
            "where the loop saves by itself, or leave --causes out."
        )
    notes = [f"the signal is the gradient of loss {signal!r}"]
    if without:
        notes.append(
            "some checkpoints have no record of the optimiser's step, such as that of step "
            f"{without[0]}: their whole motion counts as rest"
        )
    return [*notes, *_without_moments(records)]


def _without_moments(records: Mapping[Checkpoint, OptimizerStep | None]) -> list[str]:
    """Return a note if an optimiser divides by moments that are not stored."""
    for checkpoint, record in records.items():
        names = {group.optimizer for group in record.groups} if record is not None else set()
        divides = sorted(names.intersection(DIVIDE_BY_MOMENTS))
        if divides and checkpoint.moments is None:
            return [
                f"{divides[0]} divides by moments that are not stored, so signal, noise and "
                "momentum are unknown and count as rest. Record with recorder.attach(optimizer, "
                'save="moments").'
            ]
    return []
