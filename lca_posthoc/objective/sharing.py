"""One forward pass for several losses: within a batch, a model called again with the same objects gives the same outputs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def tensors_of(outputs: Any) -> Iterator[Tensor]:
    """The tensors in what a module gives, inside tuples, lists and mappings."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from tensors_of(list(outputs.values()))
    elif isinstance(outputs, tuple | list):
        for each in outputs:
            yield from tensors_of(each)


def _is_plain(outputs: Any) -> bool:
    """Whether nothing is in there whose changes could not be seen."""
    if isinstance(outputs, Mapping):
        return all(map(_is_plain, outputs.values()))
    if isinstance(outputs, tuple | list):
        return all(map(_is_plain, outputs))
    return isinstance(outputs, Tensor | int | float | str | None)


def _versions(outputs: Any) -> list[int]:
    return [each._version for each in tensors_of(outputs)]


@dataclass
class _Memory:
    """Stands for a model's `forward` and remembers what it gave for the batch at hand."""

    forward: Callable[..., Any]
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any, list[int]]] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for known_args, known_kwargs, outputs, versions in self.calls:
            if (
                _same(args, known_args)
                and list(kwargs) == list(known_kwargs)
                and _same(tuple(kwargs.values()), tuple(known_kwargs.values()))
                and _versions(outputs) == versions  # a loss that writes into the outputs keeps what it wrote to itself
            ):
                return outputs if isinstance(outputs, Tensor) else copy.copy(outputs)
        outputs = self.forward(*args, **kwargs)
        if _is_plain(outputs):
            self.calls.append((args, kwargs, outputs, _versions(outputs)))
        return outputs if isinstance(outputs, Tensor) else copy.copy(outputs)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(mine is theirs for mine, theirs in zip(one, other, strict=True))


@contextlib.contextmanager
def shared_forward(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Remember forward passes while open; yields what forgets them, to be called before every batch.

    Scripted modules, whose `forward` cannot be replaced, are called every time.
    """
    if isinstance(model, torch.jit.ScriptModule):
        yield lambda: None
        return
    memory = _Memory(model.forward)
    own = model.__dict__.get("forward")
    model.forward = memory
    try:
        yield memory.calls.clear
    finally:
        del model.forward
        if own is not None:
            model.forward = own
