"""Read and write the optimiser's numbers beside the checkpoints: a record of each step, and files
of moments.

The record of a step is stored in the metadata of the checkpoint that the step led to, as JSON under
the key `optimizer`. Moments have their own directory below the checkpoints, so that a trajectory
never reads them as checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.text import is_storable
from ..errors import InputError
from .headers import (
    MAX_TENSORS,
    Header,
    no_duplicates,
    read_header,
    short_integer,
    size_and_fingerprint,
)
from .layouts import MOMENTS
from .paths import reached

if TYPE_CHECKING:
    from .trajectory import Checkpoint

METADATA_KEY = "optimizer"
FIRST, SECOND = "exp_avg/", "exp_avg_sq/"  # prefixes of the names of the tensors they belong to
_MAX_BYTES = 16 * 2**20
_MAX_CLASS_NAME = 512


@dataclass(frozen=True, kw_only=True)
class GroupStep:
    """Record an optimiser's step for some tensors that it treats alike.

    Args:
        optimizer: class name, such as `SGD`; with its module if it is not from `torch.optim`.
        tensors: names of the tensors, as in the files.
        gradient_norms: ‖g‖₂ of each gradient as the optimiser received it, after unscaling and
            clipping; NaN if unknown.
        lr: learning rate of this step.
        weight_decay: 0 if the optimiser has none.
        decoupled: True if the decay bypasses the gradient, as in AdamW.
        momentum: momentum of SGD and RMSprop; 0 for others.
        dampening: dampening of SGD; 0 for others.
        nesterov: whether SGD uses Nesterov momentum.
        maximize: True if the step ascends the gradient.
        betas: betas of the Adam family; None for others.
        eps: None if the optimiser has none.
        amsgrad: whether an Adam uses AMSGrad.
        centered: whether RMSprop is centered.
        alpha: alpha of RMSprop; None for others.
        lr_decay: learning rate decay of Adagrad; None for others.
        steps: number of steps made with these tensors, including this one.
        has_memory: True if a momentum buffer or `exp_avg` existed before the step.
    """

    optimizer: str
    tensors: tuple[str, ...]
    gradient_norms: tuple[float, ...]
    lr: float
    weight_decay: float
    decoupled: bool
    momentum: float
    dampening: float
    nesterov: bool
    maximize: bool
    betas: tuple[float, float] | None
    eps: float | None
    amsgrad: bool
    centered: bool
    alpha: float | None
    lr_decay: float | None
    steps: int
    has_memory: bool


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """Record the step from the previous iterate to this one.

    Args:
        since: training step of the previous iterate, from whose weights the step started.
        optimizer_steps: number of steps made since then, counting inner steps of wrappers: 1 for a
            plain step. `groups` describes the last step of each tensor.
        clip: factor that multiplied the gradient before the step; None if nobody reported it.
        groups: steps by group; tensors without a gradient are in none.
    """

    since: int
    optimizer_steps: int
    clip: float | None
    groups: tuple[GroupStep, ...]


def to_metadata(step: OptimizerStep) -> str:
    """Encode a record as JSON for the metadata of a file; `from_metadata` decodes it.

    Every number except the norms must be finite.
    """
    record = {**vars(step), "clip": None if step.clip is None else _written(step.clip)}
    record["groups"] = [
        {
            **{
                name: _written(value) if isinstance(value, float) else value
                for name, value in vars(group).items()
            },
            "gradient_norms": [*map(_written, group.gradient_norms)],
        }
        for group in step.groups
    ]
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _written(number: float) -> float | str | None:
    """Encode a number for JSON: NaN as null, an infinite one as a string."""
    return None if math.isnan(number) else number if math.isfinite(number) else str(number)


def from_metadata(text: str) -> OptimizerStep:
    """Decode a record that `to_metadata` encoded, without trusting the text.

    Raises:
        InputError: if the text is not such a record.
    """
    try:
        return _step(_table(_parsed(text), "the record", OptimizerStep))
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(
            f"the record of the optimiser's step is damaged: {said}. Record the training again, or "
            "replay it without causes."
        ) from None


def _parsed(text: str) -> object:
    if len(text) > _MAX_BYTES:
        raise ValueError(f"it is longer than {_MAX_BYTES:,} characters")
    record: object = json.loads(
        text,
        object_pairs_hook=no_duplicates,
        parse_int=short_integer,
        parse_constant=_refuse_constant,
    )
    return record


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a number in JSON")


def _step(record: Mapping[str, object]) -> OptimizerStep:
    entries = record["groups"]
    if type(entries) is not list or len(entries) > MAX_TENSORS:
        raise ValueError("groups is not a list of groups")
    groups = tuple(_group(_table(entry, "a group", GroupStep)) for entry in entries)
    names = [name for group in groups for name in group.tensors]
    if len(names) > MAX_TENSORS or len({*names}) < len(names):
        raise ValueError("a tensor is in two groups, or there are too many tensors")
    return OptimizerStep(
        since=_count(record, "since", 0),
        optimizer_steps=_count(record, "optimizer_steps", 0),
        clip=_number(record, "clip", 0) if record["clip"] is not None else None,
        groups=groups,
    )


def _group(entry: Mapping[str, object]) -> GroupStep:
    tensors, norms = entry["tensors"], entry["gradient_norms"]
    if type(tensors) is not list or not tensors or not all(map(_is_name, tensors)):
        raise ValueError("tensors is not a list of names")
    if type(norms) is not list or len(norms) != len(tensors):
        raise ValueError("gradient_norms does not have one number for each tensor")
    name = entry["optimizer"]
    if type(name) is not str or not is_storable(name) or len(name) > _MAX_CLASS_NAME:
        raise ValueError("optimizer is not the name of a class")
    return GroupStep(
        optimizer=name,
        tensors=tuple(tensors),
        gradient_norms=tuple(map(_norm, norms)),
        lr=_number(entry, "lr"),
        weight_decay=_number(entry, "weight_decay"),
        decoupled=_flag(entry, "decoupled"),
        momentum=_number(entry, "momentum"),
        dampening=_number(entry, "dampening"),
        nesterov=_flag(entry, "nesterov"),
        maximize=_flag(entry, "maximize"),
        betas=_betas(entry["betas"]),
        eps=_optional(entry, "eps"),
        amsgrad=_flag(entry, "amsgrad"),
        centered=_flag(entry, "centered"),
        alpha=_optional(entry, "alpha"),
        lr_decay=_optional(entry, "lr_decay"),
        steps=_count(entry, "steps", 1),
        has_memory=_flag(entry, "has_memory"),
    )


def _table(
    entry: object, described: str, kind: type[OptimizerStep | GroupStep]
) -> dict[str, object]:
    names = {field.name for field in dataclasses.fields(kind)}
    if type(entry) is not dict or entry.keys() != names:
        raise ValueError(f"{described} does not have the entries {', '.join(sorted(names))}")
    return entry


def _count(entry: Mapping[str, object], name: str, least: int) -> int:
    value = entry[name]
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is not a whole number from {least} on")
    return value


def _flag(entry: Mapping[str, object], name: str) -> bool:
    value = entry[name]
    if type(value) is not bool:
        raise ValueError(f"{name} is neither true nor false")
    return value


def _number(entry: Mapping[str, object], name: str, least: float = -math.inf) -> float:
    value = _finite(entry[name])
    if value is None or value < least:
        raise ValueError(f"{name} is not a number" + (f" from {least} on" if least == 0 else ""))
    return value


def _optional(entry: Mapping[str, object], name: str) -> float | None:
    return None if entry[name] is None else _number(entry, name)


def _betas(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = [*map(_finite, value)] if type(value) is list else []
    match numbers:
        case [float() as first, float() as second] if 0 <= first < 1 and 0 <= second < 1:
            return first, second
    raise ValueError("betas is not a pair of numbers from 0 to 1")


def _finite(value: object) -> float | None:
    """Return a finite number of JSON as a float, or None for anything else."""
    if type(value) not in (int, float):
        return None
    number = float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else None


def _norm(value: object) -> float:
    if value is None or value == "inf":
        return math.nan if value is None else math.inf
    number = _finite(value)
    if number is None or number < 0:
        raise ValueError("gradient_norms holds something that is not a norm")
    return number


def _is_name(value: object) -> bool:
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which no file header can hold
        return False
    return True


def read_optimizer_step(checkpoint: Checkpoint) -> OptimizerStep | None:
    """Read the record of the step that led to a checkpoint; None if its files have none.

    Raises:
        InputError: if a file cannot be read or its record is damaged; the message names the file.
    """
    return optimizer_step_in({path: read_header(path) for path in checkpoint.files})


def optimizer_step_in(headers: Mapping[Path, Header]) -> OptimizerStep | None:
    """Read the record of the step that led to a checkpoint from the headers of its files; None if
    they have none.

    Raises:
        InputError: if the record is damaged; the message names the file.
    """
    for path, header in headers.items():
        text = header.metadata.get(METADATA_KEY)
        if text is not None:
            try:
                return from_metadata(text)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
    return None


def moments_path(directory: Path, step: int) -> Path:
    """Return the path of the file with the moments of a step.

    >>> moments_path(Path("ckpts"), 12).as_posix()
    'ckpts/moments/step_00000012.safetensors'

    Args:
        directory: directory of the checkpoints.
        step: training step.
    """
    return directory / MOMENTS / f"step_{step:08d}.safetensors"


@dataclass(frozen=True)
class MomentsRecord:
    """Identify a file of moments by its size in bytes and a CRC32C of samples."""

    size: int
    fingerprint: int


def record_of_moments(path: Path) -> MomentsRecord | None:
    """Return the record of a file of moments as it is now, or None if there is no file.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        with reached(path):
            if not path.is_file():
                return None
            with path.open("rb") as file:
                return MomentsRecord(*size_and_fingerprint(path, file))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from None


def about_other_moments(
    path: Path | str, step: int, recorded: MomentsRecord | None, now: MomentsRecord | None
) -> str:
    """Return the error message for moments that differ from those a run recorded.

    Args:
        path: where the file is, or was.
        step: step of the checkpoint it belongs to.
        recorded: record in the run; None if there was no file.
        now: record of the current file; None if there is no file.
    """
    if now is None:
        what, way = "is gone", "Restore it"
    elif recorded is None:
        what, way = "is new", "Remove it"
    else:
        what, way = "is another file", "Restore it"
    return (
        f"{path} (step {step}), a file of the optimiser's moments, {what} since the run was "
        f"created. {way}, or write another run with --out."
    )
