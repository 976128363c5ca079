"""The optimiser's numbers beside the checkpoints: a record of the step that led to each, and files
of its moments.

A record stands in the metadata of the checkpoint that the step led to, as JSON under the key
`optimizer`. Moments lie in a folder of their own below the checkpoints, so that a trajectory never
takes them for one.
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
FIRST, SECOND = "exp_avg/", "exp_avg_sq/"  # before the names of the tensors they belong to
_MAX_BYTES = 16 * 2**20
_MAX_CLASS_NAME = 512


@dataclass(frozen=True, kw_only=True)
class GroupStep:
    """A step of an optimiser with some tensors, all treated alike.

    Args:
        optimizer: the class, `SGD` for those of `torch.optim`, else with its module.
        tensors: their names, as in the files.
        gradient_norms: ‖g‖₂ of each gradient as the optimiser was given it, after unscaling and
            clipping; NaN where it is not known.
        lr: the learning rate of this step.
        weight_decay: 0 where the optimiser has none.
        decoupled: True where the decay is apart from the gradient, as in AdamW.
        momentum: of SGD and RMSprop; else 0.
        dampening: of SGD; else 0.
        nesterov: of SGD.
        maximize: True where the step goes up the gradient.
        betas: of the Adam family; else None.
        eps: None where the optimiser has none.
        amsgrad: of the Adam family.
        centered: of RMSprop.
        alpha: of RMSprop; else None.
        lr_decay: of Adagrad; else None.
        steps: the steps made with these tensors, this one included.
        has_memory: True where a momentum buffer or `exp_avg` existed before the step.
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
    """The step that led from the iterate before to this one.

    Args:
        since: the training step of the iterate before, with whose weights the step began.
        optimizer_steps: the steps made since then, inner ones of wrappers counted: 1 for a plain
            one. `groups` tell of the last that each tensor took part in.
        clip: the factor the gradient was multiplied by before the step; None where nobody said.
        groups: tensors that got no gradient are in none.
    """

    since: int
    optimizer_steps: int
    clip: float | None
    groups: tuple[GroupStep, ...]


def to_metadata(step: OptimizerStep) -> str:
    """Return a record as JSON, for the metadata of a file; `from_metadata` reads it, where every
    number but the norms is finite.
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
    """Return a number as JSON can hold it: NaN as null, an infinite one as a word."""
    return None if math.isnan(number) else number if math.isfinite(number) else str(number)


def from_metadata(text: str) -> OptimizerStep:
    """Return the record that `to_metadata` wrote, from a text that anybody may have written.

    Raises:
        InputError: where the text is no such record.
    """
    try:
        if len(text) > _MAX_BYTES:
            raise ValueError(f"it is longer than {_MAX_BYTES:,} signs")
        record = json.loads(
            text,
            object_pairs_hook=no_duplicates,
            parse_int=short_integer,
            parse_constant=_refuse_constant,
        )
        return _step(_table(record, "the record", OptimizerStep))
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(
            f"the record of the optimiser's step is damaged: {said}. Record the training again, or "
            "replay it without causes."
        ) from None


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _step(record: Mapping[str, object]) -> OptimizerStep:
    entries = record["groups"]
    if type(entries) is not list or len(entries) > MAX_TENSORS:
        raise ValueError("groups is no list of groups")
    groups = tuple(_group(_table(entry, "a group", GroupStep)) for entry in entries)
    names = [name for group in groups for name in group.tensors]
    if len(names) > MAX_TENSORS or len({*names}) < len(names):
        raise ValueError("a tensor is in two groups, or there are too many")
    return OptimizerStep(
        since=_count(record, "since", 0),
        optimizer_steps=_count(record, "optimizer_steps", 0),
        clip=_number(record, "clip", 0) if record["clip"] is not None else None,
        groups=groups,
    )


def _group(entry: Mapping[str, object]) -> GroupStep:
    tensors, norms = entry["tensors"], entry["gradient_norms"]
    if type(tensors) is not list or not tensors or not all(map(_is_name, tensors)):
        raise ValueError("tensors is no list of names")
    if type(norms) is not list or len(norms) != len(tensors):
        raise ValueError("gradient_norms has not one number for each tensor")
    name = entry["optimizer"]
    if type(name) is not str or not is_storable(name) or len(name) > _MAX_CLASS_NAME:
        raise ValueError("optimizer is no name of a class")
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
        raise ValueError(f"{described} has not the entries {', '.join(sorted(names))}")
    return entry


def _count(entry: Mapping[str, object], name: str, least: int) -> int:
    value = entry[name]
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is no whole number from {least}")
    return value


def _flag(entry: Mapping[str, object], name: str) -> bool:
    value = entry[name]
    if type(value) is not bool:
        raise ValueError(f"{name} is neither true nor false")
    return value


def _number(entry: Mapping[str, object], name: str, least: float = -math.inf) -> float:
    value = _finite(entry[name])
    if value is None or value < least:
        raise ValueError(f"{name} is no number" + (f" from {least}" if least == 0 else ""))
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
    raise ValueError("betas is no pair of numbers from 0 to 1")


def _finite(value: object) -> float | None:
    """Return a number of JSON; None for anything else."""
    if type(value) not in (int, float):
        return None
    number = float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else None


def _norm(value: object) -> float:
    if value is None or value == "inf":
        return math.nan if value is None else math.inf
    number = _finite(value)
    if number is None or number < 0:
        raise ValueError("gradient_norms holds something that is no norm")
    return number


def _is_name(value: object) -> bool:
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a pair of surrogates, which no file's header holds
        return False
    return True


def read_optimizer_step(checkpoint: Checkpoint) -> OptimizerStep | None:
    """Return the record of the step that led to a checkpoint; None where its files carry none.

    Raises:
        InputError: where a file cannot be read, or its record is damaged; it names the file.
    """
    return optimizer_step_in({path: read_header(path) for path in checkpoint.files})


def optimizer_step_in(headers: Mapping[Path, Header]) -> OptimizerStep | None:
    """Return the record of the step that led to a checkpoint, from the headers of its files; None
    where they carry none.

    Raises:
        InputError: where the record is damaged; it names the file.
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
    """Return the path of the moments' file of a step.

    >>> moments_path(Path("ckpts"), 12).as_posix()
    'ckpts/moments/step_00000012.safetensors'
    """
    return directory / MOMENTS / f"step_{step:08d}.safetensors"


@dataclass(frozen=True)
class MomentsRecord:
    """The size in bytes of a file of moments, and a CRC32C of samples of it."""

    size: int
    fingerprint: int


def record_of_moments(path: Path) -> MomentsRecord | None:
    """Return the record of a file of moments as it is now; None where there is none.

    Raises:
        InputError: where the file cannot be read.
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
    """Return the message that refuses moments other than those a run recorded.

    Args:
        path: where the file is, or was.
        step: of the checkpoint it belongs to.
        recorded: the record of the run; None where there was no file.
        now: the record of what is there; None where there is no file.
    """
    if now is None:
        what, way = "is gone", "Restore it"
    elif recorded is None:
        what, way = "is new", "Take it away"
    else:
        what, way = "is another file", "Restore it"
    return (
        f"{path} (step {step}), a file of the optimiser's moments, {what} since the run recorded "
        f"what was there. {way}, or write another run with --out."
    )
