"""Copy a model into another precision without a second call of its factory, which may read it from
large files.

Parameters and buffers are not all that a module computes with: masks, tables and scales stay in
plain attributes, in lists, in objects of their own. A float32 one beside float64 weights gives
wrong numbers in silence (an infinite mask in attention, say), so every floating tensor a deep copy
reaches is converted on the way.
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
    """Return a copy of a model whose floating tensors are of `dtype`, or None where a copy would
    still lead to the original.

    It is None where deepcopy fails, where an attribute is a view into a parameter's or a buffer's
    memory, and where a function that a module keeps (a hook, say) has tensors or modules of the
    original in its closure.
    """
    if any(_reaches_back(function) for function in _functions(model)):
        return None
    before = next(
        (tensor.dtype for tensor in every_name(model).values() if tensor.is_floating_point()), dtype
    )
    try:
        with _Converting(model, dtype):
            copied = copy.deepcopy(model, _converted(model, dtype))
    except Exception:  # whatever the user's own classes raise: the model is built anew instead
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
    """Return copies of a model's plain parameters for deepcopy to put in their place, by id, so
    that none is copied before it is converted.
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
    """Yield the plain functions that modules keep as attributes and hooks."""
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
