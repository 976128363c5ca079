"""Check what the user's functions return, and suggest corrections."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError, few
from ...tasks.task import Loss
from .device_errors import without_cudnn


def inputs_and_targets(batch: object) -> tuple[Any, Any]:
    """Return the inputs and targets of a batch, for losses that are plain functions.

    Raises:
        InputError: if the batch is not such a pair.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    kind = (
        f"{type(batch).__name__} of {len(batch)}"
        if hasattr(batch, "__len__")
        else type(batch).__name__
    )
    raise InputError(
        f"a batch is a {kind}, not (inputs, targets). Use Loss(call=fn), called as fn(model, "
        "batch)."
    )


def shown(value: object) -> str:
    """Describe a value in a few words: a tensor by type and shape, a dict by its keys.

    >>> shown(torch.zeros(2, 3)), shown({"logits": 0}), shown(0.5)
    ('a float32 tensor of shape [2, 3]', "a dict with 'logits'", 'a float')
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return (
            f"{'an' if dtype[0] in 'aiou' and dtype != 'uint8' else 'a'} {dtype} tensor of shape "
            f"{list(value.shape)}"
        )
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {few([*map(repr, value)])}"
    return f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def entries_of(stated: str, returned: object, entry: str | None) -> tuple[str, ...]:
    """Return the names of the entries of a dict of losses.

    Args:
        stated: name of the loss in the task.
        returned: what the loss returned.
        entry: entry that must exist; None for any.

    Raises:
        InputError: if it is not a valid dict, or lacks the entry.
    """
    if not isinstance(returned, Mapping):
        raise InputError(
            f"there is no loss {f'{stated}/{entry}'!r}: loss {stated!r} returned "
            f"{shown(returned)}, not a dict with an entry {entry!r}."
        )
    wrong = [key for key in returned if not isinstance(key, str) or not key]
    if wrong or not returned:
        what = f"a dict with the key {wrong[0]!r}" if wrong else "an empty dict"
        raise InputError(
            f"loss {stated!r} returned {what}. Give every loss in it a name: {{'boxes': …, "
            f"'classes': …}}."
        )
    if entry is not None and entry not in returned:
        raise InputError(
            f"loss {stated!r} returned no entry {entry!r}; it has "
            f"{few([*map(repr, sorted(returned))])}."
        )
    return tuple(returned)


def checked_values(where: str, values: object) -> Tensor:
    """Check that a loss returned one floating-point number per element.

    Args:
        where: name of the loss and its split, for messages.
        values: what the loss's function returned, without weights.

    Raises:
        InputError: if it did not.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise InputError(
            f"{where} returned {shown(values)}, not a tensor of floating-point "
            "values." + _as_a_tensor(values)
        )
    if values.dim() == 0:
        raise InputError(
            f"{where} returned a scalar; one value per element is needed, so that every example "
            "counts once. Leave the mean out (reduction='none'), or use Loss(call=fn) and return "
            "(values, weights)."
        )
    return values


def checked_weights(where: str, values: Tensor, weights: object) -> Tensor:
    """Check that a loss returned one constant weight per element.

    Args:
        where: name of the loss and its split, for messages.
        values: values of the loss.
        weights: what the loss returned as weights.

    Raises:
        InputError: if it did not.
    """
    if not isinstance(weights, Tensor) or weights.shape != values.shape:
        shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise InputError(
            f"{where} returned values of shape {list(values.shape)} and weights {shape}; they must "
            "agree."
        )
    if weights.requires_grad:
        raise InputError(
            f"{where} returned weights that depend on the model, but no gradient is computed "
            "through weights. Compute them from the batch only, or multiply the values by them."
        )
    return weights


def refuse_broadcast(name: str, values: Tensor, outputs: object, targets: object) -> None:
    """Check that a loss's outputs and targets were not broadcast against each other.

    Args:
        name: name of the loss.
        values: values of the loss.
        outputs: outputs of the model.
        targets: targets of the batch.

    Raises:
        InputError: if they were.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if values.numel() > max(outputs.numel(), targets.numel()):
        raise InputError(
            f"loss {name!r} gives values of shape {list(values.shape)} for outputs "
            f"{list(outputs.shape)} and targets {list(targets.shape)}: they were broadcast against "
            "each other. Make their shapes agree."
        )


def value_of_term(name: str, loss: Loss, model: nn.Module) -> Tensor:
    """Return the value of a loss that is a term of the parameters, (1,).

    Args:
        name: name of the loss.
        loss: the loss.
        model: the model.

    Raises:
        InputError: if the term is not a tensor of one floating-point number.
    """
    if loss.l2 is not None:
        squares = [parameter.double().square().sum() for parameter in model.parameters()]
        return 0.5 * loss.l2 * torch.stack(squares).sum().reshape(1)
    assert loss.term is not None
    value = loss.term(model)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != 1:
        kind = (
            f"a tensor of shape {list(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise InputError(
            f"the term of loss {name!r} returned {kind}, not a tensor of one floating-point number."
        )
    return value.reshape(1)


def way_out(loss: Loss, error: Exception, called: Mapping[str, object]) -> str:
    """Suggest how to fix an error of the model or of a loss's function, if the call shows it; else
    "".

    Args:
        loss: the loss whose function was called.
        error: the error.
        called: what was passed so far: the inputs to the model, then outputs and targets to the
            function.
    """
    advice = without_cudnn(error)
    if advice:
        return advice
    if "outputs" in called:
        name = getattr(loss.fn, "__name__", type(loss.fn).__name__)
        name = "fn" if name in ("partial", "<lambda>") else name
        return (
            f". It was called as {name}(outputs, targets), where outputs, what the model returned, "
            f"is {shown(called['outputs'])}, and targets, the second part of a batch, is "
            f"{shown(called['targets'])}. If the function takes them in another order or form, write "
            f"Loss(lambda outputs, targets: {name}(targets, outputs)); if it takes other arguments, "
            "write Loss(call=fn), called as fn(model, batch)."
        )
    if "inputs" in called:
        return (
            ". The model was called as model(inputs), where inputs, the first part of a batch, is "
            f"{shown(called['inputs'])}. If the model takes other arguments, call it in "
            "Loss(call=fn), fn(model, batch)."
        )
    if loss.fn is not None and isinstance(error, TypeError):
        return (
            ". If the loss or the model takes other arguments, write Loss(call=fn), called as "
            "fn(model, batch)."
        )
    if loss.call is not None and isinstance(error, TypeError | AttributeError):
        return (
            ". Loss(call=fn) is called as fn(model, batch); for a function of outputs and targets, "
            "write Loss(fn)."
        )
    return ""


def _as_a_tensor(values: object) -> str:
    """Suggest how to fix a loss that returns a plain number."""
    if isinstance(values, Number) and not isinstance(values, bool):
        return (
            " A number has lost its gradient: return the tensor itself, without .item() or "
            "float(), one value per element."
        )
    return ""
