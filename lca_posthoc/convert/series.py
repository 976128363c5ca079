"""Represent a series of checkpoints to convert, and decide for every format which tensors can be
stored, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoints.headers import MAX_TENSORS, TensorHeader
from ..errors import InputError
from ..recording.staging import CODES

Tensors = dict[str, torch.Tensor]
Progress = Callable[[str, int, int], None]

SIZES = {name: dtype.itemsize for dtype, name in CODES.items()}


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Hold the numbers of an optimiser to write beside an iterate.

    Attributes:
        record: record of the step that led to the iterate; None if unknown.
        moments: returns the moments after that step, by their names in their file; None if there
            are none.
        bytes: size of the moments.
        identity: checksum of their source and of the record.
    """

    record: str | None = None
    moments: Callable[[], Tensors] | None = None
    bytes: int = 0
    identity: str = ""


@dataclass(frozen=True)
class Iterate:
    """Give access to one training step of a source.

    Attributes:
        step: training step.
        origin: its name in messages.
        read: returns its tensors, contiguous and each with its own memory.
        identity: returns a checksum of their source, which shows whether an earlier import was of
            the same series.
        beside: numbers of the optimiser.
    """

    step: int
    origin: str
    read: Callable[[], Tensors]
    identity: Callable[[], str]
    beside: Beside = Beside()


@dataclass(frozen=True)
class Series:
    """Hold the iterates to convert, in order of step, the tensors of each, and notes for the user."""

    iterates: list[Iterate]
    tensors: dict[str, TensorHeader]
    notes: list[str]


def headers_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorHeader]:
    """Return names, types and shapes of tensors as a safetensors file states them."""
    return {
        name: TensorHeader(CODES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def same_headers(
    headers: Mapping[str, TensorHeader], known: Mapping[str, TensorHeader], file: str, first: str
) -> None:
    """Check that a checkpoint has the tensors of the same model.

    Args:
        headers: tensors of the checkpoint.
        known: tensors of the first checkpoint.
        file: name of the checkpoint for messages.
        first: name of the first checkpoint for messages.

    Raises:
        InputError: if a tensor differs in presence, type or shape.
    """
    for name in sorted({*headers, *known}):
        if headers.get(name) != known.get(name):
            this, other = (
                f"{table[name].dtype} {list(table[name].shape)}" if name in table else "absent"
                for table in (headers, known)
            )
            raise InputError(
                f"tensor {name!r} is {this} in {file} but {other} in {first}. All checkpoints must "
                "come from one model; move the odd ones away, or choose names with --pattern."
            )


def taken(state: Mapping[str, object], file: str) -> tuple[Tensors, list[str]]:
    """Return the tensors of a state dict, tied ones only under their first name, and notes on what
    was left out.

    Args:
        state: the state dict.
        file: name of the checkpoint for messages.

    Raises:
        InputError: if safetensors cannot store a tensor, or there are too many.
    """
    tensors, first, notes = Tensors(), dict[Any, str](), []
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            notes.append(
                f"left out {name!r} of every checkpoint: it is not a tensor but a "
                f"{type(value).__name__}"
            )
            continue
        _storable(name, value, file)
        place = (
            value.untyped_storage().data_ptr(),
            value.storage_offset(),
            value.dtype,
            value.shape,
            value.stride(),
        )
        same = first.setdefault(place, name) if value.numel() else name
        if same != name:
            notes.append(f"left out {name!r} of every checkpoint: it is {same!r} again, tied to it")
            continue
        tensors[name] = value.detach()
    if len(tensors) > MAX_TENSORS:
        raise InputError(
            f"{file} holds {len(tensors):,} tensors; a series can have at most {MAX_TENSORS:,}."
        )
    return tensors, notes


def _storable(name: str, value: torch.Tensor, file: str) -> None:
    plain = value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu"
    if not plain or value.dtype not in CODES:
        kind = str(
            value.dtype if plain else value.layout if value.device.type == "cpu" else value.device
        )
        raise InputError(
            f"tensor {name!r} in {file} is of a kind safetensors cannot hold ({kind}). Save a "
            "plain dense tensor."
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"tensor {name!r} in {file} has a name that is not text. Rename it."
        ) from None
    if name == "__metadata__":
        raise InputError(f"tensor {name!r} in {file} has a name safetensors reserves. Rename it.")


def separate(tensors: Tensors) -> Tensors:
    """Return the same numbers in contiguous tensors that do not share memory."""
    seen, separated = set[int](), Tensors()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.resolve_conj().contiguous()
        separated[name] = tensor.clone() if storage in seen and tensor.numel() else tensor
        seen.add(storage)
    return separated
