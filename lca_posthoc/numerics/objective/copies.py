"""Copy a model into another precision without calling its factory again, which may read large
files.

A module computes with more than parameters and buffers: masks, tables and scales live in plain
attributes, in lists, in separate objects. A float32 tensor among float64 weights silently gives
wrong numbers (an infinite mask in attention, for example), so the deep copy converts every floating
tensor it reaches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...tasks.task import convert_module, every_name


def copy_in(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """Return a copy of a model with floating tensors of `dtype`, or None if a copy would still
    refer to the original.

    It is None if deepcopy fails, if an attribute is a view into the memory of a parameter or
    buffer, or if a function that a module holds, such as a hook, has tensors or modules of the
    original in its closure.

    Args:
        model: the model.
        device: device of the copy.
        dtype: type of its floating tensors.
    """
    if any(_reaches_back(function) for function in _functions(model)):
        return None
    before = next(
        (tensor.dtype for tensor in every_name(model).values() if tensor.is_floating_point()), dtype
    )
    try:
        with _Converting(model, dtype):
            copied = copy.deepcopy(model, _converted(model, dtype))
    except Exception:  # the user's classes may raise anything; the caller builds a new model
        return None
    for module in copied.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.dtype) and value == before:
                vars(module)[name] = dtype
    convert_module(copied, device, dtype)
    return copied


class _Converting(TorchFunctionMode):
    """Convert plain tensors while they are deep-copied."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        named = every_name(model).values()
        self._own = {id(tensor) for tensor in named}
        self._memory = {_place(tensor) for tensor in named} - {0}

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if function is not Tensor.__deepcopy__ or type(args[0]) is not Tensor:
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in self._own and _place(tensor) in self._memory:
            raise ValueError("an attribute shares the memory of a parameter or buffer")
        wide = tensor.dtype
        if tensor.is_floating_point() or tensor.is_complex():
            wide = self._dtype.to_complex() if tensor.is_complex() else self._dtype
        copied = (
            tensor.detach()
            .to(wide, copy=True)
            .requires_grad_(tensor.is_leaf and tensor.requires_grad)
        )
        memo[id(tensor)] = copied
        return copied


def _converted(model: nn.Module, dtype: torch.dtype) -> dict[int, object]:
    """Return converted copies of a model's plain parameters, by id, for deepcopy to use, so that
    none is copied before it is converted.
    """
    return {
        id(parameter): nn.Parameter(
            parameter.detach().to(dtype, copy=True), parameter.requires_grad
        )
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter and parameter.is_floating_point()
    }


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _functions(model: nn.Module) -> Iterator[FunctionType]:
    """Yield the plain functions that modules hold as attributes and hooks."""
    for module in model.modules():
        waiting: list[Any] = list(vars(module).values())
        while waiting:
            value = waiting.pop()
            if isinstance(value, FunctionType):
                yield value
            elif isinstance(value, Mapping):
                waiting += value.values()
            elif isinstance(value, list | tuple):
                waiting += value


def _reaches_back(function: FunctionType) -> bool:
    return any(isinstance(value, Tensor | nn.Module) for value in _enclosed(function))


def _enclosed(function: FunctionType) -> Iterable[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
