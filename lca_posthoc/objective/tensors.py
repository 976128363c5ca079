"""The table of a model's tensors: which are allocated, which are only loaded, along which axis their units run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import InputError
from ..trajectory import TensorSpec, is_statistic, normalise

_ON_AXIS_1 = {"ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Conv1D"}


def tensor_table(
    model: nn.Module, norm_stats: str, fixed: Sequence[str] = (), held: Collection[str] | None = None
) -> list[TensorSpec]:
    """The model's tensors in its own order: parameters once each with their aliases, then persistent buffers.

    Floating buffers are allocated as tensors of kind "buffer", but for running statistics in `batch` mode, which the loss
    does not depend on. All else that is stored is "state". Tensors that match a pattern of `fixed` are left out, and so are
    frozen parameters that none of the names `held` in the checkpoints stands for.

    Raises:
        InputError: where a parameter is complex.
    """
    stored = model.state_dict(keep_vars=True)
    by_id: dict[int, list[str]] = {}
    for name, tensor in stored.items():
        by_id.setdefault(id(tensor), []).append(name)
    parameters, owners = dict(model.named_parameters()), _owners(model)
    table = []
    for name, tensor in [*parameters.items(), *model.named_buffers()]:
        if is_fixed(name, fixed):
            continue
        if id(tensor) not in by_id:
            continue  # a non-persistent buffer: the model builds it, checkpoints do not hold it
        aliases = tuple(alias for alias in by_id[id(tensor)] if alias != name)
        frozen = name in parameters and not tensor.requires_grad
        if frozen and held is not None and not any(normalise(each) in held for each in (name, *aliases)):
            continue
        if name in parameters and tensor.is_complex():
            raise InputError(
                f"parameter {name!r} is complex, and a loss's change is allocated to real numbers. Keep it as a real tensor of shape "
                f"{[*tensor.shape, 2]} (torch.view_as_real) and call torch.view_as_complex in forward; or freeze it by Task(fixed=[…])."
            )
        kind = "parameter" if name in parameters else "buffer"
        if not tensor.is_floating_point() or (norm_stats == "batch" and is_statistic(name)):
            kind = "state"
        table.append(TensorSpec(name, kind, tuple(tensor.shape), aliases, _unit_axis(owners[name], tensor.dim())))
    return table


def is_fixed(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor stays as the model builds it."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _owners(model: nn.Module) -> dict[str, frozenset[str]]:
    """Tensor name → the names of the classes of the module that holds it."""
    return {
        f"{prefix}.{name}" if prefix else name: frozenset(kind.__name__ for kind in type(module).__mro__)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for held in (module.named_parameters, module.named_buffers)
        for name, _ in held(recurse=False, remove_duplicate=False)
    }


def _unit_axis(owner: frozenset[str], dims: int) -> int | None:
    """Output neurons and channels run along axis 0, but along axis 1 of transposed convolutions and Conv1D."""
    if dims == 0:
        return None
    return 1 if dims > 1 and owner & _ON_AXIS_1 else 0
