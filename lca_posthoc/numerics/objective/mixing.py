"""Compare the loss of a few examples in a batch with that of each alone: contributions of single
examples are meaningless if the model or the loss mixes examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ...errors import InputError
from .containers import fresh, tensors_of
from .evaluate import COMPARED, Objective
from .tap_check import tolerance_of


def refuse_mixed(objective: Objective, name: str) -> None:
    """Reject a loss per example that is not the weighted mean of its examples' losses alone, at the
    point in the module.

    Args:
        objective: the objective.
        name: name of the loss.

    Raises:
        InputError: if examples are mixed; the message names the module that mixes them, if one
            does.
    """
    split = objective.splits[str(objective.losses[name].split)]
    positions = split.spread(min(COMPARED, split.examples))
    if objective.norm_stats == "batch":
        raise InputError(
            f"loss {name!r} is per example, which has no meaning with --norm-stats batch: there "
            "the loss of an example depends on the others in its batch. Use --norm-stats running, "
            "or recalibrated."
        )
    if positions is None:
        raise InputError(
            f"loss {name!r} is per example, but split {split.name!r} can only be read in its own "
            "order, so that the loss of an example alone cannot be checked. Give a map-style "
            "Dataset."
        )
    alone = [split.at(positions[place : place + 1]) for place in range(len(positions))]
    sums = torch.stack([_sums(objective, name, data) for data in alone])
    try:
        batch = split.at(positions)
    except InputError:  # examples of different shapes do not form a batch
        return
    together = _sums(objective, name, batch)
    if not torch.equal(together, _sums(objective, name, batch)):
        return  # it is random, which raises an error later
    tolerance = tolerance_of(objective.dtype) * sums.abs().sum(0)
    if bool(((together - sums.sum(0)).abs() <= tolerance).all()):
        return
    module = _first_that_differs(objective, name, batch, alone)
    culprit = f" Module {module!r} is the first whose output does." if module else ""
    raise InputError(
        f"loss {name!r} is per example, but the loss of {len(alone)} examples depends on "
        f"whether they are in one batch: Σ is {float(together[0]):.6g} there and "
        f"{float(sums[:, 0].sum()):.6g} one at a time.{culprit} Leave per out, or give a loss that "
        "is a mean over examples."
    )


def _sums(objective: Objective, name: str, data: object) -> Tensor:
    """Return Σ values and Σ weights of a batch, (2,) float64."""
    with objective.mode():
        values, weights = objective.values(name, fresh(data))
    count = values.numel() if weights is None else weights.double().sum()
    total = float(values.detach().double().sum())
    return torch.tensor([total, float(count)], dtype=torch.float64, device="cpu")


def _first_that_differs(
    objective: Objective, name: str, batch: object, alone: Sequence[object]
) -> str | None:
    """Return the name of the first module whose output for an example, along its first axis,
    differs between a batch and the example alone.
    """
    together = _outputs(objective, name, batch)
    singles = [_outputs(objective, name, data) for data in alone]
    tolerance = tolerance_of(objective.dtype)
    for module, output in together.items():
        if not len(output) or len(output) % len(alone):
            continue
        parts = torch.tensor_split(output, len(alone))
        for part, single in zip(parts, singles, strict=True):
            own = single.get(module)
            if own is None or own.shape != part.shape:
                continue
            if not float((part - own).abs().sum()) <= tolerance * float(own.abs().sum()):
                return module
    return None


def _outputs(objective: Objective, name: str, data: object) -> dict[str, Tensor]:
    """Return the first output of every module without children, in the order of the calls."""
    outputs: dict[str, Tensor] = {}

    def watch(module: str) -> Callable[[nn.Module, object, object], None]:
        def record(_: nn.Module, inputs: object, output: object) -> None:
            for tensor in _floating(output):
                outputs.setdefault(module, tensor.detach().double().clone())

        return record

    leaves = {
        module: part
        for module, part in objective.model.named_modules()
        if not any(True for _ in part.children())
    }
    hooks = [part.register_forward_hook(watch(module)) for module, part in leaves.items()]
    try:
        _sums(objective, name, data)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _floating(output: object) -> Iterator[Tensor]:
    return (tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.dim())
