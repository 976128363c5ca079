"""A split as consecutive batches in data-set order, resident on the device when it fits, streamed when it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import torch
from torch.utils.data import default_collate

from ..errors import InputError

_CPU_SAVED_BYTES = 32 * 2**20
_CUDA_SAVED_BYTES = 2 * 2**30
_RESIDENT_SHARE = 0.25


def move(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A batch on the device; floating tensors in the dtype of the computation, all others as they are."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, dtype) if batch.is_floating_point() else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device, dtype) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(move(value, device, dtype) for value in batch)
    return batch


def _bytes(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, Mapping):
        return sum(_bytes(value) for value in batch.values())
    return sum(_bytes(value) for value in batch) if isinstance(batch, tuple | list) else 0


class Split:
    """The examples of one split, cut into batches of `batch_size`; the last may be smaller.

    Args:
        name: for messages.
        data: `(inputs, targets)` tensors with the same first extent, or a map-style Dataset.
        device: where batches are wanted.
        dtype: of floating tensors.
    """

    def __init__(self, name: str, data: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.name = name
        self._data = data
        self._device, self._dtype = device, dtype
        self._tensors = isinstance(data, tuple) and bool(data) and all(isinstance(each, torch.Tensor) for each in data)
        self.examples = self._count()
        self._resident: list[Any] = []
        self._resident_batch_size = 0

    def _count(self) -> int:
        if self._tensors:
            lengths = {len(each) for each in self._data}
            if len(lengths) != 1:
                raise InputError(
                    f"split {self.name!r} has tensors of different lengths: {sorted(lengths)}. Give one target per input."
                )
            count = lengths.pop()
        elif self._is_dataset():
            count = len(self._data)
        else:
            raise InputError(
                f"split {self.name!r} is a {self._kind()}. Give (inputs, targets) tensors or a map-style Dataset "
                "with __len__ and __getitem__."
            )
        if count == 0:
            raise InputError(f"split {self.name!r} is empty. A loss needs at least one example.")
        return count

    def _kind(self) -> str:
        data = self._data
        inside = sorted({type(each).__name__ for each in data}) if isinstance(data, tuple | list) else []
        return type(data).__name__ + (f" of {', '.join(inside)}" if inside else "")

    def _is_dataset(self) -> bool:
        """Whether examples can be had one by one; containers that are more likely columns are not guessed at."""
        data = self._data
        columns = isinstance(data, list) and any(isinstance(each, torch.Tensor) for each in data)
        if columns or isinstance(data, Mapping | tuple | str):
            return False
        return hasattr(data, "__getitem__") and hasattr(data, "__len__")

    def slice(self, start: int, stop: int) -> Any:
        """Examples `start` to `stop` as one batch on the device."""
        if self._tensors:
            batch: Any = tuple(each[start:stop] for each in self._data)
        else:
            try:
                batch = default_collate([self._data[index] for index in range(start, min(stop, self.examples))])
            except Exception as error:
                raise InputError(
                    f"examples {start} to {min(stop, self.examples) - 1} of split {self.name!r} cannot be made into a batch: "
                    f"{type(error).__name__}: {error}. Give a map-style Dataset of tensors, numbers, or tuples and dicts of them."
                ) from error
        return move(batch, self._device, self._dtype)

    def batches(self, batch_size: int) -> Iterator[Any]:
        """Every example once, in data-set order."""
        if self._resident_batch_size == batch_size:
            yield from self._resident
            return
        keep: list[Any] | None = []
        room = self._room()
        for start in range(0, self.examples, batch_size):
            batch = self.slice(start, start + batch_size)
            if keep is not None:
                room -= _bytes(batch)
                keep.append(batch)
                keep = keep if room >= 0 else None
            yield batch
        if keep is not None:
            self._resident, self._resident_batch_size = keep, batch_size

    def _room(self) -> float:
        """Bytes this split may occupy: a share of what is free now; it decides speed, never a result."""
        if self._device.type == "cuda":
            return _RESIDENT_SHARE * torch.cuda.mem_get_info(self._device)[0]
        return _RESIDENT_SHARE * float(psutil.virtual_memory().available)


def automatic_batch_size(split: Split, forward: Callable[[Any], Any], device: torch.device) -> int:
    """A power of two chosen from shapes alone, so that the same model and data always get the same batches.

    The bytes autograd saves for one example are counted on one forward pass of two; a batch saves at most 32 MiB on a CPU
    (what stays near the cache) and 2 GiB on a GPU.
    """
    count = min(2, split.examples)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):  # a weight is saved once, whatever the batch
            saved[tensor.data_ptr()] = max(saved.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward(split.slice(0, count))
    del kept
    budget, most = (_CUDA_SAVED_BYTES, 2**16) if device.type == "cuda" else (_CPU_SAVED_BYTES, 2**11)
    fits = max(1, budget * count // max(1, sum(saved.values())))
    return int(min(most, 2 ** (fits.bit_length() - 1)))
