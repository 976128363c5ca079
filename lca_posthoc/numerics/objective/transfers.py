"""Copy between the host and a CUDA device on separate streams, through page-locked memory.

The device keeps computing, and the host does not wait for a copy until it needs the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Load = TypeVar("Load")
Copy = Callable[[Tensor], Tensor]

_AT_ONCE = 2**26  # bytes that are page-locked at a time


@dataclass(frozen=True)
class Arriving(Generic[Load]):
    """Hold tensors on their way to a device, and an object that contains them.

    Attributes:
        load: the object.
        copies: the tensors.
        copied: event that occurs on the device once they have arrived.
    """

    load: Load
    copies: list[Tensor]
    copied: torch.cuda.Event

    def here(self) -> Load:
        """Return the object for use on the current stream, which waits for the copies; the host
        does not wait.
        """
        if self.copies:
            current = torch.cuda.current_stream(self.copies[0].device)
            current.wait_event(self.copied)
            for tensor in self.copies:  # their memory belongs to the other stream
                tensor.record_stream(current)
        return self.load


class ToDevice:
    """Copy tensors from the host to a CUDA device, from any thread.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream(device)

    def begin(self, load: Callable[[Copy], Load]) -> Arriving[Load]:
        """Start to copy; `load(copy)` returns an object that contains the copies it requests."""
        copies: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor:
            with torch.cuda.stream(self._stream):
                copies.append(_copied(tensor, self._device))
            return copies[-1]

        loaded = load(copy)
        copied = _event()
        copied.record(self._stream)
        return Arriving(loaded, copies, copied)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on a device, which is complete once the current stream reaches this point;
    page-lock a large tensor piece by piece.
    """
    if tensor.nbytes <= _AT_ONCE or not tensor.is_contiguous():
        return tensor.pin_memory().to(device, non_blocking=True)
    copy = torch.empty_like(tensor, device=device)
    numbers = _AT_ONCE // tensor.element_size()
    pieces = (torch.split(whole.reshape(-1), numbers) for whole in (tensor, copy))
    for source, target in zip(*pieces, strict=True):
        target.copy_(source.pin_memory(), non_blocking=True)
    return copy


class FromDevice:
    """Copy numbers from a device into host memory.

    Args:
        device: the device; from a CPU, numbers are copied immediately.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device) if device.type == "cuda" else None
        self._leaving: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []

    def begin(self, values: Tensor, place: Tensor) -> None:
        """Start to copy.

        Args:
            values: numbers on the device; they may change after the call.
            place: tensor on the host; it is filled once `finish` returns.
        """
        if self._stream is None:
            place.copy_(values)
            return
        own = values.clone()  # the current stream may change the original
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        staged = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        with torch.cuda.stream(self._stream):
            staged.copy_(own, non_blocking=True)
        own.record_stream(self._stream)  # Python frees it before the copy is done
        copied = _event()
        copied.record(self._stream)
        self._leaving.append((staged, place, copied))

    def finish(self) -> None:
        """Wait until all copies are complete."""
        for staged, place, copied in self._leaving:
            copied.synchronize()
            place.copy_(staged)
        self._leaving.clear()


@functools.cache
def to_device(device: torch.device, what: str) -> ToDevice:
    """Return the object that copies tensors to a CUDA device; one object for each name waits for no
    other copies and reuses memory.

    Args:
        device: the device.
        what: name of the purpose.
    """
    return ToDevice(device)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
