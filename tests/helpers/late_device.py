"""A stand-in for a CUDA device that does what other streams than the computing one are asked for as
late as it may: when something waits for it. Its tensors are those of the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.device("cuda")


class Stream:
    """What a stream was asked for and has not done yet."""

    def __init__(self, *_: object) -> None:
        self.waiting: list[Callable[[], object]] = []

    def run(self) -> None:
        """Do it."""
        for work in self.waiting:
            work()
        self.waiting.clear()

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def wait_stream(self, other: Stream) -> None:
        other.run()


class Event:
    """A place in a stream."""

    def __init__(self) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        assert self.stream is not None, "nothing was recorded"
        self.stream.run()


class LateDevice:
    """The device: it computes at once.

    Attributes:
        computing: the stream on which it does.
        pinned: how many numbers each page-locked tensor has.
        streams: on which tensors are used that are not theirs.
    """

    def __init__(self) -> None:
        self.computing = Stream()
        self._current = self.computing
        self.pinned: list[int] = []
        self.streams: list[Stream] = []

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def later(self, work: Callable[[], object]) -> None:
        """Do some work as late as the current stream may."""
        self._current.waiting.append(work)
        if self._current is self.computing:
            self.computing.run()


def install(monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    """Put a late device in the place of CUDA."""
    late = LateDevice()
    to, copy_, empty, empty_like = Tensor.to, Tensor.copy_, torch.empty, torch.empty_like

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args or str(args[0]) != "cuda":
            return to(self, *args, **kwargs)
        copy = torch.full_like(self, -1)
        late.later(lambda: copy_(copy, self))
        return copy

    def copied(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking:
            late.later(lambda: copy_(self, source))
            return self
        return copy_(self, source)

    def pin(self: Tensor) -> Tensor:
        late.pinned.append(self.numel())
        return self.clone()

    def new(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs)

    monkeypatch.setattr(Tensor, "to", moved)
    monkeypatch.setattr(Tensor, "copy_", copied)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: late.streams.append(stream))
    monkeypatch.setattr(torch, "empty", new)
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: empty_like(like).fill_(-1))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", late.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: late.computing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name, answer in {
        "mem_get_info": (2**30, 2**31),
        "memory_reserved": 3 * 2**20,
        "memory_allocated": 2**20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    return late
