"""Copies between the host and a CUDA device on streams of their own, through page-locked memory: what
is computed there goes on, and the host waits for no copy before it needs the numbers.
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

_AT_ONCE = 2**26  # bytes that are page-locked together


@dataclass(frozen=True)
class Arriving(Generic[Load]):
    """Tensors that are on their way to a device, and an object that holds them.

    Attributes:
        load: the object.
        copies: the tensors.
        copied: happens on the device once they are there.
    """

    load: Load
    copies: list[Tensor]
    copied: torch.cuda.Event

    def here(self) -> Load:
        """Return it, for what the current stream is asked to do from now on: that waits for the
        copies, the host does not.
        """
        if self.copies:
            current = torch.cuda.current_stream(self.copies[0].device)
            current.wait_event(self.copied)
            for tensor in self.copies:  # whose memory is the other stream's
                tensor.record_stream(current)
        return self.load


class ToDevice:
    """Copies tensors of the host to a CUDA device, from any thread.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream(device)

    def begin(self, load: Callable[[Copy], Load]) -> Arriving[Load]:
        """Begin to copy; `load(copy)` returns an object that holds the copies it asks for."""
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
    """Return a copy on a device, which is there once the current stream has come so far; a large
    tensor is page-locked piece by piece.
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
    """Copies numbers that a device computes into memory of the host.

    Args:
        device: the device; from a CPU they are copied at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device) if device.type == "cuda" else None
        self._leaving: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []

    def begin(self, values: Tensor, place: Tensor) -> None:
        """Begin to copy; `values` may change afterwards, and `place`, on the host, has them once
        `finish` has returned.
        """
        if self._stream is None:
            place.copy_(values)
            return
        own = values.clone()  # before the current stream changes them
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        staged = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        with torch.cuda.stream(self._stream):
            staged.copy_(own, non_blocking=True)
        own.record_stream(self._stream)  # it is freed before it is copied
        copied = _event()
        copied.record(self._stream)
        self._leaving.append((staged, place, copied))

    def finish(self) -> None:
        """Wait until all that was begun is in its place."""
        for staged, place, copied in self._leaving:
            copied.synchronize()
            place.copy_(staged)
        self._leaving.clear()


@functools.cache
def to_device(device: torch.device, what: str) -> ToDevice:
    """Return what copies tensors to a CUDA device, the same one for all that is called alike: it
    waits for no copies of others, and takes the memory of earlier ones.
    """
    return ToDevice(device)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
