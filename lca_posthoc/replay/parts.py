"""The parts of the motion that a run tells: its causes, and directions."""

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
    """The parts of the motion that are asked for.

    Attributes:
        causes: whether each allocation is to be split by what moved the weights.
        along: a file of directions; None for none.
    """

    causes: bool = False
    along: str | Path | None = None

    def refuse_new(self, recorded: Settings) -> None:
        """Refuse parts that a run was made without.

        Raises:
            InputError: naming the option.
        """
        for option, asked, there in (
            ("--causes", self.causes, recorded["signal"] is not None),
            ("--along", self.along is not None, "directions" in recorded),
        ):
            if asked and not there:
                raise InputError(
                    f"this run was made without {option}. Leave it out to go on with the run, or "
                    "write another one with --out."
                )
        directions = recorded.get("directions")
        if self.along is not None and directions is not None:
            from ..checkpoints.directions_file import digest_of  # loads torch

            _same_directions(self.along, digest_of(Path(self.along).expanduser()), directions)

    def tells_causes(self, settings: Settings) -> bool:
        """Tell whether causes are asked for, or recorded in the settings of a run."""
        return self.causes or settings["signal"] is not None

    def signal(self, settings: Settings, described: Description) -> str | None:
        """Return the loss whose gradient is the signal, by default the first; None where causes are
        not told.
        """
        if self.causes and settings["signal"] is None:
            return next(iter(described.losses))
        return settings["signal"]

    def settled(self, settings: Settings, described: Description, signal: str | None) -> Settings:
        """Return settings with the signal, and with the record of the file of directions where
        there is one.

        Raises:
            InputError: where the file is not of this model, or other than the one that is recorded.
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
    """Refuse a file of other directions than those a run was made with."""
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
    """Return what is worth knowing of the records of the optimiser's steps.

    Raises:
        InputError: where the signal is no loss that can be one, or no checkpoint has a record.
    """
    if signal is None:
        return []
    loss = described.losses.get(signal)
    if loss is None:
        raise InputError(
            f"loss {signal!r} returns a dict, and is several losses. Name one of them with "
            f"--signal: {', '.join(map(repr, described.losses))}."
        )
    if loss.on is None or loss.groups is not None:
        what = "is no mean over data" if loss.on is None else "has groups"
        raise InputError(
            f"loss {signal!r} {what}, and the signal is the gradient of the training loss over all "
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
            "the checkpoints say nothing of the optimiser's steps, from which --causes tells what "
            f"moved the weights (those of steps {', '.join(map(str, without))} were looked at). "
            "Record a training with recorder.attach(optimizer), or recorder.follow(optimizer) "
            "where the loop saves by itself, or leave --causes out."
        )
    notes = [f"the signal is the gradient of loss {signal!r}"]
    if without:
        notes.append(
            "some checkpoints say nothing of the optimiser's steps, such as that of step "
            f"{without[0]}: all that the weights moved there is rest"
        )
    return [*notes, *_without_moments(records)]


def _without_moments(records: Mapping[Checkpoint, OptimizerStep | None]) -> list[str]:
    """Say where an optimiser divides by moments that are not stored."""
    for checkpoint, record in records.items():
        names = {group.optimizer for group in record.groups} if record is not None else set()
        divides = sorted(names.intersection(DIVIDE_BY_MOMENTS))
        if divides and checkpoint.moments is None:
            return [
                f"{divides[0]} divides by moments that are not stored, so signal, noise and "
                "momentum cannot be told and are rest. Record with recorder.attach(optimizer, "
                'save="moments").'
            ]
    return []
