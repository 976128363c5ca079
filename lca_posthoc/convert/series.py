"""A series of checkpoints to convert, and the rules that every format shares: which tensors can be
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
    """The numbers of an optimiser that are written beside an iterate.

    `record` tells of the step that led to it, None where that is not known; `moments` gives those
    after it, by their names in their file, and is None where there are none; `bytes` is what they
    take; `identity` is a checksum of their source and of the record.
    """

    record: str | None = None
    moments: Callable[[], Tensors] | None = None
    bytes: int = 0
    identity: str = ""


@dataclass(frozen=True)
class Iterate:
    """One training step of a source.

    `origin` names it in messages; `read` gives its tensors, each with its own memory and
    contiguous; `identity` is a checksum of their source, which tells an import that continues from
    one of another series.
    """

    step: int
    origin: str
    read: Callable[[], Tensors]
    identity: Callable[[], str]
    beside: Beside = Beside()


@dataclass(frozen=True)
class Series:
    """The iterates to convert, in order of their step, the tensors every one of them has, and notes
    for the user.
    """

    iterates: list[Iterate]
    tensors: dict[str, TensorHeader]
    notes: list[str]


def headers_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorHeader]:
    """Return names, dtypes and shapes as a safetensors file states them."""
    return {
        name: TensorHeader(CODES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def same_headers(
    headers: Mapping[str, TensorHeader], known: Mapping[str, TensorHeader], file: str, first: str
) -> None:
    """Refuse a checkpoint of another model."""
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
    """Return the tensors of a state dict, tied ones under their first name alone, and notes on what
    is left out.
    """
    tensors, first, notes = Tensors(), dict[Any, str](), []
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            notes.append(
                f"left out {name!r} of every checkpoint: it is no tensor but a "
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
            f"{file} holds {len(tensors):,} tensors; {MAX_TENSORS:,} are the most a series can "
            "have."
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
    """Return the same numbers in contiguous tensors, none of which shares memory with another."""
    seen, separated = set[int](), Tensors()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.resolve_conj().contiguous()
        separated[name] = tensor.clone() if storage in seen and tensor.numel() else tensor
        seen.add(storage)
    return separated
